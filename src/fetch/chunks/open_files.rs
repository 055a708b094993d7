//! The files that a process is filling chunk by chunk, each once, and those that are complete and wait for the disk. Each
//! has a descriptor, so there is a bound on how many there are.
//!
//! Locks: a plain mutex around the map of files, one around those that wait; held for a look or a note, never both.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lru::LruCache;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::{Chunked, Unwritten};
use crate::cache::{Cache, Partial};
use crate::fetch::memory::Memory;
use crate::object::{ChunkList, ObjectDigest};

/// So many files may wait to be made durable, each with its descriptor, before those who would add to them wait as well;
/// and so many may be filled that nobody asked for. Fewer where the process may open few: see [`share`]. Enough for small
/// files to come at the rate of the wire while a sync of the disk takes its time; each takes about a kilobyte.
const WAITING: usize = 4096;
/// A sync makes all files durable that have become complete before it, and the whole disk waits for it. So it comes when
/// for so long no further file has become complete,
const QUIET: Duration = Duration::from_millis(25);
/// or half as many wait as may, or the first has waited for so long.
const LONGEST: Duration = Duration::from_secs(1);

/// What of the descriptors that this process may open goes to one use of many; at most `most`. An eighth: there are the
/// two uses here, the files at hand in `fs`, sockets, and what is opened for a moment.
pub fn share(most: usize) -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    limit.map_or(most, |limit| usize::try_from(limit / 8).unwrap_or(most)).clamp(1, most)
}

/// The files that this process is filling, and those that wait to be made durable.
#[derive(Debug)]
pub struct OpenFiles {
    files: Mutex<HashMap<ObjectDigest, Weak<Chunked>>>,
    complete: Mutex<Complete>,
    /// Tells that fewer files wait.
    fewer: Notify,
    most: usize,
    /// For files that nobody asked for.
    neighbours: Arc<Semaphore>,
    unwritten: Arc<Unwritten>,
}

#[derive(Debug, Default)]
struct Complete {
    waiting: Vec<Arc<Chunked>>,
    /// How many wait, those in hand included.
    count: usize,
    /// Whether somebody is at it, who will find those that come meanwhile.
    committing: bool,
}

impl OpenFiles {
    /// None yet. Chunks that the cache can't take have their part of the budget.
    pub fn new(memory: &Memory) -> Self {
        let unwritten = Arc::new(Mutex::new(LruCache::new(memory.unwritten())));
        let most = share(WAITING);
        let neighbours = Arc::new(Semaphore::new(most));
        Self { files: Mutex::default(), complete: Mutex::default(), fewer: Notify::new(), most, neighbours, unwritten }
    }

    /// The file of this content, if it is being filled.
    pub fn get(&self, object: &ObjectDigest) -> Option<Arc<Chunked>> {
        self.files().get(object).and_then(Weak::upgrade)
    }

    /// Whoever wants this content next opens its file anew, and hashes what is in it: who has it now knows of bytes that
    /// were right once. They go on with it.
    pub fn let_go(&self, object: &ObjectDigest) {
        self.files().remove(object);
    }

    /// The file of this content.
    pub fn get_or_open(&self, cache: &Arc<Cache>, list: ChunkList<Bytes>) -> Arc<Chunked> {
        let mut files = self.files();
        if let Some(file) = files.get(&list.object()).and_then(Weak::upgrade) {
            return file;
        }
        // Amortised: as often as the map would grow.
        if files.len() == files.capacity() {
            files.retain(|_, file| file.strong_count() > 0);
        }
        let object = list.object();
        let file = Arc::new(Chunked::new(cache.clone(), cache.partial(list), self.unwritten.clone()));
        files.insert(object, Arc::downgrade(&file));
        file
    }

    fn files(&self) -> MutexGuard<'_, HashMap<ObjectDigest, Weak<Chunked>>> {
        self.files.lock().unwrap_or_else(|held| held.into_inner())
    }

    fn complete(&self) -> MutexGuard<'_, Complete> {
        self.complete.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// The right to fill a file that nobody asked for, if there is one left; the file keeps it for as long as it is open.
    pub fn neighbour(&self) -> Option<OwnedSemaphorePermit> {
        self.neighbours.clone().try_acquire_owned().ok()
    }

    /// The same, as soon as there is one.
    pub async fn next_neighbour(&self) -> Option<OwnedSemaphorePermit> {
        self.neighbours.clone().acquire_owned().await.ok()
    }

    /// Whether files wait to be made durable.
    pub fn are_waiting(&self) -> bool {
        self.complete().count > 0
    }

    /// Waits until not too many files wait for the disk. It writes them or fails, so this ends.
    pub async fn until_room(&self) {
        loop {
            let mut fewer = std::pin::pin!(self.fewer.notified());
            // From here on no news is missed.
            fewer.as_mut().enable();
            if self.complete().count < self.most {
                return;
            }
            fewer.await;
        }
    }

    /// Makes a complete file durable, behind the readers' backs, together with others that become complete meanwhile.
    pub fn commit(self: &Arc<Self>, cache: &Arc<Cache>, file: Arc<Chunked>) {
        let mut complete = self.complete();
        complete.waiting.push(file);
        complete.count += 1;
        if std::mem::replace(&mut complete.committing, true) {
            return;
        }
        drop(complete);
        let (committing, cache) = (Committing(self.clone()), cache.clone());
        tokio::task::spawn_blocking(move || {
            while let Some(group) = committing.gathered_group() {
                let partials: Vec<&Partial> = group.iter().map(|file| file.partial()).collect();
                for error in cache.commit(&partials) {
                    error.unless_full(|error| {
                        tracing::error!(%error, "the cache did not keep a verified file under its name");
                    });
                }
                committing.done(group);
            }
        });
    }
}

/// Who commits. Whatever ends it, the next complete file finds another.
struct Committing(Arc<OpenFiles>);

impl Committing {
    /// Those that are worth a sync.
    fn gathered_group(&self) -> Option<Vec<Arc<Chunked>>> {
        let (began, mut before) = (Instant::now(), 0);
        loop {
            let count = self.0.complete().waiting.len();
            if count == before || count * 2 >= self.0.most || began.elapsed() >= LONGEST {
                return self.next_group();
            }
            before = count;
            std::thread::sleep(QUIET);
        }
    }

    /// Those that have become complete meanwhile.
    fn next_group(&self) -> Option<Vec<Arc<Chunked>>> {
        let mut complete = self.0.complete();
        complete.committing = !complete.waiting.is_empty();
        complete.committing.then(|| std::mem::take(&mut complete.waiting))
    }

    /// Closes the files of a group.
    fn done(&self, group: Vec<Arc<Chunked>>) {
        let count = group.len();
        drop(group);
        self.0.complete().count -= count;
        self.0.fewer.notify_waiters();
    }
}

impl Drop for Committing {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut complete = self.0.complete();
            complete.committing = false;
            complete.count = complete.waiting.len();
            drop(complete);
            self.0.fewer.notify_waiters();
        }
    }
}
