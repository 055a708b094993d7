//! Complete, verified files.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, flock};

use super::damage::name_of;
use super::files::{is_file_of, open_existing};
use super::{Cache, CacheError, io_error};
use crate::digest::Unverified;
use crate::object::ObjectDigest;

/// An open file whose whole content has been verified. It exists only for what lies under `objects/`, was sealed or
/// completed by this process, or was hashed by it in a lower cache, so holding one is the proof that its bytes may be
/// served. Its shared lock keeps it from eviction. What was used last goes last: its modification time says when it was
/// opened and when the last handle went.
#[derive(Debug, Clone)]
pub struct Object {
    opened: Arc<Opened>,
}

/// What all handles of one open object share.
#[derive(Debug)]
struct Opened {
    file: Arc<File>,
    size: u64,
    /// Whether it is in this cache: another one is not written to.
    is_ours: bool,
    is_lasting: bool,
}

impl Object {
    /// An object of this cache, which is used from now on.
    fn new(file: File, size: u64) -> Self {
        touch(&file);
        Self::completed(Arc::new(file), size)
    }

    /// A file of this cache that was filled chunk by chunk, every one of them verified in it by this process.
    pub(super) fn completed(file: Arc<File>, size: u64) -> Self {
        Self { opened: Arc::new(Opened { file, size, is_ours: true, is_lasting: true }) }
    }

    /// An object of a lower cache, which is not written to. `is_lasting`: see [`Object::is_lasting`].
    pub(super) fn of_lower(file: File, size: u64, is_lasting: bool) -> Self {
        Self { opened: Arc::new(Opened { file: Arc::new(file), size, is_ours: false, is_lasting }) }
    }

    /// The file, to read from at any offset.
    pub fn file(&self) -> &Arc<File> {
        &self.opened.file
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.opened.size
    }

    /// Whether it is in this cache, and not in a lower one.
    pub fn is_ours(&self) -> bool {
        self.opened.is_ours
    }

    /// Whether nobody but root and we can write to it: then what was proved of its bytes holds for as long as it is open,
    /// whoever reads them.
    pub fn is_lasting(&self) -> bool {
        self.opened.is_lasting
    }

    /// A range of it, which ends within it.
    pub fn range(&self, range: Range<u64>) -> CachedRange {
        CachedRange::new(self.file().clone(), range)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if self.is_ours {
            touch(&self.file);
        }
    }
}

/// Notes that an open file is used now, unless that was noted a moment ago: eviction need not know it to the second, and
/// small files are opened a thousand times in one. That it can't be noted is no harm; it goes earlier, that is all.
pub(super) fn touch(file: &File) {
    const FRESH: Duration = Duration::from_secs(5);
    let Ok(last) = file.metadata().and_then(|found| found.modified()) else { return };
    // A time in the future would keep it for ever.
    if SystemTime::now().duration_since(last).is_ok_and(|age| age < FRESH) {
        return;
    }
    let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let _ = rustix::fs::futimens(file, &Timestamps { last_access: omit, last_modification: now });
}

/// A range of a file in the cache whose bytes have been verified: in a complete object, or chunk by chunk in a file that
/// is being filled. It is made in this module and in `partial` alone, so holding one is the proof.
#[derive(Debug, Clone)]
pub struct CachedRange {
    file: Arc<File>,
    range: Range<u64>,
}

impl CachedRange {
    pub(super) fn new(file: Arc<File>, range: Range<u64>) -> Self {
        Self { file, range }
    }

    /// The file.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Where the bytes begin in it.
    pub fn offset(&self) -> u64 {
        self.range.start
    }

    /// How many they are.
    pub fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// At most `len` of the bytes, from the one at `start` on, to be hashed again.
    pub fn block(&self, start: u64, len: u64) -> Result<Unverified, CacheError> {
        let mut block = vec![0; self.len().saturating_sub(start).min(len) as usize];
        let read = self.file.read_exact_at(&mut block, self.range.start + start);
        read.map_err(io_error("read", Path::new("a file that is open")))?;
        Ok(Unverified::new(block))
    }
}

/// How far an object is on its way to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is not here.
    Absent,
    /// This process has verified it, and its commit is under way.
    Staged,
    /// It has its name, so it is on the disk; here or in a lower cache.
    Named,
}

