//! Without a registry: what is complete in the cache is mounted and read, and what is not fails soon and says why. With
//! `--offline` nobody is asked at all.

mod support;

use std::fs;
use std::path::Path;

use kitfs::cache::Cache;
use kitfs::digest::Digest;
use rustix::io::Errno;
use serde_json::{Value, json};
use support::away::{AT_ONCE, Away, GIVEN_UP, Nobody, SOON, is_old, json_of, kit, make_old, two_layers, within};
use support::kit::{KitBuilder, Served, pattern, tar};
use support::program::{Kitfs, Mount, tree_of};
use support::{Fault, FaultServer, Registry, data, eventually};

/// Reads all of it, through a mount that ends with this, until all of it is in the cache for good.
fn complete(kitfs: &Kitfs, reference: &str, options: &[&str]) -> Vec<support::program::Row> {
    let mount = kitfs.mount(reference, options);
    let tree = tree_of(&mount.dir);
    is_kept(kitfs);
    tree
}

/// What was read is committed behind its readers.
fn is_kept(kitfs: &Kitfs) {
    eventually("all that was read is kept", || {
        kitfs.cached_files("incoming").is_empty() && kitfs.cached_files("partial").is_empty()
    });
}

fn errno(path: &Path) -> Errno {
    let error = fs::read(path).expect_err("it is not in the cache");
    Errno::from_io_error(&error).expect("an error of the system")
}

#[test]
fn offline_opens_no_connection_and_looks_no_name_up() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server);
    let kitfs = Kitfs::new();
    let pinned = format!("{}@{}", kit.reference.trim_end_matches(":v1"), kit.digest);
    for reference in [&kit.reference, &pinned] {
        for command in [&["resolve"][..], &["inspect"], &["ls"], &["mount"]] {
            let arguments = [command, &["--offline", reference]].concat();
            let error = within(AT_ONCE, "to refuse", || kitfs.fails(&arguments));
            let told = "is not in the cache or in kit's storage, and --offline (KITFS_OFFLINE) keeps kitfs from asking";
            assert!(error.contains(told) && error.contains("kitfs pull"), "{arguments:?}: {error}");
        }
    }
    assert_eq!(server.connections(), 0);

    let tree = complete(&kitfs, &kit.reference, &[]);
    let connections = server.connections();
    let offline = kitfs.with("KITFS_OFFLINE", "true");
    for reference in [&kit.reference, &pinned] {
        assert_eq!(complete(&offline, reference, &[]), tree);
        offline.ok(&["inspect", reference]);
        offline.ok(&["cat", reference, "w/a.bin"]);
    }
    assert_eq!(server.connections(), connections, "nobody was asked");

    // A name that can't be looked up is not looked up: that would take its time, and fail.
    let cache = Cache::open(&offline.cache()).expect("the cache");
    cache.remember("registry.invalid/team/kit:v1", &kit.digest).expect("a note");
    let served =
        within(AT_ONCE, "to resolve", || json_of(&offline, &["resolve", "--json", "registry.invalid/team/kit:v1"]));
    assert_eq!(served["digest"], json!(kit.digest));
    assert_eq!(served["last_known"]["why"], "offline");
}

#[test]
fn offline_is_a_key_of_the_config_file_and_writes_to_no_registry() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server);
    let kitfs = Kitfs::new();
    complete(&kitfs, &kit.reference, &[]);
    let connections = server.connections();
    fs::create_dir_all(kitfs.path(".config/kitfs")).expect("mkdir");
    fs::write(kitfs.path(".config/kitfs/config.toml"), "offline = true\n").expect("written");
    let made = kit.reference.replace(":v1", ":v2");
    let error = kitfs.fails(&["index", &kit.reference, &made]);
    assert!(error.contains("keeps kitfs from writing there") && error.contains("oci:DIR"), "{error}");
    assert_eq!(server.connections(), connections);
    // What lies on the disk works as ever.
    let from = format!("oci:{}", data("layouts/tiny-llm").display());
    let to = format!("oci:{}:v2", kitfs.path("layout").display());
    kitfs.ok(&["index", &from, &to]);
    assert!(!complete(&kitfs, &to, &[]).is_empty());
}

#[test]
fn a_digest_whose_kit_is_complete_needs_no_request() {
    for indexed in [false, true] {
        let server = FaultServer::empty("team/kit");
        let kit =
            two_layers(if indexed { KitBuilder::new().indexed() } else { KitBuilder::new() }).serve(&server, "v1");
        let kitfs = Kitfs::new();
        let tree = complete(&kitfs, &kit.reference, &[]);
        server.reset_counters();
        let pinned = format!("{}@{}", kit.reference.trim_end_matches(":v1"), kit.digest);
        assert_eq!(complete(&kitfs, &pinned, &[]), tree);
        let paths: Vec<_> = server.requests().into_iter().map(|request| request.path).collect();
        assert!(paths.is_empty(), "{paths:?}");
    }
}

