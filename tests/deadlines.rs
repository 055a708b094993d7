//! Names wait for their layer, but not for ever: whoever asks gets an answer or ETIMEDOUT within `--meta-timeout`, the rest
//! of the tree goes on, and what was learned behind a deadline is kept. With `--verify=listing` names wait for the digest.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use support::kit::{KitBuilder, Served, gzip, pattern, tar};
use support::program::{Kitfs, find_key};
use support::{Fault, FaultServer, eventually};

const DEADLINE: &str = "2s";
/// The deadline, and what a machine under load may take for the rest.
const IN_TIME: Duration = Duration::from_secs(6);

/// A kit of a directory layer, small or of a size that is listed by hops, and a document that has nothing to do with it.
fn kit(server: &FaultServer, suffix: &str, size: usize) -> (Served, Vec<u8>) {
    let bytes = pattern(11, size);
    let layer = tar(&[("w/a.bin", &bytes), ("w/z/b.bin", b"the last file")]);
    let layer = if suffix == "tar+gzip" { gzip(&layer) } else { layer };
    let kit =
        KitBuilder::new().layer("model", "w", suffix, layer).tar("docs", "docs", tar(&[("docs/good.md", b"good")]));
    (kit.serve(server, "v1"), bytes)
}

fn names(dir: &Path) -> io::Result<BTreeSet<String>> {
    let entries = fs::read_dir(dir)?;
    entries.map(|entry| Ok(entry?.file_name().into_string().expect("UTF-8"))).collect()
}

/// The error number, and that it came in time but not before the deadline.
fn timed_out<T>(ask: impl FnOnce() -> io::Result<T>) {
    let started = Instant::now();
    let error = ask().err().expect("it can't be told");
    let elapsed = started.elapsed();
    assert_eq!(Errno::from_io_error(&error), Some(Errno::TIMEDOUT));
    assert!((Duration::from_secs(1)..IN_TIME).contains(&elapsed), "{elapsed:?}");
}

/// A directory layer goes silent once the mount is there.
fn silence(suffix: &str, size: usize) {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server, suffix, size);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--meta-timeout", DEADLINE]);
    server.fault(kit.layers[0], Fault::Silence);
    let (w, deep, good) = (mount.path("w"), mount.path("w/z/b.bin"), mount.path("docs/good.md"));

    std::thread::scope(|scope| {
        let waiting = [
            scope.spawn(|| timed_out(|| names(&w))),
            scope.spawn(|| timed_out(|| fs::symlink_metadata(&deep))),
            scope.spawn(|| timed_out(|| fs::symlink_metadata(w.join("not-there")))),
        ];
        eventually("somebody waits", || server.requests_for(kit.layers[0]) > 1);
        assert_eq!(fs::read(&good).expect("the rest is served"), b"good");
        assert_eq!(names(&mount.dir).expect("the root is served"), ["Kitfile", "docs", "w"].map(str::to_owned).into());
        assert!(fs::symlink_metadata(&w).expect("the directory itself is known").is_dir());
        assert!(waiting.iter().any(|waiter| !waiter.is_finished()), "all this while they wait");
        for waiter in waiting {
            waiter.join().expect("it ended as it should");
        }
    });
    assert!(kitfs.logs().contains("--meta-timeout"), "{}", kitfs.logs());

    server.heal(kit.layers[0]);
    eventually("the same is answered", || {
        names(&w).is_ok_and(|names| names == ["a.bin", "z"].map(str::to_owned).into())
    });
    assert_eq!(fs::read(&deep).expect("reads"), b"the last file");
    assert!(fs::read(w.join("a.bin")).expect("reads") == bytes);
    let missing = fs::symlink_metadata(w.join("not-there")).expect_err("now it is known");
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);
}

#[test]
fn a_layer_that_is_listed_by_hops_and_goes_silent_is_etimedout_and_then_works_again() {
    silence("tar", 5 << 20);
}

#[test]
fn a_small_layer_that_goes_silent_is_etimedout_and_then_works_again() {
    silence("tar", 300 << 10);
}

#[test]
fn a_compressed_layer_that_goes_silent_is_etimedout_and_then_works_again() {
    silence("tar+gzip", 2 << 20);
}

#[test]
fn readers_of_a_page_that_does_not_come_do_not_wait_one_after_the_other() {
    const READERS: usize = 8;
    for is_indexed in [true, false] {
        let server = FaultServer::empty("team/kit");
        let (bytes, late) = (pattern(11, 3 << 20), pattern(12, 3 << 20));
        let files: [(&str, &[u8]); 2] = [("w/early.bin", &bytes), ("w/late.bin", &late)];
        let kit = KitBuilder::new().tar("model", "w", tar(&files));
        let kit = if is_indexed { kit.indexed() } else { kit }.serve(&server, "v1");
        let kitfs = Kitfs::new();
        let mount = kitfs.mount(&kit.reference, &["--read-timeout", "1s"]);
        let (here, missing) = (mount.path("w/early.bin"), mount.path("w/late.bin"));
        if is_indexed {
            assert!(fs::read(&here).expect("reads") == bytes);
        }
        fs::metadata(&missing).expect("lists");
        server.reset_counters();
        server.fault(kit.layers[0], Fault::Silence);
        std::thread::scope(|scope| {
            for _ in 0..READERS {
                scope.spawn(|| {
                    let error = fs::read(&missing).expect_err("nothing comes");
                    assert_eq!(Errno::from_io_error(&error), Some(Errno::TIMEDOUT));
                    if is_indexed {
                        assert!(fs::read(&here).expect("what is here is read") == bytes);
                    }
                });
            }
        });
        // Each deadline is a request. Two or three of the kernel's for each reader would be more than twice as many.
        let asked = server.requests_for(kit.layers[0]);
        assert!(asked < READERS, "indexed: {is_indexed}: {asked} requests");
        server.heal(kit.layers[0]);
        eventually("it is read", || fs::read(&missing).is_ok_and(|read| read == late));
    }
}

