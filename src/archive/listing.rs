//! The entries of one layer, sorted and free of contradictions.
//!
//! Invariants of [`Listing`]: sorted by the bytes of the paths; no path twice; nothing lies below a file or a symbolic link;
//! the root, where it is named at all, is a directory, or the one file of a raw layer; contents don't overlap.

use super::index::RowKind;
use super::{Entry, EntryKind, EntryRef};
use crate::path::TreePath;

/// The entries of one layer, 48 bytes each and their names. Equal if they say the same of every path.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Listing {
    rows: Vec<Row>,
    /// The paths, and behind a link's its target.
    names: Vec<u8>,
}

/// An entry, packed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    /// Of a link the target's.
    size: u64,
    offset: u64,
    mtime: i64,
    uid: u32,
    gid: u32,
    /// Where the path begins among the names. A walk takes no more of them than fit.
    path: u32,
    path_len: u16,
    mode: u16,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    Directory,
    Symlink,
}

/// Entries that contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Contradiction {
    /// One path twice, and not a directory both times.
    #[error("the layer holds {path} more than once")]
    Duplicate {
        /// The path.
        path: TreePath,
    },
    /// An entry below something that is no directory.
    #[error("the layer holds {below}, but {path} is not a directory in it")]
    BelowFile {
        /// The file or symbolic link.
        path: TreePath,
        /// What lies below it.
        below: TreePath,
    },
    /// Two contents share bytes of the layer.
    #[error("the contents of {first} and {second} overlap in the layer")]
    Overlap {
        /// One of them.
        first: TreePath,
        /// The other.
        second: TreePath,
    },
}

impl Listing {
    /// Sorts the entries of a layer, given in the order of the archive. A directory may repeat: its first entry stays.
    pub fn build(mut entries: Vec<Entry>) -> Result<Self, Contradiction> {
        sort(&mut entries, |entry| entry);
        Self::check(&entries)?;
        let mut listing = Self { rows: Vec::with_capacity(entries.len()), names: Vec::new() };
        entries.iter().for_each(|entry| listing.push(entry));
        listing.names.shrink_to_fit();
        Ok(listing)
    }

    fn push(&mut self, entry: &Entry) {
        let (kind, target): (_, &[u8]) = match &entry.kind {
            EntryKind::File => (Kind::File, &[]),
            EntryKind::Directory => (Kind::Directory, &[]),
            EntryKind::Symlink(target) => (Kind::Symlink, target),
        };
        let (path, path_len) = (self.names.len() as u32, entry.path.as_bytes().len() as u16);
        self.names.extend_from_slice(entry.path.as_bytes());
        self.names.extend_from_slice(target);
        let Entry { uid, gid, mtime, offset, .. } = *entry;
        let size = entry.size + target.len() as u64;
        self.rows.push(Row { size, offset, mtime, uid, gid, path, path_len, mode: entry.mode as u16, kind });
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The entry at a position in the order of paths.
    pub fn row(&self, position: usize) -> Option<EntryRef<'_>> {
        self.rows.get(position).map(|row| self.unpacked(row))
    }

    /// The entries in the order of their paths.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = EntryRef<'_>> {
        self.rows.iter().map(|row| self.unpacked(row))
    }

    /// Where the entry of exactly this path stands.
    pub fn find(&self, path: &[u8]) -> Option<usize> {
        self.rows.binary_search_by(|row| self.unpacked(row).path.cmp(path)).ok()
    }

    fn unpacked(&self, row: &Row) -> EntryRef<'_> {
        let (path, rest) = self.names[row.path as usize..].split_at(row.path_len.into());
        let (kind, size) = match row.kind {
            Kind::File => (RowKind::File, row.size),
            Kind::Directory => (RowKind::Directory, 0),
            Kind::Symlink => (RowKind::Symlink(&rest[..row.size as usize]), 0),
        };
        let Row { offset, mtime, uid, gid, .. } = *row;
        EntryRef { path, kind, mode: row.mode.into(), uid, gid, mtime, size, offset }
    }

    fn check(entries: &[Entry]) -> Result<(), Contradiction> {
        for pair in entries.windows(2) {
            if pair[0].path == pair[1].path {
                return Err(Contradiction::Duplicate { path: pair[0].path.clone() });
            }
        }
        for (at, entry) in entries.iter().enumerate().filter(|(_, entry)| entry.kind != EntryKind::Directory) {
            if let Some(below) = first_below(&entries[at + 1..], &entry.path) {
                return Err(Contradiction::BelowFile { path: entry.path.clone(), below: below.path.clone() });
            }
        }
        let mut contents: Vec<&Entry> = entries.iter().filter(|entry| entry.size > 0).collect();
        contents.sort_unstable_by_key(|entry| entry.offset);
        for pair in contents.windows(2) {
            if pair[0].offset.checked_add(pair[0].size).is_none_or(|end| end > pair[1].offset) {
                let (first, second) = (pair[0].path.clone(), pair[1].path.clone());
                return Err(Contradiction::Overlap { first, second });
            }
        }
        Ok(())
    }
}

