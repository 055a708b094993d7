//! Following a tag: it is asked for at an interval, and where it has moved, the mount switches to what it points at.
//!
//! - Not while a loader is at work: a switch waits until no file of what is served was opened for a while, but not for ever.
//! - Not after somebody chose another kit by hand: then the tag must move again, or the following be resumed.
//! - While the registry fails it is asked less and less often; and so is a kit tried that can't be opened.
//!
//! Lock: a plain mutex around what is known, held for a look or a note.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::{Action, Asked, Serving};
use crate::digest::Digest;
use crate::fetch::transfer::retried;
use crate::reference::Reference;
use crate::report::chain;
use crate::source::Source;

/// A registry that fails is asked after so many intervals at most, and at least as often as each [`LONGEST`].
const SLOWEST: u32 = 16;
/// The longest pause after failures, where the interval is not longer.
const LONGEST: Duration = Duration::from_secs(600);

/// How a tag is followed.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// How often it is asked for.
    pub interval: Duration,
    /// For so long no file may have been opened before a switch,
    pub settle: Duration,
    /// but a switch waits no longer than this.
    pub settle_max: Duration,
}

/// A tag that is followed.
#[derive(Debug)]
pub struct Follow {
    reference: Reference,
    source: Arc<dyn Source>,
    pace: Pace,
    /// How long one answer may take.
    patience: Duration,
    known: Mutex<Known>,
    woken: Notify,
}

/// What is known of the tag.
#[derive(Debug, Default)]
struct Known {
    /// What it points at, as far as is known.
    tag: Option<Digest>,
    checked: Option<Instant>,
    /// What to switch to, and since when.
    wanted: Option<(Digest, Instant)>,
    paused: Paused,
    /// How often asking has failed since it last did not.
    failures: u32,
    /// What could not be switched to.
    refused: Option<Refused>,
    error: Option<String>,
}

/// A kit that could not be switched to.
#[derive(Debug, Clone, Copy)]
struct Refused {
    tag: Digest,
    times: u32,
    /// When it is tried again.
    due: Instant,
}

/// Whether somebody has chosen another kit by hand.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Paused {
    #[default]
    No,
    /// Until the tag points at something else than it does when it is asked for next.
    Since,
    /// Until the tag points at something else.
    At(Digest),
}

