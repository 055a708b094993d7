//! Where two indexes of one layer differ: what one *states*, and what was *found* when the layer was read.
//!
//! The form is canonical, so indexes without a difference have the same bytes, and those with the same bytes no difference.

use std::cmp::Ordering;
use std::fmt;
use std::ops::Range;

use super::{Head, Index, LayerFacts, Row, RowKind};
use crate::digest::Digest;

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// A fact of the layer.
    Layer {
        /// Which one.
        field: &'static str,
        /// What the index states.
        stated: String,
        /// What the layer is.
        found: String,
    },
    /// An entry of the layer that the index lacks.
    Missing {
        /// Its path in the layer.
        path: Vec<u8>,
    },
    /// An entry of the index that the layer lacks.
    Extra {
        /// Its path in the index.
        path: Vec<u8>,
    },
    /// A fact of an entry.
    Entry {
        /// Its path.
        path: Vec<u8>,
        /// Which fact.
        field: &'static str,
        /// What the index states.
        stated: String,
        /// What the layer holds.
        found: String,
    },
    /// The digest of one chunk of a file.
    Chunk {
        /// The file's path.
        path: Vec<u8>,
        /// Which chunk, counted from 0.
        chunk: u64,
        /// Its bytes in the file.
        range: Range<u64>,
        /// What the index states.
        stated: Digest,
        /// What the layer's bytes have.
        found: Digest,
    },
}

/// The first differences, and how many there are in all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Differences {
    /// As many as were asked for, in the order of paths.
    pub first: Vec<Difference>,
    /// All of them, counted.
    pub count: u64,
    limit: usize,
}

/// Compares what an index states with what was found. At most `limit` differences are kept, all are counted.
pub fn compare(stated: &Index, found: &Index, limit: usize) -> Differences {
    let mut all = Differences { limit, ..Differences::default() };
    if stated.as_bytes() == found.as_bytes() {
        return all;
    }
    all.facts(stated.head().layer(), found.head().layer());
    let (mut at, mut there) = (0, 0);
    loop {
        let (left, right) = (stated.head().row(at), found.head().row(there));
        let order = match (&left, &right) {
            (None, None) => return all,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(left), Some(right)) => left.path().cmp(right.path()),
        };
        match order {
            Ordering::Less => all.note(|| Difference::Extra { path: path_at(stated.head(), at) }),
            Ordering::Greater => all.note(|| Difference::Missing { path: path_at(found.head(), there) }),
            Ordering::Equal => {
                if let (Some(left), Some(right)) = (left, right)
                    && all.entry(&left, &right)
                {
                    all.chunks(stated, at, found, there);
                }
            }
        }
        at += usize::from(order != Ordering::Greater);
        there += usize::from(order != Ordering::Less);
    }
}

fn path_at(head: &Head, position: usize) -> Vec<u8> {
    head.row(position).map(|row| row.path().to_vec()).unwrap_or_default()
}

impl Differences {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn note(&mut self, difference: impl FnOnce() -> Difference) {
        self.count += 1;
        if self.first.len() < self.limit {
            self.first.push(difference());
        }
    }

    fn facts(&mut self, stated: &LayerFacts, found: &LayerFacts) {
        let facts = [
            ("digest", stated.digest.to_string(), found.digest.to_string()),
            ("size", stated.size.to_string(), found.size.to_string()),
            ("diffId", stated.diff_id.to_string(), found.diff_id.to_string()),
            ("uncompressed size", stated.inflated.to_string(), found.inflated.to_string()),
            ("format", format!("{:?}", stated.format), format!("{:?}", found.format)),
            ("compression", format!("{:?}", stated.compression), format!("{:?}", found.compression)),
        ];
        for (field, stated, found) in facts {
            if stated != found {
                self.note(|| Difference::Layer { field, stated, found });
            }
        }
    }

    /// Compares the facts of an entry; `true` where both are files whose chunks can be compared one by one.
    fn entry(&mut self, stated: &Row<'_>, found: &Row<'_>) -> bool {
        let (left, right) = (stated.to_entry(), found.to_entry());
        let facts = [
            ("type", kind(stated), kind(found)),
            ("mode", format!("{:04o}", left.mode), format!("{:04o}", right.mode)),
            ("uid", left.uid.to_string(), right.uid.to_string()),
            ("gid", left.gid.to_string(), right.gid.to_string()),
            ("mtime", left.mtime.to_string(), right.mtime.to_string()),
            ("size", left.size.to_string(), right.size.to_string()),
            ("offset", left.offset.to_string(), right.offset.to_string()),
        ];
        for (field, stated, found) in facts {
            if stated != found {
                let path = left.path.as_bytes().to_vec();
                self.note(|| Difference::Entry { path, field, stated, found });
            }
        }
        stated.kind() == RowKind::File && found.kind() == RowKind::File && left.size == right.size
    }

    fn chunks(&mut self, stated: &Index, at: usize, found: &Index, there: usize) {
        let (Some(left), Some(right)) = (stated.chunks(at), found.chunks(there)) else { return };
        for chunk in 0..left.len() {
            let (Some(stated_digest), Some(found_digest)) = (left.digest(chunk), right.digest(chunk)) else { continue };
            if stated_digest != found_digest {
                self.note(|| Difference::Chunk {
                    path: path_at(stated.head(), at),
                    chunk,
                    range: left.range(chunk).unwrap_or_default(),
                    stated: stated_digest,
                    found: found_digest,
                });
            }
        }
    }
}

fn kind(row: &Row<'_>) -> String {
    match row.kind() {
        RowKind::File => "file".to_owned(),
        RowKind::Directory => "directory".to_owned(),
        RowKind::Symlink(target) => format!("symbolic link to {:?}", String::from_utf8_lossy(target)),
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |path: &[u8]| format!("{:?}", String::from_utf8_lossy(path));
        match self {
            Self::Layer { field, stated, found } => {
                write!(f, "the layer's {field}: the index says {stated}, it is {found}")
            }
            Self::Missing { path } => write!(f, "{}: in the layer, not in the index", shown(path)),
            Self::Extra { path } => write!(f, "{}: in the index, not in the layer", shown(path)),
            Self::Entry { path, field, stated, found } => {
                write!(f, "{}: {field}: the index says {stated}, it is {found}", shown(path))
            }
            Self::Chunk { path, chunk, range, stated, found } => {
                let Range { start, end } = range;
                let path = shown(path);
                write!(f, "{path}: chunk {chunk} (bytes {start} to {end}): the index says {stated}, it is {found}")
            }
        }
    }
}

#[cfg(test)]
#[path = "diff_tests.rs"]
mod tests;
