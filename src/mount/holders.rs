//! Which processes keep a mount busy.
//!
//! Everything is read from `/proc`, and nothing from the mount, which may be dead. A user sees his own processes, root
//! sees all.

use std::fmt;
use std::fs;
use std::path::Path;

use super::mountinfo::Entry;

/// How many processes an error names.
const SHOWN: usize = 8;

/// A process that uses a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its id.
    pub pid: u32,
    /// Its name, as `ps` shows it.
    pub name: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.name, self.pid)
    }
}

impl Holder {
    /// The processes in one line.
    pub(super) fn list(holders: &[Holder]) -> String {
        if holders.is_empty() {
            return "used by processes that this user cannot see".to_owned();
        }
        let names: Vec<String> = holders.iter().take(SHOWN).map(Holder::to_string).collect();
        let more = holders.len().saturating_sub(SHOWN);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        format!("used by {}{more}", names.join(", "))
    }
}

/// Finds the processes with an open file, a directory or a mapping in `mount`.
pub fn of(mount: &Entry) -> Vec<Holder> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = processes.flatten().filter_map(|process| process.file_name().to_str()?.parse().ok());
    let mut holders: Vec<Holder> = pids
        .filter(|pid| holds(*pid, mount))
        .map(|pid| Holder { pid, name: name(pid).unwrap_or_else(|| "?".to_owned()) })
        .collect();
    holders.sort_by_key(|holder| holder.pid);
    holders
}

fn holds(pid: u32, mount: &Entry) -> bool {
    let process = Path::new("/proc").join(pid.to_string());
    let inside = |link: &str| fs::read_link(process.join(link)).is_ok_and(|target| target.starts_with(&mount.dir));
    ["cwd", "root", "exe"].into_iter().any(inside)
        || fs::read_dir(process.join("fdinfo"))
            .is_ok_and(|files| files.flatten().any(|file| is_on(&file.path(), mount.id)))
        || fs::read_to_string(process.join("maps")).is_ok_and(|maps| maps_device(&maps, mount.device))
}

fn is_on(fdinfo: &Path, mount: u64) -> bool {
    fs::read_to_string(fdinfo).is_ok_and(|info| {
        info.lines().filter_map(|line| line.strip_prefix("mnt_id:")).any(|id| id.trim().parse() == Ok(mount))
    })
}

// 7f0c-7f0d r--s 00000000 00:2d 4 /mnt/kit/model.safetensors
fn maps_device(maps: &str, (major, minor): (u32, u32)) -> bool {
    let device = format!("{major:02x}:{minor:02x}");
    maps.lines().any(|line| line.split_ascii_whitespace().nth(3) == Some(&device))
}

fn name(pid: u32) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(name.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd as _;

    #[test]
    fn a_mapping_is_found_by_its_device() {
        let maps = "7f0c-7f0d r--s 00000000 00:2d 4   /mnt/kit/weights\n7ffd-7ffe rw-p 00000000 00:00 0 [stack]\n";
        assert!(maps_device(maps, (0, 0x2d)));
        assert!(!maps_device(maps, (0, 0x2e)));
    }

    #[test]
    fn an_open_file_is_found_by_its_mount() {
        let dir = tempfile::tempdir().expect("dir");
        let file = fs::File::create(dir.path().join("file")).expect("file");
        let info = format!("/proc/self/fdinfo/{}", file.as_raw_fd());
        let text = fs::read_to_string(&info).expect("fdinfo");
        let id = text.lines().find_map(|line| line.strip_prefix("mnt_id:")).expect("mnt_id").trim();
        let mount = id.parse().expect("number");
        assert!(is_on(Path::new(&info), mount));
        assert!(!is_on(Path::new(&info), mount + 1));
    }

    #[test]
    fn a_long_list_is_cut_and_an_empty_one_says_why() {
        let holders: Vec<Holder> = (1..=10).map(|pid| Holder { pid, name: "cat".to_owned() }).collect();
        assert!(Holder::list(&holders).ends_with("cat (pid 8) and 2 more"));
        assert!(Holder::list(&[]).contains("cannot see"));
    }
}
