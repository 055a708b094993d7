//! A mount's end, by whatever way it comes: nothing of it is left, and nothing that isn't ours is touched.

mod support;

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Pid, Signal};
use support::life::{assert_left, is_mounted, kit, mounted, mounted_on, records, runs, status, text};
use support::program::Kitfs;
use support::{FaultServer, eventually};

/// A process that holds something until it is dropped.
struct Holder(Child);

impl Holder {
    /// `tail -f` of a file, which has it open once it has printed it.
    fn of(file: &Path) -> Self {
        let mut child = Command::new("tail").arg("-f").arg(file).stdout(Stdio::piped()).spawn().expect("tail");
        let mut byte = [0];
        child.stdout.as_mut().expect("piped").read_exact(&mut byte).expect("tail prints the file");
        Self(child)
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It may have ended by itself, when what it held was gone.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Mounts of this test's own; only root makes them.
struct Foreign(PathBuf);

impl Foreign {
    fn tmpfs(dir: PathBuf) -> Self {
        rustix::mount::mount("tmpfs", &dir, "tmpfs", MountFlags::empty(), None).expect("mounts a tmpfs");
        Self(dir)
    }

    fn bind(from: &Path, dir: PathBuf) -> Self {
        rustix::mount::mount_bind(from, &dir).expect("mounts");
        Self(dir)
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn a_busy_mount_stays_and_the_error_names_who_uses_it() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    let (dir, daemon) = mounted(&kitfs, &kit, "mnt");
    let holder = Holder::of(&dir.join("README.md"));
    let said = kitfs.fails(&["unmount", text(&dir)]);
    assert!(said.contains("tail") && said.contains(&holder.pid()) && said.contains("--lazy"), "{said}");
    assert_eq!(fs::read(dir.join("README.md")).expect("still mounted"), b"read me");
    assert_eq!(status(&kitfs)[0]["condition"], "live");
    drop(holder);
    kitfs.ok(&["unmount", text(&dir)]);
    assert_left(&kitfs, &dir, daemon);
}

#[test]
fn a_working_directory_keeps_a_mount_busy() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    let (dir, daemon) = mounted(&kitfs, &kit, "mnt");
    let sleeper = Holder(Command::new("sleep").arg("1000").current_dir(&dir).spawn().expect("sleep"));
    let said = kitfs.fails(&["unmount", text(&dir)]);
    assert!(said.contains(&sleeper.pid()), "{said}");
    drop(sleeper);
    kitfs.ok(&["unmount", text(&dir)]);
    assert_left(&kitfs, &dir, daemon);
}

#[test]
fn a_lazy_unmount_serves_what_is_open_until_it_is_closed() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    let (dir, daemon) = mounted(&kitfs, &kit, "mnt");
    let mut open = File::open(dir.join("README.md")).expect("opens");
    kitfs.ok(&["unmount", "--lazy", text(&dir)]);
    assert!(!is_mounted(&dir));
    assert!(runs(daemon));
    assert_eq!(status(&kitfs)[0]["condition"], "detached");
    let mut read = Vec::new();
    open.read_to_end(&mut read).expect("what is open is served, although nothing of it was read before");
    assert_eq!(read, b"read me");
    drop(open);
    assert_left(&kitfs, &dir, daemon);
}

#[test]
fn all_are_unmounted_and_one_that_is_busy_does_not_keep_the_others() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    let mounts: Vec<(PathBuf, Pid)> = ["a", "b", "c"].iter().map(|name| mounted(&kitfs, &kit, name)).collect();
    let holder = Holder::of(&mounts[1].0.join("README.md"));
    let said = kitfs.fails(&["unmount", "--all"]);
    assert!(said.contains(text(&mounts[1].0)), "{said}");
    assert_eq!(mounts.iter().map(|(dir, _)| is_mounted(dir)).collect::<Vec<_>>(), [false, true, false]);
    drop(holder);
    kitfs.ok(&["unmount", "--all"]);
    for (dir, daemon) in &mounts {
        assert_left(&kitfs, dir, *daemon);
    }
    kitfs.ok(&["unmount", "--all"]);
}

#[test]
fn an_unmount_from_outside_ends_the_daemon_and_clears_what_it_made() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    let mut ways = vec![vec!["fusermount3", "-u"], vec!["fusermount3", "-u", "-z"]];
    if rustix::process::geteuid().is_root() {
        ways.extend([vec!["umount"], vec!["umount", "-l"]]);
    }
    for way in ways {
        let (dir, daemon) = mounted(&kitfs, &kit, "mnt");
        let outcome = Command::new(way[0]).args(&way[1..]).arg(&dir).status().expect("it runs");
        assert!(outcome.success(), "{way:?}");
        eventually("its record goes", || records(&kitfs).is_empty());
        assert_left(&kitfs, &dir, daemon);
    }
}

#[test]
fn a_signal_ends_the_daemon_and_leaves_no_dead_mount() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let (dir, daemon) = mounted(&kitfs, &kit, "mnt");
        rustix::process::kill_process(daemon, signal).expect("kill");
        assert_left(&kitfs, &dir, daemon);
    }
}

#[test]
fn a_signal_while_something_is_open_detaches_the_mount_and_the_reader_gets_an_error() {
    let server = FaultServer::empty("team/kit");
    // What passes through is the kernel's to read, whoever leaves.
    let (kit, kitfs) = (kit(&server), Kitfs::new().with("KITFS_PASSTHROUGH", "never"));
    let (dir, daemon) = mounted(&kitfs, &kit, "mnt");
    let mut open = File::open(dir.join("README.md")).expect("opens");
    rustix::process::kill_process(daemon, Signal::TERM).expect("kill");
    assert_left(&kitfs, &dir, daemon);
    let failed = open.read_to_end(&mut Vec::new()).expect_err("nobody serves it");
    // The second is what a request gets that was under way.
    assert!(matches!(Errno::from_io_error(&failed), Some(Errno::NOTCONN | Errno::CONNABORTED)), "{failed}");
}

