//! Making a kit complete in the cache, and keeping it there.
//!
//! What is kept is noted before anything is fetched, so that eviction can't take it meanwhile; and no more is kept than
//! the cache may hold, so that what is kept never makes it useless.

use std::sync::Arc;
use std::time::SystemTime;

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use tokio::sync::Semaphore;

use super::{Context, FILLS, FetchError, Kit, Pace};
use crate::cache::{Cache, CacheError, KitRecord, LayerRecord};
use crate::digest::Digest;
use crate::inventory;
use crate::units::format_size;

/// Indexes that are looked for at once: a small read each.
const LOOKS: usize = 32;

/// What became of one layer.
#[derive(Debug)]
pub struct Pulled {
    /// Bytes that came for it now.
    pub fetched: u64,
    /// Why it is not complete, if it is not.
    pub error: Option<FetchError>,
}

/// Makes all layers of a kit complete in the cache, a few at a time; goes on after one that can't be had. What became of
/// them, in the order of the plan.
pub async fn pull(kit: &Kit) -> Vec<Pulled> {
    let places = Semaphore::new(FILLS);
    let pulls = kit.layers.iter().map(|layer| async {
        let _place = places.acquire().await;
        let before = layer.fetched();
        let error = layer.complete(Pace::Now).await.err();
        if let Some(error) = error.as_ref().filter(|error| error.is_unreachable()) {
            // Where the registry is gone, each few layers would wait out the deadline: the others try now, all at once.
            kit.note_failure(layer, error);
            places.add_permits(kit.layers.len());
        }
        Pulled { fetched: layer.fetched() - before, error }
    });
    let mut all = join_all(pulls).await;
    for (layer, pulled) in kit.layers.iter().zip(&mut all).filter(|(_, pulled)| pulled.error.is_none()) {
        // What came last may have driven out what came first.
        pulled.error = match layer.lacks().await {
            Ok(Some(0)) => None,
            Ok(lacks) => {
                Some(FetchError::NotKept { layer: layer.layer.digest, bytes: lacks.unwrap_or(layer.layer.size) })
            }
            Err(error) => Some(error),
        };
    }
    all
}

/// Why a kit can't be made complete, or kept.
#[derive(Debug, thiserror::Error)]
pub enum NoRoom {
    /// It is larger than the cache may be.
    #[error(
        "{kit} takes {}, and the cache keeps {} at once: raise the limit with --cache-size, or take a part of the kit with \
         --filter",
        format_size(*bytes), format_size(*limit)
    )]
    Large {
        /// The kit.
        kit: String,
        /// What its content takes.
        bytes: u64,
        /// What the cache may hold.
        limit: u64,
    },
    /// With what is kept already it is.
    #[error(
        "keeping {kit} makes {} that are kept, and the cache keeps {} at once; kept already: {kept}; remove one with \
         `kitfs cache rm REF`, or raise the limit with --cache-size",
        format_size(*bytes), format_size(*limit)
    )]
    Kept {
        /// The kit.
        kit: String,
        /// What all that is kept would take.
        bytes: u64,
        /// What the cache may hold.
        limit: u64,
        /// The kits that are kept, with their sizes.
        kept: String,
    },
    /// The cache's disk failed.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A task ended without an answer.
    #[error(transparent)]
    Fetch(#[from] FetchError),
}

/// A kit that is marked as kept; dropped before [`Keeping::confirm`], what was not marked before is unmarked. Both block
/// on the disk.
#[derive(Debug)]
pub struct Keeping {
    cache: Arc<Cache>,
    record: KitRecord,
    /// The layers that were not kept before.
    news: Vec<LayerRecord>,
    is_confirmed: bool,
}

impl Keeping {
    /// The kit is complete: it stays marked.
    pub fn confirm(mut self) -> Result<(), CacheError> {
        self.is_confirmed = true;
        // Once more: another pull of it may have failed meanwhile, and undone the mark.
        self.cache.note_kit(self.record.clone())
    }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        if !self.is_confirmed
            && let Err(error) = self.cache.unmark(&self.record.digest, &self.news)
        {
            tracing::warn!(%error, "a kit that could not be pulled may stay marked as kept; `kitfs cache rm` ends that");
        }
    }
}

