//! `kitfs index`: makes a kit readable in parts, by indexes that its manifest names or that stand beside it.

use clap::Args;
use serde_json::{Value, json};

use super::Failure;
use super::history::HistoryArgs;
use super::kits;
use super::options::{ChoiceArgs, ConnectionArgs, FetchArgs, JsonArgs, ProgressArgs};
use super::output::{self, Output, printable};
use super::progress::Progress;
use super::tag::{ImmutableArgs, recorded};
use crate::archive::index::annotations::is_ours;
use crate::digest::Digest;
use crate::fetch::{Access, Context, Kit, Request, Resolved, Trust, Verify};
use crate::history::{Action, Event};
use crate::mount::StateDir;
use crate::publish::write::Count;
use crate::publish::{self, Edition, PublishError, Tally, Writer};
use crate::reference::{DEFAULT_TAG, Reference};
use crate::report::chain;
use crate::units::format_size;

/// Makes a kit readable in parts: reads it once, and writes an index of each layer
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs index [OPTIONS] <SRC> [DST]",
    after_help = "\
With DST the kit is written again: the same config and layers, which are not uploaded where they
are, and a manifest that names the indexes, with a digest of its own. Without DST the kit stays as
it is, and the indexes are put beside it under a digest that a mount is told to trust.

Examples:
  kitfs index ghcr.io/team/llama:8b ghcr.io/team/llama:8b-indexed
  kitfs index oci:kits/llama:8b ghcr.io/team/llama    keeps the tag
  kitfs index --replace llama:8b llama:8b             moves the tag
  kitfs index ghcr.io/team/llama:8b                   leaves the kit alone"
)]
pub(super) struct Index {
    /// The kit
    #[arg(value_name = "SRC")]
    source: Reference,
    /// Where the indexed kit goes [default tag: SRC's]
    #[arg(value_name = "DST")]
    target: Option<Reference>,
    /// Move the tag of DST if it points at another manifest
    #[arg(long, requires = "target")]
    replace: bool,
    /// Add an annotation to the manifest; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_annotation, requires = "target")]
    annotation: Vec<(String, String)>,
    #[command(flatten)]
    immutable: ImmutableArgs,
    #[command(flatten)]
    history: HistoryArgs,
    #[command(flatten)]
    choice: ChoiceArgs,
    #[command(flatten)]
    fetch: FetchArgs,
    #[command(flatten)]
    connection: ConnectionArgs,
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    progress: ProgressArgs,
}

/// What was written, and where.
struct Written {
    /// The repository and, where the kit was written, its tag.
    name: Reference,
    edition: Edition,
    tally: Tally,
    /// Whether the kit was left as it is.
    is_beside: bool,
    /// Whether the kit was not there before, or not under this tag.
    wrote_kit: bool,
    /// Whether what keeps its indexes was not there before.
    wrote_referrer: bool,
}

