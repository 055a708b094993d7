//! Damage: files that are not what their names say. They are set aside in `quarantine/` and count as absent from then on,
//! so that they are fetched again and somebody can look what became of the disk. `cache gc` removes them.

use std::fmt::Display;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::files::{identity, identity_of, is_file_of, open_existing};
use super::usage::Area;
use super::{Cache, CacheError, io_error};
use crate::digest::Digest;
use crate::object::{CHUNK_SIZE, ObjectDigest, chunk_count};

/// So many damaged files of one name are kept to look at; more of them say nothing new, and a bad disk would fill itself.
const KEPT: u32 = 4;

impl Cache {
    /// Sets a damaged file aside. One that is gone is fine.
    pub(super) fn quarantine(&self, path: &Path, why: &dyn Display) -> Result<(), CacheError> {
        let moved = (0..KEPT).map(|number| self.place_in_quarantine(path, number)).find_map(|place| {
            match renameat_with(CWD, path, CWD, &place, RenameFlags::NOREPLACE) {
                Err(rustix::io::Errno::EXIST) => None,
                // The file system can't tell: a file that is replaced is damaged too.
                Err(rustix::io::Errno::INVAL) => Some(fs::rename(path, &place).map(|()| place)),
                moved => Some(moved.map(|()| place).map_err(io::Error::from)),
            }
        });
        match moved {
            Some(Ok(place)) => {
                tracing::warn!(path = %path.display(), moved = %place.display(), %why, "cache: a damaged file was set aside");
                return Ok(());
            }
            Some(Err(error)) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Some(Err(_)) | None => {}
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(error)),
            _ => {
                tracing::warn!(path = %path.display(), %why, "cache: a damaged file was removed");
                Ok(())
            }
        }
    }

    /// `quarantine/<area>-<name>.<number>`.
    fn place_in_quarantine(&self, path: &Path, number: u32) -> PathBuf {
        let inside = path.strip_prefix(&self.root).unwrap_or(path);
        let area = inside.components().next().filter(|_| inside.components().count() > 1);
        let mut name = area.map_or_else(Default::default, |area| area.as_os_str().to_owned());
        if !name.is_empty() {
            name.push("-");
        }
        name.push(inside.file_name().unwrap_or_default());
        name.push(format!(".{number}"));
        self.root.join(Area::Quarantine.dir()).join(name)
    }

    /// Whether an object that lies where a verified one of `size` bytes is to get its name can stay. With
    /// [`Settings::recheck`](super::Settings::recheck) it is hashed and set aside here, as an open would do it: an open that
    /// does it just after this look would leave neither of the two.
    pub(super) fn may_stay(&self, path: &Path, name: &ObjectDigest, size: u64) -> Result<bool, CacheError> {
        if !is_file_of(path, size) {
            return Ok(false);
        }
        if !self.rechecks() {
            return Ok(true);
        }
        // What can't be opened serves nobody.
        let Ok(Some(file)) = open_existing(path) else { return Ok(false) };
        self.recheck(path, &file, name)
    }

    /// Hashes an object that is about to be opened, and sets it aside if it is not what its name says; unless another has
    /// got its name meanwhile.
    pub(super) fn recheck(&self, path: &Path, file: &File, name: &ObjectDigest) -> Result<bool, CacheError> {
        let hashed = file.metadata().and_then(|found| Ok((identity(&found), name_of(file, found.len(), &|_| ())?)));
        match hashed {
            Ok((_, found)) if found == *name => return Ok(true),
            Ok((file, _)) if identity_of(path) != Some(file) => {}
            Ok((_, found)) => self.quarantine(path, &format_args!("its content is that of object {found}"))?,
            // The disk, not the system: a descriptor that is open can be read.
            Err(error) => self.quarantine(path, &format_args!("it can't be read: {error}"))?,
        }
        Ok(false)
    }
}

/// The name of a file's content, read block by block; `told` hears how many bytes were read. Not by a map: what a disk
/// can't give is an error here, and a signal there.
pub(super) fn name_of(file: &File, size: u64, told: &dyn Fn(u64)) -> io::Result<ObjectDigest> {
    let mut digests = Vec::with_capacity(usize::try_from(chunk_count(size)).unwrap_or(0));
    each_block(file, 0..size, |block| {
        digests.push(Digest::of(block));
        told(block.len() as u64);
    })?;
    Ok(ObjectDigest::new(size, &digests))
}

/// Reads a range of a file in blocks of a chunk; the last is shorter.
pub(super) fn each_block(file: &File, range: std::ops::Range<u64>, mut take: impl FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0; (range.end - range.start).min(CHUNK_SIZE.into()) as usize];
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(CHUNK_SIZE.into()) as usize;
        file.read_exact_at(&mut buffer[..len], at)?;
        take(&buffer[..len]);
        at += len as u64;
    }
    Ok(())
}
