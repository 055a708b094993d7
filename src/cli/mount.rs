//! `kitfs mount`: serves a kit until it is unmounted; without a reference lists what is mounted.
//!
//! The command starts itself again as the daemon ([`crate::mount::daemon`]), which does all the work and reports; or, in
//! the foreground, it does the work itself. Either way [`Mount::serve`] is what happens.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args, ValueEnum};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use super::config::absolute;
use super::history::{HistoryArgs, parse_label};
use super::kits::{self, KitArgs};
use super::options::{JsonArgs, MountVerifyArgs, ProgressArgs};
use super::policy::PolicyArgs;
use super::progress::{Steps, Waiting};
use super::ways::WaysArgs;
use super::{Failure, dry_run, served, status};
use crate::cache::Cache;
use crate::fetch::{Access, Request};
use crate::fs::prefetch::{Report, State};
use crate::fs::trees::Trees;
use crate::fs::{Fs, Ownership, Selection};
use crate::mount::daemon::{self, Reporter};
use crate::mount::{self, Left, MountPoint, StateDir};
use crate::reference::{Location, Reference};
use crate::report::chain;
use crate::serving::answer::answer;
use crate::serving::follow::{self, Follow, Pace};
use crate::serving::served::Served;
use crate::serving::{Opened, Opener, Purpose, Serving};
use crate::{source, units};

/// Mounts a kit on a directory; without REF lists the mounts
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs mount [OPTIONS] [REF] [DIR]",
    after_help = "\
Examples:
  kitfs mount ghcr.io/team/llama:8b                    on ./llama
  kitfs mount llama:8b /mnt/llama --filter model       the model alone
  kitfs mount --dry-run oci:kits/llama                 what would be served and fetched
  kitfs mount --prefetch all --wait llama:8b           returns when all of it is here
  kitfs mount --follow ghcr.io/team/llama:production   another kit when the tag moves
  sudo kitfs mount --allow-other llama:8b /mnt/llama   for other users and containers"
)]
pub(super) struct Mount {
    /// The kit
    #[arg(value_name = "REF")]
    reference: Option<Reference>,
    /// Where: an empty directory, made if it is missing [default: ./ and the repository's last part]
    #[arg(value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Serve from this process, and log to standard error
    #[arg(short, long, requires = "reference")]
    foreground: bool,
    /// Show tree, sizes, trust and what would be fetched; mount nothing
    #[arg(long, requires = "reference", conflicts_with = "foreground")]
    dry_run: bool,
    /// Fetch before it is read, in the background: nothing (none), what follows a weight file that is read (auto), all, or
    /// the files whose paths match, as *.safetensors or model/**; may be repeated, or take several with commas between
    #[arg(
        long,
        env = "KITFS_PREFETCH",
        value_name = "none|auto|all|PATTERN",
        value_delimiter = ',',
        default_value = "none"
    )]
    prefetch: Vec<String>,
    /// Return when what is to be prefetched is here; the mount is of use before. If it fails, the mount stays
    #[arg(long, requires = "reference", conflicts_with = "dry_run")]
    wait: bool,
    /// What the history and `status` tell with the mount, such as job=4711; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_label, requires = "reference")]
    label: Vec<(String, String)>,
    #[command(flatten)]
    follow: FollowArgs,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    ways: WaysArgs,
    #[command(flatten)]
    kit: KitArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    history: HistoryArgs,
    #[command(flatten)]
    verify: MountVerifyArgs,
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    progress: ProgressArgs,
}

