//! How go-yaml chooses the form of a string: whether it may stand plain, and which quotes it needs otherwise.
//!
//! Two questions are asked of each string. [`reads_back_as_string`]: would a YAML 1.1 or 1.2 reader take the plain text
//! for something else, such as a number? [`Forms::of`]: which forms can carry its characters at all?

use super::timestamp;

/// Whether the plain text would be read back as a string and not as null, a boolean, a number or a date.
pub(super) fn reads_back_as_string(text: &str) -> bool {
    !(is_typed(text) || is_base_60(text) || is_old_boolean(text))
}

/// Booleans of YAML 1.1, which go-yaml still quotes.
fn is_old_boolean(text: &str) -> bool {
    matches!(
        text,
        "y" | "Y" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" | "n" | "N" | "no" | "No" | "NO" | "off" | "Off" | "OFF"
    )
}

/// Numbers to base 60 of YAML 1.1, such as `12:30:45`: `[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?`.
fn is_base_60(text: &str) -> bool {
    let mut groups = text.strip_prefix(['+', '-']).unwrap_or(text).split(':').peekable();
    let is_whole = |group: &str| {
        group.starts_with(|c: char| c.is_ascii_digit()) && group.bytes().all(|c| c.is_ascii_digit() || c == b'_')
    };
    if !groups.next().is_some_and(is_whole) || groups.peek().is_none() {
        return false;
    }
    while let Some(group) = groups.next() {
        let group = match group.split_once('.') {
            Some((group, fraction))
                if groups.peek().is_none() && fraction.bytes().all(|c| c.is_ascii_digit() || c == b'_') =>
            {
                group
            }
            _ => group,
        };
        let in_range = match group.as_bytes() {
            [ones] => ones.is_ascii_digit(),
            [tens, ones] => (b'0'..=b'5').contains(tens) && ones.is_ascii_digit(),
            _ => false,
        };
        if !in_range {
            return false;
        }
    }
    true
}

/// Whether go-yaml resolves the plain text to something else than a string.
fn is_typed(text: &str) -> bool {
    match text.as_bytes().first() {
        None => true,
        Some(b'~' | b't' | b'T' | b'f' | b'F' | b'n' | b'N') => {
            matches!(text, "~" | "null" | "Null" | "NULL" | "true" | "True" | "TRUE" | "false" | "False" | "FALSE")
        }
        Some(b'.') => matches!(text, ".inf" | ".Inf" | ".INF" | ".nan" | ".NaN" | ".NAN") || is_go_float(text),
        Some(b'+' | b'-') if matches!(&text[1..], ".inf" | ".Inf" | ".INF") => true,
        Some(b'+' | b'-' | b'0'..=b'9') => timestamp::parse(text).is_some() || is_number(&text.replace('_', "")),
        Some(_) => false,
    }
}

/// What Go's `ParseFloat` takes of texts that begin with a dot: underscores may stand between digits.
fn is_go_float(text: &str) -> bool {
    let bytes = text.as_bytes();
    let is_digit = |at: Option<usize>| at.and_then(|at| bytes.get(at)).is_some_and(u8::is_ascii_digit);
    let underscores_stand_between_digits = bytes
        .iter()
        .enumerate()
        .filter(|(_, byte)| **byte == b'_')
        // A run of underscores has one that no digit precedes.
        .all(|(at, _)| is_digit(at.checked_sub(1)) && is_digit(Some(at + 1)));
    underscores_stand_between_digits && is_decimal_float(&text.replace('_', ""))
}

/// `[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?`, within what a double can hold.
fn is_decimal_float(text: &str) -> bool {
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.strip_prefix(['+', '-']).unwrap_or(exponent)),
        None => (unsigned, "0"),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = |part: &str| part.bytes().all(|c| c.is_ascii_digit());
    let well_formed = digits(whole)
        && digits(fraction)
        && !(whole.is_empty() && fraction.is_empty())
        && !exponent.is_empty()
        && digits(exponent);
    well_formed && text.parse::<f64>().is_ok_and(f64::is_finite)
}

