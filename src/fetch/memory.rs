//! The memory that content takes on its way from a source to its readers and to the disk: one budget for all of a
//! process, so that its anonymous memory is bounded by configuration and not by what it serves.
//!
//! Who is about to receive bytes takes a [`Share`] first, and gives it back by dropping it. Nobody waits for a share while
//! holding one that others need to get on: a request takes what it needs at once, or chunk by chunk where each chunk goes
//! its way without the next.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What shares are counted in: 64 KiB, as a semaphore counts up to 2^29 on 32-bit machines too.
const UNIT: u64 = 64 << 10;

/// The budget of a process.
#[derive(Debug)]
pub struct Memory {
    bytes: u64,
    units: Arc<Semaphore>,
}

/// The right to hold so many bytes in memory.
#[derive(Debug)]
pub struct Share(#[expect(dead_code, reason = "held until it is dropped")] OwnedSemaphorePermit);

impl Memory {
    /// A budget of so many bytes.
    pub fn new(bytes: u64) -> Self {
        let units = usize::try_from(bytes / UNIT).unwrap_or(usize::MAX).clamp(1, Semaphore::MAX_PERMITS);
        Self { bytes, units: Arc::new(Semaphore::new(units)) }
    }

    /// All of it.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A share for `len` bytes, as soon as others have given enough back; at most all there is.
    pub async fn share(&self, len: u64) -> Share {
        let units = len.min(self.bytes).div_ceil(UNIT).max(1);
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        // The semaphore is never closed.
        let permit = self.units.clone().acquire_many_owned(units).await;
        Share(permit.unwrap_or_else(|_| unreachable!("the budget is never closed")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_wants_more_than_is_left_waits_until_it_is_given_back() {
        let memory = Memory::new(4 << 20);
        let most = memory.share(3 << 20).await;
        let mut next = std::pin::pin!(memory.share(2 << 20));
        assert!(futures_util::poll!(next.as_mut()).is_pending());
        drop(most);
        drop(next.await);
        drop(memory.share(1 << 30).await);
    }
}
