//! Paths in a kit, from the root down, through the same file system that a mount serves.

use std::collections::VecDeque;

use super::{Failure, output};
use crate::fs::{Attr, DirEntry, Fs, FsError, Ino, NodeKind};
use crate::path::TreePath;

/// Links followed for one path, as in Linux.
const MAX_LINKS: usize = 40;

/// Reads a path as a user types it; a leading slash stands for the kit's root.
pub(super) fn parse_path(text: &str) -> Result<TreePath, crate::path::InvalidPath> {
    TreePath::clean(text.trim_start_matches('/').as_bytes())
}

/// What `path` names. Links on the way are followed, and the last one too if `through_last`.
pub(super) async fn find(fs: &Fs, path: &TreePath, through_last: bool) -> Result<(TreePath, Attr), Failure> {
    let failed = |error: FsError| at(path, error);
    let mut rest: VecDeque<Vec<u8>> = path.components().map(<[u8]>::to_vec).collect();
    let mut here = vec![(Vec::new(), fs.getattr(Ino::ROOT).await.map_err(failed)?)];
    let mut links = 0;
    while let Some(name) = rest.pop_front() {
        match name.as_slice() {
            b"" | b"." => continue,
            b".." => {
                here.truncate((here.len() - 1).max(1));
                continue;
            }
            _ => {}
        }
        let parent = here.last().map_or(Ino::ROOT, |(_, attr)| attr.ino);
        let attr = fs.lookup(parent, &name).await.map_err(failed)?;
        if attr.kind == NodeKind::Symlink && (through_last || !rest.is_empty()) {
            links += 1;
            if links > MAX_LINKS {
                return Err(Failure::failed(format!(
                    "{}: too many symbolic links",
                    output::printable(path.as_bytes())
                )));
            }
            let target = fs.readlink(attr.ino).await.map_err(failed)?;
            target.split(|byte| *byte == b'/').rev().for_each(|part| rest.push_front(part.to_vec()));
            continue;
        }
        here.push((name, attr));
    }
    let names: Vec<&[u8]> = here.iter().skip(1).map(|(name, _)| name.as_slice()).collect();
    let found = TreePath::clean(&names.join(&b'/'))?;
    // There is always the root.
    let attr = here.pop().map(|(_, attr)| attr).ok_or_else(|| at(path, FsError::NotFound))?;
    Ok((found, attr))
}

/// What is in a directory, without `.` and `..`, sorted by name.
pub(super) async fn entries(fs: &Fs, path: &TreePath, dir: Ino) -> Result<Vec<(Vec<u8>, Attr)>, Failure> {
    let mut all = Vec::new();
    let note = |entry: DirEntry<'_>| {
        if !matches!(entry.name, b"." | b"..") {
            all.push((entry.name.to_vec(), entry.attr));
        }
        false
    };
    fs.readdir(dir, 0, note).await.map_err(|error| at(path, error))?;
    Ok(all)
}

/// A failure at a path of the kit.
pub(super) fn at(path: &TreePath, error: FsError) -> Failure {
    let path = if path.is_root() { "/".to_owned() } else { output::printable(path.as_bytes()) };
    match error {
        // These say which layer, which the path does not help with.
        FsError::Fetch(error) => error.into(),
        error => Failure::failed(format!("{path}: {error}")),
    }
}
