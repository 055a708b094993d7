//! The walker for bytes that come in order, as in a fill: entries, and their contents in place.
//!
//! ```
//! # use kitfs::archive::stream::{Event, StreamWalker};
//! # use kitfs::archive::walker::{Caps, TarError};
//! # let pieces = [vec![0_u8; 700], vec![0; 324]];
//! let mut walker = StreamWalker::new(None, Caps::default());
//! for piece in &pieces {
//!     let mut rest = &piece[..];
//!     while let Some(event) = walker.next(&mut rest)? {
//!         match event {
//!             Event::Entry(entry) => println!("{}", entry.path), // create the file, start to hash
//!             Event::Content(bytes) => println!("{}", bytes.len()), // hash and write them
//!             Event::EntryEnd => {} // the file is whole
//!         }
//!     }
//! }
//! let warning = walker.finish()?;
//! # Ok::<(), TarError>(())
//! ```
//!
//! Invariants: contents are slices of the input, never copied; only a header that lies across two pieces is put together, in
//! a buffer of at most [`Caps::extension`] bytes.

use super::walker::{Caps, Step, TarError, Walker, Warning};
use super::{Entry, EntryKind};

/// What a stream holds next.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A header. A file's content and [`Event::EntryEnd`] follow, nothing follows for other kinds.
    Entry(Entry),
    /// The next bytes of the file's content; never empty.
    Content(&'a [u8]),
    /// The file's content is whole; also after an empty file.
    EntryEnd,
}

/// Where the stream is.
#[derive(Debug, Clone, Copy)]
enum State {
    /// The walker needs these bytes; what comes before them is skipped.
    Headers { offset: u64, len: u64 },
    /// So many bytes of the current file are to come.
    Content { left: u64 },
    /// The archive has ended; what follows is ignored.
    Ended,
}

/// Turns the ordered bytes of an uncompressed tar into [`Event`]s.
#[derive(Debug)]
pub struct StreamWalker {
    walker: Walker,
    state: State,
    /// How many bytes have been taken.
    at: u64,
    /// The start of what the walker needs, which has come so far; ends at `at`.
    held: Vec<u8>,
}

impl StreamWalker {
    /// A stream of `size` bytes, if that is known.
    pub fn new(size: Option<u64>, caps: Caps) -> Self {
        let state = State::Headers { offset: 0, len: super::header::BLOCK };
        Self { walker: Walker::new(size, caps), state, at: 0, held: Vec::new() }
    }

    /// The next event in `input`, which is moved forward; `None` when `input` is used up. After an error the walk is over.
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, TarError> {
        loop {
            match self.state {
                State::Content { left: 0 } => {
                    self.step(&[])?;
                    return Ok(Some(Event::EntryEnd));
                }
                _ if input.is_empty() => return Ok(None),
                State::Content { left } => {
                    let content = self.take(input, left);
                    self.state = State::Content { left: left - content.len() as u64 };
                    return Ok(Some(Event::Content(content)));
                }
                State::Headers { offset, .. } if offset > self.at => {
                    self.take(input, offset - self.at);
                }
                State::Headers { len, .. } => {
                    if let Some(entry) = self.headers(input, len)? {
                        return Ok(Some(Event::Entry(entry)));
                    }
                }
                State::Ended => {
                    self.take(input, u64::MAX);
                }
            }
        }
    }

    /// Ends the stream. A file or a header that is cut short is an error.
    pub fn finish(mut self) -> Result<Option<Warning>, TarError> {
        self.walker.ends_at(self.at)?;
        match self.walker.step(self.at, &[])? {
            Step::End { warning, .. } => Ok(warning),
            // With the end known, a walker that lacks bytes says so.
            Step::Need { offset, .. } | Step::Entry(Entry { offset, .. }) => {
                Err(TarError::CutHeader { offset, end: self.at })
            }
        }
    }

    /// Goes on with what the walker needs, `len` bytes from `self.at - self.held.len()` on.
    fn headers(&mut self, input: &mut &[u8], len: u64) -> Result<Option<Entry>, TarError> {
        let missing = len - self.held.len() as u64;
        if self.held.is_empty() && input.len() as u64 >= len {
            let bytes = self.take(input, len);
            return self.step(bytes);
        }
        let bytes = self.take(input, missing);
        self.held.reserve_exact(usize::try_from(missing).unwrap_or_default());
        self.held.extend_from_slice(bytes);
        if (bytes.len() as u64) < missing {
            return Ok(None);
        }
        let mut held = std::mem::take(&mut self.held);
        let entry = self.step(&held)?;
        held.clear();
        self.held = held;
        Ok(entry)
    }

    /// Gives the walker bytes that end at `self.at`, and turns to what it wants then.
    fn step(&mut self, bytes: &[u8]) -> Result<Option<Entry>, TarError> {
        match self.walker.step(self.at - bytes.len() as u64, bytes)? {
            Step::Need { offset, len } => self.state = State::Headers { offset, len },
            Step::End { .. } => self.state = State::Ended,
            Step::Entry(entry) if entry.kind == EntryKind::File => {
                self.state = State::Content { left: entry.size };
                return Ok(Some(entry));
            }
            Step::Entry(entry) => {
                self.state = State::Headers { offset: self.at, len: super::header::BLOCK };
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    /// Splits at most `most` bytes off the front of `input`.
    fn take<'a>(&mut self, input: &mut &'a [u8], most: u64) -> &'a [u8] {
        let len = usize::try_from(most).unwrap_or(usize::MAX).min(input.len());
        let (front, rest) = input.split_at(len);
        *input = rest;
        self.at += len as u64;
        front
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