/// Integers in Go's notations and decimal floats; underscores are gone.
fn is_number(plain: &str) -> bool {
    const LARGEST: u64 = i64::MAX.unsigned_abs();
    // Only a number without a sign may use the top bit.
    let (unsigned, limit) = match plain.as_bytes().first() {
        Some(b'-') => (&plain[1..], LARGEST + 1),
        Some(b'+') => (&plain[1..], LARGEST),
        _ => (plain, u64::MAX),
    };
    let (digits, radix) = match unsigned.as_bytes() {
        [b'0', b'x' | b'X', ..] => (&unsigned[2..], 16),
        [b'0', b'o' | b'O', ..] => (&unsigned[2..], 8),
        [b'0', b'b' | b'B', ..] => (&unsigned[2..], 2),
        [b'0', _, ..] => (&unsigned[1..], 8),
        _ => (unsigned, 10),
    };
    // go-yaml looks at `0b` and `0o` a second time, and then a sign may stand behind the prefix.
    let (digits, limit) = match plain.as_bytes() {
        [b'0', b'b' | b'o', b'+', ..] => (&digits[1..], LARGEST),
        [b'0', b'b' | b'o', b'-', ..] => (&digits[1..], LARGEST + 1),
        _ => (digits, limit),
    };
    is_integer(digits, radix, limit) || is_decimal_float(plain)
}

fn is_integer(digits: &str, radix: u32, limit: u64) -> bool {
    digits.starts_with(|c: char| c.is_ascii_alphanumeric())
        && u64::from_str_radix(digits, radix).is_ok_and(|number| number <= limit)
}

/// The forms that can carry a string.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Forms {
    /// It may stand plain inside `[…]`.
    pub(super) flow_plain: bool,
    /// It may stand plain elsewhere.
    pub(super) block_plain: bool,
    /// It may stand between single quotes.
    pub(super) single_quoted: bool,
    /// It may be a literal block.
    pub(super) literal: bool,
}

impl Forms {
    /// What the characters of `text` allow.
    pub(super) fn of(text: &str) -> Self {
        if text.is_empty() {
            return Self { flow_plain: false, block_plain: true, single_quoted: true, literal: false };
        }
        // `---` and `...` would end the document.
        let marker = text.starts_with("---") || text.starts_with("...");
        let (mut block_indicators, mut flow_indicators) = (marker, marker);
        let (mut tabs, mut special, mut breaks) = (false, false, false);
        let (mut space_after_break, mut break_after_space) = (false, false);
        let mut previous: Option<char> = None;
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            let before_blank = chars.peek().is_none_or(|next| matches!(next, ' ' | '\t'));
            let after_blank = previous.is_none_or(|c| matches!(c, ' ' | '\t' | '\0') || is_break(c));
            let (flow, block) = match (previous, c) {
                (
                    None,
                    '#' | ',' | '[' | ']' | '{' | '}' | '&' | '*' | '!' | '|' | '>' | '\'' | '"' | '%' | '@' | '`',
                ) => (true, true),
                (None, '?') | (_, ':') => (true, before_blank),
                (None, '-') => (before_blank, before_blank),
                (Some(_), ',' | '?' | '[' | ']' | '{' | '}') => (true, false),
                (Some(_), '#') => (after_blank, after_blank),
                _ => (false, false),
            };
            flow_indicators |= flow;
            block_indicators |= block;
            if c == '\t' {
                tabs = true;
            } else {
                special |= !is_printable(c);
            }
            breaks |= is_break(c);
            space_after_break |= c == ' ' && previous.is_some_and(is_break);
            break_after_space |= is_break(c) && previous == Some(' ');
            previous = Some(c);
        }
        let edge = |c: Option<char>| c.is_some_and(|c| c == ' ' || is_break(c));
        let plain = !(edge(text.chars().next()) || edge(previous) || breaks || tabs || special);
        Self {
            flow_plain: plain && !flow_indicators,
            block_plain: plain && !block_indicators,
            single_quoted: !(space_after_break || break_after_space || tabs || special),
            literal: !(previous == Some(' ') || break_after_space || special),
        }
    }
}

/// A line break of YAML 1.1.
pub(super) fn is_break(c: char) -> bool {
    matches!(c, '\r' | '\n' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

/// What go-yaml writes as it is. Nothing above U+FFFF is, so an emoji is escaped.
pub(super) fn is_printable(c: char) -> bool {
    matches!(c, '\n' | ' '..='~' | '\u{a0}'..='\u{d7ff}' | '\u{e000}'..='\u{fffd}') && c != '\u{feff}'
}