impl Index {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let name = self.target()?;
        kits::say_whose(&self.fetch.cache, &self.connection)?;
        let context = self.fetch.context(&self.connection, Verify::Strict)?;
        let access = self.fetch.access(&self.connection)?;
        // The indexes that the kit names already are not looked at: they are made anew.
        let mut request = Request { trust: Trust::Layer, ..Request::new(self.source.clone()) };
        self.choice.apply(&mut request);
        let resolved = kits::resolve(&context, &access, &request).await?;
        output::say_all("note", &resolved.notes);
        output::say_all("warning", &resolved.plan.warnings);
        let kit = Kit::open(&context, resolved);
        let written = match &name {
            Some(name) => self.write_kit(name, &context, &access, &kit).await?,
            None => self.write_beside(&context, &access, &kit).await?,
        };
        let notes = notes(&kit.resolved, &written);
        let mut out = Output::new();
        if self.json.json {
            out.json(&as_json(&kit.resolved, &written, &notes))?;
        } else {
            print(&mut out, &kit.resolved, &written)?;
            output::say_all("note", &notes);
        }
        out.finish()
    }

    /// DST with the tag that it will get.
    fn target(&self) -> Result<Option<Reference>, Failure> {
        let mut keys: Vec<&str> = self.annotation.iter().map(|(key, _)| key.as_str()).collect();
        keys.sort_unstable();
        if let Some(pair) = keys.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Failure::usage(format!("--annotation: {:?} is given twice", pair[0])));
        }
        let Some(target) = &self.target else { return Ok(None) };
        if target.digest.is_some() {
            let why = "DST can't have a digest, which follows from what is written; give it a tag";
            return Err(Failure::usage(format!("{target}: {why}")));
        }
        let of_source = match &self.source {
            source if source.tag_was_omitted() => Some(DEFAULT_TAG.to_owned()),
            source => source.tag.clone(),
        };
        let tag = target.tag.clone().or(of_source);
        let missing = || Failure::usage(format!("{target}: neither it nor SRC has a tag; give DST one"));
        Ok(Some(Reference { tag: Some(tag.ok_or_else(missing)?), ..target.clone() }))
    }

    /// Writes the kit again, with its indexes named in its manifest.
    async fn write_kit(
        &self,
        name: &Reference,
        context: &Context,
        access: &Access,
        kit: &Kit,
    ) -> Result<Written, Failure> {
        let resolved = &kit.resolved;
        let writer = writer(name, context, access, resolved).await?;
        let tally = writer.try_out().await?;
        let edition = Edition::pinned(resolved, self.derive(kit).await?, &self.annotation)?;
        let digest = edition.kit.digest;
        self.is_tagged(&writer, name, digest).await?;
        let mut blobs = edition.kit_blobs(resolved);
        blobs.extend(edition.index_blobs());
        let tally = {
            let _progress = Progress::of(&blobs, self.progress.mode());
            writer.put_all(&blobs, tally).await?
        };
        // Before the kit that it refers to, as registries must allow: what is tagged is complete, whatever ends this run.
        let wrote_referrer = writer.put_referrer(&edition).await?;
        // The upload may have taken hours, and somebody else the tag.
        let found = self.is_tagged(&writer, name, digest).await?;
        let wrote_kit = found != Some(digest);
        if wrote_kit {
            writer.put_kit(&edition.kit, name.tag()).await?;
            self.note_move(name, found, digest).await?;
        }
        Ok(Written { name: name.clone(), edition, tally, is_beside: false, wrote_kit, wrote_referrer })
    }

    /// What the tag points at; an error where that is another manifest, and it is not to be moved.
    async fn is_tagged(&self, writer: &Writer, name: &Reference, made: Digest) -> Result<Option<Digest>, Failure> {
        let found = writer.tagged(name.tag()).await?;
        match found.filter(|found| *found != made) {
            Some(found) if !self.replace => {
                Err(PublishError::TagTaken { reference: name.to_string(), found, made }.into())
            }
            Some(_) if self.immutable.holds(name.tag()) => Err(Failure::failed(format!(
                "{name} is immutable by --tags-immutable: choose another tag, and move this one with kitfs tag --force"
            ))),
            Some(_) | None => Ok(found),
        }
    }

    /// Writes down that a tag was made or moved.
    async fn note_move(&self, name: &Reference, from: Option<Digest>, to: Digest) -> Result<(), Failure> {
        let history = self.history.history(&StateDir::from_env()?);
        let event = Event { digest: Some(to), from, ..Event::now(Action::Tag, recorded(name)) };
        let appended = tokio::task::spawn_blocking(move || history.append(&event)).await?;
        if let Err(error) = appended {
            output::say("warning", format!("{name}: {}; kitfs tag --undo won't know of this move", chain(&error)));
        }
        Ok(())
    }

    /// Leaves the kit as it is, and puts its indexes beside it.
    async fn write_beside(&self, context: &Context, access: &Access, kit: &Kit) -> Result<Written, Failure> {
        let (name, resolved) = (&self.source, &kit.resolved);
        if kit.layers.iter().all(|fetch| fetch.layer.kit > 0) {
            let why = "it has no layers of its own, so there is nothing to index";
            return Err(Failure::failed(format!("{}: {why}; index the kits that it builds on", resolved.pinned())));
        }
        let writer = writer(name, context, access, resolved).await?;
        let tally = writer.try_out().await?;
        let edition = Edition::beside(resolved, self.derive(kit).await?)?;
        let blobs = edition.index_blobs();
        let tally = {
            let _progress = Progress::of(&blobs, self.progress.mode());
            writer.put_all(&blobs, tally).await?
        };
        let wrote_referrer = writer.put_referrer(&edition).await?;
        Ok(Written { name: name.clone(), edition, tally, is_beside: true, wrote_kit: false, wrote_referrer })
    }

    async fn derive(&self, kit: &Kit) -> Result<Vec<publish::Indexed>, Failure> {
        let _progress = Progress::of(&kit.layers, self.progress.mode());
        Ok(publish::derive(kit).await?)
    }
}

/// Opens what is written to.
async fn writer(name: &Reference, context: &Context, access: &Access, resolved: &Resolved) -> Result<Writer, Failure> {
    let target = kits::open_target(&name.location, access).await?;
    let sources = resolved.origins.first().map(|origin| origin.sources.clone()).unwrap_or_default();
    Ok(Writer::new(context, target, &resolved.reference.location, &sources))
}

fn parse_annotation(text: &str) -> Result<(String, String), String> {
    let split = text.split_once('=').filter(|(key, _)| !key.is_empty());
    let (key, value) = split.ok_or_else(|| format!("{text:?} is not KEY=VALUE"))?;
    if is_ours(key) {
        return Err(format!("{key:?} is set by kitfs itself"));
    }
    Ok((key.to_owned(), value.to_owned()))
}

impl Written {
    fn referrer(&self) -> Option<Digest> {
        self.edition.referrer.as_ref().map(|referrer| referrer.digest)
    }

