use serde_json::{Value, json};

use super::*;
use crate::digest::Unverified;
use crate::modelkit::manifest::Document as Parsed;

const LAYER: &str = "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae";
const OTHER: &str = "sha256:fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9";

/// A manifest with odd spaces, unknown fields and a number that no float holds.
fn manifest() -> String {
    format!(
        r#"{{"schemaVersion": 2, "zeta" : 1.50e400, "config":{{"mediaType":"application/vnd.kitops.modelkit.config.v1+json","digest":"{LAYER}","size":3}},
"layers":[{{"mediaType":"application/vnd.kitops.modelkit.model.v1.tar","digest":"{LAYER}","size":3, "x":[1,  2]}},
{{"mediaType":"application/vnd.kitops.modelkit.docs.v1.tar","digest":"{OTHER}","size":3,"annotations":{{"b":"1","a":"é"}}}}],"annotations":{{"ml.kitops.modelkit.cli-version":"1.7.0"}}}}"#
    )
}

fn parsed(text: &str) -> (Digest, Manifest) {
    let digest = Digest::of(text.as_bytes());
    let bytes = Unverified::new(text.as_bytes().to_vec()).verify(&digest).expect("verified");
    match Parsed::parse(&bytes).expect("a manifest") {
        Parsed::Manifest(manifest) => (digest, manifest),
        Parsed::Index(_) => panic!("an index"),
    }
}

fn pin(seed: &[u8]) -> Pin {
    Pin { digest: Digest::of(seed), size: 112, head_digest: Digest::of(seed), head_size: 112 }
}

fn indexed(text: &str, pins: &[Option<Pin>], added: &[(String, String)]) -> String {
    let (digest, manifest) = parsed(text);
    let document = Document::with_indexes(digest, &manifest, pins, added).expect("made");
    assert_eq!(document.digest, Digest::of(&document.manifest.bytes));
    assert_eq!(document.manifest.media_type, IMAGE_MANIFEST);
    String::from_utf8(document.manifest.bytes.to_vec()).expect("UTF-8")
}

#[test]
fn annotations_are_added_and_every_other_byte_of_a_value_stays() {
    let made = indexed(&manifest(), &[Some(pin(b"1")), None], &[]);
    let source = Digest::of(manifest().as_bytes());
    let index = Digest::of(b"1");
    let expected = format!(
        r#"{{"schemaVersion":2,"zeta":1.50e400,"config":{{"mediaType":"application/vnd.kitops.modelkit.config.v1+json","digest":"{LAYER}","size":3}},"layers":[{{"mediaType":"application/vnd.kitops.modelkit.model.v1.tar","digest":"{LAYER}","size":3,"x":[1,  2],"annotations":{{"dev.kitfs.index.digest":"{index}","dev.kitfs.index.size":"112","dev.kitfs.index.head":"112:{index}"}}}},{{"mediaType":"application/vnd.kitops.modelkit.docs.v1.tar","digest":"{OTHER}","size":3,"annotations":{{"b":"1","a":"é"}}}}],"annotations":{{"ml.kitops.modelkit.cli-version":"1.7.0","dev.kitfs.index.source":"{source}"}}}}"#
    );
    assert_eq!(made, expected);
}

#[test]
fn indexing_what_is_indexed_changes_nothing() {
    let pins = [Some(pin(b"1")), Some(pin(b"2"))];
    let added = [("k".to_owned(), "v".to_owned())];
    let once = indexed(&manifest(), &pins, &added);
    assert_eq!(indexed(&once, &pins, &[]), once);
    assert_eq!(indexed(&once, &pins, &added), once);
}

#[test]
fn other_indexes_take_the_place_of_old_ones_and_the_source_stays() {
    let once = indexed(&manifest(), &[Some(pin(b"1")), Some(pin(b"2"))], &[]);
    let again = indexed(&once, &[Some(pin(b"3")), None], &[]);
    assert_eq!(again, indexed(&manifest(), &[Some(pin(b"3")), None], &[]));
}

