//! Fetching a layer whole: a [`pass`](mod@pass) over all of it, its files staged.
//!
//! When the digest holds, the staged files become objects, readers are served, and the commit to disk follows in the
//! background. One process fills a layer at a time; the others wait as long as it makes progress, and one of them goes on
//! if it ends. A fill goes on from what an earlier one has left. If what comes of that is not the layer, nobody knows whose
//! fault it is: nobody is blamed, and the layer is fetched from its beginning.
//!
//! Where there is no room for the files, the layer is read for its index alone, by which its files are read in parts
//! afterwards: the wire is paid twice.
//!
//! - [`mod@pass`]: a whole layer read once, and hashed; [`cut`]: cut into files; [`stage`]: those on their way to the disk.
//! - [`replay`]: what an interrupted fill has left.
//! - `staged`: what one has written so far, for `--verify=stream`.

pub mod cut;
pub mod pass;
pub mod replay;
pub mod stage;
pub(super) mod staged;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use tokio::sync::{mpsc, watch};

use super::transfer::Transfer;
use super::{Context, FetchError};
use crate::archive::index::{Index, LayerFormat};
use crate::cache::{Cache, CacheError, Sealed, Staging};
use crate::digest::Digest;
use crate::modelkit::{Compression, Layer};
use crate::object::ObjectDigest;
use pass::{Failure, Passed, Staged, pass};
use replay::{Replay, Unusable};
use stage::Files;
use staged::{StagedView, Unstaged};

/// A fill above this size is announced in the log with its remedy.
const ANNOUNCED: u64 = 1 << 30;
/// What a fill is guessed to run at before one was measured, in bytes a second.
const GUESSED_RATE: u64 = 100 << 20;
/// How often a process looks whether another has finished the fill that it waits for.
const POLL: Duration = Duration::from_millis(100);
/// A look at as many files as a layer may have takes its time; so many times as long is not looked again.
const REST: u32 = 10;
/// A fill in another process that stages nothing for so long is not waited for.
const STALE: Duration = Duration::from_secs(20);
/// Nor is one of which nothing is heard for so many read timeouts, once it has only the disk to wait for. All that a machine
/// holds in memory for a disk is on it in minutes; and a process may be stopped.
const SEALED: u32 = 5;

/// Counted up when the walker reads the same bytes differently, so that older derived indexes are not found any more.
const WALKER_VERSION: u32 = 2;

/// Fills below this size tell how long a request takes, not how many bytes a second come.
const TELLING: u64 = 64 << 20;

/// The rate of the last fill that was large enough to tell, in bytes a second; 0 before the first.
static RATE: AtomicU64 = AtomicU64::new(0);

/// The key of a layer's derived index: what the same bytes mean depends on how they are read.
pub fn index_key(layer: &Layer) -> Digest {
    index_key_of(&layer.digest, LayerFormat::from(&layer.format), layer.compression)
}

/// The same by what it depends on.
pub fn index_key_of(layer: &Digest, format: LayerFormat, compression: Compression) -> Digest {
    Digest::of(format!("{layer} {format:?} {compression:?} walker {WALKER_VERSION}").as_bytes())
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
    /// How many bytes an interrupted fetch has left to this one, for those who watch.
    pub resumed: Arc<AtomicU64>,
    /// Where staged bytes are shown, if anybody may see them.
    pub view: Option<Arc<StagedView>>,
    /// Whether its index is enough to read it in parts.
    pub in_parts: bool,
    /// Told when its files can't be staged.
    pub unstaged: Arc<Unstaged>,
    /// Told of the index again once the cache keeps it.
    pub kept: mpsc::UnboundedSender<Arc<Index>>,
}

/// Whose turn it is.
enum Turn {
    /// Ours, if there is room for as much as a directory; with the index, if that is known.
    Ours(Result<Staging, CacheError>, Option<Arc<Index>>),
    Done(Arc<Index>),
}

/// An attempt that failed.
struct Failed {
    failure: Failure,
    /// Whether some of the bytes were left by an earlier one.
    resumed: bool,
}

