//! What a mount tells of itself: to the command that made it, and on its control socket.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use super::Failure;
use super::output::{self, Output, printable};
use crate::digest::Digest;
use crate::fetch::{Context, Kit, LastSeen, LayerFetch, Resolved, Tier};
use crate::fs::Fs;
use crate::fs::prefetch::{Report, State};
use crate::units::format_size;

/// How long looking at the cache's disk may take for an answer: who asks waits ten seconds, and everything else is known.
const COUNTING: Duration = Duration::from_secs(4);

/// What it means for a mount that registries are not to be asked.
pub(super) const OFFLINE: &str = "no registry is asked; to read what is not in the cache is an I/O error";

/// What is served, as `mount` prints it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Served {
    /// The repository with the digest.
    pub(super) reference: String,
    pub(super) digest: Digest,
    pub(super) mountpoint: PathBuf,
    pub(super) layers: usize,
    pub(super) bytes: u64,
    pub(super) trust: Tier,
    /// Whether registries are not to be asked.
    pub(super) offline: bool,
    /// What stood in for the registry's word on the tag, where the tag was not looked up.
    pub(super) last_known: Option<LastKnown>,
    pub(super) notes: Vec<String>,
    pub(super) warnings: Vec<String>,
    pub(super) kits: Vec<KitOfChain>,
    /// What is fetched before it is asked for, if anything is.
    pub(super) prefetch: Option<Report>,
}

/// The kit itself or one of its parents.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct KitOfChain {
    repository: String,
    digest: Digest,
}

/// How old the knowledge of a tag is, when the registry was not asked or did not answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct LastKnown {
    /// When the registry said so; nobody knows it of what kit's storage holds.
    seen: Option<String>,
    /// How long that was ago when the tag was followed; nobody knows it of what is yet to come by this machine's clock.
    age_seconds: Option<u64>,
    why: String,
    cause: Option<String>,
}

/// How old the knowledge of a tag is, for JSON.
pub(super) fn last_known(known: Option<&LastSeen>) -> Option<LastKnown> {
    known.map(|known| LastKnown {
        seen: known.seen.map(|seen| output::timestamp(i64::try_from(seen).unwrap_or(i64::MAX))),
        age_seconds: known.age.map(|age| age.as_secs()),
        why: known.why.to_string(),
        cause: known.cause.clone(),
    })
}

impl Served {
    pub(super) fn new(kit: &Kit, mountpoint: PathBuf, offline: bool, warnings: Vec<String>) -> Self {
        let resolved = &kit.resolved;
        Self {
            reference: resolved.pinned(),
            digest: resolved.digest,
            mountpoint,
            layers: kit.layers.len(),
            bytes: kit.size(),
            trust: kit.tier(),
            offline,
            last_known: last_known(resolved.last_known.as_ref()),
            notes: resolved.notes.clone(),
            warnings: resolved.plan.warnings.iter().cloned().chain(warnings).collect(),
            kits: kits(resolved),
            prefetch: None,
        }
    }

    pub(super) fn print(&self, as_json: bool) -> Result<(), Failure> {
        let mut out = Output::new();
        if as_json {
            out.json(self)?;
            return out.finish();
        }
        let trust = match self.trust {
            Tier::Provisional => "provisional: names are known, content waits for its layer's digest",
            Tier::Pinned => "pinned: content is read in parts, proved by the kit's own index",
            Tier::Attested => "attested: content is read in parts, proved by an index that you trust",
            Tier::Derived => "derived",
        };
        let plural = if self.layers == 1 { "layer" } else { "layers" };
        let mut lines = vec![
            ("mounted", self.reference.clone()),
            ("on", self.mountpoint.display().to_string()),
            ("holds", format!("{} in {} {plural}", format_size(self.bytes), self.layers)),
            ("trust", trust.to_owned()),
        ];
        if self.offline {
            lines.push(("offline", OFFLINE.to_owned()));
        }
        lines.extend(self.prefetch.as_ref().map(|report| ("prefetch", in_words(report))));
        lines.extend(self.kits.iter().skip(1).map(|kit| ("parent", format!("{}@{}", kit.repository, kit.digest))));
        lines.extend(self.notes.iter().map(|note| ("note", note.clone())));
        lines.extend(self.warnings.iter().map(|warning| ("warning", warning.clone())));
        let rows = lines.into_iter().map(|(key, value)| vec![key.to_owned(), printable(value.as_bytes())]);
        out.table(&rows.collect::<Vec<_>>())?;
        out.finish()
    }
}

/// How far the prefetch is, for people.
pub(super) fn in_words(report: &Report) -> String {
    let Report { mode, state, done, total, why } = report;
    let bytes = || format!("{} of {}", format_size(*done), format_size(*total));
    let why = why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
    match state {
        State::Waiting => format!("{mode}, waiting for reads"),
        State::Running => format!("{mode}, {} are here", bytes()),
        State::Done => format!("{mode}, done: {}{why}", format_size(*total)),
        State::Failed => format!("{mode}, failed at {}{why}", bytes()),
    }
}

/// The kit and its parents.
pub(super) fn kits(resolved: &Resolved) -> Vec<KitOfChain> {
    let kit =
        |origin: &crate::fetch::Origin| KitOfChain { repository: origin.repository.clone(), digest: origin.digest };
    resolved.origins.iter().map(kit).collect()
}

/// How a mount is, as far as its kit goes.
pub(super) async fn status(fs: Arc<Fs>, served: Arc<Served>, context: Context) -> Value {
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
    let warnings: Vec<&str> = served.warnings.iter().map(String::as_str).chain(since).collect();
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
        "warnings": warnings,
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
