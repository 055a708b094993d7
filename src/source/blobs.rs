//! Blobs that are plain files, `blobs/sha256/<hex>`, as an OCI image layout and kit's storage both keep them.
//!
//! Files are opened without following a symbolic link and must be regular: a hostile layout must not make a daemon
//! open a device or wait at a pipe. They are read with `pread` on the blocking pool, one block at a time.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::stream;
use rustix::fs::{Mode, OFlags};
use tokio::sync::Semaphore;

use crate::digest::{Digest, Unverified};
use crate::source::index_file::{Descriptor, Referring};
use crate::source::{BlobId, ByteStream, MAX_MANIFEST, SourceError, check_range};

/// What one `pread` takes: a chunk of the cache, and all that a stream holds in memory.
const BLOCK: u64 = 1 << 20;
/// How many manifests are read to find referrers: more than kits in a directory, and no hostile list takes long.
const MAX_CANDIDATES: usize = 1024;

/// So many blobs of a directory are opened at a time. A mount looks there for all of its layers at once, mostly in vain: with a
/// thread for each it took more time to start threads than to look.
const OPENINGS: usize = 4;

/// A directory of blobs.
#[derive(Debug, Clone)]
pub(super) struct Blobs {
    dir: PathBuf,
    /// The source, as errors name it.
    source_name: String,
    /// The right to open one.
    openings: Arc<Semaphore>,
}

impl Blobs {
    /// The blobs below `root`, which holds `blobs/sha256`.
    pub(super) fn below(root: &Path, source_name: String) -> Self {
        Self { dir: root.join("blobs/sha256"), source_name, openings: Arc::new(Semaphore::new(OPENINGS)) }
    }

    /// The bytes of a manifest.
    pub(super) async fn manifest(&self, digest: &Digest) -> Result<Unverified, SourceError> {
        let (path, what, name) = (self.path(digest), format!("manifest {digest}"), self.source_name.clone());
        blocking(move || read_small(&path, &name)?.ok_or(SourceError::NotFound { what, source_name: name }))
            .await
            .map(Unverified::new)
    }

    /// Bytes `range` of a blob.
    pub(super) async fn stream(&self, blob: &BlobId, range: Range<u64>) -> Result<ByteStream, SourceError> {
        check_range(blob, &range, &self.source_name)?;
        let (path, blob, name) = (self.path(&blob.digest), *blob, self.source_name.clone());
        // Never closed; and no longer held than the file is looked for.
        let opening = self.openings.acquire().await;
        let file = blocking(move || {
            let Some((file, size)) = open_regular(&path, &name)? else {
                return Err(SourceError::NotFound { what: format!("blob {}", blob.digest), source_name: name });
            };
            if size != blob.size {
                let what =
                    format!("{} holds {size} bytes, the manifest says {}: it is damaged", path.display(), blob.size);
                return Err(SourceError::Protocol { source_name: name, what });
            }
            Ok(Open { file, path })
        })
        .await?;
        drop(opening);
        let file = Arc::new(file);
        Ok(Box::pin(stream::try_unfold(range, move |left| next_block(Arc::clone(&file), left))))
    }

    /// Which of the `candidates` are manifests of this type that refer to `subject`. What is not there or is damaged
    /// refers to nothing.
    pub(super) async fn referrers(
        &self,
        candidates: &[&Descriptor],
        subject: &Digest,
        artifact_type: &str,
    ) -> Result<Vec<Digest>, SourceError> {
        let mut found = Vec::new();
        for digest in candidates.iter().filter_map(|entry| entry.digest.parse().ok()).take(MAX_CANDIDATES) {
            let Some(manifest) = self.manifest(&digest).await.ok().and_then(|bytes| bytes.verify(&digest).ok()) else {
                continue;
            };
            if Referring::is_referrer(manifest.bytes(), subject, artifact_type) && !found.contains(&digest) {
                found.push(digest);
            }
        }
        Ok(found)
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.hex())
    }
}

struct Open {
    file: File,
    path: PathBuf,
}

async fn next_block(open: Arc<Open>, left: Range<u64>) -> Result<Option<(Unverified, Range<u64>)>, SourceError> {
    if left.is_empty() {
        return Ok(None);
    }
    blocking(move || {
        let length = BLOCK.min(left.end - left.start);
        let mut block = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        open.file.read_exact_at(&mut block, left.start).map_err(|cause| disk(&open.path, cause))?;
        Ok(Some((Unverified::new(block), left.start + length..left.end)))
    })
    .await
}

/// A whole file of at most [`MAX_MANIFEST`] bytes; `None` where there is none.
pub(super) fn read_small(path: &Path, source_name: &str) -> Result<Option<Vec<u8>>, SourceError> {
    let Some((file, size)) = open_regular(path, source_name)? else { return Ok(None) };
    if size > MAX_MANIFEST {
        let what = format!("{} holds {size} bytes; a manifest or index has at most {MAX_MANIFEST}", path.display());
        return Err(SourceError::Protocol { source_name: source_name.to_owned(), what });
    }
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(usize::MAX)];
    file.read_exact_at(&mut bytes, 0).map_err(|cause| disk(path, cause))?;
    Ok(Some(bytes))
}

/// A file and its size; `None` where there is none.
pub(super) fn open_regular(path: &Path, source_name: &str) -> Result<Option<(File, u64)>, SourceError> {
    let refuse = |what: &str| {
        let what = format!("{} {what}; a blob is a regular file", path.display());
        Err(SourceError::Protocol { source_name: source_name.to_owned(), what })
    };
    // NONBLOCK keeps the open of a pipe from waiting for a writer.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(descriptor) => File::from(descriptor),
        // No such file can have been stored where its name is too long.
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::NAMETOOLONG) => return Ok(None),
        Err(rustix::io::Errno::LOOP) => return refuse("is a symbolic link"),
        Err(errno) => return Err(disk(path, errno.into())),
    };
    let metadata = file.metadata().map_err(|cause| disk(path, cause))?;
    if !metadata.is_file() {
        return refuse("is not a file");
    }
    Ok(Some((file, metadata.len())))
}

pub(super) fn disk(path: &Path, cause: io::Error) -> SourceError {
    SourceError::Disk { path: path.display().to_string(), cause: Arc::new(cause) }
}

/// Runs blocking work on the runtime's pool for it.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SourceError> + Send + 'static,
) -> Result<T, SourceError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|failure| {
        Err(SourceError::Disk { path: "reading a file".to_owned(), cause: Arc::new(io::Error::other(failure)) })
    })
}
