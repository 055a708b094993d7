//! Every kit that the real tools packed mounts to the tree that `kit unpack` made of it, from every source that can hold
//! it: path, type, mode, size and content, and the Kitfile byte for byte. What kit refuses is refused.

mod support;

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
        let mut options: Vec<&str> = Vec::new();
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
