//! Which files are read past the kernel's cache.
//!
//! A large file that is read from its start to its end for the first time comes faster so, with a third less work: what a
//! reader asks for is copied to it, and no page is made of it that nobody reads again. But each of its requests is then one
//! to us, and the kernel reads nothing ahead. Measured against a plain download, by the bytes that a reader asks for at a
//! time: 4 KiB 0.18, 16 KiB 0.59, 64 KiB 1.19, 128 KiB 1.37, 1 MiB 1.5; through the page cache 1.1 to 1.3 throughout. So
//! it is right for who asks for much at a time, wrong for who asks for little; and must be chosen when the file is opened,
//! when that is not known. Hence these rules:
//!
//! - The file is large, next to nothing of it is cached, and nobody else has it open, who would read the same again.
//! - A file that was found to be read by little at a time is cached the next time.
//! - As soon as more files of a mount were found to be read by little than by much, all are cached from then on: who reads
//!   so does it with all of them, and has lost something with the first alone.
//!
//! Such a handle counts like a cached one where modes must agree (`fuse::open_modes`), and it can be mapped like one, which
//! goes through the page cache after all.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use super::Ino;

/// Files smaller than this are read before the choice matters.
pub(super) const LARGE: u64 = 64 << 20;
/// Of a file that is opened so, at most this part is cached: one in four. Of what somebody has read already, somebody is
/// likely to read a part again.
const CACHED: u64 = 4;
/// So many bytes tell how a file is read: a header that is read by little does not count, then.
const TELLING: u64 = 4 << 20;
/// A request of fewer bytes is small: there both ways are as fast.
const SMALL: u64 = 64 << 10;

/// What is known of how the files of a mount are read.
#[derive(Debug)]
pub(super) struct Direct(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// Why none is read so any more.
    given_up: Option<String>,
    files: HashMap<Ino, Tally>,
    /// How many files were found to be read by little at a time, and how many by much.
    small: usize,
    large: usize,
}

/// How a file is read.
#[derive(Debug, Clone, Copy)]
enum Tally {
    NotYet { bytes: u64, requests: u64 },
    Small,
    Large,
}

impl Direct {
    pub(super) fn new(is_allowed: bool) -> Self {
        let given_up = (!is_allowed).then(|| "it was asked for with --direct-io never".to_owned());
        Self(Mutex::new(Known { given_up, ..Known::default() }))
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// Has all files cached from now on. The first reason stays.
    pub(super) fn give_up(&self, why: String) {
        self.lock().given_up.get_or_insert(why);
    }

    /// Why no file is read so, if none is.
    pub(super) fn given_up(&self) -> Option<String> {
        self.lock().given_up.clone()
    }

    /// Whether a file of this size may be opened so, as far as its readers so far tell.
    pub(super) fn suits(&self, ino: Ino, size: u64) -> bool {
        let known = self.lock();
        size >= LARGE && known.given_up.is_none() && !matches!(known.files.get(&ino), Some(Tally::Small))
    }

    /// Whether so little of a file is cached that it may be opened so.
    pub(super) fn is_cold(size: u64, cached: u64) -> bool {
        cached <= size / CACHED
    }

    /// Notes what a reader has asked for past the kernel's cache.
    pub(super) fn note_read(&self, ino: Ino, len: u64) {
        let mut known = self.lock();
        let tally = known.files.entry(ino).or_insert(Tally::NotYet { bytes: 0, requests: 0 });
        let Tally::NotYet { bytes, requests } = tally else { return };
        *bytes += len;
        *requests += 1;
        if *bytes < TELLING {
            return;
        }
        if *bytes / *requests >= SMALL {
            *tally = Tally::Large;
            known.large += 1;
            return;
        }
        *tally = Tally::Small;
        known.small += 1;
        if known.small > known.large {
            known.given_up.get_or_insert_with(|| "files are read by little at a time".to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(direct: &Direct, ino: u64, len: u64) {
        (0..TELLING.div_ceil(len)).for_each(|_| direct.note_read(Ino(ino), len));
    }

    #[test]
    fn a_file_that_is_read_by_little_is_cached_the_next_time_and_so_are_all_unless_others_are_not() {
        let direct = Direct::new(true);
        assert!(direct.suits(Ino(1), LARGE) && !direct.suits(Ino(1), LARGE - 1));
        read(&direct, 1, 1 << 20);
        read(&direct, 2, 512);
        assert!(direct.suits(Ino(1), LARGE) && !direct.suits(Ino(2), LARGE) && direct.suits(Ino(3), LARGE));
        read(&direct, 3, 4096);
        assert_eq!(direct.given_up().as_deref(), Some("files are read by little at a time"));
        assert!(!direct.suits(Ino(1), LARGE));
    }

    #[test]
    fn a_header_that_is_read_by_little_does_not_tell_how_a_file_is_read() {
        let direct = Direct::new(true);
        (0..30).for_each(|_| direct.note_read(Ino(1), 8192));
        read(&direct, 1, 1 << 20);
        assert!(direct.suits(Ino(1), LARGE));
    }

    #[test]
    fn what_is_not_allowed_is_never_chosen() {
        assert!(!Direct::new(false).suits(Ino(1), LARGE));
        assert!(Direct::is_cold(LARGE, LARGE / 4) && !Direct::is_cold(LARGE, LARGE / 4 + 1));
    }
}
