//! `kitfs inspect`: what a kit consists of, without a mount and without its layers.

use std::collections::BTreeMap;

use clap::Args;
use futures_util::{StreamExt as _, future, stream};
use serde_json::{Value, json};

use super::image_index::Shown;
use super::kits::{self, KitArgs};
use super::options::{JsonArgs, LookVerifyArgs, ProgressArgs};
use super::output::{self, Output, printable};
use super::progress::Progress;
use super::{Failure, ls, tags, walk};
use crate::archive::index::annotations::{DIGEST, HEAD, SIZE};
use crate::digest::Digest;
use crate::fetch::resolve::tags::Repository;
use crate::fetch::{Access, Context, FetchError, Kit, LayerFetch, Resolved, resolve_digest};
use crate::fs::{Attr, Fs};
use crate::modelkit::error::ModelKitError;
use crate::object::CHUNK_SIZE;
use crate::path::TreePath;
use crate::reference::{Location, Reference};
use crate::report::chain;
use crate::tagging::Rank;
use crate::units::format_size;

/// So many indexes are looked for at a time: a small request each, and a person waits.
const LOOKS: usize = 32;

/// Shows what a kit consists of: its entries with layers, sizes and trust
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs inspect [OPTIONS] <REF> [PATH]",
    after_help = "\
Examples:
  kitfs inspect ghcr.io/team/llama:8b
  kitfs inspect llama:8b weights/a.gguf      the entry that holds a file, and the file
  kitfs inspect --tags ghcr.io/team/llama:8b who else points at this digest
  kitfs inspect llama:8b --manifest | sha256sum"
)]
pub(super) struct Inspect {
    /// The kit
    #[arg(value_name = "REF")]
    reference: Reference,
    /// A file or directory of it
    #[arg(value_name = "PATH", value_parser = walk::parse_path)]
    path: Option<TreePath>,
    /// Print the manifest, byte for byte
    #[arg(long, group = "document", conflicts_with_all = ["json", "path"])]
    manifest: bool,
    /// Print the config, byte for byte
    #[arg(long, group = "document", conflicts_with_all = ["json", "path"])]
    config: bool,
    /// Print the Kitfile, byte for byte as it is in the mount
    #[arg(long, group = "document", conflicts_with_all = ["json", "path"])]
    kitfile: bool,
    /// Show all tags that point at the digest: in a registry, that is a request for each tag of the repository
    #[arg(long, conflicts_with = "document")]
    tags: bool,
    #[command(flatten)]
    kit: KitArgs,
    #[command(flatten)]
    verify: LookVerifyArgs,
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    progress: ProgressArgs,
}

impl Inspect {
    pub(super) async fn run(self) -> Result<(), Failure> {
        kits::say_whose(&self.kit.fetch.cache, &self.kit.connection)?;
        let (context, access, resolved) = self.kit.follow(&self.reference, self.verify.verify()).await?;
        let (context, kit) = match resolved {
            Ok(resolved) => kits::opened(context, resolved),
            Err(error) => return self.undecided(context, access, &error).await,
        };
        let mut out = Output::new();
        if let Some(bytes) = self.document(&kit.resolved)? {
            out.bytes(bytes)?;
            return out.finish();
        }
        let pointing = self.pointing(&context, &access, &kit).await?;
        let shown = kit.resolved.index.clone();
        let index = shown.as_ref().map(|(digest, index)| Shown::new(*digest, index, self.kit.choice()));
        let mut header = header(&kit.resolved);
        header["tags"] = json!(pointing.of(&kit.resolved.digest));
        header["index"] = json!(index.as_ref().map(|index| index.json(pointing.of(&index.digest))));
        let warnings = look_for_indexes(&kit).await;
        if let Value::Array(all) = &mut header["warnings"] {
            all.extend(warnings.into_iter().map(Value::from));
        }
        let (kit, entries, file) = match &self.path {
            None => {
                let entries = kit.layers.iter().map(|layer| entry(&kit, layer)).collect();
                (kit, entries, None)
            }
            Some(path) => self.file(kit, context, path).await?,
        };
        if self.json.json {
            let mut all = header;
            all["entries"] = Value::Array(entries);
            if let Some(file) = file {
                all["file"] = file;
            }
            out.json(&all)?;
        } else {
            print(&mut out, &kit, index.as_ref(), &header, &entries, file.as_ref())?;
        }
        out.finish()
    }

