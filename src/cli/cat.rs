//! `kitfs cat`: a file of a kit, without a mount.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::str::FromStr;
use std::sync::Arc;

use clap::Args;

use super::kits::{self, KitArgs};
use super::options::{LookVerifyArgs, ProgressArgs};
use super::output::{self, Output};
use super::progress::Progress;
use super::{Failure, walk};
use crate::archive::{Entry, EntryKind};
use crate::fetch::chunks::Piece;
use crate::fetch::{Context, Kit, LayerFetch, Tier, Verify};
use crate::fs::{Fs, FsError, NodeKind, ReadReply};
use crate::path::TreePath;
use crate::reference::Reference;
use crate::tree::Tree;
use crate::units;

/// Read at once: the unit of verification.
const PIECE: u64 = 1 << 20;
/// Asked for at once where nothing is verified: where registries are fastest.
const RANGE: u64 = 8 << 20;

/// Writes a file of a kit to standard output
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs cat [OPTIONS] <REF> <PATH>",
    after_help = "\
Without an index of its layer, a file's first byte needs the whole layer, unless that is cached: only
then has the layer's digest held. With one, the MiB that are printed are fetched and verified, unless
the layer is compressed.

Examples:
  kitfs cat ghcr.io/team/llama:8b README.md
  kitfs cat llama:8b weights.gguf --bytes 0-4                   the first four bytes
  kitfs cat --verify=none llama:8b weights.gguf --bytes 1GiB-   without fetching the layer, UNVERIFIED"
)]
pub(super) struct Cat {
    /// The kit
    #[arg(value_name = "REF")]
    reference: Reference,
    /// The file
    #[arg(value_name = "PATH", value_parser = walk::parse_path)]
    path: TreePath,
    /// Only the bytes from offset A up to, but not including, offset B; to the end without B
    #[arg(long, value_name = "A-[B]")]
    bytes: Option<ByteRange>,
    #[command(flatten)]
    kit: KitArgs,
    #[command(flatten)]
    verify: LookVerifyArgs,
    #[command(flatten)]
    progress: ProgressArgs,
}

/// Offsets `start..end`; without an end to the end of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ByteRange {
    start: u64,
    end: Option<u64>,
}

impl Cat {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let (context, kit) = self.kit.open(&self.reference, self.verify.verify()).await?;
        let progress = Progress::of(&kit.layers, self.progress.mode());
        let mut tree = kit.skeleton();
        let mut out = Output::new();
        if self.verify.is_none()
            && let Some((layer, entry)) = self.unverified_row(&kit, &mut tree).await?
        {
            drop(progress);
            self.write_unverified(&layer, &entry, &mut out).await?;
        } else {
            self.write(kit, context, tree, progress, &mut out).await?;
        }
        out.finish()
    }

    /// Writes verified bytes, or with `--verify=stream` what arrives.
    async fn write(
        &self,
        kit: Kit,
        context: Context,
        tree: Tree,
        progress: Progress,
        out: &mut Output,
    ) -> Result<(), Failure> {
        let streams = context.verify == Verify::Stream;
        let fs = kits::look(kit, context, tree);
        let failed = |error: FsError| walk::at(&self.path, error);
        let (_, attr) = walk::find(&fs, &self.path, true).await?;
        if attr.kind == NodeKind::Directory {
            return Err(failed(FsError::IsDirectory));
        }
        let (mut offset, end) = self.range(attr.size)?;
        // The bars must not run into the content.
        let mut progress = Some(progress);
        while offset < end {
            let len = PIECE.min(end - offset);
            let content = fs.read(attr.ino, 0, offset, len as usize).await.map_err(failed)?;
            drop(progress.take());
            match content {
                ReadReply::End => break,
                ReadReply::Pieces(pieces) => {
                    for piece in pieces {
                        match piece {
                            Piece::Memory(bytes) => out.bytes(bytes.bytes())?,
                            Piece::File(range) => copy(out, range.file(), range.offset(), range.len() as usize)?,
                        }
                    }
                }
                ReadReply::Staged { file, offset, len } => copy(out, &file, offset, len)?,
            }
            offset += len;
        }
        if streams
            && let Some(layer) = layer_of(&fs, attr.ino).await
            && layer.known().is_none()
        {
            // Only now it is known whether what was written is true.
            layer.fill().await?;
        }
        Ok(())
    }

    /// Where the file lies by its layer's headers. `None` where it can be had verified at no cost.
    async fn unverified_row(&self, kit: &Kit, tree: &mut Tree) -> Result<Option<(Arc<LayerFetch>, Entry)>, Failure> {
        let listings = kits::list_unverified(kit, tree, &self.path).await?;
        let row = listings.iter().find_map(|(at, listing)| {
            let entry = listing.entry(listing.find(&self.path)?)?;
            Some((kit.layers[*at].clone(), entry.to_entry()))
        });
        Ok(row.filter(|(layer, entry)| layer.tier() == Tier::Provisional && entry.kind == EntryKind::File))
    }

    async fn write_unverified(&self, layer: &LayerFetch, entry: &Entry, out: &mut Output) -> Result<(), Failure> {
        kits::say_unverified("bytes");
        let (mut offset, end) = self.range(entry.size)?;
        while offset < end {
            let next = end.min(offset + RANGE);
            for piece in layer.unverified_range(entry.offset + offset..entry.offset + next).await? {
                out.bytes(piece.peek())?;
            }
            offset = next;
        }
        Ok(())
    }

    /// The offsets to write of a file of `size` bytes.
    fn range(&self, size: u64) -> Result<(u64, u64), Failure> {
        let Some(ByteRange { start, end }) = self.bytes else { return Ok((0, size)) };
        if start > size {
            let path = output::printable(self.path.as_bytes());
            return Err(Failure::failed(format!("{path} has {size} bytes; --bytes begins at {start}")));
        }
        Ok((start, end.unwrap_or(size).min(size)))
    }
}

async fn layer_of(fs: &Fs, ino: crate::fs::Ino) -> Option<Arc<LayerFetch>> {
    let digest = fs.getxattr(ino, b"user.kitfs.layer").await.ok()?;
    fs.kit().layers.iter().find(|layer| layer.layer.digest.to_string().into_bytes() == digest).cloned()
}

impl FromStr for ByteRange {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || "expected A-B or A-, offsets such as 0-512 or 1MiB-2MiB, B not included".to_owned();
        let (start, end) = text.split_once('-').ok_or_else(expected)?;
        let offset = |text: &str| units::parse_size(text).map_err(|_| expected());
        let range = Self { start: offset(start)?, end: if end.is_empty() { None } else { Some(offset(end)?) } };
        if range.end.is_some_and(|end| end < range.start) {
            return Err("B lies before A".to_owned());
        }
        Ok(range)
    }
}

/// Writes a piece of a local file. This thread has nothing else to do, so it may wait for the disk.
fn copy(out: &mut Output, file: &File, offset: u64, len: usize) -> Result<(), Failure> {
    let mut buffer = vec![0; len];
    file.read_exact_at(&mut buffer, offset)?;
    out.bytes(&buffer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_half_open_and_may_lack_their_end() {
        let parse = |text: &str| text.parse::<ByteRange>();
        assert_eq!(parse("0-4"), Ok(ByteRange { start: 0, end: Some(4) }));
        assert_eq!(parse("1MiB-"), Ok(ByteRange { start: 1 << 20, end: None }));
        assert_eq!(parse("5-5"), Ok(ByteRange { start: 5, end: Some(5) }));
        for text in ["", "-", "-4", "4", "4-2", "a-b", "1-2-3"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
