//! Trees for property tests, and their tars as the `tar` crate writes them.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use proptest::prelude::*;

use super::EntryKind;

/// How the generated entry is written.
#[derive(Debug, Clone, Copy)]
pub enum Dialect {
    Gnu,
    Pax,
}

#[derive(Debug, Clone)]
pub struct Node {
    pub kind: EntryKind,
    pub mode: u32,
    pub id: u64,
    pub mtime: u64,
    pub content: Vec<u8>,
    pub dialect: Dialect,
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    // Any bytes but `/` and NUL, sometimes too many for a header's field.
    prop_oneof![
        prop::collection::vec(b'a'..b'e', 1..4),
        prop::collection::vec(any::<u8>(), 1..12),
        prop::collection::vec(1..=255_u8, 90..130),
    ]
    .prop_map(|name| name.into_iter().map(|byte| if matches!(byte, 0 | b'/') { b'_' } else { byte }).collect())
    .prop_filter("dots are no names", |name: &Vec<u8>| name != b"." && name != b"..")
}

fn node() -> impl Strategy<Value = Node> {
    let kind = prop_oneof![
        4 => Just(EntryKind::File),
        1 => Just(EntryKind::Directory),
        1 => prop::collection::vec(1..=255_u8, 1..150).prop_map(EntryKind::Symlink),
    ];
    let content = prop_oneof![Just(0), Just(511), Just(512), Just(513), 0..4000_usize];
    let dialect = prop_oneof![Just(Dialect::Gnu), Just(Dialect::Pax)];
    (kind, 0..0o10000_u32, 0..1_u64 << 40, 0..1_u64 << 35, content, any::<u8>(), dialect).prop_map(
        |(kind, mode, id, mtime, size, fill, dialect)| {
            let content = if kind == EntryKind::File { vec![fill; size] } else { Vec::new() };
            Node { kind, mode, id, mtime, content, dialect }
        },
    )
}

/// Nodes by path; parents may be missing or files, which is for the listing to judge.
pub fn tree() -> impl Strategy<Value = BTreeMap<Vec<u8>, Node>> {
    let path = prop::collection::vec(name(), 1..4).prop_map(|names| names.join(&b"/"[..]));
    prop::collection::btree_map(path, node(), 0..8)
}

/// Writes the tree with the `tar` crate.
pub fn pack(tree: &BTreeMap<Vec<u8>, Node>) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, node) in tree {
        let target = if let EntryKind::Symlink(target) = &node.kind { &target[..] } else { b"" };
        // In GNU's dialect the crate writes text only, where a name is long.
        let text = [&path[..], target].iter().all(|name| std::str::from_utf8(name).is_ok());
        let dialect = if text { node.dialect } else { Dialect::Pax };
        let mut header = match dialect {
            Dialect::Gnu => tar::Header::new_gnu(),
            Dialect::Pax => tar::Header::new_ustar(),
        };
        header.set_mode(node.mode);
        header.set_uid(node.id);
        header.set_gid(node.id + 1);
        header.set_mtime(node.mtime);
        header.set_size(node.content.len() as u64);
        header.set_entry_type(match node.kind {
            EntryKind::File => tar::EntryType::Regular,
            EntryKind::Directory => tar::EntryType::Directory,
            EntryKind::Symlink(_) => tar::EntryType::Symlink,
        });
        let name = OsStr::from_bytes(path);
        match (&node.kind, dialect) {
            (EntryKind::Symlink(_), Dialect::Gnu) => {
                builder.append_link(&mut header, name, OsStr::from_bytes(target)).expect("written");
            }
            (_, Dialect::Gnu) => builder.append_data(&mut header, name, &node.content[..]).expect("written"),
            (_, Dialect::Pax) => {
                let records = [("path", &path[..]), ("linkpath", target)];
                builder.append_pax_extensions(records).expect("written");
                header.set_path("short").expect("fits");
                header.set_cksum();
                builder.append(&header, &node.content[..]).expect("written");
            }
        }
    }
    builder.into_inner().expect("written")
}
