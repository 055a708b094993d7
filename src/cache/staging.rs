//! Files on their way into the cache: `incoming/<key>/<number>`, unverified until a digest holds: that of the layer that
//! they were cut from, or, of a blob too long to hold in memory ([`super::NewBlob`]), the blob's own.
//!
//! The way of a fill: [`Cache::stage`] locks a directory, [`Staging::begin`] empties it, or [`Staging::go_on`] takes what an
//! earlier fill has left there, [`Staging::create`] makes a file for each entry, [`Staging::seal`] takes the proof and makes
//! the files readable as objects where they lie, and [`Sealed::commit`] syncs the file system, renames each file to its
//! object name and writes the index last.
//!
//! A fill that ends before it is sealed, because its source fails or its process is killed, leaves what it has for the
//! next one, if that is worth it: see [`super::resume`]. What is left else goes with the lock, or with the next sweep.
//! Where the disk is full, [`Staging::forget`] gives up what only the next fill would need, [`Staging::clear`] everything.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FlockOperation, OFlags, RenameFlags};

use super::files::{lock_named, new_file, open_file, rename_over, write_at};
use super::resume::{self, Beside, Kept, Left, Reached};
use super::room::Room;
use super::{Cache, CacheError, Removed, io_error};
use crate::digest::{Digest, Proof};
use crate::object::ObjectDigest;

/// The file in a staging directory that carries the lock.
pub(super) const LOCK: &str = "lock";

/// Marks a directory whose files are objects already and wait for the disk.
const SEALED: &str = "sealed";

/// How often a fill that writes nothing shows that it is alive.
const TOUCH: Duration = Duration::from_secs(1);

/// How far a fill is, as seen by another process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StagedState {
    /// Bytes staged so far.
    pub bytes: u64,
    /// Whether everything is staged and verified, and only the commit is to come.
    pub sealed: bool,
    /// When it last said that it is alive, where it stages nothing.
    pub alive: Option<SystemTime>,
}

/// A locked directory under `incoming/`.
#[derive(Debug)]
pub struct Staging {
    dir: PathBuf,
    /// Held for its lock.
    lock: File,
    next: u64,
    /// What the next fill would need.
    pub(super) kept: Option<Kept>,
    /// Whether what it holds may be for another fill.
    lasts: bool,
    touched: Instant,
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
        let _growth = cache.grow_staged(&self.path, bytes.len() as u64)?;
        let written = write_at(&self.file, bytes, offset).map_err(io_error("write", &self.path));
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

    /// Its number is what [`Staging::seal`] wants: a layer may have millions of files, which can't all stay open.
    pub fn number(&self) -> StagedNumber {
        StagedNumber(self.number)
    }
}

/// A file in a staging directory.
#[derive(Debug, Clone, Copy)]
pub struct StagedNumber(u64);

/// Staged files whose layer digest has held; readable as objects, not yet under their names.
#[derive(Debug)]
pub struct Sealed {
    staging: Staging,
    objects: Vec<(PathBuf, ObjectDigest)>,
}

impl Cache {
    /// Locks the staging directory of `key`; `None` while another process (or task) holds it.
    pub fn stage(&self, key: &Digest) -> Result<Option<Staging>, CacheError> {
        let staged = self.stage_in(&self.root.join("incoming").join(key.hex()));
        staged.map_err(|error| self.room.noted(error))
    }

    /// A staging directory that no other process looks for: used when the shared one is held by who makes no progress.
    pub fn stage_alone(&self, key: &Digest) -> Result<Option<Staging>, CacheError> {
        let serial = self.counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("{}.{}.{serial}", key.hex(), std::process::id());
        let staged = self.stage_in(&self.root.join("incoming").join(name));
        // A process that is no more may have had this one's number.
        let staged = staged.and_then(|staging| {
            let Some(mut staging) = staging else { return Ok(None) };
            staging.lasts = false;
            staging.empty()?;
            Ok(Some(staging))
        });
        staged.map_err(|error| self.room.noted(error))
    }

    fn stage_in(&self, dir: &Path) -> Result<Option<Staging>, CacheError> {
        self.make_room_in(dir)?;
        let Some(lock) = lock_dir(dir)? else { return Ok(None) };
        let (dir, touched, room) = (dir.to_owned(), Instant::now(), self.room.clone());
        Ok(Some(Staging { dir, lock, next: 0, kept: None, lasts: true, touched, room }))
    }

