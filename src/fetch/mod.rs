//! From a reference to verified content: the work between the names of a kit and the bytes of its layers.
//!
//! - [`resolve`](mod@resolve): reference → manifest → config → plan, with parents, all by digest; who is trusted and what
//!   may be asked for.
//! - [`kit`]: an opened kit: its layers, and what is known of them.
//! - [`layer`]: one layer: what its root is, what it holds, its content; each a single [`flight`] for all who ask.
//! - [`listing`]: names and sizes from headers read by range, not yet proved.
//! - [`named`]: an index that the kit, or a referrer that the user trusts, names: fetched and proved.
//! - [`chunks`]: files that are filled chunk by chunk, where an index proves them; which ones come next, and before they are
//!   asked for.
//! - [`fill`]: a layer that is fetched whole, hashed and cut into files; what an interrupted one has left.
//! - [`transfer`]: bytes of a blob, in ranges or in order, with retries.
//! - [`memory`]: what all of this may hold at once.
//! - [`mod@pull`]: all of a kit in the cache, to stay there if that is wanted.
//!
//! Every wait here has a deadline ([`Limits`]) and every task outlives the reader who started it.

pub mod chunks;
pub mod error;
pub mod fill;
pub mod flight;
pub mod kit;
pub mod layer;
pub mod listing;
pub mod memory;
pub mod named;
pub mod pull;
pub mod resolve;
pub mod transfer;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

use chunks::open_files::OpenFiles;
pub use error::{ArchiveError, BadIndex, FetchError};
pub use kit::{Kit, Probed};
pub use layer::{LayerFetch, Pace, Tier};
use memory::Memory;
pub use named::Named;
pub use resolve::documents::{Origin, config, manifest};
pub use resolve::last_seen::{LastSeen, Why};
pub use resolve::policy::{Policy, Refusal};
pub use resolve::repositories::{RegistryPattern, RepositoryPattern};
pub use resolve::trust::Trust;
pub use resolve::{Access, Request, Resolved, ResolvedDigest, resolve, resolve_digest};
use transfer::vain::Vain;

use crate::cache::{Cache, CacheError};

/// Deadlines and parallelism.
#[derive(Debug, Clone)]
pub struct Limits {
    /// How long content may make no progress before its readers get an error.
    pub read_timeout: Duration,
    /// How long names and attributes may take in total.
    pub meta_timeout: Duration,
    /// Ranged requests in flight for one layer.
    pub concurrency: usize,
    /// The most bytes that a compressed layer may inflate to; `None` stands for max(1 GiB, 64 × its size).
    pub max_inflated: Option<u64>,
    /// What content on its way may take of memory, in bytes, for all layers together.
    pub memory: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            read_timeout: Duration::from_secs(60),
            meta_timeout: Duration::from_secs(30),
            // kit's own default for --concurrency.
            concurrency: 5,
            max_inflated: None,
            memory: 256 << 20,
        }
    }
}

/// When names and content of a layer that was never hashed here may be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verify {
    /// Names and sizes at once, content when the layer's digest has held.
    #[default]
    Strict,
    /// Content as it arrives. A false layer is found out only at its end; from then on it is refused.
    Stream,
    /// Names and sizes too only when the layer's digest has held, or an index vouches for them: a pinned one is covered by
    /// the manifest's digest, an attested one by the referrer that the user trusts.
    Listing,
}

/// What all kits of a process share.
#[derive(Debug, Clone)]
pub struct Context {
    /// Where verified bytes are kept.
    pub cache: Arc<Cache>,
    /// Deadlines and parallelism.
    pub limits: Limits,
    /// What may be served before a digest held.
    pub verify: Verify,
    /// What content on its way may take of memory.
    pub memory: Arc<Memory>,
    /// Layers that may be fetched whole at the same time.
    fills: Arc<Semaphore>,
    /// The same for those that nobody waits for: one, in a line of its own, so that none who waits is behind it.
    fills_ahead: Arc<Semaphore>,
    /// Indexes that may be looked for at the same time.
    looks: Arc<Semaphore>,
    /// Changes whenever one of them moves: the sign of life for those that wait for their turn.
    moved: watch::Sender<()>,
    /// Files that are being filled chunk by chunk.
    files: Arc<OpenFiles>,
    /// What was waited for in vain a moment ago.
    vain: Arc<Vain>,
}

/// So many layers are fetched whole at a time: enough to use a wire and two cores, and it bounds the ranges, windows and
/// threads that fills hold. Commands take as many layers or blobs in hand.
pub const FILLS: usize = 4;

/// So many indexes are looked for at a time. A mount looks for those of all of its layers at once, mostly in vain; with a
/// thread for each, a hundred layers took more time to start threads than to look. It bounds as well how many are decoded.
const LOOKS: usize = 4;

impl Context {
    /// What the kits of a process share.
    pub fn new(cache: Arc<Cache>, limits: Limits, verify: Verify) -> Self {
        let memory = Memory::new(limits.memory);
        Self {
            cache,
            files: Arc::new(OpenFiles::new(&memory)),
            memory: Arc::new(memory),
            limits,
            verify,
            fills: Arc::new(Semaphore::new(FILLS)),
            fills_ahead: Arc::new(Semaphore::new(1)),
            looks: Arc::new(Semaphore::new(LOOKS)),
            moved: watch::Sender::new(()),
            vain: Arc::default(),
        }
    }

    /// Runs what takes long, hashing or a million rows, on a blocking thread.
    async fn off_thread<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, FetchError> {
        let lost = |_| FetchError::Lost { what: what.to_owned() };
        tokio::task::spawn_blocking(work).await.map_err(lost)
    }

    /// Runs disk work on a blocking thread.
    async fn blocking<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce(&Cache) -> Result<T, CacheError> + Send + 'static,
    ) -> Result<T, FetchError> {
        let cache = self.cache.clone();
        Ok(self.off_thread(what, move || work(&cache)).await??)
    }
}

/// Waits for `work`, but for no longer than the read timeout without progress. Progress is looked for now and then: a wake
/// for each of its steps would cost more than the steps.
async fn while_progressing<T>(
    work: impl Future<Output = Result<T, FetchError>>,
    mut progress: watch::Receiver<u64>,
    limits: &Limits,
    what: &str,
) -> Result<T, FetchError> {
    /// A transfer gives up by itself after the read timeout, with the better error; this is the net below it.
    const NET: Duration = Duration::from_secs(5);
    /// How often it is looked for, in the time that it may take.
    const LOOKS: u32 = 16;
    let patience = limits.read_timeout + NET;
    let mut last = tokio::time::Instant::now();
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            biased;
            outcome = &mut work => return outcome,
            () = tokio::time::sleep(patience / LOOKS) => {}
        }
        match progress.has_changed() {
            Ok(false) if last.elapsed() >= patience => {
                return Err(FetchError::Timeout { what: what.to_owned(), after: limits.read_timeout, cause: None });
            }
            Ok(false) => {}
            Ok(true) => {
                progress.mark_unchanged();
                last = tokio::time::Instant::now();
            }
            // Where the one who tells of progress has gone, only the outcome is left to wait for.
            Err(_) => return work.await,
        }
    }
}
