//! What may be mounted and pulled: the rules that an operator sets for a machine.
//!
//! They keep people from mistakes; who may write the config file may change them. They hold for a kit and for each kit that
//! it builds on: a parent that is named by a tag moves what is served as much as the kit's own tag. Which registries and
//! repositories are allowed is checked before anybody is asked for anything; what a refused tag stands for is looked up,
//! to say what may be used instead.

use std::fmt;

use crate::digest::Digest;
use crate::fetch::{FetchError, RegistryPattern, RepositoryPattern};
use crate::reference::{Location, Reference};
use crate::tagging::TagPattern;

/// The rules. One that is empty, which is to say not set, or false, allows all.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// Only references with a digest, beside which a tag may stand.
    pub require_digest: bool,
    /// No reference by one of these tags, also not by leaving it out, unless a digest stands beside it.
    pub deny_tags: Vec<TagPattern>,
    /// Only these registries. What is on this machine's disks is in none, so it is no matter of this rule.
    pub allow_registries: Vec<RegistryPattern>,
    /// Only these repositories, wherever they are: in a registry, a layout or kit's storage.
    pub allow_repositories: Vec<RepositoryPattern>,
}

/// One of the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// [`Policy::require_digest`]
    RequireDigest,
    /// [`Policy::deny_tags`]
    DenyTags,
    /// [`Policy::allow_registries`]
    AllowRegistries,
    /// [`Policy::allow_repositories`]
    AllowRepositories,
}

/// By the key that sets it.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RequireDigest => "require_digest",
            Self::DenyTags => "deny_tags",
            Self::AllowRegistries => "allow_registries",
            Self::AllowRepositories => "allow_repositories",
        })
    }
}

/// A reference breaks a rule.
#[derive(Debug, thiserror::Error)]
#[error("the policy {rule} refuses {reference}{}: {remedy}", named_by(child.as_deref()))]
pub struct Refusal {
    /// The rule.
    pub rule: Rule,
    /// What it refuses, with its tag also where that was left out.
    pub reference: String,
    /// The kit that names it as what it builds on; none of what the user asked for.
    child: Option<String>,
    remedy: Remedy,
    /// Why it can't be told what may be used instead.
    #[source]
    cause: Option<Box<FetchError>>,
}

/// What can be done.
#[derive(Debug)]
enum Remedy {
    /// To take one of what is allowed.
    Allowed(String),
    /// To name it by its digest.
    Digest,
    /// By this one.
    Pinned(String),
}

fn named_by(child: Option<&str>) -> String {
    child.map(|child| format!(", on which {child} builds")).unwrap_or_default()
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allowed(allowed) => write!(f, "allowed is {allowed}"),
            Self::Digest => f.write_str("name it by its digest, as in repository@sha256:…"),
            Self::Pinned(pinned) => write!(f, "use {pinned} instead"),
        }
    }
}

impl Policy {
    /// Whether `reference` may be mounted, as far as it tells itself. What it builds on is checked when it is resolved.
    pub fn check(&self, reference: &Reference) -> Result<(), Refusal> {
        self.check_place(reference)?;
        self.check_tag(reference)
    }

    /// Whether it is where it may be.
    pub(super) fn check_place(&self, reference: &Reference) -> Result<(), Refusal> {
        let Self { allow_registries, allow_repositories, .. } = self;
        if let Location::Registry { host, .. } = &reference.location
            && !allow_registries.is_empty()
            && !allow_registries.iter().any(|pattern| pattern.covers(host))
        {
            return Err(Refusal::new(Rule::AllowRegistries, reference, Remedy::Allowed(list(allow_registries))));
        }
        if allow_repositories.is_empty() {
            return Ok(());
        }
        let name = real_name(&reference.location);
        if allow_repositories.iter().any(|pattern| pattern.covers(&name)) {
            return Ok(());
        }
        Err(Refusal::new(Rule::AllowRepositories, reference, Remedy::Allowed(list(allow_repositories))))
    }

    /// Whether it is named as it may be named.
    pub(super) fn check_tag(&self, reference: &Reference) -> Result<(), Refusal> {
        let rule = match reference.digest {
            Some(_) => return Ok(()),
            // The narrower rule says more.
            None if self.deny_tags.iter().any(|pattern| pattern.matches(reference.tag())) => Rule::DenyTags,
            None if self.require_digest => Rule::RequireDigest,
            None => return Ok(()),
        };
        Err(Refusal::new(rule, reference, Remedy::Digest))
    }
}

