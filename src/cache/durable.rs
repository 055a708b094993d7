//! Whether what was written has reached the disk.
//!
//! A sync of the file system, through a descriptor that was opened before the first write, tells whether a write of any
//! file was lost since. So the files of a group need no sync each, which costs a flush of the device each time: twenty
//! thousand small files took most of their time for it. Where the file system may not tell, or it told of a loss
//! once, each file is asked.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Mutex;

/// File systems that are known to tell of lost writes at a sync of all of them: ext4, XFS, Btrfs, and tmpfs, which loses
/// none. An overlay does not pass on what the one below it tells.
const TELLS: [u32; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994];
/// Since this version of Linux they do.
const SINCE: (u32, u32) = (5, 8);

/// The file system of a cache.
#[derive(Debug)]
pub(super) struct Durable {
    /// The cache's directory, since before it was written to; `None` where it could not be opened.
    root: Option<File>,
    /// Whether every loss is told at a sync of all, and there was none yet. A mutex, as one sync is told of a loss, and who
    /// syncs at the same time must know; held for the sync, by who makes things durable and no one else.
    tells: Mutex<bool>,
}

impl Durable {
    /// Belongs before the first write.
    pub(super) fn new(root: &Path) -> Self {
        let root = File::open(root).ok();
        let tells = root.as_ref().is_some_and(tells_of_losses);
        Self { root, tells: Mutex::new(tells) }
    }

    /// Syncs the file system. Tells whether every file that this process has written is on the disk as it was written;
    /// if not, each file has to be asked.
    pub(super) fn sync(&self) -> io::Result<bool> {
        let Some(root) = &self.root else { return Ok(false) };
        let mut tells = self.tells.lock().unwrap_or_else(|held| held.into_inner());
        let synced = rustix::fs::syncfs(root);
        *tells &= synced.is_ok();
        Ok(synced.map(|()| *tells)?)
    }
}

fn tells_of_losses(root: &File) -> bool {
    let kernel = rustix::system::uname();
    // As wide as a machine word, and signed on some of them.
    let kind = rustix::fs::fstatfs(root).map(|found| found.f_type as u32);
    kind.is_ok_and(|kind| TELLS.contains(&kind)) && kernel.release().to_str().is_ok_and(is_since)
}

/// Whether a kernel's release, such as `6.1.0-32-amd64`, is one that tells.
fn is_since(release: &str) -> bool {
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    matches!((parts.next(), parts.next()), (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= SINCE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_tell_of_lost_writes_are_known_by_their_release() {
        for release in ["5.8.0", "5.10.0-32-amd64", "6.1", "10.0.1"] {
            assert!(is_since(release), "{release}");
        }
        for release in ["5.7.19", "4.19.0-27-amd64", "5", "", "custom"] {
            assert!(!is_since(release), "{release}");
        }
    }

    #[test]
    fn a_file_system_that_may_not_tell_is_synced_and_each_file_is_asked() {
        let proc = Durable::new(Path::new("/proc"));
        assert!(!proc.sync().expect("nothing to sync"));
        let gone = Durable::new(Path::new("/nonexistent"));
        assert!(!gone.sync().expect("nothing to sync"));
    }

    #[test]
    fn who_was_told_of_a_loss_asks_each_file_from_then_on() {
        let dir = tempfile::tempdir().expect("a directory");
        let durable = Durable::new(dir.path());
        let tells = durable.sync().expect("syncs");
        assert_eq!(tells, *durable.tells.lock().expect("not poisoned"));
        *durable.tells.lock().expect("not poisoned") = false;
        assert!(!durable.sync().expect("syncs"));
    }
}
