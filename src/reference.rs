//! What a user types to name a kit.
//!
//! ```text
//! registry/repo[:tag][@digest]     a registry; with both, the tag must resolve to that digest
//! oci:DIR[:tag][@digest]           an OCI image layout on disk
//! name[:tag][@digest]              kit's local storage (no `.` or `:` in the first part)
//! ```
//!
//! No tag and no digest means `latest`; [`Reference::tag_was_omitted`] lets the output say so.
//!
//! Invariants of a parsed reference: host, repository, tag and digest follow OCI's grammars, so each may stand in a URL
//! as it is. In `oci:DIR:tag` a last `:` that a valid tag follows begins the tag; any other `:` belongs to DIR.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::digest::Digest;

/// The tag that an omitted one stands for.
pub const DEFAULT_TAG: &str = "latest";

/// The longest text that is looked at: as long as Linux's `PATH_MAX`, for `oci:DIR`.
pub const MAX_REFERENCE: usize = 4096;
/// The longest repository that registries accept, as the OCI distribution specification says.
const MAX_REPOSITORY: usize = 255;
/// The longest tag of OCI's grammar.
pub const MAX_TAG: usize = 128;
/// Errors quote this much of a text; the rest helps nobody.
const MAX_QUOTED: usize = 200;

const LAYOUT_PREFIX: &str = "oci:";
const DOCKER_HUB: &str = "docker.io";
/// Docker Hub's other name, which old tools write.
const DOCKER_HUB_INDEX: &str = "index.docker.io";
/// Where Docker Hub keeps repositories whose name has one part.
const DOCKER_HUB_NAMESPACE: &str = "library";

/// A parsed reference.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    /// Registry, layout or kit's storage, and the repository there.
    pub location: Location,
    /// The tag as written.
    pub tag: Option<String>,
    /// The digest as written.
    pub digest: Option<Digest>,
}

/// Where a reference points, without tag and digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Location {
    /// A repository in a registry.
    Registry {
        /// Host and port as written, Docker Hub as `docker.io`.
        host: String,
        /// The repository, `library/` added for Docker Hub where it is missing.
        repository: String,
    },
    /// An OCI image layout.
    Layout {
        /// Its directory as written.
        dir: PathBuf,
    },
    /// A name in kit's storage, which kit files under the registry `localhost`.
    Local {
        /// The repository.
        repository: String,
    },
}

/// A text that is no reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a reference: {why}; allowed are registry/repo[:tag][@sha256:…], oci:DIR[:tag], \
     and name[:tag] for kit's local storage"
)]
pub struct InvalidReference {
    /// What was read, cut short where it is long.
    pub text: String,
    /// What is wrong with it.
    pub why: String,
}

impl Reference {
    /// Whether neither tag nor digest was written, so that `latest` stands in.
    pub fn tag_was_omitted(&self) -> bool {
        self.tag.is_none() && self.digest.is_none()
    }

    /// The tag to ask for: the one that was written, else `latest`.
    pub fn tag(&self) -> &str {
        self.tag.as_deref().unwrap_or(DEFAULT_TAG)
    }

    /// The parent that a Kitfile's `model.path` names, by kit's rule: it contains `:` or `@` and parses as a reference.
    /// Like kit it takes the first of several tags. It never yields an OCI layout: a kit can't point a mount at the
    /// host's own directories.
    pub fn parse_model_path(path: &str) -> Option<Self> {
        if !path.contains([':', '@']) {
            return None;
        }
        let first = path.split_once(',').map_or(path, |(first, _)| first);
        parse_repository(first).ok()
    }
}

impl Location {
    /// The repository as people write it, without tag and digest: `registry/team/llama`, `oci:DIR`, `llama`.
    pub fn name(&self) -> String {
        match self {
            Self::Registry { host, repository } => format!("{host}/{repository}"),
            Self::Layout { dir } => format!("{LAYOUT_PREFIX}{}", dir.display()),
            Self::Local { repository } => repository.clone(),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.location.name())?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = InvalidReference;
    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        let parsed = match text.strip_prefix(LAYOUT_PREFIX) {
            Some(layout) => parse_layout(layout),
            None => parse_repository(text),
        };
        parsed.map_err(|why| InvalidReference { text: quotable(text), why })
    }
}

