//! The whole account of a cache: what each kit takes, what it shares, what is nobody's.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::SystemTime;

use super::holders::{SetId, Sets};
use super::layers;
use crate::cache::usage::Item;
use crate::cache::{Area, Cache, CacheError, KitRecord, LayerRecord, Small, Usage};
use crate::digest::Digest;
use crate::object::ObjectDigest;

/// What is in the cache.
#[derive(Debug)]
pub struct Inventory {
    /// What is recorded, the kit that was used last at the end.
    pub kits: Vec<KitState>,
    /// What everything takes, each file counted once.
    pub usage: Usage,
    /// Whether a layer was being staged: while it gets its names, its index is not there yet, and its objects are nobody's.
    pub is_staging: bool,
    /// Whether a record can't be read, or an index of a layer that is kept: then what seems to be nobody's may be that kit's.
    pub is_uncertain: bool,
    /// What is staged, or was when a process was killed.
    pub staging: Vec<Item>,
    objects: HashMap<ObjectDigest, Stored>,
    smalls: HashMap<Small, SmallFile>,
    sets: Sets,
}

/// A kit and what there is of it.
#[derive(Debug)]
pub struct KitState {
    /// What is recorded of it.
    pub record: KitRecord,
    /// When it was opened or read last, as far as the disk tells.
    pub used: SystemTime,
    /// Its files, as far as they are known.
    pub contents: Contents,
    /// Its layers of which no index is here, so that nobody knows which files they hold: how many, and their bytes.
    pub unknown: (usize, u64),
    /// Its documents that are not here.
    pub lost: usize,
    /// How many objects of it are here, whole or in part.
    pub objects: usize,
    /// What it takes on the disk.
    pub bytes: u64,
    /// What of that no other kit has: what removing it frees.
    pub alone: u64,
}

/// Files of a kit or layer, and what there is of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Contents {
    /// Their bytes.
    pub bytes: u64,
    /// Those that are here, about: of files that are here in part, what they take on the disk.
    pub here: u64,
    /// Files that are not here, or in part.
    pub incomplete: u64,
}

impl Contents {
    fn add(&mut self, size: u64, stored: Option<&Stored>) {
        self.bytes += size;
        self.here += stored.map_or(0, |stored| stored.here(size));
        // An empty file needs no object.
        self.incomplete += u64::from(size > 0 && stored.is_none_or(|stored| !stored.whole));
    }
}

impl std::ops::AddAssign for Contents {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.here += other.here;
        self.incomplete += other.incomplete;
    }
}

/// An object, or what there is of it.
#[derive(Debug, Clone, Copy)]
pub struct Stored {
    /// Its bytes, where a kit tells how many it has.
    pub size: Option<u64>,
    /// What it takes on the disk.
    pub bytes: u64,
    /// When it was used last.
    pub used: SystemTime,
    /// Whether it is here under its name, and not only in part.
    pub whole: bool,
    holders: SetId,
}

#[derive(Debug)]
struct SmallFile {
    bytes: u64,
    used: SystemTime,
    holders: SetId,
}

/// What is held by no kits but some, or by none.
#[derive(Debug, Default)]
pub struct Share {
    /// Objects and partial files, with what they take on the disk.
    pub objects: Vec<(ObjectDigest, u64)>,
    /// Other files, likewise. The records of kits come last.
    pub smalls: Vec<(Small, u64)>,
}

impl Share {
    /// What it takes on the disk.
    pub fn bytes(&self) -> u64 {
        self.objects.iter().map(|(_, bytes)| bytes).chain(self.smalls.iter().map(|(_, bytes)| bytes)).sum()
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty() && self.smalls.is_empty()
    }
}

impl KitState {
    /// Its bytes, as far as that is known: of layers that nobody knows, those of the blob.
    pub fn size(&self) -> u64 {
        self.contents.bytes + self.unknown.1
    }

    /// Whether it can be mounted and read without its registry.
    pub fn is_complete(&self) -> bool {
        (self.contents.incomplete, self.unknown.0, self.lost) == (0, 0, 0)
    }
}

impl Inventory {
    /// Looks at every file of the cache, and reads every record and index.
    pub fn take(cache: &Cache) -> Result<Self, CacheError> {
        let (mut objects, mut smalls) = (HashMap::new(), HashMap::new());
        // In this order: what has a name by now has its index by the time that is read, or its staging is locked in between.
        let mut staging = Vec::new();
        let usage = cache.scan(|item| match item.area {
            Area::Incoming => staging.push(item),
            _ => note(&mut objects, &mut smalls, &item),
        })?;
        let is_staging = cache.is_staging();
        let kits = cache.kits()?.into_iter().map(|(record, used)| KitState::new(record, used)).collect();
        let (is_uncertain, sets) = (false, Sets::new());
        let mut inventory = Self { kits, usage, is_staging, is_uncertain, staging, objects, smalls, sets };
        inventory.is_uncertain = inventory.has_unread_records();
        inventory.hold_contents(cache)?;
        inventory.hold_smalls(cache)?;
        inventory.add_up();
        Ok(inventory)
    }

