//! The `kitfs` binary: arguments, logging, exit code.

use std::process::ExitCode;

use kitfs::cli::{Cli, Failure};

fn main() -> ExitCode {
    run().map_or_else(Failure::report, |()| ExitCode::SUCCESS)
}

fn run() -> Result<(), Failure> {
    let cli = Cli::from_environment()?;
    cli.start_log()?;
    cli.run()
}
