//! The trees of a mount: that of the kit that is served, and those that were served before, for as long as the kernel
//! holds something of them.
//!
//! The kernel knows nodes by numbers. A number is a hash keyed by the kit's digest, so it tells its tree, and who has opened
//! or found something goes on in the tree that it is of. Only the root, number 1, is that of whichever kit is served; a
//! directory that is open keeps the tree that it was opened in. A tree that is not served any more is let go with the last
//! name that the kernel forgets of it and the last handle that it releases.
//!
//! `DIR/.kitfs/<digest>/` shows each of these trees, for who must not see a switch between two files. Directories have other
//! numbers there, as the kernel knows a directory by one name only; files share theirs, and with it what is cached of them.
//! A kit that has a `.kitfs` itself shows that.
//!
//! [`Trees::switch`] is one step: first the kernel forgets the names in the root, and is told no name there for longer than it
//! takes to use it; then one pointer changes; from then on names may be kept again.
//!
//! Locks, in this order: `switching` over a whole switch, by threads that may wait; `trees`, for a look or a change of pointers;
//! within it those of one tree (its names, when it was opened and replaced), for a look or a note.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::time::{Duration, Instant};

pub use super::live::Live;
use super::live::{VIEW, lock};
use super::ways::Ways;
use super::{Attr, DirEntry, Fs, FsError, Ino, NodeKind, Opened, OpenedDir, ReadReply, Statfs};
use crate::digest::Digest;
use crate::path::TreePath;

/// The directory that shows all trees.
const VIEWS_NAME: &[u8] = b".kitfs";
/// Its number, which is no hash.
const VIEWS: Ino = Ino(2);
/// So long after a switch the kernel is asked to forget all names of the tree that was served before: who was on a path then
/// has told it some of them again. While the tree is held after that, it is asked again, each time after so many times as long.
pub const TIDY: Duration = Duration::from_secs(1);
const TIDY_FACTOR: u32 = 8;
/// So many times it is asked; by then what is left is open.
const TIDY_TIMES: u32 = 5;
/// So long after a switch the kernel may keep what it knows of a tree below `.kitfs`, where nobody has anything of it open:
/// whoever loads files through it has them all by then.
const LINGER: Duration = Duration::from_secs(600);

/// What a switch asks of the kernel.
pub trait Kernel: Send + Sync + std::fmt::Debug {
    /// Forgets what a name stands for, so that it is asked for anew. Waits for requests on the directory that are under way.
    fn forget_name(&self, directory: Ino, name: &[u8]);
    /// Forgets the attributes of a node.
    fn forget_attributes(&self, node: Ino);
}

/// The trees of a mount.
#[derive(Debug)]
pub struct Trees {
    /// The one that is served is the first.
    trees: RwLock<Vec<Arc<Live>>>,
    serials: AtomicU64,
    is_switching: AtomicBool,
    switching: Mutex<()>,
    kernel: OnceLock<Box<dyn Kernel>>,
}

/// Says for as long as it lives that a switch is under way.
struct IsSwitching<'a>(&'a AtomicBool);

impl<'a> IsSwitching<'a> {
    fn begin(flag: &'a AtomicBool) -> Self {
        flag.store(true, Ordering::SeqCst);
        Self(flag)
    }
}

impl Drop for IsSwitching<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// What a number stands for.
enum Place<'a> {
    /// The directory of all trees.
    Views,
    /// A node of a tree.
    Node(Node<'a>),
}

/// A tree in use by a request, which keeps it.
struct InUse<'a> {
    trees: &'a Trees,
    live: Arc<Live>,
}

impl Deref for InUse<'_> {
    type Target = Arc<Live>;
    fn deref(&self) -> &Arc<Live> {
        &self.live
    }
}

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        self.trees.release(&self.live, 1);
    }
}

/// A node of a tree.
struct Node<'a> {
    live: InUse<'a>,
    /// Its number in the tree.
    ino: Ino,
    /// Whether it is below `.kitfs`.
    in_view: bool,
}

impl Node<'_> {
    /// A node of the same tree as it is seen from here.
    fn seen(&self, mut attr: Attr) -> Attr {
        if self.in_view && attr.kind == NodeKind::Directory {
            attr.ino = Ino(if attr.ino == Ino::ROOT { self.live.root().0 } else { attr.ino.0 | VIEW });
        }
        attr
    }
}