impl Follow {
    /// Follows the tag of a reference.
    pub fn new(reference: Reference, source: Arc<dyn Source>, pace: Pace, patience: Duration) -> Self {
        Self { reference, source, pace, patience, known: Mutex::default(), woken: Notify::new() }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// Somebody has chosen a kit by hand.
    pub(super) fn pause(&self) {
        let mut known = self.known();
        (known.paused, known.wanted) = (Paused::Since, None);
        drop(known);
        self.woken.notify_one();
    }

    /// The tag is what counts again, from now on.
    pub(super) fn resume(&self) {
        let mut known = self.known();
        (known.paused, known.failures, known.refused) = (Paused::No, 0, None);
        drop(known);
        self.woken.notify_one();
    }

    /// Whether this is what is to be switched to, still.
    pub(super) fn wants(&self, reference: &Reference) -> bool {
        self.known().wanted.is_some_and(|(tag, _)| reference.digest == Some(tag))
    }

    /// Notes what came of a switch.
    fn switched(&self, tag: Digest, outcome: Result<(), String>) {
        let mut known = self.known();
        if known.wanted.take().is_none() {
            // Another was chosen by hand meanwhile.
            return;
        }
        let times = known.refused.filter(|refused| refused.tag == tag).map_or(0, |refused| refused.times) + 1;
        known.refused = outcome.is_err().then(|| Refused { tag, times, due: Instant::now() + self.pause_after(times) });
        known.error = outcome.err();
        if let (Some(why), 1) = (&known.error, times) {
            tracing::warn!("the tag that is followed: {why}");
        }
    }

    /// What `status` tells; `top` is what is served.
    pub(super) fn report(&self, top: Digest) -> Value {
        let known = self.known();
        let state = match (known.paused, &known.wanted, &known.error) {
            (Paused::Since | Paused::At(_), ..) => "paused",
            (Paused::No, _, Some(_)) => "failing",
            (Paused::No, Some(_), None) => "settling",
            (Paused::No, None, None) => "following",
        };
        json!({
            "reference": self.reference.to_string(),
            "state": state,
            "interval_seconds": self.pace.interval.as_secs_f64(),
            "tag_digest": known.tag,
            "drift": known.tag.is_some_and(|tag| tag != top),
            "checked_seconds_ago": known.checked.map(|checked| checked.elapsed().as_secs()),
            "error": known.error,
        })
    }

    /// How long until it is asked for again.
    fn pause_after(&self, failures: u32) -> Duration {
        let slowed = self.pace.interval * (1 << failures.min(SLOWEST.ilog2()));
        slowed.min(LONGEST.max(self.pace.interval))
    }

    /// Asks where the tag points; notes what follows from it.
    async fn check(&self, top: Digest) {
        let before = self.known().tag;
        let what = format!("tag {}", self.reference.tag());
        let ask = || async {
            match before {
                Some(before) => Ok(self.source.moved(self.reference.tag(), &before).await?.unwrap_or(before)),
                None => self.source.resolve(self.reference.tag()).await,
            }
        };
        let answer = retried(&what, self.patience, ask).await;
        let mut known = self.known();
        known.checked = Some(Instant::now());
        match answer {
            Ok(tag) => {
                (known.tag, known.failures) = (Some(tag), 0);
                known.refused = known.refused.filter(|refused| refused.tag == tag && tag != top);
                if known.refused.is_none() {
                    known.error = None;
                }
                known.paused = match known.paused {
                    Paused::Since => Paused::At(tag),
                    Paused::At(then) if then != tag => Paused::No,
                    paused => paused,
                };
                let is_due = known.refused.is_none_or(|refused| refused.due <= Instant::now());
                let is_wanted = tag != top && known.paused == Paused::No && is_due;
                let since = known.wanted.map_or_else(Instant::now, |(_, since)| since);
                known.wanted = is_wanted.then_some((tag, since));
            }
            Err(error) => known.failed(chain(&error)),
        }
    }
}

impl Known {
    fn failed(&mut self, why: String) {
        if self.failures == 0 {
            tracing::warn!("the tag that is followed: {why}");
        }
        self.failures += 1;
        self.error = Some(why);
    }
}

/// Follows for as long as the mount lives.
pub async fn run(serving: Arc<Serving>) {
    let Some(follow) = &serving.follow else { return };
    let mut due = Instant::now() + follow.pace.interval;
    loop {
        let wanted = follow.known().wanted;
        let wait = match wanted {
            Some((_, since)) => {
                let quiet = follow.pace.settle.saturating_sub(serving.trees.now().unopened());
                quiet.min(follow.pace.settle_max.saturating_sub(since.elapsed()))
            }
            None => Duration::MAX,
        };
        if let (Some((tag, _)), true) = (wanted, wait.is_zero()) {
            let reference = Reference { tag: None, digest: Some(tag), ..follow.reference.clone() };
            let (typed, action) = (Some(follow.reference.clone()), Action::Switch);
            let asked = Asked { reference, typed, action, prefetch: false, user: None };
            let switched = serving.switch(asked).await;
            follow.switched(tag, switched.map(drop).map_err(|failure| failure.to_string()));
            due = Instant::now() + follow.pace.interval;
            continue;
        }
        let left = due.saturating_duration_since(Instant::now());
        let is_woken = tokio::select! {
            () = follow.woken.notified() => true,
            () = tokio::time::sleep(left.min(wait)) => false,
        };
        if is_woken || Instant::now() >= due {
            let top = serving.now().top;
            follow.check(top).await;
            due = Instant::now() + follow.pause_after(follow.known().failures);
        }
    }
}
