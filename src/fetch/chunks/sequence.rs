//! Chunks of a layer that can only be read from its start on, because it is compressed or its source knows no ranges, where
//! the cache has no room for all of it. Each reading picks the chunks that somebody waits for as they pass; behind
//! the first of them, it takes others along: as many as the cache takes, and some in memory. Then it stops.
//!
//! One reading of a layer at a time. Who comes while it is under way waits at the place of his chunk, or for the next one.
//!
//! Lock: a plain mutex around those who wait, held for a look or a note.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

use super::requests::{Want, verify};
use super::{Chunked, Claim};
use crate::archive::index::Index;
use crate::archive::inflate::{self, InflateError, Inflater};
use crate::digest::Mismatch;
use crate::fetch::transfer::Transfer;
use crate::fetch::{ArchiveError, Context, FetchError};
use crate::modelkit::{Compression, Layer};
use crate::object::CHUNK_SIZE;

/// Pieces in flight to who inflates and picks.
const QUEUE: usize = 16;
/// So many chunks a reading takes along that only memory keeps: most of those that it has room for, as who reads the layer
/// in order costs a reading for each time they are used up.
const ALONG: u32 = 24;

/// Who waits for chunks of one layer.
#[derive(Debug, Default)]
pub struct Sequence(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    /// By the places of their chunks.
    wants: BTreeMap<u64, Want>,
    is_read: bool,
}

/// The duty to read for those who wait. Dropped early, it tells them.
#[derive(Debug)]
pub struct Running(Option<Arc<Sequence>>);

impl Sequence {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// Asks for chunks. Gives the duty to read if nobody does.
    pub fn ask(self: &Arc<Self>, wants: Vec<Want>) -> Option<Running> {
        let mut waiting = self.waiting();
        for want in wants {
            waiting.put(want);
        }
        let is_idle = !waiting.is_read && !waiting.wants.is_empty();
        waiting.is_read |= is_idle;
        is_idle.then(|| Running(Some(self.clone())))
    }

    /// The place of the first chunk from an offset on that is waited for.
    fn next(&self, from: u64) -> Option<u64> {
        self.waiting().wants.range(from..).next().map(|(at, _)| *at)
    }

    fn take(&self, at: u64) -> Option<Want> {
        self.waiting().wants.remove(&at)
    }

    fn put(&self, want: Want) {
        self.waiting().put(want);
    }

    /// Tells all who wait that their chunks can't be had.
    fn fail(&self, error: FetchError) {
        let wants = std::mem::take(&mut self.waiting().wants);
        let error = Arc::new(error);
        for want in wants.into_values() {
            want.claim.fail(error.clone());
        }
    }
}

impl Waiting {
    fn put(&mut self, want: Want) {
        self.wants.insert(want.at.start, want);
    }
}

impl Running {
    /// Ends it if nobody waits.
    fn is_over(&mut self) -> bool {
        let Some(sequence) = &self.0 else { return true };
        let mut waiting = sequence.waiting();
        if !waiting.wants.is_empty() {
            return false;
        }
        waiting.is_read = false;
        drop(waiting);
        self.0 = None;
        true
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(sequence) = self.0.take() else { return };
        let mut waiting = sequence.waiting();
        waiting.is_read = false;
        let wants = std::mem::take(&mut waiting.wants);
        drop(waiting);
        drop(wants);
    }
}

/// Readings of one layer.
#[derive(Debug)]
pub struct Reading {
    layer: Layer,
    context: Context,
    transfers: Vec<Transfer>,
    index: Arc<Index>,
    /// Rows of files that have content, in the order of it.
    order: Arc<Vec<u32>>,
    progress: watch::Sender<u64>,
}

impl Reading {
    /// What it takes to read a layer whose index is known.
    pub fn new(
        layer: Layer,
        context: Context,
        transfers: Vec<Transfer>,
        index: Arc<Index>,
        progress: watch::Sender<u64>,
    ) -> Self {
        let head = index.head();
        let mut order: Vec<u32> = (0_u32..)
            .zip(head.rows())
            .filter(|(_, row)| row.object().is_some() && row.size() > 0)
            .map(|(at, _)| at)
            .collect();
        order.sort_unstable_by_key(|at| head.row(*at as usize).map(|row| row.offset()));
        Self { layer, context, transfers, order: Arc::new(order), index, progress }
    }

