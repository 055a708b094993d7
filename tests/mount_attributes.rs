//! What a mount tells of its files and of itself: owners, modes, times, inode numbers, extended attributes, and its line in
//! the table of mounts.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::io::Errno;
use support::kit::{KitBuilder, gzip, header, pattern};
use support::program::Kitfs;
use support::sample::{MTIME, kit};
use support::{FaultServer, data, eventually};

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Everything below a directory, itself included.
fn walk(root: &Path) -> Vec<PathBuf> {
    let mut all = vec![root.to_owned()];
    let mut at = 0;
    while at < all.len() {
        if fs::symlink_metadata(&all[at]).expect("stats").is_dir() {
            all.extend(fs::read_dir(&all[at]).expect("lists").map(|entry| entry.expect("an entry").path()));
        }
        at += 1;
    }
    all.sort();
    all
}

fn attribute(path: &Path, name: &str) -> Result<String, Errno> {
    let mut value = vec![0; 4096];
    let len = rustix::fs::getxattr(path, name, &mut value)?;
    Ok(String::from_utf8(value[..len].to_vec()).expect("UTF-8"))
}

fn attributes(path: &Path) -> BTreeSet<String> {
    let mut names = vec![0; 4096];
    let len = rustix::fs::listxattr(path, &mut names).expect("listxattr");
    let names = names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names.map(|name| String::from_utf8(name.to_vec()).expect("UTF-8")).collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| format!("user.kitfs.{name}")).collect()
}

#[test]
fn attributes_tell_where_a_file_comes_from_and_how_far_it_is_proved() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let file = mount.path("w/a.bin");
    let get = |name: &str| attribute(&file, &format!("user.kitfs.{name}"));

    fs::metadata(&file).expect("stats");
    let before = server.bytes_for(kit.layers[0]);
    assert_eq!(get("layer").as_deref(), Ok(kit.layers[0].to_string().as_str()));
    assert_eq!(get("trust").as_deref(), Ok("provisional"));
    assert_eq!(get("cached").as_deref(), Ok("no"));
    assert_eq!(get("digest"), Err(Errno::NODATA));
    assert_eq!(attributes(&file), set(&["layer", "trust", "cached"]));
    assert_eq!(server.bytes_for(kit.layers[0]), before, "asking fetches nothing");

    assert!(fs::read(&file).expect("reads") == bytes);
    assert_eq!(get("trust").as_deref(), Ok("derived"));
    eventually("the file is in the cache", || get("cached").as_deref() == Ok("yes"));
    let digest = get("digest").expect("a digest");
    assert!(digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit()), "{digest}");
    assert_eq!(attributes(&file), set(&["layer", "trust", "cached", "digest"]));
    eventually("the object of that name is in the cache", || {
        kitfs.cached_files("objects").iter().any(|path| path.ends_with(&digest))
    });
}

#[test]
fn the_root_tells_what_is_served() {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    assert_eq!(attributes(&mount.dir), set(&["reference", "digest"]));
    assert_eq!(attribute(&mount.dir, "user.kitfs.reference").as_deref(), Ok(kit.reference.as_str()));
    assert_eq!(attribute(&mount.dir, "user.kitfs.digest"), Ok(kit.digest.to_string()));
    assert_eq!(attributes(&mount.path("w")), BTreeSet::new());
    for (path, name) in
        [("", "user.kitfs.trust"), ("w", "user.kitfs.digest"), ("Kitfile", "user.kitfs.layer"), ("w/a.bin", "user.x")]
    {
        assert_eq!(attribute(&mount.path(path), name), Err(Errno::NODATA), "{name} of {path:?}");
    }
}

#[test]
fn attributes_that_a_kit_has_none_of_are_not_supported_rather_than_missing() {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    for path in ["", "w", "w/a.bin", "Kitfile"] {
        let path = mount.path(path);
        for name in ["security.selinux", "security.capability", "system.posix_acl_access", "trusted.overlay.opaque"] {
            // The kernel keeps `trusted.` from who is not root, and then has none.
            let expected = if name.starts_with("trusted") && !is_root() { Errno::NODATA } else { Errno::OPNOTSUPP };
            assert_eq!(attribute(&path, name), Err(expected), "{name} of {}", path.display());
        }
        assert_eq!(attribute(&path, "user.kitfs.nothing"), Err(Errno::NODATA), "{}", path.display());
    }
    // The directory of all trees is none itself.
    assert_eq!(attribute(&mount.path(".kitfs"), "user.kitfs.digest"), Err(Errno::NODATA));
    let logs = kitfs.logs();
    assert!(!logs.contains("ERROR"), "an answer is no error: {logs}");
}

