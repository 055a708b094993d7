//! Runs, pairs of them, and figures: the one place of medians, ratios and verdicts.

use std::time::Instant;

use crate::machine;

/// One timed run.
#[derive(Debug, Clone)]
pub struct Run {
    pub seconds: f64,
    /// Seconds of CPU by whom they were used.
    pub cpu: Vec<(&'static str, f64)>,
}

/// Times `work`, with `memory` bytes touched and freed before; tells what the `watched` processes used of the CPU meanwhile,
/// and who is not watched: this process and its children are `readers`.
pub fn timed(memory: u64, watched: &[(&'static str, u32)], work: impl FnOnce()) -> Run {
    machine::settle(memory);
    let used = || -> Vec<(&'static str, f64)> {
        let watched = watched.iter().map(|(name, process)| (*name, machine::cpu_of(*process)));
        watched.chain([("readers", machine::cpu_here())]).collect()
    };
    let before = used();
    let start = Instant::now();
    work();
    let seconds = start.elapsed().as_secs_f64();
    let cpu = used().into_iter().zip(before).map(|((name, after), (_, before))| (name, after - before)).collect();
    Run { seconds, cpu }
}

/// Lets the sides run in turn, so many rounds; each round begins with another, so that none has the better place.
pub fn in_turn<const N: usize>(rounds: usize, sides: [&mut dyn FnMut() -> Run; N]) -> [Vec<Run>; N] {
    let mut runs = std::array::from_fn(|_| Vec::with_capacity(rounds));
    for round in 0..rounds {
        for side in (0..N).map(|side| (side + round) % N) {
            let run = sides[side]();
            runs[side].push(run);
        }
    }
    runs
}

/// How many times as fast the subject was as the baseline, round by round. Both have moved the same bytes.
pub fn speeds(subject: &[Run], baseline: &[Run]) -> Vec<f64> {
    subject.iter().zip(baseline).map(|(subject, baseline)| baseline.seconds / subject.seconds).collect()
}

/// What runs took of the CPU for each of `units`, in words.
pub fn cpu_note(who: &str, runs: &[Run], units: f64, unit: &str) -> String {
    let names = runs.first().map(|run| run.cpu.iter().map(|(name, _)| *name).collect::<Vec<_>>()).unwrap_or_default();
    let part = |(at, name): (usize, &&str)| {
        let seconds = runs.iter().map(|run| run.cpu[at].1).collect::<Vec<_>>();
        format!("{name} {:.2}", median(&seconds) / units)
    };
    let parts: Vec<_> = names.iter().enumerate().map(part).collect();
    let seconds = median(&runs.iter().map(|run| run.seconds).collect::<Vec<_>>());
    format!("{who}: {seconds:.2} s, CPU-s/{unit}: {}", parts.join(", "))
}

/// What a figure should be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    AtLeast(f64),
    AtMost(f64),
    /// It explains others.
    None,
}

/// What has become of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Met,
    Missed,
    /// There is no goal.
    Told,
}

/// One line of the table.
#[derive(Debug, Clone)]
pub struct Figure {
    pub row: &'static str,
    pub what: String,
    /// Of the values; a ratio is `×`.
    pub unit: &'static str,
    pub goal: Goal,
    /// One for each round.
    pub values: Vec<f64>,
    pub notes: Vec<String>,
}

impl Figure {
    /// A ratio.
    pub fn ratio(row: &'static str, what: impl Into<String>, goal: Goal, values: Vec<f64>) -> Self {
        Self { row, what: what.into(), unit: "×", goal, values, notes: Vec::new() }
    }

    /// The same in a unit.
    pub fn of(self, unit: &'static str) -> Self {
        Self { unit, ..self }
    }

    /// With an explanation.
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    pub fn median(&self) -> f64 {
        median(&self.values)
    }

    /// The least and the greatest value.
    pub fn spread(&self) -> (f64, f64) {
        let fold = |pick: fn(f64, f64) -> f64| self.values.iter().copied().reduce(pick).unwrap_or(f64::NAN);
        (fold(f64::min), fold(f64::max))
    }

    /// The median decides. No value (`NaN`) meets no goal.
    pub fn verdict(&self) -> Verdict {
        let met = match self.goal {
            Goal::AtLeast(goal) => self.median() >= goal,
            Goal::AtMost(goal) => self.median() <= goal,
            Goal::None => return Verdict::Told,
        };
        if met { Verdict::Met } else { Verdict::Missed }
    }

    /// Whether single rounds lie on the other side of the goal: then noise may have decided.
    pub fn is_close(&self) -> bool {
        let (low, high) = self.spread();
        match self.goal {
            Goal::AtLeast(goal) | Goal::AtMost(goal) => low < goal && goal < high,
            Goal::None => false,
        }
    }
}

/// The middle one; of an even number, the mean of the middle two.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => sorted[len / 2],
        len => f64::midpoint(sorted[len / 2 - 1], sorted[len / 2]),
    }
}
