//! Getting chunks that are missing: from the disk if they are there after all, else by range, neighbours together.
//!
//! Bytes are verified on blocking threads while more of them arrive. A chunk that is not what its digest says is fetched
//! once more, from the next source or anew from the last; then its readers get the error, and nobody else.

use std::ops::Range;
use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::chunks::{Chunked, Claim};
use super::transfer::Transfer;
use super::{Context, FetchError};
use crate::digest::{Mismatch, Unverified};

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
}

/// Where chunks are fetched from, and the cache that takes them.
#[derive(Debug, Clone)]
pub struct Supply {
    /// Cache and limits.
    pub context: Context,
    /// The sources that may be tried, best first.
    pub transfers: Vec<Transfer>,
    /// Requests in flight for the layer.
    pub permits: Arc<Semaphore>,
    /// Those of them that nobody waits for yet; `None` where somebody does.
    pub ahead: Option<Arc<Semaphore>>,
}

/// Why a chunk was not had.
enum Miss {
    /// The source's bytes are not the chunk's.
    False(Mismatch, String),
    /// Anything else; shared by all chunks of a request.
    Error(Arc<FetchError>),
}

impl Supply {
    /// Gets all of `wants`, which are sorted by their places. Whoever waits for one of them is told. Returns the files
    /// that became complete.
    pub async fn get(self, wants: Vec<Want>) -> Vec<Arc<Chunked>> {
        let (wants, mut complete) = on_disk(wants).await;
        let mut requests: FuturesUnordered<_> = joined(wants).into_iter().map(|wants| self.request(wants)).collect();
        while let Some(completed) = requests.next().await {
            complete.extend(completed);
        }
        for file in &complete {
            self.context.files.commit(&self.context.cache, file.clone());
        }
        complete
    }

    /// Gets neighbours, from one source after the other.
    async fn request(&self, wants: Vec<Want>) -> Vec<Arc<Chunked>> {
        // Closed never; should it be, the claims are dropped, which tells those who wait.
        let _ahead = match &self.ahead {
            Some(permits) => permits.acquire().await.ok(),
            None => None,
        };
        let Ok(_permit) = self.permits.acquire().await else { return Vec::new() };
        let mut complete = Vec::new();
        let mut missed: Vec<(Want, Option<Miss>)> = wants.into_iter().map(|want| (want, None)).collect();
        for transfer in &self.transfers {
            let wants = missed.into_iter().map(|(want, _)| want).collect();
            missed = attempts(transfer, wants, &mut complete).await;
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
            missed = attempts(last, again, &mut complete).await;
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
pub(super) async fn on_disk(wants: Vec<Want>) -> (Vec<Want>, Vec<Arc<Chunked>>) {
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
    wants: Vec<Want>,
    complete: &mut Vec<Arc<Chunked>>,
) -> Vec<(Want, Option<Miss>)> {
    let mut missed = Vec::new();
    for wants in joined(wants) {
        missed.extend(attempt(transfer, wants, complete).await);
    }
    missed
}

/// One ranged request.
async fn attempt(transfer: &Transfer, wants: Vec<Want>, complete: &mut Vec<Arc<Chunked>>) -> Vec<(Want, Option<Miss>)> {
    let (Some(first), Some(last)) = (wants.first(), wants.last()) else { return Vec::new() };
    let span = first.at.start..last.at.end;
    let mut assembly = Assembly::new(wants, span.start);
    let transferred = transfer.each_piece(span, |piece| assembly.push(&piece)).await;
    let Assembly { mut verifying, open, waiting, .. } = assembly;
    let mut missed = Vec::new();
    while let Some(verified) = verifying.join_next().await {
        let all = verified.unwrap_or_else(|panic| {
            // The claims went with it, which told those who wait.
            tracing::error!(%panic, "chunks were lost");
            Vec::new()
        });
        for checked in all {
            match checked {
                Ok(completed) => complete.extend(completed),
                Err((want, mismatch)) => missed.push((want, Some(Miss::False(mismatch, transfer.source.name())))),
            }
        }
    }
    let error = transferred.err().map(Arc::new);
    let left = open.map(|(want, _)| want).into_iter().chain(waiting);
    missed.extend(left.map(|want| (want, error.clone().map(Miss::Error))));
    missed.sort_by_key(|(want, _)| want.at.start);
    missed
}

/// What became of a chunk's bytes: the file, if it is complete with them; or the want again, where they are false.
pub(super) type Checked = Result<Option<Arc<Chunked>>, (Want, Mismatch)>;

/// Puts chunks together from the pieces of a stream.
struct Assembly {
    /// Where the next piece begins in the layer.
    position: u64,
    /// The chunk that is being put together.
    open: Option<(Want, Vec<u8>)>,
    /// Those that come later.
    waiting: std::vec::IntoIter<Want>,
    verifying: JoinSet<Vec<Checked>>,
}

impl Assembly {
    fn new(wants: Vec<Want>, position: u64) -> Self {
        Self { position, open: None, waiting: wants.into_iter(), verifying: JoinSet::new() }
    }

    fn push(&mut self, piece: &Unverified) {
        let bytes = piece.peek();
        let range = self.position..self.position + bytes.len() as u64;
        self.position = range.end;
        // Many small files may end in one piece; they go to one thread.
        let mut whole = Vec::new();
        loop {
            let Some((want, mut buffer)) = self.open.take().or_else(|| {
                let want = self.waiting.next()?;
                let buffer = Vec::with_capacity((want.at.end - want.at.start) as usize);
                Some((want, buffer))
            }) else {
                break;
            };
            let from = range.start.max(want.at.start + buffer.len() as u64).min(range.end);
            let to = range.end.min(want.at.end);
            if from < to {
                buffer.extend_from_slice(&bytes[(from - range.start) as usize..(to - range.start) as usize]);
            }
            if want.at.end > range.end {
                self.open = Some((want, buffer));
                break;
            }
            whole.push((want, buffer));
        }
        if !whole.is_empty() {
            self.verifying.spawn_blocking(move || whole.into_iter().map(|(want, bytes)| verify(want, bytes)).collect());
        }
    }
}

/// Hashes a chunk, answers its readers and writes it. Blocks.
pub(super) fn verify(want: Want, bytes: Vec<u8>) -> Checked {
    let Want { claim, at, false_times } = want;
    let file = claim.file().clone();
    match claim.accept(Unverified::new(bytes)) {
        Ok(completes) => Ok(completes.then_some(file)),
        Err((claim, mismatch)) => Err((Want { claim, at, false_times: false_times + 1 }, mismatch)),
    }
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
