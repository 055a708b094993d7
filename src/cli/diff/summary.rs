//! The difference between two kits layer by layer, and what it costs a node to go from one to the other.
//!
//! [`Summary::of`] tells as much as two manifests do, without asking for anything. A blob that a node has whole is never
//! fetched again, wherever the other kit puts it; what is in an index makes that finer, in [`super::files`].

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::Hash;

use serde::Serialize;
use serde_json::{Value, json};

use crate::cli::Failure;
use crate::cli::output::{Output, printable};
use crate::digest::Digest;
use crate::fetch::{Resolved, Tier};
use crate::modelkit::{Compression, Layer};
use crate::units::format_size;

/// What became of a layer or file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::cli) enum Change {
    /// In the second kit alone.
    Added,
    /// In the first kit alone.
    Removed,
    /// In both, and not the same.
    Changed,
    /// In both, the same.
    Same,
    /// Of files alone: in both, of one size, and nothing tells whether they hold the same.
    Unknown,
}

impl Change {
    /// Its name in tables and JSON.
    pub(in crate::cli) fn name(self) -> &'static str {
        match self {
            Self::Added => "added",
            Self::Removed => "removed",
            Self::Changed => "changed",
            Self::Same => "same",
            Self::Unknown => "unknown",
        }
    }
}

/// A layer in the first kit, in the second, or in both. Never in neither.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cli) struct LayerChange {
    pub(in crate::cli) change: Change,
    /// Its position in the first kit's plan, and the layer.
    pub(in crate::cli) from: Option<(usize, Layer)>,
    /// The same for the second.
    pub(in crate::cli) to: Option<(usize, Layer)>,
    /// How many of its bytes a node with the first kit would fetch.
    pub(in crate::cli) fetch: u64,
    /// Whether the second kit names an index of it, by which it can be fetched in parts.
    pub(in crate::cli) is_indexed: bool,
}

/// The difference between two kits, layer by layer.
#[derive(Debug, Clone)]
pub(in crate::cli) struct Summary {
    /// Both kits by repository and digest.
    pub(in crate::cli) from: (String, Digest),
    pub(in crate::cli) to: (String, Digest),
    /// In the order of the second kit; what it does not have any more comes last.
    pub(in crate::cli) layers: Vec<LayerChange>,
}

impl Summary {
    /// What two manifests tell. Nothing is fetched.
    pub(in crate::cli) fn of(from: &Resolved, to: &Resolved) -> Self {
        let kit = |resolved: &Resolved| (resolved.pinned(), resolved.digest);
        let side = |resolved: &Resolved| {
            let named = resolved.named.iter().map(|named| named.map(|named| named.tier));
            resolved.plan.layers.iter().cloned().zip(named).collect::<Vec<_>>()
        };
        Self { from: kit(from), to: kit(to), layers: layers(&side(from), &side(to)) }
    }

    /// How many layers became what.
    pub(in crate::cli) fn count(&self, change: Change) -> usize {
        self.layers.iter().filter(|layer| layer.change == change).count()
    }

    /// How many bytes of layers a node with the first kit would fetch for the second.
    pub(in crate::cli) fn fetch(&self) -> u64 {
        self.layers.iter().map(|layer| layer.fetch).sum()
    }

    /// How many bytes the second kit's layers have.
    pub(in crate::cli) fn size(&self) -> u64 {
        self.layers.iter().filter_map(|layer| layer.to.as_ref()).map(|(_, layer)| layer.size).sum()
    }

    /// The summary as JSON.
    pub(in crate::cli) fn json(&self) -> Value {
        let kit = |(pinned, digest): &(String, Digest)| json!({ "reference": pinned, "digest": digest });
        json!({
            "from": kit(&self.from),
            "to": kit(&self.to),
            "layers": self.layers.iter().map(LayerChange::json).collect::<Vec<_>>(),
            "counts": {
                "added": self.count(Change::Added),
                "removed": self.count(Change::Removed),
                "changed": self.count(Change::Changed),
                "same": self.count(Change::Same),
            },
            "fetch": self.fetch(),
            "bytes": self.size(),
        })
    }

    /// The summary for people: a line a layer, and what it costs.
    pub(in crate::cli) fn print(&self, out: &mut Output) -> Result<(), Failure> {
        let mut table = vec![["LAYER", "TYPE", "PATH", "SIZE", "TO FETCH", "DIGEST"].map(str::to_owned).to_vec()];
        table.extend(self.layers.iter().map(LayerChange::row));
        out.table(&table)?;
        out.line("")?;
        out.line(self.in_words())
    }

    /// All of it in one line.
    pub(in crate::cli) fn in_words(&self) -> String {
        let counts = [Change::Added, Change::Removed, Change::Changed, Change::Same];
        let counts = counts.map(|change| format!("{} {}", self.count(change), change.name())).join(", ");
        let (fetch, size) = (format_size(self.fetch()), format_size(self.size()));
        format!("layers: {counts}; a node with the first kit fetches {fetch} of {size}")
    }
}

impl LayerChange {
    fn new(change: Change, from: Option<(usize, &Layer)>, to: Option<(usize, &Layer)>) -> Self {
        let own = |(at, layer): (usize, &Layer)| (at, layer.clone());
        Self { change, from: from.map(own), to: to.map(own), fetch: 0, is_indexed: false }
    }

