//! What the cache holds, as the disk tells: counted anew each time, so that there is no account that can go stale.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::files::{Identity, identity, on_disk};
use super::format::LOST_AND_FOUND;
use super::{Cache, CacheError, io_error};
use crate::object::ObjectDigest;

/// A part of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Area {
    /// Complete files.
    Objects,
    /// Files that are filled chunk by chunk, each with its chunk list.
    Partial,
    /// Staging directories, each of them one item.
    Incoming,
    /// Documents, and indexes that kits name.
    Blobs,
    /// Derived indexes.
    Indexes,
    /// What names led to.
    Tags,
    /// What belongs to kits.
    Kits,
    /// What directories serve.
    Served,
    /// What was found to be damaged.
    Quarantine,
    /// Files on their way to their names, or what a killed process left of them.
    Temporary,
    /// Anything else.
    Other,
}

impl Area {
    /// Those whose files are spread over 256 directories.
    pub(super) const SPREAD: [Self; 7] =
        [Self::Blobs, Self::Indexes, Self::Objects, Self::Partial, Self::Tags, Self::Kits, Self::Served];

    /// The directory below the cache's own. What is temporary or anything else may lie in any of them.
    pub(super) const fn dir(self) -> &'static str {
        match self {
            Self::Objects => "objects",
            Self::Partial => "partial",
            Self::Incoming => "incoming",
            Self::Blobs => "blobs/sha256",
            Self::Indexes => "indexes",
            Self::Tags => "tags",
            Self::Kits => "kits",
            Self::Served => "served",
            Self::Quarantine => "quarantine",
            Self::Temporary | Self::Other => "",
        }
    }

    /// Whether an entry of the cache's directory is an area.
    pub(super) fn is_name(name: &str) -> bool {
        Self::of(name) != Self::Other
    }

    /// The area of an entry of the cache's directory.
    fn of(name: &str) -> Self {
        let mut areas = Self::SPREAD.into_iter().chain([Self::Incoming, Self::Quarantine]);
        areas.find(|area| area.dir().split('/').next() == Some(name)).unwrap_or(Self::Other)
    }
}

/// How much there is of something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Amount {
    /// Things that are kept, or go, as a whole.
    pub items: u64,
    /// What they take on the disk; of a sparse file, what is not a hole.
    pub bytes: u64,
}

/// How much there is, by area.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize)]
#[serde(transparent)]
pub struct Usage {
    areas: BTreeMap<Area, Amount>,
}

impl Usage {
    /// What an area holds.
    pub fn of(&self, area: Area) -> Amount {
        self.areas.get(&area).copied().unwrap_or_default()
    }

    /// All areas that hold anything.
    pub fn areas(&self) -> impl Iterator<Item = (Area, Amount)> {
        self.areas.iter().map(|(area, amount)| (*area, *amount))
    }

    /// The bytes of all areas.
    pub fn bytes(&self) -> u64 {
        self.areas.values().map(|amount| amount.bytes).sum()
    }

    /// The items of all areas.
    pub fn items(&self) -> u64 {
        self.areas.values().map(|amount| amount.items).sum()
    }

    pub(super) fn add(&mut self, area: Area, items: u64, bytes: u64) {
        let amount = self.areas.entry(area).or_default();
        amount.items += items;
        amount.bytes += bytes;
    }
}

/// Something that is kept, or goes, as a whole.
#[derive(Debug, Clone)]
pub struct Item {
    /// Where it belongs.
    pub area: Area,
    /// The file; of a partial one the file without its list, whether it is there or not; of staging the directory.
    pub path: PathBuf,
    /// What it takes on the disk.
    pub bytes: u64,
    /// When it was last used: the latest modification of what belongs to it.
    pub used: SystemTime,
}

impl Item {
    /// The object whose content it is, where it is one's.
    pub fn object(&self) -> Option<ObjectDigest> {
        match self.area {
            Area::Objects | Area::Partial => self.path.file_name()?.to_str()?.parse().ok(),
            _ => None,
        }
    }
}

impl Cache {
    /// What the cache holds. Looks at every file in it.
    pub fn usage(&self) -> Result<Usage, CacheError> {
        self.scan(|_| {})
    }

