//! What goes when there is no room.

use std::collections::HashSet;

use super::{Cache, CacheError};
use crate::digest::Digest;
use crate::object::ObjectDigest;

/// What only those above the cache know of its files: which belong together. Asked when something has to go.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// Which objects stay, and which go late.
    pub protected: fn(&Cache) -> Result<Protected, CacheError>,
    /// Small files that nothing in the cache needs any more, those that were used longest ago first.
    pub spare: fn(&Cache) -> Result<Vec<Small>, CacheError>,
}

impl Default for Policy {
    /// Nothing is known: all objects are equal, and small files stay.
    fn default() -> Self {
        Self { protected: |_| Ok(Protected::default()), spare: |_| Ok(Vec::new()) }
    }
}

/// Objects that do not go, or late.
#[derive(Debug, Clone, Default)]
pub struct Protected {
    /// Those of kits that are kept.
    pub never: HashSet<ObjectDigest>,
    /// Those of kits that a directory served before the present one: who rolls back wants them.
    pub late: HashSet<ObjectDigest>,
}

/// A small file of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Small {
    /// A blob by its digest.
    Blob(Digest),
    /// A derived index by its key.
    Index(Digest),
    /// What is recorded of a kit, by its manifest's digest.
    Kit(Digest),
}
