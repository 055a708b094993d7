//! How much the cache may hold, and what happens when there is no room.

use std::path::Path;

use super::{Cache, CacheError};

/// How much the cache may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Limit {
    /// As much as the disk takes.
    #[default]
    None,
    /// So many bytes on the disk.
    Bytes(u64),
    /// As much as leaves this part of its file system free, in percent, whoever uses the rest.
    KeepFree(u8),
}

impl Cache {
    /// Says that a file of the cache is about to grow by so many bytes. Makes room for them where there is none, which
    /// may take a while: belongs on a thread that may wait. [`CacheError::Full`] where there is none to be made.
    pub(super) fn grow(&self, _path: &Path, _bytes: u64) -> Result<(), CacheError> {
        let _ = self.settings.limit;
        Ok(())
    }

    /// Makes room for what is about to be staged, or says that it can't be had. Likewise.
    pub fn make_room(&self, _bytes: u64) -> Result<(), CacheError> {
        Ok(())
    }

    /// Why the cache keeps nothing more at the moment, if it does not.
    pub fn fullness(&self) -> Option<String> {
        None
    }
}
