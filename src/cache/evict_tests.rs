use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rustix::fs::flock;

use super::*;
use crate::cache::{Limit, Settings};

const KIB: u64 = 1 << 10;

fn open(dir: &Path, policy: Policy) -> Cache {
    let settings = Settings { limit: Limit::None, policy, ..Settings::default() };
    Cache::open_with(&dir.join("cache"), settings).expect("a cache")
}

fn cache() -> (tempfile::TempDir, Cache) {
    let dir = tempfile::tempdir().expect("a directory");
    let cache = open(dir.path(), Policy::default());
    (dir, cache)
}

fn name(number: u8) -> ObjectDigest {
    ObjectDigest::new(1, &[Digest::of(&[number])])
}

/// A file of the cache that was used so many minutes ago.
fn put(path: &Path, len: u64, minutes: u64) {
    fs::create_dir_all(path.parent().expect("a parent")).expect("makes");
    fs::write(path, vec![1; len as usize]).expect("writes");
    set_used(path, minutes);
}

fn set_used(path: &Path, minutes: u64) {
    let file = fs::OpenOptions::new().write(true).open(path).expect("opens");
    file.set_modified(SystemTime::now() - Duration::from_secs(60 * minutes)).expect("sets");
}

fn object(cache: &Cache, number: u8, minutes: u64) -> PathBuf {
    let path = cache.spread("objects", &name(number).hex());
    put(&path, 100 * KIB, minutes);
    path
}

fn partial(cache: &Cache, number: u8, minutes: u64) -> PathBuf {
    let path = cache.spread("partial", &name(number).hex());
    put(&path, 99 * KIB, minutes);
    put(&path.with_extension("list"), KIB, minutes);
    path
}

/// Evicts until so many bytes have gone, or all that may.
fn evict(cache: &Cache, bytes: u64) -> Evicted {
    let held = cache.usage().expect("counts").bytes();
    let told = cache.evict_to(held.saturating_sub(bytes), true).expect("tells");
    assert_eq!(cache.usage().expect("counts").bytes(), held, "nothing goes in a dry run");
    let evicted = cache.evict_to(held.saturating_sub(bytes), false).expect("evicts");
    assert_eq!(told, evicted, "what a dry run tells is what goes");
    assert_eq!(cache.usage().expect("counts").bytes(), evicted.left);
    evicted
}

#[test]
fn what_was_used_longest_ago_goes_first_and_no_more_than_has_to() {
    let (_dir, cache) = cache();
    let files = [object(&cache, 1, 30), partial(&cache, 2, 50), object(&cache, 3, 10), object(&cache, 4, 40)];
    let there = || files.each_ref().map(|path| path.exists());
    evict(&cache, 50 * KIB);
    assert_eq!(there(), [true, false, true, true]);
    assert!(!files[1].with_extension("list").exists(), "a list goes with its file");
    let evicted = evict(&cache, 101 * KIB);
    assert_eq!(there(), [false, false, true, false]);
    assert_eq!((evicted.gone.of(Area::Objects).items, evicted.gone.items()), (2, 2));
    evict(&cache, u64::MAX);
    assert_eq!(there(), [false; 4]);
    assert!(cache.root.join("format").exists());
}

#[test]
fn a_list_without_a_file_goes_too() {
    let (_dir, cache) = cache();
    let list = cache.spread("partial", &name(1).hex()).with_extension("list");
    put(&list, 10 * KIB, 5);
    assert_eq!(evict(&cache, KIB).gone.of(Area::Partial).items, 1);
    assert!(!list.exists());
}

#[test]
fn what_is_quarantined_goes_first_and_what_a_directory_served_before_goes_last_and_what_is_kept_stays() {
    let dir = tempfile::tempdir().expect("a directory");
    let protected = |_: &Cache| Ok(Protected { never: [name(1)].into(), late: [name(2)].into() });
    let cache = open(dir.path(), Policy { protected, ..Policy::default() });
    let files = [object(&cache, 1, 90), object(&cache, 2, 80), object(&cache, 3, 10), partial(&cache, 1, 90)];
    let damaged = cache.root.join("quarantine/some");
    put(&damaged, 100 * KIB, 0);
    let there = || files.each_ref().map(|path| path.exists());
    evict(&cache, KIB);
    assert!(!damaged.exists() && there() == [true; 4]);
    evict(&cache, KIB);
    assert_eq!(there(), [true, true, false, true]);
    evict(&cache, u64::MAX);
    assert_eq!(there(), [true, false, false, true]);
}

