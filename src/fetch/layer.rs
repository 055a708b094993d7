//! One layer of an opened kit: what is known of it, and how more is found out.
//!
//! Four flights, each shared by all who ask: a look for the index that an earlier fill left, *probe* (what is the root),
//! *listing* (what does it hold), *fill* (fetch it whole). A layer with an index needs no network for its names.
//! A mount asks by [`LayerFetch::probe`], [`LayerFetch::listing`] and [`LayerFetch::content`]; the other ways to names are
//! for commands that look without fetching. A row is one position in the listing, in the tree and in the index: that
//! they agree is checked when a fill ends.
//!
//! Poison: a source that gave false bytes is not asked again; a layer that is false at every source, or is not what its
//! listing had told, is refused until the next mount.
//!
//! Locks: `poison` is a plain mutex, held for a look or a note, never across an await.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, watch};

use super::fill::{Fill, Poison};
use super::flight::Flight;
use super::listing::{self, Hopped, Listing, Probe, SMALL_LAYER};
use super::pass::Failure;
use super::staged::StagedView;
use super::transfer::Transfer;
use super::{Context, FetchError, Verify};
use crate::archive::index::Index;
use crate::cache::{Cache, Object};
use crate::digest::Unverified;
use crate::modelkit::{Compression, Layer};
use crate::source::{BlobId, Source};

/// How often a fill that waits for its turn tells its waiters so.
const QUEUED: Duration = Duration::from_secs(1);

/// How far a layer's names and content are proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
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

/// Where the bytes are that a reader asked for.
#[derive(Debug)]
pub enum RowContent {
    /// Verified.
    Object(Object),
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

/// One layer and what is known of it.
#[derive(Debug)]
pub struct LayerFetch {
    /// The layer, as planned.
    pub layer: Layer,
    context: Context,
    sources: Vec<Arc<dyn Source>>,
    index: OnceLock<Arc<Index>>,
    looked: Flight<()>,
    probe: Flight<Probe>,
    listing: Flight<Arc<Listing>>,
    fill: Flight<Arc<Index>>,
    progress: watch::Sender<u64>,
    view: Option<Arc<StagedView>>,
    poison: Mutex<Poison>,
}

impl LayerFetch {
    /// A layer of which nothing is known yet.
    pub fn new(layer: Layer, context: Context, sources: Vec<Arc<dyn Source>>) -> Arc<Self> {
        let what = |work: &str| format!("{work} of layer {}", layer.digest);
        Arc::new(Self {
            index: OnceLock::new(),
            looked: Flight::new(what("the index")),
            probe: Flight::new(what("the first read")),
            listing: Flight::new(what("the listing")),
            fill: Flight::new(what("the fetch")),
            progress: watch::Sender::new(0),
            view: (context.verify == Verify::Stream).then(|| Arc::new(StagedView::new())),
            poison: Mutex::default(),
            layer,
            context,
            sources,
        })
    }

    /// How far the layer is proved now.
    pub fn tier(&self) -> Tier {
        if self.index.get().is_some() { Tier::Derived } else { Tier::Provisional }
    }

    /// Why the layer is refused, if it is.
    pub fn poisoned(&self) -> Option<String> {
        self.lock_poison().layer.clone()
    }

    /// Bytes of the layer received so far by a fill; changes while one is under way.
    pub fn progress(&self) -> watch::Receiver<u64> {
        self.progress.subscribe()
    }

    /// Whether the layer is being fetched whole now.
    pub fn is_filling(&self) -> bool {
        self.fill.is_running()
    }

    /// The index, if the layer has been verified here.
    pub fn index(&self) -> Option<&Arc<Index>> {
        self.index.get()
    }

    /// Whether a row's content is in the cache.
    pub async fn is_cached(&self, row: usize) -> Result<bool, FetchError> {
        let row = self.index.get().and_then(|index| index.head().row(row));
        let Some((name, size)) = row.and_then(|row| Some((row.object()?, row.size()))) else { return Ok(false) };
        self.context.blocking(&self.what(), move |cache| Ok(cache.has_object(&name, size))).await
    }

