//! One suite over every source: OCI layout, kit's storage and a registry give the same answers to the same questions.

mod support;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use futures_util::StreamExt as _;
use kitfs::digest::Digest;
use kitfs::reference::Location;
use kitfs::source::{BlobId, Connection, KitStorage, Source, SourceError, open};
use serde_json::Value;
use support::{PASSWORD, Registry, RegistryOptions, USER, collect, data, layouts, support as support_file};

/// Ranges around the sizes where sources change their mind: blocks of a local read, pieces of a body.
const ODD_SIZES: [u64; 6] = [1, 511, 4097, 65_537, (1 << 20) - 1, (1 << 20) + 1];

/// What the fixtures say a repository holds.
struct Expected {
    tags: Vec<(String, Digest)>,
}

/// Asks a source everything, and checks each answer against its digest.
async fn conforms(source: &dyn Source, expected: &Expected) {
    let mut tags = source.tags().await.expect("tags");
    tags.sort();
    let mut wanted: Vec<_> = expected.tags.iter().map(|(tag, _)| tag.clone()).collect();
    wanted.sort();
    assert_eq!(tags, wanted, "{source:?}");
    let mut listed = source.tags_and_digests().await.expect("tags");
    listed.sort();
    assert_eq!(listed.iter().map(|(tag, _)| tag.clone()).collect::<Vec<_>>(), wanted, "{source:?}");
    for (tag, digest) in listed.into_iter().filter_map(|(tag, digest)| Some((tag, digest?))) {
        assert_eq!(source.resolve(&tag).await.expect("a digest"), digest, "{source:?} {tag}");
    }

    let missing = source.resolve("no-such-tag").await;
    assert!(matches!(missing, Err(SourceError::NotFound { .. })), "{missing:?}");
    let nothing = BlobId { digest: Digest::of(b"not stored anywhere"), size: 10 };
    let missing = source.blob(&nothing, 0..10).await.err();
    assert!(matches!(missing, Some(SourceError::NotFound { .. })), "{missing:?}");
    let missing = source.manifest(&nothing.digest).await;
    assert!(matches!(missing, Err(SourceError::NotFound { .. })), "{missing:?}");

    let mut checked = HashSet::new();
    for (tag, digest) in &expected.tags {
        assert_eq!(source.resolve(tag).await.expect("a digest"), *digest, "{tag}");
        if checked.insert(*digest) {
            check_manifest(source, digest).await;
        }
    }
}

async fn check_manifest(source: &dyn Source, digest: &Digest) {
    let manifest = source.manifest(digest).await.expect("a manifest").verify(digest).expect("its digest holds");
    let manifest: Value = serde_json::from_slice(manifest.bytes()).expect("JSON");
    for child in manifest["manifests"].as_array().into_iter().flatten() {
        Box::pin(check_manifest(source, &digest_of(child))).await;
    }
    for descriptor in manifest["layers"].as_array().into_iter().flatten().chain(manifest.get("config")) {
        let blob = BlobId { digest: digest_of(descriptor), size: descriptor["size"].as_u64().expect("a size") };
        check_blob(source, &blob).await;
    }
}

async fn check_blob(source: &dyn Source, blob: &BlobId) {
    let read = async |range| collect(source.blob(blob, range).await.expect("a stream")).await.expect("bytes");
    let whole = read(0..blob.size).await;
    assert_eq!(Digest::of(&whole), blob.digest, "{source:?}");
    assert_eq!(read(0..1).await, whole[..1]);
    assert_eq!(read(blob.size - 1..blob.size).await, whole[whole.len() - 1..]);
    for size in ODD_SIZES {
        let start = blob.size / 3;
        let end = blob.size.min(start + size);
        assert_eq!(read(start..end).await, whole[start as usize..end as usize], "{start}..{end} of {}", blob.digest);
    }
    // Given up after its first piece, a stream leaves the source as it was.
    let mut stream = source.blob(blob, 0..blob.size).await.expect("a stream");
    stream.next().await.expect("a first piece").expect("bytes");
    drop(stream);
    assert_eq!(read(0..1).await, whole[..1]);
    #[expect(clippy::reversed_empty_ranges, reason = "such a range is what must be refused")]
    for outside in [0..blob.size + 1, 1..1, 2..1] {
        assert!(source.blob(blob, outside.clone()).await.is_err(), "{outside:?}");
    }
}

