//! One layer of an opened kit: what is known of it, and how more is found out.
//!
//! - here: what proves the layer's parts ([`Known`]), its sources, and what is held against it;
//! - `names`: what its root is, and what it holds: without the network where the layer is known;
//! - `content`: bytes of its files: chunk by chunk where an index proves them, else the layer is fetched whole;
//! - `get`: requests for chunks, what somebody waits for first; `small`: for what lies around and behind small files;
//! - `whole`: fetching it whole, and what that may contradict; `soon`: an open that waits for that;
//! - `complete`: having all of it in the cache, or some files; `plan`: which chunks each request for that gets;
//! - `settle`: proving an attested layer once all of its chunks are here.
//!
//! Each kind of work is a flight, shared by all who ask. A row is one position in the listing, in the tree and in the
//! index: that they agree is checked when a fill ends.
//!
//! Poison: a source that gave a false layer is not asked again; a layer that is false at every source, or is not what
//! its listing or its named index had told, is refused until the next mount.
//!
//! Locks: plain mutexes, held for a look or a note, never across an await, never two at once.

mod complete;
mod content;
mod get;
mod names;
mod plan;
mod settle;
mod small;
mod soon;
mod whole;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock};

use tokio::sync::{mpsc, watch};

use super::chunks::queue::Queue;
use super::chunks::sequence::Sequence;
use super::fill::staged::{StagedView, Unstaged};
use super::fill::{self, Fill};
use super::flight::Flight;
use super::listing::{Listing, Probe};
use super::named::Named;
use super::transfer::{Persistence, Transfer};
use super::{Context, FetchError, Verify};
use crate::archive::index::{Head, Index};
use crate::cache::{Cache, CacheError};
use crate::digest::Digest;
use crate::modelkit::{Compression, Layer};
use crate::object::ObjectDigest;
use crate::source::{BlobId, Source};

use complete::Lacking;
pub use complete::{Gauge, Pace};
pub use content::Content;
use get::Places;
pub use settle::Unread;
use small::SmallFiles;
pub use whole::NotAudited;

/// How far a layer's names and content are proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Headers read by range; content waits for the layer's digest.
    Provisional,
    /// A referrer that the user trusts names its index.
    Attested,
    /// Its manifest names its index.
    Pinned,
    /// This machine has hashed the whole layer.
    Derived,
}

impl std::fmt::Display for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Provisional => "provisional",
            Self::Attested => "attested",
            Self::Pinned => "pinned",
            Self::Derived => "derived",
        })
    }
}

/// What proves the parts of a layer.
#[derive(Debug, Clone)]
pub enum Known {
    /// The index that this machine made of the verified layer.
    Derived(Arc<Index>),
    /// The head of the index that is named for the layer.
    Named(Arc<Head>, Named),
}

impl Known {
    /// The entries.
    pub fn head(&self) -> &Head {
        match self {
            Self::Derived(index) => index.head(),
            Self::Named(head, _) => head,
        }
    }

    /// The index's digest.
    fn digest(&self) -> Digest {
        match self {
            Self::Derived(index) => index.pin().digest,
            Self::Named(_, named) => named.pin.digest,
        }
    }
}

/// Where the bytes are that a reader asked for.
#[derive(Debug)]
pub enum RowContent {
    /// Verified, or to be had verified, by [`LayerFetch::read`].
    Verified(Content),
    /// Not verified yet: a file in staging that holds at least what was asked for. Only with [`Verify::Stream`].
    Staged(PathBuf),
}

/// Bytes of a layer's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Held {
    /// All of them.
    pub content: u64,
    /// Those in the cache.
    pub cached: u64,
}

/// Sources that gave false bytes for a layer, and whether the layer itself is refused. In memory, per mount.
#[derive(Debug, Default)]
struct Poison {
    /// Positions of sources that are not asked again.
    sources: HashSet<usize>,
    /// Why nothing of the layer is served any more.
    layer: Option<String>,
}

