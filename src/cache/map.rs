//! Files of the cache as bytes: short ones are read, long ones mapped. The only module with `unsafe`.
//!
//! For what is parsed where it lies: indexes, which may have gigabytes of which a mount looks at a few pages. Never for
//! content that is served: should the disk fail under a map, or somebody shorten the file, the process gets a SIGBUS and
//! every mount with it, where a read would get an error. For an index that is accepted: its pages were all read a moment
//! before, when its digest was checked, so that most are answered from memory; and to read it instead would cost memory
//! for as long as the mount lives, or a copy for every lookup.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use bytes::Bytes;

use super::files::open_existing;
use super::{CacheError, io_error};

/// Files from this length on are mapped. Below it a read costs less than a map with its page faults, and a kit of many
/// small layers does not use up the maps that the kernel allows a process (65,530).
pub(super) const MAPPED: u64 = 64 << 10;

/// All of a file; `None` where there is none, or somebody took our right to read it, which costs a fetch and no more.
pub(super) fn contents(path: &Path) -> Result<Option<Bytes>, CacheError> {
    let file = match open_existing(path) {
        Ok(Some(file)) => file,
        Ok(None) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            tracing::warn!(path = %path.display(), %error, "cache: a file is not used");
            return Ok(None);
        }
        Err(error) => return Err(io_error("open", path)(error)),
    };
    let bytes = all(&file).map_err(io_error("read", path))?;
    Ok(Some(bytes))
}

/// All of an open file.
pub(super) fn all(mut file: &File) -> io::Result<Bytes> {
    let metadata = file.metadata()?;
    if metadata.is_file() && metadata.len() >= MAPPED {
        return map(file);
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes.into())
}

#[expect(unsafe_code, reason = "a map of a file is only as constant as the file: see the safety comment")]
fn map(file: &File) -> io::Result<Bytes> {
    // SAFETY: the bytes must not change while they are mapped. Files of the cache are never written in place: each is
    // complete when it gets its name, and is replaced by renaming another over it, which leaves the mapped one as it
    // is. The directory is ours and closed to others (0700, checked when the cache is opened).
    let map = unsafe { memmap2::Mmap::map(file)? };
    Ok(Bytes::from_owner(map))
}
