//! `kitfs history`: what was served and when, and which tags were moved.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::Failure;
use super::options::JsonArgs;
use super::output::{self, Output, printable};
use crate::digest::Digest;
use crate::history::served::{self, Span, Until};
use crate::history::{Event, History, Outcome, Period};
use crate::mount::{Condition, StateDir};
use crate::reference::{Location, Reference};
use crate::units;

/// Shows what was mounted, switched, rolled back and tagged, by this user on this machine
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs history [OPTIONS] [DIR|REPO[:TAG]|DIGEST]",
    after_help = "\
A time without a zone is this machine's; what is shown is in UTC. A mount whose daemon was killed or
whose machine went down has no recorded end: that is said, and not guessed.

Examples:
  kitfs history                                        everything, the newest last
  kitfs history /mnt/llama --since 7d
  kitfs history ghcr.io/team/llama:production          mounts of that tag, and its moves
  kitfs history --at 2026-11-01                        which digests were served on that day
  kitfs history --at 2026-11-01T14:30 /mnt/llama --json"
)]
pub(super) struct HistoryCommand {
    /// Only this mount point; this repository, or one tag of it; or this digest, or its beginning
    #[arg(value_name = "DIR|REPO[:TAG]|DIGEST", value_parser = parse_subject)]
    subject: Option<Subject>,
    /// Only what is younger than this (7d), or happened since that day or instant
    #[arg(long, value_name = "DURATION|TIME", value_parser = parse_since, conflicts_with = "at")]
    since: Option<Since>,
    /// Only mounts with this label; may be repeated, then all must be there
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_label)]
    label: Vec<(String, String)>,
    /// Which digests were served then: on a day (2026-11-01), or at an instant (2026-11-01T14:30, 2026-11-01T13:30:00Z)
    #[arg(long, value_name = "TIME", value_parser = Period::parse)]
    at: Option<Period>,
    #[command(flatten)]
    record: HistoryArgs,
    #[command(flatten)]
    json: JsonArgs,
}

/// The record, for commands that read it or write to it.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "History")]
pub(super) struct HistoryArgs {
    /// How long events are kept
    #[arg(long, env = "KITFS_HISTORY_KEEP", value_name = "DURATION", default_value = "400d",
        value_parser = units::parse_duration)]
    history_keep: Duration,
}

impl HistoryArgs {
    /// The record of this user.
    pub(super) fn history(&self, state: &StateDir) -> History {
        History::at(state.root()).keeping(self.history_keep)
    }
}

/// What the events should be about.
#[derive(Debug, Clone)]
enum Subject {
    /// A digest, or its beginning.
    Digest(String),
    /// A text that may be either: `llama` is a directory here, and a repository in kit's storage.
    Named { dir: PathBuf, reference: Option<Reference> },
}

#[derive(Debug, Clone, Copy)]
enum Since {
    Age(Duration),
    Time(Timestamp),
}

impl HistoryCommand {
    pub(super) fn run(self) -> Result<(), Failure> {
        let state = StateDir::from_env()?;
        let events = self.record.history(&state).read()?;
        let begins = events.first().map(|event| event.time);
        let mut out = Output::new();
        match self.at {
            Some(period) => self.served(&mut out, &state, &events, period)?,
            None => self.events(&mut out, events)?,
        }
        out.finish()?;
        self.say_where_it_begins(begins);
        Ok(())
    }

    /// A question that goes further back than the record gets an answer that is not whole.
    fn say_where_it_begins(&self, begins: Option<Timestamp>) {
        let asked = self.since.map(Since::time).or(self.at.map(|period| period.first));
        let keep = units::format_duration(self.record.history_keep);
        match (begins, asked) {
            (None, _) => output::say("note", "nothing is recorded yet"),
            (Some(begins), Some(asked)) if asked < begins => {
                output::say("note", format!("the record begins at {}; events are kept for {keep}", time(begins)));
            }
            _ => {}
        }
    }

    fn events(&self, out: &mut Output, mut events: Vec<Event>) -> Result<(), Failure> {
        let since = self.since.map(Since::time);
        let are_some = !events.is_empty();
        events.retain(|event| {
            since.is_none_or(|since| event.time >= since) && self.is_about(event) && self.has_labels(&event.labels)
        });
        if self.json.json {
            return out.json(&json!({ "events": events }));
        }
        if are_some && events.is_empty() {
            output::say("note", "no event is about that, as far as is recorded");
        }
        out.table(&events.iter().map(row).collect::<Vec<_>>())
    }

