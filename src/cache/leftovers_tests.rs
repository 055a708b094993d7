use rustix::fs::flock;

use super::*;
use crate::digest::{Digest, Unverified};
use crate::object::ChunkList;

fn cache() -> (tempfile::TempDir, Cache) {
    let dir = tempfile::tempdir().expect("a directory");
    let cache = Cache::open(&dir.path().join("cache")).expect("a cache");
    (dir, cache)
}

fn put(path: &Path, text: &str) -> PathBuf {
    fs::create_dir_all(path.parent().expect("a parent")).expect("makes");
    fs::write(path, text).expect("writes");
    path.to_owned()
}

fn list() -> ChunkList<bytes::Bytes> {
    ChunkList::new(3, bytes::Bytes::copy_from_slice(Digest::of(b"abc").as_bytes())).expect("a list")
}

fn found(cache: &Cache) -> Vec<PathBuf> {
    cache.leftovers().expect("looks").into_iter().map(|left| left.path).collect()
}

#[test]
fn all_that_killed_processes_leave_is_found_and_removed() {
    let (_dir, cache) = cache();
    assert_eq!(found(&cache), Vec::<PathBuf>::new(), "a new cache");
    let hex = list().object().hex();
    let other = Digest::of(b"other").hex();
    let mut left = vec![
        put(&cache.root().join("format.77.0.tmp"), ""),
        put(&cache.spread("blobs/sha256", &other).with_extension("77.1.tmp"), "half"),
        put(&cache.spread("tags", &other).with_extension("77.2.tmp"), "half"),
        put(&cache.spread("partial", &other).with_extension("77.new"), "half"),
        put(&cache.spread("partial", &other).with_extension("list"), "no partial file"),
        put(&cache.spread("partial", &hex), "abc"),
        put(&cache.spread("partial", &hex).with_extension("list"), "of an object"),
        put(&cache.root().join("quarantine/blobs-x.0"), "damaged"),
        cache.root().join("incoming/empty"),
    ];
    fs::create_dir(cache.root().join("incoming/empty")).expect("makes");
    put(&cache.spread("objects", &hex), "abc");
    left.sort();
    assert_eq!(found(&cache), left);
    let all = cache.leftovers().expect("looks");
    assert!(all.iter().map(|left| left.bytes).sum::<u64>() > 0);
    for left in all {
        // The list of what became an object may go with its file.
        cache.remove_leftover(&left).expect("removes");
    }
    assert_eq!(found(&cache), Vec::<PathBuf>::new());
    assert!(left.iter().all(|path| !path.exists()));
    assert!(cache.has_object(&list().object(), 3));
}

#[test]
fn what_is_being_written_stays() {
    let (_dir, cache) = cache();
    let list = list();
    cache.keep_chunk_list(&list).expect("keeps");
    let partial = cache.partial(list.clone());
    let chunk = list.verify(0, Unverified::new(&b"abc"[..])).expect("a chunk").expect("its bytes");
    partial.write(&cache, &chunk).expect("writes");
    let _staging = cache.stage(&Digest::of(b"layer")).expect("stages").expect("free");
    let temporary = put(&cache.spread("tags", &Digest::of(b"t").hex()).with_extension("1.0.tmp"), "half");
    let writing = File::open(&temporary).expect("opens");
    flock(&writing, FlockOperation::NonBlockingLockExclusive).expect("locks");
    assert_eq!(found(&cache), Vec::<PathBuf>::new());
    drop(writing);
    let left = cache.leftovers().expect("looks");
    assert_eq!(left.len(), 1);
    let writing = File::open(&temporary).expect("opens");
    flock(&writing, FlockOperation::NonBlockingLockExclusive).expect("locks");
    assert!(!cache.remove_leftover(&left[0]).expect("looks") && temporary.exists(), "somebody took it meanwhile");
}

#[test]
fn a_partial_file_whose_object_is_here_stays_while_somebody_else_fills_it() {
    let (_dir, cache) = cache();
    let list = list();
    let partial = cache.partial(list.clone());
    let chunk = list.verify(0, Unverified::new(&b"abc"[..])).expect("a chunk").expect("its bytes");
    partial.write(&cache, &chunk).expect("writes");
    put(&cache.spread("objects", &list.object().hex()), "abc");
    assert_eq!(found(&cache), Vec::<PathBuf>::new());
    drop(partial);
    assert_eq!(found(&cache), [cache.spread("partial", &list.object().hex())]);
}

#[test]
fn clearing_up_beside_writers_loses_nothing_that_they_write() {
    let (_dir, cache) = cache();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                for left in cache.leftovers().expect("looks") {
                    cache.remove_leftover(&left).expect("removes");
                }
            }
        });
        for number in 0..400_u32 {
            let key = Digest::of(&number.to_le_bytes());
            cache.keep_index(&key, b"index").expect("keeps");
            assert!(cache.index(&key).expect("reads").is_some());
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(found(&cache), Vec::<PathBuf>::new());
}
