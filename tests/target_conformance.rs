//! One suite over every target: what was written to a registry, an OCI layout or kit's storage is there, and only that.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream;
use kitfs::digest::{Digest, Unverified};
use kitfs::reference::Location;
use kitfs::source::{
    BlobId, ByteStream, Connection, KitStorage, NewManifest, Refers, Source as _, SourceError, Target, open,
    open_target,
};
use serde_json::{Value, json};
use support::{Auth, FaultServer, Login, PASSWORD, Registry, RegistryOptions, USER, collect, data, eventually};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const TYPE: &str = "application/vnd.kitfs.index.v1";
const OTHER_TYPE: &str = "application/vnd.example.signature";
/// Tells a run of this program that it is to write and be killed, and where.
const WRITER: &str = "KITFS_TEST_WRITER";

fn stream_of(bytes: &[u8], piece: usize) -> ByteStream {
    let pieces: Vec<_> = bytes.chunks(piece).map(|piece| Ok(Unverified::new(piece.to_vec()))).collect();
    Box::pin(stream::iter(pieces))
}

fn blob_of(bytes: &[u8]) -> BlobId {
    BlobId { digest: Digest::of(bytes), size: bytes.len() as u64 }
}

async fn put(target: &dyn Target, bytes: &[u8]) -> BlobId {
    let blob = blob_of(bytes);
    target.put_blob(&blob, stream_of(bytes, 100_000)).await.expect("written");
    blob
}

fn descriptor(blob: &BlobId) -> Value {
    json!({"mediaType": "application/octet-stream", "digest": blob.digest, "size": blob.size})
}

/// A manifest over blobs that were written.
fn manifest(config: &BlobId, layer: &BlobId, title: &str) -> NewManifest {
    let value = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor(config),
        "layers": [descriptor(layer)], "annotations": {"title": title}});
    NewManifest { media_type: MANIFEST.to_owned(), bytes: value.to_string().into(), refers: None }
}

/// A manifest that refers to another one.
fn referrer(config: &BlobId, subject: &NewManifest, artifact_type: &str, title: &str) -> NewManifest {
    let digest = Digest::of(&subject.bytes);
    let value = json!({"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": artifact_type,
        "config": descriptor(config), "layers": [descriptor(config)], "annotations": {"title": title},
        "subject": {"mediaType": MANIFEST, "digest": digest, "size": subject.bytes.len()}});
    let refers = Some(Refers { subject: digest, artifact_type: artifact_type.to_owned() });
    NewManifest { media_type: MANIFEST.to_owned(), bytes: value.to_string().into(), refers }
}

