//! Manifests and image indexes, from verified bytes.
//!
//! Unknown fields are ignored, what is used is checked: version, digests, sizes, counts. A manifest that parsed is one
//! of a ModelKit or a ModelPack artifact, and its sizes can be added without overflow.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::error::ModelKitError;
use super::index::{ImageIndex, Platform};
use super::media_type::LayerType;
use super::{Compression, Kind};
use crate::digest::{Digest, Verified};

/// The largest manifest or index: what registries accept.
pub const MAX_MANIFEST: u64 = 4 << 20;
/// The largest config or Kitfile. kit's own are a few KiB; the margin is for free `parameters`.
pub const MAX_CONFIG: u64 = 4 << 20;
/// The most layers of a manifest, or manifests of an index. A manifest of 4 MiB could hold some 40,000 short ones; real
/// kits have tens, and each layer costs a request when the kit is mounted.
pub const MAX_LAYERS: usize = 10_000;

/// The config's media type in a ModelKit.
pub const KIT_CONFIG: &str = "application/vnd.kitops.modelkit.config.v1+json";
const MODEL_PACK_CONFIGS: [&str; 2] =
    ["application/vnd.cncf.model.config.v1+json", "application/vnd.cnai.model.config.v1+json"];
const MODEL_PACK_MANIFEST: &str = "application/vnd.cncf.model.manifest.v1+json";

pub(super) const MANIFEST_TYPES: [&str; 2] =
    ["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];
const INDEX_TYPES: [&str; 2] =
    ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];

/// What a tag or digest can lead to.
#[derive(Debug, Clone)]
pub enum Document {
    /// One kit.
    Manifest(Manifest),
    /// A choice of kits.
    Index(ImageIndex),
}

/// A kit's manifest.
#[derive(Debug, Clone)]
pub struct Manifest {
    /// Whose rules it follows.
    pub flavor: Flavor,
    /// The config.
    pub config: Descriptor,
    /// The layers in their order.
    pub layers: Vec<Descriptor>,
    /// Annotations of the manifest.
    pub annotations: BTreeMap<String, String>,
    /// The bytes it was read from.
    pub bytes: Verified,
}

/// Whose format an artifact has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavor {
    /// KitOps: the config is the Kitfile.
    ModelKit,
    /// CNCF ModelPack: each layer says where it belongs.
    ModelPack,
}

/// A descriptor of a blob or manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Media type; may be empty.
    pub media_type: String,
    /// Digest of the content.
    pub digest: Digest,
    /// Size in bytes.
    pub size: u64,
    /// Annotations of this descriptor.
    pub annotations: BTreeMap<String, String>,
    /// In an index: the platform it is for.
    pub platform: Option<Platform>,
    /// In an index: the artifact's type.
    pub artifact_type: Option<String>,
}

/// A descriptor's form on the wire.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawDescriptor {
    #[serde(default)]
    media_type: Option<String>,
    digest: String,
    size: i64,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    platform: Option<RawPlatform>,
    #[serde(default)]
    artifact_type: Option<String>,
}

#[derive(Deserialize)]
struct RawPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
}

/// Reads a document, which errors call `what` and which tells its `version`.
pub(super) fn read<T: DeserializeOwned>(
    what: &'static str,
    bytes: &Verified,
    version: impl FnOnce(&T) -> u64,
) -> Result<T, ModelKitError> {
    let size = bytes.bytes().len() as u64;
    if size > MAX_MANIFEST {
        return Err(ModelKitError::TooLarge { what, size, limit: MAX_MANIFEST });
    }
    let raw: T =
        serde_json::from_slice(bytes.bytes()).map_err(|cause| ModelKitError::Json { what, cause: cause.into() })?;
    match version(&raw) {
        2 => Ok(raw),
        found => Err(invalid(what, format!("its schemaVersion is {found}, expected 2"))),
    }
}

/// A manifest and an index at once: which one it is, its fields tell.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    schema_version: u64,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    artifact_type: Option<String>,
    #[serde(default)]
    config: Option<RawDescriptor>,
    #[serde(default)]
    layers: Option<Vec<RawDescriptor>>,
    #[serde(default)]
    manifests: Option<Vec<RawDescriptor>>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

pub(super) fn invalid(what: &'static str, why: impl Into<String>) -> ModelKitError {
    ModelKitError::Invalid { what, why: why.into() }
}

/// A layer that holds the files of a Kitfile entry, as far as its descriptor tells of it.
#[derive(Debug, Clone, Copy)]
pub struct Content<'a> {
    /// The descriptor.
    pub descriptor: &'a Descriptor,
    /// What sort of entry it belongs to.
    pub kind: Kind,
    /// Whether it is one file's bytes and not a tar.
    pub is_raw: bool,
    /// How it is compressed.
    pub compression: Compression,
}

