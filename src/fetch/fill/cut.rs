//! Cutting a layer into files: walk → chunk digests → index; and what is to be staged of them.
//!
//! What comes in is not compressed, and is not copied: a file's content is handed on as slices of it.

use bytes::Bytes;

use super::stage::{Batch, Step};
use crate::archive::chunk::{Chunker, Content};
use crate::archive::index::{Index, IndexEntry, LayerFacts, LayerFormat};
use crate::archive::stream::{Event, StreamWalker};
use crate::archive::walker::{Caps, Warning};
use crate::archive::{Entry, EntryKind};
use crate::cache::CacheError;
use crate::digest::{Digest, StreamHasher};
use crate::fetch::listing::raw_entry;
use crate::fetch::{ArchiveError, FetchError};
use crate::modelkit::{Compression, Format, Layer};
use crate::object::ObjectDigest;

/// Why a stream could not be cut into files.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    /// It is no archive.
    #[error(transparent)]
    Archive(ArchiveError),
    /// The disk does not take the files.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// Who did it has gone.
    #[error("cutting it into files has ended without a result")]
    Lost,
}

impl<E: Into<ArchiveError>> From<E> for CutError {
    fn from(error: E) -> Self {
        Self::Archive(error.into())
    }
}

impl CutError {
    /// The same, of this layer.
    pub fn into_fetch_error(self, layer: &Layer) -> FetchError {
        match self {
            Self::Archive(cause) => FetchError::Archive { layer: layer.digest, cause },
            Self::Cache(error) => error.into(),
            Self::Lost => FetchError::Lost { what: format!("layer {}", layer.digest) },
        }
    }
}

/// A layer cut into files, nothing proved yet.
#[derive(Debug)]
pub struct Cut {
    /// What the layer holds.
    pub index: Index,
    /// What its files hold, in the order in which they were staged.
    pub objects: Vec<ObjectDigest>,
    diff_id: Digest,
    warning: Option<Warning>,
}

impl Cut {
    /// Says what is odd about a layer whose digest holds, which a cutter that was given up early would say of any.
    pub fn tell(&self, layer: &Layer) {
        if let Some(warning) = &self.warning {
            tracing::warn!(layer = %layer.digest, "{warning}");
        }
        if let Some(stated) = layer.diff_id
            && stated != self.diff_id
        {
            tracing::warn!(layer = %layer.digest, %stated, found = %self.diff_id,
                "the kit states a wrong diffId; the layer's digest holds, so its content is served");
        }
    }
}

/// Cuts the ordered bytes of a layer, inflated, into files.
#[derive(Debug)]
pub struct Cutter {
    layer: Layer,
    walker: Option<StreamWalker>,
    /// Hashes what was inflated; an uncompressed layer's diffId is its digest.
    hasher: Option<StreamHasher>,
    /// How many bytes came.
    inflated: u64,
    entries: Entries,
}

impl Cutter {
    /// Cuts a layer.
    pub fn new(layer: Layer) -> Self {
        let is_plain = layer.compression == Compression::None;
        let walker =
            (layer.format == Format::Tar).then(|| StreamWalker::new(is_plain.then_some(layer.size), Caps::default()));
        let hasher = (!is_plain).then(StreamHasher::new);
        let mut entries = Entries { is_plain, ..Entries::default() };
        if walker.is_none() {
            entries.begin(raw_entry(0));
        }
        Self { layer, walker, hasher, inflated: 0, entries }
    }

    /// Takes the next bytes, and tells what is to be staged of them.
    pub fn feed(&mut self, piece: &Bytes) -> Result<Batch, ArchiveError> {
        let Self { entries, walker, hasher, inflated, .. } = self;
        *inflated += piece.len() as u64;
        match hasher {
            Some(hasher) => hasher.update(piece),
            None => entries.batch.taken = piece.len() as u64,
        }
        let Some(walker) = walker else {
            entries.content(piece.clone());
            return Ok(std::mem::take(&mut entries.batch));
        };
        let mut bytes = &piece[..];
        loop {
            let before = bytes;
            let event = walker.next(&mut bytes)?;
            let passed = &before[..before.len() - bytes.len()];
            match event {
                Some(Event::Content(content)) => entries.content(piece.slice_ref(content)),
                Some(Event::Entry(entry)) => {
                    entries.between(passed);
                    entries.begin(entry);
                }
                Some(Event::EntryEnd) => entries.end(),
                None => {
                    entries.between(passed);
                    return Ok(std::mem::take(&mut entries.batch));
                }
            }
        }
    }

    /// Ends the layer; what is still to be staged comes first.
    pub fn finish(mut self) -> Result<(Batch, Cut), ArchiveError> {
        let warning = match self.walker {
            Some(walker) => walker.finish()?,
            None => {
                self.entries.end();
                None
            }
        };
        let Self { layer, hasher, inflated, entries: Entries { batch, entries, objects, .. }, .. } = self;
        let diff_id = hasher.map_or(layer.digest, StreamHasher::digest);
        let facts = LayerFacts {
            digest: layer.digest,
            size: layer.size,
            diff_id,
            inflated,
            format: LayerFormat::from(&layer.format),
            compression: layer.compression,
        };
        Ok((batch, Cut { index: Index::build(facts, entries)?, objects, diff_id, warning }))
    }
}

/// The entries found so far, and the file being cut.
#[derive(Debug, Default)]
struct Entries {
    /// Whether the layer is not compressed, so that what is no file's content is kept.
    is_plain: bool,
    batch: Batch,
    open: Option<(Entry, Chunker)>,
    entries: Vec<IndexEntry>,
    objects: Vec<ObjectDigest>,
}

impl Entries {
    fn between(&mut self, bytes: &[u8]) {
        if self.is_plain {
            self.batch.between.extend_from_slice(bytes);
        }
    }

    fn begin(&mut self, entry: Entry) {
        if entry.kind != EntryKind::File {
            self.entries.push(IndexEntry { entry, content: None });
            return;
        }
        self.batch.steps.push(Step::File { path: entry.path.clone(), is_empty: entry.size == 0 });
        self.open = Some((entry, Chunker::new()));
    }

    fn content(&mut self, bytes: Bytes) {
        let Some((_, chunker)) = &mut self.open else { return };
        chunker.update(&bytes);
        self.batch.steps.push(Step::Content(bytes));
    }

    fn end(&mut self) {
        let Some((mut entry, chunker)) = self.open.take() else { return };
        let content: Content = chunker.finish();
        entry.size = content.size;
        self.objects.push(content.object);
        self.entries.push(IndexEntry { entry, content: Some(content) });
    }
}
