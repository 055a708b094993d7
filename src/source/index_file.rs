//! OCI's image index, read and rewritten: `index.json` of a layout, kit's lists, and lists of referrers.
//!
//! What others wrote stays: their entries, and fields that are not known here.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::digest::Digest;
use crate::source::target::{NewManifest, Refers};

/// The annotation that holds a tag.
pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The media type of an index.
pub(super) const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
/// The same by Docker's name.
const DOCKER_LIST_TYPE: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// An image index.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct IndexFile {
    #[serde(rename = "schemaVersion", default = "two")]
    schema_version: u32,
    #[serde(rename = "mediaType", default, skip_serializing_if = "Option::is_none")]
    media_type: Option<String>,
    /// Go writes `null` for none.
    #[serde(default, deserialize_with = "null_is_none")]
    pub(super) manifests: Vec<Descriptor>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// An entry of an index, its fields in the order in which kit writes them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Descriptor {
    #[serde(rename = "mediaType", default, skip_serializing_if = "String::is_empty")]
    pub(super) media_type: String,
    /// A text, since others may use algorithms that kitfs does not.
    pub(super) digest: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) size: Option<u64>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) annotations: BTreeMap<String, String>,
    #[serde(rename = "artifactType", default, skip_serializing_if = "Option::is_none")]
    pub(super) artifact_type: Option<String>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

fn two() -> u32 {
    2
}

fn null_is_none<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<Descriptor>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl Descriptor {
    /// What names a manifest in an index that is no list of referrers.
    pub(super) fn of(manifest: &NewManifest) -> Self {
        Self {
            media_type: manifest.media_type.clone(),
            digest: Digest::of(&manifest.bytes).to_string(),
            size: Some(manifest.bytes.len() as u64),
            ..Self::default()
        }
    }

    /// What names a referrer: its artifact type as well, and its annotations, as the distribution specification asks.
    pub(super) fn of_referrer(manifest: &NewManifest, refers: &Refers) -> Self {
        #[derive(Deserialize)]
        struct Annotated {
            #[serde(default)]
            annotations: BTreeMap<String, String>,
        }
        let annotated = serde_json::from_slice::<Annotated>(&manifest.bytes);
        let mut annotations = annotated.map(|own| own.annotations).unwrap_or_default();
        // In a layout it would be a tag.
        annotations.remove(REF_NAME);
        Self { artifact_type: Some(refers.artifact_type.clone()), annotations, ..Self::of(manifest) }
    }

    /// Whether it names an index and not a manifest.
    pub(super) fn is_index(&self) -> bool {
        matches!(self.media_type.as_str(), INDEX_TYPE | DOCKER_LIST_TYPE)
    }

    /// Whether what it names may be a referrer of this type: it says so, or it says nothing and is no kit's tag.
    pub(super) fn may_be(&self, artifact_type: &str) -> bool {
        !self.is_index() && self.artifact_type.as_ref().map_or(self.tag().is_none(), |own| own == artifact_type)
    }

    /// Its tag, in a layout.
    pub(super) fn tag(&self) -> Option<&String> {
        self.annotations.get(REF_NAME)
    }
}

impl IndexFile {
    /// An empty index that states its media type.
    pub(super) fn empty() -> Self {
        Self { media_type: Some(INDEX_TYPE.to_owned()), ..Self::bare() }
    }

    /// An empty index as kit begins the list of a repository.
    pub(super) fn bare() -> Self {
        Self { schema_version: two(), ..Self::default() }
    }

    /// Reads an index, or begins one where there is none.
    pub(super) fn read_or(bytes: Option<&[u8]>, empty: impl FnOnce() -> Self) -> serde_json::Result<Self> {
        bytes.map_or_else(|| Ok(empty()), serde_json::from_slice)
    }

    /// Adds an entry unless its digest is there. Says whether that changed anything.
    pub(super) fn add(&mut self, entry: Descriptor) -> bool {
        let missing = !self.manifests.iter().any(|there| there.digest == entry.digest);
        if missing {
            self.manifests.push(entry);
        }
        missing
    }

    /// Makes a tag name this entry and nothing else.
    pub(super) fn tag(&mut self, tag: &str, mut entry: Descriptor) {
        let mut tagged = false;
        let mut moved = Vec::new();
        for there in &mut self.manifests {
            if there.tag().is_some_and(|name| name == tag) {
                if there.digest == entry.digest && !tagged {
                    tagged = true;
                } else {
                    there.annotations.remove(REF_NAME);
                    moved.push(there.digest.clone());
                }
            }
        }
        // What lost its tag stays, but once.
        for digest in moved {
            let entries: Vec<usize> =
                (0..self.manifests.len()).filter(|at| self.manifests[*at].digest == digest).collect();
            let bare = entries.iter().find(|at| self.manifests[**at].tag().is_none());
            if let (Some(at), 2..) = (bare, entries.len()) {
                self.manifests.remove(*at);
            }
        }
        if tagged {
            return;
        }
        let untagged = self.manifests.iter_mut().find(|there| there.digest == entry.digest && there.tag().is_none());
        match untagged {
            Some(there) => {
                there.annotations.insert(REF_NAME.to_owned(), tag.to_owned());
            }
            None => {
                entry.annotations.insert(REF_NAME.to_owned(), tag.to_owned());
                self.manifests.push(entry);
            }
        }
    }
}