    /// Reads once for those who wait, from one source after the other; tells whether nobody waits any more.
    pub async fn serve(&self, running: &mut Running) -> bool {
        let Some(sequence) = running.0.clone() else { return true };
        let mut outcome = Err(FetchError::Lost { what: self.what() });
        // What came false, and from no other source, is asked for anew.
        let again = self.transfers.last().map(|last| (true, last));
        for (is_again, transfer) in self.transfers.iter().map(|transfer| (false, transfer)).chain(again) {
            if is_again && !matches!(outcome, Err(FetchError::Digest { .. })) {
                break;
            }
            outcome = self.read(transfer, &sequence).await;
            if outcome.is_ok() {
                break;
            }
        }
        if let Err(error) = outcome {
            sequence.fail(error);
        }
        running.is_over()
    }

    fn what(&self) -> String {
        format!("layer {}", self.layer.digest)
    }

    async fn read(&self, transfer: &Transfer, sequence: &Arc<Sequence>) -> Result<(), FetchError> {
        let (to_picker, mut queue) = mpsc::channel::<Bytes>(QUEUE);
        let mut picker = Picker {
            sequence: sequence.clone(),
            context: self.context.clone(),
            index: self.index.clone(),
            order: self.order.clone(),
            progress: self.progress.clone(),
            position: 0,
            open: None,
            along: None,
            next: 0,
            spare: ALONG,
        };
        let (compression, size) = (self.layer.compression, self.layer.size);
        let bound = match compression {
            Compression::None => u64::MAX,
            _ => self.context.limits.max_inflated.unwrap_or_else(|| inflate::max_inflated(size)),
        };
        let picking = tokio::task::spawn_blocking(move || {
            let mut inflater = Inflater::new(compression, bound)?;
            while let Some(bytes) = queue.blocking_recv() {
                inflater.feed(&bytes, &mut |bytes: &[u8]| picker.pass(bytes))?;
            }
            Ok::<_, Stop>(picker.is_due())
        });
        let mut bytes = transfer.ordered();
        let mut fed = Ok(());
        while let Some(piece) = bytes.next().await {
            match piece {
                Ok(piece) if to_picker.send(piece.peek().clone()).await.is_ok() => {}
                // It has what it wants, or can't go on.
                Ok(_) => break,
                Err(error) => {
                    fed = Err(error);
                    break;
                }
            }
        }
        drop(to_picker);
        let lost = || FetchError::Lost { what: self.what() };
        match picking.await.map_err(|_| lost())? {
            Err(Stop::Enough) => Ok(()),
            Err(Stop::False(cause)) => {
                let source_name = transfer.source.name();
                tracing::error!(layer = %self.layer.digest, found = %cause.found, expected = %cause.expected, source = %source_name,
                    "a chunk does not have its digest; nothing of it is kept");
                Err(FetchError::Digest { what: format!("a chunk of {}", self.what()), source_name, cause })
            }
            Err(Stop::Archive(cause)) => Err(FetchError::Archive { layer: self.layer.digest, cause }),
            Ok(is_due) => {
                fed?;
                // The layer has ended before the place of a chunk.
                if is_due { Err(lost()) } else { Ok(()) }
            }
        }
    }
}

/// Why a reading ends before its layer does.
enum Stop {
    /// Nobody waits for what follows.
    Enough,
    /// A chunk is not what it should be.
    False(Mismatch),
    /// It can't be inflated.
    Archive(ArchiveError),
}

impl From<InflateError> for Stop {
    fn from(error: InflateError) -> Self {
        Self::Archive(error.into())
    }
}

/// Picks chunks from a layer that passes.
struct Picker {
    sequence: Arc<Sequence>,
    context: Context,
    index: Arc<Index>,
    order: Arc<Vec<u32>>,
    progress: watch::Sender<u64>,
    /// How many bytes of the uncompressed layer have passed.
    position: u64,
    /// The chunk that is put together, or comes next.
    open: Option<(Want, Vec<u8>)>,
    /// The file that chunks are taken along from: `None` before the first that somebody waited for.
    along: Option<Arc<Chunked>>,
    /// Where its row is in `order`.
    next: usize,
    /// How many more may be taken along into memory.
    spare: u32,
}

