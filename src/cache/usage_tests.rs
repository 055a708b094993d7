use super::*;
use crate::digest::Digest;

fn cache() -> (tempfile::TempDir, Cache) {
    let dir = tempfile::tempdir().expect("a directory");
    let cache = Cache::open(&dir.path().join("cache")).expect("a cache");
    (dir, cache)
}

fn put(path: &Path, len: usize) {
    fs::create_dir_all(path.parent().expect("a parent")).expect("makes");
    fs::write(path, vec![1; len]).expect("writes");
}

/// What `du` would say.
fn du(path: &Path) -> u64 {
    let metadata = fs::symlink_metadata(path).expect("stat");
    let own = metadata.blocks() * 512;
    if !metadata.is_dir() {
        return own;
    }
    own + fs::read_dir(path).expect("reads").map(|entry| du(&entry.expect("an entry").path())).sum::<u64>()
}

fn items_of(usage: &Usage) -> Vec<(Area, u64)> {
    usage.areas().filter(|(_, amount)| amount.items > 0).map(|(area, amount)| (area, amount.items)).collect()
}

#[test]
fn every_file_is_an_item_of_its_area_and_all_that_the_directory_takes_is_counted() {
    let (_dir, cache) = cache();
    let key = Digest::of(b"key");
    for (area, files) in [("objects", 3), ("blobs/sha256", 2), ("indexes", 1), ("tags", 2), ("kits", 1), ("served", 1)]
    {
        for number in 0..files {
            put(&cache.spread(area, &Digest::of(&[number]).hex()), 10_000);
        }
    }
    put(&cache.root.join("quarantine/some/where"), 5000);
    put(&cache.spread("tags", "abcd.1.2.tmp"), 5000);
    put(&cache.spread("objects", "abcd.77.new"), 5000);
    put(&cache.root.join("notes.txt"), 5000);
    let mut staging = cache.stage(&key).expect("stages").expect("free");
    staging.create().expect("creates").write_at(&cache, &[1; 9000], 0).expect("writes");
    staging.create().expect("creates").write_at(&cache, &[1; 9000], 0).expect("writes");
    let usage = cache.usage().expect("counts");
    let expected = [
        (Area::Objects, 3),
        (Area::Incoming, 1),
        (Area::Blobs, 2),
        (Area::Indexes, 1),
        (Area::Tags, 2),
        (Area::Kits, 1),
        (Area::Served, 1),
        (Area::Quarantine, 1),
        (Area::Temporary, 2),
        // And `format`, and the lock on eviction.
        (Area::Other, 3),
    ];
    assert_eq!(items_of(&usage), expected);
    assert_eq!(usage.bytes(), du(&cache.root));
    assert!(usage.of(Area::Incoming).bytes >= 18_000, "{usage:?}");
}

#[test]
fn a_sparse_file_counts_as_what_it_takes_together_with_its_list() {
    let (_dir, cache) = cache();
    let name = Digest::of(b"a").hex();
    let path = cache.spread("partial", &name);
    put(&path, 0);
    let file = fs::OpenOptions::new().write(true).open(&path).expect("opens");
    file.set_len(1 << 30).expect("grows");
    std::os::unix::fs::FileExt::write_all_at(&file, &[1; 8192], 1 << 29).expect("writes");
    put(&path.with_extension("list"), 5000);
    put(&cache.spread("partial", &Digest::of(b"b").hex()).with_extension("list"), 100);
    let mut seen = Vec::new();
    let usage = cache.scan(|item| seen.extend((item.area == Area::Partial).then_some(item))).expect("counts");
    assert_eq!(items_of(&usage)[0], (Area::Partial, 2));
    let whole = seen.iter().find(|item| item.path == path).expect("named by the file, not by the list");
    assert!((12_000..100_000).contains(&whole.bytes), "{whole:?}");
    assert_eq!(whole.object().map(|object| object.hex()), Some(name));
    assert_eq!(usage.bytes(), du(&cache.root));
}

#[test]
fn a_file_with_two_names_is_counted_once_and_no_link_is_followed() {
    let (dir, cache) = cache();
    let (object, partial) = (cache.spread("objects", "aa01"), cache.spread("partial", "aa01"));
    put(&object, 1 << 20);
    fs::create_dir_all(partial.parent().expect("a parent")).expect("makes");
    fs::hard_link(&object, &partial).expect("links");
    let elsewhere = dir.path().join("elsewhere");
    put(&elsewhere.join("big"), 4 << 20);
    std::os::unix::fs::symlink(&elsewhere, cache.root.join("incoming/link")).expect("links");
    std::os::unix::fs::symlink(&elsewhere, cache.root.join("objects/link")).expect("links");
    std::os::unix::fs::symlink(elsewhere.join("big"), cache.spread("objects", "aa02")).expect("links");
    let usage = cache.usage().expect("counts");
    assert!((1 << 20..2 << 20).contains(&usage.bytes()), "{usage:?}");
    assert_eq!(usage.of(Area::Objects).items, 3);
}