impl<E: Into<Failure>> From<E> for Failed {
    fn from(error: E) -> Self {
        Self { failure: error.into(), resumed: false }
    }
}

impl Failed {
    /// Whether what an earlier fill has left may be at fault.
    fn may_be_ours(&self) -> bool {
        self.resumed && matches!(self.failure, Failure::False(..) | Failure::Error(FetchError::Cache(_)))
    }
}

impl Fill {
    fn key(&self) -> Digest {
        index_key(&self.layer)
    }

    fn what(&self) -> String {
        format!("layer {}", self.layer.digest)
    }

    /// Whether all that an index names is in the cache.
    async fn is_complete(&self, index: &Arc<Index>) -> Result<bool, FetchError> {
        let index = index.clone();
        let complete = move |cache: &Cache| {
            let here = |object: Option<ObjectDigest>, size| object.is_none_or(|name| cache.has_object(&name, size));
            Ok(index.head().rows().all(|row| here(row.object(), row.size())))
        };
        self.context.blocking(&self.what(), complete).await
    }

    /// Fetches the layer from one source, unless another process has done so or does so first.
    pub async fn run(&self, transfer: &Transfer) -> Result<Arc<Index>, Failure> {
        let failed = match self.attempt(transfer, true).await {
            Err(failed) if failed.may_be_ours() => failed,
            outcome => return outcome.map_err(|failed| failed.failure),
        };
        let why = match &failed.failure {
            Failure::False(mismatch, _) => mismatch.to_string(),
            Failure::Error(error) => crate::report::chain(error),
        };
        tracing::warn!(layer = %self.layer.digest, %why, "what an interrupted fetch left can't be used; fetching the layer from its beginning");
        self.attempt(transfer, false).await.map_err(|failed| failed.failure)
    }

    async fn attempt(&self, transfer: &Transfer, resumes: bool) -> Result<Arc<Index>, Failed> {
        let (staging, known) = match self.turn().await? {
            Turn::Done(index) => return Ok(index),
            Turn::Ours(staging, known) => (staging, known),
        };
        let (files, replay, no_directory) = match staging {
            Ok(staging) => {
                let (files, replay) = self.place(staging, known.as_ref(), resumes).await?;
                (Some(files), replay, None)
            }
            Err(why) => (None, None, Some(why)),
        };
        let no_room = no_directory.as_ref().or_else(|| files.as_ref()?.no_room.as_ref());
        if let (Some(why), Some(index)) = (no_room, &known) {
            self.unstaged.note(&self.layer, why);
            return Ok(index.clone());
        }
        let started = Instant::now();
        let from = replay.as_ref().map_or(0, |replay| replay.reached().offset);
        self.resumed.store(from, Ordering::Relaxed);
        let passed = self.pass(transfer, files, replay).await;
        if let Some(view) = &self.view {
            view.clear();
        }
        let Passed { index, proof, staged } = match (passed, known) {
            (Err(Failure::Error(FetchError::Cache(why))), Some(index)) if why.is_full() => {
                self.unstaged.note(&self.layer, &why);
                return Ok(index);
            }
            (passed, _) => passed.map_err(|failure| Failed { failure, resumed: from > 0 })?,
        };
        let (elapsed, fetched) = (started.elapsed().as_secs_f64().max(0.001), self.layer.size - from);
        if fetched >= TELLING {
            RATE.store((fetched as f64 / elapsed) as u64, Ordering::Relaxed);
        }
        tracing::info!(layer = %self.layer.digest, size = self.layer.size, seconds = elapsed, "layer verified");
        let index = Arc::new(index);
        let (staging, why) = match staged {
            Staged::All { staging, files } => {
                self.unstaged.clear();
                self.commit(staging.seal(&self.context.cache, &proof, files), &index);
                return Ok(index);
            }
            Staged::NoRoom { staging, why } => (Some(staging), Some(why)),
            Staged::Nowhere => (None, no_directory),
        };
        if let Some(why) = &why {
            self.unstaged.note(&self.layer, why);
        }
        self.keep_index(&index, staging).await?;
        let key = self.key();
        Ok(self.context.blocking(&self.what(), move |cache| Ok(at_rest(cache, &key, index))).await?)
    }

