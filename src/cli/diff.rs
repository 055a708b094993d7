//! `kitfs diff`: what is different between two kits, and what it costs a node to go from one to the other.
//!
//! [`Summary`] tells as much as two manifests do, without asking for anything: which layers were added, removed or
//! changed, and which bytes a node that has the first would fetch for the second. A blob that it has is never fetched
//! again, wherever the other kit puts it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::Hash;

use serde::Serialize;
use serde_json::{Value, json};

use super::Failure;
use super::output::{Output, printable};
use crate::digest::Digest;
use crate::fetch::Resolved;
use crate::modelkit::Layer;
use crate::units::format_size;

/// What became of a layer or file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Change {
    /// In the second kit alone.
    Added,
    /// In the first kit alone.
    Removed,
    /// In both, and not the same.
    Changed,
    /// In both, the same.
    Same,
}

impl Change {
    /// Its name in tables and JSON.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Added => "added",
            Self::Removed => "removed",
            Self::Changed => "changed",
            Self::Same => "same",
        }
    }
}

/// A layer in the first kit, in the second, or in both. Never in neither.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LayerChange {
    pub(super) change: Change,
    /// Its position in the first kit's plan, and the layer.
    pub(super) from: Option<(usize, Layer)>,
    /// The same for the second.
    pub(super) to: Option<(usize, Layer)>,
    /// How many of its bytes a node with the first kit would fetch.
    pub(super) fetch: u64,
}

/// The difference between two kits, layer by layer.
#[derive(Debug, Clone)]
pub(super) struct Summary {
    /// Both kits by repository and digest.
    pub(super) from: (String, Digest),
    pub(super) to: (String, Digest),
    /// In the order of the second kit; what it does not have any more comes last.
    pub(super) layers: Vec<LayerChange>,
}

impl Summary {
    /// What two manifests tell. Nothing is fetched.
    pub(super) fn of(from: &Resolved, to: &Resolved) -> Self {
        let kit = |resolved: &Resolved| (resolved.pinned(), resolved.digest);
        Self { from: kit(from), to: kit(to), layers: layers(&from.plan.layers, &to.plan.layers) }
    }

    /// How many layers became what.
    pub(super) fn count(&self, change: Change) -> usize {
        self.layers.iter().filter(|layer| layer.change == change).count()
    }

    /// How many bytes of layers a node with the first kit would fetch for the second.
    pub(super) fn fetch(&self) -> u64 {
        self.layers.iter().map(|layer| layer.fetch).sum()
    }

    /// How many bytes the second kit's layers have.
    pub(super) fn size(&self) -> u64 {
        self.layers.iter().filter_map(|layer| layer.to.as_ref()).map(|(_, layer)| layer.size).sum()
    }

    /// The summary as JSON.
    pub(super) fn json(&self) -> Value {
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
    pub(super) fn print(&self, out: &mut Output) -> Result<(), Failure> {
        let mut table = vec![["LAYER", "TYPE", "PATH", "SIZE", "TO FETCH", "DIGEST"].map(str::to_owned).to_vec()];
        table.extend(self.layers.iter().map(LayerChange::row));
        out.table(&table)?;
        out.line("")?;
        out.line(self.in_words())
    }

    /// All of it in one line.
    pub(super) fn in_words(&self) -> String {
        let counts = [Change::Added, Change::Removed, Change::Changed, Change::Same];
        let counts = counts.map(|change| format!("{} {}", self.count(change), change.name())).join(", ");
        let (fetch, size) = (format_size(self.fetch()), format_size(self.size()));
        format!("layers: {counts}; a node with the first kit fetches {fetch} of {size}")
    }
}

impl LayerChange {
    fn new(change: Change, from: Option<(usize, &Layer)>, to: Option<(usize, &Layer)>) -> Self {
        let own = |(at, layer): (usize, &Layer)| (at, layer.clone());
        Self { change, from: from.map(own), to: to.map(own), fetch: 0 }
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
            shown(&|layer| layer.digest.to_string()),
        ]
    }
}

/// Which layer became which: one that is the same where it is; one in the place of another; one that went elsewhere.
fn layers(from: &[Layer], to: &[Layer]) -> Vec<LayerChange> {
    let mut partners: Vec<Option<usize>> = vec![None; to.len()];
    let mut left: Vec<bool> = vec![true; from.len()];
    pair(from, to, &mut partners, &mut left, |layer| (layer.digest, layer.root.clone(), layer.kind));
    pair(from, to, &mut partners, &mut left, |layer| (layer.root.clone(), layer.kind));
    pair(from, to, &mut partners, &mut left, |layer| layer.digest);
    let mut here: HashSet<Digest> = from.iter().map(|layer| layer.digest).collect();
    let of_second = to.iter().enumerate().zip(partners).map(|((at, layer), partner)| {
        let other = partner.map(|partner| (partner, &from[partner]));
        let change = match other {
            None => Change::Added,
            Some((_, other)) if is_same(other, layer) => Change::Same,
            Some(_) => Change::Changed,
        };
        let fetch = if here.insert(layer.digest) { layer.size } else { 0 };
        LayerChange { fetch, ..LayerChange::new(change, other, Some((at, layer))) }
    });
    let mut all: Vec<_> = of_second.collect();
    let gone = from.iter().enumerate().filter(|(at, _)| left[*at]);
    all.extend(gone.map(|layer| LayerChange::new(Change::Removed, Some(layer), None)));
    all
}

/// Whether two layers put the same bytes in the same place.
pub(super) fn is_same(from: &Layer, to: &Layer) -> bool {
    let place = |layer: &Layer| (layer.digest, layer.root.clone(), layer.prefix.clone(), layer.format.clone());
    place(from) == place(to)
}

/// Gives each layer of `to` that has none yet the first of `from` that is left and has the same key.
fn pair<K: Hash + Eq>(
    from: &[Layer],
    to: &[Layer],
    partners: &mut [Option<usize>],
    left: &mut [bool],
    key: impl Fn(&Layer) -> K,
) {
    let mut offered: HashMap<K, VecDeque<usize>> = HashMap::new();
    for (at, layer) in from.iter().enumerate().filter(|(at, _)| left[*at]) {
        offered.entry(key(layer)).or_default().push_back(at);
    }
    for (layer, partner) in to.iter().zip(partners).filter(|(_, partner)| partner.is_none()) {
        *partner = offered.get_mut(&key(layer)).and_then(VecDeque::pop_front);
        if let Some(found) = *partner {
            left[found] = false;
        }
    }
}

#[cfg(test)]
#[path = "diff_tests.rs"]
mod tests;
