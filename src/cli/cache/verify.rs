//! `kitfs cache verify`: hashes what is in the cache, says whose what is damaged is, and repairs it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use bytes::Bytes;
use clap::Args;
use serde_json::{Value, json};

use super::super::Failure;
use super::super::options::{ConnectionArgs, FetchArgs, JsonArgs, ProgressArgs, TrustArgs};
use super::super::output::{self, Output, printable};
use super::super::progress::{Moves, Progress};
use super::repair::{Outcomes, Refetch, Wanted};
use crate::cache::{Cache, CacheError, CacheFile, Damage, Health, KitRecord, Repair};
use crate::digest::Digest;
use crate::fetch::FILLS;
use crate::inventory::{Place, lists, places};
use crate::object::{ChunkList, ObjectDigest};
use crate::reference::Reference;
use crate::report::chain;
use crate::units::format_size;

/// Hashes everything in the cache, and says what is damaged
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs cache verify [OPTIONS]",
    after_help = "\
With --repair, what is damaged is set aside, and fetched again where a kit needs it and its
repository can be reached. What can't be fetched now is fetched when it is read: the cache is right
again either way. Mounts may go on. The exit code is 1 if anything is damaged and was not repaired.

Examples:
  kitfs cache verify
  kitfs cache verify --repair --offline      only sets aside"
)]
pub(super) struct Verify {
    /// Set aside what is damaged, and fetch it again
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    trust: TrustArgs,
    #[command(flatten)]
    fetch: FetchArgs,
    #[command(flatten)]
    connection: ConnectionArgs,
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    progress: ProgressArgs,
}

/// A damaged file.
#[derive(Debug)]
struct Finding {
    file: CacheFile,
    damage: Damage,
    /// Whose it is: kits by their positions, and where in them, if it has a place there.
    hits: Vec<Hit>,
    /// What was done about it; an error where it could not be done.
    repaired: Option<Result<Repair, String>>,
    /// Whether it was fetched again; an error where it should have been.
    fetched: Option<Result<(), String>>,
}

/// What a damaged file is to a kit.
#[derive(Debug)]
struct Hit {
    kit: usize,
    /// Its path in the kit, or the layer's; nothing for a document.
    path: Option<String>,
    /// The layer, and the row in it where the file is content.
    layer: Option<usize>,
    row: Option<usize>,
}

/// What all files are.
#[derive(Debug, Default)]
struct Report {
    checked: u64,
    bytes: u64,
    in_use: u64,
    unknown: u64,
    damaged: Vec<Finding>,
}

/// How far the check is.
#[derive(Debug)]
struct Checking {
    size: u64,
    done: AtomicU64,
}

impl Moves for Checking {
    fn verb(&self) -> &'static str {
        "checking"
    }

    fn name(&self) -> String {
        "the cache".to_owned()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn done(&self) -> Option<u64> {
        Some(self.done.load(Ordering::Relaxed))
    }
}

