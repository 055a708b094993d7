//! Every kit that the real tools packed mounts to the tree that `kit unpack` made of it, from every source that can hold
//! it: path, type, mode, size and content, and the Kitfile byte for byte. What kit refuses is refused.

mod support;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use support::Registry;
use support::program::{Kitfs, recorded, tree_of};

#[derive(Debug, Deserialize)]
struct Case {
    kit: String,
    reference: String,
    filter: Vec<String>,
    tree: Option<PathBuf>,
    #[serde(default)]
    refused: bool,
    #[serde(default)]
    kitfile: Option<String>,
    #[serde(default, rename = "in")]
    home: Option<String>,
}

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn cases() -> Vec<Case> {
    let text = std::fs::read_to_string(data().join("cases.jsonl")).expect("cases");
    let cases: Vec<Case> = text.lines().map(|line| serde_json::from_str(line).expect("a case")).collect();
    assert!(cases.len() > 50, "the recorded cases are all here");
    cases
}

impl Case {
    fn tag(&self) -> &str {
        self.reference.rsplit(':').next().expect("a tag")
    }

    /// Mounts the case and compares what is there with what was recorded.
    fn check(&self, kitfs: &Kitfs, reference: &str) {
        self.check_as(kitfs, reference, &[], "");
    }

    /// The same with more options, and with what the mount must say of the trust where it serves the whole kit.
    fn check_as(&self, kitfs: &Kitfs, reference: &str, options: &[&str], trust: &str) {
        let mut options = options.to_vec();
        for filter in &self.filter {
            options.extend(["--filter", filter]);
        }
        let label = format!("{} as {reference} with {:?}", self.kit, self.filter);
        if self.refused {
            let dir = kitfs.path("refused");
            let dir = dir.to_str().expect("UTF-8");
            let said = kitfs.fails(&[&["mount", reference, dir], &options[..]].concat());
            assert!(said.contains("error"), "{label}: {said}");
            assert!(!Path::new(dir).exists(), "{label}: a refused mount leaves nothing behind");
            return;
        }
        let mount = kitfs.mount(reference, &options);
        if self.filter.is_empty() {
            let said = mount.said.lines().find(|line| line.starts_with("trust")).expect("a line on trust");
            assert!(said.contains(trust), "{label}: {said}, not {trust}");
        }
        let mut found = tree_of(&mount.dir);
        let mut expected = recorded(&data().join(self.tree.as_ref().expect("a tree")));
        if self.kitfile.is_some() {
            found.retain(|row| row.path != "Kitfile");
            expected.retain(|row| row.path != "Kitfile");
        }
        assert_eq!(found, expected, "{label}");
        let kitfile = data().join(format!("trees/{}.Kitfile", self.kit));
        if self.filter.is_empty() && kitfile.exists() {
            let found = std::fs::read(mount.path("Kitfile")).expect("Kitfile");
            let expected = std::fs::read(kitfile).expect("recorded Kitfile");
            assert_eq!(String::from_utf8_lossy(&found), String::from_utf8_lossy(&expected), "{label}");
        }
    }
}

#[test]
fn from_an_oci_layout() {
    let kitfs = Kitfs::new();
    for case in cases().iter().filter(|case| case.home.is_none()) {
        let layout = data().join("layouts").join(&case.kit);
        case.check(&kitfs, &format!("oci:{}:{}", layout.display(), case.tag()));
    }
}

/// The commands' caches differ, so that each tier has to get everything by its own means.
#[test]
fn with_indexes_in_the_manifest_beside_the_kit_and_derived_here() {
    let registry = Registry::start();
    let [indexing, pinned, attested] = [(); 3].map(|()| Kitfs::new());
    let mut referrers = HashMap::new();
    let cases = cases();
    // An image index is no kit: which of its kits is meant, and refused, is another test's.
    for case in cases.iter().filter(|case| case.home.is_none() && case.kit != "image-index") {
        let repository = format!("fixtures/{}", case.kit);
        let plain = format!("{}/{repository}:{}", registry.host(), case.tag());
        let indexed = format!("{}/{repository}:indexed", registry.host());
        let referrer = referrers.entry(&case.kit).or_insert_with(|| {
            registry.push_layout(&data().join("layouts").join(&case.kit), &repository);
            indexing.ok(&["index", &plain, &indexed]);
            let written = indexing.ok(&["index", &plain, "--json"]);
            let written: serde_json::Value = serde_json::from_str(&written).expect("JSON");
            written["referrer"].as_str().expect("the referrer's digest").to_owned()
        });
        case.check_as(&pinned, &indexed, &[], "pinned");
        case.check_as(&attested, &plain, &["--index-digest", referrer], "attested");
        // Another mount may have proved an attested layer by then; here no index is trusted, and all are known.
        case.check_as(&indexing, &plain, &["--trust", "layer"], "derived");
    }
    assert!(referrers.len() > 10);
}

#[test]
fn with_indexes_in_kits_own_storage_parents_included() {
    let cases = cases();
    let kitfs = Kitfs::new();
    let home = kitfs.path("kithome");
    let copied = std::process::Command::new("cp").arg("-r").arg(data().join("kithome")).arg(&home).status();
    assert!(copied.expect("cp").success());
    let kitfs = kitfs.with("KITOPS_HOME", &home);
    let mut references: Vec<&str> =
        cases.iter().filter(|case| case.home.is_some()).map(|case| &*case.reference).collect();
    references.sort_unstable();
    references.dedup();
    for reference in &references {
        // What refers to a parent refers to it by its tag, so the tag becomes the indexed kit's.
        if !reference.starts_with("registry.") {
            kitfs.ok(&["index", reference, reference, "--replace"]);
        }
    }
    for case in cases.iter().filter(|case| case.home.is_some()) {
        case.check(&kitfs, &case.reference);
    }
}

#[test]
fn from_kits_own_storage() {
    let home = data().join("kithome");
    let kitfs = Kitfs::new().with("KITOPS_HOME", &home);
    for case in cases().iter().filter(|case| case.home.is_some()) {
        case.check(&kitfs, &case.reference);
    }
}

#[test]
fn from_kits_storage_filled_from_a_layout() {
    let kitfs = Kitfs::new();
    let home = kitfs.path("kithome");
    let kitfs = kitfs.with("KITOPS_HOME", &home);
    for case in cases().iter().filter(|case| case.home.is_none()) {
        support::kithome::import(&data().join("layouts").join(&case.kit), &home, &case.kit);
        case.check(&kitfs, &format!("{}:{}", case.kit, case.tag()));
    }
}

#[test]
fn from_a_registry() {
    let registry = Registry::start();
    let kitfs = Kitfs::new();
    for case in cases().iter().filter(|case| case.home.is_none()) {
        let repository = format!("fixtures/{}", case.kit);
        registry.push_layout(&data().join("layouts").join(&case.kit), &repository);
        case.check(&kitfs, &format!("{}/{repository}:{}", registry.host(), case.tag()));
    }
}
