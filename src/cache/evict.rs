//! What goes when there is no room: quarantined files first; then objects, partial files and abandoned staging, those
//! that were used longest ago first; then what goes late; then small files that nothing needs any more.
//!
//! One process evicts at a time, under `evict.lock`, which others try for a while and never wait for in the kernel: two
//! that evict at once would both take what one had to. What is open anywhere has a shared lock and stays: a file is
//! locked alone, looked at again, and only then removed. The lock of a file alone is enough for safety.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::FlockOperation;

use super::files::{Claim, lock_named, lock_within, on_disk, open_existing, open_lock};
use super::staging::remove_abandoned;
use super::usage::{Area, Item, Usage};
use super::{Cache, CacheError, io_error};
use crate::digest::Digest;
use crate::object::ObjectDigest;

/// The file whose lock is held while something is evicted.
pub(super) const LOCK: &str = "evict.lock";

/// How long the lock on eviction is tried for. Others hold it while they look at the cache and remove files, which takes
/// seconds where there are millions; who does not get it keeps less for a moment.
const PATIENCE: Duration = Duration::from_secs(5);

/// What only those above the cache know of its files: which belong together. Asked when something has to go, so that it
/// must not make the cache grow.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// Which objects stay, and which go late.
    pub protected: fn(&Cache) -> Result<Protected, CacheError>,
    /// Small files that nothing in the cache needs any more, those that were used longest ago first.
    pub spare: fn(&Cache) -> Result<Vec<Small>, CacheError>,
}

impl Default for Policy {
    /// Nothing is known: all objects are equal, and small files stay.
    fn default() -> Self {
        Self { protected: |_| Ok(Protected::default()), spare: |_| Ok(Vec::new()) }
    }
}

/// Objects that do not go, or late.
#[derive(Debug, Clone, Default)]
pub struct Protected {
    /// Those of kits that are kept.
    pub never: HashSet<ObjectDigest>,
    /// Those of kits that a directory served before the present one: who rolls back wants them.
    pub late: HashSet<ObjectDigest>,
}

/// A small file of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Small {
    /// A blob by its digest.
    Blob(Digest),
    /// A derived index by its key.
    Index(Digest),
    /// What a name led to, by the digest of the name.
    Tag(Digest),
    /// What is recorded of a kit, by its manifest's digest. The last, as it tells of the others.
    Kit(Digest),
}

/// What an eviction took.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Evicted {
    /// What went.
    pub gone: Usage,
    /// The bytes that the cache holds now.
    pub left: u64,
}

/// What became of something that was to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removed {
    /// It is gone.
    Gone,
    /// Somebody uses it, so it stays.
    InUse,
    /// It was not there.
    Absent,
}

impl Cache {
    /// Removes what may go until the cache holds no more than `bytes`, or nothing more may go. With `dry_run` it only
    /// tells what would go.
    pub fn evict_to(&self, bytes: u64, dry_run: bool) -> Result<Evicted, CacheError> {
        let _lock = if dry_run { None } else { Some(self.lock_eviction()?) };
        let mut candidates = Vec::new();
        let held = self.scan(|item| candidates.extend(Some(item).filter(may_go)))?.bytes();
        let mut evicted = Evicted { gone: Usage::default(), left: held };
        if held <= bytes {
            return Ok(evicted);
        }
        let Protected { never, late } = (self.settings.policy.protected)(self)?;
        candidates.retain(|item| item.object().is_none_or(|object| !never.contains(&object)));
        candidates.sort_by_cached_key(|item| {
            let is_late = item.object().is_some_and(|object| late.contains(&object));
            let is_waste = matches!(item.area, Area::Quarantine | Area::Temporary);
            (!is_waste, is_late, item.used)
        });
        for item in candidates {
            if evicted.left <= bytes {
                return Ok(evicted);
            }
            if told(&item.path, remove_item(&item, dry_run)) == Removed::Gone {
                evicted.took(item.area, item.bytes);
            }
        }
        if evicted.left > bytes {
            self.evict_small(bytes, dry_run, &mut evicted)?;
        }
        Ok(evicted)
    }

    fn evict_small(&self, bytes: u64, dry_run: bool, evicted: &mut Evicted) -> Result<(), CacheError> {
        let began = SystemTime::now();
        for small in (self.settings.policy.spare)(self)? {
            if evicted.left <= bytes {
                break;
            }
            let path = self.small_path(&small);
            let Ok(found) = fs::symlink_metadata(&path) else { continue };
            if dry_run || told(&path, self.remove_spare(small, Some(began))) == Removed::Gone {
                evicted.took(small.area(), on_disk(&found));
            }
        }
        Ok(())
    }

    /// Removes an object, or what there is of it, unless somebody uses it. With `dry_run` it only tells what would become
    /// of it.
    pub fn remove_object(&self, object: &ObjectDigest, dry_run: bool) -> Result<Removed, CacheError> {
        let partial = remove_partial(&self.spread("partial", &object.hex()), None, dry_run)?;
        let whole = remove_idle(&self.spread("objects", &object.hex()), None, dry_run)?;
        Ok(match (whole, partial) {
            (Removed::InUse, _) | (_, Removed::InUse) => Removed::InUse,
            (Removed::Absent, Removed::Absent) => Removed::Absent,
            _ => Removed::Gone,
        })
    }

