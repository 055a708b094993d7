//! How much the cache may hold, and what happens when there is no room.
//!
//! There is no account that processes share, as it could go stale: what the cache holds is counted on the disk
//! ([`super::usage`]). Between two counts a process takes what it writes from an allowance ([`super::room`]), which is
//! small enough for others to have one too.
//!
//! Nobody writes above a high-water mark below the limit: what lies between them is for what others write before they
//! count again. At the mark eviction begins, and goes down to a low-water mark, so that not every write has to evict.
//! Where all there is is in use or kept, the cache is full. It is full, too, when the disk says so. While it is full
//! nothing is written, nothing fails, and once a second somebody looks again.
//!
//! Locks: one thread of a process counts and evicts, under a mutex of the room. Others that write wait for it, but only
//! for a moment: where that takes longer, nothing is written meanwhile, as if the cache were full. Under it `evict.lock`
//! and those of files ([`super::evict`]), and the mutex of what is known, which is held for a note.

use std::path::Path;
use std::time::{Duration, Instant};

use super::room::{CHUNK, Disk, Full, Growth, Looking, Room};
use super::usage::Item;
use super::{Cache, CacheError};
use crate::report::chain;
use crate::units::format_size;

/// Eviction begins when the cache holds so much of its limit, in percent. Eight processes that count at the same time and
/// then use up their allowances ([`super::room`]) need half of the rest.
const HIGH: u64 = 95;
/// And it goes down to so much: a twentieth of the cache goes at once, so that looking for what goes is rare.
const LOW: u64 = 90;
/// A full cache has room again when it holds less than so much: well below the mark, so that this does not change with
/// every file that is closed.
const AGAIN: u64 = 92;

/// Why nothing is kept while another thread makes room and takes long.
const MAKING_ROOM: &str = "room is being made, which takes a while where there are many files";

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

