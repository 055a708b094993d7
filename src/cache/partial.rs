//! Files that are filled chunk by chunk: `partial/<ab>/<hex>`, sparse; its holes are the map of what is missing.
//!
//! A chunk that is data and not a hole counts only after this process has hashed it, so neither a crash nor another
//! process's half write can make a wrong byte count: the worst is a chunk that is fetched again. Beside the file may
//! lie `<hex>.list`, its chunk digests, which its name proves.
//!
//! The way of a file: [`Cache::partial`] names it, [`Partial::look`] finds what is there, [`Partial::write`]
//! adds to it, and once every chunk has been verified in this file by this process, [`Cache::commit`] gives it its name
//! under `objects/`: after a sync, and by linking this very inode, whatever the path has become.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::{AtFlags, FlockOperation, OFlags, SeekFrom, fcntl_getfl, flock};

use super::files::{Claim, identity, identity_of, is_link, lock_named, on_disk, open_existing, rename_over, write_at};
use super::map::contents;
use super::objects::{CachedRange, Object, touch};
use super::{Cache, CacheError, io_error};
use crate::digest::Unverified;
use crate::object::{ChunkList, ObjectDigest, VerifiedChunk};

/// A file of which some chunks are here, or none. It is opened when it is first needed.
#[derive(Debug)]
pub struct Partial {
    path: PathBuf,
    /// Where it lies once it is complete.
    object: PathBuf,
    list: ChunkList<Bytes>,
    file: OnceLock<Arc<File>>,
    /// The same for writing, where the disk was read-only when it was opened and is not any more.
    for_writing: OnceLock<File>,
    /// One thread opens it at a time: else one would take another's new file for what is in the way. A mutex, as it is
    /// held for a few calls to the system.
    opening: Mutex<()>,
    /// One thread writes at a time: others would spin in the kernel for the lock of the file.
    writing: Mutex<()>,
    /// Whether some of it was found: what others wrote, maybe before this process knew of lost writes.
    was_found: AtomicBool,
    /// Which chunks this process has verified in this file. A mutex, as it is held for a look or a note.
    chunks: Mutex<Chunks>,
}

#[derive(Debug)]
struct Chunks {
    verified: Vec<bool>,
    left: usize,
}

/// A chunk that was found in a file.
#[derive(Debug)]
pub struct Found {
    /// The chunk.
    pub chunk: VerifiedChunk,
    /// Whether the file is complete with it.
    pub completes: bool,
}

impl Partial {
    /// The chunk digests of the file.
    pub fn list(&self) -> &ChunkList<Bytes> {
        &self.list
    }

    fn chunks(&self) -> MutexGuard<'_, Chunks> {
        self.chunks.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// Whether every chunk has been verified in this file by this process.
    pub fn is_complete(&self) -> bool {
        self.chunks().left == 0
    }

    /// The file as an object, if it is complete, whatever its name is by now.
    pub fn whole(&self) -> Option<Object> {
        let file = self.file.get().filter(|_| self.is_complete())?;
        let size = self.list.size();
        // What was made longer or shorter behind our back is damaged.
        let is_right = file.metadata().is_ok_and(|found| found.len() == size);
        is_right.then(|| Object::completed(file.clone(), size))
    }

    /// How many chunks this process has not verified in this file.
    pub fn left(&self) -> u64 {
        self.chunks().left as u64
    }

    /// Whether the file has no holes, so that all of it may be there, though this process has not hashed all of it.
    pub fn may_be_whole(&self) -> bool {
        let Some(file) = self.file.get().filter(|_| !self.is_complete()) else { return false };
        rustix::fs::seek(file, SeekFrom::Hole(0)).is_ok_and(|hole| hole >= self.list.size())
    }

    /// Whether this process has verified a chunk in the file.
    pub fn has(&self, chunk: u64) -> bool {
        self.chunks().verified.get(chunk as usize).copied().unwrap_or(false)
    }

    /// A range of the file, if this process has verified all of it.
    pub fn range(&self, range: &Range<u64>) -> Option<CachedRange> {
        let wanted = self.list.chunks_of(range);
        let chunks = self.chunks();
        let all = chunks.verified.get(wanted.start as usize..wanted.end as usize)?;
        let verified = range.end <= self.list.size() && all.iter().all(|verified| *verified);
        drop(chunks);
        let file = self.file.get().filter(|_| verified)?;
        Some(CachedRange::new(file.clone(), range.clone()))
    }

