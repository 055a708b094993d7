//! What a mount costs on the wire: a little to look around, a layer to read from it, nothing the second time.

mod support;

use support::FaultServer;
use support::kit::{KitBuilder, huge_tar, pattern_at, tar};
use support::program::Kitfs;

const GIB: u64 = 1 << 30;

#[test]
fn looking_around_a_kit_with_a_model_of_1_gib_moves_less_than_1_mib_of_it() {
    let server = FaultServer::empty("team/big");
    let kit = KitBuilder::new()
        .content("model", "model.safetensors", huge_tar("model.safetensors", 1, GIB))
        .tar("docs", "README.md", tar(&[("README.md", b"read me")]))
        .tar("docs", "docs", tar(&[("docs/a.md", b"a"), ("docs/b.md", b"b")]))
        .serve(&server, "v1");
    let (model, readme, docs) = (kit.layers[0], kit.layers[1], kit.layers[2]);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);

    let listed = std::process::Command::new("ls").arg("-lR").arg(&mount.dir).output().expect("ls");
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.contains(&GIB.to_string()) && listed.contains("b.md"), "{listed}");
    assert!(server.bytes_for(model) < 1 << 20, "{} bytes of the model moved", server.bytes_for(model));

    let before = (server.bytes_for(model), server.bytes_for(docs));
    assert_eq!(std::fs::read(mount.path("README.md")).expect("reads"), b"read me");
    assert_eq!((server.bytes_for(model), server.bytes_for(docs)), before, "reading one layer moves no other");
    assert!(server.bytes_for(readme) > 0);
}

#[test]
fn the_second_mount_moves_no_blob() {
    let server = FaultServer::empty("team/kit");
    let mut weights = vec![0; 3 << 20];
    pattern_at(2, 0, &mut weights);
    let kit = KitBuilder::new()
        .tar("model", "w", tar(&[("w/a.bin", &weights), ("w/b.bin", b"b")]))
        .tar("docs", "README.md", tar(&[("README.md", b"read me")]))
        .serve(&server, "v1");
    let kitfs = Kitfs::new();
    let read_all = || {
        let mount = kitfs.mount(&kit.reference, &[]);
        assert_eq!(std::fs::read(mount.path("w/a.bin")).expect("reads"), weights);
        assert_eq!(std::fs::read(mount.path("w/b.bin")).expect("reads"), b"b");
        assert_eq!(std::fs::read(mount.path("README.md")).expect("reads"), b"read me");
    };
    read_all();
    support::eventually("the commit", || kitfs.cached_files("indexes").len() == 2);
    server.reset_counters();
    read_all();
    let blobs: Vec<_> = server.requests().into_iter().filter(|request| request.path.contains("/blobs/")).collect();
    assert!(blobs.is_empty(), "{} blob requests on the second mount", blobs.len());
}

#[test]
fn a_directory_of_big_files_is_listed_by_hopping_from_header_to_header() {
    let server = FaultServer::empty("team/kit");
    let content = vec![7; 2 << 20];
    let files: Vec<(String, &[u8])> = (0..40).map(|n| (format!("w/{n:02}.bin"), &content[..])).collect();
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
    let kit = KitBuilder::new().tar("model", "w", tar(&files)).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    assert_eq!(std::fs::read_dir(mount.path("w")).expect("reads").count(), 40);
    assert!(server.bytes_for(kit.layers[0]) < 1 << 20, "{}", server.bytes_for(kit.layers[0]));
}

#[test]
fn blobs_in_kits_storage_are_not_downloaded() {
    let layout = support::data("layouts/tiny-llm");
    let server = FaultServer::from_layout(&layout, "fixtures/tiny-llm");
    let kitfs = Kitfs::new();
    let home = kitfs.path("kithome");
    support::kithome::import(&layout, &home, "elsewhere");
    let kitfs = kitfs.with("KITOPS_HOME", &home);
    let mount = kitfs.mount(&server.reference("1.2.0"), &[]);
    support::program::tree_of(&mount.dir);
    let blobs = server.requests().into_iter().filter(|request| request.path.contains("/blobs/")).count();
    assert_eq!(blobs, 0, "the registry is asked for the tag alone");
}

#[test]
fn a_fetch_of_more_than_1_gib_is_announced_with_size_time_and_remedy() {
    let server = FaultServer::empty("team/big");
    let size = GIB + (1 << 20);
    let kit = KitBuilder::new().content("model", "m.bin", huge_tar("m.bin", 1, size)).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let _gate = server.hold(kit.layers[0], 1 << 20);
    let mut reader = std::process::Command::new("cat")
        .arg(mount.path("m.bin"))
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("cat");
    support::eventually("the announcement", || kitfs.logs().contains("before anything in this layer can be read"));
    reader.kill().expect("kill");
    reader.wait().expect("wait");
    let logs = kitfs.logs();
    let lines: Vec<_> = logs.lines().filter(|line| line.contains("before anything in this layer")).collect();
    let [line] = lines[..] else { panic!("one line, not {lines:?}") };
    for part in [&kit.layers[0].to_string(), "1.0 GiB", "about ", "kitfs index"] {
        assert!(line.contains(part), "{part:?} in {line}");
    }
}