/// Marks the layers of a kit as kept. Nothing is marked where all that is kept would be more than the cache may hold.
pub async fn keep(context: &Context, kit: &Kit) -> Result<Keeping, NoRoom> {
    look_for_indexes(kit).await;
    let record = record(kit, true);
    let name = kit.resolved.pinned();
    let cache = context.cache.clone();
    let kept = move || {
        let noted = cache.kits()?;
        if let Some(limit) = cache.most()? {
            check_kept(&cache, &name, &record, &noted, limit)?;
        }
        let was_kept = |layer: &LayerRecord| {
            let before = noted.iter().filter(|(other, _)| other.digest == record.digest);
            before.flat_map(|(other, _)| &other.layers).any(|other| other.is(layer) && other.kept)
        };
        let news = record.layers.iter().filter(|layer| !was_kept(layer)).cloned().collect();
        cache.note_kit(record.clone())?;
        Ok(Keeping { cache, record, news, is_confirmed: false })
    };
    context.off_thread("the mark of what is kept", kept).await?
}

/// Refuses to keep what would make all that is kept more than `limit`.
fn check_kept(
    cache: &Cache,
    name: &str,
    record: &KitRecord,
    noted: &[(KitRecord, SystemTime)],
    limit: u64,
) -> Result<(), NoRoom> {
    let kept = |kit: &'_ KitRecord| kit.layers.iter().filter(|layer| layer.kept).cloned().collect::<Vec<_>>();
    let all: Vec<LayerRecord> = noted.iter().flat_map(|(other, _)| kept(other)).collect();
    let bytes = inventory::bytes_of(cache, all.iter().chain(&record.layers))?;
    if bytes <= limit {
        return Ok(());
    }
    let mut words = Vec::new();
    for (other, _) in noted.iter().filter(|(other, _)| other.is_kept() && other.digest != record.digest) {
        let reference = other.references.last().unwrap_or(&other.repository);
        let size = format_size(inventory::bytes_of(cache, &kept(other))?);
        words.push(format!("{reference} ({}, {size})", other.digest));
    }
    let kept = if words.is_empty() { "nothing else".to_owned() } else { words.join(", ") };
    Err(NoRoom::Kept { kit: name.to_owned(), bytes, limit, kept })
}

/// Refuses a kit that is larger than the cache may be, as far as its size is known, before anything is fetched.
pub async fn check_room(context: &Context, kit: &Kit) -> Result<(), NoRoom> {
    look_for_indexes(kit).await;
    let record = record(kit, false);
    let (cache, name) = (context.cache.clone(), kit.resolved.pinned());
    let check = move || {
        let Some(limit) = cache.most()? else { return Ok(()) };
        let bytes = inventory::bytes_of(&cache, &record.layers)?;
        if bytes > limit { Err(NoRoom::Large { kit: name, bytes, limit }) } else { Ok(()) }
    };
    context.off_thread("the size of the kit", check).await?
}

/// Whether all layers of a kit are marked as kept.
pub async fn is_kept(context: &Context, kit: &Kit) -> Result<bool, FetchError> {
    let digest = kit.resolved.digest;
    let layers: Vec<Digest> = kit.layers.iter().map(|layer| layer.layer.digest).collect();
    let look = move |cache: &Cache| {
        let record = cache.kits()?.into_iter().map(|(record, _)| record).find(|record| record.digest == digest);
        let is_kept = |record: KitRecord| {
            let kept = |digest: &Digest| record.layers.iter().any(|layer| layer.digest == *digest && layer.kept);
            record.is_kept() && layers.iter().all(kept)
        };
        Ok(record.is_some_and(is_kept))
    };
    context.blocking("what is kept", look).await
}

/// Looks for what tells the sizes of contents. One that is not to be had is told when it is needed.
async fn look_for_indexes(kit: &Kit) {
    let looks = kit.layers.iter().map(|layer| async { drop(layer.look_for_index().await) });
    futures_util::stream::iter(looks).buffer_unordered(LOOKS).collect::<()>().await;
}

/// What belongs to a kit, as it was asked for.
fn record(kit: &Kit, kept: bool) -> KitRecord {
    let mut record = super::resolve::record::record(&kit.resolved);
    record.layers.iter_mut().for_each(|layer| layer.kept = kept);
    record
}