fn digest_of(descriptor: &Value) -> Digest {
    descriptor["digest"].as_str().and_then(|text| text.parse().ok()).expect("a digest")
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("a readable file")).expect("JSON")
}

fn expected_of_layout(dir: &Path) -> Expected {
    let index = json(&dir.join("index.json"));
    let tag =
        |descriptor: &Value| descriptor["annotations"]["org.opencontainers.image.ref.name"].as_str().map(str::to_owned);
    let tags = index["manifests"].as_array().expect("manifests").iter();
    Expected { tags: tags.filter_map(|descriptor| Some((tag(descriptor)?, digest_of(descriptor)))).collect() }
}

fn source(location: &Location) -> Arc<dyn Source> {
    open(location, &Connection::default(), Path::new("/nonexistent")).expect("a source")
}

#[tokio::test]
async fn every_layout_conforms() {
    for dir in layouts() {
        let source = source(&Location::Layout { dir: dir.clone() });
        assert_eq!(source.name(), format!("oci:{}", dir.display()));
        conforms(&*source, &expected_of_layout(&dir)).await;
    }
}

#[tokio::test]
async fn every_repository_of_kits_storage_conforms() {
    use base64::Engine as _;
    let home = data("kithome");
    let mut seen = 0;
    for entry in std::fs::read_dir(home.join("storage")).expect("kit's storage") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
        let Some(encoded) = name.strip_suffix("-tags.json") else { continue };
        let decoded = base64::engine::general_purpose::URL_SAFE.decode(encoded).expect("base64");
        let repository = String::from_utf8(decoded).expect("UTF-8");
        let tags = json(&path);
        let tags = tags.as_object().expect("tags").iter();
        let expected = Expected { tags: tags.map(|(tag, of)| (tag.clone(), digest_of(of))).collect() };
        conforms(&KitStorage::for_repository(&home, &repository), &expected).await;
        if let Some(bare) = repository.strip_prefix("localhost/") {
            let local = Location::Local { repository: bare.to_owned() };
            let local = open(&local, &Connection::default(), &home).expect("a source");
            assert_eq!(local.name(), bare);
            conforms(&*local, &expected).await;
        }
        seen += 1;
    }
    assert_eq!(seen, 5, "the fixtures hold five repositories");
}

#[tokio::test]
async fn a_registry_with_every_layout_conforms() {
    let registry = Registry::start();
    for dir in layouts() {
        let repository = format!("fixtures/{}", dir.file_name().and_then(|name| name.to_str()).expect("a name"));
        registry.push_layout(&dir, &repository);
        let source = source(&registry.location(&repository));
        assert_eq!(source.name(), format!("{}/{repository}", registry.host()));
        conforms(&*source, &expected_of_layout(&dir)).await;
    }
}

#[tokio::test]
async fn a_registry_with_a_password_conforms_once_the_user_has_logged_in() {
    use base64::Engine as _;
    let dir = data("layouts/tiny-llm");
    let registry = Registry::start_with(RegistryOptions { password: true, ..RegistryOptions::default() });
    registry.push_layout(&dir, "private/kit");
    let home = tempfile::tempdir().expect("a directory");
    let source = open(&registry.location("private/kit"), &Connection::default(), home.path()).expect("a source");

    let refused = source.resolve("latest").await.expect_err("no credentials yet").to_string();
    assert!(refused.contains(&format!("run `kit login {}`", registry.host())), "{refused}");
    assert!(refused.contains("credentials.json"), "{refused}");

    let auth = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
    let login = serde_json::json!({"auths": {registry.host(): {"auth": auth}}});
    std::fs::write(home.path().join("credentials.json"), login.to_string()).expect("written");
    conforms(&*source, &expected_of_layout(&dir)).await;
}

