//! What kitfs remembers of its mounts, so that `status`, `unmount` and the next mount find them.
//!
//! ```text
//! $KITFS_STATE_DIR, else $XDG_STATE_HOME/kitfs, else ~/.local/state/kitfs      (0700)
//!   mounts/<id>.json    the record of one mount; there while the mount is ready to be used
//!   mounts/<id>.sock    the control socket of its daemon
//!   logs/<id>.log       what the daemon logs; the newest are kept
//! ```
//!
//! Invariants:
//! - A record appears, by a rename, after the mount and the socket, and goes after them: so a record with neither a
//!   living daemon nor a mount belongs to nobody, and is removed by whoever sees it.
//! - Alive means: somebody accepts on the socket, or the process that was recorded still runs (its id and start time).
//!   Mounted means: the table of mounts shows the very entry that was recorded.

use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::mountinfo::{self, Entry};
use super::{MountError, control};
use crate::digest::Digest;

/// Logs of daemons that are kept; enough to look into yesterday's failure, too few to fill a disk.
const LOGS: usize = 32;

/// The state directory.
#[derive(Debug, Clone)]
pub struct StateDir {
    root: PathBuf,
}

/// What is remembered of one mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The name of the mount's files here.
    pub id: String,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// The reference as it was typed.
    pub reference: String,
    /// The manifest's digest.
    pub digest: Digest,
    /// What `/proc/mounts` shows as its source: the kit that was mounted first.
    pub shows: String,
    /// The kit that is served now, with its digest, where that is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serves: Option<String>,
    /// The daemon's process.
    pub pid: u32,
    /// When that process started, in clock ticks since the boot: process ids are reused.
    pub pid_started: u64,
    /// The kernel's number of the mount.
    pub mount_id: u64,
    /// The mount's device.
    pub device: (u32, u32),
    /// When it was mounted, in seconds since the epoch.
    pub started_at: u64,
    /// Where the daemon logs; none in the foreground.
    pub log_file: Option<PathBuf>,
    /// The cache it fills.
    pub cache_dir: Option<PathBuf>,
    /// Whether the mount point was made for it.
    pub created_dir: bool,
}

impl Record {
    /// The kit that is served, with its digest.
    pub fn serves(&self) -> &str {
        self.serves.as_deref().unwrap_or(&self.shows)
    }

    /// Whether `entry` is the mount that was recorded.
    fn is(&self, entry: &Entry) -> bool {
        entry.is_kitfs()
            && (entry.id, entry.device) == (self.mount_id, self.device)
            && entry.dir == self.mount_point
            && entry.shows == self.shows
    }
}

/// The state of a recorded mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Condition {
    /// Mounted and served.
    Live,
    /// Mounted, but its daemon has died: every access fails with ENOTCONN until it is unmounted.
    Dead,
    /// No longer mounted (here); its daemon serves what is still open, or is about to leave.
    Detached,
}

/// A recorded mount and how it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mount {
    /// What was recorded.
    #[serde(flatten)]
    pub record: Record,
    /// How it is.
    pub condition: Condition,
}

impl StateDir {
    /// The state directory of this user, made if it is missing.
    pub fn from_env() -> Result<Self, MountError> {
        let root = root_from(|name| std::env::var_os(name)).ok_or(MountError::NoStateDir)?;
        Self::at(std::path::absolute(&root).map_err(|cause| MountError::disk("find", root, cause))?)
    }

