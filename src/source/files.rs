//! Writing in a directory of blobs: whole or not at all, and by several processes.
//!
//! ```text
//! oci-layout               whoever rewrites a list holds an exclusive flock on it
//! blobs/sha256/<hex>       arrives by rename, after its bytes were hashed and synced
//! .kitfs-<pid>-<n>.part    what is being written; its writer holds a flock on it, so one without is left over
//! ```
//!
//! The lock is held on the blocking pool alone, never across an await.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::digest::Digest;
use crate::source::blobs::{blocking, disk, open_regular};
use crate::source::checked::Checked;
use crate::source::index_file::IndexFile;
use crate::source::{BlobId, SourceError};

/// What `oci-layout` holds.
const MARKER: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
/// How long another writer may hold the lock: it rewrites a few files.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often the lock is tried.
const RETRY: Duration = Duration::from_millis(5);
/// What a file that is being written is called.
const PART: (&str, &str) = (".kitfs-", ".part");

/// A directory of blobs that is written.
#[derive(Debug, Clone)]
pub(super) struct Store {
    root: PathBuf,
    name: String,
}

/// The right to rewrite lists, until it is dropped.
pub(super) struct Lock(#[expect(dead_code, reason = "the lock goes with the file")] File);

impl Store {
    /// The store below `root`, as errors name it.
    pub(super) fn new(root: &Path, name: String) -> Self {
        Self { root: root.to_owned(), name }
    }

    /// Makes an empty store where there is none yet. An existing one is left as it is.
    pub(super) fn create(&self) -> Result<(), SourceError> {
        fs::create_dir_all(&self.root).map_err(|cause| disk(&self.root, cause))?;
        let _lock = self.lock()?;
        let marker = self.root.join("oci-layout");
        if fs::metadata(&marker).map_err(|cause| disk(&marker, cause))?.len() > 0 {
            return Ok(());
        }
        let blobs = self.root.join("blobs/sha256");
        fs::create_dir_all(&blobs).map_err(|cause| disk(&blobs, cause))?;
        let index = self.root.join("index.json");
        if !index.exists() {
            self.replace(&index, &to_json(&IndexFile::empty())?)?;
        }
        // Last, and in place, since others may hold its lock: a crash before leaves it empty, and the next one ends this.
        let mut file = OpenOptions::new().write(true).open(&marker).map_err(|cause| disk(&marker, cause))?;
        file.write_all(MARKER).and_then(|()| file.sync_all()).map_err(|cause| disk(&marker, cause))
    }

    /// Waits for the right to rewrite lists.
    pub(super) fn lock(&self) -> Result<Lock, SourceError> {
        let path = self.root.join("oci-layout");
        let failed = |cause: io::Error| disk(&path, cause);
        // Over NFS an exclusive lock takes a file that is open for writing.
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.or_else(|_| File::open(&path)).map_err(failed)?;
        let start = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Lock(file)),
                Err(Errno::WOULDBLOCK | Errno::INTR) if start.elapsed() < PATIENCE => std::thread::sleep(RETRY),
                Err(Errno::WOULDBLOCK) => {
                    let what = format!("another process has held the lock on {} for {PATIENCE:?}", path.display());
                    return Err(failed(io::Error::new(io::ErrorKind::TimedOut, what)));
                }
                Err(errno) => return Err(failed(errno.into())),
            }
        }
    }

    /// Whether a blob is there in full. One of another size is damaged: it may be written anew.
    pub(super) async fn has(&self, blob: &BlobId) -> Result<bool, SourceError> {
        let (path, name, size) = (self.blob_path(&blob.digest), self.name.clone(), blob.size);
        blocking(move || Ok(open_regular(&path, &name)?.is_some_and(|(_, found)| found == size))).await
    }

    /// Writes a blob.
    pub(super) async fn write_blob(&self, blob: &BlobId, mut bytes: Checked) -> Result<(), SourceError> {
        let store = self.clone();
        let mut part = blocking(move || {
            store.sweep();
            store.part()
        })
        .await?;
        while let Some(piece) = bytes.next().await {
            let piece = piece?;
            part = blocking(move || {
                part.write(&piece)?;
                Ok(part)
            })
            .await?;
        }
        let path = self.blob_path(&blob.digest);
        blocking(move || part.become_file(&path)).await
    }

    /// Writes a manifest as a blob.
    pub(super) fn write_manifest(&self, digest: &Digest, bytes: &Bytes) -> Result<(), SourceError> {
        let path = self.blob_path(digest);
        match open_regular(&path, &self.name)? {
            Some((_, size)) if size == bytes.len() as u64 => Ok(()),
            _ => self.replace(&path, bytes),
        }
    }

    /// Replaces a file at once; its permissions stay.
    pub(super) fn replace(&self, path: &Path, bytes: &[u8]) -> Result<(), SourceError> {
        let mut part = self.part()?;
        part.write(bytes)?;
        if let Ok(old) = fs::symlink_metadata(path)
            && old.is_file()
        {
            part.file.set_permissions(old.permissions()).map_err(|cause| disk(&part.path, cause))?;
        }
        part.become_file(path)
    }

    /// Begins a file that nobody sees yet.
    fn part(&self) -> Result<Part, SourceError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        loop {
            let number = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = self.root.join(format!("{}{}-{number}{}", PART.0, std::process::id(), PART.1));
            let file = match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => file,
                // Left over from another process of this number.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(cause) => return Err(disk(&path, cause)),
            };
            let part = Part { file, path, kept: false };
            match flock(&part.file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                // A sweep has it, and removes it.
                Err(Errno::WOULDBLOCK) => continue,
                Err(errno) => return Err(disk(&part.path, errno.into())),
            }
            // A sweep may have had it before.
            if part.file.metadata().map_err(|cause| disk(&part.path, cause))?.nlink() > 0 {
                return Ok(part);
            }
        }
    }

    /// Removes what writers that were killed have left. It is nobody's harm if that fails.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if !name.to_str().is_some_and(is_part) {
                continue;
            }
            if let Ok(file) = File::open(entry.path())
                && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
            {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }
}

/// Whether a name in a store's directory is of a file that is being written.
pub(super) fn is_part(name: &str) -> bool {
    name.starts_with(PART.0) && name.ends_with(PART.1)
}

/// JSON as it is written to disk.
pub(super) fn to_json(value: &impl serde::Serialize) -> Result<Vec<u8>, SourceError> {
    serde_json::to_vec(value).map_err(|error| disk(Path::new("JSON"), io::Error::other(error)))
}

/// A file that is being written; dropping it removes it.
struct Part {
    file: File,
    path: PathBuf,
    kept: bool,
}

impl Part {
    fn write(&mut self, bytes: &[u8]) -> Result<(), SourceError> {
        self.file.write_all(bytes).map_err(|cause| disk(&self.path, cause))
    }

    /// Gives the file its name, synced before and after.
    fn become_file(mut self, path: &Path) -> Result<(), SourceError> {
        self.file.sync_all().map_err(|cause| disk(&self.path, cause))?;
        let dir = path.parent().unwrap_or(path);
        fs::create_dir_all(dir).map_err(|cause| disk(dir, cause))?;
        fs::rename(&self.path, path).map_err(|cause| disk(path, cause))?;
        self.kept = true;
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(|cause| disk(dir, cause))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.kept {
            // The next writer sweeps what stays.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The error of bytes on disk that are no index.
pub(super) fn unreadable(path: &Path, name: &str, error: &serde_json::Error) -> SourceError {
    let what = format!("{} can't be read: {error}; it is left as it is", path.display());
    SourceError::Protocol { source_name: name.to_owned(), what }
}