    /// A chunk, if it is data in the file and hashes right: written by this process or another, now or before. Else from
    /// a lower cache: it is written here then, as the file needs all of its chunks.
    pub fn look(&self, cache: &Cache, chunk: u64) -> Result<Option<Found>, CacheError> {
        if let Some(file) = self.file(None)?
            && let Some(chunk) = chunk_in(file, &self.list, chunk).map_err(io_error("read", &self.path))?
        {
            self.was_found.store(true, Ordering::Relaxed);
            let completes = self.note(chunk.number());
            return Ok(Some(Found { chunk, completes }));
        }
        let Some(chunk) = cache.lower.iter().find_map(|lower| lower.chunk(&self.list, chunk)) else { return Ok(None) };
        let completes = self.write(cache, &chunk).unwrap_or_else(|error| {
            tracing::warn!(%error, "a chunk of a lower cache was not kept; it is read there again");
            false
        });
        Ok(Some(Found { chunk, completes }))
    }

    /// Writes a chunk; tells whether that made the file complete.
    pub fn write(&self, cache: &Cache, chunk: &VerifiedChunk) -> Result<bool, CacheError> {
        let Some(range) = self.range_of(chunk) else { return Ok(false) };
        let _growth = cache.grow(&self.path, range.end - range.start)?;
        self.write_in(cache, chunk, &range)
    }

    /// The same where the cache has room without a look whether it has, which may take long; else `None`.
    pub fn write_at_once(&self, cache: &Cache, chunk: &VerifiedChunk) -> Result<Option<bool>, CacheError> {
        let Some(range) = self.range_of(chunk) else { return Ok(Some(false)) };
        let Some(_growth) = cache.grow_at_once(range.end - range.start) else { return Ok(None) };
        self.write_in(cache, chunk, &range).map(Some)
    }

    fn range_of(&self, chunk: &VerifiedChunk) -> Option<Range<u64>> {
        self.list.range(chunk.number()).filter(|_| chunk.object() == self.list.object())
    }

    fn write_in(&self, cache: &Cache, chunk: &VerifiedChunk, range: &Range<u64>) -> Result<bool, CacheError> {
        let file = self.file_to_write(cache).map_err(|error| cache.room.noted(error))?;
        let Some(file) = file else { return Ok(false) };
        let _writing = self.writing.lock().unwrap_or_else(|held| held.into_inner());
        let written = write_at(file, chunk.bytes().bytes(), range.start).map_err(io_error("write", &self.path));
        written.map_err(|error| cache.room.noted(error))?;
        Ok(self.note(chunk.number()))
    }

    /// Notes that a chunk is verified in the file; tells whether it was the last one.
    fn note(&self, chunk: u64) -> bool {
        let mut chunks = self.chunks();
        match chunks.verified.get_mut(chunk as usize) {
            Some(verified) if !*verified => *verified = true,
            _ => return false,
        }
        chunks.left -= 1;
        chunks.left == 0
    }

    /// The file, opened once and from then on the same, whatever its path leads to. `None` where there is none, and it is
    /// not to be made in the cache.
    fn file(&self, create: Option<&Cache>) -> Result<Option<&Arc<File>>, CacheError> {
        if let Some(file) = self.file.get() {
            return Ok(Some(file));
        }
        let _opening = self.opening.lock().unwrap_or_else(|held| held.into_inner());
        if let Some(file) = self.file.get() {
            return Ok(Some(file));
        }
        let opened = self.open(create)?;
        Ok(opened.map(|file| self.file.get_or_init(|| Arc::new(file))))
    }

