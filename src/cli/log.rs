//! Logging: to standard error, which in a daemon is its log file.

use std::io::{self, IsTerminal as _};

use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use super::Failure;

/// What is logged, and how.
#[derive(Debug, Args)]
pub(super) struct LogArgs {
    /// What to log: error, warn, info, debug or trace, or filters such as kitfs::fetch=debug
    #[arg(long, env = "KITFS_LOG_LEVEL", value_name = "LEVEL", global = true, help_heading = "Log")]
    log_level: Option<String>,
    /// How to log
    #[arg(long, env = "KITFS_LOG_FORMAT", value_enum, default_value_t, global = true, help_heading = "Log")]
    log_format: LogFormat,
}

/// The form of a line.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum LogFormat {
    #[default]
    Text,
    Json,
}

impl LogArgs {
    /// Starts logging, at `default` unless a level is given.
    pub(super) fn start(&self, default: &str) -> Result<(), Failure> {
        let level = self.log_level.as_deref().unwrap_or(default);
        let wrong = || {
            Failure::usage(format!(
                "--log-level: {level:?} is neither error, warn, info, debug nor trace, nor a list of filters such as \
                 kitfs::fetch=debug"
            ))
        };
        // A word that is no level would be taken for a module's name, and silence all others.
        if level.chars().all(char::is_alphanumeric) && level.parse::<LevelFilter>().is_err() {
            return Err(wrong());
        }
        let filter = EnvFilter::try_new(filter(level)).map_err(|_| wrong())?;
        let log = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(io::stderr)
            // A log that can't be written, on a full disk, would be reported on standard error, which is the log: a panic.
            .log_internal_errors(false)
            .with_ansi(io::stderr().is_terminal());
        match self.log_format {
            LogFormat::Text => log.init(),
            LogFormat::Json => log.json().init(),
        }
        Ok(())
    }
}

/// A bare level is for kitfs; the libraries below it are only of interest where something goes wrong in them.
fn filter(level: &str) -> String {
    match level {
        "error" => "error".to_owned(),
        "warn" | "info" | "debug" | "trace" => format!("warn,kitfs={level}"),
        filters => filters.to_owned(),
    }
}
