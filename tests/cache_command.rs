//! `kitfs cache`: what is there, by kit; what may go and what stays; what is damaged, and how it is mended.

mod support;

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use support::kit::{KitBuilder, Served, pattern, tar};
use support::program::Kitfs;
use support::reading;
use support::{Fault, FaultServer, eventually};

const MIB: usize = 1 << 20;

/// A kit with one directory of weights; each file is (name, seed, MiB).
fn kit(server: &FaultServer, tag: &str, files: &[(&str, u64, usize)]) -> Served {
    weights(files).serve(server, tag)
}

fn weights(files: &[(&str, u64, usize)]) -> KitBuilder {
    let contents: Vec<_> = files.iter().map(|(_, seed, mib)| pattern(*seed, mib * MIB)).collect();
    let names: Vec<_> = files.iter().map(|(name, ..)| format!("w/{name}")).collect();
    let all: Vec<_> = names.iter().map(String::as_str).zip(contents.iter().map(Vec::as_slice)).collect();
    KitBuilder::new().tar("model", "w", tar(&all))
}

/// Reads a file of a kit, and with it, as nothing indexes its layer, all of it.
fn fetch(kitfs: &Kitfs, kit: &Served, name: &str) {
    kitfs.ok(&["cat", &kit.reference, &format!("w/{name}")]);
}

fn json_of(kitfs: &Kitfs, arguments: &[&str]) -> Value {
    let printed = kitfs.ok(arguments);
    assert_eq!(printed.lines().count(), 1, "one line for programs: {printed}");
    serde_json::from_str(&printed).expect("JSON")
}

fn ls(kitfs: &Kitfs) -> Value {
    json_of(kitfs, &["cache", "ls", "--objects", "--json"])
}

fn of_kit<'a>(listing: &'a Value, kit: &Served) -> &'a Value {
    let kits = listing["kits"].as_array().expect("kits");
    kits.iter().find(|found| found["digest"] == json!(kit.digest)).unwrap_or_else(|| panic!("{listing}"))
}

fn bytes(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("a number: {value}"))
}

/// What the files of the cache take on the disk.
fn on_disk(kitfs: &Kitfs) -> u64 {
    kitfs.cached_files("").iter().map(|path| fs::symlink_metadata(path).expect("a file").blocks() * 512).sum()
}

fn age(path: &Path) {
    let file = fs::OpenOptions::new().write(true).open(path).expect("opens");
    file.set_modified(SystemTime::now() - Duration::from_secs(3600)).expect("sets");
}

/// Marks all that is recorded of a kit as kept.
fn keep(kitfs: &Kitfs, kit: &Served) {
    let hex = kit.digest.hex();
    let path = kitfs.cache().join("kits").join(&hex[..2]).join(&hex);
    let mut record: Value = serde_json::from_slice(&fs::read(&path).expect("a record")).expect("JSON");
    for layer in record["layers"].as_array_mut().expect("layers") {
        layer["kept"] = json!(true);
    }
    fs::write(path, record.to_string()).expect("writes");
}

/// Flips a bit in the middle of a file; its path in the cache.
fn flip(kitfs: &Kitfs, path: &Path) -> String {
    flip_at(path, fs::metadata(path).expect("a file").len() / 2);
    path.strip_prefix(kitfs.cache()).expect("in the cache").to_str().expect("UTF-8").to_owned()
}

fn flip_at(path: &Path, at: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).expect("opens");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("reads");
    file.write_all_at(&[byte[0] ^ 1], at).expect("writes");
}

