//! What a tag was before: what the history of this machine tells of it.

use crate::cli::Failure;
use crate::digest::Digest;
use crate::history::{Action, Event, History, Outcome};
use crate::reference::{Location, Reference};

/// The last move of a tag.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LastMove {
    /// What it was before.
    pub(super) from: Digest,
    /// What it has been since.
    pub(super) to: Digest,
}

/// A tag as the history names it: always with the tag, and an OCI layout by its absolute directory.
pub(in crate::cli) fn recorded(name: &Reference) -> String {
    let location = match &name.location {
        Location::Layout { dir } => Location::Layout { dir: std::path::absolute(dir).unwrap_or_else(|_| dir.clone()) },
        other => other.clone(),
    };
    Reference { location, tag: Some(name.tag().to_owned()), digest: None }.to_string()
}

/// The last move of a tag that the history knows of.
pub(super) fn last_move(history: &History, name: &Reference) -> Result<LastMove, Failure> {
    of(&history.read()?, name)
}

fn of(events: &[Event], name: &Reference) -> Result<LastMove, Failure> {
    let (reference, repository, tag) = (recorded(name), name.location.name(), name.tag());
    let is_move =
        |event: &&Event| event.action == Action::Tag && event.outcome == Outcome::Done && event.reference == reference;
    match events.iter().rfind(is_move) {
        Some(Event { from: Some(from), digest: Some(to), .. }) => Ok(LastMove { from: *from, to: *to }),
        Some(Event { digest: Some(made), .. }) => Err(Failure::failed(format!(
            "{repository}:{tag} was made, as {made}: there was no such tag before, and nothing to restore"
        ))),
        _ => Err(Failure::failed(format!(
            "the history of this machine knows of no move of {repository}:{tag}; to restore a digest that you know: \
             kitfs tag {repository}@sha256:… {tag} --move"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moved(reference: &str, from: Option<&str>, to: &str) -> Event {
        let digest = |text: &str| Digest::of(text.as_bytes());
        Event { from: from.map(digest), digest: Some(digest(to)), ..Event::now(Action::Tag, reference) }
    }

    #[test]
    fn the_last_move_of_the_tag_counts_and_nothing_else() {
        let name: Reference = "r.io/a:prod".parse().expect("a reference");
        let mut events = vec![
            moved("r.io/a:prod", Some("1"), "2"),
            moved("r.io/a:prod", Some("2"), "3"),
            moved("r.io/a:x", None, "9"),
        ];
        events.push(Event { outcome: Outcome::Failed("no".to_owned()), ..moved("r.io/a:prod", Some("3"), "4") });
        events.push(Event { action: Action::Mount, ..moved("r.io/a:prod", None, "5") });
        let expected = LastMove { from: Digest::of(b"2"), to: Digest::of(b"3") };
        assert_eq!(of(&events, &name).expect("a move"), expected);
        let made = of(&[moved("r.io/a:prod", None, "1")], &name).expect_err("nothing before").message();
        assert!(made.contains("nothing to restore"), "{made}");
        let unknown = of(&events, &"r.io/b:prod".parse().expect("a reference")).expect_err("unknown").message();
        assert!(unknown.contains("kitfs tag r.io/b@sha256:… prod --move"), "{unknown}");
    }

    #[test]
    fn a_layout_is_the_same_from_wherever_it_is_named() {
        let here = std::env::current_dir().expect("a directory").join("kits");
        let name = |text: &str| recorded(&text.parse().expect("a reference"));
        assert_eq!(name("oci:kits:v1"), name(&format!("oci:{}:v1", here.display())));
        assert_eq!(name("llama"), "llama:latest");
    }
}
