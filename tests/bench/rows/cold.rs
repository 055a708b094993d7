//! A large file that is not here yet, read through a new mount with an empty cache, against `curl -o` of the same blob to the
//! same disk. What the mount delivers is verified and kept; what curl delivers is kept.

use std::path::{Path, PathBuf};

use kitfs::digest::Digest;

use super::{GIB, MIB, gib};
use crate::layers::{self, Layer, LayerMaker};
use crate::measure::{Figure, Goal, Run, cpu_note, in_turn, speeds, timed};
use crate::mounted::Mounted;
use crate::options::Effort;
use crate::readers;
use crate::site::Site;
use crate::support::Registry;
use crate::{Bench, Row};

/// The layer and the file in it.
const NAME: &str = "data/model.bin";
/// With an index, and without.
const TAGS: [(&str, bool); 2] = [("indexed", true), ("plain", false)];

pub(super) fn rows() -> Vec<Row> {
    vec![
        Row {
            name: "P2",
            about: "cold sequential read of an indexed file, against curl -o",
            disk,
            measure: |bench| sequential(bench, "P2", "indexed", Goal::AtLeast(1.2)),
        },
        Row {
            name: "P2b",
            about: "cold sequential read of a file without an index, against curl -o",
            disk,
            measure: |bench| sequential(bench, "P2b", "plain", Goal::AtLeast(1.2)),
        },
        Row {
            name: "P2c",
            about: "cold read by mmap in order of an indexed file, against curl -o",
            disk,
            measure: mapped,
        },
        Row {
            name: "P2r",
            about: "cold sequential read of an indexed file from docker-registry, against curl -o",
            disk,
            measure: from_registry,
        },
    ]
}

/// The blob; and what a run keeps of it.
fn disk(effort: Effort) -> u64 {
    2 * size(effort) + 64 * MIB
}

fn size(effort: Effort) -> u64 {
    effort.pick(512 * MIB, 2 * GIB)
}

/// A server with one large file in a layer, with and without an index.
pub(super) fn large(size: u64) -> (Site, Layer) {
    let site = Site::start();
    let mut layer = LayerMaker::new(&site, "data");
    layer.file(NAME, size);
    let layer = layer.finish();
    for (tag, indexed) in TAGS {
        layers::kit(&site, tag, std::slice::from_ref(&layer), indexed);
    }
    (site, layer)
}

fn sequential(bench: &Bench, row: &'static str, tag: &str, goal: Goal) -> Vec<Figure> {
    let size = size(bench.effort);
    let (site, layer) = large(size);
    let cold = Cold { server: site.process(), reference: site.reference(tag), size };
    let [curl, cat, dd] = in_turn(
        bench.effort.rounds(),
        [
            &mut || download(bench, cold.server, &site.url(&layer.digest), size),
            &mut || cold.read(readers::cat),
            &mut || cold.read(readers::dd),
        ],
    );
    let with_notes = |figure: Figure, who: &str, runs: &[Run]| {
        figure.note(cpu_note("curl", &curl, gib(size), "GiB")).note(cpu_note(who, runs, gib(size), "GiB"))
    };
    let said = if tag == "indexed" { "indexed" } else { "no index" };
    vec![
        with_notes(Figure::ratio(row, format!("cold cat, {said} ÷ curl -o"), goal, speeds(&cat, &curl)), "cat", &cat),
        with_notes(Figure::ratio(row, format!("cold dd bs=1M, {said} ÷ curl -o"), goal, speeds(&dd, &curl)), "dd", &dd),
    ]
}

fn mapped(bench: &Bench) -> Vec<Figure> {
    let size = size(bench.effort);
    let (site, layer) = large(size);
    let cold = Cold { server: site.process(), reference: site.reference("indexed"), size };
    let [curl, map] = in_turn(
        bench.effort.rounds(),
        [&mut || download(bench, cold.server, &site.url(&layer.digest), size), &mut || cold.read(readers::copy_map)],
    );
    let figure =
        Figure::ratio("P2c", "cold mmap copy in order, indexed ÷ curl -o", Goal::AtLeast(1.0), speeds(&map, &curl));
    vec![figure.note(cpu_note("curl", &curl, gib(size), "GiB")).note(cpu_note("mmap", &map, gib(size), "GiB"))]
}

/// The reference registry, which reads at least 4 MiB from its disk for each range.
fn from_registry(bench: &Bench) -> Vec<Figure> {
    let size = size(bench.effort);
    let (site, layer) = large(size);
    let registry = Registry::start();
    let reference = move_to(&registry, &site, &layer.digest);
    let url = format!("http://{}/v2/bench/kit/blobs/{}", registry.host(), layer.digest);
    let cold = Cold { server: registry.process(), reference, size };
    let [curl, dd] = in_turn(
        bench.effort.rounds(),
        [&mut || download(bench, cold.server, &url, size), &mut || cold.read(readers::dd)],
    );
    let what = "cold dd bs=1M, indexed, docker-registry ÷ curl -o";
    vec![
        Figure::ratio("P2r", what, Goal::None, speeds(&dd, &curl))
            .note(cpu_note("curl", &curl, gib(size), "GiB"))
            .note(cpu_note("dd", &dd, gib(size), "GiB")),
    ]
}

/// Gives the registry what the site has, the large layer without a copy.
fn move_to(registry: &Registry, site: &Site, layer: &Digest) -> String {
    let manifest = std::fs::read(site.manifest("indexed")).expect("the manifest");
    registry.push_blob("bench/kit", b"so that the repository is there");
    let link = registry.storage().join("docker/registry/v2/repositories/bench/kit/_layers/sha256").join(layer.hex());
    for dir in [registry.blob_file(layer).parent().expect("a directory"), &link] {
        std::fs::create_dir_all(dir).expect("created");
    }
    std::fs::rename(site.blob(layer), registry.blob_file(layer)).expect("the layer moves");
    std::fs::write(link.join("link"), layer.to_string()).expect("written");
    let rest: Vec<Vec<u8>> = site.blobs().iter().map(|path| std::fs::read(path).expect("a small blob")).collect();
    registry.push("bench/kit", "indexed", &manifest, &rest.iter().map(Vec::as_slice).collect::<Vec<_>>());
    format!("{}/bench/kit:indexed", registry.host())
}

/// What is read through new mounts.
struct Cold {
    server: u32,
    reference: String,
    size: u64,
}

impl Cold {
    /// Times one read; mounting and leaving are not timed. The file is verified and kept: it becomes an object.
    fn read(&self, reader: impl FnOnce(&Path)) -> Run {
        let mount = Mounted::cold(&self.reference);
        let path = mount.path(NAME);
        // The kernel's pages, and the cache's file.
        let run = timed(2 * self.size, &[("daemon", mount.daemon()), ("server", self.server)], || reader(&path));
        mount.object(self.size);
        run
    }
}

fn download(bench: &Bench, server: u32, url: &str, size: u64) -> Run {
    let to: PathBuf = bench.dir.join("downloaded");
    let run = timed(2 * size, &[("server", server)], || readers::curl(url, &to));
    std::fs::remove_file(&to).expect("downloaded");
    run
}
