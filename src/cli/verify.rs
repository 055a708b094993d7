//! `kitfs verify`: reads a kit whole and compares: layer with manifest, index with layer.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use clap::Args;
use futures_util::StreamExt as _;
use serde_json::{Value, json};

use super::Failure;
use super::kits::KitArgs;
use super::options::{JsonArgs, ProgressArgs};
use super::output::{Output, printable};
use super::progress::Progress;
use crate::archive::index::Index;
use crate::archive::index::annotations::{HEAD, Pin};
use crate::archive::index::diff::{self, Difference};
use crate::fetch::fill::index_key;
use crate::fetch::layer::NotAudited;
use crate::fetch::named::Named;
use crate::fetch::transfer::retried;
use crate::fetch::{BadIndex, Context, FILLS, FetchError, Kit, LayerFetch, Tier, Verify as VerifyRule};
use crate::modelkit::Layer;
use crate::reference::Reference;
use crate::report::chain;
use crate::source::{BlobId, Source, SourceError};
use crate::units::format_size;

/// So many differences of one index are shown; the rest are counted.
const SHOWN: usize = 20;

/// Reads every layer of a kit and compares it with the manifest, and its index with it
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs verify [OPTIONS] <REF>",
    after_help = "\
Everything is read from where it is, whatever the cache holds; nothing but indexes is kept. It goes
on after a layer that is wrong. The exit code is 0 if all is right, and 1 if anything is not.

Examples:
  kitfs verify ghcr.io/team/llama:8b
  kitfs verify llama:8b --filter docs        these layers alone
  kitfs verify --json oci:kits/llama"
)]
pub(super) struct Verify {
    /// The kit
    #[arg(value_name = "REF")]
    reference: Reference,
    #[command(flatten)]
    kit: KitArgs,
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    progress: ProgressArgs,
}

/// What is wrong with a layer, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrong {
    Differs,
    Broken,
    Unreadable,
    DiffId,
    IndexMissing,
    IndexInvalid,
    IndexUnreadable,
    IndexDiffers,
    HeadDiffers,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Differs => "differs",
            Self::Broken => "broken",
            Self::Unreadable => "unreadable",
            Self::DiffId => "diffId differs",
            Self::IndexMissing => "index missing",
            Self::IndexInvalid => "index invalid",
            Self::IndexUnreadable => "index unreadable",
            Self::IndexDiffers => "index differs",
            Self::HeadDiffers => "index head differs",
        })
    }
}

/// One thing that is wrong with a layer.
#[derive(Debug)]
struct Problem {
    wrong: Wrong,
    /// What exactly, a line for each.
    said: Vec<String>,
    /// How many there are, said or not.
    count: u64,
}

impl Problem {
    fn new(wrong: Wrong, what: impl Into<String>) -> Self {
        Self { wrong, said: vec![what.into()], count: 1 }
    }
}

/// What was found about one layer.
#[derive(Debug)]
struct Finding {
    layer: Layer,
    /// The indexes that are named for it.
    named: Vec<Named>,
    /// Nothing, where all is right.
    problems: Vec<Problem>,
}

impl Verify {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let (context, kit) = self.kit.open(&self.reference, VerifyRule::Strict).await?;
        let findings = {
            let _progress = Progress::of(&kit.layers, self.progress.mode());
            findings(&context, &kit).await
        };
        let wrong = findings.iter().filter(|finding| !finding.problems.is_empty()).count();
        let mut out = Output::new();
        if self.json.json {
            out.json(&json!({
                "reference": self.reference.to_string(),
                "repository": self.reference.location.name(),
                "digest": kit.resolved.digest,
                "ok": wrong == 0,
                "last_known": kit.resolved.last_known,
                "notes": kit.resolved.notes,
                "layers": findings.iter().map(as_json).collect::<Vec<_>>(),
            }))?;
        } else {
            print(&mut out, &kit, &findings)?;
        }
        out.finish()?;
        if wrong == 0 {
            return Ok(());
        }
        let unread = findings.iter().filter(|finding| finding.is_unread()).count();
        let verdict = match (wrong - unread, unread) {
            (0, _) => "could not be judged",
            (_, 0) => "are wrong",
            (_, _) => "are wrong or could not be judged",
        };
        Err(Failure::failed(format!("{wrong} of {} layers of {} {verdict}", findings.len(), kit.resolved.pinned())))
    }
}

/// What is found about each layer, in the order of the plan. A blob that is used twice is read once from each repository:
/// a parent's copy says nothing about the kit's own.
async fn findings(context: &Context, kit: &Kit) -> Vec<Finding> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut places = HashMap::new();
    for (at, fetch) in kit.layers.iter().enumerate() {
        let repository = kit.resolved.origins.get(fetch.layer.kit).map(|origin| origin.repository.as_str());
        let group = *places.entry((index_key(&fetch.layer), repository)).or_insert(groups.len());
        match groups.get_mut(group) {
            Some(group) => group.push(at),
            None => groups.push(vec![at]),
        }
    }
    let audits = groups.into_iter().map(|group| audit(context, kit, group));
    let found: Vec<_> = futures_util::stream::iter(audits).buffer_unordered(FILLS).collect().await;
    let mut found: Vec<_> = found.into_iter().flatten().collect();
    found.sort_by_key(|(at, _)| *at);
    found.into_iter().map(|(_, finding)| finding).collect()
}

