//! A user without privileges mounts through fusermount3. Run by root, the tests become nobody, in a mount namespace of
//! their own where `/dev/fuse` is open to all; run by anybody else they are that user.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::FaultServer;
use support::kit::{KitBuilder, Served, tar};

/// What Debian calls nobody and nogroup.
const NOBODY: &str = "65534";

/// Gives everybody a `/dev/fuse`, in this namespace only, and runs the rest as nobody. A tmpfs takes the device, as the
/// directory for temporary files may lie where there are none.
const BECOME_NOBODY: &str = r#"
mount -t tmpfs -o mode=0755 none "$HOME/dev"
mknod -m 0666 "$HOME/dev/fuse" c 10 229
mount --bind "$HOME/dev/fuse" /dev/fuse
exec setpriv --reuid NOBODY --regid NOBODY --clear-groups --inh-caps=-all -- "$@"
"#;

/// Before each script. `set -e` ignores commands after a `!`, hence `fails`.
const PRELUDE: &str = r#"
set -eu
kitfs() { "$KITFS" "$@"; }
fails() { if "$@"; then echo "should have failed: $*" >&2; exit 1; fi; }
trap 'kitfs unmount --all --lazy' EXIT
"#;

/// A user of kitfs without privileges.
struct User {
    home: tempfile::TempDir,
    id: u32,
}

impl User {
    fn new() -> Self {
        let home = tempfile::tempdir().expect("temporary directory");
        // The program as built may lie where nobody can go.
        fs::copy(env!("CARGO_BIN_EXE_kitfs"), home.path().join("kitfs")).expect("copies the program");
        fs::create_dir(home.path().join("dev")).expect("mkdir");
        let mut id = rustix::process::geteuid().as_raw();
        if id == 0 {
            id = NOBODY.parse().expect("a number");
            std::os::unix::fs::chown(home.path(), Some(id), Some(id)).expect("root can chown");
        }
        Self { home, id }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// Runs a shell script in the home, where `kitfs` is the program and `$REF` the kit. All its mounts must be gone at
    /// its end; and they are, however it ends.
    fn script(&self, kit: &Served, text: &str) -> String {
        let script = format!("{PRELUDE}{text}");
        let mut command = if rustix::process::geteuid().is_root() {
            let mut unshare = Command::new("unshare");
            let become_nobody = format!("set -eu\n{}", BECOME_NOBODY.replace("NOBODY", NOBODY));
            unshare.args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                &become_nobody,
                "sh",
                "sh",
                "-c",
                &script,
            ]);
            unshare
        } else {
            let mut shell = Command::new("sh");
            shell.args(["-c", &script]);
            shell
        };
        let output = command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").expect("PATH"))
            .env("HOME", self.home.path())
            .env("KITFS", self.path("kitfs"))
            .env("REF", &kit.reference)
            .current_dir(self.home.path())
            .output()
            .expect("sh runs");
        let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{}\n{said}\n{errors}\n{}", output.status, self.logs());
        said.into_owned()
    }

    fn logs(&self) -> String {
        let logs = fs::read_dir(self.path(".local/state/kitfs/logs")).into_iter().flatten().flatten();
        logs.filter_map(|file| fs::read_to_string(file.path()).ok()).collect()
    }
}

fn kit(server: &FaultServer) -> Served {
    let files: [(&str, &[u8]); 2] = [("code/a.py", b"print()\n"), ("code/sub/b.py", b"pass\n")];
    KitBuilder::new().tar("code", "code", tar(&files)).serve(server, "v1")
}

#[test]
fn a_user_mounts_reads_and_unmounts() {
    let server = FaultServer::empty("team/kit");
    let (kit, user) = (kit(&server), User::new());
    let said = user.script(
        &kit,
        r#"
        [ "$(id -u)" != 0 ]
        kitfs mount "$REF"
        cat kit/code/a.py
        fails touch kit/code/a.py
        grep " $HOME/kit " /proc/mounts
        stat -c "%u %a %n" kit/code/sub/b.py
        kitfs status
        kitfs unmount kit
        [ ! -e kit ]
        fails grep " $HOME/kit " /proc/mounts
        "#,
    );
    assert!(said.contains("print()"), "{said}");
    let mounted = said.lines().find(|line| line.contains("fuse.kitfs")).expect("it is in the table of mounts");
    assert!(mounted.starts_with(&format!("{}/team/kit@{} ", server.host(), kit.digest)), "{mounted}");
    let options: Vec<&str> = mounted.split(' ').nth(3).expect("options").split(',').collect();
    for option in ["ro", "nosuid", "nodev", "default_permissions", &format!("user_id={}", user.id)] {
        assert!(options.contains(&option), "{option} in {mounted}");
    }
    assert!(said.contains(&format!("{} 644 kit/code/sub/b.py", user.id)), "{said}");
    assert!(said.contains("live"), "{said}");
    let cache = fs::metadata(user.path(".cache/kitfs")).expect("the cache").permissions().mode();
    assert_eq!(cache & 0o777, 0o700, "nobody else reads the cache");
}

