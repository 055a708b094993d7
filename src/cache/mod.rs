//! Verified bytes on disk, shared by all mounts of a user. Knows digests and files, nothing of tar or OCI.
//!
//! ```text
//! <root>/                      0700, owned by us
//!   format                     the layout's version, with a check of its own
//!   blobs/sha256/<ab>/<hex>    manifests, configs, named indexes and their heads: hashed again at each read
//!   indexes/<ab>/<key>         derived indexes, each behind a digest of its own
//!   objects/<ab>/<hex>         complete, verified files, 0444
//!   partial/<ab>/<hex>         sparse file being filled: its holes are the map; <hex>.list its chunk digests
//!   incoming/<key>/            a fill in progress, with its `lock`; or a fill that was interrupted, with
//!                              what the next one needs to go on ([`resume`])
//!   incoming/<key>.<pid>.<n>/  the same for one process alone, locked too: a long blob, or a fill beside one that hangs
//!   tags/<ab>/<key>            what a tag was last known to be, and which referrer a rule of trust led to
//!   kits/<ab>/<hex>            which files of the cache belong to a kit, and whether it is kept
//!   served/<ab>/<key>          which kit a directory serves, and which one it served before
//!   evict.lock                 held by the process that evicts
//!   kits.lock                  held while a record under kits/ is changed
//!   quarantine/<area>-<name>.N damaged files, set aside; absent to all but `cache gc`
//!   *.<pid>.<n>.tmp            beside any file: what is to get its name when it is whole
//!   <hex>.<pid>.new            under partial/: another name of a complete file, about to replace a damaged object
//! ```
//!
//! Invariants:
//! - What has a name under `objects/` was verified and on the disk before it got the name ([`staging`]).
//! - Every file but a partial one gets its name when it is whole, by a rename or a link, so a reader sees all of it or
//!   none; of a partial one nothing counts before it was hashed.
//! - Whatever is missing, short or wrong counts as absent; the worst that a crash costs is a fetch.
//! - A temporary file is locked while it is written, so one that is not is a killed process's (`leftovers`).
//! - Lower caches (`lower`) are never written to.
//!
//! Locks, in the order in which they are taken; all but the mutex are `flock`s:
//! 1. `incoming/<key>/lock`, while something is staged there; or `kits.lock`, while a record under kits/ is changed;
//! 2. the mutex of the one thread of a process that counts and evicts (`room`, `limit`);
//! 3. `evict.lock`;
//! 4. those of files: alone what is evicted, or a temporary file while it is written; shared an open object or partial
//!    file, for as long as it is open, whatever else is locked meanwhile.
//!
//! Eviction goes against that order: under `evict.lock` it tries the lock of staging that seems abandoned, and takes
//! `kits.lock` where a record goes. So no `flock` is waited for in the kernel: `kits.lock` is tried for two seconds,
//! `evict.lock` for five, and the others once, or a few times for a millisecond where a partial file is being evicted.
//! Whoever does not get one goes without it, or fails and says so.
//!
//! All calls block on the disk: call them from a blocking thread.

mod blobs;
mod check;
mod damage;
mod durable;
mod evict;
mod files;
mod format;
mod kits;
mod leftovers;
mod limit;
mod lower;
mod map;
mod objects;
mod partial;
pub mod resume;
mod room;
mod small;
pub mod staging;
#[cfg(test)]
mod testing;
pub mod usage;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

pub use blobs::NewBlob;
pub use check::{CacheFile, Damage, Health, Repair};
pub use evict::{Evicted, Policy, Protected, Removed, Small};
pub use kits::{KitRecord, LayerRecord, Served};
pub use leftovers::Leftover;
pub use limit::{Limit, Marks};
pub use objects::{CachedRange, Object, Standing};
pub use partial::Partial;
pub use resume::{Beside, Left, Reached};
pub use small::LastKnown;
pub use staging::{Sealed, StagedFile, StagedNumber, StagedState, Staging};
pub use usage::{Amount, Area, Usage};

use crate::object::ObjectDigest;
use durable::Durable;
use lower::Lower;
use room::Room;

