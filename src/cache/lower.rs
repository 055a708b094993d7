//! Lower caches: other caches that are looked into before the network, in the order given, and never written to.
//!
//! Anybody may own one, so its word counts for nothing. What its bytes prove counts: a blob or chunk is hashed whenever
//! it is looked at, a chunk list whenever it is read, and an object once by each process, and again when its file has
//! changed, or at each open where that is asked for ([`Settings::recheck`](super::Settings::recheck)); then it is served
//! where it lies. (Who may write to it can still change bytes that were hashed; so a lower
//! cache should be one that nobody writes to but its own kitfs.) What a file merely claims counts only where nobody but
//! root and we could have written it: a derived index, which says that somebody hashed a whole layer, and what a tag was
//! last known to be.
//!
//! Nothing of it is mapped unless nobody but root and we can write it, as whoever shortens a mapped file kills us.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use rustix::fs::{FlockOperation, flock};

use super::damage::name_of;
use super::files::{identity, is_file_of, open_existing};
use super::format::{self, Format};
use super::map::contents;
use super::objects::{Object, open_patiently};
use super::partial::chunk_in;
use super::small::{LastKnown, index_body};
use super::{CacheError, io_error, spread};
use crate::digest::{Digest, Unverified, Verified};
use crate::object::{ChunkList, ObjectDigest, VerifiedChunk};

/// What is read into memory of a blob in a cache that others can write. Manifests have at most 4 MiB; the index of a
/// million files has about 128, and a longer one is fetched.
const READ: u64 = 128 << 20;

/// A cache that is looked into.
#[derive(Debug)]
pub(super) struct Lower {
    root: PathBuf,
    /// Whether an object is hashed again whenever it is opened.
    recheck: bool,
    /// What this process has hashed. A mutex for each object, held while it is hashed, so that all who open it wait for
    /// one; the outer one is held for a look.
    hashed: Mutex<HashMap<ObjectDigest, Arc<Mutex<Option<Hashed>>>>>,
}

/// What came of hashing an object.
#[derive(Debug, Clone, Copy)]
struct Hashed {
    stamp: Stamp,
    is_right: bool,
}

/// A file as it was. If any of this changes, so may its bytes have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    file: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(found: &fs::Metadata) -> Self {
        Self {
            file: identity(found),
            size: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        }
    }
}

impl Lower {
    /// Opens lower caches; one that is the cache itself has nothing to add.
    pub(super) fn open_all(own: &Path, dirs: &[PathBuf], recheck: bool) -> Result<Vec<Self>, CacheError> {
        let own = fs::metadata(own).map(|found| identity(&found)).ok();
        let mut all = Vec::new();
        for dir in dirs {
            let refused = |why: String| CacheError::Lower { path: dir.clone(), why };
            let found = fs::metadata(dir).map_err(|error| refused(format!("can't be used: {error}")))?;
            if own == Some(identity(&found)) {
                continue;
            }
            match format::look(dir) {
                Ok(Format::Ours) => {}
                Ok(Format::Other(version)) => return Err(refused(format!("is a cache of version {version}, not 1"))),
                Ok(Format::Damaged(found)) => return Err(refused(format!("is damaged: its `format` {found}"))),
                Ok(Format::Empty | Format::Foreign) => return Err(refused("is not a cache of kitfs".to_owned())),
                Err(error) => return Err(refused(format!("can't be read: {}", crate::report::chain(&error)))),
            }
            for area in ["objects", "blobs/sha256"] {
                fs::read_dir(dir.join(area)).map_err(|error| refused(format!("can't be read: {area}: {error}")))?;
            }
            all.push(Self { root: dir.clone(), recheck, hashed: Mutex::default() });
        }
        Ok(all)
    }

    pub(super) fn path(&self, area: &str, name: &str) -> PathBuf {
        spread(&self.root, area, name)
    }

    /// Whether nobody but root and we could have written a file: none else owns or may write it, or a directory on the
    /// way to it.
    fn vouches_for(&self, path: &Path) -> bool {
        let user = rustix::process::geteuid().as_raw();
        let is_closed = |path: &Path| {
            let found = if path == self.root { fs::metadata(path) } else { fs::symlink_metadata(path) };
            found.is_ok_and(|found| (found.uid() == 0 || found.uid() == user) && found.mode() & 0o022 == 0)
        };
        path.ancestors().take_while(|step| step.starts_with(&self.root)).all(is_closed)
    }

    /// All of a file that nobody but root and we could have written.
    fn vouched(&self, area: &str, name: &str) -> Option<Bytes> {
        let path = self.path(area, name);
        self.vouches_for(&path).then(|| self.told(contents(&path))).flatten()
    }

    /// What a look led to. A lower cache that can't be read has nothing.
    fn told<T>(&self, found: Result<Option<T>, CacheError>) -> Option<T> {
        found.unwrap_or_else(|error| {
            tracing::warn!(lower = %self.root.display(), error = %crate::report::chain(&error), "a lower cache is not used");
            None
        })
    }

    /// An object, if it hashes right.
    pub(super) fn object(&self, name: &ObjectDigest, size: u64) -> Option<Object> {
        self.told(self.try_object(name, size))
    }

