//! Making and removing the kernel's mount.
//!
//! kitfs mounts by itself, directly where it is privileged and through `fusermount3` where it isn't, and gives fuser the
//! descriptor alone: so it alone decides when to unmount. Invariant: nothing is unmounted before the table of mounts has
//! shown, in that moment, that the mount at that place is the one meant. (The kernel has no call that does both.)

use std::ffi::CString;
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{self, IoSliceMut, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::mountinfo::{self, Entry};
use super::point::MountPoint;
use super::{MountError, holders};
use crate::fs::ways::{READ_AHEAD, ReadAhead};

const DEVICE: &str = "/dev/fuse";
const HELPER: &str = "fusermount3";
const HELPER_CONFIG: &str = "/etc/fuse.conf";
const DEVICES: &str = "/sys/class/bdi";

/// A mount of this process. Dropping it detaches the mount, and then gives the mount point back.
#[derive(Debug)]
pub(super) struct Mounted {
    entry: Entry,
    gone: bool,
    point: MountPoint,
}

/// Whether something was open in a mount when it was unmounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Busy {
    No,
    Yes,
}

impl Mounted {
    pub(super) fn entry(&self) -> &Entry {
        &self.entry
    }

    pub(super) fn point(&self) -> &MountPoint {
        &self.point
    }

    /// Notes that the kernel has ended the mount, so that nothing is unmounted any more.
    pub(super) fn is_gone(&mut self) {
        self.gone = true;
    }

    /// Unmounts; a busy mount is detached, so that it is never left without its daemon.
    pub(super) fn leave(&mut self) -> Result<Busy, MountError> {
        let busy = match unmount(&self.entry, false) {
            Err(MountError::Busy { holders, .. }) => {
                tracing::warn!(dir = %self.entry.dir.display(), holders = %holders::Holder::list(&holders),
                    "the mount is busy: detached, and what is open in it fails from now on");
                unmount(&self.entry, true)?;
                Busy::Yes
            }
            outcome => outcome.map(|()| Busy::No)?,
        };
        self.gone = true;
        Ok(busy)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !self.gone
            && let Err(error) = unmount(&self.entry, true)
        {
            tracing::warn!(dir = %self.entry.dir.display(), %error, "a mount stays behind");
        }
    }
}

/// Mounts a FUSE file system on `point` and returns the device to serve it from.
pub(super) fn mount(mut point: MountPoint, shows: &str, allow_other: bool) -> Result<(OwnedFd, Mounted), MountError> {
    let dir = point.dir().to_owned();
    let device = match mount_directly(&dir, shows, allow_other)? {
        Some(device) => device,
        None => mount_by_helper(&dir, shows, allow_other)?,
    };
    match mountinfo::top_at(&dir)? {
        Some(entry) if entry.is_kitfs() && entry.shows == shows => {
            point.unlock();
            Ok((device, Mounted { entry, gone: false, point }))
        }
        // Somebody has unmounted it or mounted over it: then it is not ours to touch, and it dies with the device.
        _ => Err(MountError::Vanished { dir }),
    }
}

/// Mounts as root does; `None` if this process may not.
fn mount_directly(dir: &Path, shows: &str, allow_other: bool) -> Result<Option<OwnedFd>, MountError> {
    let device: OwnedFd = match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(file) => file.into(),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Err(MountError::NoDevice),
        Err(cause) if cause.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
        Err(cause) => return Err(MountError::disk("open", DEVICE, cause)),
    };
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    // The root's mode matters by its type alone; the rest comes with the first getattr.
    let mut options =
        format!("fd={},rootmode=40000,user_id={user},group_id={group},default_permissions", device.as_raw_fd());
    if allow_other {
        options.push_str(",allow_other");
    }
    let options =
        CString::new(options).map_err(|cause| MountError::Kernel { dir: dir.to_owned(), cause: cause.into() })?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    match rustix::mount::mount(shows, dir, mountinfo::TYPE, flags, options.as_c_str()) {
        Ok(()) => Ok(Some(device)),
        Err(Errno::PERM) => Ok(None),
        Err(cause) => Err(MountError::Kernel { dir: dir.to_owned(), cause: cause.into() }),
    }
}

/// Lets the setuid helper mount. It sends the device over the socket whose number it finds in `_FUSE_COMMFD`: that is
/// its standard input, the one descriptor that a child inherits without further ado.
fn mount_by_helper(dir: &Path, shows: &str, allow_other: bool) -> Result<OwnedFd, MountError> {
    if allow_other && !rustix::process::geteuid().is_root() && !helper_allows_other() {
        return Err(MountError::AllowOther);
    }
    let (ours, theirs) = UnixStream::pair().map_err(|cause| MountError::disk("make a socket for", HELPER, cause))?;
    let mut helper = Command::new(HELPER)
        .arg("-o")
        .arg(helper_options(shows, allow_other))
        .arg("--")
        .arg(dir)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(no_helper)?;
    let device = receive_descriptor(&ours);
    let mut said = String::new();
    if let Some(mut stderr) = helper.stderr.take() {
        // What it says is for the error message, which can do without.
        let _ = stderr.read_to_string(&mut said);
    }
    let status = helper.wait().map_err(|cause| MountError::disk("wait for", HELPER, cause))?;
    match device {
        Ok(Some(device)) if status.success() => Ok(device),
        Ok(_) => Err(helper_error(dir, &said)),
        Err(cause) => Err(MountError::Kernel { dir: dir.to_owned(), cause }),
    }
}