#[test]
fn an_attribute_says_how_long_it_is_and_fits_exactly() {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let name = "user.kitfs.digest";
    let digest = kit.digest.to_string();
    assert_eq!(rustix::fs::getxattr_query(&mount.dir, name), Ok(digest.len()));
    let mut exact = vec![0; digest.len()];
    assert_eq!(rustix::fs::getxattr(&mount.dir, name, &mut exact), Ok(digest.len()));
    assert_eq!(exact, digest.as_bytes());
    let mut short = vec![0; digest.len() - 1];
    assert_eq!(rustix::fs::getxattr(&mount.dir, name, &mut short), Err(Errno::RANGE));
    let listed = rustix::fs::listxattr_query(&mount.dir).expect("listxattr");
    assert_eq!(listed, "user.kitfs.reference\0user.kitfs.digest\0".len());
    let mut short = vec![0; listed - 1];
    assert_eq!(rustix::fs::listxattr(&mount.dir, &mut short), Err(Errno::RANGE));
}

/// Owner, group and mode of a path in a mount with these options.
fn owned(options: &[&str], names: &[&str]) -> Vec<(u32, u32, u32)> {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, options);
    let look = |name: &&str| {
        let metadata = fs::symlink_metadata(mount.path(name)).expect("stats");
        (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777)
    };
    names.iter().map(look).collect()
}

const NAMES: [&str; 5] = ["w", "w/a.bin", "w/b.sh", "w/sub", "w/link"];

#[test]
fn by_default_files_are_the_mounting_users_and_have_the_modes_of_the_kit() {
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let modes = [0o750, 0o640, 0o700, 0o700, 0o777];
    assert_eq!(owned(&[], &NAMES), modes.map(|mode| (uid, gid, mode)));
}

#[test]
fn owner_group_and_modes_can_be_set() {
    let options = ["--uid", "4711", "--gid", "4712", "--file-mode", "0444", "--dir-mode", "0555"];
    let modes = [0o555, 0o444, 0o444, 0o555, 0o777];
    assert_eq!(owned(&options, &NAMES), modes.map(|mode| (4711, 4712, mode)));
}

#[test]
fn the_kits_own_owners_can_be_shown() {
    // What is below `w` is then for 1234 and root to see.
    let found = owned(&["--owner", "kit"], &["w", "README.md"]);
    assert_eq!(found, [(1234, 2345, 0o750), (1000, 0, 0o644)]);
}

#[test]
fn owners_and_times_of_kits_that_the_real_tools_packed() {
    // kit 1.7 writes 1000:0 and no time; 0.1 wrote what was on the disk, which was root's.
    for (reference, owner, mtime) in [("tiny-llm:1.2.0", (1000, 0), 0), ("legacy-0.1:v1", (0, 0), 1_795_242_728)] {
        let kitfs = Kitfs::new();
        let mount = kitfs.mount(&format!("oci:{}", data("layouts").join(reference).display()), &["--owner=kit"]);
        let files = walk(&mount.dir).into_iter().filter(|path| path.is_file() && !path.ends_with("Kitfile"));
        let mut seen = 0;
        for path in files {
            let metadata = fs::metadata(&path).expect("stats");
            assert_eq!((metadata.uid(), metadata.gid()), owner, "{}", path.display());
            assert_eq!(metadata.mtime(), mtime, "{}", path.display());
            seen += 1;
        }
        assert!(seen > 3, "{reference} has files");
    }
}

#[test]
fn times_are_the_kits() {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    for name in NAMES {
        let metadata = fs::symlink_metadata(mount.path(name)).expect("stats");
        assert_eq!(metadata.mtime(), MTIME as i64, "{name}");
    }
}

