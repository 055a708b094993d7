//! A mount that serves another kit from one moment to the next: `switch`, `rollback`, `.kitfs`.

mod support;

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use support::kit::{KitBuilder, Served, tar};
use support::program::{Kitfs, Mount};
use support::{Fault, FaultServer, eventually, life};

/// Files of a kit, all of whose bytes are its letter; each is a byte longer than the one before.
const FILES: usize = 6;
const SIZE: usize = 200_000;

fn name(number: usize) -> String {
    format!("model/part-{number}.bin")
}

/// A kit whose files hold one letter, and one file that no other kit has.
fn kit(server: &FaultServer, tag: &str, letter: u8) -> Served {
    let bytes = vec![letter; SIZE + FILES];
    let own = format!("model/only-{}", letter as char);
    let names: Vec<String> = (0..FILES).map(name).chain([own]).collect();
    let files = names.iter().enumerate().map(|(number, name)| (&**name, &bytes[..SIZE + number]));
    let files: Vec<(&str, &[u8])> = files.collect();
    let kit = KitBuilder::new().indexed().tar("model", "model", tar(&files));
    kit.tar("docs", &format!("{}.md", letter as char), tar(&[(&format!("{}.md", letter as char), b"docs")]))
        .serve(server, tag)
}

fn switch(kitfs: &Kitfs, mount: &Mount<'_>, reference: &str) -> Value {
    let told = kitfs.ok(&["switch", life::text(&mount.path("")), reference, "--json"]);
    serde_json::from_str(&told).expect("JSON")
}

/// The letter that a file is full of.
fn letter_of(path: &Path) -> u8 {
    let bytes = fs::read(path).expect("reads");
    assert!(
        bytes.len() >= SIZE && bytes.iter().all(|byte| *byte == bytes[0]),
        "{}: two kits in one read",
        path.display()
    );
    bytes[0]
}

#[test]
fn what_is_open_goes_on_and_what_is_opened_is_new() {
    let server = FaultServer::empty("team/kit");
    let (a, b) = (kit(&server, "a", b'a'), kit(&server, "b", b'b'));
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&a.reference, &[]);
    assert_eq!(letter_of(&mount.path(&name(0))), b'a');
    let (mut open, unread) =
        (File::open(mount.path(&name(0))).expect("opens"), File::open(mount.path(&name(1))).expect("opens"));
    let mut begun = [0; 1000];
    open.read_exact(&mut begun).expect("reads");
    let map = unsafe_map(&unread);
    let inside = File::open(mount.path("model")).expect("opens a directory");
    let root = fs::read_dir(mount.path("")).expect("opens the root");

    let told = switch(&kitfs, &mount, &b.reference);
    assert_eq!(
        (told["digest"].as_str(), told["from"].as_str()),
        (Some(&*b.digest.to_string()), Some(&*a.digest.to_string()))
    );

    for number in 0..FILES {
        assert_eq!(letter_of(&mount.path(&name(number))), b'b');
    }
    assert!(mount.path("model/only-b").exists() && !mount.path("model/only-a").exists());
    assert!(mount.path("b.md").exists() && !mount.path("a.md").exists());
    let mut names: Vec<_> =
        fs::read_dir(mount.path("")).expect("reads").map(|entry| entry.expect("reads").file_name()).collect();
    names.sort();
    assert_eq!(names, ["Kitfile", "b.md", "model"], "and .kitfs is not listed");

    let mut rest = Vec::new();
    open.read_to_end(&mut rest).expect("reads");
    assert!(begun.iter().chain(&rest).all(|byte| *byte == b'a') && rest.len() == SIZE - 1000);
    assert!(map.iter().all(|byte| *byte == b'a'), "a map that nobody had touched");
    let mut late = [0; 10];
    unread.read_exact_at(&mut late, SIZE as u64 - 10).expect("reads");
    assert_eq!(late, [b'a'; 10]);
    let below = |file: &str| format!("/proc/self/fd/{}/{file}", std::os::fd::AsRawFd::as_raw_fd(&inside));
    assert_eq!(letter_of(Path::new(&below("part-3.bin"))), b'a', "found in the directory that was open");
    let mut old: Vec<_> = root.map(|entry| entry.expect("reads").file_name()).collect();
    old.sort();
    assert_eq!(old, ["Kitfile", "a.md", "model"]);

    let trees = mount.path(".kitfs");
    for (kit, letter) in [(&a, b'a'), (&b, b'b')] {
        let tree = trees.join(kit.digest.to_string());
        assert_eq!(letter_of(&tree.join(name(2))), letter);
        assert_eq!(fs::read_dir(tree.join("model")).expect("reads").count(), FILES + 1);
        assert_eq!(fs::read_dir(&tree).expect("reads").count(), 3);
    }
    assert_eq!(fs::read_dir(&trees).expect("reads").count(), 2);
    let (plain, shown) = (mount.path(&name(2)), trees.join(b.digest.to_string()).join(name(2)));
    let ino = |path: &Path| fs::metadata(path).expect("stats").ino();
    assert_eq!(ino(&plain), ino(&shown), "files are the same in both views");
    assert_eq!(fs::metadata(trees.join("sha256:00")).expect_err("no tree").kind(), std::io::ErrorKind::NotFound);

    let status = kitfs.status(&mount);
    assert_eq!(status["digest"].as_str(), Some(&*b.digest.to_string()));
    assert_eq!(status["trees"].as_array().map(Vec::len), Some(2));
}

