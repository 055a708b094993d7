use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::archive::EntryKind;
use crate::archive::listing::Listing;
use crate::archive::testing::{Tar, content_of, headers, index_of, stream};
use crate::archive::testing_trees::{pack, tree};
use crate::modelkit::Kind;
use crate::object::{CHUNK_SIZE, ObjectDigest, chunk_count};
use crate::path::TreePath;

const CHUNK: u64 = CHUNK_SIZE as u64;

pub(super) fn row(path: &[u8], kind: EntryKind, offset: u64, content: Option<Content>) -> IndexEntry {
    let path = TreePath::from_archive(path).expect("valid");
    let size = content.as_ref().map_or(0, |content| content.size);
    IndexEntry { entry: Entry { path, kind, mode: 0o644, uid: 1000, gid: 5, mtime: -1, size, offset }, content }
}

pub(super) fn file(path: &str, offset: u64, bytes: &[u8]) -> IndexEntry {
    row(path.as_bytes(), EntryKind::File, offset, Some(content_of(bytes)))
}

pub(super) fn dir(path: &str) -> IndexEntry {
    row(path.as_bytes(), EntryKind::Directory, 0, None)
}

pub(super) fn facts(size: u64) -> LayerFacts {
    let digest = Digest::of(b"layer");
    let compression = Compression::None;
    LayerFacts { digest, size, diff_id: digest, inflated: size, format: LayerFormat::Tar, compression }
}

/// A file of made-up chunk digests.
fn made_up(path: &[u8], offset: u64, size: u64) -> IndexEntry {
    let chunks: Vec<_> = (0..chunk_count(size)).map(|at| Digest::of(&[path, &at.to_le_bytes()].concat())).collect();
    let object = ObjectDigest::new(size, &chunks);
    row(path, EntryKind::File, offset, Some(Content { size, chunks, object }))
}

/// What an index was built from, in its order.
fn rows<B: AsRef<[u8]>>(index: &Index<B>) -> Vec<IndexEntry> {
    (0..index.head().len()).map(|at| index.entry(at).expect("within")).collect()
}

fn refused(index: Result<Index, IndexError>) -> String {
    crate::report::chain(&index.expect_err("refused"))
}

#[test]
fn an_index_holds_what_it_was_built_from_sorted_by_path() {
    let link = row(b"d/\xff\n", EntryKind::Symlink(b"\xfe/x".to_vec()), 512, None);
    let (big, small, empty) = (made_up(b"d/b", 4096, CHUNK + 1), file("d/a", 1024, b"abc"), file("e", 0, b""));
    let given = [empty.clone(), link.clone(), big.clone(), dir("d"), small.clone()];
    let index = Index::build(facts(4 << 20), given.to_vec()).expect("sound");
    assert_eq!(rows(&index), [dir("d"), small, big, link, empty]);
    assert_eq!(index.head().layer(), &facts(4 << 20));

    let read = Index::decode(index.as_bytes(), None).expect("sound");
    assert_eq!(read.as_bytes(), index.as_bytes());
    let head = Head::parse(index.head().as_bytes(), None).expect("sound");
    assert_eq!(head.index_len(), index.as_bytes().len() as u64);
    assert!(head.rows().map(|row| row.to_entry()).eq(index.head().rows().map(|row| row.to_entry())));
}

#[test]
fn the_object_of_a_file_is_told_whether_it_is_stored_or_computed() {
    let given = [made_up(b"big", 4096, 5 * CHUNK), file("empty", 0, b""), file("small", 1024, b"abc")];
    let index = Index::build(facts(8 << 20), given.to_vec()).expect("sound");
    for (at, given) in given.iter().enumerate() {
        let (row, content) = (index.head().row(at).expect("within"), given.content.as_ref().expect("a file"));
        assert_eq!(row.object(), Some(content.object), "{row:?}");
        assert_eq!(Content::of(&index.chunks(at).expect("a file")), *content);
    }
}

