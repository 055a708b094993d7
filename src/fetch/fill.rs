//! Fetching a layer whole: ordered stream → layer digest ∥ inflate → walk → chunk digests → staged files.
//!
//! Two blocking threads take the same bytes: one hashes the blob, one cuts it into files. When the digest holds, the
//! staged files become objects, readers are served, and the commit to disk follows in the background.
//! Where the digest fails, that is the error that is told, not what the damage did to the archive.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::sync::{mpsc, watch};

use super::listing::raw_entry;
use super::staged::StagedView;
use super::transfer::Transfer;
use super::{ArchiveError, Context, FetchError};
use crate::archive::chunk::{Chunker, Content};
use crate::archive::index::{Index, IndexEntry, LayerFacts, LayerFormat};
use crate::archive::inflate::{self, Inflater};
use crate::archive::stream::{Event, StreamWalker};
use crate::archive::walker::{Caps, Warning};
use crate::archive::{Entry, EntryKind};
use crate::cache::{Cache, CacheError, Sealed, StagedFile, StagedNumber, Staging};
use crate::digest::{Digest, Mismatch, ObjectDigest, Proof, StreamHasher};
use crate::modelkit::{Compression, Format, Layer};

/// Pieces in flight to each thread. The network gives them in 16 to 64 KiB, 4 MiB in all; a disk in 1 MiB, 64 MiB in all.
const QUEUE: usize = 64;
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

/// What a fill from one source ended with, other than success.
#[derive(Debug)]
pub enum Failure {
    /// The source's bytes are not the layer's.
    False(Mismatch),
    /// Anything else.
    Error(FetchError),
}

impl From<FetchError> for Failure {
    fn from(error: FetchError) -> Self {
        Self::Error(error)
    }
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
        let lost = || FetchError::Lost { what: self.what() };
        let (to_hash, mut hash_queue) = mpsc::channel::<Bytes>(QUEUE);
        let hasher = tokio::task::spawn_blocking(move || {
            let mut hasher = StreamHasher::new();
            while let Some(bytes) = hash_queue.blocking_recv() {
                hasher.update(&bytes);
            }
            hasher
        });
        let (to_cut, mut cut_queue) = mpsc::channel::<Bytes>(QUEUE);
        let mut cutter = Cutter::new(self, staging)?;
        let mut cutting = tokio::task::spawn_blocking(move || {
            while let Some(bytes) = cut_queue.blocking_recv() {
                cutter.feed(&bytes)?;
            }
            cutter.finish()
        });

