use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::*;
use crate::archive::testing::{Tar, index_of};
use crate::cache::{Cache, KitRecord, LayerRecord, Removed, Small};
use crate::digest::{Digest, Unverified};
use crate::object::ObjectDigest;

/// A cache whose kits are made up file by file.
struct Made {
    _dir: tempfile::TempDir,
    cache: Cache,
}

fn made() -> Made {
    let dir = tempfile::tempdir().expect("dir");
    let cache = Cache::open(&dir.path().join("cache")).expect("cache");
    Made { _dir: dir, cache }
}

fn spread(cache: &Cache, area: &str, name: &str) -> PathBuf {
    cache.root().join(area).join(&name[..2]).join(name)
}

fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().expect("a parent")).expect("makes");
    fs::write(path, bytes).expect("writes");
}

fn age(path: &Path, minutes: u64) {
    let file = File::options().append(true).open(path).expect("opens");
    file.set_modified(SystemTime::now() - Duration::from_secs(60 * minutes)).expect("sets");
}

/// Content that is `name`'s own, of 40,000 bytes.
fn content(name: &str) -> Vec<u8> {
    name.bytes().cycle().take(40_000).collect()
}

fn object(name: &str) -> ObjectDigest {
    crate::archive::testing::content_of(&content(name)).object
}

impl Made {
    fn blob(&self, text: &str) -> Digest {
        let digest = Digest::of(text.as_bytes());
        let bytes = Unverified::new(text.as_bytes().to_vec()).verify(&digest).expect("its own digest");
        self.cache.keep_blob(&digest, &bytes).expect("keeps");
        digest
    }

    fn object_path(&self, name: &str) -> PathBuf {
        spread(&self.cache, "objects", &object(name).hex())
    }

    /// A layer of files that are what they are called, with its derived index. The files are not there.
    fn layer(&self, path: &str, files: &[&str]) -> LayerRecord {
        let all = files.iter().fold(Tar::new(), |tar, name| tar.file(&format!("{path}/{name}"), &content(name)));
        let tar = all.end();
        let index = index_of(&tar).expect("an index");
        let digest = Digest::of(&tar);
        let index_key = Digest::of(format!("derived {digest}").as_bytes());
        self.cache.keep_index(&index_key, index.as_bytes()).expect("keeps");
        let (path, prefix) = (path.to_owned(), String::new());
        LayerRecord { digest, size: tar.len() as u64, path, prefix, index_key, named: None, kept: false }
    }

    /// A kit with a manifest of its own and a config that all have.
    fn kit(&self, name: &str, layers: Vec<LayerRecord>) -> Digest {
        let digest = self.blob(&format!("manifest of {name}"));
        let record = KitRecord {
            digest,
            references: vec![format!("r.io/{name}:1")],
            repository: format!("r.io/{name}"),
            blobs: vec![digest, self.blob("config")],
            layers,
        };
        self.cache.note_kit(record).expect("notes");
        self.cache.remember(&format!("r.io/{name}:1"), &digest).expect("remembers");
        digest
    }

    fn fill(&self, files: &[&str]) {
        for name in files {
            write(&self.object_path(name), &content(name));
        }
    }

    fn take(&self) -> Inventory {
        Inventory::take(&self.cache).expect("an inventory")
    }

    /// What the cache holds, as the disk says, by files alone.
    fn bytes(&self) -> u64 {
        let usage = self.cache.usage().expect("counts");
        usage.areas().map(|(_, amount)| amount.bytes).sum()
    }

    fn remove(&self, share: &Share) {
        for (object, _) in &share.objects {
            assert_eq!(self.cache.remove_object(object, false).expect("removes"), Removed::Gone);
        }
        for (small, _) in &share.smalls {
            assert_eq!(self.cache.remove_small(*small).expect("removes"), Removed::Gone);
        }
    }
}

fn state<'a>(inventory: &'a Inventory, digest: &Digest) -> &'a KitState {
    inventory.kits.iter().find(|kit| kit.record.digest == *digest).expect("the kit")
}

