//! What a fill has staged so far, for readers who agreed to unverified bytes (`--verify=stream`); and why it could not
//! stage a layer.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::cache::CacheError;
use crate::modelkit::Layer;
use crate::path::TreePath;

/// A layer that there was no room for is not tried to be staged again before this: each time costs a look at the whole
/// cache, and some of the layer.
const AGAIN: Duration = Duration::from_secs(10);

/// The staged files of one layer, by their paths in the archive.
#[derive(Debug)]
pub struct StagedView {
    files: Mutex<HashMap<TreePath, (PathBuf, u64)>>,
    changed: watch::Sender<()>,
}

impl StagedView {
    pub fn new() -> Self {
        Self { files: Mutex::default(), changed: watch::Sender::new(()) }
    }

    /// Says that `written` bytes of a file are staged.
    pub fn publish(&self, path: &TreePath, file: &std::path::Path, written: u64) {
        let mut files = self.files.lock().unwrap_or_else(|held| held.into_inner());
        files.insert(path.clone(), (file.to_owned(), written));
        drop(files);
        self.changed.send_replace(());
    }

    /// Forgets everything: the fill has ended, well or badly, or starts again.
    pub fn clear(&self) {
        self.files.lock().unwrap_or_else(|held| held.into_inner()).clear();
        self.changed.send_replace(());
    }

    /// The file that stages `path`, once `end` bytes of it are there.
    pub fn ready(&self, path: &TreePath, end: u64) -> Option<PathBuf> {
        let files = self.files.lock().unwrap_or_else(|held| held.into_inner());
        files.get(path).filter(|(_, written)| *written >= end).map(|(file, _)| file.clone())
    }

    /// Tells of every change.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}

/// Whether a layer could be staged when that was last tried.
#[derive(Debug, Default)]
pub struct Unstaged(Mutex<Option<(String, Instant)>>);

impl Unstaged {
    fn state(&self) -> MutexGuard<'_, Option<(String, Instant)>> {
        self.0.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// Notes that it could not, and says so once.
    pub fn note(&self, layer: &Layer, why: &CacheError) {
        let why = why.to_string();
        let before = self.state().replace((why.clone(), Instant::now()));
        if before.is_none() {
            tracing::warn!(layer = %layer.digest, size = layer.size, %why,
                "there is no room for all of the layer: its files are fetched again whenever they are read and not in the cache");
        }
    }

    /// Notes that it could.
    pub fn clear(&self) {
        *self.state() = None;
    }

    /// Why it could not.
    pub fn why(&self) -> Option<String> {
        self.state().as_ref().map(|(why, _)| why.clone())
    }

    /// Whether it could not a moment ago.
    pub fn is_recent(&self) -> bool {
        self.state().as_ref().is_some_and(|(_, at)| at.elapsed() < AGAIN)
    }
}
