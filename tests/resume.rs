//! A fill that is killed is gone on with where it stood, by whoever wants the layer next, and what it left is believed by
//! nobody.

mod support;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use kitfs::digest::Digest;
use support::kit::{KitBuilder, Served, gzip, huge_tar, pattern, tar};
use support::program::Kitfs;
use support::{Fault, FaultServer};

const MIB: u64 = 1 << 20;
/// Of layers in these tests: what is in flight when a process dies is a small part of it.
const SIZE: u64 = 256 * MIB;
/// Slow enough that a fill can be caught in the middle.
const RATE: u64 = 150 * MIB;

/// A kit of one layer, and a file in it.
struct Layer {
    kit: Served,
    path: &'static str,
    content: Vec<u8>,
}

impl Layer {
    fn digest(&self) -> Digest {
        self.kit.layers[0]
    }
}

/// Files of 64 KiB and a bit, as many as come to `size`; the last one is what is read.
fn many(size: u64) -> (Vec<u8>, Vec<u8>) {
    let count = (size / (64 << 10)) as usize;
    let mut files: Vec<(String, Vec<u8>)> =
        (0..count).map(|n| (format!("w/{n:05}"), pattern(n as u64, (64 << 10) + n % 700))).collect();
    files.push(("w/empty".to_owned(), Vec::new()));
    let last = pattern(1_000_000, 700_000);
    files.push(("w/last".to_owned(), last.clone()));
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, content)| (&name[..], &content[..])).collect();
    (tar(&files), last)
}

fn serve(server: &FaultServer, suffix: &str, blob: Vec<u8>, content: Vec<u8>) -> Layer {
    let path = if suffix.starts_with("raw") { "w" } else { "w/last" };
    let root = "w";
    Layer { kit: KitBuilder::new().layer("model", root, suffix, blob).serve(server, "v1"), path, content }
}

fn start(kitfs: &Kitfs, layer: &Layer) -> Child {
    let mut command = kitfs.command(["cat", &layer.kit.reference, layer.path]);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("kitfs runs")
}

fn incoming(kitfs: &Kitfs) -> Vec<PathBuf> {
    let is_content = |path: &PathBuf| path.file_name().is_some_and(|name| name != "lock" && name != "synced");
    kitfs.cached_files("incoming").into_iter().filter(is_content).collect()
}

/// How many bytes of the layer lie in staging.
fn staged(kitfs: &Kitfs) -> u64 {
    let files = incoming(kitfs);
    let len = |path: &PathBuf| fs::metadata(path).map_or(0, |file| file.len());
    match files.iter().find(|path| path.ends_with("blob")) {
        Some(blob) => len(blob),
        None => files.iter().map(len).sum(),
    }
}