#[test]
fn a_small_file_needs_the_head_alone_and_a_large_one_its_list() {
    let bytes = vec![7; CHUNK as usize + 1];
    let rows = vec![file("a", 512, b"abc"), file("b", 1024, &bytes), made_up(b"c", 4 << 20, 3 * CHUNK), dir("d")];
    let index = Index::build(facts(8 << 20), rows).expect("sound");
    let head = Head::parse(index.head().as_bytes().to_vec(), None).expect("sound");
    let row = |path| head.row(head.find(path).expect("listed")).expect("within");

    let Some(Chunks::Here(list)) = row(b"a").chunks() else { panic!("a small file") };
    assert_eq!((list.len(), list.digest(0), list.digest(1)), (1, Some(Digest::of(b"abc")), None));
    assert_eq!((list.range(0), list.range(1)), (Some(0..3), None));

    let Some(Chunks::At(range)) = row(b"b").chunks() else { panic!("a large file") };
    let fetched = &index.as_bytes()[range.start as usize..range.end as usize];
    let list = row(b"b").list(fetched).expect("its list");
    assert_eq!((list.len(), list.size(), list.object()), (2, CHUNK + 1, content_of(&bytes).object));
    assert_eq!(list.digest(1), Some(Digest::of(&[7])));
    assert_eq!((list.range(0), list.range(1), list.range(2)), (Some(0..CHUNK), Some(CHUNK..CHUNK + 1), None));
    assert_eq!(list.range(u64::MAX), None);

    let mut spoilt = fetched.to_vec();
    spoilt[63] ^= 1;
    let why = |row: &Row<'_>, bytes: &[u8]| row.list(bytes).expect_err("refused").why;
    assert_eq!(why(&row(b"b"), &spoilt), "its object digest does not follow from its chunk list");
    assert_eq!(why(&row(b"b"), &fetched[..32]), "its chunk list does not fit its size");
    assert_eq!(why(&row(b"c"), fetched), "its chunk list does not fit its size");
    assert_eq!(why(&row(b"a"), &[]), "it has none");
    assert!(row(b"d").chunks().is_none() && row(b"d").object().is_none());
}

#[test]
fn an_entry_is_found_by_its_path_whatever_sorts_between() {
    let paths = ["a", "a-b", "a.c", "a/x", "a/x-1", "a/x/1", "a0", "b/c-/e", "b/c/d"];
    let rows = paths.into_iter().map(|path| if ["a", "a/x"].contains(&path) { dir(path) } else { file(path, 0, b"") });
    let index = Index::build(facts(100), rows.collect()).expect("sound");
    for (at, path) in paths.into_iter().enumerate() {
        assert_eq!(index.head().find(path.as_bytes()), Some(at), "{path}");
    }
    for path in ["", "a-", "b", "b/c", "c"] {
        assert_eq!(index.head().find(path.as_bytes()), None, "{path}");
    }
}

#[test]
fn a_directory_may_repeat_in_an_archive_and_its_first_mode_stays() {
    let mut first = dir("a");
    first.entry.mode = 0o700;
    let index = Index::build(facts(100), vec![first, dir("a"), dir("a")]).expect("sound");
    assert_eq!(rows(&index).iter().map(|row| row.entry.mode).collect::<Vec<_>>(), [0o700]);
}

#[test]
fn archives_that_contradict_themselves_are_refused() {
    let build = |rows| refused(Index::build(facts(100), rows));
    assert!(build(vec![file("a", 0, b""), dir("a")]).contains("a more than once"));
    assert!(build(vec![file("a", 0, b""), file("a-b", 0, b""), file("a/b", 0, b"")]).contains("a is not a directory"));
    let link = row(b"a", EntryKind::Symlink(b"b".to_vec()), 0, None);
    assert!(build(vec![link, dir("b"), file("a/b", 0, b"")]).contains("a is not a directory"));
    assert!(build(vec![file("a", 0, b"abc"), file("b", 2, b"abc")]).contains("contents of a and b overlap"));
    for offset in [98, u64::MAX] {
        assert!(build(vec![file("a", offset, b"abc")]).contains("beyond the end"));
    }
}

#[test]
fn what_has_no_encoding_is_refused() {
    let spoilt = |row: IndexEntry, spoil: fn(&mut IndexEntry)| {
        let mut row = row;
        spoil(&mut row);
        refused(Index::build(facts(100), vec![row]))
    };
    assert!(spoilt(file("f", 0, b"abc"), |row| row.entry.mode = 0o100_644).contains("permission bits"));
    assert!(spoilt(file("f", 0, b"abc"), |row| row.content = None).contains("lacks its content"));
    assert!(spoilt(file("f", 0, b"abc"), |row| row.entry.size = 4).contains("don't fit the size"));
    let other = |row: &mut IndexEntry| {
        if let Some(content) = &mut row.content {
            content.object = ObjectDigest::new(1, &[]);
        }
    };
    assert!(spoilt(file("f", 0, b"abc"), other).contains("object digest does not follow"));
    assert!(spoilt(dir("d"), |row| row.content = Some(content_of(b""))).contains("only files have content"));
    assert!(spoilt(dir("d"), |row| row.entry.size = 1).contains("only files have a size"));
}

