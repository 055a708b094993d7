//! The files of the record.
//!
//! ```text
//! history/
//!   lock                   held by whoever writes, and while the files are opened to be read; never removed
//!   events.jsonl           where events go
//!   events-000001.jsonl    where they went before, by number
//! ```
//!
//! A file is closed when it is large or its first event is old, and goes when its last event is older than is to be kept.
//! What a mount began to serve, and no event says that it has ended, is copied from a file that goes to the newest one
//! first: else a long-lived mount would be forgotten while it serves.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use super::{Event, HistoryError, served};

/// Where events go.
const LIVE: &str = "events.jsonl";
/// A file is closed at this size: some 8,000 events, read in a few milliseconds.
const LARGE: u64 = 4 << 20;
/// A file is closed when its first event is this old, or the twelfth part of what is kept: a file goes as a whole, so this
/// is how much longer than they must events may stay.
const OLD: SignedDuration = SignedDuration::from_hours(30 * 24);
/// How long others may hold the lock: longer than a busy disk takes, and shorter than a person waits.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is tried to get. No process blocks in `flock`, where nothing could end the wait.
const RETRY: Duration = Duration::from_millis(2);

/// Adds an event, on the disk when this returns.
pub(super) fn append(dir: &Path, keep: Option<Duration>, event: &Event) -> Result<(), HistoryError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |cause| HistoryError { action: "written", path, cause }
    };
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed(dir))?;
    let lock_file = dir.join("lock");
    let file = open(&lock_file, OpenOptions::new().create(true).append(true)).map_err(failed(&lock_file))?;
    let _lock = lock(file, FlockOperation::NonBlockingLockExclusive).map_err(failed(&lock_file))?;
    let live = dir.join(LIVE);
    // That old events stay is no reason to lose a new one.
    if let Err(error) = rotate_if_due(dir, &live, keep, event.time) {
        tracing::warn!(dir = %dir.display(), %error, "the history's files can't be rotated");
    }
    write(dir, &live, [event]).map_err(failed(&live))
}

/// All events in the order of the files. There are none where there is no record.
pub(super) fn read(dir: &Path) -> Result<Vec<Event>, HistoryError> {
    let mut events = Vec::new();
    for (path, file) in open_all(dir)? {
        events.extend(events_in(file).map_err(not_read(&path))?);
    }
    Ok(events)
}

fn not_read(path: &Path) -> impl FnOnce(io::Error) -> HistoryError {
    let path = path.to_owned();
    move |cause| HistoryError { action: "read", path, cause }
}

/// Opens all files, oldest first, at a moment when none is moved. What is open stays readable.
fn open_all(dir: &Path) -> Result<Vec<(PathBuf, File)>, HistoryError> {
    let lock_file = dir.join("lock");
    // A copy of the record may lack it; nobody writes there.
    let held = open_to_read(&lock_file)
        .and_then(|file| file.map(|file| lock(file, FlockOperation::NonBlockingLockShared)).transpose());
    let _lock = held.map_err(not_read(&lock_file))?;
    let closed = closed(dir).map_err(not_read(dir))?;
    let mut opened = Vec::new();
    for path in closed.into_iter().map(|(_, path)| path).chain([dir.join(LIVE)]) {
        let file = open_to_read(&path).map_err(not_read(&path))?;
        opened.extend(file.map(|file| (path, file)));
    }
    Ok(opened)
}

/// Opens a file of the record, if it is there.
fn open_to_read(path: &Path) -> io::Result<Option<File>> {
    match open(path, OpenOptions::new().read(true)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some),
    }
}

/// Opens a file of the record. A pipe in its place would make us wait for its other end, and a link leads who knows where.
fn open(path: &Path, how: &mut OpenOptions) -> io::Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let opened = how.mode(0o600).custom_flags(flags).open(path);
    // By its name, as what was not opened has no other.
    if fs::symlink_metadata(path).is_ok_and(|found| !found.is_file()) {
        return Err(io::Error::other("it is not a regular file; move it away, and a new one is made"));
    }
    opened
}

/// The closed files and their numbers, oldest first.
fn closed(dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let number = name.and_then(|name| name.strip_prefix("events-")?.strip_suffix(".jsonl")?.parse().ok());
        found.extend(number.map(|number| (number, path)));
    }
    found.sort();
    Ok(found)
}

