//! `kitfs tag`: gives a kit tags, here or in another repository, and moves those that lead elsewhere.
//!
//! - [`targets`]: which tags are wanted where; [`git`]: the commit's.
//! - [`plan`](mod@plan): what becomes of each, all looked up and decided before anything is written.
//! - [`write`](mod@write): writing, and making sure of it; each move goes into the history.
//! - [`undo`]: what a tag was before.
//! - [`show`]: what is told of it.

mod git;
mod plan;
mod show;
mod targets;
mod undo;
mod write;

use std::sync::Arc;

use clap::Args;

use super::history::HistoryArgs;
use super::options::{ConnectionArgs, FetchArgs, JsonArgs, ProgressArgs};
use super::{Failure, kits, output};
use crate::digest::{Digest, Verified};
use crate::fetch::{self, Access, Context, FetchError, ResolvedDigest, Verify};
use crate::history::History;
use crate::modelkit::manifest::Document;
use crate::mount::StateDir;
use crate::publish::moves::{Expected, Release, Rules, Wanted};
use crate::reference::{Location, Reference, is_tag};
use crate::report::chain;
use crate::source::{Source, SourceError};
use crate::tagging::TagPattern;
use targets::{Place, Target};
pub(in crate::cli) use undo::recorded;

/// Gives a kit more tags, and moves tags to it: no byte of it is rebuilt
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs tag [OPTIONS] <SRC> [TARGET]...\n       kitfs tag [OPTIONS] <SRC> --undo",
    after_help = "\
A TARGET is a tag beside SRC, or a reference; several go with commas: staging,challenger or
registry/repo:a,b. (A name in kit's storage is written with its tag, name:tag.) Within a repository
nothing is copied. In another one of the same registry, blobs are mounted; else they are copied, and
a run that was ended goes on with those that are not there yet. What keeps the kit's indexes goes
along; signatures do not.

A tag that leads elsewhere moves only with --move. Registries know no condition for a write: between
the last look of --if-current and the write somebody else may still come in.

Examples:
  kitfs tag ghcr.io/team/llama:8b production --move       promotes, and says what it was before
  kitfs tag ghcr.io/team/llama:production --undo          takes it back
  kitfs tag ghcr.io/team/llama:8b --semver 1.4.2 --git    1.4.2; 1.4 and 1 move forward; git-<commit>
  kitfs tag ghcr.io/team/llama:8b ghcr.io/prod/llama      to another repository, under the same tag
  kitfs tag llama:8b production --move --dry-run          what a node would have to fetch"
)]
pub(super) struct Tag {
    /// The kit
    #[arg(value_name = "SRC")]
    source: Reference,
    /// A tag beside SRC, or a reference; several with commas between
    #[arg(value_name = "TARGET")]
    targets: Vec<Target>,
    /// Move tags that lead elsewhere
    #[arg(long = "move")]
    may_move: bool,
    /// Move a tag only if it leads to this digest now
    #[arg(long, value_name = "DIGEST", conflicts_with = "semver")]
    if_current: Option<Digest>,
    /// Move tags that are immutable by --tags-immutable too
    #[arg(long)]
    force: bool,
    /// Tag what a moved tag leaves [default: the tag's name with -prev]
    #[arg(long, value_name = "TAG", num_args = 0..=1, require_equals = true, default_missing_value = "", value_parser = parse_kept)]
    keep_old: Option<String>,
    /// Give it a version's tags: 1.4.2 makes 1.4.2, and moves 1.4 and 1 forward
    #[arg(long, value_name = "VERSION")]
    semver: Option<Release>,
    /// Give it the tag git-COMMIT, of the commit that is checked out here
    #[arg(long)]
    git: bool,
    /// Move SRC's tag back to what it was before its last move from this machine
    #[arg(long, conflicts_with_all = ["targets", "keep_old", "semver", "git"])]
    undo: bool,
    /// Show what would be done, and what a node would have to fetch; write nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    immutable: ImmutableArgs,
    #[command(flatten)]
    fetch: FetchArgs,
    #[command(flatten)]
    connection: ConnectionArgs,
    #[command(flatten)]
    history: HistoryArgs,
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    progress: ProgressArgs,
}

/// What SRC leads to: a kit's manifest, or an image index of several.
struct Origin {
    /// As it is shown.
    reference: Reference,
    location: Location,
    digest: Digest,
    manifest: Verified,
    sources: Vec<Arc<dyn Source>>,
    notes: Vec<String>,
}

/// What all steps need.
struct Tools {
    context: Context,
    access: Access,
    history: History,
}

/// Which tags stay.
#[derive(Debug, Args)]
pub(super) struct ImmutableArgs {
    /// Tags that move only with kitfs tag --force; may be repeated, or take several with commas between
    #[arg(long, env = "KITFS_TAGS_IMMUTABLE", value_name = "GLOB", value_delimiter = ',')]
    tags_immutable: Vec<TagPattern>,
}

