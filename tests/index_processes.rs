//! Many readers of a kit with indexes, in one process and in two: right bytes, and each chunk fetched once. And what
//! becomes of chunk requests when the network fails, the daemon is told to end, or descriptors are few.

mod support;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Signal, kill_process};
use support::kit::{KitBuilder, Served, pattern, tar};
use support::life::{assert_left, is_mounted, mounted, text};
use support::program::{Kitfs, Mount};
use support::{Auth, Fault, FaultServer, Login, eventually};

const MIB: usize = 1 << 20;
/// The last chunk is short.
const BIG: usize = 20 * MIB + 12_345;
const SMALL: usize = 30_000;
/// The read timeout, and how long a read may take with it: twice, as the kernel asks again by itself for what it could
/// not read ahead; and what a machine under load may take for the rest.
const TIMEOUT: &str = "2s";
const IN_TIME: Duration = Duration::from_secs(10);

fn small(number: usize) -> (String, Vec<u8>) {
    (format!("w/small/{number:04}"), pattern(1000 + number as u64, SMALL))
}

/// A pinned kit of one layer: a big file of [`BIG`] bytes, and so many small ones.
fn kit(server: &FaultServer, small_files: usize) -> (Served, Vec<u8>) {
    let bytes = pattern(5, BIG);
    let all: Vec<_> = (0..small_files).map(small).collect();
    let mut files: Vec<(&str, &[u8])> = vec![("w/a.bin", &bytes)];
    files.extend(all.iter().map(|(path, bytes)| (&**path, &**bytes)));
    (KitBuilder::new().indexed().tar("model", "w", tar(&files)).serve(server, "v1"), bytes)
}

/// Opens a file so that the kernel reads what is asked for and nothing ahead.
fn open_random(path: &Path) -> File {
    let file = File::open(path).expect("opens");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).expect("fadvise");
    file
}

/// Reads a part of the big file and compares it.
fn assert_part(file: &File, bytes: &[u8], offset: usize, len: usize) {
    let end = bytes.len().min(offset + len);
    let mut found = vec![0; end - offset];
    file.read_exact_at(&mut found, offset as u64).expect("reads");
    assert!(found == bytes[offset..end], "wrong bytes at {offset}");
}

fn assert_small(mount: &Mount<'_>, number: usize) {
    let (path, bytes) = small(number);
    assert!(fs::read(mount.path(&path)).expect("reads") == bytes, "wrong bytes in {path}");
}

/// Waits until so many bytes lie in partial files: readers are answered before the disk is.
fn eventually_written(kitfs: &Kitfs, bytes: usize) {
    let blocks = |path: &Path| fs::metadata(path).map_or(0, |found| found.blocks() * 512);
    eventually("what was read is written", || {
        kitfs.cached_files("partial").iter().map(|path| blocks(path)).sum::<u64>() >= bytes as u64
    });
}

#[test]
fn two_processes_that_read_one_cold_file_from_both_ends_fetch_no_more_than_they_had_in_flight_twice() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server, 64);
    let kitfs = Kitfs::new();
    let (one, two) = (kitfs.mount(&kit.reference, &[]), kitfs.mount(&kit.reference, &[]));
    // Slow enough that both are at work when they meet.
    server.set_rate(Some(40 << 20));
    let chunks = BIG.div_ceil(MIB);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let file = open_random(&one.path("w/a.bin"));
            // A page of each chunk forwards, whole chunks backwards: nothing is fetched ahead of either, and what is in
            // flight is what is asked for.
            (0..chunks).for_each(|chunk| assert_part(&file, &bytes, chunk * MIB, 4096));
            (0..64).for_each(|number| assert_small(&one, number));
        });
        scope.spawn(|| {
            let file = open_random(&two.path("w/a.bin"));
            (0..chunks).rev().for_each(|chunk| assert_part(&file, &bytes, chunk * MIB, MIB));
            (0..64).rev().for_each(|number| assert_small(&two, number));
        });
    });
    let sent = server.bytes_for(kit.layers[0]) as usize;
    let all = BIG + 64 * (SMALL + 1024);
    // Where they meet, each may have two chunks or windows in flight: in the big file, and among the small ones.
    assert!((BIG + 64 * SMALL..all + 4 * MIB).contains(&sent), "{sent} bytes sent for {all}");
    for mount in [&one, &two] {
        assert!(fs::read(mount.path("w/a.bin")).expect("reads") == bytes);
    }
}