    /// The same; shows each item. Follows no links. What goes or comes meanwhile may be counted or not.
    pub fn scan(&self, visit: impl FnMut(Item)) -> Result<Usage, CacheError> {
        let mut scan = Scan { usage: Usage::default(), linked: HashSet::new(), visit };
        let root = fs::metadata(&self.root).map_err(io_error("stat", &self.root))?;
        scan.usage.add(Area::Other, 0, on_disk(&root));
        for entry in entries(&self.root)? {
            if entry.path.file_name().is_some_and(|name| name == LOST_AND_FOUND) {
                continue;
            }
            let area = entry.path.file_name().and_then(|name| name.to_str()).map_or(Area::Other, Area::of);
            match area {
                Area::Incoming if entry.metadata.is_dir() => scan.incoming(&entry)?,
                _ => scan.tree(area, entry)?,
            }
        }
        Ok(scan.usage)
    }
}

/// A file or directory.
struct Entry {
    path: PathBuf,
    metadata: Metadata,
}

impl Entry {
    fn used(&self) -> SystemTime {
        self.metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH)
    }

    fn has_extension(&self, wanted: &[&str]) -> bool {
        self.path.extension().is_some_and(|extension| wanted.iter().any(|wanted| extension == *wanted))
    }
}

/// What a directory holds; nothing where it has gone meanwhile, or is none.
fn entries(dir: &Path) -> Result<Vec<Entry>, CacheError> {
    let is_gone = |error: &io::Error| matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory);
    let listed = match fs::read_dir(dir) {
        Ok(listed) => listed,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(error) => return Err(io_error("read", dir)(error)),
    };
    let mut entries = Vec::new();
    for entry in listed {
        let entry = entry.map_err(io_error("read", dir))?;
        match entry.metadata() {
            Ok(metadata) => entries.push(Entry { path: entry.path(), metadata }),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(io_error("stat", &entry.path())(error)),
        }
    }
    Ok(entries)
}

struct Scan<V> {
    usage: Usage,
    /// Files with several names that were counted under another: one that becomes an object has two for a moment.
    linked: HashSet<Identity>,
    visit: V,
}

impl<V: FnMut(Item)> Scan<V> {
    /// What an entry takes on the disk, once for all its names.
    fn bytes(&mut self, metadata: &Metadata) -> u64 {
        let is_first = metadata.is_dir() || metadata.nlink() < 2 || self.linked.insert(identity(metadata));
        if is_first { on_disk(metadata) } else { 0 }
    }

    fn item(&mut self, item: Item) {
        self.usage.add(item.area, 1, item.bytes);
        (self.visit)(item);
    }

    /// An entry and all below it, each file an item. Directories take room, but are no items.
    fn tree(&mut self, area: Area, top: Entry) -> Result<(), CacheError> {
        let mut todo = vec![top];
        while let Some(entry) = todo.pop() {
            let bytes = self.bytes(&entry.metadata);
            if entry.metadata.is_dir() {
                self.usage.add(area, 0, bytes);
                let below = entries(&entry.path)?;
                if area == Area::Partial {
                    self.partial(below, &mut todo)
                } else {
                    todo.extend(below)
                }
                continue;
            }
            let area = if entry.has_extension(&["tmp", "new"]) { Area::Temporary } else { area };
            let used = entry.used();
            self.item(Item { area, path: entry.path, bytes, used });
        }
        Ok(())
    }

    /// Files with their lists. What is neither goes to `rest`.
    fn partial(&mut self, entries: Vec<Entry>, rest: &mut Vec<Entry>) {
        let mut items = HashMap::new();
        for entry in entries {
            if entry.metadata.is_dir() || entry.has_extension(&["tmp", "new"]) {
                rest.push(entry);
                continue;
            }
            let bytes = self.bytes(&entry.metadata);
            let used = entry.used();
            let path = if entry.has_extension(&["list"]) { entry.path.with_extension("") } else { entry.path };
            let item = items.entry(path.clone()).or_insert(Item { area: Area::Partial, path, bytes: 0, used });
            item.bytes += bytes;
            item.used = item.used.max(used);
        }
        items.into_values().for_each(|item| self.item(item));
    }

    /// Staging directories.
    fn incoming(&mut self, top: &Entry) -> Result<(), CacheError> {
        let bytes = self.bytes(&top.metadata);
        self.usage.add(Area::Incoming, 0, bytes);
        for dir in entries(&top.path)? {
            let mut item = Item { area: Area::Incoming, bytes: 0, used: dir.used(), path: dir.path.clone() };
            let mut todo = vec![dir];
            while let Some(entry) = todo.pop() {
                item.bytes += self.bytes(&entry.metadata);
                item.used = item.used.max(entry.used());
                if entry.metadata.is_dir() {
                    todo.extend(entries(&entry.path)?);
                }
            }
            self.item(item);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "usage_tests.rs"]
mod tests;
