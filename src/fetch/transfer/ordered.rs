//! A blob's bytes in order, over several ranges in flight, handed on as they arrive.
//!
//! A range is asked for once there is memory for all of it, which is free again when the last of its bytes is dropped. Only
//! the range whose turn it is waits for memory; those ahead of it take what is free. So nobody waits for memory that is held
//! by what comes after, and a stream that nobody reads on holds as much as its ranges in flight, 40 MiB by default.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{PROGRESS, Pause, Transfer};
use crate::digest::Unverified;
use crate::fetch::FetchError;
use crate::fetch::memory::Share;
use crate::source::{ByteStream, SourceError};

/// One ranged request: from 4 to 16 MiB is where registries are fastest.
const RANGE: u64 = 8 << 20;

/// The bytes of a blob in order.
pub type Ordered = BoxStream<'static, Result<Unverified, FetchError>>;

impl Transfer {
    /// The whole blob in order, over several ranges in flight. A server that ignores ranges is read in one go.
    pub fn ordered(&self) -> Ordered {
        self.ordered_from(0)
    }

    /// The blob from an offset on, likewise; of a server that ignores ranges, what comes before is dropped.
    pub fn ordered_from(&self, offset: u64) -> Ordered {
        self.in_order(offset..self.blob.size)
    }

    /// The first `len` bytes in order, likewise.
    pub fn first(&self, len: u64) -> Ordered {
        self.in_order(0..len)
    }

    fn in_order(&self, all: Range<u64>) -> Ordered {
        let ranges = Ranges {
            transfer: self.clone(),
            position: all.start,
            unasked: all,
            asked: VecDeque::new(),
            are_served: false,
        };
        stream::unfold(State::Ranges(Box::new(ranges)), |mut state| async move {
            loop {
                state = match state {
                    State::Ranges(mut ranges) => match ranges.next().await? {
                        // From the first on; or from a later one on, where a server behind the same name is not like the others.
                        Err(error) if error.ignores_ranges() => {
                            State::Sequence(ranges.transfer.sequential(ranges.position..ranges.unasked.end))
                        }
                        Err(error) => return Some((Err(error), State::Over)),
                        Ok(piece) => return Some((Ok(piece), State::Ranges(ranges))),
                    },
                    State::Sequence(mut bytes) => return Some((bytes.next().await?, State::Sequence(bytes))),
                    State::Over => return None,
                };
            }
        })
        .boxed()
    }

    /// A part of the blob from a request for all of it; after a break it starts again and drops what is there already.
    fn sequential(self, part: Range<u64>) -> Ordered {
        struct State {
            transfer: Transfer,
            open: Option<ByteStream>,
            /// Up to where the bytes are there.
            delivered: u64,
            skip: u64,
            counted: u64,
            heard: u64,
            pause: Pause,
        }
        let (pause, heard) = (Pause::new(self.limits.read_timeout), self.heard());
        let (delivered, counted) = (part.start, part.start);
        let state = State { transfer: self, open: None, delivered, skip: 0, counted, heard, pause };
        stream::try_unfold(state, move |mut state| async move {
            loop {
                let size = state.transfer.blob.size;
                let left = part.end - state.delivered;
                if left == 0 {
                    return Ok(None);
                }
                let next = match &mut state.open {
                    Some(open) => open.try_next().await,
                    None => {
                        state.skip = state.delivered;
                        match state.transfer.open(0..size).await {
                            Ok(open) => {
                                state.open = Some(open);
                                continue;
                            }
                            Err(error) => Err(error),
                        }
                    }
                };
                match next {
                    Ok(Some(piece)) => {
                        state.transfer.count(piece.len());
                        let skipped = state.skip.min(piece.len() as u64);
                        state.skip -= skipped;
                        if skipped < piece.len() as u64 {
                            let end = (piece.len() as u64).min(skipped + left);
                            let rest = Unverified::new(piece.peek().slice(skipped as usize..end as usize));
                            state.delivered += rest.len() as u64;
                            return Ok(Some((rest, state)));
                        }
                    }
                    Ok(None) => {
                        // A source ends its stream with the range or with an error; this one did neither.
                        let source_name = state.transfer.source.name();
                        let what = format!("the stream ended after {} of {size} bytes", state.delivered);
                        state.open = None;
                        let error = SourceError::Transport { source_name, what, cause: None };
                        let given_up = |end| state.transfer.given_up(end, state.heard);
                        state.pause.before_retry(error).await.map_err(given_up)?;
                    }
                    Err(error) => {
                        state.open = None;
                        if state.delivered - state.counted >= PROGRESS {
                            state.counted = state.delivered;
                            state.heard = state.transfer.heard();
                            state.pause.reset();
                        }
                        let given_up = |end| state.transfer.given_up(end, state.heard);
                        state.pause.before_retry(error).await.map_err(given_up)?;
                    }
                }
            }
        })
        .boxed()
    }
}

