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
//! never reused, and silent about the order of lookups. They are made name by name, of the directory's number and the name.
//!
//! A tree is added to by who owns it alone; a clone, which shares what does not change, can be added to while others read
//! the original. See `nodes` for how little it takes.

mod nodes;

use std::collections::HashSet;
use std::hash::Hasher as _;
use std::sync::Arc;

use siphasher::sip::SipHasher24;

use crate::digest::Digest;
use crate::path::TreePath;
pub use nodes::Node;
use nodes::Nodes;

/// The inode number of the root, which FUSE fixes.
pub const ROOT_INO: u64 = 1;
/// The first inode number of a node; the one before it is free for who serves several trees.
const FIRST_INO: u64 = ROOT_INO + 2;
/// Inode numbers of nodes have so many bits: some programs read them as signed, and who serves several trees needs one.
const INO_BITS: u32 = 62;

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
#[derive(Debug, Clone)]
pub struct Tree {
    key: (u64, u64),
    nodes: Nodes,
    /// The layers' roots, in the plan's order.
    roots: Arc<[TreePath]>,
    /// How much is known of each layer.
    known: Vec<Known>,
    /// How many layers are not listed.
    unlisted: usize,
    /// Directories whose children are out of order; empty between calls.
    unsorted: HashSet<NodeId>,
}

impl Tree {
    /// The skeleton of a plan: `roots` in the plan's order, and the size of the Kitfile where there is one.
    pub fn new(plan: &Digest, roots: impl IntoIterator<Item = TreePath>, kitfile: Option<u64>) -> Self {
        let bytes = plan.as_bytes();
        let word = |at: usize| bytes[at..at + 8].iter().fold(0, |word, byte| word << 8 | u64::from(*byte));
        let roots: Arc<[TreePath]> = roots.into_iter().collect();
        let mut tree = Self {
            key: (word(0), word(8)),
            nodes: Nodes::new(),
            known: vec![Known::Nothing; roots.len()],
            unlisted: roots.len(),
            roots: roots.clone(),
            unsorted: HashSet::new(),
        };
        tree.nodes.push(NodeId::ROOT, b"", ROOT_INO, &SKELETON, Origin::Skeleton);
        if let Some(size) = kitfile {
            let meta = Meta { kind: NodeKind::File, mode: 0o644, size, ..SKELETON };
            tree.add_child(NodeId::ROOT, b"Kitfile", &meta, Origin::Kitfile);
        }
        for dir in roots.iter().flat_map(TreePath::ancestors) {
            let node = tree.make_dirs(dir.as_bytes());
            if let Some(dir) = tree.nodes.dir_mut(node) {
                dir.unsure += 1;
            }
        }
        tree.sort_children();
        tree
    }

    /// Adds what a probe told of a layer whose root is a directory: those on the way to it and the root itself, as far as
    /// the layer names them. What it does not name is there all the same, as `kit unpack` creates it.
    pub fn add_probe(&mut self, layer: usize, dirs: impl IntoIterator<Item = (TreePath, Meta)>) -> Vec<Conflict> {
        let root = self.roots[layer].clone();
        let mut known = Known::Below;
        let dirs = dirs.into_iter().map(|(path, meta)| {
            if path == root {
                known = Known::Root;
            }
            (path, meta, u32::MAX)
        });
        let mut conflicts = self.add(layer, dirs);
        let node = self.make_dirs(root.as_bytes());
        if !self.nodes.is_dir(node) && conflicts.is_empty() {
            conflicts.push(Conflict { path: root, first: self.nodes.origin(node), second: layer });
        }
        self.sort_children();
        self.learn(layer, known);
        conflicts
    }

    /// Adds everything a layer holds: clean paths with what they are. The position of an item is its position in the
    /// layer's listing.
    pub fn add_listing<P: AsRef<[u8]>>(
        &mut self,
        layer: usize,
        entries: impl IntoIterator<Item = (P, Meta)>,
    ) -> Vec<Conflict> {
        let entries = entries.into_iter();
        self.nodes.reserve(entries.size_hint().0);
        let numbered = entries.zip(0..).map(|((path, meta), entry)| (path, meta, entry));
        let conflicts = self.add(layer, numbered);
        self.learn(layer, Known::All);
        conflicts
    }

    /// Whether everything that a layer holds has been added.
    pub fn is_listed(&self, layer: usize) -> bool {
        self.known[layer] == Known::All
    }