#[test]
fn what_kits_share_counts_once_and_rm_frees_what_ls_said() {
    let server = FaultServer::empty("team/kit");
    let kitfs = Kitfs::new();
    let a = kit(&server, "a", &[("shared.bin", 1, 2), ("a.bin", 2, 1)]);
    let b = kit(&server, "b", &[("shared.bin", 1, 2), ("b.bin", 3, 1)]);
    for kit in [&a, &b] {
        fetch(&kitfs, kit, "shared.bin");
    }

    let listing = ls(&kitfs);
    for kit in [&a, &b] {
        let found = of_kit(&listing, kit);
        assert_eq!(
            [&found["complete"], &found["kept"], &found["mountpoints"]],
            [&json!(true), &json!(false), &json!([])]
        );
        assert_eq!((bytes(&found["size"]), bytes(&found["shared"])), (3 * MIB as u64, 2 * MIB as u64));
        assert_eq!(bytes(&found["here"]), bytes(&found["shared"]) + bytes(&found["frees"]));
        assert_eq!(found["references"], json!([kit.reference]));
    }
    let objects = listing["objects"].as_array().expect("objects");
    let mut sizes: Vec<_> = objects
        .iter()
        .map(|object| (bytes(&object["size"]) / MIB as u64, object["kits"].as_array().map(Vec::len)))
        .collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [(1, Some(1)), (1, Some(1)), (2, Some(2))]);
    let [of_a, of_b] = [of_kit(&listing, &a), of_kit(&listing, &b)];
    let of_kits = bytes(&of_a["frees"]) + bytes(&of_b["here"]);
    assert!(of_kits < on_disk(&kitfs) + 1 && on_disk(&kitfs) - of_kits < 64 << 10, "{of_kits} of {}", on_disk(&kitfs));

    let frees = bytes(&of_a["frees"]);
    let before = on_disk(&kitfs);
    let told = json_of(&kitfs, &["cache", "rm", &a.reference, "--dry-run", "--json"]);
    assert_eq!((bytes(&told["removed"]["bytes"]), on_disk(&kitfs)), (frees, before), "{told}");
    let done = json_of(&kitfs, &["cache", "rm", &a.reference, "--json"]);
    assert_eq!(done["removed"], told["removed"]);
    assert_eq!(before - on_disk(&kitfs), frees);

    let listing = ls(&kitfs);
    assert_eq!(listing["kits"].as_array().map(Vec::len), Some(1));
    let found = of_kit(&listing, &b);
    assert_eq!((&found["complete"], bytes(&found["shared"])), (&json!(true), 0));
    server.reset_counters();
    fetch(&kitfs, &b, "shared.bin");
    assert_eq!(server.bytes_for(b.layers[0]), 0, "what it shared is there");
    kitfs.ok(&["cache", "rm", "--all"]);
    assert_eq!((kitfs.cached_files("objects").len(), kitfs.cached_files("blobs").len()), (0, 0));
}

#[test]
fn the_table_tells_names_sizes_and_what_is_whole() {
    let server = FaultServer::empty("team/kit");
    let kitfs = Kitfs::new();
    let whole = kit(&server, "whole", &[("a.bin", 1, 2)]);
    let bare = kit(&server, "bare", &[("b.bin", 2, 3)]);
    assert!(kitfs.ok(&["cache", "ls"]).contains("in all"), "an empty cache is no error");
    fetch(&kitfs, &whole, "a.bin");
    keep(&kitfs, &whole);
    kitfs.ok(&["inspect", &bare.reference]);
    let table = kitfs.ok(&["cache", "ls"]);
    let line = |name: &str| table.lines().find(|line| line.contains(name)).unwrap_or_else(|| panic!("{name}: {table}"));
    let row = line(&whole.reference);
    assert!(row.contains(&whole.digest.short()) && row.contains("2.0 MiB") && row.ends_with("complete, kept"), "{row}");
    assert!(line(&bare.reference).ends_with("0 %"), "{table}");
    assert!(line("limit").contains("1.0 TiB") && line("limit").contains("free"), "{table}");
    let objects = kitfs.ok(&["cache", "ls", "--objects"]);
    assert!(objects.lines().nth(1).expect("an object").ends_with(&whole.digest.short()), "{objects}");
}