    /// The file, open for writing.
    fn file_to_write(&self, cache: &Cache) -> Result<Option<&File>, CacheError> {
        let Some(file) = self.file(Some(cache))? else { return Ok(None) };
        let is_writable = |file: &File| fcntl_getfl(file).is_ok_and(|flags| flags.contains(OFlags::RDWR));
        if is_writable(file) {
            return Ok(Some(file));
        }
        let _opening = self.opening.lock().unwrap_or_else(|held| held.into_inner());
        if let Some(file) = self.for_writing.get() {
            return Ok(Some(file));
        }
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
        let anew = match options.open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("open", &self.path)(error)),
        };
        let [old, new] = [&**file, &anew].map(|file| file.metadata().map_err(io_error("stat", &self.path)));
        let (old, new) = (old?, new?);
        // Where the file has become an object, or another has taken its name, nothing is written. The lock of the first
        // handle is enough for both.
        let is_same = identity(&old) == identity(&new);
        Ok(is_same.then(|| self.for_writing.get_or_init(|| anew)))
    }

    fn open(&self, create: Option<&Cache>) -> Result<Option<File>, CacheError> {
        let (path, size) = (&self.path, self.list.size());
        if let (Some(cache), Some(parent)) = (create, path.parent()) {
            cache.make_room_in(parent)?;
        }
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).create(create.is_some()).mode(0o600);
        options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
        for _ in 0..OPENED_ANEW {
            let file = match options.open(path) {
                Ok(file) => file,
                // Another process may have made it an object since this one looked.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return locked(&self.object, size),
                Err(error) if create.is_some() && is_in_the_way(&error) => {
                    if let Some(object) = locked(&self.object, size)? {
                        return Ok(Some(object));
                    }
                    let removed = fs::remove_file(path).or_else(|_| fs::remove_dir(path));
                    removed.map_err(io_error("remove", path))?;
                    continue;
                }
                // Not ours to write any more, or a disk that is read-only: what is in it still counts.
                Err(_) if create.is_none() => return locked(path, size),
                Err(error) => return Err(io_error("open", path)(error)),
            };
            // Shared by all who fill it; who evicts it would want it alone.
            let file = match lock_named(file, path, FlockOperation::NonBlockingLockShared)? {
                Claim::Held(file) => file,
                Claim::Busy => {
                    // It is being evicted, which is a matter of two calls to the system.
                    std::thread::sleep(EVICTED);
                    continue;
                }
                // Evicted or committed between open and lock.
                Claim::Gone => continue,
            };
            let held = file.metadata().map_err(io_error("stat", path))?;
            if !held.is_file() {
                if create.is_none() {
                    return Ok(None);
                }
                fs::remove_file(path).map_err(io_error("remove", path))?;
                continue;
            }
            if held.len() != size {
                // New, or damaged: nothing counts before it was hashed.
                file.set_len(size).map_err(io_error("resize", path))?;
            }
            touch(&file);
            return Ok(Some(file));
        }
        let busy = io::Error::new(io::ErrorKind::ResourceBusy, "other processes replace it again and again");
        Err(io_error("open", path)(busy))
    }

    /// Nothing counts any more, as what was written may not have reached the disk.
    fn forget(&self) {
        let mut chunks = self.chunks();
        chunks.verified.fill(false);
        chunks.left = chunks.verified.len();
    }
}

/// How often a file is opened that others move away meanwhile.
const OPENED_ANEW: usize = 8;
/// How long to wait before that where one is being evicted.
const EVICTED: Duration = Duration::from_millis(1);

impl Drop for Partial {
    fn drop(&mut self) {
        if let Some(file) = self.file.get() {
            touch(file);
        }
    }
}

/// Opens a file of this size for reading, with a shared lock; `None` where there is none, or somebody is about to remove it.
fn locked(path: &Path, size: u64) -> Result<Option<File>, CacheError> {
    let Ok(Some(file)) = open_existing(path) else { return Ok(None) };
    let found = file.metadata().map_err(io_error("stat", path))?;
    let free = flock(&file, FlockOperation::NonBlockingLockShared).is_ok();
    Ok(Some(file).filter(|_| free && found.is_file() && found.len() == size))
}

