//! Reading ahead: what a sequential reader has before it asks, what a random one is spared, and what goes before what.
//!
//! Requests and bytes are counted at the registry; nothing here depends on how long something takes.

mod support;

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use kitfs::digest::Digest;
use support::kit::{KitBuilder, Served, huge_tar, pattern, pattern_at, tar};
use support::program::{Kitfs, Mount};
use support::{FaultServer, assert_each_once, eventually};

const MIB: u64 = 1 << 20;

fn big(server: &FaultServer, size: u64) -> Served {
    KitBuilder::new().indexed().content("model", "m.bin", huge_tar("m.bin", 1, size)).serve(server, "v1")
}

/// Reads past the kernel's cache, so that nothing comes ahead but by us.
fn read(file: &File, offset: u64, len: u64) {
    let (mut found, mut expected) = (vec![0; len as usize], vec![0; len as usize]);
    file.read_exact_at(&mut found, offset).expect("reads");
    pattern_at(1, offset, &mut expected);
    assert!(found == expected, "wrong bytes at {offset}");
}

fn read_in_order(file: &File, range: std::ops::Range<u64>) {
    range.step_by(128 << 10).for_each(|offset| read(file, offset, 128 << 10));
}

/// Waits until nothing more is asked of a layer, and all that was has come.
fn until_quiet(server: &FaultServer, layer: Digest) {
    let (mut before, mut since) = ((0, 0), std::time::Instant::now());
    eventually("a quiet registry", || {
        let now = (server.requests_for(layer), server.bytes_for(layer));
        if now != before {
            (before, since) = (now, std::time::Instant::now());
        }
        let asked: u64 = server.ranges_for(layer).iter().map(|(first, last)| last - first + 1).sum();
        asked <= now.1 && since.elapsed() > Duration::from_millis(300)
    });
}

#[test]
fn a_sequential_reader_gets_each_byte_once_in_few_requests() {
    let server = FaultServer::empty("team/big");
    let kit = big(&server, 256 * MIB);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    read_in_order(&mount.open_direct("m.bin"), 0..256 * MIB);
    let ranges = server.ranges_for(kit.layers[0]);
    assert_each_once(&ranges);
    assert!(ranges.len() < 80, "{} requests for 256 chunks: {ranges:?}", ranges.len());
    assert!(ranges.iter().any(|(first, last)| last - first > 4 * MIB), "{ranges:?}");
    eventually("the commit", || kitfs.cached_files("objects").len() == 1);
}

#[test]
fn threads_that_read_stripes_of_a_file_get_each_byte_once_in_few_requests() {
    let server = FaultServer::empty("team/big");
    let kit = big(&server, 256 * MIB);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let file = mount.open_direct("m.bin");
    std::thread::scope(|scope| {
        for thread in 0..16 {
            let file = &file;
            scope.spawn(move || {
                for start in (thread * 2 * MIB..256 * MIB).step_by(32 * MIB as usize) {
                    read_in_order(file, start..start + 2 * MIB);
                }
            });
        }
    });
    let ranges = server.ranges_for(kit.layers[0]);
    assert_each_once(&ranges);
    assert!(ranges.len() < 128, "{} requests for 256 chunks: {ranges:?}", ranges.len());
}

#[test]
fn random_reads_fetch_their_chunks_and_no_more() {
    let server = FaultServer::empty("team/big");
    let kit = big(&server, 512 * MIB);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let file = mount.open_direct("m.bin");
    // 7 has no factor in common with 64: each eighth chunk once, in no order that is a stream.
    for at in 0..64 {
        read(&file, at * 7 % 64 * 8 * MIB + at * 4096, 4096);
    }
    let ranges = server.ranges_for(kit.layers[0]);
    assert_eq!(ranges.len(), 64, "{ranges:?}");
    assert!(ranges.iter().all(|(first, last)| last - first < MIB), "{ranges:?}");
}

#[test]
fn a_reader_is_answered_while_what_is_read_ahead_of_another_does_not_come() {
    let server = FaultServer::empty("team/big");
    let kit = big(&server, 1024 * MIB);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--concurrency", "2"]);
    let file = mount.open_direct("m.bin");
    read_in_order(&file, 0..32 * MIB);
    until_quiet(&server, kit.layers[0]);
    // Long requests come to a stop after two chunks.
    let gate = server.hold(kit.layers[0], 2 * MIB);
    let asked = server.ranges_for(kit.layers[0]).iter().map(|(_, last)| last / MIB).max().expect("some");
    read_in_order(&file, 32 * MIB..(asked - 24) * MIB);
    gate.wait_until_reached_by(1);
    let held = server.ranges_for(kit.layers[0]);
    let (first, last) = *held.last().expect("one");
    assert!(last - first > 4 * MIB, "read ahead: {held:?}");
    // One chunk far away, and one that waits to be read ahead behind those that are held.
    read(&file, 900 * MIB + 5000, 4096);
    read(&file, last + 2 * MIB, 4096);
    assert_eq!(server.requests_for(kit.layers[0]), held.len() + 2);
    gate.release();
    read_in_order(&file, 80 * MIB..100 * MIB);
    assert_each_once(&server.ranges_for(kit.layers[0]));
}