#[test]
fn a_user_reads_through_the_kernels_cache_and_status_says_why() {
    let server = FaultServer::empty("team/kit");
    let (kit, user) = (kit(&server), User::new());
    let said = user.script(
        &kit,
        r#"
        export KITFS_CACHE_SIZE=1TiB
        kitfs pull "$REF"
        kitfs mount "$REF"
        cat kit/code/a.py
        cat kit/code/a.py
        kitfs status
        kitfs status --json
        "#,
    );
    assert!(said.contains("print()\nprint()"), "{said}");
    let reads = said.lines().find(|line| line.trim_start().starts_with("reads ")).expect("a line of status");
    assert!(reads.contains("cached, because") && reads.contains("CAP_SYS_ADMIN"), "{reads}");
    let ahead = said.lines().find(|line| line.trim_start().starts_with("read-ahead ")).expect("a line of status");
    assert!(ahead.contains("128.0 KiB, because /sys/class/bdi/"), "{ahead}");
    assert!(said.contains(r#""opened":{"cached":2,"direct":0,"passthrough":0}"#), "{said}");
}

#[test]
fn a_busy_mount_names_who_uses_it_and_can_be_detached() {
    let server = FaultServer::empty("team/kit");
    let (kit, user) = (kit(&server), User::new());
    let said = user.script(
        &kit,
        r#"
        kitfs mount "$REF"
        exec 9<kit/code/a.py
        fails kitfs unmount kit 2>&1
        echo "pid $$"
        cat kit/code/sub/b.py
        kitfs unmount --lazy kit
        cat <&9
        exec 9<&-
        "#,
    );
    let pid = said.lines().find_map(|line| line.strip_prefix("pid ")).expect("the shell's pid");
    assert!(said.contains(&format!("sh (pid {pid}")) && said.contains("--lazy"), "{said}");
    assert!(said.contains("pass") && said.contains("print()"), "{said}");
}

#[test]
fn a_dead_mount_is_cleared_and_its_place_taken() {
    let server = FaultServer::empty("team/kit");
    let (kit, user) = (kit(&server), User::new());
    user.script(
        &kit,
        r#"
        killed() {
            kitfs mount "$REF"
            pid=$(kitfs status | sed -n 's/^ *pid  *//p')
            kill -9 "$pid"
            while kitfs status | grep -q live; do sleep 0.01; done
            kitfs status | grep dead
        }
        killed
        kitfs unmount kit
        [ ! -e kit ]
        killed
        kitfs mount "$REF"
        cat kit/code/a.py
        kitfs unmount kit
        [ ! -e kit ]
        "#,
    );
}

#[test]
fn a_source_with_spaces_commas_and_backslashes_passes_through_the_helper() {
    let server = FaultServer::empty("team/kit");
    let (kit, user) = (kit(&server), User::new());
    let layout = user.path("a kit, with\\ odd");
    let copied = Command::new("cp").arg("-r").arg(support::data("layouts/docs-only")).arg(&layout).status();
    assert!(copied.expect("cp").success());
    let said = user.script(
        &kit,
        r#"
        kitfs mount "oci:$HOME/a kit, with\\ odd:v1" "mnt, odd"
        ls "mnt, odd"
        kitfs status
        kitfs unmount "mnt, odd"
        [ ! -e "mnt, odd" ]
        "#,
    );
    assert!(said.contains("Kitfile") && said.contains("live"), "{said}");
    assert!(said.contains(&format!("oci:{}@sha256:", layout.display())), "{said}");
}

#[test]
fn others_are_let_in_only_where_the_administrator_allows_it() {
    let server = FaultServer::empty("team/kit");
    let (kit, user) = (kit(&server), User::new());
    let config = fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    let allowed = config.lines().any(|line| line.trim() == "user_allow_other");
    let (expected, proof) = if allowed { ("yes", "allow_other") } else { ("no", "/etc/fuse.conf") };
    let said = user.script(
        &kit,
        r#"
        if kitfs mount --allow-other "$REF" 2>&1; then echo "outcome yes"; else echo "outcome no"; fi
        grep " $HOME/kit " /proc/mounts || [ ! -e kit ]
        "#,
    );
    assert!(said.contains(&format!("outcome {expected}")) && said.contains(proof), "{said}");
}

#[test]
fn a_directory_of_another_user_is_refused() {
    let server = FaultServer::empty("team/kit");
    let (kit, user) = (kit(&server), User::new());
    let said = user.script(&kit, r#"fails kitfs mount "$REF" /etc/kitfs-test 2>&1"#);
    assert!(said.contains("/etc/kitfs-test") && said.contains("denied"), "{said}");
    assert!(!Path::new("/etc/kitfs-test").exists());
}
