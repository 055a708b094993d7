//! The commit that a kit was made from, as git tells it.

use std::io;
use std::process::Output;

use tokio::process::Command;

use crate::cli::Failure;

/// The tag of the commit that is checked out where the command runs: `git-<short>`. A tree with changes is no commit's.
pub(super) async fn commit_tag() -> Result<String, Failure> {
    /// Enough to see what it is about.
    const SHOWN: usize = 3;
    let changes = git(&["status", "--porcelain"]).await?;
    let changes: Vec<&str> = changes.lines().map(str::trim).collect();
    if !changes.is_empty() {
        let more = if changes.len() > SHOWN { ", …" } else { "" };
        let shown = changes.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
        let why = "the tree differs from its commit, which then does not say what the kit was made from";
        return Err(Failure::failed(format!("--git: {why}: {shown}{more}; commit, stash or ignore that")));
    }
    Ok(format!("git-{}", git(&["rev-parse", "--short", "HEAD"]).await?.trim()))
}

async fn git(arguments: &[&str]) -> Result<String, Failure> {
    let called = || format!("git {}", arguments.join(" "));
    let Output { status, stdout, stderr } = Command::new("git").args(arguments).output().await.map_err(|error| {
        let what = if error.kind() == io::ErrorKind::NotFound { "git is not installed" } else { "git can't be run" };
        Failure::failed(format!("--git: {what}: {error}"))
    })?;
    if status.success() {
        return Ok(String::from_utf8_lossy(&stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&stderr);
    Err(Failure::failed(format!("--git: `{}` says: {}", called(), said.trim())))
}
