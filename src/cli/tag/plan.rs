//! What becomes of each tag: looked up and decided before anything is written, so that what is refused changes nothing.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use super::targets::Place;
use super::{Origin, Tools};
use crate::cli::Failure;
use crate::digest::Digest;
use crate::fetch::resolve::tags::Tag;
use crate::fetch::transfer::retried;
use crate::fetch::{self, Access, FetchError};
use crate::publish::moves::{Role, Rules, Step, Wanted};
use crate::reference::{Location, Reference, is_tag};
use crate::report::chain;
use crate::source::{self, Source, SourceError};

/// Tags that are asked whether they lead to a digest that is about to lose one, a request each: seconds of waiting, for a
/// warning.
const ASKED: usize = 1000;

/// What is to be done in all repositories.
pub(super) struct Plan {
    pub(super) parts: Vec<Part>,
    pub(super) warnings: Vec<String>,
}

/// What is to be done in one repository, in this order.
pub(super) struct Part {
    pub(super) repository: Repository,
    pub(super) items: Vec<Item>,
}

/// What becomes of one tag.
pub(super) struct Item {
    pub(super) name: Reference,
    /// What it is to lead to.
    pub(super) to: Digest,
    pub(super) step: Step,
}

impl Item {
    /// What the tag leads to now; `None` for one that is to be made.
    pub(super) fn from(&self) -> Option<Digest> {
        match &self.step {
            Step::Move { from } => Some(*from),
            Step::Same => Some(self.to),
            Step::Create | Step::Behind { .. } => None,
        }
    }

    /// Whether it is to be written.
    pub(super) fn is_written(&self) -> bool {
        matches!(self.step, Step::Create | Step::Move { .. })
    }
}

/// A repository as it is before anything is written.
pub(super) struct Repository {
    pub(super) location: Location,
    /// `None` where there is nothing yet.
    source: Option<Arc<dyn Source>>,
    patience: Duration,
}

/// Decides for all places. Refusals are told together.
pub(super) async fn plan(
    tools: &Tools,
    origin: &Origin,
    places: Vec<Place>,
    rules: &Rules,
    keep_old: Option<&str>,
) -> Result<Plan, Failure> {
    let named = places.iter().flat_map(|place| &place.wanted).filter(|wanted| wanted.role == Role::Named).count();
    if let Some(kept) = keep_old.filter(|kept| !kept.is_empty() && named > 1) {
        let why = format!("--keep-old={kept}: {named} tags can't all leave theirs to one");
        return Err(Failure::usage(format!("{why}; --keep-old alone tags each with <tag>-prev")));
    }
    let mut plan = Plan { parts: Vec::new(), warnings: Vec::new() };
    let mut refused = Vec::new();
    for Place { location, wanted } in places {
        let repository = Repository::open(&location, &tools.access, tools.context.limits.meta_timeout).await?;
        let is_line = |wanted: &Wanted| matches!(wanted.role, Role::Line(_));
        let tags = if wanted.iter().any(is_line) { repository.tags(tools).await? } else { Vec::new() };
        let tags: Vec<String> = tags.into_iter().map(|tag| tag.name).collect();
        let mut part = Part { repository, items: Vec::new() };
        let wanted_here: Vec<&str> = wanted.iter().map(|wanted| wanted.tag.as_str()).collect();
        for wanted in &wanted {
            refused.extend(part.add(wanted, origin.digest, rules, &tags).await?);
            let step = part.items.last().map(|item| &item.step);
            if let (Some(kept), Some(Step::Move { from }), Role::Named) = (keep_old, step, &wanted.role) {
                let kept = if kept.is_empty() { format!("{}-prev", wanted.tag) } else { kept.to_owned() };
                let from = *from;
                refused.extend(part.keep(kept, &wanted_here, from, rules).await?);
            }
        }
        part.warn_of_losses(tools, &mut plan.warnings).await;
        plan.parts.push(part);
    }
    match refused.as_slice() {
        [] => Ok(plan),
        [one] => Err(Failure::failed(one)),
        several => Err(Failure::failed(format!("nothing was written:\n  {}", several.join("\n  ")))),
    }
}

impl Part {
    /// Decides for one tag; why it is refused, if it is.
    async fn add(
        &mut self,
        wanted: &Wanted,
        to: Digest,
        rules: &Rules,
        tags: &[String],
    ) -> Result<Option<String>, Failure> {
        let location = self.repository.location.clone();
        let name = Reference { location, tag: Some(wanted.tag.clone()), digest: None };
        let current = self.repository.current(&wanted.tag).await?;
        if matches!(wanted.role, Role::Line(_)) && current.is_some() && !tags.contains(&wanted.tag) {
            // Which releases there are is not to be told from such a list.
            return Ok(Some(format!(
                "{name} is there, and the registry's list of tags does not have it; name it as a TARGET"
            )));
        }
        match wanted.step(&name.to_string(), current, to, rules, tags) {
            Ok(step) => {
                self.items.push(Item { name, to, step });
                Ok(None)
            }
            Err(refusal) => Ok(Some(refusal.to_string())),
        }
    }

