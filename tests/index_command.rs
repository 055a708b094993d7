//! `kitfs index`: what it writes to a registry, a layout and kit's storage, and what it leaves alone.

mod support;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kitfs::digest::Digest;
use serde_json::{Value, json};
use support::kit::{KitBuilder, huge_tar};
use support::kithome::import;
use support::program::{Kitfs, recorded, tree_of};
use support::{Auth, Fault, FaultServer, Login, Registry, RegistryOptions, data, eventually, layouts};

/// The digest of the tiny-llm fixture's manifest.
const TINY: &str = "sha256:0f4b22aefbde7a60a25b5d22ef4090dde0aa0e7622142cbcdc7165537b4602b4";

fn layout(dir: &Path) -> String {
    let index: Value = serde_json::from_slice(&std::fs::read(dir.join("index.json")).expect("an index")).expect("JSON");
    let tag = &index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"];
    format!("oci:{}:{}", dir.display(), tag.as_str().expect("a tag"))
}

fn tiny() -> String {
    layout(&data("layouts/tiny-llm"))
}

/// The fixtures that are one kit.
fn kits() -> Vec<PathBuf> {
    layouts().into_iter().filter(|dir| !dir.ends_with("image-index")).collect()
}

fn as_json(kitfs: &Kitfs, arguments: &[&str]) -> Value {
    let mut all = vec!["index", "--json"];
    all.extend(arguments);
    serde_json::from_str(&kitfs.ok(&all)).expect("JSON")
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("a text: {value}")).to_owned()
}

fn manifest(kitfs: &Kitfs, reference: &str) -> Value {
    serde_json::from_str(&kitfs.ok(&["inspect", "--manifest", reference])).expect("a manifest")
}

fn layer_digests(manifest: &Value) -> Vec<&Value> {
    manifest["layers"].as_array().expect("layers").iter().map(|layer| &layer["digest"]).collect()
}

fn index_digests(written: &Value) -> Vec<String> {
    written["layers"].as_array().expect("layers").iter().map(|layer| text(&layer["index"]["digest"])).collect()
}

/// Files of a registry's or a layout's storage with the time of their last change.
fn files(dir: &Path) -> Vec<(PathBuf, std::time::SystemTime)> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).expect("readable") {
            let entry = entry.expect("an entry");
            let path = entry.path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                found.push((path, entry.metadata().expect("metadata").modified().expect("a time")));
            }
        }
    }
    found.sort();
    found
}

#[test]
fn every_fixture_is_indexed_into_a_registry_and_stays_the_same_kit() {
    let (registry, kitfs) = (Registry::start(), Kitfs::new());
    for dir in kits() {
        let source = layout(&dir);
        let name = dir.file_name().and_then(|name| name.to_str()).expect("a name");
        let target = format!("{}/kits/{name}:indexed", registry.host());
        let written = as_json(&kitfs, &[&source, &target]);
        let (before, after) = (manifest(&kitfs, &source), manifest(&kitfs, &target));
        assert_eq!(after["config"], before["config"], "{name}");
        assert_eq!(layer_digests(&after), layer_digests(&before), "{name}");
        assert_eq!(after["annotations"]["dev.kitfs.index.source"], written["source_digest"], "{name}");
        let pinned = after["layers"].as_array().expect("layers").iter();
        let pinned = pinned.filter(|layer| layer["annotations"]["dev.kitfs.index.head"].is_string()).count();
        assert!(pinned > 0 && written["referrer"].is_string(), "{name}: {written}");
        let verified = kitfs.ok(&["verify", &target]);
        assert!(verified.contains("pinned"), "{name}: {verified}");
    }
}

#[test]
fn a_second_run_writes_nothing_and_gives_the_same_digests_from_anywhere() {
    let registry = Registry::start();
    let target = format!("{}/team/kit:v1", registry.host());
    let first = as_json(&Kitfs::new(), &[&tiny(), &target]);
    assert_eq!(first["changed"], true);
    let stored = files(registry.storage());
    let elsewhere = Kitfs::new();
    let mut command = elsewhere.command(["index", "--json", &tiny(), &target]);
    let output = command.current_dir(elsewhere.path("")).output().expect("runs");
    let second: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    for key in ["digest", "source_digest", "referrer"] {
        assert_eq!(first[key], second[key], "{key}");
    }
    assert_eq!(index_digests(&first), index_digests(&second));
    assert_eq!((&second["changed"], &second["uploaded"]["blobs"]), (&json!(false), &json!(0)));
    assert_eq!(files(registry.storage()), stored, "nothing was written");
}

