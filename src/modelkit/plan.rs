//! From a chain of kits to the layers of a mount.

use std::collections::HashMap;

use super::error::ModelKitError;
use super::filter::Filters;
use super::kit::Kit;
use super::{Format, Layer, Plan};
use crate::path::TreePath;
use crate::reference::Reference;

/// The most parents a kit may have, parents of parents counted: kit's own limit.
pub const MAX_PARENTS: usize = 10;
/// Where the Kitfile stands.
const KITFILE: &str = "Kitfile";

/// A kit and the kits it builds on, the nearest first. No kit is in it twice, and it is not too long.
#[derive(Debug)]
pub struct Chain {
    first: Kit,
    parents: Vec<Kit>,
}

impl Chain {
    /// A chain of one kit.
    pub fn new(kit: Kit) -> Self {
        Self { first: kit, parents: Vec::new() }
    }

    /// The parent that is missing at the end; `None` if the chain is complete or `filters` want nothing of a parent.
    pub fn next_parent(&self, filters: &Filters) -> Option<&Reference> {
        filters.for_parent()?;
        self.last().parent()
    }

    /// Adds the parent of the last kit.
    pub fn push(&mut self, kit: Kit) -> Result<(), ModelKitError> {
        if self.kits().any(|other| other.digest == kit.digest) {
            return Err(ModelKitError::Cycle { chain: self.names(&kit) });
        }
        if self.parents.len() == MAX_PARENTS {
            return Err(ModelKitError::TooManyParents { limit: MAX_PARENTS, chain: self.names(&kit) });
        }
        self.parents.push(kit);
        Ok(())
    }

    /// All kits, the nearest first: [`Layer::kit`] counts along them.
    pub fn kits(&self) -> impl DoubleEndedIterator<Item = &Kit> + ExactSizeIterator {
        let count = 1 + self.parents.len();
        (0..count).map(|at| if at == 0 { &self.first } else { &self.parents[at - 1] })
    }

    fn last(&self) -> &Kit {
        self.parents.last().unwrap_or(&self.first)
    }

    /// The digest of the first kit, then each reference that led on.
    fn names(&self, next: &Kit) -> Vec<String> {
        let references = self.kits().filter_map(Kit::parent).map(Reference::to_string);
        let digests = [self.first.digest.to_string()].into_iter();
        digests.chain(references).chain([next.digest.to_string()]).collect()
    }
}

/// What a mount of the chain's first kit shows through the filters.
pub fn plan(chain: &Chain, filters: &Filters) -> Result<Plan, ModelKitError> {
    let mut wanted = Vec::new();
    let mut narrowed = Some(filters.clone());
    for (at, kit) in chain.kits().enumerate() {
        let Some(filters) = narrowed else { break };
        narrowed = kit.parent().and_then(|_| filters.for_parent());
        if let (Some(_), Some(reference)) = (&narrowed, kit.parent())
            && at + 1 == chain.kits().len()
        {
            return Err(ModelKitError::ParentNotRead { kit: kit.digest, reference: reference.to_string() });
        }
        wanted.push((at, kit, filters));
    }
    let (mut layers, mut warnings) = (Vec::new(), Vec::new());
    // kit unpacks parents before the kit that builds on them, and the first to make a directory gives it its mode.
    for (at, kit, filters) in wanted.into_iter().rev() {
        warnings.extend(kit.warnings.iter().cloned());
        for entry in &kit.entries {
            if filters.matches(entry.kind, entry.name.as_deref(), &entry.path) {
                let layer = entry.layer.as_ref().map_err(ModelKitError::clone)?;
                layers.push(Layer { kit: at, ..layer.clone() });
            }
        }
    }
    let kitfile = chain.first.kitfile.clone().filter(|_| filters.wants_kitfile());
    refuse_certain_collisions(&layers, kitfile.is_some())?;
    Ok(Plan { digest: chain.first.digest, kitfile, layers, warnings })
}

/// Refuses what no look into the layers could make right: a raw layer is one file, so nothing else can be at or below
/// its root. What tars hold is not known here.
fn refuse_certain_collisions(layers: &[Layer], has_kitfile: bool) -> Result<(), ModelKitError> {
    let collision = |first: String, second: String, path: &TreePath| {
        Err(ModelKitError::Collision { first, second, path: path.to_string() })
    };
    let mut files: HashMap<&TreePath, &Layer> = HashMap::new();
    for layer in layers.iter().filter(|layer| matches!(layer.format, Format::Raw { .. })) {
        if has_kitfile && layer.root.as_bytes() == KITFILE.as_bytes() {
            return collision("the Kitfile".to_owned(), layer.label(), &layer.root);
        }
        if let Some(other) = files.insert(&layer.root, layer) {
            return collision(other.label(), layer.label(), &layer.root);
        }
    }
    for layer in layers.iter().filter(|_| !files.is_empty()) {
        for ancestor in layer.root.ancestors() {
            if let Some(file) = files.get(&ancestor) {
                return collision(file.label(), layer.label(), &ancestor);
            }
        }
    }
    Ok(())
}
