//! What kits with indexes share through the cache, and what they can't do to each other by it: a file that is here is not
//! fetched again, whatever kit or layer it came by; an index counts for the kit that names it, and only for what is true.

mod support;

use std::os::unix::fs::PermissionsExt as _;

use kitfs::archive::index::{Index, IndexEntry};
use kitfs::digest::Digest;
use kitfs::path::TreePath;
use support::index::{altered, forged, index_of, pin_index, repin};
use support::kit::{KitBuilder, Served, gzip, pattern, tar};
use support::program::{Kitfs, Mount};
use support::{Content, FaultServer, eventually};

const COUNT: usize = 30;
const CHANGED: usize = 17;
const EIO: Option<i32> = Some(rustix::io::Errno::IO.raw_os_error());

type Files = Vec<(String, Vec<u8>)>;

fn files(size: usize) -> Files {
    (0..COUNT).map(|at| (format!("w/{at:02}.bin"), pattern(at as u64, size + at))).collect()
}

/// The same with other content in one of them.
fn changed(mut files: Files) -> Files {
    let content = &mut files[CHANGED].1;
    *content = pattern(1000, content.len());
    files
}

fn packed(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (&name[..], &bytes[..])).collect();
    tar(&files)
}

fn serve(server: &FaultServer, tag: &str, files: &Files) -> Served {
    KitBuilder::new().indexed().tar("model", "w", packed(files)).serve(server, tag)
}

fn assert_reads(mount: &Mount<'_>, files: &Files) {
    for (name, bytes) in files {
        assert!(std::fs::read(mount.path(name)).expect("reads") == *bytes, "{name}");
    }
}

/// Reads `first` whole and then `second`: bytes of layers that were sent for the second, beside those of its changed file.
fn sent_for_the_second(
    server: &FaultServer,
    first: &Served,
    second: (&Served, &Files),
    original: &Files,
) -> (u64, u64) {
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&first.reference, &[]);
    assert_reads(&mount, original);
    eventually("the commit", || kitfs.cached_files("objects").len() == COUNT);
    drop(mount);

    server.reset_counters();
    let (second, files) = second;
    let mount = kitfs.mount(&second.reference, &[]);
    assert_reads(&mount, files);
    let sent = second.layers.iter().map(|layer| server.bytes_for(layer)).sum();
    kitfs.assert_cache_is_true(&[]);
    (sent, files[CHANGED].1.len() as u64)
}

fn assert_little_is_sent((sent, changed): (u64, u64)) {
    assert!(sent >= changed, "{sent} bytes sent, and {changed} have changed");
    assert!(sent <= changed + changed / 20, "{sent} bytes sent, and {changed} have changed");
}

#[test]
fn a_second_version_costs_its_changed_file() {
    for size in [3 << 20, 100 << 10] {
        let server = FaultServer::empty("team/kit");
        let (one, two) = (files(size), changed(files(size)));
        let (first, second) = (serve(&server, "v1", &one), serve(&server, "v2", &two));
        assert_little_is_sent(sent_for_the_second(&server, &first, (&second, &two), &one));
    }
}

#[test]
fn a_second_version_that_is_packed_in_another_order_costs_its_changed_file() {
    for size in [3 << 20, 100 << 10] {
        let server = FaultServer::empty("team/kit");
        let (one, two) = (files(size), changed(files(size)));
        let reversed: Files = two.iter().rev().cloned().collect();
        let (first, second) = (serve(&server, "v1", &one), serve(&server, "v2", &reversed));
        assert_little_is_sent(sent_for_the_second(&server, &first, (&second, &two), &one));
    }
}

#[test]
fn a_second_version_with_other_layers_costs_its_changed_file() {
    for size in [3 << 20, 100 << 10] {
        let server = FaultServer::empty("team/kit");
        let (one, two) = (files(size), changed(files(size)));
        let first = serve(&server, "v1", &one);
        let (here, there) = two.split_at(COUNT / 2);
        let kit = KitBuilder::new().indexed().tar("docs", "w", packed(here)).tar("docs", "w/", packed(there));
        let second = kit.serve(&server, "v2");
        assert_little_is_sent(sent_for_the_second(&server, &first, (&second, &two), &one));
    }
}

#[test]
fn what_came_out_of_a_compressed_layer_is_not_fetched_again_from_another() {
    for size in [3 << 20, 100 << 10] {
        let server = FaultServer::empty("team/kit");
        let (one, two) = (files(size), changed(files(size)));
        let layer = gzip(&packed(&one));
        let first = KitBuilder::new().indexed().layer("model", "w", "tar+gzip", layer).serve(&server, "v1");
        let second = serve(&server, "v2", &two);
        assert_little_is_sent(sent_for_the_second(&server, &first, (&second, &two), &one));
    }
}

