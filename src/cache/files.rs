//! Files and directories of the cache, made and opened so that no planted link is followed.
//!
//! What could be planted was planted before the root was closed to others, which opening the cache sees to. Opening
//! refuses links among the areas and their directories ([`Cache::close_to_others`]); after that a link in the place of a
//! directory is an error to who writes and an absence to who reads, and one in the place of a file is never followed.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags, flock};

use super::map::MAPPED;
use super::usage::Area;
use super::{Cache, CacheError, io_error};

/// What lies here is not used, so it may be anything.
const QUARANTINE: &str = Area::Quarantine.dir();

/// What is written at once, and in one piece of the kernel's memory. Larger pieces are what a virtual machine gives back to
/// its host while they are free, and to touch them again costs more than the write: with 1 MiB a GiB took 2.3 s of a core,
/// with 64 KiB 0.35 s, where 0.28 was the least.
const WRITE: usize = 64 << 10;

/// So many names are tried for a temporary file: each that is taken was left by a killed process of our number.
const NAMES: usize = 64;

/// How often a lock is tried that others hold for a while.
const POLL: Duration = Duration::from_millis(10);

/// Writes all of `bytes` at `offset`.
pub(super) fn write_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let room = WRITE - (offset % WRITE as u64) as usize;
        let (now, later) = bytes.split_at(room.min(bytes.len()));
        file.write_all_at(now, offset)?;
        offset += now.len() as u64;
        bytes = later;
    }
    Ok(())
}

impl Cache {
    /// Makes the areas, and takes from all others what rights they have. An area that is a link, or holds one in the place
    /// of a directory, is refused.
    pub(super) fn close_to_others(&self) -> Result<(), CacheError> {
        let mut was_writable = close(&self.root)?;
        for area in areas() {
            let path = self.root.join(area);
            make_dir(&path)?;
            was_writable |= close(&path)?;
            for entry in fs::read_dir(&path).map_err(io_error("read", &path))? {
                let entry = entry.map_err(io_error("read", &path))?;
                if entry.file_type().is_ok_and(|kind| kind.is_symlink()) && area != QUARANTINE {
                    return Err(CacheError::Planted { path: entry.path() });
                }
            }
        }
        if was_writable { self.set_aside_what_others_own() } else { Ok(()) }
    }

    /// Sets aside what others have put into the cache while they could: an object or index of theirs would be believed,
    /// and they could change it for as long as they have it open, or under another name.
    fn set_aside_what_others_own(&self) -> Result<(), CacheError> {
        let mut dirs: Vec<PathBuf> =
            areas().filter(|area| *area != QUARANTINE).map(|area| self.root.join(area)).collect();
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir).map_err(io_error("read", &dir))? {
                let path = entry.map_err(io_error("read", &dir))?.path();
                let Ok(found) = fs::symlink_metadata(&path) else { continue };
                if let Some(owner) = other_owner(&found) {
                    self.quarantine(&path, &format_args!("it belongs to user {owner}"))?;
                } else if found.is_dir() {
                    dirs.push(path);
                }
            }
        }
        Ok(())
    }

    /// Writes a file as a whole, from its parts: to a temporary name, synced, then renamed.
    pub(super) fn write_file(&self, path: &Path, parts: &[&[u8]]) -> Result<(), CacheError> {
        let len = parts.iter().map(|part| part.len() as u64).sum();
        // What is small is what a kit can't be opened without, and goes last: there is room for it as long as the disk has.
        let _growth = if len < MAPPED { self.room.count(len) } else { self.grow(path, len)? };
        self.try_write_file(path, parts).map_err(|error| self.room.noted(error))
    }

    /// Makes a directory of the cache for what is about to be written. Where somebody has removed all that there was, the
    /// cache gets its `format` first, so that it is not refused as none by the next who opens it.
    pub(super) fn make_room_in(&self, dir: &Path) -> Result<(), CacheError> {
        if fs::symlink_metadata(dir).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            self.restore_format()?;
        }
        make_dir(dir)
    }

    fn try_write_file(&self, path: &Path, parts: &[&[u8]]) -> Result<(), CacheError> {
        if let Some(parent) = path.parent().filter(|parent| *parent != self.root) {
            self.make_room_in(parent)?;
        }
        let (temporary, mut file) = self.new_temporary(path)?;
        let written = parts.iter().try_for_each(|part| file.write_all(part)).and_then(|()| file.sync_data());
        written.and_then(|()| rename_over(&temporary, path)).map_err(|cause| {
            // The error that counts is the first one.
            let _ = fs::remove_file(&temporary);
            io_error("write", path)(cause)
        })
    }

    /// A temporary file beside `path`, locked for as long as it is open: one that is not is a killed process's.
    fn new_temporary(&self, path: &Path) -> Result<(PathBuf, File), CacheError> {
        for _ in 0..NAMES {
            let serial = self.counter.fetch_add(1, Ordering::Relaxed);
            let temporary = path.with_extension(format!("{}.{serial}.tmp", std::process::id()));
            let file = match new_file(&temporary, 0o600) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(io_error("write", path)(error)),
            };
            // Who clears up may have come between: then it is busy, or has no name any more. Where a file system has no
            // locks, nobody clears up.
            let is_taken = flock(&file, FlockOperation::NonBlockingLockExclusive) == Err(rustix::io::Errno::WOULDBLOCK);
            if !is_taken && file.metadata().map_err(io_error("stat", &temporary))?.nlink() > 0 {
                return Ok((temporary, file));
            }
        }
        let busy =
            io::Error::new(io::ErrorKind::ResourceBusy, "all its temporary names are taken; run `kitfs cache gc`");
        Err(io_error("write", path)(busy))
    }
}

