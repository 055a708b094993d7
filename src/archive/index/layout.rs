//! The sections of an encoded index as types: the bytes are read where they lie, and this is all that knows their order.
//!
//! Invariant of [`Sections`]: each has the length that the header states, all lengths keep to the caps, and together they are
//! the bytes, without a rest. Nothing has been allocated for that. What the fields say is for [`super::check`].

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{IndexError, MAX_CHUNKS, MAX_ENTRIES, MAX_NAMES};
use crate::object::CHUNK_SIZE;

/// What an index begins with.
pub(super) const MAGIC: [u8; 8] = *b"kitfsidx";
/// The version of the format.
pub(super) const VERSION: u32 = 1;

/// The length of the header.
pub(super) const HEADER_LEN: usize = size_of::<Header>();
/// The length of an entry's record.
pub(super) const RECORD_LEN: usize = size_of::<Record>();
/// The length of a chunk digest.
pub(super) const DIGEST_LEN: usize = 32;

/// Codes of [`Header::format`].
pub(super) const FORMAT_TAR: u8 = 0;
pub(super) const FORMAT_RAW: u8 = 1;

/// Codes of [`Header::compression`].
pub(super) const COMPRESSION_NONE: u8 = 0;
pub(super) const COMPRESSION_GZIP: u8 = 1;
pub(super) const COMPRESSION_ZSTD: u8 = 2;

/// The bits of [`Record::mode`] that hold the type, as in `stat(2)`, and the three types.
pub(super) const TYPE_BITS: u16 = 0o170_000;
pub(super) const TYPE_FILE: u16 = 0o100_000;
pub(super) const TYPE_DIRECTORY: u16 = 0o040_000;
pub(super) const TYPE_SYMLINK: u16 = 0o120_000;

/// The permissions of a raw layer's file, of which the layer says nothing.
pub(super) const RAW_MODE: u16 = 0o644;

/// What the index is of, and how long its sections are.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Header {
    pub magic: [u8; 8],
    pub version: U32,
    pub format: u8,
    pub compression: u8,
    pub unused: [u8; 2],
    pub chunk_size: U32,
    /// How many entries.
    pub entries: U32,
    /// How many bytes of names.
    pub names: U32,
    /// How many digests in the chunk lists.
    pub chunks: U32,
    pub size: U64,
    pub inflated: U64,
    pub digest: [u8; 32],
    pub diff_id: [u8; 32],
}

/// One entry.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Record {
    /// Of a file of one chunk, the chunk's digest, from which the object digest follows; of a larger file, the object digest,
    /// which proves its chunk list; else zero.
    pub digest: [u8; 32],
    /// Of a file, the content's; of a symbolic link, the target's, which stands behind the path; else zero.
    pub size: U64,
    pub offset: U64,
    pub mtime: I64,
    pub uid: U32,
    pub gid: U32,
    /// How many digests in the chunk lists come before this file's; zero where it has no list.
    pub chunks: U32,
    /// Where the path begins among the names.
    pub path: U32,
    pub path_len: U16,
    pub mode: U16,
}

impl Record {
    /// The bits of the mode that say what it is.
    pub fn type_bits(&self) -> u16 {
        self.mode.get() & TYPE_BITS
    }

    /// Whether it is a file of more than one chunk.
    pub fn has_list(&self) -> bool {
        self.type_bits() == TYPE_FILE && self.size.get() > CHUNK_SIZE.into()
    }

    /// Its path, if that is within the names.
    pub fn path<'a>(&self, names: &'a [u8]) -> Option<&'a [u8]> {
        names.get(self.path.get() as usize..)?.get(..self.path_len.get().into())
    }

    /// What stands behind its path, as long as it says: the target, if it is a link.
    pub fn target<'a>(&self, names: &'a [u8]) -> Option<&'a [u8]> {
        let start = self.path.get() as usize + usize::from(self.path_len.get());
        names.get(start..)?.get(..usize::try_from(self.size.get()).ok()?)
    }
}

/// How much of an index the bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// What comes before the chunk lists.
    Head,
    /// All of it.
    Whole,
}

/// The sections of an index, in their order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sections<'a> {
    pub header: &'a Header,
    pub records: &'a [Record],
    pub names: &'a [u8],
    /// Empty in a head.
    pub lists: &'a [u8],
}

impl<'a> Sections<'a> {
    /// Cuts the bytes where the header says, if it is one that this version reads.
    pub fn split(bytes: &'a [u8], extent: Extent) -> Result<Self, IndexError> {
        let found = bytes.len() as u64;
        let Ok((header, rest)) = Header::ref_from_prefix(bytes) else {
            return Err(IndexError::Length { expected: HEADER_LEN as u64, found });
        };
        if header.magic != MAGIC {
            return Err(IndexError::NotAnIndex);
        }
        if header.version != VERSION {
            return Err(IndexError::Version { found: header.version.get() });
        }
        let entries = capped("entries", header.entries.get().into(), MAX_ENTRIES)?;
        let names = capped("bytes of names", header.names.get().into(), MAX_NAMES)?;
        let chunks = capped("chunk digests", header.chunks.get().into(), MAX_CHUNKS)?;
        let lists = match extent {
            Extent::Head => 0,
            Extent::Whole => chunks * DIGEST_LEN as u64,
        };
        let expected = HEADER_LEN as u64 + entries * RECORD_LEN as u64 + names + lists;
        let wrong = || IndexError::Length { expected, found };
        if found != expected {
            return Err(wrong());
        }
        let (records, rest) = <[Record]>::ref_from_prefix_with_elems(rest, entries as usize).map_err(|_| wrong())?;
        let (names, lists) = rest.split_at_checked(names as usize).ok_or_else(wrong)?;
        Ok(Self { header, records, names, lists })
    }
}

/// `count`, if it is not more than the cap.
pub(super) fn capped(what: &'static str, count: u64, cap: u64) -> Result<u64, IndexError> {
    if count > cap { Err(IndexError::TooMany { what, count, cap }) } else { Ok(count) }
}
