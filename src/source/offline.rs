//! A repository in a registry that must not be asked. No socket is opened, no name looked up, no credential helper run.

use std::ops::Range;

use async_trait::async_trait;

use crate::digest::{Digest, Unverified};
use crate::source::{BlobId, ByteStream, Source, SourceError};

/// What stands for a registry's repository with `--offline`: it has nothing.
#[derive(Debug)]
pub struct Offline {
    name: String,
}

impl Offline {
    /// The repository `host/repository`.
    pub fn new(host: &str, repository: &str) -> Self {
        Self { name: format!("{host}/{repository}") }
    }

    fn refuse<T>(&self, what: String) -> Result<T, SourceError> {
        Err(SourceError::Offline { what, source_name: self.name.clone() })
    }
}

#[async_trait]
impl Source for Offline {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn resolve(&self, tag: &str) -> Result<Digest, SourceError> {
        self.refuse(format!("tag {tag:?}"))
    }

    async fn manifest(&self, digest: &Digest) -> Result<Unverified, SourceError> {
        self.refuse(format!("manifest {digest}"))
    }

    async fn blob(&self, blob: &BlobId, _: Range<u64>) -> Result<ByteStream, SourceError> {
        self.refuse(format!("blob {}", blob.digest))
    }

    async fn tags(&self) -> Result<Vec<String>, SourceError> {
        self.refuse("the list of tags".to_owned())
    }

    async fn referrers(&self, subject: &Digest, _: &str) -> Result<Vec<Digest>, SourceError> {
        self.refuse(format!("the list of what refers to {subject}"))
    }
}
