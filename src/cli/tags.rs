//! `kitfs tags`: the tags of a repository, and what they point at.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::Args;
use serde_json::{Value, json};

use super::options::{CacheArgs, ConnectionArgs, JsonArgs, NameArgs, ProgressArgs, ProgressMode};
use super::output::{self, Output, printable};
use super::progress::Steps;
use super::{Failure, kits};
use crate::digest::Digest;
use crate::fetch::resolve::tags::{Repository, Tag, Tagged, TaggedKind};
use crate::fetch::{Access, Context, FetchError, Limits, Verify};
use crate::reference::{Location, Reference};
use crate::source::SourceError;
use crate::tagging::{Rank, TagPattern};

/// The annotation that tells when a kit was made.
const CREATED: &str = "org.opencontainers.image.created";

/// Lists the tags of a repository, the highest version last
#[derive(Debug, Args)]
#[command(
    visible_alias = "list",
    override_usage = "kitfs tags [OPTIONS] <REPO>",
    after_help = "\
Names come before versions, versions in the order of Semantic Versioning; 1 and 1.4 count too. In a
registry what a tag points at is a request for each tag, which only --long and --digest make.

Examples:
  kitfs tags ghcr.io/team/llama
  kitfs tags ghcr.io/team/llama --match '[0-9]*' | tail -1         the highest version
  kitfs tags --long oci:kits/llama                                   a line a digest
  kitfs tags llama --digest $(kitfs resolve -q llama:latest)         who else points there"
)]
pub(super) struct Tags {
    /// The repository: a reference without tag and digest
    #[arg(value_name = "REPO")]
    repository: Reference,
    /// Show what the tags point at, a line a digest, and when that was made, if it says so
    #[arg(short, long)]
    long: bool,
    /// Only tags of this pattern, as for files: * ? [a-z]; may be repeated
    #[arg(long = "match", value_name = "GLOB")]
    matching: Vec<TagPattern>,
    /// Only tags that point at this digest
    #[arg(long, value_name = "DIGEST")]
    digest: Option<Digest>,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    names: NameArgs,
    #[command(flatten)]
    connection: ConnectionArgs,
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    progress: ProgressArgs,
}

/// Tags of one digest.
struct Group {
    /// `None` where it can't be told.
    digest: Option<Digest>,
    tagged: Option<Tagged>,
    /// In their order.
    tags: Vec<String>,
}

impl Tags {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let location = self.location()?;
        kits::say_whose(&self.cache, &self.connection)?;
        let limits = Limits { meta_timeout: self.names.meta_timeout, ..Limits::default() };
        let context = Context::new(Arc::new(self.cache.open()?), limits, Verify::Strict);
        let access = self.connection.access(&self.names)?;
        let repository = Repository::open(&context, &access, location)?;
        let mut tags = repository.tags().await.map_err(|error| self.not_listed(&access, &error))?;
        if !self.matching.is_empty() {
            tags.retain(|tag| self.matching.iter().any(|pattern| pattern.matches(&tag.name)));
        }
        if self.long || self.digest.is_some() {
            tags = point(&repository, tags, self.progress.mode()).await?;
        }
        tags.retain(|tag| self.digest.is_none() || tag.digest == self.digest);
        tags.sort_by_cached_key(|tag| Rank::of(&tag.name));
        let groups = if self.long { Some(groups(&repository, &tags).await?) } else { None };
        repository.settle().await;
        let mut out = Output::new();
        if self.json.json {
            out.json(&self.as_json(&tags, groups.as_deref()))?;
        } else if let Some(groups) = groups {
            print(&mut out, &groups)?;
        } else {
            tags.iter().try_for_each(|tag| out.line(printable(tag.name.as_bytes())))?;
        }
        out.finish()
    }

    fn location(&self) -> Result<&Location, Failure> {
        let Reference { location, tag, digest } = &self.repository;
        let name = location.name();
        let instead = match (tag, digest) {
            (None, None) => return Ok(location),
            (_, Some(digest)) => format!("--digest {digest}"),
            (Some(tag), None) => format!("--match {tag}"),
        };
        let kit = &self.repository;
        Err(Failure::usage(format!(
            "{kit} is one kit, and tags are of a repository; write {name}, or {name} {instead}"
        )))
    }

    /// A registry does not tell a repository that is not there from one that has no tags.
    fn not_listed(&self, access: &Access, error: &FetchError) -> Failure {
        let is_missing = matches!(error.root(), FetchError::Source { cause: SourceError::NotFound { .. }, .. });
        match &self.repository.location {
            Location::Registry { host, .. } if is_missing => {
                let name = self.repository.location.name();
                Failure::failed(format!("{host} has no repository {name}, or no tags in it: see how it is written"))
            }
            _ => kits::not_resolved(&self.repository, access, error),
        }
    }

    fn as_json(&self, tags: &[Tag], groups: Option<&[Group]>) -> Value {
        let mut all = json!({
            "repository": self.repository.location.name(),
            "tags": tags.iter().map(|tag| json!({ "tag": tag.name, "digest": tag.digest })).collect::<Vec<_>>(),
        });
        if let Some(groups) = groups {
            all["digests"] = groups.iter().map(Group::json).collect();
        }
        all
    }
}

