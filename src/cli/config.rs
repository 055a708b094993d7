//! The config file: defaults for flags, below the variables.
//!
//! TOML at `$KITFS_CONFIG`, else `$XDG_CONFIG_HOME/kitfs/config.toml`, else `~/.config/kitfs/config.toml`. One rule says
//! what may stand in it: whatever flag has a variable has a key, its name with `_`. A key holds for every command that has
//! the flag, and its value goes through the flag's own parser.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use clap::Command;
use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::Failure;

/// The values of a config file; empty where there is none.
#[derive(Debug, Default)]
pub(super) struct Config {
    path: PathBuf,
    values: BTreeMap<String, String>,
}

impl Config {
    /// Reads the config file. A file that a variable names must be there.
    pub(super) fn load() -> Result<Self, Failure> {
        let Some((path, is_named)) = find(|name| std::env::var_os(name)) else { return Ok(Self::default()) };
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::parse(path, &text),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !is_named => Ok(Self::default()),
            Err(error) => Err(Failure::usage(format!("the config file {} can't be read: {error}", path.display()))),
        }
    }

    fn parse(path: PathBuf, text: &str) -> Result<Self, Failure> {
        let wrong = |what: String| Failure::usage(format!("{}: {what}", path.display()));
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].lines().count().max(1));
            wrong(format!("line {line}: {}", error.message()))
        })?;
        let mut values = BTreeMap::new();
        for (key, value) in table {
            let value = match value {
                toml::Value::String(text) => text,
                toml::Value::Integer(number) => number.to_string(),
                toml::Value::Boolean(truth) => truth.to_string(),
                other => {
                    let found = other.type_str();
                    return Err(wrong(format!(
                        "{key} is of type {found}; expected a string, an integer, true or false"
                    )));
                }
            };
            values.insert(key, value);
        }
        Ok(Self { path, values })
    }

    /// Refuses keys that no flag has.
    pub(super) fn check(&self, command: &Command) -> Result<(), Failure> {
        let mut known = BTreeSet::new();
        collect(command, &mut known);
        match self.values.keys().find(|key| !known.contains(key.as_str())) {
            None => Ok(()),
            Some(key) => {
                let known = known.into_iter().collect::<Vec<_>>().join(", ");
                let path = self.path.display();
                Err(Failure::usage(format!("{path}: unknown key {key:?}; the keys are {known}")))
            }
        }
    }

    /// Makes the values the defaults of their flags. A variable that is empty counts as not set.
    pub(super) fn apply(&self, command: Command) -> Command {
        let with_default = |arg: clap::Arg| {
            let Some(variable) = arg.get_env().map(ToOwned::to_owned) else { return arg };
            let arg = match self.values.get(arg.get_id().as_str()) {
                Some(value) => arg.default_value(value.clone()),
                None => arg,
            };
            let is_empty = std::env::var_os(variable).is_some_and(|value| value.is_empty());
            if is_empty { arg.env(Resettable::Reset) } else { arg }
        };
        command.mut_args(with_default).mut_subcommands(|sub| self.apply(sub))
    }
}

fn find(variable: impl Fn(&str) -> Option<OsString>) -> Option<(PathBuf, bool)> {
    let set = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = set("KITFS_CONFIG") {
        return Some((path, true));
    }
    // The XDG specification says to ignore relative paths.
    let dir = set("XDG_CONFIG_HOME").filter(|path| path.is_absolute());
    let dir = dir.or_else(|| set("HOME").map(|home| home.join(".config")))?;
    Some((dir.join("kitfs/config.toml"), false))
}

fn collect(command: &Command, known: &mut BTreeSet<String>) {
    let settable = command.get_arguments().filter(|arg| arg.get_env().is_some());
    known.extend(settable.map(|arg| arg.get_id().to_string()));
    command.get_subcommands().for_each(|sub| collect(sub, known));
}

