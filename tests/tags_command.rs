//! `kitfs tags` and `kitfs inspect --tags`: what a repository's tags are and point at, in a registry, a layout and kit's
//! storage; and what `inspect` tells of an image index.

mod support;

use kitfs::digest::Digest;
use serde_json::{Value, json};
use support::kit::{KitBuilder, tar};
use support::kithome::import;
use support::program::Kitfs;
use support::{Fault, FaultServer, Registry, RegistryOptions, data};

/// The digest of the tiny-llm fixture's manifest, and of the two image indexes that lead to it.
const TINY: &str = "sha256:0f4b22aefbde7a60a25b5d22ef4090dde0aa0e7622142cbcdc7165537b4602b4";
const ONE: &str = "sha256:1296efa2d22fc252a3e3ce4f2dc035cd7fa629313c305c2ba5af44df09c45b22";
const TWO: &str = "sha256:c38355a4cee1f60c60cc2dc671c25a1961702eb20821f6afb732082b4d8eaa33";
const DOCS: &str = "sha256:a5a0c828baee27e45c1d80a83d2ef4c638f16359b9af8cb47001d5575e786b4e";

fn as_json(kitfs: &Kitfs, arguments: &[&str]) -> Value {
    serde_json::from_str(&kitfs.ok(arguments)).expect("JSON")
}

/// A fixture in a registry, in a layout and in kit's storage: their repositories.
struct Everywhere {
    registry: Registry,
    kitfs: Kitfs,
    repositories: [String; 3],
}

fn everywhere(fixture: &str) -> Everywhere {
    let layout = data(format!("layouts/{fixture}"));
    let (registry, kitfs) = (Registry::start(), Kitfs::new());
    registry.push_layout(&layout, "team/kit");
    import(&layout, &kitfs.path("kithome"), "kit");
    let repositories = [format!("{}/team/kit", registry.host()), format!("oci:{}", layout.display()), "kit".to_owned()];
    let home = kitfs.path("kithome");
    Everywhere { registry, kitfs: kitfs.with("KITOPS_HOME", home), repositories }
}

