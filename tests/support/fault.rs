//! A registry of our own on loopback that counts every request and byte, and misbehaves as it is told.
//!
//! ```text
//! /v2/<repository>/{manifests,blobs}/<target>    with authorization, if `Auth` asks for it
//! /v2/<repository>/tags/list
//! /v2/<repository>/blobs/uploads/[<session>]     writing: see `upload`
//! /v2/<repository>/referrers/<digest>            if it is told to have that API
//! /token                                         the token server
//! /storage/<digest>?sig=…                        where a redirect may lead: no authorization, maybe a signature
//! ```
//!
//! Faults, gates and counters go by *target*: the last part of a path (a digest, a tag, `list` or `token`), the digest
//! of the blob that a PUT brings, and `uploads` or `mount` for the POST before it.

use std::collections::{BTreeMap, HashMap};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kitfs::digest::Digest;
use kitfs::reference::Location;

use super::content::Content;
use super::wire;

/// What goes wrong with an answer. Several may be set on one target; byte counts are of one body: the answer's, or the
/// one that a PUT brings.
#[derive(Debug, Clone)]
pub enum Fault {
    /// The lowest bit of the byte at this offset of the blob is flipped.
    FlipBit { offset: u64 },
    /// The connection is closed after so many bytes.
    Truncate { after: u64 },
    /// The connection is reset after so many bytes.
    Reset { after: u64 },
    /// Nothing more comes after so many bytes, and the connection stays open.
    Hang { after: u64 },
    /// Not even a header comes.
    Silence,
    /// One byte at a time, with this pause after each.
    Drip { every: Duration },
    /// So many bytes too many, with no `Content-Length` to tell.
    Longer { extra: u64 },
    /// 200 and the whole blob, whatever range was asked.
    IgnoreRange,
    /// This `Content-Range`.
    ContentRange(String),
    /// This header beside the others.
    Header(&'static str, String),
    /// This status and no blob.
    Status { status: u16, retry_after: Option<String> },
    /// 307 to this URL (from `/v2/` only, so that a server can redirect to itself).
    Redirect { to: String },
    /// This `Location` for an upload, or none.
    Location(Option<String>),
    /// This status and this body.
    Refuse { status: u16, body: String },
    /// The same for requests that change something; the others are answered.
    RefuseWrites { status: u16, body: String },
    /// Other bytes than those of this digest, and no digest header.
    Replace(Vec<u8>),
    /// A pause before the answer.
    Delay(Duration),
}

impl Fault {
    /// A status without `Retry-After`.
    pub fn status(status: u16) -> Self {
        Self::Status { status, retry_after: None }
    }
}

/// What the server wants before it answers.
#[derive(Debug, Clone, Default)]
pub enum Auth {
    #[default]
    Open,
    Basic {
        user: String,
        password: String,
    },
    /// A token from `realm` (the server's own `/token` if none is given) that expires after `expires_in` seconds.
    Bearer {
        realm: Option<String>,
        login: Login,
        expires_in: u64,
    },
}

/// Who gets a token.
#[derive(Debug, Clone)]
pub enum Login {
    Anyone,
    Nobody,
    Password { user: String, password: String },
    RefreshToken(String),
}

/// One request as it arrived.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    /// With the query.
    pub path: String,
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
}

impl Request {
    /// A header by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// The last part of the path.
    pub fn target(&self) -> String {
        if self.path.contains("/blobs/uploads/") {
            if self.method == "POST" {
                return if self.query("mount").is_some() { "mount" } else { "uploads" }.to_owned();
            }
            if let Some(digest) = self.query("digest") {
                return digest;
            }
        }
        let path = self.path.split('?').next().unwrap_or_default();
        path.rsplit('/').next().unwrap_or_default().to_owned()
    }

    /// A value in the query, decoded.
    pub fn query(&self, name: &str) -> Option<String> {
        let url = url::Url::parse("http://server").and_then(|base| base.join(&self.path)).ok()?;
        url.query_pairs().find_map(|(key, value)| (key == name).then(|| value.into_owned()))
    }

    /// First and last byte of the range that was asked for.
    pub fn range(&self) -> Option<(u64, u64)> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()?))
    }
}

