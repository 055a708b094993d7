//! Entries → the bytes of an index.
//!
//! What is written here is checked as anything that is read ([`super::check`]); refused here is only what has no encoding.

use zerocopy::IntoBytes as _;

use super::layout::*;
use super::{IndexEntry, IndexError, LayerFacts, LayerFormat, MAX_CHUNKS, MAX_ENTRIES, MAX_NAMES};
use crate::archive::EntryKind;
use crate::archive::chunk::Content;
use crate::digest::Digest;
use crate::modelkit::Compression;
use crate::object::{CHUNK_SIZE, ObjectDigest, chunk_count};

/// The index of `layer` that has these entries, sorted already.
pub(super) fn encode(layer: &LayerFacts, rows: &[IndexEntry]) -> Result<Vec<u8>, IndexError> {
    for (position, row) in rows.iter().enumerate() {
        check(row).map_err(|why| IndexError::Entry { position, path: row.entry.path.to_string(), why })?;
    }
    let sum = |part: fn(&IndexEntry) -> usize| rows.iter().map(|row| part(row) as u64).sum();
    let entries = capped("entries", rows.len() as u64, MAX_ENTRIES)? as u32;
    let names =
        capped("bytes of names", sum(|row| row.entry.path.as_bytes().len() + target(row).len()), MAX_NAMES)? as u32;
    let chunks = capped("chunk digests", sum(|row| list(row).len()), MAX_CHUNKS)? as u32;

    let header = header(layer, entries, names, chunks);
    let lengths = [HEADER_LEN, rows.len() * RECORD_LEN, names as usize, chunks as usize * DIGEST_LEN];
    let mut bytes = Vec::with_capacity(lengths.iter().sum());
    bytes.extend_from_slice(header.as_bytes());
    let (mut path, mut chunks) = (0, 0);
    for row in rows {
        bytes.extend_from_slice(record(row, path, chunks).as_bytes());
        path += (row.entry.path.as_bytes().len() + target(row).len()) as u32;
        chunks += list(row).len() as u32;
    }
    for row in rows {
        bytes.extend_from_slice(row.entry.path.as_bytes());
        bytes.extend_from_slice(target(row));
    }
    for digest in rows.iter().flat_map(list) {
        bytes.extend_from_slice(digest.as_bytes());
    }
    Ok(bytes)
}

/// Refuses what the encoding would lose.
fn check(row: &IndexEntry) -> Result<(), &'static str> {
    let IndexEntry { entry, content } = row;
    if entry.mode & !0o7777 != 0 {
        return Err("the mode has more than permission bits");
    }
    match (&entry.kind, content) {
        (EntryKind::File, Some(content)) => {
            let Content { size, chunks, object } = content;
            if *size != entry.size || chunks.len() as u64 != chunk_count(entry.size) {
                return Err("the chunk digests don't fit the size");
            }
            if *object != ObjectDigest::new(*size, chunks) {
                return Err("its object digest does not follow from its chunk list");
            }
            Ok(())
        }
        (EntryKind::File, None) => Err("a file lacks its content's digests"),
        (EntryKind::Directory | EntryKind::Symlink(_), Some(_)) => Err("only files have content"),
        (EntryKind::Directory | EntryKind::Symlink(_), None) if entry.size > 0 => Err("only files have a size"),
        (EntryKind::Directory | EntryKind::Symlink(_), None) => Ok(()),
    }
}

fn header(layer: &LayerFacts, entries: u32, names: u32, chunks: u32) -> Header {
    Header {
        magic: MAGIC,
        version: VERSION.into(),
        format: match layer.format {
            LayerFormat::Tar => FORMAT_TAR,
            LayerFormat::Raw => FORMAT_RAW,
        },
        compression: match layer.compression {
            Compression::None => COMPRESSION_NONE,
            Compression::Gzip => COMPRESSION_GZIP,
            Compression::Zstd => COMPRESSION_ZSTD,
        },
        unused: [0; 2],
        chunk_size: CHUNK_SIZE.into(),
        entries: entries.into(),
        names: names.into(),
        chunks: chunks.into(),
        size: layer.size.into(),
        inflated: layer.inflated.into(),
        digest: *layer.digest.as_bytes(),
        diff_id: *layer.diff_id.as_bytes(),
    }
}

/// The record of an entry whose path and chunk list begin there.
fn record(row: &IndexEntry, path: u32, chunks: u32) -> Record {
    let IndexEntry { entry, content } = row;
    let digest = content.as_ref().map_or([0; 32], |content| match &content.chunks[..] {
        [] => [0; 32],
        [chunk] => *chunk.as_bytes(),
        _ => *content.object.as_bytes(),
    });
    let (kind, size) = match &entry.kind {
        EntryKind::File => (TYPE_FILE, entry.size),
        EntryKind::Directory => (TYPE_DIRECTORY, 0),
        EntryKind::Symlink(target) => (TYPE_SYMLINK, target.len() as u64),
    };
    Record {
        digest,
        size: size.into(),
        offset: entry.offset.into(),
        mtime: entry.mtime.into(),
        uid: entry.uid.into(),
        gid: entry.gid.into(),
        chunks: if list(row).is_empty() { 0 } else { chunks }.into(),
        path: path.into(),
        // A path has at most 4,095 bytes, and a mode twelve bits.
        path_len: (entry.path.as_bytes().len() as u16).into(),
        mode: (kind | entry.mode as u16).into(),
    }
}

fn target(row: &IndexEntry) -> &[u8] {
    match &row.entry.kind {
        EntryKind::Symlink(target) => target,
        EntryKind::File | EntryKind::Directory => &[],
    }
}

/// The digests that stand in the chunk lists: none for a file whose only digest stands in its record.
fn list(row: &IndexEntry) -> &[Digest] {
    let chunks = row.content.as_ref().map_or(&[][..], |content| &content.chunks);
    if chunks.len() > 1 { chunks } else { &[] }
}
