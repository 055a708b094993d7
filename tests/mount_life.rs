//! A mount's beginning and what is told of it: its directory, what is refused, starts that fail, status, the foreground.

mod support;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal};
use serde_json::Value;
use support::life::{assert_left, is_mounted, kit, mounted, mounted_on, records, status, text};
use support::program::{Kitfs, Mount};
use support::{Fault, FaultServer, eventually};

#[test]
fn a_missing_directory_is_made_and_removed() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    let (dir, daemon) = mounted(&kitfs, &kit, "mnt");
    assert_eq!(fs::read(dir.join("README.md")).expect("reads"), b"read me");
    let said = kitfs.ok(&["unmount", text(&dir)]);
    assert!(said.contains(text(&dir)) && said.contains(&kit.digest.to_string()), "{said}");
    assert!(!dir.exists(), "gone when the command returns");
    assert_left(&kitfs, &dir, daemon);
}

#[test]
fn without_a_directory_it_is_the_repositorys_last_part() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    let run = |arguments: &[&str]| {
        let output = kitfs.command(arguments).current_dir(kitfs.path("")).output().expect("kitfs runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    run(&["mount", &kit.reference]);
    assert_eq!(fs::read(kitfs.path("kit/README.md")).expect("reads"), b"read me");
    run(&["umount", "kit"]);
    assert!(!kitfs.path("kit").exists());
}

#[test]
fn an_empty_directory_stays() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    fs::create_dir(kitfs.path("mnt")).expect("mkdir");
    let (dir, _) = mounted(&kitfs, &kit, "mnt");
    kitfs.ok(&["unmount", text(&dir)]);
    assert!(dir.is_dir() && !is_mounted(&dir));
    assert_eq!(fs::read_dir(&dir).expect("lists").count(), 0);
}

#[test]
fn a_place_that_is_not_fit_is_refused_and_left_as_it_is() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    let (full, file) = (kitfs.path("full"), kitfs.path("file"));
    fs::create_dir(&full).expect("mkdir");
    fs::write(full.join("mine"), "x").expect("writes");
    fs::write(&file, "x").expect("writes");
    let orphan = kitfs.path("no/parent");
    for (dir, says) in [(&full, "not empty"), (&file, "not a directory"), (&orphan, "mkdir -p")] {
        let said = kitfs.fails(&["mount", &kit.reference, text(dir)]);
        assert!(said.contains(says) && said.contains(text(dir)), "{said}");
        assert!(!is_mounted(dir));
    }
    assert_eq!(fs::read(full.join("mine")).expect("still there"), b"x");
    assert_eq!(fs::read(&file).expect("still there"), b"x");
    assert_eq!(server.requests().len(), 0, "it is refused before anything is asked");
    assert_eq!(records(&kitfs), Vec::<PathBuf>::new());
}

#[test]
fn a_second_mount_on_one_directory_is_refused_and_told_what_is_there() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    let mount = kitfs.mount(&kit.reference, &[]);
    let said = kitfs.fails(&["mount", &kit.reference, text(&mount.dir)]);
    assert!(said.contains(&kit.digest.to_string()) && said.contains("kitfs unmount"), "{said}");
    assert_eq!(mounted_on(&mount.dir), ["fuse.kitfs"]);
    assert_eq!(fs::read(mount.path("README.md")).expect("reads"), b"read me");
}

#[test]
fn of_two_mounts_that_are_made_at_once_on_one_directory_the_second_is_refused() {
    let (slow, fast) = (FaultServer::empty("team/slow"), FaultServer::empty("team/fast"));
    let (slow_kit, fast_kit, kitfs) = (kit(&slow), kit(&fast), Kitfs::new());
    let dir = kitfs.path("mnt");
    let gate = slow.hold("v1", 0);
    let first = kitfs.command(["mount", &slow_kit.reference, text(&dir)]).spawn().expect("kitfs runs");
    gate.wait_until_reached_by(1);
    let said = kitfs.fails(&["mount", &fast_kit.reference, text(&dir)]);
    assert!(said.contains("about to mount"), "{said}");
    gate.release();
    assert!(first.wait_with_output().expect("ends").status.success());
    assert_eq!(mounted_on(&dir), ["fuse.kitfs"]);
    assert!(kitfs.ok(&["mount"]).contains("team/slow"));
    assert_eq!(fs::read(dir.join("README.md")).expect("reads"), b"read me");
    kitfs.ok(&["unmount", text(&dir)]);
    assert!(!is_mounted(&dir));
}

