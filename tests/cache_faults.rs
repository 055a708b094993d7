//! A cache or a log that is damaged, full or read-only: content is fetched again, and nothing else is lost.

mod support;

use std::fs;
use std::process::Stdio;

use support::FaultServer;
use support::kit::{KitBuilder, Served, pattern, tar};
use support::program::Kitfs;

const SIZE: usize = 3 << 20;

fn kit(server: &FaultServer) -> (Served, Vec<u8>) {
    let bytes = pattern(8, SIZE);
    let files: [(&str, &[u8]); 2] = [("w/a.bin", &bytes), ("w/z.bin", b"the last file")];
    (KitBuilder::new().tar("model", "w", tar(&files)).serve(server, "v1"), bytes)
}

#[test]
fn a_fill_whose_layer_only_the_registry_has_is_one_attempt_without_warnings() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--log-level", "debug"]);
    assert_eq!(fs::read(mount.path("w/a.bin")).expect("reads"), bytes);
    let logs = kitfs.logs();
    assert_eq!(logs.matches("fetching the layer whole").count(), 1, "{logs}");
    assert!(!logs.contains("WARN"), "{logs}");
}

#[test]
fn a_broken_connection_says_nothing_about_the_archive() {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--read-timeout", "1s"]);
    fs::metadata(mount.path("w/a.bin")).expect("lists");
    server.fault(kit.layers[0], support::Fault::status(503));
    fs::read(mount.path("w/a.bin")).expect_err("the read fails");
    let logs = kitfs.logs();
    assert!(logs.contains("503") && !logs.contains("zero blocks"), "{logs}");
}

#[test]
fn an_object_of_the_wrong_size_is_fetched_again() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server);
    let kitfs = Kitfs::new();
    let read = |why: &str| {
        let mount = kitfs.mount(&kit.reference, &[]);
        assert_eq!(fs::read(mount.path("w/a.bin")).expect("reads"), bytes, "{why}");
        assert_eq!(fs::read(mount.path("w/z.bin")).expect("reads"), b"the last file", "{why}");
    };
    read("cold");
    support::eventually("the commit", || kitfs.cached_files("indexes").len() == 1);
    for object in kitfs.cached_files("objects") {
        let damaged = fs::OpenOptions::new().write(true).open(object).expect("opens");
        damaged.set_len(5).expect("cuts");
    }
    read("cut short");
    support::eventually("whole objects", || {
        let mut sizes: Vec<_> =
            kitfs.cached_files("objects").iter().map(|o| fs::metadata(o).map_or(0, |m| m.len())).collect();
        sizes.sort_unstable();
        sizes == [13, SIZE as u64]
    });
    server.reset_counters();
    read("mended");
    assert_eq!(server.bytes_for(kit.layers[0]), 0, "it is kept");
}

#[test]
fn a_cache_that_cannot_remember_the_tag_still_serves() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server);
    let kitfs = Kitfs::new();
    kitfs.ok(&["cat", &kit.reference, "w/z.bin"]);
    support::eventually("the commit", || kitfs.cached_files("indexes").len() == 1);
    // As root a read-only directory would stop nobody: files stand where the tags' directories should.
    let tags = kitfs.cache().join("tags");
    fs::remove_dir_all(&tags).expect("removes");
    fs::create_dir(&tags).expect("creates");
    for name in 0..=255_u8 {
        fs::write(tags.join(format!("{name:02x}")), "").expect("writes");
    }
    let mount = kitfs.mount(&kit.reference, &[]);
    assert_eq!(fs::read(mount.path("w/a.bin")).expect("reads"), bytes);
}

#[test]
fn a_log_that_cannot_be_written_is_no_reason_to_fail() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server);
    let kitfs = Kitfs::new();
    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("opens");
    let mut command = kitfs.command(["cat", "--log-level", "trace", &kit.reference, "w/a.bin"]);
    let output = command.stdout(Stdio::piped()).stderr(full).output().expect("runs");
    assert!(output.status.success(), "{:?}", output.status);
    assert_eq!(output.stdout, bytes);
}
