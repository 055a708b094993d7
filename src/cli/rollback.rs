//! `kitfs rollback`: a mount serves a kit again that it has served before, as the history tells.

use std::path::{Path, PathBuf};

use clap::Args;

use super::Failure;
use super::options::{JsonArgs, ProgressArgs};
use super::output;
use super::switch;
use crate::digest::Digest;
use crate::history::{Action, Event, History, Outcome};
use crate::mount::StateDir;
use crate::reference::Reference;
use crate::serving::answer::Request;

/// Has a mount serve an earlier kit again
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs rollback [OPTIONS] <DIR> [DIGEST|N]",
    after_help = "\
Without DIGEST or N it is the kit that was served before; again, the one before that. Processes
that have loaded files keep what they have loaded until they load it anew. A mount that follows
a tag stops following until the tag moves again; kitfs switch DIR --follow resumes it.

Examples:
  kitfs rollback llama
  kitfs rollback llama 2
  kitfs rollback llama sha256:4bf5a1c0"
)]
pub(super) struct Rollback {
    /// The mount point
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Which: a digest of one that was served on DIR, or its beginning; or how many back
    #[arg(value_name = "DIGEST|N", default_value = "1", hide_default_value = true)]
    to: String,
    /// Fetch all of it first
    #[arg(long)]
    prefetch: bool,
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    progress: ProgressArgs,
}

/// A kit that was served.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Past {
    digest: Digest,
    reference: String,
}

impl Rollback {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let state = StateDir::from_env()?;
        let mount = switch::live_at(&self.dir, &state)?;
        let history = History::at(state.root());
        let events = history.read().map_err(|error| Failure::failed(crate::report::chain(&error)))?;
        let past = find(&events, &mount.record.mount_point, mount.record.digest, &self.to)?;
        let mut reference: Reference = past.reference.parse().map_err(|error| {
            Failure::failed(format!("the history has {} served from what is no reference: {error}", past.digest))
        })?;
        (reference.tag, reference.digest) = (None, Some(past.digest));
        let request = Request::Switch {
            reference: reference.to_string(),
            is_rollback: true,
            prefetch: self.prefetch,
            user: Event::now(Action::Rollback, "").user,
        };
        let switched = switch::follow_up(&state, &mount, &request, self.progress).await?;
        switch::print(&switched, self.json)?;
        if !self.json.json {
            output::say("note", "processes that run keep what they have loaded until they load it anew");
        }
        Ok(())
    }
}

/// The kits that were served on a directory before the one that is now, the last first. What a rollback went back over is
/// not among them.
fn before(events: &[Event], dir: &Path, now: Digest) -> Vec<Past> {
    let mut line: Vec<Past> = Vec::new();
    for event in events {
        let (Some(digest), Outcome::Done) = (event.digest, &event.outcome) else { continue };
        if event.mount_point.as_deref() != Some(dir) {
            continue;
        }
        match event.action {
            Action::Mount | Action::Switch if line.last().is_none_or(|last| last.digest != digest) => {
                line.push(Past { digest, reference: event.reference.clone() });
            }
            Action::Rollback => {
                if let Some(at) = line.iter().rposition(|past| past.digest == digest) {
                    line.truncate(at + 1);
                } else {
                    line.push(Past { digest, reference: event.reference.clone() });
                }
            }
            Action::Mount | Action::Switch | Action::Tag | Action::Unmount => {}
        }
    }
    if line.last().is_some_and(|last| last.digest == now) {
        line.pop();
    }
    line.reverse();
    line
}

