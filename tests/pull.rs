//! `kitfs pull`: a kit is complete in the cache afterwards, what was here is not fetched again, and what is kept fits.

mod support;

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::kit::{KitBuilder, Served, gzip, huge_tar, pattern, pattern_at, tar};
use support::program::Kitfs;
use support::{Fault, FaultServer, eventually};

const MIB: u64 = 1 << 20;

/// A kit with a layer of each sort: large and small files, one file's bytes, a compressed one; and what is in it.
fn mixed() -> (KitBuilder, Vec<(String, Vec<u8>)>) {
    let mut files: Vec<(String, Vec<u8>)> = (0..40)
        .map(|number| (format!("w/part{number:02}.txt"), pattern(number, 3000 + 977 * number as usize)))
        .collect();
    files.push(("w/empty".to_owned(), Vec::new()));
    files.push(("w/one.bin".to_owned(), pattern(91, 9 * MIB as usize + 12_345)));
    // The same content twice, and more files with chunk lists than are fetched one by one.
    files.push(("w/same.bin".to_owned(), pattern(91, 9 * MIB as usize + 12_345)));
    files.extend((0..6).map(|number| (format!("w/two{number}.bin"), pattern(100 + number, 2 * MIB as usize))));
    files.sort();
    let listed: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let docs = pattern(7, 300_000);
    let builder = KitBuilder::new()
        .tar("model", "w", tar(&listed))
        .layer("datasets", "data.bin", "raw", pattern(8, 3 * MIB as usize))
        .layer("docs", "docs", "tar+gzip", gzip(&tar(&[("docs/a.md", &docs)])));
    files.push(("data.bin".to_owned(), pattern(8, 3 * MIB as usize)));
    files.push(("docs/a.md".to_owned(), docs));
    (builder, files)
}

fn pull(kitfs: &Kitfs, reference: &str, options: &[&str]) -> Value {
    let text = kitfs.ok(&[&["pull", reference, "--json"], options].concat());
    serde_json::from_str(&text).expect("JSON")
}

/// Mounts and reads everything, whether the server is there or not.
fn assert_reads(kitfs: &Kitfs, reference: &str, options: &[&str], files: &[(String, Vec<u8>)]) {
    let mount = kitfs.mount(reference, options);
    for (name, bytes) in files {
        assert!(std::fs::read(mount.path(name)).expect("reads") == *bytes, "{name}");
    }
}

/// Requests for layers so far.
fn asked(server: &FaultServer, kit: &Served) -> usize {
    kit.layers.iter().map(|layer| server.requests_for(layer)).sum()
}

/// Pulls a kit, pulls it again, stops the registry, pulls it once more, and reads it.
fn assert_complete(server: FaultServer, kit: &Served, options: &[&str], trust: &str, files: &[(String, Vec<u8>)]) {
    let kitfs = Kitfs::new();
    let first = pull(&kitfs, &kit.reference, options);
    assert_eq!(first["digest"], kit.digest.to_string());
    assert_eq!(first["layers"].as_array().expect("layers").len(), 3);
    assert_eq!(first["layers"][0]["trust"], trust);
    assert_eq!((&first["kept"], &first["layers"][0]["error"]), (&Value::Bool(false), &Value::Null));
    let size = first["bytes"].as_u64().expect("bytes");
    let fetched = first["fetched"].as_u64().expect("bytes");
    let sent: u64 = kit.layers.iter().map(|layer| server.bytes_for(layer)).sum();
    assert!(fetched > size / 2 && fetched <= size, "{fetched} of {size}");
    assert!(sent <= size + size / 50, "{sent} bytes sent for {size}");
    assert!(kitfs.cached_files("partial").is_empty(), "all is committed when the command returns");
    assert!(kitfs.cached_files("incoming").is_empty());

    server.reset_counters();
    let second = pull(&kitfs, &kit.reference, options);
    assert_eq!((second["fetched"].as_u64(), second["bytes"].as_u64()), (Some(0), Some(size)));
    assert_eq!(asked(&server, kit), 0);
    drop(server);
    let said = kitfs.ok(&[&["pull", &kit.reference], options].concat());
    assert!(said.contains("nothing: all of it was here"), "{said}");
    assert_reads(&kitfs, &kit.reference, options, files);
    kitfs.assert_cache_is_true(b"");
}

