//! `kitfs pull`: makes a kit complete in the cache.

use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use super::Failure;
use super::kits::KitArgs;
use super::options::{JsonArgs, ProgressArgs};
use super::output::{Output, printable, say};
use super::policy::PolicyArgs;
use super::progress::Progress;
use crate::fetch::pull::{self, Pulled};
use crate::fetch::{FetchError, Kit, LayerFetch, Verify};
use crate::reference::Reference;
use crate::report::chain;
use crate::units::{format_duration, format_size};

/// What is said when the user ends it.
const INTERRUPTED: &str = "interrupted; what was fetched stays, and the next pull goes on there";

/// Makes a kit complete in the cache, so that it mounts and reads without its registry
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs pull [OPTIONS] <REF>",
    after_help = "\
What is here already is not fetched again: a pull that was interrupted or killed goes on where it
stood. It goes on after a layer that can't be had. The exit code is 0 if all is here, else 1.

Examples:
  kitfs pull ghcr.io/team/llama:8b
  kitfs pull llama:8b --filter model         the model alone
  kitfs pull --keep ghcr.io/team/llama:8b    to stay until `kitfs cache rm`"
)]
pub(super) struct Pull {
    /// The kit
    #[arg(value_name = "REF")]
    reference: Reference,
    /// Keep it: it is never evicted, until `kitfs cache rm`
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    kit: KitArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    progress: ProgressArgs,
}

impl Pull {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            outcome = self.pull() => outcome,
            _ = interrupt.recv() => Err(Failure::failed(INTERRUPTED)),
            _ = terminate.recv() => Err(Failure::failed(INTERRUPTED)),
        }
    }

    async fn pull(&self) -> Result<(), Failure> {
        let started = Instant::now();
        let (context, kit) = self.kit.open_if(&self.reference, Verify::Strict, self.policy.policy()).await?;
        let keeping = if self.keep { Some(pull::keep(&context, &kit).await?) } else { None };
        if keeping.is_none() {
            pull::check_room(&context, &kit).await?;
        }
        let pulled = {
            let _progress = Progress::of(&kit.layers, self.progress.mode());
            pull::pull(&kit).await
        };
        let failed = pulled.iter().filter(|layer| layer.error.is_some()).count();
        match keeping {
            Some(keeping) if failed == 0 => keeping.confirm()?,
            undone => drop(undone),
        }
        let done = Done { kept: pull::is_kept(&context, &kit).await?, took: started.elapsed(), kit, pulled };
        let mut out = Output::new();
        if self.json.json {
            out.json(&done.as_json(&self.reference))?;
        } else if failed == 0 {
            done.print(&mut out)?;
        }
        out.finish()?;
        if failed == 0 {
            return Ok(());
        }
        for (layer, error) in done.layers().filter_map(|(layer, pulled)| Some((layer, pulled.error.as_ref()?))) {
            say("error", format!("{}: {}", layer.layer.label(), chain(error)));
        }
        let is_full = |error: &FetchError| matches!(error.root(), FetchError::Cache(cause) if cause.is_full());
        let was_full = done.pulled.iter().filter_map(|layer| layer.error.as_ref()).any(is_full);
        let remedy = match context.cache.most()? {
            Some(limit) if was_full => format!(
                "; the cache keeps {} at once: raise that with --cache-size, or remove kits with `kitfs cache rm REF`",
                format_size(limit)
            ),
            _ => String::new(),
        };
        Err(Failure::failed(format!(
            "{failed} of {} layers of {} are not complete; what was fetched stays, and the next pull goes on there{remedy}",
            done.pulled.len(),
            done.kit.resolved.pinned()
        )))
    }
}

/// What a pull came to.
struct Done {
    kit: Kit,
    pulled: Vec<Pulled>,
    kept: bool,
    took: Duration,
}

impl Done {
    fn layers(&self) -> impl Iterator<Item = (&LayerFetch, &Pulled)> {
        self.kit.layers.iter().map(AsRef::as_ref).zip(&self.pulled)
    }

    fn fetched(&self) -> u64 {
        self.pulled.iter().map(|layer| layer.fetched).sum()
    }

    fn as_json(&self, reference: &Reference) -> Value {
        let layer = |(fetch, pulled): (&LayerFetch, &Pulled)| {
            json!({
                "path": fetch.layer.path,
                "digest": fetch.layer.digest,
                "size": fetch.layer.size,
                "fetched": pulled.fetched,
                "trust": fetch.tier(),
                "error": pulled.error.as_ref().map(|error| chain(error)),
            })
        };
        json!({
            "reference": reference.to_string(),
            "digest": self.kit.resolved.digest,
            "layers": self.layers().map(layer).collect::<Vec<_>>(),
            "bytes": self.kit.size(),
            "fetched": self.fetched(),
            "kept": self.kept,
            "last_known": self.kit.resolved.last_known,
            "notes": self.kit.resolved.notes,
            "seconds": self.took.as_secs_f64(),
        })
    }

    fn print(&self, out: &mut Output) -> Result<(), Failure> {
        let (count, fetched) = (self.pulled.len(), self.fetched());
        let plural = if count == 1 { "layer" } else { "layers" };
        let here: u64 = self.layers().map(|(fetch, pulled)| fetch.layer.size.saturating_sub(pulled.fetched)).sum();
        let told = match (fetched, here) {
            (0, _) => "nothing: all of it was here".to_owned(),
            (_, 0) => format!("all of it in {}", format_duration(self.took)),
            _ => format!("{} in {}; {} were here", format_size(fetched), format_duration(self.took), format_size(here)),
        };
        let kept = if self.kept { "until `kitfs cache rm`" } else { "as long as there is room; see --keep" };
        let rows = [
            ("pulled", self.kit.resolved.pinned()),
            ("holds", format!("{} in {count} {plural}", format_size(self.kit.size()))),
            ("fetched", told),
            ("kept", kept.to_owned()),
        ];
        out.table(&rows.map(|(key, value)| vec![key.to_owned(), printable(value.as_bytes())]))
    }
}
