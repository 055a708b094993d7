//! Making a layer complete in the cache, or some of its files: on the disk, under their names, not only in memory.
//!
//! Where an index tells the chunks of an uncompressed layer, the files that are missing are fetched in the order of their
//! content, and what lies together is fetched together; through the same claims as reads go, so that a chunk that both
//! want comes once. Else the layer is fetched whole. What is here already, chunks of half-filled files too, is not fetched.
//!
//! A chunk is claimed only once there is a place for its request: who wants to read it meanwhile finds it on its way, never
//! in a queue. With [`Pace::Ahead`] that place is one of those that nobody waits for, and the requests are short.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::task::JoinHandle;

use super::content::Failed;
use super::plan::{Lists, Missing, Next, Part, Planner};
use super::{Content, Known, LayerFetch};
use crate::archive::index::Chunks;
use crate::cache::{Cache, CacheError, Standing};
use crate::fetch::FetchError;
use crate::fetch::chunks::Wait;
use crate::fetch::chunks::queue::SHORT;
use crate::fetch::chunks::requests::{REQUEST, Want};
use crate::modelkit::Compression;
use crate::object::ObjectDigest;

/// Chunk lists of so many files are fetched one by one; those of more come with the whole index, in one request.
const LISTS: usize = 4;
/// How often is looked whether the disk has what was fetched. It writes in groups, which take longer.
const LOOK: Duration = Duration::from_millis(20);
/// How often is looked whether another reader has written a chunk that is in memory: a matter of a millisecond.
const WRITTEN: Duration = Duration::from_millis(2);

/// How urgent it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Somebody waits for it.
    Now,
    /// Nobody waits for it yet; who waits for something else goes first.
    Ahead,
}

/// How far a layer is that is being made complete or fetched whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gauge {
    /// The bytes of the layer's blob.
    pub size: u64,
    /// Those that are here. Of a layer of which some files are wanted, the others count as here.
    pub here: u64,
    /// So many of them an interrupted fetch has left. They are read again first, at a rate that tells nothing of the rest.
    pub left: u64,
}

/// What is still to come of a layer, for those who watch.
#[derive(Debug, Default)]
pub(super) struct Lacking {
    bytes: AtomicU64,
    works: AtomicUsize,
}

/// A work on a layer, and what it still has to get; what is left when it ends is not waited for any more.
pub(super) struct Work {
    layer: Arc<LayerFetch>,
    left: AtomicU64,
}

impl Work {
    fn begin(layer: &Arc<LayerFetch>, bytes: u64) -> Self {
        layer.lacking.bytes.fetch_add(bytes, Ordering::Relaxed);
        layer.lacking.works.fetch_add(1, Ordering::Relaxed);
        Self { layer: layer.clone(), left: AtomicU64::new(bytes) }
    }

    /// Notes bytes that are here now.
    pub(super) fn arrived(&self, bytes: u64) {
        // Not more than there is, should a chunk come twice.
        let less = |left: u64| Some(left - bytes.min(left));
        let before = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).unwrap_or_default();
        self.layer.lacking.bytes.fetch_sub(bytes.min(before), Ordering::Relaxed);
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.layer.lacking.bytes.fetch_sub(*self.left.get_mut(), Ordering::Relaxed);
        self.layer.lacking.works.fetch_sub(1, Ordering::Relaxed);
    }
}

impl LayerFetch {
    /// How far the layer is, while it is being made complete or fetched whole.
    pub fn gauge(&self) -> Option<Gauge> {
        let size = self.layer.size;
        let lacking = self.lacking.bytes.load(Ordering::Relaxed);
        if self.lacking.works.load(Ordering::Relaxed) > 0 {
            return Some(Gauge { size, here: size.saturating_sub(lacking), left: 0 });
        }
        let left = self.resumed.load(Ordering::Relaxed);
        self.is_filling().then(|| Gauge { size, here: (*self.progress().borrow()).min(size), left })
    }

