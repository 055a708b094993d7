//! `kitfs verify`: what it reads, what it finds wrong, and what it says.

mod support;

use kitfs::archive::index::annotations::Pin;
use kitfs::archive::index::{Index, IndexEntry};
use kitfs::digest::Digest;
use serde_json::{Map, Value, json};
use support::kit::{KitBuilder, Served, gzip, pattern, tar};
use support::program::Kitfs;
use support::{Fault, FaultServer, data, layouts};

/// A kit of two layers, `w/big.bin` of three chunks and more among them.
fn kit(server: &FaultServer) -> Served {
    let big = pattern(3, (2 << 20) + 5);
    let model = tar(&[("w/big.bin", &big), ("w/small.txt", b"small")]);
    KitBuilder::new()
        .tar("model", "w", model)
        .tar("docs", "README.md", tar(&[("README.md", b"hi")]))
        .serve(server, "v1")
}

/// The index of the kit's model layer, as kitfs derives it.
fn model_index(kitfs: &Kitfs, reference: &str, layer: &Digest) -> Index {
    kitfs.ok(&["cat", reference, "w/small.txt"]);
    let derived = kitfs.cached_files("indexes").into_iter().map(|file| std::fs::read(file).expect("an index"));
    let mut indexes = derived.map(|bytes| Index::decode(bytes[32..].to_vec().into(), None).expect("an index"));
    indexes.find(|index| index.head().layer().digest == *layer).expect("the model's index")
}

/// The same index with one entry changed.
fn changed(index: &Index, path: &str, change: impl FnOnce(&mut IndexEntry)) -> Index {
    let mut rows: Vec<_> = (0..index.head().len()).filter_map(|row| index.entry(row)).collect();
    let row = rows.iter_mut().find(|row| row.entry.path.as_bytes() == path.as_bytes()).expect("the entry");
    change(row);
    Index::build(index.head().layer().clone(), rows).expect("it makes sense, and is false")
}

/// Serves the kit again with `pin` on its model layer.
fn pin(server: &FaultServer, kitfs: &Kitfs, served: &Served, pin: &Pin) -> String {
    let mut manifest: Value =
        serde_json::from_str(&kitfs.ok(&["inspect", "--manifest", &served.reference])).expect("a manifest");
    let annotations = pin.annotations().map(|(key, value)| (key.to_owned(), json!(value)));
    manifest["layers"][0]["annotations"] = Value::Object(Map::from_iter(annotations));
    server.add_manifest("pinned", manifest.to_string());
    server.reference("pinned")
}

/// Verifies in a fresh home: exit code, the table and what follows it, and the JSON.
fn verify(reference: &str) -> (i32, String, Value) {
    let kitfs = Kitfs::new();
    let output = kitfs.run(&["verify", reference]);
    let json = kitfs.run(&["verify", "--json", reference]);
    let code = output.status.code().expect("not killed");
    assert_eq!(json.status.code(), Some(code), "both ways end alike");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(code == 1, error.contains("error: "), "{error}");
    (code, said, serde_json::from_slice(&json.stdout).expect("JSON"))
}

fn statuses(found: &Value) -> Vec<&str> {
    found["layers"].as_array().expect("layers").iter().map(|layer| layer["status"].as_str().expect("text")).collect()
}

#[test]
fn every_fixture_is_as_its_manifest_says() {
    let kitfs = Kitfs::new().with("KITOPS_HOME", data("kithome"));
    let mut references = Vec::new();
    for dir in layouts().iter().filter(|dir| !dir.ends_with("image-index")) {
        let index: Value =
            serde_json::from_slice(&std::fs::read(dir.join("index.json")).expect("an index")).expect("JSON");
        let tag = &index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"];
        references.push(format!("oci:{}:{}", dir.display(), tag.as_str().expect("a tag")));
    }
    assert!(references.len() > 10);
    for reference in &references {
        let found: Value = serde_json::from_str(&kitfs.ok(&["verify", "--json", reference])).expect("JSON");
        assert_eq!(found["ok"], true, "{found}");
        assert!(statuses(&found).iter().all(|status| *status == "ok"), "{found}");
    }
}