impl Cache {
    /// Opens an object of `size` bytes, of this cache or a lower one; `None` where it is absent or being evicted, or has
    /// another size. Then it is damaged, and the next commit replaces it; or it is whole and `size` is wrong, as whoever
    /// made an index may state any. With [`Settings::recheck`](super::Settings::recheck) it is hashed first, and set aside if it is damaged.
    pub fn object(&self, name: &ObjectDigest, size: u64) -> Result<Option<Object>, CacheError> {
        let committed = self.spread("objects", &name.hex());
        // Twice: the commit may move the file from staging to its name between the two looks.
        for _ in 0..2 {
            let staged = self.staged.lock().unwrap_or_else(|held| held.into_inner()).get(name).cloned();
            for path in std::iter::once(&committed).chain(staged.as_ref()) {
                let file = match open_patiently(path) {
                    Ok(Some(file)) => file,
                    Ok(None) => continue,
                    // Somebody took our right to read it. Another may take its name.
                    Err(error) if error.kind() == io::ErrorKind::PermissionDenied && *path == committed => {
                        self.quarantine(path, &format_args!("it can't be opened: {error}"))?;
                        continue;
                    }
                    Err(error) => return Err(io_error("open", path)(error)),
                };
                match flock(&file, FlockOperation::NonBlockingLockShared) {
                    Ok(()) => {}
                    Err(rustix::io::Errno::WOULDBLOCK) => continue,
                    Err(error) => return Err(io_error("lock", path)(io::Error::from(error))),
                }
                if self.settings.recheck && !self.is_still_right(path, &file, name, *path == committed)? {
                    continue;
                }
                let metadata = file.metadata().map_err(io_error("stat", path))?;
                // It may have been evicted between open and lock; then the next who wants it would not find it.
                if metadata.nlink() == 0 {
                    continue;
                }
                if metadata.is_file() && metadata.len() == size {
                    return Ok(Some(Object::new(file, size)));
                }
                tracing::debug!(path = %path.display(), found = metadata.len(), expected = size,
                    "cache: an object of another size is not used");
            }
            if staged.is_none() {
                break;
            }
        }
        Ok(self.lower.iter().find_map(|lower| lower.object(name, size)))
    }

    /// How far an object of `size` bytes is on its way to the disk.
    pub fn standing(&self, name: &ObjectDigest, size: u64) -> Standing {
        let staged = self.staged.lock().unwrap_or_else(|held| held.into_inner()).contains_key(name);
        // Until its commit is over it has no index.
        if staged {
            Standing::Staged
        } else if is_file_of(&self.spread("objects", &name.hex()), size)
            || self.lower.iter().any(|lower| lower.has_object(name, size))
        {
            Standing::Named
        } else {
            Standing::Absent
        }
    }

    /// Hashes an object that is about to be opened. What still lies in staging is its fill's: it is left where it is.
    fn is_still_right(
        &self,
        path: &Path,
        file: &File,
        name: &ObjectDigest,
        is_committed: bool,
    ) -> Result<bool, CacheError> {
        if is_committed {
            return self.recheck(path, file, name);
        }
        let found = file.metadata().and_then(|found| name_of(file, found.len(), &|_| ()));
        Ok(found.is_ok_and(|found| found == *name))
    }

    /// Whether an object of `size` bytes is here or in a lower cache, without opening it: what [`Cache::object`] would
    /// give, but for locks and damage that was not found yet.
    pub fn has_object(&self, name: &ObjectDigest, size: u64) -> bool {
        let staged = self.staged.lock().unwrap_or_else(|held| held.into_inner()).get(name).cloned();
        staged.is_some_and(|path| is_file_of(&path, size))
            || is_file_of(&self.spread("objects", &name.hex()), size)
            || self.lower.iter().any(|lower| lower.has_object(name, size))
    }
}

/// Opens a file, and where no more can be opened just now, waits for others to be closed: files that have become objects
/// are, as soon as the disk has them.
pub(super) fn open_patiently(path: &Path) -> io::Result<Option<File>> {
    /// Two seconds in all.
    const TRIES: u32 = 100;
    const PAUSE: Duration = Duration::from_millis(20);
    for _ in 0..TRIES {
        match open_existing(path) {
            Err(error) if is_exhausted(&error) => std::thread::sleep(PAUSE),
            outcome => return outcome,
        }
    }
    open_existing(path)
}

fn is_exhausted(error: &io::Error) -> bool {
    let [process, system] = [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE].map(|errno| errno.raw_os_error());
    error.raw_os_error().is_some_and(|found| found == process || found == system)
}