/// A shared map of a whole file.
fn unsafe_map(file: &File) -> memmap2::Mmap {
    #[expect(unsafe_code, reason = "the file of a read-only mount does not change")]
    unsafe { memmap2::Mmap::map(file) }.expect("maps")
}

#[test]
fn a_switch_that_cant_be_done_changes_nothing() {
    let server = FaultServer::empty("team/kit");
    let (a, b) = (kit(&server, "a", b'a'), kit(&server, "b", b'b'));
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&a.reference, &["--read-timeout", "2s", "--meta-timeout", "2s"]);
    let dir = mount.path("");
    let missing = kitfs.fails(&["switch", life::text(&dir), &server.reference("none")]);
    assert!(missing.contains("none"), "{missing}");
    server.fault(b.layers[0], Fault::FlipBit { offset: SIZE as u64 });
    let damaged = kitfs.fails(&["switch", life::text(&dir), &b.reference, "--prefetch"]);
    assert!(damaged.contains("can't be made complete"), "{damaged}");
    assert_eq!(letter_of(&mount.path(&name(0))), b'a');
    assert_eq!(kitfs.status(&mount)["digest"].as_str(), Some(&*a.digest.to_string()));
    server.heal(b.layers[0]);
    kitfs.ok(&["switch", life::text(&dir), &b.reference, "--prefetch"]);
    server.reset_counters();
    assert_eq!(letter_of(&mount.path(&name(0))), b'b');
    assert_eq!(server.requests_for(b.layers[0]), 0, "all of it was here first");
    let nowhere = kitfs.fails(&["switch", life::text(&kitfs.path("elsewhere")), &b.reference]);
    assert!(nowhere.contains("nothing is mounted"), "{nowhere}");
}

#[test]
fn a_kit_of_which_a_layer_is_gone_is_not_switched_to() {
    let server = FaultServer::empty("team/kit");
    let a = kit(&server, "a", b'a');
    let gone = KitBuilder::new().tar("model", "model", tar(&[("model/part-0.bin", b"gone")])).serve(&server, "gone");
    server.fault(gone.layers[0], Fault::status(404));
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&a.reference, &[]);
    let refused = kitfs.fails(&["switch", life::text(&mount.path("")), &gone.reference]);
    assert!(refused.contains("can't be read") && refused.contains(&gone.digest.to_string()), "{refused}");
    assert_eq!(letter_of(&mount.path(&name(0))), b'a');
    let events = fs::read_to_string(kitfs.path("state/history/events.jsonl")).expect("a record");
    let last: Value = serde_json::from_str(events.lines().last().expect("a line")).expect("JSON");
    assert!(last["outcome"]["failed"].is_string(), "{last}");
    assert_eq!((&last["digest"], &last["from"]), (&json!(gone.digest), &json!(a.digest)), "what the tag had led to");
}

