//! Indexes that somebody else made: each rule broken once, flipped bits, garbage.

use proptest::prelude::*;

use super::layout::{HEADER_LEN, RECORD_LEN};
use super::tests::{dir, facts, file, row};
use super::*;
use crate::archive::EntryKind;
use crate::archive::testing::content_of;

/// Names: `d`, `d/a`, `d/b`, `d/c`, `d/e`, `d/l`, `../x`.
const NAMES: usize = HEADER_LEN + 6 * RECORD_LEN;
const LISTS: usize = NAMES + 20;

const D: usize = 0;
const A: usize = 1;
const B: usize = 2;
const C: usize = 3;
const E: usize = 4;
const L: usize = 5;

fn sample() -> Vec<u8> {
    let rows = vec![
        dir("d"),
        file("d/a", 1024, b"abc"),
        row(b"d/b", EntryKind::File, 2048, Some(content_of(&vec![7; (1 << 20) + 1]))),
        row(b"d/c", EntryKind::File, 4 << 20, Some(content_of(&vec![8; 2 << 20]))),
        file("d/e", 512, b""),
        row(b"d/l", EntryKind::Symlink(b"../x".to_vec()), 512, None),
    ];
    let index = Index::build(facts(8 << 20), rows).expect("sound");
    assert_eq!(index.as_bytes().len(), LISTS + 4 * 32);
    index.as_bytes().to_vec()
}

/// Where a field of a record is.
fn at(record: usize, field: usize) -> usize {
    HEADER_LEN + record * RECORD_LEN + field
}

/// Fields of a record.
const DIGEST: usize = 0;
const SIZE: usize = 32;
const OFFSET: usize = 40;
const UID: usize = 56;
const GID: usize = 60;
const CHUNKS: usize = 64;
const PATH: usize = 68;
const PATH_LEN: usize = 72;
const MODE: usize = 74;

/// The bytes that are put in place of what is there.
fn u64s(value: u64) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

fn u32s(value: u32) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

fn u16s(value: u16) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

/// What it breaks, the changes, and what the refusal says.
type Case = (&'static str, Vec<(usize, Vec<u8>)>, &'static str);