#[test]
fn a_kit_without_indexes_is_fine_and_says_so() {
    let server = FaultServer::empty("team/kit");
    let served = kit(&server);
    let (code, said, found) = verify(&served.reference);
    assert_eq!((code, statuses(&found)), (0, vec!["ok", "ok"]));
    assert_eq!(found["digest"], served.digest.to_string());
    assert_eq!(said.matches("no index").count(), 2, "{said}");
}

#[test]
fn a_flipped_bit_is_found_and_the_other_layers_are_read() {
    let server = FaultServer::empty("team/kit");
    let served = kit(&server);
    server.fault(served.layers[0], Fault::FlipBit { offset: 70_000 });
    let (code, said, found) = verify(&served.reference);
    assert_eq!((code, statuses(&found)), (1, vec!["differs", "ok"]));
    let expected = format!("digest mismatch: expected {}, found sha256:", served.layers[0]);
    assert!(said.contains(&expected), "{said}");
}

#[test]
fn where_a_layer_is_false_its_index_tells_the_file_and_the_chunk() {
    let server = FaultServer::empty("team/kit");
    let big = pattern(3, (2 << 20) + 5);
    let model = tar(&[("w/big.bin", &big), ("w/small.txt", b"small")]);
    let served = KitBuilder::new().indexed().tar("model", "w", model).serve(&server, "v1");
    server.fault(served.layers[0], Fault::FlipBit { offset: (1 << 20) + 70_000 });
    let (code, said, found) = verify(&served.reference);
    assert_eq!((code, statuses(&found)), (1, vec!["differs"]));
    let line = said.lines().find(|line| line.contains("by its pinned index")).unwrap_or_else(|| panic!("{said}"));
    assert!(line.contains("w/big.bin") && line.contains("chunk 1"), "{line}");
}

#[test]
fn what_is_in_the_cache_hides_nothing() {
    let server = FaultServer::empty("team/kit");
    let served = kit(&server);
    let kitfs = Kitfs::new();
    kitfs.ok(&["cat", &served.reference, "w/small.txt"]);
    server.fault(served.layers[0], Fault::FlipBit { offset: 1 << 20 });
    assert!(kitfs.fails(&["verify", &served.reference]).contains("1 of 2 layers"));
    assert_eq!(kitfs.ok(&["cat", &served.reference, "w/small.txt"]), "small", "what was verified before stays good");
}

#[test]
fn a_layer_that_is_gone_is_unreadable_and_the_other_is_read() {
    let server = FaultServer::empty("team/kit");
    let served = kit(&server);
    server.fault(served.layers[1], Fault::status(404));
    let (code, said, found) = verify(&served.reference);
    assert_eq!((code, statuses(&found)), (1, vec!["ok", "unreadable"]), "{said}");
}

#[test]
fn a_broken_archive_is_told_from_a_false_layer() {
    let server = FaultServer::empty("team/kit");
    let served = KitBuilder::new().tar("model", "w", vec![1; 2048]).serve(&server, "v1");
    let (code, said, found) = verify(&served.reference);
    assert_eq!((code, statuses(&found)), (1, vec!["broken"]), "{said}");
}

#[test]
fn a_right_index_is_right() {
    let (server, kitfs) = (FaultServer::empty("team/kit"), Kitfs::new());
    let served = kit(&server);
    let index = model_index(&kitfs, &served.reference, &served.layers[0]);
    let reference = pin(&server, &kitfs, &served, &index.pin());
    server.add_blob(index.as_bytes());
    let (code, said, found) = verify(&reference);
    assert_eq!((code, statuses(&found)), (0, vec!["ok", "ok"]), "{said}");
    assert_eq!(found["layers"][0]["indexes"][0]["digest"], index.pin().digest.to_string());
    assert!(said.contains("pinned") && said.contains("no index"), "{said}");
}

