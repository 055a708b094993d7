//! Moments and days as people write them.

use jiff::civil::{Date, DateTime};
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};

/// From one moment to another, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Period {
    /// Its first moment.
    pub first: Timestamp,
    /// Its last moment: the same, of an instant.
    pub last: Timestamp,
}

/// A text that is neither.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither a day, as in 2026-11-01, nor an instant, as in 2026-11-01T12:00 or 2026-11-01T12:00:00Z")]
pub struct InvalidMoment(String);

impl Period {
    /// Reads `2026-11-01`, a day of this machine's time zone; `2026-11-01T12:00`, an instant of that zone; or
    /// `2026-11-01T12:00:00Z` and `…+01:00`.
    pub fn parse(text: &str) -> Result<Self, InvalidMoment> {
        Self::parse_in(text, &TimeZone::system())
    }

    /// The same in another time zone.
    pub fn parse_in(text: &str, zone: &TimeZone) -> Result<Self, InvalidMoment> {
        Self::read(text.trim(), zone).ok_or_else(|| InvalidMoment(text.to_owned()))
    }

    fn read(text: &str, zone: &TimeZone) -> Option<Self> {
        let moment = |zoned: Zoned| zoned.timestamp();
        if let Ok(instant) = text.parse::<Timestamp>() {
            return Some(Self { first: instant, last: instant });
        }
        // A day has no time, and an offset without effect would be worse than none.
        if text.contains(['Z', 'z', '[', '+']) {
            return None;
        }
        if text.contains([':', 'T', 't', ' ']) {
            let instant = moment(text.parse::<DateTime>().ok()?.to_zoned(zone.clone()).ok()?);
            return Some(Self { first: instant, last: instant });
        }
        let day: Date = text.parse().ok()?;
        let first = moment(day.to_zoned(zone.clone()).ok()?);
        let next = moment(day.tomorrow().ok()?.to_zoned(zone.clone()).ok()?);
        Some(Self { first, last: next.checked_sub(jiff::SignedDuration::from_nanos(1)).ok()? })
    }

    /// Whether it is a moment and not a day.
    pub fn is_instant(&self) -> bool {
        self.first == self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Option<(String, String)> {
        let zone = TimeZone::fixed(jiff::tz::offset(2));
        let period = Period::parse_in(text, &zone).ok()?;
        Some((period.first.to_string(), period.last.to_string()))
    }

    #[test]
    fn a_day_is_the_time_zones_and_an_instant_is_one_moment() {
        let pair = |first: &str, last: &str| Some((first.to_owned(), last.to_owned()));
        assert_eq!(parse("2026-11-01"), pair("2026-10-31T22:00:00Z", "2026-11-01T21:59:59.999999999Z"));
        let noon = pair("2026-11-01T12:00:00Z", "2026-11-01T12:00:00Z");
        for text in ["2026-11-01T12:00:00Z", "2026-11-01T13:00+01:00", "2026-11-01T14:00", "2026-11-01 14:00:00"] {
            assert_eq!(parse(text), noon, "{text}");
        }
    }

    #[test]
    fn what_is_no_moment_is_refused_with_an_example() {
        for text in ["", "yesterday", "2026", "2026-13-01", "2026-11-31", "2026-11-01Z", "11/01/2026", "7d"] {
            let error = Period::parse(text).expect_err(text).to_string();
            assert!(error.contains("as in 2026-11-01"), "{error}");
        }
    }
}
