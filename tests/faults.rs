//! Servers that lie, break off, refuse and stall: the error number of the design within the deadline, a remedy where
//! there is one, and nothing false in the cache.

mod support;

use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use support::kit::{KitBuilder, Served, pattern, tar};
use support::program::Kitfs;
use support::{Auth, Fault, FaultServer};

const SIZE: usize = 12 << 20;

fn kit(server: &FaultServer) -> (Served, Vec<u8>) {
    let bytes = pattern(5, SIZE);
    let files: [(&str, &[u8]); 2] = [("w/a.bin", &bytes), ("w/z.bin", b"the last file")];
    (KitBuilder::new().tar("model", "w", tar(&files)).serve(server, "v1"), bytes)
}

fn read_error(path: &Path) -> Errno {
    let error = std::fs::read(path).expect_err("the read fails");
    Errno::from_raw_os_error(error.raw_os_error().expect("an error number"))
}

/// Reads a file of a layer with a fault; the error number, and how long it took.
fn outcome(fault: Fault, options: &[&str]) -> (Errno, Duration, String) {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, options);
    assert_eq!(std::fs::metadata(mount.path("w/a.bin")).expect("lists").len(), SIZE as u64);
    server.fault(kit.layers[0], fault);
    let started = Instant::now();
    let errno = read_error(&mount.path("w/a.bin"));
    let elapsed = started.elapsed();
    assert!(kitfs.cached_files("objects").is_empty(), "nothing of it is kept");
    assert!(kitfs.cached_files("indexes").is_empty(), "nothing of it is kept");
    (errno, elapsed, kitfs.logs())
}

#[test]
fn what_is_gone_for_good_is_told_once_and_not_for_each_that_asks() {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    assert_eq!(std::fs::metadata(mount.path("w/a.bin")).expect("lists").len(), SIZE as u64);
    server.fault(kit.layers[0], Fault::status(404));
    for _ in 0..10 {
        assert_eq!(read_error(&mount.path("w/a.bin")), Errno::IO);
        assert_eq!(read_error(&mount.path("w/z.bin")), Errno::IO);
    }
    let logs = kitfs.logs();
    let told = logs.lines().filter(|line| line.contains("ERROR")).count();
    // Once, or twice where the minute has passed meanwhile.
    assert!((1..=2).contains(&told), "{logs}");
    assert!(logs.contains("w/a.bin") && logs.contains(&kit.layers[0].to_string()), "{logs}");
}

#[test]
fn one_flipped_bit_is_eio_with_expected_and_found_digest_in_the_log() {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    server.fault(kit.layers[0], Fault::FlipBit { offset: 5_000_000 });
    assert_eq!(read_error(&mount.path("w/a.bin")), Errno::IO);
    assert_eq!(read_error(&mount.path("w/z.bin")), Errno::IO, "the whole layer is refused");
    let logs = kitfs.logs();
    let line = logs.lines().find(|line| line.contains(&kit.layers[0].to_string()) && line.contains("found"));
    assert!(line.is_some_and(|line| line.matches("sha256:").count() >= 2), "{logs}");
    assert!(kitfs.cached_files("objects").is_empty());
    assert!(kitfs.cached_files("indexes").is_empty());
    support::eventually("staging is cleared", || kitfs.cached_files("incoming").is_empty());

    server.heal(kit.layers[0]);
    assert_eq!(read_error(&mount.path("w/a.bin")), Errno::IO, "a source that lied once is not believed again");
    drop(mount);
    let mount = kitfs.mount(&kit.reference, &[]);
    assert_eq!(std::fs::read(mount.path("w/z.bin")).expect("reads"), b"the last file");
}

#[test]
fn streamed_bytes_end_in_eio_where_the_layer_turns_out_false_and_none_are_kept() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--verify", "stream"]);
    server.fault(kit.layers[0], Fault::FlipBit { offset: 11 << 20 });
    let gate = server.hold(kit.layers[0], 4 << 20);
    let file = std::fs::File::open(mount.path("w/a.bin")).expect("opens");
    let mut early = vec![0; 1 << 20];
    file.read_exact_at(&mut early, 0).expect("bytes come before the layer is whole");
    assert!(early == bytes[..1 << 20]);
    gate.release();
    support::eventually("the layer is found false", || kitfs.logs().contains("does not have its digest"));
    let failed = file.read_at(&mut early, 0).expect_err("from then on it is refused");
    assert_eq!(failed.raw_os_error(), Some(Errno::IO.raw_os_error()));
    assert_eq!(read_error(&mount.path("w/z.bin")), Errno::IO);
    assert!(kitfs.cached_files("objects").is_empty());
    assert!(kitfs.cached_files("indexes").is_empty());
}

