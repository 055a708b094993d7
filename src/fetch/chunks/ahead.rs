//! What to fetch before it is asked for: which parts of a content were read, and what is likely to be read next. One for
//! all who read it; the content of a file, or that of a layer's small files one after the other.
//!
//! Readers are not told apart. What tells that somebody reads on is what lies before a read: where more than half of it was
//! read too, the window is four times as wide as that. So it doubles, and doubles again, with each step of a stream; and it
//! is the same whether one thread reads or sixteen in stripes, in whatever order the kernel's own read-ahead brings their
//! reads, and whether a map is touched page by page or with gaps. Before a random read nothing was read, or less than a
//! chunk, as the kernel cuts a read that lies across its pages in two; and it gets its chunk and no more.

use std::ops::Range;

use crate::object::CHUNK_SIZE;

/// The widest window, in chunks: at 20 ms and a gigabyte a second 20 MiB are on their way, at 100 ms 100 MiB, and beyond
/// 64 MiB before the reader no rate grew on loopback.
pub const WIDEST: u64 = 64;
/// What is noted as read: an eighth of a chunk, the kernel's usual read-ahead. Finer than a chunk, so that small reads that
/// come to lie in neighbouring chunks by chance are not taken for a stream.
const BLOCK: u64 = CHUNK / 8;
const CHUNK: u64 = CHUNK_SIZE as u64;
/// The window is so many times as wide as what was read before it: from the first chunk to the widest window in three
/// steps, each of which costs a round trip.
const FACTOR: u64 = 4;
/// So far back is looked, in blocks: over the stripes of 2 MiB that sixteen threads are in at once, and as many again.
const BACK: u64 = 64 * CHUNK / BLOCK;

/// What was read of a content, and what was asked for.
#[derive(Debug, Default)]
pub struct Streams {
    /// Blocks that were read.
    read: Bits,
    /// Chunks that were asked for.
    asked: Bits,
}

impl Streams {
    /// Notes a read of these bytes of content of `size`; tells which chunks behind it should be asked for now, at most
    /// `widest`. Some of them may have been. Who asks says so with [`Streams::asked`].
    pub fn read(&mut self, range: &Range<u64>, size: u64, widest: u64) -> Range<u64> {
        let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK);
        self.read.set(blocks.clone());
        let next = range.end.div_ceil(CHUNK);
        let run = Some(self.run(blocks.start) * BLOCK).filter(|run| *run >= CHUNK).unwrap_or_default();
        let window = widest.min(run * FACTOR / CHUNK);
        let end = size.div_ceil(CHUNK).min(next + window);
        let first = self.asked.first_unset(next);
        // In halves of the window, so that requests are few and one is always under way.
        let is_due = first < end && (first - next) * 2 <= window;
        if is_due { first..end } else { next..next }
    }

    /// Notes that chunks are asked for.
    pub fn asked(&mut self, chunks: Range<u64>) {
        self.asked.set(chunks);
    }

    /// How many of the first chunks were asked for.
    pub fn count_asked(&self, chunks: u64) -> u64 {
        self.asked.count(0..chunks)
    }

    /// Notes that chunks that were asked for do not come.
    pub fn given_up(&mut self, chunks: Range<u64>) {
        self.asked.unset(chunks);
    }

    /// Notes that a chunk is missing when it is read. Where it was asked for before, it has come and gone, and what else
    /// was read may have gone too.
    pub fn missed(&mut self, chunk: u64) {
        if self.asked.is_set(chunk) {
            *self = Self::default();
        }
    }

    /// How many blocks were read in the longest stretch before a block of which more than half was.
    fn run(&self, block: u64) -> u64 {
        let lengths = std::iter::successors(Some(1), |len| Some(len * 2)).take_while(|len| *len <= BACK);
        let read = |len: u64| (len, self.read.count(block.saturating_sub(len)..block));
        lengths.map(read).filter(|(len, read)| read * 2 > *len).map(|(_, read)| read).max().unwrap_or_default()
    }
}

/// A set of small numbers.
#[derive(Debug, Default)]
struct Bits(Vec<u64>);

impl Bits {
    fn is_set(&self, at: u64) -> bool {
        self.0.get((at / 64) as usize).is_some_and(|word| word >> (at % 64) & 1 == 1)
    }

    fn set(&mut self, range: Range<u64>) {
        let words = range.end.div_ceil(64) as usize;
        if !range.is_empty() && self.0.len() < words {
            self.0.resize(words, 0);
        }
        self.words(range, |word, mask| *word |= mask);
    }

    fn unset(&mut self, range: Range<u64>) {
        self.words(range, |word, mask| *word &= !mask);
    }

    /// Of those that are held.
    fn words(&mut self, range: Range<u64>, change: impl Fn(&mut u64, u64)) {
        for (at, mask) in masks(range) {
            let Some(word) = self.0.get_mut(at) else { break };
            change(word, mask);
        }
    }

    fn count(&self, range: Range<u64>) -> u64 {
        let held = masks(range).map_while(|(at, mask)| Some(self.0.get(at)? & mask));
        held.map(|word| u64::from(word.count_ones())).sum()
    }

    fn first_unset(&self, from: u64) -> u64 {
        let unset = masks(from..self.0.len() as u64 * 64).find_map(|(at, mask)| {
            let open = !self.0.get(at)? & mask;
            (open != 0).then(|| at as u64 * 64 + u64::from(open.trailing_zeros()))
        });
        unset.unwrap_or_else(|| from.max(self.0.len() as u64 * 64))
    }
}

/// The words that hold a range, with its bits in each.
fn masks(range: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    (range.start / 64..range.end.div_ceil(64).max(range.start / 64)).map(move |at| {
        let from = range.start.saturating_sub(at * 64).min(63);
        let to = (range.end - at * 64).min(64);
        (at as usize, (u64::MAX >> (64 - to)) & (u64::MAX << from))
    })
}

#[cfg(test)]
#[path = "ahead_tests.rs"]
mod tests;
