//! How files are read through the kernel: passed through when they are complete, past its cache when they are large and
//! cold, else through it; and that the bytes are the same, and no open or read fails, whoever has what open.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;

use rustix::process::Signal;
use serde_json::Value;
use support::kit::{KitBuilder, Served, pattern, tar};
use support::life::runs;
use support::program::{Kitfs, Mount};
use support::reading;
use support::{FaultServer, eventually};

const MIB: usize = 1 << 20;
/// Files of this size are opened past the kernel's cache while they are cold.
const LARGE: usize = 64 * MIB;

/// A kit of files of these sizes, `0` and so on, with an index.
fn kit(server: &FaultServer, sizes: &[usize]) -> (Served, Vec<Vec<u8>>) {
    let files: Vec<_> = (1..).zip(sizes).map(|(seed, size)| pattern(seed, *size)).collect();
    let names: Vec<_> = (0..files.len()).map(|number| format!("w/{number}")).collect();
    let named: Vec<(&str, &[u8])> = names.iter().zip(&files).map(|(name, bytes)| (&**name, &**bytes)).collect();
    (KitBuilder::new().indexed().tar("model", "w", tar(&named)).serve(server, "v1"), files)
}

fn reads(kitfs: &Kitfs, mount: &Mount<'_>) -> Value {
    kitfs.status(mount)["reads"].clone()
}

/// How often files were opened in a way.
fn opened(kitfs: &Kitfs, mount: &Mount<'_>, way: &str) -> u64 {
    reads(kitfs, mount)["opened"][way].as_u64().expect("a number")
}

/// Whether complete files pass through: for root they must.
fn passes(kitfs: &Kitfs, mount: &Mount<'_>) -> bool {
    let reads = reads(kitfs, mount);
    let passes = reads["passthrough"].as_bool().expect("true or false");
    let is_root = rustix::process::geteuid().is_root();
    assert_eq!(passes, is_root, "it takes root and Linux 6.9: {reads}");
    passes
}

/// What a file is open as, told by what happens to the counts.
fn way_of<T>(kitfs: &Kitfs, mount: &Mount<'_>, open: impl FnOnce() -> T) -> (&'static str, T) {
    const WAYS: [&str; 3] = ["passthrough", "cached", "direct"];
    let before = WAYS.map(|way| opened(kitfs, mount, way));
    let result = open();
    let changed = WAYS.iter().zip(before).find(|(way, count)| opened(kitfs, mount, way) > *count);
    (changed.expect("one open more").0, result)
}

fn complete(passes: bool) -> &'static str {
    if passes { "passthrough" } else { "cached" }
}

/// Waits until the cache has so many objects, and nobody fills a file.
fn committed(kitfs: &Kitfs, count: usize) {
    eventually("the commit", || {
        kitfs.cached_files("objects").len() == count && kitfs.cached_files("partial").is_empty()
    });
}

#[test]
fn a_file_that_is_complete_passes_through_and_every_way_to_read_gives_the_same_bytes() {
    let server = FaultServer::empty("team/kit");
    let (kit, files) = kit(&server, &[3 * MIB + 5, 0, 1]);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let passes = passes(&kitfs, &mount);
    let path = mount.path("w/0");
    let (way, found) = way_of(&kitfs, &mount, || fs::read(&path).expect("reads"));
    assert!(way == "cached" && found == files[0], "cold, it is {way}");
    // At once, whether it has its name by now or not.
    let (way, found) = way_of(&kitfs, &mount, || fs::read(&path).expect("reads"));
    assert!(way == complete(passes) && found == files[0], "complete, it is {way}");
    committed(&kitfs, 1);
    let read: [(&str, &dyn Fn() -> Vec<u8>); 3] = [
        ("mmap", &|| reading::mapped(&path)),
        ("O_DIRECT", &|| reading::directly(&path)),
        ("sendfile", &|| reading::sent(&path, &kitfs.path("sent"))),
    ];
    for (name, read) in read {
        let (way, found) = way_of(&kitfs, &mount, read);
        assert!(way == complete(passes) && found == files[0], "{name}: {way}");
    }
    assert_eq!(fs::read(mount.path("w/1")).expect("reads"), b"");
    assert_eq!(fs::read(mount.path("w/2")).expect("reads"), files[2]);
    drop(mount);

    let mount = kitfs.mount(&kit.reference, &[]);
    let (way, found) = way_of(&kitfs, &mount, || fs::read(mount.path("w/0")).expect("reads"));
    assert!(way == complete(passes) && found == files[0], "in the next mount it is {way}");
}

