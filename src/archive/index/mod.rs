//! What a layer holds, in the bytes that are stored, sent and read in place: index format v1.
//!
//! An index turns the digest of a whole layer into verified random access. `docs/index-format.md` is its definition; in short:
//!
//! ```text
//! header     112 bytes            the layer's facts, how many of the following
//! records    76 bytes an entry    sorted by path: type and mode, owner, time, size, offset, digest   ┐ with the header: the head,
//! names      as long as needed    of each entry the path, and behind a link's the target             ┘ which is the listing
//! lists      32 bytes a chunk     the chunk digests of files of more than one chunk
//! ```
//!
//! - [`Index`] is all of it, [`Head`] what a mount fetches to list the layer, [`ChunkList`] what it fetches to read one file.
//!   Each is valid once it exists: a digest of its bytes proves who made it, and the checks that they make sense. Whether
//!   an index is *right*, that is, made from the layer it names, is for the tiers of trust to say.
//! - The form is canonical: whoever indexes the same layer gets the same bytes. So every rule that is checked is strict, and
//!   nothing is stated twice where it could be computed.
//! - It is used where it lies: a row is read from the bytes, a path found by binary search. Only where names go into a
//!   tree does a mount copy them.
//!
//! `layout` has the sections as types, `check` the rules, `encode` the other direction, `head` the way to use an index,
//! `annotations` how manifests name it, `diff` where two indexes of one layer differ.

pub mod annotations;
mod check;
pub mod diff;
mod encode;
mod error;
mod head;
mod layout;

pub use error::{IndexError, InvalidList};
pub use head::{Chunks, Head, Row, RowKind};

use bytes::Bytes;

use super::Entry;
use super::chunk::Content;
use super::listing;
use super::walker::Caps;
use crate::digest::{Digest, StreamHasher};
use crate::modelkit::{Compression, Format, Layer};
use crate::object::ChunkList;
use annotations::Pin;
use layout::{DIGEST_LEN, Extent, HEADER_LEN, RECORD_LEN};

/// The most entries: as many as a walk finds.
pub const MAX_ENTRIES: u64 = Caps::DEFAULT.headers;
/// The most bytes of names: as many as a walk takes.
pub const MAX_NAMES: u64 = Caps::DEFAULT.names;
/// The most digests in chunk lists: 64 Mi, for 64 TiB of files. The lists take 2 GiB then.
pub const MAX_CHUNKS: u64 = 64 << 20;
/// The longest head that follows: 2.2 GiB.
pub const MAX_HEAD: u64 = HEADER_LEN as u64 + MAX_ENTRIES * RECORD_LEN as u64 + MAX_NAMES;
/// The longest index that follows: 4.2 GiB.
pub const MAX_INDEX: u64 = MAX_HEAD + MAX_CHUNKS * DIGEST_LEN as u64;

/// What the bytes of an indexed layer are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerFormat {
    /// A tar archive.
    Tar,
    /// One file's bytes.
    Raw,
}

impl From<&Format> for LayerFormat {
    fn from(format: &Format) -> Self {
        match format {
            Format::Tar => Self::Tar,
            Format::Raw { .. } => Self::Raw,
        }
    }
}

/// The layer that an index is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerFacts {
    /// The digest of the blob.
    pub digest: Digest,
    /// The size of the blob.
    pub size: u64,
    /// The digest of the blob uncompressed.
    pub diff_id: Digest,
    /// The size of the blob uncompressed.
    pub inflated: u64,
    /// What the uncompressed bytes are.
    pub format: LayerFormat,
    /// How the blob is compressed.
    pub compression: Compression,
}

impl LayerFacts {
    /// Whether they are facts of this layer, as far as the plan knows it. A diffId that the kit states may be wrong.
    pub fn fit(&self, layer: &Layer) -> bool {
        let planned = (layer.digest, layer.size, LayerFormat::from(&layer.format), layer.compression);
        (self.digest, self.size, self.format, self.compression) == planned
    }
}

/// An entry with its content's digests, which a file has and nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexEntry {
    /// The entry.
    pub entry: Entry,
    /// The file's content.
    pub content: Option<Content>,
}

/// A whole index, checked and hashed, over bytes of any kind, which must not change.
#[derive(Debug, Clone)]
pub struct Index<B = Bytes> {
    head: Head<B>,
    pin: Pin,
}

impl Index {
    /// The index of a layer from its entries, in the order of the archive. The layer was inflated, so its bound held.
    pub fn build(layer: LayerFacts, mut rows: Vec<IndexEntry>) -> Result<Self, IndexError> {
        listing::sort(&mut rows, |row| &row.entry);
        let inflated = layer.inflated;
        Self::decode(encode::encode(&layer, &rows)?.into(), Some(inflated))
    }
}

impl<B: AsRef<[u8]>> Index<B> {
    /// Takes the bytes of a whole index, if they keep all rules. `max_inflated` as in [`Head::parse`]. It reads and hashes
    /// all of them: a fifth of a second for a million files.
    pub fn decode(bytes: B, max_inflated: Option<u64>) -> Result<Self, IndexError> {
        let head = Head::read(bytes, Extent::Whole, max_inflated)?;
        let (part, all) = (head.as_bytes(), head.all_bytes());
        let mut hasher = StreamHasher::new();
        hasher.update(part);
        let head_digest = hasher.clone().digest();
        hasher.update(&all[part.len()..]);
        let (head_size, size) = (part.len() as u64, all.len() as u64);
        let pin = Pin { digest: hasher.digest(), size, head_digest, head_size };
        Ok(Self { head, pin })
    }

    /// The same index in another place, if `bytes` are its own.
    pub fn moved<C: AsRef<[u8]>>(&self, bytes: C) -> Option<Index<C>> {
        (bytes.as_ref() == self.as_bytes()).then(|| Index { head: self.head.moved(bytes), pin: self.pin })
    }

    /// Its head, which has the entries.
    pub fn head(&self) -> &Head<B> {
        &self.head
    }

    /// Its bytes: always the same for the same layer.
    pub fn as_bytes(&self) -> &[u8] {
        self.head.all_bytes()
    }

    /// The chunk digests of the file at a position; `None` for what is not a file.
    pub fn chunks(&self, position: usize) -> Option<ChunkList<&[u8]>> {
        let row = self.head.row(position)?;
        match row.chunks()? {
            Chunks::Here(list) => Some(list),
            Chunks::At(range) => {
                let list = self.as_bytes().get(range.start as usize..range.end as usize)?;
                ChunkList::new(row.size(), list)
            }
        }
    }

    /// The entry at a position, as [`Index::build`] takes it.
    pub fn entry(&self, position: usize) -> Option<IndexEntry> {
        let entry = self.head.row(position)?.to_entry();
        Some(IndexEntry { entry, content: self.chunks(position).map(|list| Content::of(&list)) })
    }

    /// What names it in a manifest.
    pub fn pin(&self) -> Pin {
        self.pin
    }
}

#[cfg(test)]
mod example_tests;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;