#[test]
fn a_kit_without_indexes_is_complete_after_a_pull_and_reads_without_its_registry() {
    let server = FaultServer::empty("team/kit");
    let (builder, files) = mixed();
    let kit = builder.serve(&server, "v1");
    assert_complete(server, &kit, &[], "derived", &files);
}

#[test]
fn a_pinned_kit_is_complete_after_a_pull_and_reads_without_its_registry() {
    let server = FaultServer::empty("team/kit");
    let (builder, files) = mixed();
    let kit = builder.indexed().serve(&server, "v1");
    assert_complete(server, &kit, &[], "pinned", &files);
}

#[test]
fn an_attested_kit_is_proved_by_its_pull() {
    let server = FaultServer::empty("team/kit");
    let (builder, files) = mixed();
    let kit = builder.attested().serve(&server, "v1");
    let referrer = kit.referrer.expect("a referrer").to_string();
    assert_complete(server, &kit, &["--index-digest", &referrer], "derived", &files);
}

#[test]
fn what_lies_together_comes_together() {
    let server = FaultServer::empty("team/kit");
    let (builder, _) = mixed();
    let kit = builder.indexed().serve(&server, "v1");
    let kitfs = Kitfs::new();
    pull(&kitfs, &kit.reference, &[]);
    // 40 small files and 8 larger ones, 21 MiB: two requests would do; what is in two places comes once.
    let ranges = server.ranges_for(kit.layers[0]);
    assert!(ranges.len() <= 4, "{ranges:?}");
    assert!(ranges.iter().all(|(first, last)| last - first < 16 * MIB), "{ranges:?}");
    assert!(server.requests_for(kit.indexes[0].digest) <= 2, "the head, and all chunk lists at once");
}

#[test]
fn a_filter_pulls_these_layers_alone() {
    let server = FaultServer::empty("team/kit");
    let (builder, _) = mixed();
    let kit = builder.serve(&server, "v1");
    let kitfs = Kitfs::new();
    let pulled = pull(&kitfs, &kit.reference, &["--filter", "docs"]);
    assert_eq!(pulled["layers"].as_array().expect("layers").len(), 1);
    assert_eq!(pulled["layers"][0]["path"], "docs");
    assert_eq!(server.requests_for(kit.layers[0]) + server.requests_for(kit.layers[1]), 0);
}

/// A pull in the background.
fn start(kitfs: &Kitfs, reference: &str) -> Child {
    let mut command = kitfs.command(["pull", reference]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts")
}

/// Bytes on the disk of files that are being filled.
fn on_disk(kitfs: &Kitfs) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let blocks = |path: std::path::PathBuf| path.metadata().map_or(0, |found| found.blocks());
    kitfs.cached_files("partial").into_iter().map(blocks).sum::<u64>() * 512
}

fn signal(child: &Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).expect("a pid")).expect("a pid");
    rustix::process::kill_process(pid, signal).expect("a signal");
}

