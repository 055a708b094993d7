//! The file system: what lookup, getattr, readdir, open and read answer. Knows nothing of FUSE.
//!
//! No method blocks a thread: it answers from memory or awaits. Waits for names end at the metadata deadline, in total;
//! waits for content when it makes no progress. Reads answer in full up to the end of the file, or with an error.
//!
//! Locks, none held across an await: those of `trees` and of `names`, which see, the first before the second; `at_hand`, the
//! contents of open files, and what `ways` notes are touched for a look or a note, while no other is held.

mod at_hand;
mod direct;
mod error;
mod files;
mod live;
mod names;
pub mod prefetch;
mod selection;
pub mod trees;
pub mod ways;
mod xattr;

use std::fs::File;
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use at_hand::AtHand;
pub use error::FsError;
pub use files::{Opened, ReadReply, Via};
use names::Names;
use prefetch::Prefetch;
pub use selection::{InvalidSelection, Selection};
use ways::{Allowed, Ways};

use crate::archive::index::RowKind;
use crate::fetch::listing::{Listing, Probe};
use crate::fetch::memory::Memory;
use crate::fetch::{Context, FetchError, Kit};
use crate::path::TreePath;
pub use crate::tree::NodeKind;
use crate::tree::{Conflict, Lookup, Meta, Need, NodeId, Origin, ROOT_INO, Tree};

/// How long the kernel may keep what never changes: names below the root, and attributes.
const LONG_TTL: Duration = Duration::from_secs(365 * 24 * 3600);
/// How long it may keep the names in the root and its attributes, which a switch to another kit changes: every path leads
/// through them, so that they would be asked for at each open and for each file that is listed.
const ROOT_TTL: Duration = Duration::from_secs(1);
/// Contradictions that are kept and logged; a hostile kit has as many as entries.
const CONFLICTS: usize = 100;
/// The block size that `statfs` counts in, and the longest name.
const BLOCK: u64 = 4096;

/// An inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ino(pub u64);

impl Ino {
    /// The root directory.
    pub const ROOT: Self = Self(ROOT_INO);
}

/// Attributes of a file, directory or link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attr {
    /// The inode number.
    pub ino: Ino,
    /// File, directory or link.
    pub kind: NodeKind,
    /// Bytes of content.
    pub size: u64,
    /// Permission bits, `& 0o7777`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since the epoch.
    pub mtime: i64,
    /// Link count.
    pub nlink: u32,
    /// How long this may be kept.
    pub ttl: Duration,
    /// How long it may be kept that the name stands for this.
    pub name_ttl: Duration,
}

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// Attributes of what the name stands for.
    pub attr: Attr,
    /// The name, `.` and `..` included.
    pub name: &'a [u8],
    /// The offset to go on from after this entry.
    pub next: u64,
}

/// How a directory was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenedDir {
    /// The handle.
    pub handle: u64,
    /// Whether the kernel may keep what it reads of it, for the next to open it too.
    pub keep_cache: bool,
}

/// What `statfs` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statfs {
    /// Blocks in total.
    pub blocks: u64,
    /// Free blocks: none.
    pub bfree: u64,
    /// Blocks for users: none.
    pub bavail: u64,
    /// Nodes known so far.
    pub files: u64,
    /// Free nodes: none.
    pub ffree: u64,
    /// Bytes of a block.
    pub bsize: u32,
    /// The longest name.
    pub namelen: u32,
}

/// Who owns the files and which modes they show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ownership {
    /// Owner of everything, unless `from_kit`.
    pub uid: u32,
    /// Group of everything, unless `from_kit`.
    pub gid: u32,
    /// Permission bits of files instead of the kit's.
    pub file_mode: Option<u32>,
    /// Permission bits of directories instead of the kit's.
    pub dir_mode: Option<u32>,
    /// Show the owners that the archives state.
    pub from_kit: bool,
    /// Others may look: files get `a+r`, directories `a+rx`, unless a mode is given.
    pub for_others: bool,
}

