//! What a layer holds, from whatever index of it is in the cache: the derived one, else the one that is named for it,
//! else the head of that. Nobody's word is taken for content here: an index tells which files belong together, and one
//! that lies can protect what is not its own, or give up what is its own; both can be fetched again.

use std::collections::HashMap;

use crate::archive::index::{Head, Index};
use crate::cache::{Cache, CacheError, LayerRecord};
use crate::digest::Digest;
use crate::object::ObjectDigest;

/// What tells two layers of records apart, as far as their contents go.
pub(super) type LayerKey = (Digest, Option<(Digest, Digest)>);

/// The key of a layer.
pub(super) fn key(layer: &LayerRecord) -> LayerKey {
    (layer.index_key, layer.named)
}

/// What a layer may inflate to was for its reader to judge.
const ANY: Option<u64> = Some(u64::MAX);

/// The whole index of a layer, if one is here.
pub(super) fn index(cache: &Cache, layer: &LayerRecord) -> Result<Option<Index>, CacheError> {
    if let Some(index) = cache.index(&layer.index_key)?.and_then(|bytes| Index::decode(bytes, ANY).ok()) {
        return Ok(Some(index));
    }
    let Some((named, _)) = layer.named else { return Ok(None) };
    Ok(cache.blob(&named)?.and_then(|bytes| Index::decode(bytes.bytes().clone(), ANY).ok()))
}

/// The entries of a layer; `None` where no index of it is here.
pub(super) fn head(cache: &Cache, layer: &LayerRecord) -> Result<Option<Head>, CacheError> {
    if let Some(index) = index(cache, layer)? {
        return Ok(Some(index.head().clone()));
    }
    let Some((_, head)) = layer.named else { return Ok(None) };
    Ok(cache.blob(&head)?.and_then(|bytes| Head::parse(bytes.bytes().clone(), ANY).ok()))
}

/// Each layer once, with the place of each of its kits.
pub(super) fn distinct<'a>(
    layers: impl IntoIterator<Item = (usize, &'a LayerRecord)>,
) -> Vec<(&'a LayerRecord, Vec<usize>)> {
    let mut places = HashMap::new();
    let mut found: Vec<(&LayerRecord, Vec<usize>)> = Vec::new();
    for (kit, layer) in layers {
        let at = *places.entry(key(layer)).or_insert(found.len());
        match found.get_mut(at) {
            Some((_, kits)) => kits.push(kit),
            None => found.push((layer, vec![kit])),
        }
    }
    found
}

/// Calls `visit` for each object of these layers, as far as their indexes are here.
pub(super) fn objects<'a>(
    cache: &Cache,
    layers: impl IntoIterator<Item = &'a LayerRecord>,
    mut visit: impl FnMut(ObjectDigest),
) -> Result<(), CacheError> {
    for (layer, _) in distinct(layers.into_iter().map(|layer| (0, layer))) {
        let Some(head) = head(cache, layer)? else { continue };
        head.rows().filter_map(|row| row.object()).for_each(&mut visit);
    }
    Ok(())
}
