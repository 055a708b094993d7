//! Durations and sizes as people write them: `10s`, `500ms`, `30MiB`, `200GB`; and points in time.
//!
//! Parsing is exact: whole numbers, no sign, no rounding; what does not fit is refused. Formatting is for people and
//! rounds to one decimal.

use std::time::Duration;

/// A text that is not a duration or a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {what}: expected {expected}")]
pub struct InvalidUnit {
    /// What was read.
    pub text: String,
    /// What it should have been.
    pub what: &'static str,
    /// What is allowed.
    pub expected: &'static str,
}

/// Milliseconds in each unit of time, the largest first.
const TIMES: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// Bytes in each unit of size: binary ones as IEC writes them, decimal ones as disks are sold.
const SIZES: [(&str, u64); 9] = [
    ("", 1),
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

/// A decimal kilobyte has two spellings in use.
const KILOBYTE: [&str; 2] = ["kB", "KB"];

/// Parses `500ms`, `10s`, `5m`, `2h` or `7d`.
pub fn parse_duration(text: &str) -> Result<Duration, InvalidUnit> {
    let unit_of = |unit: &str| TIMES.iter().find(|(name, _)| *name == unit).map(|(_, millis)| *millis);
    parse(text, unit_of).map(Duration::from_millis).ok_or_else(|| InvalidUnit {
        text: text.to_owned(),
        what: "duration",
        expected: "a whole number with ms, s, m, h or d, as in 10s",
    })
}

/// Parses `30MiB`, `1GiB`, `200GB` (decimal) or a plain number of bytes.
pub fn parse_size(text: &str) -> Result<u64, InvalidUnit> {
    let unit_of = |unit: &str| {
        if KILOBYTE.contains(&unit) {
            return Some(1000);
        }
        SIZES.iter().find(|(name, _)| *name == unit).map(|(_, bytes)| *bytes)
    };
    parse(text, unit_of).ok_or_else(|| InvalidUnit {
        text: text.to_owned(),
        what: "size",
        expected: "a whole number with KiB, MiB, GiB, TiB, kB, MB, GB or TB, as in 30MiB, or plain bytes",
    })
}

fn parse(text: &str, unit_of: impl Fn(&str) -> Option<u64>) -> Option<u64> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    number.parse::<u64>().ok()?.checked_mul(unit_of(unit.trim_start())?)
}

/// A size for people, in binary units: `26.5 KiB`, `512 B`.
pub fn format_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    // Tenths, in integers: a float would round the largest sizes in the wrong place.
    let mut tenths = u128::from(bytes) * 10;
    let mut unit = "B";
    for next in UNITS {
        // 1,023.95 would print as 1024.0, so it moves on to the next unit.
        if (tenths + 5) / 10 < 1024 && unit != "B" {
            break;
        }
        tenths = (tenths + 512) / 1024;
        unit = next;
    }
    format!("{}.{} {unit}", tenths / 10, tenths % 10)
}

/// A duration for people: its two largest units, as in `2h 5m`; below a minute to a tenth of a second; `0.2s`, `35ms`.
pub fn format_duration(duration: Duration) -> String {
    let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if millis < 100 {
        return format!("{millis}ms");
    }
    if millis < 60_000 {
        return format!("{}.{}s", millis / 1000, millis % 1000 / 100);
    }
    let mut rest = millis;
    let mut parts = Vec::new();
    for (name, unit) in &TIMES[..4] {
        let count = rest / unit;
        rest %= unit;
        if count > 0 || !parts.is_empty() {
            parts.push((count, *name));
        }
    }
    let parts = parts.iter().take(2).filter(|(count, _)| *count > 0);
    parts.map(|(count, name)| format!("{count}{name}")).collect::<Vec<_>>().join(" ")
}

/// Seconds since the epoch as `2025-01-31T12:00:00Z`.
pub fn timestamp(seconds: i64) -> String {
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

/// The date of a day counted from 1970-01-01, in the Gregorian calendar. Years are counted from March, so that the leap
/// day is a year's last.
fn civil(days: i64) -> (i64, i64, i64) {
    /// Days from 0000-03-01 to the epoch, and in 400 years.
    const TO_EPOCH: i64 = 719_468;
    const ERA: i64 = 146_097;
    let shifted = days.saturating_add(TO_EPOCH);
    let (era, day_of_era) = (shifted.div_euclid(ERA), shifted.rem_euclid(ERA));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn times_are_written_in_utc() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_827_696, "2000-02-29T12:34:56Z"),
            (1_735_689_600, "2025-01-01T00:00:00Z"),
            (-1, "1969-12-31T23:59:59Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
        ] {
            assert_eq!(timestamp(seconds), text);
        }
    }

    #[test]
    fn durations_have_a_unit() {
        for (text, millis) in [("500ms", 500), ("10s", 10_000), ("5m", 300_000), ("2h", 7_200_000), ("7d", 604_800_000)]
        {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "10", "s", "-1s", "1.5s", "10 years", "99999999999999999999s", "999999999999999999d"] {
            let error = parse_duration(text).expect_err(text).to_string();
            assert!(error.contains("as in 10s"), "{error}");
        }
    }

    #[test]
    fn sizes_are_binary_decimal_or_plain() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("30MiB", 30 << 20),
            ("1 GiB", 1 << 30),
            ("200GB", 200_000_000_000),
            ("1kB", 1000),
            ("1KB", 1000),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "MiB", "1.5GiB", "-1", "1gib", "1G", "99999999TiB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_in_binary_units() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (27136, "26.5 KiB"),
            (1 << 30, "1.0 GiB"),
            (1_048_575, "1.0 MiB"),
            (16_060_556_800, "15.0 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(format_size(bytes), text);
        }
    }

    #[test]
    fn durations_are_shown_in_their_two_largest_units() {
        for (millis, text) in [
            (0, "0ms"),
            (35, "35ms"),
            (250, "0.2s"),
            (12_340, "12.3s"),
            (60_000, "1m"),
            (125_000, "2m 5s"),
            (7_500_000, "2h 5m"),
            (7_205_000, "2h"),
            (90_000_000, "1d 1h"),
        ] {
            assert_eq!(format_duration(Duration::from_millis(millis)), text);
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text in "\\PC{0,20}|[0-9]{0,22}[a-zA-Z]{0,3}", bytes: u64, millis: u64) {
            let _ = (parse_duration(&text), parse_size(&text));
            let _ = (format_size(bytes), format_duration(Duration::from_millis(millis)));
        }
    }
}
