//! What a kit is told by, its manifests, configs and referrers: asked for, hashed here, kept in the cache.
//!
//! Invariants: what a source gives for a digest is used only once it has hashed to that; a source that does not have it, or
//! gives something else, is passed over for the next one. All that was read by digest is noted, for the cache's record of
//! the kit. Every question to a source has a deadline, and a shorter one where the asker says that something known stands
//! in for the answer. What is kept is written behind the reader's back, as a disk may take longer than a registry: in the
//! order in which it came, so that a note is never there before what it leads to, and all of it before [`Documents::settle`]
//! returns.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::TryStreamExt as _;
use serde::Serialize;
use tokio::task::JoinHandle;

use crate::cache::{Cache, CacheError, LastKnown, Small};
use crate::digest::{Digest, Unverified, Verified};
use crate::fetch::transfer::{ATTEMPTS, attempted};
use crate::fetch::{Context, FetchError};
use crate::modelkit::manifest::MAX_CONFIG;
use crate::report::chain;
use crate::source::{BlobId, Source, SourceError};

/// Where something known stands in for a registry's answer, the registry is asked anew for so long: a dead host takes as
/// much to be told from a far one.
const WAIT: Duration = Duration::from_secs(5);
/// And an answer is waited for this long: one that takes longer is of no use to who waits.
const LAST_WAIT: Duration = Duration::from_secs(10);

/// One kit of a chain: the repository it came from and where to ask for its blobs, best first.
#[derive(Debug, Clone, Serialize)]
pub struct Origin {
    /// `registry/repo`, `oci:DIR` or a bare name.
    pub repository: String,
    /// The manifest's digest.
    pub digest: Digest,
    /// kit's storage first, where it may hold the blobs already.
    #[serde(skip)]
    pub sources: Vec<Arc<dyn Source>>,
}

/// A manifest or image index by digest: from the cache, else from the first source that has it.
pub async fn manifest(context: &Context, sources: &[Arc<dyn Source>], digest: &Digest) -> Result<Verified, FetchError> {
    let documents = Documents::new(context);
    let found = documents.manifest(sources, digest).await;
    documents.settle().await;
    found
}

/// A config by its descriptor, likewise.
pub async fn config(context: &Context, sources: &[Arc<dyn Source>], config: BlobId) -> Result<Verified, FetchError> {
    let documents = Documents::new(context);
    let found = documents.blob("config", sources, config).await;
    documents.settle().await;
    found
}

/// Reads documents, and notes which.
pub(super) struct Documents<'a> {
    context: &'a Context,
    /// What was read by digest. A mutex, as it is held to put something in.
    read: Mutex<BTreeSet<Digest>>,
    /// Manifests that came with the answer for a tag. A mutex for the same reason.
    came: Mutex<HashMap<Digest, Verified>>,
    /// The last of what is being written. It waits for the one before it.
    writing: Mutex<Option<JoinHandle<()>>>,
}

impl<'a> Documents<'a> {
    pub(super) fn new(context: &'a Context) -> Self {
        Self { context, read: Mutex::default(), came: Mutex::default(), writing: Mutex::default() }
    }

    /// The digests of all that was read, which the cache may hold.
    pub(super) fn digests(&self) -> Vec<Digest> {
        lock(&self.read).iter().copied().collect()
    }
}

