//! What is left of half-filled files: after `kill -9` at any moment, after a machine that went down, on a disk that is full
//! or read-only. Whatever lies there, no wrong byte is served, and only what is damaged is fetched again.

mod support;

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use kitfs::digest::Digest;
use kitfs::object::ObjectDigest;
use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Signal, kill_process};
use support::kit::{KitBuilder, Served, pattern, tar};
use support::life::{mounted, runs, text};
use support::program::{Kitfs, Mount};
use support::random::Random;
use support::{FaultServer, eventually};

const MIB: usize = 1 << 20;

/// A pinned kit and the content of its files by path.
struct Kit {
    served: Served,
    files: Vec<(String, Vec<u8>)>,
}

impl Kit {
    /// One layer with files of these sizes.
    fn new(server: &FaultServer, sizes: impl IntoIterator<Item = usize>) -> Self {
        let named = |(at, size)| (format!("w/{at:03}"), pattern(at as u64 + 1, size));
        let files: Vec<_> = sizes.into_iter().enumerate().map(named).collect();
        let refs: Vec<(&str, &[u8])> = files.iter().map(|(path, bytes)| (&**path, &**bytes)).collect();
        let served = KitBuilder::new().indexed().tar("model", "w", tar(&refs)).serve(server, "v1");
        Self { served, files }
    }

    fn layer(&self) -> Digest {
        self.served.layers[0]
    }

    fn assert_whole(&self, mount: &Mount<'_>, when: &str) {
        for (path, bytes) in &self.files {
            let found = fs::read(mount.path(path)).unwrap_or_else(|error| panic!("{when}: {path}: {error}"));
            assert!(found == *bytes, "{when}: wrong bytes in {path}");
        }
    }
}

/// The name of content in the cache, computed here.
fn object_of(bytes: &[u8]) -> String {
    let chunks: Vec<Digest> = bytes.chunks(MIB).map(Digest::of).collect();
    ObjectDigest::new(bytes.len() as u64, &chunks).hex()
}

/// Every object has the name that its content deserves; how many there are.
fn assert_objects_true(kitfs: &Kitfs) -> usize {
    let objects = kitfs.cached_files("objects");
    for object in &objects {
        let name = object.file_name().and_then(|name| name.to_str()).expect("a name");
        assert_eq!(object_of(&fs::read(object).expect("reads")), name, "a false object");
    }
    objects.len()
}

fn assert_nothing_mounted(kitfs: &Kitfs) {
    let home = kitfs.path("");
    let table = fs::read_to_string("/proc/mounts").expect("the table of mounts");
    let left: Vec<&str> = table.lines().filter(|line| line.contains(text(&home)) && line.contains("kitfs")).collect();
    assert!(left.is_empty(), "{left:?}");
}

fn spread(kitfs: &Kitfs, area: &str, name: &str) -> PathBuf {
    kitfs.cache().join(area).join(&name[..2]).join(name)
}

/// Reads a piece at random, compares it, and tells how far it got; an error only after the kill.
fn read_some(dir: &Path, kit: &Kit, random: &mut Random, killed: &AtomicBool) -> bool {
    let (path, bytes) = &kit.files[random.below(kit.files.len())];
    let start = random.below(bytes.len());
    let mut found = vec![0; (1 + random.below(2 * MIB)).min(bytes.len() - start)];
    let read = File::open(dir.join(path)).and_then(|file| file.read_exact_at(&mut found, start as u64));
    match read {
        Ok(()) => assert!(found == bytes[start..start + found.len()], "wrong bytes in {path} at {start}"),
        Err(ref error) => assert!(killed.load(Ordering::SeqCst), "an error before the kill: {path}: {error}"),
    }
    read.is_ok()
}

