use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;

use super::*;
use crate::cache::{Partial, Policy, Protected, Settings, io_error};
use crate::digest::{Digest, Unverified};
use crate::object::{ChunkList, ObjectDigest, VerifiedChunk};

const MIB: u64 = 1 << 20;
/// What is written at once in these tests.
const PIECE: u64 = 64 << 10;

fn open(dir: &Path, limit: Limit, policy: Policy) -> Cache {
    let settings = Settings { limit, policy, ..Settings::default() };
    Cache::open_with(&dir.join("cache"), settings).expect("a cache")
}

fn limited(limit: Limit) -> (tempfile::TempDir, Cache) {
    let dir = tempfile::tempdir().expect("a directory");
    let cache = open(dir.path(), limit, Policy::default());
    (dir, cache)
}

fn held(cache: &Cache) -> u64 {
    cache.usage().expect("counts").bytes()
}

/// Content of `PIECE` bytes, its list, and its one chunk.
fn piece(number: u64) -> (ChunkList<Bytes>, VerifiedChunk) {
    let bytes: Vec<u8> = (0..PIECE / 8).flat_map(|at| (at ^ number << 32).to_le_bytes()).collect();
    let list = ChunkList::new(PIECE, Bytes::copy_from_slice(Digest::of(&bytes).as_bytes())).expect("one chunk");
    let chunk = list.verify(0, Unverified::new(bytes)).expect("a chunk").expect("its bytes");
    (list, chunk)
}

/// Keeps a small file; it stays open as long as what is returned.
fn keep(cache: &Cache, number: u64) -> Result<Partial, CacheError> {
    let (list, chunk) = piece(number);
    let partial = cache.partial(list);
    assert!(partial.write(cache, &chunk)?);
    let failed = cache.commit(&[&partial]);
    failed.into_iter().next().map_or(Ok(partial), Err)
}

fn has(cache: &Cache, number: u64) -> bool {
    cache.has_object(&piece(number).0.object(), PIECE)
}

#[test]
fn a_limit_has_marks_below_it_and_free_space_makes_one() {
    let disk = |free| Disk { total: 1000, free };
    assert_eq!(Limit::None.marks(5, disk(10)), None);
    assert_eq!(Limit::Bytes(200).marks(5, disk(10)), Some(Marks { limit: 200, high: 190, low: 180 }));
    let limit = |held, free| Limit::KeepFree(20).marks(held, disk(free)).expect("a limit").limit;
    assert_eq!(limit(300, 500), 600, "300 are over");
    assert_eq!(limit(300, 100), 200, "100 are to go");
    assert_eq!(limit(50, 100), 0, "others use more than the cache could make up for");
    assert_eq!(Limit::Bytes(u64::MAX).marks(0, disk(0)).expect("a limit").high, (u64::MAX as u128 * 95 / 100) as u64);
}

#[test]
fn a_cache_stays_below_its_limit_and_keeps_what_was_used_last() {
    let limit = 4 * MIB;
    let (_dir, cache) = limited(Limit::Bytes(limit));
    for number in 0..200 {
        keep(&cache, number).expect("there is room");
        assert!(held(&cache) <= limit, "{} after {number}", held(&cache));
    }
    assert!(held(&cache) > limit * 4 / 5, "no more goes than has to: {}", held(&cache));
    assert!(has(&cache, 199) && !has(&cache, 0));
    assert_eq!(cache.fullness(), None);
}

#[test]
fn eight_processes_that_write_at_once_stay_below_the_limit_but_for_what_they_have_in_hand() {
    let limit = 8 * MIB;
    let (dir, cache) = limited(Limit::Bytes(limit));
    let done = AtomicBool::new(false);
    let most = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..8_u64)
            .map(|process| {
                let own = open(dir.path(), Limit::Bytes(limit), Policy::default());
                scope
                    .spawn(move || (0..100).for_each(|number| drop(keep(&own, process * 1000 + number).expect("room"))))
            })
            .collect();
        let (sampled, done) = (&cache, &done);
        let sampler = scope.spawn(move || {
            let mut most = 0;
            while !done.load(Ordering::Relaxed) {
                most = most.max(held(sampled));
            }
            most
        });
        writers.into_iter().for_each(|writer| writer.join().expect("ends"));
        done.store(true, Ordering::Relaxed);
        sampler.join().expect("ends")
    });
    assert!(most <= limit + 8 * PIECE, "{most} with a limit of {limit}");
    assert!(held(&cache) <= limit, "{}", held(&cache));
}

