//! `kitfs diff`: which layers and files differ between two kits, and that what it says a node fetches is what one fetches.

mod support;

use serde_json::{Value, json};
use support::kit::{KitBuilder, Served, gzip, pattern, tar};
use support::kithome::import;
use support::program::Kitfs;
use support::{FaultServer, Registry, data};

const MIB: usize = 1 << 20;

fn diff(kitfs: &Kitfs, arguments: &[&str]) -> Value {
    let mut all = vec!["diff", "--json"];
    all.extend(arguments);
    serde_json::from_str(&kitfs.ok(&all)).expect("JSON")
}

/// Paths and what became of them.
fn changes(difference: &Value) -> Vec<(&str, &str)> {
    let entries = difference["files"]["entries"].as_array().expect("entries").iter();
    entries.map(|row| (row["path"].as_str().expect("a path"), row["change"].as_str().expect("a change"))).collect()
}

/// What became of the layers, and what of them is fetched.
fn layers(difference: &Value) -> Vec<(&str, &str, u64)> {
    let layers = difference["layers"].as_array().expect("layers").iter();
    let fetch = |layer: &Value| layer["fetch"].as_u64().expect("a number");
    layers
        .map(|row| (row["path"].as_str().expect("a path"), row["change"].as_str().expect("a change"), fetch(row)))
        .collect()
}

/// Two kits with a layer in common, a layer of which one file of three changed, and one that is in the first or second
/// alone. A file of the last is in the first kit too.
fn two_kits(indexed: bool) -> [KitBuilder; 2] {
    let [a, b, c, d] = [1, 2, 3, 4].map(|seed| pattern(seed, 3 * MIB));
    let kit = || if indexed { KitBuilder::new().indexed() } else { KitBuilder::new() };
    let weights = tar(&[("weights/w.bin", &pattern(9, 5 * MIB))]);
    let first = tar(&[("data/a.bin", &a), ("data/b.bin", &b), ("data/c.bin", &c)]);
    let second = tar(&[("data/a.bin", &a), ("data/b.bin", &d), ("data/c.bin", &c)]);
    let moved = tar(&[("copy/b.bin", &b), ("copy/new.bin", &pattern(5, MIB))]);
    [
        kit().tar("model", "weights", weights.clone()).tar("datasets", "data", first).tar(
            "docs",
            "old.txt",
            tar(&[("old.txt", b"old")]),
        ),
        kit().tar("model", "weights", weights).tar("datasets", "data", second).tar("code", "copy", moved),
    ]
}

/// What a node that has one kit fetches of the other's first layer: as `diff` tells it, and as a pull does it.
fn assert_fetches(server: &FaultServer, [has, wants]: [&Served; 2], fetch: u64) {
    assert_eq!(diff(&Kitfs::new(), &[&has.reference, &wants.reference])["fetch"], fetch);
    let node = Kitfs::new();
    node.ok(&["pull", &has.reference]);
    server.reset_counters();
    node.ok(&["pull", &wants.reference]);
    assert_eq!(server.bytes_for(wants.layers[0]), fetch);
}

#[test]
fn with_indexes_a_node_fetches_the_files_that_it_does_not_have_and_that_is_what_is_told() {
    let server = FaultServer::empty("team/kit");
    let [first, second] = two_kits(true);
    let (first, second) = (first.serve(&server, "v1"), second.serve(&server, "v2"));
    let told = diff(&Kitfs::new(), &[&first.reference, &second.reference]);
    assert_eq!((&told["from"]["digest"], &told["to"]["digest"]), (&json!(first.digest), &json!(second.digest)));
    let (three, one) = (3 * MIB as u64, MIB as u64);
    let expected =
        [("weights", "same", 0), ("data", "changed", three), ("copy", "added", one), ("old.txt", "removed", 0)];
    assert_eq!(layers(&told), expected);
    assert_eq!(told["fetch"], three + one);
    let expected = [
        ("Kitfile", "changed"),
        ("copy/b.bin", "added"),
        ("copy/new.bin", "added"),
        ("data/b.bin", "changed"),
        ("old.txt", "removed"),
    ];
    assert_eq!(changes(&told), expected);
    assert_eq!(told["files"]["counts"], json!({"added": 2, "removed": 1, "changed": 2, "same": 3, "unknown": 0}));
    // What was told is what happens.
    let node = Kitfs::new();
    node.ok(&["pull", &first.reference]);
    server.reset_counters();
    node.ok(&["pull", &second.reference]);
    let fetched: u64 = second.layers.iter().map(|layer| server.bytes_for(layer)).sum();
    let told = told["fetch"].as_u64().expect("a number");
    assert!((told..told + 64 * 1024).contains(&fetched), "told {told}, fetched {fetched}");
}

