//! `kitfs mount --prefetch`: what is fetched before it is asked for, in which order, and always behind what is asked for.

mod support;

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::kit::{KitBuilder, Served, gzip, huge_tar, pattern, pattern_at, tar};
use support::program::{Kitfs, Mount};
use support::reading;
use support::{Fault, FaultServer, eventually};

const MIB: u64 = 1 << 20;

/// Waits until the prefetch of a mount is in this state; what status tells of it then.
fn until(kitfs: &Kitfs, mount: &Mount<'_>, state: &str) -> Value {
    let mut last = Value::Null;
    eventually(&format!("prefetch is {state}"), || {
        last = kitfs.status(mount)["prefetch"].take();
        last["state"] == state
    });
    last
}

/// A read past the kernel's cache, of the content of [`huge_tar`].
fn read(mount: &Mount<'_>, name: &str, seed: u64, offset: u64, len: usize) {
    let found = reading::part_directly(&mount.open_direct(name), offset, len).expect("reads");
    let mut expected = vec![0; len];
    pattern_at(seed, offset, &mut expected);
    assert!(found == expected, "wrong bytes in {name} at {offset}");
}

/// Two large layers and a small one.
fn kit(server: &FaultServer, builder: KitBuilder) -> Served {
    builder
        .content("model", "w/a.safetensors", huge_tar("w/a.safetensors", 1, 24 * MIB))
        .content("datasets", "d/b.bin", huge_tar("d/b.bin", 2, 12 * MIB))
        .tar("docs", "README.md", tar(&[("README.md", b"read me")]))
        .serve(server, "v1")
}

#[test]
fn all_of_a_kit_comes_after_the_mount_and_reads_without_its_registry() {
    for builder in [KitBuilder::new(), KitBuilder::new().indexed()] {
        let server = FaultServer::empty("team/kit");
        let kit = kit(&server, builder);
        let kitfs = Kitfs::new();
        let mount = kitfs.mount(&kit.reference, &["--prefetch", "all"]);
        let done = until(&kitfs, &mount, "done");
        assert_eq!(done["mode"], "all");
        assert_eq!((&done["done"], &done["why"]), (&done["total"], &Value::Null));
        assert!(done["total"].as_u64().is_some_and(|total| total > 36 * MIB));
        let told = kitfs.ok(&["status"]);
        assert!(told.lines().any(|line| line.contains("prefetch") && line.contains("all, done: 36.0 MiB")), "{told}");
        drop(server);
        read(&mount, "w/a.safetensors", 1, 17 * MIB + 4096, 8192);
        read(&mount, "d/b.bin", 2, 0, 8192);
        assert_eq!(std::fs::read(mount.path("README.md")).expect("reads"), b"read me");
    }
}

#[test]
fn without_the_flag_nothing_comes() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server, KitBuilder::new().indexed());
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(kit.layers.iter().map(|layer| server.requests_for(layer)).sum::<usize>(), 0);
    assert_eq!(kitfs.status(&mount)["prefetch"], Value::Null);
}

#[test]
fn a_pattern_takes_the_files_that_match_and_no_others() {
    let server = FaultServer::empty("team/kit");
    let (weights, other) = (pattern(1, 3 * MIB as usize), pattern(2, 3 * MIB as usize));
    let model = tar(&[("w/a.safetensors", &weights), ("w/b.bin", &other), ("w/x/c.safetensors", &other)]);
    let data = gzip(&tar(&[("data/x.csv", &pattern(3, 2 * MIB as usize))]));
    let serve = |builder: KitBuilder, tag| {
        builder.tar("model", "w", model.clone()).layer("datasets", "data", "tar+gzip", data.clone()).serve(&server, tag)
    };
    let kit = serve(KitBuilder::new().indexed(), "indexed");
    let kitfs = Kitfs::new();
    // Not the file in the directory below.
    let mount = kitfs.mount(&kit.reference, &["--prefetch", "w/*.safetensors"]);
    let done = until(&kitfs, &mount, "done");
    assert_eq!((&done["total"], &done["mode"]), (&Value::from(3 * MIB), &Value::from("w/*.safetensors")));
    assert_eq!(server.bytes_for(kit.layers[0]), 3 * MIB);
    assert_eq!(server.requests_for(kit.layers[1]), 0);
    drop(mount);

    // Without an index a layer comes whole; but not one where nothing can match.
    let kit = serve(KitBuilder::new(), "plain");
    server.reset_counters();
    let kitfs = Kitfs::new().with("KITFS_PREFETCH", "w/a*,nothing/*");
    let mount = kitfs.mount(&kit.reference, &[]);
    assert_eq!(until(&kitfs, &mount, "done")["total"], model.len() as u64);
    assert!(server.bytes_for(kit.layers[0]) >= model.len() as u64);
    assert!(server.bytes_for(kit.layers[1]) <= 64 << 10, "the first read of the mount alone");
    drop(mount);

    let mount = kitfs.mount(&kit.reference, &["--prefetch", "*.gguf", "--filter", "model"]);
    let done = until(&kitfs, &mount, "done");
    assert_eq!((&done["total"], &done["why"]), (&Value::from(0), &Value::from("nothing in the kit matches")));
}

