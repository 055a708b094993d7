//! Writing kit's storage, as kit itself does.
//!
//! ```text
//! storage/<urlsafe base64 of registry/repository>-index.json              an OCI index: the repository's manifests
//! storage/<urlsafe base64 of registry/repository>-tags.json               {"latest": {descriptor}}
//! storage/<urlsafe base64 of registry/repository>-kitfs-referrers.json    an OCI index: our own, kit never reads it
//! storage/index.json                                                      the manifests of all repositories
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use async_trait::async_trait;

use super::{KitStorage, in_storage};
use crate::digest::Digest;
use crate::reference::Location;
use crate::source::blobs::{blocking, read_small};
use crate::source::checked::checked;
use crate::source::files::{Store, to_json, unreadable};
use crate::source::index_file::{Descriptor, IndexFile};
use crate::source::target::check_tag;
use crate::source::{BlobId, ByteStream, NewManifest, SourceError, Target};

/// The files that one repository has, and the one that all share.
struct Lists {
    store: Store,
    name: String,
    all: PathBuf,
    manifests: PathBuf,
    tags: PathBuf,
    referrers: PathBuf,
}

impl KitStorage {
    /// A bare name, to write to it. kit's storage is made where there is none.
    pub fn create(kit_home: &Path, repository: &str) -> Result<Self, SourceError> {
        let storage = Self::local(kit_home, repository);
        storage.store().create()?;
        Ok(storage)
    }

    fn store(&self) -> Store {
        Store::new(&self.storage, in_storage(&self.storage))
    }

    fn lists(&self) -> Lists {
        Lists {
            store: self.store(),
            name: in_storage(&self.storage),
            all: self.storage.join("index.json"),
            manifests: self.file("index"),
            tags: self.file("tags"),
            referrers: self.file(super::REFERRERS),
        }
    }
}

impl Lists {
    fn put(&self, manifest: &NewManifest, tag: Option<&str>) -> Result<Digest, SourceError> {
        let digest = Digest::of(&manifest.bytes);
        self.store.write_manifest(&digest, &manifest.bytes)?;
        let _lock = self.store.lock()?;
        match &manifest.refers {
            Some(refers) => {
                self.add(&self.referrers, IndexFile::empty, Descriptor::of_referrer(manifest, refers))?;
            }
            None => {
                self.add(&self.all, IndexFile::empty, Descriptor::of(manifest))?;
                self.add(&self.manifests, IndexFile::bare, Descriptor::of(manifest))?;
            }
        }
        if let Some(tag) = tag {
            let old = read_small(&self.tags, &self.name)?;
            let mut tags: BTreeMap<String, Descriptor> = old
                .as_deref()
                .map_or_else(|| Ok(BTreeMap::new()), serde_json::from_slice)
                .map_err(|error| unreadable(&self.tags, &self.name, &error))?;
            tags.insert(tag.to_owned(), Descriptor::of(manifest));
            self.store.replace(&self.tags, &to_json(&tags)?)?;
        }
        Ok(digest)
    }

    fn add(&self, path: &Path, empty: fn() -> IndexFile, entry: Descriptor) -> Result<(), SourceError> {
        let old = read_small(path, &self.name)?;
        let mut index =
            IndexFile::read_or(old.as_deref(), empty).map_err(|error| unreadable(path, &self.name, &error))?;
        if index.add(entry) {
            self.store.replace(path, &to_json(&index)?)?;
        }
        Ok(())
    }
}

#[async_trait]
impl Target for KitStorage {
    async fn has_blob(&self, blob: &BlobId) -> Result<bool, SourceError> {
        self.store().has(blob).await
    }

    async fn mount_blob(&self, _: &BlobId, _: &Location) -> Result<bool, SourceError> {
        // All repositories here share their blobs already.
        Ok(false)
    }

    async fn put_blob(&self, blob: &BlobId, bytes: ByteStream) -> Result<(), SourceError> {
        let bytes = checked(bytes, blob, &in_storage(&self.storage));
        self.store().write_blob(blob, bytes).await
    }

    async fn put_manifest(&self, manifest: &NewManifest, tag: Option<&str>) -> Result<Digest, SourceError> {
        let lists = self.lists();
        let (manifest, tag) = (manifest.clone(), tag.map(str::to_owned));
        if let Some(tag) = &tag {
            check_tag(tag, &lists.name)?;
        }
        blocking(move || lists.put(&manifest, tag.as_deref())).await
    }
}
