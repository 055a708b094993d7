//! Whose word counts for what: indexes that a manifest pins or a trusted referrer attests, which are missing, damaged or
//! lie; layers that they can only list; and what becomes of an attested layer once all of it was read.

mod support;

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;

use kitfs::archive::index::annotations::{DIGEST, HEAD, SIZE};
use kitfs::archive::index::{Index, IndexEntry};
use kitfs::path::TreePath;
use support::index::{altered, attest, forged, index_of, offset_of, pin_index, repin};
use support::kit::{KitBuilder, Served, gzip, pattern, tar};
use support::program::{Kitfs, Mount, find_key};
use support::{Content, Fault, FaultServer, eventually};

const BIG: usize = (3 << 20) + 777;
const EIO: Option<i32> = Some(rustix::io::Errno::IO.raw_os_error());

fn files() -> Vec<(&'static str, Vec<u8>)> {
    vec![("w/a.txt", b"a".repeat(5000)), ("w/big.bin", pattern(1, BIG)), ("w/sub/z.txt", b"z".repeat(3000))]
}

fn layer() -> Vec<u8> {
    let files = files();
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (*name, &bytes[..])).collect();
    tar(&files)
}

fn index() -> Index {
    index_of(&Content::Bytes(layer()), "tar")
}

/// The same kit without an index, to pin one to.
fn plain(server: &FaultServer) -> Served {
    KitBuilder::new().tar("model", "w", layer()).serve(server, "plain")
}

fn pinned(server: &FaultServer) -> Served {
    KitBuilder::new().indexed().tar("model", "w", layer()).serve(server, "v1")
}

fn assert_reads(mount: &Mount<'_>) {
    for (name, bytes) in files() {
        assert!(fs::read(mount.path(name)).unwrap_or_else(|error| panic!("{name}: {error}")) == bytes, "{name}");
    }
}

fn mode(mount: &Mount<'_>, name: &str) -> u32 {
    fs::metadata(mount.path(name)).expect("stat").permissions().mode() & 0o7777
}

fn assert_fails(mount: &Mount<'_>, name: &str) {
    let error = fs::read(mount.path(name)).expect_err("the read fails");
    assert_eq!(error.raw_os_error(), EIO, "{name}: {error}");
}

/// Why the layer is refused, by `status`.
fn refused(kitfs: &Kitfs, mount: &Mount<'_>) -> Option<String> {
    kitfs.status(mount)["layers"][0]["poisoned"].as_str().map(str::to_owned)
}

/// Waits until the layer is refused; both forms of `status` say so, and nothing of it is read any more.
fn assert_refused(kitfs: &Kitfs, mount: &Mount<'_>) {
    eventually("poison", || refused(kitfs, mount).is_some());
    let text = kitfs.ok(&["status", mount.dir.to_str().expect("UTF-8")]);
    assert!(text.contains("REFUSED"), "{text}");
    for (name, _) in files().iter().filter(|(name, _)| mount.path(name).exists()) {
        assert_fails(mount, name);
    }
}

/// The row of a path.
fn row<'a>(rows: &'a mut [IndexEntry], path: &str) -> &'a mut IndexEntry {
    rows.iter_mut().find(|row| row.entry.path.as_bytes() == path.as_bytes()).expect("the entry")
}

#[test]
fn a_compressed_layer_is_listed_by_its_index_and_read_by_a_fill() {
    let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 1).expect("compresses");
    let big = pattern(1, BIG);
    for (suffix, blob) in
        [("tar+gzip", gzip(&layer())), ("tar+zstd", zstd(&layer())), ("raw+gzip", gzip(&big)), ("raw+zstd", zstd(&big))]
    {
        let server = FaultServer::empty("team/kit");
        let (root, file) = if suffix.starts_with("raw") { ("m.bin", "m.bin") } else { ("w", "w/big.bin") };
        let kit = KitBuilder::new().indexed().layer("model", root, suffix, blob).serve(&server, "v1");
        let kitfs = Kitfs::new();
        let mount = kitfs.mount(&kit.reference, &[]);
        assert_eq!(fs::metadata(mount.path(file)).expect("stat").len(), BIG as u64, "{suffix}");
        assert_eq!(server.requests_for(kit.layers[0]), 0, "{suffix}: listed without a touch");
        assert_eq!(mount.trust_of(file), "pinned", "{suffix}");
        assert!(fs::read(mount.path(file)).expect("reads") == big, "{suffix}");
        assert_eq!(mount.trust_of(file), "derived", "{suffix}: the index was compared with the layer");
    }
}

