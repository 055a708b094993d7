//! What may go wrong when a registry is written to, who is blamed for it, and where a token may go.

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use kitfs::digest::{Digest, Unverified};
use kitfs::reference::Location;
use kitfs::source::{BlobId, ByteStream, Connection, NewManifest, Refers, SourceError, Target, Timeouts, open_target};
use serde_json::json;
use support::{Auth, Fault, FaultServer, Login};

/// Long enough for a busy machine, short enough to wait for.
const SHORT: Duration = Duration::from_millis(300);
/// More than the buffers of a loopback connection hold.
const SIZE: u64 = 20_000_000;
const SECRET: &str = "correct-horse";
const TYPE: &str = "application/vnd.kitfs.index.v1";

/// A server without a blob, and a target that is to get it and gives up soon.
struct Setup {
    server: FaultServer,
    target: Arc<dyn Target>,
    home: tempfile::TempDir,
    bytes: bytes::Bytes,
    blob: BlobId,
}

fn setup() -> Setup {
    let server = FaultServer::empty("team/kit");
    let bytes: bytes::Bytes = (0..SIZE).map(|at| (at * 7 % 251) as u8).collect::<Vec<_>>().into();
    let blob = BlobId { digest: Digest::of(&bytes), size: SIZE };
    let home = tempfile::tempdir().expect("a directory");
    let timeouts = Timeouts { connect: SHORT * 4, answer: SHORT * 4, stall: SHORT };
    let connection = Connection { timeouts, ..Connection::default() };
    let target = open_target(&server.location(), &connection, home.path()).expect("a target");
    Setup { server, target, home, bytes, blob }
}

impl Setup {
    fn stream(&self) -> ByteStream {
        let bytes = self.bytes.clone();
        let pieces = (0..bytes.len()).step_by(1 << 20);
        Box::pin(stream::iter(
            pieces.map(move |start| Ok(Unverified::new(bytes.slice(start..bytes.len().min(start + (1 << 20)))))),
        ))
    }

    async fn put(&self) -> Result<(), SourceError> {
        self.target.put_blob(&self.blob, self.stream()).await
    }

    /// The error of an upload whose PUT meets a fault.
    async fn error_with(&self, fault: Fault) -> SourceError {
        self.server.fault(self.blob.digest, fault);
        let error = self.put().await.expect_err("must fail");
        assert!(!self.server.holds(&self.blob.digest));
        error
    }

    fn want_token(&self, expires_in: u64) {
        let login = Login::Password { user: "me".to_owned(), password: SECRET.to_owned() };
        self.server.set_auth(Auth::Bearer { realm: None, login, expires_in });
        let login = json!({"auths": {self.server.host(): {"username": "me", "password": SECRET}}});
        std::fs::write(self.home.path().join("credentials.json"), login.to_string()).expect("written");
    }
}

fn refusal(status: u16, code: &str, message: &str) -> Fault {
    Fault::Refuse { status, body: json!({"errors": [{"code": code, "message": message}]}).to_string() }
}

fn kit() -> NewManifest {
    let bytes = json!({"schemaVersion": 2, "layers": []}).to_string().into();
    NewManifest { media_type: "application/vnd.oci.image.manifest.v1+json".to_owned(), bytes, refers: None }
}

fn referrer(subject: Digest, title: &str) -> NewManifest {
    let value = json!({"schemaVersion": 2, "artifactType": TYPE, "layers": [], "annotations": {"title": title},
        "subject": {"mediaType": "x", "digest": subject, "size": 1}});
    let refers = Some(Refers { subject, artifact_type: TYPE.to_owned() });
    NewManifest { bytes: value.to_string().into(), refers, ..kit() }
}

