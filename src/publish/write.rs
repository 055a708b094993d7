//! Writing to a repository: blobs first, each only where it is not yet; then what refers to the kit; then its manifest,
//! under its tag.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use tokio::sync::watch;

use super::manifest::EMPTY;
use super::{Document, Edition, PublishError};
use crate::archive::index::Index;
use crate::archive::index::annotations::MEDIA_TYPE;
use crate::digest::{Digest, Mismatch, Unverified};
use crate::fetch::memory::Memory;
use crate::fetch::transfer::{Persistence, Transfer, retried};
use crate::fetch::{Context, FILLS, FetchError, Limits, Resolved};
use crate::reference::Location;
use crate::source::{BlobId, ByteStream, Source, SourceError, Target};

/// A blob is as long under way as it makes progress, which its source and its target watch over. Ten years.
const NO_DEADLINE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How often it is looked whether a tag leads to what was put under it: some registries take a moment to tell.
const LOOKS: u32 = 4;
/// How long between.
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);
/// The pieces that made blobs are sent in.
const PIECE: usize = 1 << 20;

/// A blob that must be there before the manifest is.
#[derive(Debug)]
pub struct Blob {
    /// What it is, for people.
    pub what: String,
    /// Which it is.
    pub id: BlobId,
    content: Content,
    sent: AtomicU64,
    is_moving: AtomicBool,
}

#[derive(Debug)]
enum Content {
    /// The kit's own.
    Copied,
    /// Made here.
    Made(Bytes),
}

impl Blob {
    pub(super) fn copied(what: String, id: BlobId) -> Arc<Self> {
        Self::new(what, id, Content::Copied)
    }

    pub(super) fn made(what: String, digest: Digest, bytes: Bytes) -> Arc<Self> {
        Self::new(what, BlobId { digest, size: bytes.len() as u64 }, Content::Made(bytes))
    }

    fn new(what: String, id: BlobId, content: Content) -> Arc<Self> {
        Arc::new(Self { what, id, content, sent: AtomicU64::new(0), is_moving: AtomicBool::new(false) })
    }

    /// How many of its bytes are on their way; `None` while it is not being sent.
    pub fn sent(&self) -> Option<u64> {
        self.is_moving.load(Ordering::Relaxed).then(|| self.sent.load(Ordering::Relaxed))
    }
}

/// The bytes of an index that others hold too.
struct Shared(Arc<Index>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl Edition {
    /// The blobs that make up the kit itself, each once.
    pub fn kit_blobs(&self, resolved: &Resolved) -> Vec<Arc<Blob>> {
        let config = &resolved.document.config;
        let mut blobs =
            vec![Blob::copied("the config".to_owned(), BlobId { digest: config.digest, size: config.size })];
        for layer in &resolved.document.layers {
            if blobs.iter().all(|blob| blob.id.digest != layer.digest) {
                let entry = resolved.plan.layers.iter().find(|planned| planned.digest == layer.digest);
                let what = entry.map_or_else(|| format!("layer {}", layer.digest), crate::modelkit::Layer::label);
                blobs.push(Blob::copied(what, BlobId { digest: layer.digest, size: layer.size }));
            }
        }
        blobs
    }

    /// The indexes.
    pub fn index_blobs(&self) -> Vec<Arc<Blob>> {
        let index = |indexed: &super::Indexed| {
            let bytes = Bytes::from_owner(Shared(indexed.index.clone()));
            Blob::made(format!("the index of {}", indexed.layer.label()), indexed.pin.digest, bytes)
        };
        self.layers.iter().map(index).collect()
    }
}

/// How blobs came to be where they are now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Tally {
    /// Sent.
    pub uploaded: Count,
    /// Taken over from another repository of the registry.
    pub mounted: Count,
    /// There before.
    pub present: Count,
}

/// Blobs and their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Count {
    /// How many.
    pub blobs: u64,
    /// How many bytes they have.
    pub bytes: u64,
}

