//! Any bytes as a compressed layer: no panic, no hang, nothing beyond the bound, and the same however it is cut.
#![no_main]

use kitfs::archive::inflate::{InflateError, Inflater, PIECE};
use kitfs::modelkit::Compression;
use libfuzzer_sys::fuzz_target;

const BOUND: u64 = 4 << 20;

fn inflate(compression: Compression, blob: &[u8], piece: usize) -> Option<Vec<u8>> {
    let mut inflater = Inflater::new(compression, BOUND).expect("made");
    let mut out = Vec::new();
    for piece in blob.chunks(piece) {
        let mut keep = |bytes: &[u8]| {
            assert!(!bytes.is_empty() && bytes.len() <= PIECE);
            out.extend_from_slice(bytes);
            assert!(out.len() as u64 <= BOUND);
            Ok::<(), InflateError>(())
        };
        inflater.feed(piece, &mut keep).ok()?;
    }
    inflater.finish().ok().map(|len| {
        assert_eq!(len, out.len() as u64);
        out
    })
}

fuzz_target!(|data: &[u8]| {
    let Some((first, blob)) = data.split_first() else { return };
    let compression = if first & 1 == 1 { Compression::Gzip } else { Compression::Zstd };
    let whole = inflate(compression, blob, usize::MAX);
    assert_eq!(inflate(compression, blob, usize::from(*first) + 1), whole);
    if let (Compression::Gzip, Some(whole)) = (compression, whole) {
        let mut other = Vec::new();
        let read = std::io::Read::read_to_end(&mut flate2::read::MultiGzDecoder::new(blob), &mut other);
        match read {
            // A reserved flag in a header, which Go and we ignore.
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {}
            read => assert!(read.is_ok() && other == whole, "flate2's own decoder: {read:?}"),
        }
    }
});
