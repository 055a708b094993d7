//! What tests of a mount's life look at: the table of mounts, daemons, records, and what is left of them.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::Pid;
use serde_json::Value;

use super::kit::{KitBuilder, Served, tar};
use super::program::Kitfs;
use super::{FaultServer, eventually};

/// A kit of one file, `README.md`.
pub fn kit(server: &FaultServer) -> Served {
    KitBuilder::new().tar("docs", "README.md", tar(&[("README.md", b"read me")])).serve(server, "v1")
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// What is mounted on a directory, by type, lowest first.
pub fn mounted_on(dir: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/mounts").expect("the table of mounts");
    let fields = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields.filter(|fields| fields[1] == text(dir)).map(|fields| fields[2].to_owned()).collect()
}

/// Whether anything is mounted on a directory.
pub fn is_mounted(dir: &Path) -> bool {
    !mounted_on(dir).is_empty()
}

/// Whether a process runs.
pub fn runs(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    // A daemon whose starter has gone may wait as a zombie for an init that does not reap.
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

/// Records and sockets of mounts.
pub fn records(kitfs: &Kitfs) -> Vec<PathBuf> {
    let files = fs::read_dir(kitfs.path("state/mounts")).into_iter().flatten().flatten();
    files.map(|file| file.path()).collect()
}

/// The mounts as `kitfs status --json` tells them.
pub fn status(kitfs: &Kitfs) -> Vec<Value> {
    let status: Value = serde_json::from_str(&kitfs.ok(&["status", "--json"])).expect("JSON");
    status["mounts"].as_array().expect("a list").clone()
}

/// Waits until a daemon has left and nothing of its mount is there: no mount, no record, no directory.
pub fn assert_left(kitfs: &Kitfs, dir: &Path, daemon: Pid) {
    eventually("the daemon leaves", || !runs(daemon));
    assert!(!is_mounted(dir), "{:?} is left on {}", mounted_on(dir), dir.display());
    assert!(!dir.exists(), "the directory that was made for it goes with it");
    assert_eq!(records(kitfs), Vec::<PathBuf>::new());
}

/// Mounts a kit, for a test that ends the mount by itself: the directory and the daemon.
pub fn mounted(kitfs: &Kitfs, kit: &Served, name: &str) -> (PathBuf, Pid) {
    let dir = kitfs.path(name);
    kitfs.ok(&["mount", &kit.reference, text(&dir)]);
    let all = status(kitfs);
    let found = all.iter().find(|mount| mount["mountpoint"] == text(&dir)).expect("its status");
    let pid = found["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    (dir, pid.expect("a pid"))
}
