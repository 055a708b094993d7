//! An OCI image layout on disk.
//!
//! ```text
//! oci-layout              {"imageLayoutVersion":"1.0.0"}
//! index.json              descriptors; the annotation org.opencontainers.image.ref.name holds the tag
//! blobs/sha256/<hex>      manifests and blobs alike
//! ```
//!
//! The index is read anew at each question, so that a tag written meanwhile is seen.

mod write;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::Deserialize;

use crate::digest::{Digest, Unverified};
use crate::source::blobs::{Blobs, blocking, read_small};
use crate::source::index_file::{Descriptor, IndexFile, Referring, is_referrers_tag};
use crate::source::{BlobId, ByteStream, Source, SourceError};

/// The only version of the layout there is.
const LAYOUT_VERSION: &str = "1.0.0";
/// How many nested indexes are read for tags: real layouts nest one or two, a hostile one endlessly.
const MAX_NESTED: usize = 64;

/// One directory in the OCI image layout format.
#[derive(Debug)]
pub struct Layout {
    dir: PathBuf,
    blobs: Blobs,
}

/// What the index and those nested in it say.
#[derive(Default)]
struct Contents {
    tags: BTreeMap<String, BTreeSet<Digest>>,
    /// Everything, in order.
    entries: Vec<Descriptor>,
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
            let index: IndexFile = serde_json::from_slice(&bytes)
                .map_err(|error| self.broken(format!("{what} can't be read: {error}")))?;
            let mut here: BTreeMap<String, BTreeSet<Digest>> = BTreeMap::new();
            for descriptor in index.manifests {
                let digest: Digest =
                    descriptor.digest.parse().map_err(|error| self.broken(format!("{what} can't be read: {error}")))?;
                if let Some(tag) = descriptor.tag() {
                    here.entry(tag.clone()).or_default().insert(digest);
                }
                if descriptor.is_index() && seen.len() < MAX_NESTED && seen.insert(digest) {
                    let nested = self.blobs.manifest(&digest).await?;
                    let nested = nested.verify(&digest).map_err(|error| self.broken(error.to_string()))?;
                    queue.push_back((digest.to_string(), nested.bytes().to_vec()));
                }
                contents.entries.push(descriptor);
            }
            for (tag, digests) in here {
                contents.tags.entry(tag).or_insert(digests);
            }
        }
        Ok(contents)
    }

    /// What a user may have meant who gave a tag where there is none: a manifest that refers to no other.
    async fn first_untagged(&self, contents: &Contents) -> Option<Digest> {
        for entry in contents.entries.iter().filter(|entry| entry.tag().is_none()).take(MAX_NESTED) {
            let Ok(digest) = entry.digest.parse() else { continue };
            let manifest = self.blobs.manifest(&digest).await.ok().and_then(|bytes| bytes.verify(&digest).ok());
            if manifest.is_none_or(|manifest| Referring::subject(manifest.bytes()).is_none()) {
                return Some(digest);
            }
        }
        None
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
            let tags = kit_tags(&contents);
            let untagged = if tags.is_empty() { self.first_untagged(&contents).await } else { None };
            let there = match untagged {
                Some(digest) => format!("it has no tags; write {}@{digest}", self.name()),
                None => tags_there(tags.iter()),
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
        Ok(kit_tags(&self.contents().await?))
    }

    async fn tags_and_digests(&self) -> Result<Vec<(String, Option<Digest>)>, SourceError> {
        let contents = self.contents().await?;
        let tags = kit_tags(&contents).into_iter();
        // What a tag is that names several manifests, its own question says.
        let only = |digests: &BTreeSet<Digest>| digests.first().filter(|_| digests.len() == 1).copied();
        Ok(tags.map(|tag| (contents.tags.get(&tag).and_then(only), tag)).map(|(digest, tag)| (tag, digest)).collect())
    }

    async fn referrers(&self, subject: &Digest, artifact_type: &str) -> Result<Vec<Digest>, SourceError> {
        let contents = self.contents().await?;
        // Where another tool wrote the tag of referrers, its index is nested, and its entries are here too.
        let candidates: Vec<_> = contents.entries.iter().filter(|entry| entry.may_be(artifact_type)).collect();
        self.blobs.referrers(&candidates, subject, artifact_type).await
    }
}

/// The tags that name kits.
fn kit_tags(contents: &Contents) -> Vec<String> {
    contents.tags.keys().filter(|tag| !is_referrers_tag(tag)).cloned().collect()
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
