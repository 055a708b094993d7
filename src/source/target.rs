//! Repositories that can be written.

use async_trait::async_trait;
use bytes::Bytes;

use crate::digest::Digest;
use crate::reference::Location;
use crate::source::registry::{MAX_TAG, is_tag};
use crate::source::{BlobId, ByteStream, Source, SourceError};

/// A manifest to be written.
#[derive(Debug, Clone)]
pub struct NewManifest {
    /// Its media type, as its `mediaType` states it.
    pub media_type: String,
    /// Its bytes.
    pub bytes: Bytes,
    /// The manifest that it refers to, as its `subject` states it, and its artifact type.
    pub refers: Option<Refers>,
}

/// What makes a manifest a referrer.
#[derive(Debug, Clone)]
pub struct Refers {
    /// The digest of the manifest that it refers to.
    pub subject: Digest,
    /// Its artifact type.
    pub artifact_type: String,
}

/// A repository that can be written: a [`Source`] with the ways to add to it.
#[async_trait]
pub trait Target: Source {
    /// Whether a blob is there already, so that it need not be written.
    async fn has_blob(&self, blob: &BlobId) -> Result<bool, SourceError>;

    /// Takes a blob over from another repository of the same registry without moving its bytes. `false` where that
    /// can't be done: then the blob must be written.
    async fn mount_blob(&self, blob: &BlobId, from: &Location) -> Result<bool, SourceError>;

    /// Writes a blob. It is there only once its bytes were found to have its digest.
    async fn put_blob(&self, blob: &BlobId, bytes: ByteStream) -> Result<(), SourceError>;

    /// Writes a manifest under its digest, and under a tag where one is given, which then points at nothing else. A
    /// referrer is found by [`Source::referrers`] from then on.
    async fn put_manifest(&self, manifest: &NewManifest, tag: Option<&str>) -> Result<Digest, SourceError>;
}

/// Refuses a tag that no registry would take, before anything is written.
pub(super) fn check_tag(tag: &str, source_name: &str) -> Result<(), SourceError> {
    if is_tag(tag) {
        return Ok(());
    }
    let what = format!("{tag:?} is not a tag: expected at most {MAX_TAG} of A-Z a-z 0-9 _ . -, not first . or -");
    Err(SourceError::Protocol { source_name: source_name.to_owned(), what })
}
