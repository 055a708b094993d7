//! Requests for chunks of a layer: a place for each, and what it gets once it has one.
//!
//! One place is never taken by what nobody waits for, so that who does wait is not behind it, but where there is only one.
//! What is fetched in the background also waits until nothing is read ahead.

use std::sync::Arc;

use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

use super::LayerFetch;
use super::complete::Pace;
use crate::fetch::chunks::Chunked;
use crate::fetch::chunks::ahead::WIDEST;
use crate::fetch::chunks::queue::SHORT;
use crate::fetch::chunks::requests::{self, Supply, Want};
use crate::fetch::chunks::sequence::Reading;
use crate::object::CHUNK_SIZE;

/// So many bytes may wait to be read ahead in a layer, for all of its readers, before the windows of further ones are narrow:
/// two of the widest.
const WAITING: u64 = 2 * WIDEST * CHUNK_SIZE as u64;

/// Requests that a layer may have in flight: as many as the limits say.
#[derive(Debug)]
pub(super) struct Places {
    /// For any.
    long: Arc<Semaphore>,
    /// One, for short requests that somebody waits for; none where there is one place in all.
    short: Arc<Semaphore>,
    /// Those of the long ones for what no reader is expected at.
    background: Arc<Semaphore>,
}

/// The right to make one request.
pub(super) struct Place {
    is_short: bool,
    /// The place, and the right to take it.
    _held: (Result<OwnedSemaphorePermit, AcquireError>, Option<OwnedSemaphorePermit>),
}

impl Places {
    pub(super) fn new(requests: usize) -> Self {
        let [long, short, background] =
            [requests.saturating_sub(1).max(1), usize::from(requests > 1), (requests / 2).max(1)]
                .map(|places| Arc::new(Semaphore::new(places)));
        Self { long, short, background }
    }

    /// A place as soon as there is one. Which of those who wait gets it does not matter: whoever does takes what is most
    /// urgent.
    async fn next(&self, pace: Pace) -> Place {
        // Never closed.
        let long = self.long.clone().acquire_owned();
        let short = async {
            match pace {
                Pace::Now => self.short.clone().acquire_owned().await,
                Pace::Ahead => std::future::pending().await,
            }
        };
        let (held, is_short) = tokio::select! {
            biased;
            long = long => (long, false),
            short = short => (short, true),
        };
        Place { is_short, _held: (held, None) }
    }
}

impl LayerFetch {
    /// How many chunks may be read ahead of a reader: few, where others have asked for much. They cost no memory, as each
    /// is written as soon as it is here.
    pub(super) fn widest(&self) -> u64 {
        let left = WAITING.saturating_sub(self.queue.bytes()).max(SHORT);
        WIDEST.min(left / u64::from(CHUNK_SIZE)).max(1)
    }

    /// Sets out to get chunks of a row that somebody waits for, and others ahead.
    pub(super) fn get(self: &Arc<Self>, row: usize, mut wants: Vec<Want>, ahead: Vec<Want>) {
        if wants.is_empty() && ahead.is_empty() {
            return;
        }
        let this = self.clone();
        tokio::spawn(async move {
            this.context.files.until_room().await;
            if this.is_only_whole() {
                wants.extend(ahead);
                return this.read_in_order(wants).await;
            }
            if !wants.is_empty() {
                wants = this.with_neighbours(row, wants).await;
            }
            this.put(wants, Pace::Now);
            this.put(ahead, Pace::Ahead);
        });
    }

    /// Lets chunks wait for a request, and makes one as soon as there is a place.
    pub(super) fn put(self: &Arc<Self>, wants: Vec<Want>, pace: Pace) {
        if !wants.is_empty() {
            self.queue.put(wants, pace == Pace::Now);
            self.serve(pace);
        }
    }

    /// Makes a request as soon as there is a place, for what waits then, and further ones until nothing does.
    pub(super) fn serve(self: &Arc<Self>, pace: Pace) {
        let this = self.clone();
        tokio::spawn(async move {
            let place = this.places.next(pace).await;
            // What somebody waits for takes along what lies behind it: as much as would be read ahead, or little, so that the
            // last place is soon free again.
            let (wants, more) = match place.is_short {
                false => this.queue.next_of(pace == Pace::Now, this.places.long.available_permits() + 1),
                true => this.queue.next_pressing(),
            };
            if wants.is_empty() {
                return;
            }
            if more {
                this.serve(pace);
            }
            for file in this.supply().get(wants).await {
                this.note_complete(file.list().object());
            }
        });
    }

    /// What gets the chunks of one request.
    pub(super) fn supply(&self) -> Supply {
        Supply {
            context: self.context.clone(),
            transfers: self.transfers().into_iter().map(|(_, transfer)| transfer).collect(),
        }
    }

    /// The place of one request for what is to be complete; one that nobody waits for comes when nothing is asked for.
    pub(super) async fn place(&self, pace: Pace) -> Place {
        if pace == Pace::Now {
            return self.places.next(pace).await;
        }
        let background = self.places.background.clone().acquire_owned().await.ok();
        self.queue.until_empty().await;
        let place = self.places.next(pace).await;
        Place { _held: (place._held.0, background), ..place }
    }

    /// Gets chunks of a layer that can only be read from its start on, as its turn comes.
    async fn read_in_order(self: &Arc<Self>, wants: Vec<Want>) {
        let Some(index) = self.index() else { return };
        let (missing, complete) = requests::on_disk(wants).await;
        for file in complete {
            self.context.files.commit(&self.context.cache, file);
        }
        let Some(mut running) = self.sequence.ask(missing) else { return };
        let (layer, context) = (self.layer.clone(), self.context.clone());
        let transfers = self.transfers().into_iter().map(|(_, transfer)| transfer).collect();
        let reading = Reading::new(layer, context, transfers, index, self.progress.clone());
        loop {
            // One turn for each reading, so that other layers have theirs. Without one, those who wait are told.
            let Ok(_turn) = self.turn(Pace::Now).await else { return };
            if reading.serve(&mut running).await {
                return;
            }
        }
    }

    /// Sets out to get the rest of a file that is mostly here, so that it becomes an object; once, behind everything that is
    /// asked for.
    pub(super) fn finish_if_mostly_here(self: &Arc<Self>, row: usize, file: &Chunked) {
        if self.is_only_whole() || !file.is_to_be_finished() {
            return;
        }
        let this = self.clone();
        tokio::spawn(async move {
            if let Err(error) = this.complete_rows(&[row], Pace::Ahead).await {
                let error = crate::report::chain(&error);
                tracing::debug!(layer = %this.layer.digest, %error, "a file that is mostly here was not completed");
            }
        });
    }
}