impl Verify {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let cache = self.fetch.cache.open_to_check()?;
        let mut kits = Vec::new();
        let mut report = self.check(&cache, &mut kits)?;
        if self.repair {
            self.repair(&cache, &mut report.damaged);
            self.fetch_again(&kits, &mut report.damaged).await;
        }
        let mut out = Output::new();
        if self.json.json {
            out.json(&report.as_json(&cache, &kits))?
        } else {
            report.print(&mut out, &cache, &kits)?
        }
        out.finish()?;
        let left = report.damaged.iter().filter(|finding| !finding.is_repaired()).count();
        match left {
            0 => Ok(()),
            _ if self.repair => {
                Err(Failure::failed(format!("{left} damaged files of the cache could not be repaired")))
            }
            _ => Err(Failure::failed(format!(
                "{left} files of the cache are damaged; `kitfs cache verify --repair` sets them aside and fetches them again"
            ))),
        }
    }

    /// Checks everything. Small files first: which content should be where is read from them.
    fn check(&self, cache: &Cache, kits: &mut Vec<KitRecord>) -> Result<Report, Failure> {
        let files = cache.files()?;
        let checking = Arc::new(Checking { size: files.iter().map(CacheFile::bytes).sum(), done: AtomicU64::new(0) });
        let _progress = Progress::of(std::slice::from_ref(&checking), self.progress.mode());
        let is_content = |file: &CacheFile| matches!(file.what(), OBJECT | PARTIAL | LIST);
        let (contents, small): (Vec<CacheFile>, Vec<CacheFile>) = files.into_iter().partition(is_content);
        let mut report = Report::default();
        report.check(cache, small, &HashMap::new(), &checking)?;
        let spoilt: HashSet<Digest> = report.damaged.iter().filter_map(|finding| name_of(&finding.file)).collect();
        *kits = cache.kits()?.into_iter().map(|(record, _)| record).collect();
        // A look at a damaged index would set it aside.
        let mut readable = kits.clone();
        for layer in readable.iter_mut().flat_map(|kit| &mut kit.layers) {
            layer.named = layer.named.filter(|(index, head)| !spoilt.contains(index) && !spoilt.contains(head));
        }
        readable.iter_mut().for_each(|kit| kit.layers.retain(|layer| !spoilt.contains(&layer.index_key)));
        let parts = contents.iter().filter(|file| file.what() != OBJECT).filter_map(object_of).collect();
        let lists = lists(cache, &readable, &parts)?;
        report.check(cache, contents, &lists, &checking)?;
        let hit = report.damaged.iter().filter_map(|finding| object_of(&finding.file)).collect();
        let places = places(cache, &readable, &hit)?;
        for finding in &mut report.damaged {
            finding.hits = match object_of(&finding.file).map(|object| places.get(&object)) {
                Some(places) => {
                    places.into_iter().flatten().map(|place| Hit::content(kits, &readable, place)).collect()
                }
                None => name_of(&finding.file).map_or_else(Vec::new, |name| Hit::small(kits, &finding.file, &name)),
            };
        }
        Ok(report)
    }

    fn repair(&self, cache: &Cache, damaged: &mut [Finding]) {
        for finding in damaged {
            let repaired = cache.repair(&finding.file, &finding.damage);
            finding.repaired = Some(repaired.map_err(|error| chain(&error)));
        }
    }

    /// Fetches again what was set aside, kit by kit. What several kits need comes from the first of them that can be had.
    async fn fetch_again(&self, kits: &[KitRecord], damaged: &mut [Finding]) {
        let mut tried: HashSet<(usize, usize)> = HashSet::new();
        loop {
            let mut wanted: BTreeMap<usize, Wanted> = BTreeMap::new();
            for (at, finding) in damaged.iter().enumerate().filter(|(_, finding)| finding.is_to_be_fetched()) {
                let Some(hit) = finding.hits.iter().find(|hit| !tried.contains(&(at, hit.kit))) else { continue };
                tried.insert((at, hit.kit));
                wanted.entry(hit.kit).or_default().add(at, hit.layer, hit.row);
            }
            if wanted.is_empty() {
                return;
            }
            for (kit, wanted) in wanted {
                let Some(record) = kits.get(kit) else { continue };
                let outcomes = self.fetch_kit(record, &wanted).await;
                for (at, layer) in wanted.files {
                    let Some(finding) = damaged.get_mut(at) else { continue };
                    finding.fetched = Some(outcomes.as_ref().map_err(String::clone).and_then(|layers| {
                        let of_layer = layer.and_then(|layer| layers.get(&layer));
                        of_layer.map_or(Ok(()), Result::clone)
                    }));
                }
            }
        }
    }

    async fn fetch_kit(&self, record: &KitRecord, wanted: &Wanted) -> Result<Outcomes, String> {
        let reference = format!("{}@{}", record.repository, record.digest).parse::<Reference>();
        let reference = reference.map_err(|error| chain(&error))?;
        let refetch = Refetch::new(&self.fetch, &self.connection, &self.trust, self.progress, reference);
        let refetch = refetch.map_err(|failure| failure.message())?;
        refetch.kit(record, wanted).await.map_err(|error| chain(&error))
    }
}

const OBJECT: &str = "object";
const PARTIAL: &str = "partial";
const LIST: &str = "chunk list";
const INDEX: &str = "index";
const BLOB: &str = "blob";
const KIT: &str = "kit";

