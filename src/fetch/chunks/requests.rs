//! Getting chunks that are missing: from the disk if they are there after all, else by range, neighbours together.
//!
//! A request is one worker: it receives a chunk into its one buffer and hashes it as it comes, writes it and answers its
//! readers, and then receives the next into the same memory; several requests at once keep the wire, the hash and the disk busy. A chunk
//! that is not what its digest says is fetched once more, from the next source or anew from the last; then its readers get
//! the error, and nobody else.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use tokio::task::JoinSet;

use super::{Accepted, Chunked, Claim};
use crate::digest::{Gathering, Hashed, Mismatch, Unverified};
use crate::fetch::memory::{Buffer, Place};
use crate::fetch::transfer::Transfer;
use crate::fetch::{Context, FetchError};

/// The longest request: from 4 to 16 MiB is where registries are fastest.
pub const REQUEST: u64 = 16 << 20;
/// So many bytes between two chunks are read over: moving them takes less time than another request. The headers
/// between two files of a tar are far shorter.
pub const GAP: u64 = 64 << 10;

/// A claimed chunk, and where it is in the layer.
#[derive(Debug)]
pub struct Want {
    /// The claim.
    pub(super) claim: Claim,
    /// The chunk's bytes in the layer.
    pub(super) at: Range<u64>,
    /// How often other bytes came instead.
    false_times: u32,
}

impl Want {
    /// A chunk that was not asked for yet.
    pub fn new(claim: Claim, at: Range<u64>) -> Self {
        Self { claim, at, false_times: 0 }
    }

    /// How many bytes the chunk has.
    pub fn bytes(&self) -> u64 {
        self.at.end - self.at.start
    }

    /// Gives the claim up unless somebody waits for the chunk; tells how many bytes it has.
    pub fn give_up(self) -> Result<u64, Self> {
        let (len, Self { claim, at, false_times }) = (self.bytes(), self);
        claim.give_up().map(|()| len).map_err(|claim| Self { claim, at, false_times })
    }
}

/// Where chunks are fetched from, and the cache that takes them.
#[derive(Debug, Clone)]
pub struct Supply {
    /// Cache and limits.
    pub context: Context,
    /// The sources that may be tried, best first.
    pub transfers: Vec<Transfer>,
}

/// Why a chunk was not had.
enum Miss {
    /// The source's bytes are not the chunk's.
    False(Mismatch, String),
    /// Anything else; shared by all chunks of a request.
    Error(Arc<FetchError>),
}

impl Supply {
    /// Gets all of `wants`, which are sorted by their places and lie together: where the disk has some of them after all,
    /// by several requests, one after the other. Whoever waits for one of them is told. Returns the files that became
    /// complete.
    pub async fn get(self, wants: Vec<Want>) -> Vec<Arc<Chunked>> {
        let (wants, mut complete) = on_disk(wants).await;
        complete.extend(self.request(wants).await);
        for file in &complete {
            self.context.files.commit(&self.context.cache, file.clone());
        }
        complete
    }

    /// Gets neighbours, from one source after the other.
    async fn request(&self, wants: Vec<Want>) -> Vec<Arc<Chunked>> {
        if wants.is_empty() {
            return Vec::new();
        }
        let place = self.context.memory.chunks().place().await;
        let mut complete = Vec::new();
        let mut missed: Vec<(Want, Option<Miss>)> = wants.into_iter().map(|want| (want, None)).collect();
        for transfer in &self.transfers {
            let wants = missed.into_iter().map(|(want, _)| want).collect();
            missed = attempts(transfer, &place, wants, &mut complete).await;
            if missed.is_empty() {
                return complete;
            }
        }
        if let Some(last) = self.transfers.last() {
            // What came false once, and from no other source, is asked for anew.
            let once =
                |(want, miss): &(Want, Option<Miss>)| want.false_times == 1 && matches!(miss, Some(Miss::False(..)));
            let (again, lost): (Vec<_>, Vec<_>) = missed.into_iter().partition(once);
            let again = again.into_iter().map(|(want, _)| want).collect();
            missed = attempts(last, &place, again, &mut complete).await;
            missed.extend(lost);
        }
        for (Want { claim, .. }, miss) in missed {
            let what = || format!("chunk {} of object {}", claim.chunk(), claim.file().list().object());
            let error = match miss {
                Some(Miss::Error(error)) => error,
                Some(Miss::False(cause, source_name)) => {
                    tracing::error!(chunk = claim.chunk(), found = %cause.found, expected = %cause.expected, source = %source_name,
                        "a chunk does not have its digest, twice; nothing of it is kept");
                    Arc::new(FetchError::Digest { what: what(), source_name, cause })
                }
                None => Arc::new(FetchError::Lost { what: what() }),
            };
            claim.fail(error);
        }
        complete
    }
}