#[tokio::test]
async fn a_blob_goes_in_one_post_and_one_put_of_stated_length() {
    let setup = setup();
    setup.put().await.expect("written");
    let requests = setup.server.requests();
    let methods: Vec<_> = requests.iter().map(|request| request.method.as_str()).collect();
    assert_eq!(methods, ["POST", "PUT"]);
    assert_eq!(requests[1].header("content-length"), Some(SIZE.to_string().as_str()));
    assert_eq!(requests[1].header("transfer-encoding"), None);
    assert!(requests[1].path.contains("?_state=a%2Fb&digest=sha256"), "its query is kept: {}", requests[1].path);
    assert_eq!(setup.server.uploaded_for(setup.blob.digest), SIZE);
    assert!(setup.server.holds(&setup.blob.digest));
}

#[tokio::test]
async fn a_401_is_answered_with_a_token_to_push_and_the_blob_is_sent_once() {
    let setup = setup();
    setup.want_token(3600);
    assert!(!setup.target.has_blob(&setup.blob).await.expect("an answer"));
    setup.put().await.expect("written");
    setup.target.put_manifest(&kit(), Some("v1")).await.expect("written");
    let tokens = setup.server.requests_to("token");
    assert_eq!(tokens.len(), 1, "asked for at once with what the writes need");
    assert_eq!(tokens[0].query("scope").as_deref(), Some("repository:team/kit:pull,push"));
    assert_eq!(setup.server.uploaded_for(setup.blob.digest), SIZE);
}

#[tokio::test]
async fn who_has_only_read_gets_another_token_to_write() {
    let setup = setup();
    setup.want_token(3600);
    setup.server.add_manifest("v1", kit().bytes.to_vec());
    setup.target.resolve("v1").await.expect("a digest");
    setup.put().await.expect("written");
    setup.target.resolve("v1").await.expect("a digest");
    let scopes: Vec<_> =
        setup.server.requests_to("token").iter().filter_map(|request| request.query("scope")).collect();
    assert_eq!(scopes, ["repository:team/kit:pull", "repository:team/kit:pull,push"]);
}

#[tokio::test]
async fn a_mount_asks_for_a_token_to_read_the_other_repository_too() {
    let setup = setup();
    setup.want_token(3600);
    let from = Location::Registry { host: setup.server.host(), repository: "team/other".to_owned() };
    assert!(!setup.target.mount_blob(&setup.blob, &from).await.expect("an answer"));
    let opened = setup.server.requests();
    assert_eq!(opened.last().map(|request| request.method.as_str()), Some("DELETE"), "the upload is given up");
    setup.server.add_blob(setup.bytes.to_vec());
    setup.server.set_mounts(true);
    assert!(setup.target.mount_blob(&setup.blob, &from).await.expect("an answer"));
    let tokens = setup.server.requests_to("token");
    assert_eq!(tokens.len(), 1);
    let path = &tokens[0].path;
    assert!(path.contains("scope=repository%3Ateam%2Fkit%3Apull%2Cpush"), "{path}");
    assert!(path.contains("scope=repository%3Ateam%2Fother%3Apull"), "{path}");
}

#[tokio::test]
async fn a_mount_that_is_refused_is_no_mount_and_a_busy_registry_is_an_error() {
    let setup = setup();
    let from = Location::Registry { host: setup.server.host(), repository: "team/other".to_owned() };
    for status in [401, 403, 404, 405] {
        setup.server.fault_times(1, "mount", Fault::status(status));
        assert!(!setup.target.mount_blob(&setup.blob, &from).await.expect("an answer"), "{status}");
    }
    setup.server.fault_times(1, "mount", Fault::status(503));
    assert!(setup.target.mount_blob(&setup.blob, &from).await.expect_err("busy").is_transient());
}

#[tokio::test]
async fn wrong_credentials_name_the_remedy_before_a_byte_is_sent() {
    let setup = setup();
    setup.want_token(3600);
    setup.server.set_auth(Auth::Bearer { realm: None, login: Login::Nobody, expires_in: 60 });
    let error = setup.put().await.expect_err("must fail").to_string();
    assert!(error.contains(&format!("run `kit login {}`", setup.server.host())) && !error.contains(SECRET), "{error}");
    assert_eq!(setup.server.uploaded_for(setup.blob.digest), 0);
}