/// Reads the file of a layer until so much of it is staged, and kills the reader.
fn kill_at(server: &FaultServer, kitfs: &Kitfs, layer: &Layer, percent: u64) {
    let size = server.len_of(&layer.digest()).expect("the layer");
    server.set_rate(Some(RATE));
    let mut child = start(kitfs, layer);
    let begun = Instant::now();
    while staged(kitfs) < size * percent / 100 {
        assert!(child.try_wait().expect("waits").is_none(), "it ended before");
        assert!(begun.elapsed() < Duration::from_secs(60), "only {} bytes are staged", staged(kitfs));
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().expect("kills");
    child.wait().expect("is dead");
    server.set_rate(None);
}

fn read(kitfs: &Kitfs, layer: &Layer) -> Output {
    let output =
        kitfs.command(["cat", "--log-level", "info", &layer.kit.reference, layer.path]).output().expect("runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(output.stdout == layer.content, "{} bytes, not those of the file\n{said}", output.stdout.len());
    output
}

/// Reads the file of a layer; how much of the layer that asks for, in percent. What was left is read again once at most.
fn asked(server: &FaultServer, kitfs: &Kitfs, layer: &Layer) -> u64 {
    server.reset_counters();
    let said = String::from_utf8(read(kitfs, layer).stderr).expect("UTF-8");
    assert!(said.matches("fetching the layer is resumed at").count() <= 1, "{said}");
    kitfs.assert_cache_is_true(b"");
    let left = incoming(kitfs);
    assert!(left.is_empty(), "left: {left:?}");
    server.bytes_for(layer.digest()) * 100 / server.len_of(&layer.digest()).expect("the layer")
}

fn killed_at_70_percent_asks_for_at_most_35(make: impl Fn(&FaultServer) -> Layer) {
    let server = FaultServer::empty("team/kit");
    let layer = make(&server);
    let kitfs = Kitfs::new();
    kill_at(&server, &kitfs, &layer, 70);
    let asked = asked(&server, &kitfs, &layer);
    assert!(asked <= 35, "{asked} % of the layer are asked for again");
}

#[test]
fn a_tar_of_many_files() {
    killed_at_70_percent_asks_for_at_most_35(|server| {
        let (tar, last) = many(SIZE);
        serve(server, "tar", tar, last)
    });
}

#[test]
fn a_tar_of_one_big_file() {
    killed_at_70_percent_asks_for_at_most_35(|server| {
        let kit = KitBuilder::new().content("model", "big", huge_tar("big", 3, SIZE)).serve(server, "v1");
        Layer { kit, path: "big", content: pattern(3, SIZE as usize) }
    });
}

#[test]
fn a_raw_layer() {
    killed_at_70_percent_asks_for_at_most_35(|server| {
        let content = pattern(4, SIZE as usize);
        serve(server, "raw", content.clone(), content)
    });
}

#[test]
fn a_layer_in_gzip() {
    killed_at_70_percent_asks_for_at_most_35(|server| {
        let (tar, last) = many(SIZE);
        serve(server, "tar+gzip", gzip(&tar), last)
    });
}

#[test]
fn a_layer_in_zstandard() {
    killed_at_70_percent_asks_for_at_most_35(|server| {
        let (tar, last) = many(SIZE);
        serve(server, "tar+zstd", zstd::encode_all(&tar[..], 1).expect("compresses"), last)
    });
}

#[test]
fn a_source_without_ranges_sends_all_and_the_head_is_dropped() {
    let server = FaultServer::empty("team/kit");
    let (tar, last) = many(64 * MIB);
    let layer = serve(&server, "tar", tar, last);
    server.fault(layer.digest(), Fault::IgnoreRange);
    let kitfs = Kitfs::new();
    kill_at(&server, &kitfs, &layer, 60);
    server.reset_counters();
    let said = String::from_utf8(read(&kitfs, &layer).stderr).expect("UTF-8");
    assert!(said.contains("fetching the layer is resumed at"), "{said}");
}

#[test]
fn a_source_that_gives_ranges_at_first_and_none_later_sends_the_rest() {
    let server = FaultServer::empty("team/kit");
    let (tar, last) = many(64 * MIB);
    let layer = serve(&server, "tar", tar, last);
    let kitfs = Kitfs::new();
    server.set_rate(Some(RATE / 4));
    let child = start(&kitfs, &layer);
    support::eventually("some of it is staged", || staged(&kitfs) > 16 * MIB);
    server.fault(layer.digest(), Fault::IgnoreRange);
    server.set_rate(None);
    assert!(child.wait_with_output().expect("ends").status.success());
    read(&kitfs, &layer);
}

#[test]
fn killed_twice() {
    let server = FaultServer::empty("team/kit");
    for suffix in ["tar", "tar+gzip"] {
        let (tar, last) = many(SIZE);
        let layer = serve(&server, suffix, if suffix == "tar" { tar } else { gzip(&tar) }, last);
        let kitfs = Kitfs::new();
        kill_at(&server, &kitfs, &layer, 30);
        kill_at(&server, &kitfs, &layer, 70);
        let asked = asked(&server, &kitfs, &layer);
        assert!(asked <= 35, "{suffix}: {asked} % of the layer are asked for again");
    }
}

#[test]
fn what_was_damaged_in_between_is_found_and_nobody_is_blamed() {
    let server = FaultServer::empty("team/kit");
    let (tar, last) = many(64 * MIB);
    for (suffix, blob, damaged) in
        [("tar", tar.clone(), "100"), ("tar", tar.clone(), "between"), ("tar+gzip", gzip(&tar), "blob")]
    {
        let layer = serve(&server, suffix, blob, last.clone());
        let kitfs = Kitfs::new();
        kill_at(&server, &kitfs, &layer, 60);
        let path = incoming(&kitfs).into_iter().find(|path| path.ends_with(damaged)).expect("is staged");
        let file = fs::OpenOptions::new().read(true).write(true).open(path).expect("opens");
        let mut byte = [0];
        file.read_exact_at(&mut byte, 1000).expect("reads");
        file.write_all_at(&[byte[0] ^ 1], 1000).expect("writes");
        server.reset_counters();
        let said = String::from_utf8(read(&kitfs, &layer).stderr).expect("UTF-8");
        assert!(said.contains("can't be used"), "{damaged}: {said}");
        assert!(!said.contains("is not asked again") && !said.contains("refused"), "{damaged}: {said}");
        kitfs.assert_cache_is_true(b"");
        let (asked, size) = (server.bytes_for(layer.digest()), server.len_of(&layer.digest()).expect("the layer"));
        assert!(asked >= size && asked < 2 * size, "{damaged}: {asked} of {size}");
    }
}

#[test]
fn what_else_lies_in_staging_is_in_nobodys_way_and_other_names_of_its_files_keep_their_content() {
    let server = FaultServer::empty("team/kit");
    let (tar, last) = many(64 * MIB);
    for (suffix, blob) in [("tar", tar.clone()), ("tar+gzip", gzip(&tar))] {
        let layer = serve(&server, suffix, blob, last.clone());
        let kitfs = Kitfs::new();
        kill_at(&server, &kitfs, &layer, 60);
        let staged = incoming(&kitfs);
        let dir = staged[0].parent().expect("a directory").to_owned();
        let beside_the_cache = dir.ancestors().nth(3).expect("a directory");
        let copy = tempfile::tempdir_in(beside_the_cache).expect("a directory");
        let mut copied = Vec::new();
        for (number, path) in staged.iter().enumerate() {
            let name = copy.path().join(number.to_string());
            fs::hard_link(path, &name).expect("links");
            copied.push((fs::read(&name).expect("reads"), name));
        }
        for planted in ["garbage/in/it", "9999999/1", "sealed"] {
            fs::create_dir_all(dir.join(planted)).expect("makes");
        }
        read(&kitfs, &layer);
        kitfs.assert_cache_is_true(b"");
        let left = incoming(&kitfs);
        assert!(left.is_empty(), "left: {left:?}");
        for (content, name) in copied {
            assert!(fs::read(&name).expect("reads") == content, "{}", name.display());
        }
    }
}

#[test]
fn a_pipe_in_the_place_of_a_lock_hangs_nobody() {
    let server = FaultServer::empty("team/kit");
    let (tar, last) = many(16 * MIB);
    let layer = serve(&server, "tar", tar, last);
    let kitfs = Kitfs::new();
    kill_at(&server, &kitfs, &layer, 60);
    let lock = incoming(&kitfs)[0].with_file_name("lock");
    fs::remove_file(&lock).expect("removes");
    rustix::fs::mkfifoat(rustix::fs::CWD, &lock, rustix::fs::Mode::RUSR).expect("a pipe");
    let output = ended(kitfs.command(["cat", &layer.kit.reference, layer.path]));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("lock: it is not a file") && said.contains("remove it"),
        "{said}"
    );
    fs::remove_file(&lock).expect("removes");
    read(&kitfs, &layer);
}

#[test]
fn who_waits_for_the_disk_of_a_process_that_is_stopped_does_so_for_a_time() {
    let server = FaultServer::empty("team/kit");
    let (tar, last) = many(16 * MIB);
    let layer = serve(&server, "tar", tar, last);
    let kitfs = Kitfs::new();
    kill_at(&server, &kitfs, &layer, 60);
    let dir = incoming(&kitfs)[0].parent().expect("a directory").to_owned();
    let lock = fs::File::open(dir.join("lock")).expect("opens");
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).expect("is free");
    fs::write(dir.join("sealed"), "").expect("writes");
    let begun = Instant::now();
    let output = ended(kitfs.command(["cat", "--read-timeout", "2s", &layer.kit.reference, layer.path]));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout == layer.content);
    assert!(begun.elapsed() > Duration::from_secs(8), "it was not waited for");
}

