use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;
use crate::cache::testing::{CHUNK, chunk, list_of};
use crate::cache::{KitRecord, Settings};
use crate::digest::{StreamHasher, Unverified};

fn none(_: &ObjectDigest) -> Option<ChunkList<Bytes>> {
    None
}

fn content() -> Vec<u8> {
    (0..2 * CHUNK + 700).map(|at| (at / 7 % 250) as u8 + 1).collect()
}

/// A cache with one file of each kind: an object, a partial file without its middle chunk, and its list.
fn full() -> (tempfile::TempDir, Cache) {
    let dir = tempfile::tempdir().expect("a directory");
    let cache = Cache::open(&dir.path().join("cache")).expect("a cache");
    let digest = Digest::of(b"manifest");
    let verified = Unverified::new(&b"manifest"[..]).verify(&digest).expect("holds");
    cache.keep_blob(&digest, &verified).expect("keeps");
    cache.keep_index(&digest, b"index").expect("keeps");
    cache.remember("registry/kit:v1", &digest).expect("remembers");
    let record = KitRecord {
        digest,
        references: vec!["registry/kit:v1".to_owned()],
        repository: "registry/kit".to_owned(),
        blobs: Vec::new(),
        layers: Vec::new(),
    };
    cache.note_kit(record).expect("notes");
    cache.note_served(Path::new("/mnt"), &digest).expect("notes");
    let whole = b"an object".to_vec();
    let partial = cache.partial(list_of(&whole));
    partial.write(&cache, &chunk(&whole, 0)).expect("writes");
    assert!(cache.commit(&[&partial]).is_empty());
    let half = content();
    cache.keep_chunk_list(&list_of(&half)).expect("keeps");
    let partial = cache.partial(list_of(&half));
    for number in [0, 2] {
        partial.write(&cache, &chunk(&half, number)).expect("writes");
    }
    (dir, cache)
}

/// What is not right, by what it is.
fn findings(cache: &Cache) -> Vec<(CacheFile, Health)> {
    let files = cache.files().expect("lists");
    let health = |listed: CacheFile| (listed.clone(), cache.check(&listed, &none, &|_| ()).expect("checks"));
    files.into_iter().map(health).filter(|(_, health)| *health != Health::Right).collect()
}

fn repair_all(cache: &Cache) -> Vec<Repair> {
    let repair = |(listed, health): (CacheFile, Health)| match health {
        Health::Damaged(damage) => Some(cache.repair(&listed, &damage).expect("repairs")),
        _ => None,
    };
    findings(cache).into_iter().filter_map(repair).collect()
}

fn flip(path: &Path, at: u64) {
    // Whatever its mode, as a disk does.
    let bytes = fs::read(path).expect("reads");
    let mode = fs::metadata(path).expect("stat").permissions();
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("chmod");
    let file = File::options().write(true).open(path).expect("opens");
    file.write_all_at(&[bytes[at as usize] ^ 1], at).expect("writes");
    fs::set_permissions(path, mode).expect("chmod");
}

