//! Kits made by hand: those that nobody should have packed, and those that no fixture has.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::error::ModelKitError;
use super::filter::Filters;
use super::index::{ImageIndex, Platform};
use super::kit::Kit;
use super::manifest::{Document, Manifest};
use super::plan::{Chain, MAX_PARENTS, plan};
use super::tests::{path, verified};
use super::{Format, Kind, KitfileSource, Layer, Plan};
use crate::digest::Digest;
use crate::reference::Reference;

/// A kit by hand: layers are (media type, digest of text, annotations).
struct ByHand {
    manifest: Value,
    config: Value,
}

const TAR: &str = "application/vnd.kitops.modelkit.model.v1.tar";
const DOCS_TAR: &str = "application/vnd.kitops.modelkit.docs.v1.tar";
const CODE_TAR: &str = "application/vnd.kitops.modelkit.code.v1.tar";
const CODE_RAW: &str = "application/vnd.kitops.modelkit.code.v1.raw";

fn layer(media_type: &str, text: &str, file_path: Option<&str>) -> Value {
    let mut layer = json!({"mediaType": media_type, "digest": Digest::of(text.as_bytes()), "size": text.len()});
    if let Some(path) = file_path {
        layer["annotations"] = json!({"org.cncf.model.filepath": path});
    }
    layer
}

impl ByHand {
    fn new(layers: &[Value], config: Value) -> Self {
        let manifest = json!({
            "schemaVersion": 2,
            "config": {"mediaType": "application/vnd.kitops.modelkit.config.v1+json",
                       "digest": Digest::of(config.to_string().as_bytes()), "size": config.to_string().len()},
            "layers": layers});
        Self { manifest, config }
    }

    fn manifest(&self) -> Result<Manifest, ModelKitError> {
        match Document::parse(&verified(self.manifest.to_string()))? {
            Document::Manifest(manifest) => Ok(manifest),
            Document::Index(_) => panic!("an index"),
        }
    }

    fn kit(&self) -> Result<Kit, ModelKitError> {
        let digest = Digest::of(self.manifest.to_string().as_bytes());
        Kit::read(digest, &self.manifest()?, &verified(self.config.to_string()))
    }

    fn plan(&self, filters: &[&str]) -> Result<Plan, ModelKitError> {
        let filters: Vec<_> = filters.iter().map(|filter| (*filter).to_owned()).collect();
        plan(&Chain::new(self.kit()?), &Filters::parse(&filters)?)
    }

    fn error(&self) -> String {
        self.plan(&[]).expect_err("it must be refused").to_string()
    }
}

#[test]
fn an_entry_whose_layer_the_manifest_lacks_is_refused_when_it_is_wanted() {
    let config = json!({"model": {"path": "m", "digest": Digest::of(b"gone")},
                        "docs": [{"path": "README.md", "digest": Digest::of(b"d")}]});
    let kit = ByHand::new(&[layer(DOCS_TAR, "d", None)], config);
    let error = kit.error();
    assert!(error.contains("model \"m\"") && error.contains(&Digest::of(b"gone").to_string()), "{error}");
    assert_eq!(kit.plan(&["docs"]).expect("the rest is usable").layers.len(), 1);
}

#[test]
fn paths_that_are_absolute_or_climb_are_refused() {
    for path in ["/etc", "../up", "a/../../b", "a\0b"] {
        let enhanced = json!({"code": [{"path": path, "digest": Digest::of(b"c")}]});
        let legacy = json!({"code": [{"path": path}]});
        for config in [enhanced, legacy] {
            let error = ByHand::new(&[layer(CODE_TAR, "c", None)], config).error();
            assert!(error.starts_with("code "), "{error}");
        }
        let raw = json!({"code": [{"path": "x", "digest": Digest::of(b"c")}]});
        assert!(ByHand::new(&[layer(CODE_RAW, "c", Some(path))], raw).plan(&[]).is_err(), "{path:?}");
    }
}

#[test]
fn sizes_that_are_negative_or_overflow_are_refused() {
    for sizes in [[json!(-1), json!(1)], [json!(i64::MAX), json!(1)], [json!(u64::MAX), json!(0)]] {
        let layers: Vec<_> =
            sizes.iter().map(|size| json!({"mediaType": CODE_TAR, "digest": Digest::of(b"c"), "size": size})).collect();
        assert!(ByHand::new(&layers, json!({})).manifest().is_err(), "{sizes:?}");
    }
}

#[test]
fn parents_that_go_in_a_circle_are_refused() {
    let child = |parent: &str| ByHand::new(&[], json!({"model": {"path": parent}})).kit().expect("a kit");
    let mut chain = Chain::new(child("b:v1"));
    assert_eq!(chain.next_parent(&Filters::default()).map(Reference::to_string), Some("b:v1".to_owned()));
    chain.push(child("a:v1")).expect("a parent");
    let error = chain.push(child("b:v1")).expect_err("a circle").to_string();
    assert!(error.contains("b:v1 → a:v1"), "{error}");
}