#[test]
fn an_index_that_lies_about_a_compressed_layer_poisons_it() {
    let server = FaultServer::empty("team/kit");
    let blob = gzip(&layer());
    let index = index_of(&Content::Bytes(blob.clone()), "tar+gzip");
    let kit = KitBuilder::new().layer("model", "w", "tar+gzip", blob).serve(&server, "plain");
    let lies: [fn(&mut Vec<IndexEntry>); 3] = [
        |rows| row(rows, "w/a.txt").entry.mode = 0o777,
        |rows| row(rows, "w/a.txt").content.as_mut().expect("a file").clone_from(&other_content(5000)),
        |rows| rows.retain(|row| row.entry.path.as_bytes() != b"w/a.txt"),
    ];
    for lie in lies {
        let lying = pin_index(&server, &kit, "lying", 0, &altered(&index, lie));
        let kitfs = Kitfs::new();
        let mount = kitfs.mount(&lying.reference, &[]);
        assert_fails(&mount, "w/big.bin");
        assert_refused(&kitfs, &mount);
        drop(mount);
        // What the layer's own digest has proved is right whatever the index says.
        let mount = kitfs.mount(&lying.reference, &[]);
        assert_reads(&mount);
        assert_eq!(mode(&mount, "w/a.txt"), 0o644);
        assert!(mount.said.contains("which this machine made of the verified layer"), "{}", mount.said);
    }
}

#[test]
fn a_compressed_layer_with_an_index_is_not_streamed_unverified() {
    let server = FaultServer::empty("team/kit");
    let kit = KitBuilder::new().indexed().layer("model", "w", "tar+gzip", gzip(&layer())).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--verify=stream"]);
    let size = server.len_of(&kit.layers[0]).expect("the layer");
    let gate = server.hold(kit.layers[0], size - 100);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut start = [0; 100];
            fs::File::open(mount.path("w/a.txt")).and_then(|mut file| file.read_exact(&mut start)).map(|()| start)
        });
        gate.wait_until_reached_by(1);
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(!reader.is_finished(), "it was told that the kernel may keep what it reads");
        gate.release();
        assert_eq!(reader.join().expect("a reader").expect("reads"), [b'a'; 100]);
    });
}

fn other_content(size: usize) -> kitfs::archive::chunk::Content {
    let mut chunker = kitfs::archive::chunk::Chunker::new();
    chunker.update(&pattern(77, size));
    chunker.finish()
}

/// A kit whose index can't be used: `mount` and `status` say so with `word`, and the layer is read as if it had none.
fn assert_provisional(kit: &Served, word: &str) {
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    assert!(mount.said.contains("warning") && mount.said.contains(word), "{word}: {}", mount.said);
    let text = kitfs.ok(&["status", mount.dir.to_str().expect("UTF-8")]);
    assert!(text.contains("warning") && text.contains(word), "{word}: {text}");
    let status = kitfs.status(&mount);
    let warnings = status["warnings"].as_array().expect("warnings");
    assert!(warnings.iter().any(|warning| warning.as_str().is_some_and(|text| text.contains(word))), "{status}");
    assert_eq!((&status["trust"], &status["layers"][0]["trust"]), (&"provisional".into(), &"provisional".into()));
    assert_reads(&mount);
    assert_eq!(kitfs.status(&mount)["trust"], "derived");
    drop(mount);

    let json = kitfs.path("json");
    let said = kitfs.ok(&["mount", &kit.reference, json.to_str().expect("UTF-8"), "--json"]);
    let said: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert!(
        find_key(&said, "warnings").and_then(|list| list.as_array()).is_some_and(|list| !list.is_empty()),
        "{said}"
    );
    kitfs.ok(&["unmount", json.to_str().expect("UTF-8")]);
}