    /// Shows an image index of which no kit can be taken, since several could: whoever looks into it wants to know which.
    /// For whatever else is asked, that it can't be told is the answer.
    async fn undecided(&self, context: Context, access: Access, error: &FetchError) -> Result<(), Failure> {
        let failure = kits::not_resolved(&self.reference, &access, error);
        let is_index = matches!(error.root(), FetchError::ModelKit(ModelKitError::Ambiguous { .. }));
        if !is_index || self.manifest || self.config || self.kitfile || self.path.is_some() {
            return Err(failure);
        }
        let Ok(resolved) = resolve_digest(&context, &access, &self.reference).await else { return Err(failure) };
        // It may be a parent that could be several.
        let Some(index) = &resolved.index else { return Err(failure) };
        let shown = Shown::new(resolved.digest, index, self.kit.choice());
        if !shown.is_undecided() {
            return Err(failure);
        }
        let pointing = self.tags_at(&context, &access, &[resolved.digest]).await?;
        let tags = pointing.of(&resolved.digest);
        let mut out = Output::new();
        if self.json.json {
            out.json(&json!({
                "reference": self.reference.to_string(),
                "repository": self.reference.location.name(),
                "digest": resolved.digest,
                "index": shown.json(tags),
                "tags": tags,
                "last_known": resolved.last_known,
                "notes": resolved.notes,
            }))?;
        } else {
            output::say_all("note", &resolved.notes);
            let mut lines = vec![("reference", printable(self.reference.to_string().as_bytes()))];
            lines.extend(shown.lines());
            lines.extend(tags.map(|tags| ("tags", in_words(tags))));
            out.table(&lines.into_iter().map(|(key, value)| vec![key.to_owned(), value]).collect::<Vec<_>>())?;
            out.line("")?;
            shown.print_kits(&mut out)?;
        }
        out.finish()
    }

    /// The tags that point at the kit, and at the image index that led to it.
    async fn pointing(&self, context: &Context, access: &Access, kit: &Kit) -> Result<Pointing, Failure> {
        let mut digests = vec![kit.resolved.digest];
        digests.extend(kit.resolved.index.as_ref().map(|(digest, _)| *digest));
        self.tags_at(context, access, &digests).await
    }

    /// The tags that point at some digests, if they are asked for, or cost nothing.
    async fn tags_at(&self, context: &Context, access: &Access, digests: &[Digest]) -> Result<Pointing, Failure> {
        let location = &self.reference.location;
        if !self.tags && matches!(location, Location::Registry { .. }) {
            return Ok(Pointing(None));
        }
        let repository = Repository::open(context, access, location)?;
        let all = match repository.tags().await {
            Ok(all) => tags::point(&repository, all, self.progress.mode()).await?,
            // A kit that was found by its digest may be in no list.
            Err(error) if !self.tags => {
                tracing::debug!(error = chain(&error), "the tags can't be told");
                return Ok(Pointing(None));
            }
            Err(error) => return Err(error.into()),
        };
        let mut found: BTreeMap<Digest, Vec<String>> = digests.iter().map(|digest| (*digest, Vec::new())).collect();
        for tag in all {
            if let Some(tags) = tag.digest.and_then(|digest| found.get_mut(&digest)) {
                tags.push(tag.name);
            }
        }
        found.values_mut().for_each(|tags| tags.sort_by_cached_key(|tag| Rank::of(tag)));
        Ok(Pointing(Some(found)))
    }

    /// The document that was asked for, if one was.
    fn document<'a>(&self, resolved: &'a Resolved) -> Result<Option<&'a [u8]>, Failure> {
        if self.manifest {
            return Ok(Some(resolved.manifest.bytes()));
        }
        if self.config {
            return Ok(Some(resolved.config.bytes()));
        }
        if !self.kitfile {
            return Ok(None);
        }
        let kitfile = resolved.kitfile.as_ref().map(|bytes| &bytes.bytes()[..]);
        let missing = || Failure::failed(format!("{} has no Kitfile, or the filters leave it out", resolved.pinned()));
        kitfile.ok_or_else(missing).map(Some)
    }

    /// The entries that hold `path`, and what it names.
    async fn file(
        &self,
        kit: Kit,
        context: Context,
        path: &TreePath,
    ) -> Result<(Kit, Vec<Value>, Option<Value>), Failure> {
        let _progress = Progress::of(&kit.layers, self.progress.mode());
        let mut tree = kit.skeleton();
        let unverified = self.verify.is_none();
        if unverified {
            kits::list_unverified(&kit, &mut tree, path).await?;
            kits::say_unverified("names, modes and sizes");
        }
        // The file system takes the kit; the layers are shared with this one.
        let shown = Kit { resolved: kit.resolved.clone(), layers: kit.layers.clone() };
        let fs = kits::look(kit, context, tree);
        let (found, attr) = walk::find(&fs, path, false).await?;
        let mut file = describe(&fs, &found, &attr).await;
        if unverified {
            file["verified"] = json!(false);
        }
        let layer = file["layer"].as_str().map(str::to_owned);
        let holds = |fetch: &LayerFetch| match &layer {
            Some(digest) => fetch.layer.digest.to_string() == *digest && found.is_within(&fetch.layer.root),
            None => found.is_within(&fetch.layer.root) || fetch.layer.root.is_within(&found) && !found.is_root(),
        };
        let holders = shown.layers.iter().filter(|fetch| holds(fetch));
        let entries = holders.map(|layer| entry(&shown, layer)).collect();
        Ok((shown, entries, Some(file)))
    }
}

