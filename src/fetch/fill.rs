//! Fetching a layer whole: a [`pass`](super::pass) over all of it, its files staged.
//!
//! When the digest holds, the staged files become objects, readers are served, and the commit to disk follows in the
//! background. One process fills a layer at a time; the others wait as long as it makes progress.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::pass::{Failure, Files, Passed, pass};
use super::staged::StagedView;
use super::transfer::Transfer;
use super::{Context, FetchError};
use crate::archive::index::{Index, LayerFormat};
use crate::cache::{Cache, Sealed, Staging};
use crate::digest::Digest;
use crate::modelkit::Layer;
use crate::object::ObjectDigest;

/// A fill above this size is announced in the log with its remedy.
const ANNOUNCED: u64 = 1 << 30;
/// What a fill is guessed to run at before one was measured, in bytes a second.
const GUESSED_RATE: u64 = 100 << 20;
/// How often a process looks whether another has finished the fill that it waits for.
const POLL: Duration = Duration::from_millis(100);
/// A fill in another process that stages nothing for so long is not waited for.
const STALE: Duration = Duration::from_secs(20);

/// Counted up when the walker reads the same bytes differently, so that older derived indexes are not found any more.
const WALKER_VERSION: u32 = 2;

/// Fills below this size tell how long a request takes, not how many bytes a second come.
const TELLING: u64 = 64 << 20;

/// The rate of the last fill that was large enough to tell, in bytes a second; 0 before the first.
static RATE: AtomicU64 = AtomicU64::new(0);

/// The key of a layer's derived index: what the same bytes mean depends on how they are read.
pub fn index_key(layer: &Layer) -> Digest {
    let format = LayerFormat::from(&layer.format);
    Digest::of(format!("{} {format:?} {:?} walker {WALKER_VERSION}", layer.digest, layer.compression).as_bytes())
}

/// A fill of one layer.
#[derive(Debug)]
pub struct Fill {
    /// The layer.
    pub layer: Layer,
    /// Cache and limits.
    pub context: Context,
    /// Bytes received so far, for those who wait and those who watch.
    pub progress: watch::Sender<u64>,
    /// Where staged bytes are shown, if anybody may see them.
    pub view: Option<Arc<StagedView>>,
}

/// Whose turn it is.
enum Turn {
    Ours(Staging),
    Done(Arc<Index>),
}

impl Fill {
    fn key(&self) -> Digest {
        index_key(&self.layer)
    }

    fn what(&self) -> String {
        format!("layer {}", self.layer.digest)
    }

    /// The derived index of the layer, if an earlier fill left one.
    pub async fn known_index(&self) -> Result<Option<Arc<Index>>, FetchError> {
        let key = self.key();
        // Decoded there too: the index of a million files takes seconds.
        let bound = self.context.limits.max_inflated;
        let decode = move |cache: &Cache| Ok(cache.index(&key)?.map(|bytes| Index::decode(bytes, bound)));
        let Some(decoded) = self.context.blocking(&self.what(), decode).await? else { return Ok(None) };
        match decoded {
            Ok(index) if index.head().layer().fit(&self.layer) => Ok(Some(Arc::new(index))),
            // Not of this layer, or of a form we don't read: as good as absent, and the next fill replaces it.
            Ok(_) => Ok(None),
            Err(error) => {
                tracing::warn!(layer = %self.layer.digest, %error, "derived index ignored");
                Ok(None)
            }
        }
    }

    /// The derived index, if all that it names is in the cache too.
    async fn complete_index(&self) -> Result<Option<Arc<Index>>, FetchError> {
        let Some(index) = self.known_index().await? else { return Ok(None) };
        let all = index.clone();
        let what = self.what();
        let complete = self.context.blocking(&what, move |cache| {
            let here = |object: Option<ObjectDigest>, size| object.is_none_or(|name| cache.has_object(&name, size));
            Ok(all.head().rows().all(|row| here(row.object(), row.size())))
        });
        Ok(complete.await?.then_some(index))
    }

