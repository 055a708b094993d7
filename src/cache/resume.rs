//! What a fill keeps beside its files, so that the next one can go on where it ended.
//!
//! ```text
//! incoming/<key>/
//!   between    of a layer that is not compressed: its bytes that are no file's content, in order
//!   blob       of one that is: its bytes, as they came
//!   synced     up to which byte of the layer all was on the disk, and in which boot of the machine that was noted
//! ```
//!
//! A process that is killed loses nothing that it has written, so in the same boot all of it counts; in a later one that
//! which was on the disk at the last checkpoint. None of it proves anything: who goes on hashes it again with the rest.
//!
//! A checkpoint is made by a thread of its own, which ends before the directory is let go: what it notes must not reach
//! into the next fill.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::files::{new_file, open_existing, write_at};
use super::map::contents;
use super::staging::{number_of, remove_whatever};
use super::{Cache, CacheError, io_error};

/// What is less is not worth to be kept: it is fetched again in a moment.
pub const WORTH: u64 = 4 << 20;
/// So many bytes of a layer lie between two checkpoints at least: what is less is fetched again in a moment.
const CHECKPOINT: u64 = 256 << 20;
/// And so much time: while the disk is synced, what is written waits for it, and with it the wire, for most of a second. So
/// no fill that an open waits for has one, and a machine that fails costs ten seconds of the wire.
const PAUSE: Duration = Duration::from_secs(10);

const SYNCED: &str = "synced";
/// Tells one boot of the machine from another.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// Which bytes of a layer are kept beside its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beside {
    /// Those that are no file's content.
    Between,
    /// All of them: the files are made from these anew.
    Blob,
}

impl Beside {
    pub(super) fn path(self, dir: &Path) -> PathBuf {
        dir.join(match self {
            Self::Between => "between",
            Self::Blob => "blob",
        })
    }
}

/// The content of `synced`.
#[derive(Debug, Serialize, Deserialize)]
struct Synced {
    /// All bytes of the layer below this one were on the disk.
    offset: u64,
    boot: String,
}

impl Synced {
    fn read(dir: &Path) -> Option<Self> {
        let bytes = contents(&dir.join(SYNCED)).ok()??;
        serde_json::from_slice(&bytes).ok()
    }

    /// How many of the bytes that lie in the directory count.
    fn counts(&self) -> u64 {
        if boot().is_some_and(|now| now == self.boot) { u64::MAX } else { self.offset }
    }

    /// Notes it in place of what was noted before.
    fn write(offset: u64, dir: &Path) -> Result<(), CacheError> {
        let path = dir.join(SYNCED);
        let temporary = path.with_extension("tmp");
        let _ = fs::remove_file(&temporary);
        let bytes = serde_json::to_vec(&Self { offset, boot: boot().unwrap_or_default() }).map_err(io::Error::other);
        let written = bytes.and_then(|bytes| {
            let file = new_file(&temporary, 0o600)?;
            file.write_all_at(&bytes, 0)?;
            file.sync_data()?;
            fs::rename(&temporary, &path)
        });
        written.map_err(io_error("write", &path))
    }
}

/// Which boot of the machine this is, where it tells.
fn boot() -> Option<String> {
    let boot = fs::read_to_string(BOOT).ok()?.trim().to_owned();
    Some(boot).filter(|boot| !boot.is_empty())
}

/// Whether what lies in a staging directory that nobody holds is worth going on from.
pub(super) fn is_worth(dir: &Path) -> bool {
    let Some(synced) = Synced::read(dir) else { return false };
    let len = |path: PathBuf| fs::symlink_metadata(path).map_or(0, |file| file.len());
    let mut left = WORTH.saturating_sub(len(Beside::Blob.path(dir)));
    let between = Beside::Between.path(dir);
    if left > 0 && between.exists() {
        left = left.saturating_sub(len(between));
        let files = fs::read_dir(dir).into_iter().flatten().flatten();
        for file in files.filter(|entry| number_of(entry).is_some()) {
            if left == 0 {
                break;
            }
            left = left.saturating_sub(len(file.path()));
        }
    }
    left == 0 && synced.counts() >= WORTH
}

/// What an earlier fill has left, to be looked through and read again.
#[derive(Debug)]
pub struct Left {
    dir: PathBuf,
    beside: File,
    len: u64,
    counts: u64,
}

impl Left {
    /// What lies in a locked directory; `None` where there is nothing to go on from.
    pub(super) fn find(dir: &Path, beside: Beside) -> Result<Option<Self>, CacheError> {
        let Some(synced) = Synced::read(dir) else { return Ok(None) };
        let path = beside.path(dir);
        let Some(file) = open_existing(&path).map_err(io_error("open", &path))? else { return Ok(None) };
        let len = file.metadata().map_err(io_error("stat", &path))?.len();
        Ok(Some(Self { dir: dir.to_owned(), beside: file, len, counts: synced.counts() }))
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// So many bytes of the layer count at most.
    pub fn counts(&self) -> u64 {
        self.counts
    }

    /// How many bytes lie beside the files.
    pub fn beside(&self) -> u64 {
        self.len
    }

    /// Leaves out what is behind so many bytes beside the files.
    pub fn end_at(&mut self, len: u64) {
        self.len = self.len.min(len);
    }

    /// Some of the bytes beside the files.
    pub fn read_beside(&self, buffer: &mut [u8], offset: u64) -> Result<(), CacheError> {
        self.beside.read_exact_at(buffer, offset).map_err(io_error("read", &self.dir))
    }

    /// How long a staged file is; `None` where it is not there.
    pub fn file_len(&self, number: u64) -> Option<u64> {
        let found = fs::symlink_metadata(self.dir.join(number.to_string())).ok()?;
        found.is_file().then_some(found.len())
    }

    /// A staged file, to be read.
    pub fn file(&self, number: u64) -> Result<LeftFile, CacheError> {
        let path = self.dir.join(number.to_string());
        let gone = || io_error("open", &path)(io::ErrorKind::NotFound.into());
        let file = open_existing(&path).map_err(io_error("open", &path))?.ok_or_else(gone)?;
        Ok(LeftFile { file, path })
    }
}

/// A staged file of an earlier fill.
#[derive(Debug)]
pub struct LeftFile {
    file: File,
    path: PathBuf,
}

impl LeftFile {
    /// Some of its bytes.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), CacheError> {
        self.file.read_exact_at(buffer, offset).map_err(io_error("read", &self.path))
    }
}

