//! `kitfs switch`: a mount serves another kit from now on. The daemon does it; this asks, and shows how far it is.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::Failure;
use super::config::absolute;
use super::options::{JsonArgs, ProgressArgs};
use super::output::{self, Output};
use super::progress::Waiting;
use crate::history::Action;
use crate::history::Event;
use crate::mount::{self, Condition, Mount, MountError, StateDir, control};
use crate::reference::{Location, Reference};
use crate::report::chain;
use crate::serving::answer::Request;

/// A switch takes as long as its kit takes to come; the daemon's own deadlines end it. Ten years.
const PATIENCE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How long a daemon may take to answer what it knows.
const AT_ONCE: Duration = Duration::from_secs(10);
/// As often as a person looks.
const TELL: Duration = Duration::from_millis(500);

/// Has a mount serve another kit, in one step
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs switch [OPTIONS] <DIR> <REF>
       kitfs switch [OPTIONS] <DIR> --follow",
    after_help = "\
What is opened from then on is of the new kit; open files, directories and maps go on with the
old one. Nothing changes if the new kit can't be resolved and opened first; with --prefetch, not
before all of it is here. The kit is opened as the mount's own flags say (filter, trust,
connection, policy). A mount that follows a tag stops following until the tag moves again.

Examples:
  kitfs switch llama ghcr.io/team/llama:8b-v2
  kitfs switch llama ghcr.io/team/llama:8b-v2 --prefetch    only once all of it is here
  kitfs switch llama --follow                               what its tag points at again"
)]
pub(super) struct Switch {
    /// The mount point
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// The kit
    #[arg(value_name = "REF", required_unless_present = "follow")]
    reference: Option<Reference>,
    /// Fetch all of it first
    #[arg(long, conflicts_with = "follow")]
    prefetch: bool,
    /// Follow the tag again that the mount was made to follow
    #[arg(long, conflicts_with = "reference")]
    follow: bool,
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    progress: ProgressArgs,
}

impl Switch {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let state = StateDir::from_env()?;
        let mount = live_at(&self.dir, &state)?;
        let Some(mut reference) = self.reference else {
            let answer = ask(&state, &mount, &Request::Follow, AT_ONCE).await?;
            let mut out = Output::new();
            if self.json.json {
                out.json(&answer)?;
            } else {
                let followed = answer["follow"]["reference"].as_str().unwrap_or_default();
                out.line(format_args!("{} follows {followed}", mount.record.mount_point.display()))?;
            }
            return out.finish();
        };
        // The daemon has another working directory.
        if let Location::Layout { dir } = &mut reference.location {
            *dir = absolute(dir)?;
        }
        let request = Request::Switch {
            reference: reference.to_string(),
            is_rollback: false,
            prefetch: self.prefetch,
            user: Event::now(Action::Switch, "").user,
        };
        let switched = follow_up(&state, &mount, &request, self.progress).await?;
        print(&switched, self.json)
    }
}

/// The mount on a directory, which must be served.
pub(super) fn live_at(dir: &Path, state: &StateDir) -> Result<Mount, Failure> {
    let dir = match mount::locate(dir) {
        Err(MountError::NoParent { dir, .. }) => return Err(MountError::NotMounted { dir }.into()),
        located => located?,
    };
    let found = state.list()?.into_iter().find(|mount| mount.record.mount_point == dir);
    let found = found.ok_or(MountError::NotMounted { dir })?;
    match found.condition {
        Condition::Live => Ok(found),
        Condition::Dead | Condition::Detached => Err(Failure::failed(format!(
            "the mount on {} is not served any more; kitfs status tells more",
            found.record.mount_point.display()
        ))),
    }
}

/// Asks the daemon of a mount.
pub(super) async fn ask(
    state: &StateDir,
    mount: &Mount,
    request: &Request,
    patience: Duration,
) -> Result<Value, Failure> {
    let answer = control::ask(&state.socket(&mount.record), &json!(request), patience).await;
    let answer = answer.map_err(|error| Failure::failed(chain(&error)))?;
    match answer["error"].as_str() {
        Some(why) => Err(Failure::failed(why)),
        None => Ok(answer),
    }
}

/// The same, and shows meanwhile what is being fetched.
pub(super) async fn follow_up(
    state: &StateDir,
    mount: &Mount,
    request: &Request,
    progress: ProgressArgs,
) -> Result<Value, Failure> {
    let mut waiting = None;
    let mut asked = std::pin::pin!(ask(state, mount, request, PATIENCE));
    loop {
        if let Ok(answer) = tokio::time::timeout(TELL, &mut asked).await {
            return answer;
        }
        let Ok(coming) = ask(state, mount, &Request::Coming, AT_ONCE).await else { continue };
        if let Ok(report) = serde_json::from_value(coming["prefetch"].clone()) {
            waiting.get_or_insert_with(|| Waiting::new(progress.mode())).show(report);
        }
    }
}

/// Says what is served now.
pub(super) fn print(switched: &Value, json: JsonArgs) -> Result<(), Failure> {
    let mut out = Output::new();
    if json.json {
        out.json(switched)?;
        return out.finish();
    }
    let text = |key: &str| switched[key].as_str().unwrap_or_default();
    for (key, title) in [("notes", "note"), ("warnings", "warning")] {
        let all = switched[key].as_array().into_iter().flatten().filter_map(Value::as_str);
        all.for_each(|said| output::say(title, said));
    }
    if text("from") == text("digest") {
        out.line(format_args!("{} serves {} already", text("mountpoint"), text("reference")))?;
    } else {
        out.line(format_args!("{} serves {}, before {}", text("mountpoint"), text("reference"), text("from")))?;
    }
    out.finish()
}