/// Four shards in four layers and one directory; beside them one that is small, one that is another thing, and one that is
/// elsewhere.
fn shards(server: &FaultServer, builder: KitBuilder) -> Served {
    let shard = |number: u64| format!("w/m-{number}.safetensors");
    builder
        .content("model", &shard(1), huge_tar(&shard(1), 1, 12 * MIB))
        .content("datasets", &shard(3), huge_tar(&shard(3), 3, 10 * MIB))
        .content("datasets", &shard(2), huge_tar(&shard(2), 2, 12 * MIB))
        .content("datasets", &shard(4), huge_tar(&shard(4), 4, 9 * MIB))
        .content("docs", "w/small.safetensors", huge_tar("w/small.safetensors", 5, 8 * MIB - 1))
        .content("docs", "w/other.bin", huge_tar("w/other.bin", 6, 12 * MIB))
        .content("docs", "d/m-5.safetensors", huge_tar("d/m-5.safetensors", 7, 12 * MIB))
        .serve(server, "v1")
}

/// Reads from the end on, so that nothing is read ahead.
fn read_backwards(mount: &Mount<'_>, name: &str, seed: u64, chunks: std::ops::Range<u64>) {
    for chunk in chunks.rev() {
        read(mount, name, seed, chunk * MIB, MIB as usize);
    }
}

#[test]
fn siblings_of_a_weight_file_follow_once_8_mib_of_it_were_read_in_the_order_of_their_names() {
    let server = FaultServer::empty("team/kit");
    let kit = shards(&server, KitBuilder::new().indexed());
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--prefetch", "auto"]);
    read_backwards(&mount, "w/m-2.safetensors", 2, 2..10);
    read_backwards(&mount, "w/other.bin", 6, 0..10);
    std::thread::sleep(Duration::from_millis(300));
    let [one, three, two, four, small, other, elsewhere] = kit.layers[..] else { panic!("seven layers") };
    for layer in [one, three, four, small, elsewhere] {
        assert_eq!(server.requests_for(layer), 0, "8 MiB were read of one shard, and no more");
    }
    assert_eq!(kitfs.status(&mount)["prefetch"]["state"], "waiting");

    read(&mount, "w/m-2.safetensors", 2, 5 * MIB, 4096);
    let done = until(&kitfs, &mount, "done");
    assert_eq!(done["total"], (12 + 12 + 10 + 9) * MIB);
    let targets: Vec<String> = server.requests().iter().map(support::fault::Request::target).collect();
    let last = |layer: kitfs::digest::Digest| targets.iter().rposition(|target| *target == layer.to_string());
    let first = |layer: kitfs::digest::Digest| targets.iter().position(|target| *target == layer.to_string());
    assert!(last(two) < first(one), "the rest of the file itself goes first");
    assert!(last(one) < first(three) && last(three) < first(four), "then its siblings, one after the other");
    let sent = [one, two, three, four].map(|layer| server.bytes_for(layer) / MIB);
    assert_eq!(sent, [12, 12, 10, 9], "each byte once");
    assert_eq!([small, elsewhere].map(|layer| server.requests_for(layer)), [0, 0]);
    assert_eq!(server.bytes_for(other), 10 * MIB, "it has no sibling");

    server.reset_counters();
    read_backwards(&mount, "w/m-3.safetensors", 3, 0..10);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(server.requests().len(), 0, "each set once");
}

