//! The command line: one file a command.
//!
//! - `mount`, `unmount`, `status`, `switch`, `rollback`, `ls`, `cat`, `inspect`, `resolve`, `pull`, `tags`, `tag`,
//!   `diff`, `history`, `index`, `verify`, `cache`: the commands; `served`: what a mount tells, for people;
//!   `image_index`: what `inspect` tells of one; [`policy`]: what may be mounted and pulled.
//! - [`options`] and [`log`]: groups of flags that commands share; [`config`]: where their defaults come from.
//! - [`kits`]: from a reference to an opened kit; [`walk`]: paths in it; [`progress`]: what is being fetched.
//! - [`output`]: what is said on standard output and standard error; [`failure`]: errors and exit codes.
//!
//! Invariants: standard output carries results and nothing else; a flag overrides its variable, which overrides the
//! config file; exit codes are 0 for done, 1 for failed, 2 for wrong use.

mod cache;
mod cat;
mod config;
mod diff;
mod dry_run;
mod failure;
mod history;
mod image_index;
mod index;
mod inspect;
mod kits;
mod log;
mod ls;
mod mount;
mod options;
mod output;
mod policy;
mod progress;
mod pull;
mod resolve;
mod rollback;
mod served;
mod status;
mod switch;
mod tag;
mod tags;
mod unmount;
mod verify;
mod walk;
mod ways;

use clap::error::ErrorKind;
use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

pub use failure::Failure;

use config::Config;

/// What `--help` says below the options.
const EXAMPLES: &str = "\
Examples:
  kitfs mount ghcr.io/team/llama:8b          a kit from a registry, on ./llama
  kitfs mount oci:kits/llama /mnt/llama      a kit in an OCI image layout
  kitfs ls -lR ghcr.io/team/llama:8b         what is in it
  kitfs cat llama:8b README.md               a file of a kit in kit's local storage
  kitfs unmount llama

References:
  registry/repo[:tag][@digest]               in a registry
  oci:DIR[:tag][@digest]                     in an OCI image layout
  name[:tag][@digest]                        in kit's local storage

