//! What a small read somewhere in a large file costs on the wire.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::thread;
use std::time::Duration;

use super::MIB;
use super::cold::large;
use crate::measure::{Figure, Goal};
use crate::mounted::Mounted;
use crate::options::Effort;
use crate::site::Traffic;
use crate::support::random::Random;
use crate::{Bench, Row};

/// How long nothing must be asked for until all that a read has caused is over.
const QUIET: Duration = Duration::from_millis(300);

pub(super) fn rows() -> Vec<Row> {
    vec![Row {
        name: "P5",
        about: "cold random reads of 4 KiB: requests and bytes on the wire for each",
        disk: |effort| 2 * size(effort) + 64 * MIB,
        measure,
    }]
}

fn size(effort: Effort) -> u64 {
    effort.pick(256 * MIB, 1024 * MIB)
}

/// Each read is in a chunk of its own: few of a file's, so that nobody takes it for one that is read whole. What counts is
/// the mean of a round, so that no costly read hides behind cheap ones.
fn measure(bench: &Bench) -> Vec<Figure> {
    let size = size(bench.effort);
    let (site, layer) = large(size);
    let mount = Mounted::cold(&site.reference("indexed"));
    let file = File::open(mount.path("data/model.bin")).expect("opens");
    let mut chunks: Vec<u64> = (1..size / MIB).collect();
    let mut random = Random::new(5);
    let mut most = (0.0, String::new());
    let mut read = || {
        let chunk = chunks.swap_remove(random.below(chunks.len()));
        let page = random.below(256) as u64;
        let before = site.traffic(&layer.digest);
        file.read_exact_at(&mut [0; 4096], chunk * MIB + page * 4096).expect("reads");
        let after = settled(|| site.traffic(&layer.digest));
        let bytes = (after.bytes - before.bytes) as f64 / MIB as f64;
        if bytes > most.0 {
            most = (bytes, format!("page {page} of chunk {chunk}"));
        }
        ((after.requests - before.requests) as f64, bytes)
    };
    let reads = bench.effort.pick(8, 25);
    let (mut requests, mut bytes) = (Vec::new(), Vec::new());
    for _ in 0..bench.effort.rounds() {
        let (of_requests, of_bytes): (Vec<f64>, Vec<f64>) = (0..reads).map(|_| read()).unzip();
        requests.push(mean(&of_requests));
        bytes.push(mean(&of_bytes));
    }
    vec![
        Figure::ratio("P5", "requests a cold random read of 4 KiB, mean", Goal::AtMost(1.0), requests).of("requests"),
        Figure::ratio("P5", "bytes a cold random read of 4 KiB, mean", Goal::AtMost(1.0), bytes)
            .of("MiB")
            .note(format!("the costliest of {} reads: {:.2} MiB, {}", reads * bench.effort.rounds(), most.0, most.1)),
    ]
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The traffic once nothing more comes.
fn settled(look: impl Fn() -> Traffic) -> Traffic {
    let mut last = look();
    loop {
        thread::sleep(QUIET);
        let now = look();
        if now == last {
            return now;
        }
        last = now;
    }
}
