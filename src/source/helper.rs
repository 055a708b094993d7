//! Docker's credential helpers: `docker-credential-NAME get`, the registry's name on stdin, JSON on stdout.
//!
//! A helper that is missing, silent or broken is not fatal: the registry may be public. What was wrong goes into the
//! error if it is not.

use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

use crate::source::credentials::{Credential, Secret};

/// Helpers answer at once, or ask the user in a window that nobody sees: half a metadata deadline is enough.
const TIMEOUT: Duration = Duration::from_secs(10);
/// A user and a token take a few KiB.
const MAX_ANSWER: u64 = 1 << 20;

#[derive(Deserialize)]
struct Stored {
    #[serde(rename = "Username", default)]
    username: String,
    #[serde(rename = "Secret", default)]
    secret: Secret,
}

/// Asks the helper `name` for `server`: `Ok(None)` where it has nothing, `Err` with words for the user where it failed.
pub(super) async fn get(name: &str, server: &str) -> Result<Option<Credential>, String> {
    let program = format!("docker-credential-{name}");
    if name.is_empty() || name.contains('/') {
        return Err(format!("{name:?} is not the name of a credential helper"));
    }
    get_from(&program, server, TIMEOUT).await
}

async fn get_from(program: &str, server: &str, timeout: Duration) -> Result<Option<Credential>, String> {
    match tokio::time::timeout(timeout, run(program, server)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(format!("{program} did not answer within {timeout:?}")),
    }
}

async fn run(program: &str, server: &str) -> Result<Option<Credential>, String> {
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => format!("{program} is not installed"),
        _ => format!("{program} failed: {error}"),
    };
    let mut child = Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        // A helper may print anything there, a secret too.
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that does not read has its reasons; its answer tells.
        let _ = stdin.write_all(server.as_bytes()).await;
    }
    let mut answer = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MAX_ANSWER).read_to_end(&mut answer).await.map_err(failed)?;
    }
    let status = child.wait().await.map_err(failed)?;
    if !status.success() {
        return match String::from_utf8_lossy(&answer).contains("credentials not found") {
            true => Ok(None),
            false => Err(format!("{program} failed: {status}")),
        };
    }
    let stored: Stored = serde_json::from_slice(&answer).map_err(|_| format!("{program} did not answer with JSON"))?;
    Ok(Credential::from_user(stored.username, stored.secret))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A helper that answers as the server's name tells it to.
    const HELPER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/docker-credential-kitfs-test");

    async fn ask(server: &str, timeout: Duration) -> Result<Option<Credential>, String> {
        get_from(HELPER, server, timeout).await
    }

    #[tokio::test]
    async fn a_helper_is_told_the_server_and_its_user_and_secret_are_used() {
        let found = ask("known.example", TIMEOUT).await.expect("an answer");
        let password = Secret::new("secret of known.example".to_owned());
        assert_eq!(found, Some(Credential::Password { user: "me".to_owned(), password }));
        let found = ask("token.example", TIMEOUT).await.expect("an answer");
        assert_eq!(found, Some(Credential::Identity(Secret::new("refresh".to_owned()))));
    }

    #[tokio::test]
    async fn a_helper_without_an_entry_is_no_error() {
        assert_eq!(ask("unknown.example", TIMEOUT).await, Ok(None));
    }

    #[tokio::test]
    async fn a_helper_that_fails_or_sleeps_is_named_and_what_it_printed_is_not() {
        let failed = ask("broken.example", TIMEOUT).await.expect_err("it fails");
        assert!(failed.contains("docker-credential-kitfs-test failed") && !failed.contains("hunter2"), "{failed}");
        let babble = ask("babble.example", TIMEOUT).await.expect_err("no JSON");
        assert!(babble.contains("did not answer with JSON") && !babble.contains("hunter2"), "{babble}");
        let asleep = ask("slow.example", Duration::from_millis(200)).await.expect_err("it sleeps");
        assert!(asleep.contains("did not answer within"), "{asleep}");
    }

    #[tokio::test]
    async fn a_helpers_name_is_no_path() {
        assert!(get("../../bin/sh", "known.example").await.is_err());
    }
}