/// A kit's files and directories.
#[derive(Debug)]
pub struct Fs {
    kit: Kit,
    context: Context,
    ownership: Ownership,
    names: Arc<Names>,
    at_hand: AtHand,
    ways: Arc<Ways>,
    conflicts: Mutex<Vec<String>>,
    prefetch: RwLock<Option<Arc<Prefetch>>>,
}

impl Fs {
    /// Serves a kit whose layers have been probed into `tree`.
    pub fn new(kit: Kit, context: Context, tree: Tree, ownership: Ownership) -> Self {
        Self {
            kit,
            context,
            ownership,
            names: Arc::new(Names::new(tree)),
            at_hand: AtHand::new(),
            ways: Arc::new(Ways::new(Allowed::default(), false)),
            conflicts: Mutex::default(),
            prefetch: RwLock::default(),
        }
    }

    /// The same, read by the kernel in the ways that are allowed.
    pub fn read_in(mut self, allowed: Allowed) -> Self {
        self.ways = Arc::new(Ways::new(allowed, self.context.cache.rechecks()));
        self
    }

    /// The same, read as another kit's files in the same mount are.
    pub fn read_like(mut self, other: &Self) -> Self {
        self.ways = other.ways.clone();
        self
    }

    /// How files are read.
    pub fn ways(&self) -> &Arc<Ways> {
        &self.ways
    }

    /// Whether a node has this number.
    fn has(&self, ino: Ino) -> bool {
        self.tree().by_ino(ino.0).is_some()
    }

    /// A number for the root, apart from [`Ino::ROOT`], that tells this kit.
    fn root_number(&self) -> u64 {
        self.tree().root_number()
    }

    /// Hands on the names that are known by now, each with its directory.
    fn each_name(&self, mut take: impl FnMut(Ino, &[u8])) {
        let tree = self.tree();
        let mut dirs = vec![NodeId::ROOT];
        while let Some(dir) = dirs.pop() {
            let ino = Ino(tree.node(dir).ino);
            for child in tree.known_children(dir) {
                // The root is another kit's by now.
                if dir != NodeId::ROOT {
                    take(ino, tree.name(*child));
                }
                if tree.node(*child).meta.kind == NodeKind::Directory {
                    dirs.push(*child);
                }
            }
        }
    }

    /// Attributes of a directory that no layer names.
    fn skeleton_attr(&self) -> Attr {
        self.attr_of(&self.tree(), NodeId::ROOT)
    }

    /// A file of the cache, to ask what its file system can do.
    pub fn sample(&self) -> std::io::Result<File> {
        self.context.cache.sample()
    }

    /// The kit that is served.
    pub fn kit(&self) -> &Kit {
        &self.kit
    }

    /// Contradictions between layers that were found while listing them, in words: the first hundred.
    pub fn conflicts(&self) -> Vec<String> {
        self.conflicts.lock().unwrap_or_else(|held| held.into_inner()).clone()
    }

    /// What content on its way may take of memory.
    pub fn memory(&self) -> &Memory {
        &self.context.memory
    }

    /// What is fetched before it is asked for, if anything is.
    pub fn prefetch(&self) -> Option<Arc<Prefetch>> {
        self.prefetch.read().unwrap_or_else(|held| held.into_inner()).clone()
    }

    fn tree(&self) -> Arc<Tree> {
        self.names.tree()
    }

    fn node(&self, ino: Ino) -> Result<(NodeId, Meta, Origin), FsError> {
        let tree = self.tree();
        let id = tree.by_ino(ino.0).ok_or(FsError::Stale)?;
        let node = tree.node(id);
        Ok((id, node.meta, node.origin))
    }

    fn directory(&self, ino: Ino) -> Result<NodeId, FsError> {
        match self.node(ino)? {
            (id, Meta { kind: NodeKind::Directory, .. }, _) => Ok(id),
            _ => Err(FsError::NotDirectory),
        }
    }

