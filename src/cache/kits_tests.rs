use super::*;

fn cache() -> (tempfile::TempDir, Cache) {
    let dir = tempfile::tempdir().expect("dir");
    let cache = Cache::open(dir.path()).expect("cache");
    (dir, cache)
}

fn layer(name: &str) -> LayerRecord {
    let digest = Digest::of(name.as_bytes());
    let (path, prefix) = (name.to_owned(), String::new());
    LayerRecord { digest, size: 7, path, prefix, index_key: Digest::of(b"key"), named: None, kept: false }
}

fn record(reference: &str, layers: &[&str]) -> KitRecord {
    KitRecord {
        digest: Digest::of(b"kit"),
        references: vec![reference.to_owned()],
        repository: "registry.example/team/kit".to_owned(),
        blobs: vec![Digest::of(b"kit"), Digest::of(b"config")],
        layers: layers.iter().map(|name| layer(name)).collect(),
    }
}

fn only(cache: &Cache) -> KitRecord {
    let kits = cache.kits().expect("kits");
    assert_eq!(kits.len(), 1);
    kits[0].0.clone()
}

#[test]
fn what_is_noted_of_a_kit_adds_up() {
    let (_dir, cache) = cache();
    cache.note_kit(record("kit:1", &["a", "b"])).expect("note");
    let mut more = record("kit:2", &["b", "c"]);
    more.blobs.push(Digest::of(b"referrer"));
    more.layers[0].named = Some((Digest::of(b"index"), Digest::of(b"head")));
    cache.note_kit(more).expect("note");
    cache.note_kit(record("kit:1", &["b"])).expect("note");
    let found = only(&cache);
    assert_eq!(found.references, ["kit:2", "kit:1"], "the latest last");
    cache.note_kit(record(&format!("kit@{}", found.digest), &[])).expect("note");
    assert_eq!(only(&cache).name(), "kit:1", "a digest is no name");
    let paths: Vec<_> = found.layers.iter().map(|layer| layer.path.as_str()).collect();
    assert_eq!(paths, ["a", "b", "c"]);
    assert!(found.layers[1].named.is_some(), "who does not trust an index does not make it another's");
    assert_eq!(found.blobs.len(), 3);
}

#[test]
fn a_layer_is_kept_until_its_kit_is_forgotten() {
    let (_dir, cache) = cache();
    let mut kept = record("kit:1", &["a", "b"]);
    kept.layers[1].kept = true;
    cache.note_kit(kept).expect("note");
    cache.note_kit(record("kit:1", &["a", "b"])).expect("note");
    let found = only(&cache);
    assert_eq!([found.layers[0].kept, found.layers[1].kept, found.is_kept()], [false, true, true]);
    cache.forget_kit(&found.digest).expect("forget");
    assert!(cache.kits().expect("kits").is_empty());
    cache.forget_kit(&found.digest).expect("what has gone may be forgotten again");
    cache.note_kit(record("kit:1", &["a"])).expect("note");
    assert!(!only(&cache).is_kept());
}

#[test]
fn the_key_of_an_index_is_the_latest_one() {
    let (_dir, cache) = cache();
    cache.note_kit(record("kit:1", &["a"])).expect("note");
    let mut newer = record("kit:1", &["a"]);
    newer.layers[0].index_key = Digest::of(b"as read today");
    cache.note_kit(newer).expect("note");
    assert_eq!(only(&cache).layers[0].index_key, Digest::of(b"as read today"));
}

#[test]
fn only_the_latest_names_are_remembered() {
    let (_dir, cache) = cache();
    for number in 0..NAMES + 4 {
        cache.note_kit(record(&format!("kit:{number}"), &[])).expect("note");
    }
    let references = only(&cache).references;
    assert_eq!(references.len(), NAMES);
    assert_eq!((references[0].as_str(), references[NAMES - 1].as_str()), ("kit:4", "kit:19"));
}

#[test]
fn a_kit_is_used_when_it_is_noted_whether_that_is_news_or_not() {
    let (_dir, cache) = cache();
    cache.note_kit(record("kit:1", &["a"])).expect("note");
    let path = cache.spread("kits", &Digest::of(b"kit").hex());
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    File::options().append(true).open(&path).expect("open").set_modified(long_ago).expect("set");
    assert_eq!(cache.kits().expect("kits")[0].1, long_ago);
    cache.note_kit(record("kit:1", &["a"])).expect("note");
    assert!(cache.kits().expect("kits")[0].1 > long_ago);
}

#[test]
fn nothing_is_lost_where_several_note_at_once() {
    let (dir, _) = cache();
    let names: Vec<String> = (0..8).map(|number| format!("layer {number}")).collect();
    std::thread::scope(|scope| {
        for name in &names {
            let root = dir.path();
            scope.spawn(move || {
                // As another process would: with a lock of its own.
                let cache = Cache::open(root).expect("cache");
                for _ in 0..8 {
                    let mut noted = record("kit:1", &[name]);
                    noted.layers[0].kept = true;
                    cache.note_kit(noted).expect("note");
                }
            });
        }
    });
    let cache = Cache::open(dir.path()).expect("cache");
    let found = only(&cache);
    assert_eq!(found.layers.iter().filter(|layer| layer.kept).count(), names.len());
}

#[test]
fn a_record_that_makes_no_sense_counts_as_absent() {
    let (_dir, cache) = cache();
    cache.note_kit(record("kit:1", &["a"])).expect("note");
    let path = cache.spread("kits", &Digest::of(b"kit").hex());
    let elsewhere = cache.spread("kits", &Digest::of(b"other").hex());
    cache.write_file(&elsewhere, &[&fs::read(&path).expect("read")]).expect("write");
    assert_eq!(cache.kits().expect("kits").len(), 1, "its name is not its kit's");
    fs::write(&path, b"{").expect("write");
    assert!(cache.kits().expect("kits").is_empty());
    cache.note_kit(record("kit:1", &["a"])).expect("note");
    assert_eq!(only(&cache).layers.len(), 1);
}

#[test]
fn a_directory_remembers_the_kit_before() {
    let (_dir, cache) = cache();
    let [first, second] = [Digest::of(b"1"), Digest::of(b"2")];
    let (dir, other) = (Path::new("/srv/a"), Path::new("/srv/b"));
    let before = || {
        let served = cache.served().expect("served");
        served.into_iter().find(|served| served.dir == dir).map(|served| (served.now, served.before))
    };
    cache.note_served(dir, &first).expect("note");
    cache.note_served(other, &second).expect("note");
    assert_eq!(before(), Some((first, None)));
    cache.note_served(dir, &second).expect("note");
    assert_eq!(before(), Some((second, Some(first))));
    cache.note_served(dir, &second).expect("the same again");
    assert_eq!(before(), Some((second, Some(first))));
    cache.forget_served(dir).expect("forget");
    assert_eq!(before(), None);
    assert_eq!(cache.served().expect("served").len(), 1);
}

#[test]
fn names_that_are_known_are_listed_and_removed() {
    let (_dir, cache) = cache();
    cache.remember("r.io/a:1", &Digest::of(b"1")).expect("remember");
    cache.remember("r.io/a:2", &Digest::of(b"2")).expect("remember");
    let first = cache.all_known().expect("known").into_iter().find(|known| known.reference == "r.io/a:1");
    cache.remove_small(first.expect("it is known").file()).expect("remove");
    let all: Vec<_> = cache.all_known().expect("known").into_iter().map(|known| known.reference).collect();
    assert_eq!(all, ["r.io/a:2"]);
}
