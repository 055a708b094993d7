//! A layer that there is no room for: it is read completely and right, through a cache that is smaller than it, or whose disk
//! fills up in between; and when there is room again, it is kept.

mod support;

use std::collections::HashMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kitfs::digest::Digest;
use support::kit::{KitBuilder, Served, gzip, huge_tar, pattern, tar};
use support::program::{Kitfs, Mount};
use support::{Fault, FaultServer};

const MIB: u64 = 1 << 20;

/// A small disk for the cache of a user of kitfs.
struct Disk(PathBuf);

impl Disk {
    fn new(kitfs: &Kitfs, mib: u64) -> Self {
        Self::with(kitfs, &format!("size={mib}m,mode=0700"))
    }

    fn with(kitfs: &Kitfs, options: &str) -> Self {
        let dir = kitfs.cache();
        fs::create_dir(&dir).expect("makes the directory");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]).arg(&dir).status();
        assert!(mounted.expect("mount runs").success(), "mounting a tmpfs needs root");
        Self(dir)
    }

    /// Lets nobody write to it, or lets them again.
    fn remount(&self, how: &str) {
        let options = format!("remount,bind,{how}");
        // Refused for as long as a file is open for writing.
        let remounts =
            || Command::new("mount").args(["-o", &options]).arg(&self.0).status().is_ok_and(|done| done.success());
        support::eventually("it is remounted", remounts);
    }

    /// Uses up what is free.
    fn fill(&self) -> PathBuf {
        let path = self.0.join("filler.tmp");
        let mut file = fs::File::create(&path).expect("creates");
        while file.write_all(&[1; 1 << 16]).is_ok() {}
        while file.write_all(&[1]).is_ok() {}
        path
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// Who has a cache on a small disk, and a log that is easy to read.
fn user(mib: u64) -> (Kitfs, Disk) {
    let kitfs = Kitfs::new().with("KITFS_LOG_FORMAT", "json").with("KITFS_LOG_LEVEL", "info");
    let disk = Disk::new(&kitfs, mib);
    (kitfs, disk)
}

/// How often each message of these levels was logged.
fn logged(kitfs: &Kitfs, levels: &[&str]) -> HashMap<String, usize> {
    let mut logged = HashMap::new();
    for line in kitfs.logs().lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()) {
        if levels.iter().any(|level| line["level"] == *level) {
            *logged.entry(line["fields"]["message"].to_string()).or_default() += 1;
        }
    }
    logged
}

/// What is wrong is said once; that the cache is full, once more after it had room.
fn assert_complains_at_most_once(kitfs: &Kitfs) -> HashMap<String, usize> {
    let told =
        |part: &str| logged(kitfs, &["INFO"]).iter().find(|(said, _)| said.contains(part)).map_or(0, |found| *found.1);
    let had_room = told("has room again");
    let complaints = logged(kitfs, &["WARN", "ERROR"]);
    let most = |said: &str| if said.contains("keeps nothing more") { 1 + had_room } else { 1 };
    assert!(complaints.iter().all(|(said, count)| *count <= most(said)), "{complaints:#?}\n{}", kitfs.logs());
    complaints
}

fn assert_complains_once(kitfs: &Kitfs) {
    let complaints = assert_complains_at_most_once(kitfs);
    assert!(
        complaints.keys().any(|said| said.contains("no room for all of the layer")),
        "{complaints:#?}\n{}",
        kitfs.logs()
    );
}

fn assert_reads(mount: &Mount<'_>, path: &str, content: &[u8]) {
    let found = fs::read(mount.path(path)).expect("reads");
    assert!(found == content, "{path}: {} bytes, not those of the file", found.len());
}

/// Files of 300 KiB in a tar of so many bytes, and their contents.
fn files(size: u64) -> (Vec<u8>, Vec<(String, Vec<u8>)>) {
    let files: Vec<_> =
        (0..size / (300 << 10)).map(|n| (format!("w/{n:05}"), pattern(n, (300 << 10) + n as usize % 999))).collect();
    let borrowed: Vec<(&str, &[u8])> = files.iter().map(|(name, content)| (&name[..], &content[..])).collect();
    (tar(&borrowed), files)
}

/// Reads a file of 200 MiB through a cache of 100; how often the layer was sent.
fn reads_all(server: &FaultServer, kit: &Served, path: &str, content: &[u8]) -> f64 {
    let (kitfs, _disk) = user(100);
    reads_all_as(&kitfs, server, kit, path, content)
}

fn reads_all_as(kitfs: &Kitfs, server: &FaultServer, kit: &Served, path: &str, content: &[u8]) -> f64 {
    let mount = kitfs.mount(&kit.reference, &[]);
    assert_reads(&mount, path, content);
    let status = kitfs.status(&mount);
    let why = status["layers"][0]["unstaged"].as_str().unwrap_or_default();
    assert!(why.contains("no room"), "{status:#}");
    let shown = kitfs.ok(&["status"]);
    assert!(shown.contains("fetched again where it is not cached"), "{shown}");
    assert_complains_once(kitfs);
    kitfs.assert_cache_is_true(b"");
    let digest: Digest = kit.layers[0];
    server.bytes_for(digest) as f64 / server.len_of(&digest).expect("the layer") as f64
}

