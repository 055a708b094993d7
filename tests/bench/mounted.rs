//! A mount with a cache and a home of its own. When it is dropped it is unmounted, its daemon has left, and its files are gone:
//! what comes next shares the machine with nothing of it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Pid;
use serde_json::Value;

use crate::support::life;
use crate::support::program::Kitfs;

/// How long a daemon may take to put on the disk what it holds, and leave.
const LEAVE: Duration = Duration::from_secs(120);

/// It.
pub struct Mounted {
    kitfs: Kitfs,
    dir: PathBuf,
    daemon: Pid,
    took: f64,
    is_there: bool,
}

impl Mounted {
    /// Mounts with an empty cache.
    pub fn cold(reference: &str) -> Self {
        Self::by(Kitfs::new(), reference)
    }

    /// Mounts as a user who may have set something.
    pub fn by(kitfs: Kitfs, reference: &str) -> Self {
        let dir = kitfs.path("mnt");
        let (daemon, took) = mount(&kitfs, reference, &dir);
        Self { kitfs, dir, daemon, took, is_there: true }
    }

    /// Unmounts, and mounts again with the cache as it is then.
    pub fn again(&mut self, reference: &str) {
        self.leave();
        (self.daemon, self.took) = mount(&self.kitfs, reference, &self.dir);
        self.is_there = true;
    }

    /// The process that serves.
    pub fn daemon(&self) -> u32 {
        self.daemon.as_raw_nonzero().get().cast_unsigned()
    }

    /// The seconds that `kitfs mount` took until it returned.
    pub fn took(&self) -> f64 {
        self.took
    }

    /// A path in the mount.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// What `status` tells.
    pub fn status(&self) -> Value {
        life::status(&self.kitfs)[0].clone()
    }

    /// Waits until the cache holds a complete object of `size` bytes; its file.
    pub fn object(&self, size: u64) -> PathBuf {
        let start = Instant::now();
        loop {
            let of_size = |path: &PathBuf| path.metadata().is_ok_and(|metadata| metadata.len() == size);
            if let Some(file) = self.kitfs.cached_files("objects").into_iter().find(of_size) {
                return file;
            }
            assert!(start.elapsed() < LEAVE, "no object of {size} bytes in the cache\n{}", self.kitfs.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Unmounts. What it has cached stays until this is dropped.
    pub fn leave(&mut self) {
        if !std::mem::take(&mut self.is_there) {
            return;
        }
        self.kitfs.ok(&["unmount", life::text(&self.dir)]);
        let start = Instant::now();
        while life::runs(self.daemon) {
            assert!(start.elapsed() < LEAVE, "the daemon stays\n{}", self.kitfs.logs());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.kitfs.run(&["unmount", "--lazy", life::text(&self.dir)]);
        } else {
            self.leave();
        }
    }
}

/// Mounts; the daemon, and the seconds that it took.
fn mount(kitfs: &Kitfs, reference: &str, dir: &Path) -> (Pid, f64) {
    let start = Instant::now();
    kitfs.ok(&["mount", reference, life::text(dir)]);
    let took = start.elapsed().as_secs_f64();
    let pid = life::status(kitfs)[0]["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    (pid.and_then(Pid::from_raw).expect("status tells the pid"), took)
}
