//! The head of an index: all but the chunk lists. It is the listing, and is read where it lies.

use std::fmt;
use std::ops::Range;

use bytes::Bytes;

use super::layout::*;
use super::{IndexError, InvalidList, LayerFacts, check};
use crate::archive::{Entry, EntryRef};
use crate::object::{ChunkList, ObjectDigest, chunk_count};

/// A checked head over bytes of any kind, which must not change: the entries of a layer, sorted by path, none twice.
#[derive(Clone)]
pub struct Head<B = Bytes> {
    /// The head, and in an index the chunk lists behind it.
    bytes: B,
    layer: LayerFacts,
    /// Where the names begin.
    names_at: usize,
    /// Where the head ends.
    end: usize,
}

impl<B: AsRef<[u8]>> Head<B> {
    /// Reads a head alone, as a mount fetches it. `max_inflated` stands in for the rule of
    /// [`max_inflated`](crate::archive::inflate::max_inflated) where the user has allowed more.
    pub fn parse(bytes: B, max_inflated: Option<u64>) -> Result<Self, IndexError> {
        Self::read(bytes, Extent::Head, max_inflated)
    }

    pub(super) fn read(bytes: B, extent: Extent, max_inflated: Option<u64>) -> Result<Self, IndexError> {
        let sections = Sections::split(bytes.as_ref(), extent)?;
        let layer = check::layer(sections.header, max_inflated)?;
        check::entries(&sections, &layer)?;
        if extent == Extent::Whole {
            check::lists(&sections)?;
        }
        let names_at = HEADER_LEN + size_of_val(sections.records);
        let end = names_at + sections.names.len();
        Ok(Self { bytes, layer, names_at, end })
    }

    /// The layer it is of.
    pub fn layer(&self) -> &LayerFacts {
        &self.layer
    }

    /// The bytes of the head: those that the annotation's size and digest are of.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes.as_ref()[..self.end]
    }

    /// How long the whole index is, chunk lists included.
    pub fn index_len(&self) -> u64 {
        let last = self.records().iter().rev().find(|record| record.has_list());
        let chunks = last.map_or(0, |record| u64::from(record.chunks.get()) + chunk_count(record.size.get()));
        self.end as u64 + chunks * DIGEST_LEN as u64
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.records().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The entry at a position in the order of paths.
    pub fn row(&self, position: usize) -> Option<Row<'_>> {
        self.records().get(position).map(|record| self.row_of(record))
    }

    /// All entries, sorted by path.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = Row<'_>> {
        self.records().iter().map(|record| self.row_of(record))
    }

    /// Where the entry of exactly this path stands.
    pub fn find(&self, path: &[u8]) -> Option<usize> {
        self.records().binary_search_by(|record| self.path_of(record).cmp(path)).ok()
    }

    /// The same head over the same bytes in another place.
    pub(super) fn moved<C>(&self, bytes: C) -> Head<C> {
        Head { bytes, layer: self.layer.clone(), names_at: self.names_at, end: self.end }
    }

    /// The bytes that were parsed.
    pub(super) fn all_bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    fn records(&self) -> &[Record] {
        let section = &self.bytes.as_ref()[HEADER_LEN..self.names_at];
        <[Record] as zerocopy::FromBytes>::ref_from_bytes(section).unwrap_or_default()
    }

    fn names(&self) -> &[u8] {
        &self.bytes.as_ref()[self.names_at..self.end]
    }

    fn path_of(&self, record: &Record) -> &[u8] {
        record.path(self.names()).unwrap_or_default()
    }

    fn row_of<'a>(&'a self, record: &'a Record) -> Row<'a> {
        Row { record, names: self.names(), lists_at: self.end as u64 }
    }
}

impl<B> fmt::Debug for Head<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Head of layer {}", self.layer.digest)
    }
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowKind<'a> {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link and its target.
    Symlink(&'a [u8]),
}

/// One entry, where it lies.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    record: &'a Record,
    names: &'a [u8],
    /// Where the chunk lists begin in the index.
    lists_at: u64,
}

/// Where the chunk digests of a file are.
#[derive(Debug)]
pub enum Chunks<'a> {
    /// In the head: none, or one.
    Here(ChunkList<&'a [u8]>),
    /// At these bytes of the index; [`Row::list`] takes them.
    At(Range<u64>),
}

impl<'a> Row<'a> {
    /// Its path in the layer.
    pub fn path(&self) -> &'a [u8] {
        self.record.path(self.names).unwrap_or_default()
    }

    /// What it is.
    pub fn kind(&self) -> RowKind<'a> {
        match self.record.type_bits() {
            TYPE_FILE => RowKind::File,
            TYPE_SYMLINK => RowKind::Symlink(self.record.target(self.names).unwrap_or_default()),
            _ => RowKind::Directory,
        }
    }

    /// How many bytes of content it has; 0 for what is not a file.
    pub fn size(&self) -> u64 {
        if self.kind() == RowKind::File { self.record.size.get() } else { 0 }
    }

    /// Where its content starts in the uncompressed layer.
    pub fn offset(&self) -> u64 {
        self.record.offset.get()
    }

    /// The name of a file's content. That of a small file is computed, which takes a tenth of a microsecond.
    pub fn object(&self) -> Option<ObjectDigest> {
        match self.chunks()? {
            Chunks::Here(list) => Some(list.object()),
            Chunks::At(_) => Some(ObjectDigest::from_bytes(self.record.digest)),
        }
    }

    /// Where a file's chunk digests are; `None` for what is not a file.
    pub fn chunks(&self) -> Option<Chunks<'a>> {
        if self.kind() != RowKind::File {
            return None;
        }
        let (size, count) = (self.size(), chunk_count(self.size()));
        if self.record.has_list() {
            let start = self.lists_at + u64::from(self.record.chunks.get()) * DIGEST_LEN as u64;
            return Some(Chunks::At(start..start + count * DIGEST_LEN as u64));
        }
        let list = &self.record.digest[..count as usize * DIGEST_LEN];
        ChunkList::new(size, list).map(Chunks::Here)
    }

    /// Takes the bytes of the index that [`Chunks::At`] told of, if they are what the row's object digest is of.
    pub fn list<L: AsRef<[u8]>>(&self, bytes: L) -> Result<ChunkList<L>, InvalidList> {
        let invalid = |why| InvalidList { path: String::from_utf8_lossy(self.path()).into_owned(), why };
        if !self.record.has_list() {
            return Err(invalid("it has none"));
        }
        check::list_of(self.record, bytes).map_err(invalid)
    }

    /// What it states.
    pub fn entry(&self) -> EntryRef<'a> {
        let Record { mtime, uid, gid, mode, .. } = self.record;
        EntryRef {
            path: self.path(),
            kind: self.kind(),
            mode: (mode.get() & !TYPE_BITS).into(),
            uid: uid.get(),
            gid: gid.get(),
            mtime: mtime.get(),
            size: self.size(),
            offset: self.offset(),
        }
    }

    /// The entry as a value of its own.
    pub fn to_entry(&self) -> Entry {
        self.entry().to_entry()
    }
}

impl fmt::Debug for Row<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.to_entry(), f)
    }
}