    /// How many bytes of content the layer's files have, and how many of them are in the cache; `None` as long as the
    /// layer has not been verified here.
    pub async fn held(&self) -> Result<Option<Held>, FetchError> {
        let Some(index) = self.index.get().cloned() else { return Ok(None) };
        let count = move |cache: &Cache| {
            let mut held = Held::default();
            for row in index.head().rows() {
                held.content += row.size();
                if row.object().is_some_and(|object| cache.has_object(&object, row.size())) {
                    held.cached += row.size();
                }
            }
            Ok(Some(held))
        };
        self.context.blocking(&self.what(), count).await
    }

    fn lock_poison(&self) -> MutexGuard<'_, Poison> {
        self.poison.lock().unwrap_or_else(|held| held.into_inner())
    }

    fn check_poison(&self) -> Result<(), FetchError> {
        match self.poisoned() {
            Some(why) => Err(FetchError::Poisoned { layer: self.layer.digest, why }),
            None => Ok(()),
        }
    }

    fn poison_layer(&self, why: String) -> FetchError {
        tracing::error!(layer = %self.layer.digest, %why, "layer refused until the next mount");
        self.lock_poison().layer = Some(why.clone());
        FetchError::Poisoned { layer: self.layer.digest, why }
    }

    fn what(&self) -> String {
        format!("layer {}", self.layer.digest)
    }

    fn fill_job(&self) -> Fill {
        Fill {
            layer: self.layer.clone(),
            context: self.context.clone(),
            progress: self.progress.clone(),
            view: self.view.clone(),
        }
    }

