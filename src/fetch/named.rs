//! Indexes that somebody vouches for: a manifest's author by an annotation, or whom the user trusts by a referrer.
//!
//! What is named is fetched by digest from the kit's own sources, and is used only after its digest and its rules have
//! held and it was found to be of the layer that it is named for. The head alone lists the layer; a file's chunk list
//! follows when the file is read, proved by the object digest in the head. An index may have gigabytes: what is long
//! goes to the cache as it comes, and is mapped there.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::sync::watch;

use super::transfer::{Persistence, Transfer};
use super::{BadIndex, Context, FetchError, Tier};
use crate::archive::index::annotations::Pin;
use crate::archive::index::{Chunks, Head, Index, IndexError, LayerFacts};
use crate::cache::Cache;
use crate::digest::{Digest, Mismatch, Unverified, Verified};
use crate::modelkit::Layer;
use crate::object::ChunkList;
use crate::source::{BlobId, Source, SourceError};

/// What is shorter is held in memory while it is fetched, and used even where the cache can't keep it.
const HELD: u64 = 4 << 20;
/// Pieces of a long index that are written at once: 1 to 4 MiB, as the network gives them.
const WRITTEN_AT_ONCE: usize = 64;
/// What stands for a source where the bytes were in the cache.
const CACHE: &str = "the cache";
/// What stands for a source where none was asked.
const DESCRIPTOR: &str = "its descriptor";

/// An index that a manifest or a trusted referrer names for a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Named {
    /// Which index.
    pub pin: Pin,
    /// Who vouches for it: [`Tier::Pinned`] or [`Tier::Attested`].
    pub tier: Tier,
}

impl Named {
    /// The head: from the cache, else from the first source that gives the right bytes.
    pub async fn head(
        &self,
        layer: &Layer,
        context: &Context,
        sources: &[Arc<dyn Source>],
        persistence: Persistence,
    ) -> Result<Head, FetchError> {
        let ask = Ask { pin: self.pin, layer: layer.digest, context, sources, persistence };
        let Pin { head_size, head_digest, .. } = self.pin;
        let (head, source_name) = ask.checked(layer, head_size, head_digest, Head::parse, Head::layer).await?;
        if head.index_len() != self.pin.size {
            let cause = BadIndex::Length { named: self.pin.size, found: head.index_len() };
            return Err(ask.bad(&source_name, cause));
        }
        Ok(head)
    }

    /// The chunk list of the file at a row of the head. It is not kept.
    pub async fn list(
        &self,
        head: &Head,
        row: usize,
        context: &Context,
        sources: &[Arc<dyn Source>],
    ) -> Result<ChunkList<Bytes>, FetchError> {
        let persistence = Persistence::UntilDeadline;
        let ask = Ask { pin: self.pin, layer: head.layer().digest, context, sources, persistence };
        let range = match head.row(row).and_then(|row| row.chunks()) {
            Some(Chunks::Here(list)) => return Ok(list.to_owned()),
            Some(Chunks::At(range)) => range,
            None => return Err(FetchError::Lost { what: format!("the chunk list of what is not a file in {ask}") }),
        };
        ask.list(head, row, range).await
    }

    /// All of it: from the cache, else from the first source that gives the right bytes.
    pub async fn whole(
        &self,
        layer: &Layer,
        context: &Context,
        sources: &[Arc<dyn Source>],
    ) -> Result<Index, FetchError> {
        let persistence = Persistence::UntilDeadline;
        let ask = Ask { pin: self.pin, layer: layer.digest, context, sources, persistence };
        let Pin { size, digest, .. } = self.pin;
        let (index, _) = ask.checked(layer, size, digest, Index::decode, |index| index.head().layer()).await?;
        Ok(index)
    }
}

/// One index, and all that it takes to get it.
struct Ask<'a> {
    pin: Pin,
    layer: Digest,
    context: &'a Context,
    sources: &'a [Arc<dyn Source>],
    persistence: Persistence,
}

impl std::fmt::Display for Ask<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "index {} of layer {}", self.pin.digest, self.layer)
    }
}