#[test]
fn a_pull_of_an_indexed_kit_that_was_killed_fetches_only_what_is_missing() {
    const SIZE: u64 = 256 * MIB;
    let server = FaultServer::empty("team/big");
    let kit = KitBuilder::new().indexed().content("model", "m.bin", huge_tar("m.bin", 3, SIZE)).serve(&server, "v1");
    let kitfs = Kitfs::new();
    server.set_rate(Some(200 * MIB));
    let mut child = start(&kitfs, &kit.reference);
    let at_70 = Instant::now();
    while on_disk(&kitfs) < SIZE * 7 / 10 {
        assert!(at_70.elapsed() < Duration::from_secs(60), "the pull does not get on");
        std::thread::sleep(Duration::from_millis(2));
    }
    signal(&child, rustix::process::Signal::KILL);
    child.wait().expect("ends");
    server.set_rate(None);

    server.reset_counters();
    let pulled = pull(&kitfs, &kit.reference, &[]);
    // What was on the wire when it was killed is lost, and the chunk that was being written.
    let fetched = pulled["fetched"].as_u64().expect("bytes");
    assert!(fetched > 0 && fetched <= SIZE * 35 / 100, "{} MiB", fetched / MIB);
    assert!(server.bytes_for(kit.layers[0]) <= SIZE * 35 / 100);
    let mount = kitfs.mount(&kit.reference, &[]);
    let found = std::fs::read(mount.path("m.bin")).expect("reads");
    let mut expected = vec![0; found.len()];
    pattern_at(3, 0, &mut expected);
    assert!(found.len() as u64 == SIZE && found == expected, "wrong bytes");
}

#[test]
fn an_interrupt_ends_a_pull_at_once_and_what_was_fetched_stays() {
    let server = FaultServer::empty("team/big");
    let kit =
        KitBuilder::new().indexed().content("model", "m.bin", huge_tar("m.bin", 3, 64 * MIB)).serve(&server, "v1");
    let kitfs = Kitfs::new();
    server.set_rate(Some(30 * MIB));
    let child = start(&kitfs, &kit.reference);
    eventually("chunks on the disk", || on_disk(&kitfs) > 4 * MIB);
    let interrupted = Instant::now();
    signal(&child, rustix::process::Signal::INT);
    let output = child.wait_with_output().expect("ends");
    assert!(interrupted.elapsed() < Duration::from_secs(3), "{:?}", interrupted.elapsed());
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("error: interrupted; what was fetched stays, and the next pull goes on there"), "{said}");
    server.set_rate(None);
    assert!(pull(&kitfs, &kit.reference, &[])["fetched"].as_u64().expect("bytes") < 64 * MIB);
}

#[test]
fn what_a_mount_has_read_of_a_file_is_not_fetched_again() {
    let server = FaultServer::empty("team/big");
    let kit =
        KitBuilder::new().indexed().content("model", "m.bin", huge_tar("m.bin", 3, 32 * MIB)).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let mut byte = [0; 4096];
    for chunk in [20, 10, 5] {
        std::os::unix::fs::FileExt::read_exact_at(&mount.open_direct("m.bin"), &mut byte, chunk * MIB).expect("reads");
    }
    drop(mount);
    server.reset_counters();
    assert_eq!(pull(&kitfs, &kit.reference, &[])["fetched"], 29 * MIB);
    assert_eq!(server.bytes_for(kit.layers[0]), 29 * MIB);
}