/// Writes everything to a target, and reads it back.
async fn conforms(target: &dyn Target) {
    let big: Vec<u8> = (0..3_000_001_u32).map(|at| (at * 7 % 251) as u8).collect();

    // Blobs.
    let blob = blob_of(&big);
    assert!(!target.has_blob(&blob).await.expect("an answer"), "{target:?}");
    put(target, &big).await;
    assert!(target.has_blob(&blob).await.expect("an answer"), "{target:?}");
    put(target, &big).await;
    let read = collect(target.blob(&blob, 0..blob.size).await.expect("a stream")).await.expect("bytes");
    assert!(read == big, "{target:?}");
    let config = put(target, b"{}").await;
    let empty = put(target, b"").await;
    assert!(target.has_blob(&empty).await.expect("an answer"), "{target:?}");

    // Wrong bytes.
    let wrong = blob_of(b"what was promised");
    for (bytes, problem) in [
        (&b"what was promisee"[..], "have the digest"),
        (b"what was", "ended after 8 of 17"),
        (b"what was promised and more", "more than the 17 bytes"),
    ] {
        let error = target.put_blob(&wrong, stream_of(bytes, 5)).await.expect_err("must fail").to_string();
        assert!(error.contains(problem) && error.contains(&wrong.digest.to_string()), "{target:?}: {error}");
        assert!(!target.has_blob(&wrong).await.expect("an answer"), "{target:?}");
    }
    let broken = SourceError::NotFound { what: "the other half".to_owned(), source_name: "there".to_owned() };
    let half: ByteStream = Box::pin(stream::iter([Ok(Unverified::new(&b"what"[..])), Err(broken)]));
    let error = target.put_blob(&wrong, half).await.expect_err("must fail").to_string();
    assert_eq!(error, "the other half is not in there", "{target:?}");
    assert!(!target.has_blob(&wrong).await.expect("an answer"), "{target:?}");

    // Manifests, and a tag that moves.
    let (one, two) = (manifest(&config, &blob, "one"), manifest(&config, &blob, "two"));
    let first = target.put_manifest(&one, Some("latest")).await.expect("written");
    assert_eq!(first, Digest::of(&one.bytes));
    assert_eq!(target.resolve("latest").await.expect("a digest"), first, "{target:?}");
    let second = target.put_manifest(&two, None).await.expect("written");
    assert_eq!(target.manifest(&second).await.expect("there").peek(), &two.bytes, "{target:?}");
    assert_eq!(target.resolve("latest").await.expect("a digest"), first, "{target:?}");
    for _ in 0..2 {
        target.put_manifest(&two, Some("latest")).await.expect("written");
    }
    target.put_manifest(&two, Some("v2")).await.expect("written");
    assert_eq!(target.resolve("latest").await.expect("a digest"), second, "{target:?}");
    assert_eq!(target.manifest(&first).await.expect("still there").peek(), &one.bytes, "{target:?}");
    let error = target.put_manifest(&two, Some("no/tag")).await.expect_err("must fail").to_string();
    assert!(error.contains("\"no/tag\" is not a tag"), "{error}");

    // Referrers.
    assert_eq!(target.referrers(&second, TYPE).await.expect("a list"), [], "{target:?}");
    let mut written = Vec::new();
    for (artifact_type, title) in [(TYPE, "a"), (OTHER_TYPE, "b"), (TYPE, "c"), (TYPE, "a")] {
        let referrer = referrer(&config, &two, artifact_type, title);
        written.push(target.put_manifest(&referrer, None).await.expect("written"));
    }
    let found = target.referrers(&second, TYPE).await.expect("a list");
    assert_eq!(found, [written[0], written[2]], "{target:?}");
    assert_eq!(target.referrers(&second, OTHER_TYPE).await.expect("a list"), [written[1]], "{target:?}");
    assert_eq!(target.referrers(&first, TYPE).await.expect("a list"), [], "{target:?}");
    assert!(target.manifest(&found[0]).await.expect("there").verify(&found[0]).is_ok(), "{target:?}");

    let mut tags = target.tags().await.expect("tags");
    tags.sort();
    assert_eq!(tags, ["latest", "v2"], "{target:?}");
}

fn registry_target(location: &Location, home: &Path) -> Arc<dyn Target> {
    open_target(location, &Connection::default(), home).expect("a target")
}

fn layout(dir: &Path) -> Arc<dyn Target> {
    let location = Location::Layout { dir: dir.to_owned() };
    open_target(&location, &Connection::default(), Path::new("/nonexistent")).expect("a target")
}

fn local(home: &Path, repository: &str) -> Arc<dyn Target> {
    let location = Location::Local { repository: repository.to_owned() };
    open_target(&location, &Connection::default(), home).expect("a target")
}

fn log_in(home: &Path, host: &str, user: &str, password: &str) {
    let login = json!({"auths": {host: {"username": user, "password": password}}});
    fs::write(home.join("credentials.json"), login.to_string()).expect("written");
}

fn json_at(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&fs::read(path).expect("a readable file")).expect("JSON")
}

#[tokio::test]
async fn a_registry_conforms() {
    let registry = Registry::start();
    conforms(&*registry_target(&registry.location("team/kit"), Path::new("/nonexistent"))).await;
}

#[tokio::test]
async fn a_registry_with_a_password_conforms_once_the_user_has_logged_in() {
    let registry = Registry::start_with(RegistryOptions { password: true, ..RegistryOptions::default() });
    let home = tempfile::tempdir().expect("a directory");
    let target = registry_target(&registry.location("private/kit"), home.path());
    let refused = target.put_blob(&blob_of(b"x"), stream_of(b"x", 1)).await.expect_err("no credentials").to_string();
    assert!(refused.contains(&format!("run `kit login {}`", registry.host())), "{refused}");
    log_in(home.path(), &registry.host(), USER, PASSWORD);
    conforms(&*target).await;
}

#[tokio::test]
async fn a_registry_with_the_referrers_api_and_tokens_conforms_and_needs_no_tag_for_referrers() {
    let server = FaultServer::empty("team/kit");
    server.enable_referrers();
    server.set_page(1);
    let login = Login::Password { user: "me".to_owned(), password: "sesame".to_owned() };
    server.set_auth(Auth::Bearer { realm: None, login, expires_in: 3600 });
    let home = tempfile::tempdir().expect("a directory");
    log_in(home.path(), &server.host(), "me", "sesame");
    let target = registry_target(&server.location(), home.path());
    conforms(&*target).await;
    let fallback = server.requests().iter().filter(|request| request.target().starts_with("sha256-")).count();
    assert_eq!(fallback, 0);
    assert_eq!(server.requests_for("token"), 1, "one token to read and write");
}

