use super::*;

fn file(size: u64, object: Option<&[u8]>) -> File {
    let object = object.map(|bytes| ObjectDigest::of_list(size, bytes));
    File { kind: Kind::File, mode: 0o644, size, object, bytes: None, place: None }
}

fn link(target: &[u8]) -> File {
    File { kind: Kind::Link(target.to_vec()), ..file(0, None) }
}

#[test]
fn what_nothing_tells_is_unknown_and_what_anything_tells_is_told() {
    let whole = |text: &[u8]| File { bytes: Some(Digest::of(text)), ..file(3, None) };
    let placed = |row| File { place: Some((Digest::of(b"layer"), row)), ..file(3, None) };
    let executable = File { mode: 0o755, ..file(3, Some(b"a")) };
    for (from, to, expected) in [
        (file(3, Some(b"a")), file(3, Some(b"a")), Change::Same),
        (file(3, Some(b"a")), file(3, Some(b"b")), Change::Changed),
        (file(3, Some(b"a")), executable, Change::Changed),
        (file(3, Some(b"a")), file(3, None), Change::Unknown),
        (file(3, None), file(3, None), Change::Unknown),
        (file(3, None), file(4, None), Change::Changed),
        (file(0, None), file(0, None), Change::Same),
        (whole(b"abc"), whole(b"abc"), Change::Same),
        (whole(b"abc"), whole(b"abd"), Change::Changed),
        (whole(b"abc"), file(3, Some(b"a")), Change::Unknown),
        (placed(1), placed(1), Change::Same),
        (placed(1), placed(2), Change::Unknown),
        (link(b"a"), link(b"a"), Change::Same),
        (link(b"a"), link(b"b"), Change::Changed),
        (link(b"a"), link(b""), Change::Unknown),
        (link(b"a"), file(0, None), Change::Changed),
    ] {
        assert_eq!(change(Some(&from), Some(&to)), expected, "{from:?} {to:?}");
    }
    assert_eq!(change(None, Some(&link(b"a"))), Change::Added);
    assert_eq!(change(Some(&link(b"a")), None), Change::Removed);
}

#[test]
fn all_paths_are_counted_and_those_that_are_the_same_listed_on_request() {
    let tree = |names: &[(&str, u64)]| -> Tree {
        names.iter().map(|(name, size)| (name.as_bytes().to_vec(), file(*size, Some(name.as_bytes())))).collect()
    };
    let (before, after) = (tree(&[("a", 1), ("b", 2), ("d", 4)]), tree(&[("a", 1), ("c", 3), ("d", 5)]));
    for (all, expected) in [(false, &["b", "c", "d"][..]), (true, &["a", "b", "c", "d"])] {
        let mut files = Files::default();
        files.merge(before.clone(), after.clone(), all);
        let paths: Vec<_> = files.rows.iter().map(|row| String::from_utf8_lossy(&row.path).into_owned()).collect();
        assert_eq!(paths, expected);
        let counts: Vec<_> = files.counts.into_iter().collect();
        assert_eq!(counts, [(Change::Added, 1), (Change::Removed, 1), (Change::Changed, 1), (Change::Same, 1)]);
    }
}
