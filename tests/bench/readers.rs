//! Who reads. Each reads to the end, and fails if that is not where it should be.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;

/// What the readers of our own ask for at once.
const PIECE: usize = 1 << 20;

/// Downloads to a file, as one would without kitfs.
pub fn curl(url: &str, to: &Path) {
    run(Command::new("curl").args(["-sSf", "-o"]).arg(to).arg(url));
}

/// Downloads and throws away: the seconds from the first byte on.
pub fn curl_wire(url: &str) -> f64 {
    let told =
        run(Command::new("curl").args(["-sSf", "-o", "/dev/null", "-w", "%{time_starttransfer} %{time_total}", url]));
    let times: Vec<f64> = told.split(' ').map(|time| time.parse().expect("curl tells times")).collect();
    times[1] - times[0]
}

pub fn cat(path: &Path) {
    run(Command::new("cat").arg(path).stdout(Stdio::null()));
}

pub fn dd(path: &Path) {
    let mut from = std::ffi::OsString::from("if=");
    from.push(path);
    run(Command::new("dd").arg(from).args(["of=/dev/null", "bs=1M", "status=none"]));
}

/// Lists everything below a directory, with all that `stat` tells.
pub fn ls(dir: &Path) {
    run(Command::new("ls").arg("-lR").arg(dir).stdout(Stdio::null()));
}

/// 4 KiB reads at random places for `seconds`, one thread a core of two: how many a second.
pub fn fio(path: &Path, seconds: u32) -> f64 {
    let told = run(Command::new("fio")
        .args(["--name=random", "--rw=randread", "--bs=4k", "--ioengine=psync", "--numjobs=2", "--group_reporting"])
        .args([
            "--readonly",
            "--invalidate=0",
            "--norandommap",
            "--randrepeat=1",
            "--time_based",
            "--output-format=json",
        ])
        .arg(format!("--runtime={seconds}"))
        .arg(format!("--filename={}", path.display())));
    let told: Value = serde_json::from_str(&told).expect("fio tells in JSON");
    told["jobs"][0]["read"]["iops"].as_f64().expect("operations a second")
}

/// Maps a file and copies it in order.
#[expect(unsafe_code, reason = "what is measured is a map; nobody changes the file")]
pub fn copy_map(path: &Path) {
    let file = File::open(path).expect("opens");
    // SAFETY: the file system is read-only, or the file is one that only this process knows.
    let map = unsafe { memmap2::Mmap::map(&file) }.expect("maps");
    let mut buffer = vec![0; PIECE];
    for piece in map.chunks(PIECE) {
        buffer[..piece.len()].copy_from_slice(piece);
        std::hint::black_box(&mut buffer);
    }
}

/// Reads a file with several threads, each every so manieth stripe, as the ranks of a tensor-parallel server do.
pub fn stripes(path: &Path, threads: usize, stripe: usize) {
    let file = File::open(path).expect("opens");
    let size = file.metadata().expect("stats").len();
    let read = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for first in 0..threads {
            let (file, read) = (&file, &read);
            scope.spawn(move || {
                let mut buffer = vec![0; stripe];
                for at in (first as u64 * stripe as u64..size).step_by(threads * stripe) {
                    let piece = &mut buffer[..stripe.min((size - at) as usize)];
                    file.read_exact_at(piece, at).expect("reads");
                    read.fetch_add(piece.len() as u64, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(read.into_inner(), size);
}

/// Reads files one after the other.
pub fn in_order(files: &[PathBuf], bytes: u64) {
    let mut buffer = Vec::new();
    let mut read = 0;
    for path in files {
        buffer.clear();
        read += File::open(path).and_then(|mut file| file.read_to_end(&mut buffer)).expect("reads") as u64;
    }
    assert_eq!(read, bytes);
}

/// Runs a program to its end; what it printed.
fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).stderr(Stdio::piped());
    let output =
        output.output().unwrap_or_else(|error| panic!("{command:?}: {error}; scripts/setup bench installs it"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