#[tokio::test]
async fn a_layout_conforms_and_names_each_tag_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("made/here");
    conforms(&*layout(&path)).await;
    assert_eq!(json_at(path.join("oci-layout")), json!({"imageLayoutVersion": "1.0.0"}));
    let index = json_at(path.join("index.json"));
    let tags = index["manifests"].as_array().expect("manifests").iter();
    let mut tags: Vec<_> =
        tags.filter_map(|entry| entry["annotations"]["org.opencontainers.image.ref.name"].as_str()).collect();
    tags.sort();
    assert_eq!(tags, ["latest", "v2"]);
    assert_eq!(entries(&path), ["blobs", "index.json", "oci-layout"], "nothing is left over");
}

#[tokio::test]
async fn kits_storage_conforms_and_is_as_kit_writes_it() {
    let home = tempfile::tempdir().expect("a directory");
    conforms(&*local(home.path(), "tiny")).await;
    let storage = home.path().join("storage");
    // base64 of localhost/tiny
    let file = |what: &str| storage.join(format!("bG9jYWxob3N0L3Rpbnk=-{what}.json"));
    let text = fs::read_to_string(file("index")).expect("a list");
    assert!(text.starts_with(r#"{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:"#), "{text}");
    assert_eq!(json_at(file("index"))["manifests"].as_array().map(Vec::len), Some(2), "no referrer: kit would list it");
    assert_eq!(json_at(file("kitfs-referrers"))["manifests"].as_array().map(Vec::len), Some(3));
    let tags = fs::read_to_string(file("tags")).expect("tags");
    assert!(
        tags.starts_with(r#"{"latest":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:"#),
        "{tags}"
    );
    let all = fs::read_to_string(storage.join("index.json")).expect("the list of all");
    assert!(
        all.starts_with(r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"#),
        "{all}"
    );
    assert_eq!(fs::read(storage.join("oci-layout")).expect("there"), br#"{"imageLayoutVersion":"1.0.0"}"#);
}

/// Names in a directory, in order.
fn entries(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a directory");
    let mut names: Vec<_> =
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect();
    names.sort();
    names
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("created");
    for name in entries(from) {
        let (from, to) = (from.join(&name), to.join(&name));
        if from.is_dir() { copy_dir(&from, &to) } else { fs::copy(&from, &to).map(drop).expect("copied") }
    }
}

#[tokio::test]
async fn what_kit_wrote_is_kept_byte_for_byte_where_nothing_of_it_changes() {
    let home = tempfile::tempdir().expect("a directory");
    copy_dir(&data("kithome"), home.path());
    let storage = home.path().join("storage");
    let source = KitStorage::local(home.path(), "tiny-llm");
    let digest = source.resolve("latest").await.expect("a digest");
    let bytes: Bytes = source.manifest(&digest).await.expect("there").peek().clone();
    let kit = NewManifest { media_type: MANIFEST.to_owned(), bytes, refers: None };
    let target = local(home.path(), "tiny-llm");
    target.put_manifest(&kit, Some("latest")).await.expect("written");
    let original = data("kithome/storage");
    assert_eq!(entries(&storage), entries(&original));
    for name in entries(&original).iter().filter(|name| name.ends_with(".json") || *name == "oci-layout") {
        let (old, new) = (fs::read_to_string(original.join(name)), fs::read_to_string(storage.join(name)));
        assert_eq!(old.expect("there"), new.expect("there"), "{name}");
    }
    target.put_manifest(&kit, Some("v3")).await.expect("written");
    let mut tags = source.tags().await.expect("tags");
    tags.sort();
    assert_eq!(tags, ["1.2.0", "latest", "v3"]);
}

#[tokio::test]
async fn a_blob_in_kits_storage_is_there_for_all_its_repositories() {
    let home = tempfile::tempdir().expect("a directory");
    let blob = put(&*local(home.path(), "one"), b"shared").await;
    assert!(local(home.path(), "two").has_blob(&blob).await.expect("an answer"));
}

#[tokio::test]
async fn a_blob_is_mounted_from_another_repository_of_the_same_registry_only() {
    let registry = Registry::start();
    let home = Path::new("/nonexistent");
    let (one, two) = (registry.location("team/one"), registry.location("team/two"));
    let blob = put(&*registry_target(&one, home), b"the bytes of a layer").await;
    let target = registry_target(&two, home);
    assert!(!target.has_blob(&blob).await.expect("an answer"));
    let elsewhere = Location::Registry { host: "registry.example.com".to_owned(), repository: "team/one".to_owned() };
    for from in [&two, &elsewhere, &Location::Local { repository: "one".to_owned() }, &registry.location("team/none")] {
        assert!(!target.mount_blob(&blob, from).await.expect("an answer"), "{from:?}");
        assert!(!target.has_blob(&blob).await.expect("an answer"), "{from:?}");
    }
    assert!(target.mount_blob(&blob, &one).await.expect("an answer"));
    assert!(target.has_blob(&blob).await.expect("an answer"));
}

#[tokio::test]
async fn a_layout_written_by_others_keeps_all_that_is_not_known_here() {
    let dir = tempfile::tempdir().expect("a directory");
    let target = layout(dir.path());
    let config = put(&*target, b"{}").await;
    let one = manifest(&config, &config, "one");
    let digest = target.put_manifest(&one, Some("latest")).await.expect("written");
    let mut index = json_at(dir.path().join("index.json"));
    index["annotations"] = json!({"their": "note"});
    index["manifests"][0]["platform"] = json!({"os": "linux", "architecture": "amd64"});
    index["manifests"][0]["annotations"]["their"] = json!("tag");
    fs::write(dir.path().join("index.json"), index.to_string()).expect("written");
    // A list of referrers as tools keep it that know of no artifact types in a layout.
    let theirs = referrer(&config, &one, TYPE, "theirs");
    let theirs_digest = Digest::of(&theirs.bytes);
    fs::write(dir.path().join("blobs/sha256").join(theirs_digest.hex()), &theirs.bytes).expect("written");
    let list = json!({"schemaVersion": 2, "manifests": [{"mediaType": MANIFEST, "digest": theirs_digest, "size": 1}]});
    let media_type = "application/vnd.oci.image.index.v1+json".to_owned();
    let list = NewManifest { media_type, bytes: list.to_string().into(), refers: None };
    target.put_manifest(&list, Some(&format!("sha256-{}", digest.hex()))).await.expect("written");

    target.put_manifest(&manifest(&config, &config, "two"), Some("latest")).await.expect("written");
    let index = json_at(dir.path().join("index.json"));
    assert_eq!(index["annotations"], json!({"their": "note"}));
    let kept = &index["manifests"][0];
    assert_eq!(kept["platform"]["os"], "linux");
    assert_eq!(kept["annotations"], json!({"their": "tag"}), "its tag has moved on");
    assert_eq!(target.tags().await.expect("tags"), ["latest"]);
    assert_eq!(target.referrers(&digest, TYPE).await.expect("a list"), [theirs_digest]);
}

#[tokio::test]
async fn an_untagged_layout_is_not_told_to_use_its_referrer() {
    let dir = tempfile::tempdir().expect("a directory");
    let target = layout(dir.path());
    let config = put(&*target, b"{}").await;
    let kit = manifest(&config, &config, "kit");
    target.put_manifest(&referrer(&config, &kit, TYPE, "x"), None).await.expect("written");
    let digest = target.put_manifest(&kit, None).await.expect("written");
    let error = target.resolve("latest").await.expect_err("no tag").to_string();
    assert!(error.contains(&format!("it has no tags; write oci:{}@{digest}", dir.path().display())), "{error}");
}

#[tokio::test]
async fn a_directory_of_something_else_is_not_made_a_layout() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("thesis.tex"), "years of work").expect("written");
    let location = Location::Layout { dir: dir.path().to_owned() };
    let refuse = || open_target(&location, &Connection::default(), Path::new("/")).expect_err("refused").to_string();
    assert!(refuse().contains("neither an OCI image layout nor empty: \"thesis.tex\""), "{}", refuse());
    assert_eq!(entries(dir.path()), ["thesis.tex"]);
    fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"2.0.0"}"#).expect("written");
    assert!(refuse().contains("layout version \"2.0.0\""), "{}", refuse());
    fs::remove_file(dir.path().join("thesis.tex")).expect("removed");
    // What a crash while it was made leaves.
    fs::write(dir.path().join("oci-layout"), "").expect("written");
    assert!(open(&location, &Connection::default(), Path::new("/")).is_err());
    open_target(&location, &Connection::default(), Path::new("/")).expect("finished now");
    assert!(open(&location, &Connection::default(), Path::new("/")).is_ok());
}

#[tokio::test]
async fn an_index_that_cannot_be_read_is_left_as_it_is() {
    let dir = tempfile::tempdir().expect("a directory");
    let target = layout(dir.path());
    let config = put(&*target, b"{}").await;
    fs::write(dir.path().join("index.json"), "{\"manifests\":[{\"digest\":5}]}").expect("written");
    let error = target.put_manifest(&manifest(&config, &config, "x"), None).await.expect_err("refused").to_string();
    assert!(error.contains("index.json can't be read") && error.contains("left as it is"), "{error}");
    assert_eq!(fs::read(dir.path().join("index.json")).expect("there"), b"{\"manifests\":[{\"digest\":5}]}");
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_at_the_same_moment_lose_nothing() {
    const WRITERS: usize = 8;
    const EACH: usize = 12;
    let dir = tempfile::tempdir().expect("a directory");
    let (layout_dir, home) = (dir.path().join("layout"), dir.path().join("home"));
    let writers = (0..WRITERS).map(|writer| {
        let (layout_dir, home) = (layout_dir.clone(), home.clone());
        tokio::spawn(async move {
            // Each opens them anew, as a process of its own would; the first makes them.
            for target in [layout(&layout_dir), local(&home, "kit")] {
                for number in 0..EACH {
                    let config = put(&*target, b"{}").await;
                    let layer = put(&*target, format!("{writer} {number}").as_bytes()).await;
                    let kit = manifest(&config, &layer, "kit");
                    target.put_manifest(&kit, Some(&format!("v{writer}.{number}"))).await.expect("written");
                    let index = referrer(&config, &kit, TYPE, "index");
                    target.put_manifest(&index, None).await.expect("written");
                }
            }
        })
    });
    for writer in futures_util::future::join_all(writers).await {
        writer.expect("no panic");
    }
    for target in [layout(&layout_dir), local(&home, "kit")] {
        let tags = target.tags().await.expect("tags");
        assert_eq!(tags.len(), WRITERS * EACH, "{target:?}");
        for tag in tags.iter().step_by(10) {
            let digest = target.resolve(tag).await.expect("a digest");
            assert_eq!(target.referrers(&digest, TYPE).await.expect("a list").len(), 1, "{target:?} {tag}");
        }
    }
    assert_eq!(entries(&layout_dir), ["blobs", "index.json", "oci-layout"]);
}

/// Files that a writer has begun below a directory.
fn parts(dir: &Path) -> Vec<PathBuf> {
    entries(dir).iter().filter(|name| name.starts_with(".kitfs-")).map(|name| dir.join(name)).collect()
}

#[tokio::test]
async fn a_killed_writer_leaves_no_half_blob_and_the_next_one_tidies_up() {
    let promised = blob_of(&vec![7; 2_000_000]);
    let never: ByteStream = Box::pin(futures_util::StreamExt::chain(
        stream::iter([Ok(Unverified::new(vec![7; 1_000_000]))]),
        stream::pending(),
    ));
    if let Some(dir) = std::env::var_os(WRITER) {
        let written = layout(Path::new(&dir)).put_blob(&promised, never).await;
        panic!("this process was to be killed: {written:?}");
    }
    let dir = tempfile::tempdir().expect("a directory");
    let target = layout(dir.path());
    let mut writer = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "a_killed_writer_leaves_no_half_blob_and_the_next_one_tidies_up"])
        .env(WRITER, dir.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("it runs");
    eventually("half a blob", || {
        parts(dir.path()).iter().any(|part| fs::metadata(part).is_ok_and(|metadata| metadata.len() == 1_000_000))
    });
    put(&*target, b"another blob").await;
    assert_eq!(parts(dir.path()).len(), 1, "what another process is writing stays");
    writer.kill().expect("killed");
    writer.wait().expect("ended");
    assert!(!target.has_blob(&promised).await.expect("an answer"));
    assert_eq!(parts(dir.path()).len(), 1);

    // Given up within this process, it goes at once.
    let never = Box::pin(futures_util::StreamExt::chain(
        stream::iter([Ok(Unverified::new(vec![7; 1_000_000]))]),
        stream::pending(),
    ));
    let given_up = tokio::time::timeout(std::time::Duration::from_millis(200), target.put_blob(&promised, never)).await;
    assert!(given_up.is_err());
    eventually("a tidy directory", || parts(dir.path()).is_empty());
    assert_eq!(entries(&dir.path().join("blobs/sha256")), [Digest::of(b"another blob").hex()]);
}

#[tokio::test]
async fn a_damaged_blob_is_written_anew() {
    let dir = tempfile::tempdir().expect("a directory");
    let target = layout(dir.path());
    let blob = put(&*target, b"the right bytes").await;
    let path = dir.path().join("blobs/sha256").join(blob.digest.hex());
    fs::write(&path, b"half").expect("written");
    assert!(!target.has_blob(&blob).await.expect("an answer"));
    put(&*target, b"the right bytes").await;
    assert_eq!(fs::read(&path).expect("there"), b"the right bytes");
}
