//! What a layer holds, before and after it was hashed.
//!
//! A [`Listing`] has one row for each path that the layer puts into the tree, sorted by path; a position in it names the
//! entry from then on. It comes from an index (verified), which is read where it lies, or from headers read by range
//! (provisional), which are packed. Whatever its source, the same rules hold: entries lie in the layer's root or are parents
//! of it, and links stay in the tree.

use std::borrow::Cow;
use std::sync::Arc;

use super::transfer::Transfer;
use super::{ArchiveError, FetchError};
use crate::archive::index::{Head, RowKind};
use crate::archive::inflate::Inflater;
use crate::archive::stream::{Event, StreamWalker};
use crate::archive::walker::{Caps, Step, Walker};
use crate::archive::{Entry, EntryKind, EntryRef, listing};
use crate::modelkit::{Compression, Format, Layer};
use crate::path::{MAX_PATH, TreePath, is_within};
use crate::tree::{Meta, NodeKind};

/// The first read of a layer: the headers of eight parents, long names and all. With the answer's own header it is what a
/// server sends before the first acknowledgement (ten segments), so that it takes one round trip and not three.
pub(super) const BEGINNING: u64 = 12 << 10;
/// What is read of a layer where that does not tell what its root is, and where its listing begins: 64 KiB hold the headers
/// of any parents, and all of a small layer.
const PROBE: u64 = 64 << 10;
/// A hop between big files reads this much: one header with its PAX records.
const HOP: u64 = 4 << 10;
/// Files below this size are cheaper to stream past than to hop over: a round trip of 10 ms moves 1 MiB at 100 MB/s.
const DENSE: u64 = 256 << 10;
/// So many hops are made before their density is judged.
const JUDGED_AFTER: u64 = 16;
/// A layer up to this size is fetched whole for its listing.
pub const SMALL_LAYER: u64 = 1 << 20;

/// A layer's rows in the tree.
#[derive(Debug, Clone)]
pub struct Listing {
    rows: Rows,
    place: Place,
}

#[derive(Debug, Clone)]
enum Rows {
    /// What headers told.
    Told(Arc<listing::Listing>),
    /// What an index has.
    Indexed(Head),
}

/// Where a layer's entries lie in the kit.
#[derive(Debug, Clone)]
enum Place {
    /// Below this path.
    Below(TreePath),
    /// The only one at this path, with the mode and time that the manifest states.
    At { path: TreePath, mode: u32, mtime: i64 },
}

/// What a first small read tells.
#[derive(Debug, Clone)]
pub enum Probe {
    /// The layer is one file (or link): it is listed.
    File(Arc<Listing>),
    /// The layer is a directory; its parents and itself as far as headers named them.
    Directory(Vec<(TreePath, Meta)>),
    /// It can't be told without the whole layer.
    Unknown,
}

/// How a listing by headers ended.
#[derive(Debug)]
pub enum Hopped {
    /// All headers were read.
    Listed(Listing),
    /// Fetching the layer is the cheaper way.
    Dense,
}

impl Listing {
    /// What headers told of a layer, if it may lie where it does.
    pub fn told(layer: &Layer, rows: listing::Listing) -> Result<Self, FetchError> {
        Self::new(layer, Rows::Told(Arc::new(rows))).checked(layer)
    }

    /// What the index of a layer has, if it may lie where it does.
    pub fn indexed(layer: &Layer, head: &Head) -> Result<Self, FetchError> {
        Self::of_checked(layer, head).checked(layer)
    }

    /// The same of an index that was looked through before.
    pub fn of_checked(layer: &Layer, head: &Head) -> Self {
        Self::new(layer, Rows::Indexed(head.clone()))
    }

    fn new(layer: &Layer, rows: Rows) -> Self {
        let place = match layer.format {
            Format::Tar => Place::Below(layer.prefix.clone()),
            Format::Raw { mode, mtime, .. } => Place::At { path: layer.root.clone(), mode, mtime },
        };
        Self { rows, place }
    }

