//! What was waited for in vain a moment ago.
//!
//! The kernel makes two or three requests of one `read`, and tells threads that wait for the same page one after the other:
//! each would wait out the deadline anew. So whoever asks a source for a blob that it was just given up for is told the same
//! at once: for a [`MOMENT`], or until bytes of the blob come, and only where none had come all the while, so that one
//! connection that hangs is nothing against the others. What is in the cache is not asked for here.
//!
//! Lock: a plain mutex, held for a look or a note.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::GivenUp;
use crate::digest::Digest;

/// So long it is not asked again: longer than the kernel takes to tell a crowd of threads, and a source that is back is back
/// for its readers within it.
const MOMENT: Duration = Duration::from_secs(1);

/// The blobs that were waited for in vain, by their sources.
#[derive(Debug, Default)]
pub struct Vain(Mutex<HashMap<(String, Digest), Note>>);

/// What became of one.
#[derive(Debug)]
struct Note {
    when: Instant,
    /// How many of its bytes had come by then.
    received: u64,
    end: GivenUp,
}

impl Vain {
    /// Notes that a source was given up for a blob, of which so many bytes had come before.
    pub(super) fn note(&self, source: String, blob: Digest, received: u64, end: GivenUp) {
        let mut notes = self.lock();
        notes.retain(|_, note| note.when.elapsed() < MOMENT);
        notes.insert((source, blob), Note { when: Instant::now(), received, end });
    }

    /// Why it is not worth asking, if nothing has come since it was given up.
    pub(super) fn recent(&self, source: String, blob: Digest, received: u64) -> Option<GivenUp> {
        let notes = self.lock();
        let note = notes.get(&(source, blob))?;
        (note.when.elapsed() < MOMENT && note.received == received).then(|| note.end.clone())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(String, Digest), Note>> {
        self.0.lock().unwrap_or_else(|held| held.into_inner())
    }
}