#[test]
fn a_raw_layer_is_one_file_at_the_root() {
    let raw = |rows: Vec<IndexEntry>| Index::build(LayerFacts { format: LayerFormat::Raw, ..facts(3) }, rows);
    let plain = |mut row: IndexEntry| {
        (row.entry.uid, row.entry.gid, row.entry.mtime) = (0, 0, 0);
        row
    };
    let index = raw(vec![plain(file("", 0, b"abc"))]).expect("sound");
    assert_eq!(index.head().find(b""), Some(0));
    assert!(refused(raw(vec![])).contains("exactly one entry"));
    assert!(refused(raw(vec![plain(file("", 0, b"ab"))])).contains("whole layer"));
    assert!(refused(raw(vec![plain(file("", 1, b"ab"))])).contains("whole layer"));
    assert!(refused(raw(vec![plain(file("a", 0, b"abc"))])).contains("whole layer"));
    assert!(refused(raw(vec![plain(dir(""))])).contains("whole layer"));
    assert!(refused(raw(vec![file("", 0, b"abc")])).contains("mode 0644"));
    assert!(refused(Index::build(facts(3), vec![file("", 0, b"abc")])).contains("root must be a directory"));
}

#[test]
fn a_layer_may_inflate_as_far_as_its_reader_allows() {
    let bomb = LayerFacts { compression: Compression::Gzip, inflated: (1 << 30) + 1, ..facts(1000) };
    let index = Index::build(bomb, vec![]).expect("sound");
    let read = |bound| Index::decode(index.as_bytes(), bound);
    assert!(matches!(read(None), Err(IndexError::InflatesTooFar { bound: 0x4000_0000, .. })));
    assert!(read(Some(1 << 31)).is_ok());
    let stored = Index::build(facts(1 << 40), vec![]).expect("sound");
    assert!(Index::decode(stored.as_bytes(), Some(0)).is_ok(), "what is not compressed does not inflate");
}

#[test]
fn an_index_is_of_the_layer_that_the_plan_knows_and_of_no_other() {
    let layer = Layer {
        digest: Digest::of(b"layer"),
        size: 100,
        diff_id: None,
        media_type: "application/vnd.kitops.modelkit.code.v1.tar".to_owned(),
        annotations: BTreeMap::new(),
        kind: Kind::Code,
        name: None,
        path: ".".to_owned(),
        format: Format::Tar,
        compression: Compression::None,
        root: TreePath::root(),
        prefix: TreePath::root(),
        kit: 0,
    };
    assert!(facts(100).fit(&layer));
    assert!(!facts(100).fit(&Layer { digest: Digest::of(b"other"), ..layer.clone() }));
    assert!(!facts(101).fit(&layer));
    assert!(!facts(100).fit(&Layer { compression: Compression::Gzip, ..layer.clone() }));
    assert!(!LayerFacts { format: LayerFormat::Raw, ..facts(100) }.fit(&layer));
}

#[test]
fn the_pin_covers_the_head_and_the_whole() {
    let index = Index::build(facts(8 << 20), vec![made_up(b"a", 0, 3 * CHUNK)]).expect("sound");
    let (pin, bytes) = (index.pin(), index.as_bytes());
    assert_eq!((pin.size, pin.head_size), (bytes.len() as u64, bytes.len() as u64 - 96));
    assert_eq!(pin.digest, Digest::of(bytes));
    assert_eq!(pin.head_digest, Digest::of(&bytes[..bytes.len() - 96]));
    let annotations = pin.annotations().map(|(key, value)| (key.to_owned(), value));
    assert_eq!(Pin::read(&BTreeMap::from(annotations)), Ok(Some(pin)));
}

