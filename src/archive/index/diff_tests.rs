use super::*;
use crate::archive::chunk::{Chunker, Content};
use crate::archive::index::{IndexEntry, LayerFormat};
use crate::archive::{Entry, EntryKind};
use crate::modelkit::Compression;
use crate::object::CHUNK_SIZE;
use crate::path::TreePath;

fn content(bytes: &[u8]) -> Content {
    let mut chunker = Chunker::new();
    chunker.update(bytes);
    chunker.finish()
}

fn entry(path: &str, kind: EntryKind, offset: u64, bytes: Option<&[u8]>) -> IndexEntry {
    let path = TreePath::from_clean(path.as_bytes()).expect("clean");
    let size = bytes.map_or(0, |bytes| bytes.len() as u64);
    let entry = Entry { path, kind, mode: 0o644, uid: 1000, gid: 0, mtime: 7, size, offset };
    IndexEntry { entry, content: bytes.map(content) }
}

fn big(last: u8) -> Vec<u8> {
    let mut bytes = vec![0; CHUNK_SIZE as usize * 2 + 1];
    bytes[CHUNK_SIZE as usize * 2] = last;
    bytes
}

/// `a` (three chunks), `dir`, `link`, `z`, for a test to change.
fn rows() -> Vec<IndexEntry> {
    vec![
        entry("a", EntryKind::File, 512, Some(&big(0))),
        entry("dir", EntryKind::Directory, 512, None),
        entry("link", EntryKind::Symlink(b"z".to_vec()), 512, None),
        entry("z", EntryKind::File, 3 << 20, Some(b"last")),
    ]
}

fn build(rows: Vec<IndexEntry>) -> Index {
    let digest = Digest::of(b"layer");
    let facts = LayerFacts {
        digest,
        size: 4 << 20,
        diff_id: digest,
        inflated: 4 << 20,
        format: LayerFormat::Tar,
        compression: Compression::None,
    };
    Index::build(facts, rows).expect("an index")
}

fn told(change: impl FnOnce(&mut Vec<IndexEntry>)) -> Vec<String> {
    let mut stated = rows();
    change(&mut stated);
    let all = compare(&build(stated), &build(rows()), 20);
    assert_eq!(all.count, all.first.len() as u64);
    all.first.iter().map(ToString::to_string).collect()
}

#[test]
fn an_index_does_not_differ_from_itself() {
    assert!(compare(&build(rows()), &build(rows()), 20).is_empty());
    assert_eq!(told(|_| ()), Vec::<String>::new());
}

#[test]
fn each_field_of_an_entry_is_named_with_both_values() {
    let field = |change: fn(&mut Entry)| told(|rows| change(&mut rows[3].entry));
    for (change, said) in [
        ((|entry| entry.mode = 0o4755) as fn(&mut Entry), "\"z\": mode: the index says 4755, it is 0644"),
        (|entry| entry.uid = 1, "\"z\": uid: the index says 1, it is 1000"),
        (|entry| entry.gid = 1, "\"z\": gid: the index says 1, it is 0"),
        (|entry| entry.mtime = -1, "\"z\": mtime: the index says -1, it is 7"),
        (|entry| entry.offset += 512, "\"z\": offset: the index says 3146240, it is 3145728"),
    ] {
        assert_eq!(field(change), [said]);
    }
    assert_eq!(
        told(|rows| rows[2].entry.kind = EntryKind::Symlink(b"a".to_vec())),
        ["\"link\": type: the index says symbolic link to \"a\", it is symbolic link to \"z\""]
    );
    assert_eq!(
        told(|rows| rows[1] = entry("dir", EntryKind::File, 512, Some(b""))),
        ["\"dir\": type: the index says file, it is directory"]
    );
    assert_eq!(
        told(|rows| rows[3] = entry("z", EntryKind::File, 3 << 20, Some(b"other"))),
        ["\"z\": size: the index says 5, it is 4"]
    );
}

#[test]
fn entries_that_one_of_them_lacks_are_told_from_both_sides() {
    assert_eq!(told(|rows| drop(rows.remove(0))), ["\"a\": in the layer, not in the index"]);
    assert_eq!(told(|rows| drop(rows.pop())), ["\"z\": in the layer, not in the index"]);
    let more = |rows: &mut Vec<IndexEntry>| {
        rows.push(entry("zz", EntryKind::Directory, 0, None));
        rows.push(entry("b", EntryKind::Directory, 0, None));
    };
    assert_eq!(told(more), ["\"b\": in the index, not in the layer", "\"zz\": in the index, not in the layer"]);
}

#[test]
fn a_false_chunk_is_told_by_its_place_in_the_file() {
    let (zero, one) = (Digest::of(&[0]), Digest::of(&[1]));
    assert_eq!(
        told(|rows| rows[0] = entry("a", EntryKind::File, 512, Some(&big(1)))),
        [format!("\"a\": chunk 2 (bytes 2097152 to 2097153): the index says {one}, it is {zero}")]
    );
    let small = told(|rows| rows[3] = entry("z", EntryKind::File, 3 << 20, Some(b"tsal")));
    assert!(small[0].starts_with("\"z\": chunk 0 (bytes 0 to 4): the index says sha256:"), "{small:?}");
}

#[test]
fn facts_of_the_layer_are_compared_too() {
    let facts = |diff_id: &[u8], inflated| LayerFacts {
        digest: Digest::of(b"layer"),
        size: 100,
        diff_id: Digest::of(diff_id),
        inflated,
        format: LayerFormat::Tar,
        compression: Compression::Gzip,
    };
    let stated = Index::build(facts(b"a", 2048), Vec::new()).expect("an index");
    let found = Index::build(facts(b"b", 1024), Vec::new()).expect("an index");
    let said: Vec<_> = compare(&stated, &found, 20).first.iter().map(ToString::to_string).collect();
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said[0].starts_with("the layer's diffId: the index says sha256:"), "{said:?}");
    assert_eq!(said[1], "the layer's uncompressed size: the index says 2048, it is 1024");
}

#[test]
fn all_differences_are_counted_and_the_first_are_kept() {
    let many = |uid| (0..50).map(|at| entry(&format!("f{at:02}"), EntryKind::Directory, uid, None)).collect();
    let all = compare(&build(many(1)), &build(many(2)), 20);
    assert_eq!((all.first.len(), all.count), (20, 50));
    assert!(all.first[19].to_string().starts_with("\"f19\": offset"), "{:?}", all.first[19]);
}