#[test]
fn a_switch_that_failed_is_on_record_with_the_digest_that_was_asked_for() {
    let server = FaultServer::empty("team/kit");
    let a = kit(&server, "a", b'a');
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&a.reference, &[]);
    let missing = kitfs::digest::Digest::of(b"no kit has it");
    let repository = a.reference.rsplit_once(':').expect("a tag").0;
    for (reference, digest) in
        [(format!("{repository}@{missing}"), json!(missing)), (server.reference("none"), Value::Null)]
    {
        kitfs.fails(&["switch", life::text(&mount.dir), &reference]);
        let events = fs::read_to_string(kitfs.path("state/history/events.jsonl")).expect("a record");
        let last: Value = serde_json::from_str(events.lines().last().expect("a line")).expect("JSON");
        assert!(last["outcome"]["failed"].is_string() && last["digest"] == digest, "{reference}: {last}");
    }
}

/// What one switch found of a registry says nothing to the next: whoever asks by hand wants to know how it is now.
#[test]
fn a_registry_that_is_back_is_asked_by_the_next_switch() {
    let server = FaultServer::empty("team/kit");
    let (a, b) = (kit(&server, "a", b'a'), kit(&server, "moving", b'b'));
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&a.reference, &[]);
    assert_eq!(switch(&kitfs, &mount, &b.reference)["digest"], json!(b.digest));
    server.fault("moving", Fault::status(503));
    let told = switch(&kitfs, &mount, &b.reference);
    assert!(told["notes"].to_string().contains("the registry can't be reached"), "{told}");
    server.heal("moving");
    server.tag("moving", a.digest);
    let told = switch(&kitfs, &mount, &b.reference);
    assert_eq!((&told["digest"], &told["notes"]), (&json!(a.digest), &json!([])));
}

/// The switch is done, and whoever relies on the record hears that it lacks it.
#[test]
fn a_record_that_cant_be_written_is_a_warning() {
    let server = FaultServer::empty("team/kit");
    let (a, b) = (kit(&server, "a", b'a'), kit(&server, "b", b'b'));
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&a.reference, &[]);
    let record = kitfs.path("state/history/events.jsonl");
    eventually("the mount is on record", || record.exists());
    fs::rename(&record, kitfs.path("moved")).expect("moves");
    fs::create_dir(&record).expect("makes");
    let told = switch(&kitfs, &mount, &b.reference);
    assert!(told["warnings"].to_string().contains("the history"), "{told}");
    assert!(kitfs.status(&mount)["warnings"].to_string().contains("events.jsonl"));
    fs::remove_dir(&record).expect("removes");
    assert_eq!(switch(&kitfs, &mount, &a.reference)["warnings"], json!([]));
    assert_eq!(kitfs.status(&mount)["warnings"], json!([]));
}

#[test]
fn a_switch_that_nobody_waits_for_any_more_is_given_up() {
    let server = FaultServer::empty("team/kit");
    let (a, b) = (kit(&server, "a", b'a'), kit(&server, "b", b'b'));
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&a.reference, &[]);
    let gate = server.hold(b.layers[0], 0);
    let mut waiting =
        kitfs.command(["switch", life::text(&mount.dir), &b.reference, "--prefetch"]).spawn().expect("starts");
    gate.wait_until_reached_by(1);
    waiting.kill().expect("killed");
    waiting.wait().expect("ended");
    gate.release();
    // The next one waits for nothing that the first has left.
    let c = kit(&server, "c", b'c');
    switch(&kitfs, &mount, &c.reference);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(letter_of(&mount.path(&name(0))), b'c');
}

#[test]
fn a_switch_to_what_is_served_already_tells_so_and_is_no_event() {
    let server = FaultServer::empty("team/kit");
    let a = kit(&server, "a", b'a');
    server.tag("again", a.digest);
    let kitfs = Kitfs::new();
    // What is fetched ahead of reads never ends by itself.
    let mount = kitfs.mount(&a.reference, &["--prefetch", "auto"]);
    let told = kitfs.ok(&["switch", life::text(&mount.dir), &server.reference("again"), "--prefetch"]);
    assert!(told.contains("already"), "{told}");
    let events = fs::read_to_string(kitfs.path("state/history/events.jsonl")).expect("a record");
    assert_eq!(events.lines().count(), 1, "{events}");
}