#[test]
fn gc_takes_what_is_of_no_use_and_leaves_kits_alone() {
    let server = FaultServer::empty("team/kit");
    let kitfs = Kitfs::new();
    let kit = kit(&server, "v1", &[("a.bin", 1, 2)]);
    fetch(&kitfs, &kit, "a.bin");
    let nothing = json_of(&kitfs, &["cache", "gc", "--json"]);
    assert_eq!(
        (&nothing["freed"], nothing["leftovers"]["removed"]["items"].as_u64()),
        (&json!(0), Some(0)),
        "{nothing}"
    );

    let write = |path: &str| {
        let path = kitfs.cache().join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("makes");
        fs::write(&path, [1; 5000]).expect("writes");
        path
    };
    let hex = "ab".repeat(32);
    let loose = [format!("objects/ab/{hex}"), format!("blobs/sha256/ab/{hex}"), format!("indexes/ab/{hex}")]
        .map(|path| write(&path));
    loose.iter().for_each(|path| age(path));
    let left = ["indexes/ab/x.1.2.tmp", "quarantine/objects-x.0"].map(write);
    let staged = write("incoming/nobodys/0");
    let fresh = write(&format!("blobs/sha256/cd/{}", "cd".repeat(32)));

    let told = json_of(&kitfs, &["cache", "gc", "--dry-run", "--json"]);
    assert!(loose.iter().chain(&left).all(|path| path.exists()), "a dry run removes nothing");
    let done = json_of(&kitfs, &["cache", "gc", "--json"]);
    assert_eq!(
        [&told["loose"], &told["leftovers"], &told["bytes"]],
        [&done["loose"], &done["leftovers"], &done["bytes"]]
    );
    assert_eq!(done["loose"]["removed"], json!({"items": 3, "bytes": 3 * 8192}));
    assert_eq!(done["leftovers"]["removed"], json!({"items": 2, "bytes": 2 * 8192}));
    assert!(!loose.iter().chain(&left).chain([&staged]).any(|path| path.exists()));
    assert!(fresh.exists(), "whose it is may show in a moment");

    server.reset_counters();
    fetch(&kitfs, &kit, "a.bin");
    assert_eq!(server.bytes_for(kit.layers[0]), 0, "the kit is as it was");
}

#[test]
fn gc_brings_the_cache_below_its_limit_and_kept_kits_stay() {
    let server = FaultServer::empty("team/kit");
    let kitfs = Kitfs::new();
    let kits = [("a", 1), ("b", 2), ("c", 3)].map(|(tag, seed)| kit(&server, tag, &[("x.bin", seed, 3)]));
    for kit in &kits {
        fetch(&kitfs, kit, "x.bin");
        // Times are told apart by the second.
        kitfs.cached_files("objects").iter().for_each(|path| age_by_one(path));
    }
    keep(&kitfs, &kits[0]);
    let done = json_of(&kitfs, &["cache", "gc", "--cache-size", "8MiB", "--json"]);
    assert_eq!(done["evicted"]["items"], json!(1), "{done}");
    assert!(bytes(&done["bytes"]) < 8 << 20 && bytes(&done["bytes"]) >= on_disk(&kitfs), "{done}");
    let listing = ls(&kitfs);
    let complete = kits.each_ref().map(|kit| of_kit(&listing, kit)["complete"].clone());
    assert_eq!(complete, [true, false, true], "the one that was used longest ago went, but for the kept one");
    let held = listing["bytes"].as_u64().expect("a number");
    let again = json_of(&kitfs, &["cache", "gc", "--cache-size", &(held + (2 << 20)).to_string(), "--json"]);
    assert_eq!(again["freed"], json!(0));
}

/// Moves the last use of a file back, so that what is used next was used later.
fn age_by_one(path: &Path) {
    let file = fs::OpenOptions::new().write(true).open(path).expect("opens");
    let used = file.metadata().and_then(|found| found.modified()).expect("a time");
    file.set_modified(used - Duration::from_secs(60)).expect("sets");
}

