//! Proving an attested layer: once all of its chunks are here, its digest is computed from them and from the bytes
//! between, which are fetched by range. If it holds, so does everything the index told, and the tier becomes derived.
//! If not, the layer is read whole from its source, which tells who was false: the index, and then the layer is
//! poisoned; or a file of the cache.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;

use super::{Known, LayerFetch, Pace, Tier};
use crate::archive::index::Head;
use crate::cache::CachedRange;
use crate::fetch::FetchError;
use crate::fetch::fill::pass::{Failure, pass};
use crate::fetch::transfer::Transfer;
use crate::fetch::transfer::ordered::Ordered;
use crate::modelkit::Compression;
use crate::object::ObjectDigest;

/// What is taken from a file, or asked of a source, at once.
const BLOCK: u64 = 1 << 20;
/// So many gaps between files are fetched each by a request of its own. Where there are more, small files are read over:
/// a request takes as long as it takes to move a file of [`SMALL`] bytes.
const GAPS: usize = 256;
/// Files below this size are read over where there are many: 10 ms at 100 MB/s.
const SMALL: u64 = 1 << 20;
/// How long nothing is tried after a proof that could not be had; twice as long after each further one, to [`LONGEST`].
const PAUSE: Duration = Duration::from_secs(60);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(3600);

/// The objects of an attested layer that have not been seen complete yet.
#[derive(Debug, Default)]
pub struct Unread(Mutex<State>);

#[derive(Debug, Default)]
enum State {
    /// Nothing of the layer was read yet.
    #[default]
    Unknown,
    Left(HashSet<ObjectDigest>),
    /// All have been: somebody has set out to prove the layer.
    None,
    /// The proof could not be had; not before then is it tried again.
    Failed {
        until: Instant,
        pause: Duration,
    },
}

impl Unread {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// Whether it is news that an object is complete.
    fn awaits(&self, object: &ObjectDigest) -> bool {
        match &*self.state() {
            State::Unknown => true,
            State::Left(left) => left.contains(object),
            State::None => false,
            State::Failed { until, .. } => Instant::now() >= *until,
        }
    }

    /// Whether it is not known yet what is complete.
    fn is_open(&self) -> bool {
        matches!(*self.state(), State::Unknown | State::Failed { .. })
    }

    /// Notes what is missing, unless somebody else has.
    fn begin(&self, missing: HashSet<ObjectDigest>) {
        let mut state = self.state();
        if matches!(*state, State::Unknown | State::Failed { .. }) {
            *state = State::Left(missing);
        }
    }

    /// Notes that an object is complete; tells whether it was the last.
    fn note(&self, object: &ObjectDigest) -> bool {
        let mut state = self.state();
        let State::Left(left) = &mut *state else { return false };
        left.remove(object);
        let last = left.is_empty();
        if last {
            *state = State::None;
        }
        last
    }

    /// Puts a proof off that could not be had.
    fn put_off(&self, before: Option<Duration>) -> Duration {
        let pause = before.map_or(PAUSE, |pause| LONGEST.min(pause * 2));
        *self.state() = State::Failed { until: Instant::now() + pause, pause };
        pause
    }

    /// The pause after the last failure.
    fn pause(&self) -> Option<Duration> {
        match *self.state() {
            State::Failed { pause, .. } => Some(pause),
            State::Unknown | State::Left(_) | State::None => None,
        }
    }
}

impl LayerFetch {
    /// Notes that an object of the layer is complete in the cache. After the last one of an attested layer, proves it.
    pub(super) fn note_complete(self: &Arc<Self>, object: ObjectDigest) {
        let is_attested = self.tier() == Tier::Attested && self.layer.compression == Compression::None;
        if !is_attested || !self.unread.awaits(&object) {
            return;
        }
        let Some(Known::Named(head, _)) = self.known() else { return };
        let this = self.clone();
        tokio::spawn(async move {
            let before = this.unread.pause();
            if let Err(error) = this.settle_after(object, head).await {
                let again = crate::units::format_duration(this.unread.put_off(before));
                let error = crate::report::chain(&error);
                tracing::warn!(layer = %this.layer.digest, %error, "an attested layer could not be proved; tried again in {again}");
            }
        });
    }

    async fn settle_after(self: &Arc<Self>, object: ObjectDigest, head: Arc<Head>) -> Result<(), FetchError> {
        if self.unread.is_open() {
            let rows = head.clone();
            // A look for each file of the layer, on a thread that may wait for the disk.
            let missing = self.blocking(move |cache| {
                let files = rows.rows().filter_map(|row| Some((row.object()?, row.size())));
                let files = files.filter(|(name, size)| *size > 0 && !cache.has_object(name, *size));
                Ok(files.map(|(name, _)| name).collect())
            });
            self.unread.begin(missing.await?);
        }
        if self.unread.note(&object) { self.settle(head).await } else { Ok(()) }
    }