#[test]
fn a_complete_kit_is_served_without_its_registry_and_says_how_old_its_tag_is() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server);
    let kitfs = Kitfs::new();
    let fresh = kitfs.ok(&["mount", &kit.reference, kitfs.path("m").to_str().expect("UTF-8"), "--json"]);
    let fresh: Value = serde_json::from_str(&fresh).expect("JSON");
    assert_eq!((&fresh["last_known"], &fresh["offline"]), (&Value::Null, &json!(false)));
    let tree = tree_of(&kitfs.path("m"));
    is_kept(&kitfs);
    kitfs.ok(&["unmount", kitfs.path("m").to_str().expect("UTF-8")]);
    make_old(&kitfs);
    drop(server);

    let mount = within(SOON, "to mount", || kitfs.mount(&kit.reference, &[]));
    let note = mount.said.lines().find(|line| line.starts_with("note")).expect("a note");
    let told = ":v1: the registry can't be reached (Connection refused (os error 111)); took the digest it had at 20";
    assert!(note.contains(told) && note.contains("3h 5m before"), "{note}");
    assert_eq!(tree_of(&mount.dir), tree);
    let status = kitfs.status(&mount);
    is_old(&status["last_known"]);
    assert_eq!(status["last_known"]["why"], "the registry can't be reached");
    let shown = kitfs.ok(&["status", mount.dir.to_str().expect("UTF-8")]);
    assert!(shown.contains("3h 5m before"), "{shown}");
    drop(mount);

    let offline = within(AT_ONCE, "to mount offline", || kitfs.mount(&kit.reference, &["--offline"]));
    assert!(offline.said.contains(":v1: offline; took the digest it had at 20"), "{}", offline.said);
    assert!(offline.said.contains("no registry is asked"), "{}", offline.said);
    assert_eq!(tree_of(&offline.dir), tree);
    let status = kitfs.status(&offline);
    is_old(&status["last_known"]);
    assert_eq!((&status["last_known"]["why"], &status["offline"]), (&json!("offline"), &json!(true)));
    let shown = kitfs.ok(&["status", offline.dir.to_str().expect("UTF-8")]);
    assert!(shown.contains("no registry is asked"), "{shown}");
    drop(offline);

    let commands = [&["resolve"][..], &["inspect"], &["ls"], &["pull"], &["mount", "--dry-run"]];
    for command in commands {
        for (options, why) in [(&[][..], "the registry can't be reached"), (&["--offline"], "offline")] {
            let known =
                json_of(&kitfs, &[command, options, &["--json", &kit.reference]].concat())["last_known"].clone();
            is_old(&known);
            assert_eq!(known["why"], why, "{command:?}");
            assert_eq!(known["cause"].is_null(), why == "offline", "{known}");
        }
    }
    let pinned = format!("{}@{}", kit.reference.trim_end_matches(":v1"), kit.digest);
    assert_eq!(json_of(&kitfs, &["resolve", "--json", &pinned])["last_known"], Value::Null);
}

#[test]
fn whoever_vouches_for_its_indexes_a_complete_kit_is_read_without_its_registry() {
    let server = FaultServer::empty("team/kit");
    let pinned = two_layers(KitBuilder::new().indexed()).serve(&server, "pinned");
    let attested = two_layers(KitBuilder::new().attested()).serve(&server, "attested");
    let referrer = attested.referrer.expect("a referrer").to_string();
    let rule = format!("{}/*", server.host());
    let kits = [
        (&pinned.reference, vec![], "pinned"),
        (&attested.reference, vec!["--index-digest", &referrer], "attested"),
        (&attested.reference, vec!["--trust-index", &rule], "attested"),
        (&pinned.reference, vec!["--trust", "layer"], "derived"),
    ];
    // A cache for each, so that none is helped by what another left.
    let users: Vec<_> = kits
        .iter()
        .map(|(reference, options, tier)| {
            let kitfs = Kitfs::new();
            let mount = kitfs.mount(reference, options);
            if *tier != "derived" {
                assert_eq!(mount.trust_of("w/a.bin"), *tier, "{reference}");
            }
            let tree = tree_of(&mount.dir);
            is_kept(&kitfs);
            drop(mount);
            if *tier != "derived" {
                // Reading all of an attested layer derives it. It is not to help here.
                for index in kitfs.cached_files("indexes") {
                    fs::remove_file(index).expect("removed");
                }
            }
            make_old(&kitfs);
            (kitfs, tree)
        })
        .collect();
    drop(server);
    for ((kitfs, tree), (reference, options, tier)) in users.iter().zip(&kits) {
        for (more, limit) in [(&[][..], SOON), (&["--offline"], AT_ONCE)] {
            let mount = within(limit, tier, || kitfs.mount(reference, &[options, more].concat()));
            assert!(!mount.said.contains("warning"), "{}", mount.said);
            assert_eq!(mount.trust_of("w/a.bin"), *tier);
            assert_eq!(tree_of(&mount.dir), *tree, "{tier}");
            if options.contains(&"--trust-index") {
                assert!(mount.said.contains("what a rule trusts to name the indexes of"), "{}", mount.said);
                assert_eq!(mount.said.matches("3h 5m before").count(), 2, "the tag and the rule: {}", mount.said);
            }
        }
    }
}