/// Reads one blob and judges the layers at these positions, which all are that blob.
async fn audit(context: &Context, kit: &Kit, group: Vec<usize>) -> Vec<(usize, Finding)> {
    let Some(first) = group.first().and_then(|at| kit.layers.get(*at)) else { return Vec::new() };
    let audited = first.audit().await;
    let mut findings = Vec::new();
    for at in group {
        let (named, mut problems) = named_for(kit, at);
        let layer = &kit.layers[at].layer;
        match &audited {
            Err(NotAudited { error, found }) => {
                kit.note_failure(first, error);
                let mut problem = unread(error);
                if let (Some(named), Some(found)) = (named.first(), found) {
                    problem.said.extend(where_false(context, kit, &kit.layers[at], named, found.clone()).await);
                }
                problems.insert(0, problem);
            }
            Ok(found) => {
                problems.extend(diff_id(layer, found));
                for index in &named {
                    problems.extend(compare(context, kit, &kit.layers[at], index, found.clone()).await);
                }
            }
        }
        findings.push((at, Finding { layer: layer.clone(), named, problems }));
    }
    findings
}

/// The indexes that are named for a layer: by the manifest, whether it is trusted or not, and by what the user trusts.
fn named_for(kit: &Kit, at: usize) -> (Vec<Named>, Vec<Problem>) {
    let mut problems = Vec::new();
    let pinned = Pin::read(&kit.layers[at].layer.annotations).unwrap_or_else(|error| {
        problems.push(Problem::new(Wrong::IndexInvalid, error.to_string()));
        None
    });
    let mut named: Vec<_> = pinned.map(|pin| Named { pin, tier: Tier::Pinned }).into_iter().collect();
    let trusted = kit.resolved.named.get(at).copied().flatten();
    named.extend(trusted.filter(|trusted| pinned != Some(trusted.pin)));
    (named, problems)
}

/// Where bytes that are not the layer's differ from what its index tells; nothing if that can't be had.
async fn where_false(
    context: &Context,
    kit: &Kit,
    fetch: &LayerFetch,
    named: &Named,
    found: Arc<Index>,
) -> Vec<String> {
    let sources = kit.resolved.origins.get(fetch.layer.kit).map_or(&[][..], |origin| &origin.sources);
    let Ok(stated) = named.whole(&fetch.layer, context, sources).await else { return Vec::new() };
    let compared = tokio::task::spawn_blocking(move || diff::compare(&stated, &found, SHOWN)).await;
    let differences = compared.map(|compared| compared.first).unwrap_or_default();
    differences.iter().map(|difference| format!("by its {} index: {difference}", named.tier)).collect()
}

fn unread(error: &FetchError) -> Problem {
    let wrong = match error.root() {
        FetchError::Digest { .. } | FetchError::Poisoned { .. } => Wrong::Differs,
        FetchError::Archive { .. } => Wrong::Broken,
        _ => Wrong::Unreadable,
    };
    Problem::new(wrong, chain(error))
}

fn diff_id(layer: &Layer, found: &Index) -> Option<Problem> {
    let (stated, found) = (layer.diff_id?, found.head().layer().diff_id);
    let what = || format!("the diffId that the kit states is {stated}, the uncompressed layer has {found}");
    (stated != found).then(|| Problem::new(Wrong::DiffId, what()))
}

/// Compares an index that is named for a layer with what the layer gave.
async fn compare(
    context: &Context,
    kit: &Kit,
    fetch: &LayerFetch,
    named: &Named,
    found: Arc<Index>,
) -> Option<Problem> {
    let sources = kit.resolved.origins.get(fetch.layer.kit).map_or(&[][..], |origin| &origin.sources);
    let stated = match named.whole(&fetch.layer, context, sources).await {
        Ok(stated) => stated,
        Err(error) => return Some(index_problem(&error)),
    };
    // An index may have gigabytes: hashing and comparing are for a thread that may take its time.
    let pin = named.pin;
    let compared = tokio::task::spawn_blocking(move || differences(&pin, &stated, &found)).await;
    let lost = |_| FetchError::Lost { what: format!("index {}", pin.digest) };
    match compared.map_err(lost) {
        Ok(Some(problem)) => return Some(problem),
        Ok(None) => {}
        Err(error) => return Some(index_problem(&error)),
    }
    // It may have come from the cache, and be gone where others look for it.
    still_there(context, pin, sources).await.err().map(|error| index_problem(&error))
}

