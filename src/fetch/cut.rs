//! Cutting a layer into files: inflate → walk → chunk digests → index; and, where there is a staging directory, the files.
//!
//! What lies in staging already, from an earlier fill, comes first and is not written again. Where there is no room, what
//! only another fill would need goes first, then all that is staged; the cutting goes on, as the index can be had without.

use std::sync::Arc;

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
use crate::digest::{Digest, StreamHasher};
use crate::modelkit::{Compression, Format, Layer};
use crate::object::ObjectDigest;

/// Where the files of a layer go while it is read.
#[derive(Debug)]
pub struct Files {
    /// The cache that they go to.
    pub cache: Arc<Cache>,
    /// Where they are staged.
    pub staging: Staging,
    /// Where staged bytes are shown, if anybody may see them.
    pub view: Option<Arc<StagedView>>,
    /// So many bytes of the layer come from what lies there.
    pub resumed: u64,
    /// Whether the index is wanted where the files can't be staged.
    pub wants_index: bool,
    /// Why nothing is staged any more.
    pub no_room: Option<CacheError>,
}

impl Files {
    /// Takes a step of staging; `None` where nothing is staged any more.
    fn step<T>(&mut self, step: impl Fn(&mut Self) -> Result<T, CacheError>) -> Result<Option<T>, CacheError> {
        while self.no_room.is_none() {
            match step(self) {
                Err(error) if error.is_full() => {
                    if self.staging.forget() {
                        continue;
                    }
                    if !self.wants_index {
                        return Err(error);
                    }
                    // First, so that nobody looks for what goes.
                    if let Some(view) = &self.view {
                        view.clear();
                    }
                    self.staging.clear();
                    self.no_room = Some(error);
                }
                outcome => return outcome.map(Some),
            }
        }
        Ok(None)
    }
}

/// What became of a layer's files.
#[derive(Debug)]
pub enum Staged {
    /// There was no place for them.
    Nowhere,
    /// They are all staged.
    All {
        /// Where.
        staging: Staging,
        /// What they hold.
        files: Vec<(StagedNumber, ObjectDigest)>,
    },
    /// There was no room for them.
    NoRoom {
        /// Empty; its lock tells others that somebody is at it.
        staging: Staging,
        /// Why.
        why: CacheError,
    },
}

impl Staged {
    /// The staging directory.
    pub fn into_staging(self) -> Option<Staging> {
        match self {
            Self::Nowhere => None,
            Self::All { staging, .. } | Self::NoRoom { staging, .. } => Some(staging),
        }
    }
}

/// Why a stream could not be cut into files.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    /// It is no archive.
    #[error(transparent)]
    Archive(ArchiveError),
    /// The disk does not take the files.
    #[error(transparent)]
    Cache(#[from] CacheError),
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
        }
    }
}

/// A cutter that could not go on.
#[derive(Debug)]
pub struct Stopped {
    /// Why.
    pub error: CutError,
    /// Where it staged.
    pub staging: Option<Staging>,
}

/// A layer cut into files, nothing proved yet.
#[derive(Debug)]
pub struct Cut {
    /// What the layer holds.
    pub index: Index,
    /// What became of its files.
    pub staged: Staged,
    diff_id: Digest,
    warning: Option<Warning>,
}

impl Cut {
    /// Says what is odd about a layer whose digest holds, which a cutter that was given up early would say of any.
    pub fn checked(self, layer: &Layer) -> Self {
        if let Some(warning) = self.warning {
            tracing::warn!(layer = %layer.digest, "{warning}");
        }
        if let Some(stated) = layer.diff_id
            && stated != self.diff_id
        {
            tracing::warn!(layer = %layer.digest, %stated, found = %self.diff_id,
                "the kit states a wrong diffId; the layer's digest holds, so its content is served");
        }
        self
    }
}

/// Cuts the ordered bytes of a blob into files.
#[derive(Debug)]
pub struct Cutter {
    inflater: Inflater,
    entries: Entries,
    walker: Option<StreamWalker>,
    /// Hashes what was inflated; an uncompressed layer's diffId is its digest.
    hasher: Option<StreamHasher>,
    layer: Layer,
}

