//! Whether files can pass through to the kernel here, and which; how an open is answered.
//!
//! The kernel must know how (since Linux 6.9), we must be allowed to (CAP_SYS_ADMIN, outside of user namespaces), and the
//! file's disk must be able to do what a reader may ask for: who opens a handle with O_DIRECT where the disk knows none
//! would get an EIO, after others were passed through. All of it is tried before the first open, so that `status` can tell.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::sync::{Arc, Mutex};

use fuser::{BackingId, FileHandle, FopenFlags, INodeNo, InitFlags, KernelConfig, ReplyOpen};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::open_modes::OpenModes;
use crate::cache::Object;
use crate::fs::ways::{Way, Ways};
use crate::fs::{Opened, Via};

/// The type of an overlay file system, as `statfs` tells it.
const OVERLAYFS: u64 = 0x794c_7630;

/// Asks for it while the connection is made. `sample` is a file of the cache.
pub(super) fn negotiate(config: &mut KernelConfig, sample: &File) -> Result<(), String> {
    config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).map_err(|_| {
        "this kernel has no FUSE passthrough; Linux 6.9 and newer has, with CONFIG_FUSE_PASSTHROUGH".to_owned()
    })?;
    let kind = rustix::fs::fstatfs(sample).map(|found| found.f_type as u64);
    // On top of a mount of depth 2 no overlay can be mounted any more, so it is that only where it must be.
    let depth = if kind == Ok(OVERLAYFS) { 2 } else { 1 };
    config.set_max_stack_depth(depth).map(drop).map_err(|most| format!("the kernel stacks at most {most} file systems"))
}

/// Tries it, once the connection is made. What this registers stays so until the connection ends: one file.
pub(super) fn probe(device: impl AsFd, sample: &File) -> Result<(), String> {
    if !knows_o_direct(sample) {
        return Err(no_o_direct("the cache"));
    }
    BackingId::create_raw(device, sample).map(drop).map_err(|error| refusal(&error, "the cache"))
}

fn no_o_direct(cache: &str) -> String {
    format!("the disk of {cache} knows no O_DIRECT, which readers may want")
}

/// Why the kernel does not take a file of a cache.
fn refusal(error: &io::Error, cache: &str) -> String {
    match Errno::from_io_error(error) {
        Some(Errno::PERM) => "the kernel lets only root pass files through (CAP_SYS_ADMIN), not this user".to_owned(),
        Some(Errno::LOOP) => format!("{cache} is on a stack of file systems that is too high for it"),
        _ => format!("the kernel refused a file of {cache}: {error}"),
    }
}

fn knows_o_direct(file: &File) -> bool {
    let direct = OFlags::DIRECT.bits().cast_signed();
    let again = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new().read(true).custom_flags(direct).open(again).is_ok()
}

/// The files that are open, and what they are read from.
#[derive(Debug)]
pub(super) struct Files {
    ways: Arc<Ways>,
    modes: OpenModes<BackingId>,
    disks: Disks,
}

impl Files {
    pub(super) fn new(ways: Arc<Ways>) -> Self {
        Self { ways, modes: OpenModes::default(), disks: Disks::default() }
    }

    /// Answers an open: in the way that was found for it, or in that of those who have the file open already.
    pub(super) fn open(&self, node: INodeNo, opened: &Opened, reply: ReplyOpen) {
        let ways = &self.ways;
        let object = match &opened.via {
            Via::Passthrough(object) if ways.may_pass() => {
                let fits = self.disks.fit(object.file());
                if !fits {
                    ways.note_not_all(|| no_o_direct(cache_of(object)));
                }
                fits.then_some(object)
            }
            _ => None,
        };
        // There is nothing to flush, ever.
        let mut flags = FopenFlags::FOPEN_NOFLUSH;
        let register = |reply: &ReplyOpen| self.register(reply, object?);
        self.modes.open(node.0, reply, register, |reply, backing| {
            let handle = FileHandle(opened.handle);
            if let Some(backing) = backing {
                ways.note_open(Way::Passthrough);
                return reply.opened_passthrough(handle, flags, backing);
            }
            let is_direct = matches!(opened.via, Via::Direct);
            ways.note_open(if is_direct { Way::Direct } else { Way::Cached });
            flags.set(FopenFlags::FOPEN_KEEP_CACHE, opened.keep_cache);
            flags.set(FopenFlags::FOPEN_DIRECT_IO, is_direct);
            reply.opened(handle, flags);
        });
    }

    /// Registers a file with the kernel; where that fails it is read by requests.
    fn register(&self, reply: &ReplyOpen, object: &Object) -> Option<BackingId> {
        let registered = reply.open_backing(object.file());
        let refused = |error: &io::Error| {
            match Errno::from_io_error(error) {
                Some(Errno::PERM) => self.ways.note_no_passthrough(refusal(error, "the cache")),
                _ => self.ways.note_not_all(|| refusal(error, cache_of(object))),
            }
            tracing::debug!(%error, "a file is not passed through");
        };
        registered.inspect_err(refused).ok()
    }

    /// Notes that a handle was released.
    pub(super) fn release(&self, node: INodeNo) {
        self.modes.release(node.0);
    }
}

/// Where a file lies, for people.
fn cache_of(object: &Object) -> &'static str {
    if object.is_ours() { "the cache" } else { "a lower cache" }
}

/// The disks that files have been passed through from, and whether they know O_DIRECT: lower caches may lie on others.
#[derive(Debug, Default)]
struct Disks(Mutex<HashMap<u64, bool>>);

impl Disks {
    /// Whether a file can be read from its disk in all ways.
    fn fit(&self, file: &File) -> bool {
        let Ok(disk) = file.metadata().map(|found| found.dev()) else { return false };
        let known = self.0.lock().unwrap_or_else(|held| held.into_inner()).get(&disk).copied();
        known.unwrap_or_else(|| {
            let fits = knows_o_direct(file);
            self.0.lock().unwrap_or_else(|held| held.into_inner()).insert(disk, fits);
            fits
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_proc_knows_no_o_direct_and_does_not_pass() {
        let disks = Disks::default();
        let file = File::open("/proc/self/status").expect("opens");
        assert!(!disks.fit(&file) && !disks.fit(&file));
        let real = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).expect("a file");
        assert_eq!(disks.fit(&real), knows_o_direct(&real));
    }

    #[test]
    fn who_is_not_allowed_is_told_what_it_takes() {
        assert!(refusal(&io::Error::from(Errno::PERM), "the cache").contains("CAP_SYS_ADMIN"));
    }

    #[test]
    fn a_refusal_names_the_cache_that_it_is_about() {
        let why = refusal(&io::Error::from(Errno::LOOP), "a lower cache");
        assert_eq!(why, "a lower cache is on a stack of file systems that is too high for it");
    }
}