#[test]
fn names_with_spaces_commas_and_backslashes_are_no_obstacle() {
    let kitfs = Kitfs::new();
    let (layout, dir) = (kitfs.path("a kit, with\\ odd"), kitfs.path("mnt,\twith\n odd\\040"));
    let copied = Command::new("cp").arg("-r").arg(support::data("layouts/docs-only")).arg(&layout).status();
    assert!(copied.expect("cp").success());
    let index = fs::read_to_string(layout.join("index.json")).expect("index");
    let index: Value = serde_json::from_str(&index).expect("JSON");
    let tag = index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"].as_str().expect("a tag");
    let reference = format!("oci:{}:{tag}", layout.display());
    kitfs.ok(&["mount", &reference, text(&dir)]);
    assert!(fs::read_dir(&dir).expect("lists").count() > 0);
    let found = status(&kitfs).remove(0);
    assert_eq!((found["mountpoint"].as_str(), found["condition"].as_str()), (Some(text(&dir)), Some("live")));
    kitfs.ok(&["unmount", text(&dir)]);
    assert!(!dir.exists());
}

#[test]
fn a_mount_that_fails_leaves_nothing() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    let missing = server.reference("nowhere");
    // Other bytes than those of the digest that is stated, by tag and by digest.
    server.fault("v1", Fault::Header("Docker-Content-Digest", kit.digest.to_string()));
    server.fault("v1", Fault::Replace(b"{}".to_vec()));
    server.fault(kit.digest, Fault::Replace(b"{}".to_vec()));
    for reference in [kit.reference.as_str(), missing.as_str(), "127.0.0.1:1/team/kit:v1", "oci:/nowhere:v1"] {
        let dir = kitfs.path("mnt");
        let said = kitfs.fails(&["mount", reference, text(&dir), "--meta-timeout", "5s"]);
        assert!(said.starts_with("error"), "{said}");
        assert!(!dir.exists() && !is_mounted(&dir), "{reference}");
        assert_eq!(records(&kitfs), Vec::<PathBuf>::new(), "{reference}");
    }
    fs::create_dir(kitfs.path("mine")).expect("mkdir");
    kitfs.fails(&["mount", &missing, text(&kitfs.path("mine"))]);
    assert!(kitfs.path("mine").is_dir(), "a directory that was there stays");
}

#[test]
fn a_mount_that_is_interrupted_before_it_is_ready_leaves_nothing() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    server.fault("v1", Fault::Silence);
    for signal in [Signal::INT, Signal::TERM, Signal::KILL] {
        for foreground in [false, true] {
            if foreground && signal == Signal::KILL {
                continue; // A killed process cleans nothing up.
            }
            server.reset_counters();
            let dir = kitfs.path("mnt");
            let mut arguments = vec!["mount", &kit.reference, text(&dir)];
            arguments.extend(foreground.then_some("--foreground"));
            let mut command =
                kitfs.command(arguments).stderr(Stdio::null()).stdout(Stdio::null()).spawn().expect("kitfs runs");
            eventually("it asks for the manifest", || server.requests_for("v1") > 0);
            assert!(dir.exists());
            let pid = Pid::from_child(&command);
            rustix::process::kill_process(pid, signal).expect("kill");
            assert!(!command.wait().expect("ends").success());
            eventually("the directory goes", || !dir.exists());
            assert!(!is_mounted(&dir));
            assert_eq!(records(&kitfs), Vec::<PathBuf>::new(), "{signal:?}, foreground: {foreground}");
        }
    }
}

#[test]
fn mount_alone_and_status_list_what_is_mounted() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    assert_eq!(status(&kitfs), Vec::<Value>::new());
    let nothing = kitfs.run(&["mount"]);
    assert!(nothing.status.success() && nothing.stdout.is_empty());
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("nothing is mounted"));

    let mounts: Vec<Mount<'_>> = (0..2).map(|_| kitfs.mount(&kit.reference, &[])).collect();
    let listed = kitfs.ok(&["mount"]);
    assert_eq!(listed.lines().count(), 2, "{listed}");
    for (mount, line) in mounts.iter().zip(listed.lines()) {
        let all = [text(&mount.dir), &kit.digest.to_string(), "live"];
        assert!(all.iter().all(|part| line.contains(part)), "{line}");
    }
    let told = kitfs.ok(&["status", text(&mounts[1].dir)]);
    assert!(told.contains(text(&mounts[1].dir)) && !told.contains(text(&mounts[0].dir)), "{told}");
    assert!(told.contains("README.md") && told.contains("not fetched"), "{told}");
    let said = kitfs.fails(&["status", text(&kitfs.path("elsewhere"))]);
    assert!(said.contains("nothing is mounted"), "{said}");
}

