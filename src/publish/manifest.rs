//! The two manifests that are made: the kit's with its indexes named, and the referrer that keeps the indexes. Pure.
//!
//! Both are canonical, so that indexing a kit twice makes nothing new: in the first every byte that need not change stays,
//! the second is written field by field (`docs/index-format.md`, section 5).

use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;
use serde::Serialize;

use super::PublishError;
use super::fields::Fields;
use crate::archive::index::annotations::{self, MEDIA_TYPE, Pin};
use crate::digest::{Digest, Verified};
use crate::modelkit::manifest::{MAX_MANIFEST, Manifest};
use crate::source::{NewManifest, Refers};

/// What a manifest is that does not say so itself.
const IMAGE_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// The same for an index of manifests.
const IMAGE_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// The media type of a config that says nothing.
const EMPTY_CONFIG: &str = "application/vnd.oci.empty.v1+json";
/// That config.
pub(super) const EMPTY: &[u8] = b"{}";

/// A manifest and its digest.
#[derive(Debug, Clone)]
pub struct Document {
    /// The digest of its bytes.
    pub digest: Digest,
    /// What is to be written.
    pub manifest: NewManifest,
}

impl Document {
    fn new(media_type: String, bytes: Vec<u8>) -> Result<Self, PublishError> {
        let size = bytes.len() as u64;
        if size > MAX_MANIFEST {
            return Err(PublishError::TooLarge { size });
        }
        let digest = Digest::of(&bytes);
        Ok(Self { digest, manifest: NewManifest { media_type, bytes: Bytes::from(bytes), refers: None } })
    }

    /// A manifest or an image index as it is.
    pub fn unchanged(digest: Digest, bytes: &Verified) -> Result<Self, PublishError> {
        let bytes = bytes.bytes().clone();
        Ok(Self { digest, manifest: NewManifest { media_type: media_type(&parse(&bytes)?), bytes, refers: None } })
    }

    /// The same for what refers to `subject`.
    pub fn referring(self, subject: Digest) -> Self {
        let refers = Refers { subject, artifact_type: MEDIA_TYPE.to_owned() };
        Self { manifest: NewManifest { refers: Some(refers), ..self.manifest }, ..self }
    }

    /// A kit's manifest with these indexes named, one place in `pins` for each of its layers. `kit` is its digest.
    pub fn with_indexes(
        kit: Digest,
        manifest: &Manifest,
        pins: &[Option<Pin>],
        added: &[(String, String)],
    ) -> Result<Self, PublishError> {
        let mut fields = parse(manifest.bytes.bytes())?;
        if let Some(layers) = fields.get("layers") {
            let layers = serde_json::from_str::<Vec<Fields>>(layers)?.into_iter().zip(pins);
            let pinned = layers.map(|(layer, pin)| with_pin(layer, pin.as_ref())).collect::<Result<Vec<_>, _>>()?;
            fields.set("layers", &pinned)?;
        }
        let mut annotations = fields.object("annotations")?;
        let is_from = |text: &String| text.parse::<Digest>().is_ok();
        if !manifest.annotations.get(annotations::SOURCE).is_some_and(is_from) {
            annotations.set(annotations::SOURCE, &kit)?;
        }
        for (key, value) in added {
            annotations.set(key, value)?;
        }
        fields.set("annotations", &annotations)?;
        Self::new(media_type(&fields), serde_json::to_vec(&fields)?)
    }

    /// The referrer that keeps the indexes of `subject`, one for each layer and in that order; `None` where there are none.
    pub fn referrer(subject: &Self, pins: &[(Digest, Pin)]) -> Result<Option<Self>, PublishError> {
        let mut seen = HashSet::new();
        let layers: Vec<_> =
            pins.iter().filter(|(_, pin)| seen.insert(pin.digest)).map(|(layer, pin)| index_of(layer, pin)).collect();
        if layers.is_empty() {
            return Ok(None);
        }
        let referrer = Referrer {
            schema_version: 2,
            media_type: IMAGE_MANIFEST,
            artifact_type: MEDIA_TYPE,
            config: Descriptor {
                media_type: EMPTY_CONFIG,
                digest: Digest::of(EMPTY),
                size: EMPTY.len() as u64,
                annotations: None,
            },
            layers,
            subject: Descriptor {
                media_type: &subject.manifest.media_type,
                digest: subject.digest,
                size: subject.manifest.bytes.len() as u64,
                annotations: None,
            },
        };
        let document = Self::new(IMAGE_MANIFEST.to_owned(), serde_json::to_vec(&referrer)?)?;
        Ok(Some(document.referring(subject.digest)))
    }
}

fn parse(bytes: &[u8]) -> Result<Fields, serde_json::Error> {
    serde_json::from_slice(bytes)
}

fn media_type(manifest: &Fields) -> String {
    let own = manifest.get("mediaType").and_then(|json| serde_json::from_str::<String>(json).ok());
    let is_index = manifest.get("manifests").is_some() && manifest.get("config").is_none();
    let implied = if is_index { IMAGE_INDEX } else { IMAGE_MANIFEST };
    own.filter(|own| !own.is_empty()).unwrap_or_else(|| implied.to_owned())
}

/// A layer's descriptor that names this index, or none.
fn with_pin(mut layer: Fields, pin: Option<&Pin>) -> Result<Fields, serde_json::Error> {
    let mut annotations = layer.object("annotations")?;
    match pin {
        Some(pin) => {
            for (key, value) in pin.annotations() {
                annotations.set(key, &value)?;
            }
        }
        None => {
            let ours = [annotations::DIGEST, annotations::SIZE, annotations::HEAD];
            if ours.iter().filter(|key| annotations.remove(key)).count() == 0 {
                return Ok(layer);
            }
        }
    }
    if annotations.is_empty() {
        layer.remove("annotations");
    } else {
        layer.set("annotations", &annotations)?;
    }
    Ok(layer)
}

fn index_of<'a>(layer: &Digest, pin: &Pin) -> Descriptor<'a> {
    let annotations = BTreeMap::from(pin.referrer_annotations(layer));
    Descriptor { media_type: MEDIA_TYPE, digest: pin.digest, size: pin.size, annotations: Some(annotations) }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Referrer<'a> {
    schema_version: u8,
    media_type: &'a str,
    artifact_type: &'a str,
    config: Descriptor<'a>,
    layers: Vec<Descriptor<'a>>,
    subject: Descriptor<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor<'a> {
    media_type: &'a str,
    digest: Digest,
    size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    annotations: Option<BTreeMap<&'static str, String>>,
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