/// One layer and what is known of it.
#[derive(Debug)]
pub struct LayerFetch {
    /// The layer, as planned.
    pub layer: Layer,
    context: Context,
    sources: Vec<Arc<dyn Source>>,
    named: Option<Named>,
    /// Of one and the same content once it is there.
    derived: RwLock<Option<Arc<Index>>>,
    head: OnceLock<Arc<Head>>,
    /// The index whose entries lie where they may.
    placed: OnceLock<Digest>,
    /// Why the named index is not used.
    unusable: OnceLock<String>,
    looked: Flight<()>,
    probe: Flight<Probe>,
    listing: Flight<Arc<Listing>>,
    fill: Flight<Arc<Index>>,
    proof: Flight<()>,
    progress: watch::Sender<u64>,
    /// Bytes of the layer that came from its sources, those that came in vain too.
    fetched: Arc<AtomicU64>,
    /// Bytes of it that an interrupted fetch has left to the one under way.
    resumed: Arc<AtomicU64>,
    /// What is still to come, while it is being made complete.
    lacking: Lacking,
    /// Held once more by each pass over the whole layer.
    reading: Arc<()>,
    view: Option<Arc<StagedView>>,
    /// Why its files could not be staged.
    unstaged: Arc<Unstaged>,
    /// Chunks that are waited for where it can only be read from its start on.
    sequence: Arc<Sequence>,
    poison: Mutex<Poison>,
    /// Files that are being opened, by row.
    opening: Mutex<HashMap<usize, Arc<Flight<Content>>>>,
    /// Files of one chunk.
    small: SmallFiles,
    /// Chunks that wait for a request.
    queue: Queue,
    /// Ranged requests in flight.
    places: Places,
    /// Whether no source serves ranges, so that the layer can only be had whole.
    only_whole: AtomicBool,
    /// Whether a host that is away is not worth the deadline any more.
    hurried: AtomicBool,
    /// What is still to be read of an attested layer.
    unread: Unread,
}

impl LayerFetch {
    /// A layer of which nothing is known yet but the index that is named for it, if one is.
    pub fn new(layer: Layer, context: Context, sources: Vec<Arc<dyn Source>>, named: Option<Named>) -> Arc<Self> {
        let what = |work: &str| format!("{work} of layer {}", layer.digest);
        Arc::new(Self {
            named,
            derived: RwLock::default(),
            head: OnceLock::new(),
            placed: OnceLock::new(),
            unusable: OnceLock::new(),
            looked: Flight::new(what("the index")),
            probe: Flight::new(what("the first read")),
            listing: Flight::new(what("the listing")),
            fill: Flight::new(what("the fetch")),
            proof: Flight::new(what("the proof")),
            progress: watch::Sender::new(0),
            fetched: Arc::default(),
            resumed: Arc::default(),
            lacking: Lacking::default(),
            reading: Arc::default(),
            view: (context.verify == Verify::Stream).then(|| Arc::new(StagedView::new())),
            unstaged: Arc::default(),
            sequence: Arc::default(),
            poison: Mutex::default(),
            opening: Mutex::default(),
            small: SmallFiles::default(),
            queue: Queue::default(),
            places: Places::new(context.limits.concurrency),
            only_whole: AtomicBool::new(false),
            hurried: AtomicBool::new(false),
            unread: Unread::default(),
            layer,
            context,
            sources,
        })
    }

    /// How far the layer is proved now, or will be once its named index is here.
    pub fn tier(&self) -> Tier {
        match (self.is_derived(), self.named, self.unusable.get()) {
            (true, _, _) => Tier::Derived,
            (false, Some(named), None) => named.tier,
            (false, _, _) => Tier::Provisional,
        }
    }

    /// The index that is named for the layer, by its manifest or by a referrer that the user trusts.
    pub fn named(&self) -> Option<Named> {
        self.named
    }

    /// Why the index that is named for the layer is not used, if it is not.
    pub fn unusable_index(&self) -> Option<&str> {
        self.unusable.get().map(String::as_str)
    }

    /// Why the layer is refused, if it is.
    pub fn poisoned(&self) -> Option<String> {
        self.lock_poison().layer.clone()
    }

    /// Why there was no room for all of the layer, if there was not: then it has been read for its index alone, and its
    /// files are fetched again when they are read.
    pub fn unstaged(&self) -> Option<String> {
        self.unstaged.why()
    }

    /// Whether a part of it can't be had without what comes before.
    fn is_only_whole(&self) -> bool {
        self.layer.compression != Compression::None || self.only_whole.load(Ordering::Relaxed)
    }