/// Takes what is on the disk: what is missing, and the files that are complete.
pub(in crate::fetch) async fn on_disk(wants: Vec<Want>) -> (Vec<Want>, Vec<Arc<Chunked>>) {
    // Claims that are lost are told to those who wait.
    tokio::task::spawn_blocking(move || look(wants)).await.unwrap_or_default()
}

/// Blocks.
fn look(wants: Vec<Want>) -> (Vec<Want>, Vec<Arc<Chunked>>) {
    let (mut missing, mut complete) = (Vec::new(), Vec::new());
    for Want { claim, at, .. } in wants {
        let file = claim.file().clone();
        match claim.look() {
            Ok(true) => complete.push(file),
            Ok(false) => {}
            Err(claim) => missing.push(Want::new(claim, at)),
        }
    }
    (missing, complete)
}

/// Cuts wants, sorted by place, into what one request gets.
fn joined(wants: Vec<Want>) -> Vec<Vec<Want>> {
    let mut requests: Vec<Vec<Want>> = Vec::new();
    for want in wants {
        match requests.last_mut() {
            Some(request) if joins(&(request[0].at.start..request[request.len() - 1].at.end), &want.at) => {
                request.push(want);
            }
            _ => requests.push(vec![want]),
        }
    }
    requests
}

/// Whether a range goes into the request before it.
pub fn joins(request: &Range<u64>, next: &Range<u64>) -> bool {
    next.start >= request.end && next.start - request.end <= GAP && next.end - request.start <= REQUEST
}

/// One attempt at each want; what is left between them after an earlier attempt is not read again.
async fn attempts(
    transfer: &Transfer,
    place: &Place,
    wants: Vec<Want>,
    complete: &mut Vec<Arc<Chunked>>,
) -> Vec<(Want, Option<Miss>)> {
    let mut missed = Vec::new();
    for wants in joined(wants) {
        missed.extend(attempt(transfer, place, wants, complete).await);
    }
    missed
}

/// One ranged request.
async fn attempt(
    transfer: &Transfer,
    place: &Place,
    wants: Vec<Want>,
    complete: &mut Vec<Arc<Chunked>>,
) -> Vec<(Want, Option<Miss>)> {
    let (Some(first), Some(last)) = (wants.first(), wants.last()) else { return Vec::new() };
    let span = first.at.start..last.at.end;
    let mut assembly = Assembly::new(wants, span.start, place);
    let transferred = transfer.each_piece(span, |piece| assembly.push(piece.peek())).await;
    let Assembly { waiting, mut late, .. } = assembly;
    complete.append(&mut assembly.complete);
    while let Some(written) = late.join_next().await {
        // Should it panic, the chunk was answered all the same, and is fetched again.
        complete.extend(written.ok().flatten());
    }
    let is_false = |(want, mismatch)| (want, Some(Miss::False(mismatch, transfer.source.name())));
    let mut missed: Vec<_> = assembly.missed.into_iter().map(is_false).collect();
    let error = transferred.err().map(Arc::new);
    missed.extend(waiting.into_iter().map(|want| (want, error.clone().map(Miss::Error))));
    missed.sort_by_key(|(want, _)| want.at.start);
    missed
}

