//! A mount as a process: its directory, the kernel's mount, signals, the background, and what is remembered of it.
//!
//! - `point`: the directory to mount on; `kernel`: the mount itself; [`mountinfo`]: what is mounted.
//! - `state`: the records of this user's mounts; [`control`]: asking a daemon; [`daemon`]: becoming one.
//! - [`serve`] puts them together; [`unmount`] is the command's side of the end.
//!
//! Invariants:
//! - kitfs unmounts only a mount of type `fuse.kitfs`, and only while it is on top of its directory.
//! - A daemon leaves no dead mount: each guard undoes its step when it is dropped, in reverse order: record, mount,
//!   directory. SIGKILL alone leaves one, and the next mount there, or an unmount, clears it.
//! - SIGTERM, SIGINT and SIGHUP all mean to leave: a terminal that closes must not leave a dead mount either.

pub mod control;
pub mod daemon;
mod error;
pub mod holders;
mod kernel;
pub mod mountinfo;
mod point;
mod state;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tokio::net::UnixListener;
use tokio::runtime::Handle;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

pub use error::MountError;
pub use point::{MountPoint, locate};
pub use state::{Condition, Mount, Record, StateDir};

use crate::digest::Digest;
use crate::fs::trees::Trees;
use crate::fuse::{Ended, Session};
use kernel::Busy;

/// How long an unmounted session may take to end, and a daemon to clean up: both are a matter of milliseconds.
const END: Duration = Duration::from_secs(5);
/// The same after a lazy unmount, where the daemon may rightly stay for as long as something is open.
const LAZY_END: Duration = Duration::from_millis(500);

/// What to mount and how.
#[derive(Debug)]
pub struct Options {
    /// Where.
    pub point: MountPoint,
    /// The reference as it was typed.
    pub reference: String,
    /// The manifest's digest.
    pub digest: Digest,
    /// What the system's table of mounts shows as source: the reference with its digest.
    pub shows: String,
    /// Whether other users may enter.
    pub allow_other: bool,
    /// The cache, for the record.
    pub cache_dir: Option<PathBuf>,
    /// The daemon's log, for the record.
    pub log_file: Option<PathBuf>,
    /// Where to record the mount.
    pub state: StateDir,
}

/// Why a mount was no longer served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// Somebody unmounted it.
    Unmounted,
    /// Somebody aborted its connection; the dead mount was then detached.
    Aborted,
    /// A signal.
    Signal,
    /// A signal, while something was still open in it. That fails as soon as this process ends.
    SignalWhileBusy,
}

/// Mounts, calls `ready`, and serves until the mount is gone or a signal comes; then nothing of it is left.
///
/// `handler` answers requests on the control socket. After [`Left::SignalWhileBusy`] the session's threads still run,
/// and end with the process.
pub async fn serve<H, F>(
    trees: Arc<Trees>,
    options: Options,
    handler: H,
    ready: impl FnOnce(&Record),
) -> Result<Left, MountError>
where
    H: Fn(Value) -> F + Clone + Send + 'static,
    F: Future<Output = Value> + Send + 'static,
{
    // First of all: from here on no signal ends the process by itself.
    let mut signals = Signals::new()?;
    let Options { point, reference, digest, shows, allow_other, cache_dir, log_file, state } = options;

    let (device, mut mounted) = blocking(move || kernel::mount(point, &shows, allow_other)).await?;
    let dir = mounted.point().dir().to_owned();
    let runtime = Handle::current();
    let session = blocking({
        let (dir, trees) = (dir.clone(), trees.clone());
        move || Session::handshake(trees, runtime, device).map_err(|cause| MountError::Session { dir, cause })
    })
    .await?;
    // After the handshake, which sets it too.
    let ahead = kernel::raise_read_ahead(mounted.entry().device);
    trees.ways().note_read_ahead(ahead);
    let mut ended = run(session, &dir)?;

    let pid = std::process::id();
    let record = Record {
        id: state::new_id(),
        mount_point: dir.clone(),
        reference,
        digest,
        shows: mounted.entry().shows.clone(),
        serves: None,
        pid,
        pid_started: state::process_started(pid).unwrap_or(0),
        mount_id: mounted.entry().id,
        device: mounted.entry().device,
        started_at: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        log_file,
        cache_dir,
        created_dir: mounted.point().was_created(),
    };
    let mut registration = state.register(&record)?;
    let control = registration.take_listener().map(UnixListener::from_std).transpose();
    let control = control.map_err(|cause| MountError::disk("listen on", state.socket(&record), cause))?;
    // Who asks is answered by what knows the record.
    ready(&record);
    let _control = control.map(|listener| AbortOnDrop(tokio::spawn(control::serve(listener, handler))));

    let left = tokio::select! {
        outcome = &mut ended => match outcome.unwrap_or(Ok(Ended::Aborted)) {
            Ok(Ended::Unmounted) => {
                mounted.is_gone();
                Left::Unmounted
            }
            Ok(Ended::Aborted) => Left::Aborted,
            Err(cause) => return Err(MountError::Session { dir, cause }),
        },
        name = signals.recv() => {
            tracing::info!(signal = name, "leaving");
            let (outcome, back) = blocking(move || Ok((mounted.leave(), mounted))).await?;
            mounted = back;
            match outcome {
                Ok(Busy::No) => {
                    // So that nothing of the session outlives this function.
                    let _ = tokio::time::timeout(END, &mut ended).await;
                    Left::Signal
                }
                Ok(Busy::Yes) => Left::SignalWhileBusy,
                Err(error) => {
                    registration.keep();
                    return Err(error);
                }
            }
        }
    };
    // The directory goes before the record: who waits for the record to go finds everything done.
    let _ = blocking(move || {
        drop(mounted);
        Ok(())
    })
    .await;
    drop(registration);
    Ok(left)
}

