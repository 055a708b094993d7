//! The requests of the kernel, one method each.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};

use super::{Adapter, disk, guard, passthrough, refusal};
use crate::fs::{Attr, DirEntry, Ino, NodeKind, ReadReply};

/// Requests that nobody waits for (read-ahead) which the kernel may send at once. Below this, a cold sequential read
/// waits for the network one request at a time.
const MAX_BACKGROUND: u16 = 64;

/// Inode numbers are never reused, so all nodes are of one generation.
const GENERATION: Generation = Generation(0);

impl fuser::Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each by itself: a kernel that lacks one still gets the others. FUSE_OVER_IO_URING must not be asked for, as fuser
        // 0.18 does not speak it.
        for capability in [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_CACHE_SYMLINKS,
            // Tells an aborted connection from an unmounted one, see `Ended`.
            InitFlags::FUSE_ABORT_ERROR,
        ] {
            if let Err(missing) = config.add_capabilities(capability) {
                tracing::debug!(?missing, "this kernel's FUSE lacks a capability");
            }
        }
        // A handle that bypasses the page cache can still be mapped.
        if config.add_capabilities(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP).is_err() {
            self.ways.note_no_direct("this kernel can't map a file that is read so; Linux 6.6 and newer can");
        }
        if let Some(Err(why)) = self.sample.as_deref().map(|sample| passthrough::negotiate(config, sample)) {
            self.ways.note_no_passthrough(why);
        }
        // Both setters fail on zero or on more than fuser's buffer alone. Nothing is ever written: the size of a
        // write is also that of the largest read.
        let _ = config.set_max_background(MAX_BACKGROUND);
        let _ = config.set_max_write(disk::MAX_READ);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (fs, name) = (Arc::clone(&self.trees), name.to_owned());
        let work = async move {
            let name = name.as_bytes();
            fs.lookup(ino(parent), name).await.map_err(|error| refusal(&fs, "lookup", parent.0, name, &error))
        };
        self.answer("lookup", work, |outcome| match outcome {
            Ok(attr) => reply.entry_with_ttls(&attr.ttl, &attr.name_ttl, &file_attr(&attr), GENERATION),
            Err(errno) => reply.error(errno),
        });
    }

    fn forget(&self, _: &Request, node: INodeNo, lookups: u64) {
        guard("forget", || self.trees.forget(ino(node), lookups));
    }

    fn getattr(&self, _: &Request, node: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let fs = Arc::clone(&self.trees);
        let work =
            async move { fs.getattr(ino(node)).await.map_err(|error| refusal(&fs, "getattr", node.0, b"", &error)) };
        self.answer("getattr", work, |outcome| match outcome {
            Ok(attr) => reply.attr(&attr.ttl, &file_attr(&attr)),
            Err(errno) => reply.error(errno),
        });
    }

    fn readlink(&self, _: &Request, node: INodeNo, reply: ReplyData) {
        let fs = Arc::clone(&self.trees);
        let work =
            async move { fs.readlink(ino(node)).await.map_err(|error| refusal(&fs, "readlink", node.0, b"", &error)) };
        self.answer("readlink", work, |outcome| match outcome {
            Ok(target) => reply.data(&target),
            Err(errno) => reply.error(errno),
        });
    }

    fn open(&self, _: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.acc_mode() != OpenAccMode::O_RDONLY {
            return reply.error(Errno::EROFS);
        }
        let fs = Arc::clone(&self.trees);
        let work = async move { fs.open(ino(node)).await.map_err(|error| refusal(&fs, "open", node.0, b"", &error)) };
        let files = Arc::clone(&self.files);
        self.answer("open", work, move |outcome| match outcome {
            Ok(opened) => files.open(node, &opened, reply),
            Err(errno) => reply.error(errno),
        });
    }

    fn read(
        &self,
        _: &Request,
        node: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (fs, disk) = (Arc::clone(&self.trees), Arc::clone(&self.disk));
        let work = async move {
            fs.read(ino(node), handle.0, offset, size as usize)
                .await
                .map_err(|error| refusal(&fs, "read", node.0, b"", &error))
        };
        self.answer("read", work, move |outcome| {
            let content = match outcome {
                Ok(content) => content,
                Err(errno) => return reply.error(errno),
            };
            let answer = move |bytes: io::Result<&[u8]>| match bytes {
                Ok(bytes) => reply.data(bytes),
                Err(cause) => {
                    tracing::error!(operation = "read", inode = node.0, offset, size, %cause, "reading the cache failed");
                    reply.error(Errno::EIO);
                }
            };
            match content {
                ReadReply::End => answer(Ok(&[])),
                ReadReply::Pieces(pieces) => disk.gather(pieces, answer),
                ReadReply::Staged { file, offset, len } => disk.read(file, offset, len, answer),
            }
        });
    }

    fn release(
        &self,
        _: &Request,
        node: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let fs = Arc::clone(&self.trees);
        guard("release", || {
            reply.ok();
            self.files.release(node);
            // Closing may wait for the disk.
            drop(self.runtime.spawn(async move { fs.close(ino(node)).await }));
        });
    }

    // Answered, although ENOSYS would save the request: the handle pins the tree that the directory belongs to.
    fn opendir(&self, _: &Request, node: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let fs = Arc::clone(&self.trees);
        let work = async move { fs.opendir(ino(node)).map_err(|error| refusal(&fs, "opendir", node.0, b"", &error)) };
        self.answer("opendir", work, |outcome| match outcome {
            Ok(opened) => {
                // Kept, it is read from memory: of what a second look costs, only opening and closing are left.
                let kept = FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE;
                let flags = if opened.keep_cache { kept } else { FopenFlags::empty() };
                reply.opened(FileHandle(opened.handle), flags);
            }
            Err(errno) => reply.error(errno),
        });
    }

    fn readdir(&self, _: &Request, node: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let fs = Arc::clone(&self.trees);
        let work = async move {
            // `add` says that an entry no longer fits; the kernel asks for it again by its offset.
            let add = |entry: DirEntry<'_>| {
                let (node, kind) = (INodeNo(entry.attr.ino.0), file_type(&entry.attr.kind));
                reply.add(node, entry.next, kind, OsStr::from_bytes(entry.name))
            };
            let listed = fs.readdir(ino(node), handle.0, offset, false, add).await;
            (reply, listed.map_err(|error| refusal(&fs, "readdir", node.0, b"", &error)))
        };
        self.answer("readdir", work, |(reply, listed)| match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        });
    }

    fn readdirplus(&self, _: &Request, node: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        let fs = Arc::clone(&self.trees);
        let work = async move {
            let add = |entry: DirEntry<'_>| {
                let attr = file_attr(&entry.attr);
                let name = OsStr::from_bytes(entry.name);
                // One for both, of which the name's is never the longer.
                reply.add(attr.ino, entry.next, name, &entry.attr.name_ttl, &attr, GENERATION)
            };
            let listed = fs.readdir(ino(node), handle.0, offset, true, add).await;
            (reply, listed.map_err(|error| refusal(&fs, "readdirplus", node.0, b"", &error)))
        };
        self.answer("readdirplus", work, |(reply, listed)| match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        });
    }

    fn releasedir(&self, _: &Request, node: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        guard("releasedir", || {
            self.trees.releasedir(ino(node), handle.0);
            reply.ok();
        });
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        guard("statfs", || {
            let fs = self.trees.statfs();
            let fragment = fs.bsize;
            reply.statfs(fs.blocks, fs.bfree, fs.bavail, fs.files, fs.ffree, fs.bsize, fs.namelen, fragment);
        });
    }

    fn getxattr(&self, _: &Request, node: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let (fs, name) = (Arc::clone(&self.trees), name.to_owned());
        let work = async move {
            let name = name.as_bytes();
            fs.getxattr(ino(node), name).await.map_err(|error| refusal(&fs, "getxattr", node.0, name, &error))
        };
        self.answer("getxattr", work, move |outcome| send_xattr(outcome, size, reply));
    }

    fn listxattr(&self, _: &Request, node: INodeNo, size: u32, reply: ReplyXattr) {
        let fs = Arc::clone(&self.trees);
        let work = async move {
            let names =
                fs.listxattr(ino(node)).await.map_err(|error| refusal(&fs, "listxattr", node.0, b"", &error))?;
            Ok(names.into_iter().flat_map(|name| name.into_iter().chain([0])).collect())
        };
        self.answer("listxattr", work, move |outcome| send_xattr(outcome, size, reply));
    }

    // The kernel refuses what writes before it gets here, until somebody remounts the file system read-write: then
    // these do.

    fn setattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn rename(&self, _: &Request, _: INodeNo, _: &OsStr, _: INodeNo, _: &OsStr, _: RenameFlags, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(Errno::EROFS);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::EROFS);
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, _: u64, _: i32, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }
}