    /// Whether there is a record that tells nothing. One that was removed meanwhile counts too, this once.
    fn has_unread_records(&self) -> bool {
        let read: HashSet<Digest> = self.kits.iter().map(|kit| kit.record.digest).collect();
        self.smalls.keys().any(|small| matches!(small, Small::Kit(digest) if !read.contains(digest)))
    }

    /// Says which kits hold which objects.
    fn hold_contents(&mut self, cache: &Cache) -> Result<(), CacheError> {
        let Self { kits, objects, sets, is_uncertain, .. } = self;
        let all = kits.iter().enumerate().flat_map(|(at, kit)| kit.record.layers.iter().map(move |layer| (at, layer)));
        let mut found = Vec::new();
        for (layer, holders) in layers::distinct(all) {
            let Some(head) = layers::head(cache, layer)? else {
                let is_kept = |other: &LayerRecord| other.kept && layers::key(other) == layers::key(layer);
                *is_uncertain |= kits.iter().any(|kit| kit.record.layers.iter().any(is_kept));
                found.push((holders, Err(layer.size)));
                continue;
            };
            let set = sets.of(holders.iter().copied());
            let mut contents = Contents::default();
            for row in head.rows() {
                let Some(object) = row.object() else { continue };
                let stored = objects.get_mut(&object);
                contents.add(row.size(), stored.as_deref());
                if let Some(stored) = stored {
                    stored.holders = sets.union(stored.holders, set);
                    stored.size = Some(row.size());
                }
            }
            found.push((holders, Ok(contents)));
        }
        for (holders, contents) in found {
            for at in holders {
                let Some(kit) = kits.get_mut(at) else { continue };
                match contents {
                    Ok(contents) => kit.contents += contents,
                    Err(size) => kit.unknown = (kit.unknown.0 + 1, kit.unknown.1 + size),
                }
            }
        }
        Ok(())
    }

    /// Says which kits hold which documents, indexes and names.
    fn hold_smalls(&mut self, cache: &Cache) -> Result<(), CacheError> {
        let Self { kits, smalls, sets, .. } = self;
        let mut holders: HashMap<Small, SetId> = HashMap::new();
        for (at, kit) in kits.iter_mut().enumerate() {
            let set = sets.of([at]);
            let record = &kit.record;
            let blobs = record.blobs.iter().copied().map(Small::Blob);
            let named = record.layers.iter().filter_map(|layer| layer.named).flat_map(|(index, head)| [index, head]);
            let indexes = record.layers.iter().map(|layer| Small::Index(layer.index_key));
            kit.lost = blobs.clone().filter(|blob| !smalls.contains_key(blob)).count();
            for file in blobs.chain(named.map(Small::Blob)).chain(indexes).chain([Small::Kit(record.digest)]) {
                let known = holders.entry(file).or_default();
                *known = sets.union(*known, set);
            }
        }
        // A name belongs to whom it led to.
        for known in cache.all_known()? {
            let set = holders.get(&Small::Blob(known.digest)).copied().unwrap_or_default();
            holders.insert(known.file(), set);
        }
        for (small, file) in smalls {
            file.holders = holders.get(small).copied().unwrap_or_default();
        }
        Ok(())
    }

    /// Says what each kit takes.
    fn add_up(&mut self) {
        #[derive(Clone, Copy)]
        struct Total {
            objects: usize,
            bytes: u64,
            used: SystemTime,
        }
        let nothing = Total { objects: 0, bytes: 0, used: SystemTime::UNIX_EPOCH };
        let mut totals = vec![nothing; self.sets.all().count()];
        for stored in self.objects.values() {
            let Some(total) = totals.get_mut(stored.holders.index()) else { continue };
            total.objects += 1;
            total.bytes += stored.bytes;
            total.used = total.used.max(stored.used);
        }
        for file in self.smalls.values() {
            let Some(total) = totals.get_mut(file.holders.index()) else { continue };
            total.bytes += file.bytes;
        }
        for ((_, members), total) in self.sets.all().zip(totals) {
            for member in members {
                let Some(kit) = self.kits.get_mut(*member) else { continue };
                kit.objects += total.objects;
                kit.bytes += total.bytes;
                // What several have tells of neither when it was read.
                if members.len() == 1 {
                    kit.alone += total.bytes;
                    kit.used = kit.used.max(total.used);
                }
            }
        }
    }

