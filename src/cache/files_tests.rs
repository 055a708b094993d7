use std::os::unix::fs::symlink;

use super::*;
use crate::cache::format;
use crate::digest::{Digest, Unverified};
use crate::object::ObjectDigest;

fn cache() -> (tempfile::TempDir, Cache) {
    let dir = tempfile::tempdir().expect("a directory");
    let cache = Cache::open(&dir.path().join("cache")).expect("a cache");
    (dir, cache)
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).expect("stat").mode() & 0o777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

#[test]
fn a_new_cache_and_its_areas_are_private() {
    let (_dir, cache) = cache();
    assert_eq!(mode(cache.root()), 0o700);
    for area in areas() {
        assert_eq!(mode(&cache.root().join(area)), 0o700, "{area}");
    }
}

#[test]
fn a_cache_that_is_open_to_others_is_closed() {
    let (_dir, cache) = cache();
    set_mode(cache.root(), 0o777);
    for area in areas() {
        set_mode(&cache.root().join(area), 0o755);
    }
    Cache::open(cache.root()).expect("opens");
    assert_eq!(mode(cache.root()), 0o700);
    for area in areas() {
        assert_eq!(mode(&cache.root().join(area)), 0o700, "{area}");
    }
}

#[test]
fn the_root_may_be_reached_by_a_link() {
    let (dir, cache) = cache();
    let link = dir.path().join("link");
    symlink(cache.root(), &link).expect("links");
    let linked = Cache::open(&link).expect("opens");
    let digest = Digest::of(b"x");
    let verified = Unverified::new(&b"x"[..]).verify(&digest).expect("holds");
    linked.keep_blob(&digest, &verified).expect("keeps");
    assert!(cache.blob(&digest).expect("reads").is_some());
}

#[test]
fn a_cache_or_area_of_another_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        // Nobody else can give files away; the refusal of the root is what `unprivileged` tests.
        return;
    }
    let (_dir, cache) = cache();
    for path in [cache.root().to_owned(), cache.root().join("objects")] {
        std::os::unix::fs::chown(&path, Some(4711), None).expect("chown");
        let refused = Cache::open(cache.root()).expect_err("refused");
        assert!(matches!(&refused, CacheError::Owner { path: named, owner: 4711, .. } if *named == path), "{refused}");
        std::os::unix::fs::chown(&path, Some(0), None).expect("chown");
    }
    Cache::open(cache.root()).expect("opens");
}

#[test]
fn a_link_in_the_place_of_an_area_or_its_directory_is_refused_and_named() {
    let elsewhere = tempfile::tempdir().expect("a directory");
    for area in areas() {
        let (_dir, cache) = cache();
        let path = cache.root().join(area);
        fs::rename(&path, cache.root().join("moved")).expect("moves");
        symlink(elsewhere.path(), &path).expect("links");
        let refused = Cache::open(cache.root()).expect_err("refused").to_string();
        assert!(refused.contains(path.to_str().expect("UTF-8")) && refused.contains("remove it"), "{refused}");
    }
    for area in areas().filter(|area| *area != "quarantine") {
        let (_dir, cache) = cache();
        let path = cache.root().join(area).join("ab");
        symlink(elsewhere.path(), &path).expect("links");
        let refused = Cache::open(cache.root()).expect_err("refused").to_string();
        assert!(refused.contains(path.to_str().expect("UTF-8")), "{refused}");
    }
    assert_eq!(fs::read_dir(elsewhere.path()).expect("reads").count(), 0, "nothing was written there");
}

#[test]
fn a_link_that_takes_the_place_of_a_directory_later_is_not_followed_either() {
    let (dir, cache) = cache();
    let elsewhere = dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).expect("makes");
    let digest = Digest::of(b"x");
    let name = ObjectDigest::new(1, &[digest]);
    fs::write(elsewhere.join(digest.hex()), b"x").expect("writes");
    fs::write(elsewhere.join(name.hex()), b"x").expect("writes");
    for path in [
        cache.spread("blobs/sha256", &digest.hex()),
        cache.spread("indexes", &digest.hex()),
        cache.spread("objects", &name.hex()),
        cache.spread("partial", &name.hex()),
        cache.root().join("incoming").join(digest.hex()).join("lock"),
    ] {
        symlink(&elsewhere, path.parent().expect("a parent")).expect("links");
    }
    assert!(cache.blob(&digest).expect("no error").is_none());
    assert!(cache.object(&name, 1).expect("no error").is_none());
    let verified = Unverified::new(&b"x"[..]).verify(&digest).expect("holds");
    let planted = |outcome: Result<(), CacheError>| matches!(outcome, Err(CacheError::Planted { .. }));
    let other = format!("{}{}", &digest.hex()[..2], &Digest::of(b"y").hex()[2..]);
    let other = Digest::from_hex(&other).expect("a digest");
    assert!(planted(cache.keep_index(&other, b"index")));
    assert!(planted(cache.stage(&digest).map(|_| ())));
    let list = crate::object::ChunkList::new(1, bytes::Bytes::copy_from_slice(digest.as_bytes())).expect("a list");
    assert!(planted(cache.keep_chunk_list(&list)));
    let chunk = list.verify(0, Unverified::new(&b"x"[..])).expect("a chunk").expect("its bytes");
    assert!(planted(cache.partial(list.clone()).write(&cache, &chunk).map(|_| ())));
    cache.sweep_incoming();
    drop(verified);
    let mut left: Vec<_> = fs::read_dir(&elsewhere).expect("reads").map(|entry| entry.expect("entry").path()).collect();
    left.sort();
    let mut put = vec![elsewhere.join(digest.hex()), elsewhere.join(name.hex())];
    put.sort();
    assert_eq!(left, put, "nothing was written or removed there");
}

