//! What a process knows of the room there is: what it may write before somebody looks again, and whether the cache is
//! full. Between two counts the free space of the file system tells what others do.

use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};
use std::{fs, io};

use rustix::fs::{FallocateFlags, OFlags};

use super::{CacheError, Marks, io_error};

/// What a process may write before it counts again is this part of what was left up to the limit.
const SHARE: u64 = 16;
/// So long a write waits for one other thread that counts and evicts. To count thousands of files takes milliseconds; to
/// remove a hundred thousand may take a minute, and what is not kept meanwhile costs less than readers who wait.
const PATIENCE: Duration = Duration::from_millis(250);
/// How often it looks whether that thread is done.
const POLL: Duration = Duration::from_millis(2);
/// How often a full cache is tried,
const RETRY: Duration = Duration::from_secs(1);
/// and for how many times as long as a try took it is not: to count a million files takes seconds.
const TRIED: u32 = 10;
/// Free space that falls by this part of what lies between mark and limit, more than by our own writes, tells that
/// others write: then it is time to count.
const FALLEN: u64 = 4;
/// How often a process that writes looks at the free space.
const LOOK: Duration = Duration::from_millis(100);
/// A count is not relied upon for longer,
const STALE: Duration = Duration::from_secs(30);
/// or for so many times as long as it took, so that counting a million files takes a fiftieth of the time.
const WORTH: u32 = 50;
/// A full disk has room again when so much is free, or a sixteenth of it: less would be used up in a moment.
const ROOM: u64 = 64 << 20;
/// What is asked of a disk to see whether it has room again: a chunk.
pub(super) const CHUNK: u64 = 1 << 20;
/// What a file takes is counted in blocks of this size, the usual one.
const BLOCK: u64 = 4096;

fn in_blocks(bytes: u64) -> u64 {
    bytes.next_multiple_of(BLOCK)
}

/// A file system.
#[derive(Debug, Clone, Copy)]
pub(super) struct Disk {
    pub total: u64,
    /// What may be used without privilege: what is kept for root is not ours.
    pub free: u64,
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
    /// Whether who looks takes longer than others wait for.
    busy: AtomicBool,
    /// How often somebody began to look.
    looks: AtomicU64,
    /// Held by the one thread that counts and evicts.
    looking: Mutex<()>,
    /// Held for a note; taken under `looking` or alone.
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
pub(super) struct Full {
    pub why: String,
    /// Whether the disk said so, and not the limit.
    pub by_disk: bool,
    /// When it is tried again.
    pub again: Instant,
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
            busy: AtomicBool::new(false),
            looks: AtomicU64::new(0),
            looking: Mutex::default(),
            state: Mutex::default(),
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed) || self.is_busy()
    }

    /// Whether room is being made, and that takes a while.
    pub(super) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed)
    }

    /// Whether it is time to look at the disk.
    pub(super) fn is_due(&self) -> bool {
        self.opened.elapsed().as_millis() as u64 >= self.look_at.load(Ordering::Relaxed)
    }

    /// Takes from the allowance, if that is known to be good.
    pub(super) fn take(&self, bytes: u64) -> bool {
        let taken = |left: u64| left.checked_sub(in_blocks(bytes));
        !self.is_full()
            && !self.is_due()
            && self.allowance.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken).is_ok()
    }

    /// Counts what is written without asking: too little to be worth a look at the disk.
    pub(super) fn count(&self, bytes: u64) -> Growth<'_> {
        let taken = |left: u64| Some(left.saturating_sub(in_blocks(bytes)));
        let _ = self.allowance.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken);
        self.growth(bytes)
    }

    pub(super) fn growth(&self, bytes: u64) -> Growth<'_> {
        let bytes = in_blocks(bytes);
        self.in_flight.fetch_add(bytes, Ordering::Relaxed);
        Growth { room: self, bytes }
    }

    /// What those who were allowed to are writing just now.
    pub(super) fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Ends the allowance.
    pub(super) fn stop(&self) {
        self.allowance.store(0, Ordering::Relaxed);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// Why the cache is full, if it is.
    pub(super) fn full(&self) -> Option<Full> {
        self.state().full.clone()
    }

    /// The right to count and evict, for who has to have it.
    pub(super) fn looking(&self) -> Looking<'_> {
        self.looks(self.looking.lock().unwrap_or_else(|held| held.into_inner()))
    }

    /// The same for who wants to write. Who finds the cache full does not wait while another thread looks, and nobody
    /// waits for one that takes long.
    pub(super) fn looking_soon(&self) -> Option<Looking<'_>> {
        let (mut looks, mut since) = (self.looks.load(Ordering::Relaxed), Instant::now());
        loop {
            match self.looking.try_lock() {
                Ok(held) => return Some(self.looks(held)),
                Err(TryLockError::Poisoned(held)) => return Some(self.looks(held.into_inner())),
                Err(TryLockError::WouldBlock) if self.is_full() => return None,
                Err(TryLockError::WouldBlock) if since.elapsed() < PATIENCE => std::thread::sleep(POLL),
                Err(TryLockError::WouldBlock) => {
                    self.busy.store(true, Ordering::Relaxed);
                    return None;
                }
            }
            let now = self.looks.load(Ordering::Relaxed);
            if now != looks {
                // Another one looks by now.
                (looks, since) = (now, Instant::now());
            }
        }
    }

    fn looks<'a>(&'a self, held: MutexGuard<'a, ()>) -> Looking<'a> {
        self.looks.fetch_add(1, Ordering::Relaxed);
        // Who ran out of patience just as the one before was done has left this behind.
        self.busy.store(false, Ordering::Relaxed);
        Looking { room: self, _held: held }
    }

    pub(super) fn disk(&self) -> Result<Disk, CacheError> {
        let found = rustix::fs::statvfs(&self.root).map_err(|error| io_error("stat", &self.root)(error.into()))?;
        Ok(Disk { total: found.f_blocks * found.f_frsize, free: found.f_bavail * found.f_frsize })
    }

    /// Whether a disk that was full takes more: by its own account, and then by trying, as an account knows no quotas.
    pub(super) fn disk_has_room(&self) -> bool {
        let Ok(disk) = self.disk() else { return false };
        disk.free >= ROOM.min(disk.total / 16) && probe(&self.root).is_ok()
    }

    /// Remembers that the disk is full, where that is what an error says.
    pub(super) fn noted(&self, error: CacheError) -> CacheError {
        if let CacheError::Full { why, .. } = &error {
            let mut state = self.state();
            if state.full.is_none() {
                self.remember(&mut state, Full::by_disk(why.clone()));
            }
        }
        error
    }

    /// Remembers that the cache is full, as was found just now, and says so.
    pub(super) fn fill(&self, full: Full, began: Instant) -> CacheError {
        let error = full.error(&self.root);
        let again = Instant::now() + RETRY.max(began.elapsed() * TRIED);
        self.remember(&mut self.state(), Full { again, ..full });
        error
    }

    fn remember(&self, state: &mut State, full: Full) {
        if state.full.is_none() {
            let why = &full.why;
            tracing::warn!(
                "the cache keeps nothing more for now, and what is not in it is fetched at each read: {why}"
            );
        }
        self.look_after(full.again.saturating_duration_since(Instant::now()));
        state.full = Some(full);
        self.full.store(true, Ordering::Relaxed);
    }

    pub(super) fn has_room_again(&self) {
        if self.state().full.take().is_some() {
            tracing::info!("the cache has room again");
        }
        self.full.store(false, Ordering::Relaxed);
    }

    /// Sets what may be written before the next count.
    pub(super) fn allow(&self, marks: Marks, held: u64, began: Instant) -> Result<(), CacheError> {
        let allowance = marks.limit.saturating_sub(held) / SHARE;
        let free = self.disk()?.free;
        self.state().counted = Some(Counted { marks, allowance, free, at: Instant::now(), took: began.elapsed() });
        self.allowance.store(allowance, Ordering::Relaxed);
        self.look_after(LOOK);
        Ok(())
    }

    /// Whether the last count still tells what there is, as far as the disk knows.
    pub(super) fn counted_still_holds(&self, disk: Disk) -> bool {
        let left = self.allowance.load(Ordering::Relaxed);
        let holds = self.state().counted.as_ref().is_some_and(|counted| counted.holds(disk, left));
        if holds {
            self.look_after(LOOK);
        }
        holds
    }

    pub(super) fn look_after(&self, time: Duration) {
        let next = self.opened.elapsed() + time;
        self.look_at.store(next.as_millis() as u64, Ordering::Relaxed);
    }
}

