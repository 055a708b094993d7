//! Layer bytes → entries → chunks. Pure: bytes in, values out.
//!
//! - `walker`: a tar walker that is fed bytes and says what it needs next; `stream` drives it over ordered bytes.
//! - `inflate`: streaming decompression with a bound on the output.
//! - `chunk`: 1 MiB chunk digests and object digests.
//! - `listing`: the entries of one layer, sorted and free of contradictions.
//! - `index`: what a layer holds, entries, objects and chunks, in the bytes that are stored and sent.

pub mod chunk;
#[cfg(test)]
mod fixture_tests;
mod header;
pub mod index;
pub mod inflate;
pub mod listing;
pub mod stream;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
pub(crate) mod testing_trees;
pub mod walker;

use crate::path::TreePath;
use index::RowKind;

/// What kind of node an entry is.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link and its target, raw. Whether it stays in the tree is checked by who knows the tree.
    Symlink(Vec<u8>),
}

/// One file, directory or symbolic link of a layer, as its header states it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name in the archive, cleaned (the layer's naming rule is not applied).
    pub path: TreePath,
    /// File, directory or symlink.
    pub kind: EntryKind,
    /// Permission bits with setuid, setgid and sticky: `mode & 0o7777`.
    pub mode: u32,
    /// Owner; one that Linux has no number for is `nobody`, 65534.
    pub uid: u32,
    /// Group, likewise.
    pub gid: u32,
    /// Seconds since the epoch.
    pub mtime: i64,
    /// Size of the content in bytes; 0 for what is not a file.
    pub size: u64,
    /// Where the content starts in the uncompressed layer.
    pub offset: u64,
}

/// An entry where it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryRef<'a> {
    /// As [`Entry::path`].
    pub path: &'a [u8],
    /// As [`Entry::kind`].
    pub kind: RowKind<'a>,
    /// As [`Entry::mode`].
    pub mode: u32,
    /// As [`Entry::uid`].
    pub uid: u32,
    /// As [`Entry::gid`].
    pub gid: u32,
    /// As [`Entry::mtime`].
    pub mtime: i64,
    /// As [`Entry::size`].
    pub size: u64,
    /// As [`Entry::offset`].
    pub offset: u64,
}

impl Entry {
    /// The entry as it lies here.
    pub fn by_ref(&self) -> EntryRef<'_> {
        let Self { path, kind, mode, uid, gid, mtime, size, offset } = self;
        let kind = match kind {
            EntryKind::File => RowKind::File,
            EntryKind::Directory => RowKind::Directory,
            EntryKind::Symlink(target) => RowKind::Symlink(target),
        };
        let (mode, uid, gid, mtime, size, offset) = (*mode, *uid, *gid, *mtime, *size, *offset);
        EntryRef { path: path.as_bytes(), kind, mode, uid, gid, mtime, size, offset }
    }
}

impl EntryRef<'_> {
    /// The entry as a value of its own.
    pub fn to_entry(&self) -> Entry {
        let Self { path, kind, mode, uid, gid, mtime, size, offset } = *self;
        let kind = match kind {
            RowKind::File => EntryKind::File,
            RowKind::Directory => EntryKind::Directory,
            RowKind::Symlink(target) => EntryKind::Symlink(target.to_vec()),
        };
        let path = TreePath::from_clean(path).expect("checked when the entry was read");
        Entry { path, kind, mode, uid, gid, mtime, size, offset }
    }
}
