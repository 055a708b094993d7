//! Checking every file of the cache, and repairing what is damaged: what `kitfs cache verify` does.
//!
//! It is safe beside mounts that are running. A check takes the shared lock that a reader takes. A repair moves a file
//! away, so that whoever has it open keeps what it has, and whoever opens it next finds nothing and fetches. Only of a
//! partial file that nobody has open are single chunks taken back: a process that verified a chunk before it was damaged
//! would serve the hole. Content that a running mount has open stays open there: it finds the new file when it opens
//! anew.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::{FallocateFlags, FlockOperation, OFlags, flock};

use super::damage::{each_block, name_of};
use super::files::{Identity, identity, identity_of, on_disk, open_existing, other_owner};
use super::format::{self, Format};
use super::kits::{self, name_of_kit, name_of_served};
use super::partial::has_hole;
use super::small::{DIGEST_LEN, LastKnown};
use super::usage::Area;
use super::{Cache, CacheError, evict, io_error};
use crate::digest::{Digest, StreamHasher};
use crate::object::{CHUNK_SIZE, ChunkList, ObjectDigest};

/// How long after a chunk was found wrong it is looked at again: nobody takes longer to write one.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// What a name led to, what belongs to a kit, and the chunk digests of any file up to 32 TiB are shorter.
const SHORT: u64 = 1 << 30;
/// How often a file is checked that is replaced meanwhile.
const REPLACED: usize = 3;

/// A file of the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheFile {
    path: PathBuf,
    kind: Kind,
    bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Format,
    /// Nothing is in it; it is there for its lock.
    Lock,
    Object(ObjectDigest),
    Partial(ObjectDigest),
    List(ObjectDigest),
    Blob(Digest),
    Index,
    Tag(Digest),
    Kit(Digest),
    Served(Digest),
    /// Nothing of ours has such a name, or lies there.
    Stray,
}

/// How a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// All of it is right.
    Right,
    /// Not all of it is.
    Damaged(Damage),
    /// It is being written, so that what is in it tells nothing yet.
    InUse,
    /// Nothing is known that would tell: a partial file, or a chunk list, without the other and without an index.
    Unknown,
    /// It has gone since it was listed.
    Gone,
}

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// In words.
    pub what: String,
    file: Option<Identity>,
    /// Of a partial file: the chunks, and what they should hash to.
    chunks: Vec<(u64, Digest)>,
}

/// How a damaged file was repaired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// It was set aside; what it was for is fetched when it is wanted.
    SetAside,
    /// So many chunks of a partial file were taken back.
    Chunks(usize),
    /// It was written anew.
    Written,
    /// There was nothing left to do: it is gone or was replaced.
    Nothing,
}

impl CacheFile {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// About how many bytes a check reads and tells of.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What it is, in a word.
    pub fn what(&self) -> &'static str {
        match self.kind {
            Kind::Format => "format",
            Kind::Lock => "lock",
            Kind::Object(_) => "object",
            Kind::Partial(_) => "partial",
            Kind::List(_) => "chunk list",
            Kind::Blob(_) => "blob",
            Kind::Index => "index",
            Kind::Tag(_) => "tag",
            Kind::Kit(_) => "kit",
            Kind::Served(_) => "served",
            Kind::Stray => "stray",
        }
    }
}

impl Damage {
    fn new(what: impl Into<String>, file: Option<Identity>) -> Self {
        Self { what: what.into(), file, chunks: Vec::new() }
    }
}

impl Cache {
    /// Every file that can be checked: all but what is staged, set aside or left over.
    pub fn files(&self) -> Result<Vec<CacheFile>, CacheError> {
        let format = self.root.join(format::NAME);
        let mut files = vec![CacheFile { path: format, kind: Kind::Format, bytes: 0 }];
        let object = |name: &str| name.parse().ok().map(Kind::Object);
        let partial = |name: &str| match name.strip_suffix(".list") {
            Some(name) => name.parse().ok().map(Kind::List),
            None => name.parse().ok().map(Kind::Partial),
        };
        fn digest(name: &str) -> Option<Digest> {
            Digest::from_hex(name).ok()
        }
        self.add_files(&mut files, Area::Blobs, |name| digest(name).map(Kind::Blob))?;
        self.add_files(&mut files, Area::Indexes, |name| digest(name).map(|_| Kind::Index))?;
        self.add_files(&mut files, Area::Objects, object)?;
        self.add_files(&mut files, Area::Partial, partial)?;
        self.add_files(&mut files, Area::Tags, |name| digest(name).map(Kind::Tag))?;
        self.add_files(&mut files, Area::Kits, |name| digest(name).map(Kind::Kit))?;
        self.add_files(&mut files, Area::Served, |name| digest(name).map(Kind::Served))?;
        let locks = [kits::LOCK, evict::LOCK].map(|name| self.root.join(name));
        let locks = locks.into_iter().filter(|path| fs::symlink_metadata(path).is_ok());
        files.extend(locks.map(|path| CacheFile { path, kind: Kind::Lock, bytes: 0 }));
        Ok(files)
    }

