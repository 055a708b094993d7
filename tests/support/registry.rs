//! Debian's `docker-registry` as a child process on a free loopback port, over a directory of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use kitfs::digest::Digest;
use kitfs::reference::Location;
use serde_json::Value;

use super::http::{Response, request};

/// The one user of a registry with a password.
pub const USER: &str = "kit";
/// The password of that user.
pub const PASSWORD: &str = "sesame";
/// bcrypt of [`PASSWORD`], cost 5: this registry reads no other hash.
const PASSWORD_HASH: &str = "$2y$05$abcdefghijklmnopqrstuuKcS.CYWVYVaLiiCKrrc0A5s3mGesJ9O";
/// How long a registry may take to start on a busy machine.
const START: Duration = Duration::from_secs(20);

/// How a registry is to be started.
#[derive(Default)]
pub struct RegistryOptions {
    /// Serve another registry's directory.
    pub storage: Option<PathBuf>,
    /// Ask for [`USER`] and [`PASSWORD`].
    pub password: bool,
    /// Speak TLS, with the certificate in `tests/support/tls`. It can't be pushed to: share a plain one's storage.
    pub tls: bool,
    /// Demand a client certificate as well.
    pub client_certificate: bool,
    /// Write down each request, for [`Registry::accesses`].
    pub access_log: bool,
}

/// A running registry; dropping it ends the process.
pub struct Registry {
    process: Child,
    port: u16,
    storage: PathBuf,
    password: bool,
    dir: tempfile::TempDir,
}

impl Registry {
    /// A registry over plain HTTP that asks for nothing.
    pub fn start() -> Self {
        Self::start_with(RegistryOptions::default())
    }

    pub fn start_with(options: RegistryOptions) -> Self {
        // Another process may take the free port first: then the child exits, and the next port is tried.
        for _ in 0..5 {
            if let Some(registry) = Self::try_start(&options) {
                return registry;
            }
        }
        panic!("docker-registry did not start on any of five ports");
    }

