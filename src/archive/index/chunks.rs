//! The chunk digests of one file.

use std::fmt;
use std::ops::Range;

use super::{Row, check};
use crate::archive::chunk::{CHUNK_SIZE, Content, ObjectDigest, chunk_count};
use crate::digest::Digest;

/// The chunk digests of one file, which its object digest has proved.
#[derive(Clone)]
pub struct ChunkList<B> {
    size: u64,
    object: ObjectDigest,
    digests: B,
}

/// Bytes that are not the chunk list of a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not the chunk list of {path:?}: {why}")]
pub struct InvalidList {
    /// The file's path, lossily decoded.
    pub path: String,
    /// What is wrong.
    pub why: &'static str,
}

impl<B: AsRef<[u8]>> ChunkList<B> {
    /// Takes the bytes of the index that [`super::Chunks::At`] told of, if they are what the row's object digest is of.
    pub fn parse(row: &Row<'_>, bytes: B) -> Result<Self, InvalidList> {
        let invalid = |why| InvalidList { path: String::from_utf8_lossy(row.path()).into_owned(), why };
        if !row.record().has_list() {
            return Err(invalid("it has none"));
        }
        check::list_of(row.record(), bytes.as_ref()).map_err(invalid)?;
        Ok(Self::trusted(row.size(), ObjectDigest::from_bytes(row.record().digest), bytes))
    }

    /// A list that was checked with the index it stands in.
    pub(super) fn trusted(size: u64, object: ObjectDigest, digests: B) -> Self {
        Self { size, object, digests }
    }

    /// How many bytes the file has.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The name of the file's content.
    pub fn object(&self) -> ObjectDigest {
        self.object
    }

    /// How many chunks the file has.
    pub fn len(&self) -> u64 {
        chunk_count(self.size)
    }

    /// Whether the file is empty, and so has no chunk.
    pub fn is_empty(&self) -> bool {
        self.size == 0
    }

    /// The digest of a chunk, counted from 0.
    pub fn digest(&self, chunk: u64) -> Option<Digest> {
        let (digests, _) = self.digests.as_ref().as_chunks();
        digests.get(usize::try_from(chunk).ok()?).copied().map(Digest::from_bytes)
    }

    /// Where a chunk's bytes are in the file.
    pub fn range(&self, chunk: u64) -> Option<Range<u64>> {
        let start = chunk.checked_mul(CHUNK_SIZE.into()).filter(|start| *start < self.size)?;
        Some(start..self.size.min(start + u64::from(CHUNK_SIZE)))
    }

    /// The list as a value of its own.
    pub fn to_content(&self) -> Content {
        let (digests, _) = self.digests.as_ref().as_chunks();
        let chunks = digests.iter().copied().map(Digest::from_bytes).collect();
        Content { size: self.size, chunks, object: self.object }
    }
}

impl<B> fmt::Debug for ChunkList<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkList({} bytes, {})", self.size, self.object)
    }
}