#[test]
fn a_rollback_goes_back_step_by_step_and_to_any_digest() {
    let server = FaultServer::empty("team/kit");
    let kits = [kit(&server, "a", b'a'), kit(&server, "b", b'b'), kit(&server, "c", b'c')];
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kits[0].reference, &[]);
    let dir = mount.path("");
    let dir = life::text(&dir);
    let nothing = kitfs.fails(&["rollback", dir]);
    assert!(nothing.contains("no other kit before"), "{nothing}");
    switch(&kitfs, &mount, &kits[1].reference);
    switch(&kitfs, &mount, &kits[2].reference);
    for letter in [b'b', b'a'] {
        let told = kitfs.ok(&["rollback", dir]);
        assert!(told.contains("serves"), "{told}");
        assert_eq!(letter_of(&mount.path(&name(0))), letter);
    }
    kitfs.ok(&["rollback", dir, &kits[2].digest.hex()[..12]]);
    assert_eq!(letter_of(&mount.path(&name(0))), b'c');
    let record = fs::read_to_string(kitfs.path("state/history/events.jsonl")).unwrap_or_default();
    let actions: Vec<&str> =
        record.lines().filter_map(|line| line.split("\"action\":\"").nth(1)?.split('"').next()).collect();
    assert_eq!(actions, ["mount", "switch", "switch", "rollback", "rollback", "rollback"], "{record}");
}

#[test]
fn a_thousand_switches_under_readers_never_mix_two_kits_and_leave_nothing_behind() {
    const SWITCHES: usize = 1000;
    let server = FaultServer::empty("team/kit");
    let kits = [kit(&server, "a", b'a'), kit(&server, "b", b'b')];
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kits[0].reference, &[]);
    let daemon = mount.daemon().as_raw_nonzero();
    let descriptors = || fs::read_dir(format!("/proc/{daemon}/fd")).expect("the daemon").count();
    let memory = || {
        let status = fs::read_to_string(format!("/proc/{daemon}/status")).expect("the daemon");
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("a line");
        line.split_whitespace().nth(1).and_then(|number| number.parse::<u64>().ok()).expect("a number")
    };
    let files = fs::read_dir(kitfs.path("state/mounts")).expect("the state").flatten().map(|file| file.path());
    let socket =
        files.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "sock")).expect("a socket");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let to = |reference: &str| {
        let request = serde_json::json!({ "cmd": "switch", "reference": reference });
        let answer = runtime.block_on(::kitfs::mount::control::ask(&socket, &request, Duration::from_secs(60)));
        let answer = answer.expect("an answer");
        assert!(answer["error"].is_null(), "{answer}");
    };
    let (is_over, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    let (mut before, mut after) = ((0, 0), (0, 0));
    std::thread::scope(|scope| {
        for reader in 0..8 {
            let (mount, is_over, reads) = (&mount, &is_over, &reads);
            scope.spawn(move || {
                let mut number = reader;
                while !is_over.load(Ordering::Relaxed) {
                    letter_of(&mount.path(&name(number % FILES)));
                    number += 1;
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for number in 0..SWITCHES {
            to(&kits[(number + 1) % 2].reference);
            if number == SWITCHES / 4 {
                before = (descriptors(), memory());
            }
        }
        after = (descriptors(), memory());
        is_over.store(true, Ordering::Relaxed);
    });
    assert!(reads.load(Ordering::Relaxed) > 1000);
    assert!(after.0 <= before.0 + 16, "descriptors: {before:?} and {after:?}");
    assert!(after.1 <= before.1 + 16 * 1024, "KiB of memory: {before:?} and {after:?}");
    assert_eq!(letter_of(&mount.path(&name(0))), b'a');
    eventually("the other tree is let go", || kitfs.status(&mount)["trees"].as_array().map(Vec::len) == Some(1));
}