#[test]
fn siblings_follow_in_kits_without_indexes_too() {
    let server = FaultServer::empty("team/kit");
    let kit = shards(&server, KitBuilder::new());
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--prefetch", "auto"]);
    read_backwards(&mount, "w/m-1.safetensors", 1, 0..9);
    assert_eq!(until(&kitfs, &mount, "done")["state"], "done");
    let read_of = |at: usize| server.bytes_for(kit.layers[at]) / MIB;
    assert_eq!([read_of(0), read_of(1), read_of(2), read_of(3)], [12, 10, 12, 9]);
    assert_eq!(read_of(6), 0);
}

#[test]
fn what_is_read_goes_before_what_is_prefetched() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server, KitBuilder::new().indexed());
    let gate = server.hold(kit.layers[0], MIB + 1);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--prefetch", "all"]);
    gate.wait_until_reached_by(2);
    // Another file is there at once.
    let started = Instant::now();
    read(&mount, "d/b.bin", 2, 5 * MIB, 4096);
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    // And of the same layer there is a place for who waits: two of five requests are the prefetch's, and short.
    std::thread::sleep(Duration::from_millis(200));
    let held = server.ranges_for(kit.layers[0]);
    assert!(held.len() == 2 && held.iter().all(|(first, last)| last - first < 4 * MIB), "{held:?}");
    read(&mount, "w/a.safetensors", 1, 22 * MIB, 4096);
    assert_eq!(gate.reached(), 2, "a chunk of 1 MiB ends before the gate");
    assert_eq!(server.requests_for(kit.layers[0]), 3);
    assert_eq!(kitfs.status(&mount)["prefetch"]["state"], "running");
    gate.release();
    until(&kitfs, &mount, "done");
    assert_eq!(server.bytes_for(kit.layers[0]), 24 * MIB, "what was read is not fetched again");
}

#[test]
fn a_layer_that_comes_whole_for_the_prefetch_holds_no_other_up_and_serves_who_waits_for_it() {
    let server = FaultServer::empty("team/kit");
    let mut builder = KitBuilder::new();
    let name = |number: u64| format!("d/{number}.bin");
    for number in 0..6 {
        builder = builder.content("datasets", &name(number), huge_tar(&name(number), number, 10 * MIB));
    }
    let kit = builder.serve(&server, "v1");
    let gate = server.hold(kit.layers[0], MIB);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--prefetch", "all"]);
    gate.wait_until_reached_by(1);
    std::thread::scope(|scope| {
        for number in 1..6 {
            let mount = &mount;
            scope.spawn(move || read(mount, &name(number), number, 3 * MIB, 4096));
        }
    });
    std::thread::scope(|scope| {
        let joined = scope.spawn(|| read(&mount, &name(0), 0, 3 * MIB, 4096));
        std::thread::sleep(Duration::from_millis(200));
        gate.release();
        joined.join().expect("reads");
    });
    until(&kitfs, &mount, "done");
    assert!(server.bytes_for(kit.layers[0]) < 11 * MIB, "it came once for both");
}

#[test]
fn waiting_returns_when_all_is_here() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server, KitBuilder::new().indexed());
    server.set_rate(Some(60 * MIB));
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--prefetch", "*.safetensors,*.bin", "--wait", "--json"]);
    let told: Value = serde_json::from_str(&mount.said).expect("JSON");
    assert_eq!((&told["prefetch"]["state"], &told["prefetch"]["done"]), (&"done".into(), &(36 * MIB).into()));
    drop(server);
    read(&mount, "w/a.safetensors", 1, 17 * MIB + 4096, 8192);
    read(&mount, "d/b.bin", 2, 11 * MIB, 8192);
}

#[test]
fn what_was_waited_for_is_told_as_it_is_proved_then() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server, KitBuilder::new());
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--prefetch", "all", "--wait"]);
    assert!(mount.said.contains("derived") && !mount.said.contains("provisional"), "{}", mount.said);
}

