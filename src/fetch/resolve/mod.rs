//! From a reference to a plan: tag to digest once, manifest and config by digest and hashed here, parents likewise.
//!
//! Below this module there are only digests.
//!
//! - `documents`: the manifests, configs and referrers for that: asked for, hashed, kept.
//! - `first_reads`: what a mount will read of the layers, asked for while the config comes.
//! - `last_seen`: what a tag was, where its registry does not say what it is; [`tags`]: all tags of a repository.
//! - [`trust`]: who vouches for which index; [`policy`]: what may be asked for at all; [`repositories`]: patterns of
//!   repositories for both.
//! - [`mod@record`]: what belongs to a kit, for the cache.

pub(super) mod documents;
pub(super) mod first_reads;
pub(super) mod last_seen;
pub mod policy;
pub mod record;
pub mod repositories;
pub mod tags;
pub mod trust;

use std::path::PathBuf;
use std::sync::Arc;

use super::named::Named;
use super::{Context, FetchError, Policy, Refusal, Trust};
use crate::digest::{Digest, Verified};
use crate::modelkit::filter::Filters;
use crate::modelkit::index::{ImageIndex, Platform};
use crate::modelkit::kit::Kit as KitDocument;
use crate::modelkit::manifest::{Document, Manifest};
use crate::modelkit::plan::{Chain, plan};
use crate::modelkit::{KitfileSource, Plan};
use crate::reference::{Location, Reference};
use crate::report::chain;
use crate::source::{self, BlobId, Connection, KitStorage, Source, SourceError};
use documents::{Documents, Origin};
use first_reads::Begun;
use last_seen::LastSeen;

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
    /// What may be asked for.
    pub policy: Policy,
    /// Whether the layers will be asked at once what they hold, so that this is begun early.
    pub is_to_mount: bool,
}

