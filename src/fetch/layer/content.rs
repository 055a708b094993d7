//! Bytes of a layer's files.
//!
//! What the cache has whole is read from there. Else, where an index tells the chunks of an uncompressed layer, those
//! that are wanted are fetched and verified one by one, with what is likely to be wanted next. Else
//! the layer is fetched whole; and if there is no room for that, its index is known afterwards, and its chunks are fetched
//! one by one, or, where it can only be read from its start on, as they pass.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::complete::Pace;
use super::{Known, LayerFetch, RowContent};
use crate::archive::index::{Chunks, Head, Index};
use crate::cache::{Cache, Object};
use crate::fetch::FetchError;
use crate::fetch::chunks::requests::Want;
use crate::fetch::chunks::{Arrived, Chunked, Piece, Wait};
use crate::fetch::flight::Flight;
use crate::modelkit::Compression;
use crate::object::ChunkList;
use crate::path::TreePath;

/// Verified content of a file: all of it, or what there is and how to get more.
#[derive(Debug, Clone)]
pub enum Content {
    /// All of it is in the cache.
    Object(Object),
    /// It is fetched chunk by chunk.
    Chunked(Arc<Chunked>),
}

impl LayerFetch {
    /// The content of a row; unverified, at least up to `end`.
    pub async fn content(self: &Arc<Self>, row: usize, end: u64) -> Result<RowContent, FetchError> {
        self.check_poison()?;
        if let Some(known) = self.look_for_index().await? {
            match self.open(&known, row).await {
                Ok(Some(content)) => return Ok(RowContent::Verified(content)),
                // Its content comes whole, and that of an earlier fill was evicted or damaged.
                Ok(None) => self.fill.forget(),
                // The index that was named has no right list of the file's chunks any more; the layer may be there still.
                Err(error) if matches!(error.root(), FetchError::Index { .. }) => {
                    self.note_unusable(crate::report::chain(&error));
                }
                // The list is not to be had, and the layer may be in kit's storage all the same.
                Err(error) if error.is_offline() => {}
                Err(error) => return Err(error),
            }
        } else if let Some(path) = self.streamed(row, end).await? {
            return Ok(RowContent::Staged(path));
        }
        let known = Known::Derived(self.fill().await?);
        if let Some(object) = self.object(known.head(), row).await? {
            return Ok(RowContent::Verified(Content::Object(object)));
        }
        // There was no room for it.
        self.open_parts(&known, row).await.map(RowContent::Verified)
    }

    /// A range of a file that [`LayerFetch::content`] gave, which ends within it, piece by piece.
    pub async fn read(
        self: &Arc<Self>,
        row: usize,
        file: &Arc<Chunked>,
        range: Range<u64>,
    ) -> Result<Vec<Piece>, FetchError> {
        let pieces = match self.try_read(row, file, &range).await {
            // The source of another layer that holds the same content has failed; it is this one's turn.
            Err(Failed::Elsewhere(_)) => self.try_read(row, file, &range).await,
            outcome => outcome,
        };
        self.finish_if_mostly_here(row, file);
        // It may have been found false meanwhile.
        self.check_poison()?;
        pieces.map_err(|failed| match failed {
            Failed::Here(error) | Failed::Elsewhere(error) => error,
        })
    }

