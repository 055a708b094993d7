//! Paths inside a kit, valid once they exist.
//!
//! Invariants of [`TreePath`]: relative to the kit's root, `/` between components, no empty component, no `.`, no `..`,
//! no NUL, each component at most 255 bytes, the whole at most 4,095. The empty path is the root. Bytes, not text:
//! names in a tar need not be UTF-8.

use std::fmt;

/// The longest path, as Linux's `PATH_MAX` less its NUL.
pub const MAX_PATH: usize = 4095;
/// The longest component, as Linux's `NAME_MAX`.
pub const MAX_NAME: usize = 255;

/// A path below the kit's root.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct TreePath(Vec<u8>);

/// A path that may not stand in a kit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("path {path:?} {why}")]
pub struct InvalidPath {
    /// The path as it was read, lossily decoded.
    pub path: String,
    /// What is wrong with it.
    pub why: &'static str,
}

impl TreePath {
    /// The kit's root.
    pub const fn root() -> Self {
        Self(Vec::new())
    }

    /// Cleans a user's path as Go's `path.Clean` does: `./x`, `x//`, `x/./` and `.` are right; whatever is absolute or
    /// climbs out of the root is refused.
    pub fn clean(path: &[u8]) -> Result<Self, InvalidPath> {
        let invalid = |why| InvalidPath { path: String::from_utf8_lossy(path).into_owned(), why };
        if path.first() == Some(&b'/') {
            return Err(invalid("is absolute; paths in a kit are relative to its root"));
        }
        let mut out = Self::root();
        for name in path.split(|byte| *byte == b'/') {
            match name {
                b"" | b"." => {}
                b".." => {
                    if out.is_root() {
                        return Err(invalid("climbs out of the kit's root"));
                    }
                    out = out.parent().unwrap_or_default();
                }
                name => out = out.join_name(name).map_err(invalid)?,
            }
        }
        Ok(out)
    }

    /// A path as an archive states it. Like [`TreePath::clean`], but `..` is refused even where it stays inside.
    pub fn from_archive(path: &[u8]) -> Result<Self, InvalidPath> {
        if path.split(|byte| *byte == b'/').any(|name| name == b"..") {
            return Err(InvalidPath { path: String::from_utf8_lossy(path).into_owned(), why: "contains `..`" });
        }
        Self::clean(path)
    }

    /// A path that is clean already, byte for byte as [`TreePath::as_bytes`] gives it.
    pub fn from_clean(path: &[u8]) -> Result<Self, InvalidPath> {
        match clean_depth(path) {
            Ok(_) => Ok(Self(path.to_vec())),
            Err(why) => Err(InvalidPath { path: String::from_utf8_lossy(path).into_owned(), why }),
        }
    }

    fn join_name(&self, name: &[u8]) -> Result<Self, &'static str> {
        check_name(name)?;
        let mut bytes = Vec::with_capacity(self.0.len() + 1 + name.len());
        bytes.extend_from_slice(&self.0);
        if !bytes.is_empty() {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(name);
        check_length(&bytes)?;
        Ok(Self(bytes))
    }

    /// This path with `below` under it.
    pub fn join(&self, below: &TreePath) -> Result<Self, InvalidPath> {
        if self.is_root() {
            return Ok(below.clone());
        }
        if below.is_root() {
            return Ok(self.clone());
        }
        let mut bytes = self.0.clone();
        bytes.push(b'/');
        bytes.extend_from_slice(&below.0);
        if bytes.len() > MAX_PATH {
            return Err(InvalidPath {
                path: String::from_utf8_lossy(&bytes).into_owned(),
                why: "is longer than 4,095 bytes",
            });
        }
        Ok(Self(bytes))
    }

    /// The raw bytes, without a leading slash; empty for the root.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether this is the kit's root.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The components from the root down.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.0.split(|byte| *byte == b'/').filter(|name| !name.is_empty())
    }

    /// The directory that holds this path; `None` for the root.
    pub fn parent(&self) -> Option<Self> {
        if self.is_root() {
            return None;
        }
        let end = self.0.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
        Some(Self(self.0[..end].to_vec()))
    }

    /// The last component; `None` for the root.
    pub fn name(&self) -> Option<&[u8]> {
        self.components().next_back()
    }

    /// All parents, from the root (which is the first) down to the nearest.
    pub fn ancestors(&self) -> impl Iterator<Item = TreePath> + '_ {
        let slashes = self.0.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        let ends = (!self.is_root()).then_some(0).into_iter().chain(slashes);
        ends.map(|end| Self(self.0[..end].to_vec()))
    }

    /// Whether this path is `other` or lies below it.
    pub fn is_within(&self, other: &TreePath) -> bool {
        is_within(&self.0, &other.0)
    }
}

