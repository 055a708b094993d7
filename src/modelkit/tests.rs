//! The fixtures: every recorded case goes through the plan, and what the plan says is unpacked here the simple way and
//! compared with what `kit unpack` wrote.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use serde_json::{Value, json};

use super::error::ModelKitError;
use super::filter::Filters;
use super::kit::Kit;
use super::manifest::Document;
use super::plan::{Chain, plan};
use super::{Compression, Format, KitfileSource, Plan};
use crate::digest::{Digest, Unverified, Verified};
use crate::path::TreePath;
use crate::reference::{Location, Reference};

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

pub(super) fn verified(bytes: impl AsRef<[u8]>) -> Verified {
    let bytes = bytes.as_ref().to_vec();
    let digest = Digest::of(&bytes);
    Unverified::new(bytes).verify(&digest).expect("its own digest")
}

/// A directory of blobs, and the digest that a reference leads to.
struct Store {
    root: PathBuf,
}

impl Store {
    fn of(case: &Value) -> Self {
        match case["in"].as_str() {
            Some("kithome") => Self { root: data().join("kithome/storage") },
            _ => {
                let reference = case["reference"].as_str().expect("a reference");
                let kit = reference.split(':').next().expect("a name");
                Self { root: data().join("layouts").join(kit) }
            }
        }
    }

    fn blob(&self, digest: &Digest) -> Verified {
        let bytes = std::fs::read(self.root.join("blobs/sha256").join(digest.hex())).expect("the blob exists");
        Unverified::new(bytes).verify(digest).expect("the fixture is whole")
    }

    fn resolve(&self, reference: &Reference) -> Digest {
        let repository = match &reference.location {
            Location::Local { repository } => format!("localhost/{repository}"),
            location => location.name(),
        };
        let file = base64::engine::general_purpose::URL_SAFE.encode(repository) + "-tags.json";
        let digest = match std::fs::read(self.root.join(file)) {
            Ok(tags) => {
                let tags: Value = serde_json::from_slice(&tags).expect("JSON");
                tags[reference.tag()]["digest"].clone()
            }
            Err(_) => {
                let index = std::fs::read(self.root.join("index.json")).expect("a layout");
                let index: Value = serde_json::from_slice(&index).expect("JSON");
                let named = |m: &&Value| m["annotations"]["org.opencontainers.image.ref.name"] == reference.tag();
                let manifests = index["manifests"].as_array().expect("a list");
                manifests.iter().find(named).expect("the tag exists")["digest"].clone()
            }
        };
        digest.as_str().expect("a digest").parse().expect("a digest")
    }

    fn kit(&self, digest: Digest) -> Result<Kit, ModelKitError> {
        match Document::parse(&self.blob(&digest))? {
            Document::Manifest(manifest) => Kit::read(digest, &manifest, &self.blob(&manifest.config.digest)),
            Document::Index(index) => self.kit(index.select(None, None)?.digest),
        }
    }

    fn plan(&self, reference: &str, filters: &[String]) -> Result<Plan, ModelKitError> {
        let filters = Filters::parse(filters)?;
        let reference: Reference = reference.parse().expect("a reference");
        let mut chain = Chain::new(self.kit(self.resolve(&reference))?);
        while let Some(parent) = chain.next_parent(&filters) {
            let parent = self.kit(self.resolve(parent))?;
            chain.push(parent)?;
        }
        plan(&chain, &filters)
    }