    fn checked(self, layer: &Layer) -> Result<Self, FetchError> {
        (0..self.len()).filter_map(|at| self.entry(at)).try_for_each(|entry| place(layer, &entry).map(drop))?;
        Ok(self)
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        match &self.rows {
            Rows::Told(rows) => rows.len(),
            Rows::Indexed(head) => head.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The entry of a row. Its path is the one in the archive.
    pub fn entry(&self, row: usize) -> Option<EntryRef<'_>> {
        let entry = match &self.rows {
            Rows::Told(rows) => rows.row(row),
            Rows::Indexed(head) => head.row(row).map(|row| row.entry()),
        };
        match self.place {
            Place::Below(_) => entry,
            Place::At { mode, mtime, .. } => entry.map(|entry| EntryRef { mode, mtime, ..entry }),
        }
    }

    /// The rows in order: paths in the kit, and the entries behind them.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = (Cow<'_, [u8]>, EntryRef<'_>)> {
        let row = |at| {
            let entry = self.entry(at).expect("a row of as many as there are");
            (self.path_of(&entry), entry)
        };
        (0..self.len()).map(row)
    }

    fn path_of<'a>(&'a self, entry: &EntryRef<'a>) -> Cow<'a, [u8]> {
        match &self.place {
            Place::Below(prefix) => joined(prefix, entry.path),
            Place::At { path, .. } => path.as_bytes().into(),
        }
    }

    /// The row of a path in the kit.
    pub fn find(&self, path: &TreePath) -> Option<usize> {
        let path = match &self.place {
            Place::Below(prefix) if is_within(path.as_bytes(), prefix.as_bytes()) => {
                let below = &path.as_bytes()[prefix.as_bytes().len()..];
                below.strip_prefix(b"/").unwrap_or(below)
            }
            Place::Below(_) => return None,
            Place::At { path: only, .. } => return (only == path).then_some(0),
        };
        match &self.rows {
            Rows::Told(rows) => rows.find(path),
            Rows::Indexed(head) => head.find(path),
        }
    }

    /// The rows in the tree's terms.
    pub fn metas(&self) -> impl ExactSizeIterator<Item = (Cow<'_, [u8]>, Meta)> {
        self.rows().map(|(path, entry)| (path, meta(&entry)))
    }

    /// The first difference from `other`, in words; what a verified listing is compared with.
    pub fn difference(&self, other: &Listing) -> Option<String> {
        let shown = String::from_utf8_lossy;
        for ((path, mine), (told, theirs)) in self.rows().zip(other.rows()) {
            if path != told {
                return Some(format!("it holds {} where {} was told", shown(&path), shown(&told)));
            }
            if mine != theirs {
                return Some(format!("{}: {}", shown(&path), fields_that_differ(&mine, &theirs)));
            }
        }
        let (mine, theirs) = (self.len(), other.len());
        (mine != theirs).then(|| format!("{mine} entries, not {theirs}"))
    }
}

/// What an entry states otherwise than was told.
fn fields_that_differ(found: &EntryRef<'_>, told: &EntryRef<'_>) -> String {
    let kind = |entry: &EntryRef<'_>| match entry.kind {
        RowKind::File => "a file".to_owned(),
        RowKind::Directory => "a directory".to_owned(),
        RowKind::Symlink(target) => format!("a link to {:?}", String::from_utf8_lossy(target)),
    };
    let path = |entry: &EntryRef<'_>| String::from_utf8_lossy(entry.path).into_owned();
    let fields = [
        ("type", kind(found), kind(told)),
        ("mode", format!("{:04o}", found.mode), format!("{:04o}", told.mode)),
        ("uid", found.uid.to_string(), told.uid.to_string()),
        ("gid", found.gid.to_string(), told.gid.to_string()),
        ("mtime", found.mtime.to_string(), told.mtime.to_string()),
        ("size", found.size.to_string(), told.size.to_string()),
        ("offset", found.offset.to_string(), told.offset.to_string()),
        ("name in the archive", path(found), path(told)),
    ];
    let differing = fields.iter().filter(|(_, found, told)| found != told);
    let words = differing.map(|(field, found, told)| format!("{field} {found}, and {told} was told"));
    words.collect::<Vec<_>>().join("; ")
}

/// An entry in the tree's terms.
pub fn meta(entry: &EntryRef<'_>) -> Meta {
    let (kind, size) = match entry.kind {
        RowKind::File => (NodeKind::File, entry.size),
        RowKind::Directory => (NodeKind::Directory, 0),
        RowKind::Symlink(target) => (NodeKind::Symlink, target.len() as u64),
    };
    Meta { kind, mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: entry.mtime, size }
}

