use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;

use proptest::prelude::*;

use super::*;
use crate::cache::testing::{CHUNK, chunk, list_of};

fn content(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 3 % 251) as u8 | 1).collect()
}

fn cache() -> (tempfile::TempDir, Cache) {
    let dir = tempfile::tempdir().expect("a directory");
    let cache = Cache::open(&dir.path().join("cache")).expect("a cache");
    (dir, cache)
}

fn read(range: &CachedRange) -> Vec<u8> {
    let mut bytes = vec![0; range.len() as usize];
    range.file().read_exact_at(&mut bytes, range.offset()).expect("reads");
    bytes
}

#[test]
fn what_was_written_is_found_by_this_process_at_once_and_by_another_after_hashing() {
    let (_dir, cache) = cache();
    let content = content(2 * CHUNK + 5);
    let partial = cache.partial(list_of(&content));
    assert!(partial.look(&cache, 0).expect("looks").is_none(), "nothing is there, and a look makes nothing");
    assert!(!partial.path.exists());
    assert!(!partial.write(&cache, &chunk(&content, 1)).expect("writes"));
    let range = partial.range(&(CHUNK as u64 + 3..2 * CHUNK as u64)).expect("is verified");
    assert_eq!(read(&range), content[CHUNK + 3..2 * CHUNK]);
    assert!(partial.range(&(CHUNK as u64 - 1..CHUNK as u64 + 1)).is_none(), "the chunk before is missing");

    let other = cache.partial(list_of(&content));
    assert!(other.range(&(CHUNK as u64..CHUNK as u64 + 1)).is_none(), "it has not hashed it yet");
    assert!(other.look(&cache, 0).expect("looks").is_none(), "a hole");
    let found = other.look(&cache, 1).expect("looks").expect("is there");
    assert_eq!(found.chunk.bytes().bytes()[..], content[CHUNK..2 * CHUNK]);
    assert!(!found.completes);
    assert!(other.range(&(CHUNK as u64..CHUNK as u64 + 1)).is_some());
}

#[test]
fn a_complete_file_gets_its_name_by_a_commit_and_the_partial_one_goes() {
    let (_dir, cache) = cache();
    let content = content(CHUNK + 1);
    let list = list_of(&content);
    cache.keep_chunk_list(&list).expect("kept");
    let partial = cache.partial(list.clone());
    assert!(!partial.write(&cache, &chunk(&content, 1)).expect("writes"));
    assert!(cache.commit(&[&partial]).is_empty());
    assert!(cache.object(&list.object(), list.size()).expect("looks").is_none(), "it is not complete");
    assert!(partial.write(&cache, &chunk(&content, 0)).expect("writes"), "the last one is told");
    assert!(!partial.write(&cache, &chunk(&content, 0)).expect("writes"), "once");
    assert!(cache.commit(&[&partial]).is_empty());
    let object = cache.object(&list.object(), list.size()).expect("opens").expect("is there");
    assert_eq!(read(&object.range(0..list.size())), content);
    assert_eq!(object.file().metadata().expect("stat").permissions().mode() & 0o777, 0o444);
    assert!(!partial.path.exists() && cache.chunk_list(&list.object(), list.size()).expect("reads").is_none());
    assert_eq!(partial.range(&(0..5)).map(|range| read(&range)), Some(content[..5].to_vec()), "still served");
}

#[test]
fn two_who_fill_the_same_file_both_commit() {
    let (_dir, cache) = cache();
    let content = content(CHUNK);
    let list = list_of(&content);
    let (one, two) = (cache.partial(list.clone()), cache.partial(list.clone()));
    assert!(one.write(&cache, &chunk(&content, 0)).expect("writes"));
    assert!(two.look(&cache, 0).expect("looks").is_some_and(|found| found.completes));
    assert!(cache.commit(&[&one]).is_empty());
    assert!(cache.commit(&[&two]).is_empty());
    let path = cache.spread("objects", &list.object().hex());
    assert_eq!(fs::read(&path).expect("reads"), content);
    fs::remove_file(&path).expect("removes");
    assert!(cache.commit(&[&two]).is_empty());
}

#[test]
fn an_object_of_the_wrong_size_is_replaced() {
    let (_dir, cache) = cache();
    let content = content(CHUNK);
    let list = list_of(&content);
    let path = cache.spread("objects", &list.object().hex());
    fs::create_dir_all(path.parent().expect("a parent")).expect("makes");
    fs::write(&path, b"short").expect("writes");
    let partial = cache.partial(list.clone());
    assert!(partial.write(&cache, &chunk(&content, 0)).expect("writes"));
    assert!(cache.commit(&[&partial]).is_empty());
    assert_eq!(fs::read(&path).expect("reads"), content);
}

