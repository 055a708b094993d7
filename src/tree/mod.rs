//! The names of a kit: what its layers hold, merged into one tree. Pure: no I/O, no waiting.
//!
//! The plan alone gives the *skeleton*: every parent of every layer's root. A layer is then *probed* (what is its root,
//! and which modes do its parents have) and later, for a directory, *listed*. The tree says what an answer still needs:
//!
//! - a directory is complete when every layer whose root holds it is listed and every layer rooted right in it is
//!   probed; only then is it read, and a name not in it missing. So a listing never changes after its first reply;
//! - a directory's mode is that of the first layer, in the plan's order, that names it (`kit unpack` leaves it so), and the
//!   default where none does; while a layer that may name it is not known so far, the mode may still change, and
//!   [`Tree::is_settled`] says so;
//! - where two layers disagree, what came first stays and the [`Conflict`] is reported.
//!
//! Node ids are positions. Inode numbers are a hash of the path keyed by the manifest's digest: the same after a restart,
//! never reused, and silent about the order of lookups.

use std::collections::{HashMap, HashSet};
use std::hash::Hasher as _;

use siphasher::sip::SipHasher24;

use crate::digest::Digest;
use crate::path::TreePath;

/// The inode number of the root, which FUSE fixes.
pub const ROOT_INO: u64 = 1;

/// A position in the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(u32);

impl NodeId {
    /// The root directory.
    pub const ROOT: Self = Self(0);

    fn index(self) -> usize {
        self.0 as usize
    }
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
}

/// Where a node's content is to be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A directory that so far only the plan names.
    Skeleton,
    /// The `Kitfile`.
    Kitfile,
    /// An entry of a layer.
    Layer {
        /// The layer's position in the plan.
        layer: u32,
        /// The entry's position in the layer's listing.
        entry: u32,
    },
}

/// What the tree keeps of a file, directory or link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// File, directory or symlink.
    pub kind: NodeKind,
    /// Permission bits, `& 0o7777`.
    pub mode: u32,
    /// Owner as the archive states it.
    pub uid: u32,
    /// Group as the archive states it.
    pub gid: u32,
    /// Seconds since the epoch.
    pub mtime: i64,
    /// Content size of a file, target length of a link, else 0.
    pub size: u64,
}

/// A node.
#[derive(Debug)]
pub struct Node {
    /// The inode number.
    pub ino: u64,
    /// Type, mode, owner, time and size.
    pub meta: Meta,
    /// Where it comes from.
    pub origin: Origin,
    parent: NodeId,
    name: Box<[u8]>,
    /// Sorted by name; empty for what is not a directory.
    children: Vec<NodeId>,
    /// Layers that may still name this directory: those rooted below that are not probed yet, and those rooted here whose
    /// probe has not seen its entry.
    unsure: u32,
}

impl Node {
    /// The last component of its path; empty for the root.
    pub fn name(&self) -> &[u8] {
        &self.name
    }

    /// The directory that holds it; the root holds itself.
    pub fn parent(&self) -> NodeId {
        self.parent
    }
}

/// How much is known of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Known {
    Nothing,
    /// That its root is a directory, of which an entry may come yet.
    Below,
    Root,
    All,
}

/// Two that claim one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// The path that both claim.
    pub path: TreePath,
    /// Whose entry stays.
    pub first: Origin,
    /// The position of the layer whose entry is left out.
    pub second: usize,
}

/// What a lookup found.
#[derive(Debug, PartialEq, Eq)]
pub enum Lookup {
    /// The node.
    Found(NodeId),
    /// There is no such name, and there never will be.
    Missing,
    /// It can't be said before these layers are known.
    Needs(Vec<Need>),
}

/// A layer that an answer waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// What this layer's root is.
    Probe(usize),
    /// Everything that this layer holds.
    Listing(usize),
}

/// The mode of directories that no tar names, as `kit unpack` creates them under umask 022.
pub const DEFAULT_DIR_MODE: u32 = 0o755;