    fn add_files(
        &self,
        files: &mut Vec<CacheFile>,
        area: Area,
        kind: impl Fn(&str) -> Option<Kind>,
    ) -> Result<(), CacheError> {
        let first = files.len();
        let root = self.root.join(area.dir());
        for dir in fs::read_dir(&root).map_err(io_error("read", &root))? {
            let dir = dir.map_err(io_error("read", &root))?;
            if !dir.file_type().is_ok_and(|kind| kind.is_dir()) {
                files.push(CacheFile { path: dir.path(), kind: Kind::Stray, bytes: 0 });
                continue;
            }
            for entry in fs::read_dir(dir.path()).map_err(io_error("read", &dir.path()))? {
                let entry = entry.map_err(io_error("read", &dir.path()))?;
                let name = entry.file_name().to_string_lossy().into_owned();
                if name.ends_with(".tmp") || name.ends_with(".new") {
                    continue;
                }
                let is_here = name.get(..2).is_some_and(|start| *dir.file_name() == *start);
                let kind = kind(&name).filter(|_| is_here).unwrap_or(Kind::Stray);
                let Ok(found) = entry.metadata() else { continue };
                let len = match kind {
                    // Too small to tell of.
                    Kind::Stray | Kind::List(_) | Kind::Tag(_) | Kind::Kit(_) | Kind::Served(_) => 0,
                    // Holes are not read.
                    Kind::Partial(_) => found.len().min(on_disk(&found)),
                    _ => found.len(),
                };
                files.push(CacheFile { path: entry.path(), kind, bytes: len });
            }
        }
        files[first..].sort_unstable_by(|one, other| one.path.cmp(&other.path));
        Ok(())
    }

    /// Checks a file. `lists` finds the chunk digests of an object that has none beside its partial file; `told` hears how
    /// many bytes were read.
    pub fn check(
        &self,
        listed: &CacheFile,
        lists: &dyn Fn(&ObjectDigest) -> Option<ChunkList<Bytes>>,
        told: &dyn Fn(u64),
    ) -> Result<Health, CacheError> {
        for _ in 0..REPLACED {
            let health = self.check_once(listed, lists, told)?;
            match &health {
                // A right file may have been put in its place meanwhile.
                Health::Damaged(damage) if damage.file != identity_of(&listed.path) => {}
                _ => return Ok(health),
            }
        }
        Ok(Health::InUse)
    }

    fn check_once(
        &self,
        listed: &CacheFile,
        lists: &dyn Fn(&ObjectDigest) -> Option<ChunkList<Bytes>>,
        told: &dyn Fn(u64),
    ) -> Result<Health, CacheError> {
        let path = &listed.path;
        let Ok(named) = fs::symlink_metadata(path) else {
            let is_missing_format = listed.kind == Kind::Format;
            let missing = || Health::Damaged(Damage::new("is missing", None));
            return Ok(if is_missing_format { missing() } else { Health::Gone });
        };
        let damaged = |what: String| Ok(Health::Damaged(Damage::new(what, Some(identity(&named)))));
        if let Some(owner) = other_owner(&named) {
            // Who can still change it, however right it is now.
            return damaged(format!("belongs to user {owner}"));
        }
        if listed.kind == Kind::Format {
            return match format::look(&self.root)? {
                Format::Damaged(found) => damaged(found),
                _ => Ok(Health::Right),
            };
        }
        if listed.kind == Kind::Stray {
            return damaged("is nothing that kitfs makes".to_owned());
        }
        if !named.is_file() {
            return damaged("is not a file".to_owned());
        }
        if listed.kind == Kind::Lock {
            return Ok(Health::Right);
        }
        let file = match open_existing(path) {
            Ok(Some(file)) => file,
            Ok(None) => return Ok(Health::Gone),
            Err(error) if is_of_file(&error) => return damaged(format!("can't be opened: {error}")),
            Err(error) => return Err(io_error("open", path)(error)),
        };
        if matches!(listed.kind, Kind::Object(_) | Kind::Partial(_))
            && flock(&file, FlockOperation::NonBlockingLockShared) == Err(rustix::io::Errno::WOULDBLOCK)
        {
            // It is about to go.
            return Ok(Health::InUse);
        }
        let len = file.metadata().map_err(io_error("stat", path))?.len();
        let judged = match listed.kind {
            Kind::Partial(name) => self.judge_partial(&file, len, &name, lists, told),
            Kind::List(name) => self.judge_list(&file, path, &name, lists),
            kind => judge(&file, len, kind, told).map(|wrong| wrong.map_or(Health::Right, damage_of)),
        };
        match judged {
            Ok(Health::Damaged(damage)) => Ok(Health::Damaged(Damage { file: Some(identity(&named)), ..damage })),
            Ok(health) => Ok(health),
            Err(error) => damaged(format!("can't be read: {error}")),
        }
    }

