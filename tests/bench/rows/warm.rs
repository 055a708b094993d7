//! A large file that is here, read through the mount, against the same reads of the cache's own file: with the kernel reading
//! it by itself (passthrough), and through the daemon and the kernel's pages.

use std::path::Path;

use super::cold::large;
use super::{GIB, MIB};
use crate::measure::{Figure, Goal, Run, in_turn, speeds, timed};
use crate::mounted::Mounted;
use crate::options::Effort;
use crate::readers;
use crate::support::program::Kitfs;
use crate::{Bench, Row};

/// How often a run reads the file: once takes so little that starting a program would count.
const PASSES: usize = 2;

pub(super) fn rows() -> Vec<Row> {
    vec![
        Row { name: "P4", about: "warm sequential reads, against the cache's own file", disk, measure: sequential },
        Row { name: "P4b", about: "warm random reads of 4 KiB, against the cache's own file", disk, measure: random },
    ]
}

fn disk(effort: Effort) -> u64 {
    2 * size(effort) + 64 * MIB
}

fn size(effort: Effort) -> u64 {
    effort.pick(512 * MIB, 2 * GIB)
}

/// Many, as each is over in a fraction of a second, and what else the machine does hits some of them hard.
fn rounds(effort: Effort) -> usize {
    effort.pick(9, 15)
}

/// Which of the two ways a mount may read.
#[derive(Clone, Copy)]
struct Way {
    name: &'static str,
    /// `KITFS_PASSTHROUGH`.
    passthrough: &'static str,
}

const PASSTHROUGH: Way = Way { name: "passthrough", passthrough: "auto" };
const CACHED: Way = Way { name: "cached", passthrough: "never" };

/// Gives `look` the file in a mount where it is complete and warm, and the cache's own.
fn warm<T>(size: u64, way: Way, look: impl FnOnce(&Path, &Path) -> T) -> (T, String) {
    let (site, _layer) = large(size);
    let reference = site.reference("indexed");
    let kitfs = Kitfs::new().with("KITFS_PASSTHROUGH", way.passthrough);
    let mut mount = Mounted::by(kitfs, &reference);
    readers::cat(&mount.path("data/model.bin"));
    let object = mount.object(size);
    mount.again(&reference);
    let file = mount.path("data/model.bin");
    readers::cat(&file);
    readers::cat(&object);
    let found = look(&file, &object);
    let reads = &mount.status()["reads"];
    (found, format!("files were opened: {}; why not passed through: {}", reads["opened"], reads["why"]))
}

fn sequential(bench: &Bench) -> Vec<Figure> {
    let size = size(bench.effort);
    let timed = |reader: fn(&Path), path: &Path| timed(0, &[], || (0..PASSES).for_each(|_| reader(path)));
    let compare = |way: Way, goals: [Goal; 2]| {
        let compared = |file: &Path, object: &Path| {
            let both = |reader: fn(&Path)| {
                let [own, mounted]: [Vec<Run>; 2] =
                    in_turn(rounds(bench.effort), [&mut || timed(reader, object), &mut || timed(reader, file)]);
                speeds(&mounted, &own)
            };
            [both(readers::dd), both(readers::copy_map)]
        };
        let (ratios, note) = warm(size, way, compared);
        let names = ["dd bs=1M", "mmap copy"].iter().zip(ratios).zip(goals);
        let figure = |((what, values), goal): ((&&str, Vec<f64>), Goal)| {
            Figure::ratio("P4", format!("warm {what}, {} ÷ cache's file", way.name), goal, values).note(note.clone())
        };
        names.map(figure).collect::<Vec<_>>()
    };
    // A map of pages that the daemon filled costs a fault each: 0.31 was measured as the kernel's own, and has no goal.
    let with = compare(PASSTHROUGH, [Goal::AtLeast(0.95); 2]);
    let without = compare(CACHED, [Goal::AtLeast(0.6), Goal::None]);
    [with, without].concat()
}

fn random(bench: &Bench) -> Vec<Figure> {
    let seconds = bench.effort.pick(1, 4);
    let measure = |way: Way, goal: Goal| {
        let compared = |file: &Path, object: &Path| {
            let (mut own, mut mounted) = (Vec::new(), Vec::new());
            in_turn(
                bench.effort.rounds(),
                [&mut || timed(0, &[], || own.push(readers::fio(object, seconds))), &mut || {
                    timed(0, &[], || mounted.push(readers::fio(file, seconds)))
                }],
            );
            own.iter().zip(&mounted).map(|(own, mounted)| mounted / own).collect::<Vec<_>>()
        };
        let (ratios, note) = warm(size(bench.effort), way, compared);
        Figure::ratio("P4b", format!("warm fio randread 4K, {} ÷ cache's file", way.name), goal, ratios).note(note)
    };
    vec![measure(PASSTHROUGH, Goal::AtLeast(0.75)), measure(CACHED, Goal::None)]
}