    /// Whether anything was written.
    fn changed(&self) -> bool {
        self.wrote_kit || self.wrote_referrer || self.blobs() > 0
    }

    /// How many blobs were not there before.
    fn blobs(&self) -> u64 {
        self.tally.uploaded.blobs + self.tally.mounted.blobs
    }

    /// What is to be noted where what was asked for was there already, in whole or in part.
    fn was_there(&self) -> Option<String> {
        if !self.changed() {
            return Some("it was there already; nothing has changed".to_owned());
        }
        let (there, is_new) =
            if self.is_beside { ("the referrer", self.wrote_referrer) } else { ("the kit", self.wrote_kit) };
        let referrer = self.wrote_referrer.then(|| "the referrer that keeps its indexes".to_owned());
        let blobs = Some(self.blobs()).filter(|blobs| *blobs > 0).map(|blobs| format!("{blobs} blobs"));
        let added = [referrer, blobs].into_iter().flatten().collect::<Vec<_>>().join(" and ");
        (!is_new).then(|| format!("{there} was there already, and something was missing; added: {added}"))
    }
}

/// How a mount is told to trust what stands beside the kit.
fn mount_command(resolved: &Resolved, referrer: Digest) -> String {
    format!("kitfs mount {} --index-digest {referrer}", resolved.pinned())
}

fn notes(resolved: &Resolved, written: &Written) -> Vec<String> {
    let mut notes = Vec::new();
    let (old, new) = (resolved.digest, written.edition.kit.digest);
    if old != new {
        notes.push(format!("signatures over {old} do not cover {new}: sign the new digest"));
    }
    if let Some((index, offered)) = &resolved.index
        && !written.is_beside
    {
        let others = offered.manifests.len().saturating_sub(1);
        notes
            .push(format!("{index} is an image index; of its manifests only {old} was indexed, {others} are left out"));
    }
    if let Some(parent) = resolved.origins.get(1) {
        notes.push(format!("the layers of its parent {} were not indexed: index that kit too", parent.repository));
    }
    notes.extend(written.was_there());
    notes
}

fn as_json(resolved: &Resolved, written: &Written, notes: &[String]) -> Value {
    let Written { name, edition, tally, wrote_kit, wrote_referrer, .. } = written;
    let layers = edition.layers.iter().map(|indexed| {
        json!({
            "type": indexed.layer.kind,
            "path": indexed.layer.path,
            "digest": indexed.layer.digest,
            "size": indexed.layer.size,
            "index": { "digest": indexed.pin.digest, "size": indexed.pin.size,
                "head": { "digest": indexed.pin.head_digest, "size": indexed.pin.head_size } },
        })
    });
    let mount = written.referrer().filter(|_| written.is_beside);
    json!({
        "source": resolved.reference.to_string(),
        "source_digest": resolved.digest,
        "reference": name.to_string(),
        "repository": name.location.name(),
        "tag": name.tag,
        "digest": edition.kit.digest,
        "referrer": written.referrer(),
        "changed": written.changed(),
        "wrote": { "kit": wrote_kit, "referrer": wrote_referrer, "blobs": written.blobs() },
        "layers": layers.collect::<Vec<_>>(),
        "uploaded": tally.uploaded,
        "mounted": tally.mounted,
        "present": tally.present,
        "mount": mount.map(|referrer| mount_command(resolved, referrer)),
        "notes": notes,
    })
}

fn print(out: &mut Output, resolved: &Resolved, written: &Written) -> Result<(), Failure> {
    let Written { name, edition, tally, .. } = written;
    let mut lines = vec![("kit", printable(name.to_string().as_bytes())), ("digest", edition.kit.digest.to_string())];
    if !written.is_beside {
        lines.push(("made from", resolved.digest.to_string()));
    }
    if let Some(referrer) = written.referrer() {
        lines.push(("referrer", referrer.to_string()));
    }
    let counts = [("uploaded", tally.uploaded), ("mounted", tally.mounted), ("was there", tally.present)];
    for (what, Count { blobs, bytes }) in counts {
        lines.push((what, format!("{blobs} blobs, {}", format_size(bytes))));
    }
    if let Some(referrer) = written.referrer().filter(|_| written.is_beside) {
        lines.push(("mount with", mount_command(resolved, referrer)));
    }
    out.table(&lines.into_iter().map(|(key, value)| vec![key.to_owned(), value]).collect::<Vec<_>>())?;
    out.line("")?;
    let mut table = vec![["TYPE", "PATH", "SIZE", "INDEX SIZE", "INDEX"].map(str::to_owned).to_vec()];
    for publish::Indexed { layer, pin, .. } in &edition.layers {
        let kind = layer.kind.name().to_owned();
        let path = printable(layer.path.as_bytes());
        table.push(vec![kind, path, format_size(layer.size), format_size(pin.size), pin.digest.to_string()]);
    }
    out.table(&table)
}
