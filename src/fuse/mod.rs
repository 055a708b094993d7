//! The adapter: fuser ↔ [`crate::fs::trees`]. The only module that knows fuser.
//!
//! Methods translate and never decide. Invariants:
//! - An event thread never waits for the network or a disk. A request's future is polled once where it arrived; what is
//!   not ready then moves with its reply to the runtime. See `disk` for the bytes of objects.
//! - Every request is answered once. A reply that is dropped, by a panic or a runtime that has shut down, answers EIO
//!   (fuser sees to that), and a panic is caught here, so that it ends one request and not the event loop.
//! - A read is answered in full or with an error: a short reply before the end would shrink the file in the kernel.
//! - An inode is open in one mode at a time: see `open_modes`. Whether files pass through at all: `passthrough`.
//! - Errors are logged here, with operation, path and causes, and no cause more than once a minute: see `told`. ENOENT, ENODATA and EOPNOTSUPP are answers, not errors.
//!
//! Who may enter is for the kernel to say (`default_permissions`, `allow_other`); fuser's own check stays off.

mod disk;
mod open_modes;
mod passthrough;
mod requests;
mod told;

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use futures_util::FutureExt as _;
use tokio::runtime::Handle;

use crate::fs::trees::{Kernel, Trees};
use crate::fs::ways::Ways;
use crate::fs::{Fs, FsError, Ino};
use passthrough::Files;
use told::Told;

/// Threads that take requests from the kernel. They only translate and copy, and more of them measured as noise.
const EVENT_THREADS: usize = 2;

/// A FUSE connection whose handshake is done.
pub struct Session(fuser::Session<Adapter>);

/// How a session came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The file system was unmounted and nothing holds it any more.
    Unmounted,
    /// The connection was aborted under the mount: what is mounted, if anything still is, is dead.
    Aborted,
}

impl Session {
    /// Takes the FUSE device of a mount that was just made, and agrees with the kernel on how to speak.
    ///
    /// Reads the kernel's first request, so it belongs on a thread that may wait.
    pub fn handshake(trees: Arc<Trees>, runtime: Handle, device: OwnedFd) -> io::Result<Self> {
        let mut config = fuser::Config::default();
        config.n_threads = Some(EVENT_THREADS);
        let (fs, ways) = (trees.now().fs().clone(), trees.ways());
        let disk = disk::Disk::new(runtime.clone(), Arc::clone(fs.memory().replies()));
        let ours = device.as_fd().try_clone_to_owned()?;
        let sample = sample(&fs);
        let files = Arc::new(Files::new(ways.clone()));
        let adapter =
            Adapter { trees: trees.clone(), ways: ways.clone(), runtime, disk, files, sample: sample.clone() };
        // fuser would mount and unmount by itself too, but its check before unmounting is inverted and can remove
        // somebody else's file system; a session on a descriptor never unmounts.
        let session = fuser::Session::from_fd(adapter, device, fuser::SessionACL::All, config)?;
        if let Some(sample) = sample.filter(|_| ways.may_pass()) {
            passthrough::probe(&ours, &sample).unwrap_or_else(|why| ways.note_no_passthrough(why));
        }
        trees.attach(Box::new(Line(session.notifier())));
        Ok(Self(session))
    }

    /// Serves requests until the connection ends.
    pub fn run(self) -> io::Result<Ended> {
        match self.0.run() {
            Ok(()) => Ok(Ended::Unmounted),
            Err(cause) if cause.raw_os_error() == Some(rustix::io::Errno::CONNABORTED.raw_os_error()) => {
                Ok(Ended::Aborted)
            }
            Err(cause) => Err(cause),
        }
    }
}

/// A file of the cache, where files of it may pass through.
fn sample(fs: &Fs) -> Option<Arc<File>> {
    if !fs.ways().may_pass() {
        return None;
    }
    let opened = fs.sample().map(Arc::new);
    opened.inspect_err(|error| fs.ways().note_no_passthrough(format!("the cache can't be opened: {error}"))).ok()
}

/// What we tell the kernel unasked.
#[derive(Debug)]
struct Line(fuser::Notifier);

impl Kernel for Line {
    fn forget_name(&self, directory: Ino, name: &[u8]) {
        // It may know nothing of the name, which is an error too.
        let _ = self.0.inval_entry(fuser::INodeNo(directory.0), OsStr::from_bytes(name));
    }

    fn forget_attributes(&self, node: Ino) {
        // A negative offset spares what is cached of its content.
        let _ = self.0.inval_inode(fuser::INodeNo(node.0), -1, 0);
    }
}

struct Adapter {
    trees: Arc<Trees>,
    ways: Arc<Ways>,
    runtime: Handle,
    disk: Arc<disk::Disk>,
    files: Arc<Files>,
    /// A file of the cache, where files of it may pass through.
    sample: Option<Arc<File>>,
}

impl Adapter {
    /// Answers a request: now if its work is ready, else from the runtime.
    fn answer<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl Future<Output = T> + Send + 'static,
        reply: impl FnOnce(T) + Send + 'static,
    ) {
        guard(operation, || {
            // Timers and channels of tokio need its context even for a first poll.
            let _context = self.runtime.enter();
            let mut work = Box::pin(work);
            match work.as_mut().now_or_never() {
                Some(result) => reply(result),
                // A panic in a task stays in the task and drops the reply with it.
                None => drop(self.runtime.spawn(async move { reply(work.await) })),
            }
        });
    }
}

/// Runs one callback; a panic in it must not end the event loop. The reply it held has then answered EIO.
fn guard(operation: &'static str, callback: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(callback)).is_err() {
        tracing::error!(
            operation,
            "a bug in kitfs: the operation panicked and was answered with EIO; please report it"
        );
    }
}

/// What was logged; a process serves one mount.
static TOLD: LazyLock<Told> = LazyLock::new(Told::new);

/// Logs why a request failed and says what the kernel is told. `name` is a name in the node, or empty.
fn refusal(fs: &Trees, operation: &'static str, node: u64, name: &[u8], error: &FsError) -> fuser::Errno {
    use rustix::io::Errno;
    let errno = error.errno();
    let is_answer = matches!(errno, Errno::NOENT | Errno::NODATA | Errno::OPNOTSUPP);
    // There may be one for each file of a kit: nothing is put into words that nobody reads.
    if !is_answer || tracing::enabled!(tracing::Level::TRACE) {
        let mut path = fs.path(Ino(node)).map_or_else(|| format!("inode {node}"), |path| path.to_string());
        if !name.is_empty() {
            path = format!("{path}/{}", String::from_utf8_lossy(name));
        }
        let reason = crate::report::chain(error);
        // Only what could not be had fails again and again without a fault of who asks.
        let due = if matches!(error, FsError::Fetch(_)) { TOLD.due(&reason, Instant::now()) } else { Some(0) };
        match due {
            _ if is_answer => tracing::trace!(operation, path, %errno, "{reason}"),
            None => tracing::debug!(operation, path, %errno, "{reason}"),
            Some(0) => tracing::error!(operation, path, %errno, "{reason}"),
            Some(times) => {
                tracing::error!(operation, path, %errno, "{reason} (and {times} times more since this was last told)");
            }
        }
    }
    fuser::Errno::from_i32(errno.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_in_a_callback_ends_there() {
        let mut ran = false;
        guard("test", || {
            ran = true;
            panic!("the callback's panic");
        });
        assert!(ran);
    }
}
