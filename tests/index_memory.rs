//! Reading an index takes no more memory than its own length allows, whatever it claims to hold.

#![expect(unsafe_code, reason = "only an allocator sees what is allocated")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use kitfs::archive::chunk::Chunker;
use kitfs::archive::index::{Head, Index, IndexEntry, LayerFacts, LayerFormat};
use kitfs::archive::{Entry, EntryKind};
use kitfs::digest::Digest;
use kitfs::modelkit::Compression;
use kitfs::path::TreePath;

/// The system's allocator, which adds up what a thread asks for.
struct Counting;

thread_local! {
    static ALLOCATED: Cell<usize> = const { Cell::new(0) };
}

fn count(bytes: usize) {
    // While a thread ends there is nothing to count on.
    let _ = ALLOCATED.try_with(|allocated| allocated.set(allocated.get() + bytes));
}

// SAFETY: all work is the system allocator's; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: likewise.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What an error may take besides: its path and text.
const ERROR: usize = 32 << 10;

/// How many bytes reading `bytes` as an index, or as a head, allocates, freed ones counted too.
fn allocated(bytes: &[u8]) -> usize {
    let start = ALLOCATED.get();
    drop(Index::decode(bytes, None));
    let whole = ALLOCATED.get();
    drop(Head::parse(bytes, None));
    (whole - start).max(ALLOCATED.get() - whole)
}

fn sample(files: u64) -> Vec<u8> {
    let digest = Digest::of(b"layer");
    let (format, compression) = (LayerFormat::Tar, Compression::None);
    let layer = LayerFacts { digest, size: 1 << 30, diff_id: digest, inflated: 1 << 30, format, compression };
    let row = |at: u64| {
        let mut chunker = Chunker::new();
        chunker.update(&at.to_le_bytes());
        let path = TreePath::clean(format!("files/{at:06}").as_bytes()).expect("valid");
        let kind = EntryKind::File;
        let entry = Entry { path, kind, mode: 0o644, uid: 0, gid: 0, mtime: 0, size: 8, offset: at * 1024 };
        IndexEntry { entry, content: Some(chunker.finish()) }
    };
    Index::build(layer, (0..files).map(row).collect()).expect("sound").as_bytes().to_vec()
}

#[test]
fn a_sound_index_takes_four_bytes_an_entry() {
    let bytes = sample(10_000);
    let taken = allocated(&bytes);
    assert!((40_000..=40_000 + ERROR).contains(&taken), "{taken}");
}

#[test]
fn what_a_header_claims_is_not_allocated() {
    let sound = sample(3);
    // Entries, bytes of names, chunk digests.
    for field in [20, 24, 28] {
        for claim in [u32::MAX, 1 << 30, 64 << 20, 16 << 20, 1000] {
            let mut bytes = sound.clone();
            bytes[field..field + 4].copy_from_slice(&claim.to_le_bytes());
            let taken = allocated(&bytes);
            assert!(taken <= ERROR, "{claim} at {field}: {taken} bytes");
        }
    }
}

#[test]
fn no_changed_byte_makes_it_take_more() {
    let mut bytes = sample(3);
    for at in 0..bytes.len() {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let was = std::mem::replace(&mut bytes[at], value);
            let taken = allocated(&bytes);
            assert!(taken <= ERROR, "{value} at {at}: {taken} bytes");
            bytes[at] = was;
        }
    }
}