#[test]
fn two_processes_that_read_everything_at_once_get_right_bytes() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server, 64);
    let kitfs = Kitfs::new();
    let mounts = [kitfs.mount(&kit.reference, &[]), kitfs.mount(&kit.reference, &[])];
    std::thread::scope(|scope| {
        for mount in &mounts {
            for _ in 0..2 {
                scope.spawn(|| assert!(fs::read(mount.path("w/a.bin")).expect("reads") == bytes));
                scope.spawn(|| (0..64).for_each(|number| assert_small(mount, number)));
            }
        }
    });
    let (sent, all) = (server.bytes_for(kit.layers[0]) as usize, BIG + 64 * (SMALL + 1024));
    assert!(sent <= 2 * all, "{sent} bytes sent: no process fetches anything twice");
    eventually("one object a file", || kitfs.cached_files("objects").len() == 65);
    server.reset_counters();
    let third = kitfs.mount(&kit.reference, &[]);
    assert!(fs::read(third.path("w/a.bin")).expect("reads") == bytes);
    (0..64).for_each(|number| assert_small(&third, number));
    assert_eq!(server.requests_for(kit.layers[0]), 0);
}

#[test]
fn what_one_process_has_written_of_a_file_the_other_does_not_fetch_while_the_first_goes_on() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server, 0);
    let kitfs = Kitfs::new();
    let (one, two) = (kitfs.mount(&kit.reference, &[]), kitfs.mount(&kit.reference, &[]));
    let (first, second) = (open_random(&one.path("w/a.bin")), open_random(&two.path("w/a.bin")));
    // The second has the file open already, and a chunk of its own.
    assert_part(&second, &bytes, BIG - 100, 100);
    // Backwards, as nothing is fetched ahead of that.
    for chunk in (0..8).rev() {
        assert_part(&first, &bytes, chunk * MIB, MIB);
    }
    eventually_written(&kitfs, 8 * MIB + 100);
    server.reset_counters();
    let gate = server.hold(kit.layers[0], 0);
    std::thread::scope(|scope| {
        // Far enough behind what was read not to be taken for its next part.
        let waiting = scope.spawn(|| assert_part(&first, &bytes, 18 * MIB, 4096));
        gate.wait_until_reached_by(1);
        for chunk in (0..8).rev() {
            assert_part(&second, &bytes, chunk * MIB, MIB);
        }
        assert_part(&first, &bytes, BIG - 100, 100);
        assert!(!waiting.is_finished());
        assert_eq!(server.requests_for(kit.layers[0]), 1, "only what waits at the gate");
        gate.release();
    });
    assert_eq!(server.bytes_for(kit.layers[0]), MIB as u64);

    assert!(fs::read(one.path("w/a.bin")).expect("reads") == bytes);
    eventually("the commit", || kitfs.cached_files("objects").len() == 1);
    eventually("nothing is left of the way there", || kitfs.cached_files("partial").is_empty());
    let sent = server.bytes_for(kit.layers[0]);
    assert!(fs::read(two.path("w/a.bin")).expect("reads") == bytes);
    assert_eq!(server.bytes_for(kit.layers[0]), sent, "the second reads what the first completed");
    assert_eq!(sent as usize, BIG - 8 * MIB - 12_345, "and all was fetched once");
}

#[test]
fn a_process_that_opened_a_file_before_another_completed_it_fetches_nothing_of_it() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server, 64);
    let kitfs = Kitfs::new();
    let (one, two) = (kitfs.mount(&kit.reference, &[]), kitfs.mount(&kit.reference, &[]));
    let second = open_random(&two.path("w/a.bin"));
    assert_part(&second, &bytes, 3 * MIB + 5, 10);
    assert!(fs::read(one.path("w/a.bin")).expect("reads") == bytes);
    (0..64).for_each(|number| assert_small(&one, number));
    eventually("the commit", || kitfs.cached_files("objects").len() == 65);
    server.reset_counters();
    (0..BIG.div_ceil(MIB)).for_each(|chunk| assert_part(&second, &bytes, chunk * MIB, MIB));
    (0..64).for_each(|number| assert_small(&two, number));
    assert_eq!(server.requests_for(kit.layers[0]), 0);
}

#[test]
fn sixty_four_readers_of_random_ranges_fetch_each_chunk_once_and_one_that_is_killed_harms_nobody() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server, 0);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let path = mount.path("w/a.bin");
    let mut killed = Command::new("cat").arg(&path).stdout(Stdio::null()).spawn().expect("cat");
    std::thread::scope(|scope| {
        for seed in 0..64_u64 {
            let (path, bytes) = (&path, &bytes);
            scope.spawn(move || {
                let file = open_random(path);
                for read in 0..40 {
                    let place = pattern(seed * 100 + read, 8);
                    let place = u64::from_le_bytes(place.try_into().expect("eight bytes")) as usize;
                    assert_part(&file, bytes, place % BIG, 1 + place % 300_000);
                }
            });
        }
        killed.kill().expect("kill");
        killed.wait().expect("wait");
    });
    assert!(fs::read(&path).expect("reads") == bytes);
    assert_eq!(server.bytes_for(kit.layers[0]) as usize, BIG);
}