    /// What the plan's layers hold. `Err`: two layers hold the same file.
    fn unpack(&self, plan: &Plan) -> Result<BTreeMap<Vec<u8>, Node>, String> {
        let mut tree = BTreeMap::new();
        for layer in &plan.layers {
            let blob = self.blob(&layer.digest);
            let mut content = Vec::new();
            match layer.compression {
                Compression::None => content.extend_from_slice(blob.bytes()),
                Compression::Gzip => {
                    flate2::read::MultiGzDecoder::new(&blob.bytes()[..]).read_to_end(&mut content).expect("gzip");
                }
                Compression::Zstd => content = zstd::decode_all(&blob.bytes()[..]).expect("zstd"),
            }
            if let Some(diff_id) = layer.diff_id {
                assert_eq!(Digest::of(&content), diff_id, "{}", layer.label());
            }
            match &layer.format {
                Format::Raw { mode, .. } => add(&mut tree, &layer.root, *mode, Some(content))?,
                Format::Tar => {
                    for entry in tar::Archive::new(&content[..]).entries().expect("a tar") {
                        let mut entry = entry.expect("an entry");
                        let name = TreePath::from_archive(&entry.path_bytes()).expect("a path that stays");
                        let path = layer.prefix.join(&name).expect("a path that stays");
                        let is_parent = layer.root.ancestors().any(|parent| parent == path);
                        assert!(path.is_within(&layer.root) || is_parent, "{path} in {}", layer.label());
                        let mode = entry.header().mode().expect("a mode") & 0o7777;
                        let mut bytes = Vec::new();
                        entry.read_to_end(&mut bytes).expect("content");
                        let is_file = entry.header().entry_type().is_file();
                        add(&mut tree, &path, mode, is_file.then_some(bytes))?;
                    }
                }
            }
        }
        match &plan.kitfile {
            None => {}
            Some(KitfileSource::Rendered(bytes)) => {
                add(&mut tree, &path("Kitfile"), 0o644, Some(bytes.bytes().to_vec()))?;
            }
            Some(KitfileSource::Layer { digest, .. }) => {
                add(&mut tree, &path("Kitfile"), 0o644, Some(self.blob(digest).bytes().to_vec()))?;
            }
        }
        Ok(tree)
    }
}

/// Mode, and the digest of a file's content.
type Node = (u32, Option<Digest>);

pub(super) fn path(path: &str) -> TreePath {
    TreePath::clean(path.as_bytes()).expect("a valid path")
}

/// Adds a node as `kit unpack` does: parents 0755 where none is stated, directories merge, files must be new.
fn add(tree: &mut BTreeMap<Vec<u8>, Node>, path: &TreePath, mode: u32, content: Option<Vec<u8>>) -> Result<(), String> {
    for parent in path.ancestors().filter(|parent| !parent.is_root()) {
        tree.entry(parent.as_bytes().to_vec()).or_insert((0o755, None));
    }
    let node = (mode, content.map(|content| Digest::of(&content)));
    match tree.get(path.as_bytes()) {
        Some((_, None)) if node.1.is_none() => Ok(()),
        Some(_) => Err(format!("{path} is there twice")),
        None => {
            tree.insert(path.as_bytes().to_vec(), node);
            Ok(())
        }
    }
}

fn recorded(file: &str) -> BTreeMap<Vec<u8>, Node> {
    let text = std::fs::read_to_string(data().join(file)).expect("the recorded tree");
    let node = |line: &str| {
        let node: Value = serde_json::from_str(line).expect("JSON");
        let mode = u32::from_str_radix(node["mode"].as_str().expect("a mode"), 8).expect("octal");
        let sha256 = node["sha256"].as_str().map(|hex| Digest::from_hex(hex).expect("a digest"));
        (node["path"].as_str().expect("a path").as_bytes().to_vec(), (mode, sha256))
    };
    text.lines().map(node).collect()
}