#[test]
fn a_signal_while_a_reader_waits_for_the_network_ends_both() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    let (dir, daemon) = mounted(&kitfs, &kit, "mnt");
    let gate = server.hold(kit.layers[0], 100);
    let cat = Command::new("cat").arg(dir.join("README.md")).stderr(Stdio::null()).stdout(Stdio::null()).spawn();
    let mut cat = Holder(cat.expect("cat"));
    gate.wait_until_reached_by(1);
    rustix::process::kill_process(daemon, Signal::TERM).expect("kill");
    assert_left(&kitfs, &dir, daemon);
    assert!(!cat.0.wait().expect("ends").success(), "it has not read the file");
}

#[test]
fn a_killed_daemons_mount_is_told_dead_and_an_unmount_clears_it() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    let (dir, daemon) = mounted(&kitfs, &kit, "mnt");
    rustix::process::kill_process(daemon, Signal::KILL).expect("kill");
    eventually("it ends", || !runs(daemon));
    // Its other threads may hold the connection a moment longer than the first.
    eventually("it is dead", || {
        fs::read_dir(&dir).is_err_and(|error| Errno::from_io_error(&error) == Some(Errno::NOTCONN))
    });
    assert_eq!(status(&kitfs)[0]["condition"], "dead");
    for arguments in [&["status"][..], &["status", text(&dir)], &["mount"]] {
        let said = kitfs.ok(arguments);
        assert!(said.contains("dead") && said.contains("kitfs unmount"), "{said}");
    }
    kitfs.ok(&["unmount", text(&dir)]);
    assert_left(&kitfs, &dir, daemon);
}

#[test]
fn a_new_mount_takes_the_place_of_a_dead_one() {
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    let (dir, daemon) = mounted(&kitfs, &kit, "mnt");
    // Even what is still open in the dead mount does not keep it.
    let open = File::open(dir.join("README.md")).expect("opens");
    rustix::process::kill_process(daemon, Signal::KILL).expect("kill");
    eventually("it ends", || !runs(daemon));
    let (dir, daemon) = mounted(&kitfs, &kit, "mnt");
    assert_eq!(fs::read(dir.join("README.md")).expect("reads"), b"read me");
    assert_eq!(mounted_on(&dir), ["fuse.kitfs"]);
    assert_eq!(status(&kitfs).len(), 1);
    drop(open);
    kitfs.ok(&["unmount", text(&dir)]);
    assert_left(&kitfs, &dir, daemon);
}

#[test]
fn what_kitfs_has_not_mounted_it_does_not_unmount() {
    let kitfs = Kitfs::new();
    let plain = kitfs.path("plain");
    fs::create_dir(&plain).expect("mkdir");
    for dir in [text(&plain), text(&kitfs.path("missing"))] {
        let said = kitfs.fails(&["unmount", dir]);
        assert!(said.contains("nothing is mounted"), "{said}");
    }
    // Something that every system has mounted, whoever runs this.
    let said = kitfs.fails(&["unmount", "--lazy", "/proc"]);
    assert!(said.contains("proc") && said.contains("leaves it alone"), "{said}");
    assert!(is_mounted(Path::new("/proc")));
    if rustix::process::geteuid().is_root() {
        let (tmpfs, bind) = (kitfs.path("tmpfs"), kitfs.path("bind"));
        fs::create_dir(&tmpfs).expect("mkdir");
        fs::create_dir(&bind).expect("mkdir");
        let tmpfs = Foreign::tmpfs(tmpfs);
        fs::write(tmpfs.0.join("mine"), "x").expect("writes");
        let bind = Foreign::bind(&tmpfs.0, bind);
        for foreign in [&tmpfs, &bind] {
            for options in [&["unmount"][..], &["unmount", "--lazy"]] {
                let said = kitfs.fails(&[options, &[text(&foreign.0)]].concat());
                assert!(said.contains("tmpfs"), "{said}");
            }
            assert_eq!(fs::read(foreign.0.join("mine")).expect("still mounted"), b"x");
        }
        kitfs.ok(&["unmount", "--all"]);
        assert!(is_mounted(&tmpfs.0) && is_mounted(&bind.0));
    }
}

#[test]
fn a_mount_that_another_one_covers_is_neither_unmounted_nor_is_the_other() {
    if !rustix::process::geteuid().is_root() {
        // Only root can mount over a mount; that nothing foreign is unmounted is shown above for everybody.
        assert!(rustix::mount::mount("tmpfs", "/proc", "tmpfs", MountFlags::empty(), None).is_err());
        return;
    }
    let server = FaultServer::empty("team/kit");
    let (kit, kitfs) = (kit(&server), Kitfs::new());
    let (dir, daemon) = mounted(&kitfs, &kit, "mnt");
    let cover = Foreign::tmpfs(dir.clone());
    fs::write(dir.join("mine"), "x").expect("writes");
    kitfs.fails(&["unmount", text(&dir)]);
    assert_eq!(mounted_on(&dir), ["fuse.kitfs", "tmpfs"]);
    // Leaving by a signal must not take the cover away either.
    rustix::process::kill_process(daemon, Signal::TERM).expect("kill");
    eventually("it leaves", || !runs(daemon));
    assert_eq!(fs::read(dir.join("mine")).expect("still mounted"), b"x");
    drop(cover);
    kitfs.run(&["unmount", text(&dir)]);
    assert!(!is_mounted(&dir));
    assert!(status(&kitfs).is_empty());
}
