use std::os::unix::fs::PermissionsExt as _;

use std::fs;

use super::testing::{chunk, list_of};
use super::*;
use crate::digest::{Digest, StreamHasher, Unverified};

fn cache() -> (tempfile::TempDir, Cache) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let cache = Cache::open(&dir.path().join("cache")).expect("cache opens");
    (dir, cache)
}

fn sealed(cache: &Cache, key: &Digest, content: &[u8]) -> (ObjectDigest, Sealed) {
    let mut staging = cache.stage(key).expect("stages").expect("free");
    let file = staging.create().expect("creates");
    file.write_at(cache, content, 0).expect("writes");
    let name = ObjectDigest::new(content.len() as u64, &[Digest::of(content)]);
    let mut hasher = StreamHasher::new();
    hasher.update(content);
    let proof = hasher.finish(&Digest::of(content)).expect("holds");
    let sealed = staging.seal(cache, &proof, vec![(file.number(), name)]);
    (name, sealed)
}

#[test]
fn the_directory_is_private_and_says_its_format() {
    let (_dir, cache) = cache();
    assert_eq!(fs::metadata(cache.root()).expect("stat").permissions().mode() & 0o777, 0o700);
    assert_eq!(fs::read_to_string(cache.root().join("format")).expect("read"), format::content());
    Cache::open(cache.root()).expect("opens again");
}

#[test]
fn a_cache_that_was_removed_under_a_process_is_one_again_once_that_writes() {
    let remove = |root: &Path, with_root: bool| {
        if with_root {
            return fs::remove_dir_all(root).expect("removes");
        }
        for entry in fs::read_dir(root).expect("lists") {
            let path = entry.expect("an entry").path();
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.expect("removes");
        }
    };
    for with_root in [true, false] {
        let (_dir, cache) = cache();
        remove(cache.root(), with_root);
        assert!(cache.kits().expect("what is gone is empty").is_empty());
        let partial = cache.partial(list_of(b"content"));
        assert!(partial.write(&cache, &chunk(b"content", 0)).expect("writes"), "with its directory: {with_root}");
        Cache::open(cache.root()).unwrap_or_else(|error| panic!("with its directory, {with_root}: {error}"));
        remove(cache.root(), with_root);
        drop(cache.stage(&Digest::of(b"layer")).expect("stages"));
        Cache::open(cache.root()).unwrap_or_else(|error| panic!("with its directory, {with_root}, a fill: {error}"));
    }
}

#[test]
fn what_somebody_else_has_put_in_the_place_of_a_cache_is_not_made_one() {
    let (_dir, cache) = cache();
    fs::remove_dir_all(cache.root()).expect("removes");
    fs::create_dir(cache.root()).expect("makes");
    fs::write(cache.root().join("notes.txt"), "mine").expect("writes");
    drop(cache.stage(&Digest::of(b"layer")).expect("stages"));
    assert!(matches!(Cache::open(cache.root()), Err(CacheError::Foreign { .. })));
}

#[test]
fn a_sealed_file_is_read_before_and_after_its_commit() {
    let (_dir, cache) = cache();
    let key = Digest::of(b"layer");
    let (name, sealed) = sealed(&cache, &key, b"content");
    let early = cache.object(&name, 7).expect("looks").expect("is there while staged");
    sealed.commit(&cache, &key, b"index").expect("commits");
    let late = cache.object(&name, 7).expect("looks").expect("is there by name");
    for object in [early, late] {
        let mut bytes = [0; 7];
        std::os::unix::fs::FileExt::read_exact_at(&**object.file(), &mut bytes, 0).expect("reads");
        assert_eq!(&bytes, b"content");
    }
    assert_eq!(cache.index(&key).expect("looks").as_deref(), Some(&b"index"[..]));
    assert_eq!(fs::read_dir(cache.root().join("incoming")).expect("read").count(), 0);
    let path = cache.spread("objects", &name.hex());
    assert_eq!(fs::metadata(path).expect("stat").permissions().mode() & 0o777, 0o444);
}

#[test]
fn an_object_of_another_size_counts_as_absent() {
    let (_dir, cache) = cache();
    let key = Digest::of(b"layer");
    let (name, sealed) = sealed(&cache, &key, b"content");
    sealed.commit(&cache, &key, b"index").expect("commits");
    assert!(cache.object(&name, 8).expect("looks").is_none());
}

#[test]
fn an_object_that_was_cut_short_counts_as_absent_and_is_replaced() {
    let (_dir, cache) = cache();
    let key = Digest::of(b"layer");
    let commit = || {
        let (name, sealed) = sealed(&cache, &key, b"content");
        sealed.commit(&cache, &key, b"index").expect("commits");
        name
    };
    let name = commit();
    assert!(cache.has_object(&name, 7));
    let path = cache.spread("objects", &name.hex());
    fs::remove_file(&path).expect("remove");
    fs::write(&path, "con").expect("write");
    assert!(!cache.has_object(&name, 7));
    commit();
    assert!(cache.object(&name, 7).expect("looks").is_some());
}

