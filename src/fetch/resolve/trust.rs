//! Who vouches for which index: what each layer of a plan may be read by.
//!
//! A pin stands in the manifest, so that the kit's digest covers it. An attested index comes from a referrer, which the user
//! trusts by its digest or by a rule for the repository; whoever else refers to a kit is not listened to. What is named
//! belongs to one layer of one kit: another kit that shares the layer has to name it itself.

use std::collections::{BTreeMap, BTreeSet};

use super::documents::{Documents, Origin};
use super::last_seen::LastSeen;
use crate::archive::index::annotations::{InvalidPin, MEDIA_TYPE, Pin};
use crate::digest::Digest;
use crate::fetch::named::Named;
use crate::fetch::{FetchError, RepositoryPattern, Tier};
use crate::modelkit::Plan;
use crate::modelkit::error::ModelKitError;
use crate::modelkit::referrer::Referrer;
use crate::report::chain;

/// Referrers of one kit that are looked at, where a rule trusts all of them: one is expected, and each costs a request.
const REFERRERS: usize = 16;

/// Whose word counts for what a layer holds.
#[derive(Debug, Clone)]
pub enum Trust {
    /// The manifest's, and that of the referrers that the user trusts.
    Index {
        /// These themselves.
        referrers: Vec<Digest>,
        /// All that are in these repositories.
        repositories: Vec<RepositoryPattern>,
    },
    /// The layer's own digest alone.
    Layer,
}

impl Default for Trust {
    /// The manifest's word, and no referrer's.
    fn default() -> Self {
        Self::Index { referrers: Vec::new(), repositories: Vec::new() }
    }
}