#[tokio::test]
async fn a_registry_over_tls_is_trusted_by_its_authority_alone() {
    let dir = data("layouts/tiny-llm");
    let plain = Registry::start();
    plain.push_layout(&dir, "team/kit");
    let storage = Some(plain.storage().to_owned());
    let tls = Registry::start_with(RegistryOptions {
        storage,
        tls: true,
        client_certificate: true,
        ..RegistryOptions::default()
    });
    // The loopback rule gives plain HTTP to loopback names, so the registry is asked through a name that is none.
    let proxy = support::http::Tunnel::to(&tls.host());
    let location = Location::Registry { host: "registry.test".to_owned(), repository: "team/kit".to_owned() };
    let open = |connection: Connection| {
        let connection = Connection { proxy: Some(proxy.url()), ..connection };
        open(&location, &connection, Path::new("/nonexistent")).expect("a source")
    };
    let file = |name: &str| Some(support_file("tls").join(name));

    let distrusted = open(Connection::default()).resolve("latest").await.expect_err("an unknown authority");
    assert!(distrusted.to_string().contains("--ca FILE"), "{distrusted}");
    let elsewhere = Location::Registry { host: "other.test".to_owned(), repository: "team/kit".to_owned() };
    let through = Connection { ca: file("ca.pem"), proxy: Some(proxy.url()), ..Connection::default() };
    let elsewhere = kitfs::source::open(&elsewhere, &through, Path::new("/nonexistent")).expect("a source");
    let misnamed = elsewhere.resolve("latest").await.expect_err("another name");
    assert!(misnamed.to_string().contains("is for another name"), "{misnamed}");
    let bare = open(Connection { ca: file("ca.pem"), ..Connection::default() });
    let refused = bare.resolve("latest").await.expect_err("no client certificate");
    assert!(refused.to_string().contains("--cert FILE and --key FILE"), "{refused}");
    for error in [distrusted, misnamed, refused] {
        assert!(matches!(error, SourceError::Untrusted { .. }) && !error.is_transient(), "{error:?}");
    }

    let client = Connection { cert: file("client.pem"), key: file("client.key"), ..Connection::default() };
    let source = open(Connection { ca: file("ca.pem"), ..client.clone() });
    conforms(&*source, &expected_of_layout(&dir)).await;
    let unchecked = open(Connection { tls_verify: false, ..client });
    assert!(unchecked.resolve("latest").await.is_ok());
    assert!(proxy.connections() > 0, "the proxy was used");
}

#[tokio::test]
async fn a_tag_that_is_missing_names_those_that_are_there() {
    let error = source(&Location::Layout { dir: data("layouts/tiny-llm") }).resolve("v9").await;
    let error = error.expect_err("no such tag").to_string();
    assert!(error.contains("\"v9\"") && error.contains("1.2, 1.2.0, latest, production"), "{error}");
    let home = data("kithome");
    let error = KitStorage::local(&home, "tiny-llm").resolve("v9").await.expect_err("no such tag").to_string();
    assert!(error.contains("1.2.0, latest"), "{error}");
}

#[tokio::test]
async fn a_name_that_kit_does_not_hold_says_how_to_write_docker_hub() {
    let home = data("kithome");
    let error = KitStorage::local(&home, "team/llama").resolve("8b").await.expect_err("not there").to_string();
    assert!(error.contains("kit's storage") && error.contains("docker.io/team/llama"), "{error}");
    let error = KitStorage::for_repository(&home, "registry.example.com/none").tags().await.expect_err("not there");
    assert!(!error.to_string().contains("docker.io"), "{error}");
}