    fn judge_partial(
        &self,
        file: &File,
        len: u64,
        name: &ObjectDigest,
        lists: &dyn Fn(&ObjectDigest) -> Option<ChunkList<Bytes>>,
        told: &dyn Fn(u64),
    ) -> io::Result<Health> {
        let beside = self.chunk_list(name, len).ok().flatten();
        let Some(list) = beside.or_else(|| lists(name)).filter(|list| list.object() == *name) else {
            return Ok(Health::Unknown);
        };
        if len == 0 {
            // Whoever made it was killed before it got its size. Nothing is in it that could count.
            return Ok(Health::Right);
        }
        if len != list.size() {
            // Who makes it gives it its size next.
            let is_held = !is_free(file);
            let what = format!("has {len} bytes, and its content {}", list.size());
            return Ok(if is_held { Health::InUse } else { damage_of(what) });
        }
        let mut suspects = Vec::new();
        for chunk in 0..list.len() {
            let (Some(range), Some(expected)) = (list.range(chunk), list.digest(chunk)) else { break };
            if let Some(found) = digest_of(file, &range)? {
                told(range.end - range.start);
                if found != expected {
                    suspects.push((chunk, range, expected, found));
                }
            }
        }
        if suspects.is_empty() {
            return Ok(Health::Right);
        }
        std::thread::sleep(LOOK_AGAIN);
        let (mut chunks, mut is_written) = (Vec::new(), false);
        for (chunk, range, expected, before) in suspects {
            match digest_of(file, &range)? {
                Some(found) if found == before => chunks.push((chunk, expected)),
                Some(found) if found != expected => is_written = true,
                Some(_) | None => {}
            }
        }
        Ok(match chunks.len() {
            0 if is_written => Health::InUse,
            0 => Health::Right,
            count => {
                let what = format!("{count} of {} chunks are not what they should be", list.len());
                Health::Damaged(Damage { what, file: None, chunks })
            }
        })
    }

    fn judge_list(
        &self,
        file: &File,
        path: &Path,
        name: &ObjectDigest,
        lists: &dyn Fn(&ObjectDigest) -> Option<ChunkList<Bytes>>,
    ) -> io::Result<Health> {
        let bytes = read_short(file)?;
        let fits = |size| ChunkList::new(size, &bytes).is_some_and(|list| list.object() == *name);
        // It says nothing of the size, which the object's name covers.
        let sizes = [path.with_extension(""), self.spread("objects", &name.hex())];
        let sizes = sizes.iter().filter_map(|path| fs::symlink_metadata(path).ok()).map(|found| found.len());
        let sizes: Vec<u64> = sizes.chain(lists(name).map(|list| list.size())).collect();
        Ok(match sizes.as_slice() {
            sizes if sizes.iter().any(|size| fits(*size)) => Health::Right,
            // Its partial file is about to get its size.
            [] | [0] => Health::Unknown,
            _ => damage_of("is not the list that its name stands for"),
        })
    }