#[test]
fn a_missing_index_is_a_warning() {
    let server = FaultServer::empty("team/kit");
    let kit = pinned(&server);
    server.remove(&kit.indexes[0].digest);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let index = kit.indexes[0].digest.to_string();
    assert!(mount.said.contains("is not used") && mount.said.contains(&index), "{}", mount.said);
    assert_eq!(kitfs.status(&mount)["trust"], "provisional");
    assert_reads(&mount);
    assert_eq!(kitfs.status(&mount)["trust"], "derived");
}

#[test]
fn an_index_of_false_bytes_is_not_used() {
    let server = FaultServer::empty("team/kit");
    let kit = pinned(&server);
    for offset in [0, 112 + 40, kit.indexes[0].head_size - 1] {
        server.fault(kit.indexes[0].digest, Fault::FlipBit { offset });
        let kitfs = Kitfs::new();
        let mount = kitfs.mount(&kit.reference, &[]);
        assert!(mount.said.contains("is not used"), "{}", mount.said);
        assert_eq!(kitfs.status(&mount)["trust"], "provisional");
        assert_reads(&mount);
        server.heal(kit.indexes[0].digest);
    }
}

#[test]
fn an_invalid_index_with_the_right_digest_is_not_used() {
    let server = FaultServer::empty("team/kit");
    let kit = plain(&server);
    let other = index_of(&Content::Bytes(tar(&[("w/other", b"other")])), "tar");
    let longer = |pin: kitfs::archive::index::annotations::Pin| kitfs::archive::index::annotations::Pin {
        size: pin.size + 32,
        ..pin
    };
    let cases = [
        ("version", forged(&index(), |bytes| bytes[8] = 2)),
        ("does not begin where", forged(&index(), |bytes| swap_records(bytes, 0, 1))),
        ("is of", forged(&other, |_| {})),
    ];
    for (word, (bytes, pin)) in cases {
        server.add_blob(bytes);
        let bad = repin(&server, &kit, "bad", 0, &pin.annotations());
        assert_provisional(&bad, if word == "is of" { "is not used" } else { word });
    }
    let (bytes, pin) = forged(&index(), |_| {});
    server.add_blob(bytes);
    let bad = repin(&server, &kit, "bad", 0, &longer(pin).annotations());
    assert_provisional(&bad, "is not used");
}

/// Swaps two records of an index.
fn swap_records(bytes: &mut [u8], one: usize, other: usize) {
    for at in 0..76 {
        bytes.swap(112 + one * 76 + at, 112 + other * 76 + at);
    }
}

#[test]
fn annotations_that_name_no_index_are_a_warning() {
    let server = FaultServer::empty("team/kit");
    let kit = plain(&server);
    let right = index().pin().annotations();
    let without = |key| right.iter().filter(|(name, _)| *name != key).cloned().collect::<Vec<_>>();
    for key in [DIGEST, SIZE, HEAD] {
        let half = repin(&server, &kit, "half", 0, &without(key));
        assert_provisional(&half, key);
    }
    let mut large = without(SIZE);
    large.retain(|(name, _)| *name != HEAD);
    large.push((SIZE, "9999999999999".to_owned()));
    large.push((HEAD, format!("9999999999967:{}", index().pin().head_digest)));
    let large = repin(&server, &kit, "large", 0, &large);
    assert_provisional(&large, "9999999999999");
    assert_eq!(server.requests_for(index().pin().digest), 0);
}