    fn learn(&mut self, layer: usize, known: Known) {
        let before = self.known[layer];
        self.known[layer] = before.max(known);
        if before < Known::All && known == Known::All {
            self.unlisted -= 1;
        }
        let root = self.roots[layer].clone();
        if before == Known::Nothing {
            for dir in root.ancestors() {
                self.count_unsure(&dir, |unsure| unsure.saturating_sub(1));
            }
        }
        match (before, known) {
            (Known::Nothing, Known::Below) => self.count_unsure(&root, |unsure| unsure + 1),
            (Known::Below, Known::Root | Known::All) => self.count_unsure(&root, |unsure| unsure.saturating_sub(1)),
            _ => {}
        }
    }

    fn count_unsure(&mut self, dir: &TreePath, count: impl Fn(u32) -> u32) {
        if let Some(node) = self.find(dir)
            && let Some(dir) = self.nodes.dir_mut(node)
        {
            dir.unsure = count(dir.unsure);
        }
    }

    fn add<P: AsRef<[u8]>>(&mut self, layer: usize, entries: impl Iterator<Item = (P, Meta, u32)>) -> Vec<Conflict> {
        let mut conflicts = Vec::new();
        // A listing arrives in path order, so that the directory of one entry is mostly that of the next.
        let (mut last_dir, mut dir) = (Vec::new(), NodeId::ROOT);
        for (path, meta, entry) in entries {
            let path = path.as_ref();
            let origin = Origin::Layer { layer: layer as u32, entry };
            if path.is_empty() {
                self.merge_dir(NodeId::ROOT, &meta, origin);
                continue;
            }
            let (parent, name) = split(path);
            if parent != last_dir {
                dir = self.make_dirs(parent);
                last_dir.clear();
                last_dir.extend_from_slice(parent);
            }
            match self.child(dir, name) {
                None if self.nodes.is_dir(dir) => {
                    self.add_child(dir, name, &meta, origin);
                }
                Some(node) if self.nodes.is_dir(node) && meta.kind == NodeKind::Directory => {
                    self.merge_dir(node, &meta, origin);
                }
                other => {
                    let first = self.nodes.origin(other.unwrap_or(dir));
                    if first != origin {
                        // It was clean when it came in.
                        let path = TreePath::from_clean(path).unwrap_or_default();
                        conflicts.push(Conflict { path, first, second: layer });
                    }
                }
            }
        }
        self.sort_children();
        conflicts
    }

    /// The first layer that names a directory decides its mode.
    fn merge_dir(&mut self, node: NodeId, meta: &Meta, origin: Origin) {
        let rank = |origin: Origin| match origin {
            Origin::Skeleton => u32::MAX,
            Origin::Kitfile => 0,
            Origin::Layer { layer, .. } => layer,
        };
        let before = self.nodes.origin(node);
        let listed_after_probe = rank(origin) == rank(before) && origin != Origin::Skeleton;
        if rank(origin) < rank(before) || listed_after_probe {
            self.nodes.set(node, meta, origin);
        }
    }

    /// The directory at `path`, made with all its parents where it is missing. Below a file it ends at that file.
    fn make_dirs(&mut self, path: &[u8]) -> NodeId {
        let mut node = NodeId::ROOT;
        for name in components(path) {
            node = match self.child(node, name) {
                Some(child) => child,
                None if self.nodes.is_dir(node) => self.add_child(node, name, &SKELETON, Origin::Skeleton),
                None => return node,
            };
        }
        node
    }

    /// Appends a child; [`Tree::sort_children`] puts it in its place.
    fn add_child(&mut self, dir: NodeId, name: &[u8], meta: &Meta, origin: Origin) -> NodeId {
        let (ino, _) = self.locate(dir, name);
        let id = self.nodes.push(dir, name, ino, meta, origin);
        if let Some(dir) = self.nodes.dir_mut(dir) {
            dir.children.push(id);
        }
        self.unsorted.insert(dir);
        id
    }

    /// Restores the order of directories that children were added to. What a layer adds comes in order, so that this is
    /// one merge a directory.
    fn sort_children(&mut self) {
        for dir in std::mem::take(&mut self.unsorted) {
            let children = self.nodes.dir_mut(dir).map(|dir| std::mem::take(&mut dir.children));
            let mut children = children.unwrap_or_default();
            children.sort_by(|a, b| self.nodes.name(*a).cmp(self.nodes.name(*b)));
            children.shrink_to_fit();
            if let Some(dir) = self.nodes.dir_mut(dir) {
                dir.children = children;
            }
        }
    }