    /// Gets the layer's staging directory, or what another process made of it.
    async fn turn(&self) -> Result<Turn, FetchError> {
        let (key, what) = (self.key(), self.what());
        let (mut seen, mut moved) = (None, Instant::now());
        loop {
            let looked = Instant::now();
            match self.context.blocking(&what, move |cache| cache.stage(&key)).await {
                Ok(Some(staging)) => return self.ours(Ok(staging), seen.is_some()).await,
                Ok(None) => {}
                Err(FetchError::Cache(why)) if why.is_full() => return self.ours(Err(why), seen.is_some()).await,
                Err(error) => return Err(error),
            }
            let staged = self.context.blocking(&what, move |cache| Ok(cache.staged(&key))).await?;
            let read_timeout = self.context.limits.read_timeout;
            if seen != Some(staged) {
                (seen, moved) = (Some(staged), Instant::now());
                self.progress.send_replace(staged.bytes);
            }
            // A fill that is sealed has only the disk to wait for, and nobody is quicker by starting over.
            let patience = if staged.sealed { read_timeout * SEALED } else { STALE.min(read_timeout / 2) };
            if moved.elapsed() <= patience {
                self.progress.send_modify(|_| {});
            } else {
                let alone = self.context.blocking(&what, move |cache| cache.stage_alone(&key)).await?;
                if let Some(staging) = alone {
                    return self.ours(Ok(staging), true).await;
                }
            }
            tokio::time::sleep(POLL.max(looked.elapsed() * REST)).await;
        }
    }

    /// Looks whether there is anything to do, now that nobody else is at it.
    async fn ours(&self, staging: Result<Staging, CacheError>, has_waited: bool) -> Result<Turn, FetchError> {
        let Some(index) = known_index(&self.layer, &self.context).await? else { return Ok(Turn::Ours(staging, None)) };
        // Another process has made at least the index, and where it had no room for more, we have none either.
        let is_enough = has_waited && self.in_parts;
        if !is_enough && !self.is_complete(&index).await? {
            return Ok(Turn::Ours(staging, Some(index)));
        }
        self.context.off_thread(&self.what(), move || staging.map(Staging::discard)).await?.ok();
        Ok(Turn::Done(index))
    }

    /// Makes the staging directory ready: with what an earlier fill has left in it, or empty, if there is room for the
    /// layer.
    async fn place(
        &self,
        mut staging: Staging,
        known: Option<&Arc<Index>>,
        resumes: bool,
    ) -> Result<(Files, Option<Replay>), FetchError> {
        let (layer, cache, view) = (self.layer.clone(), self.context.cache.clone(), self.view.clone());
        let wanted = known.map_or(layer.size, |index| index.head().rows().map(|row| row.size()).sum());
        let wants_index = known.is_none();
        let place = move |all: &Cache| {
            let beside = replay::beside(&layer);
            let replay = if resumes { left(&layer, &mut staging) } else { None };
            let mut files = Files { cache, staging, view, resumed: 0, wants_index, no_room: None };
            if let Some(replay) = &replay {
                files.resumed = replay.reached().offset;
            } else {
                files.staging.begin(beside)?;
                match all.make_room(wanted) {
                    Err(why) if why.is_full() => {
                        files.staging.clear();
                        files.no_room = Some(why);
                    }
                    made => made?,
                }
            }
            Ok((files, replay))
        };
        self.context.blocking(&self.what(), place).await
    }

