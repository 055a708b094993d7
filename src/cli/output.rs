//! What a command says: results on standard output, notes and errors on standard error.
//!
//! Names in a kit are whatever its author wrote. On a terminal, and in tables, control characters are shown escaped, so
//! that a name can't move the cursor; elsewhere `ls` gives them as they are.

use std::fmt::Display;
use std::io::{self, BufWriter, IsTerminal as _, Stdout, Write as _};

use serde::Serialize;

use super::Failure;
pub(super) use crate::units::timestamp;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cant_move_the_cursor() {
        assert_eq!(printable(b"a\x1b[2Jb\nc"), r"a\u{1b}[2Jb\nc");
        assert_eq!(printable("modèle".as_bytes()), "modèle");
    }
}