/// Whether the mount goes with its tag.
#[derive(Debug, Args)]
#[command(next_help_heading = "Following a tag")]
struct FollowArgs {
    /// Serve what the tag points at, also when it moves
    #[arg(long, requires = "reference", conflicts_with = "dry_run")]
    follow: bool,
    /// How often the tag is asked for
    #[arg(long, env = "KITFS_INTERVAL", value_name = "DURATION", default_value = "30s", value_parser = units::parse_duration)]
    interval: Duration,
    /// Switch when no file was opened for so long, as a loader that opens one after the other must not get two kits
    #[arg(long, env = "KITFS_SETTLE", value_name = "DURATION", default_value = "30s", value_parser = units::parse_duration)]
    settle: Duration,
    /// Switch after so long in any case
    #[arg(long, env = "KITFS_SETTLE_MAX", value_name = "DURATION", default_value = "10m", value_parser = units::parse_duration)]
    settle_max: Duration,
    /// A command that the shell runs after each switch, with KITFS_DIR, KITFS_OLD and KITFS_NEW; nothing waits for it
    #[arg(long, env = "KITFS_ON_SWITCH", value_name = "COMMAND")]
    on_switch: Option<String>,
}

/// Who may read, and what owners and modes they see.
#[derive(Debug, Args)]
#[command(next_help_heading = "Owners and modes")]
struct AccessArgs {
    /// Let other users in; files then show a+r and directories a+rx, unless modes are given
    #[arg(long, env = "KITFS_ALLOW_OTHER", value_name = "true|false", action = ArgAction::Set, value_parser = BoolishValueParser::new(), num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "false", hide_default_value = true)]
    allow_other: bool,
    /// Owner of all files [default: the mounting user]
    #[arg(long, env = "KITFS_UID", value_name = "ID")]
    uid: Option<u32>,
    /// Group of all files [default: the mounting user's]
    #[arg(long, env = "KITFS_GID", value_name = "ID")]
    gid: Option<u32>,
    /// Mode of all files, such as 0444 [default: the kit's]
    #[arg(long, env = "KITFS_FILE_MODE", value_name = "MODE", value_parser = parse_mode)]
    file_mode: Option<u32>,
    /// Mode of all directories, such as 0555 [default: the kit's]
    #[arg(long, env = "KITFS_DIR_MODE", value_name = "MODE", value_parser = parse_mode)]
    dir_mode: Option<u32>,
    /// Whose files they are: the mounting user's, or whom the kit names
    #[arg(long, env = "KITFS_OWNER", value_enum, default_value = "user")]
    owner: Owner,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Owner {
    User,
    Kit,
}

impl Mount {
    /// Whether this is a command that serves, and so logs what goes on.
    pub(super) fn serves(&self) -> bool {
        self.reference.is_some() && !self.dry_run
    }

    pub(super) async fn run(mut self) -> Result<(), Failure> {
        let selection = self.selection()?;
        let Some(mut reference) = self.reference.take() else { return status::list(self.json) };
        // The daemon leaves the working directory.
        if let Location::Layout { dir } = &mut reference.location {
            *dir = absolute(dir)?;
        }
        if let Some(reporter) = Reporter::attach()? {
            return self.serve_as_daemon(&reference, selection, reporter).await;
        }
        kits::say_whose(&self.kit.fetch.cache, &self.kit.connection)?;
        if self.dry_run {
            let (context, resolved) =
                self.kit.resolve(&reference, self.verify.verify(), false, self.policy.policy()).await?;
            let ownership = self.access.ownership();
            return dry_run::run(context, resolved, ownership, self.json, self.progress).await;
        }
        if self.foreground { self.serve_in_foreground(&reference, selection).await } else { self.launch().await }
    }

    /// What is to be prefetched; and whether waiting for it makes sense.
    fn selection(&self) -> Result<Selection, Failure> {
        let wrong = |error| Failure::usage(format!("--prefetch: {}", chain(&error)));
        let selection = Selection::parse(&self.prefetch).map_err(wrong)?;
        match selection {
            Selection::None | Selection::Auto if self.wait => Err(Failure::usage(format!(
                "--wait waits for what is prefetched, which has no end with --prefetch {selection}; \
                 say --prefetch all or a pattern"
            ))),
            selection => Ok(selection),
        }
    }