    fn served(&self, out: &mut Output, state: &StateDir, events: &[Event], period: Period) -> Result<(), Failure> {
        if period.first > Timestamp::now() {
            return Err(Failure::usage(format!("--at: {} is yet to come", time(period.first))));
        }
        let mut spans = served::spans(events);
        spans.retain(|span| span.overlaps(&period) && self.is_about_span(span) && self.has_labels(&span.labels));
        let live = Live::look(state)?;
        if self.json.json {
            let served = spans.iter().map(|span| span_as_json(span, &live));
            let (from, to) = (period.first, period.last);
            return out.json(&json!({ "from": from, "to": to, "served": served.collect::<Vec<_>>() }));
        }
        if spans.is_empty() {
            let (first, last) = (time(period.first), time(period.last));
            let when = if period.is_instant() { format!("at {first}") } else { format!("from {first} to {last}") };
            output::say("note", format!("nothing was served {when}, as far as is recorded"));
        }
        out.table(&spans.iter().map(|span| span_row(span, &live)).collect::<Vec<_>>())
    }

    fn is_about(&self, event: &Event) -> bool {
        match &self.subject {
            None => true,
            Some(Subject::Digest(beginning)) => {
                [event.digest, event.from].into_iter().flatten().any(|digest| begins(&digest, beginning))
            }
            Some(named) => named.names(event, event.digest),
        }
    }

    fn is_about_span(&self, span: &Span) -> bool {
        match &self.subject {
            None => true,
            Some(Subject::Digest(beginning)) => begins(&span.digest, beginning),
            Some(named) => named.names(&span.event, Some(span.digest)),
        }
    }

    fn has_labels(&self, labels: &BTreeMap<String, String>) -> bool {
        self.label.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

impl Subject {
    /// Whether an event with that digest is of the directory or the reference.
    fn names(&self, event: &Event, digest: Option<Digest>) -> bool {
        let Self::Named { dir, reference } = self else { return false };
        if event.mount_point.as_ref() == Some(dir) {
            return true;
        }
        let (Some(wanted), Ok(found)) = (reference, event.reference.parse::<Reference>()) else { return false };
        // A digest without a tag is of no tag, also not of latest.
        let tag = Some(found.tag()).filter(|_| found.tag.is_some() || found.digest.is_none());
        place(&wanted.location) == place(&found.location)
            && (wanted.tag.is_none() || wanted.tag.as_deref() == tag)
            && wanted.digest.is_none_or(|wanted| digest == Some(wanted))
    }
}

fn begins(digest: &Digest, beginning: &str) -> bool {
    digest.to_string().starts_with(beginning)
}

/// A location that compares equal from wherever it was named.
fn place(location: &Location) -> Location {
    match location {
        Location::Layout { dir } => {
            let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.clone());
            Location::Layout { dir: dir.canonicalize().unwrap_or(dir) }
        }
        other => other.clone(),
    }
}

impl Since {
    fn time(self) -> Timestamp {
        match self {
            Self::Time(time) => time,
            Self::Age(age) => {
                let age = SignedDuration::try_from(age).unwrap_or(SignedDuration::MAX);
                Timestamp::now().checked_sub(age).unwrap_or(Timestamp::MIN)
            }
        }
    }
}

/// The mounts of now, for which no end is recorded because there is none.
struct Live {
    host: String,
    /// By number and directory.
    mounts: Vec<(String, PathBuf)>,
}

impl Live {
    fn look(state: &StateDir) -> Result<Self, Failure> {
        let mounts = state.list()?.into_iter().filter(|mount| mount.condition != Condition::Dead);
        let mounts = mounts.map(|mount| (mount.record.id, mount.record.mount_point)).collect();
        Ok(Self { host: crate::history::host(), mounts })
    }

