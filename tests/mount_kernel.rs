//! What the kernel and programs see of a mount's names and content: a read-only file system that reads the same whichever
//! way it is read.

mod support;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;

use rustix::fs::{Mode, OFlags, StatVfsMountFlags, XattrFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use support::FaultServer;
use support::kit::{KitBuilder, tar};
use support::program::Kitfs;
use support::reading;
use support::sample::{SIZE, kit};

fn errno<T>(outcome: io::Result<T>, what: &str) -> Errno {
    match outcome {
        Ok(_) => panic!("{what} should have failed"),
        Err(error) => Errno::from_io_error(&error).unwrap_or_else(|| panic!("{what}: no error number in {error}")),
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Tries whatever would change the tree.
fn assert_nothing_can_be_changed(dir: &Path) {
    let (file, sub) = (dir.join("w/a.bin"), dir.join("w/sub"));
    let open = |options: &mut OpenOptions, path: &Path| options.open(path).map(drop);
    let io = |outcome: Result<(), Errno>| outcome.map_err(io::Error::from);
    let attempts: Vec<(&str, io::Result<()>)> = vec![
        ("open for reading and writing", open(OpenOptions::new().read(true).write(true), &file)),
        ("open for writing", open(OpenOptions::new().write(true), &file)),
        ("open for appending", open(OpenOptions::new().append(true), &file)),
        ("open and truncate", open(OpenOptions::new().write(true).truncate(true), &file)),
        ("create", open(OpenOptions::new().write(true).create_new(true), &dir.join("w/new"))),
        ("create in the root", open(OpenOptions::new().write(true).create_new(true), &dir.join("new"))),
        ("utimes", File::open(&file).expect("opens").set_modified(std::time::SystemTime::UNIX_EPOCH)),
        ("unlink", fs::remove_file(&file)),
        ("rename", fs::rename(&file, dir.join("w/renamed"))),
        ("link", fs::hard_link(&file, dir.join("w/linked"))),
        ("symlink", symlink("a.bin", dir.join("w/other"))),
        ("mkdir", fs::create_dir(dir.join("w/dir"))),
        ("rmdir", fs::remove_dir(&sub)),
        ("chmod", fs::set_permissions(&file, fs::Permissions::from_mode(0o777))),
        ("chown", std::os::unix::fs::chown(&file, Some(1), Some(1))),
        ("setxattr", io(rustix::fs::setxattr(&file, "user.kitfs.trust", b"pinned", XattrFlags::empty()))),
        ("removexattr", io(rustix::fs::removexattr(&file, "user.kitfs.trust"))),
        ("mknod", io(rustix::fs::mkfifoat(rustix::fs::CWD, dir.join("w/fifo"), Mode::RUSR))),
    ];
    for (what, outcome) in attempts {
        assert_eq!(errno(outcome, what), Errno::ROFS, "{what}");
    }
}

#[test]
fn nothing_can_be_changed() {
    let server = FaultServer::empty("team/kit");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit(&server).0.reference, &[]);
    assert_nothing_can_be_changed(&mount.dir);
    if is_root() {
        // Then it is the daemon and no longer the kernel that refuses.
        rustix::mount::mount_remount(&mount.dir, MountFlags::empty(), c"").expect("root can remount read-write");
        assert_nothing_can_be_changed(&mount.dir);
    }
    assert_eq!(fs::read(mount.path("w/b.sh")).expect("reads"), b"#!/bin/sh\n");
}

#[test]
fn a_name_that_is_not_there_is_enoent_and_a_file_is_no_directory() {
    let server = FaultServer::empty("team/kit");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit(&server).0.reference, &[]);
    for missing in ["nothing", "w/nothing", "w/sub/nothing", "w/nothing/below", "w/a.bi", "w/a.bin2", "W"] {
        assert_eq!(errno(fs::symlink_metadata(mount.path(missing)), missing), Errno::NOENT, "{missing}");
    }
    assert_eq!(errno(fs::symlink_metadata(mount.path("w/a.bin/x")), "below a file"), Errno::NOTDIR);
    assert_eq!(errno(fs::read_dir(mount.path("w/a.bin")), "list a file"), Errno::NOTDIR);
    assert_eq!(errno(fs::read(mount.path("w")), "read a directory"), Errno::ISDIR);
    assert_eq!(errno(fs::read_link(mount.path("w/a.bin")), "readlink of a file"), Errno::INVAL);
}

#[test]
fn a_directory_of_3000_names_can_be_read_from_any_position_while_it_is_open() {
    let server = FaultServer::empty("team/kit");
    let names: Vec<String> = (0..3000).map(|number| format!("many/{number:05}-{}", "n".repeat(number % 80))).collect();
    let files: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b"x"[..])).collect();
    let kit = KitBuilder::new().tar("datasets", "many", tar(&files)).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);

    let expected: BTreeSet<String> = names.iter().map(|name| name["many/".len()..].to_owned()).collect();
    let listed: Vec<_> = fs::read_dir(mount.path("many")).expect("opens").map(|entry| entry.expect("reads")).collect();
    assert_eq!(listed.len(), 3000);
    let found: BTreeSet<String> = listed.iter().map(|entry| entry.file_name().into_string().expect("UTF-8")).collect();
    assert_eq!(found, expected);

    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let open = rustix::fs::open(mount.path("many"), flags, Mode::empty()).expect("opens");
    let mut dir = rustix::fs::Dir::new(open).expect("a directory");
    let read = |dir: &mut rustix::fs::Dir| {
        dir.by_ref()
            .map(|entry| entry.expect("reads"))
            .map(|entry| (entry.offset(), entry.ino(), entry.file_name().to_owned()))
            .collect::<Vec<_>>()
    };
    let all = read(&mut dir);
    assert_eq!(all.len(), 3002, "with . and ..");
    assert_eq!(all[0].2.as_c_str(), c".");
    assert_eq!(all[1].2.as_c_str(), c"..");
    for at in [0, 1, 2, 254, 255, 256, 257, 1500, 2999, 3000, 3001] {
        dir.seek(all[at].0).expect("seeks");
        assert_eq!(read(&mut dir), all[at + 1..], "after entry {at}");
    }
    dir.rewind();
    assert_eq!(read(&mut dir), all, "from the beginning again");
    for (_, ino, name) in all.iter().skip(2).step_by(500) {
        let metadata = fs::symlink_metadata(mount.path("many").join(name.to_str().expect("UTF-8"))).expect("stats");
        assert_eq!(metadata.ino(), *ino, "the number in the listing is that of stat");
    }
}

