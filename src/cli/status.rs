//! `kitfs status`: the mounts of this user, and how they are.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::Args;
use serde_json::{Value, json};

use super::options::JsonArgs;
use super::output::{self, Output, printable};
use super::{Failure, served, ways};
use crate::mount::control::{self, ControlError};
use crate::mount::{Condition, Mount, MountError, StateDir};
use crate::report::chain;
use crate::serving::answer::{self, Request};
use crate::units::{format_duration, format_size};

/// How long a daemon may take to count its layers: it looks for each of their files on the disk.
const PATIENCE: Duration = Duration::from_secs(10);

/// Shows the mounts: what they serve, how it is proved, what is cached
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs status [OPTIONS] [DIR]",
    after_help = "\
Examples:
  kitfs status
  kitfs status --check llama                 whether its tag has moved
  kitfs status llama --json"
)]
pub(super) struct Status {
    /// Only the mount on this directory
    #[arg(value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Ask where the tag points now, and tell whether it has moved away from what is served
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    json: JsonArgs,
}

impl Status {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let state = StateDir::from_env()?;
        let mut mounts = state.list()?;
        if let Some(dir) = self.dir {
            let dir = match crate::mount::locate(&dir) {
                Err(MountError::NoParent { dir, .. }) => return Err(MountError::NotMounted { dir }.into()),
                located => located?,
            };
            mounts.retain(|mount| mount.record.mount_point == dir);
            if mounts.is_empty() {
                return Err(MountError::NotMounted { dir }.into());
            }
        }
        let mut all = Vec::new();
        for mount in &mounts {
            let live = mount.condition != Condition::Dead;
            all.push((mount, if live { Some(ask(&state, mount, self.check).await) } else { None }));
        }
        let mut out = Output::new();
        if self.json.json {
            let mounts = all.iter().map(|(mount, details)| with_details(mount, details.as_ref()));
            out.json(&json!({ "mounts": mounts.collect::<Vec<_>>() }))?;
        } else {
            if all.is_empty() {
                say_nothing_is_mounted();
            }
            for (at, (mount, details)) in all.iter().enumerate() {
                if at > 0 {
                    out.line("")?;
                }
                print(&mut out, mount, details.as_ref())?;
            }
        }
        out.finish()
    }
}

/// One line for each mount.
pub(super) fn list(json: JsonArgs) -> Result<(), Failure> {
    let mounts = StateDir::from_env()?.list()?;
    let mut out = Output::new();
    if json.json {
        out.json(&json!({ "mounts": mounts.iter().map(facts).collect::<Vec<_>>() }))?;
    } else {
        if mounts.is_empty() {
            say_nothing_is_mounted();
        }
        let row = |mount: &Mount| {
            vec![mount.record.mount_point.display().to_string(), mount.record.serves().to_owned(), condition(mount)]
        };
        out.table(&mounts.iter().map(row).collect::<Vec<_>>())?;
    }
    out.finish()
}

pub(super) fn say_nothing_is_mounted() {
    output::say("note", "nothing is mounted");
}

async fn ask(state: &StateDir, mount: &Mount, check: bool) -> Result<Value, ControlError> {
    let patience = if check { PATIENCE + answer::CHECK } else { PATIENCE };
    control::ask(&state.socket(&mount.record), &json!(Request::Status { check }), patience).await
}

fn facts(mount: &Mount) -> Value {
    let record = &mount.record;
    json!({
        "mountpoint": record.mount_point,
        "reference": record.serves(),
        "asked": record.reference,
        "digest": record.digest,
        "pid": record.pid,
        "since": since(mount),
        "condition": mount.condition,
        "log": record.log_file,
        "cache": record.cache_dir,
    })
}

fn with_details(mount: &Mount, details: Option<&Result<Value, ControlError>>) -> Value {
    let mut all = facts(mount);
    match (all.as_object_mut(), details) {
        (Some(all), Some(Ok(Value::Object(details)))) => all.extend(details.clone()),
        (Some(all), Some(Err(error))) => drop(all.insert("error".to_owned(), json!(chain(error)))),
        _ => {}
    }
    all
}

fn since(mount: &Mount) -> String {
    output::timestamp(i64::try_from(mount.record.started_at).unwrap_or(i64::MAX))
}

fn condition(mount: &Mount) -> String {
    let dir = mount.record.mount_point.display();
    match mount.condition {
        Condition::Live => "live".to_owned(),
        Condition::Dead => format!("dead: its daemon has died; clear it with kitfs unmount {dir}"),
        Condition::Detached => "detached: its daemon serves what is still open".to_owned(),
    }
}

