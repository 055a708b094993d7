//! Indexes that a kit or a referrer names: which are used, which are not, and what is said.

mod support;

use std::sync::Arc;
use std::time::Duration;

use kitfs::cache::Cache;
use kitfs::digest::Digest;
use kitfs::fetch::transfer::Persistence;
use kitfs::fetch::{Access, BadIndex, Context, FetchError, Limits, Named, Request, Resolved, Verify};
use kitfs::object::ChunkList;
use kitfs::source::Connection;
use serde_json::Value;
use support::index::{attest, index_of};
use support::kit::{KitBuilder, Served, gzip, header, pattern, tar};
use support::program::Kitfs;
use support::{Content, Fault, FaultServer};

const MIB: usize = 1 << 20;

/// A kit of one layer with a file of three chunks and one of one.
fn builder() -> KitBuilder {
    KitBuilder::new().tar("model", "w", tar(&[("w/big", &pattern(1, 2 * MIB + 7)), ("w/small", b"small")]))
}

/// The rows of `kitfs inspect`.
fn inspect(kitfs: &Kitfs, reference: &str, options: &[&str]) -> Value {
    let mut arguments = vec!["inspect", "--json", reference];
    arguments.extend(options);
    serde_json::from_str(&kitfs.ok(&arguments)).expect("JSON")
}

fn trust(kit: &Value) -> Vec<&str> {
    let entries = kit["entries"].as_array().expect("entries");
    entries.iter().map(|entry| entry["trust"].as_str().expect("a tier")).collect()
}

fn warnings(kit: &Value) -> String {
    kit["warnings"].to_string()
}

/// A user of the library: what `kitfs` is to others.
struct User {
    _home: tempfile::TempDir,
    context: Context,
    access: Access,
}

impl User {
    fn new() -> Self {
        let home = tempfile::tempdir().expect("temporary directory");
        let cache = Arc::new(Cache::open(&home.path().join("cache")).expect("a cache"));
        let limits = Limits { read_timeout: Duration::from_secs(3), ..Limits::default() };
        let context = Context::new(cache, limits, Verify::Strict);
        let access =
            Access { connection: Connection::default(), kit_home: home.path().join("kit"), require_fresh: false };
        Self { _home: home, context, access }
    }

    async fn resolve(&self, kit: &Served) -> Resolved {
        let request = Request::new(kit.reference.parse().expect("a reference"));
        kitfs::fetch::resolve(&self.context, &self.access, &request).await.expect("resolved")
    }

    async fn head(&self, kit: &Resolved) -> Result<kitfs::archive::index::Head, FetchError> {
        named(kit).head(&kit.plan.layers[0], &self.context, &kit.origins[0].sources, Persistence::UntilDeadline).await
    }

    async fn list(&self, kit: &Resolved, path: &[u8]) -> Result<ChunkList<bytes::Bytes>, FetchError> {
        let head = self.head(kit).await?;
        let row = head.find(path).expect("the file");
        named(kit).list(&head, row, &self.context, &kit.origins[0].sources).await
    }
}

fn named(kit: &Resolved) -> Named {
    kit.named[0].expect("an index is named")
}

