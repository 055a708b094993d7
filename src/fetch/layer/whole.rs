//! Fetching a layer whole: to have its content, or for its index alone.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::AbortHandle;

use super::{Known, LayerFetch, Pace};
use crate::archive::index::Index;
use crate::fetch::fill::pass::{Failure, pass};
use crate::fetch::fill::{at_rest, index_key, known_index};
use crate::fetch::listing::Probe;
use crate::fetch::transfer::Transfer;
use crate::fetch::{FetchError, while_progressing};

/// How often a pass tells those behind it that it moves, at most.
const TOLD: Duration = Duration::from_secs(1);

/// A place among the fills of this process. While it is held, those who wait for one are told that this one moves.
#[derive(Debug)]
pub(super) struct Turn {
    _permit: OwnedSemaphorePermit,
    telling: AbortHandle,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.telling.abort();
    }
}

/// Why a layer could not be vouched for.
#[derive(Debug)]
pub struct NotAudited {
    /// The reason.
    pub error: FetchError,
    /// What the bytes hold that are not the layer's, if they hold anything: to tell where they differ.
    pub found: Option<Arc<Index>>,
}

impl LayerFetch {
    /// Fetches the layer whole, keeps its content, and waits for it as long as it makes progress.
    pub async fn fill(self: &Arc<Self>) -> Result<Arc<Index>, FetchError> {
        self.fill_at(Pace::Now).await
    }

    /// The same at a pace, which is that of the first to ask.
    pub async fn fill_at(self: &Arc<Self>, pace: Pace) -> Result<Arc<Index>, FetchError> {
        self.check_poison()?;
        let this = self.clone();
        let fill = self.fill.join(|| async move {
            let (kept, mut rest) = mpsc::unbounded_channel();
            let job = this.fill_job(kept);
            job.announce();
            let fill = |transfer| {
                let job = &job;
                async move { job.run(&transfer).await }
            };
            let filled = this.read_whole(pace, fill).await?;
            let accepted = this.accept(filled).await?;
            drop(job);
            tokio::spawn(async move {
                if let Some(index) = rest.recv().await {
                    this.moved(&index);
                }
            });
            Ok(accepted)
        });
        while_progressing(fill, self.progress(), &self.context.limits, &self.what()).await
    }

    /// The index that the layer's verified bytes give: from the cache, else by reading the layer whole. Only the index
    /// is kept.
    pub async fn derive(self: &Arc<Self>) -> Result<Arc<Index>, FetchError> {
        if let Some(index) = known_index(&self.layer, &self.context).await? {
            return Ok(index);
        }
        self.audit().await.map_err(|failed| failed.error)
    }

    /// The same, always by reading the layer whole.
    pub async fn audit(self: &Arc<Self>) -> Result<Arc<Index>, NotAudited> {
        let bound = self.context.limits.max_inflated;
        // A plain mutex, held to put something in.
        let false_index = Mutex::new(None);
        let audit = self.read_whole(Pace::Now, |transfer| {
            let false_index = &false_index;
            async move {
                self.progress.send_replace(0);
                match pass(&self.layer, bound, transfer.ordered(), None).await {
                    Ok(passed) => Ok(Arc::new(passed.index)),
                    Err(Failure::False(mismatch, index)) => {
                        *false_index.lock().unwrap_or_else(|held| held.into_inner()) =
                            index.map(|index| Arc::new(*index));
                        Err(Failure::False(mismatch, None))
                    }
                    Err(failure) => Err(failure),
                }
            }
        });
        let index = while_progressing(audit, self.progress(), &self.context.limits, &self.what()).await;
        match index {
            Ok(index) => self.keep(index).await.map_err(|error| NotAudited { error, found: None }),
            Err(error) => {
                Err(NotAudited { error, found: false_index.into_inner().unwrap_or_else(|held| held.into_inner()) })
            }
        }
    }

    /// Keeps an index that a pass has derived, if the cache can; and gives it back, where it lies then.
    pub(super) async fn keep(&self, index: Arc<Index>) -> Result<Arc<Index>, FetchError> {
        let key = index_key(&self.layer);
        self.blocking(move |cache| {
            cache.keep_index(&key, index.as_bytes()).unwrap_or_else(|error| {
                error.unless_full(|error| tracing::warn!(%error, "the index was not kept; it will be derived again"));
            });
            Ok(at_rest(cache, &key, index))
        })
        .await
    }

