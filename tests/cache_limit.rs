//! A cache with a limit, or on a disk that is full: every byte right, the limit held, no error to who reads.

mod support;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kitfs::cache::{Cache, CacheError, Limit, Settings};
use kitfs::digest::{Digest, Unverified};
use kitfs::object::ChunkList;
use rustix::mount::{MountFlags, UnmountFlags};
use support::FaultServer;
use support::kit::{KitBuilder, Served, pattern, tar};
use support::program::Kitfs;

const MIB: usize = 1 << 20;

/// A tmpfs of this test's own, which only root can mount.
struct Disk(PathBuf);

impl Disk {
    fn new(dir: PathBuf, mib: usize) -> Self {
        fs::create_dir(&dir).expect("mkdir");
        let size = std::ffi::CString::new(format!("size={mib}m,mode=0700")).expect("no NUL");
        rustix::mount::mount("tmpfs", &dir, "tmpfs", MountFlags::empty(), Some(&*size))
            .expect("mounts a tmpfs, as root");
        Self(dir)
    }

    /// Uses up all but so much of it.
    fn fill_up_to(&self, left: usize) -> PathBuf {
        let path = self.0.join("filler");
        let free = self.free().saturating_sub(left);
        let file = File::create(&path).expect("creates");
        (0..free.div_ceil(MIB)).for_each(|at| {
            let piece = vec![7; MIB.min(free - at * MIB)];
            file.write_all_at(&piece, (at * MIB) as u64).expect("writes");
        });
        path
    }

    fn free(&self) -> usize {
        let found = rustix::fs::statvfs(&self.0).expect("statvfs");
        (found.f_bavail * found.f_frsize) as usize
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// What a directory takes on the disk, while others write and remove.
fn du(path: &Path) -> u64 {
    let Ok(metadata) = fs::symlink_metadata(path) else { return 0 };
    let below = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| du(&entry.path()));
    metadata.blocks() * 512 + if metadata.is_dir() { below.sum() } else { 0 }
}

/// A pinned kit, and the files in it.
struct Kit {
    served: Served,
    files: Vec<(String, Vec<u8>)>,
}

impl Kit {
    fn new(server: &FaultServer, tag: &str, seed: u64, sizes: &[usize]) -> Self {
        let files = (0..).zip(sizes).map(|(at, size)| (format!("w/{at:03}"), pattern(seed * 1000 + at, *size)));
        let files: Vec<_> = files.collect();
        let refs: Vec<_> = files.iter().map(|(path, bytes)| (&**path, &**bytes)).collect();
        Self { served: KitBuilder::new().indexed().tar("model", "w", tar(&refs)).serve(server, tag), files }
    }
}

/// A sequence that looks random.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

/// Reads at random from the files below a directory for a while; tells how many bytes were read, all of them right.
fn read_at_random(dir: &Path, kit: &Kit, random: &mut Random, until: Instant) -> u64 {
    let mut read = 0;
    while Instant::now() < until {
        let (path, bytes) = &kit.files[random.below(kit.files.len())];
        let file = File::open(dir.join(path)).expect("opens");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).expect("fadvise");
        for _ in 0..4 {
            let offset = random.below(bytes.len());
            let mut found = vec![0; (1 + random.below(300_000)).min(bytes.len() - offset)];
            file.read_exact_at(&mut found, offset as u64).unwrap_or_else(|error| panic!("{path} at {offset}: {error}"));
            assert!(found == bytes[offset..offset + found.len()], "wrong bytes in {path} at {offset}");
            read += found.len() as u64;
        }
    }
    read
}