#[test]
fn a_layer_of_200_mib_through_a_cache_of_100_is_paid_twice() {
    let server = FaultServer::empty("team/kit");
    let kit = KitBuilder::new().content("model", "big", huge_tar("big", 3, 200 * MIB)).serve(&server, "v1");
    let times = reads_all(&server, &kit, "big", &pattern(3, 200 * MIB as usize));
    assert!(times < 2.2, "{times} times");
}

#[test]
fn a_limit_is_as_good_as_a_full_disk() {
    let server = FaultServer::empty("team/kit");
    let kit = KitBuilder::new().content("model", "big", huge_tar("big", 3, 200 * MIB)).serve(&server, "v1");
    let kitfs = Kitfs::new()
        .with("KITFS_LOG_FORMAT", "json")
        .with("KITFS_LOG_LEVEL", "info")
        .with("KITFS_CACHE_SIZE", "100MiB");
    let times = reads_all_as(&kitfs, &server, &kit, "big", &pattern(3, 200 * MIB as usize));
    assert!(times < 2.2, "{times} times");
}

#[test]
fn the_same_in_gzip_from_its_start_again_and_again() {
    let server = FaultServer::empty("team/kit");
    let content = pattern(3, 200 * MIB as usize);
    let blob = gzip(&tar(&[("big", &content)]));
    let kit = KitBuilder::new().layer("model", "big", "tar+gzip", blob).serve(&server, "v1");
    let times = reads_all(&server, &kit, "big", &content);
    assert!(times < 12.0, "{times} times");
}

#[test]
fn the_same_from_a_source_without_ranges() {
    let server = FaultServer::empty("team/kit");
    let content = pattern(3, 200 * MIB as usize);
    let kit = KitBuilder::new().tar("model", "big", tar(&[("big", &content)])).serve(&server, "v1");
    server.fault(kit.layers[0], Fault::IgnoreRange);
    let times = reads_all(&server, &kit, "big", &content);
    assert!(times < 14.0, "{times} times");
}

#[test]
fn many_files_in_gzip_are_read_by_many_at_once() {
    let server = FaultServer::empty("team/kit");
    let (tar, files) = files(120 * MIB);
    let kit = KitBuilder::new().layer("model", "w", "tar+gzip", gzip(&tar)).serve(&server, "v1");
    let (kitfs, _disk) = user(40);
    let mount = kitfs.mount(&kit.reference, &[]);
    std::thread::scope(|scope| {
        for reader in 0..4 {
            let (mount, files) = (&mount, &files);
            scope.spawn(move || {
                for (path, content) in files.iter().skip(reader * 31).step_by(3 + reader) {
                    assert_reads(mount, path, content);
                }
            });
        }
    });
    assert_complains_once(&kitfs);
    kitfs.assert_cache_is_true(b"");
}

/// Fills the disk in the middle of a fill; then gives the space back.
fn is_filled_up_in_between(suffix: &str, options: &[&str]) {
    let server = FaultServer::empty("team/kit");
    let (tar, files) = files(100 * MIB);
    let blob = if suffix == "tar" { tar } else { gzip(&tar) };
    let kit = KitBuilder::new().layer("model", "w", suffix, blob).serve(&server, "v1");
    let (kitfs, disk) = user(if suffix == "tar" { 130 } else { 230 });
    let mount = kitfs.mount(&kit.reference, options);
    server.set_rate(Some(30 * MIB));
    let (last, content) = files.last().expect("a file");
    let filler = std::thread::scope(|scope| {
        let reading = scope.spawn(|| assert_reads(&mount, last, content));
        let staged =
            || kitfs.cached_files("incoming").iter().map(|path| fs::metadata(path).map_or(0, |m| m.len())).sum();
        support::eventually("some of it is staged", || 20 * MIB < staged());
        let mut filler = disk.fill();
        // What is given up frees some of the disk: that goes too.
        while !reading.is_finished() {
            std::thread::sleep(Duration::from_millis(50));
            filler = disk.fill();
        }
        reading.join().expect("reads");
        filler
    });
    server.set_rate(None);
    for (path, content) in files.iter().step_by(17) {
        assert_reads(&mount, path, content);
    }
    assert_complains_once(&kitfs);
    let kept = || kitfs.cached_files("objects").len();
    assert!(kept() < files.len() / 4, "{} are kept on a full disk", kept());
    fs::remove_file(filler).expect("removes");
    // A full cache looks again once a second, and a layer is staged again after ten.
    std::thread::sleep(Duration::from_secs(11));
    for (path, content) in &files {
        assert_reads(&mount, path, content);
    }
    support::eventually("what was read since is kept", || kept() > files.len() / 2);
    kitfs.assert_cache_is_true(b"");
}

