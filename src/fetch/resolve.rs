//! From a reference to a plan: tag to digest once, manifest and config by digest and hashed here, parents likewise.
//!
//! Below this module there are only digests.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::TryStreamExt as _;

use super::named::Named;
use super::transfer::retried;
use super::{Context, FetchError, RepositoryPattern, Trust, trust};
use crate::cache::{Cache, CacheError};
use crate::digest::{Digest, Unverified, Verified};
use crate::modelkit::filter::Filters;
use crate::modelkit::index::{ImageIndex, Platform};
use crate::modelkit::kit::Kit as KitDocument;
use crate::modelkit::manifest::{Document, MAX_CONFIG, Manifest};
use crate::modelkit::plan::{Chain, plan};
use crate::modelkit::{KitfileSource, Plan};
use crate::reference::{Location, Reference};
use crate::source::{self, BlobId, Connection, KitStorage, Source, SourceError};

/// What the user asks for.
#[derive(Debug, Clone)]
pub struct Request {
    /// The reference.
    pub reference: Reference,
    /// What of the kit is wanted.
    pub filters: Filters,
    /// The platform to take from an image index; the host's where it is `None`.
    pub platform: Option<Platform>,
    /// The manifest to take from an image index.
    pub select: Option<Digest>,
    /// Whose word counts for what a layer holds.
    pub trust: Trust,
    /// Referrers whose indexes are used.
    pub index_digests: Vec<Digest>,
    /// Repositories whose referrers' indexes are used.
    pub trusted_indexes: Vec<RepositoryPattern>,
}

impl Request {
    /// A kit as a whole, and nothing but its own pins trusted.
    pub fn new(reference: Reference) -> Self {
        Self {
            reference,
            filters: Filters::default(),
            platform: None,
            select: None,
            trust: Trust::default(),
            index_digests: Vec::new(),
            trusted_indexes: Vec::new(),
        }
    }
}

/// How sources are reached.
#[derive(Debug, Clone)]
pub struct Access {
    /// Connection flags.
    pub connection: Connection,
    /// kit's home directory.
    pub kit_home: PathBuf,
    /// Whether what a tag was when it was last seen is not enough.
    pub require_fresh: bool,
}

/// One kit of a chain: the repository it came from and where to ask for its blobs, best first.
#[derive(Debug, Clone)]
pub struct Origin {
    /// `registry/repo`, `oci:DIR` or a bare name.
    pub repository: String,
    /// The manifest's digest.
    pub digest: Digest,
    /// kit's storage first, where it may hold the blobs already.
    pub sources: Vec<Arc<dyn Source>>,
}

/// A reference that was followed to the end.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The reference as asked for.
    pub reference: Reference,
    /// The digest of the kit's manifest.
    pub digest: Digest,
    /// The digest of the image index that led to it, and what it offers.
    pub index: Option<(Digest, ImageIndex)>,
    /// The manifest's bytes.
    pub manifest: Verified,
    /// The config's bytes.
    pub config: Verified,
    /// The manifest, parsed.
    pub document: Manifest,
    /// The Kitfile's bytes, where the plan has one.
    pub kitfile: Option<Verified>,
    /// What is to be served.
    pub plan: Plan,
    /// The index that is named for each of the plan's layers, where one is.
    pub named: Vec<Option<Named>>,
    /// The kit and its parents; [`crate::modelkit::Layer::kit`] counts along it.
    pub origins: Vec<Origin>,
    /// What the user should know: an omitted tag, a fallback.
    pub notes: Vec<String>,
}

impl Resolved {
    /// `repository@sha256:…`: what is served, beyond doubt.
    pub fn pinned(&self) -> String {
        format!("{}@{}", self.reference.location.name(), self.digest)
    }
}

/// Follows a reference.
pub async fn resolve(context: &Context, access: &Access, request: &Request) -> Result<Resolved, FetchError> {
    let resolver = Resolver { context, access, request };
    let mut notes = Vec::new();
    let top = resolver.kit(&request.reference, &mut notes).await?;
    let mut chain = Chain::new(top.kit);
    let mut origins = vec![top.origin];
    while let Some(parent) = chain.next_parent(&request.filters).cloned() {
        let found = resolver.kit(&parent, &mut notes).await?;
        chain.push(found.kit)?;
        origins.push(found.origin);
    }
    let mut plan = plan(&chain, &request.filters)?;
    let kitfile = match &plan.kitfile {
        None => None,
        Some(KitfileSource::Rendered(bytes)) => Some(bytes.clone()),
        Some(KitfileSource::Layer { digest, size }) => {
            let blob = BlobId { digest: *digest, size: *size };
            let bytes = resolver.blob("Kitfile", &origins[0].sources, blob).await?;
            // It is served, so not from a map of the cache's file.
            Some(bytes.derive(<[u8]>::to_vec))
        }
    };
    let named = trust::name(&resolver, &origins, &mut plan).await?;
    Ok(Resolved {
        reference: request.reference.clone(),
        digest: origins[0].digest,
        index: top.index,
        manifest: top.manifest,
        config: top.config,
        document: top.document,
        kitfile,
        plan,
        named,
        origins,
        notes,
    })
}