#[tokio::test]
async fn a_token_that_ran_out_before_the_put_is_renewed_for_the_next_attempt() {
    let setup = setup();
    setup.want_token(3600);
    setup.server.fault_times(1, setup.blob.digest, refusal(401, "UNAUTHORIZED", "expired"));
    setup.server.fault_times(1, setup.blob.digest, Fault::Header("WWW-Authenticate", challenge(&setup.server)));
    let error = setup.put().await.expect_err("the blob can't be sent twice");
    assert!(error.is_transient() && error.to_string().contains("the token ran out"), "{error}");
    setup.put().await.expect("written");
    assert_eq!(setup.server.requests_for("token"), 2);
}

fn challenge(server: &FaultServer) -> String {
    format!("Bearer realm=\"http://{}/token\",scope=\"repository:team/kit:pull,push\"", server.host())
}

#[tokio::test]
async fn refusals_are_told_in_the_registrys_own_words() {
    for (fault, parts) in [
        (refusal(403, "DENIED", "quota exceeded"), &["denied access", "(DENIED: quota exceeded)"][..]),
        (refusal(413, "SIZE_INVALID", "at most 10 MB"), &["answered 413", "too large", "at most 10 MB"]),
        (Fault::status(413), &["answered 413", "too large for the registry, or for a proxy"]),
        (refusal(405, "UNSUPPORTED", "read-only mode"), &["answered 405", "it is read-only (UNSUPPORTED"]),
        (refusal(404, "NAME_UNKNOWN", "no such project"), &["answered 404", "no such repository", "no such project"]),
        (refusal(400, "X", &format!("{} {}", "e".repeat(500), "\u{1b}[31m")), &["(X: … [31m)"]),
        (
            Fault::Redirect { to: "https://other.example/x?sig=secret".to_owned() },
            &["to other.example; name that host"],
        ),
    ] {
        for target in ["uploads", "put"] {
            let setup = setup();
            let redirect = matches!(fault, Fault::Redirect { .. });
            match target {
                "uploads" => setup.server.fault("uploads", fault.clone()),
                _ if redirect => continue,
                _ => setup.server.fault(setup.blob.digest, fault.clone()),
            }
            let error = setup.put().await.expect_err("must fail");
            assert!(!error.is_transient(), "{error:?}");
            let text = error.to_string();
            for part in parts {
                assert!(text.contains(part), "{target}: {text}");
            }
            assert!(text.contains(&setup.blob.digest.to_string()) && !text.contains("secret"), "{text}");
        }
    }
}

#[tokio::test]
async fn a_busy_registry_says_when_to_come_back() {
    for target in ["uploads", "put"] {
        let setup = setup();
        let busy = Fault::Status { status: 500, retry_after: Some("7".to_owned()) };
        match target {
            "uploads" => setup.server.fault_times(1, "uploads", busy),
            _ => setup.server.fault_times(1, setup.blob.digest, busy),
        }
        let error = setup.put().await.expect_err("must fail");
        assert!(error.to_string().ends_with("answered 500"), "{error}");
        let SourceError::Status { status: 500, retry_after, .. } = error else { panic!("{error:?}") };
        assert_eq!(retry_after, Some(Duration::from_secs(7)));
        setup.put().await.expect("the registry has recovered");
    }
}

#[tokio::test]
async fn a_busy_registry_is_quoted_too() {
    for status in [408, 429, 503] {
        let setup = setup();
        let error = setup.error_with(refusal(status, "TOOMANYREQUESTS", "come back tomorrow")).await;
        let expected = format!("answered {status} (TOOMANYREQUESTS: come back tomorrow)");
        assert!(error.is_transient() && error.to_string().contains(&expected), "{error}");
    }
}