/// The right to count and evict.
#[derive(Debug)]
pub(super) struct Looking<'a> {
    room: &'a Room,
    _held: MutexGuard<'a, ()>,
}

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        self.room.busy.store(false, Ordering::Relaxed);
    }
}

impl Full {
    pub(super) fn by_limit(why: String) -> Self {
        Self { why, by_disk: false, again: Instant::now() }
    }

    pub(super) fn by_disk(why: String) -> Self {
        // Tried at once, as there may be something to evict.
        Self { why, by_disk: true, again: Instant::now() }
    }

    pub(super) fn error(&self, path: &Path) -> CacheError {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_holds_until_it_is_old_or_others_write() {
        let marks = Marks { limit: 1000, high: 900, low: 800 };
        let counted = |at, took| Counted { marks, allowance: 50, free: 5000, at, took };
        let fresh = counted(Instant::now(), Duration::from_millis(1));
        let disk = |free| Disk { total: 10_000, free };
        assert!(fresh.holds(disk(5000), 50) && fresh.holds(disk(9000), 0));
        assert!(fresh.holds(disk(4945), 20), "30 are our own, and 25 by others are no sign");
        assert!(!fresh.holds(disk(4944), 20), "26 are one");
        let Some(minute) = Instant::now().checked_sub(Duration::from_secs(60)) else { return };
        assert!(!counted(minute, Duration::from_secs(1)).holds(disk(5000), 50));
        assert!(counted(minute, Duration::from_secs(2)).holds(disk(5000), 50), "it took two seconds");
    }

    #[test]
    fn the_disk_is_asked_for_a_chunk_and_keeps_nothing_of_it() {
        let dir = tempfile::tempdir().expect("a directory");
        probe(dir.path()).expect("there is room");
        assert_eq!(fs::read_dir(dir.path()).expect("reads").count(), 0);
        assert!(u64::from(crate::object::CHUNK_SIZE) <= CHUNK);
        assert!(probe(&dir.path().join("gone")).is_err());
    }
}