    async fn try_read(
        self: &Arc<Self>,
        row: usize,
        file: &Arc<Chunked>,
        range: &Range<u64>,
    ) -> Result<Vec<Piece>, Failed> {
        self.check_poison()?;
        if file.is_complete()
            && let Some(cached) = file.cached(range)
        {
            self.note_complete(file.list().object());
            return Ok(vec![Piece::File(cached)]);
        }
        let offset = self.known().and_then(|known| Some(known.head().row(row)?.offset()));
        let offset = offset.ok_or_else(|| FetchError::Lost { what: format!("the index of {}", self.what()) })?;
        let claim = |chunk| {
            let within = file.list().range(chunk).unwrap_or_default();
            let at = offset + within.start..offset + within.end;
            let (claim, wait) = file.claim(chunk, &self.progress);
            (claim.map(|claim| Want::new(claim, at.clone())), at, within, wait)
        };
        let (mut waits, mut wants) = (Vec::new(), Vec::new());
        for chunk in file.list().chunks_of(range) {
            let (want, at, within, wait) = claim(chunk);
            if want.is_some() {
                file.streams().missed(chunk);
                file.streams().asked(chunk..chunk + 1);
            } else if matches!(wait, Wait::Coming(_)) && self.queue.holds(at.start) {
                // It was to be read ahead.
                self.serve(Pace::Now);
            }
            wants.extend(want);
            waits.push((within, wait));
        }
        let chunks = file.ahead(range, self.widest());
        let ahead: Vec<Want> = chunks.clone().filter_map(|chunk| claim(chunk).0).collect();
        file.streams().asked(chunks);
        self.get(row, wants, ahead);
        if let Some(cached) = file.cached(range) {
            return Ok(vec![Piece::File(cached)]);
        }
        let mut pieces = Vec::new();
        for (within, wait) in waits {
            let wanted = range.start.max(within.start)..range.end.min(within.end);
            let arrived = match wait {
                Wait::Here => Arrived::InFile,
                Wait::Memory(bytes) => Arrived::InMemory(bytes),
                Wait::Coming(coming) => {
                    let is_ours = coming.is_told_by(&self.progress);
                    coming.arrived(&self.context.limits).await.map_err(|error| {
                        if !is_ours {
                            return Failed::Elsewhere(error);
                        }
                        self.note_whole(&error);
                        Failed::Here(error)
                    })?
                }
            };
            pieces.push(match arrived {
                Arrived::InFile => {
                    let lost = || FetchError::Lost { what: format!("a chunk of object {}", file.list().object()) };
                    Piece::File(file.cached(&wanted).ok_or_else(lost)?)
                }
                Arrived::InMemory(bytes) => {
                    let (start, end) = (wanted.start - within.start, wanted.end - within.start);
                    Piece::Memory(bytes.slice(start as usize..end as usize))
                }
            });
        }
        if let Some(cached) = file.cached(range) {
            return Ok(vec![Piece::File(cached)]);
        }
        Ok(pieces)
    }

    /// The file of a row that was filled chunk by chunk and is complete, but need not have its name yet.
    pub fn filled(&self, row: usize) -> Option<Arc<Chunked>> {
        let known = self.known()?;
        let found = known.head().row(row)?;
        let file = self.context.files.get(&found.object()?)?;
        (file.is_complete() && file.list().size() == found.size()).then_some(file)
    }

    /// How many bytes of a row's content are in the cache, about; none as long as nothing proves what they are.
    pub async fn in_cache(&self, row: usize) -> u64 {
        let Some(known) = self.known() else { return 0 };
        let Some((name, size)) = known.head().row(row).and_then(|row| Some((row.object()?, row.size()))) else {
            return 0;
        };
        let look = move |cache: &Cache| {
            Ok(if cache.has_object(&name, size) { size } else { cache.partial_bytes(&name).min(size) })
        };
        self.blocking(look).await.unwrap_or_default()
    }

    pub(super) async fn object(self: &Arc<Self>, head: &Head, row: usize) -> Result<Option<Object>, FetchError> {
        let found = head.row(row).and_then(|row| Some((row.object()?, row.size())));
        let Some((name, size)) = found else { return Ok(None) };
        let object = self.blocking(move |cache| cache.object(&name, size)).await?;
        if object.is_some() {
            self.note_complete(name);
        }
        Ok(object)
    }

    /// With [`Verify::Stream`](crate::fetch::Verify::Stream): waits until `end` bytes of a row are staged. `None` once the layer is verified.
    async fn streamed(self: &Arc<Self>, row: usize, end: u64) -> Result<Option<PathBuf>, FetchError> {
        let Some(view) = self.view.clone() else { return Ok(None) };
        let listing = self.listing().await?;
        let path = listing.entry(row).map(|entry| TreePath::from_clean(entry.path).unwrap_or_default());
        let Some(path) = path else { return Ok(None) };
        let mut changes = view.changes();
        let mut fill = std::pin::pin!(self.fill());
        loop {
            if let Some(staged) = view.ready(&path, end) {
                return Ok(Some(staged));
            }
            tokio::select! {
                biased;
                filled = &mut fill => return filled.map(|_| None),
                _ = changes.changed() => {}
            }
        }
    }