impl ImmutableArgs {
    /// Whether a tag is to stay.
    pub(super) fn holds(&self, tag: &str) -> bool {
        self.tags_immutable.iter().any(|pattern| pattern.matches(tag))
    }
}

impl Tag {
    pub(super) async fn run(self) -> Result<(), Failure> {
        kits::say_whose(&self.fetch.cache, &self.connection)?;
        let context = self.fetch.context(&self.connection, Verify::Strict)?;
        // Where there is no place for a record, nothing is done.
        let history = self.history.history(&StateDir::from_env()?);
        let tools = Tools { context, access: self.fetch.access(&self.connection)?, history };
        let (origin, places, rules) = self.asked(&tools).await?;
        output::say_all("note", &origin.notes);
        let plan = plan::plan(&tools, &origin, places, &rules, self.keep_old.as_deref()).await?;
        let mut report = show::Report::new(&origin, plan.warnings.clone());
        let outcome = if self.dry_run {
            report.preview(&tools, &origin, &plan).await
        } else {
            write::write(&tools, &origin, &plan, self.progress.mode(), &mut report).await
        };
        // What was done before something failed is told too.
        let told = if outcome.is_ok() || report.tells() { report.print(self.json.json, self.dry_run) } else { Ok(()) };
        outcome.and(told)
    }

    /// What is to be tagged, where, and by which rules.
    async fn asked(&self, tools: &Tools) -> Result<(Origin, Vec<Place>, Rules), Failure> {
        let if_current =
            self.if_current.map(|digest| Expected { digest, says: "--if-current says: somebody was faster" });
        let rules = Rules {
            may_move: self.may_move,
            force: self.force,
            expected: if_current,
            immutable: self.immutable.tags_immutable.clone(),
        };
        if self.undo {
            return self.undone(tools, rules).await;
        }
        let commit = if self.git { Some(git::commit_tag().await?) } else { None };
        let places = targets::places(&self.source, &self.targets, self.semver.as_ref(), commit.as_deref())?;
        Ok((Origin::find(tools, &self.source).await?, places, rules))
    }

    /// SRC's tag back to where it was.
    async fn undone(&self, tools: &Tools, rules: Rules) -> Result<(Origin, Vec<Place>, Rules), Failure> {
        let name = Reference { tag: Some(self.source.tag().to_owned()), ..self.source.clone() };
        if name.digest.is_some() {
            return Err(Failure::usage(format!("{name}: --undo moves a tag back; leave the digest out")));
        }
        let last = undo::last_move(&tools.history, &name)?;
        let before = Reference { tag: None, digest: Some(last.from), ..name.clone() };
        let resolved = fetch::resolve_digest(&tools.context, &tools.access, &before).await;
        let resolved = resolved.map_err(|error| match error.root() {
            FetchError::Source { cause: SourceError::NotFound { .. }, .. } => Failure::failed(format!(
                "{name} was {}, which is gone: the registry may have collected it, as no tag led to it (see --keep-old)",
                last.from
            )),
            _ => kits::not_resolved(&before, &tools.access, &error),
        })?;
        let mut origin = Origin::new(&name, resolved)?;
        if self.source.tag_was_omitted() {
            origin.notes.push(format!("no tag in {}: took `{}`", name.location.name(), name.tag()));
        }
        let known = Expected {
            digest: last.to,
            says: "the history of this machine says: somebody else has moved it since; --move moves it back all the same",
        };
        let expected = rules.expected.or((!self.may_move).then_some(known));
        let place = Place { location: name.location.clone(), wanted: vec![Wanted::named(name.tag())] };
        Ok((origin, vec![place], Rules { expected, may_move: true, ..rules }))
    }
}

impl Origin {
    /// Follows a reference.
    async fn find(tools: &Tools, reference: &Reference) -> Result<Self, Failure> {
        let Tools { context, access, .. } = tools;
        let resolved = fetch::resolve_digest(context, access, reference).await;
        Self::new(reference, resolved.map_err(|error| kits::not_resolved(reference, access, &error))?)
    }

    fn new(reference: &Reference, resolved: ResolvedDigest) -> Result<Self, Failure> {
        let ResolvedDigest { digest, manifest, sources, notes, last_known, .. } = resolved;
        let location = reference.location.clone();
        if let Some(known) = last_known {
            let (name, why) = (location.name(), known.cause.unwrap_or_else(|| known.why.to_string()));
            return Err(Failure::failed(format!(
                "{name}:{} can't be looked up now ({why}), and what it was is not passed on unseen; to tag that all the \
                 same, name it: {name}@{digest}",
                reference.tag()
            )));
        }
        // What is no kit is left to the tools that made it.
        Document::parse(&manifest).map_err(|error| Failure::failed(format!("{reference}: {}", chain(&error))))?;
        Ok(Self { reference: reference.clone(), location, digest, manifest, sources, notes })
    }
}

/// The tag of `--keep-old`; empty for the default.
fn parse_kept(text: &str) -> Result<String, String> {
    if text.is_empty() || is_tag(text) { Ok(text.to_owned()) } else { Err(format!("{text:?} is not a tag")) }
}
