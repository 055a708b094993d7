//! Many readers of one cold file, readers that leave, mappings, and a daemon that is killed.

mod support;

use std::fs::File;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use support::kit::{KitBuilder, Served, pattern, tar};
use support::program::Kitfs;
use support::{FaultServer, eventually};

const SIZE: usize = 20 << 20;

/// A kit of one layer with two files, and the first one's content.
fn kit(server: &FaultServer) -> (Served, Vec<u8>) {
    let bytes = pattern(3, SIZE);
    let other = pattern(4, 1 << 20);
    let files: [(&str, &[u8]); 2] = [("w/a.bin", &bytes), ("w/b.bin", &other)];
    (KitBuilder::new().tar("model", "w", tar(&files)).serve(server, "v1"), bytes)
}

/// Each byte of the layer was sent once, but for the small reads that list it.
fn assert_fetched_once(server: &FaultServer, kit: &Served) {
    let sent = server.bytes_for(kit.layers[0]);
    assert!(sent < (SIZE + (1 << 20) + (1 << 19)) as u64, "{sent} bytes sent for a layer of {SIZE}");
}

#[test]
fn sixty_four_readers_of_a_cold_file_make_one_fetch_of_the_layer() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    std::thread::scope(|scope| {
        for _ in 0..64 {
            scope.spawn(|| assert!(std::fs::read(mount.path("w/a.bin")).expect("reads") == bytes));
        }
    });
    assert_fetched_once(&server, &kit);
}

#[test]
fn a_reader_killed_while_waiting_leaves_at_once_and_the_fetch_goes_on() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let gate = server.hold(kit.layers[0], 1 << 20);
    let mut reader = Command::new("cat").arg(mount.path("w/a.bin")).stdout(Stdio::null()).spawn().expect("cat");
    gate.wait_until_reached_by(1);
    let killed = Instant::now();
    reader.kill().expect("kill");
    reader.wait().expect("wait");
    assert!(killed.elapsed() < Duration::from_secs(2), "the reader took {:?} to leave", killed.elapsed());
    gate.release();
    eventually("the fetch goes on to its end", || kitfs.cached_files("indexes").len() == 1);
    server.reset_counters();
    assert!(std::fs::read(mount.path("w/a.bin")).expect("reads") == bytes);
    assert_eq!(server.bytes_for(kit.layers[0]), 0);
}

#[test]
#[expect(unsafe_code, reason = "memory maps are what is tested; the file can't be truncated, it is read-only")]
fn faults_on_a_cold_mapping_are_served_while_all_background_requests_are_taken() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let gate = server.hold(kit.layers[0], 1 << 20);
    let file = File::open(mount.path("w/a.bin")).expect("opens");
    // SAFETY: the file system is read-only, so nobody changes the mapped bytes.
    let map = Arc::new(unsafe { memmap2::Mmap::map(&file) }.expect("maps"));
    let bytes = Arc::new(bytes);
    let mut threads = Vec::new();
    for number in 0..64 {
        let (map, bytes) = (map.clone(), bytes.clone());
        threads.push(std::thread::spawn(move || {
            let at = number * (SIZE / 64);
            assert!(map[at..at + 4096] == bytes[at..at + 4096]);
        }));
        // Sequential readers, whose read-ahead takes the background requests.
        let path = mount.path("w/a.bin");
        threads.push(std::thread::spawn(move || {
            assert_eq!(std::fs::read(path).expect("reads").len(), SIZE);
        }));
    }
    gate.wait_until_reached_by(1);
    std::thread::sleep(Duration::from_millis(300));
    // The tree answers while every reader waits.
    assert_eq!(std::fs::metadata(mount.path("w/b.bin")).expect("stats").len(), 1 << 20);
    gate.release();
    for thread in threads {
        thread.join().expect("no thread fails");
    }
}

#[test]
fn a_daemon_killed_in_the_middle_of_a_fill_leaves_nothing_that_counts() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let gate = server.hold(kit.layers[0], 1 << 20);
    let mut reader = Command::new("cat")
        .arg(mount.path("w/a.bin"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("cat");
    gate.wait_until_reached_by(1);
    rustix::process::kill_process(mount.daemon(), rustix::process::Signal::KILL).expect("kill");
    assert!(!reader.wait().expect("wait").success(), "a reader of a killed daemon gets an error");
    gate.release();
    assert!(kitfs.cached_files("objects").is_empty());
    drop(mount);

    let mount = kitfs.mount(&kit.reference, &[]);
    assert!(std::fs::read(mount.path("w/a.bin")).expect("reads") == bytes);
    eventually("the commit", || kitfs.cached_files("indexes").len() == 1);
    eventually("nothing is left in staging", || kitfs.cached_files("incoming").is_empty());
    assert_eq!(kitfs.cached_files("objects").len(), 2);
}

#[test]
fn two_processes_that_read_one_cold_layer_fetch_it_once() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server);
    let kitfs = Kitfs::new();
    let one = kitfs.mount(&kit.reference, &[]);
    let two = kitfs.mount(&kit.reference, &[]);
    std::thread::scope(|scope| {
        for mount in [&one, &two] {
            scope.spawn(|| assert!(std::fs::read(mount.path("w/a.bin")).expect("reads") == bytes));
        }
    });
    assert_fetched_once(&server, &kit);
}
