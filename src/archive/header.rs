//! The fields of a tar header block, and of the records that extend it.
//!
//! [`tar::Header`] gives the layout of the block; the values are read here, because what decides is how Go's `archive/tar`
//! (and so `kit unpack`) reads them: numbers that overflow are errors and don't wrap, and PAX values may hold newlines.

/// The unit of a tar: headers take one block, contents are padded to whole blocks.
pub(super) const BLOCK: u64 = 512;

/// The least bytes of a PAX record: `5 k=\n`.
const SHORTEST_RECORD: usize = 5;

/// Where the magic stands in a header block.
const MAGIC: std::ops::Range<usize> = 257..263;
/// POSIX's magic. GNU's has a space where this has the NUL, and uses the prefix field for other things.
const MAGIC_USTAR: &[u8] = b"ustar\0";
/// Where a USTAR header keeps what comes before the name.
const PREFIX: std::ops::Range<usize> = 345..500;

/// A field that can't be read, by name.
pub(super) type BadField = &'static str;

/// The bytes before the first NUL.
pub(super) fn until_nul(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    &field[..end]
}

/// Whether the block's checksum holds, counted over unsigned bytes, or over signed ones as some old tars did.
pub(super) fn checksum_holds(header: &tar::Header) -> bool {
    let field = &header.as_old().cksum;
    let Some(stated) = octal(field) else { return false };
    let spaces = i64::from(b' ') * field.len() as i64;
    let total = |value: fn(u8) -> i64| -> i64 {
        let sum = |bytes: &[u8]| bytes.iter().map(|byte| value(*byte)).sum::<i64>();
        sum(header.as_bytes()) - sum(field) + spaces
    };
    stated == total(i64::from) || stated == total(|byte| i64::from(byte.cast_signed()))
}

/// The name in the header itself: in USTAR, the prefix goes before it.
pub(super) fn name(header: &tar::Header) -> Vec<u8> {
    let name = until_nul(&header.as_old().name);
    let block = header.as_bytes();
    let prefix = if block[MAGIC] == *MAGIC_USTAR { until_nul(&block[PREFIX]) } else { b"" };
    if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
}

/// The numbers of a header.
pub(super) struct Numbers {
    pub mode: i64,
    pub uid: i64,
    pub gid: i64,
    pub size: i64,
    pub mtime: i64,
}

impl Numbers {
    /// Reads all of them, so that a header is refused for any, even if its type makes no use of it.
    pub fn parse(header: &tar::Header) -> Result<Self, BadField> {
        let old = header.as_old();
        Ok(Self {
            mode: number(&old.mode).ok_or("the mode")?,
            uid: number(&old.uid).ok_or("the uid")?,
            gid: number(&old.gid).ok_or("the gid")?,
            size: number(&old.size).ok_or("the size")?,
            mtime: number(&old.mtime).ok_or("the mtime")?,
        })
    }
}

/// A number in a header: octal text, or base 256 in two's complement where the first bit is set. `None` if it is neither,
/// or does not fit.
fn number(field: &[u8]) -> Option<i64> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => base256(field),
        _ => octal(field),
    }
}

fn base256(field: &[u8]) -> Option<i64> {
    let negative = field[0] & 0x40 != 0;
    // The first bit only says that the field is binary; the second is the sign.
    let first = if negative { field[0] } else { field[0] & 0x7f };
    let start = i128::from(first.cast_signed());
    let value = field[1..].iter().try_fold(start, |value, byte| {
        let value = value.checked_mul(256)?.checked_add(i128::from(*byte))?;
        // Stops early, so that twelve bytes can't overflow what holds them.
        (i128::from(i64::MIN)..=i128::from(i64::MAX)).contains(&value).then_some(value)
    })?;
    i64::try_from(value).ok()
}

fn octal(field: &[u8]) -> Option<i64> {
    let padding = |byte: &u8| matches!(byte, b' ' | 0);
    let Some(start) = field.iter().position(|byte| !padding(byte)) else { return Some(0) };
    let end = field.iter().rposition(|byte| !padding(byte)).map_or(start, |last| last + 1);
    let text = until_nul(&field[start..end]);
    text.iter().try_fold(0_i64, |value, byte| match byte {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    })
}

/// What a PAX header says of the entry after it. An empty value leaves the header's own, as in Go.
#[derive(Debug, Default)]
pub(super) struct Pax {
    pub path: Option<Vec<u8>>,
    pub linkpath: Option<Vec<u8>>,
    pub size: Option<i64>,
    pub mtime: Option<i64>,
    pub uid: Option<i64>,
    pub gid: Option<i64>,
    pub sparse: bool,
}