#[test]
fn kill_9_at_200_moments_of_concurrent_reads_leaves_no_wrong_byte() {
    const ROUNDS: usize = 200;
    const READERS: u64 = 4;
    let server = FaultServer::empty("team/kit");
    let sizes = [10 * MIB + 5, 4 * MIB, 2 * MIB + 777, MIB + 1].into_iter().chain((0..150).map(|at| 40_000 + at * 11));
    let kit = Kit::new(&server, sizes);
    let kitfs = Kitfs::new();
    let reads = AtomicUsize::new(0);
    let (rounds, cold) = (AtomicUsize::new(0), AtomicUsize::new(0));
    // Two mounts at a time, each with its own kills, and one cache for all.
    std::thread::scope(|scope| {
        for worker in 0..2_u64 {
            let (kitfs, kit, server, reads, rounds, cold) = (&kitfs, &kit, &server, &reads, &rounds, &cold);
            scope.spawn(move || {
                let mut random = Random::new(worker + 1);
                loop {
                    let round = rounds.fetch_add(1, Ordering::SeqCst) as u64;
                    if round >= ROUNDS as u64 {
                        return;
                    }
                    let before = server.bytes_for(kit.layer());
                    let (dir, daemon) = mounted(kitfs, &kit.served, &format!("mnt{worker}"));
                    let killed = AtomicBool::new(false);
                    std::thread::scope(|scope| {
                        for reader in 0..READERS {
                            let (killed, dir) = (&killed, &dir);
                            scope.spawn(move || {
                                let mut random = Random::new(1000 + round * READERS + reader);
                                while read_some(dir, kit, &mut random, killed) {
                                    reads.fetch_add(1, Ordering::SeqCst);
                                }
                            });
                        }
                        std::thread::sleep(Duration::from_micros(random.below(40_000) as u64));
                        killed.store(true, Ordering::SeqCst);
                        kill_process(daemon, Signal::KILL).expect("kill");
                    });
                    kitfs.ok(&["unmount", "--lazy", text(&dir)]);
                    cold.fetch_add(usize::from(server.bytes_for(kit.layer()) > before), Ordering::SeqCst);
                    // As an eviction would, so that the next rounds find something to do.
                    for area in ["objects", "partial"] {
                        for file in kitfs.cached_files(area) {
                            if random.below(12) == 0 {
                                // The other worker may have removed it, or given it another name.
                                let _ = fs::remove_file(file);
                            }
                        }
                    }
                }
            });
        }
    });
    assert!(reads.load(Ordering::SeqCst) > ROUNDS, "{reads:?} reads");
    assert!(cold.load(Ordering::SeqCst) > ROUNDS / 2, "only {cold:?} rounds fetched anything");
    assert_nothing_mounted(&kitfs);
    assert_objects_true(&kitfs);
    let mount = kitfs.mount(&kit.served.reference, &[]);
    kit.assert_whole(&mount, "in the end");
    eventually("the commit", || kitfs.cached_files("objects").len() == kit.files.len());
    drop(mount);
    assert_objects_true(&kitfs);
    assert!(!kitfs.logs().contains("panicked"), "{}", kitfs.logs());
}

/// Does something to a partial file that a crash, a bad disk or a fool might; tells what.
fn damage(kitfs: &Kitfs, name: &str, len: usize, random: &mut Random) -> &'static str {
    let path = spread(kitfs, "partial", name);
    let open = || File::options().read(true).write(true).open(&path).expect("opens");
    let chunks = len.div_ceil(MIB);
    let chunk = random.below(chunks);
    let start = (chunk * MIB) as u64;
    let end = len.min((chunk + 1) * MIB) as u64;
    match random.below(12) {
        0 => {
            fallocate(open(), FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, end - start)
                .expect("punch");
            "a hole"
        }
        1 => {
            open().write_all_at(&vec![0; (end - start) as usize], start).expect("writes");
            "zeros"
        }
        2 => {
            let half = (end - start) / 2;
            fallocate(open(), FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start + half, half)
                .expect("punch");
            "a torn half, then a hole"
        }
        3 => {
            let half = (end - start) as usize / 2;
            open().write_all_at(&pattern(999, half), start).expect("writes");
            "a torn half, other bytes before it"
        }
        4 => {
            let (file, at, mut byte) = (open(), random.below(len) as u64, [0]);
            file.read_exact_at(&mut byte, at).expect("reads");
            byte[0] ^= 1 << random.below(8);
            file.write_all_at(&byte, at).expect("writes");
            "a flipped bit"
        }
        5 => {
            open().set_len(random.below(len) as u64).expect("cuts");
            "cut short"
        }
        6 => {
            open().set_len((len + 1 + random.below(3 * MIB)) as u64).expect("lengthens");
            "longer"
        }
        7 => {
            let list = path.with_extension("list");
            let mut bytes = fs::read(&list).expect("the list");
            let at = random.below(bytes.len());
            bytes[at] ^= 1;
            fs::write(&list, bytes).expect("writes");
            "a flipped bit in the list"
        }
        8 => {
            fs::remove_file(path.with_extension("list")).expect("removes");
            "no list"
        }
        9 => {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).expect("chmod");
            "read-only"
        }
        10 => {
            fs::remove_file(&path).expect("removes");
            fs::create_dir(&path).expect("mkdir");
            "a directory"
        }
        _ => {
            fs::remove_file(&path).expect("removes");
            symlink(kitfs.path("elsewhere"), &path).expect("links");
            "a link"
        }
    }
}