#[test]
fn indexing_an_indexed_kit_gives_the_same_manifest() {
    let (registry, kitfs) = (Registry::start(), Kitfs::new());
    let target = format!("{}/team/kit:v1", registry.host());
    let first = as_json(&kitfs, &[&tiny(), &target]);
    let again = as_json(&kitfs, &[&target, &target]);
    assert_eq!(again["digest"], first["digest"]);
    assert_eq!((&again["changed"], &again["uploaded"]["blobs"]), (&json!(false), &json!(0)));
    let copy = as_json(&kitfs, &[&target, &format!("{}/other/kit", registry.host())]);
    assert_eq!((&copy["digest"], &copy["tag"]), (&first["digest"], &json!("v1")), "the tag is the source's");
}

#[test]
fn layers_in_the_same_repository_are_not_uploaded_again() {
    let (registry, kitfs) = (Registry::start(), Kitfs::new());
    registry.push_layout(&data("layouts/tiny-llm"), "team/kit");
    let source = format!("{}/team/kit:1.2.0", registry.host());
    let layers = manifest(&kitfs, &source)["layers"].as_array().expect("layers").len();
    let written = as_json(&kitfs, &[&source, &format!("{}/team/kit:fast", registry.host())]);
    let indexes = written["layers"].as_array().expect("layers").len();
    assert_eq!(written["present"]["blobs"], layers + 1, "the layers and the config: {written}");
    assert_eq!(written["uploaded"]["blobs"], indexes + 1, "the indexes and the empty config: {written}");
    assert_eq!(written["source_digest"], TINY);
    assert_eq!(text(&kitfs.ok(&["resolve", "-q", &source]).trim().into()), TINY, "the source is as it was");
}

#[test]
fn layers_in_another_repository_of_the_registry_are_mounted() {
    let (registry, kitfs) = (Registry::start(), Kitfs::new());
    registry.push_layout(&data("layouts/tiny-llm"), "team/kit");
    let source = format!("{}/team/kit:1.2.0", registry.host());
    let layers = manifest(&kitfs, &source)["layers"].as_array().expect("layers").len();
    let written = as_json(&kitfs, &[&source, &format!("{}/other/kit:fast", registry.host())]);
    assert_eq!(written["mounted"]["blobs"], layers + 1, "{written}");
    kitfs.ok(&["verify", &format!("{}/other/kit:fast", registry.host())]);
}

#[test]
fn a_tag_moves_only_with_replace() {
    let (registry, kitfs) = (Registry::start(), Kitfs::new());
    registry.push_layout(&data("layouts/tiny-llm"), "team/kit");
    let source = format!("{}/team/kit:1.2.0", registry.host());
    let error = kitfs.fails(&["index", &source, &source]);
    assert!(error.contains("--replace") && error.contains(TINY), "{error}");
    assert_eq!(error.matches("sha256:").count(), 2, "both digests: {error}");
    assert_eq!(kitfs.ok(&["resolve", "-q", &source]).trim(), TINY, "it has not moved");
    let moved = as_json(&kitfs, &["--replace", &source, &source]);
    assert_eq!(kitfs.ok(&["resolve", "-q", &source]).trim(), text(&moved["digest"]));
    let said = kitfs.run(&["index", &source, &source]);
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("it was there already"), "{said}");
}

#[test]
fn annotations_are_added() {
    let (registry, kitfs) = (Registry::start(), Kitfs::new());
    let target = format!("{}/team/kit:v1", registry.host());
    as_json(&kitfs, &[&tiny(), &target, "--annotation", "a=b=c", "--annotation", "org.example/x="]);
    let annotations = &manifest(&kitfs, &target)["annotations"];
    assert_eq!((&annotations["a"], &annotations["org.example/x"]), (&json!("b=c"), &json!("")));
    let kept = &manifest(&kitfs, &tiny())["annotations"];
    for (key, value) in kept.as_object().expect("annotations") {
        assert_eq!(&annotations[key], value);
    }
}