#[test]
fn a_link_in_the_place_of_a_file_is_replaced_and_not_followed() {
    let (dir, cache) = cache();
    let elsewhere = dir.path().join("elsewhere");
    fs::write(&elsewhere, "untouched").expect("writes");
    let digest = Digest::of(b"x");
    let verified = Unverified::new(&b"x"[..]).verify(&digest).expect("holds");
    let stand_in = |path: &Path| {
        fs::create_dir_all(path.parent().expect("a parent")).expect("makes");
        symlink(&elsewhere, path).expect("links");
    };
    stand_in(&cache.spread("blobs/sha256", &digest.hex()));
    cache.keep_blob(&digest, &verified).expect("keeps");
    assert!(cache.blob(&digest).expect("reads").is_some());
    let staging = cache.root().join("incoming").join(digest.hex());
    fs::create_dir(&staging).expect("makes");
    stand_in(&staging.join("lock"));
    cache.stage(&digest).map(|_| ()).expect_err("its lock is a link");
    stand_in(&cache.root().join("incoming/sealed"));
    cache.sweep_incoming();
    fs::remove_file(cache.root().join(format::NAME)).expect("removes");
    stand_in(&cache.root().join(format::NAME));
    assert!(matches!(Cache::open(cache.root()), Err(CacheError::Planted { .. } | CacheError::Format { .. })));
    assert_eq!(fs::read_to_string(&elsewhere).expect("reads"), "untouched");
}

#[test]
fn what_a_killed_process_of_our_number_left_is_not_in_the_way() {
    let (_dir, cache) = cache();
    let digest = Digest::of(b"x");
    let path = cache.spread("indexes", &digest.hex());
    fs::create_dir_all(path.parent().expect("a parent")).expect("makes");
    for serial in 0..8 {
        fs::write(path.with_extension(format!("{}.{serial}.tmp", std::process::id())), "half").expect("writes");
    }
    cache.keep_index(&digest, b"index").expect("keeps");
    assert_eq!(cache.index(&digest).expect("reads").as_deref(), Some(&b"index"[..]));
}

#[test]
fn another_version_and_anything_else_is_refused_and_left_as_it_is() {
    let tree = |root: &Path| {
        let mut names: Vec<_> =
            fs::read_dir(root).expect("reads").map(|entry| entry.expect("entry").file_name()).collect();
        names.sort();
        (names, mode(root))
    };
    let refused = |root: &Path| {
        set_mode(root, 0o755);
        let before = tree(root);
        let errors = [Cache::open(root), Cache::open_to_check(root, crate::cache::Settings::default())];
        assert_eq!(tree(root), before, "it was changed");
        errors.map(|outcome| outcome.map(|_| ()).expect_err("refused"))
    };
    let foreign = tempfile::tempdir().expect("a directory");
    fs::write(foreign.path().join("thesis.tex"), "").expect("writes");
    fs::create_dir(foreign.path().join("objects")).expect("makes");
    assert!(refused(foreign.path()).iter().all(|error| matches!(error, CacheError::Foreign { .. })));
    let newer = tempfile::tempdir().expect("a directory");
    fs::write(newer.path().join("format"), "kitfs-cache 2\n").expect("writes");
    for error in refused(newer.path()) {
        assert!(matches!(error, CacheError::Version { version: 2, .. }), "{error}");
    }
    let (_dir, cache) = cache();
    fs::write(cache.root().join("format"), "kitfs-cache 2\n").expect("writes");
    for error in refused(cache.root()) {
        assert!(matches!(error, CacheError::Version { version: 2, .. }), "{error}");
    }
}

#[test]
fn what_others_put_into_an_open_cache_is_set_aside_when_it_is_closed() {
    if !rustix::process::geteuid().is_root() {
        // Only root can give files away.
        return;
    }
    let (_dir, cache) = cache();
    let key = Digest::of(b"a layer");
    cache.keep_index(&key, b"of theirs").expect("keeps");
    let other = Digest::of(b"another layer");
    cache.keep_index(&other, b"of ours").expect("keeps");
    std::os::unix::fs::chown(cache.spread("indexes", &key.hex()), Some(4711), None).expect("chown");
    let theirs = cache.root().join("objects/ab");
    fs::create_dir(&theirs).expect("makes");
    std::os::unix::fs::chown(&theirs, Some(4711), None).expect("chown");
    set_mode(&cache.root().join("indexes"), 0o777);
    let cache = Cache::open(cache.root()).expect("opens");
    assert_eq!(cache.index(&key).expect("looks"), None);
    assert_eq!(cache.index(&other).expect("looks").as_deref(), Some(&b"of ours"[..]));
    assert!(!theirs.exists());
    assert_eq!(fs::read_dir(cache.root().join("quarantine")).expect("reads").count(), 2);
}
