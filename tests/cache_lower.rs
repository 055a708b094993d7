//! Caches below our own: what they have costs no request, whoever owns them, nothing is written to them, and what they
//! say falsely is not believed.

mod support;

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use kitfs::archive::index::Index;
use kitfs::digest::Digest;
use kitfs::path::TreePath;
use serde_json::{Value, json};
use support::index::altered;
use support::kit::{KitBuilder, Served, gzip, pattern, tar};
use support::program::Kitfs;
use support::{FaultServer, eventually};

const CHUNK: usize = 1 << 20;
const STRANGER: u32 = 4711;

fn files() -> Vec<(&'static str, Vec<u8>)> {
    vec![("w/a.bin", pattern(31, 3 * CHUNK + 5)), ("w/b.bin", pattern(32, 700))]
}

fn kit(server: &FaultServer, indexed: bool) -> Served {
    let files = files();
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (*name, &bytes[..])).collect();
    let kit = KitBuilder::new().tar("model", "w", tar(&files));
    let kit = if indexed { kit.indexed() } else { kit };
    kit.serve(server, "v1")
}

/// A cache that has the whole kit.
fn filled(kit: &Served) -> Kitfs {
    let kitfs = Kitfs::new();
    read_all(&kitfs, kit, &[]);
    eventually("the commit", || kitfs.cached_files("objects").len() == 2 && kitfs.cached_files("incoming").is_empty());
    kitfs
}

fn read_all(kitfs: &Kitfs, kit: &Served, options: &[&str]) {
    let mount = kitfs.mount(&kit.reference, options);
    for (name, bytes) in files() {
        assert!(fs::read(mount.path(name)).expect("reads") == bytes, "{name}");
    }
}

fn paths_below(root: &Path) -> Vec<PathBuf> {
    let (mut all, mut dirs) = (vec![root.to_owned()], vec![root.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).expect("reads") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                dirs.push(path.clone());
            }
            all.push(path);
        }
    }
    all.sort();
    all
}

/// Everything that a write would change, a line for each file.
fn state(root: &Path) -> Vec<String> {
    let state = |path: PathBuf| {
        let found = fs::symlink_metadata(&path).expect("stat");
        let modified = (found.mtime(), found.mtime_nsec());
        let changed = (found.ctime(), found.ctime_nsec());
        format!("{} {} {:o} {modified:?} {changed:?}", path.display(), found.ino(), found.mode())
    };
    paths_below(root).into_iter().map(state).collect()
}

fn give_away(root: &Path) {
    for path in paths_below(root) {
        chown(path, Some(STRANGER), Some(STRANGER)).expect("chown");
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn what_a_lower_cache_has_costs_no_request_and_leaves_no_trace_there() {
    for indexed in [false, true] {
        let server = FaultServer::empty("team/kit");
        let kit = kit(&server, indexed);
        let below = filled(&kit);
        let lower = below.cache();
        if indexed && is_root() {
            // What proves itself counts from anybody; the derived index of the other kit does not.
            give_away(&lower);
        }
        let before = state(&lower);
        let kitfs = Kitfs::new().with("KITFS_CACHE_LOWER", &lower);
        server.reset_counters();
        for _ in 0..2 {
            read_all(&kitfs, &kit, &[]);
        }
        for target in kit.layers.iter().chain(kit.indexes.iter().map(|pin| &pin.digest)) {
            assert_eq!(server.requests_for(target), 0, "indexed: {indexed}");
        }
        let blobs = server.requests().iter().filter(|request| request.path.contains("/blobs/")).count();
        assert_eq!(blobs, 0, "indexed: {indexed}");
        assert!(state(&lower) == before, "the lower cache was written to");
        assert!(kitfs.cached_files("objects").is_empty(), "nothing is copied");
        if is_root() && indexed {
            chown(&lower, Some(0), Some(0)).expect("chown");
        }
    }
}

#[test]
fn status_says_which_files_do_not_pass_through_and_why() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server, true);
    let below = filled(&kit);
    if is_root() {
        give_away(&below.cache());
    }
    let kitfs = Kitfs::new().with("KITFS_CACHE_LOWER", below.cache());
    let mount = kitfs.mount(&kit.reference, &[]);
    let before = kitfs.status(&mount)["reads"].clone();
    assert_eq!((&before["passthrough"], &before["not_all_why"]), (&json!(is_root()), &Value::Null));
    assert!(fs::read(mount.path("w/a.bin")).expect("reads") == files()[0].1);
    assert!(fs::read(mount.path("w/a.bin")).expect("reads") == files()[0].1);
    let reads = kitfs.status(&mount)["reads"].clone();
    assert_eq!((&reads["passthrough"], &reads["opened"]["passthrough"]), (&json!(is_root()), &json!(0)));
    if !is_root() {
        assert_eq!(reads["not_all_why"], Value::Null, "no file passes through, which is said already");
        return;
    }
    let why = "others than root and this user may write to a lower cache, after it was hashed";
    assert_eq!(reads["not_all_why"], json!(why));
    let told = kitfs.ok(&["status"]);
    assert!(told.contains(&format!("passthrough, but some files cached, because {why}")), "{told}");
    drop(mount);
    chown(below.cache(), Some(0), Some(0)).expect("chown");
}

