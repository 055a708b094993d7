//! Which errors the log has by now: what fails for good fails for each request, and its lines would bury the others.
//!
//! A reason is told when it comes first, and from then on once a [`PAUSE`] with how often it came, for as long as it comes.
//!
//! Lock: a plain mutex, held for a look or a note.

use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use lru::LruCache;

/// So long the same is not told again.
const PAUSE: Duration = Duration::from_secs(60);
/// So many reasons are remembered, those that came last: more than the layers of a kit, and half a MiB at most.
const REASONS: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");

/// The reasons that were told.
#[derive(Debug)]
pub(super) struct Told(Mutex<LruCache<String, Known>>);

/// A reason.
#[derive(Debug)]
struct Known {
    told: Instant,
    /// How often it came since then.
    times: u64,
}

impl Told {
    pub(super) fn new() -> Self {
        Self(Mutex::new(LruCache::new(REASONS)))
    }

    /// Notes that something failed at this moment; if that is to be told, how often it was not since it was told last.
    pub(super) fn due(&self, reason: &str, now: Instant) -> Option<u64> {
        let mut reasons = self.0.lock().unwrap_or_else(|held| held.into_inner());
        let Some(known) = reasons.get_mut(reason) else {
            reasons.put(reason.to_owned(), Known { told: now, times: 0 });
            return Some(0);
        };
        if now.duration_since(known.told) < PAUSE {
            known.times += 1;
            return None;
        }
        known.told = now;
        Some(std::mem::take(&mut known.times))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_told_at_once_and_then_once_a_minute_with_how_often_it_came() {
        let (told, start) = (Told::new(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(told.due("gone", at(0)), Some(0));
        assert_eq!([told.due("gone", at(1)), told.due("gone", at(59))], [None, None]);
        assert_eq!(told.due("another", at(59)), Some(0));
        assert_eq!(told.due("gone", at(60)), Some(2));
        assert_eq!(told.due("gone", at(119)), None);
        assert_eq!(told.due("gone", at(500)), Some(1));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (told, now) = (Told::new(), Instant::now());
        for number in 0..2 * REASONS.get() {
            assert_eq!(told.due(&format!("reason {number}"), now), Some(0));
        }
        assert_eq!(told.0.lock().expect("held by nobody").len(), REASONS.get());
    }
}