/// A manifest with annotations that stand there twice, as text: what readers take is the last.
fn with_twice(annotations: &str, of_kit: &str) -> String {
    let annotations = format!(r#""size":3, "x":[1,  2], "annotations":{{{annotations}}}"#);
    let manifest = manifest().replace(r#""size":3, "x":[1,  2]"#, &annotations).replace("1.50e400", "1");
    manifest.replace(r#""annotations":{"ml.kitops"#, &format!(r#""annotations":{{{of_kit},"ml.kitops"#))
}

#[test]
fn a_pin_that_stands_twice_is_replaced_wherever_it_stands() {
    let (old, new) = (pin(b"theirs"), pin(b"ours"));
    let written = |key: &str, value: &str| format!("{key:?}:{value:?}");
    let pairs = old.annotations().map(|(key, value)| written(key, &value)).join(",");
    let source = written(annotations::SOURCE, "none");
    let twice = with_twice(&format!(r#"{pairs},"between":"kept",{pairs}"#), &format!("{source},{source}"));
    assert!(matches!(Pin::read(&parsed(&twice).1.layers[0].annotations), Ok(Some(found)) if found == old));

    let made = indexed(&twice, &[Some(new), None], &[]);
    let (_, found) = parsed(&made);
    assert_eq!(Pin::read(&found.layers[0].annotations), Ok(Some(new)));
    assert!(!made.contains(&old.digest.to_string()), "{made}");
    let digest = Digest::of(twice.as_bytes()).to_string();
    assert_eq!(found.annotations[annotations::SOURCE], digest);
    for key in [annotations::DIGEST, annotations::SIZE, annotations::HEAD, annotations::SOURCE] {
        assert_eq!(made.matches(&format!("{key:?}")).count(), 1, "{key} in {made}");
    }
    assert_eq!(indexed(&made, &[Some(new), None], &[]), made, "and is canonical");

    let without = indexed(&twice, &[None, None], &[]);
    assert!(!without.contains(annotations::DIGEST) && without.contains(r#""between":"kept""#), "{without}");
}

#[test]
fn an_annotation_that_is_given_replaces_all_of_the_kits_own() {
    let twice = with_twice("", r#""k":"1","k":"2""#);
    let made = indexed(&twice, &[None, None], &[("k".to_owned(), "3".to_owned())]);
    assert_eq!(parsed(&made).1.annotations["k"], "3");
    assert_eq!(made.matches(r#""k":"#).count(), 1, "{made}");
}

#[test]
fn an_annotation_that_is_given_replaces_the_kits_own() {
    let added = [("ml.kitops.modelkit.cli-version", "2"), ("new", "a\"b")];
    let added = added.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let made = indexed(&manifest().replace("1.50e400", "1"), &[None, None], &added);
    let made: Value = serde_json::from_str(&made).expect("JSON");
    assert_eq!(made["annotations"]["ml.kitops.modelkit.cli-version"], "2");
    assert_eq!(made["annotations"]["new"], "a\"b");
}

#[test]
fn the_referrer_is_what_the_format_says() {
    let (digest, manifest) = parsed(&manifest());
    let subject = Document::unchanged(digest, &manifest.bytes).expect("a subject");
    let layer: Digest = LAYER.parse().expect("a digest");
    let (one, two) = (pin(b"1"), pin(b"2"));
    let pins = [(layer, one), (OTHER.parse().expect("a digest"), two), (layer, one)];
    let referrer = Document::referrer(&subject, &pins).expect("made").expect("a referrer");
    let empty = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";
    let index = |pin: &Pin, layer: &str| {
        let Pin { digest, head_digest, .. } = pin;
        format!(
            r#"{{"mediaType":"application/vnd.kitfs.index.v1","digest":"{digest}","size":112,"annotations":{{"dev.kitfs.index.head":"112:{head_digest}","dev.kitfs.index.layer":"{layer}"}}}}"#
        )
    };
    let expected = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","artifactType":"application/vnd.kitfs.index.v1","config":{{"mediaType":"application/vnd.oci.empty.v1+json","digest":"{empty}","size":2}},"layers":[{},{}],"subject":{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{digest}","size":{}}}}}"#,
        index(&one, LAYER),
        index(&two, OTHER),
        manifest.bytes.bytes().len(),
    );
    assert_eq!(String::from_utf8_lossy(&referrer.manifest.bytes), expected);
    let refers = referrer.manifest.refers.expect("refers");
    assert_eq!((refers.subject, refers.artifact_type.as_str()), (digest, MEDIA_TYPE));
    assert!(Document::referrer(&subject, &[]).expect("made").is_none(), "nothing to keep");
}

#[test]
fn a_manifest_that_grows_too_large_is_refused() {
    let (digest, manifest) = parsed(&manifest());
    let added = [("k".to_owned(), "v".repeat(4 << 20))];
    let error = Document::with_indexes(digest, &manifest, &[None, None], &added).expect_err("too large");
    assert!(error.to_string().contains("at most 4.0 MiB"), "{error}");
}

#[test]
fn a_media_type_of_its_own_is_kept() {
    let text = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {"mediaType": "application/vnd.kitops.modelkit.config.v1+json", "digest": LAYER, "size": 3},
    });
    let (digest, manifest) = parsed(&text.to_string());
    let made = Document::with_indexes(digest, &manifest, &[], &[]).expect("made");
    assert_eq!(made.manifest.media_type, "application/vnd.docker.distribution.manifest.v2+json");
}
