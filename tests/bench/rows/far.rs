//! A server that is milliseconds away: what is counted in round trips, and what reading ahead hides of them.

use std::path::PathBuf;
use std::time::Duration;

use super::{GIB, MIB, gib};
use crate::layers::{self, LayerMaker};
use crate::measure::{Figure, Goal, cpu_note, in_turn, median, speeds, timed};
use crate::mounted::Mounted;
use crate::options::Effort;
use crate::rows::cold::large;
use crate::site::Site;
use crate::support::delay::Delay;
use crate::{Bench, Row, machine, readers};

/// Across a continent.
const FAR: Duration = Duration::from_millis(50);
/// To the next region.
const NEAR: Duration = Duration::from_millis(20);
/// What each of 100 layers of P1 holds: more than is worth fetching to see a header.
const PART: u64 = 2 * MIB;
/// A small file of P12.
const SMALL: u64 = 100 << 10;

pub(super) fn rows() -> Vec<Row> {
    vec![
        Row {
            name: "P0",
            about: "the delay proxy itself, against no proxy: it must not be what others wait for",
            disk: |effort| stream(effort) + 64 * MIB,
            measure: proxy,
        },
        Row {
            name: "P1",
            about: "100 layers without indexes, 50 ms away: mounting, against the fewest round trips",
            disk: |_| 100 * PART + 64 * MIB,
            measure: mount,
        },
        Row {
            name: "P11",
            about: "16 threads in 2 MiB stripes, 20 ms away, against one sequential reader",
            disk: |effort| 2 * stream(effort) + 64 * MIB,
            measure: stripes,
        },
        Row {
            name: "P12",
            about: "small files in order, 20 ms away, against the wire's rate and 10 round trips",
            disk: |effort| (1 + effort.rounds() as u64) * files(effort) * (SMALL + 1024) + 64 * MIB,
            measure: small_files,
        },
    ]
}

fn stream(effort: Effort) -> u64 {
    effort.pick(512 * MIB, 2 * GIB)
}

fn files(effort: Effort) -> u64 {
    effort.pick(2_000, 10_000)
}

fn proxy(bench: &Bench) -> Vec<Figure> {
    let (site, layer) = large(stream(bench.effort));
    let delay = Delay::before(site.host(), NEAR);
    let server = [("server", site.process())];
    let (near, far) = (site.url(&layer.digest), site.url_at(&delay.host(), &layer.digest));
    let (mut wire, mut delayed) = (Vec::new(), Vec::new());
    let [_, through] = in_turn(
        bench.effort.rounds(),
        [&mut || timed(0, &server, || wire.push(readers::curl_wire(&near))), &mut || {
            timed(0, &server, || delayed.push(readers::curl_wire(&far)))
        }],
    );
    let ratios = wire.iter().zip(&delayed).map(|(wire, delayed)| wire / delayed).collect();
    let rate = gib(layer.size) / median(&delayed);
    vec![
        Figure::ratio("P0", "curl through the delay proxy, 20 ms ÷ curl", Goal::None, ratios)
            .note(format!("the proxy carries {rate:.2} GiB/s on one connection"))
            .note(cpu_note("curl and proxy", &through, gib(layer.size), "GiB")),
    ]
}

