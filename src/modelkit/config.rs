//! What a config says: the Kitfile as JSON, or ModelPack's config.
//!
//! In an *enhanced* config (kit 0.5 and later) each entry names the digest of its layer; in a *legacy* one none does.
//! Both are the same [`Config`]: the difference is entry by entry, in [`Stated`].

use super::error::ModelKitError;
use super::json::{Fields, Json, WrongType};
use super::manifest::MAX_CONFIG;
use crate::digest::Digest;

/// The Kitfile.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Config {
    /// The version of the Kitfile's own format.
    pub manifest_version: String,
    /// What the kit is called, and by whom it is.
    pub package: Package,
    /// The model.
    pub model: Option<Model>,
    /// Code, as entries.
    pub code: Vec<Entry>,
    /// Data sets.
    pub datasets: Vec<Entry>,
    /// Documentation.
    pub docs: Vec<Entry>,
    /// Prompts (newer KitOps).
    pub prompts: Vec<Entry>,
    /// MCP servers (newer KitOps).
    pub mcp_servers: Vec<Entry>,
}

/// The Kitfile's `package` section.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// What it is.
    pub description: String,
    /// Its licence.
    pub license: String,
    /// By whom it is.
    pub authors: Vec<String>,
}

/// The Kitfile's `model` section.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Model {
    /// Name, path, licence, description, parameters and layer; the path may be a reference to the parent kit.
    pub entry: Entry,
    /// The framework it is for.
    pub framework: String,
    /// The format of its weights.
    pub format: String,
    /// Its version.
    pub version: String,
    /// Its parts.
    pub parts: Vec<Entry>,
}

/// One entry. What a section has no field for stays empty.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its path as written.
    pub path: String,
    /// What it is.
    pub description: String,
    /// Its licence.
    pub license: String,
    /// What kind of model part it is.
    pub part_type: String,
    /// Where a data set without a layer is kept (newer KitOps).
    pub remote_path: String,
    /// The digest of that (newer KitOps).
    pub remote_hash: String,
    /// Anything, kept as it is.
    pub parameters: Option<Json>,
    /// The layer it names; `None` in a legacy kit.
    pub stated: Option<Stated>,
}

/// What an entry of an enhanced config says of its layer, as written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stated {
    /// The digest of the layer.
    pub digest: String,
    /// The digest of the layer uncompressed; may be empty.
    pub diff_id: String,
}

impl Config {
    /// Reads a Kitfile's JSON.
    pub fn parse(bytes: &[u8]) -> Result<Self, ModelKitError> {
        let json = parse(bytes)?;
        Self::read(&json).map_err(|why| ModelKitError::Invalid { what: "config", why: why.to_string() })
    }

    fn read(json: &Json) -> Result<Self, WrongType> {
        let root = Fields::of_root(json)?;
        let package = match root.object("package")? {
            None => Package::default(),
            Some(fields) => Package {
                name: fields.text("name")?,
                version: fields.text("version")?,
                description: fields.text("description")?,
                license: fields.text("license")?,
                authors: fields.texts("authors")?,
            },
        };
        let model = match root.object("model")? {
            None => None,
            Some(fields) => Some(Model {
                entry: Entry::read(&fields)?,
                framework: fields.text("framework")?,
                format: fields.text("format")?,
                version: fields.text("version")?,
                parts: fields.objects("parts", Entry::read)?,
            }),
        };
        Ok(Self {
            manifest_version: root.text("manifestVersion")?,
            package,
            model,
            code: root.objects("code", Entry::read)?,
            datasets: root.objects("datasets", Entry::read)?,
            docs: root.objects("docs", Entry::read)?,
            prompts: root.objects("prompts", Entry::read)?,
            mcp_servers: root.objects("mcpServers", Entry::read)?,
        })
    }
}

impl Entry {
    fn read(fields: &Fields<'_>) -> Result<Self, WrongType> {
        let is_enhanced = fields.has("digest") || fields.has("diffId");
        Ok(Self {
            name: fields.text("name")?,
            path: fields.text("path")?,
            description: fields.text("description")?,
            license: fields.text("license")?,
            part_type: fields.text("type")?,
            remote_path: fields.text("remotePath")?,
            remote_hash: fields.text("remoteHash")?,
            parameters: fields.any("parameters"),
            stated: if is_enhanced {
                Some(Stated { digest: fields.text("digest")?, diff_id: fields.text("diffId")? })
            } else {
                None
            },
        })
    }
}

/// The digests of the uncompressed layers, in the manifest's order, as a ModelPack config states them. Other than a
/// Kitfile's, they serve as a check only, so none is an answer too.
pub fn model_pack_diff_ids(bytes: &[u8]) -> Result<Vec<Digest>, ModelKitError> {
    let invalid = |why: String| ModelKitError::Invalid { what: "config", why };
    let json = parse(bytes)?;
    let texts = Fields::of_root(&json)
        .and_then(|root| root.object("modelfs"))
        .and_then(|modelfs| modelfs.map_or_else(|| Ok(Vec::new()), |modelfs| modelfs.texts("diffIds")))
        .map_err(|why| invalid(why.to_string()))?;
    texts.iter().map(|text| text.parse::<Digest>().map_err(|why| invalid(format!("modelfs.diffIds: {why}")))).collect()
}

fn parse(bytes: &[u8]) -> Result<Json, ModelKitError> {
    if bytes.len() as u64 > MAX_CONFIG {
        return Err(ModelKitError::TooLarge { what: "config", size: bytes.len() as u64, limit: MAX_CONFIG });
    }
    Json::parse(bytes).map_err(|cause| ModelKitError::Json { what: "config", cause: cause.into() })
}