#[test]
fn reads_end_where_the_file_ends() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let mut file = File::open(mount.path("w/a.bin")).expect("opens");
    let mut buffer = vec![0; 4096];
    assert_eq!(file.read_at(&mut buffer, SIZE as u64 - 10).expect("reads"), 10);
    assert_eq!(buffer[..10], bytes[SIZE - 10..]);
    for beyond in [SIZE as u64, SIZE as u64 + 1, 1 << 40, i64::MAX as u64 - 4096] {
        assert_eq!(file.read_at(&mut buffer, beyond).expect("reads"), 0, "at {beyond}");
    }
    assert_eq!(file.seek(SeekFrom::End(-1)).expect("seeks"), SIZE as u64 - 1);
    assert_eq!(file.read(&mut buffer).expect("reads"), 1);
    assert_eq!(file.read(&mut buffer).expect("reads"), 0);
    assert_eq!(fs::read(mount.path("w/sub/empty")).expect("reads"), b"");
}

#[test]
fn every_way_to_read_gives_the_same_bytes() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server);
    let kitfs = Kitfs::new();
    // Each finds the file cold once: whoever comes first must not make it easy for the others.
    for first in 0..4 {
        let kitfs_cold = Kitfs::new();
        let mount = kitfs_cold.mount(&kit.reference, &[]);
        let path = mount.path("w/a.bin");
        for way in 0..4 {
            let found = match (first + way) % 4 {
                0 => reading::directly(&path),
                1 => reading::mapped(&path),
                2 => reading::sent(&path, &kitfs.path("sent")),
                _ => copied(&path, &kitfs.path("copied")),
            };
            assert!(found == bytes, "way {} after {way} others", (first + way) % 4);
        }
    }
}

fn copied(path: &Path, to: &Path) -> Vec<u8> {
    let status = Command::new("cp").arg(path).arg(to).status().expect("cp");
    assert!(status.success());
    fs::read(to).expect("reads")
}

#[test]
fn links_are_links() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let link = mount.path("w/link");
    let metadata = fs::symlink_metadata(&link).expect("stats");
    assert!(metadata.is_symlink());
    assert_eq!(metadata.len(), 5, "as long as its target");
    assert_eq!(fs::read_link(&link).expect("readlink"), Path::new("a.bin"));
    assert!(fs::read(&link).expect("reads") == bytes);
}

#[test]
fn statfs_tells_the_size_of_the_kit_and_that_nothing_is_free() {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let found = rustix::fs::statvfs(&mount.dir).expect("statfs");
    let bytes = found.f_blocks * found.f_bsize;
    assert!((SIZE as u64..(SIZE + (1 << 20)) as u64).contains(&bytes), "{bytes}");
    assert_eq!((found.f_bfree, found.f_bavail, found.f_ffree), (0, 0, 0));
    assert!(found.f_files > 0);
    assert_eq!(found.f_namemax, 255);
    let flags = StatVfsMountFlags::RDONLY | StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV;
    assert!(found.f_flag.contains(flags), "{:?}", found.f_flag);
}
