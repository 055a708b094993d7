//! Which kit a mount served, from when to when.
//!
//! What the events say, and no more: where one is missing, a beginning or an end is not known, and that is told. A daemon
//! that died could not say so; a later mount on its directory, or whoever found it dead, gives the latest moment.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use jiff::Timestamp;

use super::{Action, Event, Outcome, Period};
use crate::digest::Digest;

/// One kit, served by one mount without a break.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// What was served.
    pub digest: Digest,
    /// Since when; `None` where the event that began it is lost.
    pub since: Option<Timestamp>,
    /// Until when.
    pub until: Until,
    /// The event that began it; where that is lost, the one that tells of it.
    pub event: Event,
    /// The mount's labels.
    pub labels: BTreeMap<String, String>,
}

/// When a span ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// At this moment.
    At(Timestamp),
    /// Nobody saw it end; at this moment it had.
    AtLatest(Timestamp),
    /// No end is recorded: it is served still, or its daemon has died.
    Open,
}

impl Span {
    /// Whether it was served in a period, as far as is known.
    pub fn overlaps(&self, period: &Period) -> bool {
        let has_ended = match self.until {
            Until::At(end) | Until::AtLatest(end) => end <= period.first,
            Until::Open => false,
        };
        !has_ended && self.since.is_none_or(|since| since <= period.last)
    }
}

/// A host, and a mount's number there.
type Key = (String, String);
/// A host, and a directory there.
type Place = (String, Option<PathBuf>);

/// All spans that `events`, oldest first, tell of, in the order in which they began.
pub fn spans(events: &[Event]) -> Vec<Span> {
    let mut spans = Spans::default();
    for event in events {
        spans.take(event);
    }
    spans.all
}

#[derive(Default)]
struct Spans {
    all: Vec<Span>,
    /// The newest one of each mount.
    of_mount: HashMap<Key, usize>,
    /// The newest one on each directory.
    at_place: HashMap<Place, usize>,
}

impl Spans {
    fn take(&mut self, event: &Event) {
        match (event.action, &event.outcome) {
            (Action::Mount, Outcome::Done) => self.begin(event),
            (Action::Switch | Action::Rollback, Outcome::Done) => self.change(event),
            (Action::Unmount, outcome) => self.end(event, *outcome == Outcome::Done),
            (Action::Mount | Action::Switch | Action::Rollback, Outcome::Failed(_)) | (Action::Tag, _) => {}
        }
    }

    fn begin(&mut self, event: &Event) {
        // Who was there before had left.
        if let Some(before) = self.at_place.get(&place(event)).and_then(|at| self.all.get_mut(*at))
            && before.until == Until::Open
        {
            before.until = Until::AtLatest(event.time);
        }
        self.push(event, event.digest, Some(event.time), Until::Open);
    }

    fn change(&mut self, event: &Event) {
        match self.newest(event) {
            Some(before) if before.until == Until::Open => before.until = Until::At(event.time),
            Some(_) => {}
            None => self.push(event, event.from, None, Until::At(event.time)),
        }
        self.push(event, event.digest, Some(event.time), Until::Open);
    }

    fn end(&mut self, event: &Event, was_seen: bool) {
        let until = if was_seen { Until::At(event.time) } else { Until::AtLatest(event.time) };
        match self.newest(event) {
            // After a lazy unmount the directory may have another mount while files of this one are open.
            Some(span) if was_seen && !matches!(span.until, Until::At(_)) => span.until = until,
            Some(span) if span.until == Until::Open => span.until = until,
            Some(_) => {}
            None => self.push(event, event.digest, None, until),
        }
    }

    fn newest(&mut self, event: &Event) -> Option<&mut Span> {
        let at = self.of_mount.get(&key(event))?;
        self.all.get_mut(*at)
    }

    fn push(&mut self, event: &Event, digest: Option<Digest>, since: Option<Timestamp>, until: Until) {
        let Some(digest) = digest else { return };
        let mut labels = event.labels.clone();
        if let Some(before) = self.newest(event).filter(|_| labels.is_empty()) {
            labels.clone_from(&before.labels);
        }
        self.of_mount.insert(key(event), self.all.len());
        self.at_place.insert(place(event), self.all.len());
        self.all.push(Span { digest, since, until, event: event.clone(), labels });
    }
}

fn place(event: &Event) -> Place {
    (event.host.clone(), event.mount_point.clone())
}

/// The mount that an event is of; the directory stands in for a number that it lacks.
fn key(event: &Event) -> Key {
    let dir = || event.mount_point.as_ref().map(|dir| dir.display().to_string());
    (event.host.clone(), event.mount.clone().or_else(dir).unwrap_or_default())
}
