//! A kit as it is, in another repository: every blob, what keeps its indexes, and the manifests that an image index lists.
//!
//! What a tag leads to is written last, by whoever moves the tag; before that, all of it is there. An index of a layer is a
//! help and not the kit: one that is lost where the kit comes from is a warning.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;

use super::manifest::EMPTY;
use super::write::{Blob, Tally, Writer};
use super::{Document, PublishError};
use crate::archive::index::annotations::{MEDIA_TYPE, Pin};
use crate::digest::{Digest, Verified};
use crate::fetch::transfer::retried;
use crate::fetch::{self, Context, FetchError};
use crate::modelkit::kit::Kit;
use crate::modelkit::manifest::{Document as Parsed, Manifest};
use crate::modelkit::referrer::Referrer;
use crate::report::chain;
use crate::source::BlobId;

/// Referrers of one manifest that are taken along: one is expected, and each costs requests.
const REFERRERS: usize = 16;

/// What is to be copied.
#[derive(Debug)]
pub struct Parcel {
    /// What the tag is to lead to.
    pub root: Document,
    /// The manifests that it lists, where it is an image index.
    listed: Vec<Document>,
    /// The blobs of all of them, each once.
    pub blobs: Vec<Arc<Blob>>,
    /// What keeps the indexes of their layers, each with its blobs.
    kept: Vec<(Document, Vec<Arc<Blob>>)>,
    /// What can't be taken along.
    pub warnings: Vec<String>,
    /// What is not taken along.
    pub notes: Vec<String>,
}

/// How a copy came to be there.
#[derive(Debug, Default)]
pub struct Copied {
    /// Its blobs, and those of its indexes.
    pub tally: Tally,
    /// How many referrers were not there before.
    pub referrers: u64,
}

/// What any manifest or image index names.
#[derive(Deserialize)]
struct Names {
    #[serde(default)]
    config: Option<Name>,
    #[serde(default)]
    layers: Option<Vec<Name>>,
    #[serde(default)]
    manifests: Option<Vec<Name>>,
}

#[derive(Deserialize)]
struct Name {
    digest: Digest,
    size: u64,
}

impl Parcel {
    /// Reads what there is to copy: what `digest`, whose bytes these are, leads to.
    pub async fn of(
        context: &Context,
        writer: &Writer,
        digest: Digest,
        bytes: &Verified,
    ) -> Result<Self, PublishError> {
        let root = Document::unchanged(digest, bytes)?;
        let (warnings, notes) = (Vec::new(), Vec::new());
        let mut parcel = Self { root, listed: Vec::new(), blobs: Vec::new(), kept: Vec::new(), warnings, notes };
        let mut manifests = vec![(digest, bytes.clone())];
        let mut seen = HashSet::new();
        for listed in names(bytes)?.manifests.unwrap_or_default() {
            if seen.insert(listed.digest) {
                manifests.push((listed.digest, get(context, writer, &listed.digest).await?));
            }
        }
        for (at, (digest, bytes)) in manifests.iter().enumerate() {
            parcel.add(context, writer, *digest, bytes, at == 0).await?;
        }
        Ok(parcel)
    }

    async fn add(
        &mut self,
        context: &Context,
        writer: &Writer,
        digest: Digest,
        bytes: &Verified,
        is_root: bool,
    ) -> Result<(), PublishError> {
        let names = names(bytes)?;
        if !is_root && names.manifests.is_some() {
            return Err(PublishError::Nested { digest });
        }
        let config = names.config.into_iter().map(|config| ("config", config));
        let layers = names.layers.into_iter().flatten().map(|layer| ("layer", layer));
        for (what, Name { digest, size }) in config.chain(layers) {
            if self.blobs.iter().all(|blob| blob.id.digest != digest) {
                self.blobs.push(Blob::copied(format!("{what} {digest}"), BlobId { digest, size }));
            }
        }
        let document = Document::unchanged(digest, bytes)?;
        self.keep_indexes(context, writer, &document, bytes).await?;
        if let Ok(Parsed::Manifest(manifest)) = Parsed::parse(bytes) {
            let id = BlobId { digest: manifest.config.digest, size: manifest.config.size };
            let copy = |cause| PublishError::Copy { what: "the config".to_owned(), cause: Box::new(cause) };
            let config = fetch::config(context, &writer.sources, id).await.map_err(copy)?;
            // What can't be mounted is copied all the same.
            if let Ok(Some(parent)) = Kit::read(digest, &manifest, &config).map(|kit| kit.parent().cloned()) {
                self.notes
                    .push(format!("it builds on {parent}, which is not copied: who mounts the copy must reach that"));
            }
        }
        if !is_root {
            self.listed.push(document);
        }
        Ok(())
    }