/// A chunk of a file that may have holes, if it is data and hashes right.
pub(super) fn chunk_in(file: &File, list: &ChunkList<Bytes>, chunk: u64) -> io::Result<Option<VerifiedChunk>> {
    let Some(range) = list.range(chunk) else { return Ok(None) };
    if has_hole(file, &range) {
        return Ok(None);
    }
    let mut bytes = vec![0; (range.end - range.start) as usize];
    match file.read_exact_at(&mut bytes, range.start) {
        Ok(()) => Ok(list.verify(chunk, Unverified::new(bytes)).and_then(Result::ok)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether any of a range is a hole. Where a file system knows no holes, all is data, and the hash tells.
pub(super) fn has_hole(file: &File, range: &Range<u64>) -> bool {
    rustix::fs::seek(file, SeekFrom::Hole(range.start)).is_ok_and(|hole| hole < range.end)
}

impl Cache {
    /// The partial file of an object. Nothing is opened or made yet.
    pub fn partial(&self, list: ChunkList<Bytes>) -> Partial {
        let count = usize::try_from(list.len()).unwrap_or(usize::MAX);
        let chunks = Mutex::new(Chunks { verified: vec![false; count], left: count });
        let path = self.spread("partial", &list.object().hex());
        let object = self.spread("objects", &list.object().hex());
        Partial {
            path,
            object,
            list,
            file: OnceLock::new(),
            for_writing: OnceLock::new(),
            opening: Mutex::new(()),
            writing: Mutex::new(()),
            was_found: AtomicBool::new(false),
            chunks,
        }
    }

    /// The chunk digests that were kept beside a partial file, here or in a lower cache.
    pub fn chunk_list(&self, object: &ObjectDigest, size: u64) -> Result<Option<ChunkList<Bytes>>, CacheError> {
        let path = self.list_path(object);
        let own = contents(&path)?.and_then(|bytes| ChunkList::new(size, bytes));
        let own = own.filter(|list| list.object() == *object);
        Ok(own.or_else(|| self.lower.iter().find_map(|lower| lower.chunk_list(object, size))))
    }

    /// Keeps the chunk digests of a file that is about to be filled.
    pub fn keep_chunk_list(&self, list: &ChunkList<Bytes>) -> Result<(), CacheError> {
        self.write_file(&self.list_path(&list.object()), &[list.as_bytes()])
    }

    pub(super) fn list_path(&self, object: &ObjectDigest) -> PathBuf {
        self.spread("partial", &object.hex()).with_extension("list")
    }

    /// How many bytes of an object's partial file are on the disk, verified or not.
    pub fn partial_bytes(&self, object: &ObjectDigest) -> u64 {
        let found = fs::symlink_metadata(self.spread("partial", &object.hex()));
        found.map_or(0, |found| found.len().min(on_disk(&found)))
    }

    /// Makes complete files objects: one sync of the file system, then their names. What fails is told for each file; it
    /// is served as before where only its name failed, and forgotten where the disk lost its bytes.
    pub fn commit(&self, complete: &[&Partial]) -> Vec<CacheError> {
        let synced = self.durable.sync().map_err(io_error("sync", &self.root));
        let is_known = synced.as_ref().is_ok_and(|is_known| *is_known);
        let complete = complete.iter().filter(|partial| partial.is_complete());
        let named = complete.filter_map(|partial| self.name(partial, is_known).err());
        synced.err().into_iter().chain(named).map(|error| self.room.noted(error)).collect()
    }

    /// Gives a file its name as an object. `is_known`: whether what this process has written of it is on the disk.
    fn name(&self, partial: &Partial, is_known: bool) -> Result<(), CacheError> {
        let Some(file) = partial.file.get() else { return Ok(()) };
        // Tells what became of every write since the file was opened: where one was lost, the pages are gone, and what is
        // read back need not be what was verified.
        if (!is_known || partial.was_found.load(Ordering::Relaxed))
            && let Err(error) = file.sync_data()
        {
            partial.forget();
            return Err(io_error("sync", &partial.path)(error));
        }
        let target = &partial.object;
        if let Some(parent) = target.parent() {
            self.make_room_in(parent)?;
        }
        match link(file, target) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // Who was told to do it a second time finds the file itself.
                let is_it = file.metadata().is_ok_and(|found| identity_of(target) == Some(identity(&found)));
                if !is_it && !self.may_stay(target, &partial.list.object(), partial.list.size())? {
                    let spare = partial.path.with_extension(format!("{}.new", std::process::id()));
                    // A killed process of the same number may have left one.
                    let _ = fs::remove_file(&spare);
                    match link(file, &spare).and_then(|()| rename_over(&spare, target)) {
                        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                        named => named.map_err(io_error("replace", target))?,
                    }
                }
            }
            // Somebody removed it: it can get no name any more, and is fetched again when it is wanted.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(io_error("name", target)(error)),
        }
        // After the link, so that a file that can't be written any more has its name.
        file.set_permissions(fs::Permissions::from_mode(0o444)).map_err(io_error("protect", target))?;
        let _ = fs::remove_file(&partial.path);
        // A list of one chunk is in the index that names the file, and is not kept.
        if partial.list.len() > 1 {
            let _ = fs::remove_file(self.list_path(&partial.list.object()));
        }
        Ok(())
    }

    /// Removes the partial file of what is an object by now. The path may be a newer file's: that one would only be
    /// fetched again. What stays is garbage, not harm.
    pub(super) fn remove_partial(&self, object: &ObjectDigest) {
        let _ = fs::remove_file(self.spread("partial", &object.hex()));
        let _ = fs::remove_file(self.list_path(object));
    }
}

/// Whether what lies at a path is no file that can be filled: read-only, as one is that has its name as an object and was
/// not removed here by a process that was killed; or a link or a directory, as nothing of ours leaves it.
fn is_in_the_way(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::IsADirectory) || is_link(error)
}

/// Gives an open file a name, whatever names it had.
fn link(file: &File, target: &Path) -> io::Result<()> {
    let open = format!("/proc/self/fd/{}", file.as_raw_fd());
    let here = rustix::fs::CWD;
    Ok(rustix::fs::linkat(here, open, here, target, AtFlags::SYMLINK_FOLLOW)?)
}

#[cfg(test)]
#[path = "partial_tests.rs"]
mod tests;
