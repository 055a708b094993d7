//! What a ModelKit says: manifest, config, Kitfile, filter, and the [`Plan`] that follows from them. Pure: no I/O.
//!
//! ```text
//! manifest    Document::parse: verified bytes → manifest or image index
//! index       the choice of one kit
//! referrer    manifests that are about a kit
//! config      the Kitfile as JSON (json: as leniently as Go reads it), ModelPack's config
//! kit         Kit::read: which entry has which layer (media_type: what a layer is)
//! filter      --filter
//! plan        Chain: a kit and its parents; plan(): the layers of a mount
//! kitfile     the Kitfile's bytes, as go-yaml writes them (yaml, scalar, key_order, timestamp)
//! ```
//!
//! A [`Plan`] is what the rest of kitfs works from: layers in order, each with digest, size, format, compression, root
//! and naming rule. Nothing below it looks at a media type again.

/// The annotation that names the commit a kit was made from, as the OCI image specification has it.
pub const REVISION: &str = "org.opencontainers.image.revision";

pub mod config;
pub mod error;
pub mod filter;
#[cfg(test)]
mod hostile_tests;
pub mod index;
pub mod json;
mod key_order;
pub mod kit;
pub mod kitfile;
pub mod manifest;
mod media_type;
pub mod plan;
pub mod referrer;
mod scalar;
#[cfg(test)]
pub mod testing;
#[cfg(test)]
mod tests;
mod timestamp;
mod yaml;
#[cfg(test)]
mod yaml_tests;

use std::collections::BTreeMap;

use crate::digest::{Digest, Verified};
use crate::path::TreePath;

/// What a mount serves: the outcome of reading a kit and its parents through the filters.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The manifest's digest.
    pub digest: Digest,
    /// The `Kitfile` at the root, unless the filters leave it out or the artifact has none.
    pub kitfile: Option<KitfileSource>,
    /// The layers in the order in which `kit unpack` writes them: the farthest parent's first, the kit's own last, each
    /// kit's in the order of its manifest. The first to make a directory gives it its mode.
    pub layers: Vec<Layer>,
    /// Things worth saying to the user: an entry without a layer, a layer of an unknown type.
    pub warnings: Vec<String>,
}

/// Where the bytes of the `Kitfile` come from.
#[derive(Debug, Clone)]
pub enum KitfileSource {
    /// Made from the config, as `kit unpack` writes it.
    Rendered(Verified),
    /// A layer of its own whose bytes are the file.
    Layer {
        /// The layer's digest.
        digest: Digest,
        /// Its size in bytes.
        size: u64,
    },
}

/// One layer of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The digest of the blob.
    pub digest: Digest,
    /// The size of the blob in bytes.
    pub size: u64,
    /// The digest of the blob uncompressed, where the kit states it.
    pub diff_id: Option<Digest>,
    /// The media type as the manifest states it.
    pub media_type: String,
    /// The annotations of its descriptor.
    pub annotations: BTreeMap<String, String>,
    /// What sort of Kitfile entry it belongs to.
    pub kind: Kind,
    /// The entry's name, where it has one.
    pub name: Option<String>,
    /// The entry's path as written.
    pub path: String,
    /// A tar, or one file's bytes.
    pub format: Format,
    /// How the blob is compressed.
    pub compression: Compression,
    /// The entry's path, cleaned: everything the layer holds lies at or below it, but for its parents.
    pub root: TreePath,
    /// Put before each name in the tar: the root's parent in legacy kits, else the kit's root.
    pub prefix: TreePath,
    /// Which kit of the chain it comes from: 0 is the kit itself, 1 its parent. It names the repository to ask.
    pub kit: usize,
}

impl Layer {
    /// The Kitfile entry for people: `docs "README.md"`.
    pub fn label(&self) -> String {
        self.kind.label(&self.path)
    }
}

impl Kind {
    /// Its name in tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::ModelPart => "modelpart",
            Self::Code => "code",
            Self::Dataset => "dataset",
            Self::Docs => "docs",
            Self::Prompt => "prompt",
            Self::McpServer => "mcpserver",
        }
    }

    /// An entry of this kind for people: `docs "README.md"`.
    pub fn label(self, path: &str) -> String {
        let kind = match self {
            Self::Model => "model",
            Self::ModelPart => "model part",
            Self::Code => "code",
            Self::Dataset => "dataset",
            Self::Docs => "docs",
            Self::Prompt => "prompt",
            Self::McpServer => "MCP server",
        };
        format!("{kind} {}", quoted(path))
    }
}

impl serde::Serialize for Kind {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// A text of the kit's for an error or warning, in quotes and of bearable length.
fn quoted(text: &str) -> String {
    /// Longer ones are cut: a config may hold texts of megabytes.
    const MAX_QUOTED: usize = 200;
    match text.char_indices().nth(MAX_QUOTED) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// What sort of Kitfile entry a layer belongs to, ordered as in the Kitfile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// The model itself.
    Model,
    /// A part of the model.
    ModelPart,
    /// Code.
    Code,
    /// A data set.
    Dataset,
    /// Documentation.
    Docs,
    /// A prompt (newer KitOps).
    Prompt,
    /// An MCP server (newer KitOps).
    McpServer,
}

/// What a layer's uncompressed bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    /// A tar archive.
    Tar,
    /// The bytes of the file at the layer's root.
    Raw {
        /// Permission bits: as annotated, else 0644.
        mode: u32,
        /// Seconds since the epoch: as annotated, else 0.
        mtime: i64,
        /// The file's size where it is annotated and the layer is compressed. Not proved by any digest.
        stated_size: Option<u64>,
    },
}

/// How a blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip, also of several members.
    Gzip,
    /// Zstandard, also of several frames.
    Zstd,
}