impl Picker {
    fn pass(&mut self, mut bytes: &[u8]) -> Result<(), Stop> {
        self.look_again();
        while !bytes.is_empty() {
            if self.open.is_none() {
                self.open = Some((self.pick().ok_or(Stop::Enough)?, Vec::new()));
            }
            let Some((want, buffer)) = &mut self.open else { return Ok(()) };
            let skipped = want.at.start.saturating_sub(self.position).min(bytes.len() as u64);
            let taken = (want.at.end - self.position - skipped).min(bytes.len() as u64 - skipped);
            buffer.extend_from_slice(&bytes[skipped as usize..(skipped + taken) as usize]);
            self.position += skipped + taken;
            bytes = &bytes[(skipped + taken) as usize..];
            if self.position == want.at.end {
                self.accept()?;
            }
        }
        Ok(())
    }

    /// Turns to a chunk that somebody waits for by now and that comes before the one that would be next.
    fn look_again(&mut self) {
        let Some((want, _)) = self.open.take_if(|(_, buffer)| buffer.is_empty()) else { return };
        self.sequence.put(want);
        let at = self.sequence.next(self.position);
        self.open = at.and_then(|at| self.sequence.take(at)).map(|want| (want, Vec::new()));
    }

    /// Whether somebody waits for what did not come.
    fn is_due(&self) -> bool {
        self.open.is_some() || self.sequence.next(self.position).is_some()
    }

    /// What comes next: what somebody waits for, or before that, what is taken along.
    fn pick(&mut self) -> Option<Want> {
        let asked = self.sequence.next(self.position);
        self.take_along(asked.unwrap_or(u64::MAX)).or_else(|| self.sequence.take(asked?))
    }

    /// The next chunk that begins before `end`, is missing and nobody is getting.
    fn take_along(&mut self, end: u64) -> Option<Want> {
        let mut passed = 0;
        while self.spare > 0 {
            let file = self.along.clone()?;
            let start = self.index.head().row(*self.order.get(self.next)? as usize)?.offset();
            let first = self.position.saturating_sub(start).div_ceil(u64::from(CHUNK_SIZE)).max(passed);
            let Some(chunk) = (first..file.list().len()).find(|chunk| !file.partial().has(*chunk)) else {
                self.next += 1;
                self.along = self.file();
                passed = 0;
                continue;
            };
            passed = chunk + 1;
            let within = file.list().range(chunk)?;
            let at = start + within.start..start + within.end;
            if at.start >= end {
                return None;
            }
            match file.claim(chunk, &self.progress).0.map(Claim::look) {
                Some(Err(claim)) => return Some(Want::new(claim, at)),
                Some(Ok(completes)) => self.commit(completes.then_some(file)),
                // It is in memory; or somebody has asked for it just now, and is found at the next look.
                None => {}
            }
        }
        None
    }

    /// The file whose turn it is, or the next one that is not in the cache; `None` also where no more can be opened.
    fn file(&mut self) -> Option<Arc<Chunked>> {
        loop {
            let list = self.index.chunks(*self.order.get(self.next)? as usize)?;
            // The right goes with the file.
            let right = self.context.files.neighbour()?;
            let file = self.context.files.get_or_open(&self.context.cache, list.to_owned());
            if !self.context.cache.has_object(&list.object(), list.size()) {
                file.keep(right);
                return Some(file);
            }
            self.next += 1;
        }
    }

    /// Verifies the chunk at hand, answers those who wait for it, and keeps it.
    fn accept(&mut self) -> Result<(), Stop> {
        let Some((want, bytes)) = self.open.take() else { return Ok(()) };
        let (file, chunk, start) = (want.claim.file().clone(), want.claim.chunk(), want.at.start);
        match verify(want, bytes) {
            Ok(complete) => self.commit(complete),
            Err((want, mismatch)) => {
                self.sequence.put(want);
                return Err(Stop::False(mismatch));
            }
        }
        if !file.partial().has(chunk) {
            self.spare = self.spare.saturating_sub(1);
        }
        // Somebody may have asked for one that lies in a later file.
        let head = self.index.head();
        let place = |row: &u32| head.row(*row as usize).map_or(0, |row| row.offset());
        self.next = self.order.partition_point(|row| place(row) <= start).saturating_sub(1);
        self.along = Some(file);
        Ok(())
    }

    /// Makes a file durable that is complete, when not too many wait for that.
    fn commit(&self, complete: Option<Arc<Chunked>>) {
        if let Some(file) = complete {
            self.context.files.commit(&self.context.cache, file);
            Handle::current().block_on(self.context.files.until_room());
        }
    }
}

impl Drop for Picker {
    fn drop(&mut self) {
        // Somebody may wait for it, and the next reading has it.
        if let Some((want, _)) = self.open.take() {
            self.sequence.put(want);
        }
    }
}
