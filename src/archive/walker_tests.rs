use super::*;
use crate::archive::testing::{Tar, headers, hop, hop_with, record, stream};

/// Walks a layer both ways, which must agree.
fn walk(layer: &[u8]) -> Result<Vec<Entry>, TarError> {
    let hopped = hop(layer, 512).map(|(entries, _)| entries);
    let streamed = stream(layer, Some(layer.len() as u64), &[]).map(|(entries, _)| headers(&entries));
    assert_eq!(hopped, streamed);
    hopped
}

fn one(layer: &[u8]) -> Entry {
    let entries = walk(layer).expect("a sound tar");
    let [entry] = &entries[..] else { panic!("{entries:?}") };
    entry.clone()
}

fn refused(layer: &[u8]) -> String {
    walk(layer).expect_err("refused").to_string()
}

#[test]
fn files_directories_and_symlinks_are_listed_with_their_facts() {
    let layer = Tar::new()
        .header(b"d", b'5', 0, |header| header.set_mode(0o1777))
        .header(b"d/f", b'0', 3, |header| {
            header.set_mode(0o104_755);
            header.set_uid(1000);
            header.set_gid(7);
            header.set_mtime(99);
        })
        .data(b"abc")
        .symlink("d/l", b"../x")
        .end();
    let entries = walk(&layer).expect("a sound tar");
    let names: Vec<_> = entries.iter().map(|entry| (entry.path.to_string(), entry.mode, entry.size)).collect();
    assert_eq!(names, [("d".into(), 0o1777, 0), ("d/f".into(), 0o4755, 3), ("d/l".into(), 0o644, 0)]);
    let file = &entries[1];
    assert_eq!((file.offset, file.uid, file.gid, file.mtime), (1024, 1000, 7, 99));
    assert_eq!(entries[2].kind, EntryKind::Symlink(b"../x".to_vec()));
}

#[test]
fn a_name_may_be_written_with_dots_and_slashes() {
    let layer = Tar::new().dir("./").dir(".").dir("./a//").file("./a/./f", b"").end();
    let paths: Vec<_> = walk(&layer).expect("a sound tar").iter().map(|entry| entry.path.to_string()).collect();
    assert_eq!(paths, [".", ".", "a", "a/f"]);
}

#[test]
fn type_nul_is_a_file_or_with_a_trailing_slash_a_directory_without_content() {
    assert_eq!(one(&Tar::new().entry(b"f", 0, b"x").end()).kind, EntryKind::File);
    assert_eq!(one(&Tar::new().entry(b"f", b'7', b"x").end()).kind, EntryKind::File);
    assert_eq!(one(&Tar::new().entry(b"f/", b'0', b"x").end()).kind, EntryKind::File);
    let entry = one(&Tar::new().header(b"d/", 0, 512, |_| {}).end());
    assert_eq!((entry.kind, entry.size), (EntryKind::Directory, 0));
}

#[test]
fn a_directory_that_declares_a_size_hides_nothing() {
    let layer = Tar::new().header(b"d", b'5', 512, |_| {}).file("d/f", b"x").end();
    assert_eq!(walk(&layer).expect("a sound tar").len(), 2);
    let layer = Tar::new().pax(&[("size", b"512")]).dir("d").file("d/f", b"x").end();
    assert_eq!(walk(&layer).expect("a sound tar").len(), 2);
}

#[test]
fn the_ustar_prefix_goes_before_the_name_and_gnu_has_none() {
    let prefix = |header: &mut tar::Header| header.as_ustar_mut().expect("ustar").prefix[..3].copy_from_slice(b"a/b");
    assert_eq!(one(&Tar::new().header(b"f", b'0', 0, prefix).end()).path.to_string(), "a/b/f");
    let gnu = |header: &mut tar::Header| {
        prefix(header);
        header.as_mut_bytes()[257..265].copy_from_slice(b"ustar  \0");
    };
    assert_eq!(one(&Tar::new().header(b"f", b'0', 0, gnu).end()).path.to_string(), "f");
}

#[test]
fn pax_records_win_over_the_header_and_last_for_one_entry() {
    let layer = Tar::new()
        .pax(&[("path", b"long\nname"), ("size", b"5"), ("mtime", b"-1.5"), ("uid", b"3000000000"), ("gid", b"9")])
        .header(b"short", b'0', 0, |_| {})
        .data(b"12345")
        .file("next", b"")
        .end();
    let entries = walk(&layer).expect("a sound tar");
    let first = &entries[0];
    assert_eq!(first.path.as_bytes(), b"long\nname");
    assert_eq!((first.size, first.mtime, first.uid, first.gid), (5, -2, 3_000_000_000, 9));
    let next = &entries[1];
    assert_eq!((next.path.to_string().as_str(), next.size, next.uid), ("next", 0, 0));
}