    /// Adds what keeps the indexes of a manifest's layers: what refers to it in its repository; and for those that the
    /// manifest pins and nothing keeps any more, what `kitfs index` once made for that.
    async fn keep_indexes(
        &mut self,
        context: &Context,
        writer: &Writer,
        subject: &Document,
        bytes: &Verified,
    ) -> Result<(), PublishError> {
        let mut found = HashSet::new();
        for source in &writer.sources {
            let what = format!("the list of what refers to {}", subject.digest);
            let ask = || source.referrers(&subject.digest, MEDIA_TYPE);
            match retried(&what, writer.limits.meta_timeout, ask).await {
                Ok(all) => found.extend(all),
                Err(error) => self.warn("what refers to it", subject, error)?,
            }
        }
        let mut found: Vec<_> = found.into_iter().collect();
        found.sort_unstable();
        for digest in found.iter().take(REFERRERS) {
            let read = match get(context, writer, digest).await {
                Ok(bytes) => bytes,
                Err(PublishError::Copy { what, cause }) => {
                    self.warn(&what, subject, *cause)?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let is_about = |referrer: &Referrer| referrer.subject == subject.digest;
            match Referrer::parse(&read).map(|referrer| is_about(&referrer) && referrer.artifact_type == MEDIA_TYPE) {
                Ok(true) => {
                    let document = Document::unchanged(*digest, &read)?.referring(subject.digest);
                    self.kept.push((document, referred(&names(&read)?)));
                }
                Ok(false) => {}
                Err(error) => self.warnings.push(format!("the referrer {digest} is left: {}", chain(&error))),
            }
        }
        let Ok(Parsed::Manifest(manifest)) = Parsed::parse(bytes) else { return Ok(()) };
        if let Some(document) = Document::referrer(subject, &pins(&manifest))?
            && !found.contains(&document.digest)
        {
            let names: Names = serde_json::from_slice(&document.manifest.bytes)?;
            self.kept.push((document, referred(&names)));
        }
        Ok(())
    }

    /// Goes on without: unless it may be had a moment later.
    fn warn(&mut self, what: &str, subject: &Document, error: FetchError) -> Result<(), PublishError> {
        if error.is_unreachable() {
            return Err(PublishError::Copy { what: what.to_owned(), cause: Box::new(error) });
        }
        self.warnings.push(format!("{what}, beside {}, is not taken along: {}", subject.digest, chain(&error)));
        Ok(())
    }

    /// All blobs, those of the indexes too.
    pub fn all_blobs(&self) -> Vec<Arc<Blob>> {
        self.blobs.iter().chain(self.kept.iter().flat_map(|(_, blobs)| blobs)).cloned().collect()
    }

    /// Puts all there but for what the tag is to lead to. Warns of the indexes that could not be taken along.
    pub async fn put(&mut self, writer: &Writer) -> Result<Copied, PublishError> {
        let mut copied = Copied { tally: writer.put_all(&self.blobs, Tally::default()).await?, referrers: 0 };
        for (document, blobs) in &self.kept {
            match writer.put_all(blobs, copied.tally).await {
                Ok(tally) => copied.tally = tally,
                Err(PublishError::Copy { what, cause }) if !cause.is_unreachable() => {
                    let why = chain(&*cause);
                    self.warnings
                        .push(format!("the indexes in {} are not taken along: {what}: {why}", document.digest));
                    continue;
                }
                Err(error) => return Err(error),
            }
            copied.referrers += u64::from(writer.put_referring(document).await?);
        }
        for document in &self.listed {
            writer.put_manifest("the manifest", document, None).await?;
        }
        Ok(copied)
    }
}

/// A manifest from where the kit is.
async fn get(context: &Context, writer: &Writer, digest: &Digest) -> Result<Verified, PublishError> {
    let copy = |cause| PublishError::Copy { what: format!("manifest {digest}"), cause: Box::new(cause) };
    fetch::manifest(context, &writer.sources, digest).await.map_err(copy)
}

fn names(bytes: &Verified) -> Result<Names, PublishError> {
    Ok(serde_json::from_slice(bytes.bytes())?)
}

/// The indexes that a manifest pins, by layer.
fn pins(manifest: &Manifest) -> Vec<(Digest, Pin)> {
    let pin = |layer: &crate::modelkit::manifest::Descriptor| Pin::read(&layer.annotations).ok().flatten();
    manifest.layers.iter().filter_map(|layer| Some((layer.digest, pin(layer)?))).collect()
}

/// The blobs of a referrer.
fn referred(names: &Names) -> Vec<Arc<Blob>> {
    let config = names.config.iter().map(|config| {
        if config.digest == Digest::of(EMPTY) {
            return Blob::made("the empty config".to_owned(), config.digest, Bytes::from_static(EMPTY));
        }
        let id = BlobId { digest: config.digest, size: config.size };
        Blob::copied(format!("config {}", config.digest), id)
    });
    let layers = names.layers.iter().flatten().map(|index| {
        Blob::copied(format!("index {}", index.digest), BlobId { digest: index.digest, size: index.size })
    });
    config.chain(layers).collect()
}
