//! An OCI image layout on disk.
//!
//! ```text
//! oci-layout              {"imageLayoutVersion":"1.0.0"}
//! index.json              descriptors; the annotation org.opencontainers.image.ref.name holds the tag
//! blobs/sha256/<hex>      manifests and blobs alike
//! ```
//!
//! The index is read anew at each question, so that a tag written meanwhile is seen.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::Deserialize;

use crate::digest::{Digest, Unverified};
use crate::source::blobs::{Blobs, blocking, read_small};
use crate::source::{BlobId, ByteStream, Source, SourceError};

/// The only version of the layout there is.
const LAYOUT_VERSION: &str = "1.0.0";
/// The annotation that holds a tag.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// How many nested indexes are read for tags: real layouts nest one or two, a hostile one endlessly.
const MAX_NESTED: usize = 64;

/// One directory in the OCI image layout format.
#[derive(Debug)]
pub struct Layout {
    dir: PathBuf,
    blobs: Blobs,
}

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Descriptor {
    #[serde(default, rename = "mediaType")]
    media_type: String,
    digest: Digest,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

impl Descriptor {
    fn is_index(&self) -> bool {
        matches!(
            self.media_type.as_str(),
            "application/vnd.oci.image.index.v1+json" | "application/vnd.docker.distribution.manifest.list.v2+json"
        )
    }
}

/// What the index and those nested in it say.
#[derive(Default)]
struct Contents {
    tags: BTreeMap<String, BTreeSet<Digest>>,
    untagged: Vec<Digest>,
}

impl Layout {
    /// Opens a layout: its `oci-layout` file must be there and of a known version.
    pub fn open(dir: &Path) -> Result<Self, SourceError> {
        #[derive(Deserialize)]
        struct Marker {
            #[serde(rename = "imageLayoutVersion")]
            version: String,
        }
        let name = format!("oci:{}", dir.display());
        let refuse = |what: String| Err(SourceError::Protocol { source_name: name.clone(), what });
        let Some(bytes) = read_small(&dir.join("oci-layout"), &name)? else {
            return refuse("not an OCI image layout: there is no file `oci-layout` in it".to_owned());
        };
        match serde_json::from_slice::<Marker>(&bytes) {
            Ok(marker) if marker.version == LAYOUT_VERSION => {}
            Ok(marker) => return refuse(format!("layout version {:?}, expected {LAYOUT_VERSION:?}", marker.version)),
            Err(error) => return refuse(format!("its file `oci-layout` can't be read: {error}")),
        }
        Ok(Self { dir: dir.to_owned(), blobs: Blobs::below(dir, name) })
    }

    /// Reads the index and those nested in it. The nearest to the top wins a tag; within one index it must be unique.
    async fn contents(&self) -> Result<Contents, SourceError> {
        let (path, name) = (self.dir.join("index.json"), self.name());
        let top = blocking(move || {
            read_small(&path, &name)?
                .ok_or_else(|| SourceError::NotFound { what: "index.json".to_owned(), source_name: name })
        })
        .await?;
        let mut contents = Contents::default();
        let mut seen = BTreeSet::new();
        let mut queue = VecDeque::from([("index.json".to_owned(), top)]);
        while let Some((what, bytes)) = queue.pop_front() {
            let index: Index = serde_json::from_slice(&bytes)
                .map_err(|error| self.broken(format!("{what} can't be read: {error}")))?;
            let mut here = Contents::default();
            for descriptor in index.manifests {
                match descriptor.annotations.get(REF_NAME) {
                    Some(tag) => {
                        here.tags.entry(tag.clone()).or_default().insert(descriptor.digest);
                    }
                    None => here.untagged.push(descriptor.digest),
                }
                if descriptor.is_index() && seen.len() < MAX_NESTED && seen.insert(descriptor.digest) {
                    let nested = self.blobs.manifest(&descriptor.digest).await?;
                    let nested = nested.verify(&descriptor.digest).map_err(|error| self.broken(error.to_string()))?;
                    queue.push_back((descriptor.digest.to_string(), nested.bytes().to_vec()));
                }
            }
            for (tag, digests) in here.tags {
                contents.tags.entry(tag).or_insert(digests);
            }
            contents.untagged.extend(here.untagged);
        }
        Ok(contents)
    }

    fn broken(&self, what: String) -> SourceError {
        SourceError::Protocol { source_name: self.name(), what }
    }
}

#[async_trait]
impl Source for Layout {
    fn name(&self) -> String {
        format!("oci:{}", self.dir.display())
    }

    async fn resolve(&self, tag: &str) -> Result<Digest, SourceError> {
        let contents = self.contents().await?;
        let Some(digests) = contents.tags.get(tag) else {
            let there = match contents.untagged.first() {
                Some(digest) if contents.tags.is_empty() => {
                    format!("it has no tags; write {}@{digest}", self.name())
                }
                _ => tags_there(contents.tags.keys()),
            };
            return Err(SourceError::NotFound {
                what: format!("tag {tag:?}"),
                source_name: format!("{} ({there})", self.name()),
            });
        };
        match (digests.first(), digests.len()) {
            (Some(digest), 1) => Ok(*digest),
            _ => {
                let list = digests.iter().map(Digest::to_string).collect::<Vec<_>>().join(", ");
                Err(self.broken(format!("tag {tag:?} names several manifests; give one by digest: {list}")))
            }
        }
    }

    async fn manifest(&self, digest: &Digest) -> Result<Unverified, SourceError> {
        self.blobs.manifest(digest).await
    }

    async fn blob(&self, blob: &BlobId, range: Range<u64>) -> Result<ByteStream, SourceError> {
        self.blobs.stream(blob, range).await
    }

    async fn tags(&self) -> Result<Vec<String>, SourceError> {
        Ok(self.contents().await?.tags.into_keys().collect())
    }
}

/// The tags a user could have meant, for an error: the first ones, where there are many.
pub(super) fn tags_there<'a>(tags: impl ExactSizeIterator<Item = &'a String>) -> String {
    /// More would bury the message.
    const SHOWN: usize = 20;
    if tags.len() == 0 {
        return "it has no tags".to_owned();
    }
    let more = tags.len().saturating_sub(SHOWN);
    let shown = tags.take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    if more == 0 { format!("it has {shown}") } else { format!("it has {shown} and {more} more") }
}
