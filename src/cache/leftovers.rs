//! What killed processes left, and what was set aside: space that nothing uses and `cache gc` gives back.
//!
//! - A temporary file (`*.tmp`) is locked while it is written, a link in the making (`*.new`) is a file that whoever makes
//!   it has open and locked: one whose lock is free is left over.
//! - A partial file whose object is here: the process that made it an object was killed before it removed the file.
//! - A chunk list without a partial file: its file became an object, was evicted, or was never begun. Whoever has just
//!   written one holds it in memory; the next one fetches it again, which is small.
//! - A staging directory without files whose lock is free. One with files is its key's next fill's to judge.
//! - Everything in quarantine.
//!
//! Whatever else is in the cache has a name that says what it is, and counts.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::files::{identity, lock_named, on_disk, open_file};
use super::staging::{LOCK, is_held, lock_dir, remove};
use super::usage::Area;
use super::{Cache, CacheError, io_error};

/// A file or directory that nothing uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// Where it is.
    pub path: PathBuf,
    /// How much of the disk it takes.
    pub bytes: u64,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Left over as long as nobody has it locked.
    Unlocked,
    /// A partial file whose object is here.
    Partial,
    List,
    Staging,
    SetAside,
}

impl Cache {
    /// What nothing uses.
    pub fn leftovers(&self) -> Result<Vec<Leftover>, CacheError> {
        let mut all = Vec::new();
        for (path, _) in entries(&self.root)? {
            all.extend(self.judge(path, Kind::Unlocked).filter(|left| is_temporary(&left.path)));
        }
        for area in Area::SPREAD {
            for (dir, kind) in entries(&self.root.join(area.dir()))? {
                if !kind.is_dir() {
                    continue;
                }
                for (path, _) in entries(&dir)? {
                    let kind = match path.extension().and_then(|extension| extension.to_str()) {
                        Some("tmp" | "new") => Kind::Unlocked,
                        Some("list") if area == Area::Partial => Kind::List,
                        None if area == Area::Partial => Kind::Partial,
                        _ => continue,
                    };
                    all.extend(self.judge(path, kind));
                }
            }
        }
        for (path, kind) in entries(&self.root.join(Area::Incoming.dir()))? {
            all.extend(self.judge(path, Kind::Staging).filter(|_| kind.is_dir()));
        }
        for (path, _) in entries(&self.root.join(Area::Quarantine.dir()))? {
            all.extend(self.judge(path, Kind::SetAside));
        }
        all.sort_unstable_by(|one, other| one.path.cmp(&other.path));
        Ok(all)
    }

    /// What is at a path, if nothing uses it.
    fn judge(&self, path: PathBuf, kind: Kind) -> Option<Leftover> {
        let found = fs::symlink_metadata(&path).ok()?;
        self.is_left(&path, kind).then(|| Leftover { path, bytes: on_disk(&found), kind })
    }

    fn is_left(&self, path: &Path, kind: Kind) -> bool {
        match kind {
            Kind::Unlocked => is_temporary(path) && lock(path).is_some(),
            Kind::Partial => {
                let object = self.object_beside(path);
                let (Ok(partial), Ok(object)) = (fs::symlink_metadata(path), fs::symlink_metadata(object)) else {
                    return false;
                };
                // The same file under two names loses one; another one may be in use.
                let is_same = identity(&partial) == identity(&object);
                is_same || (object.is_file() && object.len() == partial.len() && lock(path).is_some())
            }
            Kind::List => {
                let partial = path.with_extension("");
                fs::symlink_metadata(&partial).is_err() || self.is_left(&partial, Kind::Partial)
            }
            Kind::Staging => is_bare(path) && matches!(is_held(path), Ok(false)),
            Kind::SetAside => true,
        }
    }

    /// The object that a partial file becomes.
    fn object_beside(&self, partial: &Path) -> PathBuf {
        let name = partial.file_name().unwrap_or_default().to_string_lossy();
        self.spread("objects", &name)
    }

    /// Removes what nothing uses; `false` where something does by now.
    pub fn remove_leftover(&self, left: &Leftover) -> Result<bool, CacheError> {
        let path = &left.path;
        let outcome = match left.kind {
            Kind::Staging => {
                // Under its lock, as somebody may be about to fill it.
                let Some(_lock) = lock_dir(path)? else { return Ok(false) };
                if !is_bare(path) {
                    return Ok(false);
                }
                remove(path);
                return Ok(fs::symlink_metadata(path).is_err());
            }
            Kind::Unlocked => {
                let Some(_lock) = lock(path) else { return Ok(false) };
                fs::remove_file(path)
            }
            Kind::Partial | Kind::List if !self.is_left(path, left.kind) => return Ok(false),
            Kind::SetAside if fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()) => fs::remove_dir_all(path),
            Kind::Partial | Kind::List | Kind::SetAside => fs::remove_file(path),
        };
        match outcome {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(io_error("remove", path)(error)),
        }
    }
}

fn is_temporary(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "tmp" || extension == "new")
}

/// The lock of a file that nobody else has, as long as the path is still that file's.
fn lock(path: &Path) -> Option<File> {
    let file = open_file(path).ok()??;
    lock_named(file, path, FlockOperation::NonBlockingLockExclusive).ok()?.held()
}

/// Whether a staging directory has no files but maybe its lock.
fn is_bare(dir: &Path) -> bool {
    entries(dir).is_ok_and(|entries| entries.iter().all(|(path, _)| path.file_name().is_some_and(|name| name == LOCK)))
}

fn entries(dir: &Path) -> Result<Vec<(PathBuf, fs::FileType)>, CacheError> {
    let read = match fs::read_dir(dir) {
        // It went meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => read.map_err(io_error("read", dir))?,
    };
    let entries = read.map(|entry| entry.and_then(|entry| Ok((entry.path(), entry.file_type()?))));
    entries.collect::<io::Result<_>>().map_err(io_error("read", dir))
}

#[cfg(test)]
#[path = "leftovers_tests.rs"]
mod tests;
