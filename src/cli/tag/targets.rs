//! What is to be tagged where: from the words on the command line to tags, by repository.

use std::str::FromStr;

use crate::cli::Failure;
use crate::publish::moves::{Release, Wanted};
use crate::reference::{DEFAULT_TAG, Location, MAX_TAG, Reference, is_tag};

/// A TARGET: tags, and the repository that they are in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// SRC's own where it is `None`.
    location: Option<Location>,
    /// SRC's own where there are none.
    tags: Vec<String>,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // From the end, since a directory may hold commas too.
        let mut rest = text;
        let mut tags = Vec::new();
        while let Some((before, tag)) = rest.rsplit_once(',').filter(|(_, tag)| is_tag(tag)) {
            tags.insert(0, tag.to_owned());
            rest = before;
        }
        if is_tag(rest) {
            tags.insert(0, rest.to_owned());
            return Ok(Self { location: None, tags });
        }
        let parse = |text: &str| text.parse::<Reference>().map_err(|error| error.to_string());
        let mut reference = parse(rest)?;
        // A word alone was meant as a tag, even where it could be a name in kit's storage.
        if reference.tag_was_omitted() && !rest.contains('/') && matches!(reference.location, Location::Local { .. }) {
            return Err(format!(
                "{rest:?} is not a tag: expected at most {MAX_TAG} letters, digits, `.`, `_` and `-`; \
                 a name in kit's storage is a TARGET with its tag, as in name:tag"
            ));
        }
        if reference.tag.is_none() && !tags.is_empty() {
            (reference, tags) = (parse(text)?, Vec::new());
        }
        if reference.digest.is_some() {
            return Err(format!("{text:?} has a digest; a TARGET gets SRC's, so give it a tag alone"));
        }
        tags.splice(0..0, reference.tag);
        Ok(Self { location: Some(reference.location), tags })
    }
}

/// What is wanted in one repository.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) location: Location,
    pub(super) wanted: Vec<Wanted>,
}

/// The tags that are wanted for `source`, each once. A release and a commit get theirs wherever a target is, else beside
/// SRC.
pub(super) fn places(
    source: &Reference,
    targets: &[Target],
    release: Option<&Release>,
    commit: Option<&str>,
) -> Result<Vec<Place>, Failure> {
    let mut places: Vec<Place> = Vec::new();
    let for_all = || release.map(Release::tags).unwrap_or_default().into_iter().chain(commit.map(Wanted::named));
    let is_bare = for_all().next().is_none();
    for Target { location, tags } in targets {
        let location = location.as_ref().unwrap_or(&source.location);
        let mut tags = tags.clone();
        if tags.is_empty() && is_bare {
            let missing =
                || Failure::usage(format!("{}: neither it nor SRC has a tag; give this TARGET one", location.name()));
            tags.push(own_tag(source).ok_or_else(missing)?);
        }
        add(&mut places, location, tags.into_iter().map(Wanted::named));
    }
    if places.is_empty() {
        add(&mut places, &source.location, []);
    }
    places.iter_mut().for_each(|place| for_all().for_each(|wanted| place.add(wanted)));
    if places.iter().all(|place| place.wanted.is_empty()) {
        return Err(Failure::usage("no tag to give it: name a TARGET, or say --semver, --git or --undo"));
    }
    Ok(places)
}

/// The tag of SRC, `latest` where neither tag nor digest was written.
fn own_tag(source: &Reference) -> Option<String> {
    source.tag.clone().or_else(|| source.tag_was_omitted().then(|| DEFAULT_TAG.to_owned()))
}

fn add(places: &mut Vec<Place>, location: &Location, wanted: impl IntoIterator<Item = Wanted>) {
    let at = places.iter().position(|place| place.location == *location).unwrap_or_else(|| {
        places.push(Place { location: location.clone(), wanted: Vec::new() });
        places.len() - 1
    });
    wanted.into_iter().for_each(|wanted| places[at].add(wanted));
}