    /// How far the fill of `key` is in whichever process: a sign of life for those who wait for it.
    pub fn staged(&self, key: &Digest) -> StagedState {
        let dir = self.root.join("incoming").join(key.hex());
        let mut state = StagedState { bytes: 0, sealed: dir.join(SEALED).exists(), alive: None };
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Ok(found) = entry.metadata() else { continue };
            state.bytes += found.len();
            if entry.file_name() == LOCK {
                state.alive = found.modified().ok();
            }
        }
        // Of a compressed layer these tell how much of it has come, and not what it inflates to.
        state.bytes = fs::metadata(Beside::Blob.path(&dir)).map_or(state.bytes, |blob| blob.len());
        state
    }

    /// Whether any process stages something, or is giving what it staged its names.
    pub fn is_staging(&self) -> bool {
        let entries = fs::read_dir(self.root.join("incoming")).into_iter().flatten().flatten();
        // What can't be looked at is nothing that kitfs made.
        entries.map(|entry| is_held(&entry.path())).any(|held| held.unwrap_or(false))
    }

    /// Removes a directory under `incoming/`, unless a process holds it; with `dry_run` it only tells whether it would.
    pub fn remove_staging(&self, dir: &Path, dry_run: bool) -> Result<Removed, CacheError> {
        remove_abandoned(dir, dry_run)
    }

    /// Removes staging directories that no process holds and that are not worth going on from.
    pub(super) fn sweep_incoming(&self) {
        let Ok(entries) = fs::read_dir(self.root.join("incoming")) else { return };
        for entry in entries.flatten() {
            // What can't be removed now is found again by the next sweep.
            if entry.file_type().is_ok_and(|kind| kind.is_dir())
                && let Ok(Some(_lock)) = lock_dir(&entry.path())
                && !resume::is_worth(&entry.path())
            {
                remove(&entry.path());
            }
        }
    }
}

/// Removes a staging directory that no process holds; with `dry_run` it only tells whether it would.
pub(super) fn remove_abandoned(dir: &Path, dry_run: bool) -> Result<Removed, CacheError> {
    if dry_run {
        return Ok(if is_held(dir)? { Removed::InUse } else { Removed::Gone });
    }
    let Some(_lock) = lock_dir(dir)? else { return Ok(Removed::InUse) };
    remove(dir);
    Ok(Removed::Gone)
}

/// Removes a staging directory whose lock is held. The lock's file goes last: with it the directory is the next one's,
/// whose files must not go too. What can't be removed now is found again by the next sweep.
pub(super) fn remove(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name() != LOCK) {
        let _ = remove_whatever(&entry.path());
    }
    let _ = fs::remove_file(dir.join(LOCK));
    let _ = fs::remove_dir(dir);
}

/// Removes what lies in a staging directory: files, and whatever else somebody may have put there.
pub(super) fn remove_whatever(path: &Path) -> Result<(), CacheError> {
    let removed = match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::IsADirectory => fs::remove_dir_all(path),
        outcome => outcome,
    };
    removed.map_err(io_error("remove", path))
}

/// Takes the lock of a staging directory without waiting, and makes its file where there is none.
pub(super) fn lock_dir(dir: &Path) -> Result<Option<File>, CacheError> {
    let path = dir.join(LOCK);
    let mut options = fs::OpenOptions::new();
    // A pipe would make the open wait for its other end.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    options.create(true).truncate(false).write(true).mode(0o600).custom_flags(flags);
    let file = match options.open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(planted(&path).unwrap_or_else(|| io_error("open", &path)(error))),
    };
    Ok(lock_named(file, &path, FlockOperation::NonBlockingLockExclusive)?.held())
}

/// Whether a process holds a staging directory. Only looks: makes no file for the lock where there is none.
pub(super) fn is_held(dir: &Path) -> Result<bool, CacheError> {
    let path = dir.join(LOCK);
    let Some(file) = open_file(&path).map_err(io_error("open", &path))? else {
        // A directory that is gone was held a moment ago, by who removed it.
        return planted(&path).map_or_else(|| Ok(fs::symlink_metadata(dir).is_err()), Err);
    };
    // Shared, so that two who look do not take each other for a fill.
    Ok(lock_named(file, &path, FlockOperation::NonBlockingLockShared)?.held().is_none())
}

/// The error that something lies in the place of a lock, if it does.
fn planted(path: &Path) -> Option<CacheError> {
    let is_planted = fs::symlink_metadata(path).is_ok_and(|found| !found.is_file());
    let what = "it is not a file, and kitfs has not made it; remove it";
    is_planted.then(|| io_error("lock", path)(io::Error::other(what)))
}

/// The number of a staged file; `None` for what else lies in the directory.
pub(super) fn number_of(entry: &fs::DirEntry) -> Option<u64> {
    entry.file_name().to_str()?.parse().ok()
}

impl Staging {
    /// What an earlier fill that kept `beside` has left here.
    pub fn left(&self, beside: Beside) -> Result<Option<Left>, CacheError> {
        Left::find(&self.dir, beside)
    }

    /// Begins a fill from nothing that another can go on from. That it can't is no error, where there is no room.
    pub fn begin(&mut self, beside: Beside) -> Result<(), CacheError> {
        self.kept = None;
        self.empty()?;
        self.next = 0;
        if !self.lasts {
            return Ok(());
        }
        match Kept::begin(&self.dir, beside).map_err(|error| self.room.noted(error)) {
            Err(error) if !error.is_full() => Err(error),
            kept => {
                self.kept = kept.ok();
                Ok(())
            }
        }
    }