impl Cutter {
    /// Cuts a layer; `max_inflated` as in [`super::Limits`].
    pub fn new(layer: Layer, max_inflated: Option<u64>, files: Option<Files>) -> Result<Self, CutError> {
        let is_plain = layer.compression == Compression::None;
        let bound = match layer.compression {
            Compression::None => u64::MAX,
            Compression::Gzip | Compression::Zstd => max_inflated.unwrap_or_else(|| inflate::max_inflated(layer.size)),
        };
        let inflater = Inflater::new(layer.compression, bound)?;
        let walker =
            (layer.format == Format::Tar).then(|| StreamWalker::new(is_plain.then_some(layer.size), Caps::default()));
        let hasher = (!is_plain).then(StreamHasher::new);
        let is_begun = is_plain && files.as_ref().is_some_and(|files| files.resumed > 0);
        let mut entries = Entries {
            files,
            is_plain,
            is_begun,
            taken: 0,
            between: Vec::new(),
            open: None,
            entries: Vec::new(),
            done: Vec::new(),
        };
        if walker.is_none() {
            entries.begin(raw_entry(0))?;
        }
        Ok(Self { inflater, entries, walker, hasher, layer })
    }

    /// Takes the next bytes of the blob. What is resumed does not come in one piece with what follows.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), CutError> {
        let Self { inflater, entries, walker, hasher, .. } = self;
        entries.arrive(bytes)?;
        inflater.feed(bytes, &mut |mut bytes: &[u8]| {
            if let Some(hasher) = hasher {
                hasher.update(bytes);
            }
            let Some(walker) = walker else { return entries.content(bytes) };
            loop {
                let before = bytes;
                let event = walker.next(&mut bytes)?;
                let passed = &before[..before.len() - bytes.len()];
                match event {
                    Some(Event::Content(content)) => entries.content(content)?,
                    Some(Event::Entry(entry)) => {
                        entries.between(passed);
                        entries.begin(entry)?;
                    }
                    Some(Event::EntryEnd) => entries.end(),
                    None => {
                        entries.between(passed);
                        return Ok(());
                    }
                }
            }
        })?;
        Ok(entries.taken(bytes.len() as u64)?)
    }

    /// Gives up.
    pub fn stop(self, error: CutError) -> Box<Stopped> {
        Box::new(Stopped { error, staging: self.entries.files.map(|files| files.staging) })
    }

    /// Ends the blob.
    pub fn finish(mut self) -> Result<Cut, Box<Stopped>> {
        let files = self.entries.files.take();
        match self.end() {
            Ok(Ended { index, done, diff_id, warning }) => {
                let staged = match files {
                    None => Staged::Nowhere,
                    Some(Files { staging, no_room: Some(why), .. }) => Staged::NoRoom { staging, why },
                    Some(Files { staging, no_room: None, .. }) => Staged::All { staging, files: done },
                };
                Ok(Cut { index, staged, diff_id, warning })
            }
            Err(error) => Err(Box::new(Stopped { error, staging: files.map(|files| files.staging) })),
        }
    }

    fn end(self) -> Result<Ended, CutError> {
        let Self { inflater, mut entries, walker, hasher, layer } = self;
        let inflated = inflater.finish()?;
        let warning = match walker {
            Some(walker) => walker.finish()?,
            None => {
                entries.end();
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
        let index = Index::build(facts, entries.entries)?;
        Ok(Ended { index, done: entries.done, diff_id, warning })
    }
}

struct Ended {
    index: Index,
    done: Vec<(StagedNumber, ObjectDigest)>,
    diff_id: Digest,
    warning: Option<Warning>,
}

/// The entries found so far, and the file being cut.
#[derive(Debug)]
struct Entries {
    files: Option<Files>,
    /// Whether the layer is not compressed, so that its files need not be made again when it is resumed.
    is_plain: bool,
    /// Whether what comes now is in the files already.
    is_begun: bool,
    /// How many bytes of the blob were taken.
    taken: u64,
    /// Bytes of those being taken that are no file's content.
    between: Vec<u8>,
    open: Option<Open>,
    entries: Vec<IndexEntry>,
    done: Vec<(StagedNumber, ObjectDigest)>,
}

#[derive(Debug)]
struct Open {
    entry: Entry,
    number: Option<StagedNumber>,
    /// `None` where it is not staged, or not written to yet.
    file: Option<StagedFile>,
    chunker: Chunker,
    written: u64,
}

impl Entries {
    /// Whether bytes of the blob that come now lie in staging already.
    fn is_resumed(&self) -> bool {
        self.files.as_ref().is_some_and(|files| self.taken < files.resumed)
    }

    /// Bytes of the blob, before they are cut.
    fn arrive(&mut self, bytes: &[u8]) -> Result<(), CacheError> {
        let is_resumed = self.is_resumed();
        self.is_begun = self.is_plain && is_resumed;
        let Some(files) = &mut self.files else { return Ok(()) };
        if is_resumed || files.no_room.is_some() {
            files.staging.touch();
        } else if !self.is_plain {
            files.step(|files| files.staging.keep(&files.cache, bytes))?;
        }
        Ok(())
    }

    /// So many bytes of the blob were cut.
    fn taken(&mut self, bytes: u64) -> Result<(), CacheError> {
        let is_resumed = self.is_resumed();
        self.taken += bytes;
        let Some(files) = self.files.as_mut().filter(|_| !is_resumed) else { return Ok(()) };
        // After the content: a process that is killed in between leaves a file too many, and not one too few.
        if !self.between.is_empty() {
            files.step(|files| files.staging.keep(&files.cache, &self.between))?;
            self.between.clear();
        }
        files.staging.reached(self.taken);
        Ok(())
    }

    fn between(&mut self, bytes: &[u8]) {
        if self.is_plain && !self.is_begun && self.files.as_ref().is_some_and(|files| files.no_room.is_none()) {
            self.between.extend_from_slice(bytes);
        }
    }

    fn begin(&mut self, entry: Entry) -> Result<(), CacheError> {
        if entry.kind != EntryKind::File {
            self.entries.push(IndexEntry { entry, content: None });
            return Ok(());
        }
        let mut open = Open { entry, number: None, file: None, chunker: Chunker::new(), written: 0 };
        if let Some(files) = &mut self.files {
            if self.is_begun {
                let number = files.staging.next_begun();
                open.number = Some(number);
                if open.entry.size == 0 {
                    // It may be lost, and there is no content that would bring it back.
                    files.step(|files| files.staging.reopen(number))?;
                }
            } else {
                open.file = files.step(|files| files.staging.create())?;
                open.number = open.file.as_ref().map(StagedFile::number);
            }
        }
        self.open = Some(open);
        Ok(())
    }

    fn content(&mut self, bytes: &[u8]) -> Result<(), CutError> {
        let Some(open) = &mut self.open else { return Ok(()) };
        open.chunker.update(bytes);
        let start = open.written;
        open.written += bytes.len() as u64;
        let (Some(files), Some(number)) = (&mut self.files, open.number) else { return Ok(()) };
        if !self.is_begun {
            if open.file.is_none() {
                open.file = files.step(|files| files.staging.reopen(number))?;
            }
            if let Some(file) = &open.file
                && files.step(|files| file.write_at(&files.cache, bytes, start))?.is_none()
            {
                // Its room is free once it is closed.
                open.file = None;
            }
        }
        if let Some(view) = &files.view
            && files.no_room.is_none()
        {
            view.publish(&open.entry.path, &files.staging.path_of(number), open.written);
        }
        Ok(())
    }

    fn end(&mut self) {
        let Some(Open { mut entry, number, chunker, .. }) = self.open.take() else { return };
        let content: Content = chunker.finish();
        entry.size = content.size;
        self.done.extend(number.map(|number| (number, content.object)));
        self.entries.push(IndexEntry { entry, content: Some(content) });
    }
}
