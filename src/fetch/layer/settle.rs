//! Proving an attested layer: once all of its chunks are here, its digest is computed from them and from the bytes
//! between, which are fetched by range. If it holds, so does everything the index told, and the tier becomes derived;
//! else the layer is poisoned.

use std::collections::HashSet;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex};

use futures_util::StreamExt as _;

use super::{Known, LayerFetch, Tier};
use crate::archive::index::Head;
use crate::cache::Object;
use crate::digest::Unverified;
use crate::fetch::FetchError;
use crate::fetch::pass::{Failure, Ordered, pass};
use crate::fetch::transfer::Transfer;
use crate::modelkit::Compression;
use crate::object::ObjectDigest;

/// What is taken from a file at once.
const BLOCK: u64 = 1 << 20;

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
}

impl Unread {
    /// Notes that an object is complete, of those that `all` names; tells whether it was the last.
    fn note(&self, object: &ObjectDigest, all: impl FnOnce() -> HashSet<ObjectDigest>) -> bool {
        let mut state = self.0.lock().unwrap_or_else(|held| held.into_inner());
        if matches!(*state, State::Unknown) {
            *state = State::Left(all());
        }
        let State::Left(left) = &mut *state else { return false };
        left.remove(object);
        let last = left.is_empty();
        if last {
            *state = State::None;
        }
        last
    }

    /// Whether it is news that an object is complete.
    fn awaits(&self, object: &ObjectDigest) -> bool {
        match &*self.0.lock().unwrap_or_else(|held| held.into_inner()) {
            State::Unknown => true,
            State::Left(left) => left.contains(object),
            State::None => false,
        }
    }

    /// Begins anew, since the proof could not be had.
    fn reset(&self) {
        *self.0.lock().unwrap_or_else(|held| held.into_inner()) = State::Unknown;
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
            if let Err(error) = this.settle_after(object, head).await {
                let error = crate::report::chain(&error);
                tracing::warn!(layer = %this.layer.digest, %error, "an attested layer could not be proved yet");
                this.unread.reset();
            }
        });
    }

    async fn settle_after(self: &Arc<Self>, object: ObjectDigest, head: Arc<Head>) -> Result<(), FetchError> {
        let (this, rows) = (self.clone(), head.clone());
        let last = self.blocking(move |cache| {
            let missing = || {
                let files = rows.rows().filter_map(|row| Some((row.object()?, row.size())));
                let files = files.filter(|(name, size)| *size > 0 && !cache.has_object(name, *size));
                files.map(|(name, _)| name).collect()
            };
            Ok(this.unread.note(&object, missing))
        });
        if last.await? { self.settle(head).await } else { Ok(()) }
    }

    async fn settle(self: &Arc<Self>, head: Arc<Head>) -> Result<(), FetchError> {
        let _turn = self.turn().await?;
        let mut outcome = Err(FetchError::Lost { what: self.what() });
        for (_, transfer) in self.transfers() {
            match pass(&self.layer, None, self.reassembled(head.clone(), transfer), None).await {
                Ok(passed) => {
                    let index = self.accept(Arc::new(passed.index))?;
                    tracing::info!(layer = %self.layer.digest, "all of an attested layer is here, and its digest holds");
                    return self.keep(&index).await;
                }
                // Which of the sources is false, or whether the index is, can't be told before all were asked.
                Err(Failure::False(mismatch)) => outcome = Ok(mismatch),
                Err(Failure::Error(error)) if outcome.is_err() => outcome = Err(error),
                Err(Failure::Error(_)) => {}
            }
        }
        let mismatch = outcome?;
        self.poison_layer(format!("all of it was read by its attested index, and {mismatch}"));
        Ok(())
    }

    /// The layer's bytes in order: files from the cache, the rest from a source.
    fn reassembled(self: &Arc<Self>, head: Arc<Head>, transfer: Transfer) -> Ordered {
        let mut files: Vec<(u64, u64, ObjectDigest)> = head
            .rows()
            .filter_map(|row| Some((row.offset(), row.size(), row.object()?)))
            .filter(|(_, size, _)| *size > 0)
            .collect();
        files.sort_unstable();
        let mut parts = Vec::new();
        let mut position = 0;
        for (offset, size, object) in files {
            parts.push(Part::Between(position..offset));
            parts.push(Part::File { object, at: offset..offset + size });
            position = offset + size;
        }
        parts.push(Part::Between(position..self.layer.size));
        let this = self.clone();
        futures_util::stream::iter(parts)
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
                match self.blocking(move |cache| cache.object(&object, size)).await {
                    Ok(Some(object)) => return file(object),
                    // It was evicted in between.
                    Ok(None) | Err(_) => at,
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
enum Part {
    /// Headers and padding.
    Between(std::ops::Range<u64>),
    /// A file's content.
    File { object: ObjectDigest, at: std::ops::Range<u64> },
}

/// The bytes of an object, block by block.
fn file(object: Object) -> Ordered {
    let starts = (0..object.size()).step_by(BLOCK as usize);
    let read = move |start: u64| {
        let object = object.clone();
        async move {
            let read = tokio::task::spawn_blocking(move || {
                let mut block = vec![0; (object.size() - start).min(BLOCK) as usize];
                object.file().read_exact_at(&mut block, start).map(|()| Unverified::new(block))
            });
            let lost = || FetchError::Lost { what: "a file of the cache".to_owned() };
            read.await.map_err(|_| lost())?.map_err(|_| lost())
        }
    };
    futures_util::stream::iter(starts).then(read).boxed()
}
