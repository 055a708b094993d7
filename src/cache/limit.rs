//! How much the cache may hold, and what happens when there is no room.
//!
//! There is no account that processes share, as it could go stale: what the cache holds is counted on the disk
//! ([`super::usage`]). Between two counts a process knows what it has written itself, and takes from an allowance that
//! is small enough for others to have one too; and the free space of the file system tells what others do.
//!
//! Nobody writes above a high-water mark below the limit: what lies between them is for what others write before they
//! count again. At the mark eviction begins, and goes down to a low-water mark, so that not every write has to evict.
//! Where all there is is in use or kept, the cache is full. It is full, too, when the disk says so. While it is full
//! nothing is written, nothing fails, and once a second somebody looks again.
//!
//! Locks: a plain mutex around what is known, held by one thread of a process while it counts and evicts; others wait
//! for it, for the local disk and nothing else. Under it `evict.lock` and those of files ([`super::evict`]).

use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};
use std::{fs, io};

use rustix::fs::{FallocateFlags, OFlags};

use super::{Cache, CacheError, io_error};
use crate::units::format_size;

/// Eviction begins when the cache holds so much of its limit, in percent. Eight processes that count at the same time and
/// then use up their allowances ([`SHARE`]) need half of the rest.
const HIGH: u64 = 95;
/// And it goes down to so much: a twentieth of the cache goes at once, so that looking for what goes is rare.
const LOW: u64 = 90;
/// A full cache has room again when it holds less than so much: well below the mark, so that this does not change with
/// every file that is closed.
const AGAIN: u64 = 92;
/// What a process may write before it counts again is this part of what was left up to the limit.
const SHARE: u64 = 16;
/// Free space that falls by this part of what lies between mark and limit, more than by our own writes, tells that
/// others write: then it is time to count.
const FALLEN: u64 = 4;
/// How often a process that writes looks at the free space.
const LOOK: Duration = Duration::from_millis(100);
/// A count is not relied upon for longer,
const STALE: Duration = Duration::from_secs(30);
/// or for so many times as long as it took, so that counting a million files takes a fiftieth of the time.
const WORTH: u32 = 50;
/// How often a full cache is tried.
const RETRY: Duration = Duration::from_secs(1);
/// A full disk has room again when so much is free, or a sixteenth of it: less would be used up in a moment.
const ROOM: u64 = 64 << 20;
/// What is asked of a disk to see whether it has room again: a chunk.
const CHUNK: u64 = 1 << 20;
/// What a file takes is counted in blocks of this size, the usual one.
const BLOCK: u64 = 4096;

/// How much the cache may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Limit {
    /// As much as the disk takes.
    #[default]
    None,
    /// So many bytes on the disk.
    Bytes(u64),
    /// As much as leaves this part of its file system free, in percent, whoever uses the rest.
    KeepFree(u8),
}

/// What is being written: counts as held until it is dropped, by then it is on the disk and counted there.
#[derive(Debug)]
pub(super) struct Growth<'a> {
    room: &'a Room,
    bytes: u64,
}

impl Drop for Growth<'_> {
    fn drop(&mut self) {
        self.room.in_flight.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// What a limit comes to at a moment, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    /// What the cache may hold.
    pub limit: u64,
    /// Where eviction begins, and writing ends.
    pub high: u64,
    /// Where it ends.
    pub low: u64,
}

/// A file system.
#[derive(Debug, Clone, Copy)]
struct Disk {
    total: u64,
    /// What may be used without privilege: what is kept for root is not ours.
    free: u64,
}

impl Limit {
    /// What it comes to for a cache that holds so much on such a disk.
    fn marks(self, held: u64, disk: Disk) -> Option<Marks> {
        let limit = match self {
            Self::None => return None,
            Self::Bytes(bytes) => bytes,
            Self::KeepFree(percent) => (held + disk.free).saturating_sub(part(disk.total, percent.into())),
        };
        Some(Marks { limit, high: part(limit, HIGH), low: part(limit, LOW) })
    }
}

fn part(of: u64, percent: u64) -> u64 {
    (u128::from(of) * u128::from(percent) / 100) as u64
}

/// What this process knows of the room there is.
#[derive(Debug)]
pub(super) struct Room {
    root: PathBuf,
    /// What may be written before somebody counts again.
    allowance: AtomicU64,
    /// What is being written by those who were allowed to.
    in_flight: AtomicU64,
    /// When somebody looks at the disk again, in milliseconds since `opened`.
    look_at: AtomicU64,
    opened: Instant,
    full: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    counted: Option<Counted>,
    full: Option<Full>,
}