#[test]
fn without_a_target_the_kit_stays_and_the_referrer_is_found() {
    let (registry, kitfs) = (Registry::start(), Kitfs::new());
    registry.push_layout(&data("layouts/tiny-llm"), "team/kit");
    let source = format!("{}/team/kit:1.2.0", registry.host());
    let written = as_json(&kitfs, &[&source]);
    assert_eq!((text(&written["digest"]), text(&written["source_digest"])), (TINY.to_owned(), TINY.to_owned()));
    assert_eq!(kitfs.ok(&["resolve", "-q", &source]).trim(), TINY);
    let referrer = text(&written["referrer"]);
    let command = format!("kitfs mount {}/team/kit@{TINY} --index-digest {referrer}", registry.host());
    assert_eq!(written["mount"], command);
    let said = kitfs.ok(&["index", &source]);
    assert!(said.contains(&command), "{said}");
    let digest: Digest = referrer.parse().expect("a digest");
    let document = std::fs::read(registry.blob_file(&digest)).expect("the referrer is in the registry");
    let document: Value = serde_json::from_slice(&document).expect("JSON");
    assert_eq!(document["artifactType"], "application/vnd.kitfs.index.v1");
    assert_eq!(document["subject"]["digest"], TINY);
    let kept: Vec<_> = document["layers"].as_array().expect("layers").iter().map(|l| text(&l["digest"])).collect();
    assert_eq!(kept, index_digests(&written));
    for layer in document["layers"].as_array().expect("layers") {
        let file = registry.blob_file(&text(&layer["digest"]).parse().expect("a digest"));
        assert_eq!(json!(file.metadata().expect("the index is there").len()), layer["size"]);
    }
    let again = as_json(&kitfs, &[&source]);
    assert_eq!((&again["changed"], &again["uploaded"]["blobs"]), (&json!(false), &json!(0)));
}

#[test]
fn both_ways_name_the_same_indexes() {
    let (registry, kitfs) = (Registry::start(), Kitfs::new());
    registry.push_layout(&data("layouts/many-files"), "team/kit");
    let source = layout(&data("layouts/many-files"));
    let source = format!("{}/team/kit:{}", registry.host(), source.rsplit(':').next().expect("a tag"));
    let beside = as_json(&kitfs, &[&source]);
    let pinned = as_json(&Kitfs::new(), &[&source, &format!("{}/team/kit:pinned", registry.host())]);
    assert_eq!(index_digests(&beside), index_digests(&pinned));
    assert_ne!(beside["referrer"], pinned["referrer"], "each has a subject of its own");
}

#[test]
fn a_layout_and_kits_storage_are_written_too() {
    let kitfs = Kitfs::new();
    let home = kitfs.path("kit");
    let kitfs = kitfs.with("KITOPS_HOME", &home);
    let dir = kitfs.path("layout");
    let in_layout = format!("oci:{}:v1", dir.display());
    let first = as_json(&kitfs, &[&tiny(), &in_layout]);
    let second = as_json(&kitfs, &[&tiny(), "tiny-llm:v1"]);
    assert_eq!((&first["digest"], &first["referrer"]), (&second["digest"], &second["referrer"]));
    for target in [in_layout.as_str(), "tiny-llm:v1"] {
        let (before, after) = (manifest(&kitfs, &tiny()), manifest(&kitfs, target));
        assert_eq!((&after["config"], layer_digests(&after)), (&before["config"], layer_digests(&before)));
        assert!(kitfs.ok(&["verify", target]).contains("pinned"));
        let again = as_json(&kitfs, &[&tiny(), target]);
        assert_eq!((&again["changed"], &again["uploaded"]["blobs"]), (&json!(false), &json!(0)), "{target}");
    }
    let moved = as_json(&kitfs, &["tiny-llm:v1", "other-name"]);
    assert_eq!((&moved["digest"], &moved["tag"]), (&first["digest"], &json!("v1")));
    let beside = as_json(&kitfs, &[&in_layout]);
    assert_eq!((&beside["digest"], &beside["referrer"]), (&first["digest"], &first["referrer"]));
}

#[test]
fn a_manifest_of_an_image_index_is_indexed_and_the_rest_is_told() {
    let (registry, kitfs) = (Registry::start(), Kitfs::new());
    let source = format!("oci:{}:one", data("layouts/image-index").display());
    let target = format!("{}/team/kit:v1", registry.host());
    let output = kitfs.run(&["index", "--json", &source, &target]);
    let written: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(written["source_digest"], TINY);
    assert!(written["notes"].to_string().contains("is an image index"), "{written}");
}