    /// The transfers that may still be tried, best source first.
    fn transfers(&self) -> Vec<(usize, Transfer)> {
        let blob = BlobId { digest: self.layer.digest, size: self.layer.size };
        let poisoned = self.lock_poison().sources.clone();
        let usable = self.sources.iter().enumerate().filter(|(position, _)| !poisoned.contains(position));
        let transfer = |source: &Arc<dyn Source>| Transfer {
            source: source.clone(),
            blob,
            limits: self.context.limits.clone(),
            received: self.progress.clone(),
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

    /// Looks once whether an earlier fill left an index: on the disk, never on the network.
    pub async fn look_for_index(self: &Arc<Self>) -> Result<Option<Arc<Index>>, FetchError> {
        if self.index.get().is_none() {
            let this = self.clone();
            self.looked
                .join(|| async move {
                    if let Some(index) = this.fill_job().known_index().await? {
                        this.adopt(&index);
                    }
                    Ok(())
                })
                .await?;
        }
        Ok(self.index.get().cloned())
    }

    fn adopt(&self, index: &Arc<Index>) {
        // Two fills give the same index, since the digest held for both.
        let _ = self.index.set(index.clone());
    }

    fn listing_of(&self, index: &Index) -> Result<Arc<Listing>, FetchError> {
        let entries = index.head().rows().map(|row| row.to_entry()).collect();
        Ok(Arc::new(Listing::new(&self.layer, entries, true)?))
    }

    /// What the layer's root is. One small read, or none where the layer is known.
    pub async fn probe(self: &Arc<Self>) -> Result<Probe, FetchError> {
        self.check_poison()?;
        let this = self.clone();
        self.probe.join(|| async move { this.probe_now().await }).await
    }

    async fn probe_now(self: &Arc<Self>) -> Result<Probe, FetchError> {
        if let Some(index) = self.look_for_index().await? {
            let listing = self.listing_of(&index)?;
            let root = listing.rows.iter().find(|(path, _)| *path == self.layer.root);
            let is_file = root.is_some_and(|(_, entry)| entry.kind != crate::archive::EntryKind::Directory);
            if is_file {
                return Ok(Probe::File(listing));
            }
            let dirs = listing.metas().filter(|(path, _)| self.layer.root.is_within(path));
            return Ok(Probe::Directory(dirs.collect()));
        }
        if self.context.verify == Verify::Listing {
            return Ok(Probe::Unknown);
        }
        self.try_sources(|transfer| async move { listing::probe(&self.layer, &transfer).await }).await
    }

    /// Everything the layer holds.
    pub async fn listing(self: &Arc<Self>) -> Result<Arc<Listing>, FetchError> {
        self.check_poison()?;
        let this = self.clone();
        self.listing.join(|| async move { this.list_now().await }).await
    }

    async fn list_now(self: &Arc<Self>) -> Result<Arc<Listing>, FetchError> {
        if let Some(index) = self.look_for_index().await? {
            return self.listing_of(&index);
        }
        if self.context.verify != Verify::Listing {
            if let Probe::File(listing) = self.probe().await? {
                return Ok(listing);
            }
            let hop = |transfer: Transfer| async move { listing::hop(&self.layer, &transfer).await };
            let hopped = self.try_sources(hop).await?;
            if let Hopped::Listed(listing) = hopped {
                return Ok(Arc::new(listing));
            }
        }
        let index = self.fill().await?;
        self.listing_of(&index)
    }

    /// Everything the layer holds, if that costs little: from its headers, or, for a small layer, by fetching it. For a
    /// look ahead.
    pub async fn cheap_listing(self: &Arc<Self>) -> Result<Option<Arc<Listing>>, FetchError> {
        if let Some(index) = self.look_for_index().await? {
            return self.listing_of(&index).map(Some);
        }
        if let Probe::File(listing) = self.probe().await? {
            return Ok(Some(listing));
        }
        if self.layer.size <= SMALL_LAYER {
            return self.listing().await.map(Some);
        }
        let hop = |transfer: Transfer| async move { listing::hop(&self.layer, &transfer).await };
        Ok(match self.try_sources(hop).await? {
            Hopped::Listed(listing) => Some(Arc::new(listing)),
            Hopped::Dense => None,
        })
    }

    /// Names by headers alone, with no fill: for `--verify=none`.
    pub async fn unverified_listing(self: &Arc<Self>) -> Result<Arc<Listing>, FetchError> {
        if let Some(index) = self.look_for_index().await? {
            return self.listing_of(&index);
        }
        if let Probe::File(listing) = self.probe().await? {
            return Ok(listing);
        }
        if self.layer.compression != Compression::None {
            return Err(FetchError::NoRandomAccess { layer: self.layer.digest });
        }
        let all = |transfer: Transfer| async move { listing::hop_through(&self.layer, &transfer).await };
        Ok(Arc::new(self.try_sources(all).await?))
    }

    /// Bytes of an uncompressed layer as they are at the source: for `--verify=none`, never for a mount.
    pub async fn unverified_range(&self, range: std::ops::Range<u64>) -> Result<Vec<Unverified>, FetchError> {
        if self.layer.compression != Compression::None {
            return Err(FetchError::NoRandomAccess { layer: self.layer.digest });
        }
        let read = |transfer: Transfer| {
            let range = range.clone();
            async move { transfer.range(range).await }
        };
        self.try_sources(read).await
    }

    /// Fetches the layer whole and waits for it as long as it makes progress.
    pub async fn fill(self: &Arc<Self>) -> Result<Arc<Index>, FetchError> {
        self.check_poison()?;
        let this = self.clone();
        let fill = self.fill.join(|| async move { this.fill_now().await });
        self.while_progressing(fill).await
    }

    /// Waits for `work`, but for no longer than the read timeout without progress of the fill.
    async fn while_progressing<T>(&self, work: impl Future<Output = Result<T, FetchError>>) -> Result<T, FetchError> {
        let mut progress = self.progress.subscribe();
        let mut work = std::pin::pin!(work);
        let patience = self.context.limits.read_timeout;
        // The transfer gives up by itself after the same time, with the better error; this is the net below it.
        let net = patience + Duration::from_secs(5);
        loop {
            tokio::select! {
                biased;
                outcome = &mut work => return outcome,
                moved = tokio::time::timeout(net, progress.changed()) => if moved.is_err() {
                    return Err(FetchError::Timeout { what: self.what(), after: patience, cause: None });
                },
            }
        }
    }

    /// Waits for its turn among the fills of this process. Those ahead make progress or end, so waiting is progress too.
    async fn turn(&self) -> Result<OwnedSemaphorePermit, FetchError> {
        let mut turn = std::pin::pin!(self.context.fills.clone().acquire_owned());
        loop {
            match tokio::time::timeout(QUEUED, &mut turn).await {
                Ok(permit) => return permit.map_err(|_| FetchError::Lost { what: self.what() }),
                Err(_) => self.progress.send_modify(|_| {}),
            }
        }
    }

    async fn fill_now(self: &Arc<Self>) -> Result<Arc<Index>, FetchError> {
        let _turn = self.turn().await?;
        self.fill_job().announce();
        let mut last = FetchError::Lost { what: self.what() };
        let (mut found_false, mut may_recover) = (None, false);
        for (position, transfer) in self.transfers() {
            match self.fill_job().run(&transfer).await {
                Ok(index) => return self.accept(index),
                Err(Failure::Error(error)) => {
                    may_recover |= error.is_unreachable();
                    last = error;
                }
                Err(Failure::False(cause)) => {
                    let source_name = transfer.source.name();
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

    /// Takes a verified index, unless it contradicts what was told before.
    fn accept(&self, index: Arc<Index>) -> Result<Arc<Index>, FetchError> {
        let told = self.listing.done().or_else(|| match self.probe.done() {
            Some(Probe::File(listing)) => Some(listing),
            Some(Probe::Directory(_) | Probe::Unknown) | None => None,
        });
        if let Some(told) = told {
            let found = self.listing_of(&index)?;
            if let Some(what) = found.difference(&told) {
                let error = FetchError::ListingDiffers { layer: self.layer.digest, what };
                self.poison_layer(error.to_string());
                return Err(error);
            }
        }
        self.adopt(&index);
        Ok(index)
    }

    /// The content of a row, at least up to `end`: from the cache, else by fetching the layer.
    pub async fn content(self: &Arc<Self>, row: usize, end: u64) -> Result<RowContent, FetchError> {
        self.check_poison()?;
        if let Some(index) = self.look_for_index().await? {
            if let Some(object) = self.object(&index, row).await? {
                return Ok(RowContent::Object(object));
            }
            // It was evicted or damaged: the layer is fetched again.
            self.fill.forget();
        }
        if let Some(path) = self.streamed(row, end).await? {
            return Ok(RowContent::Staged(path));
        }
        let index = self.fill().await?;
        match self.object(&index, row).await? {
            Some(object) => Ok(RowContent::Object(object)),
            None => Err(FetchError::Lost { what: format!("an object of {}", self.what()) }),
        }
    }

    async fn object(&self, index: &Index, row: usize) -> Result<Option<Object>, FetchError> {
        let Some(row) = index.head().row(row) else { return Ok(None) };
        let Some(name) = row.object() else { return Ok(None) };
        let size = row.size();
        self.context.blocking(&self.what(), move |cache| cache.object(&name, size)).await
    }

    /// With [`Verify::Stream`]: waits until `end` bytes of a row are staged. `None` once the layer is verified.
    async fn streamed(self: &Arc<Self>, row: usize, end: u64) -> Result<Option<PathBuf>, FetchError> {
        let Some(view) = self.view.clone() else { return Ok(None) };
        let listing = self.listing().await?;
        let Some((_, entry)) = listing.rows.get(row) else { return Ok(None) };
        let mut changes = view.changes();
        let mut fill = std::pin::pin!(self.fill());
        loop {
            if let Some(path) = view.ready(&entry.path, end) {
                return Ok(Some(path));
            }
            tokio::select! {
                biased;
                filled = &mut fill => return filled.map(|_| None),
                _ = changes.changed() => {}
            }
        }
    }
}