/// A writable copy of a fixture layout.
fn copy_of(layout: &str) -> tempfile::TempDir {
    let (from, to) = (data("layouts").join(layout), tempfile::tempdir().expect("a directory"));
    std::fs::create_dir_all(to.path().join("blobs/sha256")).expect("created");
    for name in ["index.json", "oci-layout"] {
        std::fs::copy(from.join(name), to.path().join(name)).expect("copied");
    }
    for entry in std::fs::read_dir(from.join("blobs/sha256")).expect("blobs") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name");
        std::fs::copy(&path, to.path().join("blobs/sha256").join(name)).expect("copied");
    }
    to
}

#[tokio::test]
async fn a_directory_that_is_no_layout_or_of_another_version_is_refused() {
    let dir = copy_of("docs-only");
    let refusal = || {
        let location = Location::Layout { dir: dir.path().to_owned() };
        open(&location, &Connection::default(), Path::new("/")).expect_err("must be refused").to_string()
    };
    std::fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"2.0.0"}"#).expect("written");
    assert!(refusal().contains("layout version \"2.0.0\", expected \"1.0.0\""));
    std::fs::remove_file(dir.path().join("oci-layout")).expect("removed");
    assert!(refusal().contains("not an OCI image layout"));
}

#[tokio::test]
async fn a_tag_in_a_nested_index_is_found_and_a_doubtful_one_is_refused() {
    let dir = copy_of("docs-only");
    let manifest = expected_of_layout(dir.path()).tags[0].1;
    let other = Digest::of(b"another manifest");
    let entry = |digest: &Digest, tag: &str| {
        serde_json::json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": 1,
            "annotations": {"org.opencontainers.image.ref.name": tag}})
    };
    let nested = serde_json::json!({"manifests": [entry(&manifest, "deep"), entry(&other, "top")]}).to_string();
    let nested_digest = Digest::of(nested.as_bytes());
    std::fs::write(dir.path().join("blobs/sha256").join(nested_digest.hex()), &nested).expect("written");
    let nested_entry = serde_json::json!({"mediaType": "application/vnd.oci.image.index.v1+json",
        "digest": nested_digest, "size": nested.len()});
    let index = serde_json::json!({"manifests":
        [entry(&manifest, "top"), nested_entry, entry(&manifest, "twice"), entry(&other, "twice")]});
    std::fs::write(dir.path().join("index.json"), index.to_string()).expect("written");

    let source = source(&Location::Layout { dir: dir.path().to_owned() });
    assert_eq!(source.resolve("deep").await.expect("found"), manifest);
    assert_eq!(source.resolve("top").await.expect("the nearest to the top wins"), manifest);
    let doubtful = source.resolve("twice").await.expect_err("two manifests").to_string();
    assert!(doubtful.contains(&manifest.to_string()) && doubtful.contains(&other.to_string()), "{doubtful}");
}

#[tokio::test]
async fn a_local_blob_must_be_a_file_of_the_stated_size() {
    let dir = copy_of("docs-only");
    let source = source(&Location::Layout { dir: dir.path().to_owned() });
    let blobs = dir.path().join("blobs/sha256");
    let digest = Digest::of(b"twelve bytes");
    let blob = BlobId { digest, size: 12 };
    let refusal = async || source.blob(&blob, 0..12).await.err().expect("must be refused").to_string();

    std::fs::write(blobs.join(digest.hex()), b"short").expect("written");
    assert!(refusal().await.contains("holds 5 bytes, the manifest says 12"));

    std::fs::remove_file(blobs.join(digest.hex())).expect("removed");
    std::fs::write(dir.path().join("elsewhere"), b"twelve bytes").expect("written");
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), blobs.join(digest.hex())).expect("linked");
    assert!(refusal().await.contains("symbolic link"));

    std::fs::remove_file(blobs.join(digest.hex())).expect("removed");
    let made = std::process::Command::new("mkfifo").arg(blobs.join(digest.hex())).status().expect("mkfifo");
    assert!(made.success());
    assert!(refusal().await.contains("is not a file"), "a pipe must not be waited for");
}