impl Place {
    /// What was named first counts.
    fn add(&mut self, wanted: Wanted) {
        if self.wanted.iter().all(|there| there.tag != wanted.tag) {
            self.wanted.push(wanted);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(source: &str, targets: &[&str], release: Option<&str>, commit: Option<&str>) -> Vec<String> {
        let source: Reference = source.parse().expect("a reference");
        let targets: Vec<Target> = targets.iter().map(|text| text.parse().expect("a target")).collect();
        let release = release.map(|text| text.parse().expect("a release"));
        let places = places(&source, &targets, release.as_ref(), commit).expect("places");
        let tags = |place: Place| {
            let name = place.location.name();
            place.wanted.into_iter().map(move |wanted| format!("{name}:{}", wanted.tag))
        };
        places.into_iter().flat_map(tags).collect()
    }

    #[test]
    fn a_word_is_a_tag_beside_the_source_and_commas_give_several() {
        let all = ["r.io/a:v1", "r.io/a:staging", "r.io/a:b"];
        assert_eq!(wanted("r.io/a:x", &["v1,staging", "b", "v1"], None, None), all);
        let all = ["r.io/b:v1", "r.io/b:v2", "r.io/a:v3"];
        assert_eq!(wanted("r.io/a:x", &["r.io/b:v1,v2", "v3"], None, None), all);
        assert_eq!(wanted("r.io/a:x", &["llama:v1"], None, None), ["llama:v1"]);
    }

    #[test]
    fn a_target_without_a_tag_takes_the_sources() {
        assert_eq!(wanted("r.io/a:x", &["r.io/b"], None, None), ["r.io/b:x"]);
        assert_eq!(wanted("r.io/a", &["team/b"], None, None), ["team/b:latest"]);
        let pinned = format!("r.io/a@{}", crate::digest::Digest::of(b"")).parse().expect("a reference");
        let error = places(&pinned, &["r.io/b".parse().expect("a target")], None, None).expect_err("refused");
        assert!(error.message().contains("neither it nor SRC has a tag"), "{error:?}");
    }

    #[test]
    fn a_directory_may_hold_commas() {
        assert_eq!(wanted("r.io/a:x", &["oci:/srv/a,b:v1,v2"], None, None), ["oci:/srv/a,b:v1", "oci:/srv/a,b:v2"]);
        assert_eq!(wanted("r.io/a:x", &["oci:/srv/a,b"], None, None), ["oci:/srv/a,b:x"]);
    }

    #[test]
    fn a_release_and_a_commit_get_their_tags_wherever_a_target_is() {
        let all = ["r.io/a:1.4.2", "r.io/a:1.4", "r.io/a:1", "r.io/a:git-0a1b2c3"];
        assert_eq!(wanted("r.io/a:x", &[], Some("1.4.2"), Some("git-0a1b2c3")), all);
        let all = ["r.io/b:prod", "r.io/b:2.0.0-rc.1", "r.io/c:2.0.0-rc.1"];
        assert_eq!(wanted("r.io/a:x", &["r.io/b:prod", "r.io/c"], Some("2.0.0-rc.1"), None), all);
    }

    #[test]
    fn what_can_be_no_target_is_refused() {
        for (text, why) in [
            ("", "it is empty"),
            ("a,", "is not a reference"),
            (",a", "it is empty"),
            (&"a".repeat(129), "is not a tag: expected at most 128"),
            ("r.io/a,b", "is not a reference"),
            ("r.io/a:v1,r.io/b:v1", "is not a reference"),
            (&format!("r.io/a@{}", crate::digest::Digest::of(b"")), "has a digest"),
        ] {
            let error = text.parse::<Target>().expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
        let error = places(&"r.io/a:x".parse().expect("a reference"), &[], None, None).expect_err("refused");
        assert!(error.message().contains("name a TARGET"), "{error:?}");
    }
}