#[test]
fn who_looks_whether_something_is_staged_makes_no_lock() {
    let dir = tempfile::tempdir().expect("a directory");
    let cache = Cache::open(dir.path()).expect("opens");
    let staging = dir.path().join("incoming").join("left");
    fs::create_dir(&staging).expect("creates");
    assert!(!cache.is_staging());
    assert_eq!(cache.remove_staging(&staging, true).expect("looks"), Removed::Gone);
    assert_eq!(fs::read_dir(&staging).expect("is there").count(), 0);

    fs::create_dir(staging.join("lock")).expect("creates");
    assert!(!cache.is_staging(), "nothing of ours");
    assert!(cache.remove_staging(&staging, true).is_err(), "what would fail is not told to go");
    fs::remove_dir(staging.join("lock")).expect("removes");

    let held = cache.stage(&Digest::of(b"layer")).expect("stages").expect("free");
    assert!(cache.is_staging());
    drop(held);
    assert!(!cache.is_staging());
    assert_eq!(cache.remove_staging(&staging, false).expect("removes"), Removed::Gone);
    assert!(!staging.exists());
}

#[test]
fn staging_is_exclusive_and_unsealed_files_vanish() {
    let (_dir, cache) = cache();
    let key = Digest::of(b"layer");
    let mut staging = cache.stage(&key).expect("stages").expect("free");
    staging.create().expect("creates").write_at(&cache, b"half", 0).expect("writes");
    assert!(cache.stage(&key).expect("looks").is_none(), "a second fill must not share the directory");
    assert!(cache.stage_alone(&key).expect("stages").is_some());
    let StagedState { bytes, sealed, .. } = cache.staged(&key);
    assert_eq!((bytes, sealed), (4, false));
    drop(staging);
    assert!(cache.stage(&key).expect("stages").is_some());
}

#[test]
fn what_a_killed_process_left_is_swept_and_what_is_locked_stays() {
    let (_dir, cache) = cache();
    let left = cache.root().join("incoming/left");
    fs::create_dir(&left).expect("mkdir");
    fs::write(left.join("0"), "half").expect("write");
    let key = Digest::of(b"layer");
    let _held = cache.stage(&key).expect("stages").expect("free");
    Cache::open(cache.root()).expect("opens");
    assert!(!left.exists());
    assert!(cache.stage(&key).expect("looks").is_none());
}

#[test]
fn a_commit_that_fails_keeps_the_index_and_leaves_what_is_open() {
    let (_dir, cache) = cache();
    let key = Digest::of(b"layer");
    let (name, sealed) = sealed(&cache, &key, b"content");
    let open = cache.object(&name, 7).expect("looks").expect("is there while staged");
    // Where its directory should be.
    fs::write(cache.root().join("objects").join(&name.hex()[..2]), "").expect("writes");
    sealed.commit(&cache, &key, b"index").expect_err("it can't get its name");
    assert!(cache.object(&name, 7).is_err() || !cache.has_object(&name, 7));
    assert_eq!(cache.index(&key).expect("looks").as_deref(), Some(&b"index"[..]));
    assert_eq!(open.range(0..7).block(0, 7).expect("reads").peek(), &b"content"[..]);
    assert_eq!(fs::read_dir(cache.root().join("incoming")).expect("reads").count(), 0);
}

#[test]
fn damaged_blobs_and_indexes_count_as_absent() {
    let (_dir, cache) = cache();
    let digest = Digest::of(b"manifest");
    let verified = Unverified::new(&b"manifest"[..]).verify(&digest).expect("holds");
    cache.keep_blob(&digest, &verified).expect("keeps");
    cache.keep_index(&digest, b"index").expect("keeps");
    assert!(cache.blob(&digest).expect("reads").is_some());
    for path in [cache.spread("blobs/sha256", &digest.hex()), cache.spread("indexes", &digest.hex())] {
        let mut bytes = fs::read(&path).expect("read");
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, bytes).expect("write");
    }
    assert!(cache.blob(&digest).expect("reads").is_none());
    assert!(cache.index(&digest).expect("reads").is_none());
}