#[test]
fn a_sound_cache_has_every_kind_of_file_and_no_finding() {
    let (_dir, cache) = full();
    let mut kinds: Vec<_> = cache.files().expect("lists").iter().map(CacheFile::what).collect();
    kinds.sort_unstable();
    assert_eq!(
        kinds,
        ["blob", "chunk list", "format", "index", "kit", "lock", "lock", "object", "partial", "served", "tag"]
    );
    assert_eq!(findings(&cache), []);
    let (told, files) = (AtomicU64::new(0), cache.files().expect("lists"));
    let hashed = files.iter().filter(|listed| matches!(listed.what(), "object" | "blob" | "partial"));
    let bytes: u64 = hashed.clone().map(CacheFile::bytes).sum();
    for listed in hashed {
        let tell = |bytes| {
            told.fetch_add(bytes, Ordering::Relaxed);
        };
        cache.check(listed, &none, &tell).expect("checks");
    }
    let (told, content) = (told.into_inner(), (CHUNK + 700 + 9 + 8) as u64);
    assert!(told == content && (content..content + 8192).contains(&bytes), "{told} told of {bytes}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_flipped_bit_anywhere_is_found_repaired_and_then_gone(which in 0..9_usize, at in any::<prop::sample::Index>()) {
        let (_dir, cache) = full();
        let listed = cache.files().expect("lists")[which].clone();
        let mut offset = at.index(fs::metadata(listed.path()).expect("stat").len() as usize);
        if listed.what() == "partial" && (CHUNK..2 * CHUNK).contains(&offset) {
            // That is a hole.
            offset -= CHUNK;
        }
        flip(listed.path(), offset as u64);
        // A record may say something else and still name itself right: then it is a record.
        let found = findings(&cache);
        if !matches!(listed.what(), "tag" | "kit" | "served") {
            prop_assert_eq!(found.iter().filter(|(found, _)| found == &listed).count(), 1, "{:?}", found);
        }
        repair_all(&cache);
        let left = findings(&cache);
        // Without its list nobody knows what is right in the partial file.
        prop_assert!(left.iter().all(|(_, health)| *health == Health::Unknown), "{:?}", left);
        prop_assert!(Cache::open(cache.root()).is_ok());
        if listed.what() == "partial" {
            let (list, wanted) = (list_of(&content()), content());
            let partial = cache.partial(list.clone());
            for number in 0..3 {
                let range = list.range(number).expect("a chunk");
                if let Some(found) = partial.look(&cache, number).expect("looks") {
                    prop_assert_eq!(&found.chunk.bytes().bytes()[..], &wanted[range.start as usize..range.end as usize]);
                }
            }
        }
    }
}

#[test]
fn of_a_partial_file_only_the_damaged_chunk_is_taken_back() {
    let (_dir, cache) = full();
    let listed = cache.files().expect("lists").into_iter().find(|listed| listed.what() == "partial").expect("is there");
    flip(listed.path(), 5);
    assert_eq!(repair_all(&cache), [Repair::Chunks(1)]);
    let partial = cache.partial(list_of(&content()));
    assert!(partial.look(&cache, 0).expect("looks").is_none() && partial.look(&cache, 2).expect("looks").is_some());
    assert_eq!(findings(&cache), []);
}

#[test]
fn a_damaged_partial_file_that_somebody_fills_is_set_aside_and_its_bytes_stay_as_they_are() {
    let (_dir, cache) = full();
    let listed = cache.files().expect("lists").into_iter().find(|listed| listed.what() == "partial").expect("is there");
    let filling = cache.partial(list_of(&content()));
    filling.look(&cache, 0).expect("looks").expect("is right");
    flip(listed.path(), 5);
    assert_eq!(repair_all(&cache), [Repair::SetAside]);
    let range = filling.range(&(0..16)).expect("it counted before");
    let mut bytes = [0; 16];
    range.file().read_exact_at(&mut bytes, 0).expect("reads");
    assert!(bytes[5] == content()[5] ^ 1 && bytes[6] == content()[6], "no hole was made under it: {bytes:?}");
    assert!(cache.partial(list_of(&content())).look(&cache, 0).expect("looks").is_none(), "the next starts anew");
}

#[test]
fn a_partial_file_is_unknown_without_a_list_and_known_with_one_from_elsewhere() {
    let (_dir, cache) = full();
    let list = list_of(&content());
    fs::remove_file(cache.list_path(&list.object())).expect("removes");
    let found = findings(&cache);
    assert!(matches!(found.as_slice(), [(listed, Health::Unknown)] if listed.what() == "partial"), "{found:?}");
    flip(found[0].0.path(), 5);
    let lists = |name: &ObjectDigest| Some(list.clone()).filter(|list| list.object() == *name);
    let health = cache.check(&found[0].0, &lists, &|_| ()).expect("checks");
    assert!(matches!(&health, Health::Damaged(damage) if damage.what.starts_with("1 of 3 chunks")), "{health:?}");
}