    async fn launch(&self) -> Result<(), Failure> {
        let log = StateDir::from_env()?.new_log()?;
        let mut steps = Some(Steps::new(self.progress.mode()));
        let mut waiting = None;
        let show = |step: Value| match serde_json::from_value::<Report>(step["prefetch"].clone()) {
            Ok(report) => {
                steps = None;
                waiting.get_or_insert_with(|| Waiting::new(self.progress.mode())).show(report);
            }
            Err(_) => {
                if let Some(steps) = &steps {
                    steps.show(step["step"].as_str().unwrap_or_default());
                }
            }
        };
        let ready = daemon::launch(std::env::args_os().skip(1), &log, show).await;
        drop((steps, waiting));
        let served: Served = serde_json::from_value(ready?)?;
        served::print(&served, self.json.json)?;
        match served.prefetch {
            Some(Report { state: State::Failed, why, .. }) if self.wait => Err(Failure::failed(format!(
                "not all was prefetched: {}; the mount stays, and `kitfs status` tells more",
                why.unwrap_or_default()
            ))),
            _ => Ok(()),
        }
    }

    async fn serve_as_daemon(
        self,
        reference: &Reference,
        selection: Selection,
        reporter: Reporter,
    ) -> Result<(), Failure> {
        let step = |step: Step<'_>| match step {
            Step::Named(step) => reporter.progress(json!({ "step": step })),
            Step::Prefetch(report) => reporter.progress(json!({ "prefetch": report })),
        };
        let ready = |served: &Served| match serde_json::to_value(served) {
            Ok(value) => reporter.ready(value),
            Err(error) => tracing::error!(%error, "what is served can't be told"),
        };
        let log = Some(reporter.log().to_owned());
        let outcome = tokio::select! {
            outcome = self.serve(reference, selection, log, step, ready) => outcome,
            () = reporter.abandoned() => Err(Failure::failed("the command that asked for the mount has gone")),
        };
        let Err(failure) = outcome else { return Ok(()) };
        tracing::error!("{}", failure.message());
        reporter.failed(failure.message()).await;
        Err(Failure::Reported)
    }

