//! What was served and when, and which tags were moved: an append-only record, for whoever must say a year later what ran.
//!
//! One line of JSON an event, in files below `history/` of the state directory, and a copy to journald where it runs.
//!
//! - [`files`]: how lines get to the disk, and stay there for as long as they are kept.
//! - [`served`]: from the events to which kit a mount served from when to when; [`period`]: what `--at` asks for.
//! - [`journal`]: the copy; [`secrets`]: what is struck out before anything is written.
//!
//! Invariants: an event is on the disk when [`History::append`] returns, whatever is killed afterwards; lines of several
//! processes do not mix; what can't be read (the torn last line of a crash, a newer version's event) is passed over and
//! stays; nothing is ever changed, and goes only with a file in which all is older than is to be kept; no event holds a
//! secret.

mod files;
mod journal;
mod period;
mod secrets;
pub mod served;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use period::{InvalidMoment, Period};

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
    /// A mount has ended. An outcome that is not [`Outcome::Done`] says that it had ended before, unseen: its daemon had died.
    Unmount,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Mount => "mount",
            Self::Switch => "switch",
            Self::Rollback => "rollback",
            Self::Tag => "tag",
            Self::Unmount => "unmount",
        })
    }
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
    /// What is served, or what the tag points at, from then on, or would be if it had not failed, where that is known; of an
    /// unmount, what was served last.
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
            host: host(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            labels: BTreeMap::new(),
        }
    }
}

/// In one line, for people.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.action, self.reference)?;
        match (&self.from, &self.digest) {
            (Some(from), Some(digest)) => write!(f, ", {from} to {digest}")?,
            (None, Some(digest)) => write!(f, ", {digest}")?,
            (_, None) => {}
        }
        if let Some(dir) = &self.mount_point {
            write!(f, ", on {}", dir.display())?;
        }
        write!(f, ", by {}", self.user)?;
        match &self.outcome {
            Outcome::Done => Ok(()),
            Outcome::Failed(why) => write!(f, ": {why}"),
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
    keep: Option<Duration>,
    journal: PathBuf,
}

impl History {
    /// The record in the state directory at `state`. All is kept: who does not know how long it should be removes nothing.
    pub fn at(state: &Path) -> Self {
        Self { dir: state.join("history"), keep: None, journal: PathBuf::from(journal::SOCKET) }
    }

    /// The same, where events are kept for so long.
    pub fn keeping(self, keep: Duration) -> Self {
        Self { keep: Some(keep), ..self }
    }

    /// The same with another journal.
    pub fn with_journal(self, socket: impl Into<PathBuf>) -> Self {
        Self { journal: socket.into(), ..self }
    }

    /// Adds an event. It is on the disk when this returns. Waits for the disk, and for others who append, so that it does not
    /// belong on a thread that must not wait.
    pub fn append(&self, event: &Event) -> Result<(), HistoryError> {
        let event = secrets::struck_out(event);
        // Where the disk is full, the journal may still take it.
        journal::send(&self.journal, &event);
        files::append(&self.dir, self.keep, &event)
    }

    /// All events, oldest first. What is no event is passed over.
    pub fn read(&self) -> Result<Vec<Event>, HistoryError> {
        let mut events = files::read(&self.dir)?;
        events.sort_by_key(|event| event.time);
        // What was carried over from a file that goes is there twice until that file has gone.
        events.dedup();
        Ok(events)
    }
}

/// The name of this machine, as events have it.
pub fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
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
mod tests;