/// What tags point at. What is wrong with one of them is a warning.
pub(super) async fn point(
    repository: &Repository<'_>,
    tags: Vec<Tag>,
    progress: ProgressMode,
) -> Result<Vec<Tag>, Failure> {
    let (steps, total, done) = (Steps::new(progress), tags.len(), AtomicUsize::new(0));
    let count = || {
        let done = done.fetch_add(1, Ordering::Relaxed) + 1;
        steps.show(&format!("asked for {done} of {total} tags"));
    };
    Ok(repository.point(tags, count, |why| output::say("warning", why)).await?)
}

/// Tags by what they point at, in the order of the highest tag of each.
async fn groups(repository: &Repository<'_>, tags: &[Tag]) -> Result<Vec<Group>, Failure> {
    let mut by_digest: HashMap<Option<Digest>, Vec<String>> = HashMap::new();
    for tag in tags {
        by_digest.entry(tag.digest).or_default().push(tag.name.clone());
    }
    let digests: Vec<Digest> = by_digest.keys().copied().flatten().collect();
    let looks = repository.look_at(digests.clone(), |why| output::say("warning", why)).await?;
    let tagged: BTreeMap<Digest, Tagged> =
        digests.into_iter().zip(looks).filter_map(|(digest, look)| Some((digest, look?))).collect();
    let group = |(digest, tags): (Option<Digest>, Vec<String>)| {
        let tagged = digest.and_then(|digest| tagged.get(&digest).cloned());
        Group { digest, tagged, tags }
    };
    let mut groups: Vec<_> = by_digest.into_iter().map(group).collect();
    groups.sort_by_cached_key(|group| group.tags.last().map(|tag| Rank::of(tag)));
    Ok(groups)
}

impl Group {
    fn created(&self) -> Option<&str> {
        self.tagged.as_ref()?.annotations.get(CREATED).map(String::as_str)
    }

    fn json(&self) -> Value {
        json!({
            "digest": self.digest,
            "kind": self.tagged.as_ref().map(|tagged| tagged.kind),
            "created": self.created(),
            "tags": self.tags,
        })
    }
}

fn print(out: &mut Output, groups: &[Group]) -> Result<(), Failure> {
    if groups.is_empty() {
        return Ok(());
    }
    let mut table = vec![["DIGEST", "KIND", "CREATED", "TAGS"].map(str::to_owned).to_vec()];
    for group in groups {
        let kind = group.tagged.as_ref().map_or("?", |tagged| match tagged.kind {
            TaggedKind::Kit => "kit",
            TaggedKind::Index => "index",
            TaggedKind::Other => "other",
        });
        let digest = group.digest.map_or_else(|| "?".to_owned(), |digest| digest.to_string());
        let created = printable(group.created().unwrap_or("-").as_bytes());
        table.push(vec![digest, kind.to_owned(), created, printable(group.tags.join(", ").as_bytes())]);
    }
    out.table(&table)
}
