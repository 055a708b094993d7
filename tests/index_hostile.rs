//! Indexes that somebody made to do harm, named by a manifest whose digests are right: none is used, the mount says so,
//! the layer's own bytes are served, and the daemon takes no more memory for it.

mod support;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use kitfs::archive::index::annotations::Pin;
use kitfs::digest::Digest;
use serde_json::{Value, json};
use support::index::index_of;
use support::kit::{KitBuilder, Served, pattern};
use support::program::{Kitfs, Mount, find_key};
use support::{Content, FaultServer};

const MIB: usize = 1 << 20;
/// What a hostile index may make a daemon take besides.
const MEMORY: u64 = 64 << 20;

/// Bytes of an index before its records, and of a record.
const HEADER: usize = 112;
const RECORD: usize = 76;
/// Fields of the header.
const ENTRIES: usize = 20;
const NAMES: usize = 24;
const CHUNKS: usize = 28;
/// The records of a layer of [`layer`].
const DIR: usize = 0;
const A: usize = 1;
const B: usize = 2;
const E: usize = 3;
const L: usize = 4;
/// Where its names begin: `l000`, `l000/a`, `l000/b`, `l000/e`, `l000/l`, and the link's target `a`.
const PATHS: usize = HEADER + 5 * RECORD;
const LISTS: usize = PATHS + 4 + 4 * 6 + 1;

/// A layer with a directory, a small file, one of two chunks, an empty one, and a link.
fn layer(name: &str, seed: u64) -> (Vec<u8>, Vec<u8>) {
    let bytes = pattern(seed, MIB + 1000);
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |path: String, kind, content: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o755);
        header.set_entry_type(kind);
        if kind == tar::EntryType::Symlink {
            tar.append_link(&mut header, path, "a").expect("a link");
            return;
        }
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, path, content).expect("an entry");
    };
    add(format!("{name}/"), tar::EntryType::Directory, b"");
    add(format!("{name}/a"), tar::EntryType::Regular, name.as_bytes());
    add(format!("{name}/b"), tar::EntryType::Regular, &bytes);
    add(format!("{name}/e"), tar::EntryType::Regular, b"");
    add(format!("{name}/l"), tar::EntryType::Symlink, b"");
    (tar.into_inner().expect("a tar"), bytes)
}

/// Where a field of a record is.
fn at(record: usize, field: usize) -> usize {
    HEADER + record * RECORD + field
}

/// Fields of a record.
const DIGEST: usize = 0;
const SIZE: usize = 32;
const OFFSET: usize = 40;
const UID: usize = 56;
const GID: usize = 60;
const LIST: usize = 64;
const PATH: usize = 68;
const PATH_LEN: usize = 72;
const MODE: usize = 74;

