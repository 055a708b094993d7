use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::archive::testing::{Streamed, Tar, headers, hop, stream};
use crate::archive::testing_trees::{Node, pack, tree};
use crate::path::TreePath;

/// What stands for an owner that may be too large for Linux.
fn owner(id: u64) -> u32 {
    if id < u64::from(u32::MAX) { id as u32 } else { 65534 }
}

fn expected(tree: &BTreeMap<Vec<u8>, Node>, streamed: &[Streamed]) -> Vec<Streamed> {
    let offsets = streamed.iter().map(|(entry, _)| entry.offset).chain(std::iter::repeat(0));
    let entry = |((path, node), offset): ((&Vec<u8>, &Node), u64)| {
        let entry = Entry {
            path: TreePath::from_archive(path).expect("valid"),
            kind: node.kind.clone(),
            mode: node.mode,
            uid: owner(node.id),
            gid: owner(node.id + 1),
            mtime: node.mtime.cast_signed(),
            size: node.content.len() as u64,
            offset,
        };
        (entry, node.content.clone())
    };
    tree.iter().zip(offsets).map(entry).collect()
}

fn cuts() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(0..20_000_usize, 0..12)
}

/// Changes bytes, and then makes the checksums of all blocks right, so that the change is looked at.
fn mutate(layer: &mut [u8], changes: &[(prop::sample::Index, u8)], mend: bool) {
    for (at, byte) in changes {
        layer[at.index(layer.len())] = *byte;
    }
    if mend {
        for block in layer.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
            let sum: u32 = block[..148].iter().chain(&block[156..]).map(|byte| u32::from(*byte)).sum();
            block[148..156].copy_from_slice(format!("{:06o}\0 ", sum + 8 * 32).as_bytes());
        }
    }
}

/// Walks a layer in all ways, none of which may panic or hang, and which must agree.
fn agree(layer: &[u8], cuts: &[usize]) -> Result<(), TestCaseError> {
    let size = layer.len() as u64;
    let hopped = hop(layer, 512);
    prop_assert_eq!(&hop(layer, 5000), &hopped);
    for known in [None, Some(size)] {
        let streamed = stream(layer, known, cuts);
        prop_assert_eq!(streamed.is_ok(), hopped.is_ok(), "{:?} {:?}", streamed, hopped);
        if let (Ok((streamed, warning)), Ok((hopped, hop_warning))) = (&streamed, &hopped) {
            prop_assert_eq!((&headers(streamed), warning), (hopped, hop_warning));
            for (entry, content) in streamed {
                let range = entry.offset as usize..(entry.offset + entry.size) as usize;
                prop_assert_eq!(&layer[range], &content[..]);
            }
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn what_the_tar_crate_writes_comes_back_in_any_pieces(tree in tree(), cuts in cuts(), window in 512..20_000_u64) {
        let layer = pack(&tree);
        let (streamed, warning) = stream(&layer, None, &cuts).expect("a sound tar");
        prop_assert_eq!(warning, None);
        prop_assert_eq!(&streamed, &expected(&tree, &streamed));
        prop_assert_eq!(hop(&layer, window), Ok((headers(&streamed), None)));
        for (entry, content) in &streamed {
            prop_assert_eq!(&layer[entry.offset as usize..][..content.len()], &content[..]);
        }
    }

    #[test]
    fn damaged_tars_never_panic_nor_hang_and_all_ways_agree(
        tree in tree(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        mend in any::<bool>(),
        cut in any::<prop::sample::Index>(),
        cuts in cuts(),
    ) {
        let mut layer = pack(&tree);
        mutate(&mut layer, &changes, mend);
        agree(&layer, &cuts)?;
        agree(&layer[..cut.index(layer.len())], &cuts)?;
    }

    #[test]
    fn damaged_headers_never_panic_nor_hang_and_all_ways_agree(
        typeflag in prop::sample::select(&b"\x000123456789xgLKSDV"[..]),
        changes in prop::collection::vec((0..512_usize, any::<u8>()), 0..6),
        size in prop::collection::vec(any::<u8>(), 12),
        keep_size in any::<bool>(),
        cuts in cuts(),
    ) {
        let spoil = |header: &mut tar::Header| {
            if !keep_size {
                header.as_old_mut().size.copy_from_slice(&size);
            }
            for (at, byte) in &changes {
                header.as_mut_bytes()[*at] = *byte;
            }
        };
        let layer = Tar::new().header(b"name", typeflag, 20, spoil).data(b"20 path=a/bcdefghij\n").file("f", b"x").end();
        agree(&layer, &cuts)?;
    }

    #[test]
    fn arbitrary_bytes_never_panic_nor_hang(layer in prop::collection::vec(any::<u8>(), 0..3000), cuts in cuts()) {
        agree(&layer, &cuts)?;
    }
}

#[test]
fn a_header_in_single_bytes_is_put_together_and_contents_are_not_copied() {
    let layer = Tar::new().pax(&[("path", b"long")]).file("f", &[9; 1000]).end();
    let every: Vec<usize> = (0..layer.len()).collect();
    let (streamed, _) = stream(&layer, None, &every).expect("a sound tar");
    assert_eq!(streamed[0].1, [9; 1000]);

    let mut walker = StreamWalker::new(None, Caps::default());
    let mut rest = &layer[..];
    let mut found = None;
    while let Some(event) = walker.next(&mut rest).expect("a sound tar") {
        if let Event::Content(bytes) = event {
            found = Some(bytes.as_ptr_range());
        }
    }
    assert_eq!(found, Some(layer[1536..2536].as_ptr_range()));
}

#[test]
fn what_is_held_back_never_exceeds_the_cap() {
    let caps = Caps { extension: 4096, ..Caps::default() };
    let records = [b"4096 comment=".to_vec(), vec![b'x'; 4082], b"\n".to_vec()].concat();
    let layer = Tar::new().entry(b"x", b'x', &records).file("f", &[0; 100_000]).end();
    let mut walker = StreamWalker::new(None, caps);
    for byte in layer.chunks(1) {
        let mut rest = byte;
        while walker.next(&mut rest).expect("a sound tar").is_some() {}
        assert!(walker.held.capacity() <= 4096, "{}", walker.held.capacity());
    }
    assert_eq!(walker.finish(), Ok(None));
}