/// How the bytes come.
enum State {
    Ranges(Box<Ranges>),
    Sequence(Ordered),
    Over,
}

/// Ranges of a blob, of which several are in flight.
struct Ranges {
    transfer: Transfer,
    /// Up to where the bytes were handed on.
    position: u64,
    unasked: Range<u64>,
    asked: VecDeque<Asked>,
    /// Whether the source serves ranges, which the first tells.
    are_served: bool,
}

/// A range in flight.
struct Asked {
    /// What it holds at most is bounded by its share of the memory.
    pieces: mpsc::UnboundedReceiver<Bytes>,
    task: Task,
}

impl Ranges {
    /// The next bytes.
    async fn next(&mut self) -> Option<Result<Unverified, FetchError>> {
        loop {
            self.ask().await;
            let front = self.asked.front_mut()?;
            if let Some(piece) = front.pieces.recv().await {
                self.are_served = true;
                self.position += piece.len() as u64;
                return Some(Ok(Unverified::new(piece)));
            }
            let ended = self.asked.pop_front()?.task.join().await;
            if let Err(error) = ended {
                return Some(Err(error));
            }
        }
    }

    /// Asks for as many ranges as may be in flight.
    async fn ask(&mut self) {
        let concurrency = if self.are_served { self.transfer.limits.concurrency.max(1) } else { 1 };
        while self.asked.len() < concurrency && !self.unasked.is_empty() {
            let range = self.unasked.start..self.unasked.end.min(self.unasked.start + RANGE);
            let (memory, len) = (&self.transfer.memory, range.end - range.start);
            let share = match memory.try_share(len) {
                Some(share) => share,
                None if self.asked.is_empty() => memory.share(len).await,
                None => return,
            };
            self.unasked.start = range.end;
            self.asked.push_back(Asked::new(self.transfer.clone(), range, share));
        }
    }
}

impl Asked {
    /// Gets a range in a task of its own, so that it goes on while those who take the bytes are busy.
    fn new(transfer: Transfer, range: Range<u64>, share: Share) -> Self {
        let (sender, pieces) = mpsc::unbounded_channel();
        let share = Arc::new(share);
        let task = tokio::spawn(async move {
            let hand_on = |piece: Unverified| {
                let held = Held { bytes: piece.peek().clone(), _share: share.clone() };
                // Nobody wants it any more where that fails, and the task ends with who did.
                let _ = sender.send(Bytes::from_owner(held));
            };
            transfer.each_piece(range, hand_on).await
        });
        Self { pieces, task: Task(task) }
    }
}

/// Bytes that hold a share of the memory.
struct Held {
    bytes: Bytes,
    _share: Arc<Share>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// A task that ends with who waits for it.
struct Task(JoinHandle<Result<(), FetchError>>);

impl Task {
    async fn join(mut self) -> Result<(), FetchError> {
        let lost = |_| Err(FetchError::Lost { what: "a range".to_owned() });
        (&mut self.0).await.unwrap_or_else(lost)
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}