fn quotable(text: &str) -> String {
    match text.char_indices().nth(MAX_QUOTED) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

fn check_length(text: &str) -> Result<(), String> {
    if text.is_empty() {
        return Err("it is empty".to_owned());
    }
    if text.len() > MAX_REFERENCE {
        return Err(format!("it is longer than {MAX_REFERENCE} bytes"));
    }
    Ok(())
}

fn parse_layout(text: &str) -> Result<Reference, String> {
    check_length(text)?;
    let (rest, digest) = match text.rsplit_once('@') {
        Some((rest, digest)) if digest.starts_with("sha256:") => (rest, Some(parse_digest(digest)?)),
        _ => (text, None),
    };
    let (dir, tag) = match rest.rsplit_once(':') {
        Some((_, "")) => return Err("the tag after the last `:` is empty".to_owned()),
        Some((dir, tag)) if is_tag(tag) => (dir, Some(tag.to_owned())),
        _ => (rest, None),
    };
    if dir.is_empty() {
        return Err("`oci:` is not followed by a directory".to_owned());
    }
    if dir.contains('\0') {
        return Err("the directory contains a NUL byte".to_owned());
    }
    Ok(Reference { location: Location::Layout { dir: dir.into() }, tag, digest })
}

fn parse_repository(text: &str) -> Result<Reference, String> {
    check_length(text)?;
    if text.contains("://") {
        return Err("it is a URL; leave the scheme out (`--plain-http` chooses HTTP)".to_owned());
    }
    if text.parse::<Digest>().is_ok() {
        return Err("a digest alone names no repository; write name@sha256:…".to_owned());
    }
    let (host, rest) = match text.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) => (Some(parse_host(host)?), rest),
        _ => (None, text),
    };
    let (rest, digest) = match rest.split_once('@') {
        Some((rest, digest)) => (rest, Some(parse_digest(digest)?)),
        None => (rest, None),
    };
    let (repository, tag) = match rest.split_once(':') {
        Some((repository, tag)) => (repository, Some(parse_tag(tag)?)),
        None => (rest, None),
    };
    let is_hub = matches!(host, Some(DOCKER_HUB | DOCKER_HUB_INDEX));
    let repository = match repository {
        short if is_hub && !short.contains('/') => format!("{DOCKER_HUB_NAMESPACE}/{short}"),
        full => full.to_owned(),
    };
    check_repository(&repository)?;
    let location = match host {
        None => Location::Local { repository },
        Some(_) if is_hub => Location::Registry { host: DOCKER_HUB.to_owned(), repository },
        Some(host) => Location::Registry { host: host.to_owned(), repository },
    };
    Ok(Reference { location, tag, digest })
}

fn parse_host(host: &str) -> Result<&str, String> {
    let (name, port) = match host.strip_prefix('[') {
        Some(bracketed) => {
            let (address, port) =
                bracketed.split_once(']').ok_or_else(|| format!("the address {host:?} lacks its `]`"))?;
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return Err(format!("{address:?} is not an IPv6 address"));
            }
            (None, port)
        }
        None => {
            let end = host.find(':').unwrap_or(host.len());
            (Some(&host[..end]), &host[end..])
        }
    };
    if let Some(name) = name {
        let is_label = |label: &str| {
            !label.is_empty()
                && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if !name.split('.').all(is_label) {
            return Err(format!("{name:?} is not a host name"));
        }
    }
    if !port.is_empty() {
        let digits = port.strip_prefix(':').unwrap_or_default();
        if digits.is_empty() || !digits.bytes().all(|c| c.is_ascii_digit()) || digits.parse::<u16>().is_err() {
            return Err(format!("{port:?} is not a port"));
        }
    }
    Ok(host)
}

fn check_repository(repository: &str) -> Result<(), String> {
    if repository.is_empty() {
        return Err("the repository is missing".to_owned());
    }
    if repository.len() > MAX_REPOSITORY {
        return Err(format!("the repository is longer than {MAX_REPOSITORY} bytes"));
    }
    if repository.bytes().any(|c| c.is_ascii_uppercase()) {
        return Err(format!(
            "the repository {:?} must be lower case ({})",
            quotable(repository),
            quotable(&repository.to_ascii_lowercase())
        ));
    }
    match repository.split('/').find(|part| !is_repository_part(part)) {
        None => Ok(()),
        Some(part) => Err(format!(
            "{:?} may not stand in a repository: its parts are letters and digits, joined by `.`, `_`, `__` or dashes",
            quotable(part)
        )),
    }
}