#[test]
fn chunks_of_a_lower_cache_count() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server, true);
    let content = &files()[0].1;
    let read = |kitfs: &Kitfs, chunk: usize| {
        let mount = kitfs.mount(&kit.reference, &[]);
        let mut buffer = vec![0; 4096];
        mount.open_direct("w/a.bin").read_exact_at(&mut buffer, (chunk * CHUNK) as u64).expect("reads");
        assert!(buffer == content[chunk * CHUNK..chunk * CHUNK + 4096], "chunk {chunk}");
    };
    let below = Kitfs::new();
    read(&below, 1);
    let kitfs = Kitfs::new().with("KITFS_CACHE_LOWER", below.cache());
    server.reset_counters();
    read(&kitfs, 1);
    assert_eq!(server.bytes_for(kit.layers[0]), 0, "it is below");
    read(&kitfs, 2);
    assert_eq!(server.bytes_for(kit.layers[0]), CHUNK as u64, "that one is not");
    fs::remove_dir_all(below.cache()).expect("removes");
    let alone = kitfs.with("KITFS_CACHE_LOWER", "");
    server.reset_counters();
    read(&alone, 1);
    assert_eq!(server.bytes_for(kit.layers[0]), 0, "it is our own by now");
}

#[test]
fn a_lying_object_below_is_found_out_and_fetched() {
    for indexed in [false, true] {
        let server = FaultServer::empty("team/kit");
        let kit = kit(&server, indexed);
        let below = filled(&kit);
        for object in below.cached_files("objects") {
            fs::set_permissions(&object, fs::Permissions::from_mode(0o600)).expect("chmod");
            let file = fs::OpenOptions::new().write(true).open(&object).expect("opens");
            file.write_all_at(b"lies", 100).expect("writes");
        }
        let before = state(&below.cache());
        let kitfs = Kitfs::new().with("KITFS_CACHE_LOWER", below.cache());
        server.reset_counters();
        read_all(&kitfs, &kit, &[]);
        assert!(server.bytes_for(kit.layers[0]) > 0, "it was fetched");
        let logs = kitfs.logs();
        assert!(logs.contains("damaged or false"), "{logs}");
        assert!(state(&below.cache()) == before, "the lower cache was written to");
    }
}

#[test]
fn a_lying_derived_index_counts_only_where_we_or_root_could_have_written_it() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server, false);
    let below = filled(&kit);
    let path = below.cached_files("indexes").pop().expect("a derived index");
    let bytes = fs::read(&path).expect("reads");
    let index = Index::decode(bytes[32..].to_vec().into(), None).expect("an index");
    let lie = altered(&index, |rows| {
        let row = rows.iter_mut().find(|row| row.entry.path.as_bytes() == b"w/b.bin").expect("the file");
        row.entry.path = TreePath::from_clean(b"w/lie.bin").expect("a path");
    });
    fs::write(&path, [&Digest::of(lie.as_bytes()).as_bytes()[..], lie.as_bytes()].concat()).expect("writes");
    let names = |kitfs: &Kitfs| kitfs.ok(&["ls", &kit.reference, "w"]);
    let ours = Kitfs::new().with("KITFS_CACHE_LOWER", below.cache());
    assert!(names(&ours).contains("lie.bin"), "our own word counts");
    if is_root() {
        give_away(&below.cache());
        let kitfs = Kitfs::new().with("KITFS_CACHE_LOWER", below.cache());
        let names = names(&kitfs);
        assert!(names.contains("b.bin") && !names.contains("lie.bin"), "{names}");
        read_all(&kitfs, &kit, &[]);
        chown(below.cache(), Some(0), Some(0)).expect("chown");
    }
}

#[test]
fn a_lower_cache_that_is_not_there_is_an_error_that_names_the_flag() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server, false);
    let kitfs = Kitfs::new();
    let missing = kitfs.path("missing");
    let missing = missing.to_str().expect("UTF-8");
    let error = kitfs.fails(&["ls", "--cache-lower", missing, &kit.reference]);
    assert!(error.contains(missing) && error.contains("--cache-lower"), "{error}");
}

#[test]
fn a_pull_takes_what_a_lower_cache_has_of_a_compressed_layer_for_complete() {
    let server = FaultServer::empty("team/kit");
    let files = files();
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (*name, &bytes[..])).collect();
    let kit = KitBuilder::new().layer("model", "w", "tar+gzip", gzip(&tar(&files))).serve(&server, "v1");
    let lower = filled(&kit);
    server.reset_counters();
    let kitfs = Kitfs::new().with("KITFS_CACHE_LOWER", lower.cache());
    kitfs.ok(&["pull", &kit.reference]);
    assert_eq!(server.bytes_for(kit.layers[0]), 0);
    read_all(&kitfs, &kit, &["--offline"]);
}