    /// Reads the layer: first what is there, then the rest from its source.
    async fn pass(&self, transfer: &Transfer, files: Option<Files>, replay: Option<Replay>) -> Result<Passed, Failure> {
        self.progress.send_replace(0);
        let bytes = match replay {
            None => transfer.ordered(),
            Some(replay) => {
                let at = replay.reached().offset;
                // Asked first: to read again what is left is in vain where the rest is not to be had.
                if at < self.layer.size
                    && let Err(error) = transfer.range(at..at + 1).await
                    && !error.ignores_ranges()
                {
                    self.context.off_thread(&self.what(), || drop(files)).await?;
                    return Err(error.into());
                }
                let shown = crate::units::format_size(at);
                tracing::info!(layer = %self.layer.digest, offset = at, "fetching the layer is resumed at {shown}");
                replay.stream(self.progress.clone()).chain(transfer.ordered_from(at)).boxed()
            }
        };
        pass(&self.layer, self.context.limits.max_inflated, bytes, files).await
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

    /// Makes the objects durable behind the readers' backs.
    fn commit(&self, sealed: Sealed, index: &Arc<Index>) {
        let (cache, key, index, kept) = (self.context.cache.clone(), self.key(), index.clone(), self.kept.clone());
        tokio::task::spawn_blocking(move || {
            if let Err(error) = sealed.commit(&cache, &key, index.as_bytes()) {
                error.unless_full(|error| {
                    tracing::error!(%error, "the cache did not keep all of a verified layer; it will be fetched again");
                });
            }
            // Nobody hears it where the layer is gone.
            let _ = kept.send(at_rest(&cache, &key, index));
        });
    }

    /// Keeps the index of a layer that there is no room for, before others may look for it.
    async fn keep_index(&self, index: &Arc<Index>, staging: Option<Staging>) -> Result<(), FetchError> {
        let (key, index) = (self.key(), index.clone());
        let keep = move |cache: &Cache| {
            cache.keep_index(&key, index.as_bytes()).unwrap_or_else(|error| {
                error.unless_full(|error| tracing::warn!(%error, "the index was not kept; it will be derived again"));
            });
            drop(staging);
            Ok(())
        };
        self.context.blocking(&self.what(), keep).await
    }
}

/// The derived index of a layer, if an earlier fill left one.
pub async fn known_index(layer: &Layer, context: &Context) -> Result<Option<Arc<Index>>, FetchError> {
    let key = index_key(layer);
    // Decoded there too: the index of a million files takes seconds.
    let bound = context.limits.max_inflated;
    let decode = move |cache: &Cache| Ok(cache.index(&key)?.map(|bytes| Index::decode(bytes, bound)));
    // Never closed.
    let _turn = context.looks.acquire().await;
    let Some(decoded) = context.blocking(&format!("layer {}", layer.digest), decode).await? else { return Ok(None) };
    match decoded {
        Ok(index) if index.head().layer().fit(layer) => Ok(Some(Arc::new(index))),
        // Not of this layer, or of a form we don't read: as good as absent, and the next fill replaces it.
        Ok(_) => Ok(None),
        Err(error) => {
            tracing::warn!(layer = %layer.digest, %error, "derived index ignored");
            Ok(None)
        }
    }
}

/// An index where the cache keeps it, mapped if it is long, so that it takes no memory of ours for as long as the mount
/// lives; else the one that was given. Blocks.
pub fn at_rest(cache: &Cache, key: &Digest, index: Arc<Index>) -> Arc<Index> {
    let kept = cache.index(key).ok().flatten();
    kept.and_then(|bytes| index.moved(bytes)).map_or(index, Arc::new)
}

/// Goes on with what an earlier fill has left, if that can be used. Blocks.
fn left(layer: &Layer, staging: &mut Staging) -> Option<Replay> {
    let beside = replay::beside(layer);
    let found = staging.left(beside).map_err(Unusable::from);
    let found = found.and_then(|left| left.map_or(Ok(None), |left| Replay::survey(layer, left)));
    let taken = found.and_then(|found| {
        if let Some(replay) = &found {
            staging.go_on(beside, &replay.reached())?;
        }
        Ok(found)
    });
    taken.unwrap_or_else(|error| {
        tracing::info!(layer = %layer.digest, %error, "what an interrupted fetch left can't be used");
        None
    })
}