/// A path below a prefix.
fn joined<'a>(prefix: &TreePath, path: &'a [u8]) -> Cow<'a, [u8]> {
    match (prefix.as_bytes(), path) {
        (b"", path) => path.into(),
        (prefix, b"") => prefix.to_vec().into(),
        (prefix, path) => [prefix, b"/", path].concat().into(),
    }
}

/// Where an entry lies in the kit, or why it may not lie there.
fn place<'a>(layer: &Layer, entry: &EntryRef<'a>) -> Result<Cow<'a, [u8]>, FetchError> {
    let outside = |path: &[u8]| {
        let path = TreePath::from_clean(path).unwrap_or_default();
        FetchError::OutsideRoot { layer: layer.digest, path, root: layer.root.clone() }
    };
    let root = layer.root.as_bytes();
    if matches!(layer.format, Format::Raw { .. }) {
        return Ok(root.to_vec().into());
    }
    let path = joined(&layer.prefix, entry.path);
    if path.len() > MAX_PATH {
        return Err(outside(entry.path));
    }
    let is_parent = entry.kind == RowKind::Directory && is_within(root, &path);
    if !is_parent && !is_within(&path, root) {
        return Err(outside(&path));
    }
    if let RowKind::Symlink(target) = entry.kind {
        let dir = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
        let joined = [&path[..dir], b"/", target].concat();
        // `..` after a name could climb from wherever a link of that name leads to.
        let mut parts = target.split(|byte| *byte == b'/').skip_while(|part| matches!(*part, b"" | b"." | b".."));
        let stays = !target.starts_with(b"/")
            && parts.all(|part| part != b"..")
            && TreePath::clean(joined.strip_prefix(b"/").unwrap_or(&joined)).is_ok();
        if !stays {
            let (layer, path) = (layer.digest, TreePath::from_clean(&path).unwrap_or_default());
            return Err(FetchError::LinkLeaves { layer, path, target: String::from_utf8_lossy(target).into_owned() });
        }
    }
    Ok(path)
}

fn path_of(layer: &Layer, entry: &EntryRef<'_>) -> Result<TreePath, FetchError> {
    Ok(TreePath::from_clean(&place(layer, entry)?).unwrap_or_default())
}

/// The single entry of a raw layer of `size` bytes: the same whatever the kit calls the file, so that its index is.
pub fn raw_entry(size: u64) -> Entry {
    Entry { path: TreePath::root(), kind: EntryKind::File, mode: 0o644, uid: 0, gid: 0, mtime: 0, size, offset: 0 }
}

/// What a raw layer's listing is from the plan alone, if that tells its size.
fn raw_listing(layer: &Layer) -> Option<Result<Listing, FetchError>> {
    let Format::Raw { stated_size, .. } = layer.format else { return None };
    let size = match layer.compression {
        Compression::None => layer.size,
        Compression::Gzip | Compression::Zstd => stated_size?,
    };
    Some(listed(layer, vec![raw_entry(size)]))
}

/// Says what a layer's root is, from its first bytes.
pub async fn probe(layer: &Layer, transfer: &Transfer) -> Result<Probe, FetchError> {
    if let Format::Raw { .. } = layer.format {
        return raw_listing(layer).map_or(Ok(Probe::Unknown), |listing| Ok(Probe::File(Arc::new(listing?))));
    }
    if layer.root.is_root() {
        return Ok(Probe::Directory(Vec::new()));
    }
    for len in [BEGINNING, PROBE] {
        let window = transfer.head(len.min(layer.size)).await?;
        let probe = probe_in(layer, &window)?;
        if !matches!(probe, Probe::Unknown) || layer.size <= len {
            return Ok(probe);
        }
    }
    Ok(Probe::Unknown)
}

/// What the first bytes of a tar tell of its root.
fn probe_in(layer: &Layer, window: &[u8]) -> Result<Probe, FetchError> {
    let headers = match layer.compression {
        Compression::None => walked(layer, window)?,
        Compression::Gzip | Compression::Zstd => inflated(layer, window)?,
    };
    let mut dirs = Vec::new();
    for entry in headers {
        let path = place(layer, &entry.by_ref())?.into_owned();
        let root = layer.root.as_bytes();
        if path == root && entry.kind != EntryKind::Directory {
            let mut entries = dirs;
            entries.push(entry);
            return Ok(Probe::File(Arc::new(listed(layer, entries)?)));
        }
        if entry.kind == EntryKind::Directory && is_within(root, &path) {
            dirs.push(entry);
        }
        if is_within(&path, root) {
            let metas = dirs.iter().map(Entry::by_ref).map(|dir| Ok((path_of(layer, &dir)?, meta(&dir))));
            return Ok(Probe::Directory(metas.collect::<Result<_, FetchError>>()?));
        }
    }
    Ok(Probe::Unknown)
}