    /// A state directory at `root`, made if it is missing.
    pub fn at(root: PathBuf) -> Result<Self, MountError> {
        for dir in [root.join("mounts"), root.join("logs")] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&dir)
                .map_err(|cause| MountError::disk("create", dir, cause))?;
        }
        Ok(Self { root })
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Changes what is recorded of a mount that is there.
    pub fn rewrite(&self, record: &Record) -> Result<(), MountError> {
        let path = self.file(&record.id, "json");
        // One that has ended meanwhile stays forgotten.
        if !path.exists() {
            return Ok(());
        }
        write_record(&path, record).map_err(|cause| MountError::disk("write", path, cause))
    }

    /// All mounts that are recorded, by mount point. Records of mounts that are no more are removed.
    pub fn list(&self) -> Result<Vec<Mount>, MountError> {
        let dir = self.root.join("mounts");
        // Records first: a mount that is made while this runs is then in the table that is read after.
        let records: Vec<Record> = fs::read_dir(&dir)
            .map_err(|cause| MountError::disk("read", dir, cause))?
            .flatten()
            .filter(|file| file.path().extension().is_some_and(|extension| extension == "json"))
            .filter_map(|file| read_record(&file.path()))
            .collect();
        let table = mountinfo::read()?;
        let mut mounts = Vec::new();
        for record in records {
            let mounted = table.iter().any(|entry| record.is(entry));
            match condition(self.is_alive(&record), mounted) {
                Some(condition) => mounts.push(Mount { record, condition }),
                None => self.forget(&record),
            }
        }
        mounts.sort_by(|a, b| a.record.mount_point.cmp(&b.record.mount_point));
        Ok(mounts)
    }

    /// What is recorded of `entry`.
    pub fn find(&self, entry: &Entry) -> Result<Option<Mount>, MountError> {
        Ok(self.list()?.into_iter().find(|mount| mount.record.is(entry)))
    }

    /// The control socket of a mount.
    pub fn socket(&self, record: &Record) -> PathBuf {
        self.file(&record.id, "sock")
    }

    /// A new log file for a daemon that is about to start; the oldest logs of daemons that are gone are removed.
    pub fn new_log(&self) -> Result<PathBuf, MountError> {
        let in_use: Vec<PathBuf> = self.list()?.into_iter().filter_map(|mount| mount.record.log_file).collect();
        let dir = self.root.join("logs");
        let mut logs: Vec<(SystemTime, PathBuf)> = fs::read_dir(&dir)
            .map_err(|cause| MountError::disk("read", &dir, cause))?
            .flatten()
            .filter_map(|file| Some((file.metadata().ok()?.modified().ok()?, file.path())))
            .filter(|(_, path)| !in_use.contains(path))
            .collect();
        logs.sort();
        let surplus = (logs.len() + 1).saturating_sub(LOGS);
        for (_, path) in logs.into_iter().take(surplus) {
            // Somebody else may have removed it.
            let _ = fs::remove_file(path);
        }
        Ok(dir.join(format!("{}.log", new_id())))
    }

    fn file(&self, id: &str, extension: &str) -> PathBuf {
        self.root.join("mounts").join(format!("{id}.{extension}"))
    }

    /// Removes what is recorded of a mount.
    pub(super) fn forget(&self, record: &Record) {
        // The record last: who waits for it to go finds everything done, and a crash in between leaves it to be cleared.
        for extension in ["sock", "json"] {
            // Gone is what it should be.
            let _ = fs::remove_file(self.file(&record.id, extension));
        }
    }

    /// Records a mount. It is forgotten when the result is dropped.
    pub(super) fn register(&self, record: &Record) -> Result<Registration, MountError> {
        let socket = self.socket(record);
        let listener = control::bind(&socket).map_err(|cause| MountError::disk("listen on", socket, cause))?;
        // From here on dropping it cleans up.
        let registration =
            Registration { state: self.clone(), record: record.clone(), listener: Some(listener), kept: false };
        let path = self.file(&record.id, "json");
        write_record(&path, record).map_err(|cause| MountError::disk("write", path, cause))?;
        Ok(registration)
    }

    fn is_alive(&self, record: &Record) -> bool {
        control::is_served(&self.socket(record)) || process_started(record.pid) == Some(record.pid_started)
    }
}

/// A mount's place in the state directory.
#[derive(Debug)]
pub(super) struct Registration {
    state: StateDir,
    record: Record,
    listener: Option<std::os::unix::net::UnixListener>,
    kept: bool,
}

impl Registration {
    /// The control socket, once.
    pub(super) fn take_listener(&mut self) -> Option<std::os::unix::net::UnixListener> {
        self.listener.take()
    }

    /// Leaves the record, for a mount that stays behind dead: so the next mount or unmount knows whose it was.
    pub(super) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if !self.kept {
            self.state.forget(&self.record);
        }
    }
}

