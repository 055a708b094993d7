use super::*;

fn path(text: &str) -> TreePath {
    TreePath::clean(text.as_bytes()).expect("valid path")
}

fn file(size: u64) -> Meta {
    Meta { kind: NodeKind::File, mode: 0o644, size, ..SKELETON }
}

fn dir(mode: u32) -> Meta {
    Meta { mode, ..SKELETON }
}

fn tree(roots: &[&str]) -> Tree {
    Tree::new(&Digest::of(b"plan"), roots.iter().map(|root| path(root)), Some(10))
}

fn names(tree: &Tree, at: &str) -> Vec<String> {
    let node = tree.find(&path(at)).expect("exists");
    let children = tree.children(node).expect("complete");
    children.iter().map(|id| String::from_utf8_lossy(tree.node(*id).name()).into_owned()).collect()
}

#[test]
fn the_plan_alone_gives_the_skeleton() {
    let tree = tree(&["weights/deep/a.bin", "data"]);
    assert!(tree.find(&path("weights/deep")).is_some());
    assert_eq!(tree.lookup(NodeId::ROOT, b"data"), Lookup::Needs(vec![Need::Probe(1)]));
    assert_eq!(tree.lookup(NodeId::ROOT, b"nothing"), Lookup::Missing);
    let weights = tree.find(&path("weights")).expect("exists");
    assert!(!tree.is_settled(weights), "its mode is in a tar that nobody has looked at");
}

#[test]
fn a_directory_is_complete_when_every_layer_that_holds_it_is_listed() {
    let mut tree = tree(&[".", "data"]);
    assert_eq!(tree.children(NodeId::ROOT), Err(vec![Need::Listing(0), Need::Probe(1)]));
    tree.add_probe(1, [(path("data"), dir(0o700))]);
    tree.add_listing(0, [(path("top.txt"), file(3))]);
    assert_eq!(names(&tree, "."), ["Kitfile", "data", "top.txt"]);
    let data = tree.find(&path("data")).expect("exists");
    assert_eq!(tree.lookup(data, b"x"), Lookup::Needs(vec![Need::Listing(1)]));
    tree.add_listing(1, [(path("data"), dir(0o700)), (path("data/x"), file(1))]);
    assert!(matches!(tree.lookup(data, b"x"), Lookup::Found(_)));
    assert_eq!(tree.lookup(data, b"y"), Lookup::Missing);
}

#[test]
fn the_first_layer_that_names_a_directory_decides_its_mode() {
    let mut tree = tree(&["d/a", "d/b"]);
    tree.add_listing(1, [(path("d"), dir(0o700)), (path("d/b"), file(1))]);
    let d = tree.find(&path("d")).expect("exists");
    assert_eq!(tree.node(d).meta.mode, 0o700);
    assert!(!tree.is_settled(d));
    tree.add_listing(0, [(path("d"), dir(0o750)), (path("d/a"), file(1))]);
    assert_eq!(tree.node(d).meta.mode, 0o750);
    assert!(tree.is_settled(d));
}

#[test]
fn a_root_that_its_layer_does_not_name_is_a_directory_all_the_same() {
    let mut tree = tree(&["a/b", "late"]);
    assert!(tree.add_probe(0, []).is_empty());
    assert!(tree.add_probe(1, []).is_empty());
    assert_eq!(
        (names(&tree, "."), names(&tree, "a")),
        (vec!["Kitfile".into(), "a".into(), "late".into()], vec!["b".into()])
    );
    let node = |tree: &Tree, at: &str| tree.find(&path(at)).expect("exists");
    for at in ["a/b", "late"] {
        assert_eq!(tree.node(node(&tree, at)).meta, dir(DEFAULT_DIR_MODE), "{at}");
        assert!(!tree.is_settled(node(&tree, at)), "{at}: its entry may stand behind others");
    }
    assert!(tree.is_settled(node(&tree, "a")));
    assert_eq!(tree.children(node(&tree, "late")), Err(vec![Need::Listing(1)]));
    tree.add_listing(0, [(path("a/b/x"), file(1))]);
    tree.add_listing(1, [(path("late"), dir(0o700)), (path("late/x"), file(1))]);
    for (at, mode) in [("a/b", DEFAULT_DIR_MODE), ("late", 0o700)] {
        assert_eq!(tree.node(node(&tree, at)).meta.mode, mode, "{at}");
        assert!(tree.is_settled(node(&tree, at)), "{at}");
    }
}

#[test]
fn a_root_that_its_layer_does_not_name_conflicts_with_a_file() {
    let mut tree = tree(&["a", "a"]);
    tree.add_listing(0, [(path("a"), file(1))]);
    let conflicts = tree.add_probe(1, []);
    assert_eq!(conflicts, [Conflict { path: path("a"), first: Origin::Layer { layer: 0, entry: 0 }, second: 1 }]);
}

#[test]
fn what_two_layers_claim_stays_with_the_first_and_is_reported() {
    let mut tree = tree(&["a", "a/b"]);
    assert!(tree.add_listing(1, [(path("a"), dir(0o755)), (path("a/b"), file(1))]).is_empty());
    let conflicts = tree.add_listing(0, [(path("a"), file(9))]);
    assert_eq!(conflicts.len(), 1);
    assert_eq!(tree.node(tree.find(&path("a")).expect("exists")).meta.kind, NodeKind::Directory);
    let conflicts = tree.add_listing(0, [(path("Kitfile"), file(9)), (path("Kitfile/x"), file(9))]);
    assert_eq!(conflicts.len(), 2);
}