#[tokio::test]
async fn a_registry_that_files_another_manifest_is_an_error() {
    let setup = setup();
    let other = Digest::of(b"rewritten");
    setup.server.fault("v1", Fault::Header("Docker-Content-Digest", other.to_string()));
    let error = setup.target.put_manifest(&kit(), Some("v1")).await.expect_err("must fail");
    assert!(!error.is_transient(), "{error:?}");
    let error = error.to_string();
    let sent = Digest::of(&kit().bytes);
    assert!(error.contains(&format!("sent as {sent}")) && error.contains(&format!("filed {other}")), "{error}");
}

#[tokio::test]
async fn of_a_hostile_list_of_referrers_some_thousands_are_kept() {
    let setup = setup();
    setup.server.enable_referrers();
    let subject = Digest::of(b"a kit");
    let entry = |number: u32| {
        let artifact_type = if number.is_multiple_of(2) { TYPE } else { "another/type" };
        json!({"digest": Digest::of(&number.to_le_bytes()), "size": 1, "artifactType": artifact_type})
    };
    let page = json!({"schemaVersion": 2, "manifests": (0..20_000).map(entry).collect::<Vec<_>>()});
    setup.server.fault(subject, Fault::Replace(page.to_string().into_bytes()));
    setup.server.fault(subject, Fault::Header("Link", "<?from=0>; rel=\"next\"".to_owned()));
    let found = setup.target.referrers(&subject, TYPE).await.expect("a list");
    assert_eq!(found.len(), 4096);
    assert_eq!(found[1], Digest::of(&2_u32.to_le_bytes()), "of the type that was asked for, in their order");
    assert_eq!(setup.server.requests_for(subject), 1, "no page more than is kept");
}

#[tokio::test]
async fn a_connection_that_breaks_in_the_upload_is_a_transport_error() {
    for fault in [Fault::Truncate { after: 5_000_000 }, Fault::Reset { after: 5_000_000 }] {
        let setup = setup();
        let error = setup.error_with(fault).await;
        assert!(matches!(error, SourceError::Transport { .. }) && error.is_transient(), "{error:?}");
        let sent = setup.server.uploaded_for(setup.blob.digest);
        assert_eq!(sent, 5_000_000);
        setup.server.heal(setup.blob.digest);
        setup.put().await.expect("written");
    }
}

#[tokio::test]
async fn a_registry_that_stops_taking_bytes_is_given_up() {
    let setup = setup();
    let start = Instant::now();
    let error = setup.error_with(Fault::Hang { after: 1_000_000 }).await;
    assert!(matches!(error, SourceError::Transport { .. }), "{error:?}");
    assert!(error.to_string().contains("stalled: it took"), "{error}");
    assert!(start.elapsed() < SHORT * 20, "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_registry_that_has_all_and_does_not_answer_is_given_up() {
    let setup = setup();
    let error = setup.error_with(Fault::Hang { after: SIZE - 1 }).await;
    assert!(error.to_string().contains("stalled"), "{error}");
}

#[tokio::test]
async fn a_source_that_takes_its_time_does_not_count_as_a_stalled_registry() {
    let setup = setup();
    let bytes = b"two halves";
    let slow = stream::iter([&bytes[..5], &bytes[5..]]).then(async |half| {
        tokio::time::sleep(SHORT * 6).await;
        Ok(Unverified::new(half))
    });
    let blob = BlobId { digest: Digest::of(bytes), size: bytes.len() as u64 };
    setup.target.put_blob(&blob, Box::pin(slow)).await.expect("written");
}

#[tokio::test]
async fn a_blob_that_was_damaged_on_its_way_is_not_blamed_on_its_source() {
    let error = setup().error_with(Fault::FlipBit { offset: 77 }).await;
    assert!(matches!(error, SourceError::Refused { status: 400, .. }), "{error:?}");
    assert!(error.to_string().contains("what reached it has another digest than what left here"), "{error}");
}

#[tokio::test]
async fn a_wrong_source_is_blamed_and_the_registry_never_sees_the_end_of_it() {
    let mut setup = setup();
    setup.blob.digest = Digest::of(b"something else");
    let error = setup.put().await.expect_err("must fail").to_string();
    assert!(error.contains("where they come from is damaged"), "{error}");
    assert!(setup.server.uploaded_for(setup.blob.digest) < SIZE);
}

#[tokio::test]
async fn a_location_on_another_server_gets_the_bytes_and_no_token() {
    let setup = setup();
    setup.want_token(3600);
    let storage = FaultServer::empty("team/kit");
    let elsewhere = format!("http://{}/v2/team/kit/blobs/uploads/x?sig=1", storage.host());
    setup.server.fault("uploads", Fault::Location(Some(elsewhere)));
    setup.put().await.expect("written");
    assert!(storage.holds(&setup.blob.digest) && !setup.server.holds(&setup.blob.digest));
    let requests = storage.requests();
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].header("authorization"), None);
    assert!(requests[0].path.ends_with(&format!("?sig=1&digest=sha256%3A{}", setup.blob.digest.hex())));
}

