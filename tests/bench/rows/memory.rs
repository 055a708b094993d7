//! What streaming a layer takes of memory, however long it is: the layer is sparse, the cache far too small for it.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::{GIB, MIB, gib};
use crate::layers::{self, LayerMaker};
use crate::machine;
use crate::measure::{Figure, Goal, median};
use crate::mounted::Mounted;
use crate::site::Site;
use crate::support::program::Kitfs;
use crate::{Bench, Row};

/// How often is looked.
const EVERY: Duration = Duration::from_millis(100);
/// What the cache may hold.
const CACHE: &str = "1GiB";
/// How much the last quarter may take more than the one before: the noise of an allocator.
const FLAT: f64 = 16.0;

pub(super) fn rows() -> Vec<Row> {
    vec![Row {
        name: "P6",
        about: "a sparse layer streamed at full speed into a cache of 1 GiB: memory of the daemon's own",
        // The cache holds what it may, and what is open beside it.
        disk: |_| 3 * GIB,
        measure,
    }]
}

fn measure(bench: &Bench) -> Vec<Figure> {
    let sizes = bench.effort.pick([4, 2], [100, 20]).map(|gib| gib * GIB);
    let mut figures = Vec::new();
    for (tag, indexed, size) in [("indexed", true, sizes[0]), ("no index", false, sizes[1])] {
        let site = Site::start();
        let mut layer = LayerMaker::new(&site, "data");
        layer.hole("data/zeros.bin", size);
        layers::kit(&site, "v1", &[layer.finish()], indexed);
        let mount = Mounted::by(Kitfs::new().with("KITFS_CACHE_SIZE", CACHE), &site.reference("v1"));
        let start = Instant::now();
        let samples = stream(&mount.path("data/zeros.bin"), mount.daemon());
        let rate = gib(size) / start.elapsed().as_secs_f64();
        figures.extend(told(&format!("{} GiB, {tag}", size / GIB), &samples, rate));
    }
    figures
}

/// What the daemon had of memory of its own, in MiB.
struct Samples {
    /// Before the first byte: a layer that has no index and no room is read once for its index.
    before: Vec<f64>,
    /// While bytes came.
    streaming: Vec<f64>,
}

/// Reads a file, and looks meanwhile at the daemon's memory.
fn stream(path: &Path, daemon: u32) -> Samples {
    let mut reader = Command::new("dd")
        .arg(format!("if={}", path.display()))
        .args(["of=/dev/null", "bs=1M", "status=none"])
        .stdin(Stdio::null())
        .spawn()
        .expect("dd runs");
    let mut samples = Samples { before: Vec::new(), streaming: Vec::new() };
    let mut has_begun = false;
    loop {
        has_begun |= machine::written_by(reader.id()) > 0;
        let phase = if has_begun { &mut samples.streaming } else { &mut samples.before };
        phase.push(machine::memory_of(daemon, "RssAnon") as f64 / MIB as f64);
        if let Some(status) = reader.try_wait().expect("a child") {
            assert!(status.success(), "dd of {}: {status}; {}", path.display(), mounts());
            return samples;
        }
        thread::sleep(EVERY);
    }
}

fn told(what: &str, Samples { before, streaming }: &Samples, rate: f64) -> Vec<Figure> {
    let count = streaming.len();
    let quarter = |number: usize| median(&streaming[number * count / 4..(number + 1) * count / 4]);
    let peak_of = |samples: &[f64]| samples.iter().copied().fold(0.0, f64::max);
    let peak = peak_of(before).max(peak_of(streaming));
    let quarters: Vec<_> = (0..4).map(|number| format!("{:.0}", quarter(number))).collect();
    let growth = quarter(3) - quarter(2);
    vec![
        Figure::ratio("P6", format!("{what}: peak RssAnon"), Goal::AtMost(300.0), vec![peak]).of("MiB").note(format!(
            "{rate:.2} GiB/s; medians of the quarters {} MiB, {count} samples; {:.0} s before the first byte, at most {:.0} MiB",
            quarters.join(", "),
            before.len() as f64 * EVERY.as_secs_f64(),
            peak_of(before),
        )),
        Figure::ratio("P6", format!("{what}: last quarter − third"), Goal::AtMost(FLAT), vec![growth]).of("MiB"),
    ]
}

/// What is mounted by kitfs, for a failure's sake.
fn mounts() -> String {
    let table = fs::read_to_string("/proc/mounts").unwrap_or_default();
    table.lines().filter(|line| line.contains("fuse.kitfs")).collect::<Vec<_>>().join("\n")
}