/// The same of the bytes of clean paths, for who has millions where they lie.
pub fn is_within(path: &[u8], other: &[u8]) -> bool {
    let below = path.strip_prefix(other);
    other.is_empty() || below.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
}

impl AsRef<[u8]> for TreePath {
    fn as_ref(&self) -> &[u8] {
        self.as_bytes()
    }
}

/// How many components a clean path has, or why it is none that [`TreePath::as_bytes`] could give. Allocates nothing, for
/// who checks millions where they lie.
pub fn clean_depth(path: &[u8]) -> Result<usize, &'static str> {
    check_length(path)?;
    if path.is_empty() {
        return Ok(0);
    }
    path.split(|byte| *byte == b'/').try_fold(0, |depth, name| match name {
        b"" => Err("has an empty component, or a slash at an end"),
        b"." => Err("contains `.`"),
        b".." => Err("contains `..`"),
        name => check_name(name).map(|()| depth + 1),
    })
}

fn check_name(name: &[u8]) -> Result<(), &'static str> {
    if name.len() > MAX_NAME {
        return Err("has a component of more than 255 bytes");
    }
    if name.contains(&0) {
        return Err("contains a NUL byte");
    }
    Ok(())
}

fn check_length(path: &[u8]) -> Result<(), &'static str> {
    if path.len() > MAX_PATH { Err("is longer than 4,095 bytes") } else { Ok(()) }
}

impl fmt::Display for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_root() {
            return f.write_str(".");
        }
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

impl fmt::Debug for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean(path: &str) -> String {
        TreePath::clean(path.as_bytes()).map_or_else(|e| e.why.to_owned(), |p| p.to_string())
    }

    #[test]
    fn paths_are_cleaned_as_go_does() {
        assert_eq!(clean("./x"), "x");
        assert_eq!(clean("x//"), "x");
        assert_eq!(clean("x/./y"), "x/y");
        assert_eq!(clean("x/../y"), "y");
        assert_eq!(clean("."), ".");
        assert_eq!(clean(""), ".");
    }

    #[test]
    fn paths_that_leave_the_root_are_refused() {
        for path in ["/etc", "..", "a/../..", "a\0b"] {
            assert!(TreePath::clean(path.as_bytes()).is_err(), "{path}");
        }
        assert!(TreePath::from_archive(b"a/../b").is_err());
        assert!(TreePath::clean(&vec![b'a'; 256]).is_err());
        assert!(TreePath::clean(&b"a/".repeat(2100)).is_err());
    }

    #[test]
    fn a_clean_path_is_taken_as_it_is_and_no_other() {
        for path in ["", "x", "x/y", ".x", "x../...", "\u{fc}"] {
            let taken = TreePath::from_clean(path.as_bytes()).expect("clean");
            assert_eq!(taken, TreePath::clean(path.as_bytes()).expect("valid"));
        }
        for path in ["/", "/x", "x/", "x//y", ".", "./x", "x/.", "..", "x/../y", "a\0b"] {
            assert!(TreePath::from_clean(path.as_bytes()).is_err(), "{path}");
        }
        assert!(TreePath::from_clean(&[b'a'; 256]).is_err());
        let longest = b"a/".repeat(2048);
        assert!(TreePath::from_clean(&longest[..4095]).is_ok());
        assert!(TreePath::from_clean(&[&longest[..], b"a"].concat()).is_err());
        assert_eq!(clean_depth(b""), Ok(0));
        assert_eq!(clean_depth(b"a/b/c"), Ok(3));
    }

    #[test]
    fn within_goes_by_components() {
        let path = |p: &str| TreePath::clean(p.as_bytes()).expect("valid");
        assert!(path("a/b").is_within(&path("a")));
        assert!(path("a").is_within(&path("a")));
        assert!(!path("ab").is_within(&path("a")));
        assert!(path("a").is_within(&TreePath::root()));
    }

    #[test]
    fn ancestors_begin_at_the_root() {
        let path = TreePath::clean(b"a/b/c").expect("valid");
        let all: Vec<_> = path.ancestors().map(|p| p.to_string()).collect();
        assert_eq!(all, [".", "a", "a/b"]);
        assert_eq!(TreePath::root().ancestors().count(), 0);
    }
}