impl Trees {
    /// Serves a tree.
    pub fn new(fs: Arc<Fs>) -> Self {
        Self {
            trees: RwLock::new(vec![Live::new(fs, 0)]),
            serials: AtomicU64::new(1),
            is_switching: AtomicBool::new(false),
            switching: Mutex::default(),
            kernel: OnceLock::new(),
        }
    }

    /// Takes up the line to the kernel.
    pub fn attach(&self, kernel: Box<dyn Kernel>) {
        // A mount has one.
        let _ = self.kernel.set(kernel);
    }

    fn all(&self) -> Vec<Arc<Live>> {
        self.trees.read().unwrap_or_else(|held| held.into_inner()).clone()
    }

    /// The tree that is served.
    pub fn now(&self) -> Arc<Live> {
        self.trees.read().unwrap_or_else(|held| held.into_inner())[0].clone()
    }

    /// The first tree that is as it should be, for a request.
    fn find(&self, is_it: impl Fn(&Live) -> bool) -> Option<InUse<'_>> {
        let trees = self.trees.read().unwrap_or_else(|held| held.into_inner());
        let live = trees.iter().find(|live| is_it(live)).cloned()?;
        // Under the lock: what is held is not let go.
        live.hold();
        Some(InUse { trees: self, live })
    }

    /// A tree that is still there.
    pub fn of(&self, digest: &Digest) -> Option<Arc<Live>> {
        self.all().into_iter().find(|live| live.digest() == *digest)
    }

    /// The digests of all trees, that of the one that is served first.
    pub fn digests(&self) -> Vec<Digest> {
        self.all().iter().map(|live| live.digest()).collect()
    }

    /// How files are read; the same in all trees.
    pub fn ways(&self) -> Arc<Ways> {
        self.now().fs.ways().clone()
    }

    /// Serves another kit from now on, in one step; what is open goes on as it was. Blocks: for requests on the root that are
    /// under way. Where there is a tree of this digest already, that is served.
    pub fn switch(&self, fs: Arc<Fs>) {
        let _one = lock(&self.switching);
        let before = self.now();
        let digest = fs.kit().resolved.digest;
        if before.digest() == digest {
            return;
        }
        let new = self.of(&digest);
        let new = new.unwrap_or_else(|| Live::new(fs, self.serials.fetch_add(1, Ordering::Relaxed)));
        let switching = IsSwitching::begin(&self.is_switching);
        self.forget_names(&before);
        {
            let mut trees = self.trees.write().unwrap_or_else(|held| held.into_inner());
            trees.retain(|live| !Arc::ptr_eq(live, &new));
            *lock(&new.replaced) = None;
            *lock(&new.opened) = Instant::now();
            *lock(&before.replaced) = Some(Instant::now());
            before.tidied.store(0, Ordering::Relaxed);
            trees.insert(0, new.clone());
        }
        drop(switching);
        if let Some(kernel) = self.kernel.get() {
            kernel.forget_attributes(Ino::ROOT);
        }
        self.let_go();
    }

    /// Has the kernel forget the names in the root.
    fn forget_names(&self, before: &Live) {
        let Some(kernel) = self.kernel.get() else { return };
        // What it knows was told by then.
        for (name, _) in before.fs.known_entries(Ino::ROOT).unwrap_or_default() {
            kernel.forget_name(Ino::ROOT, &name);
        }
        kernel.forget_name(Ino::ROOT, VIEWS_NAME);
    }

    /// Has the kernel forget the names of trees that are not served any more, a while after the switch: it would keep them
    /// until it is short of memory. Blocks; to be called a [`TIDY`] after a switch, and from time to time.
    pub fn tidy(&self) {
        let Some(kernel) = self.kernel.get() else { return };
        for live in self.all().into_iter().skip(1) {
            let Some(since) = lock(&live.replaced).map(|since| since.elapsed()) else { continue };
            let times = live.tidied.load(Ordering::Relaxed);
            if times < TIDY_TIMES && since >= TIDY * TIDY_FACTOR.pow(times) {
                live.tidied.fetch_add(1, Ordering::Relaxed);
                live.fs.each_name(|directory, name| kernel.forget_name(directory, name));
            }
            if since > LINGER {
                kernel.forget_name(VIEWS, live.digest().to_string().as_bytes());
            }
        }
        self.let_go();
    }

    /// Lets trees go that nobody holds.
    fn let_go(&self) {
        let mut gone = Vec::new();
        {
            let mut trees = self.trees.write().unwrap_or_else(|held| held.into_inner());
            let mut at = 1;
            while at < trees.len() {
                if trees[at].held.load(Ordering::SeqCst) > 0 {
                    at += 1;
                } else {
                    gone.push(trees.remove(at));
                }
            }
        }
        if !gone.is_empty() {
            // Freeing a million names takes a moment, and closing files may wait for the disk: not for a request's thread.
            // Where there is no other, it is for this one.
            let _ = std::thread::Builder::new().name("let-go".to_owned()).spawn(move || drop(gone));
        }
    }

    /// Gives back what was held.
    fn release(&self, live: &Arc<Live>, count: u64) {
        let was_last = live.held.fetch_sub(count, Ordering::SeqCst) == count;
        if was_last && !Arc::ptr_eq(&self.now(), live) {
            self.let_go();
        }
    }

    fn place(&self, ino: Ino) -> Result<Place<'_>, FsError> {
        if ino == VIEWS {
            return Ok(Place::Views);
        }
        self.node(ino).map(Place::Node)
    }

    /// A node of a tree; the directory of all trees is none.
    fn node(&self, ino: Ino) -> Result<Node<'_>, FsError> {
        if ino == Ino::ROOT {
            let live = self.find(|_| true).ok_or(FsError::Stale)?;
            return Ok(Node { live, ino, in_view: false });
        }
        if ino.0 & VIEW == 0 {
            let live = self.find(|live| live.fs.has(ino)).ok_or(FsError::Stale)?;
            return Ok(Node { live, ino, in_view: false });
        }
        if let Some(live) = self.find(|live| live.root() == ino) {
            return Ok(Node { live, ino: Ino::ROOT, in_view: true });
        }
        let ino = Ino(ino.0 & !VIEW);
        let live = self.find(|live| live.fs.has(ino)).ok_or(FsError::Stale)?;
        Ok(Node { live, ino, in_view: true })
    }

    /// Whether the kernel may keep the names in a root: not while they are about to change, nor those that have.
    fn may_keep(&self, live: &Arc<Live>) -> bool {
        !self.is_switching.load(Ordering::SeqCst) && Arc::ptr_eq(&self.now(), live)
    }

    /// Finds a name in a directory. The kernel holds what is found until it forgets it.
    pub async fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Attr, FsError> {
        let node = match self.place(parent)? {
            Place::Node(node) => node,
            Place::Views => {
                let live = self.find(|live| live.digest().to_string().as_bytes() == name).ok_or(FsError::NotFound)?;
                live.hold();
                let node = Node { live, ino: Ino::ROOT, in_view: true };
                return Ok(node.seen(node.live.fs.getattr(Ino::ROOT).await?));
            }
        };
        let is_root = parent == Ino::ROOT;
        let mut attr = match node.live.fs.lookup(node.ino, name).await {
            Err(FsError::NotFound) if is_root && name == VIEWS_NAME => return self.views(),
            found => node.seen(found?),
        };
        if is_root && !self.may_keep(&node.live) {
            attr.name_ttl = Duration::ZERO;
        }
        node.live.hold();
        Ok(attr)
    }

    /// Attributes of the directory of all trees.
    fn views(&self) -> Result<Attr, FsError> {
        let mut attr = self.now().fs.skeleton_attr();
        (attr.ino, attr.name_ttl) = (VIEWS, Duration::ZERO);
        Ok(attr)
    }

    /// Attributes of a node.
    pub async fn getattr(&self, ino: Ino) -> Result<Attr, FsError> {
        match self.place(ino)? {
            Place::Views => self.views(),
            Place::Node(node) => {
                let mut attr = node.seen(node.live.fs.getattr(node.ino).await?);
                if ino == Ino::ROOT && !self.may_keep(&node.live) {
                    attr.ttl = Duration::ZERO;
                }
                Ok(attr)
            }
        }
    }

    /// Opens a directory. What it holds does not change: its tree stays with the handle.
    pub fn opendir(&self, ino: Ino) -> Result<OpenedDir, FsError> {
        match self.place(ino)? {
            Place::Views => Ok(OpenedDir { handle: 0, keep_cache: false }),
            Place::Node(node) => {
                node.live.fs.opendir(node.ino)?;
                node.live.hold();
                Ok(OpenedDir { handle: node.live.serial, keep_cache: ino != Ino::ROOT })
            }
        }
    }

    /// Ends what [`Trees::opendir`] began.
    pub fn releasedir(&self, ino: Ino, handle: u64) {
        if ino != VIEWS
            && let Some(live) = self.find(|live| live.serial == handle)
        {
            self.release(&live, 1);
        }
    }

    /// Hands the entries of an open directory after `offset` to `is_full`, until it says so. With `tells_nodes` the kernel
    /// holds what it was told, but for `.` and `..`.
    pub async fn readdir(
        &self,
        ino: Ino,
        handle: u64,
        offset: u64,
        tells_nodes: bool,
        mut is_full: impl FnMut(DirEntry<'_>) -> bool,
    ) -> Result<(), FsError> {
        let mut node = match self.place(ino)? {
            Place::Node(node) => node,
            Place::Views => return self.read_views(offset, tells_nodes, is_full),
        };
        if ino == Ino::ROOT
            && let Some(live) = self.find(|live| live.serial == handle)
        {
            node.live = live;
        }
        let is_kept = ino != Ino::ROOT || self.may_keep(&node.live);
        let tell = |entry: DirEntry<'_>| {
            let mut attr = node.seen(entry.attr);
            if !is_kept {
                attr.name_ttl = Duration::ZERO;
            }
            let is_full = is_full(DirEntry { attr, ..entry });
            if !is_full && tells_nodes && !matches!(entry.name, b"." | b"..") {
                node.live.hold();
            }
            is_full
        };
        node.live.fs.readdir(node.ino, offset, tell).await
    }

    fn read_views(
        &self,
        offset: u64,
        tells_nodes: bool,
        mut is_full: impl FnMut(DirEntry<'_>) -> bool,
    ) -> Result<(), FsError> {
        let dots = [(b".".to_vec(), self.views()?, None), (b"..".to_vec(), self.now().fs.skeleton_attr(), None)];
        let mut trees: Vec<_> =
            self.digests().iter().filter_map(|digest| self.find(|live| live.digest() == *digest)).collect();
        // A switch changes which is the first, and must not change what comes after an offset.
        trees.sort_by_key(|live| live.serial);
        let trees = trees.into_iter().map(|live| {
            let attr = Attr { ino: live.root(), ..live.fs.skeleton_attr() };
            (live.digest().to_string().into_bytes(), attr, Some(live))
        });
        for ((name, attr, live), next) in dots.into_iter().chain(trees).zip(1..).skip(offset as usize) {
            if is_full(DirEntry { attr, name: &name, next }) {
                break;
            }
            if let Some(live) = live.filter(|_| tells_nodes) {
                live.hold();
            }
        }
        Ok(())
    }

    /// The target of a symbolic link.
    pub async fn readlink(&self, ino: Ino) -> Result<Vec<u8>, FsError> {
        let node = self.node(ino)?;
        node.live.fs.readlink(node.ino).await
    }

    /// The kernel has forgotten a node that it was told so many times.
    pub fn forget(&self, ino: Ino, count: u64) {
        // Of the root of whichever kit is served nothing is held.
        if ino == Ino::ROOT {
            return;
        }
        if let Ok(node) = self.node(ino) {
            self.release(&node.live, count);
        }
    }

    /// The size of the kit that is served; nothing is free.
    pub fn statfs(&self) -> Statfs {
        self.now().fs.statfs()
    }

    /// Opens a file for reading.
    pub async fn open(&self, ino: Ino) -> Result<Opened, FsError> {
        let node = self.node(ino)?;
        *lock(&node.live.opened) = Instant::now();
        let opened = node.live.fs.open(node.ino).await?;
        node.live.hold();
        Ok(opened)
    }

    /// Ends what [`Trees::open`] began.
    pub async fn close(&self, ino: Ino) {
        if let Ok(node) = self.node(ino) {
            node.live.fs.release(node.ino).await;
            self.release(&node.live, 1);
        }
    }

    /// Bytes of a file, as [`Fs::read`] gives them.
    pub async fn read(&self, ino: Ino, handle: u64, offset: u64, len: usize) -> Result<ReadReply, FsError> {
        let node = self.node(ino)?;
        node.live.fs.read(node.ino, handle, offset, len).await
    }

    /// An extended attribute.
    pub async fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>, FsError> {
        match self.place(ino)? {
            Place::Views => Err(FsError::NoAttribute),
            Place::Node(node) => node.live.fs.getxattr(node.ino, name).await,
        }
    }

    /// The names of a node's extended attributes.
    pub async fn listxattr(&self, ino: Ino) -> Result<Vec<Vec<u8>>, FsError> {
        match self.place(ino)? {
            Place::Views => Ok(Vec::new()),
            Place::Node(node) => node.live.fs.listxattr(node.ino).await,
        }
    }

    /// A node's path, for messages.
    pub fn path(&self, ino: Ino) -> Option<TreePath> {
        let node = self.node(ino).ok()?;
        node.live.fs.path(node.ino)
    }
}
