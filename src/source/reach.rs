//! Which hosts answer, as all who ask them have found: nobody should have to wait for one host twice.
//!
//! A host that gives an answer, even a refusal, is there; what counts against it is a request that can't be sent, is
//! not answered, or is answered with 5xx. Whether to wait for such a host is for its callers to decide.
//!
//! Lock: a plain mutex, held for a look or a note.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::SourceError;
use crate::units::format_duration;

/// A failure that lies back longer says nothing of now. The pauses between attempts have 10 s, and connecting takes 5 s.
const RECENT: Duration = Duration::from_secs(30);
/// A request that is given up before its answer counts only if it had as long as a connection may take.
const SILENCE: Duration = Duration::from_secs(5);

/// What is known of hosts. Clones know the same.
#[derive(Debug, Clone, Default)]
pub struct Reach(Arc<Mutex<HashMap<String, Heard>>>);

/// What was heard of one host.
#[derive(Debug, Default)]
struct Heard {
    answered: Option<Instant>,
    /// Nothing was answered since.
    away: Option<Away>,
}

/// A host that does not answer.
#[derive(Debug, Clone)]
pub struct Away {
    /// When the first of the requests was made that came to nothing.
    pub since: Instant,
    /// What became of the last of them.
    pub error: SourceError,
    noted: Instant,
}

/// A request whose answer is awaited. Dropping it is giving it up.
pub(super) struct Asking<'a> {
    reach: &'a Reach,
    host: &'a str,
    source_name: &'a str,
    began: Instant,
    is_over: bool,
}

impl Reach {
    /// Says that a host is asked now.
    pub(super) fn ask<'a>(&'a self, host: &'a str, source_name: &'a str) -> Asking<'a> {
        Asking { reach: self, host, source_name, began: Instant::now(), is_over: false }
    }

    /// Since when a host answers nothing, if it was asked lately.
    pub(super) fn away(&self, host: &str) -> Option<Away> {
        let hosts = self.lock();
        let away = hosts.get(host)?.away.as_ref()?;
        (away.noted.elapsed() < RECENT).then(|| away.clone())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Heard>> {
        self.0.lock().unwrap_or_else(|held| held.into_inner())
    }
}

impl Asking<'_> {
    /// The host has answered.
    pub(super) fn answered(mut self) {
        self.is_over = true;
        let mut hosts = self.reach.lock();
        *hosts.entry(self.host.to_owned()).or_default() = Heard { answered: Some(Instant::now()), away: None };
    }

    /// The request came to nothing.
    pub(super) fn failed(mut self, error: SourceError) {
        self.note(error);
    }

    fn note(&mut self, error: SourceError) {
        self.is_over = true;
        let noted = Instant::now();
        let mut hosts = self.reach.lock();
        let heard = hosts.entry(self.host.to_owned()).or_default();
        let running = heard.away.take().filter(|away| away.noted.elapsed() < RECENT);
        // Another request may have been answered while this one was under way.
        let began = heard.answered.map_or(self.began, |answered| answered.max(self.began));
        let since = running.map_or(began, |away| away.since.min(began));
        heard.away = Some(Away { since, error, noted });
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        let waited = self.began.elapsed();
        if self.is_over || waited < SILENCE {
            return;
        }
        let what = format!("{} did not answer within {}", self.host, format_duration(waited));
        self.note(SourceError::Transport { source_name: self.source_name.to_owned(), what, cause: None });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused() -> SourceError {
        SourceError::Transport { source_name: "r/kit".to_owned(), what: "r can't be reached".to_owned(), cause: None }
    }

    #[test]
    fn a_host_is_away_from_the_first_request_that_fails_until_one_is_answered() {
        let reach = Reach::default();
        assert!(reach.away("r").is_none(), "nobody has asked");
        let first = reach.ask("r", "r/kit");
        let began = first.began;
        first.failed(refused());
        reach.ask("r", "r/other").failed(refused());
        assert_eq!(reach.away("r").expect("away").since, began);
        assert!(reach.clone().away("r").is_some() && reach.away("s").is_none());
        reach.ask("r", "r/kit").answered();
        assert!(reach.away("r").is_none());
    }

    #[test]
    fn what_was_asked_before_an_answer_and_fails_after_it_counts_from_the_answer() {
        let reach = Reach::default();
        let slow = reach.ask("r", "r/kit");
        std::thread::sleep(Duration::from_millis(5));
        let between = Instant::now();
        reach.ask("r", "r/kit").answered();
        slow.failed(refused());
        assert!(reach.away("r").expect("away").since >= between);
    }

    #[test]
    fn a_request_that_is_given_up_at_once_says_nothing_and_after_a_while_it_does() {
        let reach = Reach::default();
        drop(reach.ask("r", "r/kit"));
        assert!(reach.away("r").is_none());
        let began = Instant::now().checked_sub(SILENCE).expect("this machine runs for that long");
        drop(Asking { began, ..reach.ask("r", "r/kit") });
        let away = reach.away("r").expect("away");
        assert!(away.error.to_string().contains("r did not answer within 5.0s"), "{}", away.error);
    }
}
