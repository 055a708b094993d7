//! Where the nodes of a tree are kept: about a hundred bytes for each, its name included.
//!
//! A kit may have millions of names, and a mount keeps them for as long as it lives. So a node is a record of fixed size, its
//! name stands among the names of its neighbours, and the table from inode numbers to nodes has the nodes' positions alone.
//!
//! Nodes lie in pieces that clones share until one of them changes a node of the piece: who adds to a tree that others read
//! works on a clone, which costs a pointer for a thousand nodes and the table.

use std::sync::Arc;

use super::{Meta, NodeId, NodeKind, Origin};
use crate::path::MAX_NAME;

/// Nodes that lie together: 64 KiB of records, little to copy where one of them changes.
const PIECE: usize = 1024;
/// The part of the table that may be taken, in quarters: above three, a look passes too many others on its way.
const FULL: usize = 3;
/// An empty place in the table.
const NOBODY: u32 = u32::MAX;
/// The table's first length.
const SLOTS: usize = 16;

/// The bits of [`Record::mode`] that hold the kind, as in `stat(2)`.
const KIND: u16 = 0o170_000;
const FILE: u16 = 0o100_000;
const DIRECTORY: u16 = 0o040_000;
const SYMLINK: u16 = 0o120_000;

/// The position of a layer that stands for no layer.
const NO_LAYER: u32 = u32::MAX;
/// Entries of no layer: what the plan names, and the Kitfile.
const SKELETON: u32 = 0;
const KITFILE: u32 = 1;

/// The nodes, by position and by inode number.
#[derive(Debug, Clone)]
pub(super) struct Nodes {
    pieces: Vec<Arc<Piece>>,
    /// Positions, each at its inode number or behind it: as many as a power of two.
    slots: Vec<u32>,
}

/// Up to [`PIECE`] nodes and their names.
#[derive(Debug, Clone, Default)]
struct Piece {
    records: Vec<Record>,
    names: Vec<u8>,
}

/// One node.
#[derive(Debug, Clone)]
struct Record {
    ino: u64,
    size: u64,
    mtime: i64,
    dir: Option<Box<Dir>>,
    parent: NodeId,
    layer: u32,
    entry: u32,
    uid: u32,
    gid: u32,
    /// Where its name begins among those of the piece.
    name: u32,
    mode: u16,
    name_len: u8,
}

/// What only directories have.
#[derive(Debug, Clone, Default)]
pub(super) struct Dir {
    /// Sorted by name, but while names are added.
    pub children: Vec<NodeId>,
    /// Layers that may still name this directory: those rooted below that are not probed yet, and those rooted here whose
    /// probe has not seen its entry.
    pub unsure: u32,
}

/// A node, unpacked.
#[derive(Debug, Clone)]
pub struct Node<'a> {
    /// The inode number.
    pub ino: u64,
    /// Type, mode, owner, time and size.
    pub meta: Meta,
    /// Where it comes from.
    pub origin: Origin,
    parent: NodeId,
    name: &'a [u8],
}

impl<'a> Node<'a> {
    /// The last component of its path; empty for the root.
    pub fn name(&self) -> &'a [u8] {
        self.name
    }

    /// The directory that holds it; the root holds itself.
    pub fn parent(&self) -> NodeId {
        self.parent
    }
}

impl Nodes {
    pub fn new() -> Self {
        Self { pieces: Vec::new(), slots: vec![NOBODY; SLOTS] }
    }

    pub fn len(&self) -> usize {
        self.pieces.last().map_or(0, |last| (self.pieces.len() - 1) * PIECE + last.records.len())
    }

    /// Makes room for as many more, so that the table grows once.
    pub fn reserve(&mut self, more: usize) {
        let most = (self.len() + more).min(NOBODY as usize);
        let mut slots = self.slots.len();
        while most * 4 > slots * FULL {
            slots *= 2;
        }
        if slots > self.slots.len() {
            self.rehash(slots);
        }
    }

    fn rehash(&mut self, slots: usize) {
        let mut table = vec![NOBODY; slots];
        let records = self.pieces.iter().flat_map(|piece| &piece.records);
        for (record, id) in records.zip(0..) {
            let mut at = record.ino as usize & (slots - 1);
            while table[at] != NOBODY {
                at = (at + 1) & (slots - 1);
            }
            table[at] = id;
        }
        self.slots = table;
    }

    /// Adds a node whose inode number nobody has.
    pub fn push(&mut self, parent: NodeId, name: &[u8], ino: u64, meta: &Meta, origin: Origin) -> NodeId {
        self.reserve(1);
        let id = NodeId(u32::try_from(self.len()).unwrap_or(NOBODY));
        if id.index().is_multiple_of(PIECE) {
            self.pieces.push(Arc::default());
        }
        if let Some(piece) = self.pieces.last_mut() {
            let piece = Arc::make_mut(piece);
            let record = Record {
                ino,
                size: 0,
                mtime: 0,
                dir: None,
                parent,
                layer: 0,
                entry: 0,
                uid: 0,
                gid: 0,
                name: piece.names.len() as u32,
                mode: 0,
                name_len: name.len().min(MAX_NAME) as u8,
            };
            piece.names.extend_from_slice(name);
            piece.records.push(record);
            if piece.records.len() == PIECE {
                piece.names.shrink_to_fit();
            }
        }
        self.set(id, meta, origin);
        let free = self.probe(ino).find(|at| self.slots[*at] == NOBODY);
        if let Some(at) = free {
            self.slots[at] = id.0;
        }
        id
    }