fn print(out: &mut Output, mount: &Mount, details: Option<&Result<Value, ControlError>>) -> Result<(), Failure> {
    let record = &mount.record;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let age = Duration::from_secs(now.as_secs().saturating_sub(record.started_at));
    let mut lines = vec![
        ("kit", record.serves().to_owned()),
        ("condition", condition(mount)),
        ("since", format!("{} ({} ago)", since(mount), format_duration(age))),
        ("pid", record.pid.to_string()),
    ];
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    lines.extend(path(&record.cache_dir).map(|dir| ("cache", dir)));
    lines.extend(path(&record.log_file).map(|file| ("log", file)));
    let mut layers = Vec::new();
    match details {
        None => {}
        Some(Err(error)) => lines.push(("warning", chain(error))),
        Some(Ok(details)) => {
            let list = |key: &str| details[key].as_array().cloned().unwrap_or_default();
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            lines.push(("verify", text(&details["verify"])));
            lines.push(("trust", text(&details["trust"])));
            if let Ok(report) = serde_json::from_value(details["reads"].clone()) {
                lines.push(("reads", ways::in_words(&report)));
                lines.extend(ways::short_read_ahead(&report).map(|ahead| ("read-ahead", ahead)));
            }
            lines.extend(tag_in_words(&details["tag"]).map(|tag| ("tag", tag)));
            lines.extend(follow_in_words(&details["follow"]).map(|follow| ("follow", follow)));
            if let Some(labels) = details["labels"].as_object().filter(|labels| !labels.is_empty()) {
                let label = |(key, value): (&String, &Value)| format!("{key}={}", value.as_str().unwrap_or_default());
                lines.push(("labels", labels.iter().map(label).collect::<Vec<_>>().join(" ")));
            }
            let older: Vec<String> = list("trees").iter().skip(1).map(text).collect();
            if !older.is_empty() {
                lines.push(("older", format!("still open: {}", older.join(" "))));
            }
            if details["offline"] == true {
                lines.push(("offline", served::OFFLINE.to_owned()));
            }
            let prefetch = serde_json::from_value(details["prefetch"].clone()).ok();
            lines.extend(prefetch.map(|report| ("prefetch", served::in_words(&report))));
            if let Some(why) = details["full"].as_str() {
                lines.push(("full", format!("nothing more is kept for now: {why}")));
            }
            let several = [("notes", "note"), ("warnings", "warning"), ("conflicts", "conflict")];
            for (key, title) in several {
                lines.extend(list(key).iter().map(|value| (title, text(value))));
            }
            layers = list("layers");
        }
    }
    out.line(record.mount_point.display())?;
    let row = |(key, value): (&str, String)| vec![format!("  {key}"), printable(value.as_bytes())];
    out.table(&lines.into_iter().map(row).collect::<Vec<_>>())?;
    out.table(&layers.iter().map(layer).collect::<Vec<_>>())
}

/// Where a tag points now, next to what is served.
fn tag_in_words(tag: &Value) -> Option<String> {
    let text = |key: &str| tag[key].as_str();
    match (text("error"), text("tag"), text("digest")) {
        (Some(why), Some(tag), _) => Some(format!("{tag}: {why}")),
        (Some(why), None, _) => Some(why.to_owned()),
        (None, Some(name), Some(digest)) if tag["drift"] == true => Some(format!("{name} has moved to {digest}")),
        (None, Some(name), _) => Some(format!("{name} points at what is served")),
        _ => None,
    }
}

/// How a tag is followed.
fn follow_in_words(follow: &Value) -> Option<String> {
    let reference = follow["reference"].as_str()?;
    let at = follow["tag_digest"].as_str().unwrap_or_default();
    let drift = if follow["drift"] == true { format!("; the tag points at {at}") } else { String::new() };
    let failing = follow["error"].as_str().map(|why| format!("; the registry fails: {why}")).unwrap_or_default();
    Some(match follow["state"].as_str().unwrap_or_default() {
        "paused" => {
            format!(
                "{reference}, paused as another kit was chosen by hand{drift}; kitfs switch DIR --follow goes on{failing}"
            )
        }
        "settling" => format!("{reference}, about to switch when no file has been opened for a while{drift}"),
        "failing" => format!("{reference}, which fails: {}{drift}", follow["error"].as_str().unwrap_or_default()),
        _ => format!("{reference}{drift}"),
    })
}

/// A layer as a row of a table.
fn layer(layer: &Value) -> Vec<String> {
    let size = |key: &str| layer[key].as_u64();
    let bytes = |bytes: Option<u64>| format_size(bytes.unwrap_or(0));
    let mut state = match (layer["poisoned"].as_str(), size("filling"), size("content"), size("cached")) {
        (Some(why), ..) => format!("REFUSED: {why}"),
        (None, Some(now), ..) => format!("fetching, {} of {}", format_size(now), bytes(size("size"))),
        (None, None, Some(content), Some(cached)) if content == cached => "cached".to_owned(),
        (None, None, Some(content), cached) => format!("{} of {} cached", bytes(cached), format_size(content)),
        (None, None, None, _) if layer["counted"] == false => {
            "not counted in time: the cache's disk is slow".to_owned()
        }
        (None, None, None, _) => "not fetched".to_owned(),
    };
    if let Some(why) = layer["unstaged"].as_str() {
        state.push_str(&format!("; fetched again where it is not cached: {}", printable(why.as_bytes())));
    }
    let text = |key: &str| printable(layer[key].as_str().unwrap_or_default().as_bytes());
    vec![format!("  {}", text("type")), text("path"), bytes(size("size")), text("trust"), state, text("digest")]
}