/// OCI's `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`.
fn is_repository_part(part: &str) -> bool {
    let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    part.starts_with(is_word)
        && part.ends_with(is_word)
        && part
            .split(is_word)
            .filter(|joint| !joint.is_empty())
            .all(|joint| matches!(joint, "." | "_" | "__") || joint.bytes().all(|c| c == b'-'))
}

fn parse_tag(tag: &str) -> Result<String, String> {
    if is_tag(tag) {
        return Ok(tag.to_owned());
    }
    Err(format!("{:?} is not a tag: at most {MAX_TAG} letters, digits, `_`, `.` and `-`", quotable(tag)))
}

/// Whether a text is a tag by OCI's grammar, `[A-Za-z0-9_][A-Za-z0-9._-]{0,127}`.
pub fn is_tag(tag: &str) -> bool {
    tag.len() <= MAX_TAG
        && tag.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && tag.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'.' | b'-'))
}

fn parse_digest(digest: &str) -> Result<Digest, String> {
    digest.parse().map_err(|_| {
        format!("{:?} is not a digest: expected `sha256:` and 64 lower-case hexadecimal digits", quotable(digest))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Reference {
        text.parse().unwrap_or_else(|e: InvalidReference| panic!("{e}"))
    }

    fn registry(host: &str, repository: &str) -> Location {
        Location::Registry { host: host.into(), repository: repository.into() }
    }

    fn local(repository: &str) -> Location {
        Location::Local { repository: repository.into() }
    }

    fn layout(dir: &str) -> Location {
        Location::Layout { dir: dir.into() }
    }

    #[test]
    fn a_first_part_with_a_dot_or_a_colon_is_a_registry() {
        assert_eq!(parse("ghcr.io/team/llama:8b").location, registry("ghcr.io", "team/llama"));
        assert_eq!(parse("localhost:5000/x").location, registry("localhost:5000", "x"));
        assert_eq!(parse("127.0.0.1:5000/x:v1").location, registry("127.0.0.1:5000", "x"));
        assert_eq!(parse("[::1]:5000/x").location, registry("[::1]:5000", "x"));
        assert_eq!(parse("[::1]/x:v1").location, registry("[::1]", "x"));
    }

    #[test]
    fn anything_else_is_in_kits_storage() {
        assert_eq!(parse("llama").location, local("llama"));
        assert_eq!(parse("team/llama:8b").location, local("team/llama"));
        assert_eq!(parse("localhost/x").location, local("localhost/x"));
        assert_eq!(parse("my.model:v1.2").location, local("my.model"));
    }

    #[test]
    fn docker_hub_has_one_name_and_a_namespace_for_short_ones() {
        assert_eq!(parse("docker.io/team/llama").location, registry("docker.io", "team/llama"));
        assert_eq!(parse("docker.io/ubuntu").location, registry("docker.io", "library/ubuntu"));
        assert_eq!(parse("index.docker.io/ubuntu").location, registry("docker.io", "library/ubuntu"));
    }

    #[test]
    fn docker_hubs_namespace_counts_towards_the_length() {
        // Found by fuzzing: what was read must read back.
        let longest = "a".repeat(255 - "library/".len());
        let parsed = parse(&format!("docker.io/{longest}"));
        assert_eq!(parse(&parsed.to_string()), parsed);
        assert!(format!("docker.io/{longest}a").parse::<Reference>().is_err());
    }

    #[test]
    fn no_tag_means_latest_and_says_so() {
        let bare = parse("llama");
        assert_eq!(bare.tag(), "latest");
        assert!(bare.tag_was_omitted());
        let pinned = parse(&format!("llama@{}", Digest::of(b"")));
        assert!(!pinned.tag_was_omitted());
        assert_eq!(parse("llama:v1").tag(), "v1");
    }

    #[test]
    fn tag_and_digest_may_stand_together() {
        let digest = Digest::of(b"");
        let both = parse(&format!("ghcr.io/a/b:v1@{digest}"));
        assert_eq!((both.tag.as_deref(), both.digest), (Some("v1"), Some(digest)));
        let both = parse(&format!("oci:/srv/kit:v1@{digest}"));
        assert_eq!((both.location, both.tag.as_deref(), both.digest), (layout("/srv/kit"), Some("v1"), Some(digest)));
    }

    #[test]
    fn in_a_layout_a_last_colon_with_a_tag_after_it_begins_the_tag() {
        assert_eq!(parse("oci:./kits/x").location, layout("./kits/x"));
        assert_eq!(parse("oci:dir:v1").location, layout("dir"));
        assert_eq!(parse("oci:dir:v1").tag.as_deref(), Some("v1"));
        assert_eq!(parse("oci:a:b/c").location, layout("a:b/c"));
        assert_eq!(parse("oci:a:b:v1").location, layout("a:b"));
        assert_eq!(parse("oci:user@host").location, layout("user@host"));
    }

    #[test]
    fn a_reference_reads_back_as_it_is_written() {
        let digest = Digest::of(b"x");
        for text in [
            "llama",
            "llama:8b",
            "ghcr.io/team/llama:8b",
            "docker.io/library/ubuntu",
            "[::1]:5000/x",
            "oci:/srv/kit:v1",
            "oci:a:b/c",
            &format!("llama:8b@{digest}"),
            &format!("oci:/srv/kit@{digest}"),
        ] {
            assert_eq!(parse(text).to_string(), text);
        }
    }

    #[test]
    fn errors_say_what_was_read_and_what_is_allowed() {
        for (text, why) in [
            ("", "empty"),
            ("ghcr.io/Team/x", "must be lower case (team/x)"),
            ("https://ghcr.io/x", "leave the scheme out"),
            ("ghcr.io/", "repository is missing"),
            ("ghcr.io/a//b", "may not stand in a repository"),
            ("ghcr.io/a._b", "may not stand in a repository"),
            ("x:", "is not a tag"),
            ("x:-v1", "is not a tag"),
            ("x:a:b", "is not a tag"),
            ("x@sha256:12", "is not a digest"),
            ("x@md5:12", "is not a digest"),
            ("host:port/x", "is not a port"),
            ("host:99999/x", "is not a port"),
            ("[::1/x", "lacks its `]`"),
            ("[zz]:1/x", "is not an IPv6 address"),
            ("../x:1", "is not a host name"),
            ("oci:", "empty"),
            ("oci::v1", "not followed by a directory"),
            ("oci:dir:", "tag after the last `:` is empty"),
            ("oci:a\0b", "NUL"),
            (&Digest::of(b"").to_string(), "a digest alone"),
            (&"a".repeat(5000), "longer than 4096"),
            (&"a".repeat(300), "longer than 255"),
        ] {
            let error = text.parse::<Reference>().expect_err(text).to_string();
            assert!(error.contains(why), "{error}");
            assert!(error.contains("allowed are registry/repo"), "{error}");
            assert!(error.len() < 1000, "{error}");
        }
    }

    #[test]
    fn a_model_path_is_a_reference_only_with_a_colon_or_an_at_sign() {
        for path in ["weights/model.gguf", "ghcr.io/team/base", "./a", "", "C:\\dir", "a:b/c", "a b:c"] {
            assert_eq!(Reference::parse_model_path(path), None, "{path}");
        }
        let parent = Reference::parse_model_path("ghcr.io/team/base:v1").expect("a reference");
        assert_eq!(parent.location, registry("ghcr.io", "team/base"));
        let several = Reference::parse_model_path("base:v1,v2").expect("a reference");
        assert_eq!(several.tag.as_deref(), Some("v1"));
    }

    #[test]
    fn a_model_path_never_points_at_the_hosts_directories() {
        assert_eq!(Reference::parse_model_path("oci:/etc:v1"), None);
        let named_oci = Reference::parse_model_path("oci:v1").expect("a name in kit's storage");
        assert_eq!(named_oci.location, local("oci"));
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_what_parses_reads_back(text in "\\PC{0,60}|[a-z:/@.\\[\\]-]{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>(), Ok(reference));
            }
            let _ = Reference::parse_model_path(&text);
        }
    }
}
