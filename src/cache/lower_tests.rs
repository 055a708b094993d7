use std::os::unix::fs::{FileExt as _, PermissionsExt as _, chown, symlink};
use std::time::{Duration, SystemTime};

use super::*;
use crate::cache::testing::{CHUNK, chunk, list_of};
use crate::cache::{Cache, Settings};

fn fill(cache: &Cache, content: &[u8], chunks: std::ops::Range<u64>) {
    let partial = cache.partial(list_of(content));
    for number in chunks {
        partial.write(cache, &chunk(content, number)).expect("writes");
    }
    assert!(cache.commit(&[&partial]).is_empty());
}

/// A cache over another one.
fn two() -> (tempfile::TempDir, Cache, Cache) {
    let dir = tempfile::tempdir().expect("a directory");
    let lower = Cache::open(&dir.path().join("lower")).expect("a cache");
    let upper = over(&dir, &lower);
    (dir, lower, upper)
}

fn over(dir: &tempfile::TempDir, lower: &Cache) -> Cache {
    let settings = Settings { lower: vec![lower.root().to_owned()], ..Settings::default() };
    Cache::open_with(&dir.path().join("upper"), settings).expect("a cache")
}

/// Every file of a tree with its times and modes.
fn tree(root: &Path) -> Vec<(PathBuf, SystemTime, u32, u64)> {
    let (mut all, mut dirs) = (Vec::new(), vec![root.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).expect("reads") {
            let path = entry.expect("an entry").path();
            let found = fs::symlink_metadata(&path).expect("stat");
            all.push((path.clone(), found.modified().expect("a time"), found.mode(), found.ino()));
            if found.is_dir() {
                dirs.push(path);
            }
        }
    }
    all.sort();
    all
}

#[test]
fn what_a_lower_cache_has_is_served_from_there_and_nothing_is_written_to_it() {
    let (dir, lower, upper) = two();
    let content = vec![7; CHUNK + 9];
    let list = list_of(&content);
    fill(&lower, &content, 0..2);
    let digest = Digest::of(b"manifest");
    let verified = Unverified::new(&b"manifest"[..]).verify(&digest).expect("holds");
    lower.keep_blob(&digest, &verified).expect("keeps");
    lower.keep_index(&digest, b"index").expect("keeps");
    lower.remember("registry/kit:v1", &digest).expect("remembers");
    let half = vec![9; 2 * CHUNK];
    lower.keep_chunk_list(&list_of(&half)).expect("keeps");
    fill(&lower, &half, 1..2);
    let before = tree(lower.root());

    assert!(upper.has_object(&list.object(), list.size()));
    let object = upper.object(&list.object(), list.size()).expect("looks").expect("is there");
    let path = lower.path_of("objects", &list.object().hex());
    assert_eq!(object.file().metadata().expect("stat").ino(), fs::metadata(path).expect("stat").ino(), "in place");
    assert_eq!(upper.blob(&digest).expect("reads").expect("is there").bytes(), "manifest");
    let part = upper.part_of_blob(&digest, 1..3).expect("reads").expect("is there");
    assert_eq!(part.peek(), "an");
    assert_eq!(upper.index(&digest).expect("reads").as_deref(), Some(&b"index"[..]));
    assert_eq!(upper.known("registry/kit:v1").expect("reads").map(|known| known.digest), Some(digest));
    let found = upper.chunk_list(&list_of(&half).object(), half.len() as u64).expect("reads").expect("is there");
    let partial = upper.partial(found);
    assert!(partial.look(&upper, 0).expect("looks").is_none(), "a hole there too");
    assert_eq!(partial.look(&upper, 1).expect("looks").expect("is there").chunk.bytes().bytes()[..], half[CHUNK..]);
    assert!(partial.has(1), "it is in our file now");
    partial.write(&upper, &chunk(&half, 0)).expect("writes");
    assert!(upper.commit(&[&partial]).is_empty());
    drop(over(&dir, &lower));

    assert_eq!(tree(lower.root()), before, "the lower cache is as it was");
    assert_eq!(fs::read_dir(upper.root().join("objects")).expect("reads").count(), 1, "what was put together, alone");
}

