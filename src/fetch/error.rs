//! Why content or names could not be had.

use std::sync::Arc;
use std::time::Duration;

use super::resolve::policy::Refusal;
use super::resolve::trust::BadReferrer;
use crate::archive::index::{IndexError, InvalidList};
use crate::archive::inflate::InflateError;
use crate::archive::listing::Contradiction;
use crate::archive::walker::TarError;
use crate::cache::CacheError;
use crate::digest::{Digest, Mismatch};
use crate::modelkit::error::ModelKitError;
use crate::path::TreePath;
use crate::source::SourceError;

/// An error of the fetch layer. It is shared by all who wait for one flight, so it lives in an `Arc` there.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// A source failed, for good or until the deadline.
    #[error("{what} can't be read")]
    Source {
        /// What was asked for: `layer sha256:…`, `manifest sha256:…`, `tag x`.
        what: String,
        /// The last source's error.
        #[source]
        cause: SourceError,
    },
    /// No progress within the deadline.
    #[error("{what}: no progress for {}; see --read-timeout and --meta-timeout", crate::units::format_duration(*after))]
    Timeout {
        /// What was waited for.
        what: String,
        /// The deadline that passed.
        after: Duration,
        /// The last source's error, where there was one.
        #[source]
        cause: Option<SourceError>,
    },
    /// A blob is not what its digest says.
    #[error("{what} from {source_name}")]
    Digest {
        /// What was fetched.
        what: String,
        /// The source that gave it.
        source_name: String,
        /// Expected and found.
        #[source]
        cause: Mismatch,
    },
    /// A layer was found to be false before; it stays refused until the next mount.
    #[error("layer {layer} is refused since it was found to be false: {why}")]
    Poisoned {
        /// The layer.
        layer: Digest,
        /// What was found.
        why: String,
    },
    /// A layer's archive is broken or hostile.
    #[error("layer {layer} holds no valid archive")]
    Archive {
        /// The layer.
        layer: Digest,
        /// Where and how.
        #[source]
        cause: ArchiveError,
    },
    /// The index that is named for a layer is not to be had, or not to be used. A registry that can't be reached is a
    /// [`FetchError::Source`] or [`FetchError::Timeout`] instead: it may have the index.
    #[error("index {index} of layer {layer}, from {source_name}")]
    Index {
        /// The layer.
        layer: Digest,
        /// The index that is named for it.
        index: Digest,
        /// The source that was asked.
        source_name: String,
        /// What is wrong with it.
        #[source]
        cause: Box<BadIndex>,
    },
    /// The manifest that the user trusts to name indexes does not name this kit's.
    #[error("{referrer} does not name indexes of this kit")]
    Referrer {
        /// The manifest.
        referrer: Digest,
        /// What is wrong with it.
        #[source]
        cause: Box<BadReferrer>,
    },
    /// An entry lies outside the path that the Kitfile gives its layer.
    #[error("layer {layer} holds {path}, which lies outside its path {root}")]
    OutsideRoot {
        /// The layer.
        layer: Digest,
        /// The entry.
        path: TreePath,
        /// Where the layer's entries must lie.
        root: TreePath,
    },
    /// A symbolic link that leads out of the tree.
    #[error(
        "layer {layer} holds the symbolic link {path} to {target:?}, which leads out of the kit or may: `..` may stand at its start only"
    )]
    LinkLeaves {
        /// The layer.
        layer: Digest,
        /// The link.
        path: TreePath,
        /// Its target, lossily decoded.
        target: String,
    },
    /// The verified layer is not what its unverified headers had told.
    #[error("layer {layer} is not what its listing told: {what}")]
    ListingDiffers {
        /// The layer.
        layer: Digest,
        /// The first difference.
        what: String,
    },
    /// A manifest, config or reference makes no sense.
    #[error(transparent)]
    ModelKit(#[from] ModelKitError),
    /// The cache's disk failed.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A tag leads elsewhere than the digest beside it.
    #[error("{reference} resolves to {found}, not to {expected}: nothing is used; drop the tag or the digest")]
    TagMoved {
        /// The reference as written.
        reference: String,
        /// The digest in the reference.
        expected: Digest,
        /// The digest of the tag.
        found: Digest,
    },
    /// It breaks a rule for what may be asked for.
    #[error(transparent)]
    Policy(Box<Refusal>),
    /// A tag can't be looked up now, and what it was is not enough.
    #[error(
        "{tag} can't be looked up, and --require-fresh refuses {known}; to go on without the registry, ask for {pinned}"
    )]
    Stale {
        /// The repository with the tag.
        tag: String,
        /// What is known of it, and since when.
        known: String,
        /// The repository with the digest that is known.
        pinned: String,
        /// Why it can't be looked up.
        #[source]
        cause: Box<FetchError>,
    },
    /// The plan is contradictory: two layers claim one file.
    #[error("{0}; `kit unpack` refuses such a kit, and so does kitfs")]
    Conflict(String),
    /// A part of a layer was asked for without verification, and the layer can't be read in parts.
    #[error("layer {layer} is compressed, or its server knows no ranges: leave --verify=none out to fetch it whole")]
    NoRandomAccess {
        /// The layer.
        layer: Digest,
    },
    /// What was fetched is not in the cache.
    #[error(
        "the cache has not kept {} of layer {layer}: it is too small for the kit, see --cache-size, or its disk failed, as \
         the log says",
        crate::units::format_size(*bytes)
    )]
    NotKept {
        /// The layer.
        layer: Digest,
        /// How many bytes of its content.
        bytes: u64,
    },
    /// A task ended without an answer.
    #[error("{what} was given up: an internal error; please report it with the log")]
    Lost {
        /// What it was doing.
        what: String,
    },
    /// What another task found and shares.
    #[error(transparent)]
    Shared(#[from] Arc<FetchError>),
}

