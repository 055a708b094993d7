//! A mount that goes with its tag: `mount --follow`, and what pauses it.

mod support;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::kit::{KitBuilder, Served, tar};
use support::program::{Kitfs, Mount};
use support::{Fault, FaultServer, eventually, life};

const FILES: usize = 30;
/// Options of a follower that looks often, and does not wait.
const QUICK: [&str; 5] = ["--follow", "--interval", "100ms", "--settle", "0s"];

fn name(number: usize) -> String {
    format!("model/part-{number:02}.bin")
}

/// A kit whose files hold one letter.
fn kit(server: &FaultServer, tag: &str, letter: u8) -> Served {
    let names: Vec<String> = (0..FILES).map(name).collect();
    let bytes = vec![letter; 5000];
    let files: Vec<(&str, &[u8])> = names.iter().map(|name| (&**name, &bytes[..])).collect();
    KitBuilder::new().indexed().tar("model", "model", tar(&files)).serve(server, tag)
}

fn letter_of(path: &Path) -> u8 {
    let bytes = fs::read(path).expect("reads");
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "two kits in one file");
    bytes[0]
}

fn serves(kitfs: &Kitfs, mount: &Mount<'_>, kit: &Served) -> bool {
    kitfs.status(mount)["digest"].as_str() == Some(&*kit.digest.to_string())
}

