//! `--filter` with the semantics of `kit unpack`.
//!
//! A filter is `TYPE[,TYPE…][:NAME[,NAME…]]`; several are ORed; none means everything. Names match exactly, a name or a
//! path as the Kitfile writes it: no globs, no cleaning, no trimming. So `docs:` asks for the empty name, and matches
//! nothing among documents, which have none.

use super::Kind;
use super::error::ModelKitError;

/// What to mount. Empty means everything.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Filters(Vec<Filter>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Filter {
    types: Vec<Type>,
    /// `None`: all entries of the types.
    names: Option<Vec<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    Kitfile,
    Model,
    Datasets,
    Code,
    Docs,
    Prompts,
    McpServers,
}

const TYPES: [(&str, Type); 7] = [
    ("kitfile", Type::Kitfile),
    ("model", Type::Model),
    ("datasets", Type::Datasets),
    ("code", Type::Code),
    ("docs", Type::Docs),
    ("prompts", Type::Prompts),
    ("mcpservers", Type::McpServers),
];

impl Filters {
    /// Reads the values of all `--filter` flags.
    pub fn parse(filters: &[String]) -> Result<Self, ModelKitError> {
        filters.iter().map(|filter| parse(filter)).collect::<Result<_, _>>().map(Self)
    }

    /// Whether everything is wanted.
    pub fn is_everything(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the `Kitfile` is wanted.
    pub fn wants_kitfile(&self) -> bool {
        self.is_everything() || self.0.iter().any(|filter| filter.types.contains(&Type::Kitfile))
    }

    /// Whether an entry is wanted. Code and documents have no name, so only their path counts; where others have none,
    /// their name is empty.
    pub fn matches(&self, kind: Kind, name: Option<&str>, path: &str) -> bool {
        let (wanted, has_name) = (type_of(kind), !matches!(kind, Kind::Code | Kind::Docs));
        let is_named = |names: &Vec<String>| {
            names.iter().any(|wanted| wanted == path || (has_name && wanted == name.unwrap_or_default()))
        };
        self.is_everything()
            || self.0.iter().any(|filter| filter.types.contains(&wanted) && filter.names.as_ref().is_none_or(is_named))
    }

    /// Whether all entries of a kind are wanted, whatever they are called.
    pub fn wants_all(&self, kind: Kind) -> bool {
        let wants = |filter: &Filter| filter.names.is_none() && filter.types.contains(&type_of(kind));
        self.is_everything() || self.0.iter().any(wants)
    }

    /// What is wanted of a parent kit, which gives its model and no more. `None`: nothing, and it need not be read.
    pub fn for_parent(&self) -> Option<Filters> {
        let model = |names| Filter { types: vec![Type::Model], names };
        if self.is_everything() {
            return Some(Self(vec![model(None)]));
        }
        let narrowed: Vec<_> = self
            .0
            .iter()
            .filter(|filter| filter.types.contains(&Type::Model))
            .map(|filter| model(filter.names.clone()))
            .collect();
        (!narrowed.is_empty()).then_some(Self(narrowed))
    }
}

fn type_of(kind: Kind) -> Type {
    match kind {
        Kind::Model | Kind::ModelPart => Type::Model,
        Kind::Dataset => Type::Datasets,
        Kind::Prompt => Type::Prompts,
        Kind::McpServer => Type::McpServers,
        Kind::Code => Type::Code,
        Kind::Docs => Type::Docs,
    }
}

fn parse(filter: &str) -> Result<Filter, ModelKitError> {
    let invalid = |why| ModelKitError::InvalidFilter { filter: filter.to_owned(), why };
    let (types, names) = match filter.split_once(':') {
        Some((_, names)) if names.contains(':') => return Err(invalid("it has more than one `:`".to_owned())),
        Some((types, names)) => (types, Some(names.split(',').map(str::to_owned).collect())),
        None => (filter, None),
    };
    let parse_type = |name: &str| {
        let known = TYPES.iter().find(|(known, _)| *known == name).map(|(_, known)| *known);
        known.ok_or_else(|| {
            let all: Vec<_> = TYPES.iter().map(|(name, _)| *name).collect();
            invalid(format!("{name:?} is not one of the types {}", all.join(", ")))
        })
    };
    Ok(Filter { types: types.split(',').map(parse_type).collect::<Result<_, _>>()?, names })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn filters(texts: &[&str]) -> Filters {
        let texts: Vec<_> = texts.iter().map(|text| (*text).to_owned()).collect();
        Filters::parse(&texts).unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn no_filter_means_everything() {
        let all = filters(&[]);
        assert!(all.wants_kitfile());
        assert!(all.matches(Kind::Code, None, "src"));
    }

    #[test]
    fn names_match_exactly_a_name_or_a_path_as_written() {
        let named = filters(&["datasets:training,./data/val.jsonl"]);
        assert!(named.matches(Kind::Dataset, Some("training"), "data/train"));
        assert!(named.matches(Kind::Dataset, None, "./data/val.jsonl"));
        assert!(!named.matches(Kind::Dataset, None, "data/val.jsonl"));
        assert!(!named.matches(Kind::Docs, None, "training"));
        assert!(!named.wants_kitfile());
        assert!(!filters(&["model: tiny"]).matches(Kind::Model, Some("tiny"), "m"));
        assert!(!filters(&["code:x"]).matches(Kind::Code, Some("x"), "src"));
    }

    #[test]
    fn all_of_a_kind_is_wanted_where_no_name_is_given() {
        assert!(filters(&[]).wants_all(Kind::Docs));
        let some = filters(&["model,docs", "code:src"]);
        assert!(some.wants_all(Kind::ModelPart) && some.wants_all(Kind::Docs));
        assert!(!some.wants_all(Kind::Code) && !some.wants_all(Kind::Dataset));
    }

    #[test]
    fn an_empty_name_matches_what_could_have_a_name_and_has_none() {
        assert!(filters(&["datasets:"]).matches(Kind::Dataset, None, "data"));
        assert!(!filters(&["docs:"]).matches(Kind::Docs, None, "README.md"));
    }

    #[test]
    fn a_parent_gives_its_model_only() {
        let model = filters(&["model"]);
        assert_eq!(filters(&[]).for_parent(), Some(model.clone()));
        assert_eq!(filters(&["kitfile,model", "docs"]).for_parent(), Some(model));
        assert_eq!(filters(&["docs,model:x"]).for_parent(), Some(filters(&["model:x"])));
        assert_eq!(filters(&["code", "kitfile"]).for_parent(), None);
    }

    #[test]
    fn what_kit_refuses_is_refused_with_the_types_there_are() {
        for text in ["", "bogus", "Model", "model:a:b", "model,", " model"] {
            assert!(Filters::parse(&[text.to_owned()]).is_err(), "{text}");
        }
        let error = Filters::parse(&["bogus".to_owned()]).expect_err("not a type").to_string();
        assert!(error.contains("kitfile, model, datasets"), "{error}");
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in "\\PC{0,30}") {
            let _ = Filters::parse(&[text]);
        }
    }
}
