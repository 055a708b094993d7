//! A mount that serves: which kit it serves now, how it comes to serve another one, and what it answers.
//!
//! - [`Opener`]: from a reference to a tree that can be served, by the flags of the mount.
//! - [`Serving`]: the mount. A switch opens the new kit first, completes it where that is asked for, and only then changes
//!   over; so whatever fails leaves the mount as it is.
//! - [`follow`]: a tag that is watched. [`answer`]: requests on the control socket; [`served`]: what a mount tells of itself.
//!   [`hook`]: the command after a switch.
//!
//! Locks: `step`, one switch at a time, over all of it: also while the new kit is opened, as the next one begins where this one
//! ends. `now`, `coming` and `untold`, for a look or a note.

pub mod answer;
pub mod follow;
mod hook;
mod opener;
pub mod served;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::{Value, json};

use crate::digest::Digest;
use crate::fetch::{FetchError, Resolved};
use crate::fs::prefetch::{Background, Prefetch, State};
use crate::fs::trees::{TIDY, Trees};
use crate::fs::{Fs, Selection};
use crate::history::{Action, Event, History, Outcome};
use crate::modelkit;
use crate::mount::{Record, StateDir};
use crate::reference::Reference;
use crate::report::chain;
use follow::Follow;
pub use opener::{Opened, Opener};
use served::Served;

/// How long leaving waits for a switch that is under way: changing over takes milliseconds, and opening a kit is given up.
const LEAVING: Duration = Duration::from_secs(1);

/// Why a kit is not served, in words: for the log, the history and whoever asked for it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotServed(String);

impl From<FetchError> for NotServed {
    fn from(error: FetchError) -> Self {
        Self(chain(&error))
    }
}

/// What a mount is for, apart from its kit.
#[derive(Debug)]
pub struct Purpose {
    /// The directory.
    pub dir: PathBuf,
    /// What it was mounted as.
    pub reference: Reference,
    /// What its events are labelled with.
    pub labels: BTreeMap<String, String>,
    /// What is fetched before it is asked for.
    pub selection: Selection,
    /// A command that runs after a switch.
    pub on_switch: Option<String>,
    /// Whether registries are not to be asked.
    pub offline: bool,
    /// Where its events are written down.
    pub history: History,
}

impl Purpose {
    /// Writes down that a kit was not mounted, and why. Blocks for a moment, when nothing else is to be done.
    pub fn note_failure(&self, reference: &Reference, why: &str) {
        let event = Event {
            outcome: Outcome::Failed(why.to_owned()),
            mount_point: Some(self.dir.clone()),
            labels: self.labels.clone(),
            ..Event::now(Action::Mount, reference.to_string())
        };
        if let Err(error) = self.history.append(&event) {
            tracing::error!("{}", chain(&error));
        }
    }
}

/// A mount that serves.
#[derive(Debug)]
pub struct Serving {
    opener: Opener,
    purpose: Purpose,
    state: StateDir,
    trees: Arc<Trees>,
    /// What the state directory knows of the mount.
    record: OnceLock<Record>,
    step: tokio::sync::Mutex<()>,
    now: Mutex<Now>,
    /// The kit that is completed before it is switched to.
    coming: Mutex<Option<Arc<Fs>>>,
    follow: Option<Follow>,
    /// Why the last event could not be written down.
    untold: Mutex<Option<String>>,
}

/// What is served.
#[derive(Debug)]
struct Now {
    fs: Arc<Fs>,
    served: Arc<Served>,
    /// As it was typed.
    reference: Reference,
    /// What its reference leads to: the kit's manifest, or the image index that names it.
    top: Digest,
    background: Option<Background>,
    /// Whether the mount is being left, so that nothing is switched to any more.
    is_left: bool,
}