/// What the head alone shows.
fn head_cases() -> Vec<Case> {
    let raw = |more: Vec<(usize, Vec<u8>)>| [vec![(12, vec![1])], more].concat();
    vec![
        ("magic", vec![(0, b"K".to_vec())], "does not begin with \"kitfsidx\""),
        ("version", vec![(8, u32s(2))], "has version 2; this kitfs reads version 1"),
        ("format", vec![(12, vec![2])], "unknown format"),
        ("compression", vec![(13, vec![3])], "unknown compression"),
        ("unused byte", vec![(14, vec![1])], "unused bytes are not zero"),
        ("unused byte", vec![(15, vec![1])], "unused bytes are not zero"),
        ("chunk size", vec![(16, u32s(1 << 21))], "the chunk size is not 1 MiB"),
        ("number of entries", vec![(20, u32s(u32::MAX))], "4294967295 entries; at most 16777216"),
        ("number of entries", vec![(20, u32s(5))], "should have"),
        ("number of entries", vec![(20, u32s(16 << 20))], "should have"),
        ("bytes of names", vec![(24, u32s(u32::MAX))], "4294967295 bytes of names; at most 1073741824"),
        ("bytes of names", vec![(24, u32s(19))], "should have"),
        ("number of chunks", vec![(28, u32s(u32::MAX))], "4294967295 chunk digests; at most 67108864"),
        ("size", vec![(32, u64s(1))], "must be the same uncompressed"),
        ("uncompressed size", vec![(40, u64s(1))], "must be the same uncompressed"),
        ("digest", vec![(48, vec![0])], "must be the same uncompressed"),
        ("diffId", vec![(80, vec![0])], "must be the same uncompressed"),
        ("bound", vec![(13, vec![1]), (40, u64s(1 << 40))], "inflates to 1099511627776 bytes; at most 1073741824"),
        ("raw: one entry", raw(vec![]), "exactly one entry"),
        ("path's place", vec![(at(A, PATH), u32s(0))], "does not begin where the names before it end"),
        ("path's place", vec![(at(D, PATH), u32s(1))], "does not begin where the names before it end"),
        ("path's place", vec![(at(A, PATH), u32s(u32::MAX))], "does not begin where the names before it end"),
        ("path's length", vec![(at(A, PATH_LEN), u16s(2))], "has an empty component"),
        ("path's length", vec![(at(A, PATH_LEN), u16s(4))], "does not begin where the names before it end"),
        ("path's length", vec![(at(L, PATH_LEN), u16s(u16::MAX))], "not within the names"),
        ("path: climbs", vec![(NAMES + 1, b"../".to_vec())], "contains `..`"),
        ("path: absolute", vec![(NAMES + 1, b"/aa".to_vec())], "slash at an end"),
        ("path: not clean", vec![(NAMES + 1, b"a//".to_vec())], "has an empty component"),
        ("path: not clean", vec![(NAMES + 1, b"./a".to_vec())], "contains `.`"),
        ("path: NUL", vec![(NAMES + 3, vec![0])], "contains a NUL byte"),
        ("order", vec![(NAMES + 3, b"z".to_vec())], "not sorted by path"),
        ("repeated path", vec![(NAMES + 3, b"b".to_vec())], "d/b more than once"),
        ("parent a file", vec![(at(D, MODE), u16s(0o100_644))], "d is not a directory"),
        ("type", vec![(at(A, MODE), u16s(0o060_644))], "neither a file nor a directory nor a symbolic link"),
        ("type", vec![(at(A, MODE), u16s(0o644))], "neither a file nor a directory nor a symbolic link"),
        ("type", vec![(at(A, MODE), u16s(0o040_644))], "has a digest, but no content"),
        ("type", vec![(at(E, MODE), u16s(0o644))], "neither a file nor a directory nor a symbolic link"),
        ("owner", vec![(at(A, UID), u32s(u32::MAX))], "the number that stands for none"),
        ("group", vec![(at(A, GID), u32s(u32::MAX))], "the number that stands for none"),
        ("offset", vec![(at(A, OFFSET), u64s((8 << 20) - 2))], "beyond the end of the layer"),
        ("offset", vec![(at(A, OFFSET), u64s(u64::MAX))], "beyond the end of the layer"),
        ("offset of a directory", vec![(at(D, OFFSET), u64s((8 << 20) + 1))], "beyond the end of the layer"),
        ("overlap", vec![(at(A, OFFSET), u64s(4096))], "contents of d/b and d/a overlap"),
        ("size of a file", vec![(at(A, SIZE), u64s(u64::MAX))], "beyond the end of the layer"),
        ("size of a file", vec![(at(A, SIZE), u64s(0))], "has a digest, but no content"),
        ("size of a file", vec![(at(B, SIZE), u64s(1))], "chunk list does not begin where"),
        ("size of a file", vec![(at(C, SIZE), u64s(1))], "chunk list does not begin where"),
        ("size of a file", vec![(at(C, SIZE), u64s(3 << 20))], "chunk digests that belong to no entry"),
        ("size of a directory", vec![(at(D, SIZE), u64s(1))], "a directory has no size"),
        ("digest of a directory", vec![(at(D, DIGEST), vec![1])], "has a digest, but no content"),
        ("digest of an empty file", vec![(at(E, DIGEST + 31), vec![1])], "has a digest, but no content"),
        ("digest of a link", vec![(at(L, DIGEST), vec![1])], "has a digest, but no content"),
        ("list's place", vec![(at(A, CHUNKS), u32s(1))], "chunk list does not begin where"),
        ("list's place", vec![(at(D, CHUNKS), u32s(1))], "chunk list does not begin where"),
        ("list's place", vec![(at(B, CHUNKS), u32s(1))], "chunk list does not begin where"),
        ("list's place", vec![(at(C, CHUNKS), u32s(0))], "chunk list does not begin where"),
        ("target: empty", vec![(at(L, SIZE), u64s(0))], "the link's target is empty"),
        ("target: short", vec![(at(L, SIZE), u64s(3))], "names that belong to no entry"),
        ("target: beyond", vec![(at(L, SIZE), u64s(5))], "target is not within the names"),
        ("target: beyond", vec![(at(L, SIZE), u64s(u64::MAX))], "target is not within the names"),
        ("target: NUL", vec![(NAMES + 16, vec![0])], "contains a NUL byte"),
    ]
}