    fn try_start(options: &RegistryOptions) -> Option<Self> {
        let dir = tempfile::tempdir().expect("a directory");
        let storage = options.storage.clone().unwrap_or_else(|| dir.path().join("storage"));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        drop(listener);
        let config = dir.path().join("config.yml");
        std::fs::write(&config, configuration(options, dir.path(), &storage, port)).expect("written");
        let log = std::fs::File::create(dir.path().join("log")).expect("a log file");
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("install docker-registry (apt-get install docker-registry): {error}"));
        let mut registry = Self { process, port, storage, password: options.password, dir };
        registry.wait_until_it_answers(options.tls).then_some(registry)
    }

    fn wait_until_it_answers(&mut self, tls: bool) -> bool {
        let start = Instant::now();
        while start.elapsed() < START {
            if self.process.try_wait().expect("a child").is_some() {
                return false;
            }
            let up = if tls {
                std::net::TcpStream::connect(self.host()).is_ok()
            } else {
                request(&self.host(), "GET", "/v2/", &[], b"").is_ok_and(|answer| matches!(answer.status, 200 | 401))
            };
            if up {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    /// Host and port.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The process that serves.
    pub fn process(&self) -> u32 {
        self.process.id()
    }

    /// The location of one of its repositories.
    pub fn location(&self, repository: &str) -> Location {
        Location::Registry { host: self.host(), repository: repository.to_owned() }
    }

    /// Its directory, for a second registry over the same contents.
    pub fn storage(&self) -> &Path {
        &self.storage
    }

    /// The requests so far, method and path, if they are written down.
    pub fn accesses(&self) -> Vec<String> {
        let log = std::fs::read_to_string(self.dir.path().join("log")).expect("a log");
        // In the common log format the request is what stands in the first quotes.
        let request = |line: &str| Some(line.split('"').nth(1)?.strip_suffix(" HTTP/1.1")?.to_owned());
        log.lines().filter_map(request).collect()
    }

    /// Points tags at a manifest that the repository has, many at once: as the registry's storage has them.
    pub fn tag_in_storage(&self, repository: &str, digest: &Digest, tags: impl IntoIterator<Item = String>) {
        let all = self.storage.join("docker/registry/v2/repositories").join(repository).join("_manifests/tags");
        for tag in tags {
            let current = all.join(tag).join("current");
            std::fs::create_dir_all(&current).expect("mkdir");
            std::fs::write(current.join("link"), digest.to_string()).expect("write");
        }
    }

    /// The file that holds a blob, to damage it.
    pub fn blob_file(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        self.storage.join("docker/registry/v2/blobs/sha256").join(&hex[..2]).join(&hex).join("data")
    }

    /// Pushes every tag of an OCI layout, with all that it leads to.
    pub fn push_layout(&self, dir: &Path, repository: &str) {
        let index: Value = serde_json::from_slice(&std::fs::read(dir.join("index.json")).expect("an index"))
            .expect("an index in JSON");
        for descriptor in index["manifests"].as_array().expect("manifests") {
            let tag = &descriptor["annotations"]["org.opencontainers.image.ref.name"];
            self.push_manifest_of(dir, repository, descriptor, tag.as_str());
        }
    }

    fn push_manifest_of(&self, dir: &Path, repository: &str, descriptor: &Value, tag: Option<&str>) {
        let digest = descriptor["digest"].as_str().expect("a digest");
        let read = |digest: &str| {
            let hex = digest.strip_prefix("sha256:").expect("a sha256 digest");
            std::fs::read(dir.join("blobs/sha256").join(hex)).expect("a blob")
        };
        let bytes = read(digest);
        let manifest: Value = serde_json::from_slice(&bytes).expect("a manifest in JSON");
        for child in manifest["manifests"].as_array().into_iter().flatten() {
            self.push_manifest_of(dir, repository, child, None);
        }
        let layers = manifest["layers"].as_array().into_iter().flatten();
        for blob in layers.chain(manifest.get("config")) {
            self.push_blob(repository, &read(blob["digest"].as_str().expect("a digest")));
        }
        let media_type = descriptor["mediaType"].as_str().expect("a media type");
        self.put_manifest(repository, tag.unwrap_or(digest), media_type, &bytes);
    }

    /// Pushes a manifest and its blobs under a tag.
    pub fn push(&self, repository: &str, tag: &str, manifest: &[u8], blobs: &[&[u8]]) -> Digest {
        for blob in blobs {
            self.push_blob(repository, blob);
        }
        self.put_manifest(repository, tag, "application/vnd.oci.image.manifest.v1+json", manifest);
        Digest::of(manifest)
    }

    /// Pushes one blob in one request.
    pub fn push_blob(&self, repository: &str, blob: &[u8]) {
        let answer = self.request("POST", &format!("/v2/{repository}/blobs/uploads/"), &[], b"");
        assert_eq!(answer.status, 202, "{answer:?}");
        let location = answer.header("location").expect("an upload location");
        let path = location.strip_prefix(&format!("http://{}", self.host())).unwrap_or(location);
        let separator = if path.contains('?') { '&' } else { '?' };
        let path = format!("{path}{separator}digest={}", Digest::of(blob));
        let answer = self.request("PUT", &path, &[("Content-Type", "application/octet-stream")], blob);
        assert_eq!(answer.status, 201, "{answer:?}");
    }

    fn put_manifest(&self, repository: &str, reference: &str, media_type: &str, bytes: &[u8]) {
        let path = format!("/v2/{repository}/manifests/{reference}");
        let answer = self.request("PUT", &path, &[("Content-Type", media_type)], bytes);
        assert_eq!(answer.status, 201, "{answer:?}");
    }

    fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        let basic = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
        let basic = format!("Basic {basic}");
        let mut headers = headers.to_vec();
        if self.password {
            headers.push(("Authorization", &basic));
        }
        request(&self.host(), method, path, &headers, body).expect("the registry answers")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is gone after this.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn configuration(options: &RegistryOptions, dir: &Path, storage: &Path, port: u16) -> String {
    let mut text = format!(
        "version: 0.1\n\
         log: {{accesslog: {{disabled: {}}}, level: warn}}\n\
         storage:\n  filesystem: {{rootdirectory: {storage:?}}}\n  delete: {{enabled: true}}\n\
         http:\n  addr: 127.0.0.1:{port}\n  secret: for-tests-only\n",
        !options.access_log
    );
    if options.tls {
        let file = |name: &str| super::support("tls").join(name);
        text.push_str(&format!(
            "  tls:\n    certificate: {:?}\n    key: {:?}\n",
            file("server.pem"),
            file("server.key")
        ));
        if options.client_certificate {
            text.push_str(&format!("    clientcas: [{:?}]\n", file("ca.pem")));
        }
    }
    if options.password {
        let path = dir.join("htpasswd");
        std::fs::write(&path, format!("{USER}:{PASSWORD_HASH}\n")).expect("written");
        text.push_str(&format!("auth:\n  htpasswd: {{realm: kitfs-test, path: {path:?}}}\n"));
    }
    text
}