/// Sorts rows by the paths of their entries, and merges repeated directories.
pub(super) fn sort<T>(rows: &mut Vec<T>, entry: impl Fn(&T) -> &Entry) {
    // Stable, so that of the entries of one path the first in the archive stays first.
    rows.sort_by(|a, b| entry(a).path.cmp(&entry(b).path));
    rows.dedup_by(|later, first| {
        let (later, first) = (entry(later), entry(first));
        later.path == first.path && [later, first].iter().all(|entry| entry.kind == EntryKind::Directory)
    });
}

/// The first of the sorted `entries` that lies below `path`. Names such as `path-x` sort between a path and what lies below.
fn first_below<'a>(entries: &'a [Entry], path: &TreePath) -> Option<&'a Entry> {
    let prefix = || path.as_bytes().iter().chain(b"/");
    let at = entries.partition_point(|entry| entry.path.as_bytes().iter().lt(prefix()));
    entries.get(at).filter(|entry| entry.path.is_within(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: EntryKind, offset: u64, size: u64) -> Entry {
        let path = TreePath::clean(path.as_bytes()).expect("valid");
        Entry { path, kind, mode: 0o644, uid: 0, gid: 0, mtime: 0, size, offset }
    }

    fn dir(path: &str) -> Entry {
        entry(path, EntryKind::Directory, 512, 0)
    }

    fn file(path: &str, offset: u64, size: u64) -> Entry {
        entry(path, EntryKind::File, offset, size)
    }

    fn refused(entries: Vec<Entry>) -> String {
        Listing::build(entries).expect_err("contradicts itself").to_string()
    }

    #[test]
    fn entries_are_sorted_by_path() {
        let listing = Listing::build(vec![dir("b"), file("b/x", 512, 1), file("a", 1024, 1)]).expect("sound");
        let paths: Vec<_> = listing.entries().map(|entry| entry.path).collect();
        assert_eq!(paths, [&b"a"[..], b"b", b"b/x"]);
    }

    #[test]
    fn a_directory_may_repeat_and_its_first_mode_stays() {
        let mut first = dir("a");
        first.mode = 0o700;
        let listing = Listing::build(vec![first, dir("a"), dir("a")]).expect("sound");
        assert_eq!(listing.entries().map(|entry| entry.mode).collect::<Vec<_>>(), [0o700]);
    }

    #[test]
    fn an_entry_comes_out_as_it_went_in() {
        let link = entry("b", EntryKind::Symlink(b"a/../c".to_vec()), 2048, 0);
        let mut odd = file("c", 4096, u64::MAX - 8192);
        (odd.mode, odd.uid, odd.gid, odd.mtime) = (0o7777, 1, u32::MAX - 1, i64::MIN);
        let entries = vec![dir("a"), link, odd];
        let listing = Listing::build(entries.clone()).expect("sound");
        assert_eq!(listing.entries().map(|entry| entry.to_entry()).collect::<Vec<_>>(), entries);
        assert!(entries.iter().map(Entry::by_ref).eq(listing.entries()));
        let found = listing.find(b"b").and_then(|at| listing.row(at)).map(|entry| entry.to_entry());
        assert_eq!(found, Some(entries[1].clone()));
        assert_eq!((listing.find(b"bb"), listing.row(3)), (None, None));
    }

    #[test]
    fn a_file_may_not_repeat_nor_be_a_directory_too() {
        assert_eq!(refused(vec![file("a", 0, 0), file("a", 0, 0)]), "the layer holds a more than once");
        assert_eq!(refused(vec![dir("a"), file("a", 0, 0)]), "the layer holds a more than once");
        assert_eq!(refused(vec![dir("a"), dir("a"), file("a", 0, 0)]), "the layer holds a more than once");
    }

    #[test]
    fn nothing_lies_below_a_file_or_symlink_whatever_sorts_between() {
        let between = [file("a-b", 0, 0), file("a.c", 0, 0)];
        let link = entry("a", EntryKind::Symlink(b"x".to_vec()), 0, 0);
        for top in [file("a", 0, 0), link] {
            let mut entries = between.to_vec();
            entries.extend([top, file("a/b/c", 0, 0)]);
            assert_eq!(refused(entries), "the layer holds a/b/c, but a is not a directory in it");
        }
        let root = entry("", EntryKind::File, 0, 0);
        assert!(Listing::build(vec![root.clone()]).is_ok());
        assert!(Listing::build(vec![root, file("a", 0, 0)]).is_err());
    }

    #[test]
    fn contents_may_not_overlap() {
        assert!(Listing::build(vec![file("b", 0, 10), file("a", 10, 10), file("c", 5, 0)]).is_ok());
        assert_eq!(refused(vec![file("b", 0, 11), file("a", 10, 10)]), "the contents of b and a overlap in the layer");
        assert!(Listing::build(vec![file("a", 1, u64::MAX), file("b", 2, 1)]).is_err());
    }
}