fn patched(changes: &[(usize, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = sample();
    for (at, change) in changes {
        let place = &mut bytes[*at..at + change.len()];
        assert_ne!(place, change, "changes nothing at {at}");
        place.copy_from_slice(change);
    }
    bytes
}

fn refusal(bytes: &[u8]) -> String {
    crate::report::chain(&Index::decode(bytes, None).expect_err("refused"))
}

#[test]
fn each_rule_of_the_head_is_held_by_who_reads_the_head_and_who_reads_all() {
    for (rule, changes, says) in head_cases() {
        let bytes = patched(&changes);
        let whole = refusal(&bytes);
        assert!(whole.contains(says), "{rule}: expected {says:?} in: {whole}");
        let head = crate::report::chain(&Head::parse(&bytes[..LISTS], None).expect_err(rule));
        assert!(head.contains(says), "{rule}: expected {says:?} in: {head}");
    }
}

#[test]
fn each_chunk_list_must_be_what_its_object_digest_is_of() {
    let follows = "does not follow from its chunk list";
    let cases = [
        ("first list", vec![(LISTS, vec![0])], "entry 2 of the index, \"d/b\""),
        ("last list", vec![(LISTS + 127, vec![0])], "entry 3 of the index, \"d/c\""),
        ("object digest", vec![(at(B, DIGEST), vec![0])], "entry 2 of the index, \"d/b\""),
        ("size within the chunk", vec![(at(B, SIZE), u64s((1 << 20) + 2))], "entry 2 of the index, \"d/b\""),
    ];
    for (rule, changes, says) in cases {
        let bytes = patched(&changes);
        let message = refusal(&bytes);
        assert!(message.contains(says) && message.contains(follows), "{rule}: {message}");
        assert!(Head::parse(&bytes[..LISTS], None).is_ok(), "the head alone can't tell");
    }
    let mut swapped = sample();
    swapped[LISTS..].rotate_left(64);
    assert!(refusal(&swapped).contains(follows));
}

#[test]
fn paths_are_bounded_in_depth_and_length() {
    let built = |path: &[u8]| Index::build(facts(100), vec![row(path, EntryKind::Directory, 0, None)]);
    assert!(built(&b"a/".repeat(256)).is_ok());
    let error = built(&b"a/".repeat(257)).expect_err("too deep");
    assert!(error.to_string().contains("more than 256 directories deep"));
    assert!(built(&[b'a'; 255]).is_ok());
    let long = [&[b'a'; 255][..], b"/a"].concat();
    let bytes = built(&long).expect("sound").as_bytes().to_vec();
    let joined: Vec<u8> = bytes.iter().map(|byte| if *byte == b'/' { b'a' } else { *byte }).collect();
    assert!(refusal(&joined).contains("a component of more than 255 bytes"));
}

#[test]
fn what_is_cut_short_or_goes_on_is_refused() {
    let bytes = sample();
    for end in 0..bytes.len() {
        assert!(matches!(Index::decode(&bytes[..end], None), Err(IndexError::Length { .. })), "{end}");
        let head = Head::parse(&bytes[..end], None);
        assert_eq!(head.is_ok(), end == LISTS, "{end}");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(refusal(&longer).contains("should have 716 bytes, but has 717"), "{}", refusal(&longer));
    assert!(Head::parse(&bytes, None).is_err());
    assert!(refusal(b"").contains("should have 112 bytes, but has 0"));
    assert!(refusal(&br#"{"format":"kitfs-index-json-1""#.repeat(9)).contains("not an index of kitfs"));
}

/// Whatever is read holds no contradiction, and encodes to the bytes that it came from.
fn consistent(bytes: &[u8]) {
    let Ok(index) = Index::decode(bytes, None) else { return };
    let rows = (0..index.head().len()).map(|at| index.entry(at).expect("within")).collect();
    let again = Index::build(index.head().layer().clone(), rows).expect("what was sound stays so");
    assert_eq!(again.as_bytes(), bytes);
}

#[test]
fn no_flipped_bit_panics_or_gives_another_form_of_the_same() {
    let mut bytes = sample();
    for bit in 0..bytes.len() * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        consistent(&bytes);
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
}

proptest! {
    #[test]
    fn damaged_indexes_never_panic_and_what_is_read_is_sound(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = sample();
        for (at, byte) in &changes {
            let at = at.index(bytes.len());
            bytes[at] = *byte;
        }
        consistent(&bytes);
        consistent(&bytes[..cut.index(bytes.len())]);
        let _ = Head::parse(&bytes[..LISTS], None);
    }

    #[test]
    fn garbage_behind_a_sound_header_never_panics(garbage in prop::collection::vec(any::<u8>(), 600)) {
        let mut bytes = sample();
        bytes[HEADER_LEN..HEADER_LEN + 600].copy_from_slice(&garbage);
        consistent(&bytes);
        let _ = Index::decode(&garbage[..], None);
    }
}
