//! Files on their way into the cache: `incoming/<key>/<number>`, unverified until a digest holds: that of the layer that
//! they were cut from, or, of a blob too long to hold in memory ([`super::NewBlob`]), the blob's own.
//!
//! The way of a fill: [`Cache::stage`] locks a directory, [`Staging::create`] makes a file for each entry,
//! [`Staging::seal`] takes the proof and makes the files readable as objects where they lie, and [`Sealed::commit`]
//! syncs the file system, renames each file to its object name and writes the index last. A staging that is dropped
//! before it was sealed removes its directory; one that a killed process left is removed by who next gets its lock.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, OFlags, RenameFlags, flock};

use super::files::{make_dir, new_file, rename_over};
use super::limit::Room;
use super::objects::is_file_of;
use super::{Cache, CacheError, Removed, io_error};
use crate::digest::{Digest, Proof};
use crate::object::ObjectDigest;

/// The file in a staging directory that carries the lock.
pub(super) const LOCK: &str = "lock";

/// Marks a directory whose files are objects already and wait for the disk.
const SEALED: &str = "sealed";

/// How far a fill is, as seen by another process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StagedState {
    /// Bytes staged so far.
    pub bytes: u64,
    /// Whether everything is staged and verified, and only the commit is to come.
    pub sealed: bool,
}

/// A locked directory under `incoming/`.
#[derive(Debug)]
pub struct Staging {
    dir: PathBuf,
    /// Held for its lock.
    _lock: File,
    next: u64,
    /// Told when the disk is full.
    room: Arc<Room>,
}

/// One file being staged. Its bytes are unverified.
#[derive(Debug)]
pub struct StagedFile {
    /// Its number in the staging directory.
    number: u64,
    file: File,
    path: PathBuf,
}

impl StagedFile {
    /// Writes all of `bytes` at `offset`.
    pub fn write_at(&self, cache: &Cache, bytes: &[u8], offset: u64) -> Result<(), CacheError> {
        let _growth = cache.grow(&self.path, bytes.len() as u64)?;
        let written = self.file.write_all_at(bytes, offset).map_err(io_error("write", &self.path));
        written.map_err(|error| cache.room.noted(error))
    }

    /// Waits until its bytes are on the disk.
    pub(super) fn sync(&self) -> Result<(), CacheError> {
        self.file.sync_data().map_err(io_error("sync", &self.path))
    }

    /// Where it lies, for a reader who has agreed to unverified bytes (`--verify=stream`).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Closes the file, of which a layer may have millions; its number is what [`Staging::seal`] wants.
    pub fn close(self) -> StagedNumber {
        StagedNumber(self.number)
    }
}

/// A staged file that has been written and closed.
#[derive(Debug, Clone, Copy)]
pub struct StagedNumber(u64);

/// Staged files whose layer digest has held; readable as objects, not yet under their names.
#[derive(Debug)]
pub struct Sealed {
    staging: Staging,
    objects: Vec<(PathBuf, ObjectDigest)>,
}

impl Cache {
    /// Locks the staging directory of `key` and empties it; `None` while another process (or task) holds it.
    pub fn stage(&self, key: &Digest) -> Result<Option<Staging>, CacheError> {
        let staged = self.stage_in(&self.root.join("incoming").join(key.hex()));
        staged.map_err(|error| self.room.noted(error))
    }

    /// A staging directory that no other process looks for: used when the shared one is held by who makes no progress.
    pub fn stage_alone(&self, key: &Digest) -> Result<Option<Staging>, CacheError> {
        let serial = self.counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("{}.{}.{serial}", key.hex(), std::process::id());
        self.stage_in(&self.root.join("incoming").join(name)).map_err(|error| self.room.noted(error))
    }

    fn stage_in(&self, dir: &Path) -> Result<Option<Staging>, CacheError> {
        make_dir(dir)?;
        let Some(lock) = lock_dir(dir)? else { return Ok(None) };
        // Whatever lies here is a killed process's and proves nothing.
        for entry in fs::read_dir(dir).map_err(io_error("read", dir))? {
            let entry = entry.map_err(io_error("read", dir))?;
            if entry.file_name() != LOCK {
                fs::remove_file(entry.path()).map_err(io_error("remove", &entry.path()))?;
            }
        }
        Ok(Some(Staging { dir: dir.to_owned(), _lock: lock, next: 0, room: self.room.clone() }))
    }

    /// How far the fill of `key` is in whichever process: a sign of life for those who wait for it.
    pub fn staged(&self, key: &Digest) -> StagedState {
        let dir = self.root.join("incoming").join(key.hex());
        let sealed = dir.join(SEALED).exists();
        let entries = fs::read_dir(dir).into_iter().flatten();
        let sizes = entries.filter_map(|entry| Some(entry.ok()?.metadata().ok()?.len()));
        StagedState { bytes: sizes.sum(), sealed }
    }

