//! What a layer's root is, and what the layer holds.
//!
//! A mount asks by [`LayerFetch::probe`] and [`LayerFetch::listing`]; the other ways are for commands that look without
//! fetching.

use std::ops::Range;
use std::sync::Arc;

use super::{Known, LayerFetch};
use crate::archive::index::RowKind;
use crate::digest::Unverified;
use crate::fetch::listing::{self, Hopped, Listing, Probe, SMALL_LAYER};
use crate::fetch::transfer::{Persistence, Transfer};
use crate::fetch::{FetchError, Verify};
use crate::modelkit::Compression;
use crate::path::is_within;

impl LayerFetch {
    /// What is known, as a listing, if it may lie where it does: that is found out once.
    pub(super) async fn listing_of(self: &Arc<Self>, known: &Known) -> Result<Arc<Listing>, FetchError> {
        let (this, known) = (self.clone(), known.clone());
        self.off_thread(move || this.rows_of(&known).map(Arc::new)).await?
    }

    /// The rows of an index. A million are looked through in a tenth of a second.
    fn rows_of(&self, known: &Known) -> Result<Listing, FetchError> {
        if self.placed.get() == Some(&known.digest()) {
            return Ok(Listing::of_checked(&self.layer, known.head()));
        }
        let listing = Listing::indexed(&self.layer, known.head())?;
        // Where another index was looked through first, this one will be again, which is rare.
        let _ = self.placed.set(known.digest());
        Ok(listing)
    }

    /// What the layer's root is, by what is known.
    fn root_of(&self, known: &Known) -> Result<Probe, FetchError> {
        let listing = self.rows_of(known)?;
        let root = &self.layer.root;
        let own = listing.find(root).and_then(|at| listing.entry(at));
        if own.is_some_and(|entry| entry.kind != RowKind::Directory) {
            return Ok(Probe::File(Arc::new(listing)));
        }
        // All others are parents, of which there are few.
        if !listing.rows().any(|(path, _)| is_within(&path, root.as_bytes())) {
            return Ok(Probe::Unknown);
        }
        let way = root.ancestors().chain([root.clone()]);
        let named = way.filter_map(|path| {
            listing.entry(listing.find(&path)?).map(|entry| listing::meta(&entry)).map(|meta| (path, meta))
        });
        Ok(Probe::Directory(named.collect()))
    }

    /// What the layer's root is. One small read, or none where the layer is known.
    pub async fn probe(self: &Arc<Self>) -> Result<Probe, FetchError> {
        self.probe_with(Persistence::UntilDeadline).await
    }

    /// The same for a mount, which is of use before all roots are known: a source that does not answer is not waited for.
    pub async fn probe_unless_away(self: &Arc<Self>) -> Result<Probe, FetchError> {
        self.probe_with(Persistence::UnlessAway).await
    }

    async fn probe_with(self: &Arc<Self>, persistence: Persistence) -> Result<Probe, FetchError> {
        self.check_poison()?;
        let this = self.clone();
        self.probe.join(|| async move { this.probe_now(persistence).await }).await
    }

    async fn probe_now(self: &Arc<Self>, persistence: Persistence) -> Result<Probe, FetchError> {
        if let Some(known) = self.look(persistence).await? {
            let this = self.clone();
            return self.off_thread(move || this.root_of(&known)).await?;
        }
        if self.context.verify == Verify::Listing {
            return Ok(Probe::Unknown);
        }
        let probe = |transfer: Transfer| async move {
            listing::probe(&self.layer, &Transfer { persistence, ..transfer }).await
        };
        self.try_sources(probe).await
    }

    /// Everything the layer holds.
    pub async fn listing(self: &Arc<Self>) -> Result<Arc<Listing>, FetchError> {
        self.check_poison()?;
        let this = self.clone();
        self.listing.join(|| async move { this.list_now().await }).await
    }

    async fn list_now(self: &Arc<Self>) -> Result<Arc<Listing>, FetchError> {
        if let Some(known) = self.look_for_index().await? {
            return self.listing_of(&known).await;
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
        self.listing_of(&Known::Derived(index)).await
    }

    /// Everything the layer holds, if that costs little: from its headers, or, for a small layer, by fetching it. For a
    /// look ahead.
    pub async fn cheap_listing(self: &Arc<Self>) -> Result<Option<Arc<Listing>>, FetchError> {
        if let Some(known) = self.look_for_index().await? {
            return self.listing_of(&known).await.map(Some);
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
        if let Some(known) = self.look_for_index().await? {
            return self.listing_of(&known).await;
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
    pub async fn unverified_range(&self, range: Range<u64>) -> Result<Vec<Unverified>, FetchError> {
        if self.layer.compression != Compression::None {
            return Err(FetchError::NoRandomAccess { layer: self.layer.digest });
        }
        let read = |transfer: Transfer| {
            let range = range.clone();
            async move { transfer.range(range).await }
        };
        self.try_sources(read).await
    }
}