const SKELETON: Meta = Meta { kind: NodeKind::Directory, mode: DEFAULT_DIR_MODE, uid: 0, gid: 0, mtime: 0, size: 0 };

/// The merged names of a plan's layers.
#[derive(Debug)]
pub struct Tree {
    key: (u64, u64),
    nodes: Vec<Node>,
    by_ino: HashMap<u64, NodeId>,
    /// Directories whose children are out of order; empty between calls.
    unsorted: HashSet<NodeId>,
    layers: Vec<(TreePath, Known)>,
}

impl Tree {
    /// The skeleton of a plan: `roots` in the plan's order, and the size of the Kitfile where there is one.
    pub fn new(plan: &Digest, roots: impl IntoIterator<Item = TreePath>, kitfile: Option<u64>) -> Self {
        let bytes = plan.as_bytes();
        let word = |at: usize| bytes[at..at + 8].iter().fold(0, |word, byte| word << 8 | u64::from(*byte));
        let root = Node {
            ino: ROOT_INO,
            meta: SKELETON,
            origin: Origin::Skeleton,
            parent: NodeId::ROOT,
            name: Box::default(),
            children: Vec::new(),
            unsure: 0,
        };
        let mut tree = Self {
            key: (word(0), word(8)),
            nodes: vec![root],
            by_ino: HashMap::from([(ROOT_INO, NodeId::ROOT)]),
            unsorted: HashSet::new(),
            layers: roots.into_iter().map(|root| (root, Known::Nothing)).collect(),
        };
        if let Some(size) = kitfile {
            let meta = Meta { kind: NodeKind::File, mode: 0o644, size, ..SKELETON };
            tree.add_child(NodeId::ROOT, b"Kitfile", meta, Origin::Kitfile);
        }
        for index in 0..tree.layers.len() {
            let root = tree.layers[index].0.clone();
            for dir in root.ancestors() {
                let node = tree.make_dirs(&dir);
                tree.nodes[node.index()].unsure += 1;
            }
        }
        tree.sort_children();
        tree
    }

    /// Adds what a probe told of a layer whose root is a directory: those on the way to it and the root itself, as far as
    /// the layer names them. What it does not name is there all the same, as `kit unpack` creates it.
    pub fn add_probe(&mut self, layer: usize, dirs: impl IntoIterator<Item = (TreePath, Meta)>) -> Vec<Conflict> {
        let root = self.layers[layer].0.clone();
        let mut known = Known::Below;
        let dirs = dirs.into_iter().map(|(path, meta)| {
            if path == root {
                known = Known::Root;
            }
            (path, meta, u32::MAX)
        });
        let mut conflicts = self.add(layer, dirs);
        let node = self.make_dirs(&root);
        if !self.is_dir(node) && conflicts.is_empty() {
            conflicts.push(Conflict { path: root, first: self.nodes[node.index()].origin, second: layer });
        }
        self.sort_children();
        self.learn(layer, known);
        conflicts
    }

    /// Adds everything a layer holds. The position of an item is its position in the layer's listing.
    pub fn add_listing(&mut self, layer: usize, entries: impl IntoIterator<Item = (TreePath, Meta)>) -> Vec<Conflict> {
        let numbered = entries.into_iter().zip(0..).map(|((path, meta), entry)| (path, meta, entry));
        let conflicts = self.add(layer, numbered);
        self.learn(layer, Known::All);
        conflicts
    }

    /// Whether everything that a layer holds has been added.
    pub fn is_listed(&self, layer: usize) -> bool {
        self.layers[layer].1 == Known::All
    }

    fn learn(&mut self, layer: usize, known: Known) {
        let before = self.layers[layer].1;
        self.layers[layer].1 = before.max(known);
        if before == Known::Nothing {
            let root = self.layers[layer].0.clone();
            for dir in root.ancestors() {
                self.count_unsure(&dir, |unsure| unsure.saturating_sub(1));
            }
        }
        let root = self.layers[layer].0.clone();
        match (before, known) {
            (Known::Nothing, Known::Below) => self.count_unsure(&root, |unsure| unsure + 1),
            (Known::Below, Known::Root | Known::All) => self.count_unsure(&root, |unsure| unsure.saturating_sub(1)),
            _ => {}
        }
    }