/// How one blob came to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Uploaded,
    Mounted,
    Present,
}

impl Tally {
    fn add(mut self, way: Way, size: u64) -> Self {
        let count = match way {
            Way::Uploaded => &mut self.uploaded,
            Way::Mounted => &mut self.mounted,
            Way::Present => &mut self.present,
        };
        count.blobs += 1;
        count.bytes += size;
        self
    }
}

/// Writes to one repository what comes from another.
#[derive(Debug)]
pub struct Writer {
    /// Where to.
    pub target: Arc<dyn Target>,
    /// Where from.
    pub from: Location,
    /// Where to get what is there, best first.
    pub sources: Vec<Arc<dyn Source>>,
    /// Deadlines and parallelism.
    pub limits: Limits,
    /// What blobs on their way may take of memory.
    pub memory: Arc<Memory>,
}

impl Writer {
    /// Writes to `target` what comes from `from`, which `sources` give.
    pub fn new(context: &Context, target: Arc<dyn Target>, from: &Location, sources: &[Arc<dyn Source>]) -> Self {
        let (limits, memory) = (context.limits.clone(), context.memory.clone());
        Self { target, from: from.clone(), sources: sources.to_vec(), limits, memory }
    }

    /// Puts the config of the referrer there, two bytes: so that who may not write hears of it before anything large is read.
    pub async fn try_out(&self) -> Result<Tally, PublishError> {
        let empty = Blob::made("the empty config".to_owned(), Digest::of(EMPTY), Bytes::from_static(EMPTY));
        self.put_all(&[empty], Tally::default()).await
    }

    /// What a tag of the target points at; `None` where there is no such tag.
    pub async fn tagged(&self, tag: &str) -> Result<Option<Digest>, PublishError> {
        let what = format!("tag {tag}");
        let asked = retried(&what, self.limits.meta_timeout, || self.target.resolve(tag)).await;
        match asked {
            Err(FetchError::Source { cause: SourceError::NotFound { .. }, .. }) => Ok(None),
            other => other.map(Some).map_err(|error| self.failed(what, error)),
        }
    }

    /// Whether the target names this referrer already.
    async fn has_referrer(&self, subject: &Digest, referrer: &Digest) -> Result<bool, PublishError> {
        let what = format!("the list of what refers to {subject}");
        let ask = || self.target.referrers(subject, MEDIA_TYPE);
        let all = retried(&what, self.limits.meta_timeout, ask).await.map_err(|error| self.failed(what, error))?;
        if !all.contains(referrer) {
            return Ok(false);
        }
        // A list that a tag holds may name what is gone.
        let what = format!("the referrer {referrer}");
        match retried(&what, self.limits.meta_timeout, || self.target.manifest(referrer)).await {
            Ok(_) => Ok(true),
            Err(FetchError::Source { cause: SourceError::NotFound { .. }, .. }) => Ok(false),
            Err(error) => Err(self.failed(what, error)),
        }
    }

    /// Puts the kit's manifest under a tag. Its blobs must be there.
    pub async fn put_kit(&self, kit: &Document, tag: &str) -> Result<(), PublishError> {
        self.put_manifest("the manifest", kit, Some(tag)).await
    }

    /// Puts the referrer, unless it is there; whether it was not. Its blobs must be there.
    pub async fn put_referrer(&self, edition: &Edition) -> Result<bool, PublishError> {
        match &edition.referrer {
            Some(referrer) => self.put_referring(referrer).await,
            None => Ok(false),
        }
    }

    /// The same for any document that refers to another.
    pub(super) async fn put_referring(&self, referrer: &Document) -> Result<bool, PublishError> {
        if let Some(refers) = &referrer.manifest.refers
            && self.has_referrer(&refers.subject, &referrer.digest).await?
        {
            return Ok(false);
        }
        self.put_manifest("the referrer", referrer, None).await?;
        Ok(true)
    }

