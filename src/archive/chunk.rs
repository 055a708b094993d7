//! Cutting content into chunks, and hashing them: see [`crate::object`].

use crate::digest::{Digest, StreamHasher};
use crate::object::{CHUNK_SIZE, ChunkList, ObjectDigest};

/// One file's content as its digests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// How many bytes.
    pub size: u64,
    /// The digest of each chunk, in order.
    pub chunks: Vec<Digest>,
    /// The name that follows from both.
    pub object: ObjectDigest,
}

impl Content {
    /// What a list of chunks tells.
    pub fn of<B: AsRef<[u8]>>(list: &ChunkList<B>) -> Self {
        let (digests, _) = list.as_bytes().as_chunks();
        let chunks = digests.iter().copied().map(Digest::from_bytes).collect();
        Self { size: list.size(), chunks, object: list.object() }
    }
}

/// Cuts content that comes in pieces of any size into chunks, and hashes them.
#[derive(Debug, Default)]
pub struct Chunker {
    size: u64,
    /// The digests of the chunks that are whole.
    chunks: Vec<Digest>,
    /// The hash of the chunk that is not.
    current: StreamHasher,
}

impl Chunker {
    /// Empty content.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = u64::from(CHUNK_SIZE) - self.size % u64::from(CHUNK_SIZE);
            let len = usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len());
            let (now, later) = bytes.split_at(len);
            self.current.update(now);
            self.size += len as u64;
            bytes = later;
            if self.size.is_multiple_of(u64::from(CHUNK_SIZE)) {
                self.chunks.push(std::mem::take(&mut self.current).digest());
            }
        }
    }

    /// Ends the content.
    pub fn finish(mut self) -> Content {
        if !self.size.is_multiple_of(u64::from(CHUNK_SIZE)) {
            self.chunks.push(self.current.digest());
        }
        Content { size: self.size, object: ObjectDigest::new(self.size, &self.chunks), chunks: self.chunks }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::object::chunk_count;

    const CHUNK: usize = CHUNK_SIZE as usize;

    fn content(bytes: &[u8]) -> Content {
        let mut chunker = Chunker::new();
        chunker.update(bytes);
        chunker.finish()
    }

    #[test]
    fn the_object_digest_is_the_one_of_the_design() {
        let bytes = vec![7; CHUNK + 1];
        let mut preimage = b"kitfs-object-v1\0".to_vec();
        preimage.extend_from_slice(&(CHUNK as u64 + 1).to_le_bytes());
        preimage.extend_from_slice(&(1_u32 << 20).to_le_bytes());
        preimage.extend_from_slice(Digest::of(&bytes[..CHUNK]).as_bytes());
        preimage.extend_from_slice(Digest::of(&[7]).as_bytes());
        assert_eq!(content(&bytes).object.hex(), Digest::of(&preimage).hex());
    }

    #[test]
    fn chunks_end_at_each_mebibyte_and_an_empty_file_has_none() {
        for (size, chunks) in [(0, 0), (1, 1), (CHUNK - 1, 1), (CHUNK, 1), (CHUNK + 1, 2), (2 * CHUNK, 2)] {
            let content = content(&vec![0; size]);
            assert_eq!(content.chunks.len(), chunks, "{size}");
            assert_eq!(chunk_count(size as u64), chunks as u64, "{size}");
        }
    }

    #[test]
    fn contents_that_differ_in_size_alone_have_different_names() {
        assert_ne!(ObjectDigest::new(1, &[]), ObjectDigest::new(2, &[]));
    }

    #[test]
    fn an_object_digest_reads_back_as_it_is_written_and_is_no_oci_digest() {
        let object = content(b"x").object;
        assert_eq!(object.to_string().parse(), Ok(object));
        assert!(format!("sha256:{object}").parse::<ObjectDigest>().is_err());
        let json = serde_json::to_string(&object).expect("serialises");
        assert_eq!(serde_json::from_str::<ObjectDigest>(&json).expect("reads"), object);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn the_pieces_it_comes_in_do_not_matter(size in 0..3 * CHUNK, cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6)) {
            let bytes: Vec<u8> = (0..size).map(|i| (i / 7) as u8).collect();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(size + 1)).collect();
            cuts.sort_unstable();
            let mut chunker = Chunker::new();
            let mut from = 0;
            for cut in cuts.into_iter().chain([size]) {
                chunker.update(&bytes[from..cut]);
                from = cut;
            }
            let pieces = chunker.finish();
            prop_assert_eq!(pieces.size, size as u64);
            prop_assert_eq!(pieces, content(&bytes));
        }
    }
}
