//! What was served and when, and which tags were moved: an append-only record, for whoever must say a year later what ran.
//!
//! One line of JSON an event, in files below `history/` of the state directory. Invariants: a line is written with one call
//! under a lock, so that lines of several processes do not mix; what can't be read (the torn last line of a crash, a newer
//! version's event) is passed over and never lost; nothing is ever changed; no event holds a secret.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// A kit was mounted.
    Mount,
    /// A mount moved to another kit.
    Switch,
    /// A mount moved back to a kit that it had served.
    Rollback,
    /// A tag was made or moved.
    Tag,
    /// A mount has ended.
    Unmount,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It was done.
    Done,
    /// It was not, and why.
    Failed(String),
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When.
    pub time: Timestamp,
    /// What.
    pub action: Action,
    /// What came of it.
    pub outcome: Outcome,
    /// The reference as it was typed; of a tag, the tag that was moved, in full.
    pub reference: String,
    /// What is served, or what the tag points at, from then on; of an unmount, what was served last.
    pub digest: Option<Digest>,
    /// What was served, or what the tag pointed at, before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Digest>,
    /// Where it is mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount_point: Option<PathBuf>,
    /// The mount's number: the same in all its events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount: Option<String>,
    /// How far the content is proved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<String>,
    /// The kit's `org.opencontainers.image.revision`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Who did it.
    pub user: String,
    /// On which machine.
    pub host: String,
    /// With which kitfs.
    pub version: String,
    /// What `mount --label` said.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

impl Event {
    /// An event of now, by this user, on this machine, that was done; the rest is to be filled in.
    pub fn now(action: Action, reference: impl Into<String>) -> Self {
        Self {
            time: Timestamp::now(),
            action,
            outcome: Outcome::Done,
            reference: reference.into(),
            digest: None,
            from: None,
            mount_point: None,
            mount: None,
            trust: None,
            revision: None,
            user: user(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            labels: BTreeMap::new(),
        }
    }
}

/// The record could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("the history {} can't be {action}", path.display())]
pub struct HistoryError {
    /// What was tried.
    pub action: &'static str,
    /// The file or directory.
    pub path: PathBuf,
    /// The system's error.
    #[source]
    pub cause: io::Error,
}

/// The record of one user.
#[derive(Debug, Clone)]
pub struct History {
    dir: PathBuf,
}

/// Where events go.
const FILE: &str = "events.jsonl";

impl History {
    /// The record in the state directory at `state`.
    pub fn at(state: &Path) -> Self {
        Self { dir: state.join("history") }
    }

    /// Adds an event. It is on the disk when this returns.
    pub fn append(&self, event: &Event) -> Result<(), HistoryError> {
        let path = self.dir.join(FILE);
        let failed = |cause| HistoryError { action: "written", path: path.clone(), cause };
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir).map_err(failed)?;
        let mut options = OpenOptions::new();
        let mut file = options.create(true).append(true).mode(0o600).open(&path).map_err(failed)?;
        let mut line = serde_json::to_vec(event).map_err(|error| failed(error.into()))?;
        line.push(b'\n');
        flock(&file, FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;
        file.write_all(&line).and_then(|()| file.sync_data()).map_err(failed)
    }

    /// All events, oldest first. What is no event is passed over.
    pub fn read(&self) -> Result<Vec<Event>, HistoryError> {
        let path = self.dir.join(FILE);
        match fs::read(&path) {
            Ok(bytes) => Ok(bytes.split(|byte| *byte == b'\n').filter_map(event).collect()),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(cause) => Err(HistoryError { action: "read", path, cause }),
        }
    }
}

fn event(line: &[u8]) -> Option<Event> {
    serde_json::from_slice(line).ok()
}

/// The name of the user, else the number.
fn user() -> String {
    let number = rustix::process::getuid().as_raw();
    let line = |line: &str| {
        let mut fields = line.split(':');
        let (name, id) = (fields.next()?, fields.nth(1)?);
        (id.parse() == Ok(number)).then(|| name.to_owned())
    };
    let known = fs::read_to_string("/etc/passwd").unwrap_or_default();
    known.lines().find_map(line).unwrap_or_else(|| number.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_appended_is_read_in_order_and_a_torn_line_is_passed_over() {
        let dir = tempfile::tempdir().expect("a directory");
        let history = History::at(dir.path());
        assert_eq!(history.read().expect("none yet"), []);
        let events: Vec<_> = (0..3).map(|number| Event::now(Action::Mount, format!("r.io/a:{number}"))).collect();
        history.append(&events[0]).expect("appended");
        let mut file = OpenOptions::new().append(true).open(dir.path().join("history").join(FILE)).expect("opens");
        file.write_all(b"{\"time\":\"20\n").expect("torn");
        history.append(&events[1]).expect("appended");
        history.append(&events[2]).expect("appended");
        assert_eq!(history.read().expect("read"), events);
    }
}
