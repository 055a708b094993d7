//! Files become complete, pass through, are evicted and come again, under opens, maps and reads from all sides: no open
//! fails, no read fails, and no byte is wrong. (The kernel answers a conflict of modes with an EIO that the daemon never
//! sees: only those who open can tell.)

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use support::FaultServer;
use support::kit::{KitBuilder, Served, gzip, pattern, tar};
use support::program::Kitfs;
use support::random::Random;
use support::reading;

const MIB: usize = 1 << 20;
/// Files of this size are opened past the kernel's cache while they are cold.
const LARGE: usize = 64 * MIB;
/// How long, in seconds, where somebody wants to know better.
const SECONDS: &str = "KITFS_TEST_SECONDS";

/// A kit and its files.
struct Kit {
    served: Served,
    files: Vec<(String, Vec<u8>)>,
}

impl Kit {
    fn new(server: &FaultServer, seed: u64, sizes: &[usize], make: impl FnOnce(Vec<u8>) -> KitBuilder) -> Self {
        let files: Vec<_> =
            (0..).zip(sizes).map(|(at, size)| (format!("w/{at}"), pattern(seed * 100 + at, *size))).collect();
        let named: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (&**name, &**bytes)).collect();
        let served = make(tar(&named)).serve(server, &format!("v{seed}"));
        Self { served, files }
    }
}

/// What was done.
#[derive(Debug, Default)]
struct Counts {
    opens: AtomicU64,
    maps: AtomicU64,
    bytes: AtomicU64,
    /// How often a complete file was removed, to be fetched again.
    flips: AtomicU64,
}

/// What a reader holds for a while: a handle, or a map of what was closed.
enum Held {
    File(File),
    Map(memmap2::Mmap),
}

/// Opens, maps and reads until the end, as `seed` has it.
fn read(mounts: &[(PathBuf, &Kit)], seed: u64, until: Instant, counts: &Counts) {
    let mut random = Random::new(seed);
    let mut held: Vec<(Held, &str, &[u8])> = Vec::new();
    let mut aligned = memmap2::MmapMut::map_anon(128 << 10).expect("aligned memory");
    while Instant::now() < until {
        let (dir, kit) = &mounts[random.below(mounts.len())];
        // Few files, so that many meet at each; the large one seldom.
        let number = if random.below(50) == 0 { 0 } else { 1 + random.below(kit.files.len() - 1) };
        let (name, bytes) = &kit.files[number];
        let path = dir.join(name);
        let named = |error: std::io::Error| format!("{}: {error}", path.display());
        let (start, most) = (random.below(bytes.len()), if random.below(8) == 0 { bytes.len() } else { 40_000 });
        let end = bytes.len().min(start + 1 + random.below(most.min(2 * MIB)));
        counts.opens.fetch_add(1, Ordering::Relaxed);
        let way = random.below(10);
        if way == 0 {
            let file = reading::open_directly(&path);
            let start = start / aligned.len() * aligned.len();
            let end = bytes.len().min(start + aligned.len());
            let count = file.read_at(&mut aligned, start as u64).map_err(named).expect("reads with O_DIRECT");
            assert!(aligned[..count] == bytes[start..end], "wrong bytes in {} at {start}", path.display());
            counts.bytes.fetch_add(count as u64, Ordering::Relaxed);
            continue;
        }
        let file = File::open(&path).map_err(named).expect("opens");
        let held_now = if way < 4 {
            counts.maps.fetch_add(1, Ordering::Relaxed);
            // Closed at once: what is mapped lives on.
            Held::Map(reading::map(&file).map_err(named).expect("maps"))
        } else {
            Held::File(file)
        };
        held.push((held_now, name, bytes));
        check(&held[held.len() - 1], start..end, counts);
        // What was opened before other readers came and went is read again, and closed, in any order.
        if held.len() > random.below(6) {
            let old = held.swap_remove(random.below(held.len()));
            let at = random.below(old.2.len());
            check(&old, at..old.2.len().min(at + 5000), counts);
        }
    }
}

