use std::io::Write as _;

use proptest::prelude::*;

use super::*;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("compresses");
    encoder.finish().expect("compresses")
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 1).expect("compresses")
}

/// Inflates a blob in pieces that end at `cuts`.
fn inflate(compression: Compression, bound: u64, blob: &[u8], cuts: &[usize]) -> Result<Vec<u8>, InflateError> {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| (*cut).min(blob.len())).collect();
    cuts.push(blob.len());
    cuts.sort_unstable();
    let mut inflater = Inflater::new(compression, bound)?;
    let (mut out, mut from) = (Vec::new(), 0);
    for cut in cuts {
        inflater.feed(&blob[from..cut], &mut |piece: &[u8]| {
            assert!(!piece.is_empty() && piece.len() <= PIECE.max(blob.len()), "{}", piece.len());
            out.extend_from_slice(piece);
            Ok::<(), InflateError>(())
        })?;
        from = cut;
    }
    assert_eq!(inflater.finish()?, out.len() as u64);
    Ok(out)
}

fn whole(compression: Compression, blob: &[u8]) -> Result<Vec<u8>, InflateError> {
    inflate(compression, u64::MAX, blob, &[])
}

fn refused(compression: Compression, blob: &[u8]) -> String {
    whole(compression, blob).expect_err("refused").to_string()
}

#[test]
fn a_layer_that_is_not_compressed_is_passed_on_in_place() {
    let blob = vec![1; 3 * PIECE];
    let mut inflater = Inflater::new(Compression::None, blob.len() as u64).expect("made");
    let mut passed = None;
    let mut out = |piece: &[u8]| {
        passed = Some(piece.as_ptr_range());
        Ok::<(), InflateError>(())
    };
    inflater.feed(&blob, &mut out).expect("passed on");
    assert_eq!(passed, Some(blob.as_ptr_range()));
    assert_eq!(inflater.finish().expect("whole"), blob.len() as u64);
}

#[test]
fn reserved_flags_of_gzip_are_ignored_as_go_ignores_them() {
    // Found by fuzzing: flate2's own decoder refuses them.
    let mut blob = gzip(b"content");
    blob[3] |= 0b1110_0000;
    assert_eq!(whole(Compression::Gzip, &blob).expect("inflates"), b"content");
}

#[test]
fn members_and_frames_may_follow_each_other() {
    let both = [gzip(b"one "), gzip(b""), gzip(b"two")].concat();
    assert_eq!(whole(Compression::Gzip, &both).expect("sound"), b"one two");
    let skippable = [&0x184d_2a50_u32.to_le_bytes()[..], &3_u32.to_le_bytes(), b"any"].concat();
    let both = [zstd(b"one "), skippable, zstd(b""), zstd(b"two")].concat();
    assert_eq!(whole(Compression::Zstd, &both).expect("sound"), b"one two");
}

#[test]
fn every_optional_field_of_a_gzip_header_is_skipped_and_its_checksum_holds() {
    let body = &gzip(b"content")[10..];
    for flags in 0..32_u8 {
        let mut blob = vec![0x1f, 0x8b, 8, flags, 0, 0, 0, 0, 0, 255];
        if flags & FLAG_EXTRA != 0 {
            blob.extend_from_slice(b"\x03\x00abc");
        }
        if flags & FLAG_NAME != 0 {
            blob.extend_from_slice(b"name\0");
        }
        if flags & FLAG_COMMENT != 0 {
            blob.extend_from_slice(b"\0");
        }
        let header = blob.len();
        if flags & FLAG_CRC != 0 {
            let mut crc = Crc::new();
            crc.update(&blob);
            blob.extend_from_slice(&crc.sum().to_le_bytes()[..2]);
        }
        blob.extend_from_slice(body);
        let every: Vec<usize> = (0..blob.len()).collect();
        assert_eq!(inflate(Compression::Gzip, 100, &blob, &every).expect("sound"), b"content", "{flags}");
        if flags & FLAG_CRC != 0 {
            blob[header] ^= 1;
            assert!(refused(Compression::Gzip, &blob).contains("checksum of the header"));
        }
    }
}

#[test]
fn a_blob_cut_anywhere_is_truncated_but_between_members() {
    for (compression, one) in [(Compression::Gzip, gzip(b"some text")), (Compression::Zstd, zstd(b"some text"))] {
        let blob = [&one[..], &one].concat();
        for cut in 0..blob.len() {
            let result = whole(compression, &blob[..cut]);
            if cut == one.len() {
                assert_eq!(result.expect("sound"), b"some text");
            } else {
                let read = cut as u64;
                assert!(matches!(result, Err(InflateError::Truncated { read: r }) if r == read), "{cut} {result:?}");
            }
        }
    }
}

