//! An opened kit: its plan and its layers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures_util::StreamExt as _;

use super::layer::LayerFetch;
use super::listing::Probe;
use super::resolve::Resolved;
use super::resolve::first_reads::FIRST_READS;
use super::{Context, FetchError, Named, Tier};
use crate::tree::{Conflict, Origin, Tree};

/// A kit whose layers can be asked.
#[derive(Debug)]
pub struct Kit {
    /// How the reference was followed, and the plan.
    pub resolved: Resolved,
    /// The layers, in the plan's order.
    pub layers: Vec<Arc<LayerFetch>>,
}

/// What the first reads of a kit's layers came to.
#[derive(Debug, Default)]
pub struct Probed {
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Why the first of the layers that could not be asked could not.
    pub unasked: Option<String>,
    /// Layers, by position, whose source does not answer.
    pub unheard: BTreeSet<usize>,
}

impl Kit {
    /// Opens what was resolved. Nothing is fetched.
    pub fn open(context: &Context, resolved: Resolved) -> Self {
        let fetch = |(layer, named): (&crate::modelkit::Layer, &Option<Named>)| {
            let sources = resolved.origins.get(layer.kit).map(|origin| origin.sources.clone()).unwrap_or_default();
            LayerFetch::new(layer.clone(), context.clone(), sources, *named)
        };
        let layers = resolved.plan.layers.iter().zip(&resolved.named).map(fetch).collect();
        Self { resolved, layers }
    }

    /// The plan's names before anything is read.
    pub fn skeleton(&self) -> Tree {
        let roots = self.resolved.plan.layers.iter().map(|layer| layer.root.clone());
        let kitfile = self.resolved.kitfile.as_ref().map(|bytes| bytes.bytes().len() as u64);
        Tree::new(&self.resolved.digest, roots, kitfile)
    }

    /// For a command that is to end: notes why something of a layer could not be had. Where that was a registry that does
    /// not answer, the other layers from there don't wait for it once more.
    pub fn note_failure(&self, layer: &LayerFetch, error: &FetchError) {
        if error.is_unreachable() {
            self.layers.iter().filter(|other| other.layer.kit == layer.layer.kit).for_each(|other| other.hurry());
        }
    }

    /// Asks every layer what its root is, all at once, all within the metadata deadline, and not for long where a source
    /// does not answer. A layer that can't be asked is a warning: the rest of the kit is still of use. A layer that can't
    /// be part of a kit, or two that claim one file, is an error: `kit unpack` refuses them too.
    pub async fn probe(&self, context: &Context, tree: &mut Tree) -> Result<Probed, FetchError> {
        let patience = context.limits.meta_timeout;
        let deadline = tokio::time::Instant::now() + patience;
        let layers = self.layers.clone().into_iter().enumerate();
        let asked = layers.map(|(at, layer)| async move {
            let answer = tokio::time::timeout_at(deadline, layer.probe_unless_away()).await.unwrap_or_else(|_| {
                let what = format!("the first read of layer {}", layer.layer.digest);
                Err(FetchError::Timeout { what, after: patience, cause: None })
            });
            (at, answer)
        });
        let (mut warnings, mut unasked) = (Vec::new(), None);
        let mut unheard: BTreeMap<usize, Vec<(usize, FetchError)>> = BTreeMap::new();
        let mut answers: Vec<_> = futures_util::stream::iter(asked).buffer_unordered(FIRST_READS).collect().await;
        self.resolved.begun.iter().for_each(|begun| begun.give_up());
        answers.sort_by_key(|(at, _)| *at);
        for (at, answer) in answers {
            let conflicts = match answer {
                Ok(Probe::File(listing)) => tree.add_listing(at, listing.metas()),
                Ok(Probe::Directory(dirs)) => tree.add_probe(at, dirs),
                Ok(Probe::Unknown) => Vec::new(),
                Err(error) if error.is_refusal() => return Err(error),
                Err(error) if error.is_unreachable() => {
                    unasked.get_or_insert_with(|| crate::report::chain(&error));
                    unheard.entry(self.layers[at].layer.kit).or_default().push((at, error));
                    Vec::new()
                }
                Err(error) => {
                    let told = crate::report::chain(&error);
                    unasked.get_or_insert_with(|| told.clone());
                    warnings.push(told);
                    Vec::new()
                }
            };
            if let Some(conflict) = conflicts.into_iter().next() {
                return Err(FetchError::Conflict(self.describe(&conflict)));
            }
        }
        warnings.extend(unheard.iter().filter_map(|(kit, all)| self.unheard(*kit, all)));
        warnings.extend(self.layers.iter().filter_map(|layer| layer.unusable_index().map(str::to_owned)));
        let unheard = unheard.into_values().flatten().map(|(at, _)| at).collect();
        Ok(Probed { warnings, unasked, unheard })
    }

    /// One warning for all layers of a repository that does not answer.
    fn unheard(&self, kit: usize, layers: &[(usize, FetchError)]) -> Option<String> {
        let (first, error) = layers.first()?;
        let told = crate::report::chain(error);
        if layers.len() == 1 {
            return Some(told);
        }
        let repository = self.resolved.origins.get(kit).map(|origin| origin.repository.as_str()).unwrap_or_default();
        let path = &self.layers.get(*first)?.layer.path;
        Some(format!(
            "what {} layers of {repository} hold is not known yet, from {path} on; of the first: {told}",
            layers.len()
        ))
    }

    /// A conflict in words, with the layers' paths and digests.
    pub fn describe(&self, conflict: &Conflict) -> String {
        let layer = |at: usize| match self.layers.get(at) {
            Some(layer) => format!("{} ({})", layer.layer.path, layer.layer.digest),
            None => format!("layer {at}"),
        };
        let first = match conflict.first {
            Origin::Skeleton => "the path of another layer".to_owned(),
            Origin::Kitfile => "the Kitfile".to_owned(),
            Origin::Layer { layer: at, .. } => layer(at as usize),
        };
        format!("{} is in {} too, where {first} has it already", conflict.path, layer(conflict.second))
    }

    /// The least proved of the layers' tiers; a kit without layers is proved by its manifest.
    pub fn tier(&self) -> Tier {
        self.layers.iter().map(|layer| layer.tier()).min().unwrap_or(Tier::Derived)
    }

    /// Bytes of all layers as the manifest states them.
    pub fn size(&self) -> u64 {
        self.layers.iter().map(|layer| layer.layer.size).sum()
    }
}