    /// Removes a small file. Who has it open keeps what it read.
    pub fn remove_small(&self, small: Small) -> Result<Removed, CacheError> {
        self.remove_spare(small, None)
    }

    /// The same, unless it was written or used after `before`: then it is needed after all.
    fn remove_spare(&self, small: Small, before: Option<SystemTime>) -> Result<Removed, CacheError> {
        let path = self.small_path(&small);
        let _lock = matches!(small, Small::Kit(_)).then(|| self.lock_records()).transpose()?;
        let used = fs::symlink_metadata(&path).and_then(|found| found.modified()).ok();
        match (used, before) {
            (Some(used), Some(before)) if used > before => Ok(Removed::InUse),
            _ => remove_name(&path),
        }
    }

    fn small_path(&self, small: &Small) -> PathBuf {
        let (area, name) = small.place();
        self.spread(area, &name)
    }

    pub(super) fn open_eviction_lock(&self) -> Result<File, CacheError> {
        open_lock(&self.root.join(LOCK))
    }

    /// The lock that who evicts holds.
    fn lock_eviction(&self) -> Result<File, CacheError> {
        lock_within(&self.root.join(LOCK), PATIENCE)
    }
}

impl Small {
    /// The directory that it lies in, below the cache's own, and its name.
    pub(super) fn place(&self) -> (&'static str, String) {
        let (Self::Blob(name) | Self::Index(name) | Self::Tag(name) | Self::Kit(name)) = self;
        (self.area().dir(), name.hex())
    }

    fn area(&self) -> Area {
        match self {
            Self::Blob(_) => Area::Blobs,
            Self::Index(_) => Area::Indexes,
            Self::Tag(_) => Area::Tags,
            Self::Kit(_) => Area::Kits,
        }
    }
}

impl Evicted {
    fn took(&mut self, area: Area, bytes: u64) {
        self.gone.add(area, 1, bytes);
        self.left = self.left.saturating_sub(bytes);
    }
}

/// Whether an item is content, which can be had again, or what a killed process has left of a file. What is no object's by
/// its name is not ours to judge.
fn may_go(item: &Item) -> bool {
    match item.area {
        Area::Objects | Area::Partial => item.object().is_some(),
        // Who writes a temporary file has it locked.
        Area::Incoming | Area::Quarantine | Area::Temporary => true,
        Area::Blobs | Area::Indexes | Area::Tags | Area::Kits | Area::Served | Area::Other => false,
    }
}

/// What can't be removed stays, and others go in its place.
fn told(path: &Path, removed: Result<Removed, CacheError>) -> Removed {
    removed.unwrap_or_else(|error| {
        tracing::debug!(path = %path.display(), %error, "cache: not evicted");
        Removed::InUse
    })
}

fn remove_item(item: &Item, dry_run: bool) -> Result<Removed, CacheError> {
    let used = Some(item.used);
    match item.area {
        Area::Incoming => remove_abandoned(&item.path, dry_run),
        Area::Partial => remove_partial(&item.path, used, dry_run),
        _ => remove_idle(&item.path, used, dry_run),
    }
}

/// Removes a partial file, then its list.
fn remove_partial(path: &Path, used: Option<SystemTime>, dry_run: bool) -> Result<Removed, CacheError> {
    let removed = remove_idle(path, used, dry_run)?;
    let list = path.with_extension("list");
    let of_list = match removed {
        Removed::InUse => return Ok(removed),
        // Whose list is new is about to be filled.
        Removed::Absent => remove_idle(&list, used, dry_run)?,
        Removed::Gone if dry_run => return Ok(removed),
        Removed::Gone => remove_name(&list)?,
    };
    Ok(if removed == Removed::Gone { removed } else { of_list })
}

/// Removes a file that nobody has open, and that nobody has used after `used`.
fn remove_idle(path: &Path, used: Option<SystemTime>, dry_run: bool) -> Result<Removed, CacheError> {
    let Some(file) = open_existing(path).map_err(io_error("open", path))? else { return Ok(Removed::Absent) };
    let held = match lock_named(file, path, FlockOperation::NonBlockingLockExclusive)? {
        Claim::Held(file) => file,
        Claim::Busy => return Ok(Removed::InUse),
        Claim::Gone => return Ok(Removed::Absent),
    };
    let last = held.metadata().and_then(|found| found.modified()).map_err(io_error("stat", path))?;
    if used.is_some_and(|used| last > used) {
        return Ok(Removed::InUse);
    }
    if dry_run { Ok(Removed::Gone) } else { remove_name(path) }
}

fn remove_name(path: &Path) -> Result<Removed, CacheError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(Removed::Gone),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Removed::Absent),
        Err(error) => Err(io_error("remove", path)(error)),
    }
}

#[cfg(test)]
#[path = "evict_tests.rs"]
mod tests;