#[test]
fn a_registry_that_fails_has_not_lost_the_index() {
    let server = FaultServer::empty("team/kit");
    let kit = pinned(&server);
    server.fault(kit.indexes[0].digest, Fault::status(500));
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--meta-timeout", "2s", "--read-timeout", "5s"]);
    assert!(mount.said.contains("warning"), "{}", mount.said);
    let status = kitfs.status(&mount);
    assert_eq!(status["trust"], "pinned", "{status}");
    let error = fs::metadata(mount.path("w/a.txt")).expect_err("not listed");
    assert_ne!(error.kind(), std::io::ErrorKind::NotFound, "{error}");
    assert_eq!(server.requests_for(kit.layers[0]), 0, "nothing is read without the index that is named");

    server.heal(kit.indexes[0].digest);
    // The attempt that is under way pauses for up to ten seconds.
    let start = std::time::Instant::now();
    while fs::metadata(mount.path("w/a.txt")).is_err() {
        assert!(start.elapsed() < std::time::Duration::from_secs(20), "it is asked for again");
    }
    assert_eq!(fs::read(mount.path("w/a.txt")).expect("reads"), b"a".repeat(5000));
    assert_eq!(mount.trust_of("w/a.txt"), "pinned");
    assert!(server.bytes_for(kit.layers[0]) < 1 << 20, "read in part");
    assert_reads(&mount);
}

#[test]
fn an_index_that_goes_after_its_head_came_leaves_the_layer_to_a_fill() {
    let server = FaultServer::empty("team/kit");
    let kit = pinned(&server);
    let index = kit.indexes[0];
    let gone = |server: &FaultServer| server.remove(&index.digest);
    let falsified = |server: &FaultServer| server.fault(index.digest, Fault::FlipBit { offset: index.head_size + 5 });
    let ways: [&dyn Fn(&FaultServer); 2] = [&falsified, &gone];
    for way in ways {
        let kitfs = Kitfs::new();
        let mount = kitfs.mount(&kit.reference, &[]);
        assert_eq!(mount.trust_of("w/big.bin"), "pinned");
        way(&server);
        assert_reads(&mount);
        assert_eq!(mount.trust_of("w/big.bin"), "derived");
        let status = kitfs.status(&mount);
        assert!(status["warnings"].to_string().contains("is not used"), "{status}");
        server.heal(index.digest);
    }
}