/// Another kit that is to be served.
#[derive(Debug, Clone)]
struct Asked {
    /// Which.
    reference: Reference,
    /// As it was typed, where that is another one.
    typed: Option<Reference>,
    action: Action,
    /// Whether all of it must be here first.
    prefetch: bool,
    /// Who wants it, by hand; `None` where it is the tag that is followed.
    user: Option<String>,
}

impl Asked {
    /// The event of it, by who asked.
    fn by_whom(&self, event: Event) -> Event {
        match &self.user {
            Some(user) if !user.is_empty() => Event { user: user.clone(), ..event },
            _ => event,
        }
    }
}

/// A kit that can be changed over to.
#[derive(Debug)]
struct Prepared {
    fs: Arc<Fs>,
    warnings: Vec<String>,
    resolved: Resolved,
}

fn top(resolved: &Resolved) -> Digest {
    resolved.index.as_ref().map_or(resolved.digest, |(digest, _)| *digest)
}

impl Serving {
    /// A mount that will serve the tree it is given, which came of a reference with warnings.
    pub fn new(
        opener: Opener,
        purpose: Purpose,
        state: StateDir,
        (trees, reference, warnings): (Arc<Trees>, Reference, Vec<String>),
        follow: Option<Follow>,
    ) -> Self {
        let fs = trees.now().fs().clone();
        let resolved = &fs.kit().resolved;
        let served = Served::new(fs.kit(), resolved, purpose.dir.clone(), purpose.offline, warnings);
        let top = top(resolved);
        let (served, background, is_left) = (Arc::new(served), None, false);
        let now = Now { fs: fs.clone(), served, reference, top, background, is_left };
        let (record, step, coming, untold) = Default::default();
        Self { opener, purpose, state, trees, record, step, now: Mutex::new(now), coming, follow, untold }
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// What is served, as it was when it began to be.
    pub fn served(&self) -> Arc<Served> {
        self.now().served.clone()
    }

    /// The tree that is served.
    pub fn fs(&self) -> Arc<Fs> {
        self.now().fs.clone()
    }

    /// The mount is there.
    pub fn mounted(self: &Arc<Self>, record: &Record) {
        let _ = self.record.set(record.clone());
        let background = Prefetch::start(&self.fs(), self.purpose.selection.clone());
        self.now().background = background;
        self.note_served();
        let (this, event) = (self.clone(), self.event(Action::Mount));
        tokio::task::spawn_blocking(move || this.tell(event));
    }

    /// The mount is no more.
    pub async fn left(self: &Arc<Self>) {
        // A switch that is under way ends first, and the next finds that it is too late.
        let step = tokio::time::timeout(LEAVING, self.step.lock()).await;
        {
            let mut now = self.now();
            (now.background, now.is_left) = (None, true);
        }
        drop(step);
        if self.record.get().is_none() {
            return;
        }
        let this = self.clone();
        let told = tokio::task::spawn_blocking(move || this.tell(this.event(Action::Unmount)));
        // It is told by then, or the process ends.
        let _ = told.await;
    }

    /// The mount could not be made, or broke.
    pub fn failed(&self, why: &str) {
        if self.record.get().is_none() {
            self.purpose.note_failure(&self.now().reference, why);
        }
    }

    /// Notes in the cache what the directory serves: without it, what it served before goes as soon as anything else.
    fn note_served(&self) {
        let (cache, dir, digest) = (self.opener.context.cache.clone(), self.purpose.dir.clone(), self.served().digest);
        tokio::task::spawn_blocking(move || {
            let noted = cache.note_served(&dir, &digest);
            noted.unwrap_or_else(|error| tracing::debug!(%error, "what the directory serves is not noted"));
        });
    }

    /// An event of this mount, as it is now.
    fn event(&self, action: Action) -> Event {
        let (fs, reference) = {
            let now = self.now();
            (now.fs.clone(), now.reference.clone())
        };
        self.event_about(action, &fs, &reference)
    }

    /// An event about a kit of this mount.
    fn event_about(&self, action: Action, fs: &Fs, reference: &Reference) -> Event {
        Event {
            digest: Some(fs.kit().resolved.digest),
            mount_point: Some(self.purpose.dir.clone()),
            mount: self.record.get().map(|record| record.id.clone()),
            trust: Some(fs.kit().tier().to_string()),
            revision: fs.kit().resolved.document.annotations.get(modelkit::REVISION).cloned(),
            labels: self.purpose.labels.clone(),
            ..Event::now(action, reference.to_string())
        }
    }

    /// Writes an event down. Blocks. A record that can't be written is no reason not to serve, and is told.
    fn tell(&self, event: Event) {
        let told = self.purpose.history.append(&event).map_err(|error| chain(&error));
        if let Err(why) = &told {
            tracing::error!("{why}");
        }
        *self.untold.lock().unwrap_or_else(|held| held.into_inner()) = told.err();
    }

    /// What is wrong with the kit that is served, and with the record of it.
    fn warnings(&self, mut of_the_kit: Vec<String>) -> Vec<String> {
        of_the_kit.extend(self.untold.lock().unwrap_or_else(|held| held.into_inner()).clone());
        of_the_kit
    }

    /// Serves another kit, once it is opened, and complete where that is asked for. Whatever fails before leaves the mount as
    /// it is. What is told is what is served then.
    fn switch(self: &Arc<Self>, asked: Asked) -> BoxFuture<'static, Result<Value, NotServed>> {
        let this = self.clone();
        Box::pin(async move { this.switch_to(asked).await })
    }