    /// Fetches the layer from one source, unless another process has done so or does so first.
    pub async fn run(&self, transfer: &Transfer) -> Result<Arc<Index>, Failure> {
        let staging = match self.turn().await? {
            Turn::Done(index) => return Ok(index),
            Turn::Ours(staging) => staging,
        };
        let started = Instant::now();
        let outcome = self.stage(transfer, staging).await;
        if let Some(view) = &self.view {
            view.clear();
        }
        let (index, sealed) = outcome?;
        let elapsed = started.elapsed().as_secs_f64().max(0.001);
        if self.layer.size >= TELLING {
            RATE.store((self.layer.size as f64 / elapsed) as u64, Ordering::Relaxed);
        }
        tracing::info!(layer = %self.layer.digest, size = self.layer.size, seconds = elapsed, "layer verified");
        let index = Arc::new(index);
        self.commit(sealed, &index);
        Ok(index)
    }

    /// Gets the layer's staging directory, or what another process made of it.
    async fn turn(&self) -> Result<Turn, FetchError> {
        let (key, what) = (self.key(), self.what());
        let (mut seen, mut moved) = (0, Instant::now());
        loop {
            if let Some(staging) = self.context.blocking(&what, move |cache| cache.stage(&key)).await? {
                return Ok(match self.complete_index().await? {
                    Some(index) => Turn::Done(index),
                    None => Turn::Ours(staging),
                });
            }
            let staged = self.context.blocking(&what, move |cache| Ok(cache.staged(&key))).await?;
            // A fill that is sealed has only the disk to wait for, and nobody is quicker by starting over.
            if staged.bytes != seen || staged.sealed {
                (seen, moved) = (staged.bytes, Instant::now());
                self.progress.send_replace(staged.bytes);
            }
            if moved.elapsed() > STALE.min(self.context.limits.read_timeout / 2) {
                let alone = self.context.blocking(&what, move |cache| cache.stage_alone(&key)).await?;
                if let Some(staging) = alone {
                    return Ok(Turn::Ours(staging));
                }
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Says that a big layer is fetched whole, how long that may take, and what would spare it.
    pub fn announce(&self) {
        let Layer { digest, size, .. } = &self.layer;
        if *size <= ANNOUNCED {
            tracing::debug!(layer = %digest, size, "fetching the layer whole");
            return;
        }
        let rate = match RATE.load(Ordering::Relaxed) {
            0 => GUESSED_RATE,
            rate => rate,
        };
        let (shown, estimate) = (crate::units::format_size(*size), Duration::from_secs(size / rate));
        tracing::info!(
            layer = %digest,
            "fetching {shown} before anything in this layer can be read, about {} at {}/s; \
             a kit made with `kitfs index` is read in parts",
            crate::units::format_duration(estimate),
            crate::units::format_size(rate),
        );
    }

    async fn stage(&self, transfer: &Transfer, staging: Staging) -> Result<(Index, Sealed), Failure> {
        self.progress.send_replace(0);
        let files = Files { cache: self.context.cache.clone(), staging, view: self.view.clone() };
        let bound = self.context.limits.max_inflated;
        let Passed { index, proof, staged } = pass(&self.layer, bound, transfer.ordered(), Some(files)).await?;
        let Some((staging, files)) = staged else { return Err(FetchError::Lost { what: self.what() }.into()) };
        Ok((index, staging.seal(&self.context.cache, &proof, files)))
    }

    /// Makes the objects durable behind the readers' backs.
    fn commit(&self, sealed: Sealed, index: &Arc<Index>) {
        let (cache, key, index) = (self.context.cache.clone(), self.key(), index.clone());
        tokio::task::spawn_blocking(move || {
            if let Err(error) = sealed.commit(&cache, &key, index.as_bytes()) {
                tracing::error!(%error, "the cache did not keep a verified layer; it will be fetched again");
            }
        });
    }
}
