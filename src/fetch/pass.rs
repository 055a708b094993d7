//! One pass over a layer's bytes, in order: layer digest ∥ inflate → walk → chunk digests → index; and, where there is a
//! staging directory, the files.
//!
//! Two blocking threads take the same bytes: one hashes the blob, one cuts it into files. Where the digest fails, that
//! is the error that is told, not what the damage did to the archive.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use tokio::sync::mpsc;

use super::listing::raw_entry;
use super::staged::StagedView;
use super::{ArchiveError, FetchError};
use crate::archive::chunk::{Chunker, Content};
use crate::archive::index::{Index, IndexEntry, LayerFacts, LayerFormat};
use crate::archive::inflate::{self, Inflater};
use crate::archive::stream::{Event, StreamWalker};
use crate::archive::walker::{Caps, Warning};
use crate::archive::{Entry, EntryKind};
use crate::cache::{Cache, CacheError, StagedFile, StagedNumber, Staging};
use crate::digest::{Digest, Mismatch, Proof, StreamHasher, Unverified};
use crate::modelkit::{Compression, Format, Layer};
use crate::object::ObjectDigest;

/// Pieces in flight to each thread. The network gives them in 16 to 64 KiB, 4 MiB in all; a disk in 1 MiB, 64 MiB in all.
const QUEUE: usize = 64;

/// The bytes of a blob in order.
pub type Ordered = BoxStream<'static, Result<Unverified, FetchError>>;

/// Where the files of a layer go while it is read.
#[derive(Debug)]
pub struct Files {
    /// The cache that they go to.
    pub cache: Arc<Cache>,
    /// Where they are staged.
    pub staging: Staging,
    /// Where staged bytes are shown, if anybody may see them.
    pub view: Option<Arc<StagedView>>,
}

/// What a pass found.
#[derive(Debug)]
pub struct Passed {
    /// What the layer holds.
    pub index: Index,
    /// That its digest held.
    pub proof: Proof,
    /// The staged files, where there was a place for them.
    pub staged: Option<(Staging, Vec<(StagedNumber, ObjectDigest)>)>,
}

/// What a pass ended with, other than success.
#[derive(Debug)]
pub enum Failure {
    /// The bytes are not the layer's; and what they hold, where that is anything.
    False(Mismatch, Option<Box<Index>>),
    /// Anything else.
    Error(FetchError),
}

impl From<FetchError> for Failure {
    fn from(error: FetchError) -> Self {
        Self::Error(error)
    }
}

/// Reads a layer. `max_inflated` as in [`super::Limits`].
pub async fn pass(
    layer: &Layer,
    max_inflated: Option<u64>,
    bytes: Ordered,
    files: Option<Files>,
) -> Result<Passed, Failure> {
    let lost = || FetchError::Lost { what: format!("layer {}", layer.digest) };
    let (to_hash, mut hash_queue) = mpsc::channel::<Bytes>(QUEUE);
    let hasher = tokio::task::spawn_blocking(move || {
        let mut hasher = StreamHasher::new();
        while let Some(bytes) = hash_queue.blocking_recv() {
            hasher.update(&bytes);
        }
        hasher
    });
    let (to_cut, mut cut_queue) = mpsc::channel::<Bytes>(QUEUE);
    let mut cutter = Cutter::new(layer.clone(), max_inflated, files)?;
    let mut cutting = tokio::task::spawn_blocking(move || {
        while let Some(bytes) = cut_queue.blocking_recv() {
            cutter.feed(&bytes)?;
        }
        cutter.finish()
    });

    let mut feeding = std::pin::pin!(feed(layer, bytes, to_hash, to_cut));
    // The cutter is waited for in any case: what it still has to do must not reach into the pass that comes next.
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
        Ok(()) => {
            hasher.await.map_err(|_| lost())?.finish(&layer.digest).map_err(|mismatch| Failure::False(mismatch, None))
        }
        Err(error) => Err(error.into()),
    };
    match (proof, cut) {
        (Ok(proof), Ok(Ok(cut))) => Ok(cut.proved(layer, proof)),
        (Ok(_), Ok(Err(error))) => Err(error.into_fetch_error(layer).into()),
        (Ok(_), Err(_)) => Err(lost().into()),
        (Err(failure), cut) => {
            // It removes what was staged, which belongs on a thread that may wait for the disk.
            let held = tokio::task::spawn_blocking(move || Some(Box::new(cut.ok()?.ok()?.index))).await;
            Err(match failure {
                Failure::False(mismatch, _) => Failure::False(mismatch, held.ok().flatten()),
                error @ Failure::Error(_) => error,
            })
        }
    }
}

