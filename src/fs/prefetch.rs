//! Getting content before it is asked for, in the background of a mount, and behind everything that is asked for: one layer
//! at a time, by [`Pace::Ahead`].
//!
//! With [`Selection::Auto`] it is the reads that tell: once more than [`TELLING`] bytes of a file were asked for, the rest
//! of it is fetched and then its siblings, in the order of their names: the files of its directory with its extension,
//! each of at least as many bytes, in whichever layer. Each such set once.
//!
//! What fails because the registry is away, or the cache full, is tried again for as long as the mount lives; what can't get
//! better is left out.
//!
//! Locks: plain mutexes and a watch, held for a look or a note, never across an await, never two at once.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::selection::Selection;
use super::{DirEntry, Fs, FsError, Ino, NodeKind};
use crate::archive::index::RowKind;
use crate::fetch::{FetchError, Kit, Pace};
use crate::modelkit::Compression;
use crate::path::TreePath;
use crate::tree::Origin;
use crate::units::format_size;

/// So many bytes of a file are read by who loads weights, and not by who looks at a header. Smaller files come fast enough.
const TELLING: u64 = 8 << 20;
/// The pause after a failure; twice as long after each further one, to [`LONGEST`].
const PAUSE: Duration = Duration::from_secs(1);
/// The longest pause: a registry that comes back is found within a minute.
const LONGEST: Duration = Duration::from_secs(60);

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Nothing is known yet that should be fetched.
    #[default]
    Waiting,
    /// It is being fetched.
    Running,
    /// All of it is here.
    Done,
    /// Something can't be had, at least for now.
    Failed,
}

/// What is told of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// What is to be fetched, as it was asked for.
    pub mode: String,
    /// How far it is.
    pub state: State,
    /// Bytes that are here.
    pub done: u64,
    /// Bytes in all, as far as is known.
    pub total: u64,
    /// Why it has failed; or why there was nothing to do.
    pub why: Option<String>,
}

/// The prefetch of a mount.
#[derive(Debug)]
pub struct Prefetch {
    selection: Selection,
    progress: watch::Sender<Progress>,
    /// How many bytes of each large file were asked for.
    reads: Mutex<HashMap<Ino, u64>>,
    /// Files whose siblings should follow.
    told: mpsc::UnboundedSender<Ino>,
}

#[derive(Debug, Default)]
struct Progress {
    state: State,
    why: Option<String>,
    done: u64,
    total: u64,
    /// The layer at hand, and how many bytes of it are wanted.
    at: Option<(usize, u64)>,
}

/// Ends the prefetch when it is dropped; who waits for its end is told.
#[derive(Debug)]
pub struct Background {
    work: JoinHandle<()>,
    prefetch: Arc<Prefetch>,
}

impl Background {
    /// What is fetched.
    pub fn prefetch(&self) -> &Arc<Prefetch> {
        &self.prefetch
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.work.abort();
        self.prefetch.note(|progress| {
            if !matches!(progress.state, State::Done | State::Failed) {
                (progress.state, progress.why) = (State::Failed, Some("it was ended".to_owned()));
            }
        });
    }
}

/// A layer of which something is to be fetched.
#[derive(Debug, Clone)]
struct Job {
    layer: usize,
    files: Files,
    bytes: u64,
}

#[derive(Debug, Clone)]
enum Files {
    All,
    /// At these rows of the listing.
    Rows(Vec<usize>),
    /// Those that are selected, which is not known yet.
    Selected,
}

impl Prefetch {
    /// Begins to fetch what is selected, in the place of what was fetched so far; `None` where that is nothing.
    pub fn start(fs: &Arc<Fs>, selection: Selection) -> Option<Background> {
        if matches!(selection, Selection::None) {
            return None;
        }
        let (told, reads) = mpsc::unbounded_channel();
        let prefetch = Self { selection, progress: watch::Sender::default(), reads: Mutex::default(), told };
        let prefetch = Arc::new(prefetch);
        *fs.prefetch.write().unwrap_or_else(|held| held.into_inner()) = Some(prefetch.clone());
        let run = Run { fs: fs.clone(), prefetch: prefetch.clone() };
        Some(Background { work: tokio::spawn(run.run(reads)), prefetch })
    }

    /// How far it is.
    pub fn report(&self, kit: &Kit) -> Report {
        let progress = self.progress.borrow();
        let here = |(layer, bytes): (usize, u64)| {
            let gauge = kit.layers.get(layer)?.gauge()?;
            Some(bytes.saturating_sub(gauge.size - gauge.here))
        };
        Report {
            mode: self.selection.to_string(),
            state: progress.state,
            done: progress.done + progress.at.and_then(here).unwrap_or_default(),
            total: progress.total,
            why: progress.why.clone(),
        }
    }