#[tokio::test]
async fn a_location_may_be_absolute_on_the_same_server_and_gets_the_token() {
    let setup = setup();
    setup.want_token(3600);
    let absolute = format!("http://{}/v2/team/kit/blobs/uploads/x", setup.server.host());
    setup.server.fault("uploads", Fault::Location(Some(absolute)));
    setup.put().await.expect("written");
    assert!(setup.server.holds(&setup.blob.digest));
}

#[tokio::test]
async fn a_missing_location_or_one_that_leads_astray_breaks_the_protocol() {
    for (location, problem) in
        [(None, "its Location is missing"), (Some("file:///etc/passwd".to_owned()), "a file: URL")]
    {
        let setup = setup();
        setup.server.fault("uploads", Fault::Location(location));
        let error = setup.put().await.expect_err("must fail");
        assert!(matches!(error, SourceError::Protocol { .. }), "{error:?}");
        assert!(error.to_string().contains(problem), "{error}");
    }
}

#[tokio::test]
async fn a_blob_of_another_size_than_stated_is_not_taken_for_it() {
    let setup = setup();
    let blob = BlobId { digest: setup.server.add_blob(*b"four"), size: 5 };
    let error = setup.target.has_blob(&blob).await.expect_err("must fail").to_string();
    assert!(error.contains("holds 4 bytes under that digest, not 5"), "{error}");
}

#[tokio::test]
async fn a_manifest_that_is_refused_says_so_in_the_registrys_words() {
    let setup = setup();
    setup.server.fault("v1", refusal(400, "MANIFEST_BLOB_UNKNOWN", "blob unknown to registry"));
    let error = setup.target.put_manifest(&kit(), Some("v1")).await.expect_err("must fail").to_string();
    assert!(error.contains("answered 400 to manifest v1") && error.contains("blob unknown to registry"), "{error}");
}

#[tokio::test]
async fn without_the_api_referrers_are_kept_under_a_tag_beside_those_of_others() {
    let setup = setup();
    let subject = Digest::of(b"a kit");
    let tag = format!("sha256-{}", subject.hex());
    let theirs = json!({"mediaType": "m", "digest": "sha512:abc", "size": 1, "artifactType": "their/type", "x": 1});
    setup.server.add_manifest(&tag, json!({"schemaVersion": 2, "manifests": [theirs], "y": 2}).to_string());
    for _ in 0..2 {
        setup.target.put_manifest(&referrer(subject, "a"), None).await.expect("written");
    }
    let writes = setup.server.requests_to(&tag).iter().filter(|request| request.method == "PUT").count();
    assert_eq!(writes, 1, "what stands there is not written again");
    let digest = setup.target.resolve(&tag).await.expect("a digest");
    let index = setup.target.manifest(&digest).await.expect("there");
    let index: serde_json::Value = serde_json::from_slice(index.peek()).expect("JSON");
    assert_eq!(index["manifests"][0], theirs);
    assert_eq!(index["y"], 2);
    let ours = &index["manifests"][1];
    assert_eq!((&ours["artifactType"], &ours["annotations"]["title"]), (&json!(TYPE), &json!("a")));
    let found = setup.target.referrers(&subject, TYPE).await.expect("a list");
    assert_eq!(found, [Digest::of(&referrer(subject, "a").bytes)]);
    assert_eq!(setup.target.tags().await.expect("tags"), Vec::<String>::new());
}

