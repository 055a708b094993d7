//! Kits that were made to do harm are refused when they are mounted, or contained: what they aim at is not there, the
//! log says why, and the daemon lives on.

mod support;

use std::path::Path;

use support::FaultServer;
use support::kit::{KitBuilder, gzip, header, tar};
use support::program::Kitfs;

/// Blocks of a tar that is not closed yet, from headers and contents.
fn blocks(parts: &[(&str, u8, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (path, kind, bytes) in parts {
        out.extend(header(path, *kind, 0o644, bytes.len() as u64));
        out.extend_from_slice(bytes);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out
}

fn closed(mut blocks: Vec<u8>) -> Vec<u8> {
    blocks.extend([0; 1024]);
    blocks
}

/// A symbolic link's header.
fn link(path: &str, target: &str) -> Vec<u8> {
    let mut block = header(path, b'2', 0o777, 0);
    block[157..157 + target.len()].copy_from_slice(target.as_bytes());
    block[148..156].copy_from_slice(b"        ");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block.to_vec()
}

/// Mounts a kit of this layer for `code` beside a good one. Either the mount is refused with `says`, or the layer can't
/// be listed, the log has `says`, and the good layer is read.
fn contained(suffix: &str, layer: Vec<u8>, options: &[&str], says: &str) {
    let server = FaultServer::empty("team/hostile");
    let kit = KitBuilder::new()
        .layer("code", "code", suffix, layer)
        .tar("docs", "docs", tar(&[("docs/good.md", b"good")]))
        .serve(&server, "v1");
    let kitfs = Kitfs::new();
    let dir = kitfs.path("mnt");
    let mut arguments = vec!["mount", &kit.reference, dir.to_str().expect("UTF-8")];
    arguments.extend(options);
    let output = kitfs.run(&arguments);
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(says), "expected {says:?} in: {said}");
        assert!(!dir.exists(), "a refused mount leaves nothing behind");
        return;
    }
    let listed = std::fs::read_dir(dir.join("code")).and_then(|entries| entries.collect::<Result<Vec<_>, _>>());
    assert!(listed.is_err(), "the layer can't be listed, but gave {listed:?}");
    let logs = kitfs.logs();
    assert!(logs.contains(says), "expected {says:?} in: {logs}");
    assert_eq!(std::fs::read(dir.join("docs/good.md")).expect("the rest of the kit is fine"), b"good");
    support::eventually("nothing is left in staging", || kitfs.cached_files("incoming").is_empty());
    kitfs.ok(&["unmount", dir.to_str().expect("UTF-8")]);
}

#[test]
fn paths_that_climb() {
    contained("tar", closed(blocks(&[("code", b'5', b""), ("code/../../etc/passwd", b'0', b"x")])), &[], "..");
}

#[test]
fn absolute_paths() {
    contained("tar", closed(blocks(&[("code", b'5', b""), ("/etc/passwd", b'0', b"x")])), &[], "absolute");
}

#[test]
fn one_file_twice() {
    let twice = blocks(&[("code", b'5', b""), ("code/a", b'0', b"one"), ("code/a", b'0', b"two")]);
    contained("tar", closed(twice), &[], "more than once");
}

#[test]
fn a_file_below_a_file() {
    let below = blocks(&[("code", b'5', b""), ("code/a", b'0', b"one"), ("code/a/b", b'0', b"two")]);
    contained("tar", closed(below), &[], "not a directory");
}

#[test]
fn entries_outside_the_layers_root() {
    contained("tar", closed(blocks(&[("docs", b'5', b""), ("docs/evil.md", b'0', b"x")])), &[], "outside its path");
    let late = blocks(&[("code", b'5', b""), ("code/a", b'0', b"x"), ("docs/evil.md", b'0', b"x")]);
    contained("tar", closed(late), &[], "outside its path");
}

#[test]
fn symbolic_links_that_leave_the_tree() {
    for target in ["../../etc/passwd", "/etc/passwd", "x/../../../y", "x/.."] {
        let mut tar = blocks(&[("code", b'5', b"")]);
        tar.extend(link("code/link", target));
        contained("tar", closed(tar), &[], "leads out of the kit");
    }
}

#[test]
fn symbolic_links_that_stay_are_served() {
    let server = FaultServer::empty("team/links");
    let mut tar = blocks(&[("code", b'5', b""), ("code/a.py", b'0', b"print()")]);
    tar.extend(link("code/b.py", "a.py"));
    let kit = KitBuilder::new().tar("code", "code", closed(tar)).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    assert_eq!(std::fs::read_link(mount.path("code/b.py")).expect("readlink"), Path::new("a.py"));
    assert_eq!(std::fs::read(mount.path("code/b.py")).expect("reads"), b"print()");
}

#[test]
fn devices_fifos_and_hard_links() {
    for (kind, says) in [(b'3', "character device"), (b'4', "block device"), (b'6', "FIFO"), (b'1', "hard link")] {
        contained("tar", closed(blocks(&[("code", b'5', b""), ("code/null", kind, b"")])), &[], says);
    }
}

#[test]
fn sizes_that_overflow() {
    for size in [u64::MAX, u64::MAX / 2, 1 << 62] {
        let mut tar = blocks(&[("code", b'5', b"")]);
        tar.extend(header("code/huge", b'0', 0o644, size));
        contained("tar", closed(tar), &[], "code");
    }
}

#[test]
fn a_pax_record_of_1_gib() {
    let mut tar = blocks(&[("code", b'5', b"")]);
    tar.extend(header("PaxHeaders.0/x", b'x', 0o644, 1 << 30));
    contained("tar", closed(tar), &[], "extended header");
}

#[test]
fn a_gzip_bomb() {
    let zeros = vec![0; 64 << 20];
    let bomb = gzip(&tar(&[("code/zeros", &zeros)]));
    contained("tar+gzip", bomb, &["--max-inflated", "10MiB"], "inflates to more than");
}

#[test]
fn a_config_that_names_a_layer_which_the_manifest_lacks() {
    let server = FaultServer::empty("team/hostile");
    let mut kit = KitBuilder::new().tar("docs", "README.md", tar(&[("README.md", b"x")]));
    let missing = kitfs::digest::Digest::of(b"nowhere");
    kit.describe("datasets", "data", missing);
    let kit = kit.serve(&server, "v1");
    let kitfs = Kitfs::new();
    let said = kitfs.fails(&["mount", &kit.reference, kitfs.path("mnt").to_str().expect("UTF-8")]);
    assert!(said.contains(&missing.to_string()), "{said}");
}

#[test]
fn parents_in_a_circle() {
    let server = FaultServer::empty("team/circle");
    KitBuilder::new().parent(&server.reference("b")).serve(&server, "a");
    let kit = KitBuilder::new().parent(&server.reference("a")).serve(&server, "b");
    let kitfs = Kitfs::new();
    let said = kitfs.fails(&["mount", &kit.reference, kitfs.path("mnt").to_str().expect("UTF-8")]);
    assert!(said.contains("cycle") || said.contains("circle"), "{said}");
}

#[test]
fn a_chain_of_more_than_ten_parents() {
    let server = FaultServer::empty("team/chain");
    KitBuilder::new().tar("model", "m.bin", tar(&[("m.bin", b"m")])).serve(&server, "k0");
    let mut top = String::new();
    for number in 1..=12 {
        let kit = KitBuilder::new().parent(&server.reference(&format!("k{}", number - 1)));
        top = kit.serve(&server, &format!("k{number}")).reference;
    }
    let kitfs = Kitfs::new();
    let said = kitfs.fails(&["mount", &top, kitfs.path("mnt").to_str().expect("UTF-8")]);
    assert!(said.contains("10"), "{said}");
    let fine = kitfs.mount(&server.reference("k5"), &[]);
    assert_eq!(std::fs::read(fine.path("m.bin")).expect("reads"), b"m");
}

#[test]
fn one_layer_digest_under_two_media_types_gives_each_mount_its_own_tree() {
    let server = FaultServer::empty("team/two");
    let layer = tar(&[("code/a.py", b"print()")]);
    let as_tar = KitBuilder::new().tar("code", "code", layer.clone()).serve(&server, "tar");
    let as_raw = KitBuilder::new().layer("code", "code.tar", "raw", layer.clone()).serve(&server, "raw");
    assert_eq!(as_tar.layers, as_raw.layers);
    let kitfs = Kitfs::new();
    for _ in 0..2 {
        let tree = kitfs.mount(&as_tar.reference, &[]);
        let file = kitfs.mount(&as_raw.reference, &[]);
        assert_eq!(std::fs::read(tree.path("code/a.py")).expect("reads"), b"print()");
        assert!(std::fs::read(file.path("code.tar")).expect("reads") == layer);
        assert!(!file.path("code").exists());
    }
}

#[test]
fn a_layer_that_does_not_hold_what_its_first_bytes_promised() {
    // The first 64 KiB at the source tell another size than the layer whose digest holds.
    let server = FaultServer::empty("team/two-faced");
    let honest = tar(&[("m.bin", &vec![1; 200_000])]);
    let kit = KitBuilder::new().tar("model", "m.bin", honest.clone()).serve(&server, "v1");
    let mut lying = honest.clone();
    lying[..512].copy_from_slice(&header("m.bin", b'0', 0o644, 100_000));
    server.add_content(kit.layers[0], support::Content::Bytes(lying));
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    assert_eq!(std::fs::metadata(mount.path("m.bin")).expect("stats").len(), 100_000);
    server.add_content(kit.layers[0], support::Content::Bytes(honest));
    let error = std::fs::read(mount.path("m.bin")).expect_err("what was told is not what is");
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    assert!(kitfs.logs().contains("is not what its listing told"));
}
