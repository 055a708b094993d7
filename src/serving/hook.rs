//! The command that runs after a switch. Nobody waits for it, and nothing depends on what comes of it; the log tells.

use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;

use crate::digest::Digest;

/// Starts `command` by the shell.
pub(super) fn run(command: &str, dir: &Path, old: &Digest, new: &Digest) {
    let child = Command::new("/bin/sh")
        .arg("-c")
        .arg(command)
        .env("KITFS_DIR", dir)
        .env("KITFS_OLD", old.to_string())
        .env("KITFS_NEW", new.to_string())
        .stdin(Stdio::null())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => return tracing::error!(command, %error, "the command for a switch can't be started"),
    };
    let command = command.to_owned();
    tokio::spawn(async move {
        match child.wait().await {
            Ok(status) if status.success() => tracing::info!(command, "the command for a switch is done"),
            Ok(status) => tracing::warn!(command, %status, "the command for a switch has failed"),
            Err(error) => tracing::warn!(command, %error, "what became of the command for a switch is not known"),
        }
    });
}