#[tokio::test]
async fn something_else_under_the_tag_of_referrers_is_not_overwritten() {
    let setup = setup();
    let subject = Digest::of(b"a kit");
    let tag = format!("sha256-{}", subject.hex());
    let there = setup.server.add_manifest(&tag, "[]");
    let error = setup.target.put_manifest(&referrer(subject, "a"), None).await.expect_err("must fail").to_string();
    assert!(error.contains(&tag) && error.contains("remove that tag"), "{error}");
    assert_eq!(setup.target.resolve(&tag).await.expect("a digest"), there);
}

#[tokio::test]
async fn a_list_of_referrers_is_filtered_here_and_an_endless_one_ends() {
    let setup = setup();
    setup.server.enable_referrers();
    let subject = Digest::of(b"a kit");
    setup.target.put_manifest(&referrer(subject, "a"), None).await.expect("written");
    assert_eq!(setup.target.referrers(&subject, TYPE).await.expect("a list").len(), 1);
    assert_eq!(setup.target.referrers(&subject, "another/type").await.expect("a list"), []);
    let request = &setup.server.requests_to(subject)[0];
    assert_eq!(request.query("artifactType").as_deref(), Some(TYPE));
    setup.server.fault(subject, Fault::Header("Link", "<?from=0>; rel=\"next\"".to_owned()));
    let error = setup.target.referrers(&subject, TYPE).await.expect_err("must end").to_string();
    assert!(error.contains("more than 100 pages"), "{error}");
    setup.server.heal(subject);
    setup.server.fault(subject, Fault::Replace(b"<html>welcome</html>".to_vec()));
    assert_eq!(setup.target.referrers(&subject, TYPE).await.expect("no API, no tag"), []);
}

#[tokio::test]
async fn a_next_page_on_another_server_is_not_asked() {
    let setup = setup();
    setup.want_token(3600);
    setup.server.enable_referrers();
    let subject = Digest::of(b"a kit");
    let other = FaultServer::empty("team/kit");
    setup.server.fault(subject, Fault::Header("Link", format!("<http://{}/v2/>; rel=\"next\"", other.host())));
    setup.target.referrers(&subject, TYPE).await.expect("the first page");
    assert_eq!(other.requests().len(), 0);
}

#[tokio::test]
async fn nothing_is_written_where_nobody_answers() {
    let location = Location::Registry { host: "127.0.0.1:1".to_owned(), repository: "team/kit".to_owned() };
    let target = open_target(&location, &Connection::default(), Path::new("/nonexistent")).expect("a target");
    let error = target.put_manifest(&kit(), Some("v1")).await.expect_err("nobody is there");
    assert!(error.is_transient() && error.to_string().contains("can't be reached"), "{error}");
}

#[tokio::test]
async fn a_registry_that_has_all_may_think_for_longer_than_it_may_stall() {
    let setup = setup();
    let bytes = b"a small blob";
    let blob = BlobId { digest: Digest::of(bytes), size: bytes.len() as u64 };
    setup.server.fault(blob.digest, Fault::Delay(SHORT * 6));
    let stream = Box::pin(stream::iter([Ok(Unverified::new(&bytes[..]))]));
    setup.target.put_blob(&blob, stream).await.expect("written");
}