#[test]
fn a_run_that_was_killed_is_gone_on_with() {
    let (registry, server, kitfs) = (Registry::start(), FaultServer::empty("team/kit"), Kitfs::new());
    let served = KitBuilder::new()
        .content("model", "a.bin", huge_tar("a.bin", 5, 8 << 20))
        .content("docs", "b.bin", huge_tar("b.bin", 7, 8 << 20))
        .serve(&server, "v1");
    let target = format!("{}/team/kit:v1", registry.host());
    // The first layer comes through, the second stays open.
    let gate = server.hold(served.layers[1], 1 << 20);
    let mut child = kitfs.command(["index", &served.reference, &target]).spawn().expect("runs");
    let begun = Instant::now();
    let is_kept = |file: &PathBuf| file.extension().is_none();
    while !kitfs.cached_files("indexes").iter().any(is_kept) {
        assert!(begun.elapsed() < Duration::from_secs(30), "the first layer is indexed");
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().expect("killed");
    child.wait().expect("gone");
    gate.release();
    let error = kitfs.fails(&["resolve", &target]);
    assert!(error.contains("is not in") || error.contains("not found"), "nothing is tagged: {error}");
    server.reset_counters();
    let written = as_json(&kitfs, &[&served.reference, &target]);
    let size = huge_tar("a.bin", 5, 8 << 20).len();
    assert_eq!(server.bytes_for(served.layers[0]), size, "read once, to copy it, and not to index it");
    assert_eq!(written["layers"].as_array().map(Vec::len), Some(2));
    kitfs.ok(&["verify", &target]);
}

#[test]
fn an_upload_that_breaks_is_made_again() {
    let (server, kitfs) = (FaultServer::empty("team/copy"), Kitfs::new());
    let source = FaultServer::empty("team/kit");
    let content = huge_tar("a.bin", 5, 2 << 20);
    let served = KitBuilder::new().content("model", "a.bin", content).serve(&source, "v1");
    // The first request asks whether the layer is there, the second brings it.
    server.fault_times(2, served.layers[0], Fault::Reset { after: 1 << 20 });
    as_json(&kitfs, &[&served.reference, &server.reference("v1")]);
    let sent = server.requests_to(served.layers[0]).iter().filter(|request| request.method == "PUT").count();
    assert_eq!(sent, 2, "broken, then whole");
    kitfs.ok(&["verify", &server.reference("v1")]);
}

#[test]
fn an_upload_whose_token_ran_out_is_made_again_at_once() {
    let (server, kitfs) = (FaultServer::empty("team/copy"), Kitfs::new());
    server.set_auth(Auth::Bearer { realm: None, login: Login::Anyone, expires_in: 3600 });
    let source = FaultServer::empty("team/kit");
    let served = KitBuilder::new().content("model", "a.bin", huge_tar("a.bin", 5, 10 << 20)).serve(&source, "v1");
    // The index is made, so that the layer is read to be copied alone; it comes in one go, and stops on its way.
    kitfs.ok(&["cat", &served.reference, "a.bin"]);
    let layer = served.layers[0];
    source.fault(layer, Fault::IgnoreRange);
    let gate = source.hold(layer, 9 << 20);
    let mut child = kitfs.command(["index", &served.reference, &server.reference("v1")]).spawn().expect("runs");
    gate.wait_until_reached_by(1);
    let is_under_way = || server.uploaded_for(layer) > 0;
    eventually("the upload is under way", is_under_way);
    server.revoke_tokens();
    let released = Instant::now();
    gate.release();
    assert!(child.wait().expect("ends").success());
    assert!(released.elapsed() < Duration::from_secs(5), "{:?}", released.elapsed());
    let sent = server.requests_to(layer).iter().filter(|request| request.method == "PUT").count();
    assert_eq!((sent, server.holds(&layer)), (2, true), "refused, then sent again whole");
}

#[test]
fn a_source_that_lacks_a_blob_opens_no_upload() {
    let (server, source, kitfs) = (FaultServer::empty("team/copy"), FaultServer::empty("team/kit"), Kitfs::new());
    let served = KitBuilder::new().content("model", "a.bin", huge_tar("a.bin", 5, 1 << 20)).serve(&source, "v1");
    // kit's storage is asked first, and has nothing.
    as_json(&kitfs, &[&served.reference, &server.reference("v1")]);
    let to_layer = server.requests_to(served.layers[0]).iter().filter(|request| request.method == "PUT").count();
    assert_eq!(
        (to_layer, server.requests_for("uploads")),
        (1, 4),
        "the layer, the config, the index, the empty config"
    );
}

#[test]
fn what_was_missing_beside_a_tag_that_was_there_is_told() {
    let (server, kitfs) = (FaultServer::empty("team/copy"), Kitfs::new());
    let source = tiny();
    let target = server.reference("v1");
    let first = as_json(&kitfs, &[&source, &target]);
    assert_eq!((&first["wrote"]["kit"], &first["wrote"]["referrer"]), (&json!(true), &json!(true)));
    // From now on the list of referrers is another one, and empty.
    server.enable_referrers();
    let second = as_json(&kitfs, &[&source, &target]);
    assert_eq!(second["changed"], true);
    assert_eq!(second["wrote"], json!({"kit": false, "referrer": true, "blobs": 0}));
    let note = "the kit was there already, and something was missing; added: the referrer that keeps its indexes";
    assert_eq!(second["notes"].as_array().and_then(|notes| notes.last()), Some(&json!(note)));
    server.remove(&index_digests(&first)[0].parse().expect("a digest"));
    let said = kitfs.run(&["index", &source, &target]);
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("something was missing; added: 1 blobs") && !said.contains("nothing has changed"), "{said}");
    // A list that names a referrer which is gone.
    server.remove(&text(&first["referrer"]).parse().expect("a digest"));
    let third = as_json(&kitfs, &[&source, &target]);
    assert_eq!(third["wrote"], json!({"kit": false, "referrer": true, "blobs": 0}));
    let last = as_json(&kitfs, &[&source, &target]);
    assert_eq!((&last["changed"], last["notes"].to_string().contains("nothing has changed")), (&json!(false), true));
}

