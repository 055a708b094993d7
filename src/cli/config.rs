//! The config file: defaults for flags, below the variables.
//!
//! TOML at `$KITFS_CONFIG`, else `$XDG_CONFIG_HOME/kitfs/config.toml`, else `~/.config/kitfs/config.toml`. One rule says
//! what may stand in it: whatever flag has a variable has a key, its name with `_`, and key `b` in the table `[a]` is the
//! same as key `a_b`. A key holds for every command that has the flag, and its value goes through the flag's own parser;
//! a flag that may be repeated takes an array of strings too. An empty list of what is allowed is refused: it reads as
//! "nothing", and a flag that was never given allows all.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgAction, Command};

use super::Failure;

/// The values of a config file; empty where there is none.
#[derive(Debug, Default)]
pub(super) struct Config {
    path: PathBuf,
    /// By the names of the flags.
    values: BTreeMap<String, Setting>,
}

/// What stands at one key.
#[derive(Debug)]
struct Setting {
    /// The key as written: `a_b`, or `a.b` where it stands in a table.
    key: String,
    values: Vec<String>,
    is_array: bool,
}

/// Lists that allow all where they are not set.
const ALLOWED: [&str; 2] = ["allow_registries", "allow_repositories"];

/// What a value may be, for errors.
const SCALARS: &str = "a string, an integer, true or false";

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
        let keys = table.into_iter().flat_map(|(key, value)| match value {
            toml::Value::Table(inner) => {
                let inner = inner.into_iter();
                inner.map(|(name, value)| (format!("{key}_{name}"), format!("{key}.{name}"), value)).collect()
            }
            value => vec![(key.clone(), key, value)],
        });
        for (flag, key, value) in keys {
            let setting = Setting::read(key, value).map_err(wrong)?;
            if let Some(twice) = values.insert(flag, setting) {
                return Err(wrong(format!("{} is there twice, also as a key of a table", twice.key)));
            }
        }
        Ok(Self { path, values })
    }

    /// Refuses keys that no flag has, arrays for flags that take one value, and lists that allow nothing.
    pub(super) fn check(&self, command: &Command) -> Result<(), Failure> {
        let mut known = BTreeMap::new();
        collect(command, &mut known);
        let path = self.path.display();
        for (flag, Setting { key, is_array, values }) in &self.values {
            match known.get(flag) {
                Some(_) if values.is_empty() && ALLOWED.contains(&flag.as_str()) => {
                    return Err(Failure::usage(format!(
                        "{path}: {key} is an empty list; name what is allowed, or leave the key out to allow all (to allow \
                         no registry: allow_repositories = [\"oci:/srv/kits/*\"], the kits on a disk)"
                    )));
                }
                Some(false) if *is_array => {
                    return Err(Failure::usage(format!("{path}: {key} is of type array; expected {SCALARS}")));
                }
                Some(_) => {}
                None => {
                    let known = known.into_keys().collect::<Vec<_>>().join(", ");
                    return Err(Failure::usage(format!("{path}: unknown key {key:?}; the keys are {known}")));
                }
            }
        }
        Ok(())
    }

    /// Makes the values the defaults of their flags. A variable that is empty counts as not set.
    pub(super) fn apply(&self, command: Command) -> Command {
        let with_default = |arg: clap::Arg| {
            let Some(variable) = arg.get_env().map(ToOwned::to_owned) else { return arg };
            let arg = match self.values.get(arg.get_id().as_str()) {
                Some(setting) => arg.default_values(setting.values.clone()),
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

impl Setting {
    fn read(key: String, value: toml::Value) -> Result<Self, String> {
        let text = |value: toml::Value| match value {
            toml::Value::String(text) => Ok(text),
            toml::Value::Integer(number) => Ok(number.to_string()),
            toml::Value::Boolean(truth) => Ok(truth.to_string()),
            other => Err(format!("{key} is of type {}; expected {SCALARS}", other.type_str())),
        };
        let is_array = value.is_array();
        let values = match value {
            toml::Value::Array(items) => items
                .into_iter()
                .map(|item| match item {
                    toml::Value::String(text) => Ok(text),
                    other => Err(format!("{key} holds a value of type {}; expected strings", other.type_str())),
                })
                .collect::<Result<_, _>>()?,
            value => vec![text(value)?],
        };
        Ok(Self { key, values, is_array })
    }
}

/// The flags that have a variable, and whether they may be repeated.
fn collect(command: &Command, known: &mut BTreeMap<String, bool>) {
    let settable = command.get_arguments().filter(|arg| arg.get_env().is_some());
    known.extend(settable.map(|arg| (arg.get_id().to_string(), matches!(arg.get_action(), ArgAction::Append))));
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
    // Both may hold a list.
    let holds = |set: &str| set == value || set.split(',').any(|part| part == value);
    let variable = variable(command, &id).filter(|name| std::env::var(name).is_ok_and(|set| holds(&set)));
    let key = config.values.get(&id).filter(|setting| setting.values.iter().any(|set| holds(set)));
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
        let date = message(parse("read_timeout = 1979-05-27"));
        assert_eq!(date, "/etc/x.toml: read_timeout is of type datetime; expected a string, an integer, true or false");
        let deep = message(parse("[trust.index]\na = 1"));
        assert_eq!(deep, "/etc/x.toml: trust.index is of type table; expected a string, an integer, true or false");
        let numbers = message(parse("[trust]\nindex = [1]"));
        assert_eq!(numbers, "/etc/x.toml: trust.index holds a value of type integer; expected strings");
        let twice = message(parse("trust_index = \"a\"\n[trust]\nindex = \"b\""));
        assert!(twice.contains("is there twice"), "{twice}");
    }

    #[test]
    fn a_flag_that_may_be_repeated_takes_an_array_and_no_other_does() {
        let check = |text| Config::parse("/etc/x.toml".into(), text).expect("parsed").check(&super::super::command());
        check("[trust]\nindex = [\"r.io/a\", \"r.io/b/*\"]").expect("taken");
        check("trust_index = \"r.io/a,r.io/b\"").expect("taken");
        let text = check("read_timeout = [\"1s\"]").expect_err("refused").message();
        assert_eq!(text, "/etc/x.toml: read_timeout is of type array; expected a string, an integer, true or false");
    }

    #[test]
    fn an_empty_list_of_what_is_allowed_is_refused_and_other_empty_lists_are_lists() {
        let check = |text| Config::parse("/etc/x.toml".into(), text).expect("parsed").check(&super::super::command());
        for (text, key) in [
            ("allow_registries = []", "allow_registries"),
            ("allow_repositories = []", "allow_repositories"),
            ("[allow]\nregistries = []", "allow.registries"),
        ] {
            let said = check(text).expect_err("refused").message();
            let expected = format!("/etc/x.toml: {key} is an empty list; name what is allowed, or leave the key out");
            assert!(said.starts_with(&expected), "{said}");
        }
        check("deny_tags = []\ntrust_index = []").expect("taken");
    }

    #[test]
    fn a_key_of_a_table_is_named_as_it_is_written() {
        let config = Config::parse("/etc/x.toml".into(), "[trust]\nindx = \"r.io/a\"").expect("parsed");
        let text = config.check(&super::super::command()).expect_err("refused").message();
        assert!(text.starts_with("/etc/x.toml: unknown key \"trust.indx\"; the keys are "), "{text}");
    }

    #[test]
    fn a_key_that_no_flag_has_is_refused() {
        let config = Config::parse("/etc/x.toml".into(), "readtimeout = \"1s\"").expect("parsed");
        let text = config.check(&super::super::command()).expect_err("refused").message();
        assert!(text.starts_with("/etc/x.toml: unknown key \"readtimeout\"; the keys are "), "{text}");
        assert!(text.contains("read_timeout"), "{text}");
    }
}
