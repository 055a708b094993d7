//! What a command says: results on standard output, notes and errors on standard error.
//!
//! Names in a kit are whatever its author wrote. On a terminal, and in tables, control characters are shown escaped, so
//! that a name can't move the cursor; elsewhere `ls` gives them as they are.

use std::fmt::Display;
use std::io::{self, BufWriter, IsTerminal as _, Stdout, Write as _};

use serde::Serialize;

use super::Failure;

/// Standard output.
pub(super) struct Output {
    stdout: BufWriter<Stdout>,
    is_terminal: bool,
}

impl Output {
    pub(super) fn new() -> Self {
        let stdout = io::stdout();
        let is_terminal = stdout.is_terminal();
        Self { stdout: BufWriter::new(stdout), is_terminal }
    }

    /// Bytes as they are.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.stdout.write_all(bytes).map_err(lost)
    }

    pub(super) fn line(&mut self, text: impl Display) -> Result<(), Failure> {
        writeln!(self.stdout, "{text}").map_err(lost)
    }

    /// A line around a name of a kit.
    pub(super) fn name(&mut self, before: impl Display, name: &[u8], after: &str) -> Result<(), Failure> {
        write!(self.stdout, "{before}").map_err(lost)?;
        if self.is_terminal {
            write!(self.stdout, "{}", printable(name)).map_err(lost)?;
        } else {
            self.bytes(name)?;
        }
        self.line(after)
    }

    /// A value as JSON, in several lines for a person and in one for a program.
    pub(super) fn json(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let text = if self.is_terminal { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) };
        self.line(text?)
    }

    /// Lines with aligned columns.
    pub(super) fn table(&mut self, rows: &[Vec<String>]) -> Result<(), Failure> {
        let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
        let width =
            |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
        let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
        for row in rows {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            self.line(cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }

    /// Sends off what is buffered. Without it an error at the end would go unnoticed.
    pub(super) fn finish(mut self) -> Result<(), Failure> {
        self.stdout.flush().map_err(lost)
    }
}

fn lost(error: io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::ClosedPipe,
        _ => Failure::failed(format!("writing to standard output failed: {error}")),
    }
}

/// A line on standard error: `note: …`, `warning: …`, `error: …`. A text of several lines stays one.
pub(super) fn say(kind: &str, text: impl Display) {
    let text = text.to_string();
    let lines: Vec<String> = text.split('\n').map(|line| printable(line.as_bytes())).collect();
    // Where standard error is closed, nobody wants to know.
    let _ = writeln!(io::stderr().lock(), "{kind}: {}", lines.join("\n"));
}

/// A line on standard error for each text.
pub(super) fn say_all<T: Display>(kind: &str, texts: impl IntoIterator<Item = T>) {
    texts.into_iter().for_each(|text| say(kind, text));
}

/// A name without control characters.
pub(super) fn printable(name: &[u8]) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    String::from_utf8_lossy(name).chars().map(escape).collect()
}

/// Seconds since the epoch as `2025-01-31T12:00:00Z`.
pub(super) fn timestamp(seconds: i64) -> String {
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
    fn a_name_cant_move_the_cursor() {
        assert_eq!(printable(b"a\x1b[2Jb\nc"), r"a\u{1b}[2Jb\nc");
        assert_eq!(printable("modèle".as_bytes()), "modèle");
    }
}