#[test]
fn eight_processes_read_four_kits_at_random_through_a_cache_of_a_third_of_them() {
    /// How long, in seconds, where somebody wants to know better.
    const SECONDS: &str = "KITFS_TEST_SECONDS";
    /// Four chunks in hand for each process: written, and not yet counted by who looks.
    const IN_FLIGHT: u64 = (8 * 4) << 20;
    let seconds = std::env::var(SECONDS).map_or(15, |text| text.parse().expect("a number of seconds"));
    let server = FaultServer::empty("team/kit");
    let sizes: Vec<_> = [9 * MIB + 5, 5 * MIB].into_iter().chain((0..40).map(|at| 20_000 + at * 40_000)).collect();
    let kits: Vec<_> = (0..4).map(|seed| Kit::new(&server, &format!("v{seed}"), seed, &sizes)).collect();
    let all: u64 = kits.iter().flat_map(|kit| &kit.files).map(|(_, bytes)| bytes.len() as u64).sum();
    let limit = all / 3;
    let kitfs = Kitfs::new().with("KITFS_CACHE_SIZE", limit.to_string());
    let (done, most, read) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let deadline = Instant::now() + Duration::from_secs(seconds);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                most.fetch_max(du(&kitfs.cache()), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let readers: Vec<_> = (0..8_u64)
            .map(|process| {
                let (kitfs, kit, read) = (&kitfs, &kits[process as usize % kits.len()], &read);
                scope.spawn(move || {
                    let mut random = Random(process + 1);
                    // Processes come and go: what one had open, another may evict.
                    while Instant::now() < deadline {
                        let dir = kitfs.path(&format!("mnt{process}"));
                        kitfs.ok(&["mount", &kit.served.reference, dir.to_str().expect("UTF-8")]);
                        let turn = deadline.min(Instant::now() + Duration::from_secs(5));
                        read.fetch_add(read_at_random(&dir, kit, &mut random, turn), Ordering::Relaxed);
                        // A process that another thread has forked holds our files until it has become kitfs.
                        support::eventually("the unmount", || {
                            kitfs.run(&["unmount", dir.to_str().expect("UTF-8")]).status.success()
                        });
                    }
                })
            })
            .collect();
        let ended: Vec<_> = readers.into_iter().map(|reader| reader.join()).collect();
        done.store(true, Ordering::Relaxed);
        assert!(ended.iter().all(Result::is_ok), "{}", kitfs.logs());
    });
    let (most, read) = (most.into_inner(), read.into_inner());
    let told = format!("{read} bytes read, {} fetched, {most} held, with a limit of {limit}", server.bytes());
    assert!(read > all && most <= limit + IN_FLIGHT, "{told}");
    let held = du(&kitfs.cache());
    assert!(held <= limit, "nothing is in flight, and the cache holds {held}, with a limit of {limit}");
    assert!(held > limit / 2, "more went than had to: {held} of {limit}");
    kitfs.assert_cache_is_true(&[]);
    let logs = kitfs.logs();
    assert!(!logs.contains("ERROR") && !logs.contains("panicked"), "{logs}");
}

#[test]
fn a_disk_that_fills_amid_ranged_reads_costs_no_reader_a_byte_and_is_used_again_when_it_has_room() {
    let server = FaultServer::empty("team/kit");
    let sizes: Vec<_> = [24 * MIB + 77, 3 * MIB].into_iter().chain((0..50).map(|at| 1000 + at * 3000)).collect();
    let kit = Kit::new(&server, "v1", 1, &sizes);
    let kitfs = Kitfs::new();
    let disk = Disk::new(kitfs.path("disk"), 64);
    let kitfs = Kitfs::with(kitfs, "KITFS_CACHE_DIR", disk.0.join("cache"));
    let mount = kitfs.mount(&kit.served.reference, &[]);
    let (path, bytes) = &kit.files[0];
    let file = mount.open_direct(path);
    // Past the kernel's memory, in strides: what is read is asked of kitfs.
    let read = |chunk: usize| {
        let mut found = vec![0; MIB];
        file.read_exact_at(&mut found, (chunk * MIB) as u64).expect("a full disk is not a reader's error");
        assert!(found == bytes[chunk * MIB..(chunk + 1) * MIB], "wrong bytes in chunk {chunk}");
    };
    let held = || du(&disk.0.join("cache"));
    (0..4).for_each(|step| read(step * 5));
    let filler = disk.fill_up_to(2 * MIB);
    (0..24).for_each(|step| read(step * 5 % 24));
    // In order, and by many at once; small files too, which need new names on the disk.
    std::thread::scope(|scope| {
        for (path, bytes) in &kit.files {
            let path = mount.path(path);
            scope.spawn(move || assert!(fs::read(&path).expect("reads") == *bytes, "{}", path.display()));
        }
    });
    (0..24).rev().for_each(read);
    let logs = kitfs.logs();
    assert_eq!(logs.matches("the cache keeps nothing more").count(), 1, "{logs}");
    assert_eq!(logs.matches("WARN").count() + logs.matches("ERROR").count(), 1, "{logs}");
    let full = held();
    assert!(full < 10 << 20, "the disk had 6 MiB for it, and it holds {full}");

    fs::remove_file(filler).expect("removes");
    let start = Instant::now();
    while held() < 24 << 20 {
        assert!(start.elapsed() < Duration::from_secs(20), "{} are kept: {}", held(), kitfs.logs());
        (0..24).rev().for_each(read);
        std::thread::sleep(Duration::from_millis(200));
    }
    let logs = kitfs.logs();
    assert_eq!(logs.matches("has room again").count(), 1, "{logs}");
    assert_eq!(logs.matches("the cache keeps nothing more").count(), 1, "{logs}");
    server.reset_counters();
    (0..24).rev().for_each(read);
    assert_eq!(server.requests_for(kit.served.layers[0]), 0, "it is kept");
}