#[test]
fn an_image_index_and_parents_are_followed_from_memory() {
    let server = FaultServer::from_layout(data("layouts/image-index"), "team/kit");
    let base = two_layers(KitBuilder::new()).serve(&server, "base");
    let child = KitBuilder::new().parent(&base.reference).tar("docs", "notes", tar(&[("notes/n.md", b"note")]));
    let child = child.serve(&server, "child");
    let kitfs = Kitfs::new();
    let one = json_of(&kitfs, &["inspect", "--json", &server.reference("one")]);
    let select = one["digest"].as_str().expect("a digest").to_owned();
    let references = [
        (server.reference("one"), vec![]),
        (server.reference("two"), vec!["--select", &select]),
        (child.reference.clone(), vec![]),
    ];
    let trees: Vec<_> = references.iter().map(|(reference, options)| complete(&kitfs, reference, options)).collect();
    make_old(&kitfs);
    drop(server);
    for (more, limit) in [(&[][..], SOON), (&["--offline"], AT_ONCE)] {
        for ((reference, options), tree) in references.iter().zip(&trees) {
            let mount = within(limit, reference, || kitfs.mount(reference, &[&options[..], more].concat()));
            assert_eq!(tree_of(&mount.dir), *tree, "{reference}");
        }
        let mount = kitfs.mount(&child.reference, more);
        assert_eq!(mount.said.matches("3h 5m before").count(), 2, "the kit and its parent: {}", mount.said);
        assert!(mount.said.contains(&format!("{}: ", base.reference)), "{}", mount.said);
        drop(mount);
        let error = kitfs.fails(&[&["resolve", &child.reference, "--require-fresh"], more].concat());
        assert!(error.contains(&child.reference), "{error}");
    }
}

/// A kit of a layer that is read and others that are not, with the registry gone.
fn incomplete(others: usize) -> (Kitfs, Served, FaultServer) {
    let server = FaultServer::empty("team/kit");
    let mut kit = two_layers(KitBuilder::new());
    for number in 0..others {
        let (path, name) = (format!("d{number}"), format!("d{number}/x"));
        kit = kit.tar("datasets", &path, tar(&[(&name, &pattern(number as u64, 200_000))]));
    }
    let kit = kit.serve(&server, "v1");
    let kitfs = Kitfs::new();
    kitfs.ok(&["cat", &kit.reference, "w/a.bin"]);
    (kitfs, kit, server)
}

fn reads_what_is_here(mount: &Mount<'_>) {
    assert_eq!(fs::read(mount.path("w/a.bin")).expect("cached"), pattern(3, (2 << 20) + 5));
    assert_eq!(fs::read(mount.path("w/b.bin")).expect("cached"), pattern(4, 1000));
}

#[test]
fn an_incomplete_kit_serves_what_is_here_and_the_rest_fails_within_its_deadline() {
    let (kitfs, kit, server) = incomplete(1);
    drop(server);
    let options = ["--read-timeout", "2s", "--meta-timeout", "3s"];
    let mount = within(SOON, "to mount", || kitfs.mount(&kit.reference, &options));
    assert!(mount.said.contains("what 2 layers of"), "{}", mount.said);
    reads_what_is_here(&mount);
    within(SOON, "to fail", || assert_eq!(errno(&mount.path("d0/x")), Errno::TIMEDOUT));
    reads_what_is_here(&mount);
    drop(mount);

    let mount = within(AT_ONCE, "to mount offline", || kitfs.mount(&kit.reference, &["--offline"]));
    assert!(mount.said.contains("what 2 layers of") && mount.said.contains("--offline"), "{}", mount.said);
    reads_what_is_here(&mount);
    within(AT_ONCE, "to fail offline", || assert_eq!(errno(&mount.path("d0/x")), Errno::IO));
    within(AT_ONCE, "to fail offline", || assert_eq!(errno(&mount.path("docs/x.md")), Errno::IO));
    reads_what_is_here(&mount);
    let log = kitfs.logs();
    assert!(log.contains("keeps kitfs from asking"), "the log says why: {log}");
}

