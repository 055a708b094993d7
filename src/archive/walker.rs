//! A tar walker that is fed bytes and says what it needs next. No I/O, and no content passes through it.
//!
//! The walker serves two ways of reading. Hopping asks a blob for a header at a time:
//!
//! ```
//! # use kitfs::archive::walker::{Caps, Step, TarError, Walker};
//! # let layer = vec![0; 1024];
//! # let read = |offset: u64, len: u64| layer[offset as usize..layer.len().min((offset + len) as usize)].to_vec();
//! let mut walker = Walker::new(Some(layer.len() as u64), Caps::default());
//! let mut window = (0, Vec::new());
//! loop {
//!     match walker.step(window.0, &window.1)? {
//!         // At least `len` bytes; more of them save round trips where files are small.
//!         Step::Need { offset, len } => window = (offset, read(offset, len.max(65_536))),
//!         // Its content is at `entry.offset .. entry.offset + entry.size` of the uncompressed layer.
//!         Step::Entry(entry) => println!("{}", entry.path),
//!         Step::End { warning, .. } => break println!("{warning:?}"),
//!     }
//! }
//! # Ok::<(), TarError>(())
//! ```
//!
//! Streaming, where bytes come in order and contents are wanted, is [`super::stream::StreamWalker`].
//!
//! Invariants:
//! - Each step moves forward or asks for bytes further on, so a walk ends with the layer.
//! - Where the layer's size is known, nothing beyond it is asked for, and no entry reaches beyond it.
//! - Nothing is kept between headers but the records that extend the next one. So the walker can't see that a path
//!   repeats: [`super::listing::Listing`] does.
//!
//! Archives are read as Go's `archive/tar` reads them, since `kit unpack` is what a mount must equal:
//! - Directories and links have no content even if their header declares a size, so what follows the header is the next
//!   header. (tar-rs skips such a "content", which hides entries.)
//! - A PAX size always wins; PAX records and GNU long names apply to the next entry only, and GNU's go before PAX's.
//! - A name with a trailing slash makes a directory of type `\0` (as before POSIX), not of type `0`.
//! - The archive ends at two zero blocks, and what follows them is ignored. Its end without any is fine, with a warning; one
//!   zero block before more headers, or a part of a block, is an error. The last padding may be missing.
//!
//! Unlike Go: global PAX headers are skipped, hard links, devices and sparse files are errors, and a `7` (contiguous) is a file.

use super::header::{self, BLOCK, Numbers, Pax};
use super::{Entry, EntryKind};
use crate::path::{InvalidPath, MAX_PATH, TreePath};

/// What a walk may take before it is refused.
#[derive(Debug, Clone)]
pub struct Caps {
    /// Bytes of one PAX header, long name or long link: 1 MiB, as in Go's `archive/tar`. Paths end at 4,095 bytes, but
    /// extended attributes, which are skipped, may be long.
    pub extension: u64,
    /// Headers of all kinds: 16 Mi, more than ImageNet's 14 million files; each will cost some hundred bytes of memory.
    pub headers: u64,
    /// Bytes of all names and link targets together: 1 GiB, or 64 bytes for each of 16 Mi entries.
    pub names: u64,
    /// Components of a path: 256. Nobody nests deeper, and each level costs a node.
    pub depth: usize,
}

impl Caps {
    /// The caps of every walk outside tests, and so of every index.
    pub const DEFAULT: Self = Self { extension: 1 << 20, headers: 16 << 20, names: 1 << 30, depth: 256 };
}

impl Default for Caps {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What [`Walker::step`] answers.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// The bytes from `offset` on are needed, at least `len` of them.
    Need {
        /// Where in the uncompressed layer.
        offset: u64,
        /// How many at least; never more than a header or [`Caps::extension`].
        len: u64,
    },
    /// A header was read. Step again with the same bytes.
    Entry(Entry),
    /// The archive has ended.
    End {
        /// Where its last byte was, plus one.
        offset: u64,
        /// What was odd about the end.
        warning: Option<Warning>,
    },
}

/// Something odd that changes nothing about the entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Warning {
    /// The layer ends without the two zero blocks that end a tar. It may be cut short between two entries.
    NoEndMarker,
}

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoEndMarker => f.write_str("the tar ends without the two zero blocks that mark its end"),
        }
    }
}

