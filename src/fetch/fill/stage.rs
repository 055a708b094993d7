//! The files of a layer on their way to the disk: what a [`Cutter`](super::cut::Cutter) has found goes to staging.
//!
//! What lies in staging already, from an earlier fill, comes first and is not written again. Where there is no room, what
//! only another fill would need goes first, then all that is staged; the cutting goes on, as the index can be had without.

use std::sync::Arc;

use bytes::Bytes;

use super::staged::StagedView;
use crate::cache::{Cache, CacheError, StagedFile, StagedNumber, Staging};
use crate::path::TreePath;

/// Where the files of a layer go while it is read.
#[derive(Debug)]
pub struct Files {
    /// The cache that they go to.
    pub cache: Arc<Cache>,
    /// Where they are staged.
    pub staging: Staging,
    /// Where staged bytes are shown, if anybody may see them.
    pub view: Option<Arc<StagedView>>,
    /// So many bytes of the layer come from what lies there.
    pub resumed: u64,
    /// Whether the index is wanted where the files can't be staged.
    pub wants_index: bool,
    /// Why nothing is staged any more.
    pub no_room: Option<CacheError>,
}

impl Files {
    /// Takes a step of staging; `None` where nothing is staged any more.
    fn step<T>(&mut self, step: impl Fn(&mut Self) -> Result<T, CacheError>) -> Result<Option<T>, CacheError> {
        while self.no_room.is_none() {
            match step(self) {
                Err(error) if error.is_full() => {
                    if self.staging.forget() {
                        continue;
                    }
                    if !self.wants_index {
                        return Err(error);
                    }
                    // First, so that nobody looks for what goes.
                    if let Some(view) = &self.view {
                        view.clear();
                    }
                    self.staging.clear();
                    self.no_room = Some(error);
                }
                outcome => return outcome.map(Some),
            }
        }
        Ok(None)
    }
}

/// What is to be staged of some bytes of a layer that came in one piece.
#[derive(Debug, Default)]
pub struct Batch {
    /// In order.
    pub steps: Vec<Step>,
    /// Bytes that are no file's content, of a layer that is not compressed.
    pub between: Vec<u8>,
    /// So many bytes of the blob are dealt with by this.
    pub taken: u64,
}

/// A step of staging.
#[derive(Debug)]
pub enum Step {
    /// The blob's next bytes, of a layer that is compressed.
    Blob(Bytes),
    /// A file begins.
    File {
        /// Its path in the archive.
        path: TreePath,
        /// Whether it has no content.
        is_empty: bool,
    },
    /// The file's next bytes.
    Content(Bytes),
}

impl Batch {
    /// The next bytes of a compressed blob, which are kept beside the files that are made of them.
    pub fn blob(bytes: Bytes) -> Self {
        Self { taken: bytes.len() as u64, steps: vec![Step::Blob(bytes)], between: Vec::new() }
    }
}

/// Stages a layer's files. Blocks.
#[derive(Debug)]
pub struct Stager {
    files: Files,
    /// Whether the layer is not compressed, so that its files need not be made again when it is resumed.
    is_plain: bool,
    /// How many bytes of the blob were taken.
    taken: u64,
    open: Option<Open>,
    /// All files begun, in order; no more than there was room for.
    numbers: Vec<StagedNumber>,
}

#[derive(Debug)]
struct Open {
    path: TreePath,
    number: Option<StagedNumber>,
    /// `None` where it is not staged, or not written to yet.
    file: Option<StagedFile>,
    written: u64,
}

impl Stager {
    /// Stages a layer in `files`.
    pub fn new(files: Files, is_plain: bool) -> Self {
        Self { files, is_plain, taken: 0, open: None, numbers: Vec::new() }
    }

    /// Takes what comes next. What is resumed does not come in one batch with what follows.
    pub fn take(&mut self, batch: Batch) -> Result<(), CacheError> {
        let is_resumed = self.taken < self.files.resumed;
        if is_resumed || self.files.no_room.is_some() {
            self.files.staging.touch();
        }
        // What comes now is in the files already.
        let is_begun = self.is_plain && is_resumed;
        for step in batch.steps {
            match step {
                Step::Blob(_) if is_resumed => {}
                Step::Blob(bytes) => {
                    self.files.step(|files| files.staging.keep(&files.cache, &bytes))?;
                }
                Step::File { path, is_empty } => self.begin(path, is_empty, is_begun)?,
                Step::Content(bytes) => self.content(&bytes, is_begun)?,
            }
        }
        self.taken += batch.taken;
        if is_resumed || batch.taken == 0 {
            return Ok(());
        }
        // After the content: a process that is killed in between leaves a file too many, and not one too few.
        if !batch.between.is_empty() {
            self.files.step(|files| files.staging.keep(&files.cache, &batch.between))?;
        }
        self.files.staging.reached(self.taken);
        Ok(())
    }

    fn begin(&mut self, path: TreePath, is_empty: bool, is_begun: bool) -> Result<(), CacheError> {
        // The one before is closed first: its room is free then, if it has no name any more.
        self.open = None;
        let files = &mut self.files;
        let (number, file) = if is_begun {
            let number = files.staging.next_begun();
            if is_empty {
                // It may be lost, and there is no content that would bring it back.
                files.step(|files| files.staging.reopen(number))?;
            }
            (Some(number), None)
        } else {
            let file = files.step(|files| files.staging.create())?;
            (file.as_ref().map(StagedFile::number), file)
        };
        self.numbers.extend(number);
        self.open = Some(Open { path, number, file, written: 0 });
        Ok(())
    }

    fn content(&mut self, bytes: &[u8], is_begun: bool) -> Result<(), CacheError> {
        let (Some(open), files) = (&mut self.open, &mut self.files) else { return Ok(()) };
        let start = open.written;
        open.written += bytes.len() as u64;
        let Some(number) = open.number else { return Ok(()) };
        if !is_begun {
            if open.file.is_none() {
                open.file = files.step(|files| files.staging.reopen(number))?;
            }
            if let Some(file) = &open.file
                && files.step(|files| file.write_at(&files.cache, bytes, start))?.is_none()
            {
                // Its room is free once it is closed.
                open.file = None;
            }
        }
        if let Some(view) = &files.view
            && files.no_room.is_none()
        {
            view.publish(&open.path, &files.staging.path_of(number), open.written);
        }
        Ok(())
    }

    /// Ends the layer; its files are numbered in order, where there was room for them.
    pub fn finish(self) -> (Files, Vec<StagedNumber>) {
        (self.files, self.numbers)
    }
}
