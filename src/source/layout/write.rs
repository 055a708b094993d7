//! Writing an OCI image layout.
//!
//! `index.json` names every manifest: with its tag, or without one. A referrer stands there untagged with its artifact
//! type, so that [`Source::referrers`](crate::source::Source::referrers) finds it and no tag does.

use std::path::Path;

use async_trait::async_trait;

use super::Layout;
use crate::digest::Digest;
use crate::reference::Location;
use crate::source::blobs::{blocking, disk, read_small};
use crate::source::checked::checked;
use crate::source::files::{Store, is_part, to_json, unreadable};
use crate::source::index_file::{Descriptor, IndexFile};
use crate::source::target::check_tag;
use crate::source::{BlobId, ByteStream, NewManifest, SourceError, Target};

impl Layout {
    /// Opens a layout to write to it. A directory that is not there or is empty becomes one.
    pub fn create(dir: &Path) -> Result<Self, SourceError> {
        let name = format!("oci:{}", dir.display());
        let entries = match std::fs::read_dir(dir) {
            Ok(entries) => entries.collect::<Result<Vec<_>, _>>().map_err(|cause| disk(dir, cause))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(cause) => return Err(disk(dir, cause)),
        };
        let is_ours = |name: &std::ffi::OsStr| name == "oci-layout" || name.to_str().is_some_and(is_part);
        let foreign = entries.iter().find(|entry| !is_ours(&entry.file_name()));
        if let Some(foreign) = foreign
            && !dir.join("oci-layout").exists()
        {
            let what = format!(
                "neither an OCI image layout nor empty: {:?} is in it, and no file `oci-layout`; name another directory",
                foreign.file_name()
            );
            return Err(SourceError::Protocol { source_name: name, what });
        }
        Store::new(dir, name).create()?;
        Self::open(dir)
    }

    fn store(&self) -> Store {
        Store::new(&self.dir, format!("oci:{}", self.dir.display()))
    }
}

#[async_trait]
impl Target for Layout {
    async fn has_blob(&self, blob: &BlobId) -> Result<bool, SourceError> {
        self.store().has(blob).await
    }

    async fn mount_blob(&self, _: &BlobId, _: &Location) -> Result<bool, SourceError> {
        Ok(false)
    }

    async fn put_blob(&self, blob: &BlobId, bytes: ByteStream) -> Result<(), SourceError> {
        let store = self.store();
        let bytes = checked(bytes, blob, &format!("oci:{}", self.dir.display()));
        store.write_blob(blob, bytes).await
    }

    async fn put_manifest(&self, manifest: &NewManifest, tag: Option<&str>) -> Result<Digest, SourceError> {
        let name = format!("oci:{}", self.dir.display());
        if let Some(tag) = tag {
            check_tag(tag, &name)?;
        }
        let (store, path, manifest, tag) =
            (self.store(), self.dir.join("index.json"), manifest.clone(), tag.map(str::to_owned));
        blocking(move || {
            let digest = Digest::of(&manifest.bytes);
            store.write_manifest(&digest, &manifest.bytes)?;
            let entry = match &manifest.refers {
                Some(refers) => Descriptor::of_referrer(&manifest, refers),
                None => Descriptor::of(&manifest),
            };
            let _lock = store.lock()?;
            let old = read_small(&path, &name)?;
            let mut index = IndexFile::read_or(old.as_deref(), IndexFile::empty)
                .map_err(|error| unreadable(&path, &name, &error))?;
            match tag {
                Some(tag) => index.tag(&tag, entry),
                None => {
                    index.add(entry);
                }
            }
            let new = to_json(&index)?;
            if old.is_none_or(|old| old != new) {
                store.replace(&path, &new)?;
            }
            Ok(digest)
        })
        .await
    }
}
