//! What is being fetched or uploaded, on standard error, while a command waits for it.
//!
//! On a terminal a bar for each that is under way; elsewhere a line now and then, which short waits never reach. A thread
//! of its own looks at them, so that it shows how things are even where the runtime is busy.

use std::collections::HashMap;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::options::ProgressMode;
use super::output;
use crate::fetch::LayerFetch;
use crate::fs::prefetch::Report;
use crate::publish::Blob;
use crate::units::{format_duration, format_size};

/// How often a bar moves: smooth to the eye, of no weight to the machine.
const TICK: Duration = Duration::from_millis(100);
/// How often a line is written.
const PLAIN: Duration = Duration::from_secs(10);

/// What takes its time.
pub(super) trait Moves: Send + Sync {
    /// What is done with it: the word before a plain line.
    fn verb(&self) -> &'static str;
    /// What it is.
    fn name(&self) -> String;
    /// How many bytes it has.
    fn size(&self) -> u64;
    /// How many of them are done; `None` while it is not under way.
    fn done(&self) -> Option<u64>;
    /// As long as no more than these are done, it goes at a rate that tells nothing of the rest.
    fn left(&self) -> u64 {
        0
    }
}

impl Moves for LayerFetch {
    fn verb(&self) -> &'static str {
        "fetching"
    }

    fn name(&self) -> String {
        output::printable(self.layer.path.as_bytes())
    }

    fn size(&self) -> u64 {
        self.layer.size
    }

    fn done(&self) -> Option<u64> {
        self.gauge().map(|gauge| gauge.here)
    }

    fn left(&self) -> u64 {
        self.gauge().map(|gauge| gauge.left).unwrap_or_default()
    }
}

impl Moves for Blob {
    fn verb(&self) -> &'static str {
        "uploading"
    }

    fn name(&self) -> String {
        output::printable(self.what.as_bytes())
    }

    fn size(&self) -> u64 {
        self.id.size
    }

    fn done(&self) -> Option<u64> {
        self.sent()
    }
}

/// Shows progress until it is dropped; then nothing of the bars is left.
pub(super) struct Progress(Option<(Sender<()>, JoinHandle<()>)>);

impl Progress {
    /// Shows how far all of these are, each while it is under way.
    pub(super) fn of<M: Moves + 'static>(all: &[Arc<M>], mode: ProgressMode) -> Self {
        let all = all.to_vec();
        let (stop, stopped) = mpsc::channel();
        let watch = move || match mode {
            ProgressMode::None => {}
            ProgressMode::Fancy => {
                let mut bars = Bars::new();
                while stopped.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                    bars.show(&all);
                }
                // A terminal that is gone needs no clearing.
                let _ = bars.all.clear();
            }
            ProgressMode::Plain => {
                let mut begun = HashMap::new();
                while stopped.recv_timeout(PLAIN) == Err(RecvTimeoutError::Timeout) {
                    report(&all, &mut begun);
                }
            }
        };
        // Without a thread there is no progress to see, and the work goes on.
        Self(std::thread::Builder::new().name("progress".to_owned()).spawn(watch).ok().map(|thread| (stop, thread)))
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.0.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

/// The prefetch of a daemon, as it reports it.
pub(super) struct Waiting {
    latest: Arc<Latest>,
    _shown: Progress,
}

#[derive(Default)]
struct Latest(Mutex<Option<Report>>);

impl Waiting {
    pub(super) fn new(mode: ProgressMode) -> Self {
        let latest = Arc::<Latest>::default();
        Self { _shown: Progress::of(std::slice::from_ref(&latest), mode), latest }
    }

    pub(super) fn show(&self, report: Report) {
        *self.latest.0.lock().unwrap_or_else(|held| held.into_inner()) = Some(report);
    }
}

impl Latest {
    fn look<T: Default>(&self, look: impl FnOnce(&Report) -> T) -> T {
        self.0.lock().unwrap_or_else(|held| held.into_inner()).as_ref().map(look).unwrap_or_default()
    }
}

impl Moves for Latest {
    fn verb(&self) -> &'static str {
        "prefetching"
    }

    fn name(&self) -> String {
        self.look(|report| output::printable(report.mode.as_bytes()))
    }

    fn size(&self) -> u64 {
        self.look(|report| report.total)
    }

    fn done(&self) -> Option<u64> {
        self.look(|report| Some(report.done))
    }
}