/// What is wrong with an index, by the name of its kind.
fn cause(error: FetchError) -> &'static str {
    match error {
        FetchError::Index { cause, .. } => match *cause {
            BadIndex::Missing(_) => "missing",
            BadIndex::Unfit(_) => "unfit",
            BadIndex::False(_) => "false",
            BadIndex::Invalid(_) => "invalid",
            BadIndex::List(_) => "list",
            BadIndex::OtherLayer { .. } => "other layer",
            BadIndex::Length { .. } => "length",
            BadIndex::TooLong { .. } => "too long",
            BadIndex::Unreadable(_) => "unreadable",
            BadIndex::NotKept(_) => "not kept",
        },
        error if error.is_unreachable() => "unreachable",
        _ => "other",
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_is_fetched_alone_and_once_and_a_list_by_its_range() {
    let server = FaultServer::empty("team/kit");
    let kit = builder().indexed().serve(&server, "v1");
    let pin = kit.indexes[0];
    let user = User::new();
    let resolved = user.resolve(&kit).await;
    assert_eq!(named(&resolved).pin, pin);
    let head = user.head(&resolved).await.expect("a head");
    assert_eq!(head.len(), 3);
    let list = user.list(&resolved, b"w/big").await.expect("a list");
    assert_eq!((list.size(), list.len()), (2 * MIB as u64 + 7, 3));
    assert_eq!(list.digest(0), Some(Digest::of(&pattern(1, 2 * MIB + 7)[..MIB])));
    let small = user.list(&resolved, b"w/small").await.expect("a list");
    assert_eq!(small.digest(0), Some(Digest::of(b"small")));
    let asked = [(0, pin.head_size - 1), (pin.head_size, pin.size - 1)];
    assert_eq!(server.ranges_for(pin.digest), asked, "the head and one list, each once");
    assert_eq!(server.requests_for(kit.layers[0]), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_of_an_index_is_kept_and_serves_head_and_lists() {
    let server = FaultServer::empty("team/kit");
    let kit = builder().indexed().serve(&server, "v1");
    let user = User::new();
    let resolved = user.resolve(&kit).await;
    let (named, layer) = (named(&resolved), &resolved.plan.layers[0]);
    let whole = named.whole(layer, &user.context, &resolved.origins[0].sources);
    assert_eq!(whole.await.expect("an index").pin(), kit.indexes[0]);
    server.remove(&kit.indexes[0].digest);
    user.list(&resolved, b"w/big").await.expect("from the cache");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_ranges_sends_all_of_the_index_once() {
    let server = FaultServer::empty("team/kit");
    let kit = builder().indexed().serve(&server, "v1");
    let index = kit.indexes[0].digest;
    server.fault(index, Fault::IgnoreRange);
    let user = User::new();
    let resolved = user.resolve(&kit).await;
    user.list(&resolved, b"w/big").await.expect("a list");
    let before = server.requests_for(index);
    user.list(&resolved, b"w/big").await.expect("a list");
    assert_eq!(server.requests_for(index), before, "the second time nothing is asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_of_many_megabytes_goes_through_the_disk() {
    // 60,000 entries of 76 bytes and their names.
    let mut layer = Vec::new();
    for number in 0..60_000 {
        layer.extend(header(&format!("w/{number:06}"), b'0', 0o644, 0));
    }
    layer.extend([0; 1024]);
    let server = FaultServer::empty("team/kit");
    let kit = KitBuilder::new().tar("model", "w", layer).indexed().serve(&server, "v1");
    assert!(kit.indexes[0].head_size > 4 << 20);
    let user = User::new();
    let resolved = user.resolve(&kit).await;
    let incoming = user.context.cache.root().join("incoming");
    let left = || std::fs::read_dir(&incoming).expect("a directory").count();

    let flip = Fault::FlipBit { offset: kit.indexes[0].head_size - 1 };
    server.fault(kit.indexes[0].digest, flip);
    assert_eq!(cause(user.head(&resolved).await.expect_err("false")), "false");
    assert_eq!(left(), 0, "nothing false is left on the disk");
    server.heal(kit.indexes[0].digest);
    assert_eq!(user.head(&resolved).await.expect("a head").len(), 60_000);
    assert_eq!(left(), 0);
    server.remove(&kit.indexes[0].digest);
    assert_eq!(user.head(&resolved).await.expect("from the cache").len(), 60_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_is_not_to_be_used_says_why_and_nothing_of_it_is_kept() {
    let server = FaultServer::empty("team/kit");
    let kit = builder().indexed().serve(&server, "v1");
    let pin = kit.indexes[0];
    let user = User::new();
    let resolved = user.resolve(&kit).await;
    let head_of = async |fault: Option<Fault>| {
        if let Some(fault) = fault {
            server.fault(pin.digest, fault);
        }
        let error = user.head(&resolved).await.expect_err("refused");
        let text = kitfs::report::chain(&error);
        assert!(text.contains(&pin.digest.to_string()) && text.contains(&kit.layers[0].to_string()), "{text}");
        server.heal(pin.digest);
        cause(error)
    };
    assert_eq!(head_of(Some(Fault::FlipBit { offset: 200 })).await, "false");
    assert_eq!(head_of(Some(Fault::status(403))).await, "other");
    let bytes = server.bytes_of(&pin.digest).expect("the index");
    server.remove(&pin.digest);
    assert_eq!(head_of(None).await, "missing");
    server.add_blob(bytes);
    // The last one, as who was given up is not asked again for a moment.
    assert_eq!(head_of(Some(Fault::status(503))).await, "unreachable");
    let asked_again = async {
        while user.head(&resolved).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), asked_again).await.expect("now it is right");
    // The list is the last part.
    server.fault(pin.digest, Fault::FlipBit { offset: pin.size - 1 });
    assert_eq!(cause(user.list(&resolved, b"w/big").await.expect_err("false")), "list");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_of_another_layer_or_length_or_of_no_layer_is_refused() {
    let server = FaultServer::empty("team/kit");
    let kit = builder().indexed().serve(&server, "v1");
    let user = User::new();
    let resolved = user.resolve(&kit).await;
    let head_by = async |pin| {
        let (layer, sources) = (&resolved.plan.layers[0], &resolved.origins[0].sources);
        let named = Named { pin, ..named(&resolved) };
        cause(named.head(layer, &user.context, sources, Persistence::UntilDeadline).await.expect_err("refused"))
    };
    let other = index_of(&Content::Bytes(tar(&[("w/big", b"other")])), "tar");
    server.add_blob(other.as_bytes());
    assert_eq!(head_by(other.pin()).await, "other layer");

    // What a hostile manifest could say: a head that is right, of an index that is too long.
    let mut longer = server.bytes_of(&kit.indexes[0].digest).expect("the index");
    longer.extend([0; 32]);
    let pin = kit.indexes[0];
    let pin = kitfs::archive::index::annotations::Pin {
        digest: server.add_blob(longer.clone()),
        size: longer.len() as u64,
        ..pin
    };
    assert_eq!(head_by(pin).await, "length");

    let noise = pattern(9, 500);
    let digest = server.add_blob(noise.clone());
    let pin = kitfs::archive::index::annotations::Pin { digest, size: 500, head_digest: digest, head_size: 500 };
    assert_eq!(head_by(pin).await, "invalid");
}

#[test]
fn inspect_shows_a_pinned_index_and_its_chunks() {
    let server = FaultServer::empty("team/kit");
    let kit = builder()
        .layer("code", "c", "tar+gzip", gzip(&tar(&[("c/x", b"x")])))
        .layer("docs", "README", "raw", b"read me".to_vec())
        .indexed()
        .serve(&server, "v1");
    let kitfs = Kitfs::new();
    let shown = inspect(&kitfs, &kit.reference, &[]);
    assert_eq!(trust(&shown), ["pinned"; 3]);
    for (entry, pin) in shown["entries"].as_array().expect("entries").iter().zip(&kit.indexes) {
        assert_eq!(entry["index"]["digest"], pin.digest.to_string());
        assert_eq!(entry["index"]["size"], pin.size);
        assert_eq!(entry["index"]["chunk_size"], MIB);
    }
    let text = kitfs.ok(&["inspect", &kit.reference]);
    let size = kitfs::units::format_size(kit.indexes[0].size);
    let line = format!("{}: index {}, {size}, chunks of 1.0 MiB", kit.layers[0], kit.indexes[0].digest);
    assert!(text.contains(&line), "expected {line} in {text}");
    assert!(!text.contains("dev.kitfs.index"), "said twice: {text}");
    let ignored = inspect(&kitfs, &kit.reference, &["--trust=layer"]);
    assert_eq!(trust(&ignored), ["provisional"; 3]);
    assert_eq!(ignored["entries"][0]["index"], Value::Null);
}

#[test]
fn inspect_marks_an_index_that_is_not_usable() {
    let server = FaultServer::empty("team/kit");
    let kit = builder().indexed().serve(&server, "v1");
    server.remove(&kit.indexes[0].digest);
    let kitfs = Kitfs::new();
    let shown = inspect(&kitfs, &kit.reference, &[]);
    assert_eq!(trust(&shown), ["provisional"]);
    assert_eq!(shown["entries"][0]["index"]["usable"], false);
    assert!(warnings(&shown).contains("is not used"), "{shown}");
    let text = kitfs.ok(&["inspect", &kit.reference]);
    assert!(text.contains("NOT USABLE"), "{text}");
}

#[test]
fn inspect_shows_a_kit_whose_indexes_are_out_of_reach() {
    let server = FaultServer::empty("team/kit");
    let kit = builder().tar("docs", "d", tar(&[("d/x", b"x")])).indexed().serve(&server, "v1");
    server.fault(kit.indexes[0].digest, Fault::status(503));
    let kitfs = Kitfs::new();
    let output = kitfs.run(&["inspect", "--json", "--read-timeout", "1s", &kit.reference]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let shown: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let index = kit.indexes[0].digest.to_string();
    assert!(warnings(&shown).contains(&index) && said.contains(&format!("warning: index {index}")), "{shown} {said}");
    for (entry, pin) in shown["entries"].as_array().expect("entries").iter().zip(&kit.indexes) {
        assert_eq!(entry["index"]["digest"], pin.digest.to_string(), "what the manifest says");
    }
    let usable = |at: usize| &shown["entries"][at]["index"]["usable"];
    assert_eq!((usable(0), usable(1)), (&Value::Null, &Value::Bool(true)));
}

#[test]
fn half_a_pin_is_a_warning() {
    let server = FaultServer::empty("team/kit");
    let kit = builder().indexed().serve(&server, "v1");
    let mut manifest: Value = serde_json::from_slice(&server.bytes_of(&kit.digest).expect("manifest")).expect("JSON");
    let annotations = manifest["layers"][0]["annotations"].as_object_mut().expect("annotations");
    annotations.remove("dev.kitfs.index.head");
    server.add_manifest("half", manifest.to_string());
    let shown = inspect(&Kitfs::new(), &server.reference("half"), &[]);
    assert_eq!(trust(&shown), ["provisional"]);
    assert!(warnings(&shown).contains("annotation dev.kitfs.index.head is missing"), "{shown}");
}

#[test]
fn an_attested_index_is_ignored_until_its_referrer_is_trusted() {
    let server = FaultServer::empty("team/kit");
    let kit = builder().attested().serve(&server, "v1");
    let referrer = kit.referrer.expect("a referrer");
    let kitfs = Kitfs::new();
    let shown = inspect(&kitfs, &kit.reference, &[]);
    assert_eq!((trust(&shown), warnings(&shown).as_str()), (vec!["provisional"], "[]"));
    let shown = inspect(&kitfs, &kit.reference, &["--index-digest", &referrer.to_string()]);
    assert_eq!((trust(&shown), warnings(&shown).as_str()), (vec!["attested"], "[]"));
    assert_eq!(shown["entries"][0]["index"]["digest"], kit.indexes[0].digest.to_string());
    // A word for the layer alone against one for an index.
    let both = kitfs.run(&["inspect", &kit.reference, "--trust=layer", "--index-digest", &referrer.to_string()]);
    assert_eq!(both.status.code(), Some(2));
}

#[test]
fn a_pin_goes_before_a_referrer() {
    let server = FaultServer::empty("team/kit");
    let kit = builder().indexed().serve(&server, "v1");
    let referrer = attest(&server, &kit.digest, &[(kit.layers[0], kit.indexes[0])]);
    let shown = inspect(&Kitfs::new(), &kit.reference, &["--index-digest", &referrer.to_string()]);
    assert_eq!(trust(&shown), ["pinned"]);
}

#[test]
fn a_digest_that_is_no_referrer_of_this_kit_is_an_error_and_nothing_is_mounted() {
    let server = FaultServer::empty("team/kit");
    let kit = builder().attested().serve(&server, "v1");
    let other = KitBuilder::new().tar("docs", "README", tar(&[("README", b"x")])).attested().serve(&server, "other");
    let kitfs = Kitfs::new();
    let fails = |digest: Digest, why: &str| {
        let dir = kitfs.path("mnt");
        let digest = digest.to_string();
        let error = kitfs.fails(&["mount", &kit.reference, dir.to_str().expect("UTF-8"), "--index-digest", &digest]);
        assert!(error.contains(why) && error.contains(&digest), "expected {why:?} in {error}");
        assert!(!dir.exists());
    };
    fails(other.referrer.expect("a referrer"), &format!("it is about {}", other.digest));
    fails(kit.digest, "it has no subject");
    let sbom = serde_json::json!({
        "schemaVersion": 2, "artifactType": "application/spdx+json", "layers": [],
        "subject": {"digest": kit.digest, "size": 1},
    });
    fails(server.add_blob(sbom.to_string()), "its artifactType is \"application/spdx+json\"");
    let known = server.bytes_of(&kit.referrer.expect("a referrer")).expect("its bytes");
    let text = String::from_utf8(known).expect("JSON");
    fails(
        server.add_blob(text.replace("dev.kitfs.index.layer", "dev.kitfs.index.lair")),
        "dev.kitfs.index.layer is missing",
    );
    let mut foreign: Value = serde_json::from_str(&text).expect("JSON");
    foreign["layers"][0]["mediaType"] = "text/plain".into();
    fails(server.add_blob(foreign.to_string()), "of type \"text/plain\"");
}

#[test]
fn a_referrer_that_is_not_to_be_had_is_a_warning() {
    let server = FaultServer::empty("team/kit");
    let kit = builder().attested().serve(&server, "v1");
    let referrer = kit.referrer.expect("a referrer");
    for fault in [Fault::status(404), Fault::status(503), Fault::FlipBit { offset: 20 }] {
        server.fault(referrer, fault.clone());
        let shown = inspect(&Kitfs::new(), &kit.reference, &["--index-digest", &referrer.to_string()]);
        assert_eq!(trust(&shown), ["provisional"], "{fault:?}");
        let said = warnings(&shown);
        assert!(said.contains(&format!("the trusted index {referrer} is not used: ")), "{said}");
        server.heal(referrer);
    }
}

#[test]
fn an_index_pinned_by_one_kit_is_not_used_for_another_that_shares_the_layer() {
    let server = FaultServer::empty("team/kit");
    let pinned = builder().indexed().serve(&server, "pinned");
    let plain = builder().serve(&server, "plain");
    assert_eq!(pinned.layers, plain.layers);
    let kitfs = Kitfs::new();
    assert_eq!(trust(&inspect(&kitfs, &pinned.reference, &[])), ["pinned"]);
    assert_eq!(trust(&inspect(&kitfs, &plain.reference, &[])), ["provisional"]);
    // Nor where one is the parent of the other: each layer goes by the manifest that it stands in.
    let child = KitBuilder::new()
        .tar("docs", "README", tar(&[("README", b"x")]))
        .parent(&pinned.reference)
        .serve(&server, "child");
    assert_eq!(trust(&inspect(&kitfs, &child.reference, &[])), ["pinned", "provisional"]);
    // And a referrer of the parent attests nothing of the child.
    let docs = index_of(&Content::Bytes(tar(&[("README", b"x")])), "tar");
    let referrer = attest(&server, &pinned.digest, &[(child.layers[0], docs.pin())]);
    let shown = inspect(&kitfs, &child.reference, &["--index-digest", &referrer.to_string()]);
    assert_eq!(trust(&shown), ["pinned", "provisional"]);
}

#[test]
fn settings_are_read_from_the_file_and_the_variables() {
    let server = FaultServer::empty("team/kit");
    let kit = builder().indexed().serve(&server, "v1");
    let file = tempfile::NamedTempFile::new().expect("a file");
    let with = |text: &str| {
        std::fs::write(file.path(), text).expect("written");
        Kitfs::new().with("KITFS_CONFIG", file.path())
    };
    assert_eq!(trust(&inspect(&with("trust = \"layer\""), &kit.reference, &[])), ["provisional"]);
    assert_eq!(trust(&inspect(&with("trust = \"layer\""), &kit.reference, &["--trust=index"])), ["pinned"]);
    let variable = Kitfs::new().with("KITFS_TRUST", "layer");
    assert_eq!(trust(&inspect(&variable, &kit.reference, &[])), ["provisional"]);
    for kitfs in [
        with("[trust]\nindex = [\"r.io/team/*\", \"r.io/team/\"]"),
        Kitfs::new().with("KITFS_TRUST_INDEX", "r.io/team/*,r.io/team/"),
    ] {
        let error = kitfs.fails(&["inspect", &kit.reference]);
        assert!(error.contains("\"r.io/team/\" is not a pattern of repositories"), "{error}");
        assert!(error.contains("(from "), "{error}");
    }
}

#[test]
fn every_fixture_can_be_indexed_by_the_helper_of_these_tests() {
    let mut indexed = 0;
    for dir in support::layouts() {
        let read = |digest: &str| {
            let hex = digest.strip_prefix("sha256:").expect("a digest");
            std::fs::read(dir.join("blobs/sha256").join(hex)).expect("a blob")
        };
        let index: Value = serde_json::from_slice(&std::fs::read(dir.join("index.json")).expect("read")).expect("JSON");
        for manifest in index["manifests"].as_array().expect("manifests") {
            let manifest: Value =
                serde_json::from_slice(&read(manifest["digest"].as_str().expect("digest"))).expect("JSON");
            for layer in manifest["layers"].as_array().into_iter().flatten() {
                let media_type = layer["mediaType"].as_str().expect("a media type");
                let Some((_, suffix @ ("tar" | "raw" | "tar+gzip" | "tar+zstd" | "raw+gzip" | "raw+zstd"))) =
                    media_type.split_once(".v1.")
                else {
                    continue;
                };
                let digest = layer["digest"].as_str().expect("digest");
                let index = index_of(&Content::Bytes(read(digest)), suffix);
                assert_eq!(index.head().layer().digest.to_string(), digest);
                indexed += 1;
            }
        }
    }
    assert!(indexed > 20, "only {indexed} layers among the fixtures");
}

#[test]
fn a_rule_covers_repositories_by_flag_variable_and_file() {
    let server = FaultServer::empty("team/kit");
    let kit = builder().attested().serve(&server, "v1");
    let (covers, other) = (format!("{}/team/*", server.host()), format!("{}/other/*", server.host()));
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), format!("[trust]\nindex = [\"{other}\", \"{covers}\"]")).expect("written");
    let attested = |kitfs: Kitfs, options: &[&str]| trust(&inspect(&kitfs, &kit.reference, options)) == ["attested"];
    assert!(attested(Kitfs::new(), &["--trust-index", &other, "--trust-index", &covers]));
    assert!(attested(Kitfs::new().with("KITFS_TRUST_INDEX", format!("{other},{covers}")), &[]));
    assert!(attested(Kitfs::new().with("KITFS_CONFIG", file.path()), &[]));
    assert!(!attested(Kitfs::new(), &["--trust-index", &other]));
    assert!(!attested(Kitfs::new().with("KITFS_CONFIG", file.path()), &["--trust-index", &other]));
    assert!(!attested(Kitfs::new().with("KITFS_CONFIG", file.path()), &["--trust=layer"]));
}

#[test]
fn a_rule_leads_where_it_led_before_while_the_registry_is_away() {
    let server = FaultServer::empty("team/kit");
    let kit = builder().attested().serve(&server, "v1");
    let rule = format!("{}/team/*", server.host());
    let kitfs = Kitfs::new();
    assert_eq!(trust(&inspect(&kitfs, &kit.reference, &["--trust-index", &rule])), ["attested"]);
    drop(server);
    let shown = inspect(&kitfs, &kit.reference, &["--trust-index", &rule, "--meta-timeout", "2s"]);
    assert_eq!(trust(&shown), ["attested"], "{shown}");
}
