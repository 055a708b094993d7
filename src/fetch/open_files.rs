//! The files that a process is filling chunk by chunk, each once, and those that are complete and wait for the disk.
//!
//! Locks: a plain mutex around the map of files, one around those that wait; held for a look or a note, never both.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use bytes::Bytes;
use lru::LruCache;

use super::chunks::{Chunked, Unwritten};
use crate::cache::{Cache, Partial};
use crate::object::{ChunkList, ObjectDigest};

/// So many chunks are kept in memory for want of a disk: 32 MiB.
const UNWRITTEN: NonZeroUsize = NonZeroUsize::new(32).expect("not zero");
/// So many complete files may wait to be made durable, each with its descriptor, before more are fetched that nobody
/// asked for: a quarter of 4,096, the smallest hard limit that is usual.
const WAITING: usize = 1024;

/// The files that this process is filling, and those that wait to be made durable.
#[derive(Debug)]
pub struct OpenFiles {
    files: Mutex<HashMap<ObjectDigest, Weak<Chunked>>>,
    complete: Mutex<Complete>,
    unwritten: Arc<Unwritten>,
}

impl Default for OpenFiles {
    fn default() -> Self {
        let unwritten = Arc::new(Mutex::new(LruCache::new(UNWRITTEN)));
        Self { files: Mutex::default(), complete: Mutex::default(), unwritten }
    }
}

#[derive(Debug, Default)]
struct Complete {
    waiting: Vec<Arc<Chunked>>,
    /// Whether somebody is at it, who will find those that come meanwhile.
    committing: bool,
}

impl OpenFiles {
    /// The file of this content, if it is being filled.
    pub fn get(&self, object: &ObjectDigest) -> Option<Arc<Chunked>> {
        self.files().get(object).and_then(Weak::upgrade)
    }

    /// The file of this content.
    pub fn get_or_open(&self, cache: &Cache, list: ChunkList<Bytes>) -> Arc<Chunked> {
        let mut files = self.files();
        if let Some(file) = files.get(&list.object()).and_then(Weak::upgrade) {
            return file;
        }
        // Amortised: as often as the map would grow.
        if files.len() == files.capacity() {
            files.retain(|_, file| file.strong_count() > 0);
        }
        let object = list.object();
        let file = Arc::new(Chunked::new(cache.partial(list), self.unwritten.clone()));
        files.insert(object, Arc::downgrade(&file));
        file
    }

    fn files(&self) -> MutexGuard<'_, HashMap<ObjectDigest, Weak<Chunked>>> {
        self.files.lock().unwrap_or_else(|held| held.into_inner())
    }

    fn complete(&self) -> MutexGuard<'_, Complete> {
        self.complete.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// Whether more may be fetched that nobody asked for.
    pub fn has_room(&self) -> bool {
        self.complete().waiting.len() < WAITING
    }

    /// Makes a complete file durable, behind the readers' backs, together with others that become complete meanwhile.
    pub fn commit(self: &Arc<Self>, cache: &Arc<Cache>, file: Arc<Chunked>) {
        let mut complete = self.complete();
        complete.waiting.push(file);
        if std::mem::replace(&mut complete.committing, true) {
            return;
        }
        drop(complete);
        let (committing, cache) = (Committing(self.clone()), cache.clone());
        tokio::task::spawn_blocking(move || {
            while let Some(group) = committing.next_group() {
                let partials: Vec<&Partial> = group.iter().map(|file| file.partial()).collect();
                for error in cache.commit(&partials) {
                    tracing::error!(%error, "the cache did not keep a verified file under its name");
                }
            }
        });
    }
}

/// Who commits. Whatever ends it, the next complete file finds another.
struct Committing(Arc<OpenFiles>);

impl Committing {
    /// Those that have become complete meanwhile.
    fn next_group(&self) -> Option<Vec<Arc<Chunked>>> {
        let mut complete = self.0.complete();
        complete.committing = !complete.waiting.is_empty();
        complete.committing.then(|| std::mem::take(&mut complete.waiting))
    }
}

impl Drop for Committing {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.complete().committing = false;
        }
    }
}