#[test]
fn a_compressed_layer_is_not_fetched_where_all_of_its_files_are_here() {
    let server = FaultServer::empty("team/kit");
    let one = files(100 << 10);
    let first = serve(&server, "v1", &one);
    let layer = gzip(&packed(&one));
    let second = KitBuilder::new().indexed().layer("model", "w", "tar+gzip", layer).serve(&server, "v2");
    let (sent, _) = sent_for_the_second(&server, &first, (&second, &one), &one);
    assert_eq!(sent, 0);
}

/// Two kits that share a layer, of which the first pins an index that lies about a mode and a name.
fn liar_and_honest(server: &FaultServer, honest: KitBuilder) -> (Served, Served) {
    let layer = packed(&files(10_000));
    let index = index_of(&Content::Bytes(layer.clone()), "tar");
    let lie = altered(&index, |rows| {
        let row = rows.iter_mut().find(|row| row.entry.path.as_bytes() == b"w/03.bin").expect("the file");
        row.entry.mode = 0o4777;
        row.entry.path = TreePath::from_clean(b"w/99.bin").expect("a path");
    });
    let kit = KitBuilder::new().tar("model", "w", layer.clone()).serve(server, "plain");
    let liar = pin_index(server, &kit, "liar", 0, &lie);
    (liar, honest.tar("model", "w", layer).serve(server, "honest"))
}

#[test]
fn an_index_pinned_by_one_kit_is_not_used_for_another_that_shares_the_layer() {
    for (honest, tier) in [(KitBuilder::new(), "provisional"), (KitBuilder::new().indexed(), "pinned")] {
        let server = FaultServer::empty("team/kit");
        let (liar, honest) = liar_and_honest(&server, honest);
        let kitfs = Kitfs::new();
        let lying = kitfs.mount(&liar.reference, &[]);
        assert_eq!(lying.trust_of("w/99.bin"), "pinned");
        let mode = std::fs::metadata(lying.path("w/99.bin")).expect("stat").permissions().mode();
        assert_eq!(mode & 0o7777, 0o4777, "its author says so");
        assert_eq!(std::fs::read(lying.path("w/99.bin")).expect("reads"), files(10_000)[3].1);

        let mount = kitfs.mount(&honest.reference, &[]);
        assert_eq!(kitfs.status(&mount)["trust"], tier);
        assert!(!mount.path("w/99.bin").exists());
        let mode = std::fs::metadata(mount.path("w/03.bin")).expect("stat").permissions().mode();
        assert_eq!(mode & 0o7777, 0o644);
        assert_reads(&mount, &files(10_000));
    }
}

/// Where the digest of a row stands in an index.
fn digest_at(index: &Index, path: &str) -> std::ops::Range<usize> {
    let row = index.head().find(path.as_bytes()).expect("the file");
    112 + row * 76..112 + row * 76 + 32
}

/// A kit with a file `victim`, and what another kit needs that is out for it.
struct Victim {
    kit: Served,
    content: Vec<u8>,
    digest: [u8; 32],
    list: Vec<Digest>,
}

const VICTIM: usize = 3 << 20;

impl Victim {
    fn serve(server: &FaultServer) -> Self {
        let content = pattern(5, VICTIM);
        let layer = tar(&[("victim", &content)]);
        let index = index_of(&Content::Bytes(layer.clone()), "tar");
        let entry = index.entry(0).and_then(|row| row.content).expect("a file");
        let kit = KitBuilder::new().indexed().tar("model", "victim", layer).serve(server, "victim");
        Self { kit, content, digest: *entry.object.as_bytes(), list: entry.chunks }
    }

    fn assert_reads(&self, kitfs: &Kitfs) {
        let mount = kitfs.mount(&self.kit.reference, &[]);
        assert!(std::fs::read(mount.path("victim")).expect("reads") == self.content);
    }

    fn is_cached(&self, kitfs: &Kitfs) -> bool {
        let name = kitfs::object::ObjectDigest::from_bytes(self.digest).hex();
        kitfs.cached_files("objects").iter().any(|path| path.ends_with(&name))
    }

    fn fill(&self, kitfs: &Kitfs) {
        self.assert_reads(kitfs);
        eventually("the commit", || self.is_cached(kitfs));
    }
}

