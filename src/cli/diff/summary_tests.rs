use std::collections::BTreeMap;

use super::*;
use crate::modelkit::{Format, Kind};
use crate::path::TreePath;

fn layer(path: &str, content: &str, size: u64) -> Sided {
    let layer = Layer {
        digest: Digest::of(content.as_bytes()),
        size,
        diff_id: None,
        media_type: String::new(),
        annotations: BTreeMap::new(),
        kind: Kind::Dataset,
        name: None,
        path: path.to_owned(),
        format: Format::Tar,
        compression: Compression::None,
        root: TreePath::clean(path.as_bytes()).expect("a path"),
        prefix: TreePath::root(),
        kit: 0,
    };
    (layer, None)
}

fn pinned((layer, _): Sided) -> Sided {
    (layer, Some(Tier::Pinned))
}

#[track_caller]
fn check(from: &[Sided], to: &[Sided], expected: &[(Change, &str, u64)]) {
    let all = layers(from, to);
    let found: Vec<_> =
        all.iter().map(|found| (found.change, found.shown().expect("a layer").path.as_str(), found.fetch)).collect();
    assert_eq!(found, expected);
}

#[test]
fn a_layer_is_the_same_changed_added_or_removed() {
    let from = [layer("a", "1", 10), layer("b", "2", 20), layer("c", "3", 30)];
    let to = [layer("d", "4", 40), layer("b", "5", 50), layer("a", "1", 10)];
    let expected =
        [(Change::Added, "d", 40), (Change::Changed, "b", 50), (Change::Same, "a", 0), (Change::Removed, "c", 0)];
    check(&from, &to, &expected);
}

#[test]
fn a_blob_that_the_node_has_is_not_fetched_again_wherever_it_goes() {
    let moved = layers(&[layer("a", "1", 10)], &[layer("b", "1", 10)]);
    assert_eq!(moved[0].from.as_ref().map(|(at, layer)| (*at, layer.path.as_str())), Some((0, "a")));
    check(&[layer("a", "1", 10)], &[layer("b", "1", 10)], &[(Change::Changed, "b", 0)]);
}

#[test]
fn a_blob_that_comes_twice_is_fetched_once() {
    let to = [layer("a", "1", 10), layer("b", "1", 10)];
    check(&[], &to, &[(Change::Added, "a", 10), (Change::Added, "b", 0)]);
}

#[test]
fn layers_of_one_root_are_told_apart_by_their_digests_first() {
    let from = [layer("a", "1", 10), layer("a", "2", 20)];
    let to = [layer("a", "2", 20), layer("a", "3", 30)];
    let all = layers(&from, &to);
    let partners: Vec<_> = all.iter().map(|layer| layer.from.as_ref().map(|(at, _)| *at)).collect();
    assert_eq!(partners, [Some(1), Some(0)]);
    check(&from, &to, &[(Change::Same, "a", 0), (Change::Changed, "a", 30)]);
}

#[test]
fn files_that_came_by_a_pinned_index_prove_no_layer_to_a_kit_without_one() {
    let plain = || layer("a", "1", 10);
    let indexed = || pinned(plain());
    check(&[plain()], &[indexed()], &[(Change::Same, "a", 0)]);
    check(&[indexed()], &[indexed()], &[(Change::Same, "a", 0)]);
    check(&[indexed()], &[plain()], &[(Change::Same, "a", 10)]);
    let zipped = |(layer, named): Sided| (Layer { compression: Compression::Gzip, ..layer }, named);
    check(&[zipped(indexed())], &[zipped(plain())], &[(Change::Same, "a", 0)]);
}