#[test]
fn an_index_that_lies_is_told_by_entry_field_and_chunk() {
    let (server, kitfs) = (FaultServer::empty("team/kit"), Kitfs::new());
    let served = kit(&server);
    let index = model_index(&kitfs, &served.reference, &served.layers[0]);
    let lie = |path: &str, change: fn(&mut IndexEntry)| {
        let index = changed(&index, path, change);
        server.add_blob(index.as_bytes());
        let (code, said, found) = verify(&pin(&server, &kitfs, &served, &index.pin()));
        assert_eq!((code, statuses(&found)), (1, vec!["index differs", "ok"]), "{said}");
        let problem = &found["layers"][0]["problems"][0];
        assert_eq!(problem["count"], 1, "{problem}");
        let line = problem["differences"][0].as_str().expect("a line").to_owned();
        assert!(said.contains(&line), "{said}");
        line
    };
    let mode = lie("w/small.txt", |row| row.entry.mode = 0o4755);
    assert_eq!(mode, "\"w/small.txt\": mode: the index says 4755, it is 0644");
    let offset = lie("w/big.bin", |row| row.entry.offset -= 512);
    assert_eq!(offset, "\"w/big.bin\": offset: the index says 512, it is 1024");
    let chunk = lie("w/big.bin", |row| {
        let content = row.content.as_mut().expect("a file");
        content.chunks[1] = Digest::of(b"false");
        content.object = kitfs::object::ObjectDigest::new(content.size, &content.chunks);
    });
    let second = &pattern(3, (2 << 20) + 5)[1 << 20..2 << 20];
    let (stated, is) = (Digest::of(b"false"), Digest::of(second));
    let place = "\"w/big.bin\": chunk 1 (bytes 1048576 to 2097152)";
    assert_eq!(chunk, format!("{place}: the index says {stated}, it is {is}"));
}

#[test]
fn a_head_annotation_that_is_false_is_told() {
    let (server, kitfs) = (FaultServer::empty("team/kit"), Kitfs::new());
    let served = kit(&server);
    let index = model_index(&kitfs, &served.reference, &served.layers[0]);
    server.add_blob(index.as_bytes());
    let is = index.pin();
    for lie in [
        Pin { head_digest: Digest::of(b"other"), ..is },
        Pin { head_size: is.head_size - 32, head_digest: Digest::of(b"shorter"), ..is },
    ] {
        let (code, said, found) = verify(&pin(&server, &kitfs, &served, &lie));
        assert_eq!((code, statuses(&found)), (1, vec!["index head differs", "ok"]), "{said}");
        let [stated, head] = [lie, is].map(|pin| format!("{}:{}", pin.head_size, pin.head_digest));
        let line = format!("annotation dev.kitfs.index.head: the kit says {stated}, the index's head is {head}");
        assert!(said.contains(&line), "{said}");
    }
}

#[test]
fn an_index_that_can_be_asked_for_no_more_is_not_called_missing() {
    let (server, kitfs) = (FaultServer::empty("team/kit"), Kitfs::new());
    let served = kit(&server);
    let index = model_index(&kitfs, &served.reference, &served.layers[0]);
    let reference = pin(&server, &kitfs, &served, &index.pin());
    let digest = server.add_blob(index.as_bytes());
    // From here on the cache has it.
    kitfs.ok(&["verify", &reference]);
    for (status, expected) in
        [(404, "index missing"), (401, "index unreadable"), (403, "index unreadable"), (500, "index unreadable")]
    {
        server.heal(digest);
        server.fault(digest, Fault::status(status));
        let output = kitfs.run(&["verify", "--json", &reference]);
        let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(statuses(&found), [expected, "ok"], "{status}: {found}");
    }
}

#[test]
fn a_missing_index_is_told_even_where_the_cache_still_has_it() {
    let (server, kitfs) = (FaultServer::empty("team/kit"), Kitfs::new());
    let served = kit(&server);
    let index = model_index(&kitfs, &served.reference, &served.layers[0]);
    let reference = pin(&server, &kitfs, &served, &index.pin());
    let (code, said, found) = verify(&reference);
    assert_eq!((code, statuses(&found)), (1, vec!["index missing", "ok"]), "{said}");
    let digest = server.add_blob(index.as_bytes());
    kitfs.ok(&["verify", &reference]);
    server.fault(digest, Fault::status(404));
    assert!(kitfs.fails(&["verify", &reference]).contains("1 of 2 layers"));
}

