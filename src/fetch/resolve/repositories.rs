//! Patterns of repositories and registries, as operators write them: `registry.internal/team/*`, `*.internal:5000`.

use std::fmt;
use std::str::FromStr;

/// Which repositories a rule is about.
///
/// A `*` stands for any part of one component, also of none of it; a last component that is `*` alone stands for all that
/// is below, however deep. So `*` never reaches from one host into another, and `registry.internal/team/*` covers
/// `registry.internal/team/a` and `registry.internal/team/a/b`, not `registry.internal/team`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepositoryPattern(String);

/// A text that is no pattern of repositories.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{pattern:?} is not a pattern of repositories: {why}; expected one as in registry.internal/team/*")]
pub struct InvalidPattern {
    pattern: String,
    why: &'static str,
}

/// Which registries a rule is about: their hosts, with the port where there is one. A `*` stands for any part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryPattern(String);

/// A text that is no pattern of registries.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{pattern:?} is not a pattern of registries: {why}; expected a host, as in ghcr.io or *.internal:5000")]
pub struct InvalidRegistry {
    pattern: String,
    why: &'static str,
}

/// What stands before the directory of an OCI layout.
const LAYOUT: &str = "oci:";

impl RepositoryPattern {
    /// Whether it covers a repository, by the name that people write.
    pub fn covers(&self, repository: &str) -> bool {
        let mut parts = self.0.split('/').peekable();
        let mut names = repository.split('/').peekable();
        loop {
            match (parts.next(), names.next()) {
                (Some("*"), Some(name)) if parts.peek().is_none() => return !name.is_empty() || names.peek().is_some(),
                (Some(part), Some(name)) if fits(part.as_bytes(), name.as_bytes()) => {}
                (None, None) => return true,
                _ => return false,
            }
        }
    }
}

impl RegistryPattern {
    /// Whether it covers a host, with its port. The names of hosts are the same in capitals.
    pub fn covers(&self, host: &str) -> bool {
        fits(self.0.as_bytes(), host.to_ascii_lowercase().as_bytes())
    }
}

/// Whether a component is of the pattern's. On a mismatch only the last star is tried again, so that no pattern takes
/// more than the product of both lengths.
fn fits(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at, mut read) = (0, 0);
    let mut star = None;
    while read < name.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at + 1, read));
                at += 1;
            }
            Some(byte) if *byte == name[read] => {
                at += 1;
                read += 1;
            }
            _ => {
                let Some((behind, taken)) = star else { return false };
                star = Some((behind, taken + 1));
                (at, read) = (behind, taken + 1);
            }
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

impl FromStr for RepositoryPattern {
    type Err = InvalidPattern;

    fn from_str(text: &str) -> Result<Self, InvalidPattern> {
        let invalid = |why| Err(InvalidPattern { pattern: text.to_owned(), why });
        if text.is_empty() {
            return invalid("it is empty");
        }
        if text.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return invalid("it holds a space or control character");
        }
        if text.contains("**") {
            return invalid("`**` is not known; a `*` at the end covers what is deeper too");
        }
        if text.contains("://") {
            return invalid("it holds a scheme; repositories are written without");
        }
        if text.starts_with(LAYOUT) {
            return Ok(Self(text.to_owned()));
        }
        let mut parts = text.split('/');
        if parts.clone().any(str::is_empty) {
            return invalid("a part of it is empty; to cover all that is below, end it with `/*`");
        }
        // A host may have a port.
        if parts.clone().count() > 1 {
            parts.next();
        }
        if parts.any(|part| part.contains([':', '@'])) {
            return invalid("it names a tag or digest, and rules are about repositories");
        }
        Ok(Self(text.to_owned()))
    }
}

impl FromStr for RegistryPattern {
    type Err = InvalidRegistry;