    async fn serve_in_foreground(self, reference: &Reference, selection: Selection) -> Result<(), Failure> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let is_ready = tokio::sync::Notify::new();
        let as_json = self.json.json;
        let ready = |served: &Served| {
            is_ready.notify_one();
            // The mount is of use even where nobody reads what it says.
            if let Err(failure) = served::print(served, as_json) {
                tracing::warn!("{}", failure.message());
            }
        };
        let step = |step: Step<'_>| match step {
            Step::Named(step) => tracing::info!("{step}"),
            Step::Prefetch(report) => tracing::debug!(done = report.done, total = report.total, "prefetching"),
        };
        let serving = self.serve(reference, selection, None, step, ready);
        tokio::pin!(serving);
        // Until the mount is there, a signal ends the work as it is; after that it is `mount::serve` that leaves.
        tokio::select! {
            biased;
            outcome = &mut serving => return outcome,
            () = is_ready.notified() => {}
            _ = interrupt.recv() => return Err(Failure::failed("interrupted")),
            _ = terminate.recv() => return Err(Failure::failed("interrupted")),
        }
        serving.await
    }

    /// Resolves, mounts, and serves until the mount is gone. Whatever was made on the way goes if this future does.
    async fn serve(
        self,
        reference: &Reference,
        selection: Selection,
        log_file: Option<PathBuf>,
        step: impl Fn(Step<'_>),
        ready: impl FnOnce(&Served),
    ) -> Result<(), Failure> {
        let state = StateDir::from_env()?;
        let dir = self.dir.clone().map_or_else(|| default_dir(reference), Ok)?;
        let point = MountPoint::prepare(&dir, &state)?;
        let access = self.kit.fetch.access(&self.kit.connection)?;
        let follow = self.follow.follow(reference, &access, self.kit.fetch.meta_timeout())?;
        let request = Request { policy: self.policy.policy(), ..self.kit.request(reference)? };
        let context = self.kit.fetch.context(&self.kit.connection, self.verify.verify())?;
        let ownership = self.access.ownership();
        let purpose = Purpose {
            dir: point.dir().to_owned(),
            reference: reference.clone(),
            labels: self.label.into_iter().collect(),
            selection,
            on_switch: self.follow.on_switch,
            offline: self.kit.connection.is_offline(),
            history: self.history.history(&state),
        };
        let opener = Opener { request, access, context, ownership };
        let opened = opener.open(reference, |named| step(Step::Named(named))).await;
        let Opened { fs, warnings, .. } =
            opened.inspect_err(|error| purpose.note_failure(reference, &error.to_string()))?;
        step(Step::Named("mounting"));
        let cache = opener.context.cache.clone();
        let options = mount::Options {
            reference: reference.to_string(),
            digest: fs.kit().resolved.digest,
            shows: fs.kit().resolved.pinned(),
            allow_other: self.access.allow_other,
            cache_dir: Some(cache.root().to_owned()),
            log_file,
            state: state.clone(),
            point,
        };
        let trees = Arc::new(Trees::new(Arc::new(fs.read_in(self.ways.allowed()))));
        let served = (trees.clone(), reference.clone(), warnings);
        let serving = Arc::new(Serving::new(opener, purpose, state, served, follow));
        let handler = {
            let serving = serving.clone();
            move |request| answer(serving.clone(), request)
        };
        let yielding = tokio::spawn(keep_house(cache.clone(), trees.clone()));
        let mounted = Notify::new();
        let mounting = mount::serve(trees, options, handler, |record| {
            tracing::info!(shows = record.shows, dir = %record.mount_point.display(), "mounted");
            serving.mounted(record);
            mounted.notify_one();
        });
        let telling = async {
            mounted.notified().await;
            let fs = serving.fs();
            if self.wait {
                prefetched(&fs, |report| step(Step::Prefetch(report))).await;
            }
            let prefetch = fs.prefetch().map(|prefetch| prefetch.report(fs.kit()));
            // What was waited for may have proved more than was known before.
            ready(&Served { prefetch, trust: fs.kit().tier(), ..Served::clone(&serving.served()) });
            follow::run(serving.clone()).await;
            std::future::pending().await
        };
        let left = tokio::select! {
            left = mounting => left,
            never = telling => never,
        };
        serving.left().await;
        yielding.abort();
        let left = left.map_err(Failure::from).inspect_err(|failure| serving.failed(&failure.message()))?;
        keep_limit(cache).await;
        match left {
            Left::Unmounted | Left::Signal => tracing::info!("left"),
            Left::Aborted => tracing::warn!("the connection was aborted; the mount is detached"),
            Left::SignalWhileBusy => tracing::warn!("left while files were open; reading them fails from now on"),
        }
        Ok(())
    }
}

impl FollowArgs {
    /// The tag that is to be followed, if one is.
    fn follow(&self, reference: &Reference, access: &Access, patience: Duration) -> Result<Option<Follow>, Failure> {
        if !self.follow {
            return Ok(None);
        }
        if reference.digest.is_some() {
            return Err(Failure::usage(format!(
                "--follow: {reference} has a digest, which never moves; name a tag alone"
            )));
        }
        if self.interval.is_zero() {
            return Err(Failure::usage("--interval: expected more than no time at all"));
        }
        let source = source::open(&reference.location, &access.connection, &access.kit_home);
        let source = source.map_err(|error| Failure::failed(chain(&error)))?;
        let pace = Pace { interval: self.interval, settle: self.settle, settle_max: self.settle_max };
        Ok(Some(Follow::new(reference.clone(), source, pace, patience)))
    }
}

