//! How often a mount has to wait for the registry before it is ready. Requests and what they wait for are counted, never
//! time.

mod support;

use kitfs::digest::Digest;
use support::kit::{KitBuilder, Served, pattern, tar};
use support::program::Kitfs;
use support::{Auth, Fault, FaultServer, Login};

/// More layers than a real kit has.
const LAYERS: usize = 100;

/// A kit of files and directories, each a layer of its own.
fn kit_of(layers: usize) -> KitBuilder {
    (0..layers).fold(KitBuilder::new(), |kit, n| {
        let content = pattern(n as u64, 20_000);
        let (path, file) = match n % 2 {
            0 => (format!("f{n:03}.bin"), format!("f{n:03}.bin")),
            _ => (format!("d{n:03}"), format!("d{n:03}/x.bin")),
        };
        kit.tar("datasets", &path, tar(&[(&file, &content)]))
    })
}

/// The digest of a kit's config.
fn config_of(server: &FaultServer, kit: &Served) -> Digest {
    let manifest = server.bytes_of(&kit.digest).expect("the manifest");
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).expect("JSON");
    manifest["config"]["digest"].as_str().and_then(|text| text.parse().ok()).expect("a digest")
}

/// Method and target of all requests, in order.
fn asked(server: &FaultServer) -> Vec<(String, String)> {
    server.requests().into_iter().map(|request| (request.method.clone(), request.target())).collect()
}

fn pair(method: &str, target: impl ToString) -> (String, String) {
    (method.to_owned(), target.to_string())
}

#[test]
fn a_cold_mount_asks_for_the_manifest_by_its_tag_then_for_the_config_and_once_for_each_layer() {
    let server = FaultServer::empty("team/kit");
    let kit = kit_of(LAYERS).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let asked = asked(&server);
    assert_eq!(asked[0], pair("GET", "v1"));
    let mut rest = asked[1..].to_vec();
    rest.sort();
    let mut expected: Vec<_> = kit.layers.iter().map(|layer| pair("GET", layer)).collect();
    expected.push(pair("GET", config_of(&server, &kit)));
    expected.sort();
    assert_eq!(rest, expected);
    // A layer's beginning fits into what a server sends before it waits for an acknowledgement.
    assert!(kit.layers.iter().all(|layer| server.bytes_for(layer) <= 12 << 10));
    assert!(server.connections() <= 1 + LAYERS, "{} connections", server.connections());
    assert_eq!(std::fs::read_dir(&mount.dir).expect("reads").count(), LAYERS + 1, "with the Kitfile");
}

#[test]
fn all_layers_are_asked_before_the_config_or_any_of_them_has_answered() {
    let server = FaultServer::empty("team/kit");
    let kit = kit_of(LAYERS).serve(&server, "v1");
    let mut gates = vec![server.hold(config_of(&server, &kit), 0)];
    gates.extend(kit.layers.iter().map(|layer| server.hold(layer, 0)));
    let kitfs = Kitfs::new();
    std::thread::scope(|scope| {
        let mounting = scope.spawn(|| kitfs.mount(&kit.reference, &[]));
        support::eventually("all requests", || gates.iter().all(|gate| gate.reached() == 1));
        drop(gates);
        drop(mounting.join().expect("a mount"));
    });
    assert_eq!(server.requests().len(), LAYERS + 2);
}

#[test]
fn of_a_pinned_kit_the_heads_of_the_indexes_are_asked_for_at_once_and_nothing_of_a_layer() {
    let server = FaultServer::empty("team/kit");
    let kit = kit_of(LAYERS).indexed().serve(&server, "v1");
    let mut gates = vec![server.hold(config_of(&server, &kit), 0)];
    gates.extend(kit.indexes.iter().map(|pin| server.hold(pin.digest, 0)));
    let kitfs = Kitfs::new();
    std::thread::scope(|scope| {
        let mounting = scope.spawn(|| kitfs.mount(&kit.reference, &[]));
        support::eventually("all requests", || gates.iter().all(|gate| gate.reached() == 1));
        drop(gates);
        let mount = mounting.join().expect("a mount");
        assert_eq!(mount.trust_of("f000.bin"), "pinned");
    });
    assert_eq!(server.requests().len(), LAYERS + 2);
    assert!(kit.layers.iter().all(|layer| server.requests_for(layer) == 0));
}

#[test]
fn more_layers_than_are_asked_at_once_are_asked_too() {
    let server = FaultServer::empty("team/kit");
    let kit = kit_of(300).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    assert_eq!(std::fs::read_dir(&mount.dir).expect("reads").count(), 301);
    assert!(kit.layers.iter().all(|layer| server.requests_for(layer) == 1));
    // As many as are begun early, as many while those are waited for, and the first of all.
    assert!(server.connections() <= 1 + 2 * 128, "{} connections", server.connections());
}

#[test]
fn the_second_mount_of_a_tag_whose_layers_are_known_asks_for_the_tag_alone_and_one_by_digest_for_nothing() {
    let server = FaultServer::empty("team/kit");
    let kit = kit_of(4).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    support::program::tree_of(&mount.dir);
    support::eventually("the commits", || kitfs.cached_files("indexes").len() == 4);
    drop(mount);
    server.reset_counters();
    drop(kitfs.mount(&kit.reference, &[]));
    assert_eq!(asked(&server), [pair("HEAD", "v1")]);
    server.reset_counters();
    let pinned = format!("{}@{}", kit.reference.trim_end_matches(":v1"), kit.digest);
    drop(kitfs.mount(&pinned, &[]));
    assert_eq!(asked(&server), []);
}

