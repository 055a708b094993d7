//! Many entries: how long a mount and a listing take, and what they cost.

use std::fs;
use std::path::Path;
use std::time::Instant;

use super::MIB;
use crate::layers::{self, names_only};
use crate::machine;
use crate::measure::{Figure, Goal, Run, in_turn, median, speeds, timed};
use crate::mounted::Mounted;
use crate::options::Effort;
use crate::readers;
use crate::site::Site;
use crate::{Bench, Row};

/// How often a run lists its tree: once is over in milliseconds.
const PASSES: usize = 5;

pub(super) fn rows() -> Vec<Row> {
    vec![
        Row {
            name: "P7",
            about: "many entries: mounting, the first ls -lR, memory an entry",
            // The index at the server, in the cache, and while it is fetched.
            disk: |effort| 3 * 120 * sizes(effort)[1] + 64 * MIB,
            measure: many,
        },
        Row {
            name: "P9",
            about: "ls -lR of 10,000 files, warm, against the same on a disk",
            disk: |_| 256 * MIB,
            measure: listing,
        },
    ]
}

/// Two, to see what an entry more costs.
fn sizes(effort: Effort) -> [u64; 2] {
    effort.pick([10_000, 50_000], [200_000, 1_000_000])
}

/// What one size gave.
struct Many {
    entries: f64,
    /// Seconds.
    mount: f64,
    /// Seconds.
    list: f64,
    /// Bytes of memory of the daemon's own after mounting, and after listing.
    memory: [f64; 2],
    /// Bytes of files that it has mapped.
    mapped: f64,
}

fn many(bench: &Bench) -> Vec<Figure> {
    let rounds = bench.effort.pick(3, 3);
    let [few, all] = sizes(bench.effort).map(|files| {
        let site = Site::start();
        let layer = names_only(&site, "data", files);
        layers::kit(&site, "v1", &[layer], true);
        (0..rounds).map(|_| look(&site.reference("v1"), files)).collect::<Vec<_>>()
    });
    let pairs = || few.iter().zip(&all);
    let more = |of: fn(&Many) -> f64| -> Vec<f64> {
        pairs().map(|(few, all)| (of(all) / all.entries) / (of(few) / few.entries)).collect()
    };
    let an_entry = |of: fn(&Many) -> f64| -> Vec<f64> {
        pairs().map(|(few, all)| (of(all) - of(few)) / (all.entries - few.entries)).collect()
    };
    let middle = |all: &[Many], of: fn(&Many) -> f64| median(&all.iter().map(of).collect::<Vec<_>>());
    let seconds = |of: fn(&Many) -> f64| {
        let (few_entries, all_entries) = (few[0].entries, all[0].entries);
        format!("{few_entries} entries {:.2} s, {all_entries} entries {:.2} s", middle(&few, of), middle(&all, of))
    };
    let mapped = median(&an_entry(|many| many.mapped));
    let mounted = median(&an_entry(|many| many.memory[0]));
    // Linear, with what a machine's caches take of it.
    let linear = Goal::AtMost(1.25);
    vec![
        Figure::ratio("P7", "mount: an entry of the large tree ÷ of the small", linear, more(|many| many.mount))
            .note(seconds(|many| many.mount)),
        Figure::ratio("P7", "first ls -lR: an entry of the large ÷ of the small", linear, more(|many| many.list))
            .note(seconds(|many| many.list)),
        Figure::ratio(
            "P7",
            "memory an entry, RssAnon after ls -lR",
            Goal::AtMost(200.0),
            an_entry(|many| many.memory[1]),
        )
        .of("B")
        .note(format!("{mounted:.0} B after mounting; mapped files beside: {mapped:.0} B an entry")),
    ]
}

fn look(reference: &str, files: u64) -> Many {
    machine::settle(64 * MIB);
    let mount = Mounted::cold(reference);
    let anonymous = || machine::memory_of(mount.daemon(), "RssAnon") as f64;
    let after_mount = anonymous();
    let start = Instant::now();
    readers::ls(&mount.path("data"));
    let list = start.elapsed().as_secs_f64();
    let mapped = machine::memory_of(mount.daemon(), "RssFile") as f64;
    let entries = (files + files.div_ceil(1000) + 1) as f64;
    Many { entries, mount: mount.took(), list, memory: [after_mount, anonymous()], mapped }
}

fn listing(bench: &Bench) -> Vec<Figure> {
    const FILES: u64 = 10_000;
    let site = Site::start();
    let layer = names_only(&site, "data", FILES);
    layers::kit(&site, "v1", &[layer], true);
    let mount = Mounted::cold(&site.reference("v1"));
    let own = tempfile::tempdir().expect("a directory");
    copy_names(&mount.path("data"), &own.path().join("data"));

    let list = |dir: &Path| timed(0, &[("daemon", mount.daemon())], || (0..PASSES).for_each(|_| readers::ls(dir)));
    let [disk, mounted]: [Vec<Run>; 2] =
        in_turn(bench.effort.pick(5, 9), [&mut || list(&own.path().join("data")), &mut || list(&mount.path("data"))]);
    let calls = mounted.iter().map(|run| run.cpu[0].1).sum::<f64>() / (mounted.len() * PASSES) as f64;
    vec![
        Figure::ratio("P9", "ls -lR of 10,000 files, warm ÷ a disk", Goal::AtLeast(0.7), speeds(&mounted, &disk))
            .note(format!("the daemon takes {:.0} ms of CPU for each listing", 1000.0 * calls))
            .note(format!("the disk: {}", file_system(own.path()))),
    ]
}

/// Makes the tree of a directory again, with files of the same sizes.
fn copy_names(from: &Path, to: &Path) {
    fs::create_dir(to).expect("created");
    for entry in fs::read_dir(from).expect("reads a directory") {
        let entry = entry.expect("reads an entry");
        let (metadata, to) = (entry.metadata().expect("stats"), to.join(entry.file_name()));
        if metadata.is_dir() {
            copy_names(&entry.path(), &to);
        } else {
            fs::write(to, vec![7; metadata.len() as usize]).expect("written");
        }
    }
}

/// The type of the file system that a directory is on.
fn file_system(dir: &Path) -> String {
    let table = fs::read_to_string("/proc/mounts").expect("the table of mounts");
    let mounts = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let holding = mounts.filter(|fields| dir.starts_with(fields[1])).max_by_key(|fields| fields[1].len());
    holding.map_or_else(String::new, |fields| fields[2].to_owned())
}