#[test]
fn without_indexes_a_layer_that_changed_is_fetched_whole_and_that_is_what_is_told() {
    let server = FaultServer::empty("team/kit");
    let [first, second] = two_kits(false);
    let (first, second) = (first.serve(&server, "v1"), second.serve(&server, "v2"));
    let told = diff(&Kitfs::new(), &[&first.reference, &second.reference]);
    let sizes: Vec<_> = second.layers.iter().map(|layer| server.len_of(layer).expect("a layer")).collect();
    let expected =
        [("weights", "same", 0), ("data", "changed", sizes[1]), ("copy", "added", sizes[2]), ("old.txt", "removed", 0)];
    assert_eq!(layers(&told), expected);
    // Headers tell names and sizes, and no content.
    let counts = json!({"added": 2, "removed": 1, "changed": 1, "same": 0, "unknown": 3});
    assert_eq!((&told["files"]["counts"], &told["files"]["same_layers_not_listed"]), (&counts, &json!(1)));
    let text = Kitfs::new().run(&["diff", &first.reference, &second.reference]);
    let error = String::from_utf8_lossy(&text.stderr).into_owned();
    assert!(error.contains("3 files have the same size in both") && error.contains("kitfs pull"), "{error}");

    let node = Kitfs::new();
    node.ok(&["pull", &first.reference]);
    server.reset_counters();
    node.ok(&["pull", &second.reference]);
    let fetched: u64 = second.layers.iter().map(|layer| server.bytes_for(layer)).sum();
    assert_eq!(fetched, told["fetch"].as_u64().expect("a number"));
    // Who has both knows what they hold, and another node has to fetch as much as before.
    let known = diff(&node, &[&first.reference, &second.reference]);
    let expected = [
        ("Kitfile", "changed"),
        ("copy/b.bin", "added"),
        ("copy/new.bin", "added"),
        ("data/b.bin", "changed"),
        ("old.txt", "removed"),
    ];
    assert_eq!((changes(&known), &known["fetch"]), (expected.to_vec(), &told["fetch"]));
}

#[test]
fn a_compressed_layer_is_fetched_whole_unless_nothing_of_it_is_missing() {
    let server = FaultServer::empty("team/kit");
    let (a, b) = (pattern(1, 2 * MIB), pattern(2, 2 * MIB));
    let both = tar(&[("d/a", &a), ("d/b", &b)]);
    let kit = |suffix: &str, layer: Vec<u8>| KitBuilder::new().indexed().layer("datasets", "d", suffix, layer);
    let first = kit("tar", both.clone()).serve(&server, "v1");
    let same = kit("tar+gzip", gzip(&both)).serve(&server, "v2");
    let more = kit("tar+gzip", gzip(&tar(&[("d/a", &a), ("d/c", &pattern(3, 2 * MIB))]))).serve(&server, "v3");
    for (kit, fetch) in [(&same, 0), (&more, server.len_of(&more.layers[0]).expect("a layer"))] {
        assert_fetches(&server, [&first, kit], fetch);
    }
}