    /// Removes staging directories that no process holds.
    pub(super) fn sweep_incoming(&self) {
        let Ok(entries) = fs::read_dir(self.root.join("incoming")) else { return };
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                // What can't be removed now is found again by the next sweep.
                let _ = remove_abandoned(&entry.path(), false);
            }
        }
    }
}

/// Removes a staging directory that no process holds; with `dry_run` it only tells whether it would.
pub(super) fn remove_abandoned(dir: &Path, dry_run: bool) -> Result<Removed, CacheError> {
    let Some(_lock) = lock_dir(dir)? else { return Ok(Removed::InUse) };
    if !dry_run {
        remove(dir);
    }
    Ok(Removed::Gone)
}

/// Removes a staging directory whose lock is held. The lock's file goes last: with it the directory is the next one's,
/// whose files must not go too. What can't be removed now is found again by the next sweep.
pub(super) fn remove(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name() != LOCK) {
        let _ = fs::remove_file(entry.path());
    }
    let _ = fs::remove_file(dir.join(LOCK));
    let _ = fs::remove_dir(dir);
}

/// Takes the lock of a staging directory without waiting. The directory may have been removed, and made anew, by its
/// last holder between open and lock: then the lock is on a file without a name and does not count.
pub(super) fn lock_dir(dir: &Path) -> Result<Option<File>, CacheError> {
    let path = dir.join(LOCK);
    let mut options = fs::OpenOptions::new();
    options.create(true).truncate(false).write(true).mode(0o600).custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
    let file = match options.open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("open", &path)(error)),
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => return Err(io_error("lock", &path)(io::Error::from(error))),
    }
    let held = file.metadata().map_err(io_error("stat", &path))?;
    let named = fs::symlink_metadata(&path).is_ok_and(|named| named.ino() == held.ino() && named.dev() == held.dev());
    Ok(named.then_some(file))
}

impl Staging {
    /// A new, empty file; read-only for all but the handle returned, as objects are.
    pub fn create(&mut self) -> Result<StagedFile, CacheError> {
        let number = self.next;
        self.next += 1;
        let path = self.path(number);
        let created = new_file(&path, 0o444).map_err(io_error("create", &path));
        let file = created.map_err(|error| self.room.noted(error))?;
        Ok(StagedFile { number, file, path })
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir.join(number.to_string())
    }

    /// Makes the staged files objects of this process. `_proof` is the evidence that the stream they were cut from
    /// had its digest; `files` names each by its content.
    pub fn seal(self, cache: &Cache, _proof: &Proof, files: Vec<(StagedNumber, ObjectDigest)>) -> Sealed {
        // Without the mark, others only wait less long for this fill.
        let _ = new_file(&self.dir.join(SEALED), 0o600);
        let objects: Vec<_> = files.into_iter().map(|(file, name)| (self.path(file.0), name)).collect();
        let mut staged = cache.staged.lock().unwrap_or_else(|held| held.into_inner());
        staged.extend(objects.iter().map(|(path, name)| (*name, path.clone())));
        drop(staged);
        Sealed { staging: self, objects }
    }
}

impl Sealed {
    /// Makes everything durable: one sync of the file system, then the renames, then the index. Readers need not wait.
    pub fn commit(self, cache: &Cache, index_key: &Digest, index: &[u8]) -> Result<(), CacheError> {
        let renamed = self.rename_all(cache).map_err(|error| cache.room.noted(error));
        let committed = renamed.and_then(|()| cache.keep_index(index_key, index));
        let mut staged = cache.staged.lock().unwrap_or_else(|held| held.into_inner());
        for (path, name) in &self.objects {
            if staged.get(name) == Some(path) {
                staged.remove(name);
            }
        }
        committed
    }

    fn rename_all(&self, cache: &Cache) -> Result<(), CacheError> {
        let dir = File::open(&self.staging.dir).map_err(io_error("open", &self.staging.dir))?;
        rustix::fs::syncfs(&dir).map_err(|error| io_error("sync", &self.staging.dir)(error.into()))?;
        for (path, name) in &self.objects {
            let target = cache.spread("objects", &name.hex());
            if let Some(parent) = target.parent() {
                make_dir(parent)?;
            }
            let here = rustix::fs::CWD;
            match rustix::fs::renameat_with(here, path, here, &target, RenameFlags::NOREPLACE) {
                Ok(()) => {}
                Err(rustix::io::Errno::EXIST) => {
                    // From another layer or process, and then the staged copy goes with its directory; or damaged.
                    let size = fs::symlink_metadata(path).map_err(io_error("stat", path))?.len();
                    if !is_file_of(&target, size) {
                        rename_over(path, &target).map_err(io_error("rename", path))?;
                    }
                }
                Err(error) => return Err(io_error("rename", path)(error.into())),
            }
            cache.remove_partial(name);
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        remove(&self.dir);
    }
}
