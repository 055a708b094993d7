//! A tree of a mount, and what the kernel holds of it.
//!
//! Locks: plain mutexes around moments, held for a look or a note.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::{Fs, Ino};
use crate::digest::Digest;

/// The bit that tells a directory below `.kitfs` from the same one below the root. Hashes have 62 bits, and the last one is
/// left out because some programs read numbers as signed.
pub(super) const VIEW: u64 = 1 << 62;

/// A tree, and what the kernel holds of it.
#[derive(Debug)]
pub struct Live {
    pub(super) fs: Arc<Fs>,
    /// Its number among the trees of the mount, which the handles of its root tell.
    pub(super) serial: u64,
    /// Names that the kernel knows, each as often as it was told, handles, and requests under way.
    pub(super) held: AtomicU64,
    /// When a file was last opened.
    pub(super) opened: Mutex<Instant>,
    /// Since when it is not served any more.
    pub(super) replaced: Mutex<Option<Instant>>,
    /// How often the kernel was asked to forget its names since then.
    pub(super) tidied: AtomicU32,
}

impl Live {
    pub(super) fn new(fs: Arc<Fs>, serial: u64) -> Arc<Self> {
        let opened = Mutex::new(Instant::now());
        Arc::new(Self {
            fs,
            serial,
            held: AtomicU64::new(0),
            opened,
            replaced: Mutex::default(),
            tidied: AtomicU32::new(0),
        })
    }

    /// The tree.
    pub fn fs(&self) -> &Arc<Fs> {
        &self.fs
    }

    /// How long no file of it was opened.
    pub fn unopened(&self) -> Duration {
        lock(&self.opened).elapsed()
    }

    pub(super) fn digest(&self) -> Digest {
        self.fs.kit().resolved.digest
    }

    pub(super) fn hold(&self) {
        self.held.fetch_add(1, Ordering::SeqCst);
    }

    /// The number of its root below `.kitfs`.
    pub(super) fn root(&self) -> Ino {
        Ino(self.fs.root_number() | VIEW)
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|held| held.into_inner())
}
