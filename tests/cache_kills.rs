//! `kill -9` at any moment of mounts, pulls, evictions and collections that share a cache: what is left is right, and no
//! space is lost.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::Value;
use support::FaultServer;
use support::kit::{KitBuilder, Served, gzip, pattern, tar};
use support::life::text;
use support::program::Kitfs;
use support::random::Random;

const MIB: usize = 1 << 20;

/// A kit and the content of its files by path.
struct Kit {
    served: Served,
    files: Vec<(String, Vec<u8>)>,
}

impl Kit {
    fn new(server: &FaultServer, number: u64, make: impl FnOnce(Vec<u8>) -> KitBuilder) -> Self {
        let sizes = [7 * MIB + 5, 3 * MIB, MIB + 1].into_iter().chain((0..60).map(|at| 20_000 + at * 13));
        // The first file is in all kits.
        let seed = |at: u64| if at == 0 { 77 } else { number * 100 + at };
        let files: Vec<_> =
            (0..).zip(sizes).map(|(at, size)| (format!("w/{at:03}"), pattern(seed(at), size))).collect();
        let refs: Vec<(&str, &[u8])> = files.iter().map(|(path, bytes)| (&**path, &**bytes)).collect();
        let served = make(tar(&refs)).serve(server, &format!("v{number}"));
        Self { served, files }
    }
}

/// Pinned, plain, compressed and plain again.
fn kits(server: &FaultServer) -> Vec<Kit> {
    vec![
        Kit::new(server, 1, |tar| KitBuilder::new().indexed().tar("model", "w", tar)),
        Kit::new(server, 2, |tar| KitBuilder::new().tar("model", "w", tar)),
        Kit::new(server, 3, |tar| KitBuilder::new().layer("model", "w", "tar+gzip", gzip(&tar))),
        Kit::new(server, 4, |tar| KitBuilder::new().tar("model", "w", tar)),
    ]
}

/// What one round does until it is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Mount,
    Pull,
    TightPull,
    Collect,
}

impl Doing {
    /// About how long it takes by itself, in microseconds.
    fn takes(self) -> usize {
        match self {
            Self::Mount => 250_000,
            Self::Pull => 150_000,
            Self::TightPull => 70_000,
            Self::Collect => 30_000,
        }
    }
}

const DOINGS: [Doing; 4] = [Doing::Mount, Doing::Pull, Doing::TightPull, Doing::Collect];

fn start(kitfs: &Kitfs, doing: Doing, kit: &Kit, dir: &Path) -> Child {
    let reference = &*kit.served.reference;
    let arguments: Vec<&str> = match doing {
        Doing::Mount => vec!["mount", "--foreground", reference, text(dir)],
        Doing::Pull => vec!["pull", reference],
        // A limit that two kits don't fit into: each pull evicts.
        Doing::TightPull => vec!["pull", reference, "--cache-size", "20MiB"],
        Doing::Collect => vec!["cache", "gc", "--cache-size", "16MiB"],
    };
    let mut command = kitfs.command(arguments);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("starts")
}