    async fn switch_to(self: &Arc<Self>, asked: Asked) -> Result<Value, NotServed> {
        let _one = self.step.lock().await;
        if self.now().is_left {
            return Err(NotServed("the mount is being left".to_owned()));
        }
        if asked.user.is_none() && !self.follow.as_ref().is_some_and(|follow| follow.wants(&asked.reference)) {
            return Err(NotServed("another kit was chosen by hand meanwhile".to_owned()));
        }
        let before = self.served().digest;
        let typed = asked.typed.clone().unwrap_or_else(|| asked.reference.clone());
        let resolved = self.opener.resolve(&asked.reference).await;
        let digest = resolved.as_ref().ok().map(|resolved| resolved.digest).or(asked.reference.digest);
        let prepared = match resolved {
            Ok(resolved) => self.prepare(resolved, asked.prefetch).await,
            Err(failure) => Err(failure),
        };
        *self.coming.lock().unwrap_or_else(|held| held.into_inner()) = None;
        let prepared = match prepared {
            Ok(prepared) => prepared,
            Err(failure) => {
                let outcome = Outcome::Failed(failure.to_string());
                let (reference, trust, revision) = (typed.to_string(), None, None);
                let event = asked.by_whom(Event { from: Some(before), ..self.event(asked.action) });
                self.note(Event { outcome, digest, trust, revision, reference, ..event }).await;
                return Err(failure);
            }
        };
        let this = self.clone();
        // From here on it goes on to its end, whoever stops waiting.
        let done = tokio::spawn(async move { this.change_over(prepared, typed, asked, before).await });
        done.await.unwrap_or_else(|_| Err(broke_off()))
    }

    /// Opens the kit, and makes it complete where that is asked for. What can't be read is not switched to.
    async fn prepare(&self, resolved: Resolved, is_prefetched: bool) -> Result<Prepared, NotServed> {
        let opened = self.opener.open_resolved(resolved, |step| tracing::info!("{step}")).await?;
        let Opened { fs, warnings, unasked } = opened;
        if let Some(why) = unasked {
            return Err(NotServed(format!("{} can't be read: {why}", fs.kit().resolved.pinned())));
        }
        // How it was found now, also where the tree is one that is there.
        let resolved = fs.kit().resolved.clone();
        // What is there already is served as it is.
        let there = self.trees.of(&resolved.digest).map(|live| live.fs().clone());
        let fs = there.unwrap_or_else(|| Arc::new(fs.read_like(&self.fs())));
        if is_prefetched {
            self.complete(&fs).await?;
        }
        Ok(Prepared { fs, warnings, resolved })
    }