fn check((held, name, bytes): &(Held, &str, &[u8]), range: std::ops::Range<usize>, counts: &Counts) {
    match held {
        Held::Map(map) => assert!(map[range.clone()] == bytes[range.clone()], "wrong bytes in {name} at {range:?}"),
        Held::File(file) => {
            let mut found = vec![0; range.len()];
            let read = file.read_exact_at(&mut found, range.start as u64);
            read.unwrap_or_else(|error| panic!("{name} at {range:?}: {error}"));
            assert!(found == bytes[range.clone()], "wrong bytes in {name} at {range:?}");
        }
    }
    counts.bytes.fetch_add(range.len() as u64, Ordering::Relaxed);
}

/// Removes complete files, whoever has them open, so that they must become complete again.
fn flip(kitfs: &Kitfs, seed: u64, over: &AtomicBool, counts: &Counts) {
    let mut random = Random::new(seed);
    while !over.load(Ordering::Relaxed) {
        let objects = kitfs.cached_files("objects");
        if !objects.is_empty() && fs::remove_file(&objects[random.below(objects.len())]).is_ok() {
            counts.flips.fetch_add(1, Ordering::Relaxed);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn no_open_fails_and_no_byte_is_wrong_while_files_flip_between_partial_and_complete() {
    let seconds = std::env::var(SECONDS).map_or(12, |text| text.parse().expect("a number of seconds"));
    let server = FaultServer::empty("team/kit");
    let sizes = [LARGE, MIB, MIB + 1, 3 * MIB + 77, 2 * MIB].into_iter().chain((0..15).map(|at| 5 + at * 40_000));
    let sizes: Vec<_> = sizes.collect();
    let kits = [
        Kit::new(&server, 1, &sizes, |tar| KitBuilder::new().indexed().tar("model", "w", tar)),
        // Fetched whole; the same content as it is fetched by chunk would be another's.
        Kit::new(&server, 2, &sizes[1..], |tar| KitBuilder::new().layer("model", "w", "tar+gzip", gzip(&tar))),
    ];
    let kitfs = Kitfs::new();
    // Two processes read the first kit through one cache.
    let mounted: Vec<_> = [0, 0, 1].map(|kit| (kitfs.mount(&kits[kit].served.reference, &[]), &kits[kit])).into();
    let mounts: Vec<_> = mounted.iter().map(|(mount, kit)| (mount.dir.clone(), *kit)).collect();
    let (counts, over) = (Counts::default(), AtomicBool::new(false));
    let until = Instant::now() + Duration::from_secs(seconds);
    std::thread::scope(|scope| {
        let (counts, over, mounts, kitfs) = (&counts, &over, &mounts, &kitfs);
        scope.spawn(move || flip(kitfs, 99, over, counts));
        let readers: Vec<_> = (0..8).map(|seed| scope.spawn(move || read(mounts, seed, until, counts))).collect();
        let outcomes: Vec<_> = readers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        over.store(true, Ordering::Relaxed);
        outcomes.into_iter().for_each(|outcome| outcome.expect("no reader fails"));
    });
    let ways: Vec<_> = mounted.iter().map(|(mount, _)| kitfs.status(mount)["reads"]["opened"].clone()).collect();
    let count = |way: &str| ways.iter().map(|opened| opened[way].as_u64().expect("a number")).sum::<u64>();
    let told = format!("{counts:?} {ways:?}");
    assert_eq!(kitfs.logs().matches(" ERROR ").count(), 0, "{}", kitfs.logs());
    let opens = counts.opens.load(Ordering::Relaxed);
    assert!(opens > seconds * 50 && counts.flips.load(Ordering::Relaxed) > seconds, "{told}");
    assert!(count("cached") > seconds && count("direct") > 0, "{told}");
    assert!(!rustix::process::geteuid().is_root() || count("passthrough") > seconds, "{told}");
    if std::env::var(SECONDS).is_ok() {
        use std::io::Write as _;
        writeln!(std::io::stderr(), "{told}").expect("standard error");
    }
}