#[test]
fn what_is_open_in_any_process_stays_until_it_is_closed() {
    let (dir, cache) = cache();
    let other = open(dir.path(), Policy::default());
    let paths = [object(&cache, 1, 90), object(&cache, 2, 80)];
    let opened = other.object(&name(1), 100 * KIB).expect("looks").expect("is there");
    let range = opened.range(0..5);
    drop(opened);
    evict(&cache, u64::MAX);
    assert_eq!(paths.each_ref().map(|path| path.exists()), [true, false]);
    assert_eq!(cache.remove_object(&name(1), false).expect("looks"), Removed::InUse);
    drop(range);
    assert_eq!(cache.remove_object(&name(1), false).expect("removes"), Removed::Gone);
    assert_eq!(cache.remove_object(&name(1), false).expect("looks"), Removed::Absent);
}

#[test]
fn staging_that_nobody_holds_goes_and_what_is_being_filled_stays() {
    let (_dir, cache) = cache();
    let mut held = cache.stage(&Digest::of(b"held")).expect("stages").expect("free");
    held.create().expect("creates").write_at(&cache, &[1; 9000], 0).expect("writes");
    let left = cache.root.join("incoming/left");
    put(&left.join("0"), 100 * KIB, 30);
    let evicted = evict(&cache, u64::MAX);
    assert_eq!(evicted.gone.of(Area::Incoming).items, 1);
    assert!(!left.exists());
    assert!(cache.staged(&Digest::of(b"held")).bytes >= 9000);
}

#[test]
fn what_was_used_after_it_was_looked_at_stays() {
    let (_dir, cache) = cache();
    let path = object(&cache, 1, 90);
    let mut items = Vec::new();
    cache.scan(|item| items.extend(may_go(&item).then_some(item))).expect("counts");
    // To use it is to set its time: see below.
    drop(cache.object(&name(1), 100 * KIB).expect("looks").expect("is there"));
    assert_eq!(remove_item(&items[0], false).expect("looks"), Removed::InUse);
    assert!(path.exists());
}

#[test]
fn an_object_or_a_partial_file_is_used_when_it_is_opened_and_when_it_is_closed() {
    let (_dir, cache) = cache();
    let path = object(&cache, 1, 90);
    let age = || fs::metadata(&path).and_then(|found| found.modified()).expect("stat").elapsed().expect("in the past");
    let opened = cache.object(&name(1), 100 * KIB).expect("looks").expect("is there");
    assert!(age() < Duration::from_secs(60));
    let handle = opened.clone();
    set_used(&path, 90);
    drop(opened);
    assert!(age() > Duration::from_secs(60), "a handle is left");
    drop(handle);
    assert!(age() < Duration::from_secs(60));

    let content = vec![1; 100 << 10];
    let list = crate::object::ChunkList::new(100 * KIB, bytes::Bytes::copy_from_slice(Digest::of(&content).as_bytes()));
    let list = list.expect("one chunk");
    let path = cache.spread("partial", &list.object().hex());
    put(&path, 100 * KIB, 90);
    let partial = cache.partial(list);
    let age = || fs::metadata(&path).and_then(|found| found.modified()).expect("stat").elapsed().expect("in the past");
    assert!(partial.look(&cache, 0).expect("looks").is_some());
    assert!(age() < Duration::from_secs(60));
    set_used(&path, 90);
    drop(partial);
    assert!(age() < Duration::from_secs(60));
}

