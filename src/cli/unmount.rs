//! `kitfs unmount`: ends mounts.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::options::JsonArgs;
use super::output::{self, Output};
use super::{Failure, status};
use crate::history::{Action, Event, History, Outcome};
use crate::mount::{self, Condition, MountError, StateDir, Unmounted};
use crate::report::chain;

/// Ends mounts and waits until their daemons have left
#[derive(Debug, Args)]
#[command(
    visible_alias = "umount",
    override_usage = "kitfs unmount [OPTIONS] <DIR>...
       kitfs unmount [OPTIONS] --all",
    after_help = "\
Examples:
  kitfs unmount llama
  kitfs unmount --all --lazy                 all of this user's, also those in use"
)]
pub(super) struct Unmount {
    /// The mount points
    #[arg(value_name = "DIR", required_unless_present = "all")]
    dirs: Vec<PathBuf>,
    /// All mounts of this user
    #[arg(short, long, conflicts_with = "dirs")]
    all: bool,
    /// Detach mounts that are in use; their daemons serve what is open until it is closed
    #[arg(short, long)]
    lazy: bool,
    #[command(flatten)]
    json: JsonArgs,
}

impl Unmount {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let state = StateDir::from_env()?;
        let dirs = if self.all { mounted(&state)? } else { self.dirs };
        let mut done = Vec::new();
        let mut errors = Vec::new();
        for dir in dirs {
            // One that stays must not keep the others.
            match mount::unmount(&dir, self.lazy, &state) {
                Ok(unmounted) => {
                    note_death(&unmounted, &state);
                    done.push(unmounted);
                }
                Err(error) => errors.push(error),
            }
        }
        let mut out = Output::new();
        if self.json.json {
            let all: Vec<_> = done.iter().map(as_json).collect();
            out.json(&json!({ "unmounted": all, "errors": errors.iter().map(|e| chain(e)).collect::<Vec<_>>() }))?;
        } else {
            for unmounted in &done {
                out.line(format_args!("unmounted {} ({})", unmounted.dir.display(), unmounted.shows))?;
            }
        }
        out.finish()?;
        for unmounted in done.iter().filter(|unmounted| !unmounted.ended) {
            let dir = unmounted.dir.display();
            output::say("note", format!("the daemon of {dir} leaves when the last open file is closed"));
        }
        end(errors)
    }
}

fn mounted(state: &StateDir) -> Result<Vec<PathBuf>, Failure> {
    let all = state.list()?.into_iter().filter(|mount| mount.condition != Condition::Detached);
    let dirs: Vec<PathBuf> = all.map(|mount| mount.record.mount_point).collect();
    if dirs.is_empty() {
        status::say_nothing_is_mounted();
    }
    Ok(dirs)
}

/// Writes down the end of a mount whose daemon had died, which could not do it itself.
fn note_death(unmounted: &Unmounted, state: &StateDir) {
    let Some(record) = unmounted.record.as_ref().filter(|_| unmounted.was_dead) else { return };
    let event = Event {
        outcome: Outcome::Failed("its daemon had died".to_owned()),
        digest: Some(record.digest),
        mount_point: Some(record.mount_point.clone()),
        mount: Some(record.id.clone()),
        ..Event::now(Action::Unmount, record.reference.clone())
    };
    if let Err(error) = History::at(state.root()).append(&event) {
        output::say("warning", chain(&error));
    }
}

fn as_json(unmounted: &Unmounted) -> serde_json::Value {
    json!({
        "mountpoint": unmounted.dir,
        "reference": unmounted.shows,
        "was_dead": unmounted.was_dead,
        "ended": unmounted.ended,
    })
}

/// Says every error; the last one is the command's.
fn end(mut errors: Vec<MountError>) -> Result<(), Failure> {
    let last = errors.pop();
    output::say_all("error", errors.iter().map(|error| chain(error)));
    last.map_or(Ok(()), |error| Err(error.into()))
}