/// Entries with names that sort around the slash, contents of up to four chunks, and no contradictions.
fn entries() -> impl Strategy<Value = Vec<IndexEntry>> {
    let name = prop::collection::vec(prop::sample::select(&b"a\x01-.0\xff"[..]), 1..4)
        .prop_filter("dots are no names", |name| name != b"." && name != b"..");
    let path = prop::collection::vec(name, 1..4).prop_map(|names| names.join(&b"/"[..]));
    let size = prop_oneof![Just(0), 1..CHUNK, Just(CHUNK), Just(CHUNK + 1), 0..4 * CHUNK];
    let kind = prop_oneof![
        6 => size.prop_map(Some),
        1 => Just(None),
    ];
    let nodes = prop::collection::btree_map(path, (kind, any::<bool>(), 0..600_u64), 0..40);
    nodes.prop_map(|nodes| {
        let mut offset = 0;
        let mut rows = Vec::new();
        for (path, (size, link, gap)) in &nodes {
            let parent = |other: &[u8]| other.strip_prefix(&path[..]).is_some_and(|rest| rest.starts_with(b"/"));
            let row = match size {
                _ if nodes.keys().any(|other| parent(other)) => row(path, EntryKind::Directory, offset, None),
                None if *link => row(path, EntryKind::Symlink(path.clone()), offset, None),
                None => row(path, EntryKind::Directory, offset, None),
                Some(size) => made_up(path, offset, *size),
            };
            offset += gap + row.entry.size;
            rows.push(row);
        }
        rows
    })
}

proptest! {
    #[test]
    fn any_tar_gives_an_index_of_the_same_tree(tree in tree()) {
        let layer = pack(&tree);
        let (streamed, _) = stream(&layer, None, &[]).expect("a sound tar");
        match (Listing::build(headers(&streamed)), index_of(&layer)) {
            // Of several contradictions each tells the one that it meets first.
            (Err(_), Err(IndexError::Contradiction(_))) => {}
            (Ok(listing), Ok(index)) => {
                let entries: Vec<_> = index.head().rows().map(|row| row.to_entry()).collect();
                prop_assert_eq!(entries, listing.entries().map(|entry| entry.to_entry()).collect::<Vec<_>>());
                for (entry, bytes) in &streamed {
                    let at = index.head().find(entry.path.as_bytes()).expect("listed");
                    let content = index.chunks(at).map(|list| Content::of(&list));
                    prop_assert_eq!(content, (entry.kind == EntryKind::File).then(|| content_of(bytes)));
                }
                let again = index_of(&layer).expect("as before");
                prop_assert_eq!(again.as_bytes(), index.as_bytes());
            }
            (listing, index) => prop_assert!(false, "{listing:?}, but {index:?}"),
        }
    }

    #[test]
    fn entries_come_back_whatever_their_order_and_bytes_are_always_the_same(
        given in entries(),
        keys in prop::collection::vec(any::<u64>(), 40),
    ) {
        let index = Index::build(facts(1 << 30), given.clone()).expect("sound");
        prop_assert_eq!(rows(&index), given.clone());
        for (at, row) in given.iter().enumerate() {
            prop_assert_eq!(index.head().find(row.entry.path.as_bytes()), Some(at));
        }
        let mut shuffled: Vec<_> = keys.into_iter().zip(given).collect();
        shuffled.sort_by_key(|(key, _)| *key);
        let shuffled = shuffled.into_iter().map(|(_, row)| row).collect();
        let again = Index::build(facts(1 << 30), shuffled).expect("sound");
        prop_assert_eq!(again.as_bytes(), index.as_bytes());
        let read = Index::decode(index.as_bytes().to_vec(), None).expect("sound");
        let rebuilt = Index::build(facts(1 << 30), rows(&read)).expect("sound");
        prop_assert_eq!(rebuilt.as_bytes(), index.as_bytes());
        let head = Head::parse(index.head().as_bytes(), None).expect("sound");
        prop_assert_eq!(head.index_len(), index.as_bytes().len() as u64);
    }
}

#[test]
fn the_caps_leave_room_for_every_place_in_32_bits() {
    for cap in [MAX_ENTRIES, MAX_NAMES, MAX_CHUNKS] {
        assert!(u32::try_from(cap).is_ok(), "{cap}");
    }
}

#[test]
fn a_tar_indexed_in_pieces_gives_the_same_bytes() {
    let layer = Tar::new().dir("d").file("d/a", &vec![1; 3 << 20]).symlink("l", b"d/a").end();
    let whole = index_of(&layer).expect("sound");
    let (streamed, _) = stream(&layer, Some(layer.len() as u64), &[1, 511, 600, 1 << 20, 2_000_001]).expect("sound");
    let rows = streamed.into_iter().map(|(entry, bytes)| {
        let content = (entry.kind == EntryKind::File).then(|| content_of(&bytes));
        IndexEntry { entry, content }
    });
    let pieces = Index::build(whole.head().layer().clone(), rows.collect()).expect("sound");
    assert_eq!(pieces.as_bytes(), whole.as_bytes());
}