#[test]
fn small_files_that_nothing_needs_go_when_no_content_is_left_in_the_order_they_are_told() {
    fn spare(_: &Cache) -> Result<Vec<Small>, CacheError> {
        let [a, b, c] = [b"a", b"b", b"c"].map(|name| Digest::of(name));
        Ok(vec![Small::Kit(a), Small::Index(b), Small::Blob(c)])
    }
    let dir = tempfile::tempdir().expect("a directory");
    let cache = open(dir.path(), Policy { spare, ..Policy::default() });
    let paths = spare(&cache).expect("three").iter().map(|small| cache.small_path(small)).collect::<Vec<_>>();
    paths.iter().for_each(|path| put(path, 10 * KIB, 0));
    let content = object(&cache, 1, 0);
    let other = cache.spread("blobs/sha256", &Digest::of(b"d").hex());
    put(&other, 10 * KIB, 90);
    evict(&cache, 90 * KIB);
    assert!(!content.exists() && paths.iter().all(|path| path.exists()));
    evict(&cache, 13 * KIB);
    assert_eq!(paths.iter().map(|path| path.exists()).collect::<Vec<_>>(), [false, false, true]);
    evict(&cache, u64::MAX);
    assert!(paths.iter().all(|path| !path.exists()) && other.exists());
    assert_eq!(cache.remove_small(Small::Blob(Digest::of(b"d"))).expect("removes"), Removed::Gone);
    assert_eq!(cache.remove_small(Small::Blob(Digest::of(b"d"))).expect("looks"), Removed::Absent);
}

#[test]
fn two_processes_that_evict_at_once_take_no_more_than_one_had_to() {
    let (dir, cache) = cache();
    (0..100).for_each(|number| drop(object(&cache, number, u64::from(number))));
    let held = cache.usage().expect("counts").bytes();
    let target = held - 1000 * KIB;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let other = open(dir.path(), Policy::default());
            scope.spawn(move || other.evict_to(target, false).expect("evicts"));
        }
    });
    let left = cache.usage().expect("counts").bytes();
    assert!(left <= target && left + 100 * KIB > target, "{left} are left of {held} for {target}");
}

#[test]
fn who_can_not_evict_as_another_does_gives_up_in_time_and_says_so() {
    let (dir, cache) = cache();
    let other = open(dir.path(), Policy::default());
    let lock = other.lock_eviction().expect("free");
    let start = Instant::now();
    let error = cache.evict_to(0, false).expect_err("busy");
    assert!(error.is_busy(), "{error}");
    assert!((PATIENCE..PATIENCE * 2).contains(&start.elapsed()), "{:?}", start.elapsed());
    drop(lock);
    cache.evict_to(0, false).expect("free");
}

#[test]
fn objects_that_are_evicted_while_others_open_them_are_whole_or_absent() {
    let (dir, cache) = cache();
    let done = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..3)
            .map(|_| {
                let (other, done) = (open(dir.path(), Policy::default()), &done);
                scope.spawn(move || {
                    let mut seen = 0;
                    while !done.load(Ordering::Relaxed) {
                        if let Some(object) = other.object(&name(1), 100 * KIB).expect("looks") {
                            assert_eq!(object.file().metadata().expect("stat").nlink(), 1, "open, and evicted");
                            seen += 1;
                        }
                    }
                    seen
                })
            })
            .collect();
        let start = Instant::now();
        let mut rounds = 0;
        while start.elapsed() < Duration::from_secs(2) || rounds < 50 {
            let path = object(&cache, 1, 90);
            while path.exists() {
                cache.evict_to(0, false).expect("evicts");
            }
            rounds += 1;
        }
        done.store(true, Ordering::Relaxed);
        readers.into_iter().map(|reader| reader.join().expect("ends")).sum::<usize>()
    });
    assert!(seen > 0);
}

#[test]
fn what_a_killed_process_left_of_a_file_goes_first_and_what_is_being_written_stays() {
    let (_dir, cache) = cache();
    let kept = object(&cache, 1, 90);
    let [left, written] = ["a", "b"].map(|name| cache.root.join("indexes/aa").join(format!("{name}.1.0.tmp")));
    put(&left, 100 * KIB, 1);
    put(&written, 100 * KIB, 1);
    let writer = fs::File::open(&written).expect("opens");
    flock(&writer, FlockOperation::NonBlockingLockExclusive).expect("free");
    evict(&cache, KIB);
    assert!(!left.exists() && written.exists() && kept.exists());
}

#[test]
fn a_small_file_that_was_used_since_it_was_found_spare_stays() {
    let (_dir, cache) = cache();
    let small = Small::Kit(Digest::of(b"kit"));
    let path = cache.small_path(&small);
    put(&path, KIB, 0);
    let before = SystemTime::now() - Duration::from_secs(60);
    assert_eq!(cache.remove_spare(small, Some(before)).expect("looks"), Removed::InUse);
    set_used(&path, 5);
    assert_eq!(cache.remove_spare(small, Some(before)).expect("removes"), Removed::Gone);
}
