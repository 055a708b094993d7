//! Kits that are written: with the indexes of their layers (`kitfs index`), or as they are under other tags (`kitfs tag`).
//!
//! - [`derive()`] has the index of each layer made, or found in the cache where an earlier run left it.
//! - `manifest`, over `fields`: what is to be written, decided without I/O: an [`Edition`].
//! - [`copy`](mod@copy): a kit as it is, for another repository.
//! - [`moves`]: which tags may be moved, decided without I/O.
//! - [`write`](mod@write): writes it.
//!
//! Invariants: the config and the layers stay as they are, bit for bit, and are not moved where they need not be. Nothing is
//! tagged before all that it names is there, so whoever finds a tag finds the kit whole, and a run that was ended in the
//! middle is gone on with by the next. All that is made is canonical: a second run writes nothing.

pub mod copy;
mod fields;
mod manifest;
pub mod moves;
pub mod write;

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::{StreamExt as _, TryStreamExt as _};

use crate::archive::index::Index;
use crate::archive::index::annotations::Pin;
use crate::digest::Digest;
use crate::fetch::fill::index_key;
use crate::fetch::{FILLS, FetchError, Kit, LayerFetch, Resolved};
use crate::modelkit::Layer;
use crate::modelkit::manifest::MAX_MANIFEST;
use crate::source::SourceError;
use crate::units::format_size;

pub use manifest::Document;
pub use write::{Blob, Tally, Writer};

/// A layer of the kit itself, and its index.
#[derive(Debug, Clone)]
pub struct Indexed {
    /// The layer.
    pub layer: Layer,
    /// Its index.
    pub index: Arc<Index>,
    /// What names the index.
    pub pin: Pin,
}

/// What is to be written: a kit, and what keeps its indexes.
#[derive(Debug)]
pub struct Edition {
    /// The kit's manifest.
    pub kit: Document,
    /// The referrer that keeps the indexes; none where there are none.
    pub referrer: Option<Document>,
    /// The indexed layers, each once.
    pub layers: Vec<Indexed>,
}

/// Why a kit could not be indexed, or not be written.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A layer gave no index.
    #[error("{label} can't be indexed{}", remedy(cause))]
    Layer {
        /// The layer's Kitfile entry.
        label: String,
        /// What is wrong.
        #[source]
        cause: Box<FetchError>,
    },
    /// A blob that is to be copied can't be read.
    #[error("{what} can't be copied")]
    Copy {
        /// The blob.
        what: String,
        /// The last source's error.
        #[source]
        cause: Box<FetchError>,
    },
    /// The target refused or failed.
    #[error("{what} can't be written to {target}{}", permission(cause))]
    Write {
        /// The blob, manifest or tag.
        what: String,
        /// The repository.
        target: String,
        /// Its error.
        #[source]
        cause: SourceError,
    },
    /// The target made no progress.
    #[error("{what} can't be written")]
    Stalled {
        /// The blob, manifest or tag.
        what: String,
        /// What was waited for.
        #[source]
        cause: Box<FetchError>,
    },
    /// The tag is in use.
    #[error(
        "{reference} is {found}, and would become {made}: run again with --replace to move the tag (nothing is read twice), or \
         choose another tag"
    )]
    TagTaken {
        /// The tag.
        reference: String,
        /// What it points at.
        found: Digest,
        /// What it would point at.
        made: Digest,
    },
    /// A tag was written, and leads elsewhere.
    #[error(
        "{reference} was written as {put}, and now {}: somebody else moved it in the same moment, or the registry keeps an \
         old answer; look again with `kitfs resolve`",
        found.map_or_else(|| "there is no such tag".to_owned(), |found| format!("it is {found}"))
    )]
    NotThere {
        /// The tag.
        reference: String,
        /// What was written.
        put: Digest,
        /// What it leads to.
        found: Option<Digest>,
    },
    /// An image index that lists an image index.
    #[error("{digest} is an image index within an image index, which holds no kits")]
    Nested {
        /// The inner one.
        digest: Digest,
    },
    /// The manifest would be larger than registries accept.
    #[error("with its annotations the manifest has {}; registries accept at most {}", format_size(*size), format_size(MAX_MANIFEST))]
    TooLarge {
        /// Its size.
        size: u64,
    },
    /// The manifest is not of the shape that it had when it was read.
    #[error("the manifest can't be rewritten")]
    Json(#[from] serde_json::Error),
}