    /// Whether a layer of a kit is staged, or was when a process was killed.
    pub fn is_staged(&self, kit: &KitState) -> bool {
        let key = |staged: &Item| Some(staged.path.file_name()?.to_str()?.get(..64)?.to_owned());
        let keys: Vec<String> = self.staging.iter().filter_map(key).collect();
        kit.record.layers.iter().any(|layer| !keys.is_empty() && keys.contains(&layer.index_key.hex()))
    }

    /// All objects, the one that was used last at the end.
    pub fn objects(&self) -> Vec<(&ObjectDigest, &Stored)> {
        let mut all: Vec<_> = self.objects.iter().collect();
        all.sort_unstable_by_key(|(object, stored)| (stored.used, **object));
        all
    }

    /// The kits that hold an object.
    pub fn holders(&self, stored: &Stored) -> impl Iterator<Item = &KitState> {
        self.sets.members(stored.holders).iter().filter_map(|at| self.kits.get(*at))
    }

    /// The kits that hold a small file.
    pub fn holders_of(&self, small: &Small) -> impl Iterator<Item = &KitState> {
        let set = self.smalls.get(small).map(|file| file.holders).unwrap_or_default();
        self.sets.members(set).iter().filter_map(|at| self.kits.get(*at))
    }

    /// What these kits have and no other.
    pub fn only_in(&self, is_one: impl Fn(&KitState) -> bool) -> Share {
        let within = |members: &[usize]| members.iter().all(|at| self.kits.get(*at).is_some_and(&is_one));
        self.share(|set, _| set != SetId::NONE && within(self.sets.members(set)))
    }

    /// What no kit has, and what was not used after `since`. Objects only where none may be on its way, and nothing while
    /// it may be a kit's after all.
    pub fn loose(&self, since: SystemTime) -> Share {
        if self.is_uncertain {
            return Share::default();
        }
        let mut share = self.share(|set, used| set == SetId::NONE && used <= since);
        if self.is_staging {
            share.objects.clear();
        }
        share
    }

    /// What is held by the sets that `wanted` takes, in an order that is always the same.
    fn share(&self, wanted: impl Fn(SetId, SystemTime) -> bool) -> Share {
        let objects = self.objects.iter().filter(|(_, stored)| wanted(stored.holders, stored.used));
        let smalls = self.smalls.iter().filter(|(_, file)| wanted(file.holders, file.used));
        let mut share = Share {
            objects: objects.map(|(object, stored)| (*object, stored.bytes)).collect(),
            smalls: smalls.map(|(small, file)| (*small, file.bytes)).collect(),
        };
        share.objects.sort_unstable();
        share.smalls.sort_unstable();
        share
    }

    /// Small files of kits for whom `is_gone` holds, each when its kits were used last; the least recently used first, and
    /// of each kit the record last.
    pub(super) fn smalls_of(&self, is_gone: impl Fn(&KitState) -> bool) -> Vec<Small> {
        let mut found: Vec<(SystemTime, Small)> = Vec::new();
        for (small, _) in self.only_in(is_gone).smalls {
            let used = self.holders_of(&small).map(|kit| kit.used).max();
            found.push((used.unwrap_or(SystemTime::UNIX_EPOCH), small));
        }
        found.sort_unstable();
        found.into_iter().map(|(_, small)| small).collect()
    }
}

impl Stored {
    /// How many of its `size` bytes are here.
    pub fn here(&self, size: u64) -> u64 {
        if self.whole { size } else { self.bytes.min(size) }
    }
}

impl KitState {
    fn new(record: KitRecord, used: SystemTime) -> Self {
        let contents = Contents::default();
        Self { record, used, contents, unknown: (0, 0), lost: 0, objects: 0, bytes: 0, alone: 0 }
    }
}

/// Takes an item of the cache into account, if it belongs to kits.
fn note(objects: &mut HashMap<ObjectDigest, Stored>, smalls: &mut HashMap<Small, SmallFile>, item: &Item) {
    let Item { area, path, bytes, used } = item;
    if let Some(object) = item.object() {
        let nothing = Stored { size: None, bytes: 0, used: *used, whole: false, holders: SetId::NONE };
        let stored = objects.entry(object).or_insert(nothing);
        stored.bytes += bytes;
        stored.used = stored.used.max(*used);
        stored.whole |= *area == Area::Objects;
        return;
    }
    let Some(digest) = named(path) else { return };
    let small = match area {
        Area::Blobs => Small::Blob(digest),
        Area::Indexes => Small::Index(digest),
        Area::Tags => Small::Tag(digest),
        Area::Kits => Small::Kit(digest),
        Area::Objects
        | Area::Partial
        | Area::Incoming
        | Area::Served
        | Area::Quarantine
        | Area::Temporary
        | Area::Other => return,
    };
    smalls.insert(small, SmallFile { bytes: *bytes, used: *used, holders: SetId::NONE });
}

/// The digest that is a file's name.
fn named(path: &Path) -> Option<Digest> {
    Digest::from_hex(path.file_name()?.to_str()?).ok()
}