    /// Makes all of the layer's content complete in the cache, and proves the layer if it was only attested.
    pub async fn complete(self: &Arc<Self>, pace: Pace) -> Result<(), FetchError> {
        self.complete_all(None, pace).await?;
        // Nothing of it is still to come, whatever else is read for the proof.
        let _work = Work::begin(self, 0);
        match self.prove().await {
            // All of it is here, and as good as it was before.
            Err(error) if error.is_unreachable() => {
                let error = crate::report::chain(&error);
                tracing::warn!(layer = %self.layer.digest, %error, "an attested layer is complete and could not be proved");
                Ok(())
            }
            proved => proved,
        }
    }

    /// Makes the files at these rows of the listing complete in the cache; the whole layer, where they can't be had alone.
    pub async fn complete_rows(self: &Arc<Self>, rows: &[usize], pace: Pace) -> Result<(), FetchError> {
        let objects = self.complete_all(Some(rows), pace).await?;
        objects.into_iter().for_each(|object| self.note_complete(object));
        Ok(())
    }

    /// Closes the content of a file that nobody has open any more; what was to be read ahead of it is not. Where all of it is
    /// here by now, and other processes or earlier readers have verified what this one has not, it becomes an object.
    pub async fn let_go(self: &Arc<Self>, row: usize, content: Content) {
        if let Content::Chunked(file) = &content {
            self.queue.give_up(file);
            // To close a small file that is complete takes less than another thread would.
            if file.is_complete() && file.list().len() == 1 {
                return;
            }
        }
        // It is closed there too, which may wait for the disk.
        let look = self.off_thread(move || match content {
            Content::Object(_) => false,
            Content::Chunked(file) => file.partial().may_be_whole(),
        });
        if look.await.unwrap_or(false)
            && let Err(error) = self.complete_rows(&[row], Pace::Ahead).await
        {
            tracing::debug!(layer = %self.layer.digest, error = %crate::report::chain(&error), "a file was not completed");
        }
    }

    /// How many bytes of the layer's content are not on the cache's disk; `None` as long as nothing proves what they are.
    pub async fn lacks(self: &Arc<Self>) -> Result<Option<u64>, FetchError> {
        let Some(known) = self.look_for_index().await? else { return Ok(None) };
        let missing = self.missing(&known, None).await?;
        Ok(Some(missing.iter().map(|file| file.size).sum()))
    }

    /// Returns what came by range.
    async fn complete_all(
        self: &Arc<Self>,
        rows: Option<&[usize]>,
        pace: Pace,
    ) -> Result<Vec<ObjectDigest>, FetchError> {
        self.check_poison()?;
        if let Some(known) = self.look_for_index().await? {
            let missing = self.missing(&known, rows).await?;
            if missing.is_empty() {
                return Ok(Vec::new());
            }
            if self.layer.compression == Compression::None && !self.only_whole.load(Ordering::Relaxed) {
                let objects = missing.iter().map(|file| file.object).collect();
                match self.get_missing(&known, missing, pace).await {
                    Ok(()) => {
                        // It may have been found false meanwhile.
                        self.check_poison()?;
                        return Ok(objects);
                    }
                    Err(error) if error.ignores_ranges() => self.note_whole(&error),
                    // The index that was named has no right chunk lists any more; the layer may be there still.
                    Err(error) if matches!(error.root(), FetchError::Index { .. }) => {
                        self.note_unusable(crate::report::chain(&error));
                    }
                    Err(error) => return Err(error),
                }
            }
            // What an earlier fill has brought was evicted or damaged.
            self.fill.forget();
        }
        let index = Known::Derived(self.fill_at(pace).await?);
        let _work = Work::begin(self, 0);
        let staged = self.missing(&index, None).await?;
        self.until_named(staged).await?;
        Ok(Vec::new())
    }