#[test]
fn the_content_of_a_layer_that_was_fetched_whole_passes_through() {
    let server = FaultServer::empty("team/kit");
    let bytes = pattern(1, 2 * MIB + 3);
    let kit = KitBuilder::new().tar("model", "w", tar(&[("w/a", &bytes), ("w/b", b"bee")])).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    assert!(fs::read(mount.path("w/a")).expect("reads") == bytes);
    let (way, found) = way_of(&kitfs, &mount, || fs::read(mount.path("w/b")).expect("reads"));
    assert_eq!((way, &found[..]), (complete(passes(&kitfs, &mount)), &b"bee"[..]));
}

#[test]
fn nothing_passes_through_where_the_user_does_not_want_it_or_each_open_hashes() {
    let server = FaultServer::empty("team/kit");
    let (kit, files) = kit(&server, &[MIB + 1]);
    let kitfs = Kitfs::new();
    kitfs.ok(&["pull", &kit.reference]);
    for (option, why) in [(&["--passthrough", "never"][..], "--passthrough never"), (&["--recheck"], "--recheck")] {
        let mount = kitfs.mount(&kit.reference, option);
        let (way, found) = way_of(&kitfs, &mount, || fs::read(mount.path("w/0")).expect("reads"));
        assert!(way == "cached" && found == files[0], "{way}");
        let reads = reads(&kitfs, &mount);
        assert_eq!(reads["passthrough"], false);
        assert!(reads["why"].as_str().expect("a reason").contains(why), "{reads}");
        let said = kitfs.ok(&["status", mount.dir.to_str().expect("UTF-8")]);
        let line = said.lines().find(|line| line.trim_start().starts_with("reads ")).expect("a line of status");
        assert!(line.contains("cached, because") && line.contains(why), "{line}");
    }
}

/// A handle, or what holds one.
enum Held {
    File(File),
    Map(memmap2::Mmap),
}

impl Held {
    fn assert_is(&self, bytes: &[u8]) {
        match self {
            Self::File(file) => {
                let mut found = vec![0; bytes.len()];
                file.read_exact_at(&mut found, 0).expect("reads");
                assert!(found == bytes, "wrong bytes");
            }
            Self::Map(map) => assert!(map[..] == *bytes, "wrong bytes"),
        }
    }
}

fn hold(path: &Path, is_mapped: bool) -> Held {
    let file = File::open(path).expect("opens");
    if is_mapped { Held::Map(reading::map(&file).expect("maps")) } else { Held::File(file) }
}

