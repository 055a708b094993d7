//! Blobs by digest: manifests, configs, indexes that a kit names. Hashed again at each look, as the name is what they are.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use super::files::{make_dir, open_existing, rename_over};
use super::map::{self, MAPPED, contents};
use super::{Cache, CacheError, StagedFile, Staging, io_error};
use crate::digest::{Digest, Mismatch, Unverified, Verified};

/// So often another process may sweep a new staging directory before it is locked.
const SWEPT: usize = 8;

/// A blob too long to hold, on its way into the cache. What is dropped leaves nothing.
#[derive(Debug)]
pub struct NewBlob {
    staging: Staging,
    file: StagedFile,
    written: u64,
}

impl Cache {
    /// A blob, if it is here or in a lower cache and hashes right. A damaged one is set aside. A long one is mapped and not
    /// read: for what is parsed, not for what is served.
    pub fn blob(&self, digest: &Digest) -> Result<Option<Verified>, CacheError> {
        let path = self.spread("blobs/sha256", &digest.hex());
        if let Some(bytes) = contents(&path)? {
            match Unverified::new(bytes).verify(digest) {
                Ok(verified) => return Ok(Some(verified)),
                Err(mismatch) => self.quarantine(&path, &mismatch)?,
            }
        }
        Ok(self.lower.iter().find_map(|lower| lower.blob(digest)))
    }

    /// A part of a blob without a look at the rest, for who can prove it alone. `None` where the blob is not here or ends
    /// before it.
    pub fn part_of_blob(&self, digest: &Digest, range: Range<u64>) -> Result<Option<Unverified>, CacheError> {
        let path = self.spread("blobs/sha256", &digest.hex());
        if let Some(file) = open_existing(&path).map_err(io_error("open", &path))? {
            return part_of(&file, range, true).map_err(io_error("read", &path));
        }
        // What others can write is not mapped.
        let parts = self.lower.iter().filter_map(|lower| lower.blob_file(digest));
        Ok(parts.filter_map(|file| part_of(&file, range.clone(), false).ok().flatten()).next())
    }

    /// Keeps a small blob.
    pub fn keep_blob(&self, digest: &Digest, bytes: &Verified) -> Result<(), CacheError> {
        let path = self.spread("blobs/sha256", &digest.hex());
        let is_here = fs::symlink_metadata(&path).is_ok_and(|found| found.is_file());
        if is_here { Ok(()) } else { self.write_file(&path, &[bytes.bytes()]) }
    }

    /// A place for a blob that comes in pieces.
    pub fn new_blob(&self, digest: &Digest) -> Result<NewBlob, CacheError> {
        for _ in 0..SWEPT {
            if let Some(mut staging) = self.stage_alone(digest)? {
                let file = staging.create()?;
                return Ok(NewBlob { staging, file, written: 0 });
            }
        }
        let busy = io::Error::new(io::ErrorKind::ResourceBusy, "another process removes it again and again");
        Err(io_error("lock a directory in", &self.root.join("incoming"))(busy))
    }
}

impl NewBlob {
    /// Adds its next bytes.
    pub fn write(&mut self, cache: &Cache, bytes: &Unverified) -> Result<(), CacheError> {
        self.file.write_at(cache, bytes.peek(), self.written)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Keeps it, if it hashes right; it is hashed as it lies on the disk, and mapped if it is long.
    pub fn keep(self, cache: &Cache, digest: &Digest) -> Result<Result<Verified, Mismatch>, CacheError> {
        let staged = self.file.path();
        let bytes = contents(staged)?.unwrap_or_default();
        let verified = match Unverified::new(bytes).verify(digest) {
            Ok(verified) => verified,
            Err(mismatch) => return Ok(Err(mismatch)),
        };
        let path = cache.spread("blobs/sha256", &digest.hex());
        let named = path.parent().map_or(Ok(()), make_dir).and_then(|()| self.file.sync());
        let named = named.and_then(|()| rename_over(staged, &path).map_err(io_error("rename", staged)));
        named.map_err(|error| cache.room.noted(error))?;
        // Removes the directory.
        drop(self.staging);
        Ok(Ok(verified))
    }
}

/// A part of a file; `None` where it ends before.
fn part_of(file: &File, range: Range<u64>, may_map: bool) -> io::Result<Option<Unverified>> {
    if range.start > range.end || range.end > file.metadata()?.len() {
        return Ok(None);
    }
    if may_map && range.end - range.start >= MAPPED {
        // It was as long a moment ago, and files of the cache are not written in place.
        return Ok(Some(Unverified::new(map::all(file)?.slice(range.start as usize..range.end as usize))));
    }
    let mut part = vec![0; (range.end - range.start) as usize];
    match file.read_exact_at(&mut part, range.start) {
        Ok(()) => Ok(Some(Unverified::new(part))),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}