/// Ways in which an index that keeps all rules may be false: with the right content, and with other content.
fn lies() -> [(&'static str, Index); 4] {
    let index = index();
    [
        ("mode", altered(&index, |rows| row(rows, "w/a.txt").entry.mode = 0o4777)),
        ("time", altered(&index, |rows| row(rows, "w/a.txt").entry.mtime += 1)),
        ("offset", altered(&index, |rows| row(rows, "w/a.txt").entry.offset -= 512)),
        ("content", altered(&index, |rows| row(rows, "w/a.txt").content = Some(other_content(5000)))),
    ]
}

#[test]
fn a_pinned_index_that_lies_serves_no_other_bytes_than_it_tells_of_and_poisons_its_layer() {
    let server = FaultServer::empty("team/kit");
    let kit = plain(&server);
    for (what, lie) in lies() {
        let lying = pin_index(&server, &kit, "lying", 0, &lie);
        let kitfs = Kitfs::new();
        let mount = kitfs.mount(&lying.reference, &[]);
        match what {
            "mode" | "time" => assert_reads(&mount),
            _ => {
                assert_fails(&mount, "w/a.txt");
                assert!(fs::read(mount.path("w/big.bin")).expect("another file") == pattern(1, BIG));
            }
        }
        assert_eq!(mode(&mount, "w/a.txt"), if what == "mode" { 0o4777 } else { 0o644 });
        kitfs.assert_cache_is_true(&pattern(77, 64));
        drop(mount);

        let mount = kitfs.mount(&lying.reference, &["--trust=layer"]);
        assert_eq!(kitfs.status(&mount)["trust"], "provisional", "{what}");
        assert_reads(&mount);
        assert_eq!(mode(&mount, "w/a.txt"), 0o644, "{what}");
        drop(mount);

        // Read whole, since the registry knows no ranges.
        let kitfs = Kitfs::new();
        let mount = kitfs.mount(&lying.reference, &[]);
        server.fault(lying.layers[0], Fault::IgnoreRange);
        assert_fails(&mount, "w/big.bin");
        assert_refused(&kitfs, &mount);
        server.heal(lying.layers[0]);
        drop(mount);
        let mount = kitfs.mount(&lying.reference, &[]);
        assert!(mount.said.contains("which this machine made of the verified layer"), "{what}: {}", mount.said);
        assert_reads(&mount);
        assert_eq!(mode(&mount, "w/a.txt"), 0o644, "{what}");
    }
}

fn attested(server: &FaultServer) -> Served {
    KitBuilder::new().attested().tar("model", "w", layer()).serve(server, "v1")
}

#[test]
fn an_attested_index_counts_for_whom_trusts_it_by_digest_or_by_rule() {
    let server = FaultServer::empty("team/kit");
    let kit = attested(&server);
    let index = kit.indexes[0].digest;
    let referrer = kit.referrer.expect("a referrer").to_string();
    let tier_with = |options: &[&str], config: &str| {
        let kitfs = Kitfs::new();
        let file = kitfs.path("config.toml");
        fs::write(&file, config).expect("writes");
        let kitfs = kitfs.with("KITFS_CONFIG", &file);
        let mount = kitfs.mount(&kit.reference, options);
        let tier = kitfs.status(&mount)["trust"].as_str().map(str::to_owned);
        assert!(!mount.said.contains("warning"), "{}", mount.said);
        assert_reads(&mount);
        tier.expect("a tier")
    };
    assert_eq!(tier_with(&[], ""), "provisional");
    assert_eq!(tier_with(&[], "[trust]\nindex = [\"registry.example/team/*\"]\n"), "provisional");
    assert_eq!(server.requests_for(index), 0, "what is not trusted is not fetched");
    assert_eq!(tier_with(&["--index-digest", &referrer], ""), "attested");
    assert_eq!(tier_with(&[], &format!("[trust]\nindex = [\"{}/team/*\"]\n", server.host())), "attested");
    assert_eq!(server.requests_for(index), 4, "its head and the list, twice");
}

#[test]
fn an_attested_layer_becomes_derived_once_all_of_it_was_read_and_only_the_bytes_between_are_fetched_for_it() {
    let server = FaultServer::empty("team/kit");
    let kit = attested(&server);
    let referrer = kit.referrer.expect("a referrer").to_string();
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &["--index-digest", &referrer]);
    assert!(fs::read(mount.path("w/big.bin")).expect("reads") == pattern(1, BIG));
    assert_eq!(mount.trust_of("w/big.bin"), "attested", "not all was read");
    assert_reads(&mount);
    eventually("the proof", || mount.trust_of("w/big.bin") == "derived");
    assert_eq!(kitfs.status(&mount)["trust"], "derived");
    let ranges = server.ranges_for(kit.layers[0]);
    for (name, bytes) in files() {
        for at in [0, bytes.len() as u64 / 2, bytes.len() as u64 - 1] {
            let at = offset_of(&index(), name) + at;
            let times = ranges.iter().filter(|(first, last)| (*first..=*last).contains(&at)).count();
            assert_eq!(times, 1, "byte {at} of {name} in {ranges:?}");
        }
    }
    assert_reads(&mount);
    drop(mount);

    eventually("the derived index", || kitfs.cached_files("indexes").len() == 1);
    server.reset_counters();
    let mount = kitfs.mount(&kit.reference, &[]);
    assert_eq!(kitfs.status(&mount)["trust"], "derived", "for whom trusts nobody's index too");
    assert_reads(&mount);
    assert_eq!(server.requests_for(kit.layers[0]), 0);
}