#[test]
fn a_reader_that_waits_for_a_chunk_can_be_killed_and_the_chunk_comes_all_the_same() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server, 0);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let gate = server.hold(kit.layers[0], 1000);
    let mut reader =
        Command::new("head").args(["-c", "1"]).arg(mount.path("w/a.bin")).stdout(Stdio::null()).spawn().expect("head");
    gate.wait_until_reached_by(1);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| assert_part(&open_random(&mount.path("w/a.bin")), &bytes, 0, 1));
        let start = Instant::now();
        reader.kill().expect("kill");
        reader.wait().expect("wait");
        assert!(start.elapsed() < Duration::from_secs(3), "the reader took {:?} to leave", start.elapsed());
        assert!(!other.is_finished(), "the other waits on");
        gate.release();
    });
    assert!(fs::read(mount.path("w/a.bin")).expect("reads") == bytes);
    assert_eq!(server.bytes_for(kit.layers[0]) as usize, BIG, "each chunk once");
}

#[test]
fn a_joined_request_that_is_cut_is_resumed_where_it_stood() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server, 64);
    let layer = kit.layers[0];
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    server.fault_times(1, layer, Fault::Truncate { after: 300_001 });
    assert_part(&open_random(&mount.path("w/a.bin")), &bytes, 7 * MIB, 4096);
    let start = (1024 + 7 * MIB) as u64;
    let end = start + MIB as u64 - 1;
    assert_eq!(server.ranges_for(layer), [(start, end), (start + 300_001, end)]);
    assert_eq!(server.bytes_for(layer) as usize, MIB);

    // Small files that share a request: those before the cut are not asked for again.
    server.reset_counters();
    server.fault_times(1, layer, Fault::Truncate { after: 200_000 });
    assert_small(&mount, 40);
    let ranges = server.ranges_for(layer);
    assert_eq!(ranges.len(), 2, "{ranges:?}");
    assert!(ranges[0].1 - ranges[0].0 > 600_000, "many files in one request: {ranges:?}");
    assert_eq!(ranges[1], (ranges[0].0 + 200_000, ranges[0].1));
    // Who reads is answered before the rest of the request has come.
    eventually("all of it, once", || server.bytes_for(layer) == ranges[0].1 - ranges[0].0 + 1);

    server.fault_times(5, layer, Fault::Reset { after: 400_000 });
    assert!(fs::read(mount.path("w/a.bin")).expect("reads") == bytes);
    (0..64).for_each(|number| assert_small(&mount, number));
}

#[test]
fn a_registry_that_goes_silent_is_etimedout_in_time_while_what_is_cached_is_served() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server, 4);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--read-timeout", TIMEOUT]);
    let file = open_random(&mount.path("w/a.bin"));
    assert_part(&file, &bytes, 0, MIB);
    for (fault, after) in [(Fault::Silence, 2), (Fault::Hang { after: 1000 }, 3)] {
        server.fault(kit.layers[0], fault.clone());
        let start = Instant::now();
        let timed_out = |outcome: io::Result<()>| {
            let error = outcome.expect_err("nothing comes");
            assert_eq!(Errno::from_io_error(&error), Some(Errno::TIMEDOUT), "{fault:?}");
            assert!(start.elapsed() < IN_TIME, "{fault:?}: {:?}", start.elapsed());
        };
        std::thread::scope(|scope| {
            let chunk = scope.spawn(|| file.read_exact_at(&mut [0; 4096], 5 * MIB as u64));
            let small = scope.spawn(|| fs::read(mount.path("w/small/0002")).map(|_| ()));
            while start.elapsed() < Duration::from_secs(1) {
                // Through the daemon, not from the kernel's memory.
                rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("fadvise");
                let asked = Instant::now();
                assert_part(&file, &bytes, 1000, 5000);
                assert!(asked.elapsed() < Duration::from_secs(1), "{fault:?}: {:?}", asked.elapsed());
            }
            assert!(!chunk.is_finished() && !small.is_finished());
            timed_out(chunk.join().expect("ends"));
            timed_out(small.join().expect("ends"));
        });
        server.heal(kit.layers[0]);
        // Not at once: for a moment it is not asked.
        eventually("the registry is asked again", || file.read_exact_at(&mut [0; 4096], after * MIB as u64).is_ok());
    }
    assert_small(&mount, 2);
    assert!(fs::read(mount.path("w/a.bin")).expect("reads") == bytes);
}