/// What a count gave.
#[derive(Debug)]
struct Counted {
    marks: Marks,
    allowance: u64,
    free: u64,
    at: Instant,
    took: Duration,
}

#[derive(Debug, Clone)]
struct Full {
    why: String,
    /// Whether the disk said so, and not the limit.
    by_disk: bool,
    /// When it is tried again.
    again: Instant,
}

impl Room {
    pub(super) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            allowance: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            look_at: AtomicU64::new(0),
            opened: Instant::now(),
            full: AtomicBool::new(false),
            state: Mutex::default(),
        }
    }

    fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// Whether it is time to look at the disk.
    fn is_due(&self) -> bool {
        self.opened.elapsed().as_millis() as u64 >= self.look_at.load(Ordering::Relaxed)
    }

    /// Takes from the allowance, if that is known to be good.
    fn take(&self, bytes: u64) -> bool {
        let taken = |left: u64| left.checked_sub(bytes);
        !self.is_full()
            && !self.is_due()
            && self.allowance.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken).is_ok()
    }

    /// Counts what is written without asking: too little to be worth a look at the disk.
    pub(super) fn count(&self, bytes: u64) -> Growth<'_> {
        let bytes = bytes.next_multiple_of(BLOCK);
        let taken = |left: u64| Some(left.saturating_sub(bytes));
        let _ = self.allowance.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken);
        self.growth(bytes)
    }

    fn growth(&self, bytes: u64) -> Growth<'_> {
        self.in_flight.fetch_add(bytes, Ordering::Relaxed);
        Growth { room: self, bytes }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|held| held.into_inner())
    }

    fn disk(&self) -> Result<Disk, CacheError> {
        let found = rustix::fs::statvfs(&self.root).map_err(|error| io_error("stat", &self.root)(error.into()))?;
        Ok(Disk { total: found.f_blocks * found.f_frsize, free: found.f_bavail * found.f_frsize })
    }

    /// Whether a disk that was full takes more: by its own account, and then by trying, as an account knows no quotas.
    fn disk_has_room(&self) -> bool {
        let Ok(disk) = self.disk() else { return false };
        disk.free >= ROOM.min(disk.total / 16) && probe(&self.root).is_ok()
    }

    /// Remembers that the disk is full, where that is what an error says.
    pub(super) fn noted(&self, error: CacheError) -> CacheError {
        if let CacheError::Full { why, .. } = &error {
            let mut state = self.state();
            if state.full.is_none() {
                // At once, as there may be something to evict.
                self.fill(&mut state, Full { why: why.clone(), by_disk: true, again: Instant::now() });
            }
        }
        error
    }

    fn fill(&self, state: &mut State, full: Full) {
        if state.full.is_none() {
            tracing::warn!(
                "the cache keeps nothing more for now, and what is not in it is fetched whenever it is read: {}",
                full.why
            );
        }
        self.look_after(full.again.saturating_duration_since(Instant::now()));
        state.full = Some(full);
        self.full.store(true, Ordering::Relaxed);
    }

    fn has_room_again(&self, state: &mut State) {
        if state.full.take().is_some() {
            tracing::info!("the cache has room again");
        }
        self.full.store(false, Ordering::Relaxed);
    }

    /// Sets what may be written before the next count.
    fn allow(&self, state: &mut State, marks: Marks, held: u64, began: Instant) -> Result<(), CacheError> {
        let allowance = marks.limit.saturating_sub(held) / SHARE;
        let free = self.disk()?.free;
        state.counted = Some(Counted { marks, allowance, free, at: Instant::now(), took: began.elapsed() });
        self.allowance.store(allowance, Ordering::Relaxed);
        self.look_after(LOOK);
        Ok(())
    }

    /// Whether the last count still tells what there is, as far as the disk knows.
    fn counted_still_holds(&self, state: &State, disk: Disk) -> bool {
        let left = self.allowance.load(Ordering::Relaxed);
        let holds = state.counted.as_ref().is_some_and(|counted| counted.holds(disk, left));
        if holds {
            self.look_after(LOOK);
        }
        holds
    }

    fn look_after(&self, time: Duration) {
        let next = self.opened.elapsed() + time;
        self.look_at.store(next.as_millis() as u64, Ordering::Relaxed);
    }
}

impl Full {
    fn error(&self, path: &Path) -> CacheError {
        CacheError::Full { path: path.to_owned(), why: self.why.clone() }
    }
}

impl Counted {
    fn holds(&self, disk: Disk, left: u64) -> bool {
        let own = self.allowance.saturating_sub(left);
        let slack = self.marks.limit - self.marks.high;
        let fallen = self.free.saturating_sub(disk.free);
        self.at.elapsed() < STALE.max(self.took * WORTH) && fallen <= own + slack / FALLEN
    }
}

