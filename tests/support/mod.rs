//! What integration tests share: fixtures, a real registry, and a registry with faults.
//!
//! ```text
//! registry       Debian's docker-registry as a child process
//! fault          a registry of our own that counts, and misbehaves as it is told
//!   wire         its HTTP: requests in, answers out
//!   upload       what it takes: blobs, manifests, referrers
//!   content      what it serves: bytes, a file, or a function
//! away           what is found where a registry was
//! delay          a network of so many milliseconds before it
//! kit            ModelKits made for tests, hostile ones too
//! index          indexes of their layers, and referrers
//! kithome        kit's local storage, filled from a layout
//! sample         a kit with something of everything
//! life           what is mounted, who serves it, what is left
//! program        kitfs itself with a home of its own; mounts; recorded trees
//! random         numbers that look random
//! reading        the ways in which programs read files
//! http           a blocking HTTP client that hides nothing
//! ```
#![allow(dead_code, unused_imports, reason = "each test crate uses another part of this module")]

pub mod away;
pub mod content;
pub mod delay;
pub mod fault;
pub mod http;
pub mod index;
pub mod kit;
pub mod kithome;
pub mod life;
pub mod program;
pub mod random;
pub mod reading;
pub mod registry;
pub mod sample;
mod upload;
mod wire;

use std::path::{Path, PathBuf};

use futures_util::StreamExt as _;
use kitfs::source::{ByteStream, SourceError};

pub use content::Content;
pub use fault::{Auth, Fault, FaultServer, Login};
pub use registry::{PASSWORD, Registry, RegistryOptions, USER};

/// A path below `tests/data`.
pub fn data(path: impl AsRef<Path>) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

/// A path below `tests/support`.
pub fn support(path: impl AsRef<Path>) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support").join(path)
}

/// The OCI layouts among the fixtures.
pub fn layouts() -> Vec<PathBuf> {
    let mut all: Vec<_> = std::fs::read_dir(data("layouts"))
        .expect("tests/data/layouts")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    all.sort();
    assert!(!all.is_empty(), "tests/data/layouts is empty");
    all
}

/// All bytes of a stream.
pub async fn collect(mut stream: ByteStream) -> Result<Vec<u8>, SourceError> {
    let mut all = Vec::new();
    while let Some(piece) = stream.next().await {
        all.extend_from_slice(piece?.peek());
    }
    Ok(all)
}

/// No byte of a layer was asked for twice, and no request was longer than 16 MiB.
pub fn assert_each_once(ranges: &[(u64, u64)]) {
    let mut ranges = ranges.to_vec();
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        assert!(pair[0].1 < pair[1].0, "asked for twice: {:?} and {:?}", pair[0], pair[1]);
    }
    assert!(ranges.iter().all(|(first, last)| last - first < 16 << 20), "{ranges:?}");
}

/// Waits until something has happened on another thread; fails after ten seconds.
pub fn eventually(what: &str, mut happened: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !happened() {
        assert!(start.elapsed() < std::time::Duration::from_secs(10), "not within ten seconds: {what}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