#[test]
fn a_pax_size_wins_even_if_it_is_smaller() {
    let layer = Tar::new().pax(&[("size", b"1")]).header(b"f", b'0', 9999, |_| {}).data(b"x").end();
    assert_eq!(one(&layer).size, 1);
}

#[test]
fn gnu_long_names_and_links_go_before_pax() {
    let long = [b"n".repeat(200), b"/".to_vec(), b"m".repeat(200)].concat();
    let layer = Tar::new()
        .entry(b"././@LongLink", b'L', &[&long[..], b"\0"].concat())
        .entry(b"././@LongLink", b'K', b"a/target\0")
        .pax(&[("path", b"p"), ("linkpath", b"q")])
        .symlink("short", b"t")
        .symlink("short", b"t")
        .end();
    let entries = walk(&layer).expect("a sound tar");
    assert_eq!(entries[0].path.as_bytes(), long);
    assert_eq!(entries[0].kind, EntryKind::Symlink(b"a/target".to_vec()));
    assert_eq!(entries[1].path.to_string(), "short");
}

#[test]
fn pax_gives_a_link_its_target() {
    let layer = Tar::new().pax(&[("linkpath", b"elsewhere")]).symlink("l", b"t").end();
    assert_eq!(one(&layer).kind, EntryKind::Symlink(b"elsewhere".to_vec()));
}

#[test]
fn global_pax_headers_are_skipped() {
    let global = record("path", b"everywhere");
    let layer = Tar::new().pax(&[("path", b"real")]).entry(b"g", b'g', &global).file("f", b"").file("f", b"").end();
    let paths: Vec<_> = walk(&layer).expect("a sound tar").iter().map(|entry| entry.path.to_string()).collect();
    assert_eq!(paths, ["real", "f"]);
}

#[test]
fn a_global_header_that_is_cut_short_is_an_error_both_ways() {
    let layer = Tar::new().header(b"g", b'g', 1000, |_| {}).data(&[0; 100]).0;
    assert!(matches!(hop(&layer, 512), Err(TarError::BeyondEnd { offset: 512, size: 1000, .. })));
    assert!(matches!(stream(&layer, None, &[]), Err(TarError::BeyondEnd { offset: 512, size: 1000, .. })));
}

#[test]
fn numbers_in_base_256_are_read() {
    let layer = Tar::new()
        .header(b"f", b'0', 0, |header| {
            header.as_old_mut().uid = *b"\x80\0\0\0\xff\xff\xff\xff";
            header.as_old_mut().gid = *b"\xff\xff\xff\xff\xff\xff\xff\xfe";
            header.as_old_mut().mtime = *b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe";
        })
        .end();
    let entry = one(&layer);
    assert_eq!((entry.uid, entry.gid, entry.mtime), (65534, 65534, -2));
}

#[test]
fn a_checksum_over_signed_bytes_holds_too() {
    let mut layer = Tar::new().file("f", b"").0;
    layer[0] = 0xe9;
    let signed: i64 = layer[..148].iter().chain(&layer[156..512]).map(|byte| i64::from(byte.cast_signed())).sum();
    layer[148..156].copy_from_slice(format!("{:06o}\0 ", signed + 8 * 32).as_bytes());
    assert_eq!(one(&layer).path.as_bytes(), b"\xe9");
}

#[test]
fn a_wrong_checksum_is_refused() {
    let mut layer = Tar::new().file("f", b"").file("g", b"").end();
    layer[512] ^= 1;
    assert_eq!(refused(&layer), "tar header at offset 512 has a wrong checksum: the layer is damaged or not a tar");
}

#[test]
fn paths_that_climb_or_are_absolute_are_refused_by_name() {
    for name in ["../f", "a/../f", "/etc/passwd", "a/.."] {
        assert!(refused(&Tar::new().file(name, b"").end()).contains(name), "{name}");
        assert!(refused(&Tar::new().pax(&[("path", name.as_bytes())]).file("f", b"").end()).contains(name), "{name}");
        let long = Tar::new().entry(b"L", b'L', name.as_bytes()).file("f", b"").end();
        assert!(refused(&long).contains(name), "{name}");
    }
    assert!(refused(&Tar::new().pax(&[("path", b"a\0b")]).file("f", b"").end()).contains("NUL"));
}