    /// The layer as it is in the second kit, else as it was in the first.
    fn shown(&self) -> Option<&Layer> {
        self.to.as_ref().or(self.from.as_ref()).map(|(_, layer)| layer)
    }

    fn json(&self) -> Value {
        let side = |side: &Option<(usize, Layer)>| {
            let layer = side.as_ref().map(|(_, layer)| layer);
            layer.map(|layer| json!({ "path": layer.path, "digest": layer.digest, "size": layer.size }))
        };
        let shown = self.shown();
        json!({
            "change": self.change,
            "type": shown.map(|layer| layer.kind),
            "path": shown.map(|layer| &layer.path),
            "digest": shown.map(|layer| layer.digest),
            "size": shown.map(|layer| layer.size),
            "from": side(&self.from),
            "to": side(&self.to),
            "indexed": self.to.is_some().then_some(self.is_indexed),
            "fetch": self.fetch,
        })
    }

    fn row(&self) -> Vec<String> {
        let sides = [&self.from, &self.to];
        let shown = |what: &dyn Fn(&Layer) -> String| {
            let mut both: Vec<String> = sides.into_iter().flatten().map(|(_, layer)| what(layer)).collect();
            both.dedup();
            both.join(" -> ")
        };
        let fetch = if self.to.is_some() { format_size(self.fetch) } else { String::new() };
        vec![
            self.change.name().to_owned(),
            self.shown().map(|layer| layer.kind.name().to_owned()).unwrap_or_default(),
            shown(&|layer| printable(layer.path.as_bytes())),
            shown(&|layer| format_size(layer.size)),
            fetch,
            shown(&|layer| layer.digest.short()),
        ]
    }
}

/// A layer, and who names an index of it, if anybody does.
type Sided = (Layer, Option<Tier>);

/// Which layer became which: one that is the same where it is; one in the place of another; one that went elsewhere.
fn layers(from: &[Sided], to: &[Sided]) -> Vec<LayerChange> {
    let mut partners: Vec<Option<usize>> = vec![None; to.len()];
    let mut left: Vec<bool> = vec![true; from.len()];
    pair(from, to, &mut partners, &mut left, |layer| (layer.digest, layer.root.clone(), layer.kind));
    pair(from, to, &mut partners, &mut left, |layer| (layer.root.clone(), layer.kind));
    pair(from, to, &mut partners, &mut left, |layer| layer.digest);
    // The blobs that the node has, and whether it has hashed them.
    let mut held: HashMap<Digest, bool> = HashMap::new();
    from.iter().for_each(|layer| *held.entry(layer.0.digest).or_default() |= is_proved(layer));
    let mut seen = HashSet::new();
    let of_second = to.iter().enumerate().zip(partners).map(|((at, (layer, named)), partner)| {
        let other = partner.map(|partner| (partner, &from[partner].0));
        let change = match other {
            None => Change::Added,
            Some((_, other)) if is_same(other, layer) => Change::Same,
            Some(_) => Change::Changed,
        };
        let is_indexed = named.is_some();
        let is_here = held.get(&layer.digest).is_some_and(|proved| *proved || is_indexed);
        let is_here = !seen.insert(layer.digest) || is_here;
        let fetch = if is_here { 0 } else { layer.size };
        LayerChange { fetch, is_indexed, ..LayerChange::new(change, other, Some((at, layer))) }
    });
    let mut all: Vec<_> = of_second.collect();
    let gone = from.iter().enumerate().filter(|(at, _)| left[*at]);
    all.extend(gone.map(|(at, (layer, _))| LayerChange::new(Change::Removed, Some((at, layer)), None)));
    all
}

/// Whether a node that has all files of a layer has hashed it as a whole, too. By a pinned index it never does, and then
/// only a kit that names an index of the layer can do without fetching it.
fn is_proved((layer, named): &Sided) -> bool {
    *named != Some(Tier::Pinned) || layer.compression != Compression::None
}

/// Whether two layers put the same bytes in the same place.
pub(in crate::cli) fn is_same(from: &Layer, to: &Layer) -> bool {
    let place = |layer: &Layer| (layer.digest, layer.root.clone(), layer.prefix.clone(), layer.format.clone());
    place(from) == place(to)
}

/// Gives each layer of `to` that has none yet the first of `from` that is left and has the same key.
fn pair<K: Hash + Eq>(
    from: &[Sided],
    to: &[Sided],
    partners: &mut [Option<usize>],
    left: &mut [bool],
    key: impl Fn(&Layer) -> K,
) {
    let mut offered: HashMap<K, VecDeque<usize>> = HashMap::new();
    for (at, (layer, _)) in from.iter().enumerate().filter(|(at, _)| left[*at]) {
        offered.entry(key(layer)).or_default().push_back(at);
    }
    for ((layer, _), partner) in to.iter().zip(partners).filter(|(_, partner)| partner.is_none()) {
        *partner = offered.get_mut(&key(layer)).and_then(VecDeque::pop_front);
        if let Some(found) = *partner {
            left[found] = false;
        }
    }
}

#[cfg(test)]
#[path = "summary_tests.rs"]
mod tests;