/// A running fault server; dropping it closes every connection.
pub struct FaultServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    listening: Option<JoinHandle<()>>,
}

pub(super) struct Shared {
    pub(super) repository: String,
    pub(super) address: SocketAddr,
    pub(super) stop: AtomicBool,
    state: Mutex<State>,
    /// Weak, so that a thread that drops its connection closes it: a reset must not wait for a copy.
    connections: Mutex<Vec<Weak<TcpStream>>>,
    tokens_issued: AtomicUsize,
    accepted: AtomicUsize,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) contents: HashMap<Digest, Arc<Content>>,
    pub(super) tags: BTreeMap<String, Digest>,
    pub(super) faults: HashMap<String, Vec<(Fault, usize)>>,
    pub(super) gates: HashMap<String, Arc<GateState>>,
    pub(super) auth: Auth,
    /// Until when, and for which scopes.
    pub(super) tokens: HashMap<String, (Instant, String)>,
    pub(super) requests: Vec<Request>,
    pub(super) bytes: HashMap<String, u64>,
    pub(super) rtt: Duration,
    pub(super) rate: Option<u64>,
    pub(super) rate_free_at: Option<Instant>,
    pub(super) page: Option<usize>,
    pub(super) signature: Option<String>,
    pub(super) uploaded: HashMap<String, u64>,
    pub(super) sessions: usize,
    pub(super) mounts: bool,
    /// The descriptors of each subject's referrers, if the server has that API.
    pub(super) referrers: Option<HashMap<Digest, Vec<serde_json::Value>>>,
}

impl Shared {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test thread has panicked with it")
    }

    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Sleeps, but not beyond the server's end.
    pub(super) fn sleep(&self, duration: Duration) {
        let end = Instant::now() + duration;
        while !self.stopped() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(Duration::from_millis(10)));
        }
    }

    pub(super) fn new_token(&self, lifetime: Duration, scopes: String) -> String {
        let number = self.tokens_issued.fetch_add(1, Ordering::Relaxed) + 1;
        let token = format!("token-{number}");
        self.state().tokens.insert(token.clone(), (Instant::now() + lifetime, scopes));
        token
    }
}

