//! What a layer holds, before and after it was hashed.
//!
//! A [`Listing`] has one row for each path that the layer puts into the tree, sorted by path; a position in it names the
//! entry from then on. It comes from an index (verified) or from headers read by range (provisional). Whatever its
//! source, the same rules hold: entries lie in the layer's root or are parents of it, and links stay in the tree.

use std::sync::Arc;

use super::transfer::Transfer;
use super::{ArchiveError, FetchError};
use crate::archive::inflate::Inflater;
use crate::archive::stream::{Event, StreamWalker};
use crate::archive::walker::{Caps, Step, Walker};
use crate::archive::{Entry, EntryKind, listing};
use crate::modelkit::{Compression, Format, Layer};
use crate::path::TreePath;
use crate::tree::{Meta, NodeKind};

/// The first read of a layer: 64 KiB hold the headers of any parents, and all of a small layer.
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
    /// Paths in the kit, sorted, with the entries behind them.
    pub rows: Vec<(TreePath, Entry)>,
    /// Whether the layer's digest has held for them.
    pub verified: bool,
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
    /// Applies a layer's naming rule to its entries and checks where they lie.
    pub fn new(layer: &Layer, entries: Vec<Entry>, verified: bool) -> Result<Self, FetchError> {
        let rows = entries.into_iter().map(|entry| Ok((place(layer, &entry)?, entry)));
        let mut rows = rows.collect::<Result<Vec<_>, FetchError>>()?;
        if let Format::Raw { mode, mtime, .. } = layer.format {
            for (_, entry) in &mut rows {
                entry.mode = mode;
                entry.mtime = mtime;
            }
        }
        Ok(Self { rows, verified })
    }

    /// The rows in the tree's terms.
    pub fn metas(&self) -> impl Iterator<Item = (TreePath, Meta)> + '_ {
        self.rows.iter().map(|(path, entry)| (path.clone(), meta(entry)))
    }

    /// The first difference from `other`, in words; what a verified listing is compared with.
    pub fn difference(&self, other: &Listing) -> Option<String> {
        for ((path, mine), (told, theirs)) in self.rows.iter().zip(&other.rows) {
            if path != told {
                return Some(format!("it holds {path} where {told} was told"));
            }
            if mine != theirs {
                return Some(format!("{path}: {}", fields_that_differ(mine, theirs)));
            }
        }
        let (mine, theirs) = (self.rows.len(), other.rows.len());
        (mine != theirs).then(|| format!("{mine} entries, not {theirs}"))
    }
}

/// What an entry states otherwise than was told.
fn fields_that_differ(found: &Entry, told: &Entry) -> String {
    let kind = |entry: &Entry| match &entry.kind {
        EntryKind::File => "a file".to_owned(),
        EntryKind::Directory => "a directory".to_owned(),
        EntryKind::Symlink(target) => format!("a link to {:?}", String::from_utf8_lossy(target)),
    };
    let fields = [
        ("type", kind(found), kind(told)),
        ("mode", format!("{:04o}", found.mode), format!("{:04o}", told.mode)),
        ("uid", found.uid.to_string(), told.uid.to_string()),
        ("gid", found.gid.to_string(), told.gid.to_string()),
        ("mtime", found.mtime.to_string(), told.mtime.to_string()),
        ("size", found.size.to_string(), told.size.to_string()),
        ("offset", found.offset.to_string(), told.offset.to_string()),
        ("name in the archive", found.path.to_string(), told.path.to_string()),
    ];
    let differing = fields.iter().filter(|(_, found, told)| found != told);
    let words = differing.map(|(field, found, told)| format!("{field} {found}, and {told} was told"));
    words.collect::<Vec<_>>().join("; ")
}

/// An entry in the tree's terms.
pub fn meta(entry: &Entry) -> Meta {
    let (kind, size) = match &entry.kind {
        EntryKind::File => (NodeKind::File, entry.size),
        EntryKind::Directory => (NodeKind::Directory, 0),
        EntryKind::Symlink(target) => (NodeKind::Symlink, target.len() as u64),
    };
    Meta { kind, mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: entry.mtime, size }
}

/// Where an entry lies in the kit, or why it may not lie there.
fn place(layer: &Layer, entry: &Entry) -> Result<TreePath, FetchError> {
    let outside =
        |path: &TreePath| FetchError::OutsideRoot { layer: layer.digest, path: path.clone(), root: layer.root.clone() };
    if matches!(layer.format, Format::Raw { .. }) {
        return Ok(layer.root.clone());
    }
    let path = layer.prefix.join(&entry.path).map_err(|_| outside(&entry.path))?;
    let is_parent = entry.kind == EntryKind::Directory && layer.root.is_within(&path);
    if !is_parent && !path.is_within(&layer.root) {
        return Err(outside(&path));
    }
    if let EntryKind::Symlink(target) = &entry.kind {
        let mut joined = path.parent().unwrap_or_default().as_bytes().to_vec();
        joined.push(b'/');
        joined.extend_from_slice(target);
        // `..` after a name could climb from wherever a link of that name leads to.
        let mut parts = target.split(|byte| *byte == b'/').skip_while(|part| matches!(*part, b"" | b"." | b".."));
        let stays = !target.starts_with(b"/")
            && parts.all(|part| part != b"..")
            && TreePath::clean(joined.strip_prefix(b"/").unwrap_or(&joined)).is_ok();
        if !stays {
            let target = String::from_utf8_lossy(target).into_owned();
            return Err(FetchError::LinkLeaves { layer: layer.digest, path, target });
        }
    }
    Ok(path)
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
    // An uncompressed raw layer's size is in the manifest, which has been verified.
    Some(Listing::new(layer, vec![raw_entry(size)], layer.compression == Compression::None))
}

/// Says what a layer's root is, from its first bytes.
pub async fn probe(layer: &Layer, transfer: &Transfer) -> Result<Probe, FetchError> {
    if let Format::Raw { .. } = layer.format {
        return raw_listing(layer).map_or(Ok(Probe::Unknown), |listing| Ok(Probe::File(Arc::new(listing?))));
    }
    if layer.root.is_root() {
        return Ok(Probe::Directory(Vec::new()));
    }
    let window = transfer.head(PROBE.min(layer.size)).await?;
    let mut headers = match layer.compression {
        Compression::None => walked(layer, &window)?,
        Compression::Gzip | Compression::Zstd => inflated(layer, &window)?,
    };
    let mut dirs = Vec::new();
    for entry in headers.drain(..) {
        let path = place(layer, &entry)?;
        if path == layer.root && entry.kind != EntryKind::Directory {
            let mut entries = dirs;
            entries.push(entry);
            return Ok(Probe::File(Arc::new(listed(layer, entries)?)));
        }
        let decided = path.is_within(&layer.root);
        if entry.kind == EntryKind::Directory && layer.root.is_within(&path) {
            dirs.push(entry);
        }
        if decided {
            let metas = dirs.iter().map(|entry| Ok((place(layer, entry)?, meta(entry))));
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
    let sorted = listing::Listing::build(entries).map_err(|error| broken(layer, error))?;
    Listing::new(layer, sorted.into(), false)
}

fn broken(layer: &Layer, error: impl Into<ArchiveError>) -> FetchError {
    FetchError::Archive { layer: layer.digest, cause: error.into() }
}