/// A kit with this creation date, or with none, under a tag.
fn dated(server: &FaultServer, tag: &str, created: Option<&str>) -> Digest {
    let config = format!(r#"{{"manifestVersion":"1.0.0","package":{{"name":"{tag}"}}}}"#);
    let blob = server.add_blob(config.clone());
    let annotations = created.map(|created| json!({ "org.opencontainers.image.created": created }));
    let manifest = json!({
        "schemaVersion": 2,
        "config": { "mediaType": "application/vnd.kitops.modelkit.config.v1+json", "digest": blob, "size": config.len() },
        "layers": [],
        "annotations": annotations.unwrap_or_else(|| json!({})),
    });
    server.add_manifest(tag, manifest.to_string())
}

#[test]
fn the_same_tags_are_listed_in_the_same_order_wherever_they_are() {
    let Everywhere { registry: _registry, kitfs, repositories } = everywhere("tiny-llm");
    for repository in &repositories {
        assert_eq!(kitfs.ok(&["tags", repository]), "latest\nproduction\n1.2\n1.2.0\n", "{repository}");
        assert_eq!(kitfs.ok(&["list", repository, "--match", "1.*", "--match", "l*"]), "latest\n1.2\n1.2.0\n");
        let pointing = as_json(&kitfs, &["tags", repository, "--json", "--digest", TINY, "--match", "1.2.*"]);
        assert_eq!(pointing["tags"], json!([{ "tag": "1.2.0", "digest": TINY }]));
        assert_eq!(kitfs.ok(&["tags", repository, "--digest", DOCS]), "");
        let long = as_json(&kitfs, &["tags", repository, "--json", "--long"]);
        assert_eq!(long["repository"], *repository);
        let group = json!([{
            "digest": TINY, "kind": "kit", "created": null, "tags": ["latest", "production", "1.2", "1.2.0"],
        }]);
        assert_eq!(long["digests"], group);
        let text = kitfs.ok(&["tags", repository, "--long"]);
        assert!(text.contains(&format!("{TINY}  kit   -        latest, production, 1.2, 1.2.0\n")), "{text}");
    }
}

#[test]
fn tags_are_grouped_by_digest_with_kind_and_date_the_highest_version_last() {
    let server = FaultServer::empty("team/kit");
    let old = dated(&server, "1.9.0", Some("2026-01-02T03:04:05Z"));
    let new = dated(&server, "1.10.0", None);
    server.tag("production", old);
    server.tag("latest", new);
    let image = server.add_manifest(
        "image",
        r#"{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}"#,
    );
    let kitfs = Kitfs::new();
    let repository = format!("{}/team/kit", server.host());
    let long = as_json(&kitfs, &["tags", "--long", "--json", &repository]);
    let expected = json!([
        { "digest": image, "kind": "other", "created": null, "tags": ["image"] },
        { "digest": old, "kind": "kit", "created": "2026-01-02T03:04:05Z", "tags": ["production", "1.9.0"] },
        { "digest": new, "kind": "kit", "created": null, "tags": ["latest", "1.10.0"] },
    ]);
    assert_eq!(long["digests"], expected);
    // What the digests stand for is known from now on; what the tags are is asked again.
    server.reset_counters();
    kitfs.ok(&["tags", "--long", &repository]);
    let asked: Vec<_> = server.requests().into_iter().map(|request| request.method).collect();
    assert_eq!(asked.iter().filter(|method| *method == "HEAD").count(), 5);
    assert_eq!(asked.len(), 6, "a list and a question a tag: {asked:?}");
}

#[test]
fn names_alone_are_one_question() {
    let server = FaultServer::from_layout(data("layouts/tiny-llm"), "team/kit");
    Kitfs::new().ok(&["tags", &format!("{}/team/kit", server.host())]);
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn a_tag_that_goes_meanwhile_is_left_out_and_a_registry_that_fails_is_an_error() {
    let server = FaultServer::from_layout(data("layouts/tiny-llm"), "team/kit");
    let (kitfs, repository) = (Kitfs::new(), format!("{}/team/kit", server.host()));
    server.fault("production", Fault::status(404));
    let tags = kitfs.ok(&["tags", &repository, "--digest", TINY]);
    assert_eq!(tags, "latest\n1.2\n1.2.0\n");
    server.fault("1.2", Fault::status(403));
    let error = kitfs.fails(&["tags", &repository, "--long"]);
    assert!(error.contains("denied access") && error.contains("1.2"), "{error}");
    server.heal("1.2");
    server.fault("latest", Fault::status(503));
    let error = kitfs.fails(&["tags", &repository, "--long"]);
    assert!(error.contains("503"), "{error}");
}

#[test]
fn five_thousand_tags_of_a_real_registry_are_all_listed() {
    // In memory where there is such a place: each tag is three files and directories, which a disk is slow to remove.
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory");
    let storage = Some(dir.path().to_owned());
    let registry = Registry::start_with(RegistryOptions { storage, access_log: true, ..RegistryOptions::default() });
    registry.push_layout(&data("layouts/tiny-llm"), "team/kit");
    registry.push_layout(&data("layouts/docs-only"), "team/kit");
    let digests: [Digest; 2] = [TINY, DOCS].map(|digest| digest.parse().expect("a digest"));
    for (at, digest) in digests.iter().enumerate() {
        let numbers = (0..5000_usize).filter(|number| number % 2 == at);
        registry.tag_in_storage(
            "team/kit",
            digest,
            numbers.map(|number| format!("3.{}.{}", number / 100, number % 100)),
        );
    }
    let (kitfs, repository) = (Kitfs::new(), format!("{}/team/kit", registry.host()));
    let before = registry.accesses().len();
    let listed = kitfs.ok(&["tags", &repository]);
    assert_eq!(registry.accesses().len() - before, 1);
    // Those of the two fixtures come before.
    let ours: Vec<String> = (0..5000).map(|number| format!("3.{}.{}", number / 100, number % 100)).collect();
    let lines: Vec<_> = listed.lines().collect();
    assert_eq!(lines.len(), 5005);
    assert_eq!(lines[5..], ours);

    let before = registry.accesses().len();
    let long = as_json(&kitfs, &["tags", "--json", "--long", &repository]);
    let asked = registry.accesses().split_off(before);
    let count = |method: &str| asked.iter().filter(|line| line.starts_with(method)).count();
    assert_eq!((count("HEAD "), count("GET ")), (5005, 3), "a question a tag, one list, and two manifests");
    for (at, tags) in [(DOCS, 2501), (TINY, 2504)] {
        let groups = long["digests"].as_array().expect("groups");
        let group = groups.iter().find(|group| group["digest"] == at).expect("a group");
        assert_eq!(group["tags"].as_array().expect("tags").len(), tags, "{at}");
    }
}

#[test]
fn five_thousand_tags_come_in_pages_where_the_registry_has_pages() {
    let server = FaultServer::from_layout(data("layouts/docs-only"), "team/kit");
    let digest: Digest = DOCS.parse().expect("a digest");
    (0..4999).for_each(|number| server.tag(&format!("2.0.{number}"), digest));
    let (kitfs, repository) = (Kitfs::new(), format!("{}/team/kit", server.host()));
    for (page, pages) in [(1000, 5), (100, 50)] {
        server.set_page(page);
        server.reset_counters();
        let listed = kitfs.ok(&["tags", &repository]);
        assert_eq!(listed.lines().count(), 5000);
        assert!(listed.starts_with("v1\n2.0.0\n2.0.1\n2.0.2\n") && listed.ends_with("2.0.4998\n"));
        let asked = server.requests().len();
        assert!((pages..=pages + 1).contains(&asked), "{asked} requests for {pages} pages");
    }
    server.set_page(1000);
    server.reset_counters();
    let tags = kitfs.ok(&["tags", &repository, "--digest", DOCS, "--match", "2.0.1*"]);
    assert_eq!(tags.lines().count(), 1111, "1, 10 to 19, 100 to 199, 1000 to 1999");
    let asked = server.requests().iter().filter(|request| request.method == "HEAD").count();
    assert_eq!(asked, 1111, "nothing is asked of a tag that is not of the pattern");
}

#[test]
fn wrong_use_is_told_with_the_remedy() {
    let kitfs = Kitfs::new();
    let layout = data("layouts/tiny-llm");
    let layout = format!("oci:{}", layout.display());
    for (repository, remedy) in [
        (format!("{layout}:1.2"), format!("{layout} --match 1.2")),
        (format!("{layout}@{TINY}"), format!("--digest {TINY}")),
    ] {
        let output = kitfs.run(&["tags", &repository]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && error.contains(&remedy), "{error}");
    }
    let error = kitfs.fails(&["tags", &layout, "--match", "1/2"]);
    assert!(error.contains("no tag holds '/'") && error.contains("as in 1.4.*"), "{error}");
    let registry = Registry::start();
    let error = kitfs.fails(&["tags", &format!("{}/no/such", registry.host())]);
    assert!(error.contains("has no repository") && error.contains("no/such"), "{error}");
    let error = kitfs.fails(&["tags", "--offline", "registry.example.com/team/kit"]);
    assert!(error.contains("--offline"), "{error}");
    let error = kitfs.fails(&["tags", "unknown"]);
    assert!(error.contains("not in kit's storage") && error.contains("docker.io/unknown"), "{error}");
}

#[test]
fn inspect_tells_who_else_points_at_a_digest() {
    let Everywhere { registry: _registry, kitfs, repositories } = everywhere("tiny-llm");
    for (at, repository) in repositories.iter().enumerate() {
        let reference = format!("{repository}:1.2");
        let told = as_json(&kitfs, &["inspect", "--json", "--tags", &reference]);
        assert_eq!(told["tags"], json!(["latest", "production", "1.2", "1.2.0"]), "{repository}");
        let text = kitfs.ok(&["inspect", "--tags", &reference]);
        assert!(text.contains("latest, production, 1.2, 1.2.0\n"), "{text}");
        // In a registry that is a request a tag, which nobody makes unasked.
        let unasked = as_json(&kitfs, &["inspect", "--json", &reference]);
        assert_eq!(unasked["tags"].is_null(), at == 0, "{repository}: {unasked}");
    }
}

#[test]
fn inspect_asks_for_no_tags_unless_it_is_told_to() {
    let server = FaultServer::from_layout(data("layouts/tiny-llm"), "team/kit");
    let kitfs = Kitfs::new();
    kitfs.ok(&["inspect", &server.reference("1.2")]);
    assert_eq!(server.requests_for("list"), 0);
    server.reset_counters();
    kitfs.ok(&["inspect", "--tags", &server.reference("1.2")]);
    let heads = server.requests().iter().filter(|request| request.method == "HEAD").count();
    assert_eq!((server.requests_for("list"), heads), (1, 5), "one for each tag, and one for the kit's own");
}

#[test]
fn inspect_tells_which_kit_of_an_image_index_is_taken_and_why() {
    let Everywhere { registry: _registry, kitfs, repositories } = everywhere("image-index");
    for repository in &repositories {
        let only = as_json(&kitfs, &["inspect", "--json", "--tags", &format!("{repository}:one")]);
        let index = &only["index"];
        assert_eq!((&only["digest"], &index["digest"], &index["chosen"]), (&json!(TINY), &json!(ONE), &json!(TINY)));
        assert_eq!(index["why"], "it is the only kit in the index");
        assert_eq!((&only["tags"], &index["tags"]), (&json!([]), &json!(["one"])));

        let two = format!("{repository}:two");
        let selected = as_json(&kitfs, &["inspect", "--json", &two, "--select", DOCS]);
        assert_eq!((&selected["digest"], &selected["index"]["digest"]), (&json!(DOCS), &json!(TWO)));
        assert_eq!(selected["index"]["why"], "it was selected by its digest");
        let kits = selected["index"]["kits"].as_array().expect("kits");
        let taken: Vec<_> = kits.iter().map(|kit| (&kit["digest"], &kit["title"], &kit["taken"])).collect();
        let (tiny, docs) = (json!(TINY), json!(DOCS));
        assert_eq!(taken, [(&tiny, &json!(null), &json!(false)), (&docs, &json!("docs"), &json!(true))]);

        let undecided = as_json(&kitfs, &["inspect", "--json", &two]);
        assert_eq!((&undecided["digest"], &undecided["index"]["chosen"]), (&json!(TWO), &Value::Null));
        let text = kitfs.ok(&["inspect", &two]);
        for part in [TINY, DOCS, TWO, "none: it holds 2 kits", "--select"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(kitfs.fails(&["inspect", "--manifest", &two]).contains("--select"));
    }
}

#[test]
fn a_kit_for_this_platform_is_told_to_be_that() {
    let server = FaultServer::empty("team/kit");
    let platforms = ["linux/amd64", "linux/arm64", "darwin/arm64"];
    let kits = platforms.map(|platform| {
        let files = tar(&[("a.txt", platform.as_bytes())]);
        KitBuilder::new().tar("docs", "a.txt", files).serve(&server, &platform.replace('/', "-"))
    });
    let manifests: Vec<_> = platforms
        .iter()
        .zip(&kits)
        .map(|(platform, kit)| {
            let (os, architecture) = platform.split_once('/').expect("two parts");
            json!({
                "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": kit.digest,
                "size": server.len_of(&kit.digest), "platform": { "os": os, "architecture": architecture },
            })
        })
        .collect();
    let index = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests,
        "annotations": { "org.opencontainers.image.revision": "0a1b2c" },
    });
    let digest = server.add_manifest("all", index.to_string());
    let kitfs = Kitfs::new();
    let told = as_json(&kitfs, &["inspect", "--json", &server.reference("all"), "--platform", "darwin/arm64"]);
    assert_eq!((&told["digest"], &told["index"]["digest"]), (&json!(kits[2].digest), &json!(digest)));
    assert_eq!(told["index"]["why"], "it is the only kit for darwin/arm64, which was asked for");
    assert_eq!(told["index"]["annotations"]["org.opencontainers.image.revision"], "0a1b2c");
    let text = kitfs.ok(&["inspect", &server.reference("all"), "--platform", "linux/arm64"]);
    assert!(
        text.contains("org.opencontainers.image.revision=0a1b2c") && text.contains("which was asked for"),
        "{text}"
    );
}
