//! Files of one chunk: a miss on one brings along what lies in the same window of the layer, and who reads them in the
//! order of the layer, or nearly, finds the next windows here. A tar is mostly in the order of its names.
//!
//! Lock: a plain mutex around what was read, held for a look or a note.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::LayerFetch;
use super::complete::Pace;
use crate::archive::index::{Chunks, Head};
use crate::fetch::chunks::ahead::Streams;
use crate::fetch::chunks::requests::{GAP, Want};
use crate::object::CHUNK_SIZE;

/// A file of one chunk is fetched with what lies in the same window of the layer, aligned to this: that of [`Streams`].
const WINDOW: u64 = CHUNK_SIZE as u64;

/// The files of one chunk of a layer.
#[derive(Debug, Default)]
pub(super) struct SmallFiles {
    /// Their rows, in the order of their content.
    order: OnceLock<Vec<u32>>,
    reading: Mutex<Reading>,
}

/// What was read of them, as if the layer were a file.
#[derive(Debug, Default)]
struct Reading {
    streams: Streams,
    /// Whether some are being claimed: what is missed meanwhile may be just these.
    is_claiming: bool,
}

impl SmallFiles {
    /// The rows, in the order of their content.
    fn order(&self, head: &Head) -> &[u32] {
        self.order.get_or_init(|| {
            let is_small = |size: u64| size > 0 && size <= u64::from(CHUNK_SIZE);
            let rows = (0_u32..).zip(head.rows()).filter(|(_, row)| is_small(row.size()));
            let mut rows: Vec<u32> = rows.map(|(at, _)| at).collect();
            rows.sort_unstable_by_key(|at| head.row(*at as usize).map(|row| row.offset()));
            rows
        })
    }

    fn reading(&self) -> MutexGuard<'_, Reading> {
        self.reading.lock().unwrap_or_else(|held| held.into_inner())
    }
}

/// Where a small file lies in the layer.
fn place(head: &Head, row: usize) -> Option<Range<u64>> {
    let row = head.row(row).filter(|row| row.size() > 0 && row.size() <= u64::from(CHUNK_SIZE))?;
    Some(row.offset()..row.offset() + row.size())
}

impl LayerFetch {
    /// Notes that somebody opens a row, and is about to read it; sets out to get the small files that follow, if that seems
    /// worth it.
    pub fn note_opened(self: &Arc<Self>, row: usize) {
        let Some(known) = self.known() else { return };
        let Some(place) = place(known.head(), row) else { return };
        // What is read ahead into memory would drive out what is needed first.
        if self.is_only_whole() || self.context.cache.is_full() {
            return;
        }
        let windows = {
            let mut reading = self.small.reading();
            let windows = reading.streams.read(&place, self.layer.size, self.widest());
            if windows.is_empty() || reading.is_claiming {
                return;
            }
            reading.is_claiming = true;
            reading.streams.asked(windows.clone());
            windows
        };
        let this = self.clone();
        tokio::spawn(async move {
            this.context.files.until_room().await;
            let claiming = this.clone();
            // It looks for files on the disk. Of a thread that dies, what was claimed is given back.
            let claimed = tokio::task::spawn_blocking(move || claiming.small_files_in(known.head(), windows));
            let wants = claimed.await.unwrap_or_default();
            this.small.reading().is_claiming = false;
            this.put(wants, Pace::Ahead);
        });
    }

    /// Wants for the small files in these windows that are missing, as many as may be open. Blocks.
    fn small_files_in(&self, head: &Head, windows: Range<u64>) -> Vec<Want> {
        let order = self.small.order(head);
        let bytes = windows.start * WINDOW..windows.end * WINDOW;
        let place = |row: &u32| place(head, *row as usize).unwrap_or_default();
        // One that begins before and ends in them is nobody's neighbour.
        let first = order.partition_point(|row| place(row).end <= bytes.start);
        let mut wants = Vec::new();
        let within =
            order[first..].iter().map(|row| (row, place(row))).take_while(|(_, place)| place.start < bytes.end);
        for (row, place) in within {
            match self.neighbour(head, *row, &place) {
                Neighbour::Missing(want) => wants.push(want),
                Neighbour::Here => {}
                Neighbour::NoRight => {
                    self.small.reading().streams.given_up((place.start / WINDOW).max(windows.start)..windows.end);
                    break;
                }
            }
        }
        wants
    }

    /// Adds to the wants for a file of one chunk those for its neighbours: those that lie wholly in the same window and
    /// are missing too, up to the first that is not.
    pub(super) async fn with_neighbours(self: &Arc<Self>, row: usize, wants: Vec<Want>) -> Vec<Want> {
        let Some(known) = self.known() else { return wants };
        let Some(own) = place(known.head(), row) else { return wants };
        let window = own.start / WINDOW;
        {
            let mut reading = self.small.reading();
            if !reading.is_claiming {
                reading.streams.missed(window);
            }
            reading.streams.asked(window..window + 1);
        }
        let this = self.clone();
        // It looks for files on the disk. Of a thread that dies, the claims are lost, which tells those who wait.
        let added = tokio::task::spawn_blocking(move || this.neighbours(known.head(), row as u32, &own, wants));
        added.await.unwrap_or_default()
    }

    /// Blocks.
    fn neighbours(&self, head: &Head, row: u32, own: &Range<u64>, wants: Vec<Want>) -> Vec<Want> {
        let order = self.small.order(head);
        let window = own.start / WINDOW * WINDOW..own.end.next_multiple_of(WINDOW);
        let is_before = |other: &u32| place(head, *other as usize).is_some_and(|other| other.start < own.start);
        let at = order.partition_point(is_before);
        let mut all = VecDeque::from(wants);
        let mut edge = own.start;
        for other in order[..at].iter().rev() {
            let near = |place: &Range<u64>| place.start >= window.start && edge.saturating_sub(place.end) <= GAP;
            let Some(place) = place(head, *other as usize).filter(near) else { break };
            let Neighbour::Missing(want) = self.neighbour(head, *other, &place) else { break };
            edge = place.start;
            all.push_front(want);
        }
        let mut edge = own.end;
        for other in order[at..].iter().filter(|other| **other != row) {
            let near = |place: &Range<u64>| place.end <= window.end && place.start.saturating_sub(edge) <= GAP;
            let Some(place) = place(head, *other as usize).filter(near) else { break };
            let Neighbour::Missing(want) = self.neighbour(head, *other, &place) else { break };
            edge = place.end;
            all.push_back(want);
        }
        all.into()
    }

    /// A want for a file that nobody has asked for.
    fn neighbour(&self, head: &Head, row: u32, place: &Range<u64>) -> Neighbour {
        let list = head.row(row as usize).and_then(|row| row.chunks());
        let Some(Chunks::Here(list)) = list else { return Neighbour::Here };
        let Some(right) = self.context.files.neighbour() else { return Neighbour::NoRight };
        // First the file, then the look for the object: a file that is committed in between is either still this one or
        // seen there.
        let file = self.context.files.get_or_open(&self.context.cache, list.to_owned());
        if self.context.cache.has_object(&list.object(), list.size()) {
            return Neighbour::Here;
        }
        let Some(claim) = file.claim(0, &self.progress).0 else { return Neighbour::Here };
        file.keep(right);
        Neighbour::Missing(Want::new(claim, place.clone()))
    }
}

/// What becomes of a file that nobody has asked for.
enum Neighbour {
    /// It can be fetched.
    Missing(Want),
    /// It is here, or on its way.
    Here,
    /// So many such files are open that this one has to wait.
    NoRight,
}
