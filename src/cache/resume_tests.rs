use std::time::{Duration, Instant};

use super::*;
use crate::cache::staging::Staging;
use crate::digest::Digest;

fn cache() -> (tempfile::TempDir, Cache) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let cache = Cache::open(&dir.path().join("cache")).expect("cache opens");
    (dir, cache)
}

fn key() -> Digest {
    Digest::of(b"layer")
}

fn place(cache: &Cache) -> PathBuf {
    cache.root().join("incoming").join(key().hex())
}

fn stage(cache: &Cache) -> Staging {
    cache.stage(&key()).expect("stages").expect("free")
}

/// A fill that has written so much and is then given up.
fn interrupt(cache: &Cache, bytes: u64) {
    let mut staging = stage(cache);
    staging.begin(Beside::Between).expect("begins");
    staging.keep(cache, &[0; 512]).expect("keeps");
    let file = staging.create().expect("creates");
    file.write_at(cache, &vec![7; bytes as usize - 512], 0).expect("writes");
}

/// What the machine knows after it was started anew.
fn reboot(cache: &Cache, offset: u64) {
    let synced = Synced { offset, boot: "another".to_owned() };
    fs::write(place(cache).join(SYNCED), serde_json::to_vec(&synced).expect("JSON")).expect("writes");
}

#[test]
fn what_is_worth_it_outlives_its_fill_and_the_next_process() {
    let (_dir, cache) = cache();
    interrupt(&cache, WORTH - 1);
    assert!(!place(&cache).exists(), "that little is fetched again");
    interrupt(&cache, WORTH);
    Cache::open(cache.root()).expect("opens, and sweeps");
    let staging = stage(&cache);
    let left = staging.left(Beside::Between).expect("reads").expect("is there");
    assert_eq!((left.beside(), left.file_len(0), left.counts()), (512, Some(WORTH - 512), u64::MAX));
    assert!(staging.left(Beside::Blob).expect("reads").is_none(), "it was not kept in this way");
    drop(staging);
    assert!(place(&cache).exists(), "who only looked leaves it");
    stage(&cache).discard();
    assert!(!place(&cache).exists());
}

#[test]
fn after_a_boot_no_more_counts_than_was_synced() {
    let (_dir, cache) = cache();
    interrupt(&cache, WORTH + 100);
    reboot(&cache, WORTH + 7);
    Cache::open(cache.root()).expect("opens, and sweeps");
    let left = stage(&cache).left(Beside::Between).expect("reads").expect("is there");
    assert_eq!(left.counts(), WORTH + 7);
    reboot(&cache, WORTH - 1);
    Cache::open(cache.root()).expect("opens, and sweeps");
    assert!(!place(&cache).exists(), "it is not worth it");
}

#[test]
fn going_on_removes_what_lies_behind_and_only_then_counts_it_in_this_boot() {
    let (_dir, cache) = cache();
    interrupt(&cache, WORTH + 100);
    for more in ["1", "2"] {
        fs::write(place(&cache).join(more), "more").expect("writes");
    }
    fs::write(place(&cache).join("sealed"), "").expect("writes");
    reboot(&cache, WORTH);
    let mut staging = stage(&cache);
    let at = Reached { offset: WORTH, beside: 500, files: 1, last: WORTH - 500 };
    staging.go_on(Beside::Between, &at).expect("goes on");
    assert!(!cache.staged(&key()).sealed);
    let left = staging.left(Beside::Between).expect("reads").expect("is there");
    assert_eq!((left.beside(), left.file_len(0), left.file_len(1)), (500, Some(WORTH - 500), None));
    assert_eq!(left.counts(), u64::MAX);
    let first = staging.next_begun();
    let mode = || fs::metadata(staging.path_of(first)).expect("stat").permissions().mode() & 0o777;
    assert_eq!(mode(), 0o444);
    staging.keep(&cache, b"next").expect("keeps");
    let file = staging.reopen(first).expect("opens");
    file.write_at(&cache, b"goes on", WORTH - 500).expect("writes");
    assert_eq!(fs::metadata(file.path()).expect("stat").len(), WORTH - 500 + 7);
    assert_eq!(fs::read(place(&cache).join("between")).expect("reads").len(), 504);
}

#[test]
fn a_checkpoint_says_what_is_on_the_disk_and_does_not_reach_into_the_next_fill() {
    let (_dir, cache) = cache();
    let mut staging = stage(&cache);
    staging.begin(Beside::Blob).expect("begins");
    let synced = || Synced::read(&place(&cache)).expect("is there").offset;
    let pass_the_time = |staging: &mut Staging| staging.kept.as_mut().expect("is kept").checked_at -= PAUSE;
    staging.reached(CHECKPOINT + 5);
    assert_eq!(synced(), 0, "the last one was a moment ago");
    pass_the_time(&mut staging);
    staging.reached(CHECKPOINT - 1);
    assert_eq!(synced(), 0, "there is little to be lost");
    staging.reached(CHECKPOINT + 5);
    let start = Instant::now();
    while synced() == 0 {
        assert!(start.elapsed() < Duration::from_secs(60), "no checkpoint is made");
        std::thread::sleep(Duration::from_millis(5));
        staging.reached(CHECKPOINT + 5);
    }
    assert_eq!(synced(), CHECKPOINT + 5);
    pass_the_time(&mut staging);
    staging.reached(3 * CHECKPOINT);
    staging.begin(Beside::Blob).expect("begins anew");
    assert_eq!(synced(), 0, "the one under way has ended");
}

#[test]
fn what_is_given_up_for_want_of_room_is_gone_and_the_lock_stays() {
    let (_dir, cache) = cache();
    let mut staging = stage(&cache);
    staging.begin(Beside::Blob).expect("begins");
    staging.keep(&cache, &[1; 100]).expect("keeps");
    staging.create().expect("creates").write_at(&cache, b"content", 0).expect("writes");
    assert!(staging.forget());
    assert!(!staging.forget(), "there is no more");
    assert!(!place(&cache).join("blob").exists() && place(&cache).join("0").exists());
    staging.keep(&cache, &[1; 100]).expect("is no error");
    staging.clear();
    assert_eq!(fs::read_dir(place(&cache)).expect("reads").count(), 1);
    assert!(cache.stage(&key()).expect("looks").is_none());
    drop(staging);
    assert!(!place(&cache).exists());
}

#[test]
fn a_directory_of_ones_own_is_for_nobody_else() {
    let (_dir, cache) = cache();
    let mut staging = cache.stage_alone(&key()).expect("stages").expect("free");
    staging.begin(Beside::Blob).expect("begins");
    staging.keep(&cache, &vec![1; 2 * WORTH as usize]).expect("is no error");
    drop(staging);
    assert_eq!(fs::read_dir(cache.root().join("incoming")).expect("reads").count(), 0);
}