/// Why a named index is not used.
#[derive(Debug, thiserror::Error)]
pub enum BadIndex {
    /// The source has no such blob.
    #[error("it is missing")]
    Missing(#[source] SourceError),
    /// What the source answers can't be it: it has another size than is named, say.
    #[error("the source's answer can't be it")]
    Unfit(#[source] SourceError),
    /// The source's disk does not give it.
    #[error("the source can't read it")]
    Unreadable(#[source] SourceError),
    /// It is too long to be held in memory, and the cache's disk does not take it, or give it back.
    #[error("the cache can't hold it")]
    NotKept(#[source] CacheError),
    /// What names it states sizes that the index of no such layer has.
    #[error("a head of {head} bytes and chunk lists of {lists} are more than a layer of {layer} bytes can have")]
    TooLong {
        /// The stated size of its head.
        head: u64,
        /// The stated size of its chunk lists.
        lists: u64,
        /// The size of the layer's blob.
        layer: u64,
    },
    /// The bytes are not those that are named.
    #[error("it is false")]
    False(#[source] Mismatch),
    /// The bytes are those that are named, and no index.
    #[error("it is invalid")]
    Invalid(#[source] IndexError),
    /// The bytes that should be a file's chunk list are not.
    #[error("its chunk list is false")]
    List(#[source] InvalidList),
    /// It is an index, of another layer.
    #[error("it is of layer {found}, or of the same bytes read in another way")]
    OtherLayer {
        /// The layer that it is of.
        found: Digest,
    },
    /// Its head tells of an index of another length.
    #[error("its head is of an index of {found} bytes, but the kit names one of {named}")]
    Length {
        /// What the kit says.
        named: u64,
        /// What the head says.
        found: u64,
    },
}

/// What can be wrong inside a layer.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The tar is malformed or holds what a kit may not hold.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// The compression is broken or a bomb.
    #[error(transparent)]
    Inflate(#[from] InflateError),
    /// The entries contradict each other.
    #[error(transparent)]
    Listing(#[from] Contradiction),
    /// The index that follows is not valid.
    #[error(transparent)]
    Index(#[from] IndexError),
}

impl FetchError {
    /// Whether the network, and not the kit, is at fault: what is known already may stand in.
    pub fn is_unreachable(&self) -> bool {
        match self.root() {
            Self::Timeout { .. } => true,
            Self::Source { cause, .. } => cause.is_transient() || matches!(cause, SourceError::Offline { .. }),
            _ => false,
        }
    }

    /// Whether it would have to come from a registry, and registries are not to be asked.
    pub fn is_offline(&self) -> bool {
        matches!(self.root(), Self::Source { cause: SourceError::Offline { .. }, .. })
    }

    /// What came instead of a registry's answer, in a few words; `None` where none was asked for.
    pub fn why_unreachable(&self) -> Option<String> {
        let cause = match self.root() {
            Self::Source { cause, .. } | Self::Timeout { cause: Some(cause), .. } => cause,
            Self::Timeout { after, .. } => {
                return Some(format!("no answer within {}", crate::units::format_duration(*after)));
            }
            _ => return None,
        };
        match cause {
            SourceError::Offline { .. } => None,
            SourceError::Status { status, .. } => Some(format!("it answered {status}")),
            SourceError::Transport { what, cause: None, .. } => Some(what.clone()),
            SourceError::Transport { cause: Some(cause), .. } => {
                let mut deepest: &dyn std::error::Error = &**cause;
                while let Some(cause) = deepest.source() {
                    deepest = cause;
                }
                Some(deepest.to_string())
            }
            other => Some(other.to_string()),
        }
    }

    /// Whether the kit itself makes no sense, so that it should not be mounted at all.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self.root(),
            Self::OutsideRoot { .. } | Self::LinkLeaves { .. } | Self::Conflict(_) | Self::ModelKit(_)
        )
    }

    /// Whether a source knows no ranges, so that what was asked of it can only be had whole.
    pub fn ignores_ranges(&self) -> bool {
        matches!(self.root(), Self::Source { cause: SourceError::RangeIgnored { .. }, .. })
    }

    /// The error behind shared ones.
    pub fn root(&self) -> &FetchError {
        match self {
            Self::Shared(inner) => inner.root(),
            other => other,
        }
    }
}