/// The digest that a reference stands for, and nothing more.
pub async fn resolve_digest(
    context: &Context,
    access: &Access,
    reference: &Reference,
) -> Result<(Digest, Vec<String>), FetchError> {
    let request = Request::new(reference.clone());
    let resolver = Resolver { context, access, request: &request };
    let mut notes = Vec::new();
    let (digest, sources) = resolver.digest(reference, &mut notes).await?;
    // A digest that was typed, or that a header told, is only a claim until the manifest has been hashed.
    resolver.manifest(&sources, &digest).await?;
    Ok((digest, notes))
}

/// What is asked for, and how to get it.
pub(super) struct Resolver<'a> {
    pub(super) context: &'a Context,
    pub(super) access: &'a Access,
    pub(super) request: &'a Request,
}

struct Found {
    kit: KitDocument,
    origin: Origin,
    index: Option<(Digest, ImageIndex)>,
    manifest: Verified,
    config: Verified,
    document: Manifest,
}

impl Resolver<'_> {
    /// Asks again while that may help, for as long as names may take.
    pub(super) async fn retried<T, F>(&self, what: &str, ask: impl FnMut() -> F) -> Result<T, FetchError>
    where
        F: Future<Output = Result<T, SourceError>>,
    {
        retried(what, self.context.limits.meta_timeout, ask).await
    }

    fn sources(&self, location: &Location) -> Result<Vec<Arc<dyn Source>>, FetchError> {
        let failed = |cause| FetchError::Source { what: location.name(), cause };
        let main = source::open(location, &self.access.connection, &self.access.kit_home).map_err(failed)?;
        Ok(match location {
            Location::Registry { host, repository } => {
                let local = KitStorage::for_repository(&self.access.kit_home, &format!("{host}/{repository}"));
                vec![Arc::new(local), main]
            }
            Location::Layout { .. } | Location::Local { .. } => vec![main],
        })
    }

    async fn kit(&self, reference: &Reference, notes: &mut Vec<String>) -> Result<Found, FetchError> {
        let (mut digest, sources) = self.digest(reference, notes).await?;
        let mut manifest = self.manifest(&sources, &digest).await?;
        let mut index = None;
        let document = loop {
            match Document::parse(&manifest)? {
                Document::Manifest(document) => break document,
                // One level: an index of indexes is not a kit's.
                Document::Index(found) => {
                    let platform = self.request.platform.clone();
                    // What was selected is in the index that was asked for, not in a parent's.
                    let select = self.request.select.as_ref().filter(|_| *reference == self.request.reference);
                    let chosen = found.select(platform.as_ref(), select)?.digest;
                    index = Some((digest, found));
                    digest = chosen;
                    manifest = self.manifest(&sources, &digest).await?;
                }
            }
        };
        let blob = BlobId { digest: document.config.digest, size: document.config.size };
        let config = self.blob("config", &sources, blob).await?;
        let kit = KitDocument::read(digest, &document, &config)?;
        let origin = Origin { repository: reference.location.name(), digest, sources };
        Ok(Found { kit, origin, index, manifest, config, document })
    }

    /// The digest of the manifest or index that a reference names, and where to get it.
    async fn digest(
        &self,
        reference: &Reference,
        notes: &mut Vec<String>,
    ) -> Result<(Digest, Vec<Arc<dyn Source>>), FetchError> {
        let sources = self.sources(&reference.location)?;
        let Some(digest) = reference.digest else {
            if reference.tag_was_omitted() {
                notes.push(format!("no tag in {}: took `{}`", reference.location.name(), reference.tag()));
            }
            let digest = self.tag(reference, &sources, notes).await?;
            return Ok((digest, sources));
        };
        if reference.tag.is_some() {
            let found = self.tag(reference, &sources, notes).await?;
            if found != digest {
                return Err(FetchError::TagMoved { reference: reference.to_string(), expected: digest, found });
            }
        }
        Ok((digest, sources))
    }

    /// What a tag is now. Where the registry can't be reached, what kit's storage holds under it or what it was when we
    /// last saw it, with a note.
    async fn tag(
        &self,
        reference: &Reference,
        sources: &[Arc<dyn Source>],
        notes: &mut Vec<String>,
    ) -> Result<Digest, FetchError> {
        let tag = reference.tag();
        let name = format!("{}:{tag}", reference.location.name());
        let (Some(main), locals) = (sources.last(), &sources[..sources.len().saturating_sub(1)]) else {
            return Err(FetchError::Lost { what: name });
        };
        let error = match self.retried(&name, || main.resolve(tag)).await {
            Ok(digest) => {
                if !locals.is_empty() {
                    let key = name.clone();
                    self.keep(&name, move |cache| cache.remember(&key, &digest)).await?;
                }
                return Ok(digest);
            }
            Err(error) => error,
        };
        if !error.is_unreachable() {
            return Err(error);
        }
        for local in locals {
            if let Ok(digest) = local.resolve(tag).await {
                notes.push(format!("{name}: the registry can't be reached; took the digest in kit's storage"));
                return Ok(digest);
            }
        }
        let known = self.context.blocking(&name, {
            let name = name.clone();
            move |cache| cache.known(&name)
        });
        let Some(known) = known.await? else { return Err(error) };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let age = crate::units::format_duration(Duration::from_secs(now.as_secs().saturating_sub(known.seen)));
        notes.push(format!("{name}: the registry can't be reached; took the digest it had {age} ago"));
        Ok(known.digest)
    }

    /// A manifest by digest: from the cache, else from the first source that has it, hashed.
    pub(super) async fn manifest(&self, sources: &[Arc<dyn Source>], digest: &Digest) -> Result<Verified, FetchError> {
        let what = format!("manifest {digest}");
        let get = |source: Arc<dyn Source>| {
            let what = what.clone();
            async move { self.retried(&what, || source.manifest(digest)).await }
        };
        self.small(&what, sources, digest, get).await
    }

    /// A small blob by digest, likewise.
    async fn blob(&self, name: &str, sources: &[Arc<dyn Source>], blob: BlobId) -> Result<Verified, FetchError> {
        let what = format!("{name} {}", blob.digest);
        if blob.size > MAX_CONFIG {
            let size = crate::units::format_size(blob.size);
            let what = format!("{what} states a size of {size}, more than 4 MiB");
            let source_name = sources.first().map(|source| source.name()).unwrap_or_default();
            return Err(FetchError::Source {
                what: name.to_owned(),
                cause: SourceError::Protocol { source_name, what },
            });
        }
        let get = |source: Arc<dyn Source>| {
            let what = what.clone();
            async move {
                self.retried(&what, || async {
                    let mut bytes = Vec::new();
                    if blob.size > 0 {
                        let mut stream = source.blob(&blob, 0..blob.size).await?;
                        while let Some(piece) = stream.try_next().await? {
                            bytes.extend_from_slice(piece.peek());
                        }
                    }
                    Ok(Unverified::new(bytes))
                })
                .await
            }
        };
        self.small(&what, sources, &blob.digest, get).await
    }

    /// Keeps what was found for the next time. A cache that can't grow is no reason to do without it now.
    pub(super) async fn keep(
        &self,
        what: &str,
        work: impl FnOnce(&Cache) -> Result<(), CacheError> + Send + 'static,
    ) -> Result<(), FetchError> {
        let kept = |cache: &Cache| {
            work(cache).unwrap_or_else(|error| {
                error.unless_full(|error| tracing::warn!(%error, "not kept in the cache"));
            });
            Ok(())
        };
        self.context.blocking(what, kept).await
    }

    /// From the cache, else from the first source whose bytes hash right; those are kept.
    async fn small<F>(
        &self,
        what: &str,
        sources: &[Arc<dyn Source>],
        digest: &Digest,
        get: impl Fn(Arc<dyn Source>) -> F,
    ) -> Result<Verified, FetchError>
    where
        F: Future<Output = Result<Unverified, FetchError>>,
    {
        let wanted = *digest;
        if let Some(bytes) = self.context.blocking(what, move |cache| cache.blob(&wanted)).await? {
            return Ok(bytes);
        }
        let mut failure = FetchError::Lost { what: what.to_owned() };
        for source in sources {
            let bytes = match get(source.clone()).await {
                Ok(bytes) => bytes,
                Err(error) => {
                    failure = error;
                    continue;
                }
            };
            match bytes.verify(digest) {
                Ok(bytes) => {
                    let kept = bytes.clone();
                    self.keep(what, move |cache| cache.keep_blob(&wanted, &kept)).await?;
                    return Ok(bytes);
                }
                Err(cause) => {
                    failure = FetchError::Digest { what: what.to_owned(), source_name: source.name(), cause };
                }
            }
        }
        Err(failure)
    }
}