/// Says in one line which value is wrong and where it was read; the rest is the parser's to say.
pub(super) fn explain(error: clap::Error, command: &Command, config: &Config) -> Failure {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    let (Some(arg), Some(value)) = (context(ContextKind::InvalidArg), context(ContextKind::InvalidValue)) else {
        return Failure::Parser(error);
    };
    let why = match (error.kind(), error.get(ContextKind::ValidValue)) {
        (ErrorKind::ValueValidation, _) => match error.source() {
            // Our own errors quote what was read; those of the standard library do not.
            Some(cause) if cause.to_string().contains(&format!("{value:?}")) => cause.to_string(),
            Some(cause) => format!("{value:?}: {cause}"),
            None => return Failure::Parser(error),
        },
        (ErrorKind::InvalidValue, _) if value.is_empty() => "the value is empty".to_owned(),
        (ErrorKind::InvalidValue, Some(ContextValue::Strings(allowed))) => {
            format!("{value:?} is not one of {}", allowed.join(", "))
        }
        _ => return Failure::Parser(error),
    };
    // `--cert <FILE>`, `--tls-verify[=<true|false>]`, `<REF>`, `[PATH]`.
    let name = match arg.split([' ', '[', '=']).next() {
        Some(flag) if flag.starts_with("--") => flag,
        _ => arg.trim_matches(['<', '>', '[', ']', '.']),
    };
    let origin = origin(name, &value, command, config).map(|origin| format!(" (from {origin})")).unwrap_or_default();
    Failure::usage(format!("{name}: {why}{origin}"))
}

/// Where the value of a flag was read, if it was not given as a flag.
fn origin(flag: &str, value: &str, command: &Command, config: &Config) -> Option<String> {
    let id = flag.strip_prefix("--")?.replace('-', "_");
    let given = std::env::args().any(|arg| arg == flag || arg.starts_with(&format!("{flag}=")));
    if given {
        return None;
    }
    let variable = variable(command, &id).filter(|name| std::env::var(name).is_ok_and(|set| set == value));
    let key = config.values.get(&id).filter(|set| *set == value);
    variable.or_else(|| key.map(|_| config.path.display().to_string()))
}

fn variable(command: &Command, id: &str) -> Option<String> {
    let own = command.get_arguments().find(|arg| arg.get_id() == id).and_then(clap::Arg::get_env);
    let own = own.map(|name| name.to_string_lossy().into_owned());
    own.or_else(|| command.get_subcommands().find_map(|sub| variable(sub, id)))
}

/// An absolute path, so that it means the same after a daemon has left the working directory.
pub(super) fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| Failure::failed(format!("{}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(outcome: Result<Config, Failure>) -> String {
        outcome.expect_err("refused").message()
    }

    #[test]
    fn the_file_is_found_in_order() {
        let with = |set: &'static [&'static str]| {
            find(move |name| set.contains(&name).then(|| OsString::from(format!("/{name}"))))
        };
        assert_eq!(with(&["KITFS_CONFIG", "XDG_CONFIG_HOME", "HOME"]), Some(("/KITFS_CONFIG".into(), true)));
        let xdg = with(&["XDG_CONFIG_HOME", "HOME"]);
        assert_eq!(xdg, Some(("/XDG_CONFIG_HOME/kitfs/config.toml".into(), false)));
        assert_eq!(with(&["HOME"]), Some(("/HOME/.config/kitfs/config.toml".into(), false)));
        assert_eq!(with(&[]), None);
    }

    #[test]
    fn what_is_wrong_in_a_file_is_named_with_the_file() {
        let parse = |text| Config::parse("/etc/x.toml".into(), text);
        assert!(message(parse("a = 1\nb = [")).starts_with("/etc/x.toml: line 2: "));
        let list = message(parse("filter = [\"model\"]"));
        assert_eq!(list, "/etc/x.toml: filter is of type array; expected a string, an integer, true or false");
    }

    #[test]
    fn a_key_that_no_flag_has_is_refused() {
        let config = Config::parse("/etc/x.toml".into(), "readtimeout = \"1s\"").expect("parsed");
        let text = config.check(&super::super::command()).expect_err("refused").message();
        assert!(text.starts_with("/etc/x.toml: unknown key \"readtimeout\"; the keys are "), "{text}");
        assert!(text.contains("read_timeout"), "{text}");
    }
}
