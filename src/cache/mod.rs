//! Verified bytes on disk, shared by all mounts of a user. Knows digests and files, nothing of tar or OCI.
//!
//! ```text
//! <root>/                      0700, owned by us
//!   format                     the layout's version
//!   blobs/sha256/<ab>/<hex>    manifests, configs, named indexes and their heads: hashed again at each read
//!   indexes/<ab>/<key>         derived indexes, each behind a digest of its own
//!   objects/<ab>/<hex>         complete, verified files, 0444
//!   partial/<ab>/<hex>         sparse file being filled: its holes are the map; <hex>.list its chunk digests
//!   incoming/<key>/            a fill in progress, or one long blob, locked
//!   tags/<ab>/<key>            what a tag was last known to be, and which referrer a rule of trust led to
//!   kits/<ab>/<hex>            which files of the cache belong to a kit, and whether it is kept
//!   served/<ab>/<key>          which kit a directory serves, and which one it served before
//!   evict.lock                 held by the process that evicts
//! ```
//!
//! Invariants:
//! - What has a name under `objects/` was verified and on the disk before it got the name ([`staging`]).
//! - Every file but a partial one gets its name when it is whole, by a rename or a link, so a reader sees all of it or
//!   none; of a partial one nothing counts before it was hashed.
//! - Whatever is missing, short or wrong counts as absent; the worst that a crash costs is a fetch.
//!
//! Locks: `flock` on `incoming/<key>/lock` (exclusive, while something is staged there) and on an open object or partial
//! file (shared). None is waited for and none is taken while another is held, but for the exclusive ones of what is evicted
//! under `evict.lock`, and that one under the mutex of [`limit`].
//!
//! All calls block on the disk: call them from a blocking thread.

mod blobs;
mod evict;
mod kits;
mod limit;
mod map;
mod objects;
mod partial;
mod small;
pub mod staging;
mod usage;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

pub use blobs::NewBlob;
pub use evict::{Evicted, Policy, Protected, Removed, Small};
pub use kits::{KitRecord, LayerRecord};
pub use limit::{Limit, Marks};
pub use objects::{CachedRange, Object, Standing};
pub use partial::Partial;
pub use small::LastKnown;
pub use staging::{Sealed, StagedFile, StagedNumber, StagedState, Staging};
pub use usage::{Amount, Area, Usage};

use crate::object::ObjectDigest;
use limit::Room;
use map::MAPPED;

/// The content of `format` in a cache of this layout.
const FORMAT: &str = "kitfs-cache 1\n";

/// A cache directory.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
    settings: Settings,
    room: Arc<Room>,
    /// Objects that this process has verified and that still lie in staging.
    staged: Mutex<HashMap<ObjectDigest, PathBuf>>,
    /// Makes temporary names unique within the process.
    counter: AtomicU64,
}

/// How a cache is used.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// How much it may hold.
    pub limit: Limit,
    /// What may go when that is too much.
    pub policy: Policy,
    /// Whether an object is hashed again whenever it is opened.
    pub recheck: bool,
    /// Caches to look into before the network: read, never written, whoever owns them.
    pub lower: Vec<PathBuf>,
}

/// Why the cache can't be used, or a file in it.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The system refused an operation.
    #[error("cache: can't {what} {path}: {cause}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        #[source]
        cause: io::Error,
    },
    /// There is no room for more: the disk is full, or the cache has reached its limit and nothing in it may go.
    #[error("cache: no room for {path}: {why}")]
    Full {
        /// The file that was to grow.
        path: PathBuf,
        /// What is full.
        why: String,
    },
    /// The directory holds something else, or a cache of another version.
    #[error(
        "{path} is not a cache of this version of kitfs: its `format` reads {found:?}, expected {FORMAT:?}; \
         choose another directory with --cache-dir or KITFS_CACHE_DIR"
    )]
    Format {
        /// The cache directory.
        path: PathBuf,
        /// What `format` holds.
        found: String,
    },
    /// The directory belongs to another user, whose word we would have to take for its contents.
    #[error(
        "the cache {path} belongs to user {owner}, and kitfs runs as user {user}; \
         choose another directory with --cache-dir or KITFS_CACHE_DIR"
    )]
    Owner {
        /// The cache directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// The effective user.
        user: u32,
    },
}

impl CacheError {
    /// Whether what it is about was verified or may be: only the place to keep it is missing.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }

    /// Tells an error, but not that there is no room: the cache says so itself, once, when it begins.
    pub fn unless_full(&self, tell: impl FnOnce(&Self)) {
        if !self.is_full() {
            tell(self);
        }
    }

    /// Whether another process holds what was tried for as long as it is tried.
    fn is_busy(&self) -> bool {
        matches!(self, Self::Io { cause, .. } if cause.kind() == io::ErrorKind::WouldBlock)
    }
}

