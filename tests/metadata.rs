//! What names cost: memory for each, and requests for a second look.

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Pid;
use support::FaultServer;
use support::kit::{KitBuilder, tar};
use support::program::{Kitfs, Mount};

/// Anonymous memory that an entry may take, its share of whatever else grows with a kit.
const BYTES_AN_ENTRY: u64 = 200;
/// As long as a disk may take that many others use.
const PATIENCE: Duration = Duration::from_secs(60);

/// A tar of `files` empty files in directories of a thousand.
fn many(files: usize) -> Vec<u8> {
    let paths: Vec<_> = (0..files).map(|at| format!("data/train-{:05}/sample-{at:08}.json", at / 1000)).collect();
    tar(&paths.iter().map(|path| (path.as_str(), &b""[..])).collect::<Vec<_>>())
}

/// Anonymous memory of a process in bytes.
fn anonymous(process: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.as_raw_nonzero())).expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kib << 10
}

/// How often a process has read from anything: each request of the kernel is a read.
fn reads(process: Pid) -> u64 {
    let io = fs::read_to_string(format!("/proc/{}/io", process.as_raw_nonzero())).expect("a process");
    io.lines().find_map(|line| line.strip_prefix("syscr: ")).and_then(|n| n.parse().ok()).expect("syscr")
}

/// Looks at everything in a mount, and counts it.
fn look_around(mount: &Mount<'_>) -> usize {
    fn below(dir: &Path) -> usize {
        let entries = fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("an entry").path());
        let count = |path: std::path::PathBuf| {
            let is_dir = fs::symlink_metadata(&path).expect("metadata").is_dir();
            1 + if is_dir { below(&path) } else { 0 }
        };
        entries.map(count).sum()
    }
    below(&mount.dir)
}

/// Bytes that each entry of a kit of 100,000 takes beyond what a kit of three does, in a mount that finds its index in the
/// cache: in the one that has fetched a layer whole, the allocator keeps what that took.
fn bytes_an_entry(build: fn(KitBuilder) -> KitBuilder) -> u64 {
    let server = FaultServer::empty("team/many");
    let serve = |files, tag| build(KitBuilder::new()).tar("datasets", "data", many(files)).serve(&server, tag);
    let (few, all) = (serve(3, "few"), serve(100_000, "all"));
    let kitfs = Kitfs::new();
    let small = kitfs.mount(&few.reference, &[]);
    look_around(&small);
    let look = || {
        let large = kitfs.mount(&all.reference, &["--meta-timeout", "10m"]);
        let entries = look_around(&large) as u64;
        (large, entries)
    };
    drop(look());
    let (large, entries) = look();
    assert_eq!(entries, 100_000 + 100 + 2, "files, directories, `data` and the Kitfile");
    let (small, large) = (small.daemon(), large.daemon());
    let measure = || anonymous(large).saturating_sub(anonymous(small)) / entries;
    // An index goes from memory to the disk behind the readers' backs.
    let started = Instant::now();
    while measure() > BYTES_AN_ENTRY && started.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(100));
    }
    measure()
}

#[test]
fn a_name_of_an_indexed_kit_takes_little_memory() {
    let taken = bytes_an_entry(KitBuilder::indexed);
    assert!((1..=BYTES_AN_ENTRY).contains(&taken), "{taken} bytes an entry");
}

#[test]
fn a_name_of_a_kit_that_was_fetched_whole_takes_little_memory() {
    let taken = bytes_an_entry(|kit| kit);
    assert!((1..=BYTES_AN_ENTRY).contains(&taken), "{taken} bytes an entry");
}

#[test]
fn a_second_look_asks_for_directories_alone() {
    let server = FaultServer::empty("team/many");
    let kit = KitBuilder::new().indexed().tar("datasets", "data", many(5_000)).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let list = || {
        let listed = Command::new("ls").arg("-lR").current_dir(mount.path("data")).output().expect("ls");
        assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
        listed.stdout
    };
    let daemon = mount.daemon();
    let start = reads(daemon);
    let first = list();
    let between = reads(daemon);
    assert_eq!(list(), first);
    let (first, second) = (between - start, reads(daemon) - between);
    // 6 directories are opened and closed; how to get there is looked up.
    assert!(second < 40, "{second} requests the second time, {first} the first");
    assert!(first < 1_500, "{first} requests for 5,000 files");
}
