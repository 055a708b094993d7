//! What is told: each tag and what became of it, what was copied, and before it is done what it would cost a node.

use serde_json::{Map, Value, json};

use super::plan::{Item, Plan};
use super::{Origin, Tools};
use crate::cli::diff::Summary;
use crate::cli::output::{self, Output, printable};
use crate::cli::{Failure, kits};
use crate::digest::Digest;
use crate::fetch::{Request, Resolved};
use crate::publish::copy::{Copied, Parcel};
use crate::publish::moves::Step;
use crate::publish::write::Count;
use crate::reference::{Location, Reference};
use crate::units::format_size;

/// All that is told.
pub(super) struct Report {
    source: String,
    digest: Digest,
    tags: Vec<Told>,
    copies: Vec<(String, Copied)>,
    warnings: Vec<String>,
    notes: Vec<String>,
}

/// What became, or would become, of one tag.
struct Told {
    name: Reference,
    to: Digest,
    step: Step,
    /// What a node would have to fetch.
    diff: Option<Summary>,
}

impl Report {
    pub(super) fn new(origin: &Origin, warnings: Vec<String>) -> Self {
        let (source, notes) = (origin.reference.to_string(), origin.notes.clone());
        Self { source, digest: origin.digest, tags: Vec::new(), copies: Vec::new(), warnings, notes }
    }

    /// Whether anything was done.
    pub(super) fn tells(&self) -> bool {
        !(self.tags.is_empty() && self.copies.is_empty())
    }

    pub(super) fn done(&mut self, item: &Item) {
        let Item { name, to, step } = item;
        self.tags.push(Told { name: name.clone(), to: *to, step: step.clone(), diff: None });
    }

    pub(super) fn copied(&mut self, repository: String, copied: Copied, parcel: Parcel) {
        output::say_all("note", &parcel.notes);
        self.copies.push((repository, copied));
        self.warnings.extend(parcel.warnings);
        self.notes.extend(parcel.notes);
    }

    /// Takes what would be done, and compares what moves.
    pub(super) async fn preview(&mut self, tools: &Tools, origin: &Origin, plan: &Plan) -> Result<(), Failure> {
        let mut source: Option<Resolved> = None;
        for (part, item) in plan.parts.iter().flat_map(|part| part.items.iter().map(move |item| (part, item))) {
            self.done(item);
            let Step::Move { from } = item.step else { continue };
            if item.to != origin.digest {
                continue;
            }
            if source.is_none() {
                source = Some(resolve(tools, &origin.location, origin.digest).await?);
            }
            let old = resolve(tools, &part.repository.location, from).await;
            match (&source, old, self.tags.last_mut()) {
                (Some(new), Ok(old), Some(told)) => told.diff = Some(Summary::of(&old, new)),
                (_, Err(failure), _) => {
                    let note = format!("{} can't be compared with {from}: {}", item.name, failure.message());
                    output::say("note", &note);
                    self.notes.push(note);
                }
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn print(&self, json: bool, is_preview: bool) -> Result<(), Failure> {
        output::say_all("warning", &self.warnings);
        let mut out = Output::new();
        if json {
            out.json(&self.as_json(is_preview))?;
            return out.finish();
        }
        for told in &self.tags {
            out.line(printable(told.in_words(is_preview).as_bytes()))?;
            if let Some(diff) = &told.diff {
                diff.print(&mut out)?;
            }
        }
        for (repository, Copied { tally, referrers }) in &self.copies {
            let counts = [("uploaded", tally.uploaded), ("mounted", tally.mounted), ("there before", tally.present)];
            let counts =
                counts.map(|(what, Count { blobs, bytes })| format!("{what} {blobs} ({})", format_size(bytes)));
            let kept = if *referrers > 0 { "; the referrer that keeps its indexes went along" } else { "" };
            out.line(printable(format!("{repository}: blobs {}{kept}", counts.join(", ")).as_bytes()))?;
        }
        out.finish()
    }

    fn as_json(&self, is_preview: bool) -> Value {
        let copies = self.copies.iter().map(|(repository, Copied { tally, referrers })| {
            json!({
                "repository": repository,
                "uploaded": tally.uploaded,
                "mounted": tally.mounted,
                "present": tally.present,
                "referrers": referrers,
            })
        });
        json!({
            "source": self.source,
            "digest": self.digest,
            "dry_run": is_preview,
            "tags": self.tags.iter().map(Told::as_json).collect::<Vec<_>>(),
            "copied": copies.collect::<Vec<_>>(),
            "warnings": self.warnings,
            "notes": self.notes,
        })
    }
}

impl Told {
    fn in_words(&self, is_preview: bool) -> String {
        let Self { name, to, step, .. } = self;
        match step {
            Step::Create if is_preview => format!("{name}: would be made, as {to}"),
            Step::Create => format!("{name}: made, as {to}"),
            Step::Move { from } if is_preview => format!("{name}: would move from {from} to {to}"),
            Step::Move { from } => format!("{name}: moved from {from} to {to}"),
            Step::Same => format!("{name}: is {to} already"),
            Step::Behind { newest } => format!("{name}: stays, since {newest} is newer"),
        }
    }

    fn as_json(&self) -> Value {
        let (action, digest) = match &self.step {
            Step::Create => ("created", Some(self.to)),
            Step::Move { .. } => ("moved", Some(self.to)),
            Step::Same => ("same", Some(self.to)),
            Step::Behind { .. } => ("stays", None),
        };
        let mut told = Map::new();
        let mut put = |key: &str, value: Value| drop(told.insert(key.to_owned(), value));
        put("reference", json!(self.name.to_string()));
        put("repository", json!(self.name.location.name()));
        put("tag", json!(self.name.tag));
        put("action", json!(action));
        if let Some(digest) = digest {
            put("digest", json!(digest));
        }
        match &self.step {
            Step::Move { from } => put("from", json!(from)),
            Step::Behind { newest } => put("newest", json!(newest)),
            Step::Create | Step::Same => {}
        }
        if let Some(diff) = &self.diff {
            put("diff", diff.json());
        }
        Value::Object(told)
    }
}

/// A kit by digest, with its plan.
async fn resolve(tools: &Tools, location: &Location, digest: Digest) -> Result<Resolved, Failure> {
    let reference = Reference { location: location.clone(), tag: None, digest: Some(digest) };
    kits::resolve(&tools.context, &tools.access, &Request::new(reference)).await
}