#[test]
fn a_pinned_index_proves_no_layer_to_a_kit_that_does_not_name_it() {
    let server = FaultServer::empty("team/kit");
    let layer = tar(&[("d/a", &pattern(1, 2 * MIB))]);
    let plain = KitBuilder::new().tar("datasets", "d", layer.clone()).serve(&server, "plain");
    let indexed = KitBuilder::new().indexed().tar("datasets", "d", layer.clone()).serve(&server, "indexed");
    for (has, wants, fetch) in [(&plain, &indexed, 0), (&indexed, &plain, layer.len() as u64)] {
        assert_fetches(&server, [has, wants], fetch);
    }
}

#[test]
fn layers_alone_are_compared_without_asking_for_them_or_their_indexes() {
    let server = FaultServer::empty("team/kit");
    let [first, second] = two_kits(true);
    let (first, second) = (first.serve(&server, "v1"), second.serve(&server, "v2"));
    let told = diff(&Kitfs::new(), &["--layers", &first.reference, &second.reference]);
    assert_eq!(
        (&told["files"], &told["counts"]),
        (&Value::Null, &json!({"added": 1, "removed": 1, "changed": 1, "same": 1}))
    );
    // Two manifests and two configs.
    assert_eq!(server.requests().len(), 4, "{:?}", server.requests());
}

#[test]
fn the_same_difference_is_told_wherever_the_kits_are() {
    let (registry, kitfs) = (Registry::start(), Kitfs::new());
    let fixtures = ["tiny-llm", "tiny-llm-gzip", "docs-only"].map(|name| data(format!("layouts/{name}")));
    let home = kitfs.path("kithome");
    for (layout, name) in fixtures.iter().zip(["a", "b", "c"]) {
        registry.push_layout(layout, name);
        import(layout, &home, name);
    }
    let kitfs = kitfs.with("KITOPS_HOME", &home);
    let [a, b, c] = &fixtures;
    let place = |layout: &std::path::PathBuf, name: &str, tag: &str| {
        [
            format!("oci:{}:{tag}", layout.display()),
            format!("{}/{name}:{tag}", registry.host()),
            format!("{name}:{tag}"),
        ]
    };
    let (a, b, c) = (place(a, "a", "1.2.0"), place(b, "b", "1.2.0"), place(c, "c", "v1"));
    for from in &a {
        for (to, same) in b.iter().map(|to| (to, true)).chain(c.iter().map(|to| (to, false))) {
            let told = diff(&kitfs, &[from, to]);
            let counts = &told["files"]["counts"];
            assert_eq!((&counts["unknown"], counts["same"] == 20), (&json!(0), same), "{from} {to}: {told}");
            assert_eq!(told["fetch"], told["bytes"], "no layer of the one is in the other");
        }
    }
    let nothing = diff(&kitfs, &[&a[0], &a[1]]);
    assert_eq!((&nothing["fetch"], &nothing["files"]["counts"]["changed"]), (&json!(0), &json!(0)));
    assert_eq!(changes(&nothing), []);
    assert_eq!(changes(&diff(&kitfs, &["--all", &a[0], &a[1]])).len(), 20);
}

#[test]
fn an_omitted_tag_is_named_and_modes_count() {
    let server = FaultServer::empty("team/kit");
    let file = tar(&[("run.sh", b"#!/bin/sh\n")]);
    let mut executable = file.clone();
    executable[..512].copy_from_slice(&support::kit::header("run.sh", b'0', 0o755, 10));
    let first = KitBuilder::new().tar("code", "run.sh", file).serve(&server, "latest");
    let second = KitBuilder::new().tar("code", "run.sh", executable).serve(&server, "v2");
    let repository = first.reference.strip_suffix(":latest").expect("a tag");
    let kitfs = Kitfs::new();
    let output = kitfs.run(&["diff", repository, &second.reference]);
    let (text, notes) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(text.contains(&first.reference) && text.contains("(mode 0644 -> 0755)"), "{text}");
    assert!(notes.contains("took `latest`"), "{notes}");
}
