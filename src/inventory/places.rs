//! Where in which kits an object is: what a damaged file of the cache means to people; and what its chunks should be.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;

use super::layers;
use crate::archive::index::{Chunks, Head, LayerFormat};
use crate::cache::{Cache, CacheError, KitRecord, LayerRecord};
use crate::object::{ChunkList, ObjectDigest};
use crate::path::TreePath;

/// So many places of an object are told: enough to see what it is.
pub const TOLD: usize = 16;

/// A file of a kit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The kit's position among the records.
    pub kit: usize,
    /// The layer's position in the kit.
    pub layer: usize,
    /// Where in the listing of the layer the file stands.
    pub row: usize,
    /// Its path in the kit.
    pub path: TreePath,
}

/// The places of these objects, as far as indexes tell, the first [`TOLD`] of each.
pub fn places(
    cache: &Cache,
    kits: &[KitRecord],
    objects: &HashSet<ObjectDigest>,
) -> Result<HashMap<ObjectDigest, Vec<Place>>, CacheError> {
    let mut found: HashMap<ObjectDigest, Vec<Place>> = HashMap::new();
    if objects.is_empty() {
        return Ok(found);
    }
    for (kit, record) in kits.iter().enumerate() {
        for (at, layer) in record.layers.iter().enumerate() {
            let Some(head) = layers::head(cache, layer)? else { continue };
            for (row, entry) in head.rows().enumerate() {
                let Some(object) = entry.object().filter(|object| objects.contains(object)) else { continue };
                let places = found.entry(object).or_default();
                if places.len() < TOLD {
                    let path = path(layer, head.layer().format, entry.path());
                    places.push(Place { kit, layer: at, row, path });
                }
            }
        }
    }
    Ok(found)
}

/// The chunk digests of these objects, as far as indexes tell.
pub fn lists(
    cache: &Cache,
    kits: &[KitRecord],
    objects: &HashSet<ObjectDigest>,
) -> Result<HashMap<ObjectDigest, ChunkList<Bytes>>, CacheError> {
    let mut found = HashMap::new();
    if objects.is_empty() {
        return Ok(found);
    }
    let all = kits.iter().flat_map(|kit| &kit.layers).map(|layer| (0, layer));
    for (layer, _) in layers::distinct(all) {
        let index = layers::index(cache, layer)?;
        let head = match &index {
            Some(index) => Some(index.head().clone()),
            None => layers::head(cache, layer)?,
        };
        for (row, entry) in head.iter().flat_map(Head::rows).enumerate() {
            let Some(object) = entry.object().filter(|object| objects.contains(object)) else { continue };
            let here = match entry.chunks() {
                Some(Chunks::Here(list)) => Some(list.to_owned()),
                _ => index.as_ref().and_then(|index| Some(index.chunks(row)?.to_owned())),
            };
            found.extend(here.map(|list| (object, list)));
        }
    }
    Ok(found)
}

/// Where an entry of a layer lies in the kit.
fn path(layer: &LayerRecord, format: LayerFormat, name: &[u8]) -> TreePath {
    let root = || TreePath::clean(layer.path.as_bytes()).unwrap_or_default();
    if format == LayerFormat::Raw {
        return root();
    }
    let prefix = TreePath::clean(layer.prefix.as_bytes()).unwrap_or_default();
    TreePath::from_clean(name).and_then(|name| prefix.join(&name)).unwrap_or_else(|_| root())
}
