//! An open that waits for content which comes only with its whole layer.
//!
//! Nobody can read such a file before the layer's digest has held, so an open that waits for that costs its reader nothing,
//! and is answered with all of the content: the fastest read there is, as the kernel can read the file itself. But a
//! process that waits in an open can't be killed. So it waits a few seconds at most, and only as long as the rate that was
//! measured says that all will be here by then; else it is answered at once, and its reader waits in a read.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::{Known, LayerFetch};
use crate::archive::index::Index;
use crate::cache::Object;
use crate::fetch::{FetchError, Tier, Verify};

/// The longest that an open waits. A person takes it for a slow disk, and not yet for a hang.
const WAIT: Duration = Duration::from_secs(5);
/// How often it is looked whether the rate still promises that it will do.
const LOOK: Duration = Duration::from_millis(250);
/// So long nothing at all may have come at its beginning: some round trips to a far registry, with a token.
const SILENT: Duration = Duration::from_secs(1);
/// A fill is begun for an open where the layer is no larger: a core hashes 1.7 GB/s, so that more can't be here within the
/// wait, however fast the wire is.
const SMALL: u64 = 8 << 30;

impl LayerFetch {
    /// All of a row's content for who opens it, where that comes only with the whole layer and is here, or will be soon.
    /// `None` where a read should get it, or tell what is wrong. Ends within [`WAIT`].
    pub async fn whole_soon(self: &Arc<Self>, row: usize) -> Option<Object> {
        timeout(WAIT, self.whole_at_open(row)).await.ok()?.unwrap_or_default()
    }

    async fn whole_at_open(self: &Arc<Self>, row: usize) -> Result<Option<Object>, FetchError> {
        self.check_poison()?;
        // Its bytes are shown as they arrive.
        if self.context.verify == Verify::Stream && self.tier() == Tier::Provisional {
            return Ok(None);
        }
        // Its content comes in parts, as soon as its index has come.
        if self.known().is_none() && self.named.is_some() && self.unusable.get().is_none() {
            return Ok(None);
        }
        if let Some(known) = self.look_for_index().await? {
            if !self.is_only_whole() && self.opened(known.head(), row).is_some() {
                return Ok(None);
            }
            let here = self.object(known.head(), row).await?;
            if here.is_some() || !self.is_only_whole() || self.unstaged.is_recent() {
                return Ok(here);
            }
            // The content of an earlier fill was evicted.
            self.fill.forget();
        }
        if !self.fill.is_running() && self.layer.size > SMALL {
            return Ok(None);
        }
        match self.filled_soon().await? {
            Some(index) => self.object(Known::Derived(index).head(), row).await,
            None => Ok(None),
        }
    }

    /// The fill's outcome, if that comes soon enough. Without anybody who waits for it the fill goes on.
    async fn filled_soon(self: &Arc<Self>) -> Result<Option<Arc<Index>>, FetchError> {
        let received = self.progress();
        let mut fill = std::pin::pin!(self.fill());
        let (began, mut looked, mut before) = (Instant::now(), Instant::now(), *received.borrow());
        loop {
            tokio::select! {
                biased;
                filled = &mut fill => return filled.map(Some),
                () = sleep(LOOK) => {}
            }
            let now = *received.borrow();
            let came = Came { bytes: now.saturating_sub(before), within: looked.elapsed() };
            let left = self.layer.size.saturating_sub(now);
            let is_silent = came.bytes == 0 && began.elapsed() < SILENT;
            // A pass begins to count anew.
            let has_begun_anew = now < before;
            if !is_silent && !has_begun_anew && !came.promises(left, WAIT.saturating_sub(began.elapsed())) {
                return Ok(None);
            }
            (looked, before) = (Instant::now(), now);
        }
    }
}

/// What came since the last look.
#[derive(Debug, Clone, Copy)]
struct Came {
    bytes: u64,
    within: Duration,
}

impl Came {
    /// Whether, as things go, what is left comes in that time.
    fn promises(self, left: u64, time: Duration) -> bool {
        let taken = self.within.as_secs_f64() * left as f64 / self.bytes as f64;
        left == 0 || taken <= time.as_secs_f64()
    }
}

#[cfg(test)]
#[path = "soon_tests.rs"]
mod tests;