#[test]
fn a_file_that_a_killed_commit_left_read_only_is_made_anew() {
    let (_dir, cache) = cache();
    let content = content(10);
    let partial = cache.partial(list_of(&content));
    fs::create_dir_all(partial.path.parent().expect("a parent")).expect("makes");
    fs::write(&partial.path, b"old").expect("writes");
    fs::set_permissions(&partial.path, fs::Permissions::from_mode(0o444)).expect("chmod");
    assert!(partial.write(&cache, &chunk(&content, 0)).expect("writes"));
    assert_eq!(fs::read(&partial.path).expect("reads"), content);
}

#[test]
fn a_chunk_of_another_object_is_not_written() {
    let (_dir, cache) = cache();
    let (mine, other) = (content(10), vec![9; 10]);
    let partial = cache.partial(list_of(&mine));
    assert!(!partial.write(&cache, &chunk(&other, 0)).expect("no error"));
    assert!(partial.range(&(0..10)).is_none() && !partial.path.exists());
}

#[test]
fn a_chunk_list_beside_a_file_is_used_only_if_the_name_follows_from_it() {
    let (_dir, cache) = cache();
    let list = list_of(&content(3 * CHUNK));
    cache.keep_chunk_list(&list).expect("kept");
    let found = |size| cache.chunk_list(&list.object(), size).expect("reads");
    assert_eq!(found(list.size()).map(|list| list.object()), Some(list.object()));
    assert!(found(list.size() - 1).is_none());
    let path = cache.list_path(&list.object());
    let mut bytes = fs::read(&path).expect("reads");
    bytes[40] ^= 1;
    fs::write(&path, bytes).expect("writes");
    assert!(found(list.size()).is_none());
}

/// What a crash may have made of a chunk that was written.
#[derive(Debug, Clone)]
enum Crash {
    Hole,
    Zeros,
    Torn(usize),
    Flipped(usize),
    Fine,
}

fn crash() -> impl Strategy<Value = Crash> {
    prop_oneof![
        Just(Crash::Hole),
        Just(Crash::Zeros),
        (0..CHUNK).prop_map(Crash::Torn),
        (0..CHUNK).prop_map(Crash::Flipped),
        Just(Crash::Fine)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn after_a_crash_no_wrong_byte_is_served_and_what_is_whole_is_found(
        crashes in prop::collection::vec(crash(), 1..5),
        last in 1..CHUNK,
    ) {
        let (_dir, cache) = cache();
        let content = content((crashes.len() - 1) * CHUNK + last);
        let list = list_of(&content);
        let before = cache.partial(list.clone());
        for number in 0..list.len() {
            before.write(&cache, &chunk(&content, number)).expect("writes");
        }
        let file = OpenOptions::new().write(true).open(&before.path).expect("opens");
        for (number, crash) in (0..).zip(&crashes) {
            let range = list.range(number).expect("a chunk");
            let len = (range.end - range.start) as usize;
            match crash {
                Crash::Hole => {
                    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
                    rustix::fs::fallocate(&file, flags, range.start, len as u64).expect("punches");
                }
                Crash::Zeros => file.write_all_at(&vec![0; len], range.start).expect("writes"),
                Crash::Torn(at) if *at < len => {
                    file.write_all_at(&vec![0; len - at], range.start + *at as u64).expect("writes");
                }
                Crash::Flipped(at) if *at < len => {
                    let byte = content[range.start as usize + at] ^ 0x10;
                    file.write_all_at(&[byte], range.start + *at as u64).expect("writes");
                }
                Crash::Torn(_) | Crash::Flipped(_) | Crash::Fine => {}
            }
        }
        let after = cache.partial(list.clone());
        for (number, crash) in (0..).zip(&crashes) {
            let range = list.range(number).expect("a chunk");
            let len = (range.end - range.start) as usize;
            let is_whole = match crash {
                Crash::Hole | Crash::Zeros => false,
                Crash::Torn(at) | Crash::Flipped(at) => *at >= len,
                Crash::Fine => true,
            };
            let found = after.look(&cache, number).expect("looks");
            prop_assert_eq!(found.is_some(), is_whole, "{:?}", crash);
            prop_assert_eq!(after.range(&range).map(|range| read(&range)).is_some(), is_whole);
            if !is_whole {
                after.write(&cache, &chunk(&content, number)).expect("writes");
            }
        }
        prop_assert!(after.is_complete());
        prop_assert_eq!(after.range(&(0..list.size())).map(|range| read(&range)), Some(content));
    }
}