#[test]
fn others_may_enter_only_if_they_are_allowed() {
    let server = FaultServer::empty("team/kit");
    let (kit, bytes) = kit(&server);
    let kitfs = Kitfs::new();
    if !is_root() {
        let allowed =
            fs::read_to_string("/etc/fuse.conf").is_ok_and(|text| text.lines().any(|line| line == "user_allow_other"));
        let dir = kitfs.path("mnt");
        let output = kitfs.run(&["mount", "--allow-other", &kit.reference, dir.to_str().expect("UTF-8")]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), allowed, "{said}");
        assert!(allowed || said.contains("user_allow_other"), "{said}");
        kitfs.run(&["unmount", "--all"]);
        return;
    }
    // The way to the mount is open, so it is the mount that decides.
    fs::set_permissions(kitfs.path(""), fs::Permissions::from_mode(0o755)).expect("chmod");
    let as_nobody = |command: &[&str], path: &Path| {
        let mut setpriv = Command::new("setpriv");
        setpriv.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]).args(command).arg(path);
        setpriv.output().expect("setpriv")
    };
    let closed = kitfs.mount(&kit.reference, &[]);
    assert!(!as_nobody(&["ls"], &closed.dir).status.success(), "others can't enter by default");

    let open = kitfs.mount(&kit.reference, &["--allow-other"]);
    let modes: Vec<u32> =
        NAMES.iter().map(|name| fs::symlink_metadata(open.path(name)).expect("stats").mode() & 0o7777).collect();
    assert_eq!(modes, [0o755, 0o644, 0o744, 0o755, 0o777], "files get a+r and directories a+rx");
    let read = as_nobody(&["cat"], &open.path("w/a.bin"));
    assert!(read.status.success() && read.stdout == bytes, "{}", String::from_utf8_lossy(&read.stderr));
    let written = as_nobody(&["touch"], &open.path("w/a.bin"));
    assert!(!written.status.success());

    let given = kitfs.mount(&kit.reference, &["--allow-other", "--file-mode", "0600"]);
    assert!(as_nobody(&["ls"], &given.path("w")).status.success());
    assert!(!as_nobody(&["cat"], &given.path("w/a.bin")).status.success(), "a mode that is given counts as it is");
}

#[test]
fn inode_numbers_are_the_same_after_a_remount_and_belong_to_one_name() {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server);
    let kitfs = Kitfs::new();
    let numbers = |read: bool| {
        let mount = kitfs.mount(&kit.reference, &[]);
        if read {
            fs::read(mount.path("w/a.bin")).expect("reads");
        }
        let paths = walk(&mount.dir);
        let number = |path: &PathBuf| {
            let name = path.strip_prefix(&mount.dir).expect("below").to_owned();
            (name, fs::symlink_metadata(path).expect("stats").ino())
        };
        paths.iter().map(number).collect::<BTreeMap<_, _>>()
    };
    let cold = numbers(true);
    assert_eq!(cold.len(), 9, "{cold:?}");
    assert_eq!(cold.values().collect::<BTreeSet<_>>().len(), cold.len(), "each has its own");
    assert_eq!(numbers(false), cold, "from the index they are those of the headers");
}

#[test]
fn the_table_of_mounts_shows_the_type_and_the_reference_with_its_digest() {
    let server = FaultServer::empty("team/kit");
    let (kit, _) = kit(&server);
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    let table = fs::read_to_string("/proc/mounts").expect("the table");
    let dir = mount.dir.to_str().expect("UTF-8");
    let line = table.lines().find(|line| line.split(' ').nth(1) == Some(dir)).expect("the mount");
    let fields: Vec<&str> = line.split(' ').collect();
    assert_eq!(fields[0], format!("{}/team/kit@{}", server.host(), kit.digest));
    assert_eq!(fields[2], "fuse.kitfs");
    let options: Vec<&str> = fields[3].split(',').collect();
    for option in ["ro", "nosuid", "nodev", "default_permissions"] {
        assert!(options.contains(&option), "{option} in {line}");
    }
    assert!(!options.contains(&"allow_other"), "{line}");
}

#[test]
fn a_layer_that_names_no_directory_is_shown_with_those_that_kit_unpack_would_make() {
    let big = pattern(1, 3 << 20);
    let mut tar = Vec::new();
    for (path, bytes) in [("w/deep/a.bin", &big[..]), ("w/deep/sub/b.txt", b"b")] {
        tar.extend(header(path, b'0', 0o644, bytes.len() as u64));
        tar.extend_from_slice(bytes);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.extend([0; 1024]);
    for (suffix, blob) in [("tar", tar.clone()), ("tar+gzip", gzip(&tar))] {
        for indexed in [false, true] {
            let server = FaultServer::empty("team/kit");
            let builder = KitBuilder::new().layer("model", "w/deep", suffix, blob.clone());
            let kit = if indexed { builder.indexed() } else { builder }.serve(&server, "v1");
            let kitfs = Kitfs::new();
            let mount = kitfs.mount(&kit.reference, &[]);
            let mode = |name: &str| fs::metadata(mount.path(name)).expect("is there").permissions().mode() & 0o7777;
            assert_eq!((mode("w"), mode("w/deep")), (0o755, 0o755), "{suffix} {indexed}");
            assert_eq!(walk(&mount.path("w")).len(), 5, "{suffix} {indexed}");
            assert_eq!(mode("w/deep/sub"), 0o755, "{suffix} {indexed}");
            assert_eq!(fs::read(mount.path("w/deep/sub/b.txt")).expect("reads"), b"b", "{suffix} {indexed}");
        }
    }
}