#[test]
fn a_tag_that_moved_costs_one_request_more_than_one_that_did_not() {
    let server = FaultServer::empty("team/kit");
    let first = kit_of(1).serve(&server, "v1");
    let kitfs = Kitfs::new();
    drop(kitfs.mount(&first.reference, &[]));
    let second = kit_of(2).serve(&server, "v1");
    server.reset_counters();
    let mount = kitfs.mount(&second.reference, &[]);
    assert!(mount.said.contains(&second.digest.to_string()), "{}", mount.said);
    assert_eq!(asked(&server)[..2], [pair("HEAD", "v1"), pair("GET", second.digest)]);
}

#[test]
fn what_a_filter_may_leave_out_is_not_asked_for() {
    let server = FaultServer::empty("team/kit");
    let (docs, model) = (tar(&[("README.md", b"read me")]), tar(&[("w/a.bin", b"weights")]));
    let build = || KitBuilder::new().tar("docs", "README.md", docs.clone()).tar("model", "w", model.clone());
    let kit = build().serve(&server, "v1");
    for filter in ["model", "model:m", "model:w"] {
        server.reset_counters();
        let kitfs = Kitfs::new();
        let mount = kitfs.mount(&kit.reference, &["--filter", filter]);
        assert_eq!(std::fs::read_dir(&mount.dir).expect("reads").count(), 1);
        assert_eq!((server.requests_for(kit.layers[0]), server.requests_for(kit.layers[1])), (0, 1), "{filter}");
    }
    let attested = build().attested().serve(&server, "v2");
    server.reset_counters();
    let referrer = attested.referrer.expect("a referrer").to_string();
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&attested.reference, &["--index-digest", &referrer]);
    assert_eq!(mount.trust_of("README.md"), "attested");
    assert!(attested.layers.iter().all(|layer| server.requests_for(layer) == 0), "the indexes list them");
}

#[test]
fn what_was_asked_for_early_and_is_of_no_use_holds_nobody() {
    let server = FaultServer::empty("team/kit");
    let kit = KitBuilder::new()
        .tar("docs", "README.md", tar(&[("README.md", b"read me")]))
        .tar("code", ".", tar(&[("src/a.py", b"a")]))
        .serve(&server, "v1");
    let gate = server.hold(kit.layers[1], 0);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    assert_eq!(gate.reached(), 1, "the config was not there yet, which says that its root is the kit's");
    gate.release();
    assert_eq!(std::fs::read(mount.path("src/a.py")).expect("reads"), b"a");
}

#[test]
fn a_first_read_that_fails_is_made_again() {
    let server = FaultServer::empty("team/kit");
    let kit = kit_of(6).serve(&server, "v1");
    server.fault_times(1, kit.layers[0], Fault::status(503));
    server.fault_times(1, kit.layers[1], Fault::Reset { after: 100 });
    server.fault_times(1, kit.layers[2], Fault::Truncate { after: 0 });
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    for layer in [0, 2, 4] {
        let content = std::fs::read(mount.path(&format!("f{layer:03}.bin"))).expect("reads");
        assert!(content == pattern(layer, 20_000), "layer {layer}");
    }
    assert!(std::fs::metadata(mount.path("d001")).expect("a directory").is_dir());
}

#[test]
fn a_root_below_more_parents_than_the_first_read_holds_is_found_by_a_second() {
    let server = FaultServer::empty("team/kit");
    let root = "p/".repeat(40) + "x.bin";
    let kit = KitBuilder::new().tar("model", &root, tar(&[(&root, &[7; 100_000])])).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    assert_eq!(server.ranges_for(kit.layers[0]), [(0, (12 << 10) - 1), (0, (64 << 10) - 1)]);
    assert_eq!(std::fs::metadata(mount.path(&root)).expect("a file").len(), 100_000);
    assert_eq!(server.requests_for(kit.layers[0]), 2, "the second told");
}

#[test]
fn a_manifest_that_is_damaged_on_its_way_is_asked_for_by_its_digest() {
    let server = FaultServer::empty("team/kit");
    let kit = kit_of(1).serve(&server, "v1");
    server.fault("v1", Fault::FlipBit { offset: 20 });
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    assert!(mount.said.contains(&kit.digest.to_string()), "{}", mount.said);
    assert_eq!(server.requests_for(kit.digest), 1);
}

#[test]
fn one_token_is_asked_for_whatever_the_number_of_layers() {
    let server = FaultServer::empty("team/kit");
    let kit = kit_of(LAYERS).serve(&server, "v1");
    server.set_auth(Auth::Bearer { realm: None, login: Login::Anyone, expires_in: 3600 });
    let kitfs = Kitfs::new();
    drop(kitfs.mount(&kit.reference, &[]));
    assert_eq!(server.requests_for("token"), 1);
    assert_eq!(server.requests().len(), LAYERS + 2 + 2, "the refusal and the token beside the others");
}

#[test]
fn a_parent_is_asked_over_the_connection_of_its_child() {
    let server = FaultServer::empty("team/kit");
    let raw = |seed| pattern(seed, 1000);
    let parent = KitBuilder::new().layer("model", "w.bin", "raw", raw(1)).serve(&server, "base");
    let mut chain = vec![parent.reference];
    for n in 0..8 {
        let name = format!("child{n}");
        let docs = format!("{name}.md");
        let child = KitBuilder::new().parent(chain.last().expect("a parent")).layer("docs", &docs, "raw", raw(n + 2));
        chain.push(child.serve(&server, &name).reference);
    }
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(chain.last().expect("the last"), &[]);
    assert!(mount.path("w.bin").exists() && mount.path("child7.md").exists());
    assert_eq!(server.requests().len(), 2 * chain.len(), "a manifest and a config each");
    // The one that was used last may not be back yet when the next is wanted.
    assert!(server.connections() <= 3, "{} connections", server.connections());
}