/// Evicts what is above the limit now that nothing of the mount is in use any more. What takes long is left to the next
/// who writes: a process that serves nothing should be gone.
async fn keep_limit(cache: Arc<Cache>) {
    const PATIENCE: Duration = Duration::from_secs(2);
    let (tell, done) = tokio::sync::oneshot::channel();
    // A thread that ends with the process, wherever it is: eviction can be ended at any moment.
    let evicting =
        std::thread::Builder::new().name("evict".to_owned()).spawn(move || drop(tell.send(cache.keep_limit())));
    if evicting.is_ok() && !matches!(tokio::time::timeout(PATIENCE, done).await, Ok(Ok(Ok(())))) {
        tracing::debug!("what is above the limit is left to the next who writes");
    }
}

/// Gives room back that others need, and lets trees go that are not served any more, for as long as a mount lives.
async fn keep_house(cache: Arc<Cache>, trees: Arc<Trees>) {
    /// A kubelet looks as often.
    const EACH: Duration = Duration::from_secs(10);
    loop {
        tokio::time::sleep(EACH).await;
        let (cache, trees) = (cache.clone(), trees.clone());
        let kept = tokio::task::spawn_blocking(move || {
            trees.tidy();
            cache.yield_room()
        });
        if let Ok(Err(error)) = kept.await {
            tracing::debug!(%error, "the free space is not known");
        }
    }
}

/// How far a mount is on its way.
enum Step<'a> {
    Named(&'a str),
    Prefetch(&'a Report),
}

/// Waits until what is to be prefetched is here, or can't be had; tells meanwhile how far it is.
async fn prefetched(fs: &Fs, tell: impl Fn(&Report)) {
    /// As often as a person looks.
    const TELL: Duration = Duration::from_millis(200);
    let Some(prefetch) = fs.prefetch() else { return };
    let mut ended = std::pin::pin!(prefetch.ended());
    while tokio::time::timeout(TELL, &mut ended).await.is_err() {
        tell(&prefetch.report(fs.kit()));
    }
}

impl AccessArgs {
    fn ownership(&self) -> Ownership {
        Ownership {
            uid: self.uid.unwrap_or_else(|| rustix::process::getuid().as_raw()),
            gid: self.gid.unwrap_or_else(|| rustix::process::getgid().as_raw()),
            file_mode: self.file_mode,
            dir_mode: self.dir_mode,
            from_kit: self.owner == Owner::Kit,
            for_others: self.allow_other,
        }
    }
}

/// `./llama` for `registry/team/llama`, `oci:kits/llama` and `team/llama`.
fn default_dir(reference: &Reference) -> Result<PathBuf, Failure> {
    let name = match &reference.location {
        Location::Registry { repository, .. } | Location::Local { repository } => Path::new(repository).file_name(),
        Location::Layout { dir } => dir.file_name(),
    };
    let unnamed = || Failure::usage(format!("{reference} has no last part to name a directory by; give DIR"));
    Ok(Path::new(".").join(name.ok_or_else(unnamed)?))
}

fn parse_mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777);
    mode.ok_or_else(|| "expected an octal mode, such as 0444".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_directory_is_the_repositorys_last_part() {
        for (reference, dir) in [
            ("ghcr.io/team/llama:8b", Some("./llama")),
            ("team/llama", Some("./llama")),
            ("llama", Some("./llama")),
            ("oci:/srv/kits/llama:v1", Some("./llama")),
            ("oci:/", None),
        ] {
            let found = default_dir(&reference.parse().expect("a reference")).ok();
            assert_eq!(found.as_deref(), dir.map(Path::new), "{reference}");
        }
    }

    #[test]
    fn modes_are_octal() {
        assert_eq!((parse_mode("0444"), parse_mode("755")), (Ok(0o444), Ok(0o755)));
        for text in ["", "0888", "u+r", "77777"] {
            assert!(parse_mode(text).is_err(), "{text}");
        }
    }
}