#[test]
fn a_mount_waits_for_a_silent_layer_no_longer_than_the_deadline_and_warns() {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server, "tar", 5 << 20);
    server.fault(kit.layers[0], Fault::Silence);
    let kitfs = Kitfs::new();
    let started = Instant::now();
    let mount = kitfs.mount(&kit.reference, &["--meta-timeout", DEADLINE]);
    assert!(started.elapsed() < IN_TIME, "{:?}", started.elapsed());
    let layer = kit.layers[0].to_string();
    assert!(mount.said.contains("warning") && mount.said.contains(&layer), "{}", mount.said);
    let status = kitfs.ok(&["status", "--json"]);
    let status = serde_json::from_str(&status).expect("JSON");
    let warnings = find_key(&status, "warnings").expect("a list").to_string();
    assert!(warnings.contains(&layer), "{warnings}");

    assert_eq!(fs::read(mount.path("docs/good.md")).expect("the rest is served"), b"good");
    timed_out(|| fs::symlink_metadata(mount.path("w/a.bin")));
    server.heal(kit.layers[0]);
    eventually("it is there after all", || {
        fs::read(mount.path("w/z/b.bin")).is_ok_and(|read| read == b"the last file")
    });
    assert_eq!(names(&mount.dir).expect("lists"), ["Kitfile", "docs", "w"].map(str::to_owned).into());
}

#[test]
fn a_body_that_stops_in_the_middle_is_no_different_from_silence() {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server, "tar", 300 << 10);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--meta-timeout", DEADLINE]);
    server.fault(kit.layers[0], Fault::Hang { after: 100_000 });
    timed_out(|| names(&mount.path("w")));
    assert_eq!(fs::read(mount.path("docs/good.md")).expect("the rest is served"), b"good");
}

#[test]
fn a_listing_that_takes_longer_than_the_deadline_goes_on_behind_it_and_is_kept() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server, "tar+gzip", 2 << 20);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--meta-timeout", DEADLINE]);
    let gate = server.hold(kit.layers[0], 500_000);
    timed_out(|| names(&mount.path("w")));
    gate.release();
    eventually("it comes to its end, though nobody waits", || kitfs.cached_files("indexes").len() == 1);
    server.reset_counters();
    assert_eq!(names(&mount.path("w")).expect("lists"), ["a.bin", "z"].map(str::to_owned).into());
    assert!(fs::read(mount.path("w/a.bin")).expect("reads") == bytes);
    assert_eq!(server.requests_for(kit.layers[0]), 0);
}

#[test]
fn with_verify_listing_names_appear_when_the_whole_layer_is_verified() {
    for suffix in ["tar", "tar+gzip"] {
        let server = FaultServer::empty("team/kit");
        let (kit, bytes) = kit(&server, suffix, 3 << 20);
        let kitfs = Kitfs::new();
        let mount = kitfs.mount(&kit.reference, &["--verify", "listing"]);
        assert_eq!(server.bytes_for(kit.layers[0]), 0, "nothing of it is read before somebody asks");
        let gate = server.hold(kit.layers[0], 2 << 20);
        let (w, file) = (mount.path("w"), mount.path("w/a.bin"));
        std::thread::scope(|scope| {
            let listing = scope.spawn(|| names(&w));
            let stat = scope.spawn(|| fs::symlink_metadata(&file).map(|metadata| metadata.len()));
            gate.wait_until_reached_by(1);
            std::thread::sleep(Duration::from_millis(300));
            assert!(!listing.is_finished() && !stat.is_finished(), "two thirds of the layer tell nothing");
            assert_eq!(fs::read(mount.path("docs/good.md")).expect("the rest is served"), b"good");
            gate.release();
            let listed = listing.join().expect("ends").expect("lists");
            assert_eq!(listed, ["a.bin", "z"].map(str::to_owned).into());
            assert_eq!(stat.join().expect("ends").expect("stats"), bytes.len() as u64);
        });
        assert!(server.bytes_for(kit.layers[0]) >= 3 << 20, "{}", server.bytes_for(kit.layers[0]));
        server.reset_counters();
        assert!(fs::read(&file).expect("reads") == bytes);
        assert_eq!(server.bytes_for(kit.layers[0]), 0, "what was verified is not fetched again");
    }
}

#[test]
fn with_verify_listing_a_flipped_bit_hides_every_name() {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server, "tar", 3 << 20);
    server.fault(kit.layers[0], Fault::FlipBit { offset: 2 << 20 });
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--verify", "listing"]);
    let errno = |error: io::Error| Errno::from_io_error(&error);
    assert_eq!(errno(names(&mount.path("w")).expect_err("false")), Some(Errno::IO));
    assert_eq!(errno(fs::symlink_metadata(mount.path("w/a.bin")).expect_err("false")), Some(Errno::IO));
    assert_eq!(
        errno(fs::symlink_metadata(mount.path("w/not-there")).expect_err("false")),
        Some(Errno::IO),
        "not ENOENT"
    );
    assert_eq!(fs::read(mount.path("docs/good.md")).expect("the rest is served"), b"good");
    let logs = kitfs.logs();
    assert!(logs.lines().any(|line| line.contains(&kit.layers[0].to_string()) && line.contains("found")), "{logs}");
    eventually("only the document is kept", || kitfs.cached_files("objects").len() == 1);
}