/// Why a manifest is not taken for a referrer that vouches for the kit's indexes.
#[derive(Debug, thiserror::Error)]
pub enum BadReferrer {
    /// It is not a referrer at all.
    #[error(transparent)]
    Malformed(#[from] ModelKitError),
    /// It is one of another kind.
    #[error("its artifactType is {found:?}, expected {MEDIA_TYPE:?}; `kitfs index REF` prints the digest to trust")]
    OtherType {
        /// Its artifact type.
        found: String,
    },
    /// It is about another kit.
    #[error("it is about {subject}, and this kit is {kit}; `kitfs index REF` prints the digest to trust")]
    OtherKit {
        /// Whom it is about.
        subject: Digest,
        /// The kit that was asked for.
        kit: Digest,
    },
    /// It holds what is no index.
    #[error("it holds {blob} of type {found:?}, expected {MEDIA_TYPE:?}")]
    Foreign {
        /// What it holds.
        blob: Digest,
        /// Its media type.
        found: String,
    },
    /// It does not say what an index is of.
    #[error("index {index}: {cause}")]
    Unnamed {
        /// The index.
        index: Digest,
        /// What is wrong.
        #[source]
        cause: InvalidPin,
    },
}

/// Indexes that referrers attest, by the kit of the chain and the layer.
type Attested = BTreeMap<(usize, Digest), Pin>;

/// Says for each layer of the plan which index is named for it, and adds what went wrong to the plan's warnings, and what
/// is from memory to the notes.
pub(super) async fn name(
    documents: &Documents<'_>,
    trust: &Trust,
    origins: &[Origin],
    plan: &mut Plan,
    notes: &mut Vec<String>,
) -> Result<Vec<Option<Named>>, FetchError> {
    let Trust::Index { referrers, repositories } = trust else {
        return Ok(plan.layers.iter().map(|_| None).collect());
    };
    let mut warnings = Vec::new();
    let pinned = plan.layers.iter().map(|layer| {
        let pin = Pin::read(&layer.annotations).unwrap_or_else(|error| {
            warnings.push(format!("layer {}: {error}; the layer is read as if it had no index", layer.digest));
            None
        });
        pin.map(|pin| Named { pin, tier: Tier::Pinned })
    });
    let mut named: Vec<_> = pinned.collect();

    let mut attested = Attested::new();
    for digest in referrers {
        by_digest(documents, origins, digest, &mut attested, &mut warnings).await?;
    }
    let unnamed = |attested: &Attested| {
        let all = plan.layers.iter().zip(&named).filter(|(_, named)| named.is_none());
        let rest = all.filter(|(layer, _)| !attested.contains_key(&(layer.kit, layer.digest)));
        rest.map(|(layer, _)| layer.kit).collect::<BTreeSet<_>>()
    };
    for kit in unnamed(&attested) {
        let Some(origin) = origins.get(kit) else { continue };
        if repositories.iter().any(|pattern| pattern.covers(&origin.repository)) {
            by_rule(documents, kit, origin, &mut attested, &mut warnings, notes).await;
        }
    }
    for (layer, named) in plan.layers.iter().zip(&mut named) {
        let pin = attested.get(&(layer.kit, layer.digest));
        *named = named.or_else(|| pin.map(|pin| Named { pin: *pin, tier: Tier::Attested }));
    }
    plan.warnings.extend(warnings);
    Ok(named)
}

/// Adds what a referrer names that the user trusts by its digest. One that is not to be had is a warning, as the kit can
/// be read without; one that is not what the user must have meant is an error.
async fn by_digest(
    documents: &Documents<'_>,
    origins: &[Origin],
    digest: &Digest,
    attested: &mut Attested,
    warnings: &mut Vec<String>,
) -> Result<(), FetchError> {
    let sources: Vec<_> = origins.iter().flat_map(|origin| origin.sources.iter().cloned()).collect();
    let manifest = match documents.manifest(&sources, digest).await {
        Ok(manifest) => manifest,
        Err(error @ (FetchError::Cache(_) | FetchError::Lost { .. })) => return Err(error),
        Err(error) => {
            warnings.push(format!("the trusted index {digest} is not used: {}", chain(&error)));
            return Ok(());
        }
    };
    let bad = |cause| FetchError::Referrer { referrer: *digest, cause: Box::new(cause) };
    let referrer = Referrer::parse(&manifest).map_err(|error| bad(error.into()))?;
    let pins = pins(&referrer).map_err(bad)?;
    let Some(kit) = origins.iter().position(|origin| origin.digest == referrer.subject) else {
        return Err(bad(BadReferrer::OtherKit { subject: referrer.subject, kit: origins[0].digest }));
    };
    add(attested, kit, pins);
    Ok(())
}

/// Adds what the first good referrer names that the kit's repository holds. Whatever fails leaves the kit without, and is a
/// warning.
async fn by_rule(
    documents: &Documents<'_>,
    kit: usize,
    origin: &Origin,
    attested: &mut Attested,
    warnings: &mut Vec<String>,
    notes: &mut Vec<String>,
) {
    let mut refused = Vec::new();
    // Kit's storage answers always; whether somebody is away is for the last source to say, the kit's own place.
    let mut is_away = None;
    let key = format!("{}@{} {MEDIA_TYPE}", origin.repository, origin.digest);
    let known = documents.known(&key).await;
    for source in &origin.sources {
        let what = format!("the list of what refers to {}", origin.digest);
        let ask = || source.referrers(&origin.digest, MEDIA_TYPE);
        let mut found = match documents.ask(&what, source, known.is_some(), ask).await {
            Ok(found) => found,
            Err(error) => {
                refused.push(chain(&error));
                is_away = Some(error).filter(FetchError::is_unreachable);
                continue;
            }
        };
        is_away = None;
        // In an order that is the same everywhere and every time.
        found.sort_unstable();
        found.dedup();
        for digest in found.iter().take(REFERRERS) {
            match vouched(documents, origin, digest).await {
                Ok(pins) => {
                    let digest = *digest;
                    // Without the note, the rule is of no use while the registry is away.
                    documents.keep(move |cache| cache.remember(&key, &digest));
                    return add(attested, kit, pins);
                }
                Err(why) => refused.push(why),
            }
        }
    }
    // What the rule led to the last time stands in for an answer, never against one.
    if let (Some(error), Some(known)) = (is_away, known)
        && let Ok(pins) = vouched(documents, origin, &known.digest).await
    {
        let known = LastSeen::new(Some(known.seen), &error);
        notes.push(format!("what a rule trusts to name the indexes of {}: {known}", origin.repository));
        return add(attested, kit, pins);
    }
    warnings.extend(refused.into_iter().map(|why| format!("no trusted index for {}: {why}", origin.repository)));
}

/// What a referrer of a kit names, or why it is not taken at its word.
async fn vouched(documents: &Documents<'_>, origin: &Origin, digest: &Digest) -> Result<Vec<(Digest, Pin)>, String> {
    let manifest = documents.manifest(&origin.sources, digest).await.map_err(|error| chain(&error))?;
    let read = Referrer::parse(&manifest).map_err(BadReferrer::from).and_then(|referrer| {
        let pins = pins(&referrer)?;
        let (subject, kit) = (referrer.subject, origin.digest);
        if subject == kit { Ok(pins) } else { Err(BadReferrer::OtherKit { subject, kit }) }
    });
    read.map_err(|cause| chain(&FetchError::Referrer { referrer: *digest, cause: Box::new(cause) }))
}

/// The indexes that a referrer names, with the layers that they are of.
fn pins(referrer: &Referrer) -> Result<Vec<(Digest, Pin)>, BadReferrer> {
    if referrer.artifact_type != MEDIA_TYPE {
        return Err(BadReferrer::OtherType { found: referrer.artifact_type.clone() });
    }
    let read = referrer.layers.iter().map(|layer| {
        if layer.media_type != MEDIA_TYPE {
            return Err(BadReferrer::Foreign { blob: layer.digest, found: layer.media_type.clone() });
        }
        Pin::read_referred(layer.digest, layer.size, &layer.annotations)
            .map_err(|cause| BadReferrer::Unnamed { index: layer.digest, cause })
    });
    read.collect()
}

/// What was named first stays.
fn add(attested: &mut Attested, kit: usize, pins: Vec<(Digest, Pin)>) {
    for (layer, pin) in pins {
        attested.entry((kit, layer)).or_insert(pin);
    }
}

#[cfg(test)]
#[path = "trust_tests.rs"]
mod tests;
