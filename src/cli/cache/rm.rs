//! `kitfs cache rm`: forgets kits, and removes what only they have.

use std::collections::HashSet;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::super::Failure;
use super::super::options::{CacheArgs, JsonArgs};
use super::super::output::{self, Output};
use super::{Outcome, mounted, name};
use crate::cache::{Cache, KitRecord};
use crate::digest::Digest;
use crate::fetch::resolve::record::absolute;
use crate::inventory::{Inventory, KitState};
use crate::reference::Reference;

/// The fewest digits of a digest that name a kit: as many as are shown.
const SHORTEST: usize = 12;

/// Removes kits from the cache: what no other kit has, and that they are kept
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs cache rm [OPTIONS] <REF>...",
    after_help = "\
REF is a reference as it was mounted or pulled, or a digest, or the first 12 digits of one. A tag
means the kit that it led to last; no registry is asked. What is open stays until `kitfs cache gc`.

Examples:
  kitfs cache rm ghcr.io/team/llama:8b
  kitfs cache rm sha256:0f4b22aefbde
  kitfs cache rm --all --dry-run             what it would free"
)]
pub(super) struct Rm {
    /// The kits
    #[arg(value_name = "REF", required_unless_present = "all", conflicts_with = "all")]
    kits: Vec<String>,
    /// Remove all kits
    #[arg(long)]
    all: bool,
    /// Remove kits that are mounted, too: mounts then fetch again what they read
    #[arg(long)]
    force: bool,
    /// Show what would go; remove nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    json: JsonArgs,
}

impl Rm {
    pub(super) fn run(self) -> Result<(), Failure> {
        let cache = self.cache.open()?;
        let records: Vec<KitRecord> = cache.kits()?.into_iter().map(|(record, _)| record).collect();
        let mut chosen = HashSet::new();
        if self.all {
            chosen.extend(records.iter().map(|record| record.digest));
        }
        for text in &self.kits {
            chosen.insert(find(&cache, &records, text)?);
        }
        if !self.force {
            refuse_mounted(&cache, &records, &chosen)?;
        }
        let inventory = Inventory::take(&cache)?;
        let is_chosen = |kit: &KitState| chosen.contains(&kit.record.digest);
        let share = inventory.only_in(is_chosen);
        let mut outcome = Outcome::default();
        outcome.remove(&cache, &share, self.dry_run)?;
        let kits: Vec<&KitState> = inventory.kits.iter().filter(|kit| is_chosen(kit)).collect();
        let mut out = Output::new();
        if self.json.json {
            out.json(&json!({
                "dry_run": self.dry_run,
                "kits": kits.iter().map(|kit| as_json(kit)).collect::<Vec<_>>(),
                "removed": outcome.removed,
                "in_use": outcome.in_use,
            }))?;
        } else {
            let verb = if self.dry_run { "would remove" } else { "removed" };
            for kit in kits {
                let (name, digest) = name(kit);
                out.line(format_args!("{verb} {name} {digest}"))?;
            }
            let verb = if self.dry_run { "would free" } else { "freed" };
            out.line(format_args!("{verb} {}", outcome.removed))?;
            if outcome.in_use.items > 0 {
                output::say(
                    "note",
                    format!(
                        "{} are in use and stay; once they are closed, `kitfs cache gc` removes them",
                        outcome.in_use
                    ),
                );
            }
        }
        out.finish()
    }
}

fn as_json(kit: &KitState) -> Value {
    json!({ "digest": kit.record.digest, "references": kit.record.references, "kept": kit.record.is_kept() })
}

/// The kit that a text names.
fn find(cache: &Cache, records: &[KitRecord], text: &str) -> Result<Digest, Failure> {
    let by_reference = text.parse::<Reference>().ok().map(|reference| by_reference(cache, records, &reference));
    if let Some(found) = by_reference.transpose()?.flatten() {
        return Ok(found);
    }
    let digits = text.strip_prefix("sha256:").unwrap_or(text);
    let is_hex = digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let mut found = Vec::new();
    if is_hex && digits.len() >= SHORTEST {
        found.extend(records.iter().map(|record| record.digest).filter(|digest| digest.hex().starts_with(digits)));
    }
    match found[..] {
        [found] => Ok(found),
        [] => Err(unknown(cache, records, text)),
        [..] => Err(Failure::failed(format!(
            "{text} is the beginning of {} digests in the cache; give more digits",
            found.len()
        ))),
    }
}

/// The kit that was opened by a reference. Several may have been, where the tag has moved: then it is the one that the tag
/// led to last, or else the one that was used last.
fn by_reference(cache: &Cache, records: &[KitRecord], reference: &Reference) -> Result<Option<Digest>, Failure> {
    let asked = absolute(reference);
    if let Some(digest) = asked.digest {
        let known = |record: &&KitRecord| record.digest == digest || record.blobs.contains(&digest);
        // The record has the repository that it was had from last; a copy of the kit in another one has its name only.
        let is_from = |text: &String| text.parse::<Reference>().is_ok_and(|known| known.location == asked.location);
        let is_there =
            |record: &&KitRecord| record.repository == asked.location.name() || record.references.iter().any(is_from);
        // An image index may have led to several kits.
        let same = records.iter().filter(known).filter(is_there);
        return Ok(same.map(|record| record.digest).next_back());
    }
    let same = |text: &String| {
        text.parse::<Reference>().is_ok_and(|known| {
            known.location == asked.location
                && known.tag() == asked.tag()
                && (known.digest.is_none() || known.tag.is_some())
        })
    };
    let named: Vec<_> = records.iter().filter(|record| record.references.iter().any(same)).collect();
    let led_to = cache.known(&format!("{}:{}", asked.location.name(), asked.tag()))?.map(|known| known.digest);
    let by_tag = named.iter().find(|record| led_to.is_some_and(|digest| record.blobs.contains(&digest)));
    Ok(by_tag.or(named.last()).map(|record| record.digest))
}

fn unknown(cache: &Cache, records: &[KitRecord], text: &str) -> Failure {
    let root = cache.root().display();
    if records.is_empty() {
        return Failure::failed(format!("{text} is not in the cache {root}, which holds no kit"));
    }
    let known = records.iter().map(|record| format!("  {} {}", record.name(), record.digest.short()));
    let known = known.collect::<Vec<_>>().join("\n");
    Failure::failed(format!("{text} is not in the cache {root}; there are\n{known}"))
}

/// Refuses to remove what is being served: the mount would fetch it again, and not survive without its registry.
fn refuse_mounted(cache: &Cache, records: &[KitRecord], chosen: &HashSet<Digest>) -> Result<(), Failure> {
    let mounted = mounted(cache)?;
    let mut served = Vec::new();
    for record in records.iter().filter(|record| chosen.contains(&record.digest)) {
        let dirs: &[PathBuf] = mounted.get(&record.digest).map_or(&[], Vec::as_slice);
        let name = record.name();
        served.extend(dirs.iter().map(|dir| format!("{name} is mounted on {}", dir.display())));
    }
    if served.is_empty() {
        return Ok(());
    }
    Err(Failure::failed(format!("{}; unmount it, or remove it with --force", served.join("; "))))
}