/// The directories of a cache, parents first.
fn areas() -> impl Iterator<Item = &'static str> {
    let spread = Area::SPREAD.into_iter().map(Area::dir);
    std::iter::once("blobs").chain(spread).chain([Area::Incoming.dir(), QUARANTINE])
}

/// Whose something is, if it is not ours.
pub(super) fn other_owner(found: &fs::Metadata) -> Option<u32> {
    Some(found.uid()).filter(|owner| *owner != rustix::process::geteuid().as_raw())
}

/// Takes the rights of group and others from a directory that is ours; tells whether they could write to it.
fn close(path: &Path) -> Result<bool, CacheError> {
    let found = fs::metadata(path).map_err(io_error("stat", path))?;
    if let Some(owner) = other_owner(&found) {
        let user = rustix::process::geteuid().as_raw();
        return Err(CacheError::Owner { path: path.to_owned(), owner, user });
    }
    let mode = found.mode() & 0o7777;
    if mode & 0o077 == 0 {
        return Ok(false);
    }
    match fs::set_permissions(path, fs::Permissions::from_mode(mode & 0o700)) {
        Ok(()) => {
            tracing::warn!(path = %path.display(), "cache: open to others with mode {mode:04o}; now closed");
            Ok(mode & 0o022 != 0)
        }
        // Nothing can be planted there either.
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok(false),
        Err(error) => Err(io_error("protect", path)(error)),
    }
}

/// Gives a file its name, also where an empty directory lies in its way.
pub(super) fn rename_over(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::IsADirectory => {
            fs::remove_dir(to).and_then(|()| fs::rename(from, to))
        }
        outcome => outcome,
    }
}

/// Makes a directory with mode 0700, and its parents where they are missing; an existing one is fine, a link is not.
pub(super) fn make_dir(path: &Path) -> Result<(), CacheError> {
    // Mostly it is there, and a look takes no lock of its parent, as trying to make it does.
    if fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()) {
        return Ok(());
    }
    let make = || fs::DirBuilder::new().mode(0o700).create(path);
    let made = match (make(), path.parent()) {
        (Err(error), Some(parent)) if error.kind() == io::ErrorKind::NotFound => {
            make_dir(parent)?;
            make()
        }
        (made, _) => made,
    };
    match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let found = fs::symlink_metadata(path).map_err(io_error("stat", path))?;
            match found.file_type() {
                kind if kind.is_dir() => Ok(()),
                kind if kind.is_symlink() => Err(CacheError::Planted { path: path.to_owned() }),
                _ => Err(io_error("create", path)(error)),
            }
        }
        made => made.map_err(io_error("create", path)),
    }
}