/// Hands the layer's bytes to both threads as they arrive.
async fn feed(
    layer: &Layer,
    mut bytes: Ordered,
    to_hash: mpsc::Sender<Bytes>,
    to_cut: mpsc::Sender<Bytes>,
) -> Result<(), FetchError> {
    while let Some(piece) = bytes.next().await {
        let piece = piece?.peek().clone();
        let lost = |_| FetchError::Lost { what: format!("layer {}", layer.digest) };
        to_hash.send(piece.clone()).await.map_err(lost)?;
        // A cutter that has stopped is not fed any more.
        let _ = to_cut.send(piece).await;
    }
    Ok(())
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

impl CutError {
    fn into_fetch_error(self, layer: &Layer) -> FetchError {
        match self {
            Self::Archive(cause) => FetchError::Archive { layer: layer.digest, cause },
            Self::Cache(error) => error.into(),
        }
    }
}

/// A layer cut into files, nothing proved yet.
struct Cut {
    index: Index,
    staged: Option<(Staging, Vec<(StagedNumber, ObjectDigest)>)>,
    diff_id: Digest,
    warning: Option<Warning>,
}

impl Cut {
    /// Says what was odd, which a cutter that was given up early would say of any layer.
    fn proved(self, layer: &Layer, proof: Proof) -> Passed {
        if let Some(warning) = self.warning {
            tracing::warn!(layer = %layer.digest, "{warning}");
        }
        if let Some(stated) = layer.diff_id
            && stated != self.diff_id
        {
            tracing::warn!(layer = %layer.digest, %stated, found = %self.diff_id,
                "the kit states a wrong diffId; the layer's digest holds, so its content is served");
        }
        Passed { index: self.index, proof, staged: self.staged }
    }
}

/// Cuts the ordered bytes of a blob into files.
struct Cutter {
    inflater: Inflater,
    files: Entries,
    walker: Option<StreamWalker>,
    /// Hashes what was inflated; an uncompressed layer's diffId is its digest.
    hasher: Option<StreamHasher>,
    layer: Layer,
}

impl Cutter {
    fn new(layer: Layer, max_inflated: Option<u64>, files: Option<Files>) -> Result<Self, FetchError> {
        let bound = match layer.compression {
            Compression::None => u64::MAX,
            Compression::Gzip | Compression::Zstd => max_inflated.unwrap_or_else(|| inflate::max_inflated(layer.size)),
        };
        let inflater = Inflater::new(layer.compression, bound)
            .map_err(|error| FetchError::Archive { layer: layer.digest, cause: error.into() })?;
        let known_size = (layer.compression == Compression::None).then_some(layer.size);
        let walker = (layer.format == Format::Tar).then(|| StreamWalker::new(known_size, Caps::default()));
        let hasher = (layer.compression != Compression::None).then(StreamHasher::new);
        let mut files = Entries { files, open: None, entries: Vec::new(), done: Vec::new() };
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
        let staged = files.files.map(|all| (all.staging, files.done));
        Ok(Cut { index, staged, diff_id, warning })
    }
}

/// The entries found so far, and the file being cut.
struct Entries {
    files: Option<Files>,
    open: Option<Open>,
    entries: Vec<IndexEntry>,
    done: Vec<(StagedNumber, ObjectDigest)>,
}

struct Open {
    entry: Entry,
    file: Option<StagedFile>,
    chunker: Chunker,
    written: u64,
}

impl Entries {
    fn begin(&mut self, entry: Entry) -> Result<(), CacheError> {
        if entry.kind == EntryKind::File {
            let file = self.files.as_mut().map(|files| files.staging.create()).transpose()?;
            self.open = Some(Open { entry, file, chunker: Chunker::new(), written: 0 });
        } else {
            self.entries.push(IndexEntry { entry, content: None });
        }
        Ok(())
    }

    fn content(&mut self, bytes: &[u8]) -> Result<(), CutError> {
        let Some(open) = &mut self.open else { return Ok(()) };
        open.chunker.update(bytes);
        let start = open.written;
        open.written += bytes.len() as u64;
        let (Some(files), Some(file)) = (&self.files, &open.file) else { return Ok(()) };
        file.write_at(&files.cache, bytes, start)?;
        if let Some(view) = &files.view {
            view.publish(&open.entry.path, file.path(), open.written);
        }
        Ok(())
    }

    fn end(&mut self) {
        let Some(Open { mut entry, file, chunker, .. }) = self.open.take() else { return };
        let content: Content = chunker.finish();
        entry.size = content.size;
        self.done.extend(file.map(|file| (file.close(), content.object)));
        self.entries.push(IndexEntry { entry, content: Some(content) });
    }
}