#[test]
fn a_damaged_object_is_set_aside_at_a_recheck_and_served_without_one() {
    let (_dir, cache) = full();
    let list = list_of(b"an object");
    let path = cache.spread("objects", &list.object().hex());
    let recheck = Settings { recheck: true, ..Settings::default() };
    let careful = Cache::open_with(cache.root(), recheck).expect("opens");
    assert!(careful.object(&list.object(), list.size()).expect("opens").is_some(), "it is right");
    assert!(careful.object(&list.object(), list.size() + 1).expect("looks").is_none());
    assert!(path.exists(), "a wrong size that somebody states is no damage");
    flip(&path, 3);
    assert!(cache.object(&list.object(), list.size()).expect("opens").is_some(), "nobody looks");
    assert!(careful.object(&list.object(), list.size()).expect("looks").is_none());
    assert!(!careful.has_object(&list.object(), list.size()) && !path.exists());
    let place = cache.root().join("quarantine").join(format!("objects-{}.0", list.object()));
    assert_eq!(fs::read(place).expect("was set aside").len(), 9);
}

/// A layer is fetched again because one of its objects was found damaged; another is damaged too, and nobody has opened it
/// yet when the new one is committed.
#[test]
fn a_verified_object_takes_the_name_of_one_whose_damage_nobody_has_seen_yet() {
    let (_dir, cache) = full();
    let careful = Cache::open_with(cache.root(), Settings { recheck: true, ..Settings::default() }).expect("opens");
    let list = list_of(b"an object");
    let path = cache.spread("objects", &list.object().hex());
    flip(&path, 3);
    let seen = fs::File::open(&path).expect("opens");
    let mut staging = careful.stage(&Digest::of(b"again")).expect("stages").expect("free");
    let file = staging.create().expect("creates");
    file.write_at(&careful, b"an object", 0).expect("writes");
    let mut hasher = StreamHasher::new();
    hasher.update(b"an object");
    let proof = hasher.finish(&Digest::of(b"an object")).expect("holds");
    let sealed = staging.seal(&careful, &proof, vec![(file.number(), list.object())]);
    sealed.commit(&careful, &Digest::of(b"again"), b"index").expect("commits");
    assert_eq!(fs::read(&path).expect("reads"), b"an object");
    // Who opened the damaged one before that sets nothing aside now.
    assert!(!careful.recheck(&path, &seen, &list.object()).expect("hashes"));
    assert!(careful.object(&list.object(), list.size()).expect("opens").is_some());

    flip(&path, 3);
    let partial = careful.partial(list.clone());
    assert!(partial.write(&careful, &chunk(b"an object", 0)).expect("writes"), "it is complete");
    for _ in 0..2 {
        assert!(careful.commit(&[&partial]).is_empty());
        assert_eq!(fs::read(&path).expect("reads"), b"an object");
    }
}

#[test]
fn damage_of_one_name_does_not_fill_the_disk() {
    let (_dir, cache) = full();
    let path = cache.spread("blobs/sha256", &Digest::of(b"manifest").hex());
    for _ in 0..10 {
        fs::write(&path, "false").expect("writes");
        assert!(cache.blob(&Digest::of(b"manifest")).expect("reads").is_none());
    }
    assert_eq!(fs::read_dir(cache.root().join("quarantine")).expect("reads").count(), 4);
}

#[test]
fn what_kitfs_never_makes_is_set_aside() {
    let (dir, cache) = full();
    let name = ObjectDigest::new(0, &[]);
    let planted = cache.spread("objects", &name.hex());
    fs::create_dir_all(planted.parent().expect("a parent")).expect("makes");
    fs::write(dir.path().join("elsewhere"), "").expect("writes");
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), &planted).expect("links");
    fs::write(cache.root().join("objects/notes"), "mine").expect("writes");
    fs::write(cache.root().join("tags").join("00"), "").expect("writes");
    fs::create_dir_all(cache.root().join("indexes/00/deep")).expect("makes");
    assert_eq!(repair_all(&cache), [Repair::SetAside; 4]);
    assert_eq!(findings(&cache), []);
    assert!(dir.path().join("elsewhere").exists() && !planted.exists());
}

#[test]
fn a_damaged_format_is_refused_until_it_is_written_anew() {
    for damage in [None, Some("kitfs-cache 1\n"), Some("kitfs-cache 3\nabc\n"), Some("")] {
        let (_dir, cache) = full();
        let path = cache.root().join("format");
        match damage {
            Some(text) => fs::write(&path, text).expect("writes"),
            None => fs::remove_file(&path).expect("removes"),
        }
        let refused = Cache::open(cache.root()).expect_err("refused").to_string();
        assert!(refused.contains("kitfs cache verify --repair"), "{refused}");
        let cache = Cache::open_to_check(cache.root(), Settings::default()).expect("opens");
        assert_eq!(fs::read_to_string(&path).ok().as_deref(), damage, "opening repairs nothing");
        assert_eq!(repair_all(&cache), [Repair::Written]);
        Cache::open(cache.root()).expect("opens");
    }
}