#[test]
fn a_mount_waits_for_a_hundred_layers_of_a_registry_that_is_gone_as_for_one() {
    let (kitfs, kit, server) = incomplete(100);
    let host = server.host();
    drop(server);
    let pinned = format!("{}@{}", kit.reference.trim_end_matches(":v1"), kit.digest);
    // The digest tells nobody that the registry is gone; the tag does.
    for reference in [&pinned, &kit.reference] {
        let mount = within(SOON, "to mount", || kitfs.mount(reference, &[]));
        assert!(mount.said.contains("what 101 layers of"), "{}", mount.said);
        assert_eq!(mount.said.matches("warning").count(), 1, "{}", mount.said);
        reads_what_is_here(&mount);
        let mount = within(AT_ONCE, "to mount offline", || kitfs.mount(reference, &["--offline"]));
        assert_eq!(mount.said.matches("warning").count(), 1, "{}", mount.said);
        reads_what_is_here(&mount);
    }
    let _nobody = Nobody::at(&host, Away::Drops);
    for reference in [&pinned, &kit.reference] {
        let mount = within(GIVEN_UP, "to mount", || kitfs.mount(reference, &[]));
        reads_what_is_here(&mount);
    }
}

#[test]
fn a_command_waits_for_a_registry_that_is_gone_once_and_not_for_each_layer() {
    let (kitfs, kit, server) = incomplete(40);
    drop(server);
    // Four layers are fetched at once: all forty-one would take half a minute.
    let deadlines = ["--read-timeout", "3s", "--meta-timeout", "3s"];
    let pinned = format!("{}@{}", kit.reference.trim_end_matches(":v1"), kit.digest);
    for (command, verdict) in [("pull", "41 of 42 layers"), ("verify", "42 of 42 layers")] {
        let error = within(SOON, command, || kitfs.fails(&[&[command, &pinned][..], &deadlines].concat()));
        assert!(error.contains(verdict), "{command}: {error}");
    }
    let told = within(SOON, "--dry-run", || kitfs.ok(&["mount", "--dry-run", &pinned]));
    assert!(told.contains("w/a.bin") && told.contains("for its names too"), "{told}");
}

#[test]
fn a_layer_that_could_not_be_asked_at_the_mount_is_read_when_its_registry_is_back() {
    let (kitfs, kit, server) = incomplete(1);
    for layer in &kit.layers[1..] {
        server.fault(layer, Fault::status(503));
    }
    let mount = kitfs.mount(&kit.reference, &[]);
    assert!(mount.said.contains("it answered 503") || mount.said.contains("answered 503"), "{}", mount.said);
    kit.layers.iter().for_each(|layer| server.heal(layer));
    assert_eq!(fs::read(mount.path("d0/x")).expect("it is back"), pattern(0, 200_000));
    assert_eq!(fs::read(mount.path("docs/x.md")).expect("it is back"), b"read me");
}

#[test]
fn a_layer_in_kits_storage_is_read_offline_though_its_index_is_not_here() {
    let server = FaultServer::empty("team/kit");
    let kit = two_layers(KitBuilder::new().indexed()).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let blobs = kitfs.path("kit/storage/blobs/sha256");
    fs::create_dir_all(&blobs).expect("mkdir");
    let manifest: Value =
        serde_json::from_slice(&server.bytes_of(&kit.digest).expect("the manifest")).expect("a manifest");
    let config: Digest = manifest["config"]["digest"].as_str().expect("a config").parse().expect("a digest");
    for digest in kit.layers.iter().chain([&kit.digest, &config]) {
        fs::write(blobs.join(digest.hex()), server.bytes_of(digest).expect("on the server")).expect("written");
    }
    let pinned = format!("{}@{}", kit.reference.trim_end_matches(":v1"), kit.digest);
    let home = kitfs.path("kit");
    let mount = kitfs.mount(&pinned, &["--offline", "--kit-home", home.to_str().expect("UTF-8")]);
    reads_what_is_here(&mount);
    assert_eq!(server.connections(), 0);
}

#[test]
fn a_real_registry_may_stop_too() {
    let registry = Registry::start();
    registry.push_layout(&data("layouts/tiny-llm"), "team/kit");
    let reference = format!("{}/team/kit:latest", registry.host());
    let kitfs = Kitfs::new();
    let tree = complete(&kitfs, &reference, &[]);
    drop(registry);
    for (options, limit) in [(&[][..], SOON), (&["--offline"], AT_ONCE)] {
        let mount = within(limit, "to mount", || kitfs.mount(&reference, options));
        assert!(mount.said.contains("took the digest it had at"), "{}", mount.said);
        assert_eq!(tree_of(&mount.dir), tree);
    }
}
