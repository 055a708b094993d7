//! Where manifests and blobs come from, and where they are written to.
//!
//! Two traits, to read ([`Source`]) and to write ([`Target`]); three implementations of both (registry, OCI layout,
//! kit's storage), and one conformance test of each over all of them (`tests/source_conformance.rs`,
//! `tests/target_conformance.rs`). A source moves bytes and reports what went wrong; it does not retry, cache or
//! decide: that is its caller's. What it returns is [`Unverified`]: the caller hashes. What is written is hashed here, once.
//!
//! ```text
//! layout, kit_storage       local directories, in each of them `write` beside what reads
//!   blobs                   how both read their blobs
//!   files                   how both write: whole files or none, and lists under a lock
//! registry                  the distribution API: which request, and whether the answer keeps to what was asked
//!   registry/push, upload   writing; the body of a blob on its way, given up when it stalls
//!   registry/referrers      who refers to a manifest: the API, or the tag that stands in for it
//!   registry/tags           the list of tags, page by page
//!   transport, body         one HTTP request with its redirects; an answer's bytes, counted and timed
//!   clients                 which of them share connections
//!   lookup                  host names, looked up where nobody is held by it
//!   token, access,          tokens: one flight for all who need one, and for what
//!     challenge
//!   credentials, helper     what the user has logged in with, read anew each time
//! offline                   what stands for a registry that must not be asked
//! reach                     which hosts answer
//! checked                   a blob's bytes on their way to a target, hashed
//! index_file                OCI's image index: lists of manifests and of referrers
//! ```

mod access;
mod blobs;
mod body;
mod challenge;
mod checked;
mod clients;
mod connection;
mod credentials;
mod files;
mod helper;
mod index_file;
mod kit_storage;
mod layout;
mod lookup;
mod offline;
mod reach;
mod registry;
mod retry_after;
mod target;
mod token;
mod transport;

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::Stream;

use crate::digest::{Digest, Mismatch, Unverified};
use crate::reference::Location;

/// It bounds the answers of token servers too.
pub use crate::modelkit::manifest::MAX_MANIFEST;
pub use clients::Clients;
pub use connection::{Connection, Timeouts, kit_home};
pub use kit_storage::KitStorage;
pub use layout::Layout;
pub use offline::Offline;
pub use reach::{Away, Reach};
pub use registry::Registry;
pub use target::{NewManifest, Refers, Target};

/// A blob by digest and size, as its descriptor in a manifest states them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlobId {
    /// The digest of the whole blob.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

/// The bytes of one range, in order. It ends after exactly as many bytes as were asked for, or with an error.
/// Dropping it gives the connection up.
pub type ByteStream = Pin<Box<dyn Stream<Item = Result<Unverified, SourceError>> + Send>>;

/// A repository: one name in one registry, one OCI layout, or one name in kit's storage.
#[async_trait]
pub trait Source: Send + Sync + fmt::Debug {
    /// The repository as people write it, without tag or digest: `registry/team/llama`, `oci:DIR`, `llama`.
    fn name(&self) -> String;

    /// The digest a tag points at now. One request; nothing is cached.
    async fn resolve(&self, tag: &str) -> Result<Digest, SourceError>;

    /// What a tag points at now, if that is something else than `known`. One request, which has no body to send back where it
    /// is not.
    async fn moved(&self, tag: &str, known: &Digest) -> Result<Option<Digest>, SourceError> {
        Ok(Some(self.resolve(tag).await?).filter(|digest| digest != known))
    }

    /// The same for who wants what the tag points at too, which may come in the same answer. The digest is what the source
    /// states; whether the bytes have it is for the caller to see.
    async fn tagged(&self, tag: &str) -> Result<(Digest, Option<Unverified>), SourceError> {
        Ok((self.resolve(tag).await?, None))
    }

    /// The bytes of a manifest or image index, at most [`MAX_MANIFEST`].
    async fn manifest(&self, digest: &Digest) -> Result<Unverified, SourceError>;

    /// Bytes `range` of a blob. The range is not empty and ends at or before `blob.size`.
    async fn blob(&self, blob: &BlobId, range: Range<u64>) -> Result<ByteStream, SourceError>;