/// The object that a file holds, or a part of.
fn object_of(file: &CacheFile) -> Option<ObjectDigest> {
    matches!(file.what(), OBJECT | PARTIAL | LIST).then(|| file.path().file_stem()?.to_str()?.parse().ok()).flatten()
}

/// The digest that is a small file's name.
fn name_of(file: &CacheFile) -> Option<Digest> {
    let is_small = matches!(file.what(), INDEX | BLOB | KIT);
    is_small.then(|| Digest::from_hex(file.path().file_name()?.to_str()?).ok()).flatten()
}

impl Report {
    /// Checks files, several at once: one thread hashes slower than most disks read.
    fn check(
        &mut self,
        cache: &Cache,
        files: Vec<CacheFile>,
        lists: &HashMap<ObjectDigest, ChunkList<Bytes>>,
        checking: &Checking,
    ) -> Result<(), CacheError> {
        let next = AtomicUsize::new(0);
        // A plain mutex, held to add what was found.
        let found: Mutex<Vec<(usize, Health)>> = Mutex::default();
        let work = || -> Result<(), CacheError> {
            while let Some((at, file)) =
                Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|at| Some((at, files.get(at)?)))
            {
                let told = |bytes| {
                    checking.done.fetch_add(bytes, Ordering::Relaxed);
                };
                let health = cache.check(file, &|object| lists.get(object).cloned(), &told)?;
                found.lock().unwrap_or_else(|held| held.into_inner()).push((at, health));
            }
            Ok(())
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..FILLS).map(|_| scope.spawn(work)).collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })?;
        let mut found = found.into_inner().unwrap_or_else(|held| held.into_inner());
        found.sort_unstable_by_key(|(at, _)| *at);
        for (file, (_, health)) in files.into_iter().zip(found) {
            self.checked += 1;
            self.bytes += file.bytes();
            match health {
                Health::Right => {}
                Health::Gone => self.checked -= 1,
                Health::InUse => self.in_use += 1,
                Health::Unknown => self.unknown += 1,
                Health::Damaged(damage) => {
                    let (hits, repaired, fetched) = (Vec::new(), None, None);
                    self.damaged.push(Finding { file, damage, hits, repaired, fetched });
                }
            }
        }
        Ok(())
    }

    fn as_json(&self, cache: &Cache, kits: &[KitRecord]) -> Value {
        json!({
            "cache": cache.root(),
            "ok": self.damaged.iter().all(Finding::is_repaired),
            "checked": self.checked,
            "bytes": self.bytes,
            "in_use": self.in_use,
            "unknown": self.unknown,
            "damaged": self.damaged.iter().map(|finding| finding.as_json(cache, kits)).collect::<Vec<_>>(),
        })
    }

    fn print(&self, out: &mut Output, cache: &Cache, kits: &[KitRecord]) -> Result<(), Failure> {
        for finding in &self.damaged {
            finding.print(out, cache, kits)?;
        }
        let damaged = match self.damaged.len() {
            0 => "all are right".to_owned(),
            1 => "1 is damaged".to_owned(),
            several => format!("{several} are damaged"),
        };
        out.line(format_args!("checked {} files, {}: {damaged}", self.checked, format_size(self.bytes)))?;
        if self.in_use > 0 {
            output::say("note", format!("{} are being written, and were not judged", self.in_use));
        }
        if self.unknown > 0 {
            output::say(
                "note",
                format!("{} are parts of files of which no index is here, and were not judged", self.unknown),
            );
        }
        Ok(())
    }
}

impl Finding {
    fn is_repaired(&self) -> bool {
        matches!(self.repaired, Some(Ok(_)))
    }

    /// Whether something is missing now that was here. Chunks that were taken back come when they are read, as those come
    /// that were never here.
    fn is_to_be_fetched(&self) -> bool {
        let is_needed = matches!(self.file.what(), OBJECT | INDEX | BLOB | KIT);
        let is_gone = matches!(self.repaired, Some(Ok(Repair::SetAside | Repair::Nothing)));
        is_needed && is_gone && !matches!(self.fetched, Some(Ok(())))
    }

