//! Which files belong to a kit, as whoever opened the kit has told; and which kit a directory serves, or served before.
//! Small JSON files; one that can't be read counts as absent. The modification time says when a kit was last used.
//!
//! What is noted of a kit is added to what was noted before, under the lock of `kits.lock`: else of two processes that
//! open one kit at once, the later one would undo what the earlier one said, and that may be that the kit is kept.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::files::lock_within;
use super::map::contents;
use super::{Cache, CacheError, io_error};
use crate::digest::Digest;

/// So many names of a kit are remembered, the latest: more tags than a kit carries.
const NAMES: usize = 16;

/// The file whose lock is the records'.
pub(super) const LOCK: &str = "kits.lock";

/// How long the lock is tried for. Whoever holds it reads and writes a file of some KiB.
const PATIENCE: Duration = Duration::from_secs(2);

/// What belongs to a kit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KitRecord {
    /// The digest of its manifest.
    pub digest: Digest,
    /// The references under which it was asked for, the latest last.
    pub references: Vec<String>,
    /// Its repository, as people write it.
    pub repository: String,
    /// Manifests, configs and other documents: its own, its parents', and the image index that led to it.
    pub blobs: Vec<Digest>,
    /// Its layers, as far as they were asked for.
    pub layers: Vec<LayerRecord>,
}

/// What belongs to a layer of a kit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// The digest of its blob.
    pub digest: Digest,
    /// The size of its blob.
    pub size: u64,
    /// Its path in the kit.
    pub path: String,
    /// What stands in the kit before each name in its archive; nothing but in old kits.
    #[serde(default)]
    pub prefix: String,
    /// The key of its derived index.
    pub index_key: Digest,
    /// The index that is named for it, and the head of that index: blobs, where they are in the cache.
    pub named: Option<(Digest, Digest)>,
    /// Whether its content stays until the kit is removed.
    pub kept: bool,
}

/// Which kits a directory serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    /// The directory.
    pub dir: PathBuf,
    /// The kit that was mounted there last.
    pub now: Digest,
    /// The other kit that was mounted there before it.
    pub before: Option<Digest>,
}

impl LayerRecord {
    /// Whether both are records of one layer at one path.
    pub fn is(&self, other: &Self) -> bool {
        (self.digest, &self.path) == (other.digest, &other.path)
    }
}

impl KitRecord {
    /// Whether any of it is kept.
    pub fn is_kept(&self) -> bool {
        self.layers.iter().any(|layer| layer.kept)
    }

    /// What people know it by: its latest name with a tag, as a digest alone says nothing to them.
    pub fn name(&self) -> &str {
        let tagged = self.references.iter().rev().find(|reference| !reference.contains("@sha256:"));
        tagged.or(self.references.last()).unwrap_or(&self.repository)
    }

    /// Adds what a newer record of the same kit tells.
    fn add(&mut self, newer: Self) {
        self.references.retain(|known| !newer.references.contains(known));
        self.references.extend(newer.references);
        let surplus = self.references.len().saturating_sub(NAMES);
        self.references.drain(..surplus);
        self.repository = newer.repository;
        for blob in newer.blobs {
            if !self.blobs.contains(&blob) {
                self.blobs.push(blob);
            }
        }
        for layer in newer.layers {
            match self.layers.iter_mut().find(|known| known.is(&layer)) {
                // The key of the index changes with the way archives are read.
                Some(known) => {
                    *known =
                        LayerRecord { kept: known.kept || layer.kept, named: layer.named.or(known.named), ..layer };
                }
                None => self.layers.push(layer),
            }
        }
    }
}

impl Cache {
    /// Notes what belongs to a kit, together with what was noted before, and that it is used now.
    pub fn note_kit(&self, record: KitRecord) -> Result<(), CacheError> {
        let path = self.spread("kits", &record.digest.hex());
        let _lock = self.lock_records()?;
        let older = read::<KitRecord>(&path)?.filter(|older| older.digest == record.digest);
        let Some(older) = older else { return self.write_json(&path, &record) };
        let mut merged = older.clone();
        merged.add(record);
        if merged == older { touch(&path) } else { self.write_json(&path, &merged) }
    }

    /// All kits that are known, with the times when they were last used, the latest last.
    pub fn kits(&self) -> Result<Vec<(KitRecord, SystemTime)>, CacheError> {
        let mut kits = Vec::new();
        for path in self.files_of("kits")? {
            let Some(record) = read::<KitRecord>(&path)? else { continue };
            if path.file_name().is_none_or(|name| *name != *record.digest.hex()) {
                continue;
            }
            let used = fs::symlink_metadata(&path).and_then(|found| found.modified());
            kits.push((record, used.unwrap_or(SystemTime::UNIX_EPOCH)));
        }
        kits.sort_by_key(|(record, used)| (*used, record.digest));
        Ok(kits)
    }