/// What a manifest says of whom it refers to.
#[derive(Deserialize)]
pub(super) struct Referring {
    subject: Option<Descriptor>,
    #[serde(rename = "artifactType")]
    artifact_type: Option<String>,
    config: Option<Descriptor>,
}

impl Referring {
    /// The subject of a manifest, where it has one.
    pub(super) fn subject(manifest: &[u8]) -> Option<Digest> {
        serde_json::from_slice::<Self>(manifest).ok()?.subject?.digest.parse().ok()
    }

    /// Whether a manifest is of this type and refers to `subject`. The type of the config counts where it states none.
    pub(super) fn is_referrer(manifest: &[u8], subject: &Digest, artifact_type: &str) -> bool {
        let Ok(own) = serde_json::from_slice::<Self>(manifest) else { return false };
        let own_type = own.artifact_type.or(own.config.map(|config| config.media_type));
        own_type.is_some_and(|own| own == artifact_type)
            && own.subject.is_some_and(|own| own.digest == subject.to_string())
    }
}

/// The tag under which the distribution specification keeps the referrers of `subject` where there is no API for them.
pub(super) fn referrers_tag(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}

/// Whether a tag is one that holds referrers, and no kit.
pub(super) fn is_referrers_tag(tag: &str) -> bool {
    tag.strip_prefix("sha256-").is_some_and(|hex| Digest::from_hex(hex).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(digest: &str) -> Descriptor {
        Descriptor { digest: digest.to_owned(), ..Descriptor::default() }
    }

    fn tags(index: &IndexFile) -> Vec<(String, Option<&str>)> {
        index.manifests.iter().map(|entry| (entry.digest.clone(), entry.tag().map(String::as_str))).collect()
    }

    #[test]
    fn a_tag_names_one_manifest_and_what_lost_it_stays() {
        let mut index = IndexFile::empty();
        index.tag("v1", entry("a"));
        index.tag("latest", entry("a"));
        index.tag("latest", entry("b"));
        index.tag("latest", entry("b"));
        assert_eq!(tags(&index), [("a".to_owned(), Some("v1")), ("b".to_owned(), Some("latest"))]);
        index.tag("v1", entry("b"));
        let expected = [("a".to_owned(), None), ("b".to_owned(), Some("latest")), ("b".to_owned(), Some("v1"))];
        assert_eq!(tags(&index), expected);
        index.tag("v2", entry("a"));
        assert_eq!(tags(&index)[0], ("a".to_owned(), Some("v2")));
        assert!(!index.add(entry("a")) && index.add(entry("c")));
    }

    #[test]
    fn a_referrer_is_listed_with_its_annotations_and_never_as_a_tag() {
        let bytes = format!(r#"{{"annotations":{{"k":"v","{REF_NAME}":"latest"}}}}"#).into();
        let manifest = NewManifest { media_type: "m".to_owned(), bytes, refers: None };
        let refers = Refers { subject: Digest::of(b""), artifact_type: "t".to_owned() };
        let entry = Descriptor::of_referrer(&manifest, &refers);
        assert_eq!(
            (entry.tag(), entry.annotations["k"].as_str(), entry.artifact_type.as_deref()),
            (None, "v", Some("t"))
        );
    }

    #[test]
    fn unknown_fields_and_foreign_entries_survive() {
        let text = concat!(
            r#"{"schemaVersion":2,"manifests":[{"mediaType":"m","digest":"sha512:x","size":1,"platform":{"os":"a"}}],"#,
            r#""annotations":{"k":"v"},"x":[1]}"#
        );
        let index: IndexFile = serde_json::from_str(text).expect("an index");
        assert_eq!(serde_json::to_string(&index).expect("JSON"), text);
        let none: IndexFile = serde_json::from_str(r#"{"manifests":null}"#).expect("as Go writes it");
        assert!(none.manifests.is_empty());
    }

    #[test]
    fn a_tag_of_referrers_is_told_from_a_tag_of_a_kit() {
        assert!(is_referrers_tag(&referrers_tag(&Digest::of(b"x"))));
        assert!(!is_referrers_tag("sha256-abc") && !is_referrers_tag("latest"));
    }
}
