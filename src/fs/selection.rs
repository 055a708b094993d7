//! What is to be fetched before it is asked for.

use std::fmt;

use glob::MatchOptions;

use crate::path::TreePath;

/// As a shell matches: `*` stays within a name, a leading dot is a character like any other.
const OPTIONS: MatchOptions =
    MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: false };

/// Which files.
#[derive(Debug, Clone, Default)]
pub enum Selection {
    /// None.
    #[default]
    None,
    /// The siblings of a weight file that is being read.
    Auto,
    /// All.
    All,
    /// Those whose paths match one of these.
    Matching(Vec<Pattern>),
}

/// A pattern of paths in a kit; one without `/` is of names, wherever they are.
#[derive(Debug, Clone)]
pub struct Pattern {
    glob: glob::Pattern,
}

/// What was written is no selection.
#[derive(Debug, thiserror::Error)]
pub enum InvalidSelection {
    /// A word that says it all, among others.
    #[error("`{0}` stands alone: leave the others out")]
    Mixed(String),
    /// Not a pattern.
    #[error("{text:?} is no pattern, such as *.safetensors or model/**")]
    Pattern {
        /// What was written.
        text: String,
        /// What is wrong with it.
        #[source]
        cause: glob::PatternError,
    },
}

impl Selection {
    /// Reads `none`, `auto`, `all`, or patterns.
    pub fn parse(words: &[String]) -> Result<Self, InvalidSelection> {
        let is_alone = |word: &String| matches!(word.as_str(), "none" | "auto" | "all");
        match (words, words.iter().find(|word| is_alone(word))) {
            ([], _) => Ok(Self::None),
            ([word], Some(_)) => Ok(match word.as_str() {
                "auto" => Self::Auto,
                "all" => Self::All,
                _ => Self::None,
            }),
            (_, Some(word)) => Err(InvalidSelection::Mixed(word.clone())),
            (words, None) => Ok(Self::Matching(words.iter().map(|word| Pattern::new(word)).collect::<Result<_, _>>()?)),
        }
    }

    /// Whether a file is selected by its path.
    pub fn takes(&self, path: &TreePath) -> bool {
        match self {
            Self::None | Self::Auto => false,
            Self::All => true,
            Self::Matching(patterns) => patterns.iter().any(|pattern| pattern.takes(path)),
        }
    }

    /// Whether a file at or below this path may be.
    pub fn may_take_below(&self, root: &TreePath) -> bool {
        match self {
            Self::None | Self::Auto => false,
            Self::All => true,
            Self::Matching(patterns) => patterns.iter().any(|pattern| pattern.may_take_below(root)),
        }
    }
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Auto => f.write_str("auto"),
            Self::All => f.write_str("all"),
            Self::Matching(patterns) => {
                let words: Vec<_> = patterns.iter().map(|pattern| pattern.glob.as_str()).collect();
                f.write_str(&words.join(","))
            }
        }
    }
}

impl Pattern {
    fn new(text: &str) -> Result<Self, InvalidSelection> {
        let glob = glob::Pattern::new(text.trim_start_matches('/'));
        let glob = glob.map_err(|cause| InvalidSelection::Pattern { text: text.to_owned(), cause })?;
        Ok(Self { glob })
    }

    fn is_of_names(&self) -> bool {
        !self.glob.as_str().contains('/')
    }

    fn takes(&self, path: &TreePath) -> bool {
        let text = if self.is_of_names() { path.name().unwrap_or_default() } else { path.as_bytes() };
        self.glob.matches_with(&String::from_utf8_lossy(text), OPTIONS)
    }

    fn may_take_below(&self, root: &TreePath) -> bool {
        if self.is_of_names() {
            return true;
        }
        let mut parts = self.glob.as_str().split('/');
        for name in root.components() {
            match parts.next() {
                None => return false,
                Some("**") => return true,
                Some(part) => {
                    let name = String::from_utf8_lossy(name);
                    // A part that is no pattern by itself may be a piece of one.
                    if glob::Pattern::new(part).is_ok_and(|part| !part.matches_with(&name, OPTIONS)) {
                        return false;
                    }
                }
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> TreePath {
        TreePath::clean(text.as_bytes()).expect("a path")
    }

    fn selection(words: &[&str]) -> Selection {
        Selection::parse(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>()).expect("a selection")
    }

    #[test]
    fn a_pattern_without_a_slash_is_of_names_and_one_with_it_of_paths() {
        for (pattern, taken, left) in [
            (
                "*.safetensors",
                &["a.safetensors", "model/b/a.safetensors"][..],
                &["a.safetensors.json", "safetensors"][..],
            ),
            ("model/**", &["model/a", "model/b/c/.d"], &["models/a", "x/model/a", "model"]),
            ("/model/*.bin", &["model/a.bin"], &["model/b/a.bin", "a.bin"]),
            ("**/*.txt", &["a.txt", "b/c/a.txt"], &["a.md"]),
            ("[Rr]*", &["README.md", "docs/readme"], &["docs/x"]),
        ] {
            let selection = selection(&[pattern]);
            assert!(taken.iter().all(|text| selection.takes(&path(text))), "{pattern}");
            assert!(!left.iter().any(|text| selection.takes(&path(text))), "{pattern}");
        }
        assert!(selection(&["*.a", "*.b"]).takes(&path("x.b")));
    }

    #[test]
    fn a_layer_where_nothing_can_match_is_known_by_its_root() {
        for (pattern, may, cant) in [
            ("model/**", &["", "model", "model/a/b"][..], &["data", "models"][..]),
            ("*/x/a.bin", &["", "model", "model/x", "model/x/a.bin"], &["model/y", "model/x/a.bin/c"]),
            ("**/a", &["model", "x/y"], &[]),
            ("*.bin", &["", "data/x"], &[]),
        ] {
            let selection = selection(&[pattern]);
            assert!(may.iter().all(|root| selection.may_take_below(&path(root))), "{pattern}");
            assert!(!cant.iter().any(|root| selection.may_take_below(&path(root))), "{pattern}");
        }
    }

    #[test]
    fn a_word_that_says_it_all_stands_alone() {
        assert!(matches!(selection(&[]), Selection::None));
        assert!(matches!(selection(&["all"]), Selection::All));
        for words in [&["all", "*.bin"][..], &["*.bin", "none"], &["auto", "auto"]] {
            let words: Vec<_> = words.iter().map(|word| (*word).to_owned()).collect();
            assert!(matches!(Selection::parse(&words), Err(InvalidSelection::Mixed(_))), "{words:?}");
        }
        assert!(matches!(Selection::parse(&["[".to_owned()]), Err(InvalidSelection::Pattern { .. })));
    }
}
