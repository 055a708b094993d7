//! Contents and their chunks, for the tests of the cache.

use bytes::Bytes;

use crate::digest::{Digest, Unverified};
use crate::object::{CHUNK_SIZE, ChunkList, VerifiedChunk};

pub(super) const CHUNK: usize = CHUNK_SIZE as usize;

/// The chunk digests of a content.
pub(super) fn list_of(content: &[u8]) -> ChunkList<Bytes> {
    let digests: Vec<u8> = content.chunks(CHUNK).flat_map(|chunk| *Digest::of(chunk).as_bytes()).collect();
    ChunkList::new(content.len() as u64, Bytes::from(digests)).expect("as many digests as chunks")
}

/// One of its chunks.
pub(super) fn chunk(content: &[u8], number: u64) -> VerifiedChunk {
    let list = list_of(content);
    let range = list.range(number).expect("a chunk");
    let bytes = content[range.start as usize..range.end as usize].to_vec();
    list.verify(number, Unverified::new(bytes)).expect("the list has it").expect("its bytes")
}