fn cases() -> Vec<Value> {
    let text = std::fs::read_to_string(data().join("cases.jsonl")).expect("the cases");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn strings(list: &Value) -> Vec<String> {
    list.as_array().expect("a list").iter().map(|item| item.as_str().expect("a string").to_owned()).collect()
}

#[test]
fn every_case_gives_the_tree_that_kit_unpacked() {
    let mut compared = 0;
    for case in cases().iter().filter(|case| case["refused"] != true) {
        let store = Store::of(case);
        let plan = store.plan(case["reference"].as_str().expect("a reference"), &strings(&case["filter"]));
        let plan = plan.unwrap_or_else(|e| panic!("{case}: {e}"));
        let mut found = store.unpack(&plan).unwrap_or_else(|e| panic!("{case}: {e}"));
        if case["kitfile"] == "not recorded" {
            assert!(found.remove(&b"Kitfile"[..]).is_some(), "{case}");
        }
        assert_eq!(found, recorded(case["tree"].as_str().expect("a tree")), "{case}");
        assert_eq!(plan.warnings, [""; 0], "{case}");
        compared += 1;
    }
    assert!(compared > 45, "{compared} cases");
}

#[test]
fn what_kit_refuses_is_refused() {
    let refused: Vec<_> = cases().into_iter().filter(|case| case["refused"] == true).collect();
    assert_eq!(refused.len(), 6);
    for case in refused {
        let store = Store::of(&case);
        let planned = store.plan(case["reference"].as_str().expect("a reference"), &strings(&case["filter"]));
        let outcome = planned.map_err(|e| e.to_string()).and_then(|plan| store.unpack(&plan).map(|_| ()));
        assert!(outcome.is_err(), "{case}");
    }
}

#[test]
fn every_recorded_kitfile_is_rendered_byte_for_byte() {
    let mut compared = 0;
    for case in cases().iter().filter(|case| case["filter"] == json!([]) && case["refused"] != true) {
        let file = data().join(format!("trees/{}.Kitfile", case["kit"].as_str().expect("a name")));
        let Ok(expected) = std::fs::read(file) else { continue };
        let plan = Store::of(case).plan(case["reference"].as_str().expect("a reference"), &[]).expect("a plan");
        let Some(KitfileSource::Rendered(found)) = plan.kitfile else { panic!("{case}: no Kitfile") };
        assert_eq!(String::from_utf8_lossy(found.bytes()), String::from_utf8_lossy(&expected), "{case}");
        compared += 1;
    }
    let files = std::fs::read_dir(data().join("trees")).expect("the trees");
    let recorded =
        files.filter(|file| file.as_ref().is_ok_and(|f| f.path().extension().is_some_and(|e| e == "Kitfile")));
    assert_eq!(compared, recorded.count());
}

#[test]
fn newer_fields_come_after_the_older_ones_in_the_kitfile() {
    let case = json!({"reference": "newer-kitops:v1"});
    let plan = Store::of(&case).plan("newer-kitops:v1", &[]).expect("a plan");
    let Some(KitfileSource::Rendered(kitfile)) = plan.kitfile else { panic!("no Kitfile") };
    let text = String::from_utf8_lossy(kitfile.bytes()).into_owned();
    assert!(text.ends_with("datasets:\n  - path: data\nprompts:\n  - path: prompts/system.md\n"), "{text}");
}

#[test]
fn an_index_of_two_kits_lists_them_and_takes_a_choice() {
    let store = Store::of(&json!({"reference": "image-index:two"}));
    let digest = store.resolve(&"image-index:two".parse().expect("a reference"));
    let Ok(Document::Index(index)) = Document::parse(&store.blob(&digest)) else { panic!("not an index") };
    let error = index.select(None, None).expect_err("two kits").to_string();
    assert!(error.contains("--select DIGEST") && error.contains("docs  no platform"), "{error}");
    for candidate in &index.manifests {
        assert!(error.contains(&candidate.digest.to_string()), "{error}");
        assert_eq!(index.select(None, Some(&candidate.digest)).ok(), Some(candidate));
    }
    assert!(matches!(index.select(None, Some(&digest)), Err(ModelKitError::NotInIndex { .. })));
}

proptest::proptest! {
    #[test]
    fn a_config_with_one_byte_changed_is_planned_or_refused(at in 0_usize..2572, byte: u8) {
        let store = Store::of(&json!({"reference": "tiny-llm:1.2.0"}));
        let digest = store.resolve(&"tiny-llm:1.2.0".parse().expect("a reference"));
        let Ok(Document::Manifest(manifest)) = Document::parse(&store.blob(&digest)) else { panic!("a kit") };
        let mut config = store.blob(&manifest.config.digest).bytes().to_vec();
        config[at] = byte;
        if let Ok(kit) = Kit::read(digest, &manifest, &verified(&config)) {
            let _ = plan(&Chain::new(kit), &Filters::default());
        }
    }
}