impl Manifest {
    /// The layers that hold files, in their order.
    pub fn contents(&self) -> impl Iterator<Item = Content<'_>> {
        self.layers.iter().filter_map(|descriptor| match LayerType::of(descriptor) {
            LayerType::Content { kind, raw, compression } => {
                Some(Content { descriptor, kind, is_raw: raw, compression })
            }
            LayerType::Kitfile | LayerType::Config | LayerType::Unknown => None,
        })
    }
}

impl Document {
    /// Reads a manifest or an image index.
    pub fn parse(bytes: &Verified) -> Result<Self, ModelKitError> {
        let raw: RawDocument = read("manifest", bytes, |raw: &RawDocument| raw.schema_version)?;
        let media_type = raw.media_type.as_deref().unwrap_or_default();
        let known = |types: &[&str]| media_type.is_empty() || types.contains(&media_type);
        match (raw.config, raw.manifests) {
            (None, Some(manifests)) if known(&INDEX_TYPES) => {
                let manifests = descriptors("image index", manifests)?;
                let annotations = raw.annotations.unwrap_or_default();
                Ok(Self::Index(ImageIndex { manifests, annotations, bytes: bytes.clone() }))
            }
            (Some(config), None) if known(&MANIFEST_TYPES) => {
                let config = descriptor("manifest", config)?;
                let flavor = flavor(&config.media_type, raw.artifact_type.as_deref())?;
                if config.size > MAX_CONFIG {
                    return Err(ModelKitError::TooLarge { what: "config", size: config.size, limit: MAX_CONFIG });
                }
                let layers = descriptors("manifest", raw.layers.unwrap_or_default())?;
                let annotations = raw.annotations.unwrap_or_default();
                Ok(Self::Manifest(Manifest { flavor, config, layers, annotations, bytes: bytes.clone() }))
            }
            (None, None) => Err(invalid("manifest", "it has neither a config nor manifests")),
            // The document says one thing by its media type and another by its fields: two readers would differ.
            _ => Err(invalid("manifest", format!("its fields do not fit its mediaType {media_type:?}"))),
        }
    }
}

fn flavor(config_type: &str, artifact_type: Option<&str>) -> Result<Flavor, ModelKitError> {
    if config_type == KIT_CONFIG {
        return Ok(Flavor::ModelKit);
    }
    if MODEL_PACK_CONFIGS.contains(&config_type) || artifact_type == Some(MODEL_PACK_MANIFEST) {
        return Ok(Flavor::ModelPack);
    }
    let found = match config_type {
        "application/vnd.oci.image.config.v1+json" | "application/vnd.docker.container.image.v1+json" => {
            "a container image"
        }
        "application/vnd.cncf.helm.config.v1+json" => "a Helm chart",
        _ => "an artifact of another kind",
    };
    let media_type = match artifact_type {
        Some(artifact_type) if config_type.is_empty() || config_type == "application/vnd.oci.empty.v1+json" => {
            artifact_type
        }
        _ => config_type,
    };
    Err(ModelKitError::NotAKit { found, media_type: media_type.to_owned() })
}

pub(super) fn descriptors(what: &'static str, raw: Vec<RawDescriptor>) -> Result<Vec<Descriptor>, ModelKitError> {
    if raw.len() > MAX_LAYERS {
        return Err(invalid(what, format!("it lists {} blobs; kitfs reads at most {MAX_LAYERS}", raw.len())));
    }
    let descriptors: Vec<_> = raw.into_iter().map(|raw| descriptor(what, raw)).collect::<Result<_, _>>()?;
    let total = descriptors.iter().try_fold(0_i64, |sum, descriptor| sum.checked_add_unsigned(descriptor.size));
    if total.is_none() {
        return Err(invalid(what, "its sizes add up to more than 8 EiB"));
    }
    Ok(descriptors)
}

pub(super) fn descriptor(what: &'static str, raw: RawDescriptor) -> Result<Descriptor, ModelKitError> {
    let digest = raw.digest.parse::<Digest>().map_err(|why| invalid(what, why.to_string()))?;
    let size =
        u64::try_from(raw.size).map_err(|_| invalid(what, format!("it says that {digest} has {} bytes", raw.size)))?;
    let platform = raw.platform.filter(|platform| !(platform.os.is_empty() && platform.architecture.is_empty()));
    Ok(Descriptor {
        media_type: raw.media_type.unwrap_or_default(),
        digest,
        size,
        annotations: raw.annotations.unwrap_or_default(),
        platform: platform.map(|platform| Platform {
            os: platform.os,
            architecture: platform.architecture,
            variant: platform.variant.filter(|variant| !variant.is_empty()),
        }),
        artifact_type: raw.artifact_type.filter(|artifact_type| !artifact_type.is_empty()),
    })
}

/// Whether a descriptor in an index leads to a manifest and not to another index.
pub(super) fn is_manifest_type(media_type: &str) -> bool {
    media_type.is_empty() || MANIFEST_TYPES.contains(&media_type)
}