/// Turns an I/O error into one that says what was tried on which file; or that there is no room, where the system says so.
fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CacheError {
    let path = path.to_owned();
    move |cause| match cause.kind() {
        io::ErrorKind::StorageFull => {
            CacheError::Full { path, why: "the disk of the cache is full; free some space on it".to_owned() }
        }
        io::ErrorKind::QuotaExceeded => {
            let why = "the quota on the disk of the cache is used up; free some space, or have it raised".to_owned();
            CacheError::Full { path, why }
        }
        _ => CacheError::Io { what, path, cause },
    }
}

impl Cache {
    /// Opens a cache without a limit, making it where there is none.
    pub fn open(root: &Path) -> Result<Self, CacheError> {
        Self::open_with(root, Settings::default())
    }

    /// Opens a cache, making it where there is none, and clears staging that no process holds.
    pub fn open_with(root: &Path, settings: Settings) -> Result<Self, CacheError> {
        make_dir(root)?;
        let owner = fs::metadata(root).map_err(io_error("stat", root))?.uid();
        let user = rustix::process::geteuid().as_raw();
        if owner != user {
            return Err(CacheError::Owner { path: root.to_owned(), owner, user });
        }
        let (staged, counter) = (Mutex::new(HashMap::new()), AtomicU64::new(0));
        let cache = Self { root: root.to_owned(), settings, room: Arc::new(Room::new(root)), staged, counter };
        cache.check_format()?;
        for dir in ["blobs/sha256", "indexes", "objects", "partial", "incoming", "tags", "kits", "served"] {
            make_dir(&root.join(dir))?;
        }
        // While there is room for it.
        cache.open_eviction_lock()?;
        cache.sweep_incoming();
        Ok(cache)
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn check_format(&self) -> Result<(), CacheError> {
        let path = self.root.join("format");
        match fs::read_to_string(&path) {
            Ok(found) if found == FORMAT => Ok(()),
            Ok(found) => Err(CacheError::Format { path: self.root.clone(), found }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut entries = fs::read_dir(&self.root).map_err(io_error("read", &self.root))?;
                if entries.any(|entry| entry.is_ok_and(|e| !e.file_name().as_encoded_bytes().starts_with(b"format."))) {
                    let found = "(no such file, and the directory is not empty)".to_owned();
                    return Err(CacheError::Format { path: self.root.clone(), found });
                }
                self.write_file(&path, &[FORMAT.as_bytes()])
            }
            Err(error) => Err(io_error("read", &path)(error)),
        }
    }

    /// `<area>/<ab>/<name>`: spread over 256 directories by the first two characters.
    fn spread(&self, area: &str, name: &str) -> PathBuf {
        let mut path = self.root.join(area);
        path.push(name.get(..2).unwrap_or("__"));
        path.push(name);
        path
    }

    /// Writes a file as a whole, from its parts: to a temporary name, synced, then renamed.
    fn write_file(&self, path: &Path, parts: &[&[u8]]) -> Result<(), CacheError> {
        let len = parts.iter().map(|part| part.len() as u64).sum();
        // What is small is what a kit can't be opened without, and goes last: there is room for it as long as the disk has.
        let _growth = if len < MAPPED { self.room.count(len) } else { self.grow(path, len)? };
        self.try_write_file(path, parts).map_err(|error| self.room.noted(error))
    }

    fn try_write_file(&self, path: &Path, parts: &[&[u8]]) -> Result<(), CacheError> {
        if let Some(parent) = path.parent() {
            make_dir(parent)?;
        }
        let serial = self.counter.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_extension(format!("{}.{serial}.tmp", std::process::id()));
        let written = new_file(&temporary, 0o600)
            .and_then(|mut file| parts.iter().try_for_each(|part| file.write_all(part)).and_then(|()| file.sync_data()))
            .and_then(|()| rename_over(&temporary, path));
        written.map_err(|cause| {
            // The error that counts is the first one.
            let _ = fs::remove_file(&temporary);
            io_error("write", path)(cause)
        })
    }
}

/// Gives a file its name, also where an empty directory lies in its way.
fn rename_over(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::IsADirectory => {
            fs::remove_dir(to).and_then(|()| fs::rename(from, to))
        }
        outcome => outcome,
    }
}

/// Makes a directory and its parents with mode 0700; an existing one is fine.
fn make_dir(path: &Path) -> Result<(), CacheError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_error("create", path))
}

/// A new file that must not exist yet, so that no planted link is followed.
fn new_file(path: &Path, mode: u32) -> io::Result<File> {
    fs::OpenOptions::new().read(true).write(true).create_new(true).mode(mode).open(path)
}

/// Opens a regular file for reading, following no link; `None` where there is none, or something else lies there, which
/// can only have been planted.
fn open_existing(path: &Path) -> io::Result<Option<File>> {
    // A pipe would make the open wait for its other end.
    let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits().cast_signed();
    let file = match fs::OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound || is_link(&error) || is_socket(&error) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    Ok(file.metadata()?.is_file().then_some(file))
}

/// Whether a path was not opened because it is a socket.
fn is_socket(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error())
}

/// Whether a path was not opened because it is a symbolic link.
fn is_link(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error())
}

#[cfg(test)]
mod tests;