    /// A number that no node of another kit's tree has, nor of this one but by a chance of one in 2^62, to stand for the root.
    pub fn root_number(&self) -> u64 {
        let mut hasher = SipHasher24::new_with_keys(self.key.0, self.key.1);
        hasher.write(b"/");
        (hasher.finish() >> (u64::BITS - INO_BITS)).max(FIRST_INO)
    }

    /// The inode number of a name in a directory, and the node that has it. A collision (one in 2^62 a pair) takes the next
    /// number.
    fn locate(&self, dir: NodeId, name: &[u8]) -> (u64, Option<NodeId>) {
        let mut hasher = SipHasher24::new_with_keys(self.key.0, self.key.1);
        hasher.write(&self.nodes.ino(dir).to_le_bytes());
        hasher.write(name);
        let mut ino = (hasher.finish() >> (u64::BITS - INO_BITS)).max(FIRST_INO);
        loop {
            match self.nodes.by_ino(ino) {
                None => return (ino, None),
                Some(id) if self.nodes.parent(id) == dir && self.nodes.name(id) == name => return (ino, Some(id)),
                Some(_) => ino = (ino.wrapping_add(1) & (u64::MAX >> (u64::BITS - INO_BITS))).max(FIRST_INO),
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
    pub fn node(&self, id: NodeId) -> Node<'_> {
        self.nodes.get(id)
    }

    /// The last component of a node's path; empty for the root.
    pub fn name(&self, id: NodeId) -> &[u8] {
        self.nodes.name(id)
    }

    /// The node with an inode number.
    pub fn by_ino(&self, ino: u64) -> Option<NodeId> {
        self.nodes.by_ino(ino)
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
            names.push(self.nodes.name(at));
            at = self.nodes.parent(at);
        }
        names.reverse();
        // The parts were valid when they came in, so the whole is.
        TreePath::clean(&names.join(&b'/')).unwrap_or_default()
    }

    /// Whether a node's attributes are final.
    pub fn is_settled(&self, id: NodeId) -> bool {
        self.nodes.dir(id).is_none_or(|dir| dir.unsure == 0)
    }

    /// Looks a name up in a directory.
    pub fn lookup(&self, dir: NodeId, name: &[u8]) -> Lookup {
        let needs = self.needs(dir, |root| root.name() == Some(name));
        if !needs.is_empty() {
            return Lookup::Needs(needs);
        }
        self.child(dir, name).map_or(Lookup::Missing, Lookup::Found)
    }

    /// What a directory is known to hold by now, in name order; there may be more.
    pub fn known_children(&self, dir: NodeId) -> &[NodeId] {
        self.nodes.dir(dir).map_or(&[], |dir| &dir.children)
    }

    /// What a directory holds, in name order; an error names the layers that it waits for.
    pub fn children(&self, dir: NodeId) -> Result<&[NodeId], Vec<Need>> {
        let needs = self.needs(dir, |_| true);
        if needs.is_empty() { Ok(self.known_children(dir)) } else { Err(needs) }
    }

    /// How many bytes its nodes take.
    pub fn bytes(&self) -> usize {
        self.nodes.bytes()
    }

    /// Layers that must be known before `dir` is read: those that hold it, and those rooted right in it whose root
    /// `concerns` the question.
    fn needs(&self, dir: NodeId, concerns: impl Fn(&TreePath) -> bool) -> Vec<Need> {
        // All are known for the most of a mount's life, and then nothing is asked of the path.
        if self.unlisted == 0 {
            return Vec::new();
        }
        let dir = self.path(dir);
        let need = |(index, (root, known)): (usize, (&TreePath, &Known))| {
            if dir.is_within(root) {
                Some(Need::Listing(index))
            } else if *known == Known::Nothing && root.parent().is_some_and(|parent| parent == dir) && concerns(root) {
                Some(Need::Probe(index))
            } else {
                None
            }
        };
        let layers = self.roots.iter().zip(&self.known).enumerate();
        layers.filter(|(_, (_, known))| **known < Known::All).filter_map(need).collect()
    }
}

/// The directory and the name of a path that is not the root's.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests;
