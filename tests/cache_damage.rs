//! Bytes of the cache that flip, in every kind of file, under a mount and between mounts: with `--recheck` none of them is
//! served, what is damaged is set aside, and it is fetched again.

mod support;

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use support::kit::{KitBuilder, Served, gzip, pattern, tar};
use support::program::{Kitfs, Mount};
use support::{FaultServer, eventually};

const CHUNK: usize = 1 << 20;

/// A big file and a small one.
fn files() -> Vec<(&'static str, Vec<u8>)> {
    vec![("w/big.bin", pattern(21, 5 * CHUNK + 77)), ("w/small.bin", pattern(22, 900))]
}

fn kit(server: &FaultServer, suffix: &str, indexed: bool) -> Served {
    let files = files();
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (*name, &bytes[..])).collect();
    let layer = tar(&files);
    let layer = if suffix == "tar" { layer } else { gzip(&layer) };
    let kit = KitBuilder::new().layer("model", "w", suffix, layer);
    let kit = if indexed { kit.indexed() } else { kit };
    kit.serve(server, "v1")
}

/// Flips a bit, whatever the file's mode.
fn flip(path: &Path, at: u64) {
    let mode = fs::metadata(path).expect("stat").permissions();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("chmod");
    let file = fs::OpenOptions::new().read(true).write(true).open(path).expect("opens");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("reads");
    file.write_all_at(&[byte[0] ^ 0x20], at).expect("writes");
    fs::set_permissions(path, mode).expect("chmod");
}

fn assert_right(mount: &Mount<'_>, why: &str) {
    for (name, bytes) in files() {
        let found = fs::read(mount.path(name)).unwrap_or_else(|error| panic!("{why}: {name}: {error}"));
        assert!(found == bytes, "{why}: {name} is wrong");
    }
}

/// All objects are there.
fn committed(kitfs: &Kitfs) {
    eventually("the commit", || kitfs.cached_files("objects").len() == 2 && kitfs.cached_files("incoming").is_empty());
}

fn set_aside(kitfs: &Kitfs, area: &str) -> Vec<PathBuf> {
    let all = kitfs.cached_files("quarantine");
    all.into_iter().filter(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(area))).collect()
}

#[test]
fn a_damaged_object_is_fetched_again_at_the_next_mount_that_rechecks() {
    for (suffix, indexed) in [("tar", false), ("tar", true), ("tar+gzip", false)] {
        let why = format!("{suffix}, indexed: {indexed}");
        let server = FaultServer::empty("team/kit");
        let kit = kit(&server, suffix, indexed);
        let kitfs = Kitfs::new();
        assert_right(&kitfs.mount(&kit.reference, &[]), &why);
        committed(&kitfs);
        server.reset_counters();
        assert_right(&kitfs.mount(&kit.reference, &["--recheck"]), &why);
        assert_eq!(server.bytes_for(kit.layers[0]), 0, "{why}: what is right is not fetched");
        for object in kitfs.cached_files("objects") {
            flip(&object, 500);
        }
        assert_right(&kitfs.mount(&kit.reference, &["--recheck"]), &why);
        assert!(server.bytes_for(kit.layers[0]) > 0, "{why}: it was fetched");
        assert_eq!(set_aside(&kitfs, "objects-").len(), 2, "{why}");
        committed(&kitfs);
        kitfs.assert_cache_is_true(b"");
        server.reset_counters();
        assert_right(&kitfs.mount(&kit.reference, &["--recheck"]), &why);
        assert_eq!(server.bytes_for(kit.layers[0]), 0, "{why}: it is mended");
    }
}

#[test]
fn an_object_that_is_damaged_under_a_mount_is_not_served_to_who_opens_it_then() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server, "tar", true);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--recheck"]);
    assert_right(&mount, "cold");
    committed(&kitfs);
    for round in 0..3 {
        assert_right(&mount, "warm");
        for object in kitfs.cached_files("objects") {
            flip(&object, 100 + round);
        }
        assert_right(&mount, "damaged");
        committed(&kitfs);
    }
    assert!(set_aside(&kitfs, "objects-").len() >= 6);
}

#[test]
fn a_damaged_chunk_of_a_partial_file_is_fetched_again_and_no_other() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server, "tar", true);
    let kitfs = Kitfs::new();
    let bytes = &files()[0].1;
    let read = |mount: &Mount<'_>, chunk: usize| {
        let mut buffer = vec![0; 4096];
        // Page by page and backwards, so that nothing is read ahead.
        mount.open_direct("w/big.bin").read_exact_at(&mut buffer, (chunk * CHUNK) as u64).expect("reads");
        assert!(buffer == bytes[chunk * CHUNK..chunk * CHUNK + 4096], "chunk {chunk}");
    };
    let partial = || {
        let found = kitfs.cached_files("partial").into_iter().find(|path| path.extension().is_none());
        found.expect("a partial file")
    };
    let chunks_fetched = || {
        server.reset_counters();
        let mount = kitfs.mount(&kit.reference, &[]);
        for chunk in [4, 2, 0] {
            read(&mount, chunk);
        }
        server.bytes_for(kit.layers[0]) / CHUNK as u64
    };
    assert_eq!(chunks_fetched(), 3);
    flip(&partial(), (2 * CHUNK + 9) as u64);
    assert_eq!(chunks_fetched(), 1, "the damaged one alone");
    assert_eq!(chunks_fetched(), 0);
    let mount = kitfs.mount(&kit.reference, &["--recheck"]);
    read(&mount, 4);
    flip(&partial(), (4 * CHUNK) as u64);
    read(&mount, 4);
}

