//! `kitfs mount --dry-run`: what a mount would show, what a read would fetch, and how it is proved.
//!
//! Layers are listed by their headers, small ones by fetching them. A big one whose files are small or compressed could be
//! listed only by fetching it too; that is left to the mount, and its root stands for it.

use serde_json::{Value, json};

use super::ls::{self, Row};
use super::options::{JsonArgs, ProgressArgs};
use super::output::{self, Output, printable};
use super::progress::Progress;
use super::{Failure, walk};
use crate::fetch::{Context, FetchError, Kit, LayerFetch, Probed, Resolved};
use crate::fs::{Fs, Ino, NodeKind, Ownership};
use crate::path::TreePath;
use crate::units::format_size;

pub(super) async fn run(
    context: Context,
    resolved: Resolved,
    ownership: Ownership,
    json: JsonArgs,
    progress: ProgressArgs,
) -> Result<(), Failure> {
    let kit = Kit::open(&context, resolved);
    let progress = Progress::of(&kit.layers, progress.mode());
    let mut tree = kit.skeleton();
    let Probed { mut warnings, unheard, .. } = kit.probe(&context, &mut tree).await?;
    warnings.splice(0..0, kit.resolved.plan.warnings.iter().cloned());
    let mut layers = Vec::new();
    for (at, layer) in kit.layers.iter().enumerate() {
        let mut described = describe(layer).await?;
        // Who did not answer just now would only be waited for again, for each layer.
        let listed = if unheard.contains(&at) { Ok(None) } else { layer.cheap_listing().await };
        let listing = match listed {
            Err(error) if error.is_refusal() => return Err(error.into()),
            Ok(listing) => listing,
            // The probe has warned of a layer that can't be read.
            Err(error) => {
                tracing::info!(%error, "a layer stays unlisted");
                None
            }
        };
        let conflicts = listing.as_ref().map(|listing| tree.add_listing(at, listing.metas()));
        if let Some(conflict) = conflicts.into_iter().flatten().next() {
            return Err(FetchError::Conflict(kit.describe(&conflict)).into());
        }
        described["listed"] = json!(listing.is_some());
        layers.push(described);
    }
    drop(progress);
    let fs = Fs::new(kit, context, tree, ownership);
    let rows = rows(&fs).await?;
    let resolved = &fs.kit().resolved;
    let mut out = Output::new();
    if json.json {
        out.json(&json!({
            "reference": resolved.pinned(),
            "digest": resolved.digest,
            "trust": fs.kit().tier(),
            "bytes": fs.kit().size(),
            "entries": rows.iter().map(Row::json).collect::<Vec<_>>(),
            "layers": layers,
            "last_known": resolved.last_known,
            "notes": resolved.notes,
            "warnings": warnings,
        }))?;
    } else {
        output::say_all("note", &resolved.notes);
        output::say_all("warning", warnings);
        print(&mut out, &fs, &rows, &layers)?;
    }
    out.finish()
}

/// All that is known of the tree, in the order of paths.
async fn rows(fs: &Fs) -> Result<Vec<Row>, Failure> {
    let mut rows = Vec::new();
    let mut pending = vec![(TreePath::root(), Ino::ROOT)];
    while let Some((dir, ino)) = pending.pop() {
        for (name, attr) in fs.known_entries(ino).map_err(|error| walk::at(&dir, error))? {
            let path = dir.join(&TreePath::clean(&name)?)?;
            if attr.kind == NodeKind::Directory {
                pending.push((path.clone(), attr.ino));
            }
            rows.push(Row { name: path.as_bytes().to_vec(), path, attr, target: None });
        }
    }
    rows.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(rows)
}

/// How a layer is before this command asks more of it.
async fn describe(fetch: &LayerFetch) -> Result<Value, Failure> {
    let layer = &fetch.layer;
    let is_cached = fetch.held().await?.is_some_and(|held| held.cached == held.content);
    Ok(json!({
        "type": layer.kind,
        "path": layer.path,
        "digest": layer.digest,
        "size": layer.size,
        "fetch": if is_cached { 0 } else { layer.size },
        "trust": fetch.tier(),
    }))
}

fn print(out: &mut Output, fs: &Fs, rows: &[Row], layers: &[Value]) -> Result<(), Failure> {
    out.line(fs.kit().resolved.pinned())?;
    out.line("")?;
    let width = rows.iter().map(|row| row.attr.size.to_string().len()).max().unwrap_or(0);
    for row in rows {
        let before = format!("{} {:>width$} ", ls::mode(&row.attr), row.attr.size);
        out.name(before, &row.name, if row.attr.kind == NodeKind::Directory { "/" } else { "" })?;
    }
    out.line("")?;
    let mut table = vec![["TYPE", "PATH", "TRUST", "FIRST READ FETCHES", "LAYER"].map(str::to_owned).to_vec()];
    for layer in layers {
        let text = |key: &str| printable(layer[key].as_str().unwrap_or_default().as_bytes());
        let fetch = match layer["fetch"].as_u64() {
            Some(0) | None => "nothing, it is cached".to_owned(),
            Some(bytes) => format_size(bytes),
        };
        let unlisted = if layer["listed"] == json!(false) { ", for its names too" } else { "" };
        table.push(vec![text("type"), text("path"), text("trust"), format!("{fetch}{unlisted}"), text("digest")]);
    }
    out.table(&table)
}
