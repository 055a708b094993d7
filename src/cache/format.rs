//! `format`: the version of a cache's layout, and what kind of directory it is.
//!
//! ```text
//! kitfs-cache 1
//! 3f8a…            the first 16 hexadecimal digits of the SHA-256 of the line above, its end included
//! ```
//!
//! The check tells a newer version from a damaged file. A newer cache is never written to, whatever the command; nor is a
//! directory that is no cache. A damaged one is refused until `kitfs cache verify --repair` writes it anew. Where the cache is
//! removed under a process that has it open, that process writes it again with the first directory that it makes.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read as _};
use std::path::Path;

use super::evict::LOCK;
use super::files::{make_dir, open_file};
use super::usage::Area;
use super::{Cache, CacheError, io_error};
use crate::digest::Digest;

/// The file.
pub(super) const NAME: &str = "format";
/// What the root of a file system of its own may hold beside a cache: that of the file system's repair, for root alone.
pub(super) const LOST_AND_FOUND: &str = "lost+found";
/// What a cache of any version says in its first line, before the number.
const WORD: &str = "kitfs-cache ";
/// The version of this layout.
const VERSION: u32 = 1;
/// So many digits are enough against damage; nobody is kept from writing them.
const CHECK: usize = 16;
/// No `format` of any version is longer.
const LONGEST: u64 = 4096;
/// What every cache has since it was first opened. All of them, as a Git directory has `objects` and an OCI layout
/// `blobs/sha256`.
const ALWAYS: [Area; 5] = [Area::Blobs, Area::Indexes, Area::Objects, Area::Partial, Area::Incoming];

/// What kind of directory it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Format {
    /// A cache of this version.
    Ours,
    /// A cache of another version.
    Other(u32),
    /// A cache whose `format` is missing or damaged.
    Damaged(String),
    /// Nothing is in it.
    Empty,
    /// No cache.
    Foreign,
}

/// What `format` holds in a cache of this version.
pub(super) fn content() -> String {
    let line = format!("{WORD}{VERSION}\n");
    let check = check(&line);
    line + &check + "\n"
}

fn check(line: &str) -> String {
    let mut hex = Digest::of(line.as_bytes()).hex();
    hex.truncate(CHECK);
    hex
}

/// Looks what a directory is.
pub(super) fn look(root: &Path) -> Result<Format, CacheError> {
    // Twice: who makes a cache writes `format` first, and it may have come to lie between other looks.
    for _ in 0..2 {
        let found = read(&root.join(NAME))?;
        if let Some(format) = found.as_deref().and_then(judge) {
            return Ok(format);
        }
        if found.is_none() && is_empty(root)? {
            return Ok(Format::Empty);
        }
    }
    let is_there = |area: Area| fs::symlink_metadata(root.join(area.dir())).is_ok_and(|found| found.is_dir());
    let is_cache = ALWAYS.into_iter().all(is_there);
    if !is_cache {
        return Ok(Format::Foreign);
    }
    Ok(Format::Damaged(match read(&root.join(NAME))? {
        Some(found) => format!("reads {:?}", String::from_utf8_lossy(&found[..found.len().min(64)])),
        None => "is missing".to_owned(),
    }))
}

/// What a `format` says, if it is whole.
fn judge(found: &[u8]) -> Option<Format> {
    if found == content().as_bytes() {
        return Some(Format::Ours);
    }
    let text = std::str::from_utf8(found).ok()?;
    let (line, rest) = text.split_at(text.find('\n')? + 1);
    let number: u32 = line.strip_prefix(WORD)?.trim_end_matches('\n').parse().ok()?;
    // A version that had no check is no version of ours either.
    let is_whole = rest.is_empty() || rest.lines().next() == Some(&check(line));
    (is_whole && number != VERSION).then_some(Format::Other(number))
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, CacheError> {
    let Some(file) = open_file(path).map_err(io_error("open", path))? else { return Ok(None) };
    let mut bytes = Vec::new();
    match file.take(LONGEST).read_to_end(&mut bytes) {
        Ok(_) => Ok(Some(bytes)),
        Err(error) => Err(io_error("read", path)(error)),
    }
}

/// Whether nothing is in a directory but what was left by who was killed while making it a cache, and what a new file
/// system holds.
fn is_empty(root: &Path) -> Result<bool, CacheError> {
    holds_only(root, is_nothing)
}

fn is_nothing(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b"format.") || name == LOST_AND_FOUND
}