    /// Goes on with what is left, and removes what is not part of it.
    pub fn go_on(&mut self, beside: Beside, at: &Reached) -> Result<(), CacheError> {
        let _ = fs::remove_file(self.dir.join(SEALED));
        self.next = 0;
        self.kept = Some(Kept::go_on(&self.dir, beside, at).map_err(|error| self.room.noted(error))?);
        Ok(())
    }

    /// Keeps bytes beside the files for the next fill.
    pub fn keep(&mut self, cache: &Cache, bytes: &[u8]) -> Result<(), CacheError> {
        self.kept.as_mut().map_or(Ok(()), |kept| kept.add(cache, bytes))
    }

    /// Says that all bytes of the layer below `offset` are in the files, or beside them.
    pub fn reached(&mut self, offset: u64) {
        if let Some(kept) = &mut self.kept {
            kept.reached(offset);
        }
    }

    /// Says to those who wait that this fill is alive, where it has nothing to write.
    pub fn touch(&mut self) {
        if self.touched.elapsed() >= TOUCH {
            self.touched = Instant::now();
            // They only wait less long for it.
            let _ = self.lock.set_modified(SystemTime::now());
        }
    }

    /// Gives up what only the next fill would need; tells whether there was any.
    pub fn forget(&mut self) -> bool {
        self.kept.take().map(Kept::remove).is_some()
    }

    /// Gives up all that is staged, so that its room is free again. The lock stays.
    pub fn clear(&mut self) {
        self.forget();
        // What can't be removed goes with the directory.
        let _ = self.empty();
        self.next = 0;
    }

    /// Ends it with nothing left for another fill.
    pub fn discard(mut self) {
        self.lasts = false;
    }

    fn empty(&self) -> Result<(), CacheError> {
        for entry in fs::read_dir(&self.dir).map_err(io_error("read", &self.dir))? {
            let entry = entry.map_err(io_error("read", &self.dir))?;
            if entry.file_name() != LOCK {
                remove_whatever(&entry.path())?;
            }
        }
        Ok(())
    }

    /// The next file, where an earlier fill has begun it.
    pub fn next_begun(&mut self) -> StagedNumber {
        self.next += 1;
        StagedNumber(self.next - 1)
    }

    /// A file that was begun, to go on with it. One that was lost is made again.
    pub fn reopen(&mut self, number: StagedNumber) -> Result<StagedFile, CacheError> {
        let (number, path) = (number.0, self.path(number.0));
        let opened = if path.exists() {
            resume::reopen(&path, 0o444)
        } else {
            new_file(&path, 0o444).map_err(io_error("create", &path))
        };
        let file = opened.map_err(|error| self.room.noted(error))?;
        Ok(StagedFile { number, file, path })
    }

    /// Where a staged file lies.
    pub fn path_of(&self, number: StagedNumber) -> PathBuf {
        self.path(number.0)
    }

    /// A new, empty file; read-only for all but the handle returned, as objects are.
    pub fn create(&mut self) -> Result<StagedFile, CacheError> {
        let number = self.next;
        let path = self.path(number);
        let created = new_file(&path, 0o444).map_err(io_error("create", &path));
        let file = created.map_err(|error| self.room.noted(error))?;
        self.next += 1;
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
    /// Makes everything durable: one sync of the file system, then the renames, then the index. Readers need not wait. The
    /// index is kept in any case: by it, what was not is fetched in parts.
    pub fn commit(mut self, cache: &Cache, index_key: &Digest, index: &[u8]) -> Result<(), CacheError> {
        // Up to here, whatever ends this leaves all that is needed to do it again.
        self.staging.lasts = false;
        let renamed = self.rename_all(cache).map_err(|error| cache.room.noted(error));
        let kept = cache.keep_index(index_key, index);
        let committed = renamed.and(kept);
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
        // The last ones first: should this process be killed, those left are the layer's beginning, from which another goes on.
        for (path, name) in self.objects.iter().rev() {
            let target = cache.spread("objects", &name.hex());
            if let Some(parent) = target.parent() {
                cache.make_room_in(parent)?;
            }
            let here = rustix::fs::CWD;
            match rustix::fs::renameat_with(here, path, here, &target, RenameFlags::NOREPLACE) {
                Ok(()) => {}
                Err(rustix::io::Errno::EXIST) => {
                    // From another layer or process, and then the staged copy goes with its directory; or damaged.
                    let size = fs::symlink_metadata(path).map_err(io_error("stat", path))?.len();
                    if !cache.may_stay(&target, name, size)? {
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
        // It may wait for a checkpoint.
        self.kept = None;
        if !self.lasts || !resume::is_worth(&self.dir) {
            remove(&self.dir);
        }
    }
}