    /// Proves the layer now, if it is attested, whose objects are all in the cache; for who waits for it.
    pub(super) async fn prove(self: &Arc<Self>) -> Result<(), FetchError> {
        let Some(Known::Named(head, _)) = self.known() else { return Ok(()) };
        if self.tier() != Tier::Attested || self.layer.compression != Compression::None {
            return Ok(());
        }
        self.settle(head).await
    }

    async fn settle(self: &Arc<Self>, head: Arc<Head>) -> Result<(), FetchError> {
        let this = self.clone();
        self.proof.join(|| async move { this.settle_now(head).await }).await
    }

    async fn settle_now(self: &Arc<Self>, head: Arc<Head>) -> Result<(), FetchError> {
        let index = self.read_whole(Pace::Now, |transfer| {
            let head = head.clone();
            async move {
                match pass(&self.layer, None, self.reassembled(head, transfer.clone()), None).await {
                    Err(Failure::False(mismatch, _)) => {
                        tracing::warn!(layer = %self.layer.digest, %mismatch,
                            "what was read of an attested layer is not the layer; reading it whole to tell why");
                        let whole = pass(&self.layer, None, transfer.ordered(), None).await?;
                        Ok(Arc::new(whole.index))
                    }
                    outcome => Ok(Arc::new(outcome?.index)),
                }
            }
        });
        // Kept first: it is right whatever the attested one said, and the next mount has it.
        let index = self.keep(index.await?).await?;
        self.accept(index).await?;
        tracing::info!(layer = %self.layer.digest, "all of an attested layer is here, and its digest holds");
        Ok(())
    }

    /// The layer's bytes in order: files from the cache, the rest from a source.
    fn reassembled(self: &Arc<Self>, head: Arc<Head>, transfer: Transfer) -> Ordered {
        let this = self.clone();
        futures_util::stream::iter(parts(&head, self.layer.size))
            .then(move |part| {
                let (this, transfer) = (this.clone(), transfer.clone());
                async move { this.part(part, transfer).await }
            })
            .flatten()
            .boxed()
    }

    async fn part(&self, part: Part, transfer: Transfer) -> Ordered {
        let range = match part {
            Part::Between(range) => range,
            Part::File { object, at } => {
                let size = at.end - at.start;
                let filled = self.context.files.get(&object).and_then(|file| file.cached(&(0..size)));
                let found = match filled {
                    Some(content) => Some(content),
                    None => {
                        let object = self.blocking(move |cache| cache.object(&object, size)).await;
                        object.ok().flatten().map(|object| object.range(0..size))
                    }
                };
                match found {
                    Some(content) => return file(content),
                    // It was evicted in between.
                    None => at,
                }
            }
        };
        let blocks = (range.start..range.end).step_by(BLOCK as usize);
        let ranges = blocks.map(move |start| start..range.end.min(start + BLOCK));
        futures_util::stream::iter(ranges)
            .then(move |range| {
                let transfer = transfer.clone();
                async move {
                    let pieces = transfer.range(range).await;
                    let pieces = pieces.map_or_else(|error| vec![Err(error)], |all| all.into_iter().map(Ok).collect());
                    futures_util::stream::iter(pieces)
                }
            })
            .flatten()
            .boxed()
    }
}

/// A part of a layer.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    /// Headers, padding, and what is read over.
    Between(Range<u64>),
    /// A file's content.
    File { object: ObjectDigest, at: Range<u64> },
}

/// The parts of a layer of `size` bytes, in order.
fn parts(head: &Head, size: u64) -> Vec<Part> {
    let files = head.rows().filter_map(|row| Some((row.offset()..row.offset() + row.size(), row.object()?)));
    let mut files: Vec<_> = files.filter(|(at, _)| !at.is_empty()).collect();
    if files.len() > GAPS {
        files.retain(|(at, _)| at.end - at.start >= SMALL);
    }
    files.sort_unstable_by_key(|(at, _)| at.start);
    let mut parts = Vec::new();
    let mut position = 0;
    for (at, object) in files {
        parts.push(Part::Between(position..at.start));
        position = at.end;
        parts.push(Part::File { object, at });
    }
    parts.push(Part::Between(position..size));
    parts
}

/// The bytes of a file, block by block.
fn file(content: CachedRange) -> Ordered {
    let starts = (0..content.len()).step_by(BLOCK as usize);
    let read = move |start: u64| {
        let content = content.clone();
        async move {
            let read = tokio::task::spawn_blocking(move || content.block(start, BLOCK));
            let lost = |_| FetchError::Lost { what: "a file of the cache".to_owned() };
            Ok(read.await.map_err(lost)??)
        }
    };
    futures_util::stream::iter(starts).then(read).boxed()
}