#[test]
fn a_long_blob_or_index_is_mapped_and_stays_when_its_file_goes() {
    let (_dir, cache) = cache();
    let bytes: Vec<u8> = (0..map::MAPPED as u32).flat_map(u32::to_le_bytes).collect();
    let digest = Digest::of(&bytes);
    let mut blob = cache.new_blob(&digest).expect("a place");
    for piece in bytes.chunks(50_000) {
        blob.write(&cache, &Unverified::new(piece.to_vec())).expect("writes");
    }
    let kept = blob.keep(&cache, &digest).expect("keeps").expect("holds");
    cache.keep_index(&digest, &bytes).expect("keeps");
    let again = cache.blob(&digest).expect("reads").expect("is there");
    let index = cache.index(&digest).expect("reads").expect("is there");
    let maps = fs::read_to_string("/proc/self/maps").expect("maps");
    for path in [cache.spread("blobs/sha256", &digest.hex()), cache.spread("indexes", &digest.hex())] {
        assert!(maps.contains(path.to_str().expect("UTF-8")), "{} is not mapped", path.display());
        fs::remove_file(path).expect("remove");
    }
    assert!([kept.bytes(), again.bytes(), &index].iter().all(|found| **found == bytes));
    assert_eq!(fs::read_dir(cache.root().join("incoming")).expect("read").count(), 0);
}

#[test]
fn a_long_blob_that_is_false_or_not_finished_leaves_nothing() {
    let (_dir, cache) = cache();
    let digest = Digest::of(b"right");
    let mut blob = cache.new_blob(&digest).expect("a place");
    blob.write(&cache, &Unverified::new(&b"wrong"[..])).expect("writes");
    assert!(blob.keep(&cache, &digest).expect("looks").is_err());
    drop(cache.new_blob(&digest).expect("a place"));
    assert!(cache.blob(&digest).expect("reads").is_none());
    assert_eq!(fs::read_dir(cache.root().join("incoming")).expect("read").count(), 0);
}

#[test]
fn a_part_of_a_blob_is_what_lies_there_whether_read_or_mapped() {
    let (_dir, cache) = cache();
    let bytes: Vec<u8> = (0..map::MAPPED as u32).flat_map(u32::to_le_bytes).collect();
    let digest = Digest::of(&bytes);
    let verified = Unverified::new(bytes.clone()).verify(&digest).expect("holds");
    cache.keep_blob(&digest, &verified).expect("keeps");
    let len = bytes.len() as u64;
    for range in [0..0, 7..9, 100..70_000, len - 32..len] {
        let part = cache.part_of_blob(&digest, range.clone()).expect("reads").expect("is there");
        assert_eq!(part.peek()[..], bytes[range.start as usize..range.end as usize], "{range:?}");
    }
    assert!(cache.part_of_blob(&digest, len - 1..len + 1).expect("reads").is_none());
    assert!(cache.part_of_blob(&Digest::of(b"other"), 0..1).expect("reads").is_none());
}

#[test]
fn a_tag_is_remembered_under_its_full_name() {
    let (_dir, cache) = cache();
    let digest = Digest::of(b"manifest");
    cache.remember("registry/team/llama:8b", &digest).expect("remembers");
    let known = cache.known("registry/team/llama:8b").expect("reads").expect("is known");
    assert_eq!(known.digest, digest);
    assert!(known.seen > 1_700_000_000);
    assert!(cache.known("registry/team/llama:70b").expect("reads").is_none());
}

#[test]
fn what_was_planted_in_place_of_a_file_counts_as_absent_and_holds_nobody_up() {
    let (dir, cache) = cache();
    let digest = Digest::of(b"x");
    let name = ObjectDigest::new(1, &[digest]);
    let elsewhere = dir.path().join("elsewhere");
    fs::write(&elsewhere, b"x").expect("writes");
    let paths = [
        cache.spread("blobs/sha256", &digest.hex()),
        cache.spread("indexes", &digest.hex()),
        cache.spread("objects", &name.hex()),
    ];
    type Plant = fn(&Path, &Path);
    let plants: [Plant; 3] = [
        |path, _| rustix::fs::mkfifoat(rustix::fs::CWD, path, rustix::fs::Mode::RUSR).expect("a pipe"),
        |path, _| fs::create_dir(path).expect("a directory"),
        |path, elsewhere| std::os::unix::fs::symlink(elsewhere, path).expect("a link"),
    ];
    for plant in plants {
        for path in &paths {
            fs::create_dir_all(path.parent().expect("a parent")).expect("makes");
            plant(path, &elsewhere);
        }
        assert!(cache.blob(&digest).expect("no error").is_none());
        assert!(cache.index(&digest).expect("no error").is_none());
        assert!(cache.object(&name, 1).expect("no error").is_none() && !cache.has_object(&name, 1));
        cache.keep_index(&digest, b"index").expect("takes its place");
        assert_eq!(cache.index(&digest).expect("reads").as_deref(), Some(&b"index"[..]));
        for path in &paths {
            fs::remove_file(path).or_else(|_| fs::remove_dir(path)).expect("removes");
        }
    }
    assert_eq!(fs::read(&elsewhere).expect("reads"), b"x", "nothing was written through the link");
}
