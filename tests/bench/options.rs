//! The command line of `scripts/bench`.

use std::path::PathBuf;

use clap::Parser;

use crate::Row;

/// How much is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effort {
    /// About a minute: small data, three rounds.
    Quick,
    /// All of it: the sizes that the goals name, five rounds.
    Full,
}

impl Effort {
    /// The one value or the other.
    pub fn pick<T>(self, quick: T, full: T) -> T {
        match self {
            Self::Quick => quick,
            Self::Full => full,
        }
    }

    /// How often the sides of a comparison run. Odd, so that a median is a run that was.
    pub fn rounds(self) -> usize {
        self.pick(3, 5)
    }

    pub fn name(self) -> &'static str {
        self.pick("quick", "full")
    }
}

/// Measures kitfs against what it is built on, on this machine alone, and prints one table of ratios
#[derive(Debug, Parser)]
#[command(name = "scripts/bench", disable_version_flag = true)]
pub struct Options {
    /// Only these rows, as P2 or P12 [default: all]
    #[arg(value_name = "ROW")]
    rows: Vec<String>,
    /// Small data and three rounds: about a minute [default]
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// The sizes that the goals name, five rounds
    #[arg(long)]
    full: bool,
    /// Write the figures here too, and their picture beside, whatever rows were chosen
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// How many cores all of it shares: servers, readers and daemon
    #[arg(long, value_name = "N|all", default_value = "2", value_parser = parse_cores)]
    pub cores: Cores,
    /// Fail if a goal is missed
    #[arg(long)]
    pub check: bool,
    /// Name the rows and leave
    #[arg(long)]
    pub list: bool,
    /// What cargo says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
    /// Where files may be put; the script makes and removes it
    #[arg(long, hide = true)]
    dir: Option<PathBuf>,
}

/// How many cores: `None` are all.
pub type Cores = Option<usize>;

fn parse_cores(text: &str) -> Result<Cores, String> {
    match text {
        "all" => Ok(None),
        _ => text
            .parse()
            .ok()
            .filter(|cores| *cores > 0)
            .map(Some)
            .ok_or_else(|| "a number from 1 on, or all".to_owned()),
    }
}

impl Options {
    pub fn read() -> Self {
        Self::parse()
    }

    pub fn effort(&self) -> Effort {
        if self.full { Effort::Full } else { Effort::Quick }
    }

    /// Whether the table is of all rows.
    pub fn is_whole(&self) -> bool {
        self.rows.is_empty()
    }

    /// The rows that are wanted, in the order of the table.
    pub fn chosen(&self, all: Vec<Row>) -> Result<Vec<Row>, String> {
        for name in &self.rows {
            if !all.iter().any(|row| row.name.eq_ignore_ascii_case(name)) {
                let names: Vec<_> = all.iter().map(|row| row.name).collect();
                return Err(format!("there is no row {name}; there are {}", names.join(" ")));
            }
        }
        let wanted = |row: &Row| self.is_whole() || self.rows.iter().any(|name| row.name.eq_ignore_ascii_case(name));
        Ok(all.into_iter().filter(wanted).collect())
    }

    /// Where files may be put.
    pub fn dir(&self) -> Result<PathBuf, String> {
        self.dir
            .clone()
            .ok_or_else(|| "run scripts/bench: it clears up what this leaves when it is interrupted".to_owned())
    }
}