/// How many bytes of a file have to be fetched, by what lies in its partial file.
fn missing(kitfs: &Kitfs, bytes: &[u8]) -> usize {
    let path = spread(kitfs, "partial", &object_of(bytes));
    let found = fs::symlink_metadata(&path);
    let is_usable =
        found.is_ok_and(|found| found.is_file() && (found.mode() & 0o200 != 0 || rustix::process::geteuid().is_root()));
    if !is_usable {
        return bytes.len();
    }
    let found = fs::read(&path).expect("reads");
    let chunks = bytes.chunks(MIB).enumerate();
    chunks.filter(|(at, chunk)| found.get(at * MIB..at * MIB + chunk.len()) != Some(chunk)).map(|(_, c)| c.len()).sum()
}

#[test]
fn damage_to_partial_files_costs_the_damaged_chunks_and_nothing_else() {
    const ROUNDS: u64 = 60;
    let server = FaultServer::empty("team/kit");
    let kit = Kit::new(&server, [5 * MIB + 77, 3 * MIB, 2 * MIB + 500_000]);
    let kitfs = Kitfs::new();
    let secret = pattern(4242, 3 * MIB);
    fs::write(kitfs.path("elsewhere"), &secret).expect("writes");
    let mut seen: HashMap<&str, usize> = HashMap::new();
    for round in 0..ROUNDS {
        let mut random = Random::new(round + 1);
        let mount = kitfs.mount(&kit.served.reference, &[]);
        for (path, bytes) in &kit.files {
            let file = File::open(mount.path(path)).expect("opens");
            fadvise(&file, 0, None, Advice::Random).expect("fadvise");
            // Never all: what is complete gets another name. Never none: there is a file to damage.
            let chunks = bytes.len().div_ceil(MIB);
            let left_out = random.below(chunks);
            // Backwards, as nothing is fetched ahead of that.
            for chunk in (0..chunks).rev().filter(|chunk| *chunk != left_out) {
                let mut found = [0; 64];
                file.read_exact_at(&mut found, (chunk * MIB) as u64).expect("reads");
                assert_eq!(found, bytes[chunk * MIB..chunk * MIB + 64]);
            }
        }
        let daemon = mount.daemon();
        drop(mount);
        eventually("the daemon leaves", || !runs(daemon));

        let mut done = Vec::new();
        for (_, bytes) in &kit.files {
            let what = damage(&kitfs, &object_of(bytes), bytes.len(), &mut random);
            *seen.entry(what).or_default() += 1;
            done.push(what);
        }
        let when = format!("round {round}: {}", done.join(", "));
        let expected: usize = kit.files.iter().map(|(_, bytes)| missing(&kitfs, bytes)).sum();
        server.reset_counters();
        let mount = kitfs.mount(&kit.served.reference, &[]);
        kit.assert_whole(&mount, &when);
        assert_eq!(server.bytes_for(kit.layer()) as usize, expected, "{when}\n{}", kitfs.logs());
        eventually("the commit", || {
            kitfs.cached_files("objects").len() == kit.files.len() && kitfs.cached_files("partial").is_empty()
        });
        drop(mount);
        assert_objects_true(&kitfs);
        assert!(fs::read(kitfs.path("elsewhere")).expect("reads") == secret, "{when}: a link was followed");
        for file in kitfs.cached_files("objects").iter().chain(&kitfs.cached_files("partial")) {
            fs::remove_file(file).expect("removes");
        }
    }
    assert_eq!(seen.len(), 12, "each kind came about: {seen:?}");
}

