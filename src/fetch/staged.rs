//! What a fill has staged so far, for readers who agreed to unverified bytes (`--verify=stream`).

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Mutex;

use tokio::sync::watch;

use crate::path::TreePath;

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