    fn count_unsure(&mut self, dir: &TreePath, count: impl Fn(u32) -> u32) {
        if let Some(node) = self.find(dir) {
            let unsure = &mut self.nodes[node.index()].unsure;
            *unsure = count(*unsure);
        }
    }

    fn add(&mut self, layer: usize, entries: impl Iterator<Item = (TreePath, Meta, u32)>) -> Vec<Conflict> {
        let mut conflicts = Vec::new();
        // A listing arrives in path order, so that the directory of one entry is mostly that of the next.
        let mut last_dir = (TreePath::root(), NodeId::ROOT);
        for (path, meta, entry) in entries {
            let origin = Origin::Layer { layer: layer as u32, entry };
            let (Some(parent_path), Some(name)) = (path.parent(), path.name()) else {
                self.merge_dir(NodeId::ROOT, meta, origin);
                continue;
            };
            if parent_path != last_dir.0 {
                let dir = self.make_dirs(&parent_path);
                last_dir = (parent_path, dir);
            }
            let dir = last_dir.1;
            let existing = self.child(dir, name);
            match existing {
                None if self.nodes[dir.index()].meta.kind == NodeKind::Directory => {
                    self.add_child(dir, name, meta, origin);
                }
                Some(node) if self.is_dir(node) && meta.kind == NodeKind::Directory => {
                    self.merge_dir(node, meta, origin);
                }
                other => {
                    let first = self.nodes[other.unwrap_or(dir).index()].origin;
                    if first != origin {
                        conflicts.push(Conflict { path, first, second: layer });
                    }
                }
            }
        }
        self.sort_children();
        conflicts
    }

    fn is_dir(&self, node: NodeId) -> bool {
        self.nodes[node.index()].meta.kind == NodeKind::Directory
    }

    /// The first layer that names a directory decides its mode.
    fn merge_dir(&mut self, node: NodeId, meta: Meta, origin: Origin) {
        let rank = |origin: Origin| match origin {
            Origin::Skeleton => u32::MAX,
            Origin::Kitfile => 0,
            Origin::Layer { layer, .. } => layer,
        };
        let node = &mut self.nodes[node.index()];
        let listed_after_probe = rank(origin) == rank(node.origin) && origin != Origin::Skeleton;
        if rank(origin) < rank(node.origin) || listed_after_probe {
            node.meta = meta;
            node.origin = origin;
        }
    }

    /// The directory at `path`, made with all its parents where it is missing. Below a file it ends at that file.
    fn make_dirs(&mut self, path: &TreePath) -> NodeId {
        let mut node = NodeId::ROOT;
        for name in path.components() {
            node = match self.child(node, name) {
                Some(child) => child,
                None if self.is_dir(node) => self.add_child(node, name, SKELETON, Origin::Skeleton),
                None => return node,
            };
        }
        node
    }

    /// Appends a child; [`Tree::sort_children`] puts it in its place.
    fn add_child(&mut self, dir: NodeId, name: &[u8], meta: Meta, origin: Origin) -> NodeId {
        let id = NodeId(self.nodes.len() as u32);
        let (ino, _) = self.locate(dir, name);
        self.nodes[dir.index()].children.push(id);
        self.unsorted.insert(dir);
        self.by_ino.insert(ino, id);
        let name = name.into();
        self.nodes.push(Node { ino, meta, origin, parent: dir, name, children: Vec::new(), unsure: 0 });
        id
    }

    /// Restores the order of directories that children were added to. What a layer adds comes in order, so that this is
    /// one merge a directory.
    fn sort_children(&mut self) {
        for dir in std::mem::take(&mut self.unsorted) {
            let mut children = std::mem::take(&mut self.nodes[dir.index()].children);
            children.sort_by(|a, b| self.nodes[a.index()].name.cmp(&self.nodes[b.index()].name));
            self.nodes[dir.index()].children = children;
        }
    }

