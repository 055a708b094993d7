//! What can be wrong with an index.

use super::layout::{MAGIC, VERSION};
use crate::archive::listing::Contradiction;
use crate::digest::Digest;

/// Bytes that are not the chunk list of a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not the chunk list of {path:?}: {why}")]
pub struct InvalidList {
    /// The file's path, lossily decoded.
    pub path: String,
    /// What is wrong.
    pub why: &'static str,
}

/// Bytes, or entries, that are no index of a layer.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// It doesn't begin like an index.
    #[error("not an index of kitfs: it does not begin with {:?}", String::from_utf8_lossy(&MAGIC))]
    NotAnIndex,
    /// It is of another version of the format.
    #[error(
        "the index has version {found}; this kitfs reads version {VERSION}: index the kit again, or use another kitfs"
    )]
    Version {
        /// Its version.
        found: u32,
    },
    /// It is longer or shorter than its header says, or shorter than a header.
    #[error("the index should have {expected} bytes, but has {found}: it is cut short or damaged")]
    Length {
        /// How many it should have.
        expected: u64,
        /// How many it has.
        found: u64,
    },
    /// It holds more than is read.
    #[error("the index has {count} {what}; at most {cap} are read")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: u64,
        /// How many may be.
        cap: u64,
    },
    /// A field of the header is not as it must be.
    #[error("the index's header: {why}")]
    Header {
        /// What is wrong.
        why: &'static str,
    },
    /// Facts of the layer that don't fit each other.
    #[error("the index's facts of its layer {layer}: {why}")]
    Layer {
        /// The layer it names.
        layer: Digest,
        /// What is wrong.
        why: &'static str,
    },
    /// The layer would inflate beyond the bound.
    #[error(
        "the index says that layer {layer} inflates to {inflated} bytes; at most {bound} are allowed: if that is right, raise \
         the bound with --max-inflated"
    )]
    InflatesTooFar {
        /// The layer it names.
        layer: Digest,
        /// How far it inflates.
        inflated: u64,
        /// How far it may.
        bound: u64,
    },
    /// An entry whose facts don't fit it, or that is not in its place.
    #[error("entry {position} of the index, {path:?}: {why}")]
    Entry {
        /// Which one, counted from 0.
        position: usize,
        /// Its path, lossily decoded.
        path: String,
        /// What is wrong.
        why: &'static str,
    },
    /// Entries that contradict each other.
    #[error("the index contradicts itself")]
    Contradiction(#[from] Contradiction),
    /// Sections that are longer than what their entries take.
    #[error("the index has {what} that belong to no entry")]
    Unused {
        /// What they are.
        what: &'static str,
    },
}