fn events_in(mut file: File) -> io::Result<Vec<Event>> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes.split(|byte| *byte == b'\n').filter_map(event).collect())
}

fn event(line: &[u8]) -> Option<Event> {
    serde_json::from_slice(line).ok()
}

/// Takes the lock, which goes with the file.
fn lock(file: File, operation: FlockOperation) -> io::Result<File> {
    let start = Instant::now();
    loop {
        match flock(&file, operation) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) if start.elapsed() < PATIENCE => std::thread::sleep(RETRY),
            Err(Errno::WOULDBLOCK) => {
                let why = format!("another process has held it for {}", crate::units::format_duration(PATIENCE));
                return Err(io::Error::new(io::ErrorKind::TimedOut, why));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Writes lines with one call, and waits for the disk. What a crash has left of a line is ended first, so that it does not
/// take the next one with it.
fn write<'a>(dir: &Path, live: &Path, events: impl IntoIterator<Item = &'a Event>) -> io::Result<()> {
    let mut file = open(live, OpenOptions::new().create(true).read(true).append(true))?;
    let is_new = file.metadata()?.len() == 0;
    let mut lines = Vec::new();
    if !is_new {
        let mut last = [0];
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
        lines.extend((last != *b"\n").then_some(b'\n'));
    }
    for event in events {
        serde_json::to_writer(&mut lines, event)?;
        lines.push(b'\n');
    }
    file.write_all(&lines)?;
    file.sync_data()?;
    if is_new { File::open(dir)?.sync_all() } else { Ok(()) }
}

/// Closes the file where events go if it is large or old, and removes files that need not be kept. `now` is the time of the
/// event that follows.
fn rotate_if_due(dir: &Path, live: &Path, keep: Option<Duration>, now: Timestamp) -> io::Result<()> {
    let Some(file) = open_to_read(live)? else { return Ok(()) };
    let keep = keep.and_then(|keep| SignedDuration::try_from(keep).ok()).unwrap_or(SignedDuration::MAX);
    let is_large = file.metadata()?.len() >= LARGE;
    let is_old = first_event(file)?.is_some_and(|first| now.duration_since(first.time) > OLD.min(keep / 12));
    if !is_large && !is_old {
        return Ok(());
    }
    let mut files = closed(dir)?;
    let next = files.last().map_or(0, |(number, _)| *number) + 1;
    let path = dir.join(format!("events-{next:06}.jsonl"));
    fs::rename(live, &path)?;
    files.push((next, path));
    File::open(dir)?.sync_all()?;
    remove_old(dir, live, files, keep, now)
}

fn first_event(file: File) -> io::Result<Option<Event>> {
    for line in BufReader::new(file).split(b'\n') {
        if let Some(event) = event(&line?) {
            return Ok(Some(event));
        }
    }
    Ok(None)
}

/// Removes the oldest files in which all is older than `keep`, one after the other, until one is to stay.
fn remove_old(
    dir: &Path,
    live: &Path,
    files: Vec<(u64, PathBuf)>,
    keep: SignedDuration,
    now: Timestamp,
) -> io::Result<()> {
    let mut events = Vec::new();
    let (mut old_files, mut old_events) = (Vec::new(), 0);
    let mut is_old = true;
    for (_, path) in files {
        let Some(file) = open_to_read(&path)? else { continue };
        let found = events_in(file)?;
        // Where nothing can be read, a newer kitfs may have written.
        let last = match found.iter().map(|event| event.time).max() {
            Some(last) => last,
            None => Timestamp::try_from(fs::metadata(&path)?.modified()?).unwrap_or(now),
        };
        is_old &= now.duration_since(last) > keep;
        events.extend(found);
        if is_old {
            old_files.push(path);
            old_events = events.len();
        }
    }
    if old_files.is_empty() {
        return Ok(());
    }
    let old: Vec<Event> = events[..old_events].to_vec();
    events.sort_by_key(|event| event.time);
    let open = served::spans(&events).into_iter().filter(|span| span.until == served::Until::Open);
    let carried: Vec<Event> = open.map(|span| span.event).filter(|event| old.contains(event)).collect();
    if !carried.is_empty() {
        write(dir, live, &carried)?;
    }
    old_files.iter().try_for_each(fs::remove_file)
}