/// Headers in the first bytes of an uncompressed layer, until they tell what the root is.
fn walked(layer: &Layer, window: &[u8]) -> Result<Vec<Entry>, FetchError> {
    let mut walker = Walker::new(Some(layer.size), Caps::default());
    let mut found = Vec::new();
    while let Step::Entry(entry) = walker.step(0, window).map_err(|error| broken(layer, error))? {
        found.push(entry);
    }
    Ok(found)
}

/// The same for a compressed layer. What a window cuts off is no error here; the fill finds what is.
fn inflated(layer: &Layer, window: &[u8]) -> Result<Vec<Entry>, FetchError> {
    let mut walker = StreamWalker::new(None, Caps::default());
    let mut found = Vec::new();
    // A window of 64 KiB inflates to at most 64 MiB of gzip; more is not needed to see a root.
    let mut inflater = Inflater::new(layer.compression, 64 << 20).map_err(|error| broken(layer, error))?;
    let fed = inflater.feed(window, &mut |mut bytes: &[u8]| {
        while let Some(event) = walker.next(&mut bytes)? {
            if let Event::Entry(entry) = event {
                found.push(entry);
            }
        }
        Ok::<(), ArchiveError>(())
    });
    match fed {
        Ok(()) => Ok(found),
        Err(_) if !found.is_empty() => Ok(found),
        Err(error) => Err(broken(layer, error)),
    }
}

/// Lists an uncompressed tar by its headers alone, where that is cheaper than to fetch it.
pub async fn hop(layer: &Layer, transfer: &Transfer) -> Result<Hopped, FetchError> {
    if layer.compression != Compression::None || layer.size <= SMALL_LAYER {
        return Ok(Hopped::Dense);
    }
    let dense = |hops, offset| hops > JUDGED_AFTER && offset / hops < DENSE;
    Ok(walk(layer, transfer, dense).await?.map_or(Hopped::Dense, Hopped::Listed))
}

/// Lists an uncompressed tar by its headers alone, whatever that costs.
pub async fn hop_through(layer: &Layer, transfer: &Transfer) -> Result<Listing, FetchError> {
    let listed = walk(layer, transfer, |_, _| false).await?;
    listed.ok_or(FetchError::NoRandomAccess { layer: layer.digest })
}

/// Reads header after header; `None` where `give_up`, told of the hops made and the bytes passed, says so.
async fn walk(
    layer: &Layer,
    transfer: &Transfer,
    give_up: impl Fn(u64, u64) -> bool,
) -> Result<Option<Listing>, FetchError> {
    let mut walker = Walker::new(Some(layer.size), Caps::default());
    let mut entries = Vec::new();
    let mut window = (0, transfer.head(PROBE.min(layer.size)).await?);
    let mut hops = 0;
    loop {
        match walker.step(window.0, &window.1).map_err(|error| broken(layer, error))? {
            Step::Entry(entry) => entries.push(entry),
            Step::End { .. } => return listed(layer, entries).map(Some),
            Step::Need { offset, len } => {
                hops += 1;
                if give_up(hops, offset) {
                    return Ok(None);
                }
                let end = layer.size.min(offset.saturating_add(len.max(HOP)));
                let pieces = match transfer.range(offset..end).await {
                    // Where there are no ranges there is no hopping.
                    Err(error) if error.ignores_ranges() => return Ok(None),
                    pieces => pieces?,
                };
                let bytes = pieces.iter().flat_map(|piece| piece.peek().iter().copied()).collect();
                window = (offset, bytes);
            }
        }
    }
}

/// Sorted and checked rows from entries in archive order, not verified.
fn listed(layer: &Layer, entries: Vec<Entry>) -> Result<Listing, FetchError> {
    Listing::told(layer, listing::Listing::build(entries).map_err(|error| broken(layer, error))?)
}

fn broken(layer: &Layer, error: impl Into<ArchiveError>) -> FetchError {
    FetchError::Archive { layer: layer.digest, cause: error.into() }
}
