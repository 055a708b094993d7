//! The ways in which the kernel may have a file read.
//!
//! - *Passthrough*: the kernel reads the cache's own file by itself, as fast as that is, and we see nothing of it. It takes
//!   a file that is complete, and a kernel and privileges that allow it.
//! - *Cached*: through the kernel's page cache, which asks us for what it lacks, and reads ahead.
//! - *Direct*: past the page cache, each request of a reader to us: see [`super::direct`].
//!
//! What is wanted, the user says; what is possible, the adapter and the mount find out, and note here; which way one file
//! goes, [`Fs::open`](super::Fs::open) decides. What is not possible has a reason, which `status` tells; the first counts.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::direct::Direct;

/// How far the kernel should read ahead of who reads in order, in bytes: as much as it sends in one request. Its own
/// 128 KiB cost two thirds of the rate at which a page cache is filled from the disk; more than this gained nothing.
pub const READ_AHEAD: u64 = 1 << 20;

/// What the user allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Allowed {
    /// Complete files may pass through.
    pub passthrough: bool,
    /// Large files may be read past the kernel's cache.
    pub direct_io: bool,
}

/// How the handles of a mount are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The kernel reads the cache's file.
    Passthrough,
    /// Through the kernel's page cache.
    Cached,
    /// Past it.
    Direct,
}

/// The ways that a mount has.
#[derive(Debug)]
pub struct Ways {
    /// Why no file passes through, if none does.
    no_passthrough: OnceLock<String>,
    /// Why a file does not, where others do.
    not_all: OnceLock<String>,
    pub(super) direct: Direct,
    read_ahead: OnceLock<ReadAhead>,
    /// How often a file was opened in each way.
    opened: [AtomicU64; 3],
}

/// What is told of how files are read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Whether complete files pass through to the kernel.
    pub passthrough: bool,
    /// Why they don't.
    pub why: Option<String>,
    /// Why some of them don't, where others do.
    #[serde(default)]
    pub not_all_why: Option<String>,
    /// Whether large files that are not here yet are read past the kernel's cache.
    pub direct_io: bool,
    /// Why they are not.
    pub direct_io_why: Option<String>,
    /// How far the kernel reads ahead, where that is known.
    pub read_ahead: Option<ReadAhead>,
    /// How often files were opened.
    pub opened: Opens,
}

/// How far the kernel reads ahead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadAhead {
    /// In bytes.
    pub bytes: u64,
    /// Why it is not [`READ_AHEAD`].
    pub why: Option<String>,
}

/// How often files were opened, by the way they are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opens {
    /// By the kernel from the cache's file.
    pub passthrough: u64,
    /// Through the kernel's page cache.
    pub cached: u64,
    /// Past it.
    pub direct: u64,
}

impl Ways {
    /// The ways that are allowed, and whether what is in the cache is hashed again whenever it is opened.
    pub(super) fn new(allowed: Allowed, rechecks: bool) -> Self {
        let no_passthrough = OnceLock::new();
        if !allowed.passthrough {
            let _ = no_passthrough.set("it was asked for with --passthrough never".to_owned());
        } else if rechecks {
            let _ = no_passthrough.set("--recheck hashes what is read, and the kernel would not".to_owned());
        }
        let direct = Direct::new(allowed.direct_io);
        Self {
            no_passthrough,
            not_all: OnceLock::new(),
            direct,
            read_ahead: OnceLock::new(),
            opened: Default::default(),
        }
    }

    /// Whether complete files may pass through, as far as is known.
    pub fn may_pass(&self) -> bool {
        self.no_passthrough.get().is_none()
    }

    /// Notes why no file can pass through.
    pub fn note_no_passthrough(&self, why: String) {
        if let Ok(()) = self.no_passthrough.set(why) {
            tracing::info!(why = self.no_passthrough.get(), "files are read through the kernel's cache");
        }
    }

    /// Notes why a file does not pass through that others need not share.
    pub fn note_not_all(&self, why: impl FnOnce() -> String) {
        if self.not_all.get().is_none() {
            let _ = self.not_all.set(why());
        }
    }

    /// Notes that a handle past the kernel's cache could not be mapped here.
    pub fn note_no_direct(&self, why: &str) {
        self.direct.give_up(why.to_owned());
    }

    /// Notes how far the kernel reads ahead.
    pub fn note_read_ahead(&self, found: ReadAhead) {
        // A mount has one.
        let _ = self.read_ahead.set(found);
    }

    /// Notes that a file was opened.
    pub fn note_open(&self, way: Way) {
        self.count(way).fetch_add(1, Ordering::Relaxed);
    }

    fn count(&self, way: Way) -> &AtomicU64 {
        let [passthrough, cached, direct] = &self.opened;
        match way {
            Way::Passthrough => passthrough,
            Way::Cached => cached,
            Way::Direct => direct,
        }
    }

    /// What is told of it.
    pub fn report(&self) -> Report {
        let count = |way| self.count(way).load(Ordering::Relaxed);
        let direct_io_why = self.direct.given_up();
        Report {
            passthrough: self.may_pass(),
            why: self.no_passthrough.get().cloned(),
            not_all_why: self.not_all.get().filter(|_| self.may_pass()).cloned(),
            direct_io: direct_io_why.is_none(),
            direct_io_why,
            read_ahead: self.read_ahead.get().cloned(),
            opened: Opens {
                passthrough: count(Way::Passthrough),
                cached: count(Way::Cached),
                direct: count(Way::Direct),
            },
        }
    }
}