/// The tags that point at some digests, in their order; `None` where they were not asked for.
struct Pointing(Option<BTreeMap<Digest, Vec<String>>>);

impl Pointing {
    fn of(&self, digest: &Digest) -> Option<&[String]> {
        self.0.as_ref()?.get(digest).map(Vec::as_slice)
    }
}

/// Tags for people.
fn in_words(tags: &[String]) -> String {
    if tags.is_empty() { "none".to_owned() } else { printable(tags.join(", ").as_bytes()) }
}

/// Looks for all layers' indexes at once. What is wrong with one, or out of reach, is a warning: the manifest can be shown.
pub(super) async fn look_for_indexes(kit: &Kit) -> Vec<String> {
    let looks = kit.layers.iter().map(|layer| async move {
        let Err(error) = layer.look_for_index_unless_away().await else {
            // The log has told of it.
            return layer.unusable_index().map(str::to_owned);
        };
        let warning = chain(&error);
        output::say("warning", &warning);
        Some(warning)
    });
    stream::iter(looks).buffered(LOOKS).filter_map(future::ready).collect().await
}

/// What the manifest and the config say of the kit as a whole.
fn header(resolved: &Resolved) -> Value {
    let config: Value = serde_json::from_slice(resolved.config.bytes()).unwrap_or_default();
    // A Kitfile has a package, a ModelPack a descriptor.
    let said = |field: &str| {
        let found = config.pointer(&format!("/package/{field}"));
        let found = found.or_else(|| config.pointer(&format!("/descriptor/{field}")));
        found.and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned)
    };
    json!({
        "reference": resolved.reference.to_string(),
        "repository": resolved.reference.location.name(),
        "digest": resolved.digest,
        "config": {
            "media_type": resolved.document.config.media_type,
            "digest": resolved.document.config.digest,
            "size": resolved.document.config.size,
        },
        "package": { "name": said("name"), "version": said("version"), "description": said("description") },
        "annotations": resolved.document.annotations,
        "kits": resolved.origins,
        "last_known": resolved.last_known,
        "notes": resolved.notes,
        "warnings": resolved.plan.warnings,
    })
}

/// One row: a layer and the Kitfile entry it belongs to.
fn entry(kit: &Kit, fetch: &LayerFetch) -> Value {
    let layer = &fetch.layer;
    // The manifests of parents are read for their plan alone.
    let described = kit.resolved.document.layers.iter().find(|found| layer.kit == 0 && found.digest == layer.digest);
    let none = BTreeMap::new();
    let annotations = described.map_or(&none, |found| &found.annotations);
    json!({
        "type": layer.kind,
        "path": layer.path,
        "name": layer.name,
        "media_type": layer.media_type,
        "digest": layer.digest,
        "diff_id": layer.diff_id,
        "size": layer.size,
        "trust": fetch.tier(),
        "index": index(fetch),
        "kit": layer.kit,
        "annotations": annotations,
    })
}

/// The index by which a layer's content is proved: the one that was made here, else the one that is named. Whether that
/// one is usable is not known where it is out of reach.
fn index(fetch: &LayerFetch) -> Value {
    let named_usable = match fetch.unusable_index() {
        Some(_) => Some(false),
        None => fetch.known().map(|_| true),
    };
    let (digest, size, usable) = match (fetch.index(), fetch.named()) {
        (Some(index), _) => (Digest::of(index.as_bytes()), index.as_bytes().len() as u64, Some(true)),
        (None, Some(named)) => (named.pin.digest, named.pin.size, named_usable),
        (None, None) => return Value::Null,
    };
    json!({ "digest": digest, "size": size, "chunk_size": CHUNK_SIZE, "usable": usable })
}

