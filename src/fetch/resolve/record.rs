//! What belongs to a kit that was resolved, for the cache's own record of it.

use super::documents::Documents;
use crate::cache::{KitRecord, LayerRecord};
use crate::fetch::Resolved;
use crate::fetch::fill::index_key;
use crate::modelkit::Layer;
use crate::reference::{Location, Reference};

/// What belongs to a kit. Nothing of it is kept yet.
pub fn record(resolved: &Resolved) -> KitRecord {
    let named = |at: usize| resolved.named.get(at).copied().flatten();
    let layer = |(at, layer): (usize, &Layer)| LayerRecord {
        digest: layer.digest,
        size: layer.size,
        path: layer.root.to_string(),
        prefix: layer.prefix.to_string(),
        index_key: index_key(layer),
        named: named(at).map(|named| (named.pin.digest, named.pin.head_digest)),
        kept: false,
    };
    let reference = absolute(&resolved.reference);
    KitRecord {
        digest: resolved.digest,
        references: vec![reference.to_string()],
        repository: reference.location.name(),
        blobs: resolved.documents.clone(),
        layers: resolved.plan.layers.iter().enumerate().map(layer).collect(),
    }
}

/// A reference that means the same in every working directory.
pub fn absolute(reference: &Reference) -> Reference {
    let mut reference = reference.clone();
    if let Location::Layout { dir } = &mut reference.location
        && let Ok(path) = std::path::absolute(&*dir)
    {
        *dir = path;
    }
    reference
}

/// Notes it. Without a record the kit's files are nobody's, which is told where the cache is looked at; reading goes on.
pub(super) fn note(documents: &Documents<'_>, resolved: &Resolved) {
    let record = record(resolved);
    documents.keep(move |cache| {
        cache.note_kit(record).unwrap_or_else(|error| tracing::debug!(%error, "what belongs to the kit is not noted"));
        Ok(())
    });
}