#[test]
fn whoever_has_a_file_open_while_it_becomes_complete_goes_on_and_so_do_those_who_come_then() {
    let server = FaultServer::empty("team/kit");
    for is_mapped in [false, true] {
        // Cold, the first is cached, the second past the kernel's cache.
        let (kit, files) = kit(&server, &[2 * MIB, LARGE]);
        let kitfs = Kitfs::new();
        let mount = kitfs.mount(&kit.reference, &[]);
        let passes = passes(&kitfs, &mount);
        for (number, (bytes, cold)) in files.iter().zip(["cached", "direct"]).enumerate() {
            let path = mount.path(&format!("w/{number}"));
            let (way, early) = way_of(&kitfs, &mount, || hold(&path, is_mapped));
            assert_eq!(way, cold);
            early.assert_is(bytes);
            committed(&kitfs, number + 1);
            let (way, late) = way_of(&kitfs, &mount, || hold(&path, is_mapped));
            assert_eq!(way, "cached", "the mode is that of who holds it");
            late.assert_is(bytes);
            early.assert_is(bytes);
            drop(early);
            let (way, later) = way_of(&kitfs, &mount, || hold(&path, is_mapped));
            assert_eq!(way, "cached");
            drop((late, later));
            // The kernel tells of the last close a moment after it.
            let mut last = None;
            eventually("it passes through once nobody holds it", || {
                let (way, held) = way_of(&kitfs, &mount, || hold(&path, is_mapped));
                held.assert_is(bytes);
                last = Some(held);
                way == complete(passes)
            });
            let (way, second) = way_of(&kitfs, &mount, || hold(&path, !is_mapped));
            assert_eq!(way, complete(passes));
            second.assert_is(bytes);
            drop(last);
            second.assert_is(bytes);
        }
    }
}

#[test]
fn what_passes_through_is_not_evicted_before_it_is_closed() {
    let server = FaultServer::empty("team/kit");
    let (kit, files) = kit(&server, &[3 * MIB, 3 * MIB]);
    let kitfs = Kitfs::new();
    kitfs.ok(&["pull", &kit.reference]);
    let mount = kitfs.mount(&kit.reference, &[]);
    let (way, held) = way_of(&kitfs, &mount, || File::open(mount.path("w/0")).expect("opens"));
    assert_eq!(way, complete(passes(&kitfs, &mount)));
    if way == "cached" {
        // Then it is in use from the first read on.
        held.read_exact_at(&mut [0; 1], 0).expect("reads");
    }
    kitfs.ok(&["cache", "gc", "--cache-size", "1MiB"]);
    assert_eq!(kitfs.cached_files("objects").len(), 1, "only the one that nobody reads has gone");
    let map = reading::map(&held).expect("maps");
    assert!(map[..] == files[0]);
    drop(held);
    let gone = || {
        eventually("it goes too", || {
            kitfs.ok(&["cache", "gc", "--cache-size", "1MiB"]);
            kitfs.cached_files("objects").is_empty()
        });
    };
    if way == "cached" {
        drop(map);
    } else {
        // What is mapped from the cache's own file outlives its name.
        gone();
        assert!(map[..] == files[0]);
    }
    gone();
    let (way, found) = way_of(&kitfs, &mount, || fs::read(mount.path("w/0")).expect("reads"));
    assert!(way == "cached" && found == files[0], "{way}");
}

#[test]
fn what_passes_through_is_read_on_when_the_daemon_was_killed() {
    let server = FaultServer::empty("team/kit");
    let (kit, files) = kit(&server, &[3 * MIB, 3 * MIB]);
    let kitfs = Kitfs::new();
    kitfs.ok(&["pull", &kit.reference]);
    let mount = kitfs.mount(&kit.reference, &[]);
    let passes = passes(&kitfs, &mount);
    let (file, map) = (hold(&mount.path("w/0"), false), hold(&mount.path("w/1"), true));
    let daemon = mount.daemon();
    rustix::process::kill_process(daemon, Signal::KILL).expect("kill");
    eventually("it ends", || !runs(daemon));
    if passes {
        file.assert_is(&files[0]);
        map.assert_is(&files[1]);
    }
    assert!(File::open(mount.path("w/0")).is_err(), "nobody answers");
}

