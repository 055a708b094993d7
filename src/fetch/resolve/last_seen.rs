//! What stands in for a registry that does not say what a tag is: the digest it had, and how old that knowledge is.

use std::fmt;
use std::time::{Duration, SystemTime};

use serde::{Serialize, Serializer};

use crate::fetch::FetchError;
use crate::units::{format_duration, timestamp};

/// That a tag's digest is not what the registry says now, but what stood in for that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LastSeen {
    /// When the registry said so, in seconds since the epoch; not known of what kit's storage holds.
    #[serde(serialize_with = "as_timestamp")]
    pub seen: Option<u64>,
    /// How long that was ago when the tag was followed; not known either where this machine's clock says it was not yet.
    #[serde(rename = "age_seconds", serialize_with = "as_seconds")]
    pub age: Option<Duration>,
    /// Why the registry was not asked.
    pub why: Why,
    /// What came instead of its answer, in a few words.
    pub cause: Option<String>,
}

/// Why a registry does not say what a tag is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It does not answer.
    Unreachable,
    /// It is not to be asked.
    Offline,
}

impl Serialize for Why {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// For people and machines alike, as all times in JSON are.
fn as_timestamp<S: Serializer>(seen: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    seen.map(at).serialize(serializer)
}

fn as_seconds<S: Serializer>(age: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    age.map(|age| age.as_secs()).serialize(serializer)
}

fn at(seen: u64) -> String {
    timestamp(i64::try_from(seen).unwrap_or(i64::MAX))
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unreachable => "the registry can't be reached",
            Self::Offline => "offline",
        })
    }
}

impl LastSeen {
    /// What stands in for an answer that failed with `error`.
    pub(super) fn new(seen: Option<u64>, error: &FetchError) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let age = seen.and_then(|seen| now.checked_sub(seen)).map(Duration::from_secs);
        let cause = error.why_unreachable();
        let why = if error.is_offline() { Why::Offline } else { Why::Unreachable };
        Self { seen, age, why, cause }
    }

    /// Why it had to stand in, in words.
    pub(super) fn reason(&self) -> String {
        match &self.cause {
            Some(cause) => format!("{} ({cause})", self.why),
            None => self.why.to_string(),
        }
    }

    /// The digest in words, without itself.
    pub(super) fn digest(&self) -> String {
        match (self.seen, self.age) {
            (Some(seen), Some(age)) => {
                // The clock of the note ticks in seconds.
                let age = format_duration(age.max(Duration::from_secs(1)));
                format!("the digest it had at {}, {age} before", at(seen))
            }
            (Some(seen), None) => {
                format!("the digest it had at {}, which is yet to come by this machine's clock", at(seen))
            }
            (None, _) => "the digest in kit's storage, whose age is not known".to_owned(),
        }
    }
}

impl fmt::Display for LastSeen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; took {}", self.reason(), self.digest())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::SourceError;

    fn failed(cause: SourceError) -> FetchError {
        FetchError::Source { what: "r/kit:v1".to_owned(), cause }
    }

    #[test]
    fn the_words_tell_why_what_and_how_old() {
        let status =
            SourceError::Status { source_name: "r".to_owned(), status: 503, retry_after: None, words: "".into() };
        let known =
            LastSeen { age: Some(Duration::from_secs(11_100)), ..LastSeen::new(Some(1_735_689_600), &failed(status)) };
        assert_eq!(
            known.to_string(),
            "the registry can't be reached (it answered 503); took the digest it had at 2025-01-01T00:00:00Z, 3h 5m before"
        );
        let offline = SourceError::Offline { what: "tag".to_owned(), source_name: "r".to_owned() };
        let known = LastSeen::new(None, &failed(offline));
        assert_eq!((known.why, known.cause.as_deref(), known.age), (Why::Offline, None, None));
        assert_eq!(known.to_string(), "offline; took the digest in kit's storage, whose age is not known");
    }

    #[test]
    fn a_note_from_the_future_has_no_age_and_is_told_as_what_it_is() {
        let silent = FetchError::Timeout { what: "tag".to_owned(), after: Duration::from_secs(10), cause: None };
        let known = LastSeen::new(Some(4_102_444_800), &silent);
        assert_eq!((known.age, known.cause.as_deref()), (None, Some("no answer within 10.0s")));
        let told = "took the digest it had at 2100-01-01T00:00:00Z, which is yet to come by this machine's clock";
        assert!(known.to_string().ends_with(told), "{known}");
    }
}
