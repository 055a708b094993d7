//! Any bytes as an index: what is read is sound, is found again, and has no other form.
#![no_main]

use kitfs::archive::EntryKind;
use kitfs::object::ObjectDigest;
use kitfs::archive::index::{Chunks, Head, Index};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = Head::parse(data, None);
    let Ok(index) = Index::decode(data, None) else { return };
    let head = Head::parse(index.head().as_bytes(), None).expect("a part of what is sound");
    assert_eq!(head.index_len(), data.len() as u64);
    let mut rows = Vec::new();
    for (at, row) in head.rows().enumerate() {
        assert!(row.offset() + row.size() <= head.layer().inflated);
        assert_eq!(head.find(row.path()), Some(at));
        let entry = index.entry(at).expect("within");
        assert_eq!(entry.entry.kind == EntryKind::File, entry.content.is_some());
        if let Some(content) = &entry.content {
            assert_eq!(content.object, ObjectDigest::new(row.size(), &content.chunks));
            assert_eq!(row.object(), Some(content.object));
        }
        if let Some(Chunks::At(range)) = row.chunks() {
            row.list(&data[range.start as usize..range.end as usize]).expect("was checked with the index");
        }
        rows.push(entry);
    }
    let again = Index::build(index.head().layer().clone(), rows).expect("what was sound stays so");
    assert_eq!(again.as_bytes(), data);
});
