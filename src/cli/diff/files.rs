//! The difference between two kits file by file, as far as indexes and headers tell.
//!
//! A file's content is told apart by its object digest, which an index has; by the layer's digest where the file is all of
//! the layer; or by its place in a layer that both kits have. Else its size tells whether it has changed, and nothing
//! tells that it has not.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::{Value, json};

use super::{Change, Summary};
use crate::archive::index::RowKind;
use crate::cli::Failure;
use crate::cli::output::{Output, printable};
use crate::digest::Digest;
use crate::fetch::listing::SMALL_LAYER;
use crate::fetch::{Kit, LayerFetch, Pace};
use crate::modelkit::{Compression, Format, Layer};
use crate::object::ObjectDigest;
use crate::units::format_size;

/// So many layers are listed at a time. A small one is fetched for it, which takes up to a MiB of memory.
const LISTINGS: usize = 8;
/// Where the Kitfile stands, and its permissions, as kit writes it.
const KITFILE: (&[u8], u32) = (b"Kitfile", 0o644);

/// The files of two kits, compared.
#[derive(Debug, Default)]
pub(super) struct Files {
    /// In the order of paths; those that are the same only where they were asked for.
    rows: Vec<Row>,
    /// How many there are of each.
    counts: BTreeMap<Change, u64>,
    /// Layers of which no files are known, by path and digest. Those that are the same in both kits are not among them.
    unlisted: Vec<(String, Digest)>,
    /// How many layers that are the same were not looked into.
    passed_over: usize,
}

/// A path with what is there in each kit. Never in neither.
#[derive(Debug)]
struct Row {
    path: Vec<u8>,
    change: Change,
    from: Option<File>,
    to: Option<File>,
}

/// A file or link.
#[derive(Debug, Clone)]
struct File {
    kind: Kind,
    mode: u32,
    size: u64,
    object: Option<ObjectDigest>,
    /// The digest of all its bytes.
    bytes: Option<Digest>,
    /// The layer that holds it, and its row there.
    place: Option<(Digest, usize)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    File,
    /// A link with its target, which headers do not tell.
    Link(Vec<u8>),
}

/// The files of one kit, by path.
type Tree = BTreeMap<Vec<u8>, File>;

impl Files {
    /// Compares what both kits hold. Layers that are the same in both are not asked for what they hold, unless `all` is
    /// wanted.
    pub(super) async fn compare(summary: &Summary, from: &Kit, to: &Kit, all: bool) -> Result<Self, Failure> {
        let mut found = Self::default();
        let (mut before, mut after) = (Tree::new(), Tree::new());
        let same = summary.layers.iter().filter(|layer| layer.change == Change::Same);
        let at = |side: &Option<(usize, Layer)>| side.as_ref().map(|(at, _)| *at);
        let (kept, same): (HashSet<_>, HashSet<_>) = same.map(|layer| (at(&layer.from), at(&layer.to))).unzip();
        let asked = to.layers.iter().enumerate().map(|(at, layer)| (layer, same.contains(&Some(at))));
        let both = |path: Vec<u8>, file: File, is_same| {
            if is_same {
                before.entry(path.clone()).or_insert_with(|| file.clone());
            }
            after.entry(path).or_insert(file);
        };
        found.list(asked, all, both).await?;
        let asked = from.layers.iter().enumerate().filter(|(at, _)| !kept.contains(&Some(*at)));
        let asked = asked.map(|(_, layer)| (layer, false));
        let first = |path, file, _| {
            before.entry(path).or_insert(file);
        };
        found.list(asked, all, first).await?;
        for (kit, tree) in [(from, &mut before), (to, &mut after)] {
            tree.extend(kitfile(kit).map(|file| (KITFILE.0.to_vec(), file)));
        }
        found.merge(before, after, all);
        Ok(found)
    }

