//! kit's own storage, below its home.
//!
//! ```text
//! storage/<urlsafe base64 of registry/repository>-tags.json               {"latest": {descriptor}}
//! storage/<urlsafe base64 of registry/repository>-kitfs-referrers.json    our own: what refers to its manifests
//! storage/blobs/sha256/<hex>                                              manifests and blobs of all repositories
//! ```
//!
//! It holds what `kit pack` made, under the registry `localhost`, and what `kit pull` fetched. Blobs are shared by all
//! repositories, so a manifest or blob is found by digest whatever repository it came through.

mod write;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use base64::Engine as _;
use serde::Deserialize;

use crate::digest::{Digest, Unverified};
use crate::source::blobs::{Blobs, blocking, read_small};
use crate::source::files::unreadable;
use crate::source::index_file::IndexFile;
use crate::source::layout::tags_there;
use crate::source::{BlobId, ByteStream, Source, SourceError};

/// The registry that kit files bare names under.
const LOCAL_REGISTRY: &str = "localhost";
/// The list of referrers. kit knows none, and would show them as kits.
const REFERRERS: &str = "kitfs-referrers";

/// One repository in kit's storage.
#[derive(Debug)]
pub struct KitStorage {
    /// The repository as people write it.
    name: String,
    storage: PathBuf,
    /// The registry and repository as kit files them.
    filed_as: String,
    blobs: Blobs,
}

#[derive(Deserialize)]
struct Tagged {
    digest: Digest,
}

impl KitStorage {
    /// A bare name, as `kit pack -t name:tag` stores it.
    pub fn local(kit_home: &Path, repository: &str) -> Self {
        Self::new(kit_home, repository, format!("{LOCAL_REGISTRY}/{repository}"))
    }

    /// What kit's storage holds of a registry's repository, `registry.example.com/team/llama`. Its manifests and blobs
    /// need not be downloaded. Its tags are as old as the last `kit pull`: only the registry knows them now, so they
    /// count only where it can't be asked.
    pub fn for_repository(kit_home: &Path, repository: &str) -> Self {
        Self::new(kit_home, repository, repository.to_owned())
    }

    fn new(kit_home: &Path, name: &str, filed_as: String) -> Self {
        let storage = kit_home.join("storage");
        let blobs = Blobs::below(&storage, in_storage(&storage));
        Self { name: name.to_owned(), storage, filed_as, blobs }
    }

    /// A file of this repository.
    fn file(&self, what: &str) -> PathBuf {
        let repository = base64::engine::general_purpose::URL_SAFE.encode(&self.filed_as);
        self.storage.join(format!("{repository}-{what}.json"))
    }

    async fn read_tags(&self) -> Result<BTreeMap<String, Digest>, SourceError> {
        let (path, name) = (self.file("tags"), self.name.clone());
        let missing = SourceError::NotFound {
            what: format!("repository {:?}", self.name),
            source_name: format!("{}{}", in_storage(&self.storage), self.hint()),
        };
        blocking(move || {
            let bytes = read_small(&path, &name)?.ok_or(missing)?;
            let tags: BTreeMap<String, Tagged> = serde_json::from_slice(&bytes).map_err(|error| {
                SourceError::Protocol { source_name: name, what: format!("{} can't be read: {error}", path.display()) }
            })?;
            Ok(tags.into_iter().map(|(tag, tagged)| (tag, tagged.digest)).collect())
        })
        .await
    }

    /// A bare name that kit does not know was often meant for Docker Hub.
    fn hint(&self) -> String {
        if self.filed_as.strip_prefix(LOCAL_REGISTRY).is_some_and(|rest| rest.starts_with('/')) {
            format!("; for Docker Hub write docker.io/{}", self.name)
        } else {
            String::new()
        }
    }
}

fn in_storage(storage: &Path) -> String {
    format!("kit's storage ({})", storage.display())
}

#[async_trait]
impl Source for KitStorage {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn resolve(&self, tag: &str) -> Result<Digest, SourceError> {
        let tags = self.read_tags().await?;
        tags.get(tag).copied().ok_or_else(|| SourceError::NotFound {
            what: format!("tag {tag:?} of {:?}", self.name),
            source_name: format!("{} ({})", in_storage(&self.storage), tags_there(tags.keys())),
        })
    }

    async fn manifest(&self, digest: &Digest) -> Result<Unverified, SourceError> {
        self.blobs.manifest(digest).await
    }

    async fn blob(&self, blob: &BlobId, range: Range<u64>) -> Result<ByteStream, SourceError> {
        self.blobs.stream(blob, range).await
    }

    async fn tags(&self) -> Result<Vec<String>, SourceError> {
        Ok(self.read_tags().await?.into_keys().collect())
    }

    async fn tags_and_digests(&self) -> Result<Vec<(String, Option<Digest>)>, SourceError> {
        Ok(self.read_tags().await?.into_iter().map(|(tag, digest)| (tag, Some(digest))).collect())
    }

    async fn referrers(&self, subject: &Digest, artifact_type: &str) -> Result<Vec<Digest>, SourceError> {
        let (path, name) = (self.file(REFERRERS), in_storage(&self.storage));
        let index = blocking(move || {
            let bytes = read_small(&path, &name)?;
            IndexFile::read_or(bytes.as_deref(), IndexFile::empty).map_err(|error| unreadable(&path, &name, &error))
        })
        .await?;
        let candidates: Vec<_> = index.manifests.iter().filter(|entry| entry.may_be(artifact_type)).collect();
        self.blobs.referrers(&candidates, subject, artifact_type).await
    }
}
