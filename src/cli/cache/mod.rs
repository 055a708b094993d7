//! `kitfs cache`: what is in the cache, and tending it.
//!
//! - `ls`, `gc`, `rm`, `verify`: the commands; `repair`: fetching again what was damaged.
//! - here: what they have in common: names of kits, who serves them, removing and telling of it.

mod gc;
mod ls;
mod repair;
mod rm;
mod verify;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{Failure, output};
use crate::cache::{Cache, Removed};
use crate::digest::Digest;
use crate::inventory::{KitState, Share};
use crate::mount::{MountError, StateDir};
use crate::units::format_size;

/// Shows what is in the cache, by kit; removes and checks it
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs cache <COMMAND>",
    after_help = "\
When the cache reaches its limit (--cache-size), what was used longest ago goes by itself, but for
kits that are kept. These commands are for a look, and for more than that.

Examples:
  kitfs cache ls
  kitfs cache rm ghcr.io/team/llama:8b
  kitfs cache verify --repair"
)]
pub(super) struct CacheCommand {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Ls(ls::Ls),
    Gc(gc::Gc),
    Rm(rm::Rm),
    Verify(Box<verify::Verify>),
}

impl CacheCommand {
    pub(super) async fn run(self) -> Result<(), Failure> {
        match self.command {
            Command::Ls(command) => command.run(),
            Command::Gc(command) => command.run(),
            Command::Rm(command) => command.run(),
            Command::Verify(command) => command.run().await,
        }
    }
}

/// How many things there are of something, and what they take on the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
struct Count {
    items: u64,
    bytes: u64,
}

impl Count {
    fn add(&mut self, bytes: u64) {
        self.items += 1;
        self.bytes += bytes;
    }

    fn of(share: &Share) -> Self {
        Self { items: (share.objects.len() + share.smalls.len()) as u64, bytes: share.bytes() }
    }
}

impl std::fmt::Display for Count {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let files = if self.items == 1 { "file" } else { "files" };
        write!(f, "{} in {} {files}", format_size(self.bytes), self.items)
    }
}

/// What was removed, and what was to be and stays, as somebody uses it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
struct Outcome {
    removed: Count,
    in_use: Count,
}

impl Outcome {
    fn took(&mut self, bytes: u64, removed: Removed) {
        match removed {
            Removed::Gone => self.removed.add(bytes),
            Removed::InUse => self.in_use.add(bytes),
            Removed::Absent => {}
        }
    }

    /// Removes what a share has, or only tells. Whoever has an object open keeps it.
    fn remove(&mut self, cache: &Cache, share: &Share, dry_run: bool) -> Result<(), Failure> {
        for (object, bytes) in &share.objects {
            self.took(*bytes, cache.remove_object(object, dry_run)?);
        }
        for (small, bytes) in &share.smalls {
            self.took(*bytes, if dry_run { Removed::Gone } else { cache.remove_small(*small)? });
        }
        Ok(())
    }
}

/// The latest name of a kit, and the beginning of its digest.
fn name(kit: &KitState) -> (String, String) {
    (output::printable(kit.record.name().as_bytes()), kit.record.digest.short())
}

/// Where kits from this cache are mounted, as far as this user's mounts go.
fn mounted(cache: &Cache) -> Result<HashMap<Digest, Vec<PathBuf>>, Failure> {
    let state = match StateDir::from_env() {
        // Who has no place for records has no mounts.
        Err(MountError::NoStateDir) => return Ok(HashMap::new()),
        state => state?,
    };
    let same = |dir: &Path| dir == cache.root() || dir.canonicalize().ok() == cache.root().canonicalize().ok();
    let mut mounted: HashMap<Digest, Vec<PathBuf>> = HashMap::new();
    for mount in state.list()? {
        if mount.record.cache_dir.as_deref().is_none_or(same) {
            mounted.entry(mount.record.digest).or_default().push(mount.record.mount_point);
        }
    }
    Ok(mounted)
}

/// A moment as it is shown.
fn time(moment: SystemTime) -> String {
    let since = moment.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    output::timestamp(i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

/// What its file system has free.
fn free(cache: &Cache) -> Option<u64> {
    let found = rustix::fs::statvfs(cache.root()).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}
