//! Files that are filled chunk by chunk, shared by all of the process that read the same content, of whatever kit.
//!
//! A missing chunk is claimed by one reader; the others wait for the same answer. Who holds a [`Claim`] looks whether
//! the chunk is on the disk after all (another process may have written it) and else fetches it ([`requests`]).
//! The bytes are verified, written, and then answered from the file: that is faster than from memory, which goes to the
//! next chunk meanwhile. Where the cache has no room at once they are answered from memory, and written then.
//!
//! - [`requests`]: getting the chunks that are missing; [`queue`]: which ones next; [`ahead`]: which ones before they are
//!   asked for.
//! - [`sequence`]: getting them from a layer that can only be read from its start on.
//! - [`open_files`]: all files that are filled, and those that wait to be made durable.
//!
//! Locks: plain mutexes around the slots and the streams of a file, each held for a look or a note, none across an
//! await, none while another is held, but for what is verified or unwritten, which is looked at under the slots.

pub mod ahead;
pub mod open_files;
pub mod queue;
pub mod requests;
pub mod sequence;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use bytes::Bytes;
use lru::LruCache;
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::FetchError;
use super::flight::Outcome;
use crate::cache::{Cache, CacheError, CachedRange, Object, Partial};
use crate::digest::{Hashed, Mismatch, Verified};
use crate::object::{CHUNK_SIZE, ChunkList, ObjectDigest, VerifiedChunk};
use ahead::Streams;

/// Verified bytes of a file, in memory or in the cache.
#[derive(Debug, Clone)]
pub enum Piece {
    /// In memory.
    Memory(Verified),
    /// In a file of the cache.
    File(CachedRange),
}

/// A file of which some chunks are in the cache.
#[derive(Debug)]
pub struct Chunked {
    cache: Arc<Cache>,
    partial: Partial,
    slots: Mutex<HashMap<u64, Slot>>,
    streams: Mutex<Streams>,
    /// Whether its rest was asked for.
    finished: AtomicBool,
    unwritten: Arc<Unwritten>,
    /// Held for as long as the file is open, where nobody asked for it.
    right: OnceLock<OwnedSemaphorePermit>,
}

/// Verified chunks that the cache could not take, those used last: what a full disk would have fetched again for each
/// of the small reads that make up a chunk.
pub type Unwritten = Mutex<LruCache<(ObjectDigest, u64), VerifiedChunk>>;

/// So many chunks a stream gets ahead of its reader into memory: eight readers use all of it.
const UNWRITTEN_AHEAD: u64 = 4;
/// So many bytes of a file are fetched that nobody has asked for, so that it is complete. With at most half of the file,
/// what it costs is no more than what was read; and this is what a slow wire brings in a minute or two.
const REST: u64 = 1 << 30;
/// Smaller files are not completed so: what is read of them stays in the kernel's cache, and the rest comes in a second.
const LARGE: u64 = 64 << 20;

/// A chunk that somebody is getting.
#[derive(Debug, Clone)]
struct Slot {
    outcome: watch::Receiver<Option<Outcome<Arrived>>>,
    /// Moves as long as it is worth waiting.
    progress: watch::Receiver<u64>,
}

/// How a chunk will be had.
#[derive(Debug)]
pub enum Wait {
    /// It is verified in the file.
    Here,
    /// It is verified, and the cache could not take it.
    Memory(Verified),
    /// Somebody is getting it.
    Coming(Coming),
}

/// Where a chunk is that somebody has got.
#[derive(Debug, Clone)]
pub enum Arrived {
    /// It is verified in the file.
    InFile,
    /// It is verified, and the cache has not taken it, or not yet.
    InMemory(Verified),
}

/// A chunk that is being got.
#[derive(Debug)]
pub struct Coming {
    slot: Slot,
    what: String,
}

/// The right and the duty to get one chunk. Dropped without an outcome, it tells so to those who wait.
#[derive(Debug)]
pub struct Claim {
    file: Arc<Chunked>,
    chunk: u64,
    outcome: watch::Sender<Option<Outcome<Arrived>>>,
}

/// What became of a chunk that was verified.
#[derive(Debug)]
pub enum Accepted {
    /// All that could be done was; tells whether the file is complete with it.
    Kept(bool),
    /// Its readers have it, and it is still to be written.
    Late(Late),
}

/// A chunk that is still to be written, and for which room may have to be made.
#[derive(Debug)]
pub struct Late {
    claim: Claim,
    chunk: VerifiedChunk,
}

impl Chunked {
    /// A file of which no chunk is known to be here yet.
    pub fn new(cache: Arc<Cache>, partial: Partial, unwritten: Arc<Unwritten>) -> Self {
        let (slots, streams, finished, right) = Default::default();
        Self { cache, partial, slots, streams, finished, unwritten, right }
    }

    /// Keeps the right to be open, for one that nobody asked for.
    pub fn keep(&self, right: OwnedSemaphorePermit) {
        // A second one goes back.
        let _ = self.right.set(right);
    }

    /// The file in the cache.
    pub fn partial(&self) -> &Partial {
        &self.partial
    }