/// Asks the disk for a chunk, in a file that has no name any more.
fn probe(root: &Path) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    let nameless = options.clone().custom_flags(OFlags::TMPFILE.bits().cast_signed()).open(root);
    let file = match nameless {
        Ok(file) => file,
        // A file system that has no such files: one that loses its name at once.
        Err(_) => {
            let path = root.join(format!("room.{}.tmp", std::process::id()));
            let _ = fs::remove_file(&path);
            let file = options.create_new(true).open(&path)?;
            fs::remove_file(&path)?;
            file
        }
    };
    match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, CHUNK) {
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl Cache {
    /// Says that a file of the cache grows by so many bytes for as long as what is returned is held. Makes room for them where there is none, which
    /// may take a while: belongs on a thread that may wait. [`CacheError::Full`] where there is none to be made.
    pub(super) fn grow(&self, path: &Path, bytes: u64) -> Result<Growth<'_>, CacheError> {
        let bytes = bytes.next_multiple_of(BLOCK);
        if (self.settings.limit == Limit::None && !self.room.is_full()) || self.room.take(bytes) {
            return Ok(self.room.growth(bytes));
        }
        self.look(bytes).map_err(|error| match error {
            CacheError::Full { why, .. } => CacheError::Full { path: path.to_owned(), why },
            other => other,
        })
    }

    /// Whether the cache keeps nothing more at the moment. Costs nothing.
    pub fn is_full(&self) -> bool {
        self.room.is_full()
    }

    /// Whether to write is worth a try. Costs nothing either.
    pub fn may_have_room(&self) -> bool {
        !self.room.is_full() || self.room.is_due()
    }

    /// The most bytes that the cache may hold, where that is said.
    pub fn limit_bytes(&self) -> Option<u64> {
        match self.settings.limit {
            Limit::Bytes(most) => Some(most),
            Limit::None | Limit::KeepFree(_) => None,
        }
    }

    /// Why the cache keeps nothing more at the moment, if it does not.
    pub fn fullness(&self) -> Option<String> {
        if self.is_full() {
            // Where nobody has written for a while, nobody has looked.
            let _ = self.look(CHUNK);
        }
        self.room.state().full.as_ref().map(|full| full.why.clone())
    }

    /// What the limit comes to now, for a cache that holds so many bytes; `None` where there is no limit.
    pub fn marks(&self, held: u64) -> Result<Option<Marks>, CacheError> {
        Ok(self.settings.limit.marks(held, self.room.disk()?))
    }

    /// Evicts what is above the limit by now: free space that is kept may be used up by others while we write nothing.
    pub fn keep_limit(&self) -> Result<(), CacheError> {
        if self.settings.limit == Limit::None {
            return Ok(());
        }
        self.room.look_after(Duration::ZERO);
        match self.look(0) {
            // It is known, and has been told.
            Err(CacheError::Full { .. }) => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    /// Looks whether there is room for more bytes.
    fn look(&self, bytes: u64) -> Result<Growth<'_>, CacheError> {
        let room = &*self.room;
        let mut state = room.state();
        let full = match &mut state.full {
            // Another thread may have looked meanwhile.
            None if room.take(bytes) => return Ok(room.growth(bytes)),
            Some(full) if Instant::now() < full.again => return Err(full.error(&self.root)),
            Some(full) => {
                full.again = Instant::now() + RETRY;
                room.look_after(RETRY);
                Some(full.clone())
            }
            None => None,
        };
        let disk = room.disk()?;
        if full.is_none() && room.counted_still_holds(&state, disk) && room.take(bytes) {
            return Ok(room.growth(bytes));
        }
        let still_full = |full: &&Full| full.by_disk && !room.disk_has_room();
        let evicts_for_disk = matches!(self.settings.limit, Limit::KeepFree(_));
        if !evicts_for_disk && let Some(full) = full.as_ref().filter(still_full) {
            return Err(full.error(&self.root));
        }
        // Whoever else writes waits for the outcome.
        room.allowance.store(0, Ordering::Relaxed);
        let began = Instant::now();
        let by_disk = full.as_ref().is_some_and(|full| full.by_disk);
        let Some((held, marks)) = self.count_and_evict(bytes, disk, by_disk)? else {
            room.has_room_again(&mut state);
            return Ok(room.growth(bytes));
        };
        if let Some(full) = full.as_ref().filter(still_full) {
            return Err(full.error(&self.root));
        }
        let most = if full.is_some() { part(marks.limit, AGAIN) } else { marks.high };
        if held + bytes > most {
            let full = Full { why: self.limit_reached(marks), by_disk: false, again: Instant::now() + RETRY };
            let error = full.error(&self.root);
            room.fill(&mut state, full);
            return Err(error);
        }
        room.has_room_again(&mut state);
        room.allow(&mut state, marks, held + bytes, began)?;
        Ok(room.growth(bytes))
    }

    /// Counts what the cache holds, and evicts where that and what is to come passes the mark. `None` without a limit.
    fn count_and_evict(&self, bytes: u64, disk: Disk, by_disk: bool) -> Result<Option<(u64, Marks)>, CacheError> {
        if self.settings.limit == Limit::None {
            return Ok(None);
        }
        let in_flight = self.room.in_flight.load(Ordering::Relaxed);
        let held = in_flight + self.usage()?.bytes();
        let Some(marks) = self.settings.limit.marks(held, disk) else { return Ok(None) };
        let target = if by_disk {
            // Where an account tells of room there is a quota, or no place for more names: what goes helps both.
            marks.low.min(part(held, LOW))
        } else if held + bytes > marks.high {
            marks.low
        } else {
            return Ok(Some((held, marks)));
        };
        Ok(Some((in_flight + self.evict_or_wait(target.saturating_sub(in_flight + bytes))?, marks)))
    }

    /// Evicts, or waits while another process does; tells what is left.
    fn evict_or_wait(&self, bytes: u64) -> Result<u64, CacheError> {
        match self.evict_to(bytes, false) {
            Err(error) if error.is_busy() => Ok(self.usage()?.bytes()),
            evicted => Ok(evicted?.left),
        }
    }

    /// Makes room for what is about to be staged, or says that it can't be had. Belongs on a thread that may wait.
    pub fn make_room(&self, bytes: u64) -> Result<(), CacheError> {
        let room = &*self.room;
        let full = |why| Err(CacheError::Full { path: self.root.join("incoming"), why });
        let disk = room.disk()?;
        let evicts = matches!(self.settings.limit, Limit::KeepFree(_));
        if !evicts && disk.free < bytes {
            let [wanted, free] = [bytes, disk.free].map(format_size);
            return full(format!("{wanted} are to be staged at once, and its disk has {free} free"));
        }
        if self.settings.limit == Limit::None {
            return Ok(());
        }
        // One at a time; and what is written meanwhile waits for the outcome.
        let mut state = room.state();
        let began = Instant::now();
        let mut kept = 0;
        let never = (self.settings.policy.protected)(self)?.never;
        let is_kept = |item: &super::usage::Item| item.object().is_some_and(|object| never.contains(&object));
        let mut held = self.scan(|item| kept += if is_kept(&item) { item.bytes } else { 0 })?.bytes();
        let Some(marks) = self.settings.limit.marks(held, disk) else { return Ok(()) };
        if bytes > marks.limit.saturating_sub(kept) {
            let [wanted, limit, kept] = [bytes, marks.limit, kept].map(format_size);
            return full(format!(
                "{wanted} are to be staged at once, its limit is {limit}, and {kept} of that are kept; \
                 a larger --cache-size would do"
            ));
        }
        if held + bytes > marks.high {
            held = self.evict_or_wait(marks.low.saturating_sub(bytes))?;
        }
        if held + bytes > marks.limit {
            let [wanted, limit, held] = [bytes, marks.limit, held].map(format_size);
            return full(format!(
                "{wanted} are to be staged at once, its limit is {limit}, and {held} of that are in use or kept"
            ));
        }
        if state.full.is_none() { room.allow(&mut state, marks, held, began) } else { Ok(()) }
    }

    fn limit_reached(&self, marks: Marks) -> String {
        let root = self.root.display();
        match self.settings.limit {
            Limit::KeepFree(percent) if marks.limit == 0 => format!(
                "the file system of {root} has less than {percent} % free, which the cache leaves to others; \
                 free some space, or say with --cache-size how much the cache may hold"
            ),
            Limit::KeepFree(percent) => format!(
                "the cache {root} may hold {} to leave {percent} % of its file system free, and all in it is in use or kept; \
                 free some space, or say with --cache-size how much it may hold",
                format_size(marks.limit)
            ),
            Limit::Bytes(_) | Limit::None => format!(
                "the cache {root} has reached its limit of {}, and all in it is in use or kept; \
                 choose a larger --cache-size, or remove kits with `kitfs cache rm`",
                format_size(marks.limit)
            ),
        }
    }
}

#[cfg(test)]
#[path = "limit_tests.rs"]
mod tests;