    /// Sets out to get what it takes to read a file: the chunk list that its named index has of it. Nobody waits, and who
    /// reads is told what is wrong.
    pub fn prepare(self: &Arc<Self>, row: usize) {
        let Some(known @ Known::Named(..)) = self.known() else { return };
        let is_elsewhere = known.head().row(row).is_some_and(|row| matches!(row.chunks(), Some(Chunks::At(_))));
        if !is_elsewhere || self.layer.compression != Compression::None {
            return;
        }
        let this = self.clone();
        tokio::spawn(async move {
            let _ = this.open(&known, row).await;
        });
    }

    /// Opens the content of a row that is known, for all who ask at once. `None` where it comes with the whole layer.
    pub(super) async fn open(self: &Arc<Self>, known: &Known, row: usize) -> Result<Option<Content>, FetchError> {
        if let Some(file) = self.opened(known.head(), row).filter(|_| !self.is_only_whole()) {
            return Ok(Some(Content::Chunked(file)));
        }
        if let Some(object) = self.object(known.head(), row).await? {
            return Ok(Some(Content::Object(object)));
        }
        if self.is_only_whole() && !self.unstaged.is_recent() {
            return Ok(None);
        }
        self.open_parts(known, row).await.map(Some)
    }

    /// Opens a file that is fetched chunk by chunk.
    async fn open_parts(self: &Arc<Self>, known: &Known, row: usize) -> Result<Content, FetchError> {
        let what = || format!("a file of {}", self.what());
        let flight = {
            let mut opening = self.opening.lock().unwrap_or_else(|held| held.into_inner());
            opening.entry(row).or_insert_with(|| Arc::new(Flight::new(what()))).clone()
        };
        let (this, known) = (self.clone(), known.clone());
        let opened = flight.join(|| async move { this.open_chunked(&known, row).await }).await;
        // Opened anew the next time: until then it may have become an object, or been dropped.
        self.opening.lock().unwrap_or_else(|held| held.into_inner()).remove(&row);
        opened.inspect_err(|error| self.note_whole(error))
    }

    async fn open_chunked(self: &Arc<Self>, known: &Known, row: usize) -> Result<Content, FetchError> {
        let lost = || FetchError::Lost { what: format!("a file of {}", self.what()) };
        if let Some(file) = self.opened(known.head(), row) {
            return Ok(Content::Chunked(file));
        }
        let found = known.head().row(row).ok_or_else(lost)?;
        let (object, size) = (found.object().ok_or_else(lost)?, found.size());
        let list = match known {
            Known::Derived(index) => owned_list(index, row).ok_or_else(lost)?,
            Known::Named(head, named) => match found.chunks().ok_or_else(lost)? {
                Chunks::Here(list) => list.to_owned(),
                Chunks::At(_) => match self.blocking(move |cache| cache.chunk_list(&object, size)).await? {
                    Some(list) => list,
                    None => {
                        let list = named.list(head, row, &self.context, &self.sources).await?;
                        let kept = list.clone();
                        self.blocking(move |cache| {
                            cache.keep_chunk_list(&kept).unwrap_or_else(|error| {
                                error.unless_full(|error| tracing::warn!(%error, "chunk digests not kept"));
                            });
                            Ok(())
                        })
                        .await?;
                        list
                    }
                },
            },
        };
        let file = self.context.files.get_or_open(&self.context.cache, list);
        // It may have been completed and committed since the last look.
        Ok(match self.object(known.head(), row).await? {
            Some(object) => Content::Object(object),
            None => Content::Chunked(file),
        })
    }

    /// The file of a row, if somebody is filling it.
    pub(super) fn opened(&self, head: &Head, row: usize) -> Option<Arc<Chunked>> {
        let row = head.row(row)?;
        // The object digest covers the size: where they differ, the row's list can't be right, and will be refused.
        self.context.files.get(&row.object()?).filter(|file| file.list().size() == row.size())
    }

    /// Remembers that a layer can only be had whole.
    pub(super) fn note_whole(&self, error: &FetchError) {
        if error.ignores_ranges() {
            self.only_whole.store(true, Ordering::Relaxed);
        }
    }
}

/// Why chunks were not had.
pub(super) enum Failed {
    /// By this layer's own request, or before any was made.
    Here(FetchError),
    /// By the request of another layer that holds the same content.
    Elsewhere(FetchError),
}

impl From<FetchError> for Failed {
    fn from(error: FetchError) -> Self {
        Self::Here(error)
    }
}

fn owned_list(index: &Index, row: usize) -> Option<ChunkList<Bytes>> {
    index.chunks(row).map(|list| list.to_owned())
}
