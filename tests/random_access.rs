//! Verified random access: what reads of a kit with indexes cost on the wire, and what a false byte costs its readers.

mod support;

use std::os::unix::fs::FileExt as _;

use kitfs::archive::index::Index;
use support::index::{index_of, offset_of};
use support::kit::{KitBuilder, Served, huge_tar, pattern, pattern_at, tar};
use support::program::{Kitfs, Mount};
use support::{Content, Fault, FaultServer, assert_each_once, eventually};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
const EIO: Option<i32> = Some(rustix::io::Errno::IO.raw_os_error());

/// Part of a file, past the kernel's cache.
fn part(mount: &Mount<'_>, name: &str, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    mount.open_direct(name).read_exact_at(&mut bytes, offset).map(|()| bytes)
}

#[test]
fn a_small_read_in_the_middle_of_a_cold_1_gib_file_is_one_request_of_at_most_1_mib() {
    let server = FaultServer::empty("team/big");
    let kit = KitBuilder::new().indexed().content("model", "m.bin", huge_tar("m.bin", 1, GIB)).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    assert_eq!(std::fs::metadata(mount.path("m.bin")).expect("stat").len(), GIB);
    assert_eq!(server.requests_for(kit.layers[0]), 0, "the index lists the layer without a touch");

    let file = std::fs::File::open(mount.path("m.bin")).expect("opens");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).expect("fadvise");
    let (mut found, mut expected) = (vec![0; 4096], vec![0; 4096]);
    let offset = GIB / 2 + 12_345;
    file.read_exact_at(&mut found, offset).expect("reads");
    pattern_at(1, offset, &mut expected);
    assert!(found == expected, "wrong bytes");
    let ranges = server.ranges_for(kit.layers[0]);
    let [(first, last)] = ranges[..] else { panic!("one request, not {ranges:?}") };
    assert!(last - first < MIB, "{first}-{last}");
}

#[test]
fn whole_chunks_that_are_read_here_and_there_come_alone() {
    let server = FaultServer::empty("team/big");
    let kit =
        KitBuilder::new().indexed().content("model", "m.bin", huge_tar("m.bin", 1, 64 * MIB)).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    // The kernel cuts each of these reads in pieces, in order.
    let file = std::fs::File::open(mount.path("m.bin")).expect("opens");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).expect("fadvise");
    let (mut found, mut expected) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    let chunks = [40, 3, 22, 60, 59, 58, 10, 31];
    for chunk in chunks {
        file.read_exact_at(&mut found, chunk * MIB).expect("reads");
        pattern_at(1, chunk * MIB, &mut expected);
        assert!(found == expected, "wrong bytes in chunk {chunk}");
    }
    let ranges = server.ranges_for(kit.layers[0]);
    assert_eq!(ranges.len(), chunks.len(), "{ranges:?}");
    assert!(ranges.iter().all(|(first, last)| last - first + 1 == MIB), "{ranges:?}");
}

#[test]
fn the_chunk_list_of_a_file_comes_when_it_is_opened_and_not_when_it_is_listed() {
    let server = FaultServer::empty("team/kit");
    let kit = KitBuilder::new().indexed().content("model", "m.bin", huge_tar("m.bin", 1, 3 * MIB)).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let index = kit.indexes[0].digest;
    assert_eq!(std::fs::metadata(mount.path("m.bin")).expect("stat").len(), 3 * MIB);
    assert_eq!(server.requests_for(index), 1, "the head");
    let _file = std::fs::File::open(mount.path("m.bin")).expect("opens");
    support::eventually("the list", || server.requests_for(index) == 2);
    assert_eq!(server.requests_for(kit.layers[0]), 0, "the layer waits for a read");
}

