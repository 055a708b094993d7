//! Manifests that refer to a kit: what they are, whom they are about, what they hold.

use serde::Deserialize;

use super::error::ModelKitError;
use super::manifest::{Descriptor, MANIFEST_TYPES, RawDescriptor, descriptor, descriptors, invalid, read};
use crate::digest::{Digest, Verified};

/// A manifest with a subject.
#[derive(Debug, Clone)]
pub struct Referrer {
    /// The digest of the manifest that it is about.
    pub subject: Digest,
    /// What it is.
    pub artifact_type: String,
    /// What it holds, in order.
    pub layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawReferrer {
    schema_version: u64,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    artifact_type: Option<String>,
    #[serde(default)]
    subject: Option<RawDescriptor>,
    #[serde(default)]
    layers: Option<Vec<RawDescriptor>>,
}

impl Referrer {
    /// Reads a manifest that must be a referrer.
    pub fn parse(bytes: &Verified) -> Result<Self, ModelKitError> {
        const WHAT: &str = "referrer";
        let raw: RawReferrer = read(WHAT, bytes, |raw: &RawReferrer| raw.schema_version)?;
        let media_type = raw.media_type.unwrap_or_default();
        if !media_type.is_empty() && !MANIFEST_TYPES.contains(&media_type.as_str()) {
            return Err(invalid(WHAT, format!("its mediaType is {media_type:?}, expected an OCI manifest's")));
        }
        let subject = raw.subject.ok_or_else(|| invalid(WHAT, "it has no subject"))?;
        Ok(Self {
            subject: descriptor(WHAT, subject)?.digest,
            artifact_type: raw.artifact_type.unwrap_or_default(),
            layers: descriptors(WHAT, raw.layers.unwrap_or_default())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::digest::Unverified;

    fn sound() -> Value {
        let descriptor = |bytes: &[u8]| json!({"mediaType": "a/b", "digest": Digest::of(bytes), "size": bytes.len()});
        json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "artifactType": "application/x",
            "config": descriptor(b"{}"),
            "layers": [descriptor(b"layer")],
            "subject": descriptor(b"kit"),
        })
    }

    fn parse(value: &Value) -> Result<Referrer, ModelKitError> {
        let bytes = value.to_string().into_bytes();
        let digest = Digest::of(&bytes);
        Referrer::parse(&Unverified::new(bytes).verify(&digest).expect("its own digest"))
    }

    #[test]
    fn a_referrer_says_what_it_is_and_whom_it_is_about() {
        let referrer = parse(&sound()).expect("sound");
        assert_eq!(referrer.subject, Digest::of(b"kit"));
        assert_eq!(referrer.artifact_type, "application/x");
        assert_eq!(referrer.layers.len(), 1);
    }

    #[test]
    fn what_is_no_referrer_is_refused_with_the_reason() {
        for (key, value, why) in [
            ("schemaVersion", json!(1), "its schemaVersion is 1, expected 2"),
            ("mediaType", json!("application/vnd.oci.image.index.v1+json"), "expected an OCI manifest's"),
            ("subject", json!(null), "it has no subject"),
            ("subject", json!({"digest": "sha256:0", "size": 1}), "is not a digest"),
            ("layers", json!([{"digest": Digest::of(b""), "size": -1}]), "has -1 bytes"),
            ("layers", json!("none"), "the referrer is not valid"),
        ] {
            let mut referrer = sound();
            referrer[key] = value;
            let error = parse(&referrer).expect_err(why).to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
