//! Timestamps as YAML and ModelPack annotations write them.
//!
//! [`parse`] takes just what go-yaml takes: where it does, a plain YAML string would be read back as a date, so the
//! Kitfile quotes it. RFC 3339, in which ModelPack states a file's mtime, is among these forms.

const SECONDS_PER_DAY: i64 = 86_400;

/// Seconds since the epoch of `2006-1-2`, `2006-1-2 15:4:5.9` or `2006-1-2T15:4:5.9Z` (or `t`, or an offset `+07:00`),
/// where month, day and time may have one digit or two. The fraction is dropped.
pub(super) fn parse(text: &str) -> Option<i64> {
    let mut rest = Rest(text.as_bytes());
    let year = rest.year()?;
    rest.literal(b'-')?;
    let month = rest.number(1..=12)?;
    rest.literal(b'-')?;
    let day = rest.number(1..=days_in(year, month))?;
    let midnight = days_since_epoch(year, month, day) * SECONDS_PER_DAY;
    if rest.0.is_empty() {
        return Some(midnight);
    }
    let zoned = match rest.0[0] {
        b'T' | b't' => true,
        b' ' => false,
        _ => return None,
    };
    if zoned {
        rest.0 = &rest.0[1..];
    } else {
        // Go's layouts let one space stand for any number of them.
        rest.skip_spaces();
    }
    let hour = rest.number(0..=23)?;
    rest.literal(b':')?;
    let minute = rest.number(0..=59)?;
    rest.literal(b':')?;
    let second = rest.number(0..=59)?;
    rest.fraction();
    let offset = if zoned { rest.offset()? } else { 0 };
    rest.0.is_empty().then_some(midnight + hour * 3600 + minute * 60 + second - offset)
}

/// What is still to be read.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn digit(&self, at: usize) -> Option<i64> {
        self.0.get(at).filter(|byte| byte.is_ascii_digit()).map(|byte| i64::from(byte - b'0'))
    }

    fn skip_spaces(&mut self) {
        let spaces = self.0.iter().take_while(|byte| **byte == b' ').count();
        self.0 = &self.0[spaces..];
    }

    fn literal(&mut self, byte: u8) -> Option<()> {
        self.0 = self.0.strip_prefix(&[byte])?;
        Some(())
    }

    /// Four digits, no more: go-yaml looks for just that before it tries a date.
    fn year(&mut self) -> Option<i64> {
        let year = (0..4).try_fold(0, |year, at| Some(year * 10 + self.digit(at)?))?;
        self.0 = &self.0[4..];
        Some(year)
    }

    /// One digit or two.
    fn number(&mut self, allowed: std::ops::RangeInclusive<i64>) -> Option<i64> {
        let first = self.digit(0)?;
        let (number, length) = match self.digit(1) {
            Some(second) => (first * 10 + second, 2),
            None => (first, 1),
        };
        self.0 = &self.0[length..];
        allowed.contains(&number).then_some(number)
    }

    /// A dot or comma with digits after it, if there is one.
    fn fraction(&mut self) {
        if matches!(self.0.first(), Some(b'.' | b',')) && self.digit(1).is_some() {
            let digits = self.0[1..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            self.0 = &self.0[1 + digits..];
        }
    }

    /// `Z` or `+07:00`, in seconds. Go lets 24 hours and 60 minutes pass.
    fn offset(&mut self) -> Option<i64> {
        if self.literal(b'Z').is_some() {
            return Some(0);
        }
        let sign = match self.0.first()? {
            b'+' => 1,
            b'-' => -1,
            _ => return None,
        };
        let hours = self.digit(1)? * 10 + self.digit(2)?;
        let minutes = self.digit(4)? * 10 + self.digit(5)?;
        if self.0[3] != b':' || hours > 24 || minutes > 60 {
            return None;
        }
        self.0 = &self.0[6..];
        Some(sign * (hours * 3600 + minutes * 60))
    }
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_in(year: i64, month: i64) -> i64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

fn days_since_epoch(year: i64, month: i64, day: i64) -> i64 {
    let leap_days = |year: i64| year / 4 - year / 100 + year / 400;
    // Years 0 to year - 1; year 0 is a leap year in the calendar that Go uses.
    let before = |year: i64| if year == 0 { 0 } else { year * 365 + leap_days(year - 1) + 1 };
    let months: i64 = (1..month).map(|month| days_in(year, month)).sum();
    before(year) - before(1970) + months + day - 1
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn rfc_3339_is_read_to_the_second() {
        assert_eq!(parse("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(parse("2025-01-01T00:00:00Z"), Some(1_735_689_600));
        assert_eq!(parse("2026-11-21T06:32:08.070748037Z"), Some(1_795_242_728));
        assert_eq!(parse("2024-02-29T12:00:00+02:00"), Some(1_709_200_800));
        assert_eq!(parse("1969-12-31T23:59:59Z"), Some(-1));
        assert_eq!(parse("0000-01-01"), Some(-62_167_219_200));
    }

    #[test]
    fn what_go_yaml_takes_for_a_date_is_one() {
        for text in
            ["2001-1-2", "2001-12-14t21:59:43.10-05:00", "2001-12-14   21:59:43.10", "2001-1-2 3:4:5,5", "2024-02-29"]
        {
            assert!(parse(text).is_some(), "{text}");
        }
        for text in [
            "",
            "2001",
            "2001-13-01",
            "2023-02-29",
            "2001-01-01T",
            "2001-01-01 ",
            "2001-01-01T10:00:00",
            "2001-01-01T24:00:00Z",
            "2001-12-14 21:59:43.10 -5",
            "20011-01-01",
            "2001-01-01T10:00:00+0700",
        ] {
            assert!(parse(text).is_none(), "{text}");
        }
    }
}