#[test]
fn a_chunk_list_is_fetched_once_and_a_chunk_too() {
    let server = FaultServer::empty("team/big");
    let kit =
        KitBuilder::new().indexed().content("model", "m.bin", huge_tar("m.bin", 1, 64 * MIB)).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let pin = kit.indexes[0];
    let read = |mount: &Mount<'_>, offset| {
        let mut expected = vec![0; 4096];
        pattern_at(1, offset, &mut expected);
        assert!(part(mount, "m.bin", offset, 4096).expect("reads") == expected, "wrong bytes at {offset}");
    };
    let mount = kitfs.mount(&kit.reference, &[]);
    for offset in [30 * MIB, 30 * MIB + 500_000, 30 * MIB + 4096, 7 * MIB, 7 * MIB + 9999] {
        read(&mount, offset);
    }
    assert_eq!(server.requests_for(kit.layers[0]), 2, "two chunks");
    let ranges = server.ranges_for(pin.digest);
    assert_eq!(ranges, [(0, pin.head_size - 1), (pin.head_size, pin.size - 1)], "the head, and the one list");
    drop(mount);

    server.reset_counters();
    let mount = kitfs.mount(&kit.reference, &[]);
    read(&mount, 30 * MIB);
    read(&mount, 7 * MIB);
    assert_eq!(server.requests_for(pin.digest), 0, "the cache has head and list");
    assert_eq!(server.requests_for(kit.layers[0]), 0, "and what an earlier mount has left of the file");
    read(&mount, 8 * MIB);
    assert_eq!(server.requests_for(kit.layers[0]), 1);
}

#[test]
fn a_read_across_chunks_is_one_request() {
    let server = FaultServer::empty("team/big");
    let kit =
        KitBuilder::new().indexed().content("model", "m.bin", huge_tar("m.bin", 1, 64 * MIB)).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let mut expected = vec![0; 200_000];
    pattern_at(1, 4 * MIB - 100_000, &mut expected);
    assert!(part(&mount, "m.bin", 4 * MIB - 100_000, 200_000).expect("reads") == expected, "wrong bytes");
    assert_eq!(server.ranges_for(kit.layers[0]), [(512 + 3 * MIB, 512 + 5 * MIB - 1)]);
}

#[test]
fn a_file_that_is_read_whole_comes_once_and_then_from_the_cache() {
    let server = FaultServer::empty("team/kit");
    let (one, two) = (pattern(1, 10 * MIB as usize + 12_345), pattern(2, 3 * MIB as usize));
    let layer = tar(&[("w/one.bin", &one), ("w/two.bin", &two)]);
    let size = layer.len() as u64;
    let kit = KitBuilder::new().indexed().tar("model", "w", layer).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let read_all = |mount: &Mount<'_>| {
        assert!(std::fs::read(mount.path("w/one.bin")).expect("reads") == one);
        assert!(std::fs::read(mount.path("w/two.bin")).expect("reads") == two);
    };
    let mount = kitfs.mount(&kit.reference, &[]);
    read_all(&mount);
    assert_each_once(&server.ranges_for(kit.layers[0]));
    assert!(server.bytes_for(kit.layers[0]) <= size);
    read_all(&mount);
    eventually("the commit", || kitfs.cached_files("objects").len() == 2);
    eventually("an end of what was filled", || kitfs.cached_files("partial").is_empty());
    drop(mount);

    server.reset_counters();
    let again = kitfs.mount(&kit.reference, &[]);
    read_all(&again);
    assert_eq!(server.requests_for(kit.layers[0]) + server.requests_for(kit.indexes[0].digest), 0);
    drop(again);

    let without = kitfs.mount(&kit.reference, &[]);
    drop(server);
    read_all(&without);
    kitfs.assert_cache_is_true(&[]);
}

/// A layer of a big file between two heaps of small ones.
struct Sample {
    layer: Vec<u8>,
    index: Index,
    big: Vec<u8>,
}

const SMALL: usize = 4096;

fn small_name(at: usize) -> String {
    format!("w/{at:04}.txt")
}

fn small(at: usize) -> Vec<u8> {
    pattern(100 + at as u64, SMALL)
}

impl Sample {
    fn new(count: usize) -> Self {
        let big = pattern(1, 8 * MIB as usize);
        let mut files: Vec<(String, Vec<u8>)> = (0..count).map(|at| (small_name(at), small(at))).collect();
        files.insert(count / 2, ("w/big.bin".to_owned(), big.clone()));
        let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (&name[..], &bytes[..])).collect();
        let layer = tar(&files);
        let index = index_of(&Content::Bytes(layer.clone()), "tar");
        Self { layer, index, big }
    }

    fn serve(&self, server: &FaultServer) -> Served {
        KitBuilder::new().indexed().tar("model", "w", self.layer.clone()).serve(server, "v1")
    }
}