/// What a command comes to that must end by itself.
fn ended(mut command: std::process::Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("kitfs runs");
    let id = rustix::process::Pid::from_child(&child);
    let (done, waiting) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(child.wait_with_output()));
    waiting.recv_timeout(Duration::from_secs(60)).map_or_else(
        |_| {
            let _ = rustix::process::kill_process(id, rustix::process::Signal::KILL);
            panic!("it hangs")
        },
        |output| output.expect("ends"),
    )
}

#[test]
fn after_a_boot_it_goes_on_from_what_was_on_the_disk() {
    let server = FaultServer::empty("team/kit");
    let (tar, last) = many(64 * MIB);
    let layer = serve(&server, "tar", tar, last);
    for (offset, expected) in [(32 * MIB, 45..=60), (0, 95..=110)] {
        let kitfs = Kitfs::new();
        kill_at(&server, &kitfs, &layer, 70);
        let synced =
            kitfs.cached_files("incoming").into_iter().find(|path| path.ends_with("synced")).expect("is there");
        let found: serde_json::Value = serde_json::from_slice(&fs::read(&synced).expect("reads")).expect("JSON");
        assert_eq!(found["offset"], 0, "there was no checkpoint: {found}");
        // What is behind the checkpoint is whatever the file system made of it.
        for file in incoming(&kitfs) {
            let number: u64 = file.file_name().and_then(|name| name.to_str()?.parse().ok()).unwrap_or(0);
            if number > 600 {
                fs::remove_file(&file).expect("removes");
                fs::write(&file, "zeros and others").expect("writes");
            }
        }
        fs::write(synced, format!("{{\"offset\":{offset},\"boot\":\"another\"}}")).expect("writes");
        let asked = asked(&server, &kitfs, &layer);
        assert!(expected.contains(&asked), "{offset}: {asked} % of the layer are asked for again");
    }
}