    /// A node's path, for messages.
    pub fn path(&self, ino: Ino) -> Option<TreePath> {
        let tree = self.tree();
        tree.by_ino(ino.0).map(|id| tree.path(id))
    }

    /// Finds a name in a directory.
    pub async fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Attr, FsError> {
        let dir = self.directory(parent)?;
        self.until_known(|tree| match tree.lookup(dir, name) {
            Lookup::Found(id) => Ok(Ok(self.attr_of(tree, id))),
            Lookup::Missing => Ok(Err(FsError::NotFound)),
            Lookup::Needs(needs) => Err(needs),
        })
        .await?
    }

    /// Attributes of a node.
    pub async fn getattr(&self, ino: Ino) -> Result<Attr, FsError> {
        let tree = self.tree();
        let id = tree.by_ino(ino.0).ok_or(FsError::Stale)?;
        Ok(self.attr_of(&tree, id))
    }

    /// Refuses to open what is no directory.
    pub fn opendir(&self, ino: Ino) -> Result<(), FsError> {
        self.directory(ino).map(drop)
    }

    /// Hands the entries of a directory after `offset` to `is_enough`, until it says so.
    pub async fn readdir(
        &self,
        ino: Ino,
        offset: u64,
        mut is_enough: impl FnMut(DirEntry<'_>) -> bool,
    ) -> Result<(), FsError> {
        let dir = self.directory(ino)?;
        self.until_known(|tree| {
            let children = tree.children(dir)?;
            let dots = [(&b"."[..], dir), (&b".."[..], tree.node(dir).parent())];
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let rest = children.get(start.saturating_sub(dots.len())..).unwrap_or_default();
            let named = rest.iter().map(|id| (tree.name(*id), *id));
            let mut entries = dots.into_iter().skip(start).chain(named).zip(offset + 1..);
            entries.any(|((name, id), next)| is_enough(DirEntry { attr: self.attr_of(tree, id), name, next }));
            Ok(())
        })
        .await
    }

    /// Names of a directory as far as they are known by now, without `.` and `..`, and what they stand for: for a look ahead,
    /// which fetches nothing. A file system that is served answers by [`Fs::readdir`].
    pub fn known_entries(&self, ino: Ino) -> Result<Vec<(Vec<u8>, Attr)>, FsError> {
        let dir = self.directory(ino)?;
        let tree = self.tree();
        let entry = |id: &NodeId| (tree.name(*id).to_vec(), self.attr_of(&tree, *id));
        Ok(tree.known_children(dir).iter().map(entry).collect())
    }

    /// The target of a symbolic link.
    pub async fn readlink(&self, ino: Ino) -> Result<Vec<u8>, FsError> {
        let (_, _, Origin::Layer { layer, entry }) = self.node(ino)? else { return Err(FsError::NotLink) };
        let layer = &self.kit.layers[layer as usize];
        let listing = self.in_time(layer.listing()).await?;
        match listing.entry(entry as usize).map(|entry| entry.kind) {
            Some(RowKind::Symlink(target)) => Ok(target.to_vec()),
            Some(RowKind::File | RowKind::Directory) | None => Err(FsError::NotLink),
        }
    }

    /// The size of the kit; nothing is free.
    pub fn statfs(&self) -> Statfs {
        let files = self.tree().len() as u64;
        let blocks = self.kit.size().div_ceil(BLOCK);
        Statfs { blocks, bfree: 0, bavail: 0, files, ffree: 0, bsize: BLOCK as u32, namelen: 255 }
    }

    fn attr_of(&self, tree: &Tree, id: NodeId) -> Attr {
        let node = tree.node(id);
        let Meta { kind, mode, uid, gid, mtime, size } = node.meta;
        let who = &self.ownership;
        let others = if who.for_others { 0o444 } else { 0 };
        let mode = match kind {
            NodeKind::File => who.file_mode.unwrap_or(mode | others),
            NodeKind::Directory => who.dir_mode.unwrap_or(mode | others | others >> 2),
            NodeKind::Symlink => 0o777,
        };
        let (uid, gid) = if who.from_kit { (uid, gid) } else { (who.uid, who.gid) };
        // Names in the root are those that a switch to another kit changes; what they stood for stays what it is.
        let is_root = id == NodeId::ROOT;
        let ttl = match tree.is_settled(id) {
            true if is_root => ROOT_TTL,
            true => LONG_TTL,
            false => Duration::ZERO,
        };
        let name_ttl = if is_root || node.parent() == NodeId::ROOT { ttl.min(ROOT_TTL) } else { ttl };
        let nlink = if kind == NodeKind::Directory { 2 } else { 1 };
        Attr { ino: Ino(node.ino), kind, size, mode, uid, gid, mtime, nlink, ttl, name_ttl }
    }

    /// Answers a question to the tree, learning what it needs first, within the metadata deadline in total.
    async fn until_known<T>(&self, mut ask: impl FnMut(&Tree) -> Result<T, Vec<Need>>) -> Result<T, FsError> {
        let answered = async {
            loop {
                let needs = match ask(&self.tree()) {
                    Ok(answer) => return Ok(answer),
                    Err(needs) => needs,
                };
                futures_util::future::try_join_all(needs.into_iter().map(|need| self.learn(need))).await?;
            }
        };
        self.in_time(answered).await
    }

    async fn in_time<T>(&self, work: impl Future<Output = Result<T, FetchError>>) -> Result<T, FsError> {
        let after = self.context.limits.meta_timeout;
        match tokio::time::timeout(after, work).await {
            Ok(outcome) => Ok(outcome?),
            Err(_) => {
                let what = "the listing that this name waits for".to_owned();
                Err(FetchError::Timeout { what, after, cause: None }.into())
            }
        }
    }

    /// Adds what a layer can tell to the tree.
    async fn learn(&self, need: Need) -> Result<(), FetchError> {
        let at = match need {
            Need::Probe(at) | Need::Listing(at) => at,
        };
        let layer = &self.kit.layers[at];
        if let Need::Probe(_) = need {
            match layer.probe().await? {
                Probe::File(listing) => return self.add_listing(at, listing).await,
                Probe::Directory(dirs) => {
                    return self.add(|_| false, move |tree| tree.add_probe(at, dirs)).await;
                }
                Probe::Unknown => {}
            }
        }
        self.add_listing(at, layer.listing().await?).await
    }

    async fn add_listing(&self, at: usize, listing: Arc<Listing>) -> Result<(), FetchError> {
        self.add(move |tree| tree.is_listed(at), move |tree| tree.add_listing(at, listing.metas())).await
    }

    /// Adds to the tree on a thread that may take its time.
    async fn add(
        &self,
        is_known: impl FnOnce(&Tree) -> bool + Send + 'static,
        add: impl FnOnce(&mut Tree) -> Vec<Conflict> + Send + 'static,
    ) -> Result<(), FetchError> {
        let names = self.names.clone();
        let added = tokio::task::spawn_blocking(move || names.add(is_known, add)).await;
        self.report(added.map_err(|_| FetchError::Lost { what: "a listing".to_owned() })?);
        Ok(())
    }

    fn report(&self, conflicts: Vec<Conflict>) {
        let mut kept = self.conflicts.lock().unwrap_or_else(|held| held.into_inner());
        let room = CONFLICTS.saturating_sub(kept.len());
        let more = conflicts.len().saturating_sub(room);
        for conflict in conflicts.into_iter().take(room) {
            let text = self.kit.describe(&conflict);
            tracing::error!("{text}");
            kept.push(text);
        }
        if more > 0 {
            tracing::error!(more, "more paths are in two layers");
        }
    }
}