#[test]
fn an_index_that_is_none_or_of_another_layer_is_invalid() {
    let (server, kitfs) = (FaultServer::empty("team/kit"), Kitfs::new());
    let served = kit(&server);
    let index = model_index(&kitfs, &served.reference, &served.layers[0]);
    let mut bytes = index.as_bytes().to_vec();
    bytes[0] ^= 1;
    let garbage = Pin { digest: server.add_blob(bytes.clone()), ..index.pin() };
    let (code, said, found) = verify(&pin(&server, &kitfs, &served, &garbage));
    assert_eq!((code, statuses(&found)[0]), (1, "index invalid"), "{said}");

    let facts = kitfs::archive::index::LayerFacts {
        digest: Digest::of(b"other"),
        diff_id: Digest::of(b"other"),
        ..index.head().layer().clone()
    };
    let rows = (0..index.head().len()).filter_map(|row| index.entry(row)).collect();
    let other = Index::build(facts, rows).expect("an index");
    server.add_blob(other.as_bytes());
    let (code, said, found) = verify(&pin(&server, &kitfs, &served, &other.pin()));
    assert_eq!((code, statuses(&found)[0]), (1, "index invalid"), "{said}");
}

#[test]
fn a_wrong_diff_id_is_told() {
    let (server, kitfs) = (FaultServer::empty("team/kit"), Kitfs::new());
    let docs = gzip(&tar(&[("README.md", b"hi")]));
    let served = KitBuilder::new().layer("docs", "README.md", "tar+gzip", docs).serve(&server, "v1");
    let mut config: Value =
        serde_json::from_str(&kitfs.ok(&["inspect", "--config", &served.reference])).expect("a config");
    config["docs"][0]["diffId"] = json!(Digest::of(b"other"));
    let config = config.to_string();
    let mut manifest: Value =
        serde_json::from_str(&kitfs.ok(&["inspect", "--manifest", &served.reference])).expect("a manifest");
    manifest["config"]["size"] = json!(config.len());
    manifest["config"]["digest"] = json!(server.add_blob(config));
    server.add_manifest("false", manifest.to_string());
    let (code, said, found) = verify(&server.reference("false"));
    assert_eq!((code, statuses(&found)), (1, vec!["diffId differs"]), "{said}");
}

#[test]
fn a_layer_that_is_shared_with_a_parent_is_read_from_both_repositories() {
    let (above, server) = (FaultServer::empty("team/base"), FaultServer::empty("team/kit"));
    let model = tar(&[("w/a.bin", &pattern(3, 5000))]);
    let parent = KitBuilder::new().tar("model", "w", model.clone()).serve(&above, "v1");
    let child = KitBuilder::new().parent(&parent.reference).tar("docs", "w", model).serve(&server, "v1");
    let layer = child.layers[child.layers.len() - 1];
    assert_eq!(layer, parent.layers[0], "one blob in two repositories");
    let (_, said, found) = verify(&child.reference);
    assert_eq!(statuses(&found), ["ok", "ok"], "{said}");
    server.fault(layer, Fault::FlipBit { offset: 600 });
    assert_eq!(statuses(&verify(&child.reference).2), ["ok", "differs"], "the kit's own copy");
    server.heal(layer);
    above.fault(layer, Fault::status(404));
    assert_eq!(statuses(&verify(&child.reference).2), ["unreadable", "ok"], "the parent's");
}

#[test]
fn parents_are_read_too() {
    let server = FaultServer::empty("team/kit");
    let parent = kit(&server);
    let child = KitBuilder::new()
        .parent(&parent.reference)
        .tar("docs", "CHILD.md", tar(&[("CHILD.md", b"child")]))
        .serve(&server, "child");
    let (code, said, found) = verify(&child.reference);
    assert_eq!((code, statuses(&found)), (0, vec!["ok", "ok"]), "{said}");
    assert_eq!(found["layers"][0]["kit"], 1);
    server.fault(parent.layers[0], Fault::FlipBit { offset: 600 });
    let (code, _, found) = verify(&child.reference);
    assert_eq!((code, statuses(&found)), (1, vec!["differs", "ok"]));
}