    /// Forgets what belongs to a kit, and that it is kept.
    pub fn forget_kit(&self, digest: &Digest) -> Result<(), CacheError> {
        let _lock = self.lock_records()?;
        remove(&self.spread("kits", &digest.hex()))
    }

    /// Says of layers of a kit that they are not kept.
    pub fn unmark(&self, digest: &Digest, layers: &[LayerRecord]) -> Result<(), CacheError> {
        let path = self.spread("kits", &digest.hex());
        let _lock = self.lock_records()?;
        let Some(mut record) = read::<KitRecord>(&path)? else { return Ok(()) };
        let unmarked = record.layers.iter_mut().filter(|layer| layers.iter().any(|other| other.is(layer)));
        unmarked.for_each(|layer| layer.kept = false);
        self.write_json(&path, &record)
    }

    /// Takes the lock of the records. It is held for a moment by all who take it, so it is tried for a while.
    pub(super) fn lock_records(&self) -> Result<File, CacheError> {
        lock_within(&self.root.join(LOCK), PATIENCE)
    }

    /// Notes which kit a directory serves from now on.
    pub fn note_served(&self, dir: &Path, digest: &Digest) -> Result<(), CacheError> {
        let path = self.served_path(dir);
        let known = read::<Served>(&path)?.filter(|known| known.dir == dir);
        let before = match known {
            Some(known) if known.now == *digest => return touch(&path),
            Some(known) => Some(known.now),
            None => None,
        };
        self.write_json(&path, &Served { dir: dir.to_owned(), now: *digest, before })
    }

    /// Which kits directories serve, and which they served before.
    pub fn served(&self) -> Result<Vec<Served>, CacheError> {
        let mut all = Vec::new();
        for path in self.files_of("served")? {
            all.extend(read::<Served>(&path)?);
        }
        Ok(all)
    }

    /// Forgets what a directory served.
    pub fn forget_served(&self, dir: &Path) -> Result<(), CacheError> {
        remove(&self.served_path(dir))
    }

    fn served_path(&self, dir: &Path) -> PathBuf {
        self.spread("served", &name_of_dir(dir).hex())
    }

    fn write_json(&self, path: &Path, value: &impl Serialize) -> Result<(), CacheError> {
        let bytes = serde_json::to_vec(value).map_err(|error| io_error("encode", path)(io::Error::other(error)))?;
        self.write_file(path, &[&bytes])
    }

    /// The files of an area that is spread over directories, but for temporary ones.
    pub(super) fn files_of(&self, area: &str) -> Result<Vec<PathBuf>, CacheError> {
        let root = self.root.join(area);
        let mut files = Vec::new();
        let dirs = match fs::read_dir(&root) {
            // Somebody has removed the cache under us.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            dirs => dirs.map_err(io_error("read", &root))?,
        };
        for dir in dirs.flatten() {
            let Ok(entries) = fs::read_dir(dir.path()) else { continue };
            files.extend(entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_none()));
        }
        files.sort();
        Ok(files)
    }
}

/// The name that a file which holds this record of a kit should have.
pub(super) fn name_of_kit(bytes: &[u8]) -> Option<Digest> {
    serde_json::from_slice::<KitRecord>(bytes).ok().map(|record| record.digest)
}

/// The name of the file that says what a directory serves.
fn name_of_dir(dir: &Path) -> Digest {
    Digest::of(dir.as_os_str().as_encoded_bytes())
}

/// The name that a file which says this of a directory should have.
pub(super) fn name_of_served(bytes: &[u8]) -> Option<Digest> {
    serde_json::from_slice::<Served>(bytes).ok().map(|served| name_of_dir(&served.dir))
}

fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>, CacheError> {
    let Some(bytes) = contents(path)? else { return Ok(None) };
    Ok(serde_json::from_slice(&bytes).ok())
}

/// Removes a file; one that has gone is what it should be.
fn remove(path: &Path) -> Result<(), CacheError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Notes that a file is used now.
fn touch(path: &Path) -> Result<(), CacheError> {
    let flags = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    let file = File::options().append(true).custom_flags(flags).open(path).map_err(io_error("open", path))?;
    file.set_modified(SystemTime::now()).map_err(io_error("touch", path))
}

#[cfg(test)]
#[path = "kits_tests.rs"]
mod tests;