    fn try_object(&self, name: &ObjectDigest, size: u64) -> Result<Option<Object>, CacheError> {
        let path = self.path("objects", &name.hex());
        let Some(file) = open_patiently(&path).map_err(io_error("open", &path))? else { return Ok(None) };
        // Keeps it from eviction, where it has an owner who evicts and a file system with locks.
        if flock(&file, FlockOperation::NonBlockingLockShared) == Err(rustix::io::Errno::WOULDBLOCK) {
            return Ok(None);
        }
        let found = file.metadata().map_err(io_error("stat", &path))?;
        if found.len() != size || !self.is_right(name, &path, &file, &found)? {
            return Ok(None);
        }
        Ok(Some(Object::of_lower(file, size, self.vouches_for(&path))))
    }

    /// Whether an open object hashes right, or did when this process last hashed it and has not changed since.
    fn is_right(
        &self,
        name: &ObjectDigest,
        path: &Path,
        file: &File,
        found: &fs::Metadata,
    ) -> Result<bool, CacheError> {
        let entry = self.hashed.lock().unwrap_or_else(|held| held.into_inner()).entry(*name).or_default().clone();
        let mut hashed = entry.lock().unwrap_or_else(|held| held.into_inner());
        let stamp = Stamp::of(found);
        if let Some(known) = *hashed
            && known.stamp == stamp
            && !self.recheck
        {
            return Ok(known.is_right);
        }
        let content = name_of(file, found.len(), &|_| ()).map_err(io_error("read", path))?;
        let is_right = content == *name;
        if !is_right {
            tracing::warn!(path = %path.display(), found = %content, "an object of a lower cache is damaged or false, and not used");
        }
        *hashed = Some(Hashed { stamp, is_right });
        Ok(is_right)
    }

    /// Whether an object is here that was not found wrong.
    pub(super) fn has_object(&self, name: &ObjectDigest, size: u64) -> bool {
        let path = self.path("objects", &name.hex());
        if !is_file_of(&path, size) {
            return false;
        }
        let entry = self.hashed.lock().unwrap_or_else(|held| held.into_inner()).get(name).cloned();
        // One that is being hashed was not found wrong yet.
        let known = entry.and_then(|entry| entry.try_lock().ok().and_then(|hashed| *hashed));
        known.is_none_or(|known| {
            known.is_right || fs::symlink_metadata(&path).is_ok_and(|found| Stamp::of(&found) != known.stamp)
        })
    }

    /// A blob, if it hashes right.
    pub(super) fn blob(&self, digest: &Digest) -> Option<Verified> {
        let path = self.path("blobs/sha256", &digest.hex());
        let bytes = if self.vouches_for(&path) { contents(&path) } else { read(&path, READ) };
        let verified = Unverified::new(self.told(bytes)?).verify(digest);
        let warn = |mismatch| tracing::warn!(path = %path.display(), %mismatch, "a blob of a lower cache is not used");
        verified.map_err(warn).ok()
    }

    /// The file of a blob, nothing of it proved.
    pub(super) fn blob_file(&self, digest: &Digest) -> Option<File> {
        let path = self.path("blobs/sha256", &digest.hex());
        self.told(open_existing(&path).map_err(io_error("open", &path)))
    }

    /// A derived index, if we may believe that its layer was hashed.
    pub(super) fn index(&self, key: &Digest) -> Option<Bytes> {
        self.vouched("indexes", &key.hex()).and_then(index_body)
    }

    /// What a name was last known to lead to, if we may believe it.
    pub(super) fn known(&self, reference: &str) -> Option<LastKnown> {
        LastKnown::read(&self.vouched("tags", &Digest::of(reference.as_bytes()).hex())?, reference)
    }

    /// The chunk digests of an object.
    pub(super) fn chunk_list(&self, object: &ObjectDigest, size: u64) -> Option<ChunkList<Bytes>> {
        let path = self.path("partial", &object.hex()).with_extension("list");
        // 32 bytes for each MiB; a longer file is none.
        let bytes = self.told(read(&path, size / (1 << 15) + 32))?;
        ChunkList::new(size, bytes).filter(|list| list.object() == *object)
    }

    /// A chunk of an object that is here in part, or whole and damaged elsewhere.
    pub(super) fn chunk(&self, list: &ChunkList<Bytes>, chunk: u64) -> Option<VerifiedChunk> {
        ["partial", "objects"].iter().find_map(|area| {
            let path = self.path(area, &list.object().hex());
            let file = self.told(open_patiently(&path).map_err(io_error("open", &path)))?;
            self.told(chunk_in(&file, list, chunk).map_err(io_error("read", &path)))
        })
    }
}

/// All of a file of at most `most` bytes, in memory.
fn read(path: &Path, most: u64) -> Result<Option<Bytes>, CacheError> {
    let Some(file) = open_existing(path).map_err(io_error("open", path))? else { return Ok(None) };
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes).map_err(io_error("read", path))?;
    Ok(Some(Bytes::from(bytes)).filter(|bytes| bytes.len() as u64 <= most))
}

#[cfg(test)]
#[path = "lower_tests.rs"]
mod tests;
