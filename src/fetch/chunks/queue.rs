//! Chunks that are claimed and wait for a request to get them.
//!
//! What a request gets is settled when there is a place for it, not when it is asked for: what somebody waits for goes
//! first, also where it was to be read ahead when it was claimed; what lies together comes together, whoever asked for it;
//! and what was to be read ahead of a reader who has left is not fetched any more.
//!
//! Lock: a plain mutex around what waits, held for a look or a note; the slots of a file are looked at under it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::Notify;

use super::Chunked;
use super::requests::{REQUEST, Want, joins};
use crate::object::CHUNK_SIZE;

/// The shortest request that a longer piece is cut into, where several places are free: from here on registries are fast.
pub const SHORT: u64 = 4 << 20;

/// So much at most lies between two files of a tar that follow each other: a few headers, with long names. What is longer is
/// another file, which is here or on its way, and not to be fetched twice.
const HEADERS: u64 = 4 << 10;

/// The chunks of a layer that wait.
#[derive(Debug, Default)]
pub struct Queue {
    pending: Mutex<Pending>,
    emptied: Notify,
}

#[derive(Debug, Default)]
struct Pending {
    /// By place in the layer, and by when they came.
    wants: BTreeMap<(u64, u64), Waiting>,
    came: u64,
    bytes: u64,
}

#[derive(Debug)]
struct Waiting {
    want: Want,
    /// Whether it was put as what somebody waits for; it may have become that since.
    is_wanted: bool,
}

impl Waiting {
    fn is_pressing(&self) -> bool {
        self.is_wanted || self.want.claim.is_awaited()
    }
}

impl Queue {
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// Adds chunks that somebody waits for, with those that are to come with them; or chunks to be read ahead.
    pub fn put(&self, wants: Vec<Want>, is_wanted: bool) {
        let mut pending = self.pending();
        for want in wants {
            pending.came += 1;
            pending.bytes += want.bytes();
            let key = (want.at.start, pending.came);
            pending.wants.insert(key, Waiting { want, is_wanted });
        }
    }

    /// Whether the chunk at this place waits.
    pub fn holds(&self, start: u64) -> bool {
        self.pending().wants.range((start, 0)..=(start, u64::MAX)).next().is_some()
    }

    /// How many bytes wait.
    pub fn bytes(&self) -> u64 {
        self.pending().bytes
    }

    /// What the next request gets of what somebody waits for, and a little of what lies behind it; and whether there is more
    /// of it.
    pub fn next_pressing(&self) -> (Vec<Want>, bool) {
        self.next(Waiting::is_pressing, SHORT)
    }

    /// What the next of so many requests gets, or of as many as it takes: of what somebody waits for and of what lies behind
    /// it, or of all; and whether there is more.
    pub fn next_of(&self, is_pressing: bool, requests: usize) -> (Vec<Want>, bool) {
        let bytes = self.bytes();
        // A chunk more, so that the last one does not get what the others leave of their shares.
        let share = bytes / bytes.div_ceil(REQUEST).max(requests as u64).max(1) + u64::from(CHUNK_SIZE);
        let share = share.clamp(SHORT, REQUEST);
        self.next(|waiting| !is_pressing || waiting.is_pressing(), share)
    }

    /// Begins with the one of `these` that has waited longest, first among those that somebody waits for, and goes on
    /// with those behind it: with others as far as `most`.
    fn next(&self, these: impl Fn(&Waiting) -> bool, most: u64) -> (Vec<Want>, bool) {
        let mut pending = self.pending();
        let order = |((_, came), waiting): &(&(u64, u64), &Waiting)| (!waiting.is_pressing(), *came);
        let first = pending.wants.iter().filter(|(_, waiting)| these(waiting)).min_by_key(order);
        let Some(mut key) = first.map(|(key, _)| *key) else { return (Vec::new(), false) };
        let mut wants: Vec<Want> = Vec::new();
        while let Some(Waiting { want, .. }) = pending.wants.remove(&key) {
            pending.bytes -= want.bytes();
            let span = wants.first().map_or(want.at.start, |first| first.at.start)..want.at.end;
            wants.push(want);
            let Some((next, waiting)) = pending.wants.range((span.end, 0)..).next() else { break };
            let is_next = waiting.want.at.start - span.end < HEADERS;
            let is_within = waiting.want.at.end - span.start <= most || waiting.is_pressing();
            if !is_next || !joins(&span, &waiting.want.at) || !is_within {
                break;
            }
            key = *next;
        }
        let more = pending.wants.values().any(these);
        if pending.wants.is_empty() {
            self.emptied.notify_waiters();
        }
        (wants, more)
    }

    /// Drops what was to be read ahead of a file and nobody waits for.
    pub fn give_up(&self, file: &Arc<Chunked>) {
        let mut pending = self.pending();
        let keys = pending.wants.iter().filter(|(_, waiting)| Arc::ptr_eq(waiting.want.claim.file(), file));
        let keys: Vec<_> = keys.map(|(key, _)| *key).collect();
        for key in keys {
            let Some(Waiting { want, is_wanted }) = pending.wants.remove(&key) else { continue };
            match want.give_up() {
                Ok(len) => pending.bytes -= len,
                Err(want) => drop(pending.wants.insert(key, Waiting { want, is_wanted })),
            }
        }
        if pending.wants.is_empty() {
            self.emptied.notify_waiters();
        }
    }

