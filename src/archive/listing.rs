//! The entries of one layer, sorted and free of contradictions.
//!
//! Invariants of [`Listing`]: sorted by the bytes of the paths; no path twice; nothing lies below a file or a symbolic link;
//! the root, where it is named at all, is a directory, or the one file of a raw layer; contents don't overlap.

use super::{Entry, EntryKind};
use crate::path::TreePath;

/// The entries of one layer. Equal if they say the same of every path.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Listing(Vec<Entry>);

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
        Ok(Self(entries))
    }

    /// The entries in the order of their paths.
    pub fn entries(&self) -> &[Entry] {
        &self.0
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

impl From<Listing> for Vec<Entry> {
    fn from(listing: Listing) -> Self {
        listing.0
    }
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
        let paths: Vec<_> = listing.entries().iter().map(|entry| entry.path.to_string()).collect();
        assert_eq!(paths, ["a", "b", "b/x"]);
    }

    #[test]
    fn a_directory_may_repeat_and_its_first_mode_stays() {
        let mut first = dir("a");
        first.mode = 0o700;
        let listing = Listing::build(vec![first, dir("a"), dir("a")]).expect("sound");
        assert_eq!(listing.entries().len(), 1);
        assert_eq!(listing.entries()[0].mode, 0o700);
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
