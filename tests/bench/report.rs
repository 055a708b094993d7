//! The figures as a table for people, and as JSON for programs.

use std::any::Any;
use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Value, json};

use crate::machine;
use crate::measure::{Figure, Goal, Verdict};
use crate::options::Options;
use crate::plot;

/// Where the figures of whole tables are kept.
const KEPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/bench");

/// What was found.
pub struct Report {
    effort: &'static str,
    rounds: usize,
    machine: String,
    cores: String,
    /// The load of the machine before the first row.
    load: f64,
    figures: Vec<Figure>,
    /// Rows that gave no figures, and why.
    failures: Vec<(&'static str, String)>,
}

impl Report {
    pub fn new(options: &Options, cores: &str) -> Self {
        let effort = options.effort();
        Self {
            effort: effort.name(),
            rounds: effort.rounds(),
            machine: machine::description(),
            cores: cores.to_owned(),
            load: machine::load(),
            figures: Vec::new(),
            failures: Vec::new(),
        }
    }

    pub fn add(&mut self, figures: Vec<Figure>) {
        self.figures.extend(figures);
    }

    /// Notes that a row panicked.
    pub fn fail(&mut self, row: &'static str, panic: &(dyn Any + Send)) {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        self.failures.push((row, text.unwrap_or("it panicked").to_owned()));
    }

    pub fn has_failed(&self) -> bool {
        !self.failures.is_empty()
    }

    pub fn has(&self, verdict: Verdict) -> bool {
        self.figures.iter().any(|figure| figure.verdict() == verdict)
    }

    /// On what it is measured.
    pub fn head(&self) -> String {
        let Self { effort, rounds, machine, cores, load, .. } = self;
        let busy = if *load > 1.0 { "; others are at work here: expect noise" } else { "" };
        format!(
            "kitfs {}, {effort}, {rounds} rounds\n{machine}\n{cores}, shared by server, daemon and readers; load {load:.1}{busy}",
            env!("CARGO_PKG_VERSION")
        )
    }

    /// The table, and below it what explains it.
    pub fn table(&self) -> String {
        let mut lines = vec![["row", "what", "median", "spread", "goal", "verdict"].map(str::to_owned)];
        for figure in &self.figures {
            let (low, high) = figure.spread();
            lines.push([
                figure.row.to_owned(),
                figure.what.clone(),
                format!("{} {}", number(figure.median()), figure.unit),
                if figure.values.len() > 1 { format!("{} – {}", number(low), number(high)) } else { String::new() },
                goal(figure.goal),
                verdict(figure),
            ]);
        }
        for (row, _) in &self.failures {
            lines.push([row, "it failed, see below", "", "", "", "FAILED"].map(str::to_owned));
        }
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default();
        let widths: [usize; 6] = std::array::from_fn(width);
        let mut text = String::from("\n");
        for line in &lines {
            let cells = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
            text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
            text.push('\n');
        }
        for figure in self.figures.iter().filter(|figure| !figure.notes.is_empty()) {
            text.push_str(&format!("\n{} {}\n", figure.row, figure.what));
            figure.notes.iter().for_each(|note| text.push_str(&format!("    {note}\n")));
        }
        for (row, why) in &self.failures {
            text.push_str(&format!("\n{row} failed: {why}\n"));
        }
        text
    }

    /// Keeps the figures and their picture: those of a whole table beside the documentation, and all where it is wanted.
    pub fn write(&self, options: &Options) -> io::Result<()> {
        let whole = options.is_whole() && !self.has_failed();
        let kept = whole.then(|| Path::new(KEPT).join(self.effort).with_extension("json"));
        for file in options.json.iter().chain(&kept) {
            fs::write(file, format!("{:#}\n", self.json()))?;
            let picture = file.with_extension("svg");
            fs::write(&picture, plot::draw(&self.figures, &self.head()))?;
            crate::say(&format!("written: {}, {}", file.display(), picture.display()));
        }
        Ok(())
    }

    fn json(&self) -> Value {
        let figure = |figure: &Figure| {
            let (low, high) = figure.spread();
            let goal = match figure.goal {
                Goal::AtLeast(goal) => json!({"at_least": goal}),
                Goal::AtMost(goal) => json!({"at_most": goal}),
                Goal::None => Value::Null,
            };
            json!({
                "row": figure.row, "what": figure.what, "unit": figure.unit, "goal": goal,
                "median": figure.median(), "low": low, "high": high, "values": figure.values,
                "verdict": verdict(figure), "notes": figure.notes,
            })
        };
        json!({
            "kitfs": env!("CARGO_PKG_VERSION"), "effort": self.effort, "rounds": self.rounds, "machine": self.machine,
            "cores": self.cores, "load": self.load,
            "figures": self.figures.iter().map(figure).collect::<Vec<_>>(),
            "failed": self.failures.iter().map(|(row, why)| json!({"row": row, "why": why})).collect::<Vec<_>>(),
        })
    }
}

/// A number with as many digits as mean something.
pub fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn goal(goal: Goal) -> String {
    match goal {
        Goal::AtLeast(goal) => format!("≥ {goal}"),
        Goal::AtMost(goal) => format!("≤ {goal}"),
        Goal::None => String::new(),
    }
}

/// Met or missed, and whether single rounds say otherwise.
fn verdict(figure: &Figure) -> String {
    let verdict = match figure.verdict() {
        Verdict::Met => "met",
        Verdict::Missed => "missed",
        Verdict::Told => return String::new(),
    };
    if figure.is_close() { format!("{verdict}, within the noise") } else { verdict.to_owned() }
}
