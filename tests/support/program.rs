//! Runs the built `kitfs` with a cache, a state directory and a home of its own, and mounts through the kernel.

use std::ffi::OsStr;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use kitfs::archive::chunk::Chunker;
use serde_json::Value;
use sha2::Digest as _;

/// A user of kitfs who has nothing yet.
pub struct Kitfs {
    home: tempfile::TempDir,
    variables: Vec<(String, String)>,
}

impl Kitfs {
    /// A fresh home. Panics where the kernel or fusermount3 can't mount, saying what to install.
    pub fn new() -> Self {
        assert!(Path::new("/dev/fuse").exists(), "/dev/fuse is missing: load the module (modprobe fuse)");
        let fusermount = Command::new("fusermount3").arg("--version").output();
        assert!(fusermount.is_ok(), "fusermount3 is missing: apt-get install fuse3");
        Self { home: tempfile::tempdir().expect("temporary directory"), variables: Vec::new() }
    }

    /// The same with another environment variable.
    pub fn with(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        let value = value.as_ref().to_str().expect("UTF-8").to_owned();
        self.variables.push((name.to_owned(), value));
        self
    }

    /// A path in the home.
    pub fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// The cache directory.
    pub fn cache(&self) -> PathBuf {
        self.path("cache")
    }

    /// The program, not started yet.
    pub fn command<I: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kitfs"));
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            let foreign = ["KITFS_", "KITOPS_", "XDG_", "DOCKER_"].iter().any(|prefix| name.starts_with(prefix));
            if foreign || name == "REGISTRY_AUTH_FILE" || name.to_lowercase().ends_with("_proxy") {
                command.env_remove(&name);
            }
        }
        command
            .env("HOME", self.home.path())
            .env("KITFS_CACHE_DIR", self.cache())
            .env("KITFS_STATE_DIR", self.path("state"))
            // How full this machine's disk is must not decide what a test sees.
            .env("KITFS_CACHE_SIZE", "1TiB")
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// Runs it to its end.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("kitfs runs")
    }

    /// Runs it and expects success; its standard output.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kitfs {arguments:?}: {error}\n{}", self.logs());
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs it and expects failure; its standard error.
    pub fn fails(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(!output.status.success(), "kitfs {arguments:?} should have failed");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Mounts a reference on a new directory.
    pub fn mount(&self, reference: &str, options: &[&str]) -> Mount<'_> {
        let dir =
            (0..).map(|number| self.path(&format!("mnt{number}"))).find(|dir| !dir.exists()).expect("a free name");
        let text = dir.to_str().expect("UTF-8");
        let mut arguments = vec!["mount", reference, text];
        arguments.extend(options);
        let said = self.ok(&arguments);
        Mount { kitfs: self, dir, said }
    }

    /// What the daemons have logged.
    pub fn logs(&self) -> String {
        let mut all = String::new();
        let mut dirs = vec![self.path("state")];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    dirs.push(path);
                } else if path.extension().is_some_and(|extension| extension == "log") {
                    all.push_str(&std::fs::read_to_string(path).unwrap_or_default());
                }
            }
        }
        all
    }

    /// Files below a part of the cache.
    pub fn cached_files(&self, area: &str) -> Vec<PathBuf> {
        let mut files = Vec::new();
        let mut dirs = vec![self.cache().join(area)];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                if entry.path().is_dir() { dirs.push(entry.path()) } else { files.push(entry.path()) }
            }
        }
        files
    }

    /// Each object in the cache is what its name says, and no file of the cache holds `bytes`.
    pub fn assert_cache_is_true(&self, bytes: &[u8]) {
        for path in self.cached_files("objects") {
            let mut chunker = Chunker::new();
            chunker.update(&std::fs::read(&path).expect("reads an object"));
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            assert_eq!(chunker.finish().object.hex(), name, "an object that is not what its name says");
        }
        for path in [self.cached_files("objects"), self.cached_files("partial")].concat() {
            let content = std::fs::read(&path).unwrap_or_default();
            let holds = !bytes.is_empty() && content.windows(bytes.len()).any(|part| part == bytes);
            assert!(!holds, "{} holds bytes that are not right", path.display());
        }
    }

    /// What `status` tells of the mount on a directory.
    pub fn status(&self, mount: &Mount<'_>) -> Value {
        let status = self.ok(&["status", mount.dir.to_str().expect("UTF-8"), "--json"]);
        let status: Value = serde_json::from_str(&status).expect("JSON");
        status["mounts"][0].clone()
    }
}