impl Cache {
    /// Says that a file of the cache grows by so many bytes while what is returned is held. Makes room for them where there
    /// is none, which may take a while: belongs on a thread that may wait. [`CacheError::Full`] where none is to be made,
    /// or another thread makes it and takes long: what can be had again is not worth a wait.
    pub(super) fn grow(&self, path: &Path, bytes: u64) -> Result<Growth<'_>, CacheError> {
        self.grow_by(path, bytes, Room::looking_soon)
    }

    /// The same for what is lost as a whole where a part of it is not kept: waits for as long as another thread makes room.
    pub(super) fn grow_staged(&self, path: &Path, bytes: u64) -> Result<Growth<'_>, CacheError> {
        self.grow_by(path, bytes, |room| Some(room.looking()))
    }

    fn grow_by(
        &self,
        path: &Path,
        bytes: u64,
        looking: fn(&Room) -> Option<Looking<'_>>,
    ) -> Result<Growth<'_>, CacheError> {
        if let Some(growth) = self.grow_at_once(bytes) {
            return Ok(growth);
        }
        self.look(bytes, looking).map_err(|error| match error {
            CacheError::Full { why, .. } => CacheError::Full { path: path.to_owned(), why },
            other => other,
        })
    }

    /// The same where there is room without a look at the disk, else `None`: for who can't wait.
    pub(super) fn grow_at_once(&self, bytes: u64) -> Option<Growth<'_>> {
        let is_granted = (self.settings.limit == Limit::None && !self.room.is_full()) || self.room.take(bytes);
        is_granted.then(|| self.room.growth(bytes))
    }

    /// Whether the cache keeps nothing more at the moment. Costs nothing.
    pub fn is_full(&self) -> bool {
        self.room.is_full()
    }

    /// Whether to write is worth a try. Costs nothing either.
    pub fn may_have_room(&self) -> bool {
        !self.room.is_full() || self.room.is_due()
    }

    /// The most bytes that can be kept at once as things are: above its mark nothing is written. `None` without a limit.
    pub fn most(&self) -> Result<Option<u64>, CacheError> {
        let held = match self.settings.limit {
            Limit::None | Limit::Bytes(_) => 0,
            // What others leave of the disk, and what is here.
            Limit::KeepFree(_) => self.usage()?.bytes(),
        };
        Ok(self.marks(held)?.map(|marks| marks.high))
    }

    /// Why the cache keeps nothing more at the moment, if it does not.
    pub fn fullness(&self) -> Option<String> {
        if self.is_full() {
            // Where nobody has written for a while, nobody has looked.
            let _ = self.look(CHUNK, Room::looking_soon);
        }
        let making_room = || self.room.is_busy().then(|| MAKING_ROOM.to_owned());
        self.room.full().map(|full| full.why).or_else(making_room)
    }

    /// What the limit comes to now, for a cache that holds so many bytes; `None` where there is no limit.
    pub fn marks(&self, held: u64) -> Result<Option<Marks>, CacheError> {
        Ok(self.settings.limit.marks(held, self.room.disk()?))
    }

    /// Evicts where others have used up the free space that is kept for them. Costs next to nothing while they have not,
    /// so that a mount can look every few seconds.
    pub fn yield_room(&self) -> Result<(), CacheError> {
        let Limit::KeepFree(percent) = self.settings.limit else { return Ok(()) };
        let disk = self.room.disk()?;
        if disk.free < part(disk.total, percent.into()) { self.keep_limit() } else { Ok(()) }
    }

    /// Evicts what is above the limit by now: what was in use may not be any more.
    pub fn keep_limit(&self) -> Result<(), CacheError> {
        if self.settings.limit == Limit::None {
            return Ok(());
        }
        self.room.look_after(Duration::ZERO);
        match self.look(0, |room| Some(room.looking())) {
            // It is known, and has been told.
            Err(CacheError::Full { .. }) => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    /// Looks whether there is room for more bytes.
    fn look(&self, bytes: u64, looking: fn(&Room) -> Option<Looking<'_>>) -> Result<Growth<'_>, CacheError> {
        let room = &*self.room;
        let Some(_looking) = looking(room) else {
            let why = room.full().map_or_else(|| MAKING_ROOM.to_owned(), |full| full.why);
            return Err(CacheError::Full { path: self.root.clone(), why });
        };
        let full = match room.full() {
            // Another thread may have looked meanwhile.
            None if room.take(bytes) => return Ok(room.growth(bytes)),
            Some(full) if Instant::now() < full.again => return Err(full.error(&self.root)),
            full => full,
        };
        let began = Instant::now();
        let disk = room.disk()?;
        if full.is_none() && room.counted_still_holds(disk) && room.take(bytes) {
            return Ok(room.growth(bytes));
        }
        let disk_is_full = full.as_ref().filter(|full| full.by_disk && !room.disk_has_room());
        if let Some(full) = disk_is_full
            && self.settings.limit == Limit::None
        {
            return Err(room.fill(full.clone(), began));
        }
        // Whoever else writes waits for the outcome.
        room.stop();
        let counted = self.count_and_evict(bytes, disk, disk_is_full.is_some()).map_err(|error| match error {
            CacheError::Full { why, .. } => room.fill(Full::by_disk(why), began),
            // A file in the way of a count is no reason for a reader to fail.
            other => room.fill(Full::by_limit(format!("what it holds can't be told: {}", chain(&other))), began),
        });
        let Some((held, marks)) = counted? else {
            room.has_room_again();
            return Ok(room.growth(bytes));
        };
        if let Some(full) = disk_is_full
            && !room.disk_has_room()
        {
            return Err(room.fill(full.clone(), began));
        }
        let most = if full.is_some() { part(marks.limit, AGAIN) } else { marks.high };
        if held + bytes > most {
            return Err(room.fill(Full::by_limit(self.limit_reached(marks)), began));
        }
        room.has_room_again();
        room.allow(marks, held + bytes, began)?;
        Ok(room.growth(bytes))
    }

    /// Counts what the cache holds, and evicts where that and what is to come passes the mark. `None` without a limit.
    fn count_and_evict(&self, bytes: u64, disk: Disk, disk_is_full: bool) -> Result<Option<(u64, Marks)>, CacheError> {
        if self.settings.limit == Limit::None {
            return Ok(None);
        }
        let in_flight = self.room.in_flight();
        let held = in_flight + self.usage()?.bytes();
        let Some(marks) = self.settings.limit.marks(held, disk) else { return Ok(None) };
        let target = if disk_is_full && matches!(self.settings.limit, Limit::KeepFree(_)) {
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
        // Some file systems, as one of memory without a bound, do not tell how large they are.
        if !evicts && disk.total > 0 && disk.free < bytes {
            let [wanted, free] = [bytes, disk.free].map(format_size);
            return full(format!("{wanted} are to be staged at once, and its disk has {free} free"));
        }
        if self.settings.limit == Limit::None {
            return Ok(());
        }
        // One at a time; and what is written meanwhile waits for the outcome.
        let _looking = room.looking();
        let began = Instant::now();
        let mut kept = 0;
        let never = (self.settings.policy.protected)(self)?.never;
        let is_kept = |item: &Item| item.object().is_some_and(|object| never.contains(&object));
        let mut held = self.scan(|item| kept += if is_kept(&item) { item.bytes } else { 0 })?.bytes();
        let Some(marks) = self.settings.limit.marks(held, disk) else { return Ok(()) };
        let [wanted, limit, kept_size] = [bytes, marks.limit, kept].map(format_size);
        if kept + bytes > marks.high {
            return full(format!(
                "{wanted} are to be staged at once, its limit is {limit}, and {kept_size} of that are kept; \
                 choose a larger --cache-size"
            ));
        }
        if held + bytes > marks.high {
            held = self.evict_or_wait(marks.low.saturating_sub(bytes))?;
        }
        if held + bytes > marks.high {
            let held = format_size(held);
            return full(format!(
                "{wanted} are to be staged at once, its limit is {limit}, and {held} of that are in use or kept"
            ));
        }
        if room.full().is_none() { room.allow(marks, held, began) } else { Ok(()) }
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