impl Documents<'_> {
    /// Asks a source again while that may help, for as long as names may take. Where something stands in for the answer,
    /// nobody wants to wait so long; and a host that was just found away is asked once more only if nothing does.
    pub(super) async fn ask<T, F>(
        &self,
        what: &str,
        source: &Arc<dyn Source>,
        has_stand_in: bool,
        ask: impl FnMut() -> F,
    ) -> Result<T, FetchError>
    where
        F: Future<Output = Result<T, SourceError>>,
    {
        let deadline = self.context.limits.meta_timeout;
        let (attempts, patience, deadline) = match (source.away(), has_stand_in) {
            (Some(away), true) => return Err(FetchError::Source { what: what.to_owned(), cause: away.error }),
            (Some(_), false) => (1, deadline, deadline.min(LAST_WAIT)),
            (None, true) => (ATTEMPTS, deadline.min(WAIT), deadline.min(LAST_WAIT)),
            (None, false) => (ATTEMPTS, deadline, deadline),
        };
        attempted(what, attempts, patience, deadline, ask).await
    }

    /// What a name led to when it was last followed.
    pub(super) async fn known(&self, name: &str) -> Option<LastKnown> {
        let key = name.to_owned();
        let known = self.context.blocking(name, move |cache| cache.known(&key)).await;
        known.unwrap_or_else(|error| {
            tracing::warn!(error = chain(&error), name, "what is known of it can't be read");
            None
        })
    }

    /// Whether the cache seems to have a document.
    pub(super) async fn seem_to_have(&self, digest: &Digest) -> bool {
        let wanted = Small::Blob(*digest);
        let look = move |cache: &Cache| Ok(cache.seems_to_have(&wanted));
        self.context.blocking("a document", look).await.unwrap_or_default()
    }

    /// Takes a manifest that came unasked. One that is not what it should be is left: it is asked for by its digest.
    pub(super) fn take(&self, digest: Digest, bytes: Unverified) {
        match bytes.verify(&digest) {
            Ok(bytes) => {
                self.keep_blob(digest, &bytes);
                lock(&self.came).insert(digest, bytes);
            }
            Err(cause) => tracing::debug!(%cause, "what came with a tag is not the manifest that it leads to"),
        }
    }

    /// A manifest by digest: from the cache, else from the first source that has it, hashed.
    pub(super) async fn manifest(&self, sources: &[Arc<dyn Source>], digest: &Digest) -> Result<Verified, FetchError> {
        let what = format!("manifest {digest}");
        let get = |source: Arc<dyn Source>| {
            let what = what.clone();
            async move { self.ask(&what, &source, false, || source.manifest(digest)).await }
        };
        self.small(&what, sources, digest, get).await
    }

    /// A small blob by digest, likewise.
    pub(super) async fn blob(
        &self,
        name: &str,
        sources: &[Arc<dyn Source>],
        blob: BlobId,
    ) -> Result<Verified, FetchError> {
        let what = format!("{name} {}", blob.digest);
        if blob.size > MAX_CONFIG {
            let size = crate::units::format_size(blob.size);
            let what = format!("{what} states a size of {size}, more than 4 MiB");
            let source_name = sources.first().map(|source| source.name()).unwrap_or_default();
            return Err(FetchError::Source {
                what: name.to_owned(),
                cause: SourceError::Protocol { source_name, what },
            });
        }
        let get = |source: Arc<dyn Source>| {
            let what = what.clone();
            async move {
                self.ask(&what, &source, false, || async {
                    let mut bytes = Vec::new();
                    if blob.size > 0 {
                        let mut stream = source.blob(&blob, 0..blob.size).await?;
                        while let Some(piece) = stream.try_next().await? {
                            bytes.extend_from_slice(piece.peek());
                        }
                    }
                    Ok(Unverified::new(bytes))
                })
                .await
            }
        };
        self.small(&what, sources, &blob.digest, get).await
    }

    /// Keeps what was found for the next time. A cache that can't grow is no reason to do without it now.
    pub(super) fn keep(&self, work: impl FnOnce(&Cache) -> Result<(), CacheError> + Send + 'static) {
        let cache = self.context.cache.clone();
        let write = move || {
            work(&cache).unwrap_or_else(|error| {
                error.unless_full(|error| tracing::warn!(%error, "not kept in the cache"));
            });
        };
        let mut writing = lock(&self.writing);
        let before = writing.take();
        *writing = Some(tokio::spawn(async move {
            settled(before).await;
            settled(Some(tokio::task::spawn_blocking(write))).await;
        }));
    }

    fn keep_blob(&self, digest: Digest, bytes: &Verified) {
        let bytes = bytes.clone();
        self.keep(move |cache| cache.keep_blob(&digest, &bytes));
    }

    /// Waits until all is written that was to be kept.
    pub(super) async fn settle(&self) {
        let last = lock(&self.writing).take();
        settled(last).await;
    }

    /// From the cache, else from the first source whose bytes hash right; those are kept.
    async fn small<F>(
        &self,
        what: &str,
        sources: &[Arc<dyn Source>],
        digest: &Digest,
        get: impl Fn(Arc<dyn Source>) -> F,
    ) -> Result<Verified, FetchError>
    where
        F: Future<Output = Result<Unverified, FetchError>>,
    {
        let wanted = *digest;
        let found = || {
            lock(&self.read).insert(wanted);
        };
        let came = lock(&self.came).get(digest).cloned();
        if let Some(bytes) = came {
            found();
            return Ok(bytes);
        }
        if let Some(bytes) = self.context.blocking(what, move |cache| cache.blob(&wanted)).await? {
            found();
            return Ok(bytes);
        }
        let mut failure = FetchError::Lost { what: what.to_owned() };
        for source in sources {
            let bytes = match get(source.clone()).await {
                Ok(bytes) => bytes,
                Err(error) => {
                    failure = error;
                    continue;
                }
            };
            match bytes.verify(digest) {
                Ok(bytes) => {
                    found();
                    self.keep_blob(wanted, &bytes);
                    return Ok(bytes);
                }
                Err(cause) => {
                    failure = FetchError::Digest { what: what.to_owned(), source_name: source.name(), cause };
                }
            }
        }
        Err(failure)
    }
}

/// Waits for a write. One that was lost is not there the next time.
async fn settled(write: Option<JoinHandle<()>>) {
    if let Some(write) = write
        && let Err(error) = write.await
    {
        tracing::warn!(%error, "not kept in the cache");
    }
}

fn lock<T>(held: &Mutex<T>) -> MutexGuard<'_, T> {
    // All that is held is right after any panic.
    held.lock().unwrap_or_else(|held| held.into_inner())
}