type Case = (&'static str, usize, Vec<u8>);

/// One broken rule each: what it breaks, where, and the bytes that are put there.
fn cases() -> Vec<Case> {
    let u64s = |value: u64| value.to_le_bytes().to_vec();
    let u32s = |value: u32| value.to_le_bytes().to_vec();
    let u16s = |value: u16| value.to_le_bytes().to_vec();
    vec![
        ("magic", 0, b"K".to_vec()),
        ("version", 8, u32s(2)),
        ("format", 12, vec![2]),
        ("raw, with five entries", 12, vec![1]),
        ("compression", 13, vec![3]),
        ("another compression than the layer's", 13, vec![1]),
        ("unused bytes", 14, vec![1]),
        ("chunk size", 16, u32s(1 << 21)),
        ("more entries than any index", ENTRIES, u32s(u32::MAX)),
        ("as many entries as an index may have", ENTRIES, u32s(16 << 20)),
        ("an entry too few", ENTRIES, u32s(4)),
        ("more names than any index", NAMES, u32s(u32::MAX)),
        ("as many names as an index may have", NAMES, u32s(1 << 30)),
        ("a name too short", NAMES, u32s(28)),
        ("more chunks than any index", CHUNKS, u32s(u32::MAX)),
        ("as many chunks as an index may have", CHUNKS, u32s(64 << 20)),
        ("a chunk too few", CHUNKS, u32s(1)),
        ("the layer's size", 32, u64s(1)),
        ("the layer's uncompressed size", 40, u64s(u64::MAX)),
        ("the layer's digest", 48, vec![0; 32]),
        ("another layer: digest and diffId", 48, vec![7; 64]),
        ("path before its place", at(A, PATH), u32s(0)),
        ("path beyond the names", at(A, PATH), u32s(u32::MAX)),
        ("path longer than the names", at(L, PATH_LEN), u16s(u16::MAX)),
        ("path: climbs", PATHS + 4, b"../../".to_vec()),
        ("path: absolute", PATHS + 4, b"/etc/a".to_vec()),
        ("path: NUL", PATHS + 9, vec![0]),
        ("path: two slashes", PATHS + 8, b"//".to_vec()),
        ("order", PATHS + 9, b"z".to_vec()),
        ("repeated path", PATHS + 9, b"b".to_vec()),
        ("parent is a file", at(DIR, MODE), u16s(0o100_644)),
        ("type: device", at(A, MODE), u16s(0o060_644)),
        ("type: none", at(A, MODE), u16s(0o644)),
        ("directory with content", at(A, MODE), u16s(0o040_644)),
        ("owner", at(A, UID), u32s(u32::MAX)),
        ("group", at(A, GID), u32s(u32::MAX)),
        ("content beyond the layer", at(A, OFFSET), u64s(u64::MAX)),
        ("content at the layer's last byte", at(B, OFFSET), u64s(1 << 21)),
        ("contents overlap", at(A, OFFSET), u64s(4096)),
        ("size beyond the layer", at(A, SIZE), u64s(u64::MAX)),
        ("size of more chunks", at(B, SIZE), u64s(3 << 20)),
        ("size of one chunk", at(B, SIZE), u64s(1)),
        ("directory with a size", at(DIR, SIZE), u64s(1)),
        ("directory with a digest", at(DIR, DIGEST), vec![1]),
        ("empty file with a digest", at(E, DIGEST), vec![1]),
        ("link with a digest", at(L, DIGEST), vec![1]),
        ("list of a file that has none", at(A, LIST), u32s(1)),
        ("list beyond the lists", at(B, LIST), u32s(u32::MAX)),
        ("target: empty", at(L, SIZE), u64s(0)),
        ("target beyond the names", at(L, SIZE), u64s(u64::MAX)),
        ("target: NUL", LISTS - 1, vec![0]),
    ]
}

/// An index as the manifest names it: the pin, and what the server has under the digest.
struct Hostile {
    pin: Pin,
    content: Content,
}

impl Hostile {
    /// The digests are right; the head has so many bytes.
    fn new(bytes: Vec<u8>, head: usize) -> Self {
        let pin = Pin {
            digest: Digest::of(&bytes),
            size: bytes.len() as u64,
            head_digest: Digest::of(&bytes[..head]),
            head_size: head as u64,
        };
        Self { pin, content: Content::Bytes(bytes) }
    }
}

/// A kit of `count` layers, each with the index that `make` gives for its number and its sound index.
fn kit(server: &FaultServer, count: usize, make: impl Fn(usize, Vec<u8>) -> Option<Hostile>) -> (Served, Vec<Vec<u8>>) {
    let mut builder = KitBuilder::new();
    let (mut contents, mut pins) = (Vec::new(), Vec::new());
    for number in 0..count {
        let name = format!("l{number:03}");
        let (tar, bytes) = layer(&name, number as u64 + 1);
        let index = index_of(&Content::Bytes(tar.clone()), "tar").as_bytes().to_vec();
        assert_eq!(index.len(), LISTS + 64);
        pins.push(make(number, index).map(|hostile| {
            server.add_content(hostile.pin.digest, hostile.content);
            hostile.pin
        }));
        builder = builder.tar("datasets", &name, tar);
        contents.push(bytes);
    }
    let mut served = builder.serve(server, "plain");
    repin(server, &mut served, &pins);
    (served, contents)
}

/// Serves a kit again with pins on its layers.
fn repin(server: &FaultServer, served: &mut Served, pins: &[Option<Pin>]) {
    let manifest = server.bytes_of(&served.digest).expect("the manifest");
    let mut manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
    for (at, pin) in pins.iter().enumerate() {
        let Some(pin) = pin else { continue };
        let annotations = pin.annotations().into_iter().map(|(key, value)| (key.to_owned(), json!(value)));
        manifest["layers"][at]["annotations"] = Value::Object(annotations.collect());
    }
    served.digest = server.add_manifest("v1", manifest.to_string());
    served.reference = server.reference("v1");
}

/// Memory of a daemon that no file stands for, in bytes.
fn memory(mount: &Mount<'_>) -> u64 {
    let status = format!("/proc/{}/status", mount.daemon().as_raw_nonzero());
    let status = fs::read_to_string(status).expect("the daemon runs");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("a line");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// The tiers of the layers and the warnings, as `status` tells them.
fn told(kitfs: &Kitfs) -> (Vec<String>, Vec<String>) {
    let status: Value = serde_json::from_str(&kitfs.ok(&["status", "--json"])).expect("JSON");
    let strings = |value: &Value| value.as_str().expect("a string").to_owned();
    let list = |key| find_key(&status, key).and_then(Value::as_array).expect("a list").clone();
    let tiers = list("layers").iter().map(|layer| strings(&layer["trust"])).collect();
    (tiers, list("warnings").iter().map(strings).collect())
}

fn assert_content(mount: &Mount<'_>, contents: &[Vec<u8>]) {
    for (number, bytes) in contents.iter().enumerate() {
        let name = format!("l{number:03}");
        let mut names: Vec<_> = fs::read_dir(mount.path(&name))
            .expect("lists")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
            .collect();
        names.sort();
        assert_eq!(names, ["a", "b", "e", "l"], "{name}");
        assert_eq!(fs::read(mount.path(&format!("{name}/l"))).expect("reads"), name.as_bytes());
        assert_eq!(fs::read(mount.path(&format!("{name}/e"))).expect("reads"), b"");
        assert!(fs::read(mount.path(&format!("{name}/b"))).expect("reads") == *bytes, "{name}");
    }
}

/// Mounts kits with and without hostile indexes: none is used, content is right, memory is bounded.
fn assert_contained(count: usize, make: impl Fn(usize, Vec<u8>) -> Hostile, name: impl Fn(usize) -> String) {
    let without = {
        let server = FaultServer::empty("team/kit");
        let (kit, contents) = kit(&server, count, |_, _| None);
        let kitfs = Kitfs::new();
        let mount = kitfs.mount(&kit.reference, &[]);
        assert_content(&mount, &contents);
        memory(&mount)
    };
    let server = FaultServer::empty("team/kit");
    let (kit, contents) = kit(&server, count, |number, index| Some(make(number, index)));
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let at_once = memory(&mount);
    let (tiers, warnings) = told(&kitfs);
    for (number, (tier, layer)) in tiers.iter().zip(&kit.layers).enumerate() {
        assert_eq!(tier, "provisional", "{}", name(number));
        let warned = warnings.iter().any(|text| text.contains(&layer.to_string()) && text.contains("is not used"));
        assert!(warned, "{}: no warning in {warnings:#?}", name(number));
    }
    assert_eq!(mount.said.matches("is not used").count(), count, "{}", mount.said);
    assert_content(&mount, &contents);
    for taken in [at_once, memory(&mount)] {
        assert!(taken < without + MEMORY, "{taken} bytes; {without} without");
    }
    assert!(!kitfs.logs().contains("panicked"), "{}", kitfs.logs());
}

#[test]
fn an_index_that_breaks_a_rule_is_never_used() {
    let cases = cases();
    let patched = |number: usize, mut index: Vec<u8>| {
        let (rule, at, bytes) = &cases[number];
        let place = &mut index[*at..at + bytes.len()];
        assert_ne!(place, bytes, "{rule}: changes nothing");
        place.copy_from_slice(bytes);
        Hostile::new(index, LISTS)
    };
    assert_contained(cases.len(), patched, |number| cases[number].0.to_owned());
}

#[test]
fn an_index_of_random_bytes_or_of_another_length_is_never_used() {
    let names =
        ["all random", "random behind the header", "header alone", "head too long", "lists too long", "long zeros"];
    let make = |number: usize, index: Vec<u8>| match number {
        0 => Hostile::new(pattern(99, index.len()), LISTS),
        1 => Hostile::new([&index[..HEADER], &pattern(98, index.len() - HEADER)].concat(), LISTS),
        2 => Hostile::new(index[..HEADER].to_vec(), HEADER),
        3 => Hostile::new([&index[..LISTS], &[0; 32], &index[LISTS..]].concat(), LISTS + 32),
        4 => Hostile::new([&index[..], &[0; 3200]].concat(), LISTS),
        // Counts that fit its length, so that all of it is looked at: 160 MiB, mostly zeros.
        _ => {
            let entries = (160 * MIB - HEADER) / RECORD;
            let mut long = index[..HEADER].to_vec();
            long[ENTRIES..NAMES].copy_from_slice(&(entries as u32).to_le_bytes());
            long[NAMES..32].copy_from_slice(&[0; 8]);
            long.resize(HEADER + entries * RECORD, 0);
            let len = long.len();
            Hostile::new(long, len)
        }
    };
    assert_contained(names.len(), make, |number| names[number].to_owned());
}

#[test]
fn a_pin_whose_blob_is_short_long_or_another_is_never_used() {
    const GIB: u64 = 1 << 30;
    let names = ["4 GiB of lists", "a head of 2 GiB", "a blob that is longer", "an empty blob", "a false head digest"];
    let make = |number: usize, index: Vec<u8>| {
        let mut hostile = Hostile::new(index.clone(), LISTS);
        match number {
            0 => hostile.pin.size = LISTS as u64 + 4 * GIB - 32 * 100_000_000,
            1 => {
                hostile.pin.head_size = 2 * GIB;
                hostile.pin.size = 4 * GIB;
            }
            2 => hostile.content = Content::Bytes([&index[..], &[0; 1000]].concat()),
            3 => {
                hostile.pin.digest = Digest::of(&[number as u8]);
                hostile.content = Content::Bytes(Vec::new());
            }
            _ => hostile.pin.head_digest = Digest::of(b"another"),
        }
        hostile
    };
    assert_contained(names.len(), make, |number| names[number].to_owned());
}

/// A layer of files with these names below `d`, and its index.
fn named(names: &[Vec<u8>]) -> (Vec<u8>, Vec<u8>) {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o755);
    header.set_entry_type(tar::EntryType::Directory);
    tar.append_data(&mut header, "d/", &b""[..]).expect("an entry");
    for name in names {
        let path = [b"d/", &name[..]].concat();
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(name.len() as u64);
        tar.append_data(&mut header, Path::new(OsStr::from_bytes(&path)), &name[..]).expect("an entry");
    }
    let tar = tar.into_inner().expect("a tar");
    let index = index_of(&Content::Bytes(tar.clone()), "tar").as_bytes().to_vec();
    (tar, index)
}

/// A thousand names that no text has: 255 bytes, not UTF-8, control characters, and what looks like a way out.
fn odd_names() -> Vec<Vec<u8>> {
    let odd = |number: usize| {
        let mut name = format!("{number:04}").into_bytes();
        match number % 4 {
            0 => name.resize(255, b'n'),
            1 => name.extend(b"\xff\xfe\x80"),
            2 => name.extend(b"\n\x1b[31m\\..\\"),
            _ => name.extend(b"...\xc0\xaf"),
        }
        name
    };
    (0..1000).map(odd).collect()
}

fn serve_named(server: &FaultServer, tar: Vec<u8>, index: Vec<u8>) -> Served {
    let mut kit = KitBuilder::new().tar("datasets", "d", tar).serve(server, "plain");
    let len = index.len();
    let hostile = Hostile::new(index, len);
    server.add_content(hostile.pin.digest, hostile.content);
    repin(server, &mut kit, &[Some(hostile.pin)]);
    kit
}

fn assert_named(mount: &Mount<'_>, names: &[Vec<u8>]) {
    let entries = fs::read_dir(mount.path("d")).expect("lists");
    let mut found: Vec<_> = entries.map(|entry| entry.expect("an entry").file_name().as_bytes().to_vec()).collect();
    found.sort();
    assert!(found == *names, "{} names", found.len());
    for name in names {
        let path = mount.path("d").join(OsStr::from_bytes(name));
        assert_eq!(fs::read(path).expect("reads"), *name, "{}", name.escape_ascii());
    }
}

#[test]
fn a_thousand_names_that_are_odd_but_right_are_served_from_the_index() {
    let server = FaultServer::empty("team/kit");
    let names = odd_names();
    let (tar, index) = named(&names);
    let kit = serve_named(&server, tar, index);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    assert_named(&mount, &names);
    assert_eq!(told(&kitfs), (vec!["pinned".to_owned()], Vec::new()));
}

#[test]
fn one_hostile_name_among_a_thousand_refuses_the_index() {
    let names = odd_names();
    let (tar, index) = named(&names);
    let last = format!("{:04}", 999).into_bytes();
    let place = index.windows(4).rposition(|window| window == last).expect("the last name");
    let long = index.windows(4).rposition(|window| window == b"0996").expect("a long name");
    let hostile: [(&str, usize, &[u8]); 6] = [
        ("climbs", place, b"../"),
        ("is absolute", place - 2, b"/e"),
        ("is a directory's", place + 3, b"/"),
        ("holds a NUL", place + 1, b"\0"),
        ("is out of order", place, b"0000"),
        // The slash before it: 257 bytes between two slashes.
        ("is too long", long - 1, b"x"),
    ];
    for (what, at, bytes) in hostile {
        let server = FaultServer::empty("team/kit");
        let mut index = index.clone();
        index[at..at + bytes.len()].copy_from_slice(bytes);
        let kit = serve_named(&server, tar.clone(), index);
        let kitfs = Kitfs::new();
        let mount = kitfs.mount(&kit.reference, &[]);
        let (tiers, warnings) = told(&kitfs);
        assert_eq!(tiers, ["provisional"], "a name that {what}");
        assert!(warnings.len() == 1 && warnings[0].contains("is not used"), "a name that {what}: {warnings:?}");
        assert_named(&mount, &names);
        assert!(!kitfs.logs().contains("panicked"), "{}", kitfs.logs());
    }
}