    /// Makes sure that a tag leads to what was just put under it, by the bytes that it gives.
    pub async fn check_tag(&self, tag: &str, put: &Digest) -> Result<(), PublishError> {
        let what = format!("tag {tag}");
        let mut found = None;
        for look in 0..LOOKS {
            if look > 0 {
                tokio::time::sleep(BETWEEN_LOOKS).await;
            }
            found = match retried(&what, self.limits.meta_timeout, || self.target.tagged(tag)).await {
                Ok((stated, None)) => Some(stated),
                Ok((_, Some(bytes))) => Some(Digest::of(bytes.peek())),
                Err(FetchError::Source { cause: SourceError::NotFound { .. }, .. }) => None,
                Err(error) => return Err(self.failed(what, error)),
            };
            if found.as_ref() == Some(put) {
                return Ok(());
            }
        }
        Err(PublishError::NotThere { reference: format!("{}:{tag}", self.target.name()), put: *put, found })
    }

    pub(super) async fn put_manifest(
        &self,
        name: &str,
        document: &Document,
        tag: Option<&str>,
    ) -> Result<(), PublishError> {
        let what = format!("{name} {}", document.digest);
        let put = || self.target.put_manifest(&document.manifest, tag);
        retried(&what, self.limits.meta_timeout, put).await.map(drop).map_err(|error| self.failed(what, error))
    }

    /// Sees to it that these blobs are there, several at a time, and goes on counting.
    pub async fn put_all(&self, blobs: &[Arc<Blob>], before: Tally) -> Result<Tally, PublishError> {
        let put = |blob: Arc<Blob>| async move { Ok((self.put(&blob).await?, blob.id.size)) };
        let done = stream::iter(blobs.iter().cloned().map(put)).buffer_unordered(FILLS);
        done.try_fold(before, |tally, (way, size)| async move { Ok(tally.add(way, size)) }).await
    }

    async fn put(&self, blob: &Arc<Blob>) -> Result<Way, PublishError> {
        let failed = |error| self.failed(blob.what.clone(), error);
        let patience = self.limits.meta_timeout;
        if retried(&blob.what, patience, || self.target.has_blob(&blob.id)).await.map_err(failed)? {
            return Ok(Way::Present);
        }
        match &blob.content {
            Content::Made(bytes) => {
                let send = self.send(blob, || pieces(bytes.clone())).await;
                send.map_err(|failure| self.not_copied(failure, blob, "memory"))?;
            }
            Content::Copied => {
                let mount = || self.target.mount_blob(&blob.id, &self.from);
                if retried(&blob.what, patience, mount).await.map_err(failed)? {
                    return Ok(Way::Mounted);
                }
                self.copy(blob).await?;
            }
        }
        Ok(Way::Uploaded)
    }

    /// Sends a blob from the first of the sources that gives it.
    async fn copy(&self, blob: &Arc<Blob>) -> Result<(), PublishError> {
        let lost = FetchError::Lost { what: blob.what.clone() };
        let mut last = PublishError::Copy { what: blob.what.clone(), cause: Box::new(lost) };
        for source in &self.sources {
            let open = || self.transfer(source, blob.id).ordered();
            let Err(failure) = self.send(blob, open).await else { return Ok(()) };
            last = self.not_copied(failure, blob, &source.name());
            if !matches!(last, PublishError::Copy { .. }) {
                break;
            }
        }
        Err(last)
    }

    /// What an upload ended with; another source may do better only after a [`PublishError::Copy`].
    fn not_copied(&self, failure: Failure, blob: &Blob, source_name: &str) -> PublishError {
        let what = blob.what.clone();
        let cause = match failure {
            Failure::Written(error) => return self.failed(what, error),
            Failure::Read(error) => error,
            Failure::False(cause) => {
                FetchError::Digest { what: what.clone(), source_name: source_name.to_owned(), cause }
            }
        };
        PublishError::Copy { what, cause: Box::new(cause) }
    }