#[test]
fn all_layers_are_tried_and_each_error_is_told() {
    let server = FaultServer::empty("team/kit");
    let (builder, _) = mixed();
    let kit = builder.serve(&server, "v1");
    let kitfs = Kitfs::new().with("KITFS_READ_TIMEOUT", "2s");
    server.remove(&kit.layers[0]);
    server.fault(kit.layers[1], Fault::status(503));
    let output = kitfs.run(&["pull", &kit.reference, "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let told: Vec<&str> = said.lines().filter(|line| line.starts_with("error: ")).collect();
    let [first, second, last] = told[..] else { panic!("{said}") };
    assert!(first.starts_with("error: model \"w\": ") && second.starts_with("error: dataset \"data.bin\": "), "{said}");
    assert!(second.contains("answered 503"), "{said}");
    assert!(last.starts_with("error: 2 of 3 layers of ") && last.contains("the next pull goes on there"), "{said}");
    let json: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(json["layers"][2]["error"], Value::Null);
    assert!(json["layers"][0]["error"].as_str().is_some_and(|error| error.contains("is not in")), "{json}");
}

#[test]
fn a_pull_whose_registry_has_gone_fails_within_the_deadline() {
    let server = FaultServer::empty("team/kit");
    let mut builder = KitBuilder::new();
    for number in 0..12 {
        builder =
            builder.tar("datasets", &format!("d{number}"), tar(&[(&format!("d{number}"), &pattern(number, 200_000))]));
    }
    let kit = builder.serve(&server, "v1");
    let kitfs = Kitfs::new().with("KITFS_READ_TIMEOUT", "2s");
    pull(&kitfs, &kit.reference, &["--filter", "docs"]);
    drop(server);
    let started = Instant::now();
    let said = kitfs.fails(&["pull", &kit.reference]);
    // The deadline for the first few, and once more for the rest; with what a slow machine adds.
    assert!(started.elapsed() < Duration::from_secs(12), "{:?}: {said}", started.elapsed());
    assert!(said.contains("12 of 12 layers"), "{said}");
}

/// A kit of one file of so many MiB.
fn of_size(server: &FaultServer, tag: &str, seed: u64, mib: u64) -> Served {
    KitBuilder::new().indexed().content("model", "m.bin", huge_tar("m.bin", seed, mib * MIB)).serve(server, tag)
}

/// Whether each layer of a kit is marked as kept, as the cache notes it.
fn kept(kitfs: &Kitfs, kit: &Served) -> bool {
    let records = kitfs.cached_files("kits").into_iter();
    let records = records.map(|path| serde_json::from_slice(&std::fs::read(path).expect("reads")).expect("JSON"));
    let mut records = records.filter(|record: &Value| record["digest"] == kit.digest.to_string());
    records.any(|record| record["layers"].as_array().expect("layers").iter().all(|layer| layer["kept"] == true))
}

#[test]
fn no_more_is_kept_than_the_cache_may_hold() {
    let server = FaultServer::empty("team/kit");
    let kitfs = Kitfs::new().with("KITFS_CACHE_SIZE", "20MiB");
    let (one, two) = (of_size(&server, "one", 1, 8), of_size(&server, "two", 2, 16));
    assert_eq!(pull(&kitfs, &one.reference, &["--keep"])["kept"], true);
    assert!(kept(&kitfs, &one));
    server.reset_counters();
    let said = kitfs.fails(&["pull", &two.reference, "--keep"]);
    for part in ["24.0 MiB", "19.0 MiB", &one.reference, "8.0 MiB", "kitfs cache rm", "--cache-size"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(asked(&server, &two), 0, "before anything is fetched");
    assert!(kept(&kitfs, &one) && !kept(&kitfs, &two));
    // The same content counts once, however many kits hold it.
    let again = of_size(&server, "again", 1, 8);
    assert_eq!(pull(&kitfs, &again.reference, &["--keep"])["kept"], true);
    let large = of_size(&server, "large", 3, 24);
    let said = kitfs.fails(&["pull", &large.reference]);
    assert!(said.contains("24.0 MiB") && said.contains("19.0 MiB") && said.contains("--cache-size"), "{said}");
    assert_eq!(asked(&server, &large), 0);
}

#[test]
fn a_pull_that_fails_keeps_nothing_that_was_not_kept_before() {
    let server = FaultServer::empty("team/kit");
    let kitfs = Kitfs::new().with("KITFS_READ_TIMEOUT", "1s");
    let kit = of_size(&server, "v1", 1, 4);
    server.fault(kit.layers[0], Fault::status(404));
    kitfs.fails(&["pull", &kit.reference, "--keep"]);
    assert!(!kept(&kitfs, &kit));
    server.heal(kit.layers[0]);
    assert_eq!(pull(&kitfs, &kit.reference, &["--keep"])["kept"], true);
    for path in kitfs.cached_files("objects") {
        std::fs::remove_file(path).expect("removes");
    }
    server.fault(kit.layers[0], Fault::status(404));
    kitfs.fails(&["pull", &kit.reference, "--keep"]);
    assert!(kept(&kitfs, &kit), "it was kept before");
    // A pull without --keep leaves the mark alone.
    server.heal(kit.layers[0]);
    assert_eq!(pull(&kitfs, &kit.reference, &[])["kept"], true);
}

#[test]
fn a_false_layer_fails_the_pull_and_leaves_nothing() {
    let server = FaultServer::empty("team/kit");
    let (builder, _) = mixed();
    let kit = builder.serve(&server, "v1");
    server.fault(kit.layers[1], Fault::FlipBit { offset: 1000 });
    let kitfs = Kitfs::new();
    let said = kitfs.fails(&["pull", &kit.reference]);
    assert!(said.contains("dataset \"data.bin\"") && said.contains("1 of 3 layers"), "{said}");
    let mut bad = pattern(8, 2000)[900..1100].to_vec();
    bad[100] ^= 1;
    kitfs.assert_cache_is_true(&bad);
}

#[test]
fn a_source_without_ranges_gives_the_layer_whole() {
    let server = FaultServer::empty("team/kit");
    let bytes = pattern(5, 5 * MIB as usize);
    let kit = KitBuilder::new().indexed().tar("model", "w", tar(&[("w/a.bin", &bytes)])).serve(&server, "v1");
    server.fault(kit.layers[0], Fault::IgnoreRange);
    let kitfs = Kitfs::new();
    pull(&kitfs, &kit.reference, &[]);
    drop(server);
    assert_reads(&kitfs, &kit.reference, &[], &[("w/a.bin".to_owned(), bytes)]);
}

#[test]
fn many_small_files_come_with_few_descriptors() {
    let server = FaultServer::empty("team/kit");
    let files: Vec<(String, Vec<u8>)> =
        (0..3000).map(|number| (format!("w/{number:04}"), pattern(number, 500 + number as usize))).collect();
    let listed: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let kit = KitBuilder::new().indexed().tar("model", "w", tar(&listed)).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "ulimit -n 256; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_kitfs"), "pull", &kit.reference]);
    command.envs(kitfs.command(["x"]).get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = command.output().expect("runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(kitfs.cached_files("objects").len(), 3000);
    drop(server);
    assert_reads(&kitfs, &kit.reference, &[], &files);
}

#[test]
fn the_help_tells_of_it() {
    let kitfs = Kitfs::new();
    let help = kitfs.ok(&["--help"]);
    assert!(help.contains("pull") && help.contains("Makes a kit complete in the cache"), "{help}");
}

/// A file system of so many MiB in place of the cache, detached when it goes.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn new(kitfs: &Kitfs, mib: u64) -> Self {
        let dir = kitfs.cache();
        std::fs::create_dir(&dir).expect("mkdir");
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m,mode=0700"), "tmpfs"])
            .arg(&dir)
            .status();
        assert!(mounted.is_ok_and(|status| status.success()), "mounting a tmpfs takes root");
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_pull_that_fills_the_disk_fails_and_does_not_go_round() {
    for builder in [KitBuilder::new(), KitBuilder::new().indexed()] {
        let server = FaultServer::empty("team/kit");
        let kit = builder.content("model", "m.bin", huge_tar("m.bin", 1, 64 * MIB)).serve(&server, "v1");
        let kitfs = Kitfs::new();
        let _disk = SmallDisk::new(&kitfs, 24);
        let started = Instant::now();
        let said = kitfs.fails(&["pull", &kit.reference]);
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
        assert!(said.contains("1 of 1 layers") && said.contains("cache: "), "{said}");
        assert!(server.bytes_for(kit.layers[0]) <= 65 * MIB, "nothing is fetched twice");
    }
}