#[test]
fn after_the_last_release_no_further_request_is_made_for_what_nobody_reads() {
    let server = FaultServer::empty("team/big");
    let kit = big(&server, 1024 * MIB);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--concurrency", "2"]);
    let (file, other) = (mount.open_direct("m.bin"), mount.open_direct("m.bin"));
    read_in_order(&file, 0..32 * MIB);
    until_quiet(&server, kit.layers[0]);
    let gate = server.hold(kit.layers[0], 2 * MIB);
    let before = server.ranges_for(kit.layers[0]);
    let asked = before.iter().map(|(_, last)| last / MIB).max().expect("some");
    read_in_order(&file, 32 * MIB..(asked - 24) * MIB);
    gate.wait_until_reached_by(1);
    drop(other);
    drop(file);
    // The kernel tells of it behind the back of who closes.
    std::thread::sleep(Duration::from_secs(1));
    gate.release();
    until_quiet(&server, kit.layers[0]);
    let after = server.ranges_for(kit.layers[0]);
    assert_eq!(after.len(), before.len() + 1, "what was under way came, and no more: {after:?}");

    // Who comes back has it read ahead again.
    let file = mount.open_direct("m.bin");
    read_in_order(&file, (asked - 24) * MIB..(asked + 40) * MIB);
    let ranges = server.ranges_for(kit.layers[0]);
    assert_each_once(&ranges);
    assert!(ranges.len() < after.len() + 20, "{ranges:?}");
}

#[test]
fn a_file_that_was_mostly_read_is_completed_and_one_that_was_not_is_left_alone() {
    let server = FaultServer::empty("team/big");
    let kit = big(&server, 64 * MIB);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let file = mount.open_direct("m.bin");
    // Backwards, so that nothing is read ahead.
    for chunk in (33..64).rev() {
        read(&file, chunk * MIB, 4096);
    }
    until_quiet(&server, kit.layers[0]);
    assert_eq!(server.requests_for(kit.layers[0]), 31);
    // With the first of these half of it comes; the second finds that so.
    read(&file, 32 * MIB, 4096);
    read(&file, 32 * MIB + 4096, 4096);
    eventually("the whole file", || kitfs.cached_files("objects").len() == 1);
    assert_each_once(&server.ranges_for(kit.layers[0]));
    assert!(server.requests_for(kit.layers[0]) <= 42, "{:?}", server.ranges_for(kit.layers[0]));
    drop(server);
    read_in_order(&file, 0..64 * MIB);
}

/// So many small files of 24 KiB, 41 of them in a window of 1 MiB.
const HEAP: usize = 2400;
const SMALL: usize = 24 << 10;

fn heap(server: &FaultServer) -> Served {
    let files: Vec<(String, Vec<u8>)> = (0..HEAP).map(|at| (name(at), pattern(at as u64, SMALL))).collect();
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (&name[..], &bytes[..])).collect();
    KitBuilder::new().indexed().tar("datasets", "d", tar(&files)).serve(server, "v1")
}

fn name(at: usize) -> String {
    format!("d/{:02}/{at:04}.txt", at / 100)
}

fn read_small(mount: &Mount<'_>, at: usize) {
    let mut found = Vec::new();
    File::open(mount.path(&name(at))).expect("opens").read_to_end(&mut found).expect("reads");
    assert!(found == pattern(at as u64, SMALL), "wrong bytes in {at}");
}

#[test]
fn small_files_that_are_read_in_order_come_in_far_fewer_requests_than_there_are_windows() {
    let server = FaultServer::empty("team/heap");
    let kit = heap(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    (0..HEAP).for_each(|at| read_small(&mount, at));
    let ranges = server.ranges_for(kit.layers[0]);
    assert_each_once(&ranges);
    assert!(ranges.len() < 25, "{} requests for 58 windows: {ranges:?}", ranges.len());
    eventually("the commit", || kitfs.cached_files("objects").len() == HEAP);
    kitfs.assert_cache_is_true(&[]);
}

#[test]
fn small_files_that_are_read_in_order_by_several_come_once_in_few_requests() {
    let server = FaultServer::empty("team/heap");
    let kit = heap(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    std::thread::scope(|scope| {
        for worker in 0..8 {
            let mount = &mount;
            scope.spawn(move || (worker..HEAP).step_by(8).for_each(|at| read_small(mount, at)));
        }
    });
    let ranges = server.ranges_for(kit.layers[0]);
    assert_each_once(&ranges);
    assert!(ranges.len() < 40, "{} requests for 58 windows: {ranges:?}", ranges.len());
}

#[test]
fn small_files_that_are_read_here_and_there_fetch_their_window_and_no_more() {
    let server = FaultServer::empty("team/heap");
    let kit = heap(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    for at in 0..20 {
        read_small(&mount, (at * 7 % 20) * 120 + 20);
    }
    until_quiet(&server, kit.layers[0]);
    let ranges = server.ranges_for(kit.layers[0]);
    assert_eq!(ranges.len(), 20, "{ranges:?}");
    // A file over the edge of a window is fetched with those of both.
    assert!(ranges.iter().all(|(first, last)| last - first < 2 * MIB), "{ranges:?}");
}