/// How many requests asked for the byte at an offset of a layer.
fn fetches_of(server: &FaultServer, kit: &Served, offset: u64) -> usize {
    let ranges = server.ranges_for(kit.layers[0]);
    ranges.iter().filter(|(first, last)| (*first..=*last).contains(&offset)).count()
}

#[test]
fn a_flipped_bit_is_an_error_for_the_readers_of_its_chunk_and_for_nobody_else() {
    let server = FaultServer::empty("team/kit");
    let sample = Sample::new(20);
    let kit = sample.serve(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let flipped = 3 * MIB as usize + 777;
    let offset = offset_of(&sample.index, "w/big.bin") + flipped as u64;
    server.fault(kit.layers[0], Fault::FlipBit { offset });
    let mut falsified = sample.big[flipped - 32..flipped + 32].to_vec();
    falsified[32] ^= 1;

    let read = |at: u64, len: usize| part(&mount, "w/big.bin", at, len);
    let right = |at: u64, len: usize| sample.big[at as usize..at as usize + len].to_vec();
    for attempt in 1..=3 {
        let error = read(3 * MIB + 4096, 4096).expect_err("the chunk is false");
        assert_eq!(error.raw_os_error(), EIO, "{error}");
        assert_eq!(fetches_of(&server, &kit, offset), 2 * attempt, "two fetches each time");
    }
    for at in [2 * MIB, 4 * MIB, 4 * MIB - MIB - 4096] {
        assert!(read(at, 4096).expect("another chunk") == right(at, 4096));
    }
    // Both chunks come with one request, and one of them stays.
    let before = server.requests_for(kit.layers[0]);
    assert_eq!(read(4 * MIB - 4096, 8192).expect_err("one of two chunks is false").raw_os_error(), EIO);
    assert_eq!(read(3 * MIB - 4096 - MIB, 2 * MIB as usize).expect_err("likewise").raw_os_error(), EIO);
    assert!(read(MIB, 4096).expect("it came along") == right(MIB, 4096));
    assert!(server.requests_for(kit.layers[0]) > before);
    assert_eq!(std::fs::read(mount.path("w/big.bin")).expect_err("all of it").raw_os_error(), EIO);
    assert_eq!(std::fs::read(mount.path(&small_name(3))).expect("another file"), small(3));
    kitfs.assert_cache_is_true(&falsified);
    assert!(kitfs.logs().contains("a chunk does not have its digest, twice"), "{}", kitfs.logs());

    server.heal(kit.layers[0]);
    assert!(std::fs::read(mount.path("w/big.bin")).expect("healed") == sample.big);
    eventually("the commit", || kitfs.cached_files("partial").iter().all(|path| path.extension().is_some()));
    kitfs.assert_cache_is_true(&falsified);
}

#[test]
fn readers_at_once_of_a_false_chunk_and_of_its_neighbours_get_what_is_theirs() {
    let server = FaultServer::empty("team/kit");
    let sample = Sample::new(2);
    let kit = sample.serve(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    server.fault(kit.layers[0], Fault::FlipBit { offset: offset_of(&sample.index, "w/big.bin") + 5 * MIB });
    std::thread::scope(|scope| {
        for reader in 0..32 {
            let (mount, big) = (&mount, &sample.big);
            scope.spawn(move || {
                let at = reader % 8 * MIB;
                match part(mount, "w/big.bin", at + 100, 4096) {
                    Ok(bytes) => assert!(at != 5 * MIB && bytes == big[at as usize + 100..][..4096], "chunk at {at}"),
                    Err(error) => assert_eq!((at, error.raw_os_error()), (5 * MIB, EIO), "{error}"),
                }
            });
        }
    });
}

#[test]
fn a_flipped_bit_in_a_small_file_spares_its_neighbours() {
    let server = FaultServer::empty("team/kit");
    let sample = Sample::new(40);
    let kit = sample.serve(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let offset = offset_of(&sample.index, &small_name(7)) + 100;
    server.fault(kit.layers[0], Fault::FlipBit { offset });
    let mut falsified = small(7)[68..132].to_vec();
    falsified[32] ^= 1;

    assert_eq!(std::fs::read(mount.path(&small_name(3))).expect("a neighbour"), small(3));
    eventually("a second fetch of the false one", || fetches_of(&server, &kit, offset) == 2);
    for at in (0..20).filter(|at| *at != 7) {
        assert_eq!(std::fs::read(mount.path(&small_name(at))).expect("another"), small(at));
    }
    assert_eq!(server.requests_for(kit.layers[0]), 2, "the window, and the false file once more");
    for attempt in 2..=3 {
        assert_eq!(part(&mount, &small_name(7), 0, SMALL).expect_err("false").raw_os_error(), EIO);
        assert_eq!(fetches_of(&server, &kit, offset), 2 * attempt);
    }
    kitfs.assert_cache_is_true(&falsified);
    server.heal(kit.layers[0]);
    assert_eq!(std::fs::read(mount.path(&small_name(7))).expect("healed"), small(7));
}

#[test]
fn what_is_false_in_kits_storage_comes_from_the_registry() {
    let server = FaultServer::empty("team/kit");
    let sample = Sample::new(40);
    let kit = sample.serve(&server);
    let kitfs = Kitfs::new();
    let home = kitfs.path("kithome");
    let blobs = home.join("storage/blobs/sha256");
    std::fs::create_dir_all(&blobs).expect("mkdir");
    let mut damaged = sample.layer.clone();
    for at in [offset_of(&sample.index, "w/big.bin") + 5 * MIB, offset_of(&sample.index, &small_name(7))] {
        damaged[at as usize] ^= 1;
    }
    std::fs::write(blobs.join(kit.layers[0].hex()), damaged).expect("writes");
    let kitfs = kitfs.with("KITOPS_HOME", &home);
    let mount = kitfs.mount(&kit.reference, &[]);
    assert!(std::fs::read(mount.path("w/big.bin")).expect("reads") == sample.big);
    for at in 0..40 {
        assert_eq!(std::fs::read(mount.path(&small_name(at))).expect("reads"), small(at));
    }
    let bytes = server.bytes_for(kit.layers[0]);
    assert_eq!(bytes, MIB + SMALL as u64, "the registry gives what is false in kit's storage, and no more");
    kitfs.assert_cache_is_true(&[]);
}

/// So many small files with their headers fill three windows of 1 MiB.
const HEAP: usize = 600;

fn heap(server: &FaultServer) -> Served {
    let files: Vec<(String, Vec<u8>)> = (0..HEAP).map(|at| (small_name(at), small(at))).collect();
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (&name[..], &bytes[..])).collect();
    KitBuilder::new().indexed().tar("model", "w", tar(&files)).serve(server, "v1")
}

#[test]
fn a_small_file_brings_its_window_and_a_heap_of_them_costs_a_request_a_window() {
    let server = FaultServer::empty("team/kit");
    let kit = heap(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    assert_eq!(std::fs::read(mount.path(&small_name(300))).expect("reads"), small(300));
    let ranges = server.ranges_for(kit.layers[0]);
    let [(first, last)] = ranges[..] else { panic!("one request, not {ranges:?}") };
    assert!(last - first < MIB, "{first}-{last}");
    assert!(last - first > MIB - 3 * (SMALL as u64 + 512), "what lies wholly in the window: {first}-{last}");
    for at in 0..HEAP {
        assert_eq!(std::fs::read(mount.path(&small_name(at))).expect("reads"), small(at));
    }
    let ranges = server.ranges_for(kit.layers[0]);
    assert!(ranges.len() <= 5, "three windows and files across their edges: {ranges:?}");
    assert_each_once(&ranges);
}

#[test]
fn a_heap_of_small_files_read_by_many_at_once_comes_once() {
    let server = FaultServer::empty("team/kit");
    let kit = heap(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    std::thread::scope(|scope| {
        for reader in 0..16 {
            let mount = &mount;
            scope.spawn(move || {
                for step in 0..HEAP {
                    // Each in an order of its own: 600 has no factor in common with these.
                    let at = (step * [1, 7, 11, 13][reader % 4] + reader * 37) % HEAP;
                    assert_eq!(std::fs::read(mount.path(&small_name(at))).expect("reads"), small(at));
                }
            });
        }
    });
    assert_each_once(&server.ranges_for(kit.layers[0]));
    eventually("the commit", || kitfs.cached_files("objects").len() == HEAP);
    kitfs.assert_cache_is_true(&[]);
}