/// What is known of a file or directory.
async fn describe(fs: &Fs, path: &TreePath, attr: &Attr) -> Value {
    let mut file = ls::attributes(attr);
    file["path"] = json!(String::from_utf8_lossy(path.as_bytes()));
    for (key, attribute) in [
        ("layer", "user.kitfs.layer"),
        ("trust", "user.kitfs.trust"),
        ("cached", "user.kitfs.cached"),
        ("object", "user.kitfs.digest"),
    ] {
        // A directory, the Kitfile and the root have none of these, or others by the same name.
        if !path.is_root()
            && let Ok(value) = fs.getxattr(attr.ino, attribute.as_bytes()).await
        {
            file[key] = json!(String::from_utf8_lossy(&value));
        }
    }
    file
}

/// The text of a JSON value, without quotes; empty for null.
fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => printable(text.as_bytes()),
        other => other.to_string(),
    }
}

fn print(
    out: &mut Output,
    kit: &Kit,
    index: Option<&Shown<'_>>,
    header: &Value,
    entries: &[Value],
    file: Option<&Value>,
) -> Result<(), Failure> {
    let resolved = &kit.resolved;
    let mut lines =
        vec![("kit", printable(resolved.reference.to_string().as_bytes())), ("digest", text(&header["digest"]))];
    lines.extend(index.map(Shown::lines).unwrap_or_default());
    let tags = |value: &Value| {
        let tags = value.as_array()?.iter().filter_map(Value::as_str).map(str::to_owned);
        Some(in_words(&tags.collect::<Vec<_>>()))
    };
    lines.extend(tags(&header["tags"]).map(|tags| ("tags", tags)));
    lines.extend(tags(&header["index"]["tags"]).map(|tags| ("index tags", tags)));
    lines.push(("config", text(&header["config"]["media_type"])));
    for key in ["name", "version"] {
        lines.push((key, text(&header["package"][key])));
    }
    for parent in resolved.origins.iter().skip(1) {
        lines.push(("parent", format!("{}@{}", parent.repository, parent.digest)));
    }
    for (key, value) in &resolved.document.annotations {
        lines.push(("annotation", printable(format!("{key}={value}").as_bytes())));
    }
    let lines = lines.into_iter().filter(|(_, value)| !value.is_empty());
    out.table(&lines.map(|(key, value)| vec![key.to_owned(), value]).collect::<Vec<_>>())?;

    if let Some(index) = index {
        out.line("")?;
        index.print_kits(out)?;
    }
    out.line("")?;
    let titles = ["TYPE", "PATH", "SIZE", "TRUST", "MEDIA TYPE", "LAYER", "DIFF ID"];
    let mut table = vec![titles.map(str::to_owned).to_vec()];
    for entry in entries {
        let size = format_size(entry["size"].as_u64().unwrap_or(0));
        let cells = ["type", "path", "size", "trust", "media_type", "digest", "diff_id"];
        let cell = |key: &str| match key {
            "size" => size.clone(),
            "diff_id" if entry["diff_id"] == entry["digest"] => "same".to_owned(),
            key => text(&entry[key]),
        };
        table.push(cells.map(cell).to_vec());
    }
    out.table(&table)?;
    for entry in entries.iter().filter(|entry| entry["index"].is_object()) {
        let (layer, index) = (text(&entry["digest"]), &entry["index"]);
        let size = |key: &str| format_size(index[key].as_u64().unwrap_or(0));
        let (digest, size, chunks) = (text(&index["digest"]), size("size"), size("chunk_size"));
        let state = match index["usable"].as_bool() {
            Some(true) => "",
            Some(false) => "; NOT USABLE: it proves nothing",
            None => "; out of reach",
        };
        out.line(format_args!("{layer}: index {digest}, {size}, chunks of {chunks}{state}"))?;
    }
    let annotated = entries.iter().filter_map(|entry| Some((entry, entry["annotations"].as_object()?)));
    for (entry, annotations) in annotated {
        // The line above has said it.
        let is_said = |key: &str| entry["trust"] == "pinned" && [DIGEST, SIZE, HEAD].contains(&key);
        for (key, value) in annotations.iter().filter(|(key, _)| !is_said(key)) {
            out.line(format_args!("{}: {}={}", text(&entry["digest"]), printable(key.as_bytes()), text(value)))?;
        }
    }

    let Some(file) = file.and_then(Value::as_object) else { return Ok(()) };
    out.line("")?;
    let order = ["path", "type", "mode", "size", "layer", "trust", "cached", "object", "verified"];
    let known = order.iter().filter_map(|key| Some((key, file.get(*key)?)));
    out.table(&known.map(|(key, value)| vec![(*key).to_owned(), text(value)]).collect::<Vec<_>>())
}
