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
/// So long nothing at all may come: at its beginning, some round trips to a far registry, with a token.
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
        let (began, mut seen) = (Instant::now(), *received.borrow());
        let mut moved = began;
        let mut measured = None;
        loop {
            tokio::select! {
                biased;
                filled = &mut fill => return filled.map(Some),
                () = sleep(LOOK) => {}
            }
            let (now, look) = (*received.borrow(), Instant::now());
            if now != seen {
                // From the first bytes on: what was before them is no rate. A pass begins to count anew.
                if measured.is_none() || now < seen {
                    measured = Some(Measured { since: look, from: now });
                }
                (seen, moved) = (now, look);
            }
            let left = self.layer.size.saturating_sub(now);
            let time = WAIT.saturating_sub(look - began);
            let has_stalled = left > 0 && look - moved >= SILENT;
            if has_stalled || measured.as_ref().is_some_and(|measured| !measured.promises(now, look, left, time)) {
                return Ok(None);
            }
        }
    }
}

/// Where the rate is measured from. All that came since counts, as what comes in one moment tells little: it stops for one
/// when the disk or the processor is another's.
#[derive(Debug, Clone, Copy)]
struct Measured {
    since: Instant,
    from: u64,
}

impl Measured {
    /// Whether, as things go, what is left comes in that time.
    fn promises(&self, now: u64, look: Instant, left: u64, time: Duration) -> bool {
        let (came, within) = ((now - self.from) as f64, (look - self.since).as_secs_f64());
        within * left as f64 <= came * time.as_secs_f64()
    }
}

#[cfg(test)]
#[path = "soon_tests.rs"]
mod tests;