#[test]
fn the_status_in_json_has_all_facts() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    let mount = kitfs.mount(&kit.reference, &[]);
    let cold = status(&kitfs).remove(0);
    assert_eq!(cold["mountpoint"], text(&mount.dir));
    assert_eq!(cold["reference"], format!("{}/team/kit@{}", server.host(), kit.digest));
    assert_eq!(cold["asked"], kit.reference);
    assert_eq!(cold["digest"], kit.digest.to_string());
    assert_eq!(cold["condition"], "live");
    assert_eq!(cold["verify"], "strict");
    assert_eq!(cold["trust"], "provisional");
    assert_eq!(cold["cache"], text(&kitfs.cache()));
    assert!(Path::new(cold["log"].as_str().expect("a log")).is_file());
    for key in ["pid", "since", "bytes", "kits", "conflicts", "notes", "warnings"] {
        assert!(!cold[key].is_null(), "{key} in {cold}");
    }
    let layer = &cold["layers"][0];
    assert_eq!(layer["digest"], kit.layers[0].to_string());
    assert_eq!((layer["path"].as_str(), layer["type"].as_str()), (Some("README.md"), Some("docs")));
    assert!(layer["cached"].is_null() && layer["poisoned"].is_null() && layer["filling"].is_null(), "{layer}");

    fs::read(mount.path("README.md")).expect("reads");
    eventually("it is cached", || status(&kitfs)[0]["layers"][0]["cached"] == 7);
    let warm = status(&kitfs).remove(0);
    assert_eq!((&warm["trust"], &warm["layers"][0]["content"]), (&"derived".into(), &7.into()));
}

#[test]
fn in_the_foreground_it_serves_until_a_signal_or_an_unmount() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    for end in [Some(Signal::INT), Some(Signal::TERM), None] {
        let dir = kitfs.path("mnt");
        let mut serving = kitfs
            .command(["mount", "--foreground", &kit.reference, text(&dir)])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("kitfs runs");
        let pid = Pid::from_child(&serving);
        let mut said = BufReader::new(serving.stdout.take().expect("piped"));
        let mut line = String::new();
        said.read_line(&mut line).expect("it says what is mounted");
        assert!(line.contains(&kit.digest.to_string()), "{line}");
        assert_eq!(fs::read(dir.join("README.md")).expect("reads"), b"read me");
        let found = status(&kitfs).remove(0);
        assert_eq!(found["pid"], pid.as_raw_nonzero().get());
        assert!(found["log"].is_null(), "it logs to standard error");
        match end {
            Some(signal) => rustix::process::kill_process(pid, signal).expect("kill"),
            None => drop(kitfs.ok(&["unmount", text(&dir)])),
        }
        assert!(serving.wait().expect("ends").success(), "leaving is no failure: {end:?}");
        assert_left(&kitfs, &dir, pid);
    }
}

#[test]
fn under_sudo_each_command_says_once_whose_cache_and_credentials_it_uses() {
    if !rustix::process::geteuid().is_root() {
        // The note is root's: nobody else is under sudo in this sense.
        return;
    }
    let kitfs = Kitfs::new();
    let layout = format!("oci:{}:1.2", support::data("layouts/tiny-llm").display());
    let cache = kitfs.cache();
    let dir = kitfs.path("mnt");
    let dir = dir.to_str().expect("UTF-8");
    let commands: [&[&str]; 4] =
        [&["ls", &layout], &["resolve", &layout], &["inspect", &layout], &["mount", &layout, dir]];
    for arguments in commands {
        let output = kitfs.command(arguments).env("SUDO_USER", "alice").output().expect("runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}");
        assert_eq!(said.matches("under sudo").count(), 1, "{arguments:?}: {said}");
        assert!(said.contains("not alice") && said.contains(cache.to_str().expect("UTF-8")), "{said}");
        let output = kitfs.command(arguments).env("SUDO_USER", "root").output().expect("runs");
        assert!(!String::from_utf8_lossy(&output.stderr).contains("under sudo"));
    }
    kitfs.ok(&["unmount", dir]);
    assert!(!kitfs.logs().contains("under sudo"), "the daemon says it too");
}