#[test]
fn a_tag_that_somebody_took_meanwhile_is_not_moved() {
    let (server, kitfs) = (FaultServer::empty("team/copy"), Kitfs::new());
    let source = FaultServer::empty("team/kit");
    let served = KitBuilder::new().content("model", "a.bin", huge_tar("a.bin", 5, 2 << 20)).serve(&source, "v1");
    // The index is made, so that the layer is read to be copied alone.
    kitfs.ok(&["cat", &served.reference, "a.bin"]);
    let gate = source.hold(served.layers[0], 1 << 20);
    let mut command = kitfs.command(["index", &served.reference, &server.reference("v1")]);
    let child = command.stderr(std::process::Stdio::piped()).spawn().expect("runs");
    gate.wait_until_reached_by(1);
    let theirs = server.add_manifest("v1", json!({"schemaVersion": 2}).to_string());
    gate.release();
    let output = child.wait_with_output().expect("ends");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("--replace") && error.contains(&theirs.to_string()), "{error}");
    let writes = server.requests_to("v1").iter().filter(|request| request.method == "PUT").count();
    assert_eq!(writes, 0);
}

#[test]
fn a_source_that_has_become_false_is_named_and_nothing_is_tagged() {
    let (registry, server, kitfs) = (Registry::start(), FaultServer::empty("team/kit"), Kitfs::new());
    let content = huge_tar("a.bin", 5, 1 << 20);
    let served = KitBuilder::new().content("model", "a.bin", content).serve(&server, "v1");
    kitfs.ok(&["cat", &served.reference, "a.bin"]);
    server.fault(served.layers[0], Fault::FlipBit { offset: 7000 });
    let target = format!("{}/team/kit:v1", registry.host());
    let error = kitfs.fails(&["index", &served.reference, &target]);
    let expected = format!("model \"a.bin\" can't be copied: model \"a.bin\" from {}", server.host());
    assert!(error.contains(&expected) && error.contains("digest mismatch"), "{error}");
    assert!(!kitfs.run(&["resolve", &target]).status.success(), "nothing was tagged");
}