    /// Whether the mount is there still; `None` where that can't be known, as it is another machine's.
    fn has(&self, event: &Event) -> Option<bool> {
        let is = |(id, dir): &(String, PathBuf)| match &event.mount {
            Some(mount) => mount == id,
            None => event.mount_point.as_ref() == Some(dir),
        };
        (event.host == self.host).then(|| self.mounts.iter().any(is))
    }
}

fn row(event: &Event) -> Vec<String> {
    let mut notes = Vec::new();
    if let Outcome::Failed(why) = &event.outcome {
        notes.push(format!("FAILED: {why}"));
    }
    notes.extend(event.from.map(|from| format!("from {from}")));
    notes.extend(labels(&event.labels));
    let digest = event.digest.map_or_else(|| "-".to_owned(), |digest| digest.to_string());
    let dir = event.mount_point.as_ref().map_or_else(|| "-".to_owned(), |dir| dir.display().to_string());
    let by = format!("{}@{}", event.user, event.host);
    let cells = [event.action.to_string(), event.reference.clone(), digest, dir, by, notes.join("; ")];
    [time(event.time)].into_iter().chain(cells.map(|cell| printable(cell.as_bytes()))).collect()
}

fn span_row(span: &Span, live: &Live) -> Vec<String> {
    let Span { event, .. } = span;
    let since = span.since.map_or_else(|| "its beginning is not recorded".to_owned(), time);
    let until = match (span.until, live.has(event)) {
        (Until::At(end), _) => time(end),
        (Until::AtLatest(end), _) => format!("{} at the latest: its end is not recorded", time(end)),
        (Until::Open, Some(true)) => "now".to_owned(),
        (Until::Open, Some(false)) => "an unknown time: its daemon died, and its end is not recorded".to_owned(),
        (Until::Open, None) => format!("now, or an unknown time: no end is recorded of it on {}", event.host),
    };
    let dir = event.mount_point.as_ref().map_or_else(|| "-".to_owned(), |dir| dir.display().to_string());
    let cells = [
        dir,
        span.digest.to_string(),
        event.reference.clone(),
        format!("{since} to {until}"),
        labels(&span.labels).unwrap_or_default(),
    ];
    cells.map(|cell| printable(cell.as_bytes())).to_vec()
}

fn span_as_json(span: &Span, live: &Live) -> Value {
    let Span { event, digest, since, labels, .. } = span;
    let (until, end) = match span.until {
        Until::At(end) => (Some(end), "recorded"),
        Until::AtLatest(end) => (Some(end), "at_latest"),
        Until::Open => (None, if live.has(event) == Some(true) { "live" } else { "unknown" }),
    };
    json!({
        "mountpoint": event.mount_point,
        "mount": event.mount,
        "reference": event.reference,
        "digest": digest,
        "since": since,
        "until": until,
        "end": end,
        "trust": event.trust,
        "revision": event.revision,
        "labels": labels,
        "user": event.user,
        "host": event.host,
        "version": event.version,
    })
}

fn labels(labels: &BTreeMap<String, String>) -> Option<String> {
    let pairs = labels.iter().map(|(key, value)| format!("{key}={value}"));
    (!labels.is_empty()).then(|| pairs.collect::<Vec<_>>().join(" "))
}

fn time(time: Timestamp) -> String {
    output::timestamp(time.as_second())
}

fn parse_subject(text: &str) -> Result<Subject, String> {
    if text.is_empty() {
        return Err("it is empty".to_owned());
    }
    if text.strip_prefix("sha256:").is_some_and(|hex| hex.bytes().all(|digit| digit.is_ascii_hexdigit())) {
        return Ok(Subject::Digest(text.to_owned()));
    }
    let path = PathBuf::from(text);
    // What is mounted there may be dead, or gone.
    let dir = crate::mount::locate(&path).ok().or_else(|| std::path::absolute(&path).ok()).unwrap_or(path);
    Ok(Subject::Named { dir, reference: text.parse().ok() })
}

fn parse_since(text: &str) -> Result<Since, String> {
    if let Ok(age) = units::parse_duration(text) {
        return Ok(Since::Age(age));
    }
    let period = Period::parse(text).map_err(|error| format!("{error}; nor a duration, as in 7d"))?;
    Ok(Since::Time(period.first))
}

/// `k=v`, for `--label`.
pub(super) fn parse_label(text: &str) -> Result<(String, String), String> {
    let found = text.split_once('=').filter(|(key, _)| !key.is_empty());
    found.map(|(key, value)| (key.to_owned(), value.to_owned())).ok_or_else(|| "expected KEY=VALUE".to_owned())
}