    /// Repairs what [`Cache::check`] found damaged.
    pub fn repair(&self, listed: &CacheFile, damage: &Damage) -> Result<Repair, CacheError> {
        if damage.file != identity_of(&listed.path) {
            return Ok(Repair::Nothing);
        }
        if !damage.chunks.is_empty()
            && let Some(count) = take_back(&listed.path, damage)?
        {
            tracing::warn!(path = %listed.path.display(), count, "cache: damaged chunks were taken back");
            return Ok(Repair::Chunks(count));
        }
        if damage.file.is_some() {
            self.quarantine(&listed.path, &damage.what)?;
        }
        if listed.kind == Kind::Format {
            self.write_format()?;
            return Ok(Repair::Written);
        }
        Ok(Repair::SetAside)
    }
}

fn damage_of(what: impl Into<String>) -> Health {
    Health::Damaged(Damage::new(what, None))
}

/// What is wrong with a whole file, if anything is.
fn judge(file: &File, len: u64, kind: Kind, told: &dyn Fn(u64)) -> io::Result<Option<String>> {
    let named = |expected: Digest, found: Option<Digest>| {
        (found != Some(expected)).then(|| "is not what its name stands for".to_owned())
    };
    Ok(match kind {
        Kind::Object(name) => {
            let found = name_of(file, len, told)?;
            (found != name).then(|| format!("its content is that of object {found}"))
        }
        Kind::Blob(digest) => {
            let found = hash(file, 0..len, told)?;
            (found != digest).then(|| format!("its digest is {found}"))
        }
        Kind::Index => {
            let start = (DIGEST_LEN as u64).min(len);
            let mut stated = Vec::new();
            file.take(start).read_to_end(&mut stated)?;
            let found = hash(file, start..len, told)?;
            (stated != found.as_bytes()).then(|| "its digest does not hold".to_owned())
        }
        Kind::Tag(name) => named(name, LastKnown::name_of(&read_short(file)?)),
        Kind::Kit(name) => named(name, name_of_kit(&read_short(file)?)),
        Kind::Served(name) => named(name, name_of_served(&read_short(file)?)),
        Kind::Format | Kind::Lock | Kind::Partial(_) | Kind::List(_) | Kind::Stray => None,
    })
}

fn hash(file: &File, range: Range<u64>, told: &dyn Fn(u64)) -> io::Result<Digest> {
    let mut hasher = StreamHasher::new();
    each_block(file, range, |block| {
        hasher.update(block);
        told(block.len() as u64);
    })?;
    Ok(hasher.digest())
}

fn read_short(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(SHORT).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The digest of a range; `None` where any of it is a hole.
fn digest_of(file: &File, range: &Range<u64>) -> io::Result<Option<Digest>> {
    if has_hole(file, range) {
        return Ok(None);
    }
    hash(file, range.clone(), &|_| ()).map(Some)
}

/// Whether nobody else has a file open that is locked by who has it open. What lock we had on it goes.
fn is_free(file: &File) -> bool {
    let is_free = flock(file, FlockOperation::NonBlockingLockExclusive).is_ok();
    let _ = flock(file, FlockOperation::Unlock);
    is_free
}

/// Whether it is the file that can't be had, and not the system that has too much to do: the disk failed, or somebody took
/// our right to read it.
fn is_of_file(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::IO, Errno::ILSEQ, Errno::BADMSG, Errno::ACCESS, Errno::PERM]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// Makes holes of damaged chunks, if nobody has the file open; how many were damaged still. `None` where it is open, or
/// its file system knows no holes.
fn take_back(path: &Path, damage: &Damage) -> Result<Option<usize>, CacheError> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    // Read-only, it is no file that is filled.
    let Ok(file) = File::options().read(true).write(true).custom_flags(flags).open(path) else { return Ok(None) };
    let found = file.metadata().map_err(io_error("stat", path))?;
    let is_alone = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
    if !is_alone || Some(identity(&found)) != damage.file {
        return Ok(None);
    }
    let mut count = 0;
    for (chunk, expected) in &damage.chunks {
        let start = chunk * u64::from(CHUNK_SIZE);
        let range = start..found.len().min(start + u64::from(CHUNK_SIZE));
        // Somebody may have written it again meanwhile.
        if range.is_empty() || digest_of(&file, &range).is_ok_and(|found| found.is_none_or(|found| found == *expected))
        {
            continue;
        }
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&file, hole, start, range.end - start) {
            Ok(()) => count += 1,
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => return Ok(None),
            Err(error) => return Err(io_error("punch a hole into", path)(error.into())),
        }
    }
    file.sync_data().map_err(io_error("sync", path))?;
    Ok(Some(count))
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