    /// All tags of the repository that name kits: those that hold referrers are left out.
    async fn tags(&self) -> Result<Vec<String>, SourceError>;

    /// The same with what they point at, where that is known without a request for each.
    async fn tags_and_digests(&self) -> Result<Vec<(String, Option<Digest>)>, SourceError> {
        Ok(self.tags().await?.into_iter().map(|tag| (tag, None)).collect())
    }

    /// The manifests of this artifact type that refer to `subject`. What they are is the source's claim.
    async fn referrers(&self, subject: &Digest, artifact_type: &str) -> Result<Vec<Digest>, SourceError>;

    /// Since when the host answers nothing, whoever asked it; `None` where it answers, where it was not asked lately, and
    /// for what lies on this machine's disks.
    fn away(&self) -> Option<Away> {
        None
    }
}

/// The source that a reference points at. Nothing is asked of a registry yet.
///
/// Kit's storage may hold a registry's blobs as well: see [`KitStorage::for_repository`].
pub fn open(location: &Location, connection: &Connection, kit_home: &Path) -> Result<Arc<dyn Source>, SourceError> {
    Ok(match location {
        Location::Registry { host, repository } if connection.offline => Arc::new(Offline::new(host, repository)),
        Location::Registry { host, repository } => Arc::new(Registry::new(host, repository, connection, kit_home)?),
        Location::Layout { dir } => Arc::new(Layout::open(dir)?),
        Location::Local { repository } => Arc::new(KitStorage::local(kit_home, repository)),
    })
}

/// The place that a reference points at, to write there. A directory that is empty or not there becomes an OCI layout;
/// kit's storage is made where there is none. Nothing is asked of a registry yet, and offline there is none to write to.
pub fn open_target(
    location: &Location,
    connection: &Connection,
    kit_home: &Path,
) -> Result<Arc<dyn Target>, SourceError> {
    Ok(match location {
        Location::Registry { .. } if connection.offline => {
            let what = format!(
                "{} is in a registry, and --offline (KITFS_OFFLINE) keeps kitfs from writing there; leave it out, or write \
                 to an OCI layout, oci:DIR",
                location.name()
            );
            return Err(SourceError::Setup { what, cause: None });
        }
        Location::Registry { host, repository } => Arc::new(Registry::new(host, repository, connection, kit_home)?),
        Location::Layout { dir } => Arc::new(Layout::create(dir)?),
        Location::Local { repository } => Arc::new(KitStorage::create(kit_home, repository)?),
    })
}

/// Refuses a range that the [`Source::blob`] contract rules out, before it becomes a request.
fn check_range(blob: &BlobId, range: &Range<u64>, source_name: &str) -> Result<(), SourceError> {
    if range.start < range.end && range.end <= blob.size {
        return Ok(());
    }
    Err(SourceError::Protocol {
        source_name: source_name.to_owned(),
        what: format!("bytes {}..{} of {} lie outside its {} bytes", range.start, range.end, blob.digest, blob.size),
    })
}