    /// Hands on the files of layers, in their order.
    async fn list<'a>(
        &mut self,
        layers: impl Iterator<Item = (&'a Arc<LayerFetch>, bool)>,
        all: bool,
        mut take: impl FnMut(Vec<u8>, File, bool),
    ) -> Result<(), Failure> {
        let listed = layers.map(async |(layer, is_same)| {
            let is_asked = all || !is_same || layer.known().is_some();
            if !is_same && layer.layer.size <= SMALL_LAYER && layer.known().is_none() {
                // Its index tells what it holds, and not only how much.
                layer.complete(Pace::Now).await?;
            }
            let listing = if is_asked { layer.cheap_listing().await? } else { None };
            Ok::<_, Failure>((layer, is_same, listing))
        });
        let mut listed = stream::iter(listed).buffered(LISTINGS);
        while let Some((layer, is_same, listing)) = listed.try_next().await? {
            let Some(listing) = listing else {
                match is_same {
                    true => self.passed_over += 1,
                    false => self.unlisted.push((layer.layer.path.clone(), layer.layer.digest)),
                }
                continue;
            };
            let known = layer.known();
            let is_whole =
                matches!(layer.layer.format, Format::Raw { .. }) && layer.layer.compression == Compression::None;
            for (row, (path, entry)) in listing.rows().enumerate() {
                let kind = match entry.kind {
                    RowKind::Directory => continue,
                    RowKind::File => Kind::File,
                    RowKind::Symlink(target) => Kind::Link(target.to_vec()),
                };
                let object = known.as_ref().and_then(|known| known.head().row(row)?.object());
                let digest = layer.layer.digest;
                let bytes = is_whole.then_some(digest);
                let file = File { kind, mode: entry.mode, size: entry.size, object, bytes, place: Some((digest, row)) };
                take(path.into_owned(), file, is_same);
            }
        }
        Ok(())
    }

    /// Goes through both kits' paths at once.
    fn merge(&mut self, before: Tree, mut after: Tree, all: bool) {
        let mut rows: Vec<_> = before
            .into_iter()
            .map(|(path, from)| {
                let to = after.remove(&path);
                Row { path, change: change(Some(&from), to.as_ref()), from: Some(from), to }
            })
            .collect();
        let added = after.into_iter();
        rows.extend(added.map(|(path, to)| Row { path, change: change(None, Some(&to)), from: None, to: Some(to) }));
        rows.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        rows.iter().for_each(|row| *self.counts.entry(row.change).or_default() += 1);
        rows.retain(|row| all || row.change != Change::Same);
        self.rows = rows;
    }

    pub(super) fn json(&self) -> Value {
        let count = |change: Change| self.counts.get(&change).copied().unwrap_or_default();
        let unlisted = self.unlisted.iter().map(|(path, digest)| json!({ "path": path, "digest": digest }));
        json!({
            "counts": {
                "added": count(Change::Added),
                "removed": count(Change::Removed),
                "changed": count(Change::Changed),
                "same": count(Change::Same),
                "unknown": count(Change::Unknown),
            },
            "entries": self.rows.iter().map(Row::json).collect::<Vec<_>>(),
            "unlisted": unlisted.collect::<Vec<_>>(),
            "same_layers_not_listed": self.passed_over,
        })
    }

    pub(super) fn print(&self, out: &mut Output) -> Result<(), Failure> {
        let all = [Change::Added, Change::Removed, Change::Changed, Change::Same, Change::Unknown];
        let is_told = |change: &Change| *change != Change::Unknown || self.counts.contains_key(change);
        let count =
            |change: Change| format!("{} {}", self.counts.get(&change).copied().unwrap_or_default(), change.name());
        let counts: Vec<_> = all.into_iter().filter(is_told).map(count).collect();
        let more = match self.passed_over {
            0 => String::new(),
            layers => format!(", and those of {layers} same layers"),
        };
        out.line(format_args!("files: {}{more}", counts.join(", ")))?;
        if !self.rows.is_empty() {
            out.line("")?;
        }
        for row in &self.rows {
            row.print(out)?;
        }
        Ok(())
    }

    /// What could not be told, and what would help.
    pub(super) fn notes(&self) -> Vec<String> {
        let unlisted = self.unlisted.iter().map(|(path, digest)| {
            let path = printable(path.as_bytes());
            format!("what {path} ({digest}) holds is not known without fetching it: `kitfs pull` the kit, or `kitfs index` it")
        });
        let unknown = self.counts.get(&Change::Unknown).map(|count| {
            let files = if *count == 1 { "1 file has".to_owned() } else { format!("{count} files have") };
            format!(
                "{files} the same size in both, and no index tells what they hold: `kitfs pull` both kits, or `kitfs index` them"
            )
        });
        unlisted.chain(unknown).collect()
    }
}