#[test]
fn a_kept_kit_survives_others_that_are_read_under_a_tight_limit() {
    let server = FaultServer::empty("team/kit");
    let kitfs = Kitfs::new().with("KITFS_CACHE_SIZE", "8MiB");
    let kits = [("a", 1), ("b", 2), ("c", 3), ("d", 4)].map(|(tag, seed)| kit(&server, tag, &[("x.bin", seed, 2)]));
    for (at, kit) in kits.iter().enumerate() {
        fetch(&kitfs, kit, "x.bin");
        kitfs.cached_files("objects").iter().for_each(|path| age_by_one(path));
        if at == 0 {
            keep(&kitfs, kit);
        }
    }
    let listing = ls(&kitfs);
    assert_eq!(of_kit(&listing, &kits[0])["complete"], json!(true), "{listing}");
    assert_eq!(of_kit(&listing, &kits[1])["complete"], json!(false), "{listing}");
    assert!(on_disk(&kitfs) <= 8 << 20);
}

#[test]
fn what_a_directory_served_before_goes_late() {
    let server = FaultServer::empty("team/kit");
    let kitfs = Kitfs::new().with("KITFS_CACHE_SIZE", "8MiB");
    let kits = [("v1", 1), ("x", 2), ("v2", 3), ("y", 4)].map(|(tag, seed)| kit(&server, tag, &[("x.bin", seed, 2)]));
    let dir = kitfs.path("llama");
    for (at, kit) in kits.iter().enumerate() {
        if at % 2 == 0 {
            let dir = dir.to_str().expect("UTF-8");
            kitfs.ok(&["mount", &kit.reference, dir]);
            fs::read(Path::new(dir).join("w/x.bin")).expect("reads");
            eventually("the commit", || kitfs.cached_files("indexes").len() == at + 1);
            kitfs.ok(&["unmount", dir]);
        } else {
            fetch(&kitfs, kit, "x.bin");
        }
        kitfs.cached_files("objects").iter().for_each(|path| age_by_one(path));
    }
    let listing = ls(&kitfs);
    let complete = kits.each_ref().map(|kit| of_kit(&listing, kit)["complete"].clone());
    assert_eq!(complete, [true, false, true, true], "the one for a rollback is older, and stays: {listing}");
}