/// Where an index differs from what the layer gave, or else what names it from the index.
fn differences(named: &Pin, stated: &Index, found: &Index) -> Option<Problem> {
    let differences = diff::compare(stated, found, SHOWN);
    if !differences.is_empty() {
        let said = differences.first.iter().map(Difference::to_string).collect();
        return Some(Problem { wrong: Wrong::IndexDiffers, said, count: differences.count });
    }
    // Digest and size have held. The head is fetched by itself, by what names it.
    let pin = found.pin();
    let head = |pin: &Pin| format!("{}:{}", pin.head_size, pin.head_digest);
    let what = || format!("annotation {HEAD}: the kit says {}, the index's head is {}", head(named), head(&pin));
    (pin != *named).then(|| Problem::new(Wrong::HeadDiffers, what()))
}

fn index_problem(error: &FetchError) -> Problem {
    let wrong = match error.root() {
        FetchError::Index { cause, .. } if matches!(**cause, BadIndex::Missing(_)) => Wrong::IndexMissing,
        FetchError::Source { cause: SourceError::NotFound { .. }, .. } => Wrong::IndexMissing,
        FetchError::Index { cause, .. } if matches!(**cause, BadIndex::Unreadable(_) | BadIndex::NotKept(_)) => {
            Wrong::IndexUnreadable
        }
        FetchError::Index { .. } | FetchError::Source { cause: SourceError::Protocol { .. }, .. } => {
            Wrong::IndexInvalid
        }
        _ => Wrong::IndexUnreadable,
    };
    Problem::new(wrong, chain(error))
}

/// Whether any of the sources has the index. That one lacks it is told only where no other failed in another way.
async fn still_there(context: &Context, pin: Pin, sources: &[Arc<dyn Source>]) -> Result<(), FetchError> {
    let blob = BlobId { digest: pin.digest, size: pin.size };
    let what = format!("index {}", pin.digest);
    let mut failure: Option<FetchError> = None;
    for source in sources {
        let ask = || async {
            match source.blob(&blob, 0..1).await {
                // Who ignores ranges has it.
                Ok(_) | Err(SourceError::RangeIgnored { .. }) => Ok(()),
                Err(error) => Err(error),
            }
        };
        // Commands lift the deadline of names.
        let Err(error) = retried(&what, context.limits.read_timeout, ask).await else { return Ok(()) };
        let is_missing = |error: &FetchError| index_problem(error).wrong == Wrong::IndexMissing;
        if !is_missing(&error) || failure.as_ref().is_none_or(is_missing) {
            failure = Some(error);
        }
    }
    failure.map_or(Ok(()), Err)
}

impl Finding {
    /// Whether all that can be said is that something could not be read.
    fn is_unread(&self) -> bool {
        let unread = |problem: &Problem| matches!(problem.wrong, Wrong::Unreadable | Wrong::IndexUnreadable);
        !self.problems.is_empty() && self.problems.iter().all(unread)
    }

    fn status(&self) -> String {
        let words: Vec<_> = self.problems.iter().map(|problem| problem.wrong.to_string()).collect();
        if words.is_empty() { "ok".to_owned() } else { words.join(", ") }
    }

    fn trust(&self) -> String {
        let tiers: Vec<_> = self.named.iter().map(|named| named.tier.to_string()).collect();
        if tiers.is_empty() { "no index".to_owned() } else { tiers.join(", ") }
    }
}

fn as_json(finding: &Finding) -> Value {
    let Finding { layer, named, problems } = finding;
    let index = |named: &Named| json!({ "digest": named.pin.digest, "size": named.pin.size, "trust": named.tier });
    let problem = |problem: &Problem| {
        let Problem { wrong, said, count } = problem;
        json!({ "status": wrong.to_string(), "count": count, "differences": said })
    };
    json!({
        "type": layer.kind,
        "path": layer.path,
        "digest": layer.digest,
        "size": layer.size,
        "kit": layer.kit,
        "status": finding.status(),
        "indexes": named.iter().map(index).collect::<Vec<_>>(),
        "problems": problems.iter().map(problem).collect::<Vec<_>>(),
    })
}

fn print(out: &mut Output, kit: &Kit, findings: &[Finding]) -> Result<(), Failure> {
    out.line(kit.resolved.pinned())?;
    let mut table = vec![["STATUS", "INDEX", "TYPE", "PATH", "SIZE", "LAYER"].map(str::to_owned).to_vec()];
    for finding in findings {
        let layer = &finding.layer;
        let kind = layer.kind.name().to_owned();
        let path = printable(layer.path.as_bytes());
        let size = format_size(layer.size);
        table.push(vec![finding.status(), finding.trust(), kind, path, size, layer.digest.to_string()]);
    }
    out.table(&table)?;
    for finding in findings {
        for problem in &finding.problems {
            out.line("")?;
            out.line(format_args!("{}: {}", printable(finding.layer.label().as_bytes()), problem.wrong))?;
            for line in &problem.said {
                out.line(format_args!("  {}", printable(line.as_bytes())))?;
            }
            let more = problem.count.saturating_sub(problem.said.len() as u64);
            if more > 0 {
                out.line(format_args!("  and {more} more differences"))?;
            }
        }
    }
    Ok(())
}