/// A kit whose file `evil` has `size` bytes and states the victim's digest over its own chunk list.
fn states_the_digest(server: &FaultServer, victim: &Victim, size: usize) -> Served {
    let layer = tar(&[("evil", &pattern(6, size))]);
    let index = index_of(&Content::Bytes(layer.clone()), "tar");
    let (bytes, pin) = forged(&index, |bytes| bytes[digest_at(&index, "evil")].copy_from_slice(&victim.digest));
    server.add_blob(bytes);
    let kit = KitBuilder::new().tar("model", "evil", layer).serve(server, "plain");
    repin(server, &kit, "evil", 0, &pin.annotations())
}

#[test]
fn a_digest_that_is_stated_over_another_list_places_nothing() {
    let server = FaultServer::empty("team/kit");
    let victim = Victim::serve(&server);
    for size in [VICTIM, VICTIM + (1 << 20), VICTIM - (1 << 20)] {
        let evil = states_the_digest(&server, &victim, size);
        let kitfs = Kitfs::new();
        let mount = kitfs.mount(&evil.reference, &[]);
        assert_eq!(std::fs::read(mount.path("evil")).expect_err("no such list").raw_os_error(), EIO, "{size}");
        assert!(!victim.is_cached(&kitfs), "{size}");
        victim.fill(&kitfs);
        kitfs.assert_cache_is_true(&[]);
    }
}

#[test]
fn a_digest_that_is_stated_over_another_size_takes_nothing_from_the_cache() {
    let server = FaultServer::empty("team/kit");
    let victim = Victim::serve(&server);
    for size in [VICTIM + (1 << 20), VICTIM - (1 << 20)] {
        let evil = states_the_digest(&server, &victim, size);
        let kitfs = Kitfs::new();
        victim.fill(&kitfs);
        let mount = kitfs.mount(&evil.reference, &[]);
        assert_eq!(std::fs::read(mount.path("evil")).expect_err("no such list").raw_os_error(), EIO, "{size}");
        assert!(victim.is_cached(&kitfs), "{size}");
        server.reset_counters();
        victim.assert_reads(&kitfs);
        assert_eq!(server.requests_for(victim.kit.layers[0]), 0);
    }
}

#[test]
fn a_digest_that_is_stated_for_two_sizes_pads_nothing() {
    let server = FaultServer::empty("team/kit");
    let (content, longer) = (pattern(5, VICTIM), pattern(6, VICTIM + (2 << 20)));
    let layer = tar(&[("w/a", &content), ("w/b", &longer)]);
    let index = index_of(&Content::Bytes(layer.clone()), "tar");
    let (bytes, pin) =
        forged(&index, |bytes| bytes.copy_within(digest_at(&index, "w/a"), digest_at(&index, "w/b").start));
    server.add_blob(bytes);
    let kit = KitBuilder::new().tar("model", "w", layer).serve(&server, "plain");
    let evil = repin(&server, &kit, "evil", 0, &pin.annotations());
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&evil.reference, &[]);
    assert!(std::fs::read(mount.path("w/a")).expect("reads") == content);
    assert_eq!(std::fs::read(mount.path("w/b")).expect_err("no such list").raw_os_error(), EIO);
}

#[test]
fn a_true_list_of_another_kits_file_brings_that_content_and_changes_nothing() {
    let server = FaultServer::empty("team/kit");
    let victim = Victim::serve(&server);
    let layer = tar(&[("evil", &pattern(6, VICTIM))]);
    let index = index_of(&Content::Bytes(layer.clone()), "tar");
    let lie = altered(&index, |rows| {
        let content = rows.iter_mut().find_map(|row: &mut IndexEntry| row.content.as_mut()).expect("a file");
        content.chunks.clone_from(&victim.list);
        content.object = kitfs::object::ObjectDigest::from_bytes(victim.digest);
    });
    let kit = KitBuilder::new().tar("model", "evil", layer).serve(&server, "plain");
    let evil = pin_index(&server, &kit, "evil", 0, &lie);

    // Its own layer has not the content that its index tells of.
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&evil.reference, &[]);
    assert_eq!(std::fs::read(mount.path("evil")).expect_err("false").raw_os_error(), EIO);
    assert!(!victim.is_cached(&kitfs));
    drop(mount);
    victim.fill(&kitfs);
    kitfs.assert_cache_is_true(&[]);

    // Where the content is here, it is what the index says.
    let mount = kitfs.mount(&evil.reference, &[]);
    assert!(std::fs::read(mount.path("evil")).expect("reads") == victim.content);
    victim.assert_reads(&kitfs);
    kitfs.assert_cache_is_true(&[]);
}