        let mut feeding = std::pin::pin!(self.feed(transfer, to_hash, to_cut));
        // The cutter is waited for in any case: what it still has to do must not reach into the fill that comes next.
        let (fed, cut) = tokio::select! {
            biased;
            fed = &mut feeding => (fed, cutting.await),
            cut = &mut cutting => match cut {
                // What can't be staged need not be fetched.
                Ok(Err(CutError::Cache(error))) => return Err(FetchError::from(error).into()),
                // It stops at a broken archive too; whether the bytes were the layer's at all is still to be told.
                cut => (feeding.await, cut),
            },
        };
        let proof = match fed {
            Ok(()) => hasher.await.map_err(|_| lost())?.finish(&self.layer.digest).map_err(Failure::False),
            Err(error) => Err(error.into()),
        };
        match (proof, cut) {
            (Ok(proof), Ok(Ok(cut))) => self.seal(cut, &proof).map_err(Failure::Error),
            (Ok(_), Ok(Err(error))) => Err(self.broken(error).into()),
            (Ok(_), Err(_)) => Err(lost().into()),
            (Err(failure), cut) => {
                // It removes what was staged, which belongs on a thread that may wait for the disk.
                let _ = tokio::task::spawn_blocking(move || drop(cut)).await;
                Err(failure)
            }
        }
    }

    /// Hands the layer's bytes to both threads as they arrive.
    async fn feed(
        &self,
        transfer: &Transfer,
        to_hash: mpsc::Sender<Bytes>,
        to_cut: mpsc::Sender<Bytes>,
    ) -> Result<(), FetchError> {
        self.progress.send_replace(0);
        let mut stream = transfer.ordered();
        while let Some(piece) = stream.next().await {
            let bytes = piece?.peek().clone();
            let lost = |_| FetchError::Lost { what: self.what() };
            to_hash.send(bytes.clone()).await.map_err(lost)?;
            // A cutter that has stopped is not fed any more.
            let _ = to_cut.send(bytes).await;
        }
        Ok(())
    }

    fn seal(&self, cut: Cut, proof: &Proof) -> Result<(Index, Sealed), FetchError> {
        // Said here, as a cutter that was given up early ends in the same way.
        if let Some(warning) = cut.warning {
            tracing::warn!(layer = %self.layer.digest, "{warning}");
        }
        if let Some(stated) = self.layer.diff_id
            && stated != cut.diff_id
        {
            tracing::warn!(layer = %self.layer.digest, %stated, found = %cut.diff_id,
                "the kit states a wrong diffId; the layer's digest holds, so its content is served");
        }
        let sealed = cut.staging.seal(&self.context.cache, proof, cut.files);
        Ok((cut.index, sealed))
    }

    fn broken(&self, error: CutError) -> FetchError {
        match error {
            CutError::Archive(cause) => FetchError::Archive { layer: self.layer.digest, cause },
            CutError::Cache(error) => error.into(),
        }
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

/// Why a stream could not be cut into files.
#[derive(Debug, thiserror::Error)]
enum CutError {
    #[error(transparent)]
    Archive(ArchiveError),
    #[error(transparent)]
    Cache(#[from] CacheError),
}

impl<E: Into<ArchiveError>> From<E> for CutError {
    fn from(error: E) -> Self {
        Self::Archive(error.into())
    }
}

/// A layer cut into staged files, nothing proved yet.
struct Cut {
    staging: Staging,
    index: Index,
    files: Vec<(StagedNumber, ObjectDigest)>,
    diff_id: Digest,
    warning: Option<Warning>,
}

/// Cuts the ordered bytes of a blob into files.
struct Cutter {
    inflater: Inflater,
    files: Files,
    walker: Option<StreamWalker>,
    /// Hashes what was inflated; an uncompressed layer's diffId is its digest.
    hasher: Option<StreamHasher>,
    layer: Layer,
}

impl Cutter {
    fn new(fill: &Fill, staging: Staging) -> Result<Self, FetchError> {
        let layer = fill.layer.clone();
        let bound = match layer.compression {
            Compression::None => u64::MAX,
            Compression::Gzip | Compression::Zstd => {
                fill.context.limits.max_inflated.unwrap_or_else(|| inflate::max_inflated(layer.size))
            }
        };
        let inflater = Inflater::new(layer.compression, bound)
            .map_err(|error| FetchError::Archive { layer: layer.digest, cause: error.into() })?;
        let known_size = (layer.compression == Compression::None).then_some(layer.size);
        let walker = (layer.format == Format::Tar).then(|| StreamWalker::new(known_size, Caps::default()));
        let hasher = (layer.compression != Compression::None).then(StreamHasher::new);
        let mut files = Files { staging, open: None, entries: Vec::new(), done: Vec::new(), view: fill.view.clone() };
        if walker.is_none() {
            files.begin(raw_entry(0))?;
        }
        Ok(Self { inflater, files, walker, hasher, layer })
    }

    fn feed(&mut self, bytes: &[u8]) -> Result<(), CutError> {
        let Self { inflater, files, walker, hasher, .. } = self;
        inflater.feed(bytes, &mut |mut bytes: &[u8]| {
            if let Some(hasher) = hasher {
                hasher.update(bytes);
            }
            let Some(walker) = walker else { return files.content(bytes) };
            while let Some(event) = walker.next(&mut bytes)? {
                match event {
                    Event::Entry(entry) => files.begin(entry)?,
                    Event::Content(bytes) => files.content(bytes)?,
                    Event::EntryEnd => files.end(),
                }
            }
            Ok(())
        })
    }

    fn finish(self) -> Result<Cut, CutError> {
        let Self { inflater, mut files, walker, hasher, layer } = self;
        let inflated = inflater.finish()?;
        let warning = match walker {
            Some(walker) => walker.finish()?,
            None => {
                files.end();
                None
            }
        };
        let diff_id = hasher.map_or(layer.digest, StreamHasher::digest);
        let facts = LayerFacts {
            digest: layer.digest,
            size: layer.size,
            diff_id,
            inflated,
            format: LayerFormat::from(&layer.format),
            compression: layer.compression,
        };
        let index = Index::build(facts, files.entries)?;
        Ok(Cut { staging: files.staging, index, files: files.done, diff_id, warning })
    }
}

/// The files being staged: at most one open at a time.
struct Files {
    staging: Staging,
    open: Option<Open>,
    entries: Vec<IndexEntry>,
    done: Vec<(StagedNumber, ObjectDigest)>,
    view: Option<Arc<StagedView>>,
}

struct Open {
    entry: Entry,
    file: StagedFile,
    chunker: Chunker,
    written: u64,
}

impl Files {
    fn begin(&mut self, entry: Entry) -> Result<(), CacheError> {
        if entry.kind == EntryKind::File {
            let file = self.staging.create()?;
            self.open = Some(Open { entry, file, chunker: Chunker::new(), written: 0 });
        } else {
            self.entries.push(IndexEntry { entry, content: None });
        }
        Ok(())
    }

    fn content(&mut self, bytes: &[u8]) -> Result<(), CutError> {
        let Some(open) = &mut self.open else { return Ok(()) };
        open.chunker.update(bytes);
        open.file.write_at(bytes, open.written)?;
        open.written += bytes.len() as u64;
        if let Some(view) = &self.view {
            view.publish(&open.entry.path, open.file.path(), open.written);
        }
        Ok(())
    }

    fn end(&mut self) {
        let Some(Open { mut entry, file, chunker, .. }) = self.open.take() else { return };
        let content: Content = chunker.finish();
        entry.size = content.size;
        self.done.push((file.close(), content.object));
        self.entries.push(IndexEntry { entry, content: Some(content) });
    }
}

/// Sources that gave false bytes for a layer, and whether the layer itself is refused. In memory, per mount.
#[derive(Debug, Default)]
pub struct Poison {
    /// Positions of sources that are not asked again.
    pub sources: HashSet<usize>,
    /// Why nothing of the layer is served any more.
    pub layer: Option<String>,
}