impl Cache {
    fn path_of(&self, area: &str, name: &str) -> PathBuf {
        self.spread(area, name)
    }
}

#[test]
fn a_lying_object_is_not_used_and_looked_at_again_only_when_it_changes() {
    let (_dir, lower, upper) = two();
    let content = b"right".to_vec();
    let list = list_of(&content);
    let path = lower.path_of("objects", &list.object().hex());
    fs::create_dir_all(path.parent().expect("a parent")).expect("makes");
    fs::write(&path, b"wrong").expect("writes");
    let look = || upper.object(&list.object(), list.size()).expect("looks").is_some();
    assert!(!look() && !look() && !upper.has_object(&list.object(), list.size()));
    fs::write(&path, b"right").expect("writes");
    let later = SystemTime::now() + Duration::from_secs(1);
    File::options().write(true).open(&path).expect("opens").set_modified(later).expect("touches");
    assert!(upper.has_object(&list.object(), list.size()), "it may be right now");
    assert!(look() && upper.has_object(&list.object(), list.size()));
    File::options().write(true).open(&path).expect("opens").write_all_at(b"W", 0).expect("writes");
    assert!(!look(), "it was changed");
    let elsewhere = path.with_extension("elsewhere");
    fs::write(&elsewhere, b"right").expect("writes");
    fs::remove_file(&path).expect("removes");
    symlink(&elsewhere, &path).expect("links");
    assert!(!look() && !upper.has_object(&list.object(), list.size()), "no link is followed");
}

#[test]
fn an_object_is_hashed_once_by_a_process_however_many_open_it() {
    let (_dir, lower, upper) = two();
    let content = vec![3; 3 * CHUNK];
    let list = list_of(&content);
    fill(&lower, &content, 0..3);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert!(upper.object(&list.object(), list.size()).expect("looks").is_some()));
        }
    });
    // Damage that leaves no trace in the file's times is not seen any more: it was hashed, once.
    assert_eq!(upper.lower[0].hashed.lock().expect("a lock").len(), 1);
}

#[test]
fn chunks_of_a_damaged_object_count_where_they_are_right() {
    let (_dir, lower, upper) = two();
    let content = vec![5; 2 * CHUNK];
    let list = list_of(&content);
    fill(&lower, &content, 0..2);
    let path = lower.path_of("objects", &list.object().hex());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
    File::options().write(true).open(&path).expect("opens").write_all_at(b"!", 9).expect("writes");
    assert!(upper.object(&list.object(), list.size()).expect("looks").is_none());
    let partial = upper.partial(list);
    assert!(partial.look(&upper, 0).expect("looks").is_none());
    assert!(partial.look(&upper, 1).expect("looks").is_some());
}

#[test]
fn what_another_user_claims_does_not_count_and_what_his_bytes_prove_does() {
    if !rustix::process::geteuid().is_root() {
        // Only root can make files of another user; what is tested is root's own protection.
        return;
    }
    let digest = Digest::of(b"manifest");
    let verified = Unverified::new(&b"manifest"[..]).verify(&digest).expect("holds");
    type Give = fn(&Cache, &Path);
    let ways: [Give; 5] = [
        |cache, _| chown(cache.root(), Some(4711), None).expect("chown"),
        |cache, _| chown(cache.root().join("indexes"), Some(4711), None).expect("chown"),
        |_, index| chown(index.parent().expect("a parent"), Some(4711), None).expect("chown"),
        |_, index| chown(index, Some(4711), None).expect("chown"),
        |_, index| fs::set_permissions(index, fs::Permissions::from_mode(0o666)).expect("chmod"),
    ];
    for (at, give) in ways.into_iter().enumerate() {
        let (_dir, lower, upper) = two();
        lower.keep_blob(&digest, &verified).expect("keeps");
        lower.keep_index(&digest, b"index").expect("keeps");
        lower.remember("registry/kit:v1", &digest).expect("remembers");
        assert!(upper.index(&digest).expect("reads").is_some());
        give(&lower, &lower.path_of("indexes", &digest.hex()));
        assert!(upper.index(&digest).expect("reads").is_none(), "way {at}");
        assert!(upper.blob(&digest).expect("reads").is_some(), "way {at}");
        if at == 0 {
            assert!(upper.known("registry/kit:v1").expect("reads").is_none());
        }
    }
}