#[test]
fn the_root_may_be_a_directory_only() {
    for name in [".", "./", ""] {
        assert!(refused(&Tar::new().file(name, b"").end()).contains("not a directory"), "{name:?}");
        assert!(refused(&Tar::new().symlink(name, b"x").end()).contains("not a directory"), "{name:?}");
    }
}

#[test]
fn hard_links_devices_and_unknown_types_are_refused_by_name_and_kind() {
    for (typeflag, kind) in [
        (b'1', "hard link"),
        (b'3', "character device"),
        (b'4', "block device"),
        (b'6', "FIFO"),
        (b'S', "sparse file"),
        (b'V', "tar entry of unknown type 'V'"),
        (0xff, "tar entry of unknown type '\\xff'"),
    ] {
        let message = refused(&Tar::new().entry(b"a/node", typeflag, b"").end());
        assert!(message.contains("\"a/node\"") && message.contains(kind), "{message}");
    }
}

#[test]
fn sparse_files_in_pax_form_are_refused() {
    for record in [("GNU.sparse.major", &b"1"[..]), ("GNU.sparse.map", b"0,1"), ("GNU.sparse.size", b"9")] {
        let message = refused(&Tar::new().pax(&[record]).file("holes", b"").end());
        assert!(message.contains("\"holes\" is a sparse file"), "{message}");
    }
}

#[test]
fn a_link_needs_a_target_that_can_be_one() {
    assert!(refused(&Tar::new().symlink("l", b"").end()).contains("target"));
    assert!(refused(&Tar::new().pax(&[("linkpath", b"a\0b")]).symlink("l", b"t").end()).contains("target"));
    assert!(refused(&Tar::new().pax(&[("linkpath", &b"a".repeat(4096))]).symlink("l", b"t").end()).contains("target"));
}

