//! The tags of a repository: which there are, what they point at, and what that says of itself.
//!
//! Each question goes to the repository itself: neither the cache nor kit's storage knows what a tag is now. What a digest
//! stands for never changes, so that manifests come from the cache where they are there.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::documents::Documents;
use super::sources;
use crate::digest::Digest;
use crate::fetch::{Access, Context, FetchError};
use crate::modelkit::error::ModelKitError;
use crate::modelkit::manifest::Document;
use crate::reference::Location;
use crate::report::chain;
use crate::source::{Source, SourceError};

/// So many tags are asked for at a time: a small request each, and a person waits.
const AT_ONCE: usize = 32;

/// A repository whose tags are asked for.
pub struct Repository<'a> {
    name: String,
    /// The last of them is the repository itself.
    sources: Vec<Arc<dyn Source>>,
    documents: Documents<'a>,
}

/// A tag and what it points at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag {
    /// Its name.
    pub name: String,
    /// What it points at, as far as that is known.
    pub digest: Option<Digest>,
}

/// What a tag points at, by what it says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tagged {
    /// What it is.
    pub kind: TaggedKind,
    /// Its annotations; none of what is no kit.
    pub annotations: BTreeMap<String, String>,
}

/// What a tag can point at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TaggedKind {
    /// A kit.
    Kit,
    /// An image index, which should lead to kits.
    Index,
    /// Something that kitfs does not read.
    Other,
}

impl<'a> Repository<'a> {
    /// The repository at a location. Nothing is asked of it yet.
    pub fn open(context: &'a Context, access: &Access, location: &Location) -> Result<Self, FetchError> {
        let documents = Documents::new(context);
        Ok(Self { name: location.name(), sources: sources(access, location)?, documents })
    }

    /// All tags, with what they point at where the list tells that.
    pub async fn tags(&self) -> Result<Vec<Tag>, FetchError> {
        let what = format!("the tags of {}", self.name);
        let main = self.main(&what)?;
        let all = self.documents.ask(&what, main, false, || main.tags_and_digests()).await?;
        Ok(all.into_iter().map(|(name, digest)| Tag { name, digest }).collect())
    }

    /// The same tags with what each points at now, a request each where that is not known yet; `count` hears of each that
    /// is. One that has gone meanwhile is left out; one that can't be told what it points at stays without, and `warn`
    /// hears why. A repository that does not answer, or refuses, is an error.
    pub async fn point(
        &self,
        tags: Vec<Tag>,
        count: impl Fn() + Sync,
        warn: impl Fn(String) + Sync,
    ) -> Result<Vec<Tag>, FetchError> {
        let ask = async |tag: Tag| {
            let name = format!("{}:{}", self.name, tag.name);
            let digest = match (tag.digest, self.main(&name)?) {
                (Some(digest), _) => Ok(digest),
                (None, main) => self.documents.ask(&name, main, false, || main.resolve(&tag.name)).await,
            };
            count();
            match digest {
                Ok(digest) => Ok(Some(Tag { digest: Some(digest), ..tag })),
                Err(error) => match error.root() {
                    FetchError::Source { cause: SourceError::NotFound { .. }, .. } => Ok(None),
                    FetchError::Source { cause: SourceError::Protocol { .. }, .. } => {
                        warn(chain(&error));
                        Ok(Some(tag))
                    }
                    _ => Err(error),
                },
            }
        };
        let asked = stream::iter(tags).map(ask).buffered(AT_ONCE);
        asked.try_filter_map(async |tag| Ok(tag)).try_collect().await
    }

    /// What these digests stand for, in their order, a request each where that is not in the cache. One that can't be told
    /// is left without, and `warn` hears why; a repository that does not answer is an error.
    pub async fn look_at(
        &self,
        digests: Vec<Digest>,
        warn: impl Fn(String) + Sync,
    ) -> Result<Vec<Option<Tagged>>, FetchError> {
        let look = async |digest: Digest| match self.documents.manifest(&self.sources, &digest).await {
            Ok(manifest) => match Document::parse(&manifest) {
                Ok(Document::Manifest(kit)) => Ok(Some(Tagged { kind: TaggedKind::Kit, annotations: kit.annotations })),
                Ok(Document::Index(index)) => {
                    Ok(Some(Tagged { kind: TaggedKind::Index, annotations: index.annotations }))
                }
                Err(ModelKitError::NotAKit { .. }) => {
                    Ok(Some(Tagged { kind: TaggedKind::Other, annotations: BTreeMap::new() }))
                }
                Err(error) => {
                    warn(format!("{}@{digest}: {}", self.name, chain(&error)));
                    Ok(None)
                }
            },
            Err(error) if error.is_unreachable() => Err(error),
            Err(error) => {
                warn(chain(&error));
                Ok(None)
            }
        };
        stream::iter(digests).map(look).buffered(AT_ONCE).try_collect().await
    }

    /// Waits until the cache has what was read.
    pub async fn settle(self) {
        self.documents.settle().await;
    }

    fn main(&self, what: &str) -> Result<&Arc<dyn Source>, FetchError> {
        self.sources.last().ok_or_else(|| FetchError::Lost { what: what.to_owned() })
    }
}