#[test]
fn the_disk_is_filled_in_the_middle_of_a_fill() {
    is_filled_up_in_between("tar", &[]);
}

#[test]
fn the_disk_is_filled_in_the_middle_of_a_compressed_fill() {
    is_filled_up_in_between("tar+gzip", &[]);
}

#[test]
fn the_disk_is_filled_while_bytes_are_served_as_they_come() {
    is_filled_up_in_between("tar", &["--verify", "stream"]);
}

#[test]
fn what_would_only_serve_the_next_fill_goes_first() {
    let server = FaultServer::empty("team/kit");
    let (tar, files) = files(60 * MIB);
    let kit = KitBuilder::new().layer("model", "w", "tar+gzip", gzip(&tar)).serve(&server, "v1");
    // Enough for the files, and not for the blob beside them.
    let (kitfs, _disk) = user(80);
    let mount = kitfs.mount(&kit.reference, &[]);
    let (last, content) = files.last().expect("a file");
    assert_reads(&mount, last, content);
    support::eventually("the commit", || kitfs.cached_files("indexes").len() == 1);
    assert_eq!(kitfs.cached_files("objects").len(), files.len());
    assert_complains_at_most_once(&kitfs);
    assert!(!Path::new(&kitfs.cache()).join("incoming").read_dir().expect("reads").any(|_| true));
}

#[test]
fn a_cache_that_is_above_a_smaller_limit_yields_though_its_disk_is_full() {
    let server = FaultServer::empty("team/kit");
    let kit = KitBuilder::new().content("model", "big", huge_tar("big", 3, 60 * MIB)).indexed().serve(&server, "v1");
    let (kitfs, disk) = user(80);
    kitfs.ok(&["pull", &kit.reference, "--cache-size", "1GiB"]);
    disk.fill();
    assert_eq!(kitfs.cached_files("objects").len(), 1);
    let other =
        KitBuilder::new().content("model", "other", huge_tar("other", 4, 10 * MIB)).indexed().serve(&server, "v2");
    let mount = kitfs.mount(&other.reference, &["--cache-size", "20MiB"]);
    assert_reads(&mount, "other", &pattern(4, 10 * MIB as usize));
    support::eventually("what nobody uses goes", || {
        kitfs.status(&mount);
        kitfs.cached_files("objects").iter().all(|path| fs::metadata(path).is_ok_and(|found| found.len() < 20 * MIB))
    });
    assert_complains_at_most_once(&kitfs);
}

#[test]
fn a_disk_that_is_read_only_for_a_while_is_as_good_as_a_full_one() {
    let server = FaultServer::empty("team/kit");
    let kit = KitBuilder::new().content("model", "big", huge_tar("big", 3, 40 * MIB)).indexed().serve(&server, "v1");
    let (kitfs, disk) = user(100);
    let mount = kitfs.mount(&kit.reference, &["--cache-size", "90MiB"]);
    let content = pattern(3, 40 * MIB as usize);
    let read = |file: &fs::File, chunk: u64| {
        let mut found = vec![0; 4096];
        file.read_exact_at(&mut found, chunk * MIB).expect("reads");
        assert!(found == content[(chunk * MIB) as usize..][..4096], "chunk {chunk}");
    };
    read(&mount.open_direct("big"), 1);
    support::eventually("it is kept", || kitfs.cached_files("partial").len() == 2);
    disk.remount("ro");
    let file = mount.open_direct("big");
    (1..40).step_by(3).for_each(|chunk| read(&file, chunk));
    let complaints = assert_complains_at_most_once(&kitfs);
    assert!(complaints.len() == 1 && complaints.keys().all(|said| said.contains("read-only")), "{complaints:#?}");
    let shown = kitfs.ok(&["status"]);
    assert!(shown.contains("the disk of the cache is read-only"), "{shown}");
    disk.remount("rw");
    std::thread::sleep(Duration::from_secs(2));
    // The handle was opened while nothing could be written.
    (0..40).for_each(|chunk| read(&file, chunk));
    support::eventually("all of it is kept", || kitfs.cached_files("objects").len() == 1);
    assert!(!kitfs.ok(&["status"]).contains("read-only"));
    kitfs.assert_cache_is_true(b"");
}

#[test]
fn a_disk_that_does_not_tell_its_size_is_not_taken_for_a_full_one() {
    let server = FaultServer::empty("team/kit");
    let kit = KitBuilder::new().content("model", "big", huge_tar("big", 3, 20 * MIB)).serve(&server, "v1");
    let kitfs = Kitfs::new().with("KITFS_CACHE_SIZE", "100MiB");
    let _disk = Disk::with(&kitfs, "size=0,mode=0700");
    kitfs.ok(&["pull", &kit.reference]);
    assert_eq!(kitfs.cached_files("objects").len(), 1);
}
