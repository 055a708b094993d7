//! The machine that is measured on: its cores, its memory, its disk, and what processes have used.

use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::thread::available_parallelism;

use kitfs::units::format_size;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::options::Cores;

/// What the kernel counts a process's time in: `USER_HZ`, 100 on every Linux.
const TICKS: f64 = 100.0;
/// What is left free beside what is needed, so that nothing else on the disk suffers.
const SPARE: u64 = 1 << 30;

/// Confines this process, and what it starts, to the first `cores` that it may use; says in words which.
pub fn pin(cores: Cores) -> rustix::io::Result<String> {
    let all = available_parallelism().map_or(1, usize::from);
    let Some(cores) = cores.filter(|cores| *cores < all) else { return Ok(format!("all {all} cores")) };
    let allowed = sched_getaffinity(None)?;
    let chosen: Vec<_> = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core)).take(cores).collect();
    let mut set = CpuSet::new();
    chosen.iter().for_each(|core| set.set(*core));
    sched_setaffinity(None, &set)?;
    Ok(format!("cores {chosen:?} of {all}"))
}

/// Refuses to start where the disk can't hold what is made.
pub fn require_disk(dir: &Path, needed: u64) -> Result<(), String> {
    let found = rustix::fs::statvfs(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let free = found.f_bavail * found.f_frsize;
    if free < needed + SPARE {
        let (needed, free) = (format_size(needed + SPARE), format_size(free));
        return Err(format!(
            "this needs {needed} of disk below {}, where {free} are free; choose fewer rows, or set CARGO_TARGET_DIR to a directory on a larger disk",
            dir.display()
        ));
    }
    Ok(())
}

/// Makes a timed run's start the same each time: nothing waits to be written, and the memory that it will need is the
/// machine's own. (A virtual machine's free memory goes back to its host after a while; touching it again costs up to a
/// second a GiB, which would count against whoever comes first.) Who needs none reads what is warm, and has nothing to settle.
pub fn settle(memory: u64) {
    if memory == 0 {
        return;
    }
    rustix::fs::sync();
    let most = meminfo("MemAvailable") / 2;
    let touched = usize::try_from(memory.min(most)).expect("memory");
    drop(black_box(vec![1_u8; touched]));
}

/// A line of `/proc/meminfo`, in bytes.
fn meminfo(name: &str) -> u64 {
    kilobytes(&fs::read_to_string("/proc/meminfo").expect("the kernel tells"), name)
}

/// A line of a process's `status`, in bytes: `RssAnon` is memory of its own, `RssFile` maps of files.
pub fn memory_of(process: u32, name: &str) -> u64 {
    kilobytes(&fs::read_to_string(format!("/proc/{process}/status")).expect("the process runs"), name)
}

fn kilobytes(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).expect("a line of that name");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number of kB") << 10
}

/// How many bytes a process has written; none of one that has ended.
pub fn written_by(process: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{process}/io")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("wchar: "));
    line.and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// The seconds of CPU that a process has used.
pub fn cpu_of(process: u32) -> f64 {
    times(&format!("/proc/{process}/stat"))[..2].iter().sum()
}

/// The seconds of CPU that this process and its children that have ended have used.
pub fn cpu_here() -> f64 {
    times("/proc/self/stat").iter().sum()
}

/// User and system time of a process, and of its children that have ended.
fn times(stat: &str) -> [f64; 4] {
    let text = fs::read_to_string(stat).expect("the process runs");
    let (_, fields) = text.rsplit_once(')').expect("a name in parentheses");
    let mut fields = fields.split_whitespace().skip(11);
    std::array::from_fn(|_| {
        fields.next().and_then(|field| field.parse::<f64>().ok()).expect("a number of ticks") / TICKS
    })
}

/// What the machine is, for who reads the table later.
pub fn description() -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let processor = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown");
    let processor = processor.trim_start_matches(['\t', ' ', ':']);
    let who = if rustix::process::geteuid().is_root() { "root" } else { "no root" };
    format!("Linux {}, {processor}, {}, {who}", kernel.trim(), format_size(meminfo("MemTotal")))
}

/// How many others want the cores: the load of the last minute.
pub fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or_default()
}