#[test]
fn an_attested_index_that_lies_is_found_out_once_all_of_the_layer_was_read() {
    let server = FaultServer::empty("team/kit");
    let kit = plain(&server);
    let without_directory = altered(&index(), |rows| rows.retain(|row| row.entry.path.as_bytes() != b"w/sub"));
    let renamed = altered(&index(), |rows| {
        row(rows, "w/sub/z.txt").entry.path = TreePath::from_clean(b"w/sub/y.txt").expect("a path");
    });
    let [mode, time, ..] = lies();
    for (what, lie) in [mode, time, ("directory", without_directory), ("name", renamed)] {
        server.add_blob(lie.as_bytes());
        let referrer = attest(&server, &kit.digest, &[(kit.layers[0], lie.pin())]);
        let kitfs = Kitfs::new();
        let mount = kitfs.mount(&kit.reference, &["--index-digest", &referrer.to_string()]);
        let open = mount.open_direct("w/big.bin");
        let last = if what == "name" { "w/sub/y.txt" } else { "w/sub/z.txt" };
        for name in ["w/a.txt", "w/big.bin", last] {
            fs::read(mount.path(name)).unwrap_or_else(|error| panic!("{what}, {name}: {error}"));
        }
        assert_refused(&kitfs, &mount);
        let error = std::os::unix::fs::FileExt::read_at(&open, &mut [0; 4096], 0).expect_err("refused as well");
        assert_eq!(error.raw_os_error(), EIO, "{what}: {error}");
        drop(open);
        drop(mount);
        let mount = kitfs.mount(&kit.reference, &["--trust=layer"]);
        assert_reads(&mount);
    }
}

#[test]
fn a_false_byte_between_the_files_of_an_attested_layer_is_found_out() {
    let server = FaultServer::empty("team/kit");
    let kit = attested(&server);
    let kitfs = Kitfs::new();
    let referrer = kit.referrer.expect("a referrer").to_string();
    let mount = kitfs.mount(&kit.reference, &["--index-digest", &referrer]);
    server.fault(kit.layers[0], Fault::FlipBit { offset: 3 });
    for (name, bytes) in files() {
        assert!(fs::read(mount.path(name)).expect("its chunks are right") == bytes, "{name}");
    }
    assert_refused(&kitfs, &mount);
    assert!(refused(&kitfs, &mount).is_some_and(|why| why.contains("digest mismatch")), "{}", kitfs.logs());
}

#[test]
fn a_pin_that_states_more_than_its_layer_can_have_is_not_fetched() {
    let server = FaultServer::empty("team/kit");
    let kit = plain(&server);
    let right = index().pin();
    let len = layer().len() as u64;
    for (head_size, lists) in [(112 + len + 1, 0), (2_000_000_000, 0), (right.head_size, 32 * 9)] {
        let pin = kitfs::archive::index::annotations::Pin { head_size, size: head_size + lists, ..right };
        let large = repin(&server, &kit, "large", 0, &pin.annotations());
        assert_provisional(&large, "are more than a layer of");
        assert_eq!(server.requests_for(right.digest), 0);
    }
}

#[test]
fn an_index_that_a_layout_can_not_read_is_a_warning() {
    let server = FaultServer::empty("team/kit");
    let kit = plain(&server);
    let made = Kitfs::new();
    let dir = made.path("layout");
    let target = format!("oci:{}:v1", dir.display());
    made.ok(&["index", &kit.reference, &target]);
    let blob = dir.join("blobs/sha256").join(index().pin().digest.hex());
    let cut = |blob: &std::path::Path| {
        fs::OpenOptions::new().write(true).open(blob).and_then(|file| file.set_len(150)).expect("cuts");
    };
    let replaced = |blob: &std::path::Path| {
        fs::remove_file(blob).and_then(|()| fs::create_dir(blob)).expect("a directory instead");
    };
    // Even root can't open a socket as a file: an error of the system, as of a disk that can't give the bytes.
    let refused = |blob: &std::path::Path| {
        let socket = made.path("s");
        std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
        fs::remove_dir(blob).and_then(|()| fs::rename(socket, blob)).expect("a socket instead");
    };
    let ways: [&dyn Fn(&std::path::Path); 3] = [&cut, &replaced, &refused];
    for spoil in ways {
        spoil(&blob);
        let kitfs = Kitfs::new();
        let mount = kitfs.mount(&target, &[]);
        assert!(mount.said.contains("is not used"), "{}", mount.said);
        assert_eq!(kitfs.status(&mount)["trust"], "provisional");
        assert_reads(&mount);
        assert_eq!(kitfs.status(&mount)["trust"], "derived");
    }
}