#[test]
fn what_another_process_writes_counts_at_the_next_look() {
    let limit = 4 * MIB;
    let (dir, cache) = limited(Limit::Bytes(limit));
    keep(&cache, 0).expect("there is room");
    let other = open(dir.path(), Limit::None, Policy::default());
    (1..100).for_each(|number| drop(keep(&other, number).expect("no limit")));
    assert!(held(&cache) > limit);
    // More than its allowance of an empty cache.
    (100..110).for_each(|number| drop(keep(&cache, number).expect("makes room")));
    assert!(held(&cache) <= limit, "{}", held(&cache));
    assert!(!has(&cache, 1) && has(&cache, 109));
}

#[test]
fn a_cache_that_is_all_in_use_is_full_says_so_and_has_room_again_when_it_is_not() {
    let limit = 4 * MIB;
    let (_dir, cache) = limited(Limit::Bytes(limit));
    let mut open = Vec::new();
    let error = (0..100).find_map(|number| keep(&cache, number).map(|partial| open.push(partial)).err());
    let error = error.expect("the limit is reached");
    assert!(error.is_full() && error.to_string().contains("--cache-size"), "{error}");
    assert!(cache.is_full() && held(&cache) <= limit && open.len() > 40, "{} are open", open.len());
    assert_eq!(cache.fullness().as_deref().map(|why| why.contains("4.0 MiB")), Some(true));
    // What is small is kept all the same, and what is there stays.
    cache.remember("a/b:c", &Digest::of(b"x")).expect("there is room on the disk");
    cache.keep_index(&Digest::of(b"key"), &[1; 70_000]).expect_err("that is not small");
    assert!((0..open.len() as u64).all(|number| has(&cache, number)));
    open.clear();
    let start = Instant::now();
    while keep(&cache, 200).is_err() {
        assert!(start.elapsed() < Duration::from_secs(3), "it does not try again");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(!cache.is_full() && cache.fullness().is_none());
}

#[test]
fn a_disk_without_the_free_space_that_is_kept_gets_nothing_and_the_remedy_is_told() {
    let (_dir, cache) = limited(Limit::KeepFree(100));
    let error = keep(&cache, 1).expect_err("no disk is all free");
    assert!(error.is_full());
    let why = cache.fullness().expect("is full");
    assert!(why.contains("100 % free") && why.contains("--cache-size"), "{why}");
    assert!(matches!(cache.make_room(1), Err(CacheError::Full { .. })));
    let (_dir, cache) = limited(Limit::KeepFree(0));
    keep(&cache, 1).expect("there is room");
}

#[test]
fn a_limit_is_kept_without_writing_when_it_has_become_smaller() {
    let dir = tempfile::tempdir().expect("a directory");
    let cache = open(dir.path(), Limit::None, Policy::default());
    (0..100).for_each(|number| drop(keep(&cache, number).expect("no limit")));
    let cache = open(dir.path(), Limit::Bytes(2 * MIB), Policy::default());
    cache.keep_limit().expect("evicts");
    assert!(held(&cache) <= 2 * MIB * LOW / 100);
    open(dir.path(), Limit::None, Policy::default()).keep_limit().expect("nothing to do");
}

#[test]
fn room_is_made_for_what_is_staged_or_it_is_said_that_there_can_not_be() {
    let limit = 4 * MIB;
    let dir = tempfile::tempdir().expect("a directory");
    fn kept(number: u64) -> ObjectDigest {
        piece(number).0.object()
    }
    let protected = |_: &Cache| Ok(Protected { never: (0..20).map(kept).collect(), ..Protected::default() });
    let cache = open(dir.path(), Limit::Bytes(limit), Policy { protected, ..Policy::default() });
    (0..50).for_each(|number| drop(keep(&cache, number).expect("there is room")));
    let error = cache.make_room(3 * MIB).expect_err("20 pieces are kept, 1.25 MiB");
    assert!(error.is_full() && error.to_string().contains("--cache-size"), "{error}");
    assert_eq!(cache.fullness(), None, "for chunks there is room");
    assert!((0..50).all(|number| has(&cache, number)), "what is in vain takes nothing");
    cache.make_room(2 * MIB).expect("evicts the others");
    assert!(held(&cache) + 2 * MIB <= limit && (0..20).all(|number| has(&cache, number)));
    let used: Vec<_> = (100..120).map(|number| keep(&cache, number).expect("there is room")).collect();
    let error = cache.make_room(2 * MIB).expect_err("the rest is in use");
    assert!(error.is_full() && error.to_string().contains("in use"), "{error}");
    drop(used);
    cache.make_room(2 * MIB).expect("not any more");
    assert!(open(dir.path(), Limit::None, Policy::default()).make_room(u64::MAX).expect_err("no such disk").is_full());
}

#[test]
fn many_threads_that_find_the_cache_full_wait_for_one_of_them_and_for_no_lock_of_the_kernel() {
    let (dir, cache) = limited(Limit::Bytes(8 * MIB));
    let cache = std::sync::Arc::new(cache);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..16_u64 {
            let cache = cache.clone();
            scope.spawn(move || (0..30).for_each(|number| drop(keep(&cache, thread * 100 + number).expect("room"))));
        }
    });
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    assert!(held(&cache) <= 8 * MIB + 16 * PIECE);
    drop(dir);
}