    /// The inode number of a name in a directory, and the node that has it. 63 bits: some programs read inode numbers as
    /// signed. A collision (one in 2^63 a pair) takes the next number.
    fn locate(&self, dir: NodeId, name: &[u8]) -> (u64, Option<NodeId>) {
        let mut hasher = SipHasher24::new_with_keys(self.key.0, self.key.1);
        let mut path = self.path(dir).as_bytes().to_vec();
        path.push(b'/');
        path.extend_from_slice(name);
        hasher.write(&path);
        let mut ino = (hasher.finish() >> 1).max(ROOT_INO + 1);
        loop {
            match self.by_ino.get(&ino) {
                None => return (ino, None),
                Some(id) if self.nodes[id.index()].parent == dir && *self.nodes[id.index()].name == *name => {
                    return (ino, Some(*id));
                }
                Some(_) => ino = (ino.wrapping_add(1) & (u64::MAX >> 1)).max(ROOT_INO + 1),
            }
        }
    }

    fn child(&self, dir: NodeId, name: &[u8]) -> Option<NodeId> {
        self.locate(dir, name).1
    }

    /// The node at a path, among what is known now.
    pub fn find(&self, path: &TreePath) -> Option<NodeId> {
        path.components().try_fold(NodeId::ROOT, |node, name| self.child(node, name))
    }

    /// A node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// The node with an inode number.
    pub fn by_ino(&self, ino: u64) -> Option<NodeId> {
        self.by_ino.get(&ino).copied()
    }

    /// How many nodes are known.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// A tree is never empty: it has a root.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// A node's path.
    pub fn path(&self, id: NodeId) -> TreePath {
        let mut names = Vec::new();
        let mut at = id;
        while at != NodeId::ROOT {
            names.push(&*self.nodes[at.index()].name);
            at = self.nodes[at.index()].parent;
        }
        names.reverse();
        // The parts were valid when they came in, so the whole is.
        TreePath::clean(&names.join(&b'/')).unwrap_or_default()
    }

    /// Whether a node's attributes are final.
    pub fn is_settled(&self, id: NodeId) -> bool {
        self.nodes[id.index()].unsure == 0
    }

    /// Looks a name up in a directory.
    pub fn lookup(&self, dir: NodeId, name: &[u8]) -> Lookup {
        let dir_path = self.path(dir);
        let needs = self.needs(&dir_path, |root| root.name() == Some(name));
        if !needs.is_empty() {
            return Lookup::Needs(needs);
        }
        self.child(dir, name).map_or(Lookup::Missing, Lookup::Found)
    }

    /// What a directory is known to hold by now, in name order; there may be more.
    pub fn known_children(&self, dir: NodeId) -> &[NodeId] {
        &self.nodes[dir.index()].children
    }

    /// What a directory holds, in name order; an error names the layers that it waits for.
    pub fn children(&self, dir: NodeId) -> Result<&[NodeId], Vec<Need>> {
        let needs = self.needs(&self.path(dir), |_| true);
        if needs.is_empty() { Ok(self.known_children(dir)) } else { Err(needs) }
    }

    /// Layers that must be known before `dir` is read: those that hold it, and those rooted right in it whose root
    /// `concerns` the question.
    fn needs(&self, dir: &TreePath, concerns: impl Fn(&TreePath) -> bool) -> Vec<Need> {
        let need = |(index, (root, known)): (usize, &(TreePath, Known))| {
            if dir.is_within(root) {
                (*known < Known::All).then_some(Need::Listing(index))
            } else if *known == Known::Nothing && root.parent().is_some_and(|parent| parent == *dir) && concerns(root) {
                Some(Need::Probe(index))
            } else {
                None
            }
        };
        self.layers.iter().enumerate().filter(|(_, (_, known))| *known < Known::All).filter_map(need).collect()
    }
}

#[cfg(test)]
mod tests;
