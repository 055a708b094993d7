//! The memory that content takes on its way from a source to its readers and to the disk: one budget for all of a
//! process, so that its anonymous memory is bounded by configuration and not by what it serves.
//!
//! The budget has parts that nobody else can use up, so that none who holds memory waits for one who waits for memory:
//!
//! - [`Memory::chunks`]: buffers in which a ranged request puts its chunks together, one after the other. Who has one waits
//!   for the network and the disk, which end, and for no other memory.
//! - [`Memory::replies`]: buffers that replies are read into; each is held for one read and one answer.
//! - [`Memory::unwritten`]: chunks that the cache can't take.
//! - What is left goes in shares: who is about to hold more than a chunk takes a [`Share`] first, and gives it back by
//!   dropping it. Nobody waits for a share while holding one that others need to get on.
//!
//! Buffers are page-aligned and reused, last in, first out: what was touched last is still in the processor's cache, and
//! fresh memory for each chunk cost a quarter of the throughput.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::digest::Room;
use crate::object::CHUNK_SIZE;

/// What shares are counted in: 64 KiB, as a semaphore counts up to 2^29 on 32-bit machines too.
const UNIT: u64 = 64 << 10;
/// What a buffer holds: a chunk, which is also the largest reply.
pub const BUFFER: usize = CHUNK_SIZE as usize;
/// The part of the budget that each kind of buffer gets, and what is unwritten,
const PART: u64 = 8;
/// up to so many chunks: more requests or replies at once only take each other's processors.
const MOST: u64 = 32;
/// Buffers begin at a multiple of this: the kernel copies whole pages fastest.
const PAGE: usize = 4096;

/// The budget of a process.
#[derive(Debug)]
pub struct Memory {
    /// What goes in shares.
    shared: u64,
    units: Arc<Semaphore>,
    chunks: Arc<Buffers>,
    replies: Arc<Buffers>,
    unwritten: NonZeroUsize,
}

/// The right to hold so many bytes in memory.
#[derive(Debug)]
pub struct Share(#[expect(dead_code, reason = "held until it is dropped")] OwnedSemaphorePermit);

impl Memory {
    /// A budget of so many bytes.
    pub fn new(bytes: u64) -> Self {
        let part = (bytes / PART / BUFFER as u64).clamp(1, MOST);
        let shared = bytes.saturating_sub(3 * part * BUFFER as u64).max(UNIT);
        let units = usize::try_from(shared / UNIT).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        let buffers = || Arc::new(Buffers::new(part as usize));
        let unwritten = NonZeroUsize::new(part as usize).unwrap_or(NonZeroUsize::MIN);
        Self { shared, units: Arc::new(Semaphore::new(units)), chunks: buffers(), replies: buffers(), unwritten }
    }

    /// For chunks that a ranged request puts together.
    pub fn chunks(&self) -> &Arc<Buffers> {
        &self.chunks
    }

    /// For replies.
    pub fn replies(&self) -> &Arc<Buffers> {
        &self.replies
    }

    /// So many chunks may be kept in memory for want of a disk.
    pub fn unwritten(&self) -> NonZeroUsize {
        self.unwritten
    }

    /// What shares may come to, all together.
    pub fn shared(&self) -> u64 {
        self.shared
    }

    /// A share for `len` bytes, as soon as others have given enough back; at most all there is.
    pub async fn share(&self, len: u64) -> Share {
        let units = len.min(self.shared).div_ceil(UNIT).max(1);
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        // The semaphore is never closed.
        let permit = self.units.clone().acquire_many_owned(units).await;
        Share(permit.unwrap_or_else(|_| unreachable!("the budget is never closed")))
    }

    /// A share, if so much is free and nobody waits for it.
    pub fn try_share(&self, len: u64) -> Option<Share> {
        let units = len.min(self.shared).div_ceil(UNIT).max(1);
        self.units.clone().try_acquire_many_owned(u32::try_from(units).ok()?).ok().map(Share)
    }
}

/// Buffers of one kind.
#[derive(Debug)]
pub struct Buffers {
    places: Arc<Semaphore>,
    /// Those that nobody uses, the one used last at the end. A mutex, as it is held for a push or a pop.
    free: Mutex<Vec<Vec<u8>>>,
}

/// The right to one buffer at a time.
#[derive(Debug)]
pub struct Place {
    home: Arc<Buffers>,
    #[expect(dead_code, reason = "held until it is dropped")]
    permit: OwnedSemaphorePermit,
}

/// [`BUFFER`] bytes, of which the first are in use; it goes back when it is dropped.
#[derive(Debug)]
pub struct Buffer {
    home: Arc<Buffers>,
    bytes: Vec<u8>,
    /// Where the first page begins.
    start: usize,
    len: usize,
}

impl Buffers {
    fn new(count: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(count)), free: Mutex::default() }
    }

    /// A place, as soon as there is one.
    pub async fn place(self: &Arc<Self>) -> Place {
        let permit = self.places.clone().acquire_owned().await;
        let permit = permit.unwrap_or_else(|_| unreachable!("the budget is never closed"));
        Place { home: self.clone(), permit }
    }

    /// A place, if there is one now.
    pub fn place_now(self: &Arc<Self>) -> Option<Place> {
        let permit = self.places.clone().try_acquire_owned().ok()?;
        Some(Place { home: self.clone(), permit })
    }

    fn free(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.free.lock().unwrap_or_else(|held| held.into_inner())
    }
}