    /// Bytes of the layer received so far; changes while it is being fetched, whole or in part.
    pub fn progress(&self) -> watch::Receiver<u64> {
        self.progress.subscribe()
    }

    /// Bytes of the layer that came from its sources.
    pub fn fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    /// Whether the layer is being fetched whole now.
    pub fn is_filling(&self) -> bool {
        self.fill.is_running() || Arc::strong_count(&self.reading) > 1
    }

    /// What proves the layer's parts, as far as that is here by now.
    pub fn known(&self) -> Option<Known> {
        let derived = self.index().map(Known::Derived);
        derived.or_else(|| Some(Known::Named(self.head.get()?.clone(), self.named?)))
    }

    /// The index, if the layer has been verified here.
    pub fn index(&self) -> Option<Arc<Index>> {
        self.derived.read().unwrap_or_else(|held| held.into_inner()).clone()
    }

    fn is_derived(&self) -> bool {
        self.derived.read().unwrap_or_else(|held| held.into_inner()).is_some()
    }

    /// The name of a file's content, where that is known.
    pub fn object_of(&self, row: usize) -> Option<ObjectDigest> {
        self.known()?.head().row(row)?.object()
    }

    /// Whoever reads a row next looks at what the cache has of it anew.
    pub fn look_anew(&self, row: usize) {
        if let Some(object) = self.object_of(row) {
            self.context.files.let_go(&object);
        }
    }

    /// Whether a row's content is in the cache, all of it.
    pub async fn is_cached(&self, row: usize) -> Result<bool, FetchError> {
        let Some(known) = self.known() else { return Ok(false) };
        let Some((name, size)) = known.head().row(row).and_then(|row| Some((row.object()?, row.size()))) else {
            return Ok(false);
        };
        let complete = self.context.files.get(&name).is_some_and(|file| file.is_complete());
        Ok(complete || self.context.blocking(&self.what(), move |cache| Ok(cache.has_object(&name, size))).await?)
    }

    /// How many bytes of content the layer's files have, and how many of them are in the cache; `None` as long as
    /// nothing proves what they are.
    pub async fn held(&self) -> Result<Option<Held>, FetchError> {
        let Some(known) = self.known() else { return Ok(None) };
        let count = move |cache: &Cache| {
            let mut held = Held::default();
            for row in known.head().rows() {
                held.content += row.size();
                let Some(object) = row.object() else { continue };
                let whole = cache.has_object(&object, row.size());
                held.cached += if whole { row.size() } else { cache.partial_bytes(&object).min(row.size()) };
            }
            Ok(Some(held))
        };
        self.context.blocking(&self.what(), count).await
    }

    /// Looks once for what proves the layer's parts: the index that an earlier pass left on the disk, else the head of
    /// the index that is named for the layer, from the cache or the network. One that is missing or invalid is noted,
    /// and the layer is provisional; a source that can't be reached is an error, and the next to ask tries again.
    pub async fn look_for_index(self: &Arc<Self>) -> Result<Option<Known>, FetchError> {
        self.look(self.persistence()).await
    }

    /// The same for who can do without where the source does not answer.
    pub async fn look_for_index_unless_away(self: &Arc<Self>) -> Result<Option<Known>, FetchError> {
        self.look(Persistence::UnlessAway).await
    }

    async fn look(self: &Arc<Self>, persistence: Persistence) -> Result<Option<Known>, FetchError> {
        if !self.is_derived() {
            let this = self.clone();
            self.looked.join(|| async move { this.look_now(persistence).await }).await?;
        }
        Ok(self.known())
    }