    /// The places where an inode number may stand, in order.
    fn probe(&self, ino: u64) -> impl Iterator<Item = usize> + use<> {
        let mask = self.slots.len() - 1;
        (0..=mask).map(move |step| (ino as usize).wrapping_add(step) & mask)
    }

    pub fn by_ino(&self, ino: u64) -> Option<NodeId> {
        let taken = self.probe(ino).map(|at| self.slots[at]).take_while(|slot| *slot != NOBODY);
        taken.map(NodeId).find(|id| self.record(*id).ino == ino)
    }

    fn record(&self, id: NodeId) -> &Record {
        &self.pieces[id.index() / PIECE].records[id.index() % PIECE]
    }

    fn record_mut(&mut self, id: NodeId) -> &mut Record {
        &mut Arc::make_mut(&mut self.pieces[id.index() / PIECE]).records[id.index() % PIECE]
    }

    pub fn get(&self, id: NodeId) -> Node<'_> {
        let record = self.record(id);
        Node {
            ino: record.ino,
            meta: record.meta(),
            origin: record.origin(),
            parent: record.parent,
            name: self.name(id),
        }
    }

    pub fn ino(&self, id: NodeId) -> u64 {
        self.record(id).ino
    }

    pub fn parent(&self, id: NodeId) -> NodeId {
        self.record(id).parent
    }

    pub fn origin(&self, id: NodeId) -> Origin {
        self.record(id).origin()
    }

    pub fn name(&self, id: NodeId) -> &[u8] {
        let piece = &self.pieces[id.index() / PIECE];
        let record = &piece.records[id.index() % PIECE];
        &piece.names[record.name as usize..][..record.name_len.into()]
    }

    pub fn is_dir(&self, id: NodeId) -> bool {
        self.record(id).dir.is_some()
    }

    /// What a directory has besides; nothing for what is none.
    pub fn dir(&self, id: NodeId) -> Option<&Dir> {
        self.record(id).dir.as_deref()
    }

    pub fn dir_mut(&mut self, id: NodeId) -> Option<&mut Dir> {
        self.record_mut(id).dir.as_deref_mut()
    }

    /// Says what a node is and where it comes from.
    pub fn set(&mut self, id: NodeId, meta: &Meta, origin: Origin) {
        let record = self.record_mut(id);
        let kind = match meta.kind {
            NodeKind::File => FILE,
            NodeKind::Directory => DIRECTORY,
            NodeKind::Symlink => SYMLINK,
        };
        record.mode = kind | (meta.mode & 0o7777) as u16;
        (record.uid, record.gid, record.mtime, record.size) = (meta.uid, meta.gid, meta.mtime, meta.size);
        (record.layer, record.entry) = match origin {
            Origin::Skeleton => (NO_LAYER, SKELETON),
            Origin::Kitfile => (NO_LAYER, KITFILE),
            Origin::Layer { layer, entry } => (layer, entry),
        };
        if meta.kind == NodeKind::Directory {
            record.dir.get_or_insert_default();
        }
    }

    /// How many bytes they take, those of the allocator left out.
    pub fn bytes(&self) -> usize {
        let of_dir = |dir: &Dir| size_of::<Dir>() + dir.children.capacity() * size_of::<NodeId>();
        let of_piece = |piece: &Arc<Piece>| {
            let dirs = piece.records.iter().filter_map(|record| record.dir.as_deref()).map(of_dir);
            size_of::<Piece>()
                + piece.records.capacity() * size_of::<Record>()
                + piece.names.capacity()
                + dirs.sum::<usize>()
        };
        self.pieces.iter().map(of_piece).sum::<usize>()
            + self.pieces.capacity() * size_of::<Arc<Piece>>()
            + self.slots.capacity() * size_of::<u32>()
    }
}

impl Record {
    fn meta(&self) -> Meta {
        let kind = match self.mode & KIND {
            DIRECTORY => NodeKind::Directory,
            SYMLINK => NodeKind::Symlink,
            _ => NodeKind::File,
        };
        let Self { uid, gid, mtime, size, .. } = *self;
        Meta { kind, mode: (self.mode & !KIND).into(), uid, gid, mtime, size }
    }

    fn origin(&self) -> Origin {
        match (self.layer, self.entry) {
            (NO_LAYER, KITFILE) => Origin::Kitfile,
            (NO_LAYER, _) => Origin::Skeleton,
            (layer, entry) => Origin::Layer { layer, entry },
        }
    }
}