fn state(kitfs: &Kitfs, mount: &Mount<'_>) -> String {
    kitfs.status(mount)["follow"]["state"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn a_mount_goes_with_its_tag_until_somebody_chooses_and_then_when_it_moves_again() {
    let server = FaultServer::empty("team/kit");
    let kits = [kit(&server, "a", b'a'), kit(&server, "b", b'b'), kit(&server, "c", b'c')];
    server.tag("production", kits[0].digest);
    let kitfs = Kitfs::new();
    let told = kitfs.path("told");
    let hook = format!("echo $KITFS_DIR $KITFS_OLD $KITFS_NEW >> {}", told.display());
    let options: Vec<&str> = QUICK.into_iter().chain(["--on-switch", &hook, "--label", "job=7"]).collect();
    let mount = kitfs.mount(&server.reference("production"), &options);
    let dir = mount.path("");
    let dir = life::text(&dir);
    assert_eq!((letter_of(&mount.path(&name(0))), &*state(&kitfs, &mount)), (b'a', "following"));

    server.tag("production", kits[1].digest);
    eventually("the switch", || serves(&kitfs, &mount, &kits[1]));
    assert_eq!(letter_of(&mount.path(&name(0))), b'b');

    kitfs.ok(&["rollback", dir]);
    assert_eq!(letter_of(&mount.path(&name(0))), b'a');
    eventually("the pause", || kitfs.status(&mount)["follow"]["drift"] == true);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(
        (letter_of(&mount.path(&name(0))), &*state(&kitfs, &mount)),
        (b'a', "paused"),
        "nobody is pulled forward"
    );
    kitfs.ok(&["switch", dir, "--follow"]);
    eventually("the way back to the tag", || serves(&kitfs, &mount, &kits[1]));

    kitfs.ok(&["rollback", dir]);
    eventually("the pause", || state(&kitfs, &mount) == "paused");
    std::thread::sleep(Duration::from_millis(300));
    server.tag("production", kits[2].digest);
    eventually("the tag's next move", || serves(&kitfs, &mount, &kits[2]));
    assert_eq!(letter_of(&mount.path(&name(0))), b'c');

    let hooks = || fs::read_to_string(&told).unwrap_or_default();
    eventually("the commands", || hooks().lines().count() == 5);
    let first = format!("{} {} {}", mount.dir.display(), kits[0].digest, kits[1].digest);
    assert_eq!(hooks().lines().next(), Some(&*first));
    drop(mount);
    let events = fs::read_to_string(kitfs.path("state/history/events.jsonl")).expect("a record");
    let events: Vec<Value> = events.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let actions: Vec<&str> = events.iter().filter_map(|event| event["action"].as_str()).collect();
    assert_eq!(actions, ["mount", "switch", "rollback", "switch", "rollback", "switch", "unmount"]);
    assert!(events.iter().all(|event| event["labels"]["job"] == "7"), "{events:?}");
    assert_eq!(events[2]["from"].as_str(), Some(&*kits[1].digest.to_string()));
}

#[test]
fn a_loader_that_takes_its_time_gets_one_kit() {
    let server = FaultServer::empty("team/kit");
    let kits = [kit(&server, "a", b'a'), kit(&server, "b", b'b')];
    server.tag("production", kits[0].digest);
    let kitfs = Kitfs::new();
    let options = ["--follow", "--interval", "100ms", "--settle", "1500ms"];
    let mount = kitfs.mount(&server.reference("production"), &options);
    for number in 0..FILES {
        if number == 5 {
            server.tag("production", kits[1].digest);
        }
        assert_eq!(letter_of(&mount.path(&name(number))), b'a', "file {number}");
        std::thread::sleep(Duration::from_millis(250));
    }
    assert_eq!(state(&kitfs, &mount), "settling");
    eventually("the switch", || serves(&kitfs, &mount, &kits[1]));
}

#[test]
fn who_never_rests_gets_the_new_kit_in_the_end() {
    let server = FaultServer::empty("team/kit");
    let kits = [kit(&server, "a", b'a'), kit(&server, "b", b'b')];
    server.tag("production", kits[0].digest);
    let kitfs = Kitfs::new();
    let options = ["--follow", "--interval", "100ms", "--settle", "1h", "--settle-max", "2s"];
    let mount = kitfs.mount(&server.reference("production"), &options);
    server.tag("production", kits[1].digest);
    let start = Instant::now();
    while letter_of(&mount.path(&name(0))) == b'a' {
        assert!(start.elapsed() < Duration::from_secs(30), "no switch");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(start.elapsed() >= Duration::from_secs(2));
}

#[test]
fn a_registry_that_fails_is_asked_less_often_and_a_kit_that_cant_be_opened_is_not_served() {
    let server = FaultServer::empty("team/kit");
    let kits = [kit(&server, "a", b'a'), kit(&server, "b", b'b')];
    server.tag("production", kits[0].digest);
    let kitfs = Kitfs::new();
    let options: Vec<&str> = QUICK.into_iter().chain(["--meta-timeout", "1s"]).collect();
    let mount = kitfs.mount(&server.reference("production"), &options);
    server.fault(kits[1].digest, Fault::status(404));
    server.tag("production", kits[1].digest);
    eventually("the failure", || state(&kitfs, &mount) == "failing");
    let status = kitfs.status(&mount);
    assert!(status["follow"]["error"].as_str().is_some_and(|why| !why.is_empty()), "{status}");
    assert_eq!((letter_of(&mount.path(&name(0))), &status["follow"]["drift"]), (b'a', &Value::Bool(true)));
    server.heal(kits[1].digest);
    eventually("the switch", || serves(&kitfs, &mount, &kits[1]));
}

#[test]
fn without_following_status_tells_on_request_that_the_tag_has_moved() {
    let server = FaultServer::empty("team/kit");
    let kits = [kit(&server, "a", b'a'), kit(&server, "b", b'b')];
    server.tag("production", kits[0].digest);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&server.reference("production"), &[]);
    let check = || {
        let told = kitfs.ok(&["status", life::text(&mount.dir), "--check", "--json"]);
        let told: Value = serde_json::from_str(&told).expect("JSON");
        told["mounts"][0]["tag"].clone()
    };
    assert_eq!(check()["drift"], false);
    server.tag("production", kits[1].digest);
    let tag = check();
    assert_eq!((&tag["drift"], tag["digest"].as_str()), (&Value::Bool(true), Some(&*kits[1].digest.to_string())));
    assert!(kitfs.status(&mount)["tag"].is_null(), "only on request");
    let paused = kitfs.fails(&["switch", life::text(&mount.dir), "--follow"]);
    assert!(paused.contains("without --follow"), "{paused}");
    let pinned = format!("{}@{}", server.reference("production").rsplit_once(':').expect("a tag").0, kits[0].digest);
    let refused = kitfs.fails(&["mount", &pinned, "--follow"]);
    assert!(refused.contains("never moves"), "{refused}");
}

#[test]
fn what_is_mounted_is_what_was_printed_though_the_tag_moves_meanwhile() {
    let server = FaultServer::empty("team/kit");
    let kits = [kit(&server, "a", b'a'), kit(&server, "b", b'b')];
    server.tag("production", kits[0].digest);
    let kitfs = Kitfs::new();
    // Its first layer is asked for after the tag: there the tag moves.
    let gate = server.hold(kits[0].indexes[0].digest, 0);
    std::thread::scope(|scope| {
        let mounting = scope.spawn(|| kitfs.mount(&server.reference("production"), &["--json"]));
        gate.wait_until_reached_by(1);
        server.tag("production", kits[1].digest);
        gate.release();
        let mount = mounting.join().expect("mounts");
        let printed: Value = serde_json::from_str(&mount.said).expect("JSON");
        assert_eq!(printed["digest"].as_str(), Some(&*kits[0].digest.to_string()));
        assert_eq!(letter_of(&mount.path(&name(0))), b'a');
        assert!(serves(&kitfs, &mount, &kits[0]));
    });
}