    /// Waits until nothing waits.
    pub async fn until_empty(&self) {
        loop {
            let mut emptied = std::pin::pin!(self.emptied.notified());
            // From here on no news is missed.
            emptied.as_mut().enable();
            if self.pending().wants.is_empty() {
                return;
            }
            emptied.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tokio::sync::watch;

    use super::*;
    use crate::cache::Cache;
    use crate::digest::Digest;
    use crate::fetch::chunks::Wait;
    use crate::fetch::chunks::open_files::OpenFiles;
    use crate::fetch::memory::Memory;
    use crate::object::ChunkList;

    const MIB: u64 = 1 << 20;

    fn file() -> (tempfile::TempDir, Arc<Chunked>) {
        let dir = tempfile::tempdir().expect("a directory");
        let cache = Arc::new(Cache::open(&dir.path().join("cache")).expect("a cache"));
        let digests = Digest::of(b"").as_bytes().repeat(100);
        let list = ChunkList::new(100 * MIB, Bytes::from(digests)).expect("a hundred chunks");
        (dir, OpenFiles::new(&Memory::new(32 << 20)).get_or_open(&cache, list))
    }

    fn claim(file: &Arc<Chunked>, chunk: u64) -> (Option<Want>, Wait) {
        let (claim, wait) = file.claim(chunk, &watch::Sender::new(0));
        (claim.map(|claim| Want::new(claim, chunk * MIB..(chunk + 1) * MIB)), wait)
    }

    fn wants(file: &Arc<Chunked>, chunks: std::ops::Range<u64>) -> Vec<Want> {
        chunks.filter_map(|chunk| claim(file, chunk).0).collect()
    }

    fn chunks(wants: &(Vec<Want>, bool)) -> (Vec<u64>, bool) {
        (wants.0.iter().map(|want| want.claim.chunk()).collect(), wants.1)
    }

    #[test]
    fn what_somebody_waits_for_goes_first_and_what_lies_together_comes_together() {
        let (_dir, file) = file();
        let queue = Queue::default();
        queue.put(wants(&file, 10..20), false);
        queue.put(wants(&file, 20..40), false);
        queue.put(wants(&file, 60..62), true);
        assert_eq!(chunks(&queue.next_pressing()), (vec![60, 61], false));
        assert_eq!(chunks(&queue.next_pressing()), (vec![], false));
        assert_eq!(chunks(&queue.next_of(false, 1)), ((10..26).collect(), true), "16 MiB");
        let (none, wait) = claim(&file, 30);
        assert!(none.is_none() && matches!(wait, Wait::Coming(_)) && queue.holds(30 * MIB));
        assert_eq!(
            chunks(&queue.next_pressing()),
            ((30..34).collect(), false),
            "it was to be read ahead, and now somebody waits; with 4 MiB from there on"
        );
        assert!(!queue.holds(30 * MIB));
        drop(wait);
        assert_eq!(chunks(&queue.next_of(false, 4)), ((26..30).collect(), true), "not over what is fetched already");
        assert_eq!(
            chunks(&queue.next_of(false, 2)),
            ((34..38).collect(), true),
            "cut, so that there is one for each place"
        );
        assert_eq!(chunks(&queue.next_of(false, 1)), ((38..40).collect(), false));
        assert_eq!(queue.bytes(), 0);
    }

    #[test]
    fn headers_are_read_over_and_what_another_request_brings_is_not() {
        let (_dir, file) = file();
        let queue = Queue::default();
        let at = |chunk: u64, start: u64| {
            let claim = claim(&file, chunk).0.expect("free").claim;
            Want::new(claim, start..start + MIB)
        };
        let (second, third) = (MIB + 2048, 2 * MIB + 2048 + HEADERS);
        queue.put(vec![at(0, 0), at(1, second), at(2, third)], true);
        assert_eq!(chunks(&queue.next_pressing()), (vec![0, 1], true));
        assert_eq!(chunks(&queue.next_pressing()), (vec![2], false));
    }

    #[tokio::test]
    async fn what_nobody_waits_for_is_given_up_and_can_be_claimed_again() {
        let (_dir, file) = file();
        let (_other_dir, other) = self::file();
        let queue = Queue::default();
        queue.put(wants(&file, 10..14), false);
        queue.put(wants(&other, 50..51), false);
        let wait = claim(&file, 12).1;
        queue.give_up(&file);
        assert_eq!(queue.bytes(), 2 * MIB);
        assert!(claim(&file, 10).0.is_some() && claim(&file, 12).0.is_none());
        let mut empty = std::pin::pin!(queue.until_empty());
        assert!(futures_util::poll!(empty.as_mut()).is_pending());
        assert_eq!(chunks(&queue.next_of(false, 1)), (vec![12], true));
        assert_eq!(chunks(&queue.next_of(false, 1)), (vec![50], false));
        empty.await;
        drop(wait);
    }
}
