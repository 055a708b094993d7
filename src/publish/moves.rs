//! Which tags are made, moved or left: decided from what they lead to now. Pure.
//!
//! A tag that leads elsewhere moves only if that was asked for. Two kinds need no asking: the lines of a release, `1.4` and
//! `1`, which go forward by themselves and never back; and the tag that keeps what another one leaves. A full version never
//! moves by its own release, and what a rule holds to be immutable moves only by force.

use std::str::FromStr;

use semver::Version;

use crate::digest::Digest;
use crate::reference::is_tag;
use crate::tagging::TagPattern;

/// A tag that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The tag.
    pub tag: String,
    /// Why it is wanted.
    pub role: Role,
}

/// Why a tag is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// It was named.
    Named,
    /// It is the full version of a release.
    Version,
    /// It is a line of a release, such as `1.4` of `1.4.2`.
    Line(Release),
    /// It keeps what another tag leaves.
    Keeps,
}

/// What is allowed.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// Whether named tags may move.
    pub may_move: bool,
    /// Whether immutable ones may move too.
    pub force: bool,
    /// What named tags must lead to now.
    pub expected: Option<Expected>,
    /// Tags that do not move.
    pub immutable: Vec<TagPattern>,
}

/// What a tag is thought to lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// The digest.
    pub digest: Digest,
    /// Who thinks so, and what can be done where it is not so.
    pub says: &'static str,
}

/// What becomes of a tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// It is made.
    Create,
    /// It moves.
    Move {
        /// What it leads to now.
        from: Digest,
    },
    /// It leads there already.
    Same,
    /// It is a line that leads to a newer release, and stays.
    Behind {
        /// The tag of that release.
        newest: String,
    },
}

/// Why a tag may not be moved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It leads elsewhere.
    #[error("{tag} is {found}, and would become {to}: to move it, add --move")]
    Taken {
        /// The tag.
        tag: String,
        /// What it leads to.
        found: Digest,
        /// What it would lead to.
        to: Digest,
    },
    /// It does not lead to what it was thought to.
    #[error(
        "{tag} is {}, not {} as {}",
        found.map_or_else(|| "not there".to_owned(), |found| found.to_string()),
        expected.digest,
        expected.says
    )]
    Changed {
        /// The tag.
        tag: String,
        /// What it was thought to lead to.
        expected: Expected,
        /// What it leads to.
        found: Option<Digest>,
    },
    /// A rule keeps it.
    #[error(
        "{tag} is {found}, and stays so: the rule {pattern:?} holds it to be immutable (tags.immutable in the config file, --tags-immutable); --force moves it all the same"
    )]
    Immutable {
        /// The tag.
        tag: String,
        /// What it leads to.
        found: Digest,
        /// The rule.
        pattern: String,
    },
    /// It is another kit's version.
    #[error(
        "{tag} is {found} already, and would become {to}: a version does not move; choose the next one (named as a TARGET, \
         with --move, the tag moves all the same)"
    )]
    Released {
        /// The tag.
        tag: String,
        /// What it leads to.
        found: Digest,
        /// What it would lead to.
        to: Digest,
    },
}

impl Wanted {
    /// A tag that was named.
    pub fn named(tag: impl Into<String>) -> Self {
        Self { tag: tag.into(), role: Role::Named }
    }

    /// What becomes of the tag, which leads to `current` now and is to lead to `to`, among the `tags` of its repository.
    /// Refusals call it `name`.
    pub fn step(
        &self,
        name: &str,
        current: Option<Digest>,
        to: Digest,
        rules: &Rules,
        tags: &[String],
    ) -> Result<Step, Refusal> {
        if current == Some(to) {
            return Ok(Step::Same);
        }
        let tag = || name.to_owned();
        if let (Role::Named, Some(expected)) = (&self.role, rules.expected)
            && current != Some(expected.digest)
        {
            return Err(Refusal::Changed { tag: tag(), expected, found: current });
        }
        if let Role::Line(release) = &self.role
            && let Some(newest) = release.newer_in(&self.tag, tags)
        {
            return Ok(Step::Behind { newest });
        }
        let Some(found) = current else { return Ok(Step::Create) };
        if let Some(rule) = rules.immutable.iter().find(|rule| rule.matches(&self.tag))
            && !rules.force
        {
            return Err(Refusal::Immutable { tag: tag(), found, pattern: rule.to_string() });
        }
        match self.role {
            Role::Version => Err(Refusal::Released { tag: tag(), found, to }),
            Role::Named if !(rules.may_move || rules.force || rules.expected.is_some()) => {
                Err(Refusal::Taken { tag: tag(), found, to })
            }
            Role::Named | Role::Line(_) | Role::Keeps => Ok(Step::Move { from: found }),
        }
    }
}

/// A release by its version, as tags name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// `v`, or nothing.
    prefix: &'static str,
    version: Version,
}

impl Release {
    /// The tags that it gets: its full version, and unless it comes before its release the lines that it belongs to.
    pub fn tags(&self) -> Vec<Wanted> {
        let mut tags = vec![Wanted { tag: self.to_string(), role: Role::Version }];
        if self.version.pre.is_empty() {
            let Version { major, minor, .. } = self.version;
            let lines = [format!("{}{major}.{minor}", self.prefix), format!("{}{major}", self.prefix)];
            tags.extend(lines.map(|tag| Wanted { tag, role: Role::Line(self.clone()) }));
        }
        tags
    }

    /// The newest release among `tags` that is on this line and newer than this one.
    fn newer_in(&self, line: &str, tags: &[String]) -> Option<String> {
        let on_line = |tag: &&String| tag.strip_prefix(line).is_some_and(|rest| rest.starts_with('.'));
        let releases = tags.iter().filter(on_line).filter_map(|tag| Some((tag.parse::<Self>().ok()?, tag)));
        let newer = releases.filter(|(release, _)| release.version.pre.is_empty() && release.version > self.version);
        newer.max_by(|(a, _), (b, _)| a.version.cmp(&b.version)).map(|(_, tag)| tag.clone())
    }
}

impl std::fmt::Display for Release {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.prefix, self.version)
    }
}

impl FromStr for Release {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (prefix, version) = text.strip_prefix('v').map_or(("", text), |version| ("v", version));
        let expected =
            "expected MAJOR.MINOR.PATCH, and what comes before a release after a `-`: 1.4.2, v1.4.2, 1.5.0-rc.1";
        let version = Version::parse(version).map_err(|error| format!("{text:?}: {error}; {expected}"))?;
        if !version.build.is_empty() {
            return Err(format!("{text:?}: a tag can't hold a `+`; {expected}"));
        }
        if !is_tag(text) {
            return Err(format!("{text:?} is too long for a tag"));
        }
        Ok(Self { prefix, version })
    }
}

#[cfg(test)]
#[path = "moves_tests.rs"]
mod tests;