fn root_from(lookup: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name| lookup(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("KITFS_STATE_DIR")
        // The XDG specification says to ignore relative paths.
        .or_else(|| set("XDG_STATE_HOME").filter(|path| path.is_absolute()).map(|path| path.join("kitfs")))
        .or_else(|| set("HOME").map(|home| home.join(".local/state/kitfs")))
}

fn condition(alive: bool, mounted: bool) -> Option<Condition> {
    match (alive, mounted) {
        (true, true) => Some(Condition::Live),
        (false, true) => Some(Condition::Dead),
        (true, false) => Some(Condition::Detached),
        (false, false) => None,
    }
}

/// A name that no other mount has: random enough across the processes and namespaces that share the directory.
pub(super) fn new_id() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let pid = std::process::id();
    Digest::of(format!("{pid} {:?} {now}", process_started(pid)).as_bytes()).short()
}

/// When a process started, in clock ticks since the boot; `None` if it has ended, also where nobody has reaped it yet.
pub(super) fn process_started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_started(&stat)
}

fn parse_started(stat: &str) -> Option<u64> {
    // The second field is the name in parentheses, which may hold anything; the state is the third field and the start
    // time the 22nd.
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace();
    match fields.next()? {
        "Z" | "X" => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}

fn read_record(path: &Path) -> Option<Record> {
    match read_regular(path).map(|text| serde_json::from_slice::<Record>(&text)) {
        // The name decides which files a record speaks for.
        Ok(Ok(record)) if path.file_stem().is_some_and(|stem| *stem == *record.id) => Some(record),
        Ok(outcome) => {
            let reason = outcome.err().map_or_else(|| "its id is not its name".to_owned(), |error| error.to_string());
            tracing::warn!(path = %path.display(), reason, "ignoring a record that kitfs cannot read");
            None
        }
        // It went in this moment.
        Err(_) => None,
    }
}

/// The bytes of a file. A pipe in its place would make us wait for its other end, and a link may lead to what never ends.
fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let mut file = fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn write_record(path: &Path, record: &Record) -> io::Result<()> {
    let draft = path.with_extension("new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
    file.write_all(&serde_json::to_vec_pretty(record)?)?;
    fs::rename(draft, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn record(id: &str, dir: &str) -> Record {
        Record {
            id: id.to_owned(),
            mount_point: PathBuf::from(dir),
            reference: "registry.example/a:1".to_owned(),
            digest: Digest::of(b"kit"),
            shows: "registry.example/a:1@sha256:00".to_owned(),
            serves: None,
            pid: u32::MAX,
            pid_started: 1,
            mount_id: u64::MAX,
            device: (0, 0),
            started_at: 0,
            log_file: None,
            cache_dir: None,
            created_dir: false,
        }
    }

    fn state() -> (tempfile::TempDir, StateDir) {
        let temp = tempfile::tempdir().expect("dir");
        let state = StateDir::at(temp.path().join("state")).expect("state");
        (temp, state)
    }

    #[test]
    fn what_lies_in_the_place_of_a_record_and_is_no_file_is_passed_over() {
        let dir = tempfile::tempdir().expect("a directory");
        let (pipe, link) = (dir.path().join("a.json"), dir.path().join("b.json"));
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).expect("a pipe");
        std::os::unix::fs::symlink("/dev/zero", &link).expect("linked");
        for path in [&pipe, &link] {
            assert!(read_record(path).is_none(), "{}", path.display());
        }
        write_record(&dir.path().join("c.json"), &record("c", "/mnt/c")).expect("written");
        assert!(read_record(&dir.path().join("c.json")).is_some());
    }

    #[test]
    fn the_variables_are_asked_in_order() {
        let with = |set: &[(&str, &str)]| {
            let set: Vec<(String, OsString)> = set.iter().map(|(k, v)| ((*k).to_owned(), OsString::from(v))).collect();
            root_from(|name| set.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()))
        };
        let (kitfs, xdg, home) = (("KITFS_STATE_DIR", "/k"), ("XDG_STATE_HOME", "/x"), ("HOME", "/h"));
        assert_eq!(with(&[home, xdg, kitfs]), Some(PathBuf::from("/k")));
        assert_eq!(with(&[home, xdg]), Some(PathBuf::from("/x/kitfs")));
        assert_eq!(with(&[home, ("XDG_STATE_HOME", "x")]), Some(PathBuf::from("/h/.local/state/kitfs")));
        assert_eq!(with(&[("HOME", "")]), None);
    }

    #[test]
    fn the_directory_and_its_files_are_private() {
        let (_temp, state) = state();
        let kept = record("a", "/a");
        let _registration = state.register(&kept).expect("register");
        let mode = |path: &Path| fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
        assert_eq!(mode(&state.root), 0o700);
        assert_eq!(mode(&state.file("a", "json")), 0o600);
        assert_eq!(mode(&state.socket(&kept)), 0o600);
    }

    #[test]
    fn a_registered_mount_is_listed_until_it_is_dropped() {
        let (_temp, state) = state();
        let registration = state.register(&record("a", "/a")).expect("register");
        let listed = state.list().expect("list");
        // Served, but in no table of mounts.
        assert_eq!(listed.iter().map(|mount| mount.condition).collect::<Vec<_>>(), [Condition::Detached]);
        assert_eq!(listed[0].record, record("a", "/a"));
        drop(registration);
        assert_eq!(state.list().expect("list"), []);
        assert_eq!(fs::read_dir(state.root.join("mounts")).expect("read").count(), 0);
    }

    #[test]
    fn a_record_can_be_left_for_the_next_one() {
        let (_temp, state) = state();
        state.register(&record("a", "/a")).expect("register").keep();
        assert!(state.file("a", "json").is_file());
    }

    #[test]
    fn a_record_without_daemon_and_mount_is_cleared_away() {
        let (_temp, state) = state();
        let stale = record("stale", "/stale");
        write_record(&state.file("stale", "json"), &stale).expect("write");
        fs::write(state.socket(&stale), "").expect("write");
        assert_eq!(state.list().expect("list"), []);
        assert_eq!(fs::read_dir(state.root.join("mounts")).expect("read").count(), 0);
    }

    #[test]
    fn a_recorded_process_that_still_runs_keeps_its_record() {
        let (_temp, state) = state();
        let pid = std::process::id();
        let started = process_started(pid).expect("start time");
        let mut alive = record("alive", "/alive");
        (alive.pid, alive.pid_started) = (pid, started);
        write_record(&state.file("alive", "json"), &alive).expect("write");
        let mut reused = record("reused", "/reused");
        (reused.pid, reused.pid_started) = (pid, started + 1);
        write_record(&state.file("reused", "json"), &reused).expect("write");
        let ids: Vec<String> = state.list().expect("list").into_iter().map(|mount| mount.record.id).collect();
        assert_eq!(ids, ["alive"]);
    }

    #[test]
    fn a_zombie_counts_as_ended() {
        let stat = |state| format!("7 (a) b) {state} 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4711 0 0");
        assert_eq!(parse_started(&stat("S")), Some(4711));
        assert_eq!(parse_started(&stat("Z")), None);
    }

    #[test]
    fn a_mounted_record_without_a_daemon_is_dead() {
        assert_eq!(condition(false, true), Some(Condition::Dead));
        assert_eq!(condition(true, true), Some(Condition::Live));
    }

    #[test]
    fn a_file_that_is_no_record_is_left_alone() {
        let (_temp, state) = state();
        for (name, text) in [("torn", "{\"id\":"), ("other", "{}")] {
            fs::write(state.file(name, "json"), text).expect("write");
        }
        write_record(&state.file("renamed", "json"), &record("a", "/a")).expect("write");
        assert_eq!(state.list().expect("list"), []);
        assert_eq!(fs::read_dir(state.root.join("mounts")).expect("read").count(), 3);
    }

    #[test]
    fn old_logs_go_when_there_are_too_many() {
        let (_temp, state) = state();
        for number in 0..LOGS + 5 {
            fs::write(state.root.join("logs").join(format!("{number}.log")), "").expect("write");
        }
        fs::write(state.new_log().expect("log"), "").expect("write");
        assert_eq!(fs::read_dir(state.root.join("logs")).expect("read").count(), LOGS);
    }

    #[test]
    fn ids_differ() {
        assert_ne!(new_id(), new_id());
    }
}
