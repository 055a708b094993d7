//! Which files belong to a kit, as whoever opened the kit has told; and which kit a directory serves, or served before.
//! Small JSON files; one that can't be read counts as absent. The modification time says when a kit was last used.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::map::contents;
use super::{Cache, CacheError, io_error};
use crate::digest::Digest;

/// So many names of a kit are remembered, the latest: more tags than a kit carries.
const NAMES: usize = 16;

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
    /// The key of its derived index.
    pub index_key: Digest,
    /// The index that is named for it, and the head of that index: blobs, where they are in the cache.
    pub named: Option<(Digest, Digest)>,
    /// Whether its content stays until the kit is removed.
    pub kept: bool,
}

/// Which kits a directory serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Served {
    dir: String,
    now: Digest,
    before: Option<Digest>,
}

impl KitRecord {
    /// Whether any of it is kept.
    pub fn is_kept(&self) -> bool {
        self.layers.iter().any(|layer| layer.kept)
    }

    /// Adds what an older record of the same kit knew.
    fn add(&mut self, older: Self) {
        for reference in older.references.into_iter().rev() {
            if !self.references.contains(&reference) {
                self.references.insert(0, reference);
            }
        }
        let surplus = self.references.len().saturating_sub(NAMES);
        self.references.drain(..surplus);
        for blob in older.blobs {
            if !self.blobs.contains(&blob) {
                self.blobs.push(blob);
            }
        }
        for layer in older.layers {
            let same = |known: &&mut LayerRecord| (known.digest, &known.path) == (layer.digest, &layer.path);
            match self.layers.iter_mut().find(same) {
                Some(known) => {
                    known.kept |= layer.kept;
                    known.named = known.named.or(layer.named);
                }
                None => self.layers.push(layer),
            }
        }
    }
}

impl Cache {
    /// Notes what belongs to a kit, together with what was noted before, and that it is used now.
    pub fn note_kit(&self, mut record: KitRecord) -> Result<(), CacheError> {
        let path = self.spread("kits", &record.digest.hex());
        let older = read::<KitRecord>(&path)?.filter(|older| older.digest == record.digest);
        if let Some(older) = older {
            let known = older.clone();
            record.add(older);
            if known == record {
                return touch(&path);
            }
        }
        self.write_json(&path, &record)
    }

    /// All kits that are known, with the times when they were last used.
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

    /// Forgets that a kit is kept, or the whole record of it.
    pub fn forget_kit(&self, digest: &Digest) -> Result<(), CacheError> {
        let path = self.spread("kits", &digest.hex());
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    /// Notes which kit a directory serves from now on.
    pub fn note_served(&self, dir: &Path, digest: &Digest) -> Result<(), CacheError> {
        let dir = dir.to_string_lossy().into_owned();
        let path = self.spread("served", &Digest::of(dir.as_bytes()).hex());
        let known = read::<Served>(&path)?.filter(|known| known.dir == dir);
        let before = match known {
            Some(known) if known.now == *digest => return touch(&path),
            Some(known) => Some(known.now),
            None => None,
        };
        self.write_json(&path, &Served { dir, now: *digest, before })
    }

    /// The kits that directories served before their present ones.
    pub fn served_before(&self) -> Result<Vec<Digest>, CacheError> {
        let mut before = Vec::new();
        for path in self.files_of("served")? {
            before.extend(read::<Served>(&path)?.and_then(|served| served.before));
        }
        Ok(before)
    }

    fn write_json(&self, path: &Path, value: &impl Serialize) -> Result<(), CacheError> {
        let bytes = serde_json::to_vec(value).map_err(|error| io_error("encode", path)(io::Error::other(error)))?;
        self.write_file(path, &[&bytes])
    }

    /// The files of an area that is spread over directories, but for temporary ones.
    fn files_of(&self, area: &str) -> Result<Vec<std::path::PathBuf>, CacheError> {
        let root = self.root.join(area);
        let mut files = Vec::new();
        for dir in fs::read_dir(&root).map_err(io_error("read", &root))?.flatten() {
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

/// The name that a file which says this of a directory should have.
pub(super) fn name_of_served(bytes: &[u8]) -> Option<Digest> {
    serde_json::from_slice::<Served>(bytes).ok().map(|served| Digest::of(served.dir.as_bytes()))
}

fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>, CacheError> {
    let Some(bytes) = contents(path)? else { return Ok(None) };
    Ok(serde_json::from_slice(&bytes).ok())
}

/// Notes that a file is used now.
fn touch(path: &Path) -> Result<(), CacheError> {
    let flags = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    let file = File::options().append(true).custom_flags(flags).open(path).map_err(io_error("open", path))?;
    file.set_modified(SystemTime::now()).map_err(io_error("touch", path))
}