/// The kit that is meant by `to`: how many back, or a digest or its beginning.
fn find(events: &[Event], dir: &Path, now: Digest, to: &str) -> Result<Past, Failure> {
    /// Fewer digits of a digest are too easily a number, or another's.
    const LEAST: usize = 6;
    let at = dir.display();
    let hex = to.strip_prefix("sha256:").unwrap_or(to);
    if let (Ok(back), true) = (to.parse::<usize>(), hex.len() < LEAST) {
        let line = before(events, dir, now);
        let found = back.checked_sub(1).and_then(|at| line.get(at)).cloned();
        return found.ok_or_else(|| match (back, line.len()) {
            (0, _) => Failure::usage("0: expected 1 or more, or a digest"),
            (_, 0) => Failure::failed(format!("{at} has served no other kit before this one, but for those that a rollback left behind; kitfs history {at} shows all, and \
                 a digest of one of them goes there")),
            (_, known) => Failure::failed(format!("{at}: the history goes {known} back, not {back}")),
        });
    }
    if hex.len() < LEAST || !hex.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(Failure::usage(format!(
            "{to:?}: expected a number, or a digest or at least {LEAST} digits of its beginning"
        )));
    }
    let served = |event: &&Event| {
        event.mount_point.as_deref() == Some(dir) && event.outcome == Outcome::Done && event.action != Action::Unmount
    };
    let mut found: Vec<Past> = Vec::new();
    for event in events.iter().filter(served) {
        let Some(digest) = event.digest.filter(|digest| digest.hex().starts_with(hex)) else { continue };
        found.retain(|past| past.digest != digest);
        found.push(Past { digest, reference: event.reference.clone() });
    }
    match &found[..] {
        [one] => Ok(one.clone()),
        [] => Err(Failure::failed(format!(
            "{to} was not served on {at}, as far as the history goes; kitfs switch serves any kit"
        ))),
        several => Err(Failure::failed(format!(
            "{to} may be {} of the kits that {at} has served; give more digits",
            several.len()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(name: &str) -> Digest {
        Digest::of(name.as_bytes())
    }

    fn events(of: &[(Action, &str)]) -> Vec<Event> {
        let event = |(action, name): &(Action, &str)| Event {
            digest: Some(digest(name)),
            mount_point: Some("/mnt".into()),
            ..Event::now(*action, format!("r.io/{name}:1"))
        };
        of.iter().map(event).collect()
    }

    fn back(of: &[(Action, &str)], now: &str, to: &str) -> Result<String, String> {
        let found = find(&events(of), Path::new("/mnt"), digest(now), to);
        found.map(|past| past.reference).map_err(|failure| failure.message())
    }

    #[test]
    fn one_back_is_what_was_served_before_and_a_rollback_goes_on_from_where_it_went() {
        use Action::{Mount, Rollback, Switch, Unmount};
        let mut line = vec![(Mount, "a"), (Switch, "b"), (Switch, "b"), (Switch, "c")];
        assert_eq!(back(&line, "c", "1").as_deref(), Ok("r.io/b:1"));
        assert_eq!(back(&line, "c", "2").as_deref(), Ok("r.io/a:1"));
        assert!(back(&line, "c", "3").expect_err("no more").contains("goes 2 back"));
        line.push((Rollback, "b"));
        assert_eq!(back(&line, "b", "1").as_deref(), Ok("r.io/a:1"), "not c, which it came from");
        line.extend([(Unmount, "b"), (Mount, "d")]);
        assert_eq!(back(&line, "d", "1").as_deref(), Ok("r.io/b:1"), "of an earlier mount on the directory");
    }

    #[test]
    fn a_digest_may_be_short_but_must_be_one_that_was_served_there() {
        use Action::{Mount, Switch};
        let line = [(Mount, "a"), (Switch, "b")];
        let hex = digest("a").hex();
        assert_eq!(back(&line, "b", &hex[..8]).as_deref(), Ok("r.io/a:1"));
        assert_eq!(back(&line, "b", &format!("sha256:{hex}")).as_deref(), Ok("r.io/a:1"));
        assert!(back(&line, "b", "abcdef00").expect_err("another").contains("was not served"));
        assert!(back(&line, "b", "latest").expect_err("no digest").contains("expected a number"));
    }
}