#[test]
fn streaming_serves_a_file_before_its_layer_is_whole() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--verify", "stream"]);
    let mut read = Vec::new();
    std::fs::File::open(mount.path("w/a.bin")).expect("opens").read_to_end(&mut read).expect("reads");
    assert!(read == bytes);
    support::eventually("the layer is kept", || kitfs.cached_files("objects").len() == 2);
}

#[test]
fn a_body_that_always_breaks_off_is_etimedout() {
    let (errno, elapsed, _) = outcome(Fault::Truncate { after: 1000 }, &["--read-timeout", "3s"]);
    assert_eq!(errno, Errno::TIMEDOUT);
    assert!(elapsed < Duration::from_secs(10), "{elapsed:?}");
}

#[test]
fn a_server_that_sends_one_byte_a_second_holds_nobody() {
    let fault = Fault::Drip { every: Duration::from_secs(1) };
    let (errno, elapsed, _) = outcome(fault, &["--read-timeout", "3s"]);
    assert_eq!(errno, Errno::TIMEDOUT);
    assert!(elapsed < Duration::from_secs(20), "{elapsed:?}");
}

#[test]
fn a_server_that_says_nothing_holds_nobody() {
    let (errno, elapsed, _) = outcome(Fault::Silence, &["--read-timeout", "3s"]);
    assert_eq!(errno, Errno::TIMEDOUT);
    assert!(elapsed < Duration::from_secs(20), "{elapsed:?}");
}

#[test]
fn a_wrong_content_range_is_eio() {
    let fault = Fault::ContentRange("bytes 0-99/100".to_owned());
    assert_eq!(outcome(fault, &[]).0, Errno::IO);
}

#[test]
fn a_blob_that_is_gone_is_eio_and_named() {
    let (errno, _, logs) = outcome(Fault::status(404), &[]);
    assert_eq!(errno, Errno::IO);
    assert!(logs.contains("sha256:"), "{logs}");
}

#[test]
fn refused_credentials_are_eacces_and_the_log_says_what_to_run() {
    let (errno, _, logs) = outcome(Fault::status(401), &[]);
    assert_eq!(errno, Errno::ACCESS);
    assert!(logs.contains("login"), "{logs}");
}

#[test]
fn a_server_that_ignores_ranges_is_read_in_one_go() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server);
    server.fault(kit.layers[0], Fault::IgnoreRange);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    assert!(std::fs::read(mount.path("w/a.bin")).expect("reads") == bytes);
}

#[test]
fn a_hiccup_is_retried_and_nobody_notices() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    server.fault_times(2, kit.layers[0], Fault::status(503));
    server.fault_times(2, kit.layers[0], Fault::Reset { after: 300_000 });
    assert!(std::fs::read(mount.path("w/a.bin")).expect("reads") == bytes);
}

#[test]
fn a_mount_without_credentials_says_what_to_run() {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server);
    server.set_auth(Auth::Basic { user: "u".to_owned(), password: "p".to_owned() });
    let kitfs = Kitfs::new();
    let dir = kitfs.path("refused");
    let said = kitfs.fails(&["mount", &kit.reference, dir.to_str().expect("UTF-8")]);
    assert!(said.contains(&format!("kit login {}", server.host())), "{said}");
    assert!(!dir.exists());
}

#[test]
fn a_manifest_that_does_not_hash_right_is_not_mounted() {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server);
    server.fault(kit.digest, Fault::Replace(b"{\"schemaVersion\":2}".to_vec()));
    let kitfs = Kitfs::new();
    // By its digest alone: with a tag it would come with the answer for that.
    let (repository, _) = kit.reference.rsplit_once(':').expect("a tag");
    let pinned = format!("{repository}@{}", kit.digest);
    let dir = kitfs.path("refused");
    let said = kitfs.fails(&["mount", &pinned, dir.to_str().expect("UTF-8")]);
    assert!(said.contains(&kit.digest.to_string()), "{said}");
}

#[test]
fn a_tag_that_leads_elsewhere_than_the_digest_beside_it_mounts_nothing() {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server);
    let other = KitBuilder::new().tar("docs", "README.md", tar(&[("README.md", b"x")])).serve(&server, "v2");
    let kitfs = Kitfs::new();
    let dir = kitfs.path("refused");
    let mixed = format!("{}@{}", kit.reference, other.digest);
    let said = kitfs.fails(&["mount", &mixed, dir.to_str().expect("UTF-8")]);
    assert!(said.contains(&kit.digest.to_string()) && said.contains(&other.digest.to_string()), "{said}");
    assert!(!dir.exists());
}
