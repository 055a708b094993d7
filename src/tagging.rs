//! Tags as people use them: their order, and patterns of them.
//!
//! A tag that is a version (`1.4.2`, `v2.0.0-rc.1`, and `1.4` or `1`, which stand for the newest below them) is ordered as
//! Semantic Versioning says, everything else as people count: `llama-2` before `llama-10`. Names come before versions, so
//! that the last of a list is the highest version.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use semver::{Prerelease, Version};

/// Where a tag stands in a list. No two tags have the same place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    key: Key,
    /// `1.0.0` and `v1.0.0` are one version, and two tags.
    tag: String,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Name(Vec<Part>),
    Version(Release),
}

/// A part of a name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Number(Digits),
    Text(String),
}

/// Digits without zeros before them, however many.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Digits(String);

/// A version, whole or in part. What is left out comes before all that could stand there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Release {
    major: u64,
    minor: Option<u64>,
    patch: Option<u64>,
    pre: Prerelease,
}

impl Rank {
    /// The place of a tag.
    pub fn of(tag: &str) -> Self {
        let key = release(tag.strip_prefix('v').unwrap_or(tag)).map_or_else(|| Key::Name(parts(tag)), Key::Version);
        Self { key, tag: tag.to_owned() }
    }
}

impl Ord for Digits {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.0.len(), &self.0).cmp(&(other.0.len(), &other.0))
    }
}

impl PartialOrd for Digits {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The version that a text is. A tag can't hold the `+` before build metadata, so there is none.
fn release(text: &str) -> Option<Release> {
    if let Ok(Version { major, minor, patch, pre, .. }) = Version::parse(text) {
        return Some(Release { major, minor: Some(minor), patch: Some(patch), pre });
    }
    // A date or a number of a build may be longer than any version's; it is a name then.
    let number = |part: &str| {
        let is_number = part.bytes().all(|c| c.is_ascii_digit()) && (part == "0" || !part.starts_with('0'));
        part.parse().ok().filter(|_| is_number)
    };
    let (major, minor) = match text.split_once('.') {
        Some((major, minor)) => (number(major)?, Some(number(minor)?)),
        None => (number(text)?, None),
    };
    Some(Release { major, minor, patch: None, pre: Prerelease::EMPTY })
}

fn parts(tag: &str) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut rest = tag;
    while let Some(first) = rest.chars().next() {
        let digits = first.is_ascii_digit();
        let end = rest.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(rest.len());
        let (part, after) = rest.split_at(end);
        parts.push(match digits {
            true => Part::Number(Digits(part.trim_start_matches('0').to_owned())),
            false => Part::Text(part.to_owned()),
        });
        rest = after;
    }
    parts
}

/// A pattern of tags, as a shell has it for files: `*` any characters, `?` one, `[a-z]` and `[!a-z]` one of a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagPattern(glob::Pattern);

/// A text that is no pattern of tags.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{pattern:?} is not a pattern of tags: {why}; expected one as in 1.4.* or *-[qf]8*")]
pub struct InvalidTagPattern {
    /// What was read.
    pub pattern: String,
    /// What is wrong with it.
    pub why: String,
}

impl TagPattern {
    /// Whether a tag is of the pattern, all of it.
    pub fn matches(&self, tag: &str) -> bool {
        self.0.matches(tag)
    }
}

impl FromStr for TagPattern {
    type Err = InvalidTagPattern;
    fn from_str(text: &str) -> Result<Self, InvalidTagPattern> {
        let invalid = |why: String| InvalidTagPattern { pattern: text.to_owned(), why };
        if text.is_empty() {
            return Err(invalid("it is empty".to_owned()));
        }
        let known = |c: &char| c.is_ascii_alphanumeric() || "_.-*?[]!".contains(*c);
        if let Some(other) = text.chars().find(|c| !known(c)) {
            return Err(invalid(format!("no tag holds {other:?}, and it means nothing in a pattern")));
        }
        glob::Pattern::new(text).map(Self).map_err(|error| invalid(error.msg.to_owned()))
    }
}

impl fmt::Display for TagPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn versions_come_last_in_their_order_and_names_as_people_count() {
        let ordered = [
            "7b-chat-q4_0",
            "7b-chat-q8_0",
            "70b-chat",
            "git-0a1b",
            "latest",
            "llama-2",
            "llama-10",
            "production",
            "0.9.0",
            "1",
            "1.2",
            "1.2.3-rc.2",
            "1.2.3-rc.10",
            "1.2.3",
            "v1.2.3",
            "1.2.10",
            "1.10",
            "1.10.0",
            "v2",
            "20261101",
        ];
        let mut tags = ordered;
        tags.reverse();
        tags.sort_by_cached_key(|tag| Rank::of(tag));
        assert_eq!(tags, ordered);
    }

    #[test]
    fn what_only_looks_like_a_version_is_a_name() {
        for tag in ["1.2.3.4", "01.2.3", "1.x", "v", "8b", "1.2-cuda", "99999999999999999999", "1.", ".1"] {
            assert!(matches!(Rank::of(tag).key, Key::Name(_)), "{tag}");
        }
    }

    #[test]
    fn a_pattern_is_of_the_whole_tag() {
        let pattern = |text: &str| text.parse::<TagPattern>().expect("a pattern");
        let immutable = pattern("[0-9]*.[0-9]*.[0-9]*");
        assert!(immutable.matches("1.4.2") && immutable.matches("10.0.0-rc.1"));
        assert!(!immutable.matches("1.4") && !immutable.matches("v1.4.2"));
        assert!(pattern("git-*").matches("git-0a1b") && !pattern("git-*").matches("my-git-0a1b"));
        assert!(
            pattern("7b-?").matches("7b-x")
                && !pattern("7b-?").matches("7b-xy")
                && !pattern("LATEST").matches("latest")
        );
    }

    #[test]
    fn a_pattern_that_could_match_nothing_is_refused() {
        for (text, why) in [
            ("", "it is empty"),
            ("v1/*", "no tag holds '/'"),
            ("{a,b}", "no tag holds '{'"),
            ("[a-", "invalid range"),
            ("a**b", "recursive wildcards"),
        ] {
            let error = text.parse::<TagPattern>().expect_err(text).to_string();
            assert!(error.contains(why) && error.contains("as in 1.4.*"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn the_order_is_total_and_tells_all_tags_apart(a in "[a-z0-9._v-]{0,8}", b in "[a-z0-9._v-]{0,8}", c in "[0-9.v-]{0,6}") {
            let (x, y, z) = (Rank::of(&a), Rank::of(&b), Rank::of(&c));
            prop_assert_eq!(x == y, a == b);
            prop_assert_eq!(x.cmp(&y), y.cmp(&x).reverse());
            if x <= y && y <= z {
                prop_assert!(x <= z);
            }
        }
    }
}