#[test]
fn a_cache_that_has_reached_its_limit_with_all_in_use_serves_the_rest_from_memory() {
    let server = FaultServer::empty("team/kit");
    let kit = Kit::new(&server, "v1", 2, &[30 * MIB]);
    let kitfs = Kitfs::new().with("KITFS_CACHE_SIZE", "8MiB");
    let mount = kitfs.mount(&kit.served.reference, &[]);
    for _ in 0..2 {
        assert!(fs::read(mount.path("w/000")).expect("reads") == kit.files[0].1);
        let file = mount.open_direct("w/000");
        let mut found = vec![0; MIB];
        file.read_exact_at(&mut found, 20 * MIB as u64).expect("reads");
        assert!(found == kit.files[0].1[20 * MIB..21 * MIB]);
    }
    let held = du(&kitfs.cache());
    assert!((4 << 20..=8 << 20).contains(&held), "{held}");
    let logs = kitfs.logs();
    assert_eq!(logs.matches("the cache keeps nothing more").count(), 1, "{logs}");
    assert!(logs.contains("--cache-size"), "{logs}");
}

/// Keeps a file of one chunk.
fn keep(cache: &Cache, seed: u64) -> Result<(), CacheError> {
    let bytes = pattern(seed, MIB);
    let list = ChunkList::new(MIB as u64, Bytes::copy_from_slice(Digest::of(&bytes).as_bytes())).expect("one chunk");
    let chunk = list.verify(0, Unverified::new(bytes)).expect("a chunk").expect("its bytes");
    let partial = cache.partial(list);
    partial.write(cache, &chunk)?;
    cache.commit(&[&partial]).into_iter().next().map_or(Ok(()), Err)
}

fn limited(disk: &Disk, limit: Limit) -> Cache {
    Cache::open_with(&disk.0.join("cache"), Settings { limit, ..Settings::default() }).expect("a cache")
}

#[test]
fn the_part_of_a_disk_that_is_kept_free_is_left_to_others_who_come() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = Disk::new(dir.path().join("disk"), 40);
    let cache = limited(&disk, Limit::KeepFree(20));
    (0..60).for_each(|seed| keep(&cache, seed).expect("there is room"));
    assert!(disk.free() >= 8 * MIB, "{} are free of 40 MiB", disk.free());
    assert!(disk.free() < 14 * MIB, "{} are free of 40 MiB", disk.free());
    fs::write(disk.0.join("other"), vec![1; 7 * MIB]).expect("a fifth was free");
}

#[test]
fn a_full_disk_is_told_as_such_whatever_was_written_and_a_probe_finds_room() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = Disk::new(dir.path().join("disk"), 16);
    let cache = limited(&disk, Limit::None);
    (0..4).for_each(|seed| keep(&cache, seed).expect("there is room"));
    let filler = disk.fill_up_to(0);
    let key = Digest::of(b"key");
    let is_full = |outcome: Result<(), CacheError>| outcome.is_err_and(|error| error.is_full());
    assert!(is_full(keep(&cache, 10)) && is_full(cache.keep_index(&key, b"index")));
    let fresh = limited(&disk, Limit::None);
    let staged = fresh.stage(&key).and_then(|staging| {
        let file = staging.expect("free").create()?;
        file.write_at(&fresh, &[1; 4096], 0)
    });
    assert!(is_full(staged));
    for cache in [&cache, &fresh] {
        assert!(cache.is_full() && cache.fullness().is_some_and(|why| why.contains("disk")));
    }
    // Too little to begin again: it would be full in a moment.
    let len = fs::metadata(&filler).expect("stat").len();
    File::options().write(true).open(&filler).and_then(|file| file.set_len(len - 20_000)).expect("cuts");
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(2500) {
        assert!(cache.fullness().is_some());
        std::thread::sleep(Duration::from_millis(100));
    }
    fs::remove_file(&filler).expect("removes");
    support::eventually("there is room again", || cache.fullness().is_none());
    keep(&cache, 10).expect("there is room");
    assert!((0..4).all(|seed| keep(&cache, seed).is_ok()), "nothing was evicted for it");
}

#[test]
fn a_disk_that_is_full_for_a_cache_that_keeps_some_free_makes_it_yield() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = Disk::new(dir.path().join("disk"), 32);
    let cache = limited(&disk, Limit::KeepFree(20));
    (0..20).for_each(|seed| keep(&cache, seed).expect("there is room"));
    let before = du(&disk.0.join("cache"));
    disk.fill_up_to(0);
    cache.keep_limit().expect("evicts");
    assert!(disk.free() >= 32 * MIB / 5, "{} are free", disk.free());
    assert!(du(&disk.0.join("cache")) < before);
    keep(&cache, 100).expect("there is room for what is new");
}

#[test]
fn an_io_error_that_is_no_full_disk_is_not_taken_for_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let cache = Cache::open(&dir.path().join("cache")).expect("a cache");
    let indexes = cache.root().join("indexes");
    fs::remove_dir(&indexes).expect("removes");
    fs::write(&indexes, b"").expect("writes");
    let error = cache.keep_index(&Digest::of(b"key"), b"index").expect_err("no directory");
    assert!(matches!(&error, CacheError::Io { cause, .. } if cause.kind() != io::ErrorKind::StorageFull), "{error}");
    assert!(!cache.is_full());
}