#[test]
fn a_lower_cache_that_others_may_write_to_does_not_pass_through() {
    let server = FaultServer::empty("team/kit");
    let (kit, files) = kit(&server, &[2 * MIB]);
    let below = Kitfs::new();
    below.ok(&["pull", &kit.reference]);
    for (mode, is_lasting) in [(0o700, true), (0o777, false)] {
        fs::set_permissions(below.cache(), fs::Permissions::from_mode(mode)).expect("chmod");
        let kitfs = Kitfs::new().with("KITFS_CACHE_LOWER", below.cache());
        let mount = kitfs.mount(&kit.reference, &[]);
        let (way, found) = way_of(&kitfs, &mount, || fs::read(mount.path("w/0")).expect("reads"));
        assert!(way == complete(is_lasting && passes(&kitfs, &mount)) && found == files[0], "{way}");
        assert_eq!(kitfs.cached_files("objects").len(), 0, "it is read where it lies");
    }
}

#[test]
fn a_large_cold_file_is_read_past_the_kernels_cache_by_the_first_who_opens_it() {
    let server = FaultServer::empty("team/kit");
    let (kit, files) = kit(&server, &[LARGE, LARGE - 1, LARGE, LARGE]);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let expected = ["direct", "cached", "direct"];
    for (number, expected) in expected.into_iter().enumerate() {
        let path = mount.path(&format!("w/{number}"));
        let (way, first) = way_of(&kitfs, &mount, || File::open(&path).expect("opens"));
        assert_eq!(way, expected, "{number}");
        let (way, second) = way_of(&kitfs, &mount, || File::open(&path).expect("opens"));
        assert_eq!(way, "cached", "who comes second may read the same");
        let mut found = vec![0; 8 * MIB];
        first.read_exact_at(&mut found, 12_345).expect("reads");
        assert!(found[..] == files[number][12_345..12_345 + 8 * MIB]);
        second.read_exact_at(&mut found, 12_346).expect("reads");
        assert!(found[..] == files[number][12_346..12_346 + 8 * MIB]);
        let map = reading::map(&first).expect("a handle past the cache can be mapped");
        assert!(map[LARGE - MIB..LARGE - 1] == files[number][LARGE - MIB..LARGE - 1]);
    }
    drop(mount);
    let mount = kitfs.mount(&kit.reference, &["--direct-io", "never"]);
    let (way, _file) = way_of(&kitfs, &mount, || File::open(mount.path("w/3")).expect("opens"));
    assert_eq!(way, "cached");
    assert!(reads(&kitfs, &mount)["direct_io_why"].as_str().expect("a reason").contains("--direct-io never"));
}

#[test]
fn after_a_file_was_read_by_little_at_a_time_the_next_are_cached() {
    let server = FaultServer::empty("team/kit");
    let (kit, files) = kit(&server, &[LARGE, LARGE]);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let (way, file) = way_of(&kitfs, &mount, || File::open(mount.path("w/0")).expect("opens"));
    assert_eq!(way, "direct");
    let mut found = [0; 16 << 10];
    for offset in (0..4 * MIB).step_by(found.len()) {
        file.read_exact_at(&mut found, offset as u64).expect("reads");
        assert!(found[..] == files[0][offset..offset + found.len()]);
    }
    drop(file);
    for number in 0..2 {
        let path = mount.path(&format!("w/{number}"));
        let (way, _file) = way_of(&kitfs, &mount, || File::open(path).expect("opens"));
        assert_eq!(way, "cached");
    }
    let reads = reads(&kitfs, &mount);
    assert_eq!(
        (&reads["direct_io"], &reads["direct_io_why"]),
        (&false.into(), &"files are read by little at a time".into())
    );
}

#[test]
fn the_kernel_reads_ahead_as_far_as_it_sends_at_once_or_status_says_why_not() {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server, &[1]);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let ahead = &reads(&kitfs, &mount)["read_ahead"];
    match ahead["why"].as_str() {
        None => assert_eq!(ahead["bytes"].as_u64(), Some(MIB as u64)),
        // As root it takes a sysfs that can be written to.
        Some(why) => assert!(why.contains("read_ahead_kb"), "{why}"),
    }
}