/// Runs the session on a thread of its own, which ends with the mount.
fn run(session: Session, dir: &Path) -> Result<oneshot::Receiver<std::io::Result<Ended>>, MountError> {
    let (tell, ended) = oneshot::channel();
    thread::Builder::new()
        .name("fuse".to_owned())
        // Nobody listens any more when a signal has ended the mount.
        .spawn(move || drop(tell.send(session.run())))
        .map_err(|cause| MountError::Session { dir: dir.to_owned(), cause })?;
    Ok(ended)
}

/// What an unmount found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unmounted {
    /// The mount point.
    pub dir: PathBuf,
    /// What was mounted there.
    pub shows: String,
    /// What was recorded of it, where it is this user's.
    pub record: Option<Record>,
    /// Whether its daemon had died before.
    pub was_dead: bool,
    /// Whether its daemon has left too. After a lazy unmount it stays until the last open file is closed.
    pub ended: bool,
}

/// Unmounts the kit at `dir`, and waits for its daemon to clean up. `lazy` detaches a busy mount. May wait: belongs on
/// a thread that can.
pub fn unmount(dir: &Path, lazy: bool, state: &StateDir) -> Result<Unmounted, MountError> {
    let dir = match point::locate(dir) {
        Err(MountError::NoParent { dir, .. }) => return Err(MountError::NotMounted { dir }),
        outcome => outcome?,
    };
    let Some(entry) = mountinfo::top_at(&dir)? else { return Err(MountError::NotMounted { dir }) };
    if !entry.is_kitfs() {
        return Err(MountError::NotKitfs { dir, kind: entry.kind });
    }
    // A mount without a record is another user's, or another state directory's. Root may unmount it all the same.
    let recorded = state.find(&entry)?;
    let was_dead = recorded.as_ref().is_some_and(|mount| mount.condition == Condition::Dead);
    // What is open in a dead mount is of no use to anybody: it is never a reason to keep it.
    kernel::unmount(&entry, lazy || was_dead)?;
    let mut ended = true;
    let record = recorded.as_ref().map(|mount| mount.record.clone());
    let shows = recorded.as_ref().map_or_else(|| entry.shows.clone(), |mount| mount.record.serves().to_owned());
    match recorded {
        Some(mount) if was_dead => {
            if mount.record.created_dir {
                // Somebody may have put something there in the meantime, or removed it.
                let _ = std::fs::remove_dir(&dir);
            }
            state.forget(&mount.record);
        }
        Some(mount) => ended = has_ended(state, &mount.record, if lazy { LAZY_END } else { END })?,
        None => {}
    }
    Ok(Unmounted { dir, shows, record, was_dead, ended })
}

/// Waits a while for a daemon to remove its record, and to end: until then it may be writing to the cache.
fn has_ended(state: &StateDir, record: &Record, patience: Duration) -> Result<bool, MountError> {
    let deadline = Instant::now() + patience;
    let runs = || state::process_started(record.pid) == Some(record.pid_started);
    while state.list()?.iter().any(|mount| mount.record.id == record.id) || runs() {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(true)
}

/// Runs what may wait for the kernel or for another process on a thread for that.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, MountError> + Send + 'static,
) -> Result<T, MountError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(MountError::Interrupted))
}

struct Signals([(&'static str, Signal); 3]);

impl Signals {
    fn new() -> Result<Self, MountError> {
        let listen = |kind| signal(kind).map_err(|cause| MountError::disk("handle signals of", "/proc/self", cause));
        Ok(Self([
            ("SIGTERM", listen(SignalKind::terminate())?),
            ("SIGINT", listen(SignalKind::interrupt())?),
            ("SIGHUP", listen(SignalKind::hangup())?),
        ]))
    }

    async fn recv(&mut self) -> &'static str {
        let [terminate, interrupt, hangup] = &mut self.0;
        tokio::select! {
            _ = terminate.1.recv() => terminate.0,
            _ = interrupt.1.recv() => interrupt.0,
            _ = hangup.1.recv() => hangup.0,
        }
    }
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