    /// Waits until it is done or has failed, be it for now.
    pub async fn ended(&self) {
        let is_end = |progress: &Progress| matches!(progress.state, State::Done | State::Failed);
        // The sender is here.
        let _ = self.progress.subscribe().wait_for(is_end).await;
    }

    /// Notes that bytes of a file are asked for.
    pub(super) fn note_read(&self, ino: Ino, size: u64, bytes: u64) {
        if size < TELLING || !matches!(self.selection, Selection::Auto) {
            return;
        }
        let mut reads = self.reads.lock().unwrap_or_else(|held| held.into_inner());
        let read = reads.entry(ino).or_default();
        let before = *read;
        *read = before.saturating_add(bytes);
        if before <= TELLING && *read > TELLING {
            // Nobody listens when the mount is being left.
            let _ = self.told.send(ino);
        }
    }

    /// Whether what is read of a file may still tell what to fetch: nothing is known of how the kit is read, and little was
    /// read of this file.
    pub(super) fn watches(&self, ino: Ino, size: u64) -> bool {
        if size < TELLING || !matches!(self.selection, Selection::Auto) {
            return false;
        }
        let read = self.reads.lock().unwrap_or_else(|held| held.into_inner()).get(&ino).copied();
        read.is_none_or(|read| read <= TELLING) && self.progress.borrow().state == State::Waiting
    }

    fn note(&self, note: impl FnOnce(&mut Progress)) {
        self.progress.send_modify(note);
    }
}

/// The work in the background.
struct Run {
    fs: Arc<Fs>,
    prefetch: Arc<Prefetch>,
}

impl Run {
    async fn run(self, mut reads: mpsc::UnboundedReceiver<Ino>) {
        if !matches!(self.prefetch.selection, Selection::Auto) {
            let jobs = self.selected().await;
            return self.work(jobs).await;
        }
        let mut seen = HashSet::new();
        while let Some(ino) = reads.recv().await {
            match self.siblings(ino, &mut seen).await {
                Ok(jobs) if jobs.is_empty() => {}
                Ok(jobs) => self.work(jobs).await,
                // The next file of the set that is read tells of it again.
                Err(error) => tracing::warn!(%error, "the siblings of a file that is read are not known"),
            }
        }
    }

    /// What is selected, as far as that is known without much ado.
    async fn selected(&self) -> Vec<Job> {
        let mut jobs = Vec::new();
        let mut is_away = false;
        for layer in 0..self.fs.kit.layers.len() {
            let selected = Job { layer, files: Files::Selected, bytes: 0 };
            match if is_away { Ok(Some(selected.clone())) } else { self.selected_of(layer).await } {
                Ok(job) => jobs.extend(job),
                Err(error) => {
                    // It is asked again, and what is wrong told, when it is its turn.
                    is_away = error.is_unreachable();
                    jobs.push(selected);
                }
            }
        }
        jobs
    }

    /// What is selected of a layer.
    async fn selected_of(&self, at: usize) -> Result<Option<Job>, FetchError> {
        let layer = &self.fs.kit.layers[at];
        let selection = &self.prefetch.selection;
        let whole = Job { layer: at, files: Files::All, bytes: layer.layer.size };
        if matches!(selection, Selection::All) {
            return Ok(Some(whole));
        }
        let Some(listing) = layer.cheap_listing().await? else {
            // Its names come with its content.
            return Ok(Some(whole).filter(|_| selection.may_take_below(&layer.layer.root)));
        };
        let is_taken = |path: &[u8]| TreePath::from_clean(path).is_ok_and(|path| selection.takes(&path));
        let files = listing.rows().enumerate();
        let files = files.filter(|(_, (path, entry))| entry.kind == RowKind::File && is_taken(path));
        let (rows, sizes): (Vec<_>, Vec<_>) = files.map(|(row, (_, entry))| (row, entry.size)).unzip();
        Ok((!rows.is_empty()).then(|| self.job(at, rows, sizes.iter().sum())))
    }

    /// Files of a layer: alone where they can be had alone.
    fn job(&self, at: usize, rows: Vec<usize>, bytes: u64) -> Job {
        let layer = &self.fs.kit.layers[at];
        if layer.known().is_some() && layer.layer.compression == Compression::None {
            Job { layer: at, files: Files::Rows(rows), bytes }
        } else {
            Job { layer: at, files: Files::All, bytes: layer.layer.size }
        }
    }