/// Puts chunks together from the pieces of a stream, verifies them and keeps them.
struct Assembly<'a> {
    /// Where the next piece begins in the layer.
    position: u64,
    /// Those that are still to come; the first is being put together.
    waiting: VecDeque<Want>,
    /// What is here of the first.
    open: Option<Gathering<Buffer>>,
    place: &'a Place,
    /// Files that are complete now.
    complete: Vec<Arc<Chunked>>,
    /// Chunks that are not what they should be.
    missed: Vec<(Want, Mismatch)>,
    /// Chunks that room is made for: the file, if it is complete with it.
    late: JoinSet<Option<Arc<Chunked>>>,
}

impl<'a> Assembly<'a> {
    fn new(wants: Vec<Want>, position: u64, place: &'a Place) -> Self {
        Self {
            position,
            waiting: wants.into(),
            open: None,
            place,
            complete: Vec::new(),
            missed: Vec::new(),
            late: JoinSet::new(),
        }
    }

    /// Takes the next bytes of the layer. What ends with them is written by this thread, which has just received it; the
    /// runtime goes on with its other work on another one.
    fn push(&mut self, bytes: &[u8]) {
        let end = self.position + bytes.len() as u64;
        if self.waiting.front().is_some_and(|want| want.at.end <= end) {
            tokio::task::block_in_place(|| self.take(bytes));
        } else {
            self.take(bytes);
        }
    }

    fn take(&mut self, mut bytes: &[u8]) {
        while let Some(want) = self.waiting.front() {
            // What lies between two chunks is read over.
            let skipped = want.at.start.saturating_sub(self.position).min(bytes.len() as u64);
            self.position += skipped;
            bytes = &bytes[skipped as usize..];
            let taken = want.at.end.saturating_sub(self.position).min(bytes.len() as u64);
            self.position += taken;
            let (taken, rest) = bytes.split_at(taken as usize);
            bytes = rest;
            let open = self.open.get_or_insert_with(|| Gathering::new(self.place.buffer()));
            open.push(taken);
            if self.position < want.at.end {
                return;
            }
            if let (Some(want), Some(open)) = (self.waiting.pop_front(), self.open.take()) {
                self.accept(want, open.finish());
            }
        }
        self.position += bytes.len() as u64;
    }

    fn accept(&mut self, want: Want, bytes: Hashed) {
        let file = want.claim.file().clone();
        match accept(want, bytes) {
            Ok(Accepted::Kept(completes)) => self.complete.extend(completes.then_some(file)),
            Ok(Accepted::Late(late)) => {
                self.late.spawn_blocking(move || late.write().then_some(file));
            }
            Err(missed) => self.missed.push(missed),
        }
    }
}

/// Writes a chunk and answers its readers; gives the want back if its bytes are false. Blocks.
fn accept(want: Want, bytes: Hashed) -> Result<Accepted, (Want, Mismatch)> {
    let Want { claim, at, false_times } = want;
    let taken = claim.accept(bytes);
    taken.map_err(|(claim, mismatch)| (Want { claim, at, false_times: false_times + 1 }, mismatch))
}

/// What became of a chunk's bytes: the file, if it is complete with them; or the want again, where they are false.
pub(super) type Checked = Result<Option<Arc<Chunked>>, (Want, Mismatch)>;

/// Hashes a chunk, answers its readers and writes it. Blocks.
pub(super) fn verify(want: Want, bytes: Vec<u8>) -> Checked {
    let file = want.claim.file().clone();
    Ok(accept(want, Unverified::new(bytes).into())?.finish().then_some(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn neighbours_join_up_to_16_mib_and_over_headers_but_not_over_other_files() {
        assert!(joins(&(0..MIB), &(MIB..2 * MIB)));
        assert!(joins(&(512..1000), &(2048..4096)), "headers lie between");
        assert!(!joins(&(0..MIB), &(2 * MIB..3 * MIB)), "a chunk lies between");
        assert!(joins(&(0..15 * MIB), &(15 * MIB..16 * MIB)));
        assert!(!joins(&(0..16 * MIB), &(16 * MIB..17 * MIB)));
    }
}