#[test]
fn the_later_knowledge_of_a_tag_counts() {
    let (_dir, lower, upper) = two();
    let (old, new) = (Digest::of(b"old"), Digest::of(b"new"));
    upper.remember("registry/kit:v1", &old).expect("remembers");
    lower.remember("registry/kit:v1", &new).expect("remembers");
    let path = upper.path_of("tags", &Digest::of(b"registry/kit:v1").hex());
    let known = |seen: u64, digest| serde_json::json!({"reference": "registry/kit:v1", "digest": digest, "seen": seen});
    fs::write(&path, known(1, old).to_string()).expect("writes");
    assert_eq!(upper.known("registry/kit:v1").expect("reads").map(|known| known.digest), Some(new));
    fs::write(&path, known(u64::MAX, old).to_string()).expect("writes");
    assert_eq!(upper.known("registry/kit:v1").expect("reads").map(|known| known.digest), Some(old));
}

#[test]
fn a_lower_cache_that_is_none_is_an_error_that_names_the_flag() {
    let dir = tempfile::tempdir().expect("a directory");
    let open = |lower: &Path| {
        let settings = Settings { lower: vec![lower.to_owned()], ..Settings::default() };
        Cache::open_with(&dir.path().join("upper"), settings).map(|_| ()).map_err(|error| error.to_string())
    };
    let refused = |lower: &Path, why: &str| {
        let error = open(lower).expect_err("refused");
        assert!(error.contains("--cache-lower") && error.contains(why), "{error}");
    };
    refused(&dir.path().join("missing"), "No such file");
    let file = dir.path().join("file");
    fs::write(&file, "").expect("writes");
    refused(&file, "can't be read");
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).expect("makes");
    refused(&empty, "is not a cache");
    assert_eq!(fs::read_dir(&empty).expect("reads").count(), 0, "and none was made of it");
    let newer = dir.path().join("newer");
    fs::create_dir(&newer).expect("makes");
    fs::write(newer.join("format"), "kitfs-cache 2\n").expect("writes");
    refused(&newer, "version 2");
    let damaged = Cache::open(&dir.path().join("damaged")).expect("a cache");
    fs::remove_file(damaged.root().join("format")).expect("removes");
    refused(damaged.root(), "is damaged");
    open(&dir.path().join("upper")).expect("the cache itself has nothing to add");
}

#[test]
fn with_recheck_an_object_below_is_hashed_at_each_open() {
    for recheck in [false, true] {
        let (dir, lower, _) = two();
        let content = vec![7; 5000];
        fill(&lower, &content, 0..1);
        let name = list_of(&content).object();
        let settings = Settings { lower: vec![lower.root().to_owned()], recheck, ..Settings::default() };
        let upper = Cache::open_with(&dir.path().join("upper"), settings).expect("a cache");
        assert!(upper.object(&name, 5000).expect("opens").is_some());
        let path = spread(lower.root(), "objects", &name.hex());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
        File::options().write(true).open(&path).expect("opens").write_all_at(b"!", 100).expect("writes");
        // As a disk that fails leaves it: nothing tells that it has changed.
        let stamp = Stamp::of(&fs::metadata(&path).expect("stat"));
        let entry = upper.lower[0].hashed.lock().expect("free")[&name].clone();
        *entry.lock().expect("free") = Some(Hashed { stamp, is_right: true });
        assert_eq!(upper.object(&name, 5000).expect("opens").is_none(), recheck);
    }
}