/// A step of a work that has no bytes to count.
pub(super) struct Steps(Option<ProgressBar>);

impl Steps {
    pub(super) fn new(mode: ProgressMode) -> Self {
        Self((mode == ProgressMode::Fancy).then(|| {
            let spinner = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            spinner.set_style(ProgressStyle::default_spinner());
            spinner.enable_steady_tick(TICK);
            spinner
        }))
    }

    pub(super) fn show(&self, step: &str) {
        if let Some(spinner) = &self.0 {
            spinner.set_message(step.to_owned());
        }
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        if let Some(spinner) = &self.0 {
            spinner.finish_and_clear();
        }
    }
}

struct Bars {
    all: MultiProgress,
    shown: HashMap<usize, ProgressBar>,
    style: ProgressStyle,
}

impl Bars {
    fn new() -> Self {
        let template = "{prefix} {bar:24} {bytes}/{total_bytes} {bytes_per_sec} {eta} left";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        Self { all: MultiProgress::with_draw_target(ProgressDrawTarget::stderr()), shown: HashMap::new(), style }
    }

    fn show<M: Moves>(&mut self, all: &[Arc<M>]) {
        for (at, one) in all.iter().enumerate() {
            if let Some(done) = one.done() {
                let bar = self.shown.entry(at).or_insert_with(|| {
                    let bar = ProgressBar::new(one.size()).with_position(done).with_style(self.style.clone());
                    let bar = self.all.add(bar);
                    bar.set_prefix(one.name());
                    // What was here at first did not come at any rate.
                    bar.reset_eta();
                    bar
                });
                bar.set_length(one.size());
                bar.set_position(done);
                if done <= one.left() {
                    bar.reset_eta();
                }
            } else if let Some(bar) = self.shown.remove(&at) {
                bar.finish_and_clear();
            }
        }
    }
}

/// Says how far each is that is under way. `begun` remembers since when, and from where.
fn report<M: Moves>(all: &[Arc<M>], begun: &mut HashMap<usize, (Instant, u64)>) {
    for (at, one) in all.iter().enumerate() {
        if let Some(line) = line(&**one, begun.entry(at).or_insert_with(|| (Instant::now(), u64::MAX))) {
            output::say(one.verb(), line);
        }
    }
}

/// How far one is, if it is under way.
fn line(one: &impl Moves, (since, before): &mut (Instant, u64)) -> Option<String> {
    let (now, size) = (one.done()?, one.size());
    if *before == u64::MAX || now <= one.left() {
        (*since, *before) = (Instant::now(), now);
    }
    let rate = now.saturating_sub(*before).checked_div(since.elapsed().as_secs()).filter(|rate| *rate > 0);
    let rate = rate.map(|rate| {
        let left = format_duration(Duration::from_secs(size.saturating_sub(now) / rate));
        format!(", {}/s, {left} left", format_size(rate))
    });
    Some(format!("{}: {} of {}{}", one.name(), format_size(now), format_size(size), rate.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Something of 1000 MiB, of which 700 were left by an earlier fetch.
    struct Resumed(u64);

    impl Moves for Resumed {
        fn verb(&self) -> &'static str {
            "fetching"
        }

        fn name(&self) -> String {
            "w".to_owned()
        }

        fn size(&self) -> u64 {
            1000 << 20
        }

        fn done(&self) -> Option<u64> {
            Some(self.0 << 20)
        }

        fn left(&self) -> u64 {
            700 << 20
        }
    }

    #[test]
    fn what_was_left_by_an_earlier_fetch_says_nothing_of_the_rate() {
        let mut begun = (Instant::now(), u64::MAX);
        let mut at = |done, ago| {
            begun.0 -= Duration::from_secs(ago);
            line(&Resumed(done), &mut begun).expect("is under way")
        };
        assert_eq!(at(100, 0), "w: 100.0 MiB of 1000.0 MiB");
        assert_eq!(at(700, 10), "w: 700.0 MiB of 1000.0 MiB");
        assert_eq!(at(800, 10), "w: 800.0 MiB of 1000.0 MiB, 10.0 MiB/s, 20.0s left");
    }
}
