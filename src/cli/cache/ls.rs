//! `kitfs cache ls`: what is in the cache, by kit or by object.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::SystemTime;

use clap::Args;
use serde::ser::{Serialize, Serializer};
use serde_json::{Value, json};

use super::super::Failure;
use super::super::options::{CacheArgs, JsonArgs};
use super::super::output::Output;
use super::{Count, free, mounted, name, time};
use crate::cache::{Area, Cache, Usage};
use crate::digest::Digest;
use crate::inventory::{Inventory, KitState, Stored};
use crate::units::format_size;

/// Lists what is in the cache, by kit
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs cache ls [OPTIONS]",
    after_help = "\
HERE is what a kit takes on the disk; SHARED is the part of it that other kits have too, so that
removing the kit frees the rest. The kit that was used last is at the end.

Examples:
  kitfs cache ls
  kitfs cache ls --objects              each file of a kit's content
  kitfs cache ls --json"
)]
pub(super) struct Ls {
    /// List the contents of files, with the kits that hold them
    #[arg(long)]
    objects: bool,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    json: JsonArgs,
}

impl Ls {
    pub(super) fn run(self) -> Result<(), Failure> {
        let cache = self.cache.open()?;
        let inventory = Inventory::take(&cache)?;
        let mut out = Output::new();
        if self.json.json {
            out.json(&self.listing(&cache, &inventory)?)?;
        } else if self.objects {
            print_objects(&mut out, &inventory)?;
        } else {
            print_kits(&mut out, &cache, &inventory)?;
        }
        out.finish()
    }

    fn listing<'a>(&self, cache: &Cache, inventory: &'a Inventory) -> Result<Listing<'a>, Failure> {
        let mounted = mounted(cache)?;
        let held = inventory.usage.bytes();
        Ok(Listing {
            cache: cache.root().to_owned(),
            bytes: held,
            areas: inventory.usage.clone(),
            limit: cache.marks(held)?.map(|marks| marks.limit),
            free: free(cache),
            loose: Count::of(&inventory.loose(SystemTime::now())),
            leftovers: leftovers(cache)?,
            kits: inventory.kits.iter().map(|kit| as_json(kit, &mounted)).collect(),
            objects: self.objects.then_some(Objects(inventory)),
        })
    }
}

/// All of it, for programs.
#[derive(serde::Serialize)]
struct Listing<'a> {
    cache: PathBuf,
    bytes: u64,
    areas: Usage,
    limit: Option<u64>,
    free: Option<u64>,
    loose: Count,
    leftovers: Count,
    kits: Vec<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    objects: Option<Objects<'a>>,
}

/// The objects, written one by one: there may be millions.
struct Objects<'a>(&'a Inventory);

impl Serialize for Objects<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.objects().into_iter().map(|(object, stored)| {
            json!({
                "object": object,
                "size": stored.size,
                "here": stored.bytes,
                "state": if stored.whole { "complete" } else { "partial" },
                "used": time(stored.used),
                "kits": self.0.holders(stored).map(|kit| kit.record.digest).collect::<Vec<_>>(),
            })
        }))
    }
}

fn as_json(kit: &KitState, mounted: &HashMap<Digest, Vec<PathBuf>>) -> Value {
    let layers = kit.record.layers.iter();
    json!({
        "digest": kit.record.digest,
        "repository": kit.record.repository,
        "references": kit.record.references,
        "size": kit.size(),
        "here": kit.bytes,
        "shared": kit.bytes - kit.alone,
        "frees": kit.alone,
        "complete": kit.is_complete(),
        "kept": kit.record.is_kept(),
        "used": time(kit.used),
        "mountpoints": mounted.get(&kit.record.digest).cloned().unwrap_or_default(),
        "layers": layers
            .map(|layer| json!({ "path": layer.path, "digest": layer.digest, "size": layer.size, "kept": layer.kept }))
            .collect::<Vec<_>>(),
    })
}