#[test]
fn a_signal_while_chunks_are_in_flight_ends_the_mount_and_its_readers() {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server, 4);
    let kitfs = Kitfs::new();
    let (dir, daemon) = mounted(&kitfs, &kit, "mnt");
    let gate = server.hold(kit.layers[0], 1000);
    let reader = |name: &str| {
        let quiet = Command::new("cat").arg(dir.join(name)).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        quiet.expect("cat")
    };
    let mut readers = [reader("w/a.bin"), reader("w/small/0001")];
    gate.wait_until_reached_by(2);
    let start = Instant::now();
    kill_process(daemon, Signal::TERM).expect("kill");
    for reader in &mut readers {
        assert!(!reader.wait().expect("wait").success(), "it can't have had its bytes");
    }
    assert_left(&kitfs, &dir, daemon);
    assert!(start.elapsed() < IN_TIME, "{:?}", start.elapsed());
    assert!(!is_mounted(&dir) && !kitfs.logs().contains("panicked"), "{}", kitfs.logs());
}

#[test]
fn a_token_that_expires_between_ranges_is_renewed_and_no_byte_comes_twice() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server, 64);
    server.set_auth(Auth::Bearer { realm: None, login: Login::Anyone, expires_in: 3600 });
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let file = open_random(&mount.path("w/a.bin"));
    assert_part(&file, &bytes, 20 * MIB, 12_345);
    let before = server.requests_for("token");
    // Each round lies before the one that was: what it fetches ahead is its own or here, and nothing of a
    // later one. All of a round meet the same stale token at once.
    for round in 0..4 {
        server.revoke_tokens();
        std::thread::scope(|scope| {
            for part in 0..5 {
                let (file, bytes) = (&file, &bytes);
                scope.spawn(move || assert_part(file, bytes, (16 - round * 5 + part) * MIB, MIB));
            }
            scope.spawn(|| (round * 16..round * 16 + 16).for_each(|number| assert_small(&mount, number)));
        });
    }
    server.revoke_tokens();
    assert_part(&file, &bytes, 0, MIB);
    assert!(server.requests_for("token") >= before + 5);
    let answers = server.bytes_for(kit.layers[0]) as usize;
    let refusals = 2 * server.requests_for(kit.layers[0]);
    let all = BIG + 64 * (SMALL + 1024);
    assert!(answers <= all + refusals, "{answers} bytes sent for {all}");
}

#[test]
fn a_low_limit_of_descriptors_costs_requests_and_no_read_fails() {
    let server = FaultServer::empty("team/kit");
    let all: Vec<_> = (0..2000).map(|number| (format!("w/{number:04}"), pattern(number, 3000))).collect();
    let files: Vec<(&str, &[u8])> = all.iter().map(|(path, bytes)| (&**path, &**bytes)).collect();
    let kit = KitBuilder::new().indexed().tar("model", "w", tar(&files)).serve(&server, "v1");
    // A soft limit is raised; a hard one of a shell or a container stays.
    for (limit, threads, stride) in
        [("--nofile=256:", 32, 1), ("--nofile=1024:1024", 16, 7), ("--nofile=256:256", 8, 7)]
    {
        let kitfs = Kitfs::new();
        let dir = kitfs.path("mnt");
        let mount = kitfs.command(["mount", &kit.reference, text(&dir)]);
        let mut limited = Command::new("prlimit");
        limited.arg(limit).arg(mount.get_program()).args(mount.get_args()).stdin(Stdio::null());
        for (name, value) in mount.get_envs() {
            match value {
                Some(value) => limited.env(name, value),
                None => limited.env_remove(name),
            };
        }
        let mounted = limited.output().expect("prlimit runs");
        assert!(mounted.status.success(), "{}", String::from_utf8_lossy(&mounted.stderr));
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let (all, dir, kitfs) = (&all, &dir, &kitfs);
                scope.spawn(move || {
                    for at in (thread..all.len()).step_by(threads) {
                        let (path, bytes) = &all[at * stride % all.len()];
                        let found = fs::read(dir.join(path));
                        assert!(found.is_ok_and(|found| found == *bytes), "{limit}, {path}: {}", kitfs.logs());
                    }
                });
            }
        });
        eventually("most of them are kept", || kitfs.cached_files("objects").len() > 1500);
        kitfs.ok(&["unmount", text(&dir)]);
    }
}