#[test]
fn where_one_source_is_false_the_next_one_is_copied() {
    let (server, source) =
        (FaultServer::empty("team/copy"), FaultServer::from_layout(data("layouts/tiny-llm"), "team/kit"));
    let kitfs = Kitfs::new();
    let home = kitfs.path("kit");
    let kitfs = kitfs.with("KITOPS_HOME", &home);
    import(&data("layouts/tiny-llm"), &home, &format!("{}/team/kit", source.host()));
    let reference = source.reference("1.2.0");
    let layer: Digest = text(&manifest(&kitfs, &reference)["layers"][0]["digest"]).parse().expect("a digest");
    let file = home.join("storage/blobs/sha256").join(layer.hex());
    let mut bytes = std::fs::read(&file).expect("a blob");
    bytes[600] ^= 1;
    std::fs::write(&file, bytes).expect("damaged");
    as_json(&kitfs, &[&reference, &server.reference("v1")]);
    let sent = server.requests_to(layer).iter().filter(|request| request.method == "PUT").count();
    // The false one may be given up before the server has seen it.
    assert!((1..=2).contains(&sent) && server.holds(&layer), "false, then true: {sent}");
    assert_eq!(source.requests_for(layer), 2, "the true one is read to be indexed, and again to be copied");
}

#[test]
fn the_command_that_is_printed_mounts_the_kit_by_its_indexes() {
    let (registry, kitfs) = (Registry::start(), Kitfs::new());
    registry.push_layout(&data("layouts/tiny-llm"), "team/kit");
    let source = format!("{}/team/kit:1.2.0", registry.host());
    let command = text(&as_json(&kitfs, &[&source])["mount"]);
    let words: Vec<&str> = command.split(' ').collect();
    let ["kitfs", "mount", reference, options @ ..] = &words[..] else { panic!("{command}") };
    let fresh = Kitfs::new();
    let mount = fresh.mount(reference, options);
    assert_eq!(tree_of(&mount.dir), recorded(&data("trees/tiny-llm.jsonl")));
    assert!(mount.said.contains("attested"), "{}", mount.said);
}

#[test]
fn a_layer_that_cant_be_indexed_is_named_with_what_is_wrong() {
    let (registry, server, kitfs) = (Registry::start(), FaultServer::empty("team/kit"), Kitfs::new());
    let served = KitBuilder::new().tar("model", "w", vec![1; 2048]).serve(&server, "v1");
    let target = format!("{}/team/kit:v1", registry.host());
    let error = kitfs.fails(&["index", &served.reference, &target]);
    assert!(error.contains("model \"w\" can't be indexed as it is broken") && error.contains("pack"), "{error}");
    assert!(!kitfs.run(&["resolve", &target]).status.success(), "nothing was tagged");
}

#[test]
fn who_may_not_write_hears_of_it_before_a_layer_is_read() {
    let registry = Registry::start_with(RegistryOptions { password: true, ..RegistryOptions::default() });
    let (server, kitfs) = (FaultServer::empty("team/kit"), Kitfs::new());
    let content = huge_tar("a.bin", 5, 1 << 20);
    let served = KitBuilder::new().content("model", "a.bin", content).serve(&server, "v1");
    let error = kitfs.fails(&["index", &served.reference, &format!("{}/team/kit:v1", registry.host())]);
    assert!(error.contains("login") && error.contains(&registry.host()), "{error}");
    assert_eq!(server.bytes_for(served.layers[0]), 0, "no layer was read");
}

#[test]
fn wrong_use_is_told_before_anything_is_done() {
    let kitfs = Kitfs::new();
    for (arguments, said) in [
        (&["a:1", &format!("b@{TINY}")][..], "DST can't have a digest"),
        (&[&format!("a@{TINY}"), "b"], "give DST one"),
        (&["a:1", "--replace"], "DST"),
        (&["a:1", "--annotation", "k=v"], "DST"),
        (&["a:1", "b:1", "--annotation", "novalue"], "is not KEY=VALUE"),
        (&["a:1", "b:1", "--annotation", "=v"], "is not KEY=VALUE"),
        (&["a:1", "b:1", "--annotation", "k=1", "--annotation", "k=2"], "given twice"),
        (&["a:1", "b:1", "--annotation", "dev.kitfs.index.source=x"], "set by kitfs itself"),
    ] {
        let mut all = vec!["index"];
        all.extend(arguments);
        let output = kitfs.run(&all);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        assert!(error.contains(said), "{arguments:?}: {error}");
    }
}