fn remedy(cause: &FetchError) -> &'static str {
    match cause.root() {
        FetchError::Archive { .. } => " as it is broken, and a mount could not read it either; pack the kit again",
        FetchError::Digest { .. } | FetchError::Poisoned { .. } => {
            " as it is damaged where it lies; push the kit again"
        }
        _ => "",
    }
}

fn permission(cause: &SourceError) -> &'static str {
    match cause {
        SourceError::Forbidden { .. } | SourceError::Unauthorized { .. } | SourceError::Refused { status: 405, .. } => {
            "; to write there, log in as a user who may push, or name another repository as DST"
        }
        _ => "",
    }
}

/// The indexes of the kit's own layers, in the manifest's order; those of its parents are theirs to index.
pub async fn derive(kit: &Kit) -> Result<Vec<Indexed>, PublishError> {
    let mut distinct = HashMap::new();
    let own = kit.layers.iter().filter(|fetch| fetch.layer.kit == 0);
    let first: Vec<_> = own.filter(|fetch| distinct.insert(index_key(&fetch.layer), ()).is_none()).cloned().collect();
    futures_util::stream::iter(first.into_iter().map(index_of)).buffered(FILLS).try_collect().await
}

async fn index_of(fetch: Arc<LayerFetch>) -> Result<Indexed, PublishError> {
    let failed = |cause| PublishError::Layer { label: fetch.layer.label(), cause: Box::new(cause) };
    let index = fetch.derive().await.map_err(failed)?;
    let named = index.clone();
    // Hashing the index of a million files takes a tenth of a second.
    let pin = tokio::task::spawn_blocking(move || named.pin()).await;
    let pin = pin.map_err(|_| failed(FetchError::Lost { what: "an index".to_owned() }))?;
    Ok(Indexed { layer: fetch.layer.clone(), index, pin })
}

impl Edition {
    /// The kit with its indexes named in its manifest, and these annotations added: another manifest, another digest.
    pub fn pinned(resolved: &Resolved, layers: Vec<Indexed>, added: &[(String, String)]) -> Result<Self, PublishError> {
        let pins = pins(resolved, &layers);
        let kit = Document::with_indexes(resolved.digest, &resolved.document, &pins, added)?;
        Self::kept(kit, resolved, layers, &pins)
    }

    /// The kit as it is, with its indexes beside it.
    pub fn beside(resolved: &Resolved, layers: Vec<Indexed>) -> Result<Self, PublishError> {
        let pins = pins(resolved, &layers);
        let kit = Document::unchanged(resolved.digest, &resolved.manifest)?;
        Self::kept(kit, resolved, layers, &pins)
    }

    fn kept(
        kit: Document,
        resolved: &Resolved,
        layers: Vec<Indexed>,
        pins: &[Option<Pin>],
    ) -> Result<Self, PublishError> {
        let described = resolved.document.layers.iter().zip(pins);
        let named: Vec<_> = described.filter_map(|(layer, pin)| Some((layer.digest, (*pin)?))).collect();
        let referrer = Document::referrer(&kit, &named)?;
        Ok(Self { kit, referrer, layers })
    }
}

/// The index of each layer that the manifest lists. One digest may be listed twice, and be read in two ways.
fn pins(resolved: &Resolved, indexed: &[Indexed]) -> Vec<Option<Pin>> {
    let by_key: HashMap<Digest, Pin> = indexed.iter().map(|found| (index_key(&found.layer), found.pin)).collect();
    let own = resolved.plan.layers.iter().filter(|layer| layer.kit == 0);
    let planned: HashMap<_, _> =
        own.map(|layer| ((layer.digest, layer.media_type.as_str()), index_key(layer))).collect();
    let described = resolved.document.layers.iter();
    described.map(|layer| by_key.get(planned.get(&(layer.digest, layer.media_type.as_str()))?).copied()).collect()
}