    fn from_str(text: &str) -> Result<Self, InvalidRegistry> {
        let why = match text {
            "" => "it is empty",
            _ if text.contains("://") => "it holds a scheme; registries are written without",
            _ if text.contains('/') => "it holds a `/`, and a registry is a host; see --allow-repositories",
            _ if text.contains(|c: char| c.is_whitespace() || c.is_control()) => {
                "it holds a space or control character"
            }
            _ if text.contains('@') => "it holds an `@`",
            _ => return Ok(Self(text.to_ascii_lowercase())),
        };
        Err(InvalidRegistry { pattern: text.to_owned(), why })
    }
}

impl fmt::Display for RegistryPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for RepositoryPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(pattern: &str, covered: &[&str], others: &[&str]) {
        let parsed: RepositoryPattern = pattern.parse().expect("a pattern");
        for repository in covered {
            assert!(parsed.covers(repository), "{pattern} should cover {repository}");
        }
        for repository in others {
            assert!(!parsed.covers(repository), "{pattern} should not cover {repository}");
        }
    }

    #[test]
    fn a_star_at_the_end_covers_what_is_deeper_too() {
        let others = ["r.io/team", "r.io/team2/a", "r.io/teams", "r.io:5000/team/a", "evil.com/r.io/team/a", "team/a"];
        check("r.io/team/*", &["r.io/team/a", "r.io/team/a/b"], &others);
        check("*", &["r.io/team/a", "llama"], &[]);
    }

    #[test]
    fn without_a_star_it_covers_one_repository() {
        check("r.io:5000/team/a", &["r.io:5000/team/a"], &["r.io:5000/team/a/b", "r.io:5000/team", "r.io/team/a"]);
        check("llama", &["llama"], &["llama2", "r.io/llama", "r.io/llama/x"]);
    }

    #[test]
    fn a_star_within_a_part_stays_in_it() {
        check("*.internal/a", &["x.internal/a", ".internal/a"], &["x.internal.evil.com/a", "evil.com/x.internal/a"]);
        check("r.io/*/llama", &["r.io/team/llama"], &["r.io/llama", "r.io/a/b/llama", "r.io/team/llama/x"]);
        check("r.io/team-*", &["r.io/team-a", "r.io/team-"], &["r.io/team-a/b", "r.io/team"]);
        check("r.io/a*b*c/*", &["r.io/abc/x", "r.io/a-b-b-c/x/y"], &["r.io/acb/x", "r.io/abcd/x"]);
        check("r.io*", &["r.io", "r.io.evil.com"], &["r.io/x"]);
    }

    #[test]
    fn layouts_go_by_their_directories() {
        check("oci:/srv/kits/*", &["oci:/srv/kits/a", "oci:/srv/kits/a/b"], &["oci:/srv/kits", "oci:/srv/other/a"]);
    }

    #[test]
    fn a_registry_is_a_host() {
        let pattern: RegistryPattern = "*.Internal:5000".parse().expect("a pattern");
        assert!(pattern.covers("r.internal:5000") && pattern.covers("R.INTERNAL:5000"));
        assert!(!pattern.covers("r.internal") && !pattern.covers("r.internal:5000.evil.com"));
        for (text, why) in [
            ("", "it is empty"),
            ("https://r.io", "a scheme"),
            ("r.io/team", "see --allow-repositories"),
            ("r.io x.io", "a space"),
            ("me@r.io", "an `@`"),
        ] {
            let error = text.parse::<RegistryPattern>().expect_err(text).to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn what_could_never_cover_anything_is_refused() {
        for (pattern, why) in [
            ("", "it is empty"),
            ("r.io/team/", "end it with `/*`"),
            ("/team/*", "a part of it is empty"),
            ("r.io/team/a:8b", "a tag or digest"),
            ("r.io/team/a@sha256:00", "a tag or digest"),
            ("llama:8b", "a tag or digest"),
            ("r.io/**", "`**` is not known"),
            ("https://r.io/team/*", "a scheme"),
            ("r.io/team/* r.io/b", "a space"),
        ] {
            let error = pattern.parse::<RepositoryPattern>().expect_err(pattern).to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