/// A layer that is not a tar kitfs reads.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TarError {
    /// A header's checksum is wrong.
    #[error("tar header at offset {offset} has a wrong checksum: the layer is damaged or not a tar")]
    Checksum {
        /// Where the header is.
        offset: u64,
    },
    /// A value in a header, or in the records before it, can't be read.
    #[error("tar header at offset {offset}: can't read {field}")]
    BadField {
        /// Where the header is.
        offset: u64,
        /// What could not be read.
        field: &'static str,
    },
    /// A name that may not stand in a kit.
    #[error("tar header at offset {offset}: {source}")]
    BadName {
        /// Where the header is.
        offset: u64,
        /// What is wrong with the name.
        source: InvalidPath,
    },
    /// A symbolic link without a usable target.
    #[error("symbolic link {path} has a target that is empty, longer than 4,095 bytes or contains a NUL byte")]
    BadTarget {
        /// The link.
        path: TreePath,
    },
    /// The root of the archive as something else than a directory.
    #[error("tar header at offset {offset}: entry {name:?} names the archive's root but is not a directory")]
    RootNotDirectory {
        /// Where the header is.
        offset: u64,
        /// The name as written.
        name: String,
    },
    /// A kind of entry that kitfs doesn't serve.
    #[error("entry {name:?} is a {kind}; a kit may hold files, directories and symbolic links only")]
    Unsupported {
        /// The name as written.
        name: String,
        /// What it is.
        kind: String,
    },
    /// A PAX header or long name beyond [`Caps::extension`].
    #[error("extended header at offset {offset} has {size} bytes; at most {cap} are read")]
    ExtensionTooLong {
        /// Where the header is.
        offset: u64,
        /// What it declares.
        size: u64,
        /// What is allowed.
        cap: u64,
    },
    /// More headers than [`Caps::headers`].
    #[error("the tar has more than {cap} headers")]
    TooManyHeaders {
        /// What is allowed.
        cap: u64,
    },
    /// More bytes of names than [`Caps::names`].
    #[error("the names in the tar take more than {cap} bytes")]
    TooManyNames {
        /// What is allowed.
        cap: u64,
    },
    /// A path with more components than [`Caps::depth`].
    #[error("entry {path} lies more than {cap} directories deep")]
    TooDeep {
        /// The path.
        path: TreePath,
        /// What is allowed.
        cap: usize,
    },
    /// Content that reaches beyond the end of the layer, or of all offsets.
    #[error(
        "entry {name:?} has {size} bytes from offset {offset} on, but the layer ends before: it is cut short or lies"
    )]
    BeyondEnd {
        /// The name as written.
        name: String,
        /// Where its content starts.
        offset: u64,
        /// Its size as stated.
        size: u64,
    },
    /// The layer ends within a header.
    #[error("the layer ends at {end}, within the tar header at offset {offset}: it is cut short")]
    CutHeader {
        /// Where the header is.
        offset: u64,
        /// Where the layer ends.
        end: u64,
    },
    /// A zero block with more headers behind it.
    #[error("zero block at offset {offset} is followed by more headers: the layer is damaged")]
    LoneZeroBlock {
        /// Where it is.
        offset: u64,
    },
}

/// What the walker looks at next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    Header,
    /// The records of an extended header of this type.
    Extension {
        typeflag: u8,
        size: u64,
    },
    /// The second zero block.
    EndMarker,
    Nothing(Option<Warning>),
}

/// What extends the next entry's header.
#[derive(Debug, Default)]
struct Extensions {
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    pax: Pax,
}

/// The content that was announced last: name, offset and size.
type Announced = (Vec<u8>, u64, u64);

/// Walks the headers of one tar. See the module for how to drive it.
#[derive(Debug)]
pub struct Walker {
    caps: Caps,
    /// The uncompressed layer's size, if it is known.
    end: Option<u64>,
    /// Where the next thing to look at begins.
    at: u64,
    expect: Expect,
    extensions: Extensions,
    /// Kept until the end is known, to tell then whether the content is cut short.
    announced: Option<Announced>,
    headers: u64,
    names: u64,
}

impl Walker {
    /// A walk over a layer of `size` uncompressed bytes, if that is known.
    pub fn new(size: Option<u64>, caps: Caps) -> Self {
        Self {
            caps,
            end: size,
            at: 0,
            expect: Expect::Header,
            extensions: Extensions::default(),
            announced: None,
            headers: 0,
            names: 0,
        }
    }

    /// Says that the layer turned out to end at `end`. Needed where the size was not known from the start.
    pub fn ends_at(&mut self, end: u64) -> Result<(), TarError> {
        self.end = Some(end);
        match self.announced.take() {
            Some((name, offset, size)) => self.check_within(&name, offset, size).map(drop),
            None => Ok(()),
        }
    }

