//! `kitfs diff`: what is different between two kits, and what it costs a node to go from one to the other.
//!
//! - [`summary`]: layer by layer, from two manifests alone.
//! - [`files`]: file by file, as far as indexes and headers tell.

mod files;
mod summary;

use clap::Args;
use serde_json::{Value, json};

use super::Failure;
use super::inspect::look_for_indexes;
use super::kits::KitArgs;
use super::options::{JsonArgs, ProgressArgs};
use super::output::{self, Output};
use super::progress::Progress;
use crate::fetch::{Kit, Verify};
use crate::reference::Reference;
use files::Files;
pub(super) use summary::{Change, Summary};

/// Shows how two kits differ, and what a node with the first fetches for the second
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs diff [OPTIONS] <A> <B>",
    after_help = "\
Files are compared by the indexes of their layers, and layers of up to 1 MiB are fetched. Of others the
headers tell names and sizes, unproved; a file of the same size in both is \"unknown\" then, and a layer
whose headers can't be read alone is named. Times and owners don't count.

What is to be fetched is counted for a node that has all of A: nothing of a layer that A has too; of one
that B names an index of, the files that A is not known to have; of any other, all of it. Manifests and
indexes come on top.

Examples:
  kitfs diff ghcr.io/team/llama:production ghcr.io/team/llama:staging
  kitfs diff --layers llama:8b oci:kits/llama        by the manifests alone
  kitfs diff --json llama:1.4.1 llama:1.4.2 | jq .fetch"
)]
pub(super) struct Diff {
    /// The kit that a node has
    #[arg(value_name = "A")]
    from: Reference,
    /// The kit that it is to have
    #[arg(value_name = "B")]
    to: Reference,
    /// Compare layers alone: nothing of them is asked for, not their indexes either
    #[arg(long, conflicts_with = "all")]
    layers: bool,
    /// List files that are the same too
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    kit: KitArgs,
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    progress: ProgressArgs,
}

impl Diff {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let kits = self.kit.open_both([&self.from, &self.to], Verify::Strict).await?;
        let [from, to] = &kits;
        let mut summary = Summary::of(&from.resolved, &to.resolved);
        let mut warnings: Vec<String> = kits.iter().flat_map(|kit| kit.resolved.plan.warnings.clone()).collect();
        let files = if self.layers {
            None
        } else {
            let layers: Vec<_> = kits.iter().flat_map(|kit| kit.layers.iter().cloned()).collect();
            let _progress = Progress::of(&layers, self.progress.mode());
            warnings.extend(look_for_indexes(from).await);
            warnings.extend(look_for_indexes(to).await);
            let files = Files::compare(&summary, from, to, self.all).await?;
            files::count_fetch(&mut summary, from, to);
            Some(files)
        };
        let mut out = Output::new();
        if self.json.json {
            let mut all = summary.json();
            all["references"] = json!([self.from.to_string(), self.to.to_string()]);
            all["notes"] = kits.iter().flat_map(|kit| kit.resolved.notes.clone()).collect();
            all["warnings"] = warnings.into();
            all["files"] = files.as_ref().map_or(Value::Null, Files::json);
            out.json(&all)?;
        } else {
            out.table(&[side("from", from), side("to", to)])?;
            out.line("")?;
            summary.print(&mut out)?;
            if let Some(files) = &files {
                files.print(&mut out)?;
            }
        }
        out.finish()?;
        if let Some(files) = files {
            output::say_all("note", files.notes());
        }
        Ok(())
    }
}

/// A kit with the tag that it was asked for by, one that was left out too.
fn side(name: &str, kit: &Kit) -> Vec<String> {
    let reference = &kit.resolved.reference;
    let asked = match reference.digest {
        None => format!("{}:{}", reference.location.name(), reference.tag()),
        Some(_) => reference.to_string(),
    };
    vec![name.to_owned(), output::printable(asked.as_bytes()), kit.resolved.digest.to_string()]
}