#[test]
fn what_others_read_just_now_is_hashed_again_for_who_opens_it_then() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server, "tar", true);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--recheck"]);
    let bytes = &files()[0].1;
    let read = |file: &fs::File, chunk: usize| {
        let mut buffer = vec![0; 4096];
        file.read_exact_at(&mut buffer, (chunk * CHUNK) as u64).expect("reads");
        assert!(buffer == bytes[chunk * CHUNK..chunk * CHUNK + 4096], "chunk {chunk}");
    };
    let first = mount.open_direct("w/big.bin");
    read(&first, 4);
    let gate = server.hold(kit.layers[0], 0);
    std::thread::scope(|scope| {
        // Has the partial file in use.
        scope.spawn(|| read(&first, 0));
        gate.wait_until_reached_by(1);
        let partial = kitfs.cached_files("partial").into_iter().find(|path| path.extension().is_none());
        flip(&partial.expect("a partial file"), (4 * CHUNK) as u64);
        let second = scope.spawn(|| read(&mount.open_direct("w/big.bin"), 4));
        eventually("a second request or a wrong byte", || gate.reached() > 1 || second.is_finished());
        gate.release();
    });
}

#[test]
fn damaged_indexes_and_documents_are_made_again_without_a_recheck() {
    for indexed in [false, true] {
        let server = FaultServer::empty("team/kit");
        let kit = kit(&server, "tar", indexed);
        let kitfs = Kitfs::new();
        assert_right(&kitfs.mount(&kit.reference, &[]), "cold");
        committed(&kitfs);
        let damaged = [kitfs.cached_files("blobs"), kitfs.cached_files("indexes")].concat();
        for path in &damaged {
            flip(path, fs::metadata(path).expect("stat").len() / 2);
        }
        assert_right(&kitfs.mount(&kit.reference, &[]), "damaged");
        // The tag is asked for again, and its manifest is the only document that comes without a look at the cache.
        assert!(kitfs.cached_files("quarantine").len() >= damaged.len() - 1, "{damaged:?}");
        assert_right(&kitfs.mount(&kit.reference, &[]), "mended");
    }
}

#[test]
fn a_damaged_format_is_refused_with_its_remedy_and_left_as_it_is() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server, "tar", false);
    let kitfs = Kitfs::new();
    kitfs.ok(&["ls", &kit.reference]);
    let format = kitfs.cache().join("format");
    let right = fs::read(&format).expect("reads");
    for at in 0..right.len() as u64 {
        fs::write(&format, &right).expect("writes");
        flip(&format, at);
        let damaged = fs::read(&format).expect("reads");
        let error = kitfs.fails(&["ls", &kit.reference]);
        assert!(error.contains("kitfs cache verify --repair"), "{error}");
        assert_eq!(fs::read(&format).expect("reads"), damaged);
    }
    fs::write(&format, "kitfs-cache 2\n").expect("writes");
    let error = kitfs.fails(&["ls", &kit.reference]);
    assert!(error.contains("version 2") && error.contains("--cache-dir"), "{error}");
    assert_eq!(fs::read_to_string(&format).expect("reads"), "kitfs-cache 2\n");
}

#[test]
fn random_damage_all_over_the_cache_never_shows_in_a_mount_that_rechecks() {
    let mut state = 0x5eed_u64;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below.max(1)
    };
    for indexed in [false, true] {
        let server = FaultServer::empty("team/kit");
        let kit = kit(&server, "tar", indexed);
        let kitfs = Kitfs::new();
        for round in 0..6 {
            let mount = kitfs.mount(&kit.reference, &["--recheck"]);
            let mut page = [0; 512];
            mount.open_direct("w/big.bin").read_exact_at(&mut page, 3 * CHUNK as u64).expect("reads");
            if round % 2 == 1 {
                assert_right(&mount, "before");
            }
            let areas = ["objects", "partial", "indexes", "blobs", "tags", "kits", "served"];
            for path in areas.iter().flat_map(|area| kitfs.cached_files(area)) {
                let Ok(found) = fs::metadata(&path) else { continue };
                // What is only a name in the making may go under our hands.
                if found.len() > 0 && found.nlink() > 0 && path.extension().is_none_or(|name| name == "list") {
                    for _ in 0..1 + random(3) {
                        flip(&path, random(found.len()));
                    }
                }
            }
            assert_right(&mount, &format!("round {round}, under the mount"));
            drop(mount);
            assert_right(&kitfs.mount(&kit.reference, &["--recheck"]), &format!("round {round}, mounted anew"));
        }
    }
}