#[test]
fn waiting_for_what_has_no_end_is_wrong_use() {
    let kitfs = Kitfs::new();
    for options in
        [&["--wait"][..], &["--wait", "--prefetch", "auto"], &["--prefetch", "all,*.bin"], &["--prefetch", "["]]
    {
        let output = kitfs.run(&[&["mount", "localhost:1/team/kit:v1"], options].concat());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{options:?}: {said}");
        assert!(said.contains("--prefetch"), "{said}");
    }
}

#[test]
fn a_prefetch_that_fails_leaves_the_mount_and_says_why() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server, KitBuilder::new().indexed());
    server.remove(&kit.layers[1]);
    let kitfs = Kitfs::new();
    let dir = kitfs.path("mnt");
    let output = kitfs.run(&["mount", &kit.reference, dir.to_str().expect("UTF-8"), "--prefetch", "all", "--wait"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("error: not all was prefetched: ") && said.contains("the mount stays"), "{said}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("mounted"));
    assert_eq!(std::fs::read(dir.join("README.md")).expect("the mount is of use"), b"read me");
    let status: Value = serde_json::from_str(&kitfs.ok(&["status", "--json"])).expect("JSON");
    let prefetch = &status["mounts"][0]["prefetch"];
    assert_eq!(prefetch["state"], "failed");
    assert!(prefetch["why"].as_str().is_some_and(|why| why.contains(&kit.layers[1].to_string())), "{prefetch}");
    assert!(prefetch["done"].as_u64().is_some_and(|done| done > 24 * MIB), "the rest is here: {prefetch}");
    kitfs.ok(&["unmount", dir.to_str().expect("UTF-8")]);
}

#[test]
fn a_prefetch_goes_on_when_its_registry_is_back() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server, KitBuilder::new().indexed());
    server.fault(kit.layers[0], Fault::status(503));
    let kitfs = Kitfs::new().with("KITFS_READ_TIMEOUT", "1s");
    let mount = kitfs.mount(&kit.reference, &["--prefetch", "all"]);
    let failed = until(&kitfs, &mount, "failed");
    assert!(failed["why"].as_str().is_some_and(|why| why.contains("503")), "{failed}");
    // Once more, so that it has failed twice.
    let before = server.requests_for(kit.layers[0]);
    eventually("another try", || server.requests_for(kit.layers[0]) > before + 1);
    server.heal(kit.layers[0]);
    until(&kitfs, &mount, "done");
    drop(server);
    read(&mount, "w/a.safetensors", 1, 17 * MIB + 4096, 8192);
    assert_eq!(kitfs.logs().matches("prefetching waits").count(), 1, "{}", kitfs.logs());
}

#[test]
fn more_than_the_cache_may_hold_is_not_prefetched() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server, KitBuilder::new().indexed());
    let kitfs = Kitfs::new().with("KITFS_CACHE_SIZE", "30MiB");
    let mount = kitfs.mount(&kit.reference, &["--prefetch", "all"]);
    let failed = until(&kitfs, &mount, "failed");
    assert!(
        failed["why"].as_str().is_some_and(|why| why.contains("28.5 MiB") && why.contains("--cache-size")),
        "{failed}"
    );
    assert_eq!(server.bytes_for(kit.layers[0]), 0);
}

#[test]
fn an_interrupted_wait_leaves_nothing_mounted() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server, KitBuilder::new().indexed());
    let gate = server.hold(kit.layers[0], MIB);
    let kitfs = Kitfs::new();
    let dir = kitfs.path("mnt");
    let mut command =
        kitfs.command(["mount", &kit.reference, dir.to_str().expect("UTF-8"), "--prefetch", "all", "--wait"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    gate.wait_until_reached_by(1);
    assert_eq!(std::fs::read(dir.join("README.md")).expect("it is of use before"), b"read me");
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).expect("a pid")).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("a signal");
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("interrupted"));
    eventually("the end of the mount", || !dir.exists());
    assert_eq!(kitfs.ok(&["status", "--json"]).trim(), r#"{"mounts":[]}"#);
}