fn no_helper(cause: io::Error) -> MountError {
    match cause.kind() {
        io::ErrorKind::NotFound => MountError::NoFusermount,
        _ => MountError::disk("run", HELPER, cause),
    }
}

fn helper_error(dir: &Path, said: &str) -> MountError {
    let said = said.trim().to_owned();
    let hint = if said.contains(DEVICE) {
        "; this user needs read and write permission on /dev/fuse (as root: chmod 666 /dev/fuse)"
    } else if rustix::process::geteuid().is_root() && said.contains("not permitted") {
        "; a container needs --device /dev/fuse --cap-add SYS_ADMIN, and maybe --security-opt apparmor=unconfined"
    } else {
        ""
    };
    MountError::Fusermount { dir: dir.to_owned(), said, hint }
}

/// Reads the one descriptor that the helper sends; `None` if it ended without.
fn receive_descriptor(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    Ok(control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    }))
}

fn helper_options(shows: &str, allow_other: bool) -> String {
    let mut options = "ro,nosuid,nodev,noatime,default_permissions,subtype=kitfs,fsname=".to_owned();
    for c in shows.chars() {
        // The helper splits at commas and takes what follows a backslash as it is.
        if matches!(c, ',' | '\\') {
            options.push('\\');
        }
        options.push(c);
    }
    if allow_other {
        options.push_str(",allow_other");
    }
    options
}

fn helper_allows_other() -> bool {
    // Unreadable is not forbidden: then the helper says so itself.
    fs::read_to_string(HELPER_CONFIG).map_or(true, |config| allows_other(&config))
}

fn allows_other(config: &str) -> bool {
    config.lines().any(|line| line.trim() == "user_allow_other")
}

/// Has the kernel read ahead as far as it sends in one request. INIT offers 128 KiB and takes no more, so this goes through
/// the device's knob, which is root's. Nothing of the mount is asked for it.
pub(super) fn raise_read_ahead((major, minor): (u32, u32)) -> ReadAhead {
    let knob = format!("{DEVICES}/{major}:{minor}/read_ahead_kb");
    let raised = fs::write(&knob, (READ_AHEAD >> 10).to_string());
    let now = fs::read_to_string(&knob).ok().and_then(|text| text.trim().parse::<u64>().ok());
    let why = raised.err().map(|error| format!("{knob} can't be written: {error}"));
    if let Some(why) = &why {
        tracing::debug!(why, "the kernel reads ahead as far as it does by itself");
    }
    ReadAhead { bytes: now.map_or(0, |kib| kib << 10), why }
}

/// Unmounts exactly this mount, if it is still what its directory shows.
pub(super) fn unmount(mount: &Entry, lazy: bool) -> Result<(), MountError> {
    if mountinfo::top_at(&mount.dir)?.as_ref() != Some(mount) {
        let dir = mount.dir.clone();
        let covered = mountinfo::read()?.contains(mount);
        return Err(if covered { MountError::Covered { dir } } else { MountError::NotMounted { dir } });
    }
    let flags = if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    match rustix::mount::unmount(&mount.dir, flags | UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::PERM) => unmount_by_helper(mount, lazy),
        Err(Errno::BUSY) => Err(busy(mount)),
        Err(cause) => Err(MountError::Unmount { dir: mount.dir.clone(), said: cause.to_string() }),
    }
}

fn unmount_by_helper(mount: &Entry, lazy: bool) -> Result<(), MountError> {
    let output = Command::new(HELPER)
        .arg(if lazy { "-uz" } else { "-u" })
        .arg("--")
        .arg(&mount.dir)
        .stdin(Stdio::null())
        .output()
        .map_err(no_helper)?;
    if output.status.success() {
        return Ok(());
    }
    let mut said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if said.ends_with("busy") {
        return Err(busy(mount));
    }
    if said.is_empty() {
        // Writing to a String can't fail.
        let _ = write!(said, "{HELPER} ended with {}", output.status);
    }
    Err(MountError::Unmount { dir: mount.dir.clone(), said })
}

fn busy(mount: &Entry) -> MountError {
    MountError::Busy { dir: mount.dir.clone(), holders: holders::of(mount) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn commas_and_backslashes_of_a_source_are_escaped_for_the_helper() {
        let options = helper_options("oci:a,b\\c:1@sha256:00", true);
        assert!(options.ends_with(",fsname=oci:a\\,b\\\\c:1@sha256:00,allow_other"), "{options}");
        assert!(!helper_options("x", false).contains("allow_other"));
    }

    #[test]
    fn only_the_bare_line_allows_others() {
        assert!(allows_other("# mount_max = 3\nuser_allow_other\n"));
        assert!(!allows_other("#user_allow_other\n"));
        assert!(!allows_other(""));
    }

    #[test]
    fn a_socket_that_closes_without_a_descriptor_yields_none() {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        drop(theirs);
        assert!(receive_descriptor(&ours).expect("receive").is_none());
    }

    #[test]
    fn a_mount_that_is_not_there_any_more_is_left_alone() {
        let root = mountinfo::top_at(Path::new("/")).expect("table").expect("root");
        let other = Entry { id: root.id + 100_000, dir: PathBuf::from("/"), ..root };
        assert!(matches!(unmount(&other, true), Err(MountError::NotMounted { .. })));
    }

    #[test]
    fn an_error_about_the_device_names_the_remedy() {
        let error = helper_error(Path::new("/mnt"), "fusermount3: failed to open /dev/fuse: Permission denied\n");
        assert!(error.to_string().contains("chmod 666 /dev/fuse"), "{error}");
    }
}