#[test]
fn what_two_kits_share_counts_once_and_goes_with_the_last_of_them() {
    let made = made();
    let both = made.layer("shared", &["s"]);
    let first = made.kit("first", vec![made.layer("a", &["a", "s"]), both.clone()]);
    let second = made.kit("second", vec![both]);
    made.fill(&["a", "s"]);

    let inventory = made.take();
    let [one, two] = [state(&inventory, &first), state(&inventory, &second)];
    assert!(one.is_complete() && two.is_complete());
    assert_eq!(
        (one.contents.bytes, one.contents.here, one.objects),
        (120_000, 120_000, 2),
        "one file is in two layers"
    );
    assert_eq!((two.contents.bytes, two.objects), (40_000, 1));
    // 40,000 bytes take 40 KiB; then come manifest, record and name.
    assert!(one.alone > one.bytes / 2 && two.alone < two.bytes / 2, "{one:?} {two:?}");
    let total: u64 = inventory.loose(SystemTime::now()).bytes() + one.alone + two.bytes;
    assert_eq!(inventory.only_in(|_| true).bytes(), total, "all is somebody's, and is counted once");

    let before = made.bytes();
    let share = inventory.only_in(|kit| kit.record.digest == second);
    assert_eq!(share.bytes(), two.alone);
    assert!(share.objects.is_empty(), "the other one has it too");
    assert_eq!(share.smalls.last().map(|(small, _)| *small), Some(Small::Kit(second)), "the record goes last");
    made.remove(&share);
    assert_eq!(before - made.bytes(), two.alone);

    let inventory = made.take();
    let one = state(&inventory, &first);
    assert_eq!(one.alone, one.bytes, "nobody shares it any more");
    made.remove(&inventory.only_in(|_| true));
    assert_eq!(made.take().only_in(|_| true).bytes() + made.take().loose(SystemTime::now()).bytes(), 0);
}

#[test]
fn a_kit_is_complete_if_each_of_its_files_and_documents_is_here() {
    let made = made();
    let kit = made.kit("kit", vec![made.layer("w", &["a", "b"])]);
    made.fill(&["a"]);
    let inventory = made.take();
    let found = state(&inventory, &kit);
    assert_eq!((found.contents.here, found.contents.incomplete, found.is_complete()), (40_000, 1, false));

    write(&spread(&made.cache, "partial", &object("b").hex()), &content("b")[..8192]);
    let inventory = made.take();
    let found = state(&inventory, &kit);
    assert_eq!((found.contents.here, found.contents.incomplete), (48_192, 1), "a part of it is a part");

    made.fill(&["b"]);
    assert!(state(&made.take(), &kit).is_complete());
    made.cache.remove_small(Small::Blob(Digest::of(b"config"))).expect("removes");
    assert!(!state(&made.take(), &kit).is_complete(), "it could not be opened");
}

#[test]
fn a_layer_without_an_index_is_unknown_and_its_objects_are_nobodys() {
    let made = made();
    let layer = made.layer("w", &["a"]);
    let kit = made.kit("kit", vec![layer.clone()]);
    made.fill(&["a"]);
    made.cache.remove_small(Small::Index(layer.index_key)).expect("removes");
    let inventory = made.take();
    let found = state(&inventory, &kit);
    assert_eq!((found.unknown.0, found.objects, found.is_complete()), (1, 0, false));
    let loose = inventory.loose(SystemTime::now());
    assert_eq!(loose.objects.iter().map(|(object, _)| *object).collect::<Vec<_>>(), [object("a")]);
}

#[test]
fn the_index_that_is_named_for_a_layer_tells_its_files_and_so_does_its_head() {
    let made = made();
    let tar = Tar::new().file("w/a", &content("a")).end();
    let index = index_of(&tar).expect("an index");
    let pin = index.pin();
    let mut layer = made.layer("w", &["a"]);
    made.cache.remove_small(Small::Index(layer.index_key)).expect("removes");
    layer.named = Some((pin.digest, pin.head_digest));
    let kit = made.kit("kit", vec![layer]);
    made.fill(&["a"]);
    for (digest, bytes) in [(pin.digest, index.as_bytes()), (pin.head_digest, index.head().as_bytes())] {
        let verified = Unverified::new(bytes.to_vec()).verify(&digest).expect("its digest");
        assert_eq!(state(&made.take(), &kit).unknown.0, 1);
        made.cache.keep_blob(&digest, &verified).expect("keeps");
        let inventory = made.take();
        assert!(state(&inventory, &kit).is_complete());
        assert!(inventory.loose(SystemTime::now()).is_empty(), "the index belongs to the kit");
        made.cache.remove_small(Small::Blob(digest)).expect("removes");
    }
}

#[test]
fn what_no_record_names_is_loose_once_it_has_settled() {
    let made = made();
    made.kit("kit", vec![made.layer("w", &["a"])]);
    made.fill(&["a", "nobody's"]);
    let blob = made.blob("a manifest that was only resolved");
    made.cache.remember("r.io/other:1", &blob).expect("remembers");
    let inventory = made.take();
    assert!(inventory.loose(settled()).is_empty(), "it may be wanted yet");
    let loose = inventory.loose(SystemTime::now());
    assert_eq!(loose.objects.len(), 1);
    let smalls: Vec<_> = loose.smalls.iter().map(|(small, _)| *small).collect();
    let tag = Small::Tag(Digest::of(b"r.io/other:1"));
    assert_eq!(smalls, [Small::Blob(blob), tag]);
}

