//! Contents of files that are open: kept at hand from the first read to the last release, so that the cache can tell
//! what is in use from what may go. Beyond a bound the one read longest ago is let go, and opened anew when it is read.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard};

use lru::LruCache;

use crate::fetch::chunks::open_files::share;
use crate::fetch::layer::Content;

/// Files of the cache kept at hand; fewer where the process may open few.
const MOST: usize = 256;

/// A file: its layer and its row.
pub(super) type At = (u32, u32);

/// The contents at hand. A plain mutex: it is held for a look or a note, and what is let go is closed after.
#[derive(Debug)]
pub(super) struct AtHand(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    contents: LruCache<At, Content>,
    /// How often each file is open.
    handles: HashMap<At, u64>,
    /// How often something was forgotten.
    forgotten: u64,
}

/// What is known of a file that was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    /// Whether nobody else has it open.
    pub(super) is_first: bool,
    /// Whether its content is at hand.
    pub(super) is_at_hand: bool,
}

/// A moment between two times that something is forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Moment(u64);

impl AtHand {
    pub(super) fn new() -> Self {
        let most = NonZeroUsize::new(share(MOST)).unwrap_or(NonZeroUsize::MIN);
        Self(Mutex::new(Inner { contents: LruCache::new(most), handles: HashMap::new(), forgotten: 0 }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// Notes that a file was opened once more.
    pub(super) fn opened(&self, at: At) -> Found {
        let mut inner = self.lock();
        let handles = inner.handles.entry(at).or_insert(0);
        *handles += 1;
        let is_first = *handles == 1;
        Found { is_first, is_at_hand: inner.contents.contains(&at) }
    }

    /// Notes that a file was closed once. After the last time its content is given back, to be let go.
    pub(super) fn released(&self, at: At) -> Option<Content> {
        let mut inner = self.lock();
        let count = inner.handles.get_mut(&at)?;
        *count -= 1;
        if *count > 0 {
            return None;
        }
        inner.handles.remove(&at);
        inner.contents.pop(&at)
    }

    /// The content of a file, if it is at hand, and when that was.
    pub(super) fn get(&self, at: At) -> (Option<Content>, Moment) {
        let mut inner = self.lock();
        let moment = Moment(inner.forgotten);
        (inner.contents.get(&at).cloned(), moment)
    }

    /// Keeps the content of a file, which was not at hand at that moment; not if something was forgotten since, as that
    /// may have been this.
    pub(super) fn put(&self, at: At, content: Content, moment: Moment) {
        let mut inner = self.lock();
        if moment != Moment(inner.forgotten) {
            return;
        }
        let let_go = inner.contents.push(at, content);
        drop(inner);
        drop(let_go);
    }

    /// Lets the content of a file go: it is to be had in another way.
    pub(super) fn forget(&self, at: At) {
        let mut inner = self.lock();
        inner.forgotten += 1;
        let let_go = inner.contents.pop(&at);
        drop(inner);
        drop(let_go);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::cache::Cache;
    use crate::fetch::chunks::open_files::OpenFiles;
    use crate::fetch::memory::Memory;
    use crate::object::ChunkList;

    #[test]
    fn content_is_at_hand_from_the_first_read_to_the_last_release() {
        let dir = tempfile::tempdir().expect("a directory");
        let cache = Arc::new(Cache::open(&dir.path().join("cache")).expect("a cache"));
        let list = ChunkList::new(0, bytes::Bytes::new()).expect("no chunks");
        let file = OpenFiles::new(&Memory::new(32 << 20)).get_or_open(&cache, list);
        let (files, at) = (AtHand::new(), (0, 7));
        assert_eq!(files.opened(at), Found { is_first: true, is_at_hand: false });
        let (_, moment) = files.get(at);
        files.put(at, Content::Chunked(file.clone()), moment);
        let second = Found { is_first: false, is_at_hand: true };
        assert_eq!(files.opened(at), second, "the second reader finds it");
        assert!(files.released(at).is_none() && files.get(at).0.is_some());
        assert!(files.released(at).is_some() && files.get(at).0.is_none());
        let (_, moment) = files.get(at);
        files.forget(at);
        files.put(at, Content::Chunked(file.clone()), moment);
        assert!(files.get(at).0.is_none(), "it was opened before it was forgotten");
        assert_eq!(Arc::strong_count(&file), 1, "nobody holds it any more");
    }
}