    /// A file that is read and those beside it that are like it, unless that set has had its turn.
    async fn siblings(&self, ino: Ino, seen: &mut HashSet<(Ino, Vec<u8>)>) -> Result<Vec<Job>, FsError> {
        let (dir, extension) = {
            let tree = self.fs.tree();
            let node = tree.node(tree.by_ino(ino.0).ok_or(FsError::Stale)?);
            (Ino(tree.node(node.parent()).ino), extension(node.name()).map(<[u8]>::to_vec))
        };
        let Some(extension) = extension else { return Ok(Vec::new()) };
        if seen.contains(&(dir, extension.clone())) {
            return Ok(Vec::new());
        }
        let is_like = |entry: &DirEntry<'_>| {
            let is_large = entry.attr.kind == NodeKind::File && entry.attr.size >= TELLING;
            is_large && self::extension(entry.name) == Some(&*extension)
        };
        let mut set = Vec::new();
        let note = |entry: DirEntry<'_>| {
            set.extend(is_like(&entry).then_some(entry.attr.ino));
            false
        };
        self.fs.readdir(dir, 0, note).await?;
        if set.len() < 2 {
            return Ok(Vec::new());
        }
        seen.insert((dir, extension));
        let mut jobs: Vec<Job> = Vec::new();
        for ino in std::iter::once(ino).chain(set.into_iter().filter(|other| *other != ino)) {
            let (_, meta, origin) = self.fs.node(ino)?;
            let Origin::Layer { layer, entry } = origin else { continue };
            let job = self.job(layer as usize, vec![entry as usize], meta.size);
            let comes_anyway = |other: &Job| other.layer == job.layer && matches!(other.files, Files::All);
            if !jobs.iter().any(comes_anyway) {
                jobs.push(job);
            }
        }
        Ok(jobs)
    }

    /// Gets one after the other. What may get better is tried again later, after the others.
    async fn work(&self, jobs: Vec<Job>) {
        let total = jobs.iter().map(|job| job.bytes).sum();
        let nothing = jobs.is_empty().then(|| "nothing in the kit matches".to_owned());
        self.note(|progress| {
            *progress = Progress { state: State::Running, total, why: nothing.clone(), ..Progress::default() };
        });
        let cache = self.fs.context.cache.clone();
        let most = tokio::task::spawn_blocking(move || cache.most()).await;
        if let Ok(Ok(Some(limit))) = most
            && total > limit
        {
            let [total, limit] = [total, limit].map(format_size);
            return self.give_up(format!("{total} are more than the cache keeps at once, {limit}; see --cache-size"));
        }
        let mut jobs = VecDeque::from(jobs);
        let (mut pause, mut lost) = (PAUSE, None);
        while let Some(job) = jobs.pop_front() {
            let outcome = self.get(&job).await;
            self.note(|progress| progress.at = None);
            match outcome {
                Ok(()) => pause = PAUSE,
                Err(error) => {
                    let why = crate::report::chain(&error);
                    if !may_recover(&error) {
                        tracing::error!(layer = %self.fs.kit.layers[job.layer].layer.digest, error = why, "not prefetched");
                        lost = Some(why);
                        continue;
                    }
                    if pause == PAUSE {
                        tracing::warn!(error = why, "prefetching waits, and is tried again");
                    }
                    self.note(|progress| (progress.state, progress.why) = (State::Failed, Some(why)));
                    jobs.push_back(job);
                    tokio::time::sleep(pause).await;
                    pause = LONGEST.min(pause * 2);
                    self.note(|progress| progress.state = State::Running);
                }
            }
        }
        match lost {
            Some(why) => self.give_up(why),
            None => {
                tracing::info!(bytes = self.prefetch.progress.borrow().done, "prefetched");
                self.note(|progress| (progress.state, progress.why) = (State::Done, nothing));
            }
        }
    }

    fn give_up(&self, why: String) {
        tracing::error!(why, "not all was prefetched");
        self.note(|progress| (progress.state, progress.why) = (State::Failed, Some(why)));
    }

    async fn get(&self, job: &Job) -> Result<(), FetchError> {
        let layer = &self.fs.kit.layers[job.layer];
        let mut job = job.clone();
        if let Files::Selected = job.files {
            let Some(found) = self.selected_of(job.layer).await? else { return Ok(()) };
            self.note(|progress| progress.total += found.bytes);
            job = found;
        }
        self.note(|progress| progress.at = Some((job.layer, job.bytes)));
        match &job.files {
            Files::Rows(rows) => layer.complete_rows(rows, Pace::Ahead).await?,
            Files::All | Files::Selected => layer.complete(Pace::Ahead).await?,
        }
        self.note(|progress| {
            progress.done += job.bytes;
            progress.at = None;
        });
        Ok(())
    }

    fn note(&self, note: impl FnOnce(&mut Progress)) {
        self.prefetch.note(note);
    }
}

/// Whether what failed may be had later: when the registry is back, or there is room.
fn may_recover(error: &FetchError) -> bool {
    error.is_unreachable() || matches!(error.root(), FetchError::Cache(cause) if cause.is_full())
}

/// What follows the last dot of a name.
fn extension(name: &[u8]) -> Option<&[u8]> {
    let dot = name.iter().rposition(|byte| *byte == b'.')?;
    Some(&name[dot + 1..]).filter(|extension| !extension.is_empty())
}