    /// Reads the layer whole by `read` from one source after the other, until one gives its true bytes.
    pub(super) async fn read_whole<F>(&self, pace: Pace, read: impl Fn(Transfer) -> F) -> Result<Arc<Index>, FetchError>
    where
        F: Future<Output = Result<Arc<Index>, Failure>>,
    {
        let _turn = self.turn(pace).await?;
        let _reading = self.reading.clone();
        let mut last = FetchError::Lost { what: self.what() };
        let (mut found_false, mut may_recover) = (None, false);
        for (position, transfer) in self.transfers() {
            let source_name = transfer.source.name();
            match read(transfer).await {
                Ok(index) => return Ok(index),
                Err(Failure::Error(error)) => {
                    may_recover |= error.is_unreachable();
                    last = error;
                }
                Err(Failure::False(cause, _)) => {
                    tracing::error!(layer = %cause.expected, found = %cause.found, source = %source_name,
                        "layer does not have its digest; nothing of it is kept and this source is not asked again");
                    self.lock_poison().sources.insert(position);
                    found_false = Some(FetchError::Digest { what: self.what(), source_name, cause });
                }
            }
        }
        match found_false {
            // Another source may come back, and be honest.
            Some(error) if may_recover => Err(error),
            Some(error) => {
                self.poison_layer(crate::report::chain(&error));
                Err(error)
            }
            None => Err(last),
        }
    }

    /// Waits for its turn among the fills of this process. As long as one of those ahead moves, waiting is progress too.
    pub(super) async fn turn(&self, pace: Pace) -> Result<Turn, FetchError> {
        let line = match pace {
            Pace::Now => &self.context.fills,
            Pace::Ahead => &self.context.fills_ahead,
        };
        let mut turn = std::pin::pin!(line.clone().acquire_owned());
        let mut moved = self.context.moved.subscribe();
        let permit = loop {
            tokio::select! {
                biased;
                permit = &mut turn => break permit.map_err(|_| FetchError::Lost { what: self.what() })?,
                // The sender is in the context, so that this does not fail.
                _ = moved.changed() => self.progress.send_modify(|_| {}),
            }
        };
        let (mut own, moved) = (self.progress.subscribe(), self.context.moved.clone());
        let telling = tokio::spawn(async move {
            let mut received = *own.borrow_and_update();
            moved.send_replace(());
            loop {
                // Once a second is often enough, and pieces come a thousand times as often.
                tokio::time::sleep(TOLD).await;
                // Bytes count and nothing else: what waits for a turn tells those who wait for this layer so, too.
                let Ok(now) = own.wait_for(|now| *now != received).await.map(|now| *now) else { return };
                received = now;
                moved.send_replace(());
            }
        });
        Ok(Turn { _permit: permit, telling: telling.abort_handle() })
    }

    /// Takes the index of a verified layer, unless it contradicts what was told before: by headers, or by the index that
    /// is named for the layer.
    pub(super) async fn accept(self: &Arc<Self>, index: Arc<Index>) -> Result<Arc<Index>, FetchError> {
        let told = self.listing.done().or_else(|| match self.probe.done() {
            Some(Probe::File(listing)) => Some(listing),
            Some(Probe::Directory(_) | Probe::Unknown) | None => None,
        });
        if let Some(told) = told {
            let found = self.listing_of(&Known::Derived(index.clone())).await?;
            if let Some(what) = self.off_thread(move || found.difference(&told)).await? {
                return Err(self.differs(what));
            }
        }
        if let (Some(_), Some(named)) = (self.head.get(), self.named)
            && index.pin() != named.pin
        {
            let (pin, found) = (named.pin.digest, index.pin().digest);
            return Err(self.differs(format!("its {} index is {pin}, and the layer's is {found}", named.tier)));
        }
        self.adopt(&index);
        Ok(index)
    }

    fn differs(&self, what: String) -> FetchError {
        let error = FetchError::ListingDiffers { layer: self.layer.digest, what };
        self.poison_layer(error.to_string());
        error
    }
}

#[cfg(test)]
#[path = "whole_tests.rs"]
mod tests;