#[test]
fn a_partial_file_that_is_left_beside_its_complete_object_is_not_looked_at() {
    let server = FaultServer::empty("team/kit");
    let kit = Kit::new(&server, [3 * MIB + 1, 5000]);
    let kitfs = Kitfs::new();
    kit.assert_whole(&kitfs.mount(&kit.served.reference, &[]), "cold");
    eventually("the commit", || kitfs.cached_files("objects").len() == 2);
    for (_, bytes) in &kit.files {
        let path = spread(&kitfs, "partial", &object_of(bytes));
        fs::create_dir_all(path.parent().expect("a parent")).expect("mkdir");
        fs::write(path, pattern(77, bytes.len())).expect("writes");
    }
    server.reset_counters();
    kit.assert_whole(&kitfs.mount(&kit.served.reference, &[]), "beside garbage");
    assert_eq!(server.requests_for(kit.layer()), 0);
    assert_eq!(assert_objects_true(&kitfs), 2);
}

/// A mount of this test's own; only root makes them.
struct Foreign(PathBuf);

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn a_cache_on_a_disk_that_is_too_small_serves_all_and_keeps_only_what_is_true() {
    let server = FaultServer::empty("team/kit");
    let kit = Kit::new(&server, [14 * MIB + 9, 7 * MIB].into_iter().chain((0..60).map(|_| 50_000)));
    let kitfs = Kitfs::new();
    fs::create_dir(kitfs.cache()).expect("mkdir");
    let size = std::ffi::CString::new("size=6m,mode=0700").expect("no NUL");
    rustix::mount::mount("tmpfs", kitfs.cache(), "tmpfs", MountFlags::empty(), Some(&*size)).expect("mounts a tmpfs");
    let _disk = Foreign(kitfs.cache());
    let mount = kitfs.mount(&kit.served.reference, &[]);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| kit.assert_whole(&mount, "full"));
        }
    });
    let (sent, all) = (server.bytes_for(kit.layer()) as usize, 21 * MIB + 60 * 51_200);
    assert!(sent <= 3 * all, "{sent} bytes of {all}: small reads of a chunk that can't be kept don't fetch it again");
    let file = File::open(mount.path("w/000")).expect("opens");
    fadvise(&file, 0, None, Advice::DontNeed).expect("fadvise");
    kit.assert_whole(&mount, "full, again");
    assert!(kitfs.logs().contains("the disk of the cache is full"), "{}", kitfs.logs());
    assert!(assert_objects_true(&kitfs) < kit.files.len());
    drop(mount);
    kit.assert_whole(&kitfs.mount(&kit.served.reference, &[]), "full from the start");
    assert_objects_true(&kitfs);
}

#[test]
fn a_cache_that_is_read_only_serves_what_it_has_and_the_rest_from_memory() {
    let server = FaultServer::empty("team/kit");
    let kit = Kit::new(&server, [5 * MIB + 9, 3 * MIB, 4000, 5000]);
    let kitfs = Kitfs::new();
    {
        let mount = kitfs.mount(&kit.served.reference, &[]);
        let mut part = vec![0; MIB];
        let file = File::open(mount.path("w/000")).expect("opens");
        fadvise(&file, 0, None, Advice::Random).expect("fadvise");
        // Backwards, so that nothing is read ahead.
        for chunk in [1, 0] {
            file.read_exact_at(&mut part, (chunk * MIB) as u64).expect("reads");
        }
        assert!(fs::read(mount.path("w/001")).expect("reads") == kit.files[1].1);
        eventually("the commit", || kitfs.cached_files("objects").len() == 1);
    }
    rustix::mount::mount_bind(kitfs.cache(), kitfs.cache()).expect("binds");
    let _disk = Foreign(kitfs.cache());
    let read_only = MountFlags::BIND | MountFlags::RDONLY;
    rustix::mount::mount_remount(kitfs.cache(), read_only, "").expect("remounts");
    fs::write(kitfs.cache().join("x"), "x").expect_err("it is read-only");
    server.reset_counters();
    let mount = kitfs.mount(&kit.served.reference, &[]);
    kit.assert_whole(&mount, "read-only");
    kit.assert_whole(&mount, "read-only, again");
    let sent = server.bytes_for(kit.layer()) as usize;
    assert!(
        sent <= 3 * MIB + 20_000,
        "{sent} bytes: what was in the partial file counts, and the rest stays in memory"
    );
    assert_eq!(assert_objects_true(&kitfs), 1);
}
