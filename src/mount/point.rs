//! The directory to mount on.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::state::{Condition, StateDir};
use super::{MountError, kernel, mountinfo};

/// A directory that is fit to mount on. If it was made for that, it goes when this does.
#[derive(Debug)]
pub struct MountPoint {
    dir: PathBuf,
    created: bool,
    /// The directory, locked until something is mounted on it: of several that want it at once, one gets it.
    lock: Option<File>,
}

impl MountPoint {
    /// Checks `dir`, and creates it if it is missing. A mount of ours whose daemon has died there is cleared first.
    pub fn prepare(dir: &Path, state: &StateDir) -> Result<Self, MountError> {
        let dir = locate(dir)?;
        if dir.to_str().is_none() {
            return Err(MountError::NotUtf8 { dir });
        }
        if let Some(entry) = mountinfo::top_at(&dir)?.filter(mountinfo::Entry::is_kitfs) {
            let recorded = state.find(&entry)?;
            let Some(dead) = recorded.filter(|mount| mount.condition == Condition::Dead) else {
                return Err(MountError::AlreadyMounted { dir, shows: entry.shows });
            };
            tracing::warn!(dir = %dir.display(), shows = entry.shows, "clearing a mount whose daemon has died");
            kernel::unmount(&entry, true)?;
            state.forget(&dead.record);
            // The directory that the dead mount had made is this one's to remove.
            let mut point = Self::claim(dir)?;
            point.created |= dead.record.created_dir;
            return Ok(point);
        }
        Self::claim(dir)
    }

    fn claim(dir: PathBuf) -> Result<Self, MountError> {
        let created = match fs::create_dir(&dir) {
            Ok(()) => true,
            Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => false,
            Err(cause) => return Err(MountError::disk("create", dir, cause)),
        };
        let mut entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(cause) if cause.kind() == io::ErrorKind::NotADirectory => {
                return Err(MountError::NotADirectory { dir });
            }
            Err(cause) => return Err(MountError::disk("read", dir, cause)),
        };
        if entries.next().is_some() {
            return Err(MountError::NotEmpty { dir });
        }
        Self { dir, created, lock: None }.locked()
    }

    /// Takes the lock, and looks once more: somebody may have mounted since the first look, and let it go.
    fn locked(mut self) -> Result<Self, MountError> {
        let lock = File::open(&self.dir).map_err(|cause| MountError::disk("open", &self.dir, cause))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(MountError::InUse { dir: self.dir.clone() }),
            Err(cause) => return Err(MountError::disk("lock", &self.dir, cause)),
        }
        if let Some(entry) = mountinfo::top_at(&self.dir)?.filter(mountinfo::Entry::is_kitfs) {
            return Err(MountError::AlreadyMounted { dir: self.dir.clone(), shows: entry.shows });
        }
        self.lock = Some(lock);
        Ok(self)
    }

    /// Something is mounted on it now.
    pub(super) fn unlock(&mut self) {
        self.lock = None;
    }

    /// Its absolute path, without symbolic links.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether it was made for this mount.
    pub fn was_created(&self) -> bool {
        self.created
    }
}

impl Drop for MountPoint {
    fn drop(&mut self) {
        if self.created
            && let Err(cause) = fs::remove_dir(&self.dir)
        {
            tracing::debug!(dir = %self.dir.display(), %cause, "the mount point stays");
        }
    }
}

/// The absolute path of `dir` without symbolic links, found without asking a file system that is mounted *on* it, as
/// that one may be dead.
pub fn locate(dir: &Path) -> Result<PathBuf, MountError> {
    let dir = std::path::absolute(dir).map_err(|cause| MountError::disk("find", dir, cause))?;
    let canonical = |path: &Path| fs::canonicalize(path).map_err(|cause| (path.to_owned(), cause));
    let resolved = match (dir.parent(), dir.file_name()) {
        (Some(parent), Some(name)) => canonical(parent).map(|parent| parent.join(name)),
        _ => canonical(&dir),
    };
    let path = resolved.map_err(|(parent, cause)| match cause.kind() {
        io::ErrorKind::NotFound => MountError::NoParent { dir: dir.clone(), parent },
        _ => MountError::disk("find", parent, cause),
    })?;
    if mountinfo::top_at(&path)?.is_some() {
        return Ok(path);
    }
    match fs::canonicalize(&path) {
        Ok(path) => Ok(path),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(path),
        Err(cause) => Err(MountError::disk("find", path, cause)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(dir: &tempfile::TempDir) -> StateDir {
        StateDir::at(dir.path().join("state")).expect("state")
    }

    #[test]
    fn a_missing_directory_is_made_and_goes_again() {
        let temp = tempfile::tempdir().expect("dir");
        let dir = temp.path().join("kit");
        let point = MountPoint::prepare(&dir, &state(&temp)).expect("point");
        assert!(point.was_created() && dir.is_dir());
        drop(point);
        assert!(!dir.exists());
    }

    #[test]
    fn an_empty_directory_stays() {
        let temp = tempfile::tempdir().expect("dir");
        let dir = temp.path().join("kit");
        fs::create_dir(&dir).expect("create");
        let point = MountPoint::prepare(&dir, &state(&temp)).expect("point");
        assert!(!point.was_created());
        drop(point);
        assert!(dir.is_dir());
    }

    #[test]
    fn of_two_that_want_a_directory_one_gets_it() {
        let temp = tempfile::tempdir().expect("dir");
        let dir = temp.path().join("kit");
        let mut first = MountPoint::prepare(&dir, &state(&temp)).expect("point");
        assert!(matches!(MountPoint::prepare(&dir, &state(&temp)), Err(MountError::InUse { .. })));
        assert!(dir.is_dir(), "it is the first one's to remove");
        first.unlock();
        MountPoint::prepare(&dir, &state(&temp)).expect("point");
    }

    #[test]
    fn a_full_directory_a_file_and_a_missing_parent_are_refused() {
        let temp = tempfile::tempdir().expect("dir");
        let state = state(&temp);
        fs::write(temp.path().join("file"), "x").expect("write");
        let prepare = |path: &Path| MountPoint::prepare(path, &state).map(|point| point.was_created());
        assert!(matches!(prepare(temp.path()), Err(MountError::NotEmpty { .. })));
        assert!(matches!(prepare(&temp.path().join("file")), Err(MountError::NotADirectory { .. })));
        assert!(matches!(prepare(&temp.path().join("a/b")), Err(MountError::NoParent { .. })));
        assert!(temp.path().join("file").is_file());
    }

    #[test]
    fn a_link_to_a_directory_is_followed() {
        let temp = tempfile::tempdir().expect("dir");
        let real = temp.path().join("real");
        fs::create_dir(&real).expect("create");
        std::os::unix::fs::symlink(&real, temp.path().join("link")).expect("link");
        let found = locate(&temp.path().join("link")).expect("locate");
        assert_eq!(found, fs::canonicalize(real).expect("canonical"));
    }
}