#[test]
fn sizes_that_overflow_or_leave_the_layer_are_refused() {
    let sized = |field: [u8; 12]| Tar::new().header(b"f", b'0', 0, |header| header.as_old_mut().size = field).end();
    assert!(refused(&sized(*b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")).contains("negative"));
    assert!(refused(&sized(*b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff")).contains("can't read the size"));
    assert!(refused(&sized(*b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")).contains("can't read the size"));
    assert!(refused(&sized(*b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff")).contains("ends before"));
    assert!(refused(&sized(*b"00000002001\0")).contains("1025 bytes from offset 512"));
    for size in [&b"18446744073709551615"[..], b"9223372036854775808", b"-1", b"1e3"] {
        let message = refused(&Tar::new().pax(&[("size", size)]).file("f", b"").end());
        assert!(message.contains("the size"), "{message}");
    }
    let message = refused(&Tar::new().pax(&[("size", b"9223372036854775807")]).file("f", b"").end());
    assert!(message.contains("ends before"), "{message}");
}

#[test]
fn offsets_do_not_overflow_where_the_end_is_unknown() {
    let header = Tar::new().header(b"f", b'0', 0, |header| {
        header.as_old_mut().size = *b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff";
    });
    let mut walker = Walker::new(None, Caps::default());
    let mut offset = 0;
    for _ in 0..2 {
        match walker.step(offset, &header.0) {
            Ok(Step::Entry(entry)) => assert_eq!(entry.offset, offset + 512),
            Err(TarError::BeyondEnd { .. }) => return,
            other => panic!("{other:?}"),
        }
        let Ok(Step::Need { offset: next, .. }) = walker.step(0, b"") else { panic!("the next header") };
        assert!(next > offset);
        offset = next;
    }
    panic!("two contents of 2^63 bytes fit nowhere");
}

#[test]
fn a_pax_header_of_a_gibibyte_is_refused_before_it_is_read() {
    for typeflag in *b"xLK" {
        let header = Tar::new().header(b"x", typeflag, 1 << 30, |_| {}).0;
        let mut reads = 0;
        let walk = hop_with(1 << 40, Caps::default(), |_, _| {
            reads += 1;
            header.clone()
        });
        assert_eq!(walk, Err(TarError::ExtensionTooLong { offset: 0, size: 1 << 30, cap: 1 << 20 }));
        assert_eq!(reads, 1);
        let mut walker = Walker::new(None, Caps::default());
        assert!(walker.step(0, &header).is_err());
    }
}

#[test]
fn caps_on_headers_names_and_depth_hold() {
    let walk = |layer: Vec<u8>, caps| {
        hop_with(layer.len() as u64, caps, |from, len| layer[from as usize..][..len as usize].to_vec())
    };
    let two = || Tar::new().file("aaaa", b"").symlink("bbbb", b"cccc").end();
    let caps = || Caps { headers: 2, names: 12, depth: 1, ..Caps::default() };
    assert!(walk(two(), caps()).is_ok());
    assert_eq!(walk(two(), Caps { headers: 1, ..caps() }), Err(TarError::TooManyHeaders { cap: 1 }));
    assert_eq!(walk(two(), Caps { names: 11, ..caps() }), Err(TarError::TooManyNames { cap: 11 }));
    let deep = walk(Tar::new().file("a/b", b"").end(), caps());
    assert!(matches!(deep, Err(TarError::TooDeep { cap: 1, .. })), "{deep:?}");
}

#[test]
fn the_archive_ends_at_two_zero_blocks_and_what_follows_is_ignored() {
    let mut layer = Tar::new().file("f", b"x").end();
    layer.extend_from_slice(b"garbage");
    let (entries, warning) = hop(&layer, 512).expect("a sound tar");
    assert_eq!((entries.len(), warning), (1, None));
    assert!(
        stream(&layer, None, &[1500, 2049]).is_ok_and(|(entries, warning)| entries.len() == 1 && warning.is_none())
    );
}

#[test]
fn one_zero_block_before_more_headers_is_refused() {
    let layer = Tar::new().file("f", b"").data(&[0; 512]).file("g", b"").end();
    assert_eq!(refused(&layer), "zero block at offset 512 is followed by more headers: the layer is damaged");
}

#[test]
fn a_missing_end_marker_or_padding_is_a_warning() {
    let whole = Tar::new().file("f", b"abc");
    for layer in [&whole.0[..], &whole.0[..515], &[&whole.0[..], &[0; 512]].concat(), &[]] {
        let (_, warning) = hop(layer, 512).expect("a sound tar");
        assert_eq!(warning, Some(Warning::NoEndMarker));
    }
}

#[test]
fn a_tar_cut_anywhere_is_an_error_or_ends_between_entries() {
    let layer = Tar::new()
        .dir("d")
        .pax(&[("path", b"d/long"), ("mtime", b"1.5")])
        .file("f", &[7; 700])
        .file("empty", b"")
        .end();
    let marker = layer.len() - 1024;
    let records = record("path", b"d/long").len() + record("mtime", b"1.5").len();
    // Where an entry or its records, with or without padding, or the first zero block ends.
    let ends = |cut: usize| {
        let padding = (1024 + records..=1536).contains(&cut) || (2048 + 700..=3072).contains(&cut);
        padding || [0, 512, marker, marker + 512].contains(&cut)
    };
    for cut in 0..layer.len() {
        let cut_layer = &layer[..cut];
        let hopped = hop(cut_layer, 512);
        for pieces in [&[][..], &[cut / 2], &[cut / 3, cut / 2]] {
            let streamed = stream(cut_layer, None, pieces).map(|(entries, warning)| (headers(&entries), warning));
            assert_eq!(streamed.is_ok(), hopped.is_ok(), "{cut}");
            assert!(streamed.is_err() || streamed == hopped, "{cut}");
        }
        match hopped {
            Ok((_, warning)) => assert!(ends(cut) && warning == Some(Warning::NoEndMarker), "{cut}"),
            Err(error) => {
                assert!(!ends(cut), "{cut}: {error}");
                let told = matches!(error, TarError::CutHeader { .. } | TarError::BeyondEnd { .. });
                assert!(told, "{cut}: {error}");
            }
        }
    }
}

#[test]
fn a_window_may_start_before_what_is_needed_and_hold_many_entries() {
    let layer = Tar::new().file("a", b"1").file("b", b"2").end();
    let mut walker = Walker::new(Some(layer.len() as u64), Caps::default());
    let steps: Vec<_> = (0..3).map(|_| walker.step(0, &layer)).collect();
    assert!(matches!(
        &steps[..],
        [Ok(Step::Entry(_)), Ok(Step::Entry(_)), Ok(Step::End { offset: 3072, warning: None })]
    ));
}

#[test]
fn hopping_reads_only_headers() {
    let big = 1_u64 << 35;
    let header = Tar::new().pax(&[("size", big.to_string().as_bytes())]).file("weights", b"").0;
    let tail = Tar::new().file("after", b"").end();
    let after = header.len() as u64 + big;
    let mut read = 0;
    let (entries, warning) = hop_with(after + tail.len() as u64, Caps::default(), |offset, len| {
        read += len;
        let (part, at) = if offset < after { (&header, offset) } else { (&tail, offset - after) };
        part[at as usize..][..len as usize].to_vec()
    })
    .expect("a sound tar");
    let sizes: Vec<_> = entries.iter().map(|entry| entry.size).collect();
    assert_eq!((&sizes[..], warning), (&[big, 0][..], None));
    assert!(read < 4096, "{read}");
}
