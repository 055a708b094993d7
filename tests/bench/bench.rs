//! The table of speeds. `scripts/bench` builds, runs and clears up after it; `docs/bench/README.md` says what the rows mean.
//!
//! ```text
//! options    the command line
//! machine    cores, memory, what processes have used
//! measure    sides that run in turn; figures, their medians and verdicts
//! report     the table and the JSON
//! plot       the picture
//! site       a registry of files: nginx, and what it was asked for
//! layers     layers and kits on it, made in one pass
//! mounted    a mount with a home of its own, gone without a trace when it is dropped
//! readers    who reads: curl, cat, dd, a map, threads, fio
//! rows       the rows, by what they look at
//! ```
//!
//! A row takes a [`Bench`] and gives [`Figure`]s. It starts what it needs and drops it at its end, so rows do not see each
//! other, and the disk has to hold what the largest needs. A row that panics is a row that failed: the others go on.

#[path = "../support/mod.rs"]
mod support;

mod layers;
mod machine;
mod measure;
mod mounted;
mod options;
mod plot;
mod readers;
mod report;
mod rows;
mod site;

use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use measure::{Figure, Verdict};
use options::{Effort, Options};
use report::Report;

/// What a row is given.
pub struct Bench {
    /// How much is to be done.
    pub effort: Effort,
    /// Where it may put files: on the disk that the cache is on too.
    pub dir: PathBuf,
}

/// One row of the table, or several that share their runs.
pub struct Row {
    /// Its name in the table.
    pub name: &'static str,
    /// What it is about.
    pub about: &'static str,
    /// How many bytes of disk it needs.
    pub disk: fn(Effort) -> u64,
    /// Does it.
    pub measure: fn(&Bench) -> Vec<Figure>,
}

fn main() -> ExitCode {
    let options = Options::read();
    match run(&options) {
        Ok(code) => code,
        Err(refusal) => {
            say(&format!("bench: {refusal}"));
            ExitCode::from(2)
        }
    }
}

fn run(options: &Options) -> Result<ExitCode, String> {
    if options.list {
        rows::all().iter().for_each(|row| say(&format!("{:5} {}", row.name, row.about)));
        return Ok(ExitCode::SUCCESS);
    }
    let rows = options.chosen(rows::all())?;
    let dir = options.dir()?;
    tempfile::env::override_temp_dir(&dir).map_err(|_| "a temporary directory was made too early".to_owned())?;
    let cores = machine::pin(options.cores).map_err(|error| format!("can't choose cores: {error}"))?;
    let disk = rows.iter().map(|row| (row.disk)(options.effort())).max().unwrap_or_default();
    machine::require_disk(&dir, disk)?;

    let bench = Bench { effort: options.effort(), dir };
    let mut report = Report::new(options, &cores);
    say(&report.head());
    say(&format!("{} of disk below {} are used meanwhile", kitfs::units::format_size(disk), bench.dir.display()));
    for row in &rows {
        say(&format!("… {} {}", row.name, row.about));
        let start = Instant::now();
        let figures = catch_unwind(AssertUnwindSafe(|| (row.measure)(&bench)));
        match figures {
            Ok(figures) => report.add(figures),
            Err(panic) => report.fail(row.name, panic.as_ref()),
        }
        say(&format!("  {:.0} s", start.elapsed().as_secs_f64()));
    }
    say(&report.table());
    report.write(options).map_err(|error| format!("can't write the report: {error}"))?;
    let failed = report.has_failed() || (options.check && report.has(Verdict::Missed));
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Prints a line; nobody has to listen.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