#[test]
fn who_waits_for_a_fill_takes_over_when_it_is_killed() {
    let server = FaultServer::empty("team/kit");
    let (tar, last) = many(SIZE);
    let layer = serve(&server, "tar", tar, last);
    let kitfs = Kitfs::new();
    server.set_rate(Some(RATE));
    let mut first = start(&kitfs, &layer);
    support::eventually("the first stages", || staged(&kitfs) > 0);
    let mut second = start(&kitfs, &layer);
    support::eventually("the most of it is staged", || staged(&kitfs) > SIZE * 6 / 10);
    first.kill().expect("kills");
    first.wait().expect("is dead");
    assert!(second.wait().expect("ends").success());
    let asked = server.bytes_for(layer.digest()) * 100 / server.len_of(&layer.digest()).expect("the layer");
    assert!(asked < 130, "{asked} % of the layer were asked for");
    read(&kitfs, &layer);
}

#[test]
fn when_its_source_fails_the_next_reader_goes_on() {
    let server = FaultServer::empty("team/kit");
    let (tar, last) = many(SIZE);
    let layer = serve(&server, "tar", tar, last);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&layer.kit.reference, &["--read-timeout", "2s"]);
    server.set_rate(Some(RATE));
    let failing = std::thread::spawn({
        let path = mount.path("w/last");
        move || fs::read(path).expect_err("its source fails")
    });
    support::eventually("the most of it is staged", || staged(&kitfs) > SIZE * 6 / 10);
    server.fault(layer.digest(), Fault::Reset { after: 0 });
    failing.join().expect("no panic");
    server.heal(layer.digest());
    server.set_rate(None);
    server.reset_counters();
    assert!(fs::read(mount.path("w/last")).expect("reads") == layer.content);
    let asked = server.bytes_for(layer.digest()) * 100 / server.len_of(&layer.digest()).expect("the layer");
    assert!(asked <= 45, "{asked} % of the layer are asked for again");
}

#[test]
fn killed_at_any_moment_the_content_is_right_in_the_end() {
    let server = FaultServer::empty("team/kit");
    let (tar, last) = many(48 * MIB);
    let layers = [("tar", tar.clone()), ("tar+gzip", gzip(&tar)), ("raw", tar.clone())];
    // Not random, and all over the time that a fill takes.
    let mut state = 7_u64;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for round in 0..20 {
        let (suffix, blob) = &layers[round % layers.len()];
        let content = if *suffix == "raw" { tar.clone() } else { last.clone() };
        let layer = serve(&server, suffix, blob.clone(), content);
        let kitfs = Kitfs::new();
        server.set_rate(Some(100 * MIB));
        for _ in 0..=random(3) {
            let mut child = start(&kitfs, &layer);
            std::thread::sleep(Duration::from_millis(random(700)));
            // It may have ended.
            let _ = child.kill();
            child.wait().expect("is dead");
        }
        server.set_rate(None);
        read(&kitfs, &layer);
        kitfs.assert_cache_is_true(b"");
        let left = incoming(&kitfs);
        assert!(left.is_empty(), "round {round}, {suffix}: {left:?}");
    }
}