    fn place<'a>(&'a self, cache: &Cache) -> &'a Path {
        self.file.path().strip_prefix(cache.root()).unwrap_or(self.file.path())
    }

    /// What was done about it, in words.
    fn remedy(&self) -> Option<String> {
        let repaired = match self.repaired.as_ref()? {
            Ok(Repair::SetAside) => "set aside".to_owned(),
            Ok(Repair::Chunks(count)) => format!("{count} chunks taken back; they come again when they are read"),
            Ok(Repair::Written) => "written anew".to_owned(),
            Ok(Repair::Nothing) => "gone by now".to_owned(),
            Err(why) => return Some(format!("NOT REPAIRED: {why}")),
        };
        Some(match &self.fetched {
            // Nobody knows any more whose the files are that it told of.
            None if self.file.what() == KIT => format!(
                "{repaired}; mount or pull the kit again (with --keep if it was kept) before `kitfs cache gc` takes its files"
            ),
            None => repaired,
            Some(Ok(())) => format!("{repaired}, fetched again"),
            Some(Err(why)) => format!("{repaired}; not fetched again yet: {why}"),
        })
    }

    fn as_json(&self, cache: &Cache, kits: &[KitRecord]) -> Value {
        let hit = |hit: &Hit| {
            let kit = kits.get(hit.kit);
            json!({
                "kit": kit.map(|kit| kit.digest),
                "reference": kit.map(KitRecord::name),
                "path": hit.path,
            })
        };
        json!({
            "file": self.place(cache),
            "type": self.file.what(),
            "wrong": self.damage.what,
            "hits": self.hits.iter().map(hit).collect::<Vec<_>>(),
            "repaired": self.is_repaired(),
            "fetched": matches!(self.fetched, Some(Ok(()))),
            "remedy": self.remedy(),
        })
    }

    fn print(&self, out: &mut Output, cache: &Cache, kits: &[KitRecord]) -> Result<(), Failure> {
        let what = self.file.what();
        out.line(format_args!("damaged {what} {}: {}", self.place(cache).display(), self.damage.what))?;
        for hit in &self.hits {
            let Some(kit) = kits.get(hit.kit) else { continue };
            let path = hit.path.as_ref().map_or_else(String::new, |path| format!(": {path}"));
            out.line(format_args!(
                "  {}",
                printable(format!("{} {}{path}", kit.name(), kit.digest.short()).as_bytes())
            ))?;
        }
        self.remedy().map_or(Ok(()), |remedy| out.line(format_args!("  {remedy}")))
    }
}

impl Hit {
    /// A file's content. Its layer is told by its position in the record, which may have more than those that were looked
    /// at.
    fn content(kits: &[KitRecord], readable: &[KitRecord], place: &Place) -> Self {
        let layer = readable.get(place.kit).and_then(|kit| kit.layers.get(place.layer));
        let same = |other: &crate::cache::LayerRecord| {
            layer.is_some_and(|layer| (other.digest, &other.path) == (layer.digest, &layer.path))
        };
        let layer = kits.get(place.kit).and_then(|kit| kit.layers.iter().position(same));
        Self { kit: place.kit, path: Some(place.path.to_string()), layer, row: Some(place.row) }
    }

    /// A document, an index or a record.
    fn small(kits: &[KitRecord], file: &CacheFile, name: &Digest) -> Vec<Self> {
        let mut hits = Vec::new();
        for (kit, record) in kits.iter().enumerate() {
            let is_document = file.what() == BLOB && record.blobs.contains(name);
            if is_document || (file.what() == KIT && record.digest == *name) {
                hits.push(Self { kit, path: None, layer: None, row: None });
            }
            for (at, layer) in record.layers.iter().enumerate() {
                let is_index = match file.what() {
                    INDEX => layer.index_key == *name,
                    BLOB => layer.named.is_some_and(|(index, head)| index == *name || head == *name),
                    _ => false,
                };
                if is_index {
                    hits.push(Self { kit, path: Some(layer.path.clone()), layer: Some(at), row: None });
                }
            }
        }
        hits
    }
}