    async fn look_now(self: &Arc<Self>, persistence: Persistence) -> Result<(), FetchError> {
        if let Some(index) = fill::known_index(&self.layer, &self.context).await? {
            if let Some(named) = self.named
                && index.pin() != named.pin
            {
                let pin = index.pin().digest;
                self.note_unusable(format!("it should be {pin}, which this machine made of the verified layer"));
            }
            self.adopt(&index);
            return Ok(());
        }
        let Some(named) = self.named else { return Ok(()) };
        match named.head(&self.layer, &self.context, &self.sources, persistence).await {
            Ok(head) => {
                let _ = self.head.set(Arc::new(head));
                Ok(())
            }
            Err(error) if matches!(error.root(), FetchError::Index { .. }) => {
                self.note_unusable(crate::report::chain(&error));
                Ok(())
            }
            // It can't come any more, and the layer may be in kit's storage all the same.
            Err(error) if error.is_offline() => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn note_unusable(&self, why: String) {
        let Some(Named { pin, tier }) = self.named else { return };
        let index = pin.digest;
        let told = format!("layer {}: its {tier} index {index} is not used: {why}", self.layer.digest);
        if self.unusable.set(told).is_ok() {
            tracing::warn!(layer = %self.layer.digest, %index, %tier, %why, "the index that is named for a layer is not used");
        }
    }

    /// Takes the index of the verified layer. Two passes give the same, since the digest held for both.
    fn adopt(&self, index: &Arc<Index>) {
        *self.derived.write().unwrap_or_else(|held| held.into_inner()) = Some(index.clone());
    }

    /// Takes the same index in another place, and whatever else holds its rows, or those that headers told.
    fn moved(&self, index: &Arc<Index>) {
        self.adopt(index);
        self.fill.replace(index.clone());
        self.listing.replace(Arc::new(Listing::of_checked(&self.layer, index.head())));
    }

    fn lock_poison(&self) -> MutexGuard<'_, Poison> {
        self.poison.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// Refuses a layer that was found to be false.
    pub fn check_poison(&self) -> Result<(), FetchError> {
        match self.poisoned() {
            Some(why) => Err(FetchError::Poisoned { layer: self.layer.digest, why }),
            None => Ok(()),
        }
    }

    fn poison_layer(&self, why: String) {
        tracing::error!(layer = %self.layer.digest, %why, "layer refused until the next mount");
        self.lock_poison().layer = Some(why);
    }

    fn what(&self) -> String {
        format!("layer {}", self.layer.digest)
    }

    fn fill_job(&self, kept: mpsc::UnboundedSender<Arc<Index>>) -> Fill {
        Fill {
            kept,
            layer: self.layer.clone(),
            context: self.context.clone(),
            progress: self.progress.clone(),
            resumed: self.resumed.clone(),
            view: self.view.clone(),
            in_parts: !self.is_only_whole(),
            unstaged: self.unstaged.clone(),
        }
    }

    /// From now on waits for no host that is away: somebody has waited for it in vain.
    pub fn hurry(&self) {
        self.hurried.store(true, Ordering::Relaxed);
    }

    fn persistence(&self) -> Persistence {
        if self.hurried.load(Ordering::Relaxed) { Persistence::UnlessAway } else { Persistence::UntilDeadline }
    }

    /// The transfers that may still be tried, best source first, with the positions of their sources.
    fn transfers(&self) -> Vec<(usize, Transfer)> {
        let blob = BlobId { digest: self.layer.digest, size: self.layer.size };
        let poisoned = self.lock_poison().sources.clone();
        let usable = self.sources.iter().enumerate().filter(|(position, _)| !poisoned.contains(position));
        let transfer = |source: &Arc<dyn Source>| Transfer {
            source: source.clone(),
            blob,
            limits: self.context.limits.clone(),
            received: self.progress.clone(),
            persistence: self.persistence(),
            fetched: self.fetched.clone(),
            memory: self.context.memory.clone(),
            vain: self.context.vain.clone(),
        };
        usable.map(|(at, source)| (at, transfer(source))).collect()
    }

    /// Tries `ask` on each source in turn; the last error counts.
    async fn try_sources<T, F>(&self, ask: impl Fn(Transfer) -> F) -> Result<T, FetchError>
    where
        F: Future<Output = Result<T, FetchError>>,
    {
        let mut last = FetchError::Lost { what: self.what() };
        for (_, transfer) in self.transfers() {
            match ask(transfer).await {
                Ok(value) => return Ok(value),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Runs what takes long on a blocking thread.
    async fn off_thread<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, FetchError> {
        self.context.off_thread(&self.what(), work).await
    }

    /// Runs disk work on a blocking thread.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Cache) -> Result<T, CacheError> + Send + 'static,
    ) -> Result<T, FetchError> {
        self.context.blocking(&self.what(), work).await
    }
}