    /// Goes on with the bytes of the uncompressed layer that start at `offset`: any window will do, also an empty one.
    ///
    /// If the bytes end before the next thing to look at, the answer is [`Step::Need`]; to give the same bytes again would
    /// ask the same again. After an error the walk is over.
    pub fn step(&mut self, offset: u64, bytes: &[u8]) -> Result<Step, TarError> {
        loop {
            let len = match self.expect {
                Expect::Header | Expect::EndMarker => BLOCK,
                Expect::Extension { size, .. } => size,
                Expect::Nothing(warning) => return Ok(Step::End { offset: self.at, warning }),
            };
            if let Some(end) = self.end {
                if self.at >= end && !matches!(self.expect, Expect::Extension { .. }) {
                    self.at = end;
                    self.expect = Expect::Nothing(Some(Warning::NoEndMarker));
                    continue;
                }
                if end - self.at.min(end) < len {
                    return Err(TarError::CutHeader { offset: self.at, end });
                }
            }
            let Some(found) = window(offset, bytes, self.at, len) else {
                return Ok(Step::Need { offset: self.at, len });
            };
            match self.expect {
                Expect::Header if is_zero(found) => {
                    self.at += BLOCK;
                    self.expect = Expect::EndMarker;
                }
                Expect::Header => {
                    if let Some(entry) = self.header(tar::Header::from_byte_slice(found))? {
                        return Ok(Step::Entry(entry));
                    }
                }
                Expect::EndMarker if is_zero(found) => {
                    self.at += BLOCK;
                    self.expect = Expect::Nothing(None);
                }
                Expect::EndMarker => return Err(TarError::LoneZeroBlock { offset: self.at - BLOCK }),
                Expect::Extension { typeflag, size } => {
                    self.extension(typeflag, found)?;
                    self.at = self.check_within(b"", self.at, size)?;
                    self.expect = Expect::Header;
                }
                Expect::Nothing(_) => {}
            }
        }
    }

    /// Takes the header at `self.at` and moves behind it. `None` if it only extends the next one.
    fn header(&mut self, header: &tar::Header) -> Result<Option<Entry>, TarError> {
        let offset = self.at;
        if !header::checksum_holds(header) {
            return Err(TarError::Checksum { offset });
        }
        self.headers += 1;
        if self.headers > self.caps.headers {
            return Err(TarError::TooManyHeaders { cap: self.caps.headers });
        }
        let typeflag = header.as_old().linkflag[0];
        let numbers = Numbers::parse(header).map_err(|field| TarError::BadField { offset, field })?;
        let content = offset.checked_add(BLOCK).ok_or_else(|| self.beyond_end(b"", offset, BLOCK))?;
        match typeflag {
            b'x' | b'L' | b'K' => {
                let size = self.size(numbers.size)?;
                if size > self.caps.extension {
                    return Err(TarError::ExtensionTooLong { offset, size, cap: self.caps.extension });
                }
                self.at = content;
                self.expect = Expect::Extension { typeflag, size };
                Ok(None)
            }
            b'g' => {
                let size = self.size(numbers.size)?;
                self.skip(header::name(header), content, size)?;
                Ok(None)
            }
            _ => self.entry(header, typeflag, &numbers, content).map(Some),
        }
    }

    /// Makes the entry of a header and of what extends it, and moves behind its content.
    fn entry(
        &mut self,
        header: &tar::Header,
        typeflag: u8,
        numbers: &Numbers,
        content: u64,
    ) -> Result<Entry, TarError> {
        let offset = self.at;
        let Extensions { long_name, long_link, pax } = std::mem::take(&mut self.extensions);
        let name = long_name.or(pax.path).unwrap_or_else(|| header::name(header));
        let target =
            || long_link.or(pax.linkpath).unwrap_or_else(|| header::until_nul(&header.as_old().linkname).to_vec());

        let kind = match typeflag {
            _ if pax.sparse => return Err(unsupported(&name, "sparse file")),
            b'0' | b'7' => EntryKind::File,
            0 if name.ends_with(b"/") => EntryKind::Directory,
            0 => EntryKind::File,
            b'5' => EntryKind::Directory,
            b'2' => EntryKind::Symlink(target()),
            b'1' => return Err(unsupported(&name, "hard link")),
            b'3' => return Err(unsupported(&name, "character device")),
            b'4' => return Err(unsupported(&name, "block device")),
            b'6' => return Err(unsupported(&name, "FIFO")),
            b'S' => return Err(unsupported(&name, "sparse file")),
            other => return Err(unsupported(&name, &format!("tar entry of unknown type '{}'", other.escape_ascii()))),
        };
        let path = TreePath::from_archive(&name).map_err(|source| TarError::BadName { offset, source })?;
        self.check_names(&path, &kind, &name)?;

        let size = match kind {
            EntryKind::File => self.size(pax.size.unwrap_or(numbers.size))?,
            EntryKind::Directory | EntryKind::Symlink(_) => 0,
        };
        let entry = Entry {
            path,
            kind,
            mode: (numbers.mode & 0o7777) as u32,
            uid: owner(pax.uid, numbers.uid),
            gid: owner(pax.gid, numbers.gid),
            mtime: pax.mtime.unwrap_or(numbers.mtime),
            size,
            offset: content,
        };
        self.skip(name, content, size)?;
        Ok(entry)
    }

