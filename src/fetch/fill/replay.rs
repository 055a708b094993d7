//! What an earlier fill has left of a layer, read again as the layer's first bytes.
//!
//! It is surveyed first, by the walker that cut the layer: the bytes that are no file's content tell which files there
//! are, and how much of each is there. It ends where something is missing. Nothing of it is believed: whoever reads it
//! hashes it together with the rest of the layer.

use std::ops::Range;

use futures_util::{StreamExt as _, TryStreamExt as _};
use tokio::sync::{mpsc, watch};

use crate::archive::EntryKind;
use crate::archive::walker::{Caps, Step, TarError, Walker};
use crate::cache::resume::{Beside, LeftFile, Reached, WORTH};
use crate::cache::{CacheError, Left};
use crate::digest::Unverified;
use crate::fetch::FetchError;
use crate::fetch::transfer::ordered::Ordered;
use crate::modelkit::{Compression, Format, Layer};

/// What is handed on at once.
const PIECE: usize = 1 << 20;
/// Pieces that are read ahead of who hashes them.
const QUEUE: usize = 4;
/// Headers are read so many bytes at once.
const WINDOW: u64 = 256 << 10;

/// What is left can't be gone on from.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// It can't be read.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// Its headers are none.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// A file holds more than the layer has of it.
    #[error("file {number} has {found} bytes, and its header says {size}")]
    TooLong {
        /// Its number.
        number: u64,
        /// How long it is.
        found: u64,
        /// How long it should be.
        size: u64,
    },
    /// It is not what it was a moment ago.
    #[error("it changed while it was read")]
    Changed,
}

/// A layer's first bytes, as an earlier fill has left them.
#[derive(Debug)]
pub struct Replay {
    layer: Layer,
    left: Left,
    at: Reached,
}

/// What a fill of this layer keeps beside its files.
pub fn beside(layer: &Layer) -> Beside {
    match layer.compression {
        Compression::None => Beside::Between,
        Compression::Gzip | Compression::Zstd => Beside::Blob,
    }
}

impl Replay {
    /// Looks through what is left; `None` where it is not worth going on from. Blocks.
    pub fn survey(layer: &Layer, left: Left) -> Result<Option<Self>, Unusable> {
        let most = left.counts();
        let replay = Self::up_to(layer, left, most)?;
        Ok((replay.at.offset >= WORTH).then_some(replay))
    }

    /// What is left, up to so many bytes of the layer.
    fn up_to(layer: &Layer, mut left: Left, most: u64) -> Result<Self, Unusable> {
        let mut parts = Parts::new(layer, &left, most);
        while parts.next()?.is_some() {}
        let at = parts.reached();
        // What lies behind goes before the rest is read again.
        left.end_at(at.beside);
        Ok(Self { layer: layer.clone(), left, at })
    }

    /// Up to where the layer is there.
    pub fn reached(&self) -> Reached {
        self.at
    }

    /// Its bytes, which `received` counts.
    pub fn stream(self, received: watch::Sender<u64>) -> Ordered {
        let (sender, mut receiver) = mpsc::channel::<Result<Unverified, FetchError>>(QUEUE);
        tokio::task::spawn_blocking(move || {
            let taken = |piece| sender.blocking_send(Ok(Unverified::new(piece))).is_ok();
            if let Err(error) = self.read(taken) {
                let (path, cause) = (self.left.dir().to_owned(), std::io::Error::other(error));
                let _ = sender.blocking_send(Err(CacheError::Io { what: "go on with", path, cause }.into()));
            }
        });
        futures_util::stream::poll_fn(move |context| receiver.poll_recv(context))
            .inspect_ok(move |piece| received.send_modify(|all| *all += piece.len() as u64))
            .boxed()
    }

    /// Hands its bytes on, until nobody takes them.
    fn read(&self, mut take: impl FnMut(Vec<u8>) -> bool) -> Result<(), Unusable> {
        let mut parts = Parts::new(&self.layer, &self.left, self.at.offset);
        let mut piece = Vec::with_capacity(PIECE);
        while let Some(part) = parts.next()? {
            let (file, mut range) = match part {
                Part::Beside(range) => (None, range),
                Part::File { len: 0, .. } => continue,
                Part::File { number, len } => (Some(self.left.file(number)?), 0..len),
            };
            while !range.is_empty() {
                let filled = piece.len();
                let len = (range.end - range.start).min((PIECE - filled) as u64);
                piece.resize(filled + len as usize, 0);
                read(&self.left, file.as_ref(), &mut piece[filled..], range.start)?;
                range.start += len;
                if piece.len() == PIECE && !take(std::mem::replace(&mut piece, Vec::with_capacity(PIECE))) {
                    return Ok(());
                }
            }
        }
        if parts.reached() != self.at {
            return Err(Unusable::Changed);
        }
        take(piece);
        Ok(())
    }
}