    /// The chunk digests of the file.
    pub fn list(&self) -> &ChunkList<Bytes> {
        self.partial.list()
    }

    /// A range of the file, if all of it is verified in the cache.
    pub fn cached(&self, range: &Range<u64>) -> Option<CachedRange> {
        self.partial.range(range)
    }

    /// Whether somebody is getting a chunk, or about to write it.
    pub fn is_claimed(&self, chunk: u64) -> bool {
        self.slots().contains_key(&chunk)
    }

    /// Writes a verified chunk that the cache could not take before, if it is still in memory. Blocks.
    pub fn write_again(&self, chunk: u64) -> Result<(), CacheError> {
        let key = (self.list().object(), chunk);
        let Some(chunk) = unwritten(&self.unwritten).get(&key).cloned() else { return Ok(()) };
        self.partial.write(&self.cache, &chunk)?;
        unwritten(&self.unwritten).pop(&key);
        Ok(())
    }

    /// The file as an object, if it is complete.
    pub fn whole(&self) -> Option<Object> {
        self.partial.whole()
    }

    /// Whether all chunks are verified in the cache.
    pub fn is_complete(&self) -> bool {
        self.partial.is_complete()
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<u64, Slot>> {
        self.slots.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// What was read of the file, and what was asked for.
    pub fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// Notes that this range is read; tells which other chunks should be asked for, at most `widest`: few, while they can
    /// only be kept in memory, where they would drive each other out before they are read.
    pub fn ahead(&self, range: &Range<u64>, widest: u64) -> Range<u64> {
        let widest = if self.cache.is_full() { UNWRITTEN_AHEAD.min(widest) } else { widest };
        self.streams().read(range, self.list().size(), widest)
    }

    /// Whether the rest of a large file should come although nobody has asked for it: once, when at most half of its chunks
    /// are neither here nor asked for, and at most [`REST`] bytes. One that is read may be written a moment later.
    pub fn is_to_be_finished(&self) -> bool {
        if self.finished.load(Ordering::Relaxed) {
            return false;
        }
        let all = self.list().len();
        let left = self.partial.left().min(all - self.streams().count_asked(all));
        let is_mostly_here = left > 0 && left * 2 <= all && left * u64::from(CHUNK_SIZE) <= REST;
        let is_large = self.list().size() >= LARGE;
        is_large && is_mostly_here && !self.cache.is_full() && !self.finished.swap(true, Ordering::Relaxed)
    }

    /// Claims a chunk unless it is here or somebody has claimed it; either way tells how it will be had. `progress` moves
    /// as long as the claimant gets on. A chunk in memory that may be written by now is claimed too.
    pub fn claim(self: &Arc<Self>, chunk: u64, progress: &watch::Sender<u64>) -> (Option<Claim>, Wait) {
        let coming = |slot| {
            let what = format!("chunk {chunk} of object {}", self.list().object());
            Wait::Coming(Coming { slot, what })
        };
        let mut slots = self.slots();
        if let Some(slot) = slots.get(&chunk) {
            return (None, coming(slot.clone()));
        }
        // Under the lock: a slot goes only after its chunk was written.
        if self.partial.has(chunk) {
            return (None, Wait::Here);
        }
        let in_memory = unwritten(&self.unwritten).get(&(self.list().object(), chunk)).cloned();
        if let Some(held) = &in_memory
            && !self.cache.may_have_room()
        {
            return (None, Wait::Memory(held.bytes().clone()));
        }
        let (sender, outcome) = watch::channel(None);
        let slot = Slot { outcome, progress: progress.subscribe() };
        slots.insert(chunk, slot.clone());
        let wait = match in_memory {
            // Who holds the claim writes it.
            Some(held) => Wait::Memory(held.bytes().clone()),
            None => coming(slot),
        };
        (Some(Claim { file: self.clone(), chunk, outcome: sender }), wait)
    }
}

impl Coming {
    /// Whether who gets it tells of its progress here: then it comes from the same sources.
    pub fn is_told_by(&self, progress: &watch::Sender<u64>) -> bool {
        self.slot.progress.same_channel(&progress.subscribe())
    }

    /// Waits for the chunk as long as there is progress.
    pub async fn arrived(self, limits: &super::Limits) -> Result<Arrived, FetchError> {
        let Self { mut slot, what } = self;
        let arrived = async {
            match slot.outcome.wait_for(Option::is_some).await.as_deref() {
                Ok(Some(Ok(arrived))) => Ok(arrived.clone()),
                Ok(Some(Err(error))) => Err(FetchError::Shared(error.clone())),
                Ok(None) | Err(_) => Err(FetchError::Lost { what: what.clone() }),
            }
        };
        super::while_progressing(arrived, slot.progress, limits, &what).await
    }
}

impl Claim {
    /// The file.
    pub fn file(&self) -> &Arc<Chunked> {
        &self.file
    }

    /// Which chunk.
    pub fn chunk(&self) -> u64 {
        self.chunk
    }

    /// Takes the chunk from the disk, if it is there, or from memory, and writes it then. Blocks. Gives the claim back if
    /// it is in neither; tells whether the file is complete if it is.
    pub fn look(self) -> Result<bool, Self> {
        let in_memory = unwritten(&self.file.unwritten).pop(&(self.file.list().object(), self.chunk));
        if let Some(chunk) = in_memory {
            return Ok(self.late(chunk).write());
        }
        match self.file.partial.look(&self.file.cache, self.chunk) {
            Ok(Some(found)) => {
                // What was found in a lower cache may not have been kept here.
                let is_here = self.file.partial.has(self.chunk);
                self.tell(Ok(if is_here { Arrived::InFile } else { Arrived::InMemory(found.chunk.bytes().clone()) }));
                Ok(found.completes)
            }
            Ok(None) => Err(self),
            Err(error) => {
                tracing::warn!(%error, "a chunk is fetched again");
                Err(self)
            }
        }
    }

    /// Verifies the chunk's bytes, writes them and answers those who wait. Blocks, but never for long. Gives the claim back
    /// if they are not the chunk's. Nothing keeps them afterwards: they may lie in a buffer.
    pub fn accept(self, bytes: impl Into<Hashed>) -> Result<Accepted, (Self, Mismatch)> {
        let chunk = match self.file.list().verify(self.chunk, bytes) {
            Some(Ok(chunk)) => chunk,
            Some(Err(mismatch)) => return Err((self, mismatch)),
            // Nobody waits for what is not there; the claim goes, which would tell them.
            None => return Ok(Accepted::Kept(false)),
        };
        Ok(match self.file.partial.write_at_once(&self.file.cache, &chunk) {
            Ok(Some(completes)) => {
                let is_here = self.file.partial.has(self.chunk);
                self.tell(Ok(if is_here { Arrived::InFile } else { Arrived::InMemory(chunk.bytes().copied()) }));
                Accepted::Kept(completes)
            }
            Ok(None) => Accepted::Late(self.late(chunk.copied())),
            Err(error) => {
                let chunk = chunk.copied();
                self.tell(Ok(Arrived::InMemory(chunk.bytes().clone())));
                self.not_written(chunk, error);
                Accepted::Kept(false)
            }
        })
    }

    /// Answers those who wait from memory.
    fn late(self, chunk: VerifiedChunk) -> Late {
        self.tell(Ok(Arrived::InMemory(chunk.bytes().clone())));
        Late { claim: self, chunk }
    }

    /// Keeps a chunk in memory.
    fn not_written(&self, chunk: VerifiedChunk, error: CacheError) {
        error.unless_full(|error| {
            tracing::warn!(%error, "the cache did not keep a verified chunk; it will be fetched again");
        });
        unwritten(&self.file.unwritten).put((chunk.object(), chunk.number()), chunk);
    }

    /// Whether somebody waits for the chunk.
    pub fn is_awaited(&self) -> bool {
        // The slot holds one.
        self.outcome.receiver_count() > 1
    }

    /// Gives the claim up, as if the chunk had not been asked for, unless somebody waits for it.
    pub fn give_up(self) -> Result<(), Self> {
        {
            // Who comes for the chunk takes this lock to wait for it.
            let mut slots = self.file.slots();
            if !self.is_awaited() {
                slots.remove(&self.chunk);
                drop(slots);
                self.file.streams().given_up(self.chunk..self.chunk + 1);
                return Ok(());
            }
        }
        Err(self)
    }

    /// Says that the chunk can't be had. Who asks after that starts anew.
    pub fn fail(self, error: Arc<FetchError>) {
        self.free();
        self.tell(Err(error));
    }

    /// Lets another claim the chunk.
    fn free(&self) {
        let mut slots = self.file.slots();
        // Of one that was given up, another may be the claim by now.
        let is_ours = |slot: &Slot| slot.outcome.same_channel(&self.outcome.subscribe());
        if slots.get(&self.chunk).is_some_and(is_ours) {
            slots.remove(&self.chunk);
        }
    }

    fn tell(&self, outcome: Outcome<Arrived>) {
        // Nobody may be waiting any more.
        let _ = self.outcome.send(Some(outcome));
    }
}

impl Accepted {
    /// Does what is left to do, which may take long. Blocks. Tells whether the file is complete.
    pub fn finish(self) -> bool {
        match self {
            Self::Kept(completes) => completes,
            Self::Late(late) => late.write(),
        }
    }
}

impl Late {
    /// The file.
    pub fn file(&self) -> &Arc<Chunked> {
        &self.claim.file
    }

    /// Writes the chunk, or keeps it in memory; tells whether that made the file complete. Makes room for it where there is
    /// none: blocks, maybe for long.
    pub fn write(self) -> bool {
        let Self { claim, chunk } = self;
        claim.file.partial.write(&claim.file.cache, &chunk).unwrap_or_else(|error| {
            claim.not_written(chunk, error);
            false
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.free();
    }
}

fn unwritten(chunks: &Unwritten) -> MutexGuard<'_, LruCache<(ObjectDigest, u64), VerifiedChunk>> {
    chunks.lock().unwrap_or_else(|held| held.into_inner())
}

#[cfg(test)]
mod tests;