/// Opens a file that is there for its lock, making it where there is none. A pipe in its place would make who opens it wait.
pub(super) fn open_lock(path: &Path) -> Result<File, CacheError> {
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed());
    let planted = || io::Error::other("it is not a file; `kitfs cache verify --repair` sets it aside");
    let opened = options.open(path);
    // By its name, as what was not opened has no other.
    if fs::symlink_metadata(path).is_ok_and(|found| !found.is_file()) {
        return Err(io_error("open", path)(planted()));
    }
    opened.map_err(io_error("open", path))
}

/// What came of trying to lock a file.
#[derive(Debug)]
pub(super) enum Claim {
    /// It is locked until this is closed, and has its name.
    Held(File),
    /// Somebody has a lock on it.
    Busy,
    /// Its name is gone, or another file's by now.
    Gone,
}

impl Claim {
    /// The file, if it is locked.
    pub(super) fn held(self) -> Option<File> {
        match self {
            Self::Held(file) => Some(file),
            Self::Busy | Self::Gone => None,
        }
    }
}

/// Locks a file that was opened by its name, without waiting. Who had the lock before may have removed or replaced the
/// file between open and lock: then the lock is on a file without a name, and does not count.
pub(super) fn lock_named(file: File, path: &Path, how: FlockOperation) -> Result<Claim, CacheError> {
    match flock(&file, how) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(Claim::Busy),
        Err(error) => return Err(io_error("lock", path)(error.into())),
    }
    let held = file.metadata().map_err(io_error("stat", path))?;
    let is_named = identity_of(path) == Some(identity(&held));
    Ok(if is_named { Claim::Held(file) } else { Claim::Gone })
}

/// Takes the lock of a file that is there for it. Others have it for a while, so it is tried for as long as `patience`; not
/// waited for in the kernel, as who holds it may have stopped.
pub(super) fn lock_within(path: &Path, patience: Duration) -> Result<File, CacheError> {
    let (file, start) = (open_lock(path)?, Instant::now());
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if start.elapsed() < patience => std::thread::sleep(POLL),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let busy = io::Error::new(io::ErrorKind::WouldBlock, "another process does not let go of it");
                return Err(io_error("lock", path)(busy));
            }
            Err(error) => return Err(io_error("lock", path)(error.into())),
        }
    }
}

/// A new file that must not exist yet, so that no planted link is followed.
pub(super) fn new_file(path: &Path, mode: u32) -> io::Result<File> {
    fs::OpenOptions::new().read(true).write(true).create_new(true).mode(mode).open(path)
}

/// Opens a regular file for reading, following no link, nor one in the place of its directory; `None` where there is
/// none, or something else lies there, which can only have been planted.
pub(super) fn open_existing(path: &Path) -> io::Result<Option<File>> {
    let is_in_a_link = path.parent().is_some_and(is_symlink);
    if is_in_a_link { Ok(None) } else { open_file(path) }
}

/// The same for a file whose directory may be reached by a link: that of the root.
pub(super) fn open_file(path: &Path) -> io::Result<Option<File>> {
    // A pipe would make the open wait for its other end.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = match fs::OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound || is_link(&error) || is_socket(&error) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    Ok(file.metadata()?.is_file().then_some(file))
}

/// Whether a path is a symbolic link.
pub(super) fn is_symlink(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink())
}

/// Whether a path was not opened because it is a socket.
fn is_socket(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error())
}

/// Whether a path was not opened because it is a symbolic link.
pub(super) fn is_link(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error())
}

/// What a file takes on the disk; of a sparse one, what is not a hole.
pub(super) fn on_disk(found: &fs::Metadata) -> u64 {
    /// The unit of `st_blocks`, whatever the block size is.
    const BLOCK: u64 = 512;
    found.blocks() * BLOCK
}

/// Whether a path is a regular file of this size. Any other there is damage.
pub(super) fn is_file_of(path: &Path, size: u64) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_file() && found.len() == size)
}

/// Which file it is, whatever its name.
pub(super) type Identity = (u64, u64);

/// Which file lies at a path, a link itself included.
pub(super) fn identity_of(path: &Path) -> Option<Identity> {
    fs::symlink_metadata(path).ok().map(|found| identity(&found))
}

/// Which file it is.
pub(super) fn identity(found: &fs::Metadata) -> Identity {
    (found.dev(), found.ino())
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