    /// Moves behind content, which is for others to read.
    fn skip(&mut self, name: Vec<u8>, offset: u64, size: u64) -> Result<(), TarError> {
        self.at = self.check_within(&name, offset, size)?;
        self.announced = self.end.is_none().then_some((name, offset, size));
        Ok(())
    }

    fn extension(&mut self, typeflag: u8, records: &[u8]) -> Result<(), TarError> {
        let text = || Some(header::until_nul(records).to_vec()).filter(|text| !text.is_empty());
        match typeflag {
            b'L' => self.extensions.long_name = text(),
            b'K' => self.extensions.long_link = text(),
            _ => {
                self.extensions.pax =
                    Pax::parse(records).map_err(|field| TarError::BadField { offset: self.at - BLOCK, field })?;
            }
        }
        Ok(())
    }

    fn check_names(&mut self, path: &TreePath, kind: &EntryKind, name: &[u8]) -> Result<(), TarError> {
        if path.is_root() && *kind != EntryKind::Directory {
            return Err(TarError::RootNotDirectory { offset: self.at, name: lossy(name) });
        }
        if path.components().nth(self.caps.depth).is_some() {
            return Err(TarError::TooDeep { path: path.clone(), cap: self.caps.depth });
        }
        self.names += path.as_bytes().len() as u64;
        if let EntryKind::Symlink(target) = kind {
            if target.is_empty() || target.len() > MAX_PATH || target.contains(&0) {
                return Err(TarError::BadTarget { path: path.clone() });
            }
            self.names += target.len() as u64;
        }
        if self.names > self.caps.names {
            return Err(TarError::TooManyNames { cap: self.caps.names });
        }
        Ok(())
    }

    /// Checks that content lies within the layer, and says where the next header is.
    fn check_within(&self, name: &[u8], offset: u64, size: u64) -> Result<u64, TarError> {
        let end = offset.checked_add(size).filter(|end| self.end.is_none_or(|layer| *end <= layer));
        end.and_then(padded).ok_or_else(|| self.beyond_end(name, offset, size))
    }

    fn beyond_end(&self, name: &[u8], offset: u64, size: u64) -> TarError {
        TarError::BeyondEnd { name: lossy(name), offset, size }
    }

    fn size(&self, stated: i64) -> Result<u64, TarError> {
        u64::try_from(stated).map_err(|_| TarError::BadField { offset: self.at, field: "the size: it is negative" })
    }
}

/// The `len` bytes at `at` out of those that start at `offset`, if they are all there.
fn window(offset: u64, bytes: &[u8], at: u64, len: u64) -> Option<&[u8]> {
    at.checked_add(len)?;
    let start = usize::try_from(at.checked_sub(offset)?).ok()?;
    bytes.get(start..)?.get(..usize::try_from(len).ok()?)
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|byte| *byte == 0)
}

/// The next block boundary.
fn padded(offset: u64) -> Option<u64> {
    offset.checked_next_multiple_of(BLOCK)
}

/// What stands in for an owner that Linux has no number for, be it below zero or too large: the kernel's overflow id, `nobody`.
const OVERFLOW_ID: u32 = 65534;
/// The number that means "no owner" to Linux, so that nothing can belong to it.
pub(super) const NO_ID: u32 = u32::MAX;

fn owner(pax: Option<i64>, header: i64) -> u32 {
    u32::try_from(pax.unwrap_or(header)).ok().filter(|id| *id != NO_ID).unwrap_or(OVERFLOW_ID)
}

fn unsupported(name: &[u8], kind: &str) -> TarError {
    TarError::Unsupported { name: lossy(name), kind: kind.to_owned() }
}

fn lossy(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

#[cfg(test)]
#[path = "walker_tests.rs"]
mod tests;