fn holds_only(root: &Path, is_fine: impl Fn(&OsStr) -> bool) -> Result<bool, CacheError> {
    let entries = fs::read_dir(root).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
    let entries = entries.map_err(io_error("read", root))?;
    Ok(entries.iter().all(|entry| is_fine(&entry.file_name())))
}

impl Cache {
    /// Refuses what is no cache of this version; makes one of an empty directory.
    pub(super) fn check_format(&self, also_damaged: bool) -> Result<(), CacheError> {
        let path = self.root.clone();
        match look(&path)? {
            Format::Ours => Ok(()),
            Format::Empty => self.write_format(),
            Format::Other(version) => Err(CacheError::Version { path, version }),
            Format::Foreign => Err(CacheError::Foreign { path }),
            Format::Damaged(_) if also_damaged => Ok(()),
            Format::Damaged(found) => Err(CacheError::Format { path, found }),
        }
    }

    /// Writes `format` again, where it is gone and nothing is there but what we have made since, or what is still to be
    /// removed. What else lies there may be another's by now.
    pub(super) fn restore_format(&self) -> Result<(), CacheError> {
        let path = self.root.join(NAME);
        if fs::symlink_metadata(&path).map_or_else(|error| error.kind() != io::ErrorKind::NotFound, |_| true) {
            return Ok(());
        }
        make_dir(&self.root)?;
        let is_ours = |name: &OsStr| is_nothing(name) || name == LOCK || name.to_str().is_some_and(Area::is_name);
        if holds_only(&self.root, is_ours)? { self.write_format() } else { Ok(()) }
    }

    /// Writes `format`, so that it is on the disk before anything that it is about.
    pub(super) fn write_format(&self) -> Result<(), CacheError> {
        self.write_file(&self.root.join(NAME), &[content().as_bytes()])?;
        let synced = fs::File::open(&self.root).and_then(|root| root.sync_all());
        synced.map_err(io_error("sync", &self.root))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_format_tells_its_version_and_any_other_is_damaged() {
        let checked = |line: &str| format!("{line}{}\n", check(line)).into_bytes();
        assert_eq!(judge(&checked("kitfs-cache 1\n")), Some(Format::Ours));
        assert_eq!(judge(&checked("kitfs-cache 2\n")), Some(Format::Other(2)));
        assert_eq!(judge(b"kitfs-cache 2\n"), Some(Format::Other(2)));
        assert_eq!(judge(&[checked("kitfs-cache 7\n"), b"more\n".to_vec()].concat()), Some(Format::Other(7)));
        for damaged in ["", "kitfs-cache 1\n", "kitfs-cache 1", "kitfs-cache x\n", "something else\n"] {
            assert_eq!(judge(damaged.as_bytes()), None, "{damaged:?}");
        }
    }

    #[test]
    fn a_file_system_of_its_own_is_an_empty_directory() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir(dir.path().join(LOST_AND_FOUND)).expect("makes");
        let cache = Cache::open(dir.path()).expect("opens");
        let before = cache.usage().expect("counts").bytes();
        fs::write(dir.path().join(LOST_AND_FOUND).join("#12"), vec![1; 100_000]).expect("writes");
        assert_eq!(cache.usage().expect("counts").bytes(), before, "what is found there is not the cache's");
    }

    #[test]
    fn no_flipped_bit_and_no_cut_makes_another_version_of_it() {
        let right = content().into_bytes();
        for bit in 0..right.len() * 8 {
            let mut flipped = right.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(judge(&flipped), None, "{:?}", String::from_utf8_lossy(&flipped));
        }
        for len in 0..right.len() {
            assert_eq!(judge(&right[..len]), None, "{len}");
        }
    }
}