#[test]
fn whatever_follows_the_last_gzip_member_is_an_error_even_zeros() {
    for garbage in [&b"garbage after the end"[..], &[0; 512]] {
        let message = refused(Compression::Gzip, &[&gzip(b"text")[..], garbage].concat());
        assert!(message.contains("no gzip header where a member should start"), "{message}");
    }
    assert!(matches!(
        whole(Compression::Gzip, &[&gzip(b"text")[..], &[0; 9]].concat()),
        Err(InflateError::Truncated { .. })
    ));
    assert!(refused(Compression::Zstd, &[&zstd(b"text")[..], &[0; 9]].concat()).contains("not valid Zstandard"));
}

#[test]
fn a_gzip_checksum_or_size_that_is_wrong_is_told() {
    let blob = gzip(b"some text");
    for at in blob.len() - 8..blob.len() {
        let mut blob = blob.clone();
        blob[at] ^= 1;
        assert!(refused(Compression::Gzip, &blob).contains("checksum or size"), "{at}");
    }
}

#[test]
fn not_a_byte_beyond_the_bound_comes_out() {
    let zeros = vec![0; 50 << 20];
    for (compression, bomb) in
        [(Compression::Gzip, gzip(&zeros)), (Compression::Zstd, zstd(&zeros)), (Compression::None, zeros.clone())]
    {
        for bound in [0, 1, PIECE as u64, 20 << 20] {
            let mut inflater = Inflater::new(compression, bound).expect("made");
            let mut out = 0;
            let result = inflater.feed(&bomb, &mut |piece: &[u8]| {
                out += piece.len() as u64;
                Ok::<(), InflateError>(())
            });
            assert!(matches!(result, Err(InflateError::InflatesTooFar { bound: b }) if b == bound));
            assert!(out <= bound, "{out}");
        }
        assert_eq!(inflate(compression, 50 << 20, &bomb, &[]).expect("just fits").len(), 50 << 20);
    }
}

#[test]
fn the_bound_is_a_gibibyte_or_64_times_the_size() {
    assert_eq!(max_inflated(0), 1 << 30);
    assert_eq!(max_inflated(16 << 20), 1 << 30);
    assert_eq!(max_inflated((16 << 20) + 1), (1 << 30) + 64);
    assert_eq!(max_inflated(u64::MAX), u64::MAX);
}

#[test]
fn a_zstd_frame_that_wants_a_window_of_gigabytes_is_refused() {
    // A frame header without content size, whose window descriptor says 2^31.
    let frame = [&0xfd2f_b528_u32.to_le_bytes()[..], &[0, (31 - 10) << 3], &[1, 0, 0]].concat();
    assert!(refused(Compression::Zstd, &frame).contains("window of at most 128 MiB"));
    let frame = [&0xfd2f_b528_u32.to_le_bytes()[..], &[0, (27 - 10) << 3], &[1, 0, 0]].concat();
    assert_eq!(whole(Compression::Zstd, &frame).expect("an empty block"), b"");
}

#[test]
fn an_error_of_the_receiver_ends_it() {
    #[derive(Debug, thiserror::Error)]
    enum Failed {
        #[error(transparent)]
        Inflate(#[from] InflateError),
        #[error("disk full")]
        Disk,
    }
    let mut inflater = Inflater::new(Compression::Gzip, 1 << 20).expect("made");
    let result = inflater.feed(&gzip(b"text"), &mut |_: &[u8]| Err(Failed::Disk));
    assert!(matches!(result, Err(Failed::Disk)));
}

fn content() -> impl Strategy<Value = Vec<u8>> {
    let run = (any::<u8>(), 1..200_000_usize).prop_map(|(byte, len)| vec![byte; len]);
    let noise = prop::collection::vec(any::<u8>(), 0..3000);
    prop::collection::vec(prop_oneof![run, noise], 0..6).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_compressed_comes_back_in_any_pieces(
        members in prop::collection::vec(content(), 1..3),
        cuts in prop::collection::vec(0..5000_usize, 0..8),
    ) {
        let plain = members.concat();
        for (compression, pack) in [(Compression::Gzip, gzip as fn(&[u8]) -> Vec<u8>), (Compression::Zstd, zstd)] {
            let blob: Vec<u8> = members.iter().flat_map(|member| pack(member)).collect();
            let inflated = inflate(compression, plain.len() as u64, &blob, &cuts).expect("sound");
            prop_assert!(inflated == plain);
        }
    }

    #[test]
    fn damaged_blobs_never_panic_nor_hang_nor_leave_the_bound(
        content in content(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..5),
        bound in 0..400_000_u64,
        cuts in prop::collection::vec(0..5000_usize, 0..8),
    ) {
        for (compression, mut blob) in [(Compression::Gzip, gzip(&content)), (Compression::Zstd, zstd(&content))] {
            for (at, byte) in &changes {
                let at = at.index(blob.len());
                blob[at] = *byte;
            }
            if let Ok(inflated) = inflate(compression, bound, &blob, &cuts) {
                prop_assert!(inflated.len() as u64 <= bound);
            }
        }
    }
}