impl Ask<'_> {
    /// What the first `len` bytes of the index are, which have `digest`, if they keep the rules and are of the layer; and
    /// who gave them. Nothing is asked for that is longer than the layer's index can be.
    async fn checked<T: Send + 'static>(
        &self,
        layer: &Layer,
        len: u64,
        digest: Digest,
        read: fn(Bytes, Option<u64>) -> Result<T, IndexError>,
        facts: fn(&T) -> &LayerFacts,
    ) -> Result<(T, String), FetchError> {
        let bound = self.context.limits.max_inflated;
        if !self.pin.fits(layer, bound) {
            let (head, lists) = (self.pin.head_size, self.pin.size - self.pin.head_size);
            return Err(self.bad(DESCRIPTOR, BadIndex::TooLong { head, lists, layer: layer.size }));
        }
        let (bytes, source_name) = self.proved(len, digest).await?;
        let read = self.off_thread(move || read(bytes.bytes().clone(), bound)).await?;
        let read = read.map_err(|cause| self.bad(&source_name, BadIndex::Invalid(cause)))?;
        let found = facts(&read);
        if !found.fit(layer) {
            return Err(self.bad(&source_name, BadIndex::OtherLayer { found: found.digest }));
        }
        Ok((read, source_name))
    }

    /// The first `len` bytes of the index, which have `digest`, and who gave them; kept for the next time.
    async fn proved(&self, len: u64, digest: Digest) -> Result<(Verified, String), FetchError> {
        let index = self.pin.digest;
        let look = move |cache: &Cache| {
            if let Some(found) = cache.blob(&digest)? {
                return Ok(Some(found));
            }
            // The index may be there as a whole.
            let part = if digest == index { None } else { cache.part_of_blob(&index, 0..len)? };
            Ok(part.and_then(|part| part.verify(&digest).ok()))
        };
        let found = self.context.blocking(&self.to_string(), look).await;
        if let Some(found) = found.map_err(|error| self.explain(error, CACHE))? {
            return Ok((found, CACHE.to_owned()));
        }
        self.try_sources(|transfer| self.fetch(transfer, len, digest)).await
    }

    /// What the first source gives that can; with it the source's name. That a source lacks the index is told only
    /// where no other failed in another way.
    async fn try_sources<T, F>(&self, get: impl Fn(Transfer) -> F) -> Result<(T, String), FetchError>
    where
        F: Future<Output = Result<T, FetchError>>,
    {
        let blob = BlobId { digest: self.pin.digest, size: self.pin.size };
        let mut failure = None;
        for source in self.sources {
            let limits = self.context.limits.clone();
            let (received, fetched) = (watch::Sender::new(0), Arc::default());
            let (persistence, memory) = (self.persistence, self.context.memory.clone());
            let (source, source_name, vain) = (source.clone(), source.name(), self.context.vain.clone());
            let transfer = Transfer { source, blob, limits, received, persistence, fetched, memory, vain };
            let error = match get(transfer).await {
                Ok(value) => return Ok((value, source_name)),
                Err(error) => self.explain(error, &source_name),
            };
            let is_missing = |error: &FetchError| matches!(error, FetchError::Index { cause, .. } if matches!(**cause, BadIndex::Missing(_)));
            // That it is missing is the last source's to say, which is the registry; and only if no other was at fault.
            if !is_missing(&error) || failure.as_ref().is_none_or(is_missing) {
                failure = Some(error);
            }
        }
        Err(failure.unwrap_or_else(|| FetchError::Lost { what: self.to_string() }))
    }

    async fn fetch(&self, transfer: Transfer, len: u64, digest: Digest) -> Result<Verified, FetchError> {
        let verified = if len <= HELD {
            let bytes = Unverified::new(transfer.head(len).await?);
            let verified = self.off_thread(move || bytes.verify(&digest)).await?;
            if let Ok(verified) = &verified {
                self.keep(digest, verified).await;
            }
            verified
        } else {
            self.fetch_to_disk(&transfer, len, digest).await?
        };
        verified.map_err(|cause| self.bad(&transfer.source.name(), BadIndex::False(cause)))
    }

    /// Keeps what was proved. A cache that can't grow is no reason to do without it now. A mount, which asks for the heads of
    /// all layers at once, does not wait for the disk: what is lost with the process is fetched again.
    async fn keep(&self, digest: Digest, verified: &Verified) {
        let (cache, verified) = (self.context.cache.clone(), verified.clone());
        let keeping = tokio::task::spawn_blocking(move || {
            cache.keep_blob(&digest, &verified).unwrap_or_else(|error| {
                error.unless_full(|error| tracing::warn!(%error, "not kept in the cache"));
            });
        });
        if self.persistence == Persistence::UntilDeadline && keeping.await.is_err() {
            tracing::warn!(%digest, "not kept in the cache");
        }
    }

    async fn fetch_to_disk(
        &self,
        transfer: &Transfer,
        len: u64,
        digest: Digest,
    ) -> Result<Result<Verified, Mismatch>, FetchError> {
        let what = self.to_string();
        let mut blob = self.context.blocking(&what, move |cache| cache.new_blob(&digest)).await?;
        let mut pieces = transfer.first(len).ready_chunks(WRITTEN_AT_ONCE);
        while let Some(pieces) = pieces.next().await {
            let pieces = pieces.into_iter().collect::<Result<Vec<_>, _>>()?;
            let write = move |cache: &Cache| {
                pieces.iter().try_for_each(|piece| blob.write(cache, piece))?;
                Ok(blob)
            };
            blob = self.context.blocking(&what, write).await?;
        }
        self.context.blocking(&what, move |cache| blob.keep(cache, &digest)).await
    }

    /// The chunk list that lies at `range` of the index.
    async fn list(&self, head: &Head, row: usize, range: Range<u64>) -> Result<ChunkList<Bytes>, FetchError> {
        let prove = |bytes: Bytes| {
            let head = head.clone();
            self.off_thread(move || head.row(row).map(|row| row.list(bytes)).transpose())
        };
        let (index, part) = (self.pin.digest, range.clone());
        let cached = self.context.blocking(&self.to_string(), move |cache| cache.part_of_blob(&index, part)).await?;
        if let Some(bytes) = cached
            && let Ok(Some(list)) = prove(bytes.peek().clone()).await?
        {
            return Ok(list.to_owned());
        }
        let get = |transfer: Transfer| {
            let range = range.clone();
            async move {
                let name = transfer.source.name();
                let bytes = match transfer.range(range.clone()).await {
                    // Then all of it comes, and is kept, so that this happens once.
                    Err(error) if error.ignores_ranges() => {
                        let whole = self.fetch(transfer, self.pin.size, self.pin.digest).await?;
                        whole.bytes().slice(range.start as usize..range.end as usize)
                    }
                    pieces => joined(&pieces?),
                };
                let list = prove(bytes).await?.map_err(|cause| self.bad(&name, BadIndex::List(cause)))?;
                list.ok_or_else(|| FetchError::Lost { what: self.to_string() })
            }
        };
        // Bytes of its own: it must not hold a map, or all of a response.
        Ok(self.try_sources(get).await?.0.to_owned())
    }

    /// Hashing and checking, away from the threads that wait for the network.
    async fn off_thread<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, FetchError> {
        self.context.off_thread(&self.to_string(), work).await
    }

    fn bad(&self, source_name: &str, cause: BadIndex) -> FetchError {
        FetchError::Index {
            layer: self.layer,
            index: self.pin.digest,
            source_name: source_name.to_owned(),
            cause: Box::new(cause),
        }
    }

    /// What a transfer ended with, told of an index and not of a blob. What a disk refuses, the source's or the cache's,
    /// it would refuse again, and the layer can be read without its index.
    fn explain(&self, error: FetchError, source_name: &str) -> FetchError {
        match error {
            FetchError::Source { cause: cause @ SourceError::NotFound { .. }, .. } => {
                self.bad(source_name, BadIndex::Missing(cause))
            }
            FetchError::Source { cause: cause @ SourceError::Protocol { .. }, .. } => {
                self.bad(source_name, BadIndex::Unfit(cause))
            }
            FetchError::Source { cause: cause @ SourceError::Disk { .. }, .. } => {
                self.bad(source_name, BadIndex::Unreadable(cause))
            }
            FetchError::Cache(cause) => self.bad(source_name, BadIndex::NotKept(cause)),
            FetchError::Source { cause, .. } => FetchError::Source { what: self.to_string(), cause },
            FetchError::Timeout { after, cause, .. } => FetchError::Timeout { what: self.to_string(), after, cause },
            other => other,
        }
    }
}

fn joined(pieces: &[Unverified]) -> Bytes {
    match pieces {
        [piece] => piece.peek().clone(),
        pieces => {
            let mut all = Vec::with_capacity(pieces.iter().map(Unverified::len).sum());
            pieces.iter().for_each(|piece| all.extend_from_slice(piece.peek()));
            all.into()
        }
    }
}
