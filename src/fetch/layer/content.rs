//! Bytes of a layer's files.
//!
//! What the cache has whole is read from there. Else, where an index tells the chunks of an uncompressed layer, those
//! that are wanted are fetched and verified one by one; a file of one chunk brings its missing neighbours along. Else
//! the layer is fetched whole; and if there is no room for that, its index is known afterwards, and its chunks are fetched
//! one by one, or, where it can only be read from its start on, as they pass.

use std::collections::VecDeque;
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
use crate::fetch::chunks::{Arrived, Chunked, Piece, Wait};
use crate::fetch::flight::Flight;
use crate::fetch::requests::{self, GAP, Supply, Want};
use crate::fetch::sequence::Reading;
use crate::modelkit::Compression;
use crate::object::{CHUNK_SIZE, ChunkList};

/// A file of one chunk is fetched with what lies in the same window of the layer, aligned to this.
const WINDOW: u64 = 1 << 20;

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
            let (claim, wait) = file.claim(chunk, &self.progress);
            let want = claim.map(|claim| Want::new(claim, offset + within.start..offset + within.end));
            (want, within, wait)
        };
        let (mut waits, mut wants) = (Vec::new(), Vec::new());
        let chunks = file.list().chunks_of(range);
        for chunk in chunks.clone() {
            let (want, within, wait) = claim(chunk);
            wants.extend(want);
            waits.push((within, wait));
        }
        let somebody_waits = !wants.is_empty();
        wants.extend(file.ahead(&chunks).filter_map(|chunk| claim(chunk).0));
        if !wants.is_empty() {
            self.get(row, wants, somebody_waits);
        }
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

    /// Sets out to get chunks; whoever wants them waits at their claims.
    fn get(self: &Arc<Self>, row: usize, mut wants: Vec<Want>, somebody_waits: bool) {
        let this = self.clone();
        tokio::spawn(async move {
            this.context.files.until_room().await;
            if this.is_only_whole() {
                return this.read_in_order(wants).await;
            }
            if let Some(known) = this.known() {
                wants = this.with_neighbours(known, row, wants).await;
            }
            let supply = Supply {
                context: this.context.clone(),
                transfers: this.transfers().into_iter().map(|(_, transfer)| transfer).collect(),
                permits: this.permits.clone(),
                ahead: (!somebody_waits).then(|| this.ahead.clone()),
            };
            for file in supply.get(wants).await {
                this.note_complete(file.list().object());
            }
        });
    }

    /// Gets chunks of a layer that can only be read from its start on, as its turn comes.
    async fn read_in_order(self: &Arc<Self>, wants: Vec<Want>) {
        let Some(index) = self.derived.get().cloned() else { return };
        let (missing, complete) = requests::on_disk(wants).await;
        for file in complete {
            self.context.files.commit(&self.context.cache, file);
        }
        let Some(mut running) = self.sequence.ask(missing) else { return };
        let (layer, context) = (self.layer.clone(), self.context.clone());
        let transfers = self.transfers().into_iter().map(|(_, transfer)| transfer).collect();
        let reading = Reading::new(layer, context, transfers, index, self.progress.clone());
        loop {
            // One turn for each reading, so that other layers have theirs. Without one, those who wait are told.
            let Ok(_turn) = self.turn(Pace::Now).await else { return };
            if reading.serve(&mut running).await {
                return;
            }
        }
    }

    /// Adds to the wants for a file of one chunk those for its neighbours: those that lie wholly in the same window and
    /// are missing too, up to the first that is not.
    async fn with_neighbours(self: &Arc<Self>, known: Known, row: usize, wants: Vec<Want>) -> Vec<Want> {
        let is_small = known.head().row(row).is_some_and(|row| row.size() <= u64::from(CHUNK_SIZE));
        if !is_small {
            return wants;
        }
        let this = self.clone();
        // It looks for files on the disk.
        let added = tokio::task::spawn_blocking(move || {
            let head = known.head();
            let order = this.small.get_or_init(|| small_files(head));
            let place = |row: u32| head.row(row as usize).map(|row| row.offset()..row.offset() + row.size());
            let Some(own) = place(row as u32) else { return wants };
            let window = own.start / WINDOW * WINDOW..own.end.next_multiple_of(WINDOW);
            let at = order.partition_point(|other| place(*other).is_some_and(|other| other.start < own.start));
            let mut all = VecDeque::from(wants);
            let mut edge = own.start;
            for other in order[..at].iter().rev() {
                let near = |place: &Range<u64>| place.start >= window.start && edge.saturating_sub(place.end) <= GAP;
                let Some(place) = place(*other).filter(near) else { break };
                let Some(want) = this.neighbour(head, *other, &place) else { break };
                edge = place.start;
                all.push_front(want);
            }
            let mut edge = own.end;
            for other in order[at..].iter().filter(|other| **other as usize != row) {
                let near = |place: &Range<u64>| place.end <= window.end && place.start.saturating_sub(edge) <= GAP;
                let Some(place) = place(*other).filter(near) else { break };
                let Some(want) = this.neighbour(head, *other, &place) else { break };
                edge = place.end;
                all.push_back(want);
            }
            all.into()
        });
        // Its claims went with it, which told those who wait.
        added.await.unwrap_or_default()
    }

    /// A want for a neighbour, if it is missing and nobody is getting it.
    fn neighbour(&self, head: &Head, row: u32, place: &Range<u64>) -> Option<Want> {
        let Some(Chunks::Here(list)) = head.row(row as usize)?.chunks() else { return None };
        let right = self.context.files.neighbour()?;
        // First the file, then the look for the object: a file that is committed in between is either still this one or
        // seen there.
        let file = self.context.files.get_or_open(&self.context.cache, list.to_owned());
        if self.context.cache.has_object(&list.object(), list.size()) {
            return None;
        }
        let claim = file.claim(0, &self.progress).0?;
        file.keep(right);
        Some(Want::new(claim, place.clone()))
    }

    /// The file of a row that was filled chunk by chunk and is complete, but need not have its name yet.
    pub fn filled(&self, row: usize) -> Option<Arc<Chunked>> {
        let known = self.known()?;
        let found = known.head().row(row)?;
        let file = self.context.files.get(&found.object()?)?;
        (file.is_complete() && file.list().size() == found.size()).then_some(file)
    }

    /// The content of a row, if all of it is in the cache.
    pub async fn whole_soon(self: &Arc<Self>, row: usize) -> Option<Object> {
        let known = self.known()?;
        let found = self.object(known.head(), row).await;
        // Who reads it is told.
        found.inspect_err(|error| tracing::debug!(%error, "what is cached of a file is not known")).ok()?
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

    async fn object(self: &Arc<Self>, head: &Head, row: usize) -> Result<Option<Object>, FetchError> {
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
        let Some((_, entry)) = listing.rows.get(row) else { return Ok(None) };
        let mut changes = view.changes();
        let mut fill = std::pin::pin!(self.fill());
        loop {
            if let Some(path) = view.ready(&entry.path, end) {
                return Ok(Some(path));
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
        let found = known.head().row(row).ok_or_else(lost)?;
        let (object, size) = (found.object().ok_or_else(lost)?, found.size());
        // The object digest covers the size: where they differ, the row's list can't be right, and will be refused.
        if let Some(file) = self.context.files.get(&object)
            && file.list().size() == size
        {
            return Ok(Content::Chunked(file));
        }
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

/// Rows of files of one chunk, in the order of their content in the layer.
fn small_files(head: &Head) -> Vec<u32> {
    let is_small = |size: u64| size > 0 && size <= u64::from(CHUNK_SIZE);
    let mut rows: Vec<u32> =
        (0_u32..).zip(head.rows()).filter(|(_, row)| is_small(row.size())).map(|(at, _)| at).collect();
    rows.sort_unstable_by_key(|at| head.row(*at as usize).map(|row| row.offset()));
    rows
}