#[test]
fn a_chain_has_ten_parents_at_most() {
    let kit = |nth: usize| ByHand::new(&[], json!({"model": {"path": format!("k{nth}:v1")}})).kit().expect("a kit");
    let mut chain = Chain::new(kit(0));
    for nth in 1..=MAX_PARENTS {
        chain.push(kit(nth)).expect("not too long yet");
    }
    assert!(matches!(chain.push(kit(11)), Err(ModelKitError::TooManyParents { limit: 10, .. })));
}

#[test]
fn a_parent_is_needed_unless_the_filters_want_nothing_of_it() {
    let kit =
        ByHand::new(&[layer(CODE_TAR, "c", None)], json!({"model": {"path": "base:v1"}, "code": [{"path": "c"}]}));
    assert!(matches!(kit.plan(&[]), Err(ModelKitError::ParentNotRead { .. })));
    assert_eq!(kit.plan(&["code"]).expect("the parent is not asked").layers.len(), 1);
}

#[test]
fn one_digest_under_two_types_is_two_layers() {
    let digest = Digest::of(b"same");
    let config = json!({"code": [{"path": "c", "digest": digest}], "docs": [{"path": "d", "digest": digest}]});
    let kit = ByHand::new(&[layer(DOCS_TAR, "same", None), layer(CODE_TAR, "same", None)], config);
    let plan = kit.plan(&[]).expect("a plan");
    let found: Vec<_> = plan.layers.iter().map(|layer| (layer.kind, layer.media_type.as_str())).collect();
    assert_eq!(found, [(Kind::Docs, DOCS_TAR), (Kind::Code, CODE_TAR)]);
}

#[test]
fn raw_layers_that_meet_are_refused_from_the_plan_alone() {
    let config =
        json!({"code": [{"path": "a", "digest": Digest::of(b"1")}, {"path": "b", "digest": Digest::of(b"2")}]});
    let kit = |first, second| {
        ByHand::new(&[layer(CODE_RAW, "1", Some(first)), layer(CODE_RAW, "2", Some(second))], config.clone())
    };
    assert!(kit("x", "y").plan(&[]).is_ok());
    assert!(kit("x", "x-y").plan(&[]).is_ok());
    assert!(kit("x", "./x").error().contains("both want the path x"));
    assert!(kit("x/y", "x").error().contains("both want the path x"));
    assert!(kit("Kitfile", "y").error().contains("the Kitfile"));
    assert!(kit(".", "y").error().contains("kit's root"));
}

