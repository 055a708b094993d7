//! `kitfs cache gc`: removes what is of no use, and what is above the limit.

use std::collections::HashSet;
use std::time::{Duration, SystemTime};
use std::{fs, io};

use clap::Args;
use serde_json::{Value, json};

use super::super::Failure;
use super::super::options::{CacheArgs, JsonArgs};
use super::super::output::{self, Output};
use super::{Count, Outcome};
use crate::cache::usage::Item;
use crate::cache::{Cache, Removed};
use crate::digest::Digest;
use crate::inventory::{Inventory, settled};
use crate::units::format_size;

/// So long the beginning of a layer is kept that a killed process has fetched, for the next one to go on with.
const RESUMED: Duration = Duration::from_secs(7 * 24 * 3600);

/// Removes what is of no use to any kit, and what is above the limit
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs cache gc [OPTIONS]",
    after_help = "\
What killed processes left, what was set aside as damaged, and what belongs to no kit goes; then,
where the cache is near its limit, what was used longest ago, as it would by itself. What is in use
stays.

Examples:
  kitfs cache gc --dry-run                   what would go
  kitfs cache gc --cache-size 50GiB          and down to this limit"
)]
pub(super) struct Gc {
    /// Show what would go; remove nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    json: JsonArgs,
}

/// What was removed, and why.
#[derive(Debug, Default)]
struct Collected {
    /// What nothing uses: left by killed processes, or set aside.
    leftovers: Outcome,
    /// What belongs to no kit.
    loose: Outcome,
    /// What was above the limit.
    evicted: Count,
}

impl Gc {
    pub(super) fn run(self) -> Result<(), Failure> {
        let cache = self.cache.open()?;
        let inventory = Inventory::take(&cache)?;
        let mut collected = Collected::default();
        self.remove_leftovers(&cache, &inventory, &mut collected.leftovers)?;
        collected.loose.remove(&cache, &inventory.loose(settled()), self.dry_run)?;
        if !self.dry_run {
            forget_directories(&cache, &inventory)?;
        }
        // Counted, as others may have added to it.
        let freed = if self.dry_run { collected.freed() } else { 0 };
        let mut held = cache.usage()?.bytes().saturating_sub(freed);
        let marks = cache.marks(held)?;
        if let Some(marks) = marks.filter(|marks| held > marks.high) {
            // What a dry run has not removed is still there.
            let evicted = cache.evict_to(marks.low + freed, self.dry_run)?;
            collected.evicted = Count { items: evicted.gone.items(), bytes: evicted.gone.bytes() };
            held = evicted.left.saturating_sub(freed);
        }
        let mut out = Output::new();
        if self.json.json {
            out.json(&collected.as_json(self.dry_run, held, marks.map(|marks| marks.limit)))?;
        } else {
            collected.print(&mut out, self.dry_run, held)?;
            if inventory.is_uncertain {
                output::say(
                    "note",
                    "a record or an index of a kit can't be read, so what seems to belong to no kit stays; \
                     `kitfs cache verify --repair` mends that",
                );
            } else if inventory.is_staging {
                output::say(
                    "note",
                    "a layer is being fetched; whose files those are that belong to no kit shows when it is done",
                );
            }
        }
        out.finish()
    }

    fn remove_leftovers(&self, cache: &Cache, inventory: &Inventory, outcome: &mut Outcome) -> Result<(), Failure> {
        for left in cache.leftovers()? {
            let gone = self.dry_run || cache.remove_leftover(&left)?;
            outcome.took(left.bytes, if gone { Removed::Gone } else { Removed::InUse });
        }
        for staging in abandoned(inventory) {
            outcome.took(staging.bytes, cache.remove_staging(&staging.path, self.dry_run)?);
        }
        Ok(())
    }
}

/// Staging that nobody will go on with: of a layer of no kit, or begun long ago. That some of it is held shows when it is
/// to go.
fn abandoned(inventory: &Inventory) -> impl Iterator<Item = &Item> {
    let layers = inventory.kits.iter().flat_map(|kit| &kit.record.layers);
    let keys: HashSet<String> = layers.map(|layer| layer.index_key.hex()).collect();
    let since = SystemTime::now() - RESUMED;
    inventory.staging.iter().filter(move |staging| {
        let name = staging.path.file_name().unwrap_or_default().to_string_lossy();
        !keys.contains(&*name) || staging.used < since
    })
}

/// Forgets what directories served that are no more, or of which no kit is here any more.
fn forget_directories(cache: &Cache, inventory: &Inventory) -> Result<(), Failure> {
    let is_here = |digest: Digest| inventory.kits.iter().any(|kit| kit.record.digest == digest);
    for served in cache.served()? {
        let is_gone = fs::symlink_metadata(&served.dir).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        let is_of_use = inventory.is_uncertain || is_here(served.now) || served.before.is_some_and(is_here);
        if is_gone || !is_of_use {
            cache.forget_served(&served.dir)?;
        }
    }
    Ok(())
}

impl Collected {
    fn freed(&self) -> u64 {
        self.leftovers.removed.bytes + self.loose.removed.bytes + self.evicted.bytes
    }

    fn as_json(&self, dry_run: bool, held: u64, limit: Option<u64>) -> Value {
        json!({
            "dry_run": dry_run,
            "leftovers": self.leftovers,
            "loose": self.loose,
            "evicted": self.evicted,
            "freed": self.freed(),
            "bytes": held,
            "limit": limit,
        })
    }

    fn print(&self, out: &mut Output, dry_run: bool, held: u64) -> Result<(), Failure> {
        let [removed, freed] = if dry_run { ["would remove", "would free"] } else { ["removed", "freed"] };
        let reasons = [
            (self.leftovers.removed, "left by killed processes, or damaged"),
            (self.loose.removed, "of no kit"),
            (self.evicted, "used longest ago, to keep the limit"),
        ];
        for (count, why) in reasons {
            if count.items > 0 {
                out.line(format_args!("{removed} {count}: {why}"))?;
            }
        }
        out.line(format_args!("{freed} {}; {} are left", format_size(self.freed()), format_size(held)))?;
        let stays = [self.leftovers.in_use, self.loose.in_use].into_iter().filter(|count| count.items > 0);
        output::say_all("note", stays.map(|count| format!("{count} stay, as they are in use")));
        Ok(())
    }
}