fn read(left: &Left, file: Option<&LeftFile>, buffer: &mut [u8], offset: u64) -> Result<(), CacheError> {
    match file {
        Some(file) => file.read(buffer, offset),
        None => left.read_beside(buffer, offset),
    }
}

/// A part of a layer.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    /// What lies there beside the files.
    Beside(Range<u64>),
    /// So much of a file, from its start.
    File { number: u64, len: u64 },
}

/// The parts of a layer that are there, in order.
struct Parts<'a> {
    left: &'a Left,
    /// `None` where the layer is not cut by headers.
    walker: Option<Walker>,
    is_raw: bool,
    /// Bytes of headers, from `start` on; the first of them is at `offset` in the layer.
    window: Vec<u8>,
    start: usize,
    offset: u64,
    /// How many bytes of content lie before it.
    content: u64,
    /// What comes next, and how long it would be if all of it were there.
    pending: Option<(u64, u64)>,
    most: u64,
    is_over: bool,
    at: Reached,
}

impl<'a> Parts<'a> {
    /// The parts up to `most` bytes of the layer.
    fn new(layer: &Layer, left: &'a Left, most: u64) -> Self {
        let is_plain = layer.compression == Compression::None;
        let is_raw = is_plain && layer.format != Format::Tar;
        Self {
            left,
            walker: (is_plain && !is_raw).then(|| Walker::new(Some(layer.size), Caps::default())),
            is_raw,
            window: Vec::new(),
            start: 0,
            offset: 0,
            content: 0,
            // A raw layer is one file.
            pending: is_raw.then_some((0, layer.size)),
            most: most.min(layer.size),
            is_over: false,
            at: Reached::default(),
        }
    }

    /// Where those that were given end.
    fn reached(&self) -> Reached {
        self.at
    }

    fn next(&mut self) -> Result<Option<Part>, Unusable> {
        if self.is_over {
            return Ok(None);
        }
        if let Some((number, size)) = self.pending.take() {
            return self.file(number, size).map(Some);
        }
        let end = self.headers()?.min(self.left.beside());
        let start = self.at.beside;
        let len = (end - start).min(self.most - self.at.offset);
        self.is_over = self.pending.is_none() || start + len < end;
        self.at.beside += len;
        self.at.offset += len;
        Ok(Some(Part::Beside(start..start + len)))
    }

    fn file(&mut self, number: u64, size: u64) -> Result<Part, Unusable> {
        let found = self.left.file_len(number).unwrap_or(0);
        if found > size {
            return Err(Unusable::TooLong { number, found, size });
        }
        let len = found.min(self.most - self.at.offset);
        // There is nothing else in a raw layer; and an empty file that is lost is made again.
        self.is_over = self.is_raw || len < size;
        self.at.offset += len;
        self.at.files = number + 1;
        self.at.last = len;
        Ok(Part::File { number, len })
    }

    /// Reads headers up to the next file's, which is pending then; tells where they end among the bytes beside the files.
    fn headers(&mut self) -> Result<u64, Unusable> {
        let Some(walker) = &mut self.walker else { return Ok(self.left.beside()) };
        loop {
            match walker.step(self.offset, &self.window[self.start..])? {
                Step::Need { offset, len } => {
                    let from = offset - self.content;
                    let Some(room) = self.left.beside().checked_sub(from).filter(|room| *room >= len) else {
                        return Ok(self.left.beside());
                    };
                    self.window.resize(room.min(len.max(WINDOW)) as usize, 0);
                    self.left.read_beside(&mut self.window, from)?;
                    (self.start, self.offset) = (0, offset);
                }
                Step::Entry(entry) if entry.kind == EntryKind::File => {
                    let end = entry.offset - self.content;
                    self.pending = Some((self.at.files, entry.size));
                    // What follows in the window follows on the content in the layer.
                    self.start += (entry.offset - self.offset) as usize;
                    self.offset = entry.offset + entry.size;
                    self.content += entry.size;
                    return Ok(end);
                }
                Step::Entry(_) => {}
                Step::End { .. } => return Ok(self.left.beside()),
            }
        }
    }
}

#[cfg(test)]
#[path = "replay_tests.rs"]
mod tests;