#[test]
fn a_raw_layer_has_the_mode_and_time_that_are_annotated() {
    let mut raw = layer(CODE_RAW, "1", Some("run.sh"));
    raw["annotations"]["org.cncf.model.file.metadata+json"] =
        json!(r#"{"mode":493,"size":1,"mtime":"2025-01-01T00:00:00Z","typeflag":"0"}"#);
    let config = json!({"code": [{"path": "run.sh", "digest": Digest::of(b"1")}]});
    let plan = ByHand::new(&[raw], config).plan(&[]).expect("a plan");
    assert_eq!(plan.layers[0].format, Format::Raw { mode: 0o755, mtime: 1_735_689_600, stated_size: None });
}

#[test]
fn diff_ids_must_fit_the_compression() {
    let config = json!({"code": [{"path": "c", "digest": Digest::of(b"1"), "diffId": Digest::of(b"2")}]});
    assert!(ByHand::new(&[layer(CODE_TAR, "1", None)], config).error().contains("not compressed"));
    let config = json!({"code": [{"path": "c", "digest": Digest::of(b"1"), "diffId": Digest::of(b"1")}]});
    let gzip = layer(&format!("{CODE_TAR}+gzip"), "1", None);
    let plan = ByHand::new(&[gzip], config).plan(&[]).expect("a wrong diffId does not stop kit either");
    assert_eq!((plan.layers[0].diff_id, plan.warnings.len()), (None, 1));
}

#[test]
fn layers_of_unknown_type_are_refused_only_where_an_entry_needs_them() {
    let unknown = layer("application/x-other", "1", None);
    let plan = ByHand::new(std::slice::from_ref(&unknown), json!({})).plan(&[]).expect("a plan");
    assert!(plan.warnings[0].contains("application/x-other"), "{:?}", plan.warnings);
    let config = json!({"code": [{"path": "c", "digest": Digest::of(b"1")}]});
    assert!(ByHand::new(&[unknown], config).error().contains("application/x-other"));
}

#[test]
fn what_has_no_layer_and_what_has_no_entry_is_told() {
    let config = json!({"code": [{"path": "a"}, {"path": "b"}],
                        "datasets": [{"path": "far", "remotePath": "s3://x/y"}]});
    let plan = ByHand::new(&[layer(CODE_TAR, "1", None), layer(TAR, "2", None)], config).plan(&[]).expect("a plan");
    let paths: Vec<_> = plan.layers.iter().map(|layer| layer.path.as_str()).collect();
    assert_eq!(paths, ["a"]);
    assert!(plan.warnings[0].contains("code \"b\" has no layer"), "{:?}", plan.warnings);
    assert!(plan.warnings[1].contains("belongs to no Kitfile entry"), "{:?}", plan.warnings);
}

#[test]
fn legacy_layers_are_put_below_the_parent_of_their_path() {
    let config = json!({"model": {"path": "./a/b/w.gguf"}, "code": [{"path": "."}]});
    let kit = ByHand::new(&[layer(CODE_TAR, "1", None), layer(TAR, "2", None)], config);
    let layers = kit.plan(&[]).expect("a plan").layers;
    let place = |layer: &Layer| (layer.root.to_string(), layer.prefix.to_string());
    assert_eq!(place(&layers[0]), (".".into(), ".".into()));
    assert_eq!(place(&layers[1]), ("a/b/w.gguf".into(), "a/b".into()));
}

#[test]
fn a_model_pack_that_kit_packed_brings_its_kitfile_in_an_annotation() {
    let mut kit = ByHand::new(&[], json!({"modelfs": {"type": "layers", "diffIds": [Digest::of(b"1")]}}));
    kit.manifest["config"]["mediaType"] = json!("application/vnd.cncf.model.config.v1+json");
    kit.manifest["layers"] = json!([layer("application/vnd.cncf.model.doc.v1.tar", "1", Some("docs/a.md"))]);
    let kitfile = json!({"manifestVersion": "1.0.0", "docs": [{"path": "docs/a.md", "digest": Digest::of(b"1")}]});
    kit.manifest["annotations"] = json!({"ml.kitops.modelkit.kitfile": kitfile.to_string()});
    let plan = kit.plan(&[]).expect("a plan");
    let Some(KitfileSource::Rendered(rendered)) = &plan.kitfile else { panic!("no Kitfile") };
    assert_eq!(&rendered.bytes()[..], b"manifestVersion: 1.0.0\ndocs:\n  - path: docs/a.md\n");
    assert_eq!(plan.layers[0].root, path("docs/a.md"));
    assert!(plan.layers[0].prefix.is_root());
    assert_eq!(plan.layers[0].diff_id, Some(Digest::of(b"1")));
}

#[test]
fn other_artifacts_are_named_for_what_they_are() {
    let mut image = ByHand::new(&[], json!({}));
    image.manifest["config"]["mediaType"] = json!("application/vnd.oci.image.config.v1+json");
    let error = image.manifest().expect_err("an image").to_string();
    assert!(error.contains("a container image") && error.contains("oci.image.config"), "{error}");
    for document in ["", "[]", "{}", r#"{"schemaVersion":1}"#, r#"{"schemaVersion":2,"manifests":[],"config":{}}"#] {
        assert!(Document::parse(&verified(document)).is_err(), "{document}");
    }
}

fn index(manifests: Value) -> ImageIndex {
    let document = json!({"schemaVersion": 2, "manifests": manifests}).to_string();
    match Document::parse(&verified(document)).expect("an index") {
        Document::Index(index) => index,
        Document::Manifest(_) => panic!("a manifest"),
    }
}

#[test]
fn an_index_is_chosen_from_by_platform() {
    let of = |text: &str, platform: Value| {
        json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 1,
               "digest": Digest::of(text.as_bytes()), "platform": platform})
    };
    let both = index(json!([
        of("1", json!({"os": "linux", "architecture": "amd64"})),
        of("2", json!({"os": "linux", "architecture": "arm64", "variant": "v8"})),
    ]));
    let select = |platform: &str| both.select(Some(&platform.parse().expect("a platform")), None).map(|d| d.digest);
    assert_eq!(select("linux/amd64").ok(), Some(Digest::of(b"1")));
    assert_eq!(select("linux/arm64").ok(), Some(Digest::of(b"2")));
    assert_eq!(select("linux/arm64/v8").ok(), Some(Digest::of(b"2")));
    let error = select("linux/arm64/v7").expect_err("another variant").to_string();
    assert!(error.contains("2 kits, none of them for linux/arm64/v7"), "{error}");
    assert!("linux".parse::<Platform>().is_err());
    assert!("linux//v8".parse::<Platform>().is_err());
}

#[test]
fn attestations_and_referrers_in_an_index_are_no_kits() {
    let manifest = "application/vnd.oci.image.manifest.v1+json";
    let listed = index(json!([
        {"mediaType": manifest, "size": 1, "digest": Digest::of(b"kit")},
        {"mediaType": manifest, "size": 1, "digest": Digest::of(b"sbom"), "artifactType": "application/spdx+json"},
        {"mediaType": manifest, "size": 1, "digest": Digest::of(b"att"),
         "annotations": {"vnd.docker.reference.type": "attestation-manifest"}},
        {"mediaType": "application/vnd.oci.image.index.v1+json", "size": 1, "digest": Digest::of(b"index")},
    ]));
    assert_eq!(listed.select(None, None).map(|found| found.digest).ok(), Some(Digest::of(b"kit")));
    assert!(matches!(index(json!([])).select(None, None), Err(ModelKitError::EmptyIndex)));
}

proptest! {
    #[test]
    fn documents_and_configs_of_any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Document::parse(&verified(&bytes));
        let _ = super::config::Config::parse(&bytes);
        let _ = super::config::model_pack_diff_ids(&bytes);
    }
}
