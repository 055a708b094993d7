//! Who may ask a registry, and where a secret may go: tokens, credential files, redirects.

mod support;

use std::sync::Arc;
use std::time::Duration;

use kitfs::digest::Digest;
use kitfs::source::{BlobId, Connection, Source, SourceError, open};
use support::{Auth, Fault, FaultServer, Login, collect};

const SECRET: &str = "correct-horse";
const HOUR: u64 = 3600;

/// A server with one blob, and a source whose user's home is a directory of the test's own.
struct Setup {
    server: FaultServer,
    source: Arc<dyn Source>,
    home: tempfile::TempDir,
    blob: BlobId,
}

fn setup(auth: Auth) -> Setup {
    let server = FaultServer::empty("team/kit");
    let bytes = b"the bytes of a blob";
    let blob = BlobId { digest: server.add_blob(bytes.as_slice()), size: bytes.len() as u64 };
    server.add_manifest("v1", r#"{"schemaVersion":2}"#);
    server.set_auth(auth);
    let home = tempfile::tempdir().expect("a directory");
    let source = open(&server.location(), &Connection::default(), home.path()).expect("a source");
    Setup { server, source, home, blob }
}

fn bearer(login: Login, expires_in: u64) -> Auth {
    Auth::Bearer { realm: None, login, expires_in }
}

fn password() -> Login {
    Login::Password { user: "me".to_owned(), password: SECRET.to_owned() }
}

impl Setup {
    async fn read(&self) -> Result<Vec<u8>, SourceError> {
        collect(self.source.blob(&self.blob, 0..5).await?).await
    }

    /// Writes kit's credential file.
    fn log_in(&self, entry: serde_json::Value) {
        let file = serde_json::json!({"auths": {self.server.host(): entry}});
        std::fs::write(self.home.path().join("credentials.json"), file.to_string()).expect("written");
    }

    fn token_requests(&self) -> usize {
        self.server.requests_for("token")
    }
}

fn user_entry() -> serde_json::Value {
    serde_json::json!({"username": "me", "password": SECRET})
}

#[tokio::test]
async fn an_open_registry_is_asked_for_no_token() {
    let setup = setup(Auth::Open);
    setup.read().await.expect("bytes");
    assert_eq!(setup.server.requests().len(), 1);
}

#[tokio::test]
async fn an_anonymous_token_is_fetched_for_the_scope_that_the_registry_names_and_kept() {
    let setup = setup(bearer(Login::Anyone, HOUR));
    for _ in 0..3 {
        setup.read().await.expect("bytes");
    }
    assert_eq!(setup.token_requests(), 1);
    let request = &setup.server.requests_to("token")[0];
    assert!(request.path.contains("service=fault"), "{request:?}");
    assert!(request.path.contains("scope=repository%3Ateam%2Fkit%3Apull"), "{request:?}");
    assert!(request.header("authorization").is_none(), "{request:?}");
    assert_eq!(setup.server.requests_for(setup.blob.digest), 4, "one 401, three answers");
}

#[tokio::test]
async fn sixteen_cold_reads_fetch_one_token() {
    let setup = setup(bearer(password(), HOUR));
    setup.log_in(user_entry());
    setup.server.set_rtt(Duration::from_millis(20));
    for read in futures_util::future::join_all((0..16).map(|_| setup.read())).await {
        read.expect("bytes");
    }
    assert_eq!(setup.token_requests(), 1);
}

#[tokio::test]
async fn a_reader_who_leaves_does_not_cancel_the_token_of_the_others() {
    let setup = setup(bearer(Login::Anyone, HOUR));
    setup.server.fault("token", Fault::Delay(Duration::from_millis(200)));
    let leaves = tokio::time::timeout(Duration::from_millis(100), setup.read());
    let (left, stayed) = tokio::join!(leaves, setup.read());
    assert!(left.is_err(), "it left before the token came");
    stayed.expect("bytes");
    assert_eq!(setup.token_requests(), 1);
}

#[tokio::test]
async fn a_token_is_renewed_before_it_expires() {
    let setup = setup(bearer(Login::Anyone, 1));
    setup.read().await.expect("bytes");
    tokio::time::sleep(Duration::from_millis(800)).await;
    setup.read().await.expect("bytes");
    assert_eq!(setup.token_requests(), 2);
    let refused = setup.server.requests_for(setup.blob.digest) - 2;
    assert_eq!(refused, 1, "only the first request met a 401");
}

#[tokio::test]
async fn a_token_that_the_registry_revoked_is_renewed_once() {
    let setup = setup(bearer(Login::Anyone, HOUR));
    setup.read().await.expect("bytes");
    setup.server.revoke_tokens();
    setup.read().await.expect("bytes");
    assert_eq!(setup.token_requests(), 2);
}

#[tokio::test]
async fn a_registry_that_refuses_a_new_token_too_is_not_asked_again() {
    let setup = setup(bearer(Login::Anyone, 0));
    let error = setup.read().await.expect_err("a token that never holds");
    assert!(matches!(error, SourceError::Unauthorized { .. }), "{error:?}");
    assert_eq!(setup.server.requests_for(setup.blob.digest), 2);
}

#[tokio::test]
async fn a_401_names_the_host_the_remedy_and_what_was_tried() {
    let setup = setup(bearer(password(), HOUR));
    let text = setup.read().await.expect_err("nobody has logged in").to_string();
    let host = setup.server.host();
    assert!(text.contains(&format!("run `kit login {host}` or `docker login {host}`")), "{text}");
    assert!(text.contains("without credentials") && text.contains("credentials.json"), "{text}");

    setup.log_in(serde_json::json!({"username": "me", "password": "hunter2"}));
    let text = setup.read().await.expect_err("a wrong password").to_string();
    assert!(text.contains("user \"me\" of ") && !text.contains("hunter2"), "{text}");
}

#[tokio::test]
async fn credential_files_are_read_anew_at_each_token_request() {
    let setup = setup(bearer(password(), HOUR));
    assert!(setup.read().await.is_err());
    setup.log_in(user_entry());
    setup.read().await.expect("bytes, after `kit login`");
}

#[tokio::test]
async fn basic_authentication_is_answered_and_a_changed_password_is_found() {
    let basic = |password: &str| Auth::Basic { user: "me".to_owned(), password: password.to_owned() };
    let setup = setup(basic(SECRET));
    let error = setup.read().await.expect_err("nobody has logged in");
    assert!(matches!(error, SourceError::Unauthorized { .. }), "{error:?}");
    setup.log_in(user_entry());
    setup.read().await.expect("bytes");
    setup.server.set_auth(basic("changed"));
    setup.log_in(serde_json::json!({"auth": "bWU6Y2hhbmdlZA=="}));
    setup.read().await.expect("bytes");
}

#[tokio::test]
async fn an_identity_token_is_exchanged_by_post() {
    let setup = setup(bearer(Login::RefreshToken("refresh-me".to_owned()), HOUR));
    setup.log_in(serde_json::json!({"identitytoken": "refresh-me"}));
    setup.read().await.expect("bytes");
    let request = &setup.server.requests_to("token")[0];
    let form = String::from_utf8_lossy(&request.body).into_owned();
    assert_eq!(request.method, "POST");
    for part in ["grant_type=refresh_token", "service=fault", "client_id=kitfs", "scope=repository%3Ateam%2Fkit%3Apull"]
    {
        assert!(form.contains(part), "{form}");
    }
    assert!(!request.path.contains("refresh-me"), "a secret does not belong into a URL");
}

#[tokio::test]
async fn a_post_with_a_secret_follows_no_redirect() {
    let setup = setup(bearer(Login::RefreshToken("refresh-me".to_owned()), HOUR));
    setup.log_in(serde_json::json!({"identitytoken": "refresh-me"}));
    let thief = FaultServer::empty("x");
    setup.server.fault("token", Fault::Status { status: 307, retry_after: None });
    setup.server.fault("token", Fault::Header("Location", format!("http://{}/token", thief.host())));
    assert!(setup.read().await.is_err());
    assert_eq!(thief.requests().len(), 0);
}

#[tokio::test]
async fn a_token_server_that_is_no_url_is_refused() {
    for realm in ["not a url", "file:///etc/passwd", "http://me:pw@127.0.0.1/token"] {
        let auth = Auth::Bearer { realm: Some(realm.to_owned()), login: Login::Anyone, expires_in: HOUR };
        let error = setup(auth).read().await.expect_err("must be refused");
        assert!(matches!(error, SourceError::Protocol { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn a_busy_token_server_is_a_transient_error_and_a_broken_one_is_named() {
    let setup = setup(bearer(Login::Anyone, HOUR));
    let busy = Fault::Status { status: 429, retry_after: Some("3".to_owned()) };
    setup.server.fault_times(1, "token", busy);
    let error = setup.read().await.expect_err("busy");
    assert!(matches!(error, SourceError::Status { status: 429, retry_after: Some(_), .. }), "{error:?}");
    setup.server.fault_times(1, "token", Fault::status(200));
    let error = setup.read().await.expect_err("no token in it").to_string();
    assert!(error.contains("sent no token"), "{error}");
    setup.read().await.expect("bytes, once it is well");
}

#[tokio::test]
async fn a_redirect_to_another_host_keeps_the_range_and_drops_the_authorization() {
    let setup = setup(bearer(Login::Anyone, HOUR));
    let storage = FaultServer::empty("storage");
    storage.add_blob(b"the bytes of a blob".as_slice());
    let to = storage.storage_url(&setup.blob.digest, "sig=secret");
    setup.server.fault(setup.blob.digest, Fault::Redirect { to });
    assert_eq!(setup.read().await.expect("bytes"), b"the b");
    let request = &storage.requests()[0];
    assert_eq!(request.range(), Some((0, 4)));
    assert!(request.header("authorization").is_none(), "{request:?}");
}

#[tokio::test]
async fn the_end_of_a_redirect_is_remembered_until_it_expires() {
    let setup = setup(Auth::Open);
    let storage = FaultServer::empty("storage");
    storage.add_blob(b"the bytes of a blob".as_slice());
    let digest = setup.blob.digest;
    storage.set_signature("one");
    setup.server.fault(digest, Fault::Redirect { to: storage.storage_url(&digest, "sig=one") });
    for _ in 0..3 {
        setup.read().await.expect("bytes");
    }
    assert_eq!(setup.server.requests_for(digest), 1, "the registry was asked once");
    storage.set_signature("two");
    setup.server.heal(digest);
    setup.server.fault(digest, Fault::Redirect { to: storage.storage_url(&digest, "sig=two") });
    setup.read().await.expect("bytes, resolved anew");
    assert_eq!(setup.server.requests_for(digest), 2);
}

#[tokio::test]
async fn a_refusal_by_the_storage_names_it_and_not_its_signature() {
    let setup = setup(Auth::Open);
    let storage = FaultServer::empty("storage");
    storage.set_signature("right");
    let to = storage.storage_url(&setup.blob.digest, "sig=wrong-secret");
    setup.server.fault(setup.blob.digest, Fault::Redirect { to });
    let error = setup.read().await.expect_err("a wrong signature");
    assert!(matches!(error, SourceError::Forbidden { .. }), "{error:?}");
    let text = format!("{error} {error:?} {:?}", setup.source);
    assert!(text.contains(&storage.host()) && !text.contains("wrong-secret"), "{text}");

    drop(storage);
    let error = setup.read().await.expect_err("nobody listens");
    assert!(!format!("{error:?}").contains("wrong-secret"), "{error:?}");
}

#[tokio::test]
async fn redirects_in_a_circle_end() {
    let setup = setup(Auth::Open);
    let to = format!("http://{}/v2/team/kit/blobs/{}", setup.server.host(), setup.blob.digest);
    setup.server.fault(setup.blob.digest, Fault::Redirect { to });
    let error = setup.read().await.expect_err("a circle").to_string();
    assert!(error.contains("redirects"), "{error}");
}

#[tokio::test]
async fn no_secret_is_in_what_a_source_shows_of_itself() {
    let setup = setup(bearer(password(), HOUR));
    setup.log_in(user_entry());
    setup.read().await.expect("bytes");
    let error = setup.source.manifest(&Digest::of(b"nowhere")).await.expect_err("no such manifest");
    assert!(!format!("{error} {error:?} {:?}", setup.source).contains(SECRET));
}
