//! One file's content by its digests: chunks, the list of their digests, and the object digest that follows from it.
//!
//! A file's content is cut into chunks of 1 MiB, the last one shorter; each is verified on its own. The object digest
//! covers the size and the list of chunk digests, so a list that has it is right, and with it every chunk.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::digest::{Digest, Hashed, InvalidDigest, Mismatch, StreamHasher, Verified};

/// The unit of verification: 1 MiB, fixed in version 1 of the object digest. Hashing one takes about half a
/// millisecond, and the digests of a 100 GiB file take 3 MiB.
pub const CHUNK_SIZE: u32 = 1 << 20;

/// How many chunks content of `size` bytes has.
pub const fn chunk_count(size: u64) -> u64 {
    size.div_ceil(CHUNK_SIZE as u64)
}

/// What the object digest begins with, so that it can't equal the digest of any blob's bytes.
const DOMAIN: &[u8] = b"kitfs-object-v1\0";

/// The name of one file's content in the cache. Written as 64 hexadecimal digits, without an algorithm: it is not the
/// SHA-256 of the content, and must not be mistaken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectDigest(Digest);

impl ObjectDigest {
    /// The name of content of `size` bytes with these chunk digests, in order.
    pub fn new(size: u64, chunks: &[Digest]) -> Self {
        let mut hasher = Self::hasher(size);
        for chunk in chunks {
            hasher.update(chunk.as_bytes());
        }
        Self(hasher.digest())
    }

    /// The same from the raw bytes of the chunk digests, one after the other, as an index holds them.
    pub fn of_list(size: u64, list: &[u8]) -> Self {
        let mut hasher = Self::hasher(size);
        hasher.update(list);
        Self(hasher.digest())
    }

    fn hasher(size: u64) -> StreamHasher {
        let mut hasher = StreamHasher::new();
        hasher.update(DOMAIN);
        hasher.update(&size.to_le_bytes());
        hasher.update(&CHUNK_SIZE.to_le_bytes());
        hasher
    }

    /// A name from its 32 raw bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(Digest::from_bytes(bytes))
    }

    /// The 32 raw bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        self.0.as_bytes()
    }

    /// The 64 hexadecimal digits, as used in file names.
    pub fn hex(&self) -> String {
        self.0.hex()
    }
}

impl fmt::Display for ObjectDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.hex())
    }
}

impl FromStr for ObjectDigest {
    type Err = InvalidDigest;
    fn from_str(hex: &str) -> Result<Self, InvalidDigest> {
        Digest::from_hex(hex).map(Self)
    }
}

impl serde::Serialize for ObjectDigest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for ObjectDigest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The length of a digest in a list.
const DIGEST_LEN: u64 = 32;

/// The chunk digests of one file, of which its object digest is.
#[derive(Clone)]
pub struct ChunkList<B> {
    size: u64,
    object: ObjectDigest,
    digests: B,
}

impl<B: AsRef<[u8]>> ChunkList<B> {
    /// The list of content of `size` bytes; the object digest is what follows from it. `None` where it has not as many
    /// digests as the content has chunks.
    pub fn new(size: u64, digests: B) -> Option<Self> {
        let list = digests.as_ref();
        let fits = list.len() as u64 == chunk_count(size).checked_mul(DIGEST_LEN)?;
        let object = ObjectDigest::of_list(size, list);
        fits.then_some(Self { size, object, digests })
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

    /// Takes the bytes of a chunk, if they have its digest. `None` where the list has no such chunk.
    pub fn verify(&self, chunk: u64, bytes: impl Into<Hashed>) -> Option<Result<VerifiedChunk, Mismatch>> {
        let bytes = bytes.into().verify(&self.digest(chunk)?);
        Some(bytes.map(|bytes| VerifiedChunk { object: self.object, number: chunk, bytes }))
    }

    /// Where a chunk's bytes are in the file.
    pub fn range(&self, chunk: u64) -> Option<Range<u64>> {
        let start = chunk.checked_mul(CHUNK_SIZE.into()).filter(|start| *start < self.size)?;
        Some(start..self.size.min(start + u64::from(CHUNK_SIZE)))
    }

    /// The chunks that hold a range of the file, which ends within it.
    pub fn chunks_of(&self, range: &Range<u64>) -> Range<u64> {
        range.start / u64::from(CHUNK_SIZE)..chunk_count(range.end.min(self.size))
    }

    /// The digests, one after the other.
    pub fn as_bytes(&self) -> &[u8] {
        self.digests.as_ref()
    }

    /// The same list over bytes of its own.
    pub fn to_owned(&self) -> ChunkList<bytes::Bytes> {
        let digests = bytes::Bytes::copy_from_slice(self.digests.as_ref());
        ChunkList { size: self.size, object: self.object, digests }
    }
}

/// A chunk of an object whose digest held.
#[derive(Debug, Clone)]
pub struct VerifiedChunk {
    object: ObjectDigest,
    number: u64,
    bytes: Verified,
}

impl VerifiedChunk {
    /// The object.
    pub fn object(&self) -> ObjectDigest {
        self.object
    }

    /// Which chunk, counted from 0.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Its bytes.
    pub fn bytes(&self) -> &Verified {
        &self.bytes
    }

    /// The same with bytes in memory of their own.
    pub fn copied(&self) -> Self {
        Self { bytes: self.bytes.copied(), ..*self }
    }
}

impl<B> fmt::Debug for ChunkList<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkList({} bytes, {})", self.size, self.object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Unverified;

    #[test]
    fn a_chunk_is_taken_if_it_has_its_digest_and_the_list_has_it() {
        let list = ChunkList::new(3, *Digest::of(b"abc").as_bytes()).expect("one chunk");
        let verify = |chunk, bytes: &'static [u8]| list.verify(chunk, Unverified::new(bytes));
        let taken = verify(0, b"abc").expect("there is one").expect("its bytes");
        assert_eq!((taken.number(), taken.object(), &taken.bytes().bytes()[..]), (0, list.object(), &b"abc"[..]));
        let refused = verify(0, b"abd").expect("there is one").expect_err("other bytes");
        assert_eq!((refused.expected, refused.found), (Digest::of(b"abc"), Digest::of(b"abd")));
        for (chunk, bytes) in [(1, &b""[..]), (1, b"abc"), (u64::MAX, b"abc")] {
            assert!(verify(chunk, bytes).is_none());
        }
    }
}
