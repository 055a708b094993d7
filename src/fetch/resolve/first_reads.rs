//! What a mount reads of a kit's layers first, asked for while the kit's config is on its way.
//!
//! The manifest tells which layers there are, the config where they belong. What is read of a layer first, its beginning or
//! the head of its index, follows from the manifest alone; so it is asked for one round trip earlier, and the connections
//! that it takes are opened meanwhile. The serial round trips of a mount over plain HTTP are then four: the connection, the
//! manifest (by tag, in one request), the connections for the layers beside the config, and the layers. TLS adds one for
//! each connection, a token its own, a referrer that is trusted by a rule one for the list and one for itself.
//!
//! Who later reads exactly such a range gets the answer that is under way, as if it had just asked: a failure is then that
//! of its first attempt. Invariants: nothing is asked for that filters may leave out, that the cache holds, or that an index
//! may make needless, and nothing of a kit that a local source has; at most [`FIRST_READS`] at once; what nobody has taken
//! once the layers have been asked is given up, with its connections.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use tokio::task::JoinHandle;

use super::documents::Origin;
use crate::archive::index::LayerFormat;
use crate::archive::index::annotations::Pin;
use crate::cache::Small;
use crate::digest::{Digest, Unverified};
use crate::fetch::fill::index_key_of;
use crate::fetch::listing::BEGINNING;
use crate::fetch::{Context, FetchError, Trust, Verify};
use crate::modelkit::filter::Filters;
use crate::modelkit::manifest::{Content, Manifest};
use crate::source::{Away, BlobId, ByteStream, Source, SourceError};

/// First reads in flight at once: mounting waits for them, each more wave of them is a round trip, and a kit has tens of
/// layers. A read has a few KiB, so what a registry feels is the connections; it sees them once a mount, and most are closed
/// right after (`source` keeps few idle).
pub(in crate::fetch) const FIRST_READS: usize = 128;
/// A longer head is read when its layer is: what was begun is held in the connection's buffers until it is taken.
const LONGEST: u64 = 64 << 10;

/// A source of which something has been asked already.
pub struct Begun {
    source: Arc<dyn Source>,
    /// What is under way, by blob and length. A mutex, as it is held to put something in or to take it.
    openings: Mutex<HashMap<(BlobId, u64), Opening>>,
}

/// An answer that is under way. It is given up with this value.
struct Opening(JoinHandle<Result<ByteStream, SourceError>>);

impl Drop for Opening {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Asks the origin's last source, the one that is far, for what will be read first of the layers of a manifest. `None`
/// where there is nothing to ask for.
pub(super) async fn begin(
    context: &Context,
    origin: &Origin,
    manifest: &Manifest,
    filters: &Filters,
    trust: &Trust,
) -> Result<Option<Arc<Begun>>, FetchError> {
    let Some((source, locals)) = origin.sources.split_last().filter(|(_, locals)| !locals.is_empty()) else {
        // What is near takes no round trips.
        return Ok(None);
    };
    for local in locals {
        // Then it has the layers too.
        if local.manifest(&origin.digest).await.is_ok() {
            return Ok(None);
        }
    }
    let wanted = manifest.contents().filter(|content| filters.wants_all(content.kind));
    let reads: Vec<_> = wanted.filter_map(|content| First::of(context, origin, &content, trust)).collect();
    let look = move |cache: &crate::cache::Cache| {
        let absent = reads.into_iter().filter(|read| !read.instead.iter().any(|small| cache.seems_to_have(small)));
        Ok(absent.take(FIRST_READS).collect::<Vec<_>>())
    };
    let absent = context.blocking("the first reads", look).await?;
    let mut openings = HashMap::new();
    for First { blob, len, .. } in absent {
        let source = source.clone();
        let open = async move { source.blob(&blob, 0..len).await };
        openings.entry((blob, len)).or_insert_with(|| Opening(tokio::spawn(open)));
    }
    if openings.is_empty() {
        return Ok(None);
    }
    Ok(Some(Arc::new(Begun { source: source.clone(), openings: Mutex::new(openings) })))
}

/// A first read of one layer.
struct First {
    blob: BlobId,
    len: u64,
    /// What makes it needless where the cache has it.
    instead: Vec<Small>,
}

impl First {
    /// What is surely read first of a layer, as far as its descriptor tells.
    fn of(context: &Context, origin: &Origin, layer: &Content<'_>, trust: &Trust) -> Option<Self> {
        let format = if layer.is_raw { LayerFormat::Raw } else { LayerFormat::Tar };
        let derived = Small::Index(index_key_of(&layer.descriptor.digest, format, layer.compression));
        let pin = match trust {
            Trust::Index { .. } => Pin::read(&layer.descriptor.annotations).ok().flatten(),
            Trust::Layer => None,
        };
        if let Some(pin) = pin {
            let blob = BlobId { digest: pin.digest, size: pin.size };
            let instead = vec![derived, Small::Blob(pin.head_digest), Small::Blob(pin.digest)];
            let bound = context.limits.max_inflated;
            let fits = pin.fits_one_of(layer.descriptor.size, format, layer.compression, bound);
            return (fits && pin.head_size <= LONGEST).then_some(Self { blob, len: pin.head_size, instead });
        }
        let may_be_attested = match trust {
            Trust::Index { referrers, repositories } => {
                !referrers.is_empty() || repositories.iter().any(|pattern| pattern.covers(&origin.repository))
            }
            Trust::Layer => false,
        };
        let blob = BlobId { digest: layer.descriptor.digest, size: layer.descriptor.size };
        let is_read = !layer.is_raw && !may_be_attested && context.verify != Verify::Listing && blob.size > 0;
        is_read.then(|| Self { blob, len: BEGINNING.min(blob.size), instead: vec![derived] })
    }
}

impl fmt::Debug for Begun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

impl Begun {
    /// Gives up what nobody has taken.
    pub(in crate::fetch) fn give_up(&self) {
        self.openings().clear();
    }

    fn openings(&self) -> MutexGuard<'_, HashMap<(BlobId, u64), Opening>> {
        self.openings.lock().unwrap_or_else(|held| held.into_inner())
    }
}

#[async_trait]
impl Source for Begun {
    fn name(&self) -> String {
        self.source.name()
    }

    async fn resolve(&self, tag: &str) -> Result<Digest, SourceError> {
        self.source.resolve(tag).await
    }

    async fn tagged(&self, tag: &str) -> Result<(Digest, Option<Unverified>), SourceError> {
        self.source.tagged(tag).await
    }

    async fn manifest(&self, digest: &Digest) -> Result<Unverified, SourceError> {
        self.source.manifest(digest).await
    }

    async fn blob(&self, blob: &BlobId, range: Range<u64>) -> Result<ByteStream, SourceError> {
        let opening = if range.start == 0 { self.openings().remove(&(*blob, range.end)) } else { None };
        if let Some(mut opening) = opening
            && let Ok(opened) = (&mut opening.0).await
        {
            return opened;
        }
        self.source.blob(blob, range).await
    }

    async fn tags(&self) -> Result<Vec<String>, SourceError> {
        self.source.tags().await
    }

    async fn referrers(&self, subject: &Digest, artifact_type: &str) -> Result<Vec<Digest>, SourceError> {
        self.source.referrers(subject, artifact_type).await
    }

    fn away(&self) -> Option<Away> {
        self.source.away()
    }
}