/// Where a fill goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reached {
    /// So many bytes of the layer are there.
    pub offset: u64,
    /// So many of them beside the files.
    pub beside: u64,
    /// So many files were begun.
    pub files: u64,
    /// How long the last of them is, which may have only begun.
    pub last: u64,
}

/// What is kept beside the files of a fill under way.
#[derive(Debug)]
pub(super) struct Kept {
    dir: PathBuf,
    path: PathBuf,
    file: File,
    len: u64,
    /// Up to where the last checkpoint was made.
    checked: u64,
    /// When that was begun.
    checked_at: Instant,
    checkpoint: Option<JoinHandle<()>>,
}

impl Kept {
    /// Nothing yet, in an empty directory.
    pub(super) fn begin(dir: &Path, beside: Beside) -> Result<Self, CacheError> {
        let path = beside.path(dir);
        let file = new_file(&path, 0o600).map_err(io_error("create", &path))?;
        Synced::write(0, dir)?;
        Ok(Self { dir: dir.to_owned(), path, file, len: 0, checked: 0, checked_at: Instant::now(), checkpoint: None })
    }

    /// What is there, without whatever lies behind.
    pub(super) fn go_on(dir: &Path, beside: Beside, at: &Reached) -> Result<Self, CacheError> {
        let path = beside.path(dir);
        for entry in fs::read_dir(dir).map_err(io_error("read", dir))? {
            let entry = entry.map_err(io_error("read", dir))?;
            let Some(number) = number_of(&entry) else { continue };
            if beside == Beside::Blob || number >= at.files {
                remove_whatever(&entry.path())?;
            } else if number + 1 == at.files {
                let last = reopen(&entry.path(), 0o444)?;
                last.set_len(at.last).map_err(io_error("resize", &entry.path()))?;
            }
        }
        let file = reopen(&path, 0o600)?;
        file.set_len(at.beside).map_err(io_error("resize", &path))?;
        let synced = Synced::read(dir);
        let checked = synced.as_ref().map_or(0, |synced| synced.offset.min(at.offset));
        // Last: what was behind counts no more, in this boot either.
        if synced.is_none_or(|synced| synced.counts() != u64::MAX || synced.offset > checked) {
            Synced::write(checked, dir)?;
        }
        Ok(Self {
            dir: dir.to_owned(),
            path,
            file,
            len: at.beside,
            checked,
            checked_at: Instant::now(),
            checkpoint: None,
        })
    }

    /// Adds bytes. They reach the system before this returns, as a process that is killed loses what it holds itself.
    pub(super) fn add(&mut self, cache: &Cache, bytes: &[u8]) -> Result<(), CacheError> {
        let _growth = cache.grow_staged(&self.path, bytes.len() as u64)?;
        let written = write_at(&self.file, bytes, self.len).map_err(io_error("write", &self.path));
        written.map_err(|error| cache.room.noted(error))?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Says that all bytes of the layer below `offset` were written. Makes a checkpoint now and then.
    pub(super) fn reached(&mut self, offset: u64) {
        let is_early = offset - self.checked < CHECKPOINT || self.checked_at.elapsed() < PAUSE;
        if is_early || self.checkpoint.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return;
        }
        (self.checked, self.checked_at) = (offset, Instant::now());
        let dir = self.dir.clone();
        let checkpoint = move || {
            let synced = File::open(&dir).and_then(|dir| Ok(rustix::fs::syncfs(&dir)?));
            if let Err(error) = synced.map_err(io_error("sync", &dir)).and_then(|()| Synced::write(offset, &dir)) {
                tracing::debug!(%error, "no checkpoint was made");
            }
        };
        self.checkpoint = std::thread::Builder::new().name("checkpoint".to_owned()).spawn(checkpoint).ok();
    }

    /// Removes it: the fill goes on, and can't be resumed.
    pub(super) fn remove(self) {
        let (dir, path) = (self.dir.clone(), self.path.clone());
        drop(self);
        let _ = fs::remove_file(dir.join(SYNCED));
        let _ = fs::remove_file(path);
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = self.checkpoint.take().map(JoinHandle::join);
    }
}

/// Opens a file to write to it again, which may be read-only for its owner too, and is of this mode then. One with another
/// name is left alone: that may be a copy of the cache, made with links.
pub(super) fn reopen(path: &Path, mode: u32) -> Result<File, CacheError> {
    let found = fs::symlink_metadata(path).map_err(io_error("stat", path))?;
    if !found.is_file() || found.nlink() != 1 {
        return Err(io_error("open", path)(io::Error::other("it is not a file, or has another name too")));
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(io_error("open", path))?;
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
    let file = options.open(path).map_err(io_error("open", path))?;
    file.set_permissions(fs::Permissions::from_mode(mode)).map_err(io_error("open", path))?;
    Ok(file)
}

#[cfg(test)]
#[path = "resume_tests.rs"]
mod tests;
