//! What a mount tells of itself: to the command that made it, and to whoever asks for its status.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use super::Serving;
use crate::digest::Digest;
use crate::fetch::{Kit, LayerFetch, Origin, Resolved, Tier};
use crate::fs::Fs;
use crate::fs::prefetch::Report;

/// How long looking at the cache's disk may take for an answer: who asks waits ten seconds, and everything else is known.
const COUNTING: Duration = Duration::from_secs(4);

/// What is served, as the mount began to serve it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Served {
    /// The repository with the digest.
    pub reference: String,
    /// The digest of the kit's manifest.
    pub digest: Digest,
    /// The directory.
    pub mountpoint: PathBuf,
    /// How many layers the kit has.
    pub layers: usize,
    /// How many bytes they have, as the manifest states them.
    pub bytes: u64,
    /// How far what is served is proved.
    pub trust: Tier,
    /// Whether registries are not to be asked.
    pub offline: bool,
    /// What stood in for the registry's word on the tag, where the tag was not looked up: a
    /// [`LastSeen`](crate::fetch::LastSeen).
    pub last_known: Value,
    /// What is worth to be known of how the kit was found.
    pub notes: Vec<String>,
    /// What is wrong with the kit, which is served all the same.
    pub warnings: Vec<String>,
    /// The kit itself and its parents.
    pub kits: Vec<KitOfChain>,
    /// What is fetched before it is asked for, if anything is.
    pub prefetch: Option<Report>,
}

/// The kit itself or one of its parents.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KitOfChain {
    /// Where it is.
    pub repository: String,
    /// The digest of its manifest.
    pub digest: Digest,
}

impl From<&Origin> for KitOfChain {
    fn from(origin: &Origin) -> Self {
        Self { repository: origin.repository.clone(), digest: origin.digest }
    }
}

impl Served {
    /// What a kit that is mounted tells, and how it was found.
    pub(super) fn new(
        kit: &Kit,
        resolved: &Resolved,
        mountpoint: PathBuf,
        offline: bool,
        warnings: Vec<String>,
    ) -> Self {
        Self {
            reference: resolved.pinned(),
            digest: resolved.digest,
            mountpoint,
            layers: kit.layers.len(),
            bytes: kit.size(),
            trust: kit.tier(),
            offline,
            last_known: json!(resolved.last_known),
            notes: resolved.notes.clone(),
            warnings: resolved.plan.warnings.iter().cloned().chain(warnings).collect(),
            kits: resolved.origins.iter().map(KitOfChain::from).collect(),
            prefetch: None,
        }
    }
}

/// How a mount is, as far as its kit goes.
pub(super) async fn status(serving: &Serving, fs: Arc<Fs>, served: Arc<Served>) -> Value {
    let context = &serving.opener.context;
    let until = Instant::now() + COUNTING;
    let cache = context.cache.clone();
    let full = tokio::task::spawn_blocking(move || cache.fullness());
    let full = timeout_at(until, full).await.ok().and_then(Result::ok).flatten();
    let mut layers = Vec::new();
    for fetch in &fs.kit().layers {
        layers.push(layer(fetch, until).await);
    }
    // What went wrong since it was mounted counts too.
    let indexes = fs.kit().layers.iter().filter_map(|layer| layer.unusable_index());
    let since = indexes.filter(|warning| !served.warnings.iter().any(|known| known == warning));
    let warnings = served.warnings.iter().cloned().chain(since.map(str::to_owned)).collect();
    json!({
        "verify": context.verify,
        "trust": fs.kit().tier(),
        "bytes": served.bytes,
        "kits": served.kits,
        "offline": served.offline,
        "last_known": served.last_known,
        "layers": layers,
        "conflicts": fs.conflicts(),
        "prefetch": fs.prefetch().map(|prefetch| prefetch.report(fs.kit())),
        "full": full,
        "reads": fs.ways().report(),
        "notes": served.notes,
        "warnings": serving.warnings(warnings),
    })
}

/// How a layer is. `content` and `cached` count bytes of its files, as far as they are known in time.
async fn layer(fetch: &LayerFetch, until: Instant) -> Value {
    let layer = &fetch.layer;
    let counted = timeout_at(until, fetch.held()).await;
    let held = match &counted {
        Ok(Ok(held)) => *held,
        Ok(Err(error)) => {
            tracing::warn!(%error, "what is cached can't be told");
            None
        }
        Err(_) => None,
    };
    json!({
        "type": layer.kind,
        "path": layer.path,
        "digest": layer.digest,
        "size": layer.size,
        "trust": fetch.tier(),
        "content": held.map(|held| held.content),
        "cached": held.map(|held| held.cached),
        "counted": counted.is_ok(),
        "filling": fetch.is_filling().then(|| *fetch.progress().borrow()),
        "poisoned": fetch.poisoned(),
        "unstaged": fetch.unstaged(),
    })
}
