//! What contents take, or would take: those of kits that are not here yet, too.

use std::collections::HashMap;

use super::layers;
use crate::cache::{Cache, CacheError, LayerRecord};

/// Bytes of the contents of these layers, each content once: files where an index tells of them, else blobs as they are.
pub fn bytes_of<'a>(cache: &Cache, layers: impl IntoIterator<Item = &'a LayerRecord>) -> Result<u64, CacheError> {
    let (mut objects, mut blobs) = (HashMap::new(), HashMap::new());
    for (layer, _) in layers::distinct(layers.into_iter().map(|layer| (0, layer))) {
        match layers::head(cache, layer)? {
            Some(head) => objects.extend(head.rows().filter_map(|row| Some((row.object()?, row.size())))),
            None => drop(blobs.insert(layer.digest, layer.size)),
        }
    }
    Ok(objects.values().chain(blobs.values()).sum())
}
