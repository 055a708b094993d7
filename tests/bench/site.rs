//! A registry of files: Debian's nginx over a directory of blobs and manifests, which it sends as they lie there. It is the
//! fastest server that there is to measure against, and logs each request with its bytes.
//!
//! ```text
//! www/v2/bench/kit/blobs/sha256:<hex>
//! www/v2/bench/kit/manifests/<tag>
//! access.log                           a line a request: status, bytes, method, path
//! ```

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use kitfs::digest::Digest;

use crate::support::{eventually, http};

/// The repository of everything.
const REPOSITORY: &str = "bench/kit";

/// A running server over a directory of its own; both go when it is dropped.
pub struct Site {
    dir: tempfile::TempDir,
    host: String,
    process: Child,
}

/// What a server was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    pub requests: u64,
    pub bytes: u64,
}

impl Site {
    /// An empty one.
    pub fn start() -> Self {
        // Another process may take the free port first: then nginx ends, and the next port is tried.
        (0..5).find_map(|_| Self::try_start()).expect("nginx starts on one of five ports")
    }

    fn try_start() -> Option<Self> {
        let dir = tempfile::tempdir().expect("a directory");
        for part in ["blobs", "manifests"] {
            fs::create_dir_all(dir.path().join("www/v2").join(REPOSITORY).join(part)).expect("created");
        }
        fs::create_dir(dir.path().join("tmp")).expect("created");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let host = listener.local_addr().expect("its address").to_string();
        drop(listener);
        let configuration = dir.path().join("nginx.conf");
        fs::write(&configuration, self::configuration(dir.path(), &host)).expect("written");
        let mut process = Command::new("nginx")
            .args(["-e", "error.log", "-p"])
            .arg(dir.path())
            .arg("-c")
            .arg(&configuration)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("nginx: {error}; scripts/setup bench installs it"));
        let answers = || http::request(&host, "GET", "/v2/", &[], b"").is_ok_and(|answer| answer.status == 200);
        let mut ended = false;
        eventually("nginx answers", || {
            ended = process.try_wait().expect("a child").is_some();
            ended || answers()
        });
        (!ended).then_some(Self { dir, host, process })
    }

    /// Host and port.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The process that serves.
    pub fn process(&self) -> u32 {
        self.process.id()
    }

    /// The reference of a tag, with the server at `host`, which may be a proxy before it.
    pub fn reference_at(&self, host: &str, tag: &str) -> String {
        format!("{host}/{REPOSITORY}:{tag}")
    }

    pub fn reference(&self, tag: &str) -> String {
        self.reference_at(&self.host, tag)
    }

    /// The URL of a blob, with the server at `host`.
    pub fn url_at(&self, host: &str, blob: &Digest) -> String {
        format!("http://{host}/v2/{REPOSITORY}/blobs/{blob}")
    }

    pub fn url(&self, blob: &Digest) -> String {
        self.url_at(&self.host, blob)
    }

    /// Where a file lies before its digest is known.
    pub fn new_file(&self) -> tempfile::NamedTempFile {
        tempfile::NamedTempFile::new_in(self.dir.path()).expect("a new file")
    }

    /// The file of a blob.
    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.repository("blobs").join(digest.to_string())
    }

    /// The files of all blobs.
    pub fn blobs(&self) -> Vec<PathBuf> {
        let files = fs::read_dir(self.repository("blobs")).expect("a directory");
        files.map(|file| file.expect("an entry").path()).collect()
    }

    /// The file of a manifest.
    pub fn manifest(&self, tag: &str) -> PathBuf {
        self.repository("manifests").join(tag)
    }

    /// Adds a small blob.
    pub fn add_blob(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        fs::write(self.blob(&digest), bytes).expect("written");
        digest
    }

    /// Puts a manifest under a tag.
    pub fn add_manifest(&self, tag: &str, bytes: &[u8]) {
        for name in [tag.to_owned(), Digest::of(bytes).to_string()] {
            fs::write(self.manifest(&name), bytes).expect("written");
        }
    }

    /// What was asked of one blob since the server started. A request is logged when its answer has been sent.
    pub fn traffic(&self, blob: &Digest) -> Traffic {
        let log = fs::read_to_string(self.dir.path().join("access.log")).unwrap_or_default();
        let mut traffic = Traffic { requests: 0, bytes: 0 };
        for line in log.lines().filter(|line| line.ends_with(&blob.to_string())) {
            traffic.requests += 1;
            traffic.bytes +=
                line.split(' ').nth(1).and_then(|bytes| bytes.parse::<u64>().ok()).expect("a number of bytes");
        }
        traffic
    }

    fn repository(&self, part: &str) -> PathBuf {
        self.dir.path().join("www/v2").join(REPOSITORY).join(part)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is gone after this.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// One process, so that what it uses of the CPU is in one place; it sends from the page cache without waiting.
fn configuration(dir: &Path, host: &str) -> String {
    let dir = dir.display();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|kind| format!("  {kind}_temp_path {dir}/tmp/{kind};\n"))
        .collect();
    format!(
        "daemon off;\nmaster_process off;\npid {dir}/nginx.pid;\nerror_log {dir}/error.log warn;\n\
         events {{ worker_connections 1024; }}\n\
         http {{\n{temporary}\
         \x20 log_format bench '$status $body_bytes_sent $request_method $uri';\n\
         \x20 access_log {dir}/access.log bench;\n\
         \x20 sendfile on;\n  tcp_nopush on;\n  keepalive_requests 1000000;\n  keepalive_timeout 300s;\n\
         \x20 default_type application/octet-stream;\n\
         \x20 server {{\n    listen {host};\n    root {dir}/www;\n\
         \x20   location = /v2/ {{ return 200 '{{}}'; }}\n\
         \x20   location ~ /manifests/ {{ default_type application/vnd.oci.image.manifest.v1+json; }}\n\
         \x20 }}\n}}\n"
    )
}