    /// Sees to it that all of a kit is in the cache.
    async fn complete(&self, fs: &Arc<Fs>) -> Result<(), NotServed> {
        let Some(background) = Prefetch::start(fs, Selection::All) else { return Ok(()) };
        *self.coming.lock().unwrap_or_else(|held| held.into_inner()) = Some(fs.clone());
        let prefetch = background.prefetch();
        prefetch.ended().await;
        let report = prefetch.report(fs.kit());
        match report.state {
            State::Failed => Err(NotServed(format!(
                "{} can't be made complete: {}",
                fs.kit().resolved.pinned(),
                report.why.unwrap_or_default()
            ))),
            _ => Ok(()),
        }
    }

    async fn change_over(
        self: &Arc<Self>,
        Prepared { fs, warnings, resolved }: Prepared,
        typed: Reference,
        asked: Asked,
        before: Digest,
    ) -> Result<Value, NotServed> {
        let (trees, next) = (self.trees.clone(), fs.clone());
        // It waits for the kernel.
        if self.now().is_left {
            return Err(NotServed("the mount is being left".to_owned()));
        }
        tokio::task::spawn_blocking(move || trees.switch(next)).await.map_err(|_| broke_off())?;
        if let (Some(follow), Some(_)) = (&self.follow, &asked.user) {
            follow.pause();
        }
        let trees = self.trees.clone();
        tokio::spawn(async move {
            tokio::time::sleep(TIDY).await;
            let _ = tokio::task::spawn_blocking(move || trees.tidy()).await;
        });
        let served = Served::new(fs.kit(), &resolved, self.purpose.dir.clone(), self.purpose.offline, warnings);
        let served = Arc::new(served);
        // Another name of what was served already is nothing to tell.
        let is_another = before != served.digest;
        // On record before it is told: who hears of this switch and goes back finds it there.
        if is_another {
            let event = self.event_about(asked.action, &fs, &typed);
            self.note(asked.by_whom(Event { from: Some(before), ..event })).await;
            self.rewrite_record(&typed, &served).await;
        }
        {
            let mut now = self.now();
            (now.fs, now.served) = (fs.clone(), served.clone());
            (now.reference, now.top) = (typed.clone(), top(&resolved));
            // What was fetched ahead of the one before is not wanted any more.
            now.background = None;
        }
        let background = Prefetch::start(&fs, self.purpose.selection.clone());
        self.now().background = background;
        tracing::info!(from = %before, to = %served.digest, reference = %typed, "switched");
        if is_another {
            self.note_served();
            if let Some(command) = &self.purpose.on_switch {
                hook::run(command, &self.purpose.dir, &before, &served.digest);
            }
        }
        Ok(json!({
            "mountpoint": self.purpose.dir,
            "reference": served.reference,
            "digest": served.digest,
            "from": before,
            "trust": fs.kit().tier(),
            "notes": served.notes,
            "warnings": self.warnings(served.warnings.clone()),
        }))
    }

    /// Writes an event down.
    async fn note(self: &Arc<Self>, event: Event) {
        let this = self.clone();
        let _ = tokio::task::spawn_blocking(move || this.tell(event)).await;
    }

    async fn rewrite_record(&self, typed: &Reference, served: &Served) {
        let Some(record) = self.record.get() else { return };
        let (digest, serves) = (served.digest, Some(served.reference.clone()));
        let record = Record { reference: typed.to_string(), digest, serves, ..record.clone() };
        let state = self.state.clone();
        let written = tokio::task::spawn_blocking(move || state.rewrite(&record)).await;
        if let Ok(Err(error)) = written {
            tracing::error!("{}", chain(&error));
        }
    }
}

fn broke_off() -> NotServed {
    NotServed("the switch broke off, which is a bug in kitfs; the log of the mount tells more".to_owned())
}