fn print_kits(out: &mut Output, cache: &Cache, inventory: &Inventory) -> Result<(), Failure> {
    let mounted = mounted(cache)?;
    let titles = ["KIT", "DIGEST", "SIZE", "HERE", "SHARED", "LAST USE", "STATE"];
    let mut table = vec![titles.map(str::to_owned).to_vec()];
    for kit in &inventory.kits {
        let (name, digest) = name(kit);
        let mut state = vec![if kit.is_complete() { "complete".to_owned() } else { part(kit) }];
        state.extend(kit.record.is_kept().then(|| "kept".to_owned()));
        state.extend(mounted.contains_key(&kit.record.digest).then(|| "mounted".to_owned()));
        let sizes = [kit.size(), kit.bytes, kit.bytes - kit.alone].map(format_size);
        let mut row = vec![name, digest];
        row.extend(sizes.into_iter().chain([time(kit.used), state.join(", ")]));
        table.push(row);
    }
    if !inventory.kits.is_empty() {
        out.table(&table)?;
        out.line("")?;
    }
    out.table(&totals(cache, inventory)?)
}

/// How much of a kit is here.
fn part(kit: &KitState) -> String {
    let here = u128::from(kit.contents.here) * 100 / u128::from(kit.size().max(1));
    // What is missing is told, however little it is.
    format!("{} %", here.min(99))
}

/// What killed processes left, and what was set aside.
fn leftovers(cache: &Cache) -> Result<Count, Failure> {
    let mut count = Count::default();
    cache.leftovers()?.iter().for_each(|left| count.add(left.bytes));
    Ok(count)
}

fn totals(cache: &Cache, inventory: &Inventory) -> Result<Vec<Vec<String>>, Failure> {
    let usage = &inventory.usage;
    let held = usage.bytes();
    let row = |key: &str, value: String| vec![key.to_owned(), value];
    let mut lines = vec![row("cache", cache.root().display().to_string())];
    let titles = [
        (Area::Objects, "files"),
        (Area::Partial, "parts of files"),
        (Area::Incoming, "being fetched"),
        (Area::Blobs, "documents"),
        (Area::Indexes, "indexes"),
        (Area::Quarantine, "damaged"),
    ];
    for (area, title) in titles {
        let amount = usage.of(area);
        if amount.items > 0 {
            lines.push(row(title, Count { items: amount.items, bytes: amount.bytes }.to_string()));
        }
    }
    lines.push(row("in all", format_size(held)));
    let limit = cache.marks(held)?.map_or_else(|| "none".to_owned(), |marks| format_size(marks.limit));
    let free = free(cache).map_or_else(String::new, |free| format!("; its disk has {} free", format_size(free)));
    lines.push(row("limit", format!("{limit}{free}")));
    let useless = [("of no kit", Count::of(&inventory.loose(SystemTime::now()))), ("left over", leftovers(cache)?)];
    for (title, count) in useless.into_iter().filter(|(_, count)| count.items > 0) {
        lines.push(row(title, format!("{count}; `kitfs cache gc` removes that")));
    }
    Ok(lines)
}

/// Row by row and not as a table: there may be millions.
fn print_objects(out: &mut Output, inventory: &Inventory) -> Result<(), Failure> {
    let title = ["OBJECT", "SIZE", "HERE", "LAST USE", "STATE"];
    out.line(format_args!(
        "{:<64}  {:<10}  {:<10}  {:<20}  {:<12}  KITS",
        title[0], title[1], title[2], title[3], title[4]
    ))?;
    for (object, stored) in inventory.objects() {
        let kits: Vec<_> = inventory.holders(stored).map(|kit| kit.record.digest.short()).collect();
        let size = stored.size.map_or_else(|| "?".to_owned(), format_size);
        let (here, used, state) = (format_size(stored.bytes), time(stored.used), state(stored));
        let kits = if kits.is_empty() { "none".to_owned() } else { kits.join(",") };
        out.line(format_args!("{object:<64}  {size:<10}  {here:<10}  {used:<20}  {state:<12}  {kits}"))?;
    }
    Ok(())
}

fn state(stored: &Stored) -> String {
    match stored.size {
        _ if stored.whole => "complete".to_owned(),
        Some(size) if size > 0 => {
            let part = u128::from(stored.here(size)) * 100 / u128::from(size);
            format!("partial {} %", part.min(99))
        }
        _ => "partial".to_owned(),
    }
}