#[test]
fn what_is_evicted_or_replaced_while_it_is_checked_is_no_damage() {
    let (_dir, cache) = full();
    let files = cache.files().expect("lists");
    let object = files.iter().find(|listed| listed.what() == "object").expect("is there");
    let evicting = File::open(object.path()).expect("opens");
    flock(&evicting, FlockOperation::NonBlockingLockExclusive).expect("locks");
    assert_eq!(cache.check(object, &none, &|_| ()).expect("checks"), Health::InUse);
    drop(evicting);
    flip(object.path(), 1);
    let Health::Damaged(damage) = cache.check(object, &none, &|_| ()).expect("checks") else { panic!("it is damaged") };
    let spare = object.path().with_extension("spare");
    fs::write(&spare, "an object").expect("writes");
    fs::rename(&spare, object.path()).expect("renames");
    assert_eq!(cache.repair(object, &damage).expect("looks"), Repair::Nothing, "another file by now");
    assert_eq!(cache.check(object, &none, &|_| ()).expect("checks"), Health::Right);
    fs::remove_file(object.path()).expect("removes");
    assert_eq!(cache.check(object, &none, &|_| ()).expect("checks"), Health::Gone);
}

#[test]
fn what_another_user_owns_is_found_in_every_kind_of_file_and_set_aside() {
    if !rustix::process::geteuid().is_root() {
        // Only root can give files away.
        return;
    }
    let (_dir, cache) = full();
    let all = cache.files().expect("lists");
    for listed in &all {
        std::os::unix::fs::chown(listed.path(), Some(4711), None).expect("chown");
    }
    let found = findings(&cache);
    assert_eq!(found.len(), all.len());
    for (listed, health) in found {
        let Health::Damaged(damage) = health else { panic!("{listed:?}") };
        assert_eq!(damage.what, "belongs to user 4711", "{listed:?}");
    }
    repair_all(&cache);
    assert_eq!(findings(&cache), []);
}

#[test]
fn something_in_the_place_of_a_lock_makes_nobody_wait_and_is_set_aside() {
    use rustix::fs::{CWD, FileType, Mode};
    let plants: [&dyn Fn(&Path); 3] = [
        &|path| rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).expect("a pipe"),
        &|path| fs::create_dir(path).expect("a directory"),
        &|path| std::os::unix::fs::symlink("elsewhere", path).expect("a link"),
    ];
    for plant in plants {
        let (_dir, cache) = full();
        for name in [kits::LOCK, evict::LOCK] {
            let path = cache.root().join(name);
            fs::remove_file(&path).expect("removes");
            plant(&path);
        }
        let refused = cache.forget_kit(&Digest::of(b"manifest")).expect_err("no lock");
        assert!(crate::report::chain(&refused).contains("verify --repair"), "{refused}");
        assert!(cache.evict_to(0, false).is_err());
        let cache = Cache::open(cache.root()).expect("opens");
        assert_eq!(repair_all(&cache), [Repair::SetAside; 2]);
        cache.forget_kit(&Digest::of(b"manifest")).expect("forgets");
        cache.evict_to(0, false).expect("evicts");
    }
}

#[test]
fn a_partial_file_whose_maker_was_killed_before_it_had_its_size_is_no_damage() {
    let (_dir, cache) = full();
    let partial =
        cache.files().expect("lists").into_iter().find(|listed| listed.what() == "partial").expect("a partial file");
    File::options().write(true).open(partial.path()).expect("opens").set_len(0).expect("empties");
    let list = |_: &ObjectDigest| Some(list_of(&content()));
    assert_eq!(cache.check(&partial, &list, &|_| ()).expect("checks"), Health::Right);
    let file = cache.partial(list_of(&content()));
    assert!(file.look(&cache, 0).expect("looks").is_none());
}