/// The Kitfile of a kit, which is in no layer, or is one.
fn kitfile(kit: &Kit) -> Option<File> {
    let bytes = kit.resolved.kitfile.as_ref()?.bytes();
    Some(File {
        kind: Kind::File,
        mode: KITFILE.1,
        size: bytes.len() as u64,
        object: None,
        bytes: Some(Digest::of(bytes)),
        place: None,
    })
}

/// What became of a path.
fn change(from: Option<&File>, to: Option<&File>) -> Change {
    match (from, to) {
        (None, _) => Change::Added,
        (_, None) => Change::Removed,
        (Some(from), Some(to)) if (&from.mode, from.size) != (&to.mode, to.size) => Change::Changed,
        (Some(from), Some(to)) => match is_same(from, to) {
            Some(true) => Change::Same,
            Some(false) => Change::Changed,
            None => Change::Unknown,
        },
    }
}

/// Whether two files of one size hold the same, as far as that is known.
fn is_same(from: &File, to: &File) -> Option<bool> {
    if from.place.is_some() && from.place == to.place {
        return Some(true);
    }
    match (&from.kind, &to.kind) {
        (Kind::File, Kind::File) => {}
        (Kind::Link(from), Kind::Link(to)) => {
            return (!from.is_empty() && !to.is_empty()).then(|| from == to);
        }
        _ => return Some(false),
    }
    let objects = from.object.zip(to.object).map(|(from, to)| from == to);
    let bytes = from.bytes.zip(to.bytes).map(|(from, to)| from == to);
    let empty = (from.size == 0).then_some(true);
    objects.or(bytes).or(empty)
}

impl File {
    fn json(&self) -> Value {
        let (kind, target) = match &self.kind {
            Kind::File => ("file", None),
            Kind::Link(target) if target.is_empty() => ("symlink", None),
            Kind::Link(target) => ("symlink", Some(String::from_utf8_lossy(target))),
        };
        let layer = self.place.map(|(layer, _)| layer);
        let mode = format!("{:04o}", self.mode);
        json!({
            "type": kind,
            "target": target,
            "mode": mode,
            "size": self.size,
            "object": self.object,
            "layer": layer,
        })
    }
}

impl Row {
    fn json(&self) -> Value {
        json!({
            "path": String::from_utf8_lossy(&self.path),
            "change": self.change,
            "from": self.from.as_ref().map(File::json),
            "to": self.to.as_ref().map(File::json),
        })
    }

    fn print(&self, out: &mut Output) -> Result<(), Failure> {
        let mut sizes: Vec<_> =
            [&self.from, &self.to].into_iter().flatten().map(|file| format_size(file.size)).collect();
        sizes.dedup();
        let mode = match (&self.from, &self.to) {
            (Some(from), Some(to)) if from.mode != to.mode => format!(" (mode {:04o} -> {:04o})", from.mode, to.mode),
            _ => String::new(),
        };
        out.name(format_args!("{:<8} {:>24}  ", self.change.name(), sizes.join(" -> ")), &self.path, &mode)
    }
}

/// Counts anew what a node with the first kit fetches of layers that the second kit names an index of: the files that it
/// does not have. It knows each file that it has by its object digest, whatever layer it came with.
pub(super) fn count_fetch(summary: &mut Summary, from: &Kit, to: &Kit) {
    let objects = |layer: &Arc<LayerFetch>| {
        let known = layer.known()?;
        let rows = known.head().rows();
        Some(rows.filter_map(|row| Some((row.object()?, row.size()))).collect::<Vec<_>>())
    };
    let held = from.layers.iter().filter_map(objects).flatten();
    let mut held: HashSet<ObjectDigest> = held.map(|(object, _)| object).collect();
    for layer in &mut summary.layers {
        let Some((at, _)) = layer.to else { continue };
        let fetch = to.layers.get(at).filter(|fetch| fetch.named().is_some() && fetch.unusable_index().is_none());
        let Some(all) = fetch.and_then(objects).filter(|_| layer.fetch > 0) else { continue };
        let missing: u64 =
            all.into_iter().filter(|(object, size)| *size > 0 && held.insert(*object)).map(|(_, size)| size).sum();
        let is_in_parts = fetch.is_some_and(|fetch| fetch.layer.compression == Compression::None);
        layer.fetch = match missing {
            0 => 0,
            // A compressed layer can only be read from its start on.
            _ if !is_in_parts => layer.fetch,
            missing => missing.min(layer.fetch),
        };
    }
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