fn mount(bench: &Bench) -> Vec<Figure> {
    // Connect, manifest, config, and the first bytes of all layers at once.
    const ROUND_TRIPS: u32 = 4;
    let site = Site::start();
    let made = (0..100).map(|number| {
        let dir = format!("part-{number:03}");
        let mut layer = LayerMaker::new(&site, &dir);
        layer.file(&format!("{dir}/weights.bin"), PART);
        layer.finish()
    });
    layers::kit(&site, "plain", &made.collect::<Vec<_>>(), false);
    let delay = Delay::before(site.host(), FAR);
    let reference = site.reference_at(&delay.host(), "plain");
    let (mut seconds, mut connections) = (Vec::new(), Vec::new());
    for _ in 0..bench.effort.rounds() {
        let before = delay.connections();
        machine::settle(64 * MIB);
        seconds.push(Mounted::cold(&reference).took());
        connections.push((delay.connections() - before) as f64);
    }
    let least = (ROUND_TRIPS * FAR).as_secs_f64();
    let ratios = seconds.iter().map(|seconds| seconds / least).collect();
    vec![Figure::ratio("P1", "mount, 100 layers, 50 ms ÷ 4 round trips", Goal::AtMost(1.2), ratios).note(format!(
        "{:.0} ms; {:.0} connections",
        1000.0 * median(&seconds),
        median(&connections)
    ))]
}

fn stripes(bench: &Bench) -> Vec<Figure> {
    let size = stream(bench.effort);
    let (site, _layer) = large(size);
    let delay = Delay::before(site.host(), NEAR);
    let reference = site.reference_at(&delay.host(), "indexed");
    let read = |threads: usize| {
        let mount = Mounted::cold(&reference);
        let path = mount.path("data/model.bin");
        let watched = [("daemon", mount.daemon()), ("server", site.process())];
        timed(2 * size, &watched, || readers::stripes(&path, threads, 2 << 20))
    };
    let [one, sixteen] = in_turn(bench.effort.rounds(), [&mut || read(1), &mut || read(16)]);
    vec![
        Figure::ratio("P11", "16 threads, 20 ms ÷ one reader", Goal::AtLeast(1.0), speeds(&sixteen, &one))
            .note(cpu_note("one", &one, gib(size), "GiB"))
            .note(cpu_note("16", &sixteen, gib(size), "GiB")),
    ]
}

fn small_files(bench: &Bench) -> Vec<Figure> {
    const ROUND_TRIPS: u32 = 10;
    let site = Site::start();
    let mut layer = LayerMaker::new(&site, "data");
    let names: Vec<String> = (0..files(bench.effort)).map(|number| format!("data/{number:05}.bin")).collect();
    names.iter().for_each(|name| layer.file(name, SMALL));
    let layer = layer.finish();
    layers::kit(&site, "indexed", std::slice::from_ref(&layer), true);
    let delay = Delay::before(site.host(), NEAR);
    let reference = site.reference_at(&delay.host(), "indexed");
    let url = site.url_at(&delay.host(), &layer.digest);
    let bytes = names.len() as u64 * SMALL;

    // The files of earlier rounds stay: ext4 without a journal looks a minute long at each inode that was freed before it
    // takes one, which cost a round more than its hashes.
    let (mut wire, mut past) = (Vec::new(), Vec::new());
    let [_, read] = in_turn(
        bench.effort.rounds(),
        [&mut || timed(bytes, &[("server", site.process())], || wire.push(readers::curl_wire(&url))), &mut || {
            let mut mount = Mounted::cold(&reference);
            let paths: Vec<PathBuf> = names.iter().map(|name| mount.path(name)).collect();
            let watched = [("daemon", mount.daemon()), ("server", site.process())];
            let run = timed(2 * bytes, &watched, || readers::in_order(&paths, bytes));
            mount.leave();
            past.push(mount);
            run
        }],
    );
    drop(past);
    let extra = (ROUND_TRIPS * NEAR).as_secs_f64();
    let ratios = read.iter().zip(&wire).map(|(run, wire)| run.seconds / (wire + extra)).collect();
    vec![
        Figure::ratio(
            "P12",
            format!("{} cold files of 100 KiB, 20 ms ÷ wire + 10 round trips", names.len()),
            Goal::AtMost(2.0),
            ratios,
        )
        .note(format!("the wire: {:.2} s, {:.2} GiB/s", median(&wire), gib(layer.size) / median(&wire)))
        .note(cpu_note("files", &read, gib(bytes), "GiB")),
    ]
}