impl FaultServer {
    /// An empty repository.
    pub fn empty(repository: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("its address");
        let shared = Arc::new(Shared {
            repository: repository.to_owned(),
            address,
            stop: AtomicBool::new(false),
            state: Mutex::default(),
            connections: Mutex::default(),
            tokens_issued: AtomicUsize::new(0),
            accepted: AtomicUsize::new(0),
        });
        let serving = Arc::clone(&shared);
        let listening = std::thread::spawn(move || {
            let shared = serving;
            for stream in listener.incoming().map_while(Result::ok) {
                if shared.stopped() {
                    return;
                }
                shared.accepted.fetch_add(1, Ordering::Relaxed);
                let stream = Arc::new(stream);
                let mut connections = shared.connections.lock().expect("not poisoned");
                connections.retain(|connection| connection.strong_count() > 0);
                connections.push(Arc::downgrade(&stream));
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || wire::serve(&shared, &stream));
            }
        });
        Self { address, shared, listening: Some(listening) }
    }

    /// A repository with all tags and blobs of an OCI layout.
    pub fn from_layout(dir: impl AsRef<Path>, repository: &str) -> Self {
        let server = Self::empty(repository);
        server.add_layout(dir);
        server
    }

    /// Adds all tags and blobs of an OCI layout.
    pub fn add_layout(&self, dir: impl AsRef<Path>) {
        let dir = dir.as_ref();
        for entry in std::fs::read_dir(dir.join("blobs/sha256")).expect("a layout") {
            let path = entry.expect("an entry").path();
            let hex = path.file_name().and_then(|name| name.to_str()).expect("a name");
            self.add_content(Digest::from_hex(hex).expect("a digest"), Content::file(&path));
        }
        let index = std::fs::read(dir.join("index.json")).expect("an index");
        let index: serde_json::Value = serde_json::from_slice(&index).expect("an index in JSON");
        for descriptor in index["manifests"].as_array().expect("manifests") {
            let digest = descriptor["digest"].as_str().and_then(|text| text.parse().ok()).expect("a digest");
            if let Some(tag) = descriptor["annotations"]["org.opencontainers.image.ref.name"].as_str() {
                self.tag(tag, digest);
            }
        }
    }

    /// Adds a blob or manifest under its digest.
    pub fn add_blob(&self, bytes: impl Into<Vec<u8>>) -> Digest {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        self.add_content(digest, Content::Bytes(bytes));
        digest
    }

    /// Adds content under a digest that the test vouches for, or deliberately does not.
    pub fn add_content(&self, digest: Digest, content: Content) {
        self.shared.state().contents.insert(digest, Arc::new(content));
    }

    /// Adds a manifest under its digest and a tag.
    pub fn add_manifest(&self, tag: &str, bytes: impl Into<Vec<u8>>) -> Digest {
        let digest = self.add_blob(bytes);
        self.tag(tag, digest);
        digest
    }

    /// Adds a manifest that refers to another, and lists it under the tag that the referrers tag schema gives to it.
    pub fn add_referrer(&self, subject: &Digest, artifact_type: &str, bytes: impl Into<Vec<u8>>) -> Digest {
        let bytes = bytes.into();
        let size = bytes.len();
        let digest = self.add_blob(bytes);
        let tag = format!("sha256-{}", subject.hex());
        let known = self.shared.state().tags.get(&tag).copied();
        let mut manifests: Vec<serde_json::Value> = match known.and_then(|known| self.bytes_of(&known)) {
            Some(bytes) => {
                let index: serde_json::Value = serde_json::from_slice(&bytes).expect("an index in JSON");
                index["manifests"].as_array().expect("manifests").clone()
            }
            None => Vec::new(),
        };
        manifests.push(serde_json::json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "artifactType": artifact_type,
            "digest": digest,
            "size": size,
        }));
        let index = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": manifests,
        });
        self.add_manifest(&tag, index.to_string());
        digest
    }

    /// Forgets a blob or manifest.
    pub fn remove(&self, digest: &Digest) {
        self.shared.state().contents.remove(digest);
    }

    /// How long a blob or manifest is.
    pub fn len_of(&self, digest: &Digest) -> Option<u64> {
        self.shared.state().contents.get(digest).map(|content| content.len())
    }

    /// All bytes of a blob or manifest.
    pub fn bytes_of(&self, digest: &Digest) -> Option<Vec<u8>> {
        let content = self.shared.state().contents.get(digest).cloned()?;
        let mut bytes = vec![0; content.len() as usize];
        content.read_at(0, &mut bytes);
        Some(bytes)
    }

    /// Points a tag at a digest.
    pub fn tag(&self, tag: &str, digest: Digest) {
        self.shared.state().tags.insert(tag.to_owned(), digest);
    }

    /// Host and port.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// The location of its repository.
    pub fn location(&self) -> Location {
        Location::Registry { host: self.host(), repository: self.shared.repository.clone() }
    }

    /// The reference that a user types.
    pub fn reference(&self, tag: &str) -> String {
        format!("{}/{}:{tag}", self.host(), self.shared.repository)
    }

    /// The URL of a blob outside of the registry's API.
    pub fn storage_url(&self, digest: &Digest, query: &str) -> String {
        format!("http://{}/storage/{digest}?{query}", self.host())
    }

    /// Sets a fault on all further requests for a target.
    pub fn fault(&self, target: impl ToString, fault: Fault) {
        self.fault_times(usize::MAX, target, fault);
    }

    /// Sets a fault on the next `times` requests for a target.
    pub fn fault_times(&self, times: usize, target: impl ToString, fault: Fault) {
        self.shared.state().faults.entry(target.to_string()).or_default().push((fault, times));
    }

    /// Takes all faults of a target away.
    pub fn heal(&self, target: impl ToString) {
        self.shared.state().faults.remove(&target.to_string());
    }

    /// What is wanted before an answer.
    pub fn set_auth(&self, auth: Auth) {
        self.shared.state().auth = auth;
    }

    /// Makes every token that was issued invalid.
    pub fn revoke_tokens(&self) {
        self.shared.state().tokens.clear();
    }

    /// A pause before each answer, as a far registry has.
    pub fn set_rtt(&self, rtt: Duration) {
        self.shared.state().rtt = rtt;
    }

    /// Bytes a second, over all connections together.
    pub fn set_rate(&self, rate: Option<u64>) {
        self.shared.state().rate = rate;
    }

    /// How many tags a page of the list has.
    pub fn set_page(&self, tags: usize) {
        self.shared.state().page = Some(tags);
    }

    /// The signature that `/storage` wants in the query.
    pub fn set_signature(&self, signature: &str) {
        self.shared.state().signature = Some(signature.to_owned());
    }

    /// Whether blobs that are there are mounted when asked.
    pub fn set_mounts(&self, mounts: bool) {
        self.shared.state().mounts = mounts;
    }

    /// Gives it the referrers API.
    pub fn enable_referrers(&self) {
        self.shared.state().referrers = Some(HashMap::new());
    }

    /// How many bytes of a blob were taken, in all attempts to write it.
    pub fn uploaded_for(&self, digest: impl ToString) -> u64 {
        self.shared.state().uploaded.get(&digest.to_string()).copied().unwrap_or_default()
    }

    /// Whether it holds a blob or manifest.
    pub fn holds(&self, digest: &Digest) -> bool {
        self.shared.state().contents.contains_key(digest)
    }

    /// Holds every body of a target after so many bytes, until the gate is released or dropped.
    pub fn hold(&self, target: impl ToString, after: u64) -> Gate {
        let gate = Arc::new(GateState { after, reached: AtomicUsize::new(0), open: AtomicBool::new(false) });
        self.shared.state().gates.insert(target.to_string(), Arc::clone(&gate));
        Gate(gate)
    }

    /// Every request so far.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.state().requests.clone()
    }

    /// The requests for a target so far.
    pub fn requests_to(&self, target: impl ToString) -> Vec<Request> {
        let target = target.to_string();
        self.shared.state().requests.iter().filter(|request| request.target() == target).cloned().collect()
    }

    /// How many requests there were for a target.
    pub fn requests_for(&self, target: impl ToString) -> usize {
        self.requests_to(target).len()
    }

    /// The ranges that were asked of a target, first and last byte; requests without a range are left out.
    pub fn ranges_for(&self, target: impl ToString) -> Vec<(u64, u64)> {
        self.requests_to(target).iter().filter_map(Request::range).collect()
    }

    /// How many bytes of bodies were sent for a target.
    pub fn bytes_for(&self, target: impl ToString) -> u64 {
        self.shared.state().bytes.get(&target.to_string()).copied().unwrap_or_default()
    }

    /// How many bytes of bodies were sent in all.
    pub fn bytes(&self) -> u64 {
        self.shared.state().bytes.values().sum()
    }

    /// How many connections were accepted.
    pub fn connections(&self) -> usize {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    /// Forgets requests and bytes.
    pub fn reset_counters(&self) {
        let mut state = self.shared.state();
        state.requests.clear();
        state.bytes.clear();
        state.uploaded.clear();
    }
}

impl Drop for FaultServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for connection in
            self.shared.connections.lock().expect("not poisoned").drain(..).filter_map(|weak| weak.upgrade())
        {
            // The other side may have closed it first.
            let _ = connection.shutdown(Shutdown::Both);
        }
        // Wakes the thread that accepts, which then drops its listener: after this, nobody answers.
        let _ = TcpStream::connect(self.address);
        let _ = self.listening.take().map(JoinHandle::join);
    }
}

pub(super) struct GateState {
    pub(super) after: u64,
    pub(super) reached: AtomicUsize,
    pub(super) open: AtomicBool,
}

/// Holds bodies back; see [`FaultServer::hold`].
pub struct Gate(Arc<GateState>);

impl Gate {
    /// Waits until `answers` bodies have come to the gate.
    pub fn wait_until_reached_by(&self, answers: usize) {
        super::eventually("a body at the gate", || self.reached() >= answers);
    }

    /// How many bodies have come to the gate.
    pub fn reached(&self) -> usize {
        self.0.reached.load(Ordering::Relaxed)
    }

    /// Lets them go on, and all later ones pass.
    pub fn release(&self) {
        self.0.open.store(true, Ordering::Relaxed);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.release();
    }
}
