//! An image index as `kitfs inspect` shows it: the kits in it, and which one is taken.

use serde_json::{Value, json};

use super::Failure;
use super::options::ChoiceArgs;
use super::output::{Output, printable};
use crate::digest::Digest;
use crate::modelkit::error::ModelKitError;
use crate::modelkit::index::{ImageIndex, Platform, TITLE, Why};

/// An image index, and the kit that is taken from it.
pub(super) struct Shown<'a> {
    pub(super) digest: Digest,
    index: &'a ImageIndex,
    choice: Result<(Digest, Why), ModelKitError>,
}

impl<'a> Shown<'a> {
    pub(super) fn new(digest: Digest, index: &'a ImageIndex, wanted: &ChoiceArgs) -> Self {
        let choice = index.choose(wanted.platform.as_ref(), wanted.select.as_ref());
        let choice = choice.map(|(descriptor, why)| (descriptor.digest, why));
        Self { digest, index, choice }
    }

    /// Whether the index has several kits, and nothing says which.
    pub(super) fn is_undecided(&self) -> bool {
        matches!(self.choice, Err(ModelKitError::Ambiguous { .. }))
    }

    fn taken(&self) -> Option<Digest> {
        self.choice.as_ref().ok().map(|(digest, _)| *digest)
    }

    /// Why one is taken, or none.
    fn why(&self) -> String {
        match &self.choice {
            Ok((_, why)) => why.to_string(),
            Err(ModelKitError::Ambiguous { why, .. }) => {
                format!("it holds {why}: choose one with --select DIGEST or --platform OS/ARCH")
            }
            Err(error) => error.to_string(),
        }
    }

    /// The index as JSON; `tags` are those that point at it, where that was asked for.
    pub(super) fn json(&self, tags: Option<&[String]>) -> Value {
        let kits = self.index.kits().into_iter().map(|kit| {
            json!({
                "digest": kit.digest,
                "size": kit.size,
                "platform": kit.platform.as_ref().map(Platform::to_string),
                "title": kit.annotations.get(TITLE),
                "annotations": kit.annotations,
                "taken": self.taken() == Some(kit.digest),
            })
        });
        json!({
            "digest": self.digest,
            "manifests": self.index.manifests.len(),
            "chosen": self.taken(),
            "why": self.why(),
            "kits": kits.collect::<Vec<_>>(),
            "annotations": self.index.annotations,
            "tags": tags,
        })
    }

    /// What stands in the head of `inspect` for people.
    pub(super) fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![("index", self.digest.to_string())];
        lines.push(match self.taken() {
            Some(_) => ("taken", format!("the digest above, as {}", self.why())),
            None => ("taken", format!("none: {}", self.why())),
        });
        let annotations = self.index.annotations.iter();
        lines.extend(annotations.map(|(key, value)| ("of the index", printable(format!("{key}={value}").as_bytes()))));
        lines
    }

    /// The kits, one a line.
    pub(super) fn print_kits(&self, out: &mut Output) -> Result<(), Failure> {
        let mut table = vec![["IN THE INDEX", "TAKEN", "PLATFORM", "TITLE"].map(str::to_owned).to_vec()];
        for kit in self.index.kits() {
            let taken = if self.taken() == Some(kit.digest) { "yes" } else { "no" };
            let platform = kit.platform.as_ref().map_or_else(|| "-".to_owned(), Platform::to_string);
            let title = kit.annotations.get(TITLE).map_or("-", String::as_str);
            table.push(vec![
                kit.digest.to_string(),
                taken.to_owned(),
                printable(platform.as_bytes()),
                printable(title.as_bytes()),
            ]);
        }
        out.table(&table)
    }
}