impl Drop for Kitfs {
    /// A test that fails leaves no mount behind.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.run(&["unmount", "--all", "--lazy"]);
        }
    }
}

/// A mounted kit, unmounted when it goes.
pub struct Mount<'a> {
    kitfs: &'a Kitfs,
    /// Where.
    pub dir: PathBuf,
    /// What `kitfs mount` printed.
    pub said: String,
}

impl Mount<'_> {
    /// A path in the mount.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// How far a file is proved.
    pub fn trust_of(&self, name: &str) -> String {
        let mut value = [0; 64];
        let len = rustix::fs::getxattr(self.path(name), "user.kitfs.trust", &mut value).expect("getxattr");
        String::from_utf8_lossy(&value[..len]).into_owned()
    }

    /// Opens a file past the kernel's cache: each read of it is one of ours, and none comes ahead; unless it is complete and
    /// passes through, then it is one of the disk, in whole blocks ([`super::reading::part_directly`]).
    pub fn open_direct(&self, name: &str) -> std::fs::File {
        let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        std::fs::OpenOptions::new().read(true).custom_flags(direct).open(self.path(name)).expect("opens")
    }

    /// The process that serves it.
    pub fn daemon(&self) -> rustix::process::Pid {
        let status = self.kitfs.ok(&["status", self.dir.to_str().expect("UTF-8"), "--json"]);
        let status: Value = serde_json::from_str(&status).expect("JSON");
        let pid = find_key(&status, "pid").and_then(Value::as_i64).expect("status tells the pid");
        rustix::process::Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("a pid")
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let output = self.kitfs.run(&["unmount", "--lazy", self.dir.to_str().expect("UTF-8")]);
        if !output.status.success() && !std::thread::panicking() {
            panic!("unmount: {}\n{}", String::from_utf8_lossy(&output.stderr), self.kitfs.logs());
        }
    }
}

/// The first value under `key`, wherever it is.
pub fn find_key<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    match value {
        Value::Object(map) => map.get(key).or_else(|| map.values().find_map(|inner| find_key(inner, key))),
        Value::Array(items) => items.iter().find_map(|inner| find_key(inner, key)),
        _ => None,
    }
}

/// One row of a recorded tree.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Deserialize)]
pub struct Row {
    /// Path from the root.
    pub path: String,
    /// Octal permission bits.
    pub mode: String,
    /// `file` or `dir`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Bytes of a file.
    #[serde(default)]
    pub size: Option<u64>,
    /// SHA-256 of a file.
    #[serde(default)]
    pub sha256: Option<String>,
}

/// The tree that `kit unpack` made, as recorded.
pub fn recorded(file: &Path) -> Vec<Row> {
    let text = std::fs::read_to_string(file).expect("recorded tree");
    let mut rows: Vec<Row> = text.lines().map(|line| serde_json::from_str(line).expect("a row")).collect();
    rows.sort();
    rows
}

/// The tree below a directory, read in full.
pub fn tree_of(root: &Path) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).expect("reads a directory") {
            let path = entry.expect("reads an entry").path();
            let metadata = std::fs::symlink_metadata(&path).expect("stats");
            let name = path.strip_prefix(root).expect("below").to_str().expect("UTF-8").to_owned();
            let mode = format!("{:04o}", metadata.permissions().mode() & 0o7777);
            if metadata.is_dir() {
                dirs.push(path);
                rows.push(Row { path: name, mode, kind: "dir".to_owned(), size: None, sha256: None });
                continue;
            }
            let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("read {name}: {error}"));
            assert_eq!(bytes.len() as u64, metadata.size(), "{name}");
            let sha256 = Some(sha256(&bytes));
            rows.push(Row { path: name, mode, kind: "file".to_owned(), size: Some(metadata.size()), sha256 });
        }
    }
    rows.sort();
    rows
}

/// SHA-256 in hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