impl Request {
    /// A kit as a whole, nothing but its own pins trusted, and everything allowed.
    pub fn new(reference: Reference) -> Self {
        Self {
            reference,
            filters: Filters::default(),
            platform: None,
            select: None,
            trust: Trust::default(),
            policy: Policy::default(),
            is_to_mount: false,
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

impl Access {
    /// Why a reference leads nowhere, and what helps. A bare name that kit does not know was often meant for Docker Hub.
    pub fn why_not(&self, reference: &Reference, error: &FetchError) -> String {
        let unknown = match error.root() {
            FetchError::Source { cause: SourceError::NotFound { what, .. }, .. } => what.starts_with("repository"),
            _ => false,
        };
        if unknown && matches!(reference.location, Location::Local { .. }) {
            let home = self.kit_home.display();
            return format!(
                "{reference} is not in kit's storage; for Docker Hub write docker.io/{reference} (kit's home is {home})"
            );
        }
        let is_distrusted = matches!(error.root(), FetchError::Source { cause: SourceError::Untrusted { .. }, .. })
            && !self.require_fresh;
        let remedy = if is_distrusted { "; --offline takes what is in the cache instead" } else { "" };
        format!("{}{remedy}", chain(error))
    }
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
    /// What has been asked of some of them already.
    pub begun: Vec<Arc<Begun>>,
    /// Manifests, configs and other documents that were read on the way, all of which the cache may hold.
    pub documents: Vec<Digest>,
    /// What the user should know: an omitted tag, a fallback.
    pub notes: Vec<String>,
    /// That the kit's own tag was not looked up now, and what stood in for that.
    pub last_known: Option<LastSeen>,
}

impl Resolved {
    /// `repository@sha256:…`: what is served, beyond doubt.
    pub fn pinned(&self) -> String {
        format!("{}@{}", self.reference.location.name(), self.digest)
    }
}

/// Follows a reference.
pub async fn resolve(context: &Context, access: &Access, request: &Request) -> Result<Resolved, FetchError> {
    let resolver = Resolver::new(context, access, request);
    let resolved = follow(&resolver, request).await;
    resolver.documents.settle().await;
    resolved
}

async fn follow(resolver: &Resolver<'_>, request: &Request) -> Result<Resolved, FetchError> {
    let mut notes = Vec::new();
    let top = resolver.kit(&request.reference, Some(&request.filters), &mut notes).await?;
    let mut chain = Chain::new(top.kit);
    let mut origins = vec![top.origin];
    let mut begun: Vec<_> = top.begun.into_iter().collect();
    while let Some(parent) = chain.next_parent(&request.filters).cloned() {
        let found = resolver.kit(&parent, request.filters.for_parent().as_ref(), &mut notes).await;
        let found = found.map_err(|error| match (error, origins.last()) {
            (FetchError::Policy(refusal), Some(Origin { repository, digest, .. })) => {
                FetchError::Policy(Box::new(refusal.of_parent(format!("{repository}@{digest}"))))
            }
            (error, _) => error,
        })?;
        chain.push(found.kit)?;
        origins.push(found.origin);
        begun.extend(found.begun);
    }
    let mut plan = plan(&chain, &request.filters)?;
    let kitfile = match &plan.kitfile {
        None => None,
        Some(KitfileSource::Rendered(bytes)) => Some(bytes.clone()),
        Some(KitfileSource::Layer { digest, size }) => {
            let blob = BlobId { digest: *digest, size: *size };
            let bytes = resolver.documents.blob("Kitfile", &origins[0].sources, blob).await?;
            // It is served, so not from a map of the cache's file.
            Some(bytes.derive(<[u8]>::to_vec))
        }
    };
    let named = trust::name(&resolver.documents, &request.trust, &origins, &mut plan, &mut notes).await?;
    let resolved = Resolved {
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
        begun,
        documents: resolver.documents.digests(),
        notes,
        last_known: top.last_known,
    };
    record::note(&resolver.documents, &resolved);
    Ok(resolved)
}

/// The digest that a reference stands for, and nothing more.
pub async fn resolve_digest(
    context: &Context,
    access: &Access,
    reference: &Reference,
) -> Result<ResolvedDigest, FetchError> {
    let request = Request::new(reference.clone());
    let resolver = Resolver::new(context, access, &request);
    let mut notes = Vec::new();
    let pointed = resolver.pointed(reference, &mut notes).await?;
    // A digest that was typed, or that a header told, is only a claim until the manifest has been hashed.
    let manifest = resolver.documents.manifest(&pointed.sources, &pointed.digest).await?;
    let document = Document::parse(&manifest);
    if document.is_ok() {
        resolver.remember(&pointed);
    }
    resolver.documents.settle().await;
    let index = match document {
        Ok(Document::Index(index)) => Some(index),
        Ok(Document::Manifest(_)) | Err(_) => None,
    };
    let Pointed { digest, sources, last_known, .. } = pointed;
    Ok(ResolvedDigest { digest, index, manifest, sources, notes, last_known })
}

/// What a reference stands for.
#[derive(Debug, Clone)]
pub struct ResolvedDigest {
    /// The digest of a manifest or image index.
    pub digest: Digest,
    /// Its bytes.
    pub manifest: Verified,
    /// Where it is, best first.
    pub sources: Vec<Arc<dyn Source>>,
    /// The image index, if it is one.
    pub index: Option<ImageIndex>,
    /// What the user should know.
    pub notes: Vec<String>,
    /// That the tag was not looked up now, and what stood in for that.
    pub last_known: Option<LastSeen>,
}

/// What is asked for, and how to get it.
struct Resolver<'a> {
    context: &'a Context,
    access: &'a Access,
    request: &'a Request,
    documents: Documents<'a>,
}

struct Found {
    kit: KitDocument,
    origin: Origin,
    begun: Option<Arc<Begun>>,
    index: Option<(Digest, ImageIndex)>,
    manifest: Verified,
    config: Verified,
    document: Manifest,
    last_known: Option<LastSeen>,
}

/// What a reference names.
struct Pointed {
    digest: Digest,
    /// Where to get it, best first.
    sources: Vec<Arc<dyn Source>>,
    last_known: Option<LastSeen>,
    /// The tag that the registry has just looked up, to be noted once the digest was found to be a kit's.
    remember: Option<String>,
}

/// Where to ask for what a location holds, best first: the last is the place itself, those before it hold copies.
pub(super) fn sources(access: &Access, location: &Location) -> Result<Vec<Arc<dyn Source>>, FetchError> {
    let failed = |cause| FetchError::Source { what: location.name(), cause };
    let main = source::open(location, &access.connection, &access.kit_home).map_err(failed)?;
    Ok(match location {
        Location::Registry { host, repository } => {
            let local = KitStorage::for_repository(&access.kit_home, &format!("{host}/{repository}"));
            vec![Arc::new(local), main]
        }
        Location::Layout { .. } | Location::Local { .. } => vec![main],
    })
}

impl<'a> Resolver<'a> {
    fn new(context: &'a Context, access: &'a Access, request: &'a Request) -> Self {
        Self { context, access, request, documents: Documents::new(context) }
    }
}

impl Resolver<'_> {
    /// A kit of the chain, of which `filters` want something.
    async fn kit(
        &self,
        reference: &Reference,
        filters: Option<&Filters>,
        notes: &mut Vec<String>,
    ) -> Result<Found, FetchError> {
        let pointed = self.pointed(reference, notes).await?;
        let (mut digest, sources) = (pointed.digest, &pointed.sources);
        let mut manifest = self.documents.manifest(sources, &digest).await?;
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
                    manifest = self.documents.manifest(sources, &digest).await?;
                }
            }
        };
        let blob = BlobId { digest: document.config.digest, size: document.config.size };
        let mut origin = Origin { repository: reference.location.name(), digest, sources: sources.clone() };
        let begin = async {
            match filters.filter(|_| self.request.is_to_mount) {
                Some(filters) => {
                    first_reads::begin(self.context, &origin, &document, filters, &self.request.trust).await
                }
                None => Ok(None),
            }
        };
        let (config, begun) = tokio::join!(self.documents.blob("config", sources, blob), begin);
        let (config, begun) = (config?, begun?);
        let kit = KitDocument::read(digest, &document, &config)?;
        self.remember(&pointed);
        if let (Some(begun), Some(last)) = (&begun, origin.sources.last_mut()) {
            *last = begun.clone();
        }
        Ok(Found { kit, origin, begun, index, manifest, config, document, last_known: pointed.last_known })
    }

    /// The digest of the manifest or index that a reference names, and where to get it.
    async fn pointed(&self, reference: &Reference, notes: &mut Vec<String>) -> Result<Pointed, FetchError> {
        let refused = |refusal: Refusal| FetchError::Policy(Box::new(refusal));
        self.request.policy.check_place(reference).map_err(refused)?;
        let sources = sources(self.access, &reference.location)?;
        let name = format!("{}:{}", reference.location.name(), reference.tag());
        let Some(digest) = reference.digest else {
            if reference.tag_was_omitted() {
                notes.push(format!("no tag in {}: took `{}`", reference.location.name(), reference.tag()));
            }
            let found = self.tag(&name, reference.tag(), &sources).await;
            if let Err(refusal) = self.request.policy.check_tag(reference) {
                return Err(refused(refusal.looked_up(reference, found.map(|(digest, _)| digest))));
            }
            let (digest, last_known) = found?;
            notes.extend(last_known.as_ref().map(|known| format!("{name}: {known}")));
            let remember = (last_known.is_none() && sources.len() > 1).then_some(name);
            return Ok(Pointed { digest, sources, last_known, remember });
        };
        let mut remember = None;
        if reference.tag.is_some() {
            // The digest is what counts: it stands in for an answer.
            match self.ask_tag(&name, reference.tag(), &sources, Some(&digest), !self.access.require_fresh).await {
                Ok(found) if found != digest => {
                    return Err(FetchError::TagMoved { reference: reference.to_string(), expected: digest, found });
                }
                Ok(_) => remember = (sources.len() > 1).then_some(name),
                Err(error) if error.is_unreachable() && !self.access.require_fresh => {
                    let known = LastSeen::new(None, &error);
                    notes.push(format!(
                        "{name}: {}; it was not checked that the tag is still this digest",
                        known.reason()
                    ));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Pointed { digest, sources, last_known: None, remember })
    }

    /// What a tag is now. Where the registry can't be reached, what kit's storage holds under it or what it was when it
    /// was last seen, and that it is so.
    async fn tag(
        &self,
        name: &str,
        tag: &str,
        sources: &[Arc<dyn Source>],
    ) -> Result<(Digest, Option<LastSeen>), FetchError> {
        let stand_in = self.stand_in(name, tag, sources).await;
        let known = stand_in.as_ref().map(|(digest, _)| digest);
        let error = match self.ask_tag(name, tag, sources, known, known.is_some() && !self.access.require_fresh).await {
            Ok(digest) => return Ok((digest, None)),
            Err(error) => error,
        };
        let Some((digest, seen)) = stand_in.filter(|_| error.is_unreachable()) else { return Err(error) };
        let known = LastSeen::new(seen, &error);
        if self.access.require_fresh {
            let repository = name.strip_suffix(tag).and_then(|name| name.strip_suffix(':')).unwrap_or(name);
            let pinned = format!("{repository}@{digest}");
            let known = known.digest();
            return Err(FetchError::Stale { tag: name.to_owned(), known, pinned, cause: Box::new(error) });
        }
        tracing::info!(tag = name, %digest, error = chain(&error), "{known}");
        Ok((digest, Some(known)))
    }

    /// Asks the source itself, which is the last: those before it only hold copies. Where the manifest would have to be
    /// asked for next, the question is such that it comes with the answer; where it is here already, if the tag is what is
    /// `known` of it, the digest alone is asked for.
    async fn ask_tag(
        &self,
        name: &str,
        tag: &str,
        sources: &[Arc<dyn Source>],
        known: Option<&Digest>,
        has_stand_in: bool,
    ) -> Result<Digest, FetchError> {
        let (main, locals) = sources.split_last().ok_or_else(|| FetchError::Lost { what: name.to_owned() })?;
        if self.is_here(locals, known).await {
            return self.documents.ask(name, main, has_stand_in, || main.resolve(tag)).await;
        }
        let (digest, manifest) = self.documents.ask(name, main, has_stand_in, || main.tagged(tag)).await?;
        manifest.into_iter().for_each(|bytes| self.documents.take(digest, bytes));
        Ok(digest)
    }

    /// Whether a manifest that is known of can be had without the network.
    async fn is_here(&self, locals: &[Arc<dyn Source>], known: Option<&Digest>) -> bool {
        let Some(digest) = known else { return false };
        for local in locals {
            if local.manifest(digest).await.is_ok() {
                return true;
            }
        }
        self.documents.seem_to_have(digest).await
    }

    /// The digest that may stand in for a registry's answer, and when the registry said so, where that is known.
    async fn stand_in(&self, name: &str, tag: &str, sources: &[Arc<dyn Source>]) -> Option<(Digest, Option<u64>)> {
        let (_, locals) = sources.split_last()?;
        for local in locals {
            if let Ok(digest) = local.resolve(tag).await {
                return Some((digest, None));
            }
        }
        if locals.is_empty() {
            return None;
        }
        let known = self.documents.known(name).await?;
        Some((known.digest, Some(known.seen)))
    }

    /// Remembers what a name leads to, once that was found to be a kit.
    fn remember(&self, pointed: &Pointed) {
        let Some(name) = pointed.remember.clone() else { return };
        let digest = pointed.digest;
        self.documents.keep(move |cache| cache.remember(&name, &digest));
    }
}