    /// What is not on the disk under its name: each content once, in the order of the layer.
    async fn missing(self: &Arc<Self>, known: &Known, rows: Option<&[usize]>) -> Result<Vec<Missing>, FetchError> {
        let (known, rows) = (known.clone(), rows.map(<[usize]>::to_vec));
        // A look for each file, on a thread that may wait for the disk.
        let look = move |cache: &Cache| {
            let head = known.head();
            let rows = rows.unwrap_or_else(|| (0..head.len()).collect());
            let mut seen = HashSet::new();
            let mut missing = Vec::new();
            for row in rows {
                let Some(found) = head.row(row).filter(|found| found.size() > 0) else { continue };
                let (Some(object), size) = (found.object(), found.size()) else { continue };
                if cache.standing(&object, size) != Standing::Named && seen.insert(object) {
                    missing.push(Missing { row, object, size, offset: found.offset() });
                }
            }
            missing.sort_unstable_by_key(|file| file.offset);
            Ok(missing)
        };
        self.blocking(look).await
    }

    /// Gets what is missing of an uncompressed layer by range, and waits until the disk has it.
    async fn get_missing(self: &Arc<Self>, known: &Known, missing: Vec<Missing>, pace: Pace) -> Result<(), FetchError> {
        let work = Arc::new(Work::begin(self, missing.iter().map(|file| file.size).sum()));
        let lists = self.lists(known, &missing).await?;
        // Who wants the last chunk of what nobody waited for waits for those before it.
        let most = if pace == Pace::Ahead { SHORT } else { REQUEST };
        let mut planner = Planner::new(self.context.clone(), known.clone(), lists, missing.clone(), work.clone(), most);
        // Tasks of their own, which go on if this future does not: others may wait for what they have claimed.
        let mut groups = FuturesUnordered::<JoinHandle<Result<(), FetchError>>>::new();
        let mut outcome = Ok(());
        while outcome.is_ok() {
            self.context.files.until_room().await;
            let place = tokio::select! {
                place = self.place(pace) => place,
                Some(ended) = groups.next() => {
                    outcome = ended.unwrap_or_else(|_| Err(self.lost()));
                    continue;
                }
            };
            let (back, next) = self.off_thread(move || planner.next()).await?;
            planner = back;
            match next {
                Next::Parts(parts) => {
                    let (this, work) = (self.clone(), work.clone());
                    groups.push(tokio::spawn(async move {
                        let _place = place;
                        this.get_parts(&parts, &work).await
                    }));
                }
                Next::NoRight => {
                    drop(place);
                    // Files are closed as soon as the disk has them.
                    planner.take_right(self.context.files.next_neighbour().await);
                }
                Next::End => break,
                Next::NoList => outcome = Err(self.lost()),
            }
        }
        while let Some(ended) = groups.next().await {
            outcome = outcome.and(ended.unwrap_or_else(|_| Err(self.lost())));
        }
        outcome?;
        self.until_named(missing).await
    }

    pub(super) fn lost(&self) -> FetchError {
        FetchError::Lost { what: self.what() }
    }

    /// Gets the chunk lists that are not in the head: those of a few files alone, else all.
    async fn lists(self: &Arc<Self>, known: &Known, missing: &[Missing]) -> Result<Lists, FetchError> {
        let (head, named) = match known {
            Known::Derived(index) => return Ok(Lists::All(index.clone())),
            Known::Named(head, named) => (head, named),
        };
        let list_of = |file: &Missing| head.row(file.row).and_then(|row| row.chunks());
        let elsewhere = missing.iter().filter(|file| matches!(list_of(file), Some(Chunks::At(_))));
        let elsewhere: Vec<usize> = elsewhere.map(|file| file.row).collect();
        if elsewhere.len() > LISTS {
            return Ok(Lists::All(Arc::new(named.whole(&self.layer, &self.context, &self.sources).await?)));
        }
        let mut files = Vec::new();
        for row in elsewhere {
            if let Some(Content::Chunked(file)) = self.open(known, row).await? {
                files.push((row, file));
            }
        }
        Ok(Lists::Few(files))
    }