    /// Has `tag` keep what the tag leaves that was decided for last. It is written before that.
    async fn keep(
        &mut self,
        tag: String,
        wanted: &[&str],
        from: Digest,
        rules: &Rules,
    ) -> Result<Option<String>, Failure> {
        if !is_tag(&tag) {
            return Err(Failure::usage(format!("--keep-old: {tag:?} is too long for a tag; name one: --keep-old=TAG")));
        }
        if wanted.contains(&&*tag) || self.items.iter().any(|item| item.name.tag() == tag) {
            return Err(Failure::usage(format!("--keep-old: {tag} is a TARGET itself; name another: --keep-old=TAG")));
        }
        let moved = self.items.pop();
        let refused = self.add(&Wanted { tag, role: Role::Keeps }, from, rules, &[]).await?;
        self.items.extend(moved);
        Ok(refused)
    }

    /// Warns of each digest that will be left without a tag.
    async fn warn_of_losses(&self, tools: &Tools, warnings: &mut Vec<String>) {
        let moved = self.items.iter().filter(|item| matches!(item.step, Step::Move { .. }));
        let left: HashSet<Digest> = moved.filter_map(Item::from).collect();
        let is_left = |digest: &&Digest| !self.items.iter().any(|item| item.to == **digest);
        let mut left: Vec<&Digest> = left.iter().filter(is_left).collect();
        if left.is_empty() {
            return;
        }
        left.sort_unstable();
        let name = self.repository.location.name();
        let collector = match self.repository.location {
            Location::Registry { .. } => "the registry",
            Location::Layout { .. } | Location::Local { .. } => "whoever tidies up there",
        };
        match self.other_tags(tools).await {
            Ok(led_to) => warnings.extend(left.into_iter().filter(|digest| !led_to.contains(digest)).map(|digest| {
                let loss = "loses its last tag";
                format!("{name}@{digest} {loss}: {collector} may collect it, and then there is no way back; --keep-old tags it")
            })),
            Err(failure) => warnings.extend(left.into_iter().map(|digest| {
                let why = failure.message();
                format!("whether another tag of {name} leads to {digest} was not looked up: {why}; --keep-old tags it")
            })),
        }
    }

    /// What the tags of the repository lead to that are not written here.
    async fn other_tags(&self, tools: &Tools) -> Result<HashSet<Digest>, Failure> {
        let written: HashSet<&str> =
            self.items.iter().filter(|item| item.is_written()).map(|item| item.name.tag()).collect();
        let mut tags = self.repository.tags(tools).await?;
        tags.retain(|tag| !written.contains(tag.name.as_str()));
        let asked = tags.iter().filter(|tag| tag.digest.is_none()).count();
        if asked > ASKED {
            return Err(Failure::failed(format!("it has {asked} more tags, a request each")));
        }
        let repository =
            fetch::resolve::tags::Repository::open(&tools.context, &tools.access, &self.repository.location)?;
        let ignore = |why: String| tracing::debug!(why, "a tag that can't be told what it leads to");
        let pointed = repository.point(tags, || (), ignore).await?;
        Ok(pointed.into_iter().filter_map(|tag| tag.digest).collect())
    }
}

impl Repository {
    async fn open(location: &Location, access: &Access, patience: Duration) -> Result<Self, Failure> {
        let is_there = match location {
            // To look at it is no reason to make it.
            Location::Layout { dir } => tokio::fs::try_exists(dir.join("oci-layout")).await.unwrap_or(true),
            Location::Registry { .. } | Location::Local { .. } => true,
        };
        let (opened, Access { connection, kit_home, .. }) = (location.clone(), access.clone());
        let source = if is_there {
            // It reads a file.
            let opened = tokio::task::spawn_blocking(move || source::open(&opened, &connection, &kit_home));
            Some(opened.await??)
        } else {
            None
        };
        Ok(Self { location: location.clone(), source, patience })
    }

    /// What a tag leads to now.
    async fn current(&self, tag: &str) -> Result<Option<Digest>, Failure> {
        let Some(source) = &self.source else { return Ok(None) };
        let what = format!("tag {tag} of {}", self.location.name());
        found(retried(&what, self.patience, || source.resolve(tag)).await)
    }

    async fn tags(&self, tools: &Tools) -> Result<Vec<Tag>, Failure> {
        if self.source.is_none() {
            return Ok(Vec::new());
        }
        let repository = fetch::resolve::tags::Repository::open(&tools.context, &tools.access, &self.location)?;
        Ok(found(repository.tags().await)?.unwrap_or_default())
    }
}

/// What is not there is no error.
fn found<T>(asked: Result<T, FetchError>) -> Result<Option<T>, Failure> {
    match asked {
        Ok(found) => Ok(Some(found)),
        Err(FetchError::Source { cause: SourceError::NotFound { .. }, .. }) => Ok(None),
        Err(error) => Err(Failure::failed(chain(&error))),
    }
}
