//! Making a kit complete in the cache, and keeping it there.
//!
//! What is kept is noted before anything is fetched, so that eviction can't take it meanwhile; and no more is kept than
//! the cache may hold, so that what is kept never makes it useless.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use tokio::sync::Semaphore;

use super::{Context, FILLS, FetchError, Kit, Pace};
use crate::archive::index::{Head, Index};
use crate::cache::{Cache, CacheError, KitRecord, LayerRecord};
use crate::digest::Digest;
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
        if error.as_ref().is_some_and(FetchError::is_unreachable) {
            // Where the registry is gone, each few layers would wait out the deadline: the others try now, all at once.
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
        "{kit} takes {}, and the cache may hold {}: raise the limit with --cache-size, or take a part of the kit with \
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
        "keeping {kit} makes {} that are kept, and the cache may hold {}; kept already: {kept}; remove one with \
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

/// A kit that is marked as kept; dropped before [`Keeping::confirm`], it is marked as it was before.
#[derive(Debug)]
pub struct Keeping {
    cache: Arc<Cache>,
    record: KitRecord,
    /// What was noted of it before.
    before: Option<KitRecord>,
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
        if self.is_confirmed {
            return;
        }
        let before = self.before.take().unwrap_or_else(|| {
            let mut record = self.record.clone();
            record.layers.iter_mut().for_each(|layer| layer.kept = false);
            record
        });
        // Marks only ever add up.
        let undone = self.cache.forget_kit(&before.digest).and_then(|()| self.cache.note_kit(before));
        if let Err(error) = undone {
            tracing::warn!(%error, "a kit that could not be pulled may stay marked as kept; `kitfs cache rm` ends that");
        }
    }
}

/// Marks the layers of a kit as kept. Nothing is marked where all that is kept would be more than the cache may hold.
pub async fn keep(context: &Context, kit: &Kit) -> Result<Keeping, NoRoom> {
    look_for_indexes(kit).await;
    let record = record(kit, true);
    let bound = context.limits.max_inflated;
    let name = kit.resolved.pinned();
    let cache = context.cache.clone();
    let kept = move || {
        let noted = cache.kits()?;
        let before = noted.iter().map(|(record, _)| record).find(|other| other.digest == record.digest).cloned();
        if let Some(limit) = cache.limit_bytes() {
            let mut all = Contents::default();
            let mut words = Vec::new();
            for (other, _) in noted.iter().filter(|(other, _)| other.is_kept()) {
                let mut own = Contents::default();
                for layer in other.layers.iter().filter(|layer| layer.kept) {
                    own.add(&cache, layer, bound)?;
                }
                if other.digest != record.digest {
                    let reference = other.references.last().unwrap_or(&other.repository);
                    words.push(format!("{reference} ({}, {})", other.digest, format_size(own.bytes())));
                }
                all.0.extend(own.0);
            }
            for layer in &record.layers {
                all.add(&cache, layer, bound)?;
            }
            if all.bytes() > limit {
                let kept = if words.is_empty() { "nothing else".to_owned() } else { words.join(", ") };
                return Err(NoRoom::Kept { kit: name, bytes: all.bytes(), limit, kept });
            }
        }
        cache.note_kit(record.clone())?;
        Ok(Keeping { cache, record, before, is_confirmed: false })
    };
    context.off_thread("the mark of what is kept", kept).await?
}

/// Refuses a kit that is larger than the cache may be, as far as its size is known, before anything is fetched.
pub async fn check_room(context: &Context, kit: &Kit) -> Result<(), NoRoom> {
    let Some(limit) = context.cache.limit_bytes() else { return Ok(()) };
    look_for_indexes(kit).await;
    let record = record(kit, false);
    let (cache, bound, name) = (context.cache.clone(), context.limits.max_inflated, kit.resolved.pinned());
    let check = move || {
        let mut own = Contents::default();
        record.layers.iter().try_for_each(|layer| own.add(&cache, layer, bound))?;
        let bytes = own.bytes();
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
    let mut record = super::record::record(&kit.resolved);
    record.layers.iter_mut().for_each(|layer| layer.kept = kept);
    record
}

/// Contents by their names, each once: objects where an index tells them, else blobs as they are.
#[derive(Debug, Default)]
struct Contents(HashMap<Digest, u64>);

impl Contents {
    fn bytes(&self) -> u64 {
        self.0.values().sum()
    }

    fn add(&mut self, cache: &Cache, layer: &LayerRecord, bound: Option<u64>) -> Result<(), CacheError> {
        if let Some(Ok(index)) = cache.index(&layer.index_key)?.map(|bytes| Index::decode(bytes, bound)) {
            self.add_rows(index.head());
            return Ok(());
        }
        let head = match layer.named {
            Some((_, head)) => cache.blob(&head)?,
            None => None,
        };
        match head.map(|bytes| Head::parse(bytes.bytes().clone(), bound)) {
            Some(Ok(head)) => self.add_rows(&head),
            Some(Err(_)) | None => drop(self.0.insert(layer.digest, layer.size)),
        }
        Ok(())
    }

    fn add_rows(&mut self, head: &Head) {
        let objects = head.rows().filter_map(|row| Some((Digest::from_bytes(*row.object()?.as_bytes()), row.size())));
        self.0.extend(objects);
    }
}