#[test]
fn who_writes_chunks_does_not_wait_while_another_takes_long_to_make_room_but_who_stages_does() {
    const LONG: Duration = Duration::from_secs(2);
    static SLOW: AtomicBool = AtomicBool::new(false);
    fn slow(_: &Cache) -> Result<Protected, CacheError> {
        if SLOW.swap(false, Ordering::Relaxed) {
            std::thread::sleep(LONG);
        }
        Ok(Protected::default())
    }
    let dir = tempfile::tempdir().expect("a directory");
    let cache = open(dir.path(), Limit::Bytes(4 * MIB), Policy { protected: slow, ..Policy::default() });
    (0..59).for_each(|number| drop(keep(&cache, number).expect("there is room")));
    SLOW.store(true, Ordering::Relaxed);
    std::thread::scope(|scope| {
        let evicting = scope.spawn(|| (100..110).for_each(|number| drop(keep(&cache, number).expect("makes room"))));
        while SLOW.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let began = Instant::now();
        let error = keep(&cache, 200).expect_err("room is being made");
        assert!(error.is_full() && error.to_string().contains("being made"), "{error}");
        assert_eq!(cache.fullness().as_deref(), Some(MAKING_ROOM));
        keep(&cache, 201).expect_err("still");
        assert!(began.elapsed() < LONG / 2, "{:?}", began.elapsed());
        let staged = cache.grow_staged(dir.path(), PIECE).expect("waits");
        assert!(began.elapsed() > LONG / 2, "{:?}", began.elapsed());
        drop(staged);
        evicting.join().expect("ends");
    });
    keep(&cache, 202).expect("has room again");
    assert_eq!(cache.fullness(), None);
}

#[test]
fn nothing_goes_for_a_disk_that_has_room_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let cache = open(dir.path(), Limit::Bytes(32 * MIB), Policy::default());
    (0..100).for_each(|number| drop(keep(&cache, number).expect("there is room")));
    let refused = || io_error("write", dir.path())(std::io::ErrorKind::StorageFull.into());
    assert!(cache.room.noted(refused()).is_full() && cache.is_full());
    assert_eq!(cache.fullness(), None, "the disk has room by now");
    assert!((0..100).all(|number| has(&cache, number)), "nothing has to go for that");
}