#[test]
fn nothing_is_loose_while_it_may_be_a_kits_whose_record_or_index_is_damaged() {
    let made = made();
    let mut layer = made.layer("w", &["a"]);
    layer.kept = true;
    let key = layer.index_key;
    let kit = made.kit("kit", vec![layer]);
    made.fill(&["a", "nobody's"]);
    let is_loose = || !made.take().loose(SystemTime::now()).is_empty();
    assert!(is_loose());
    let record = spread(&made.cache, "kits", &kit.hex());
    let right = fs::read(&record).expect("reads");
    write(&record, &right[1..]);
    assert!(!is_loose(), "whose files are those?");
    write(&record, &right);
    assert!(is_loose());
    made.cache.remove_small(Small::Index(key)).expect("removes");
    assert!(!is_loose(), "they may be those of the kit that is kept");
}

#[test]
fn a_kit_was_used_when_what_only_it_has_was_used() {
    let made = made();
    let [first, second] = [("first", "a"), ("second", "b")].map(|(name, file)| {
        let kit = made.kit(name, vec![made.layer(name, &[file, "s"])]);
        age(&spread(&made.cache, "kits", &kit.hex()), 100);
        kit
    });
    made.fill(&["a", "b", "s"]);
    age(&made.object_path("a"), 50);
    age(&made.object_path("b"), 10);
    let inventory = made.take();
    let minutes = |kit| state(&inventory, kit).used.elapsed().expect("in the past").as_secs() / 60;
    assert_eq!([minutes(&first), minutes(&second)], [50, 10], "what both have tells of neither");
}

#[test]
fn what_is_kept_never_goes_and_what_a_directory_served_before_goes_late() {
    let made = made();
    let mut kept = made.layer("kept", &["k"]);
    kept.kept = true;
    made.kit("kept", vec![kept, made.layer("not kept", &["n"])]);
    let before = made.kit("before", vec![made.layer("before", &["b", "s"])]);
    let now = made.kit("now", vec![made.layer("now", &["c", "s"])]);
    for kit in [before, now] {
        made.cache.note_served(Path::new("/srv/model"), &kit).expect("notes");
    }
    let protected = (policy().protected)(&made.cache).expect("a policy");
    assert_eq!(protected.never, HashSet::from([object("k")]));
    assert_eq!(protected.late, HashSet::from([object("b")]), "what is served now is recent anyway");
}

#[test]
fn documents_of_kits_without_content_are_spare_those_that_were_used_longest_ago_first() {
    let made = made();
    let all = ["old", "new", "here", "kept", "served", "filled", "opened"];
    let layers = all.map(|name| made.layer(name, &[name]));
    let indexes = layers.each_ref().map(|layer| layer.index_key);
    let kits = layers.map(|mut layer| {
        let name = layer.path.clone();
        layer.kept = name == "kept";
        made.kit(&name, vec![layer])
    });
    for (kit, minutes) in kits.iter().zip([90, 80, 100, 100, 100, 100, 0]) {
        age(&spread(&made.cache, "kits", &kit.hex()), minutes);
    }
    made.fill(&["here"]);
    made.cache.note_served(Path::new("/srv/model"), &kits[4]).expect("notes");
    write(&made.cache.root().join("incoming").join(indexes[5].hex()).join("0"), b"a part");
    let loose = made.blob("nobody's");
    age(&spread(&made.cache, "blobs/sha256", &loose.hex()), 70);
    made.blob("of a kit that is being opened");

    let spare = (policy().spare)(&made.cache).expect("a policy");
    let tag = |name: &str| Small::Tag(Digest::of(format!("r.io/{name}:1").as_bytes()));
    let of = |at: usize, name| [Small::Blob(kits[at]), Small::Index(indexes[at]), tag(name), Small::Kit(kits[at])];
    let expected = [vec![Small::Blob(loose)], of(0, "old").to_vec(), of(1, "new").to_vec()].concat();
    assert_eq!(spare, expected, "what others still need stays, such as the config");
}

#[test]
fn an_object_is_found_in_all_kits_by_its_path() {
    let made = made();
    let mut old = made.layer("train", &["a"]);
    old.prefix = "data".to_owned();
    made.kit("first", vec![made.layer("w", &["b"]), made.layer("v", &["x", "a"])]);
    made.kit("legacy", vec![old]);
    let records: Vec<_> = made.cache.kits().expect("kits").into_iter().map(|(record, _)| record).collect();
    let found = places(&made.cache, &records, &HashSet::from([object("a")])).expect("places");
    let mut paths: Vec<_> = found[&object("a")].iter().map(|place| place.path.to_string()).collect();
    paths.sort();
    assert_eq!(paths, ["data/train/a", "v/a"]);
    let first = found[&object("a")].iter().find(|place| place.path.to_string() == "v/a").expect("the place");
    assert_eq!((first.layer, first.row), (1, 0), "rows are sorted by path");
}