/// A cache directory.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
    settings: Settings,
    room: Arc<Room>,
    /// Where is looked after this one.
    lower: Vec<Lower>,
    /// Objects that this process has verified and that still lie in staging.
    staged: Mutex<HashMap<ObjectDigest, PathBuf>>,
    durable: Durable,
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
    /// There is no room for more: the disk is full or read-only, or the cache has reached its limit and nothing in it may go.
    #[error("cache: no room for {path}: {why}")]
    Full {
        /// The file that was to grow.
        path: PathBuf,
        /// What is full.
        why: String,
    },
    /// The directory holds something else, which is left alone.
    #[error(
        "{path} is not empty and not a cache of kitfs; choose another directory with --cache-dir or KITFS_CACHE_DIR"
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
    },
    /// A cache of another version, which is left alone.
    #[error(
        "{path} is a cache of version {version}, and this kitfs knows version 1; \
         use the kitfs that made it, or choose another directory with --cache-dir or KITFS_CACHE_DIR"
    )]
    Version {
        /// The cache directory.
        path: PathBuf,
        /// The version that made it.
        version: u32,
    },
    /// A cache that does not say of which version it is.
    #[error("the cache {path} is damaged: its `format` {found}; `kitfs cache verify --repair` writes it anew")]
    Format {
        /// The cache directory.
        path: PathBuf,
        /// What became of `format`.
        found: String,
    },
    /// Something lies in the place of a directory that leads elsewhere.
    #[error("{path} in the cache is a symbolic link, which kitfs neither makes nor follows; remove it")]
    Planted {
        /// The link.
        path: PathBuf,
    },
    /// A lower cache is not there, or none.
    #[error("the lower cache {path} {why}; correct --cache-lower or KITFS_CACHE_LOWER, or leave it out")]
    Lower {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
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
        io::ErrorKind::ReadOnlyFilesystem => {
            let why = "the disk of the cache is read-only; have it mounted for writing again".to_owned();
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

    /// Opens a cache, making it where there is none, and clears staging that no process holds and none can go on from.
    pub fn open_with(root: &Path, settings: Settings) -> Result<Self, CacheError> {
        Self::open_as(root, settings, false)
    }

    /// Opens a cache whose `format` may be damaged, to check and repair it: not one of another version.
    pub fn open_to_check(root: &Path, settings: Settings) -> Result<Self, CacheError> {
        Self::open_as(root, settings, true)
    }

    fn open_as(root: &Path, settings: Settings, also_damaged: bool) -> Result<Self, CacheError> {
        // Its own path may lead through links.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(io_error("create", root))?;
        let owner = fs::metadata(root).map_err(io_error("stat", root))?.uid();
        let user = rustix::process::geteuid().as_raw();
        if owner != user {
            return Err(CacheError::Owner { path: root.to_owned(), owner, user });
        }
        let lower = Lower::open_all(root, &settings.lower, settings.recheck)?;
        let (staged, counter) = (Mutex::new(HashMap::new()), AtomicU64::new(0));
        let (room, durable) = (Arc::new(Room::new(root)), Durable::new(root));
        let cache = Self { root: root.to_owned(), settings, room, lower, staged, durable, counter };
        cache.check_format(also_damaged)?;
        cache.close_to_others()?;
        // Made while there is room for it; a disk that is read-only has no use for it.
        let _ = cache.open_eviction_lock();
        cache.sweep_incoming();
        Ok(cache)
    }

    /// A file of the cache, to ask what its file system can do.
    pub fn sample(&self) -> io::Result<fs::File> {
        fs::File::open(self.root.join("format"))
    }

    /// Whether what is in the cache is hashed again whenever it is opened.
    pub fn rechecks(&self) -> bool {
        self.settings.recheck
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn spread(&self, area: &str, name: &str) -> PathBuf {
        spread(&self.root, area, name)
    }
}

/// `<area>/<ab>/<name>`: spread over 256 directories by the first two characters.
fn spread(root: &Path, area: &str, name: &str) -> PathBuf {
    let mut path = root.join(area);
    path.push(name.get(..2).unwrap_or("__"));
    path.push(name);
    path
}

#[cfg(test)]
mod tests;