    /// Gets chunks that lie together, or waits for those who are getting them, until they are written.
    async fn get_parts(self: &Arc<Self>, parts: &[Part], work: &Work) -> Result<(), FetchError> {
        let outcome = match self.try_parts(parts, work).await {
            // The source of another layer that holds the same content has failed; it is this one's turn.
            Err(Failed::Elsewhere(_)) => self.try_parts(parts, work).await,
            outcome => outcome,
        };
        outcome.map_err(|failed| match failed {
            Failed::Here(error) | Failed::Elsewhere(error) => error,
        })
    }

    async fn try_parts(self: &Arc<Self>, parts: &[Part], work: &Work) -> Result<(), Failed> {
        let (mut wants, mut comings) = (Vec::new(), FuturesUnordered::new());
        for part in parts.iter().filter(|part| !part.is_here()) {
            let (claim, wait) = part.file.claim(part.chunk, &self.progress);
            wants.extend(claim.map(|claim| Want::new(claim, part.at.clone())));
            if let Wait::Coming(coming) = wait {
                let (is_ours, limits) = (coming.is_told_by(&self.progress), &self.context.limits);
                comings.push(async move { (part, is_ours, coming.arrived(limits).await.map(drop)) });
            }
        }
        let supply = self.supply();
        let mut failed = None;
        let arriving = async {
            while let Some((part, is_ours, came)) = comings.next().await {
                match came {
                    Ok(()) => work.arrived(part.len()),
                    Err(error) if is_ours => failed = Some(Failed::Here(error)),
                    Err(error) => failed = failed.take().or(Some(Failed::Elsewhere(error))),
                }
            }
        };
        let (committed, ()) = tokio::join!(supply.get(wants), arriving);
        let committed: HashSet<_> = committed.iter().map(|file| file.list().object()).collect();
        // What others have got is answered first, and written then.
        while parts.iter().any(|part| !part.is_here() && part.file.is_claimed(part.chunk)) {
            tokio::time::sleep(WRITTEN).await;
        }
        let unwritten: Vec<_> = parts.iter().filter(|part| !part.is_here()).cloned().collect();
        let again = self.off_thread(move || unwritten.iter().try_for_each(Part::write_again)).await?;
        // Whoever completes a file commits it; of those that others complete, it is not said when.
        for part in parts.iter().filter(|part| part.file.is_complete()) {
            if !committed.contains(&part.file.list().object()) {
                self.context.files.commit(&self.context.cache, part.file.clone());
            }
        }
        if let Some(failed) = failed {
            if let Failed::Here(error) = &failed {
                self.note_whole(error);
            }
            return Err(failed);
        }
        again.map_err(FetchError::from)?;
        let left: u64 = parts.iter().filter(|part| !part.is_here()).map(Part::len).sum();
        if left > 0 { Err(self.not_kept(left).await?.into()) } else { Ok(()) }
    }

    /// Waits until the disk has what was fetched, under its names. It takes it or fails, so this ends.
    async fn until_named(&self, mut files: Vec<Missing>) -> Result<(), FetchError> {
        loop {
            // Before the look: what is committed in between is found.
            let mut under_way = self.context.files.are_waiting();
            let looked = self.blocking(move |cache| {
                files.retain(|file| {
                    let standing = cache.standing(&file.object, file.size);
                    under_way |= standing == Standing::Staged;
                    standing != Standing::Named
                });
                Ok((files, under_way))
            });
            (files, under_way) = looked.await?;
            if files.is_empty() {
                return Ok(());
            }
            if !under_way {
                return Err(self.not_kept(files.iter().map(|file| file.size).sum()).await?);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Why bytes that were fetched are not there.
    async fn not_kept(&self, bytes: u64) -> Result<FetchError, FetchError> {
        let (path, full) = self.blocking(|cache| Ok((cache.root().to_owned(), cache.fullness()))).await?;
        Ok(match (path, full.or_else(|| self.unstaged())) {
            (path, Some(why)) => CacheError::Full { path, why }.into(),
            (_, None) => FetchError::NotKept { layer: self.layer.digest, bytes },
        })
    }
}
