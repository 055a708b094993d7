//! Why a kit can't be mounted, as far as its manifest and config tell.

use crate::digest::Digest;
use crate::path::InvalidPath;

/// A manifest, config or filter that kitfs refuses. Where the user can do something about it, the text says what.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ModelKitError {
    /// More than kitfs is willing to hold.
    #[error("the {what} has {size} bytes; kitfs reads at most {limit}")]
    TooLarge {
        /// Manifest, config or Kitfile.
        what: &'static str,
        /// Its size.
        size: u64,
        /// The cap.
        limit: u64,
    },
    /// Not JSON, or not of the expected shape.
    #[error("the {what} is not valid: {cause}")]
    Json {
        /// Manifest, index or config.
        what: &'static str,
        /// The parser's words.
        #[source]
        cause: std::sync::Arc<serde_json::Error>,
    },
    /// JSON that breaks a rule.
    #[error("the {what} is not valid: {why}")]
    Invalid {
        /// Manifest, index or config.
        what: &'static str,
        /// The rule, and what was found.
        why: String,
    },
    /// Some other artifact, such as a container image.
    #[error(
        "this is {found} and neither a ModelKit nor a ModelPack artifact (its config is {media_type:?}); \
         kitfs mounts what `kit pack` or `modctl build` made"
    )]
    NotAKit {
        /// What it seems to be.
        found: &'static str,
        /// The media type of its config, or its artifact type.
        media_type: String,
    },
    /// An image index without a kit in it.
    #[error("the image index holds no ModelKit or ModelPack manifest")]
    EmptyIndex,
    /// An image index of several kits, and nothing says which.
    #[error("the image index holds {}; choose one with --select DIGEST or --platform OS/ARCH:\n{}", .why, .candidates.join("\n"))]
    Ambiguous {
        /// Why none was taken.
        why: String,
        /// One line a kit: digest, title, platform.
        candidates: Vec<String>,
    },
    /// `--select` names what the index does not hold.
    #[error("{selected} is not in the image index; it holds:\n{}", .candidates.join("\n"))]
    NotInIndex {
        /// What was asked for.
        selected: Digest,
        /// One line a kit.
        candidates: Vec<String>,
    },
    /// A text that is no platform.
    #[error("{0:?} is not a platform: expected os/arch or os/arch/variant, as in linux/arm64")]
    InvalidPlatform(String),
    /// A filter that kit refuses.
    #[error(
        "the filter {filter:?} is not valid: {why}; expected TYPE[,TYPE…][:NAME[,NAME…]], as in model,docs:README.md"
    )]
    InvalidFilter {
        /// As written.
        filter: String,
        /// What is wrong with it.
        why: String,
    },
    /// A path that leaves the kit.
    #[error("{entry}: {cause}")]
    Path {
        /// The Kitfile entry or layer.
        entry: String,
        /// What is wrong with its path.
        #[source]
        cause: InvalidPath,
    },
    /// An entry names a layer that is not there.
    #[error(
        "{entry} names the layer {digest}, which the manifest does not have; the kit is damaged and must be packed again"
    )]
    MissingLayer {
        /// The Kitfile entry.
        entry: String,
        /// The digest it names.
        digest: Digest,
    },
    /// An entry whose digests can't be right.
    #[error("{entry}: {why}")]
    Entry {
        /// The Kitfile entry or layer.
        entry: String,
        /// What is wrong with it.
        why: String,
    },
    /// A layer of a kind that kitfs can't read.
    #[error(
        "{entry} is a layer of the unknown type {media_type:?}; kitfs reads kit's and ModelPack's tar and raw layers"
    )]
    UnknownLayer {
        /// The Kitfile entry.
        entry: String,
        /// The layer's media type.
        media_type: String,
    },
    /// Two layers can't both be where they want to be.
    #[error("{first} and {second} both want the path {path}; `kit unpack` refuses this kit too")]
    Collision {
        /// One layer.
        first: String,
        /// The other.
        second: String,
        /// Where they meet.
        path: String,
    },
    /// A kit that builds on itself.
    #[error("the kits refer to each other in a circle: {}", .chain.join(" → "))]
    Cycle {
        /// The chain up to the kit that was there before.
        chain: Vec<String>,
    },
    /// Too many kits build on each other.
    #[error("the chain of parent kits has more than {limit} references: {}", .chain.join(" → "))]
    TooManyParents {
        /// The cap.
        limit: usize,
        /// The chain so far.
        chain: Vec<String>,
    },
    /// A kit of the chain names a parent that was not read. This is a mistake of kitfs, not of the kit.
    #[error("the parent {reference} of the kit {kit} was not read")]
    ParentNotRead {
        /// The kit that names it.
        kit: Digest,
        /// The parent's reference.
        reference: String,
    },
}
