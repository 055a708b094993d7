//! What can go wrong with a mount as such, and how to mend it.

use std::io;
use std::path::PathBuf;

use super::holders::Holder;

/// Mounting, serving or unmounting failed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The mount point has something in it that the mount would hide.
    #[error("{} is not empty; name an empty directory, or one that does not exist yet", dir.display())]
    NotEmpty {
        /// The mount point.
        dir: PathBuf,
    },
    /// The mount point is a file.
    #[error("{} is not a directory; name an empty directory, or one that does not exist yet", dir.display())]
    NotADirectory {
        /// The mount point.
        dir: PathBuf,
    },
    /// The mount point's parent is missing.
    #[error("cannot create {}: its parent does not exist; create it first: mkdir -p {}", dir.display(), parent.display())]
    NoParent {
        /// The mount point.
        dir: PathBuf,
        /// What is missing.
        parent: PathBuf,
    },
    /// The mount point cannot be written down.
    #[error("{} is not valid UTF-8; kitfs keeps its mounts in JSON files, so name another directory", dir.display())]
    NotUtf8 {
        /// The mount point, lossily shown.
        dir: PathBuf,
    },
    /// A kit is mounted there.
    #[error("{} already shows {shows}; unmount it first: kitfs unmount {}", dir.display(), dir.display())]
    AlreadyMounted {
        /// The mount point.
        dir: PathBuf,
        /// What is mounted.
        shows: String,
    },
    /// Another mount is being made there.
    #[error("another kitfs is about to mount on {}; let it finish, or name another directory", dir.display())]
    InUse {
        /// The mount point.
        dir: PathBuf,
    },
    /// There is no FUSE here.
    #[error(
        "/dev/fuse does not exist; load the kernel module (modprobe fuse), or give the container the device \
         (--device /dev/fuse --cap-add SYS_ADMIN)"
    )]
    NoDevice,
    /// Not privileged, and no helper either.
    #[error("fusermount3 is not installed, and without it only root can mount; install it (Debian: apt install fuse3)")]
    NoFusermount,
    /// The administrator has not allowed `allow_other`.
    #[error("--allow-other needs root, or the line `user_allow_other` in /etc/fuse.conf, which root can add")]
    AllowOther,
    /// fusermount3 refused.
    #[error("mounting on {} failed: {said}{hint}", dir.display())]
    Fusermount {
        /// The mount point.
        dir: PathBuf,
        /// What the helper said.
        said: String,
        /// What may help, with its separator; or nothing.
        hint: &'static str,
    },
    /// The kernel refused to mount.
    #[error("mounting on {} failed", dir.display())]
    Kernel {
        /// The mount point.
        dir: PathBuf,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// The mount was made but is not where it should be.
    #[error("{} was mounted but is not in /proc/self/mountinfo; was it unmounted in this moment?", dir.display())]
    Vanished {
        /// The mount point.
        dir: PathBuf,
    },
    /// The FUSE connection failed.
    #[error("the FUSE connection of {} failed", dir.display())]
    Session {
        /// The mount point.
        dir: PathBuf,
        /// The system's error.
        #[source]
        cause: io::Error,
    },
    /// There is nothing to unmount.
    #[error("nothing is mounted on {}", dir.display())]
    NotMounted {
        /// The path as given.
        dir: PathBuf,
    },
    /// Another mount lies over it.
    #[error("{} cannot be unmounted: another mount covers it; unmount that first: umount {}", dir.display(), dir.display())]
    Covered {
        /// The mount point.
        dir: PathBuf,
    },
    /// What is mounted there is none of ours.
    #[error("{} is not a kitfs mount but {kind}; kitfs leaves it alone", dir.display())]
    NotKitfs {
        /// The mount point.
        dir: PathBuf,
        /// The type of the file system.
        kind: String,
    },
    /// Processes use the mount.
    #[error("{} is busy: {}; end them, or detach it now and let them finish: kitfs unmount --lazy {}",
        dir.display(), Holder::list(holders), dir.display())]
    Busy {
        /// The mount point.
        dir: PathBuf,
        /// Who uses it, as far as this user may know.
        holders: Vec<Holder>,
    },
    /// The kernel or fusermount3 refused to unmount.
    #[error("unmounting {} failed: {said}", dir.display())]
    Unmount {
        /// The mount point.
        dir: PathBuf,
        /// What was said.
        said: String,
    },
    /// A file or directory of the mount's own could not be used.
    #[error("cannot {action} {}", path.display())]
    Disk {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// The system's error.
        #[source]
        cause: io::Error,
    },
    /// There is no place for the state.
    #[error(
        "neither KITFS_STATE_DIR nor XDG_STATE_HOME nor HOME is set; set one, so that kitfs can remember its mounts"
    )]
    NoStateDir,
    /// The runtime is going down.
    #[error("interrupted")]
    Interrupted,
}

impl MountError {
    /// A failure of a system call on `path`.
    pub(super) fn disk(action: &'static str, path: impl Into<PathBuf>, cause: impl Into<io::Error>) -> Self {
        Self::Disk { action, path: path.into(), cause: cause.into() }
    }
}
