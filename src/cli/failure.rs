//! How a command ends when it does not end well.

use std::fmt::Display;
use std::process::ExitCode;

use super::output;
use crate::report::chain;

/// The exit code of wrong use, as clap has it too.
const WRONG_USE: u8 = 2;

/// Why a command ended early.
#[derive(Debug)]
pub enum Failure {
    /// What was asked for can't be done.
    Failed(String),
    /// It was asked wrongly.
    Usage(String),
    /// It was told already, to the command that started this daemon.
    Reported,
    /// Who read our output has read enough.
    ClosedPipe,
    /// What the parser has to say: help, the version, or wrong use.
    Parser(clap::Error),
}

impl Failure {
    pub(super) fn failed(message: impl Display) -> Self {
        Self::Failed(message.to_string())
    }

    pub(super) fn usage(message: impl Display) -> Self {
        Self::Usage(message.to_string())
    }

    /// The message, for a log or a report to another process.
    pub(super) fn message(&self) -> String {
        match self {
            Self::Failed(message) | Self::Usage(message) => message.clone(),
            Self::Reported => "reported before".to_owned(),
            Self::ClosedPipe => "standard output is closed".to_owned(),
            Self::Parser(error) => error.to_string(),
        }
    }

    /// Says what happened on standard error and gives the exit code.
    pub fn report(self) -> ExitCode {
        match self {
            Self::Failed(message) => {
                output::say("error", message);
                ExitCode::FAILURE
            }
            Self::Usage(message) => {
                output::say("error", message);
                ExitCode::from(WRONG_USE)
            }
            Self::Reported => ExitCode::FAILURE,
            Self::ClosedPipe => ExitCode::SUCCESS,
            Self::Parser(error) => {
                // Nobody is left to tell if even that fails.
                let _ = error.print();
                ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(WRONG_USE))
            }
        }
    }
}

/// An error with all its causes, in one line. (The parser's own goes into [`Failure::Parser`].)
impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Failed(chain(&error))
    }
}