/// Why a source did not give what it was asked for. Cloned to everyone who waits for the same answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SourceError {
    /// There is no such tag, manifest or blob.
    #[error("{what} is not in {source_name}")]
    NotFound {
        /// Tag, manifest or blob, with its name.
        what: String,
        /// The source that was asked.
        source_name: String,
    },
    /// 401: no credentials, or not the right ones.
    #[error("{host} refused the credentials ({tried}); run `kit login {host}` or `docker login {host}`")]
    Unauthorized {
        /// The registry's host.
        host: String,
        /// Which credentials were tried, and from which file: never a secret.
        tried: String,
    },
    /// 403: the credentials are right and not enough.
    #[error("{host} denied access to {what} ({tried})")]
    Forbidden {
        /// The registry's host.
        host: String,
        /// What was asked for.
        what: String,
        /// Which credentials were tried, and from which file.
        tried: String,
    },
    /// The server answered a range with the whole blob (200 instead of 206). A caller may ask for the whole instead.
    #[error("{source_name} ignores byte ranges")]
    RangeIgnored {
        /// The source that was asked.
        source_name: String,
    },
    /// The server can't be reached, the connection broke, or it went silent.
    #[error("{source_name}: {what}")]
    Transport {
        /// The source that was asked.
        source_name: String,
        /// What happened.
        what: String,
        /// The library's error.
        #[source]
        cause: Option<Arc<dyn std::error::Error + Send + Sync>>,
    },
    /// It is in a registry, and registries are not to be asked.
    #[error(
        "{what} is not in the cache or in kit's storage, and --offline (KITFS_OFFLINE) keeps kitfs from asking \
         {source_name}; leave it out, or `kitfs pull` the kit first"
    )]
    Offline {
        /// Tag, manifest or blob, with its name.
        what: String,
        /// The repository that was not asked.
        source_name: String,
    },
    /// The server is not proved to be the one that was meant, or wants us to prove who we are, and TLS was given up. Who
    /// sits in between may want just that, so that nothing older stands in for an answer.
    #[error("{source_name}: {what}")]
    Untrusted {
        /// The source that was asked.
        source_name: String,
        /// What is wrong with the certificate, and the remedy.
        what: String,
        /// The library's error.
        #[source]
        cause: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The server is busy or broken: 408, 429 or 5xx.
    #[error("{source_name} answered {status}{words}")]
    Status {
        /// The source that was asked.
        source_name: String,
        /// The HTTP status.
        status: u16,
        /// `Retry-After`, where it was given.
        retry_after: Option<Duration>,
        /// What a registry said of it when it was written to, in brackets after a space; else empty.
        words: Box<str>,
    },
    /// A registry refused a write for good: 404, 405, 413, a wrong digest.
    #[error("{source_name} answered {status} to {what}")]
    Refused {
        /// The registry's repository.
        source_name: String,
        /// The HTTP status.
        status: u16,
        /// What was to be written, what that status means, and the registry's own words.
        what: String,
    },
    /// A registry keeps a tag from moving.
    #[error(
        "{source_name} holds that tag to be immutable, and answered {status} to {what}{words}; choose another tag, or have \
         the registry's rule changed"
    )]
    TagImmutable {
        /// The registry's repository.
        source_name: String,
        /// The HTTP status.
        status: u16,
        /// What was to be written.
        what: Box<str>,
        /// The registry's own words, in brackets after a space.
        words: Box<str>,
    },
    /// What was to be written as a blob is not that blob. The target has kept nothing, and is not to blame.
    #[error("the bytes to write as blob {} to {target} have the digest {}: where they come from is damaged; nothing was written", cause.expected, cause.found)]
    Damaged {
        /// The target.
        target: String,
        /// Expected and found.
        cause: Box<Mismatch>,
    },
    /// An answer that breaks the protocol: a wrong `Content-Range`, a body too long, a redirect to plain HTTP.
    #[error("{source_name}: {what}")]
    Protocol {
        /// The source that was asked.
        source_name: String,
        /// What was expected and what came.
        what: String,
    },
    /// A local file can't be read or written.
    #[error("{path}: {cause}")]
    Disk {
        /// The file.
        path: String,
        /// The system's error.
        #[source]
        cause: Arc<std::io::Error>,
    },
    /// A setting of the connection can't be used: a CA file without certificates, a proxy that is not a URL.
    #[error("{what}")]
    Setup {
        /// Which setting, what is wrong with it, and what is expected.
        what: String,
        /// The underlying error.
        #[source]
        cause: Option<Arc<dyn std::error::Error + Send + Sync>>,
    },
}

impl SourceError {
    /// Whether asking again may help.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Transport { .. } | Self::Status { .. } => true,
            Self::NotFound { .. }
            | Self::Unauthorized { .. }
            | Self::Forbidden { .. }
            | Self::Offline { .. }
            | Self::Untrusted { .. }
            | Self::RangeIgnored { .. }
            | Self::Refused { .. }
            | Self::TagImmutable { .. }
            | Self::Damaged { .. }
            | Self::Protocol { .. }
            | Self::Disk { .. }
            | Self::Setup { .. } => false,
        }
    }
}