#[test]
fn inode_numbers_are_the_same_in_whatever_order_names_arrive() {
    let mut one = tree(&["a", "b"]);
    one.add_listing(0, [(path("a"), file(1))]);
    one.add_listing(1, [(path("b"), file(1))]);
    let mut two = tree(&["a", "b"]);
    two.add_listing(1, [(path("b"), file(1))]);
    two.add_listing(0, [(path("a"), file(1))]);
    let ino = |tree: &Tree, at: &str| tree.node(tree.find(&path(at)).expect("exists")).ino;
    assert_eq!(ino(&one, "a"), ino(&two, "a"));
    assert_ne!(ino(&one, "a"), ino(&one, "b"));
    let other = Tree::new(&Digest::of(b"another plan"), [path("a/x")], None);
    assert_ne!(ino(&one, "a"), ino(&other, "a"));
}

#[test]
fn names_of_two_layers_interleave_in_order() {
    let mut tree = tree(&["d", "d"]);
    let even = (0..1000).map(|n| (path(&format!("d/{:04}", n * 2)), file(1)));
    let odd = (0..1000).map(|n| (path(&format!("d/{:04}/x", n * 2 + 1)), file(1)));
    assert!(tree.add_listing(0, even).is_empty());
    assert!(tree.add_listing(1, odd).is_empty());
    let expected: Vec<_> = (0..2000).map(|n| format!("{n:04}")).collect();
    assert_eq!(names(&tree, "d"), expected);
}

/// A thousand directories of a hundred files, in path order.
fn many() -> impl Iterator<Item = (TreePath, Meta)> {
    let dirs = (0..1000).map(|at| format!("data/train-{at:05}"));
    dirs.flat_map(|name| {
        let files: Vec<_> = (0..100).map(|at| (path(&format!("{name}/sample-{at:08}.json")), file(at))).collect();
        std::iter::once((path(&name), dir(0o750))).chain(files)
    })
}

#[test]
fn a_hundred_thousand_names_are_found_by_path_and_by_number() {
    let mut tree = tree(&["data"]);
    assert!(tree.add_listing(0, many()).is_empty());
    assert_eq!(tree.len(), 2 + 1 + 101_000);
    for (at, (path, meta)) in many().enumerate() {
        let id = tree.find(&path).expect("it was added");
        let node = tree.node(id);
        assert_eq!((node.meta.clone(), node.origin), (meta, Origin::Layer { layer: 0, entry: at as u32 }));
        assert_eq!((tree.by_ino(node.ino), tree.path(id)), (Some(id), path));
    }
    assert_eq!(tree.by_ino(0), None);
}

#[test]
fn a_name_takes_about_a_hundred_bytes() {
    let mut tree = tree(&["data"]);
    tree.add_listing(0, many());
    let each = tree.bytes() / tree.len();
    assert!((64..=128).contains(&each), "{each} bytes");
}

#[test]
fn a_clone_can_be_added_to_and_the_original_stays_as_it_is() {
    let mut before = tree(&["a", "b"]);
    before.add_listing(0, (0..3000).map(|at| (path(&format!("a/{at:04}")), file(at))));
    let mut after = before.clone();
    after.add_listing(1, [(path("a"), dir(0o700)), (path("b"), dir(0o700)), (path("b/x"), file(1))]);
    assert!(before.find(&path("b")).is_none() && after.find(&path("b/x")).is_some());
    assert_eq!(before.children(NodeId::ROOT), Err(vec![Need::Probe(1)]));
    assert_eq!(names(&after, "."), ["Kitfile", "a", "b"]);
    let ino = |tree: &Tree, at: &str| tree.node(tree.find(&path(at)).expect("exists")).ino;
    assert_eq!(ino(&before, "a/2999"), ino(&after, "a/2999"));
}

proptest::proptest! {
    #[test]
    fn whatever_the_layers_hold_each_name_is_there_once_and_in_its_place(
        layers in proptest::collection::vec(proptest::collection::btree_set("[ab]{1,2}(/[ab.-]{3}){0,3}", 0..30), 1..4),
    ) {
        let mut tree = tree(&vec!["."; layers.len()]);
        let mut expected = std::collections::BTreeSet::from([path("Kitfile")]);
        for (at, paths) in layers.iter().enumerate() {
            let paths: std::collections::BTreeSet<_> = paths.iter().map(|text| path(text)).collect();
            // Directories, so that nothing contradicts anything.
            let conflicts = tree.add_listing(at, paths.iter().map(|path| (path.clone(), dir(0o700))));
            proptest::prop_assert_eq!(conflicts, []);
            let parents = paths.iter().flat_map(TreePath::ancestors).filter(|path| !path.is_root());
            expected.extend(parents.collect::<Vec<_>>());
            expected.extend(paths);
        }
        let mut found = Vec::new();
        let mut pending = vec![NodeId::ROOT];
        while let Some(dir) = pending.pop() {
            let children = tree.children(dir).expect("all are listed");
            let names: Vec<_> = children.iter().map(|id| tree.name(*id)).collect();
            proptest::prop_assert!(names.is_sorted(), "{:?}", names);
            for id in children {
                let node = tree.node(*id);
                proptest::prop_assert_eq!((node.parent(), tree.by_ino(node.ino)), (dir, Some(*id)));
                proptest::prop_assert_eq!(tree.find(&tree.path(*id)), Some(*id));
                found.push(tree.path(*id));
            }
            pending.extend(children);
        }
        found.sort();
        proptest::prop_assert_eq!(found, expected.into_iter().collect::<Vec<_>>());
    }
}