#[test]
fn rm_takes_names_and_digests_and_asks_no_registry() {
    let server = FaultServer::empty("team/kit");
    let kitfs = Kitfs::new();
    let old = kit(&server, "v1", &[("a.bin", 1, 1)]);
    fetch(&kitfs, &old, "a.bin");
    let new = kit(&server, "v1", &[("a.bin", 2, 1)]);
    fetch(&kitfs, &new, "a.bin");
    // By its digest, so that it is the one that was used last.
    let repository = old.reference.strip_suffix(":v1").expect("a tag");
    let pinned = format!("{repository}@{}", old.digest);
    kitfs.ok(&["ls", &pinned]);
    server.reset_counters();

    let said = kitfs.fails(&["cache", "rm", &format!("{repository}:other")]);
    assert!(said.contains("is not in the cache") && said.contains(&old.digest.short()), "{said}");
    assert!(said.contains(&new.digest.short()), "it lists what there is: {said}");
    let said = kitfs.ok(&["cache", "rm", &old.reference]);
    assert!(said.contains(&new.digest.short()), "the kit that the tag led to last: {said}");
    let said = kitfs.fails(&["cache", "rm", &old.digest.short()[..11]]);
    assert!(said.contains("is not in the cache"), "too short to be meant: {said}");
    for name in
        [pinned.as_str(), &old.digest.to_string(), &format!("sha256:{}", old.digest.short()), &old.digest.short()]
    {
        let told = json_of(&kitfs, &["cache", "rm", name, "--dry-run", "--json"]);
        assert_eq!(told["kits"][0]["digest"], json!(old.digest), "{name}");
    }
    kitfs.ok(&["cache", "rm", &old.digest.short()]);
    assert_eq!(server.requests().len(), 0);
    let said = kitfs.fails(&["cache", "rm", &old.reference]);
    assert!(said.contains("holds no kit"), "{said}");
    for arguments in [&["cache", "rm"][..], &["cache", "rm", "--all", "x"], &["cache"]] {
        assert_eq!(kitfs.run(arguments).status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn a_kit_that_came_from_two_repositories_is_removed_by_either_with_its_digest() {
    let servers = ["team/one", "team/two"].map(FaultServer::empty);
    let kitfs = Kitfs::new();
    let kits = servers.each_ref().map(|server| kit(server, "v1", &[("a.bin", 1, 1)]));
    assert_eq!(kits[0].digest, kits[1].digest);
    kits.iter().for_each(|kit| fetch(&kitfs, kit, "a.bin"));
    for kit in &kits {
        let pinned = format!("{}@{}", kit.reference.strip_suffix(":v1").expect("a tag"), kit.digest);
        let told = json_of(&kitfs, &["cache", "rm", &pinned, "--dry-run", "--json"]);
        assert_eq!(told["kits"][0]["digest"], json!(kit.digest), "{pinned}");
    }
    let elsewhere = kits[0].reference.replace("team/one:v1", &format!("team/three@{}", kits[0].digest));
    assert!(kitfs.fails(&["cache", "rm", &elsewhere]).contains("is not in the cache"));
}

#[test]
fn gc_forgets_what_a_directory_served_of_which_nothing_is_left() {
    let server = FaultServer::empty("team/kit");
    let kitfs = Kitfs::new();
    let kit = kit(&server, "v1", &[("a.bin", 1, 1)]);
    let mount = kitfs.mount(&kit.reference, &[]);
    fs::read(mount.path("w/a.bin")).expect("reads");
    let dir = mount.dir.clone();
    drop(mount);
    // The directory stays.
    fs::create_dir_all(&dir).expect("makes");
    kitfs.ok(&["cache", "gc"]);
    assert_eq!(kitfs.cached_files("served").len(), 1);
    kitfs.ok(&["cache", "rm", "--all"]);
    kitfs.ok(&["cache", "gc"]);
    assert_eq!(kitfs.cached_files("served"), Vec::<PathBuf>::new());
}

#[test]
fn rm_refuses_a_kit_that_is_mounted_and_what_is_open_stays_until_it_is_closed() {
    let server = FaultServer::empty("team/kit");
    let kitfs = Kitfs::new();
    let kit = kit(&server, "v1", &[("a.bin", 1, 2), ("b.bin", 2, 1)]);
    fetch(&kitfs, &kit, "a.bin");
    let mount = kitfs.mount(&kit.reference, &[]);
    let said = kitfs.fails(&["cache", "rm", &kit.reference]);
    assert!(said.contains(mount.dir.to_str().expect("UTF-8")) && said.contains("--force"), "{said}");
    assert!(kitfs.ok(&["cache", "ls"]).contains("complete, mounted"));
    assert_eq!(kitfs.cached_files("objects").len(), 2);

    let open = mount.open_direct("w/a.bin");
    reading::part_directly(&open, 0, 4096).expect("reads");
    server.reset_counters();
    let told = json_of(&kitfs, &["cache", "rm", "--force", "--dry-run", &kit.reference, "--json"]);
    let done = json_of(&kitfs, &["cache", "rm", "--force", &kit.reference, "--json"]);
    assert_eq!([&told["removed"], &told["in_use"]], [&done["removed"], &done["in_use"]]);
    assert_eq!(done["in_use"]["items"], json!(1), "{done}");
    let page = reading::part_directly(&open, MIB as u64, 4096).expect("reads on");
    assert_eq!(page[..], pattern(1, 2 * MIB)[MIB..MIB + 4096]);
    assert_eq!(server.requests().len(), 0, "it is there still");
    let [object] = &kitfs.cached_files("objects")[..] else { panic!("one object is left") };
    age(object);
    let gc = json_of(&kitfs, &["cache", "gc", "--json"]);
    assert_eq!(gc["loose"]["in_use"]["items"], json!(1), "{gc}");
    let read = fs::read(mount.path("w/b.bin")).expect("the mount fetches it again");
    assert_eq!(read, pattern(2, MIB));
    drop(open);
    drop(mount);
    age(object);
    assert_eq!(json_of(&kitfs, &["cache", "gc", "--json"])["loose"]["removed"]["items"], json!(1));
    assert!(!object.exists());
}

/// A cache with an object, a partial file, a derived index and documents, and what a check of it should find once each
/// has been damaged: its path in the cache, its kind, its tag and path in the kit.
fn damaged(server: &FaultServer, kitfs: &Kitfs) -> (Served, Served, Vec<(String, &'static str, Value)>) {
    let whole = kit(server, "whole", &[("a.bin", 1, 2), ("b.bin", 2, 1)]);
    fetch(kitfs, &whole, "a.bin");
    let partial = weights(&[("big.bin", 3, 8)]).indexed().serve(server, "partial");
    {
        let mount = kitfs.mount(&partial.reference, &[]);
        let mut page = [0; 4096];
        mount.open_direct("w/big.bin").read_exact_at(&mut page, 5 * MIB as u64).expect("reads");
        eventually("a chunk", || !partial_files(kitfs).is_empty());
    }
    let big = |path: &PathBuf| fs::metadata(path).is_ok_and(|found| found.len() == 2 * MIB as u64);
    let object = kitfs.cached_files("objects").into_iter().find(big).expect("the object");
    let [index] = &kitfs.cached_files("indexes")[..] else { panic!("one index") };
    let [part] = &partial_files(kitfs)[..] else { panic!("one partial file") };
    flip_at(part, 5 * MIB as u64 + 17);
    let config = server.bytes_of(&whole.digest).expect("the manifest");
    let config: Value = serde_json::from_slice(&config).expect("JSON");
    let config = config["config"]["digest"].as_str().and_then(|text| text.strip_prefix("sha256:")).expect("a digest");
    let config = kitfs.cache().join("blobs/sha256").join(&config[..2]).join(config);
    let name =
        |path: &Path| path.strip_prefix(kitfs.cache()).expect("in the cache").to_str().expect("UTF-8").to_owned();
    let hit = |kit: &Served, path: Value| json!([{"kit": kit.digest, "reference": kit.reference, "path": path}]);
    let expected = vec![
        (flip(kitfs, &config), "blob", hit(&whole, Value::Null)),
        (flip(kitfs, index), "index", hit(&whole, json!("w"))),
        (flip(kitfs, &object), "object", json!([])),
        (name(part), "partial", hit(&partial, json!("w/big.bin"))),
    ];
    (whole, partial, expected)
}

fn partial_files(kitfs: &Kitfs) -> Vec<PathBuf> {
    kitfs.cached_files("partial").into_iter().filter(|path| path.extension().is_none()).collect()
}

fn found(report: &Value) -> Vec<(String, String, Value)> {
    let damaged = report["damaged"].as_array().expect("a list").iter();
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    damaged.map(|one| (text(&one["file"]), text(&one["type"]), one["hits"].clone())).collect()
}

fn report(kitfs: &Kitfs, arguments: &[&str]) -> (Option<i32>, Value) {
    let output = kitfs.run(&[&["cache", "verify", "--json"], arguments].concat());
    let report = serde_json::from_slice(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    (output.status.code(), report.unwrap_or_else(|error| panic!("{error}: {said}")))
}

#[test]
fn verify_finds_what_is_damaged_and_repair_mends_it() {
    let server = FaultServer::empty("team/kit");
    let kitfs = Kitfs::new();
    let (whole, _partial, expected) = damaged(&server, &kitfs);
    let before = on_disk(&kitfs);
    for _ in 0..2 {
        let (code, report) = report(&kitfs, &[]);
        assert_eq!((code, &report["ok"]), (Some(1), &json!(false)), "{report}");
        let expected: Vec<_> =
            expected.iter().map(|(file, kind, hits)| (file.clone(), (*kind).to_owned(), hits.clone())).collect();
        assert_eq!(found(&report), expected);
    }
    assert_eq!(on_disk(&kitfs), before, "a check changes nothing");

    let (code, mended) = report(&kitfs, &["--repair"]);
    assert_eq!((code, &mended["ok"]), (Some(0), &json!(true)), "{mended}");
    let fetched: Vec<_> =
        mended["damaged"].as_array().expect("a list").iter().map(|one| one["fetched"].clone()).collect();
    assert_eq!(fetched, [true, true, false, false], "what a kit needs comes again, a chunk when it is read: {mended}");
    assert_eq!(kitfs.cached_files("quarantine").len(), 3);
    let (code, clean) = report(&kitfs, &[]);
    assert_eq!((code, clean["damaged"].as_array().map(Vec::len)), (Some(0), Some(0)), "{clean}");
    assert_eq!(kitfs.run(&["cat", &whole.reference, "w/a.bin"]).stdout, pattern(1, 2 * MIB));
}

#[test]
fn a_damaged_object_is_told_by_its_paths_and_fetched_again() {
    let server = FaultServer::empty("team/kit");
    let kitfs = Kitfs::new();
    let one = kit(&server, "one", &[("a.bin", 1, 2)]);
    let two = kit(&server, "two", &[("copy.bin", 1, 2), ("b.bin", 2, 1)]);
    fetch(&kitfs, &one, "a.bin");
    fetch(&kitfs, &two, "b.bin");
    let big = |path: &PathBuf| fs::metadata(path).is_ok_and(|found| found.len() == 2 * MIB as u64);
    let object = kitfs.cached_files("objects").into_iter().find(big).expect("the object");
    flip(&kitfs, &object);

    let output = kitfs.run(&["cache", "verify"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for name in [
        format!("{} {}: w/a.bin", one.reference, one.digest.short()),
        format!("{} {}: w/copy.bin", two.reference, two.digest.short()),
    ] {
        assert!(said.contains(&name), "{name}: {said}");
    }
    assert!(String::from_utf8_lossy(&output.stderr).contains("cache verify --repair"));

    // The kit that comes first can't be had; the other one has it too.
    server.fault(one.layers[0], Fault::status(503));
    let (code, mended) = report(&kitfs, &["--repair", "--read-timeout", "1s"]);
    assert_eq!((code, &mended["damaged"][0]["fetched"]), (Some(0), &json!(true)), "{mended}");
    assert!(object.exists());
    server.heal(one.layers[0]);
    kitfs.assert_cache_is_true(b"");
    server.reset_counters();
    assert_eq!(kitfs.run(&["cat", &one.reference, "w/a.bin"]).stdout, pattern(1, 2 * MIB));
    assert_eq!(server.bytes_for(one.layers[0]) + server.bytes_for(two.layers[0]), 0, "it is here");
}

#[test]
fn what_cannot_be_fetched_now_is_set_aside_and_fetched_when_it_is_read() {
    let server = FaultServer::empty("team/kit");
    let kitfs = Kitfs::new();
    let kit = kit(&server, "v1", &[("a.bin", 1, 2)]);
    fetch(&kitfs, &kit, "a.bin");
    let [object] = &kitfs.cached_files("objects")[..] else { panic!("one object") };
    flip(&kitfs, object);
    server.fault(kit.layers[0], Fault::status(503));
    let (code, mended) = report(&kitfs, &["--repair", "--read-timeout", "1s"]);
    assert_eq!((code, &mended["damaged"][0]["fetched"]), (Some(0), &json!(false)), "{mended}");
    let remedy = mended["damaged"][0]["remedy"].as_str().expect("a text");
    assert!(remedy.starts_with("set aside; not fetched again yet: ") && remedy.contains("503"), "{remedy}");
    assert_eq!(report(&kitfs, &[]).0, Some(0), "the cache is right again");
    server.heal(kit.layers[0]);
    assert_eq!(kitfs.run(&["cat", &kit.reference, "w/a.bin"]).stdout, pattern(1, 2 * MIB));
}

#[test]
fn a_damaged_format_is_found_and_written_anew() {
    let server = FaultServer::empty("team/kit");
    let kitfs = Kitfs::new();
    let kit = kit(&server, "v1", &[("a.bin", 1, 1)]);
    fetch(&kitfs, &kit, "a.bin");
    flip(&kitfs, &kitfs.cache().join("format"));
    let (code, found) = report(&kitfs, &[]);
    assert_eq!((code, &found["damaged"][0]["type"]), (Some(1), &json!("format")), "{found}");
    assert_eq!(report(&kitfs, &["--repair"]).0, Some(0));
    fetch(&kitfs, &kit, "a.bin");
}