/// Reads here and there until it is over; how often that went well. What fails does so for want of a mount.
fn read(dir: &Path, kit: &Kit, seed: u64, over: &AtomicBool) -> usize {
    let mut random = Random::new(seed);
    let mut reads = 0;
    while !over.load(Ordering::SeqCst) {
        let (path, bytes) = &kit.files[random.below(kit.files.len())];
        let start = random.below(bytes.len());
        let mut found = vec![0; (1 + random.below(MIB)).min(bytes.len() - start)];
        match File::open(dir.join(path)).and_then(|file| file.read_exact_at(&mut found, start as u64)) {
            Ok(()) => {
                assert!(found == bytes[start..start + found.len()], "wrong bytes in {path} at {start}");
                reads += 1;
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    reads
}

/// Bytes on the disk in a directory, directories included.
fn disk_usage(dir: &Path) -> u64 {
    let mut bytes = fs::metadata(dir).expect("stats").blocks() * 512;
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let found = entry.metadata().expect("stats");
            bytes += found.blocks() * 512;
            if found.is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    bytes
}

fn left_in(kitfs: &Kitfs) -> Vec<PathBuf> {
    ["objects", "partial", "incoming", "blobs", "indexes", "kits", "quarantine"]
        .iter()
        .flat_map(|area| kitfs.cached_files(area))
        .collect()
}

#[test]
fn kill_9_at_200_moments_of_mounts_pulls_evictions_and_collections_leaves_a_cache_that_is_right() {
    const ROUNDS: usize = 200;
    let server = FaultServer::empty("team/kit");
    let kits = kits(&server);
    let kitfs = Kitfs::new();
    let (rounds, reads) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let killed: [AtomicUsize; DOINGS.len()] = Default::default();
    // Three at a time, so that each kill has neighbours at work.
    std::thread::scope(|scope| {
        for worker in 0..3_u64 {
            let (kitfs, kits, rounds, reads, killed) = (&kitfs, &kits, &rounds, &reads, &killed);
            scope.spawn(move || {
                let mut random = Random::new(worker + 1);
                let dir = kitfs.path(&format!("mnt{worker}"));
                loop {
                    let round = rounds.fetch_add(1, Ordering::SeqCst);
                    if round >= ROUNDS {
                        return;
                    }
                    let kit = &kits[random.below(kits.len())];
                    let which = random.below(DOINGS.len());
                    let mut child = start(kitfs, DOINGS[which], kit, &dir);
                    let over = AtomicBool::new(false);
                    std::thread::scope(|scope| {
                        if DOINGS[which] == Doing::Mount {
                            for reader in 0..2 {
                                let (dir, over) = (&dir, &over);
                                let seed = (round * 2 + reader) as u64 + 10_000;
                                scope.spawn(move || reads.fetch_add(read(dir, kit, seed, over), Ordering::SeqCst));
                            }
                        }
                        std::thread::sleep(Duration::from_micros(random.below(DOINGS[which].takes()) as u64));
                        // One that has ended by itself is not killed.
                        let ended = child.try_wait().expect("waits").is_some();
                        killed[which].fetch_add(usize::from(!ended), Ordering::SeqCst);
                        child.kill().expect("kill");
                        child.wait().expect("reaped");
                        over.store(true, Ordering::SeqCst);
                    });
                    kitfs.run(&["unmount", "--lazy", text(&dir)]);
                }
            });
        }
    });
    assert!(reads.load(Ordering::SeqCst) > ROUNDS, "{reads:?} reads");
    for (doing, killed) in DOINGS.iter().zip(&killed) {
        assert!(killed.load(Ordering::SeqCst) > ROUNDS / 40, "{doing:?} was killed {killed:?} times");
    }
    assert!(!kitfs.logs().contains("panicked"), "{}", kitfs.logs());
    kitfs.assert_cache_is_true(b"");

    let found: Value = serde_json::from_slice(&kitfs.run(&["cache", "verify", "--json"]).stdout).expect("JSON");
    assert_eq!(found["damaged"].as_array().map(Vec::len), Some(0), "{found}");
    kitfs.ok(&["cache", "gc"]);
    // What the commands know of is all that is there.
    let listed: Value = serde_json::from_str(&kitfs.ok(&["cache", "ls", "--json"])).expect("JSON");
    assert_eq!(listed["bytes"].as_u64(), Some(disk_usage(&kitfs.cache())), "{listed}");
    assert_eq!((&listed["leftovers"]["bytes"], &listed["areas"]["temporary"]), (&0.into(), &Value::Null), "{listed}");
    for kit in &kits {
        let mount = kitfs.mount(&kit.served.reference, &[]);
        for (path, bytes) in &kit.files {
            assert!(fs::read(mount.path(path)).expect("reads") == *bytes, "wrong bytes in {path}");
        }
    }
    kitfs.ok(&["cache", "rm", "--all"]);
    kitfs.ok(&["cache", "gc"]);
    assert_eq!(left_in(&kitfs), Vec::<PathBuf>::new());
}