impl Place {
    /// The buffer, empty. Whoever asks again has given the one before back, or waits for nothing until it is.
    pub fn buffer(&self) -> Buffer {
        // Zeroed pages that nobody has touched cost nothing.
        let bytes = self.home.free().pop().unwrap_or_else(|| vec![0; BUFFER + PAGE]);
        let start = bytes.as_ptr().align_offset(PAGE).min(PAGE);
        Buffer { home: self.home.clone(), bytes, start, len: 0 }
    }
}

impl Room for Buffer {
    fn push(&mut self, bytes: &[u8]) {
        let end = BUFFER.min(self.len + bytes.len());
        let (from, to) = (self.start + self.len, self.start + end);
        self.bytes[from..to].copy_from_slice(&bytes[..to - from]);
        self.len = end;
    }
}

impl Buffer {
    /// The first `len` bytes, whatever they are, to be written over. `None` where it holds fewer.
    pub fn first(&mut self, len: usize) -> Option<&mut [u8]> {
        self.len = Some(len).filter(|len| *len <= BUFFER)?;
        Some(&mut self.bytes[self.start..self.start + len])
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.home.free().push(std::mem::take(&mut self.bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_wants_more_than_is_left_waits_until_it_is_given_back() {
        let memory = Memory::new(8 << 20);
        assert_eq!(memory.shared(), 5 << 20);
        let most = memory.share(4 << 20).await;
        assert!(memory.try_share(2 << 20).is_none() && memory.try_share(1 << 20).is_some());
        let mut next = std::pin::pin!(memory.share(2 << 20));
        assert!(futures_util::poll!(next.as_mut()).is_pending());
        drop(most);
        drop(next.await);
        drop(memory.share(1 << 30).await);
    }

    #[tokio::test]
    async fn shares_leave_the_buffers_alone_and_all_parts_together_are_the_budget() {
        for mib in [32_u64, 256, 1024] {
            let memory = Memory::new(mib << 20);
            let _all = memory.share(u64::MAX).await;
            let places = [memory.chunks(), memory.replies()]
                .map(|buffers| std::iter::from_fn(|| buffers.place_now()).collect::<Vec<_>>().len());
            let count = (mib as usize / 8).min(32);
            assert_eq!((places, memory.unwritten().get()), ([count; 2], count), "{mib} MiB");
            assert_eq!(memory.shared() + 3 * ((count as u64) << 20), mib << 20);
        }
    }

    #[tokio::test]
    async fn there_are_as_many_places_as_buffers_and_the_next_waits_for_one() {
        let buffers = Arc::new(Buffers::new(2));
        let (first, _second) = (buffers.place().await, buffers.place().await);
        assert!(buffers.place_now().is_none());
        let mut third = std::pin::pin!(buffers.place());
        assert!(futures_util::poll!(third.as_mut()).is_pending());
        drop(first);
        drop(third.await);
    }

    #[tokio::test]
    async fn a_buffer_is_whole_pages_and_the_one_used_last_is_used_next() {
        let buffers = Arc::new(Buffers::new(2));
        let (one, two) = (buffers.place().await, buffers.place().await);
        let (first, second) = (one.buffer(), two.buffer());
        let address = first.bytes.as_ptr();
        assert_eq!(first.bytes[first.start..].as_ptr().align_offset(PAGE), 0);
        drop(second);
        drop(first);
        let again = two.buffer();
        assert_eq!(again.bytes.as_ptr(), address);
        drop(again);
        assert_eq!(buffers.free().len(), 2);
    }

    #[tokio::test]
    async fn a_buffer_holds_what_was_put_into_it_and_no_more_than_it_can() {
        let place = Arc::new(Buffers::new(1)).place().await;
        let mut buffer = place.buffer();
        buffer.push(b"ab");
        buffer.push(b"c");
        assert_eq!(buffer.as_ref(), b"abc");
        buffer.push(&vec![1; BUFFER]);
        assert_eq!(buffer.as_ref().len(), BUFFER);
        assert!(buffer.first(BUFFER + 1).is_none());
        buffer.first(2).expect("it holds two").copy_from_slice(b"xy");
        assert_eq!(bytes::Bytes::from_owner(buffer), "xy");
        assert!(place.buffer().as_ref().is_empty());
    }
}