A flag overrides its variable (--read-timeout: KITFS_READ_TIMEOUT), which overrides the config file
(read_timeout = \"60s\" in $KITFS_CONFIG, else ~/.config/kitfs/config.toml).
Exit codes: 0 done, 1 failed, 2 wrong use.";

/// The commands by what they are for, as `--help` shows them.
const GROUPS: [(&str, &[&str]); 5] = [
    ("Mounts", &["mount", "unmount", "status", "switch", "rollback"]),
    ("Without a mount", &["ls", "cat", "inspect", "resolve", "pull"]),
    ("Tags and digests", &["tags", "tag", "diff", "history"]),
    ("Making kits readable in parts", &["index", "verify"]),
    ("The cache", &["cache"]),
];

/// Mounts ModelKits as read-only directories: lazily, verified, cached
#[derive(Debug, Parser)]
#[command(name = "kitfs", version, max_term_width = 120, after_help = EXAMPLES, disable_help_subcommand = true)]
pub struct Cli {
    #[command(flatten)]
    log: log::LogArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Mount(mount::Mount),
    Unmount(unmount::Unmount),
    Status(status::Status),
    Switch(switch::Switch),
    Rollback(rollback::Rollback),
    Ls(ls::Ls),
    Cat(cat::Cat),
    Inspect(inspect::Inspect),
    Resolve(resolve::Resolve),
    Pull(pull::Pull),
    Tags(tags::Tags),
    Diff(diff::Diff),
    Tag(tag::Tag),
    History(history::HistoryCommand),
    Index(index::Index),
    Verify(verify::Verify),
    Cache(cache::CacheCommand),
}

impl Cli {
    /// Reads arguments, variables and the config file.
    pub fn from_environment() -> Result<Self, Failure> {
        let command = command();
        let config = Config::load().and_then(|config| {
            config.check(&command)?;
            Ok(config)
        });
        let config = match config {
            Ok(config) => config,
            // Help is given whatever the config file looks like.
            Err(failure) => match command.try_get_matches() {
                Err(shown) if matches!(shown.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
                    return Err(Failure::Parser(shown));
                }
                _ => return Err(failure),
            },
        };
        let parsed = config.apply(command.clone()).try_get_matches();
        let parsed = parsed.and_then(|matches| Self::from_arg_matches(&matches));
        parsed.map_err(|error| config::explain(error, &command, &config))
    }

    /// Starts logging, as the flags say.
    pub fn start_log(&self) -> Result<(), Failure> {
        let serves = matches!(&self.command, Command::Mount(mount) if mount.serves());
        self.log.start(if serves { "info" } else { "warn" })
    }

    /// Runs the command.
    pub fn run(self) -> Result<(), Failure> {
        raise_descriptor_limit();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        // Dropping the runtime waits for what is being written to the cache.
        runtime.block_on(async {
            match self.command {
                Command::Mount(command) => command.run().await,
                Command::Unmount(command) => command.run().await,
                Command::Status(command) => command.run().await,
                Command::Switch(command) => command.run().await,
                Command::Rollback(command) => command.run().await,
                Command::Ls(command) => command.run().await,
                Command::Cat(command) => command.run().await,
                Command::Inspect(command) => command.run().await,
                Command::Resolve(command) => command.run().await,
                Command::Pull(command) => command.run().await,
                Command::Tags(command) => command.run().await,
                Command::Diff(command) => command.run().await,
                Command::Tag(command) => command.run().await,
                Command::History(command) => command.run(),
                Command::Index(command) => command.run().await,
                Command::Verify(command) => command.run().await,
                Command::Cache(command) => command.run().await,
            }
        })
    }
}

/// Allows as many descriptors as we may have: each file that is being filled takes one, and the usual limit of 1,024 is
/// meant for programs that call `select`. Where it can't be raised, the cache keeps less.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, rustix::process::Rlimit { current: limit.maximum, ..limit })
    {
        tracing::debug!(%error, "the limit of open files stays");
    }
}

/// The parser, with the commands of its help in groups.
fn command() -> clap::Command {
    let command = Cli::command();
    let about = |name: &str| command.find_subcommand(name).and_then(clap::Command::get_about).map(ToString::to_string);
    let line = |name: &&str| format!("  {name:<10}{}\n", about(name).unwrap_or_default());
    let group = |(title, names): &(&str, &[&str])| format!("{title}:\n{}", names.iter().map(line).collect::<String>());
    let groups = GROUPS.iter().map(group).collect::<Vec<_>>().join("\n");
    let template =
        format!("{{about}}\n\n{{usage-heading}} {{usage}}\n\n{groups}\nOptions:\n{{options}}{{after-help}}\n");
    // Which variable belongs to a flag follows from its name; one line for each would bury the rest.
    fn tidy(command: clap::Command) -> clap::Command {
        command.mut_args(|arg| arg.hide_env(true)).mut_subcommands(tidy)
    }
    tidy(command).help_template(template)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parser_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn every_command_is_in_a_group_of_the_help() {
        let grouped: Vec<&str> = GROUPS.iter().flat_map(|(_, names)| names.iter().copied()).collect();
        let command = command();
        let mut known: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).collect();
        known.sort_unstable();
        let mut grouped_sorted = grouped;
        grouped_sorted.sort_unstable();
        assert_eq!(grouped_sorted, known);
    }

    #[test]
    fn a_flag_its_variable_and_its_key_have_one_name() {
        fn check(command: &clap::Command) {
            for arg in command.get_arguments() {
                let Some(variable) = arg.get_env() else { continue };
                let (long, id) = (arg.get_long().expect("a flag"), arg.get_id().as_str());
                assert_eq!(long.replace('-', "_"), id);
                let variable = variable.to_str().expect("UTF-8");
                let ours = format!("KITFS_{}", id.to_uppercase());
                assert!(variable == ours || variable.starts_with("KITOPS_"), "--{long}: {variable}");
            }
            command.get_subcommands().for_each(check);
        }
        check(&command());
    }
}