    fn transfer(&self, source: &Arc<dyn Source>, blob: BlobId) -> Transfer {
        let (limits, received, fetched) = (self.limits.clone(), watch::Sender::new(0), Arc::default());
        let (persistence, memory) = (Persistence::UntilDeadline, self.memory.clone());
        // Nobody else waits for it.
        let vain = Arc::default();
        Transfer { source: source.clone(), blob, limits, received, persistence, fetched, memory, vain }
    }

    /// Sends the bytes that `open` gives. Where the target fails, it is tried again from the start.
    async fn send(
        &self,
        blob: &Arc<Blob>,
        open: impl Fn() -> BoxStream<'static, Result<Unverified, FetchError>>,
    ) -> Result<(), Failure> {
        let _moving = Moving::begin(blob);
        let unread = Arc::new(Mutex::new(None));
        let put = || async {
            blob.sent.store(0, Ordering::Relaxed);
            let mut bytes = counted(open(), blob.clone(), unread.clone());
            // A source that has nothing is no reason to open an upload.
            let first = bytes.next().await.transpose()?;
            let bytes = stream::iter(first.map(Ok)).chain(bytes);
            self.target.put_blob(&blob.id, Box::pin(bytes)).await
        };
        let outcome = retried(&blob.what, NO_DEADLINE, put).await;
        // The target can only say that the stream broke off; why, the stream has noted.
        let unread = unread.lock().unwrap_or_else(|held| held.into_inner()).take();
        match (outcome, unread) {
            (Ok(()), _) => Ok(()),
            (Err(_), Some(error)) => Err(Failure::Read(error)),
            (Err(FetchError::Source { cause: SourceError::Damaged { cause, .. }, .. }), None) => {
                Err(Failure::False(*cause))
            }
            (Err(error), None) => Err(Failure::Written(error)),
        }
    }

    pub(super) fn failed(&self, what: String, error: FetchError) -> PublishError {
        match error {
            FetchError::Source { cause, .. } => PublishError::Write { what, target: self.target.name(), cause },
            cause => PublishError::Stalled { what, cause: Box::new(cause) },
        }
    }
}

/// Which side failed.
enum Failure {
    /// What is copied can't be had.
    Read(FetchError),
    /// What is copied is not what its digest says.
    False(Mismatch),
    /// The target.
    Written(FetchError),
}

/// Shows a blob as moving for as long as it lives.
struct Moving<'a>(&'a Blob);

impl<'a> Moving<'a> {
    fn begin(blob: &'a Blob) -> Self {
        blob.is_moving.store(true, Ordering::Relaxed);
        Self(blob)
    }
}

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        self.0.is_moving.store(false, Ordering::Relaxed);
    }
}

fn pieces(bytes: Bytes) -> BoxStream<'static, Result<Unverified, FetchError>> {
    let count = bytes.len().div_ceil(PIECE);
    let piece = move |at: usize| bytes.slice(at * PIECE..bytes.len().min((at + 1) * PIECE));
    stream::iter((0..count).map(move |at| Ok(Unverified::new(piece(at))))).boxed()
}

/// The bytes as a target takes them: counted. An error goes to `unread`, and the target gets one that is no reason to try
/// again.
fn counted(
    bytes: BoxStream<'static, Result<Unverified, FetchError>>,
    blob: Arc<Blob>,
    unread: Arc<Mutex<Option<FetchError>>>,
) -> ByteStream {
    let count = move |piece: Result<Unverified, FetchError>| match piece {
        Ok(piece) => {
            blob.sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
            Ok(piece)
        }
        Err(error) => {
            *unread.lock().unwrap_or_else(|held| held.into_inner()) = Some(error);
            let what = "its bytes broke off".to_owned();
            Err(SourceError::Protocol { source_name: "the source".to_owned(), what })
        }
    };
    Box::pin(bytes.map(count))
}