fn ino(node: INodeNo) -> Ino {
    Ino(node.0)
}

fn file_type(kind: &NodeKind) -> FileType {
    match kind {
        NodeKind::File => FileType::RegularFile,
        NodeKind::Directory => FileType::Directory,
        NodeKind::Symlink => FileType::Symlink,
    }
}

fn file_attr(attr: &Attr) -> FileAttr {
    let mtime = time(attr.mtime);
    FileAttr {
        ino: INodeNo(attr.ino.0),
        size: attr.size,
        blocks: attr.size.div_ceil(512),
        atime: mtime,
        mtime,
        ctime: mtime,
        crtime: mtime,
        kind: file_type(&attr.kind),
        // The type is in `kind`; the lower twelve bits fit.
        perm: (attr.mode & 0o7777) as u16,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// Seconds since the epoch as a time; what no time can hold is the epoch.
fn time(seconds: i64) -> SystemTime {
    let distance = Duration::from_secs(seconds.unsigned_abs());
    let time = if seconds < 0 { UNIX_EPOCH.checked_sub(distance) } else { UNIX_EPOCH.checked_add(distance) };
    time.unwrap_or(UNIX_EPOCH)
}

/// Size 0 asks how long the value is; a buffer that is too small is told so.
fn send_xattr(outcome: Result<Vec<u8>, Errno>, size: u32, reply: ReplyXattr) {
    match outcome {
        // The kernel takes at most 64 KiB.
        Ok(value) if size == 0 => reply.size(u32::try_from(value.len()).unwrap_or(u32::MAX)),
        Ok(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(errno) => reply.error(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch_and_beyond_all_bounds_have_an_answer() {
        assert_eq!(time(0), UNIX_EPOCH);
        assert_eq!(UNIX_EPOCH.duration_since(time(-5)).map(|d| d.as_secs()).ok(), Some(5));
        for seconds in [i64::MIN, i64::MAX] {
            let _ = time(seconds);
        }
    }

    #[test]
    fn the_type_bits_of_a_mode_are_left_out_of_the_permissions() {
        let attr = Attr {
            ino: Ino(7),
            kind: NodeKind::File,
            size: 513,
            mode: 0o104755,
            uid: 1,
            gid: 2,
            mtime: 3,
            nlink: 1,
            ttl: Duration::ZERO,
            name_ttl: Duration::ZERO,
        };
        let attr = file_attr(&attr);
        assert_eq!((attr.perm, attr.blocks, attr.kind), (0o4755, 2, FileType::RegularFile));
    }
}