impl Pax {
    /// Reads the records of a PAX header. Where a key repeats, the last one counts.
    pub fn parse(mut records: &[u8]) -> Result<Self, BadField> {
        let mut pax = Self::default();
        while !records.is_empty() {
            let (key, value, rest) = record(records).ok_or("a record that is not `length key=value`")?;
            records = rest;
            pax.set(key, value)?;
        }
        Ok(pax)
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), BadField> {
        if key.starts_with(b"GNU.sparse.") {
            self.sparse = true;
            return Ok(());
        }
        match key {
            b"path" => self.path = text(value, "the path: it contains a NUL byte")?,
            b"linkpath" => self.linkpath = text(value, "the link's target: it contains a NUL byte")?,
            b"size" => self.size = decimal(value, "the size")?,
            b"uid" => self.uid = decimal(value, "the uid")?,
            b"gid" => self.gid = decimal(value, "the gid")?,
            b"mtime" => self.mtime = seconds(value)?,
            _ => {}
        }
        Ok(())
    }
}

/// Splits the first record off: key, value, rest. The record's length says where it ends; a value may hold newlines.
fn record(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = records.iter().position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&records[..space]).ok()?.parse().ok()?;
    if length < SHORTEST_RECORD || length > records.len() || records[length - 1] != b'\n' {
        return None;
    }
    let pair = records.get(space + 1..length - 1)?;
    let equals = pair.iter().position(|byte| *byte == b'=')?;
    let (key, value) = (&pair[..equals], &pair[equals + 1..]);
    (!key.is_empty() && !key.contains(&0)).then_some((key, value, &records[length..]))
}

fn text(value: &[u8], field: BadField) -> Result<Option<Vec<u8>>, BadField> {
    if value.contains(&0) { Err(field) } else { Ok((!value.is_empty()).then(|| value.to_vec())) }
}

fn decimal(value: &[u8], field: BadField) -> Result<Option<i64>, BadField> {
    if value.is_empty() {
        return Ok(None);
    }
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).map(Some).ok_or(field)
}

/// A time with an optional fraction, rounded down to whole seconds.
fn seconds(value: &[u8]) -> Result<Option<i64>, BadField> {
    let field = "the mtime";
    let dot = value.iter().position(|byte| *byte == b'.').unwrap_or(value.len());
    let fraction = value.get(dot + 1..).unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(field);
    }
    let down = i64::from(value.starts_with(b"-") && fraction.iter().any(|digit| *digit != b'0'));
    Ok(decimal(&value[..dot], field)?.map(|whole| whole.saturating_sub(down)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_padded_with_spaces_or_nuls() {
        for (field, value) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b" 644 \0  ", Some(0o644)),
            (b"\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"777777777777", Some(0o777_777_777_777)),
            (b"12x", None),
            (b"12 \0 3", None),
            (b"12\x003", Some(0o12)),
            (b"12\t", None),
            (b"8", None),
            (b"-1", None),
        ] {
            assert_eq!(number(field), value, "{field:?}");
        }
    }

    #[test]
    fn numbers_in_base_256_do_not_wrap() {
        for (field, value) in [
            (&b"\x80\0\0\0\0\0\0\0\0\0\x01\0"[..], Some(256)),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX)),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\x80\0\0\x01\0\0\0\0\0\0\0\0", None),
            (b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\xff\xff\xff\xff\x80\0\0\0\0\0\0\0", Some(i64::MIN)),
            (b"\xff\xff\xff\xff\x7f\xff\xff\xff\xff\xff\xff\xff", None),
        ] {
            assert_eq!(number(field), value, "{field:?}");
        }
    }

    #[test]
    fn a_pax_value_may_hold_a_newline_and_an_equals_sign() {
        let pax = Pax::parse(b"14 path=a\nb=c\n12 mtime=-1\n").expect("valid");
        assert_eq!(pax.path.as_deref(), Some(&b"a\nb=c"[..]));
        assert_eq!(pax.mtime, Some(-1));
    }

    #[test]
    fn pax_times_are_rounded_down() {
        for (text, value) in [("5.9", 5), ("-5.0", -5), ("-5.1", -6), ("7", 7), ("7.", 7)] {
            assert_eq!(seconds(text.as_bytes()), Ok(Some(value)), "{text}");
        }
        assert!(seconds(b"1.x").is_err());
        assert!(seconds(b".5").is_ok_and(|value| value.is_none()));
    }

    #[test]
    fn malformed_pax_records_are_refused() {
        for records in [
            &b"x"[..],
            b"999999999999999999999 a=b\n",
            b"4 a=\n",
            b"8 path=a\n",
            b"6 a=bc\n",
            b"0 a=b\n",
            b"6 =ab\n",
            b"10 pa\0h=x\n",
            b"10 path=\0\n",
            b"13 size=-x9\n\n",
            b"29 size=18446744073709551615\n",
            b"5 \n\n\n",
            b"10000000 path=a\n",
        ] {
            assert!(Pax::parse(records).is_err(), "{:?}", String::from_utf8_lossy(records));
        }
    }

    #[test]
    fn an_empty_pax_value_leaves_the_header_its_own() {
        let pax = Pax::parse(b"8 path=\n8 size=\n9 mtime=\n").expect("valid");
        assert!(pax.path.is_none() && pax.size.is_none() && pax.mtime.is_none());
    }
}
