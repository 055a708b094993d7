//! `kitfs resolve`: the digest behind a reference.

use std::sync::Arc;

use clap::Args;
use serde_json::json;

use super::options::{CacheArgs, ConnectionArgs, JsonArgs, NameArgs};
use super::output::{self, Output};
use super::{Failure, kits};
use crate::fetch::{Context, Limits, Verify};
use crate::reference::Reference;

/// Prints the digest that a reference stands for now
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs resolve [OPTIONS] <REF>",
    after_help = "\
Examples:
  kitfs resolve ghcr.io/team/llama:8b        ghcr.io/team/llama@sha256:…
  kitfs mount $(kitfs resolve llama:8b)      what is mounted can't move"
)]
pub(super) struct Resolve {
    /// The kit
    #[arg(value_name = "REF")]
    reference: Reference,
    /// Print the digest alone
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    names: NameArgs,
    #[command(flatten)]
    connection: ConnectionArgs,
    #[command(flatten)]
    json: JsonArgs,
}

impl Resolve {
    pub(super) async fn run(self) -> Result<(), Failure> {
        kits::say_whose(&self.cache, &self.connection)?;
        let limits = Limits { meta_timeout: self.names.meta_timeout, ..Limits::default() };
        let context = Context::new(Arc::new(self.cache.open()?), limits, Verify::Strict);
        let access = self.connection.access(&self.names)?;
        let resolved = crate::fetch::resolve::resolve_digest(&context, &access, &self.reference).await;
        let resolved = resolved.map_err(|error| kits::not_resolved(&self.reference, &access, &error))?;
        let repository = self.reference.location.name();
        let mut out = Output::new();
        if self.json.json {
            out.json(&json!({
                "reference": self.reference.to_string(),
                "repository": repository,
                "tag": (self.reference.tag.is_some() || self.reference.digest.is_none()).then(|| self.reference.tag()),
                "digest": resolved.digest,
                "last_known": resolved.last_known,
                "notes": resolved.notes,
            }))?;
        } else {
            let digest = resolved.digest;
            output::say_all("note", resolved.notes);
            if self.quiet { out.line(digest)? } else { out.line(format_args!("{repository}@{digest}"))? }
        }
        out.finish()
    }
}