fn list<T: fmt::Display>(patterns: &[T]) -> String {
    patterns.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// A layout by the directory where it really is: neither `..` nor a link leads out of what is allowed.
fn real_name(location: &Location) -> String {
    match location {
        Location::Layout { dir } => {
            let dir = dir.canonicalize().or_else(|_| std::path::absolute(dir)).unwrap_or_else(|_| dir.clone());
            Location::Layout { dir }.name()
        }
        Location::Registry { .. } | Location::Local { .. } => location.name(),
    }
}

impl Refusal {
    fn new(rule: Rule, reference: &Reference, remedy: Remedy) -> Self {
        let mut name = reference.to_string();
        if reference.tag_was_omitted() {
            name = format!("{name}:{} (no tag means {})", reference.tag(), reference.tag());
        }
        Self { rule, reference: name, child: None, remedy, cause: None }
    }

    /// The same, with what the tag of `reference` stands for now, or why that is not known.
    pub(super) fn looked_up(self, reference: &Reference, found: Result<Digest, FetchError>) -> Self {
        match found {
            Ok(digest) => Self { remedy: Remedy::Pinned(format!("{}@{digest}", reference.location.name())), ..self },
            Err(error) => Self { cause: Some(Box::new(error)), ..self },
        }
    }

    /// The same, of what `child` builds on.
    pub(super) fn of_parent(self, child: String) -> Self {
        Self { child: Some(child), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::chain;

    fn reference(text: &str) -> Reference {
        text.parse().expect("a reference")
    }

    fn patterns<T: std::str::FromStr<Err: fmt::Debug>>(texts: &[&str]) -> Vec<T> {
        texts.iter().map(|text| text.parse().expect("a pattern")).collect()
    }

    #[track_caller]
    fn check(policy: &Policy, allowed: &[&str], refused: &[&str]) {
        for text in allowed {
            policy.check(&reference(text)).expect(text);
        }
        for text in refused {
            policy.check(&reference(text)).expect_err(text);
        }
    }

    const PINNED: &str = "r.io/a@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn without_rules_all_is_allowed() {
        check(&Policy::default(), &["llama", "r.io/a", "oci:x", PINNED], &[]);
    }

    #[test]
    fn a_digest_is_enough_for_both_rules_about_tags() {
        let both = PINNED.replace('@', ":latest@");
        let policy = Policy { require_digest: true, ..Policy::default() };
        check(&policy, &[PINNED, &both], &["r.io/a:8b", "r.io/a", "llama", "oci:x"]);
        let policy = Policy { deny_tags: patterns(&["latest", "dev-*"]), ..Policy::default() };
        check(&policy, &[PINNED, &both, "r.io/a:8b"], &["r.io/a", "r.io/a:latest", "llama", "oci:x", "r.io/a:dev-1"]);
    }

    #[test]
    fn a_registry_is_its_host_and_port() {
        let policy = Policy { allow_registries: patterns(&["r.io", "*.internal:5000"]), ..Policy::default() };
        let refused = ["r.io:443/a", "r.io.evil.com/a", "evil.com/r.io", "x.internal/a", "docker.io/a"];
        check(&policy, &["r.io/a/b", "R.io/a", "x.internal:5000/a", "llama", "oci:x"], &refused);
    }

    #[test]
    fn a_repository_is_allowed_wherever_it_is_and_a_layout_by_where_it_really_is() {
        let temp = tempfile::tempdir().expect("a directory");
        let root = temp.path().canonicalize().expect("its path");
        for dir in ["kits/a", "other"] {
            std::fs::create_dir_all(root.join(dir)).expect("made");
        }
        std::os::unix::fs::symlink(root.join("other"), root.join("kits/link")).expect("linked");
        let root = root.to_str().expect("UTF-8");
        let kits = format!("oci:{root}/kits/*");
        let policy = Policy { allow_repositories: patterns(&["r.io/team/*", "llama", &kits]), ..Policy::default() };
        let layout = |path: &str| format!("oci:{root}/{path}");
        check(
            &policy,
            &["r.io/team/a/b:8b", "llama:8b", &layout("kits/a"), &layout("kits/missing"), &layout("other/../kits/a")],
            &["r.io/a", "r.io/team", "mistral", &layout("other"), &layout("kits/../other"), &layout("kits/link")],
        );
    }

    #[test]
    fn a_refusal_names_the_rule_and_what_to_do() {
        let policy = Policy { deny_tags: patterns(&["latest"]), ..Policy::default() };
        let asked = reference("r.io/a");
        let refused = || policy.check(&asked).expect_err("refused");
        let name = "r.io/a:latest (no tag means latest)";
        let text = format!("the policy deny_tags refuses {name}: name it by its digest, as in repository@sha256:…");
        assert_eq!(refused().to_string(), text);
        let digest = Digest::of(b"");
        let text = format!("the policy deny_tags refuses {name}: use r.io/a@{digest} instead");
        assert_eq!(refused().looked_up(&asked, Ok(digest)).to_string(), text);
        let lost = FetchError::Lost { what: "it".to_owned() };
        assert!(chain(&refused().looked_up(&asked, Err(lost))).contains("repository@sha256:…: it was given up"));
        let text = refused().of_parent("r.io/child".to_owned()).to_string();
        assert!(text.contains("refuses r.io/a:latest (no tag means latest), on which r.io/child builds: "), "{text}");
    }
}
