//! The rules that an index keeps, checked where its bytes lie.
//!
//! All of them hold for every index that exists as a value, whether it was built here or read: [`super::Head`] keeps those of
//! [`layer`] and [`entries`], [`super::Index`] those of [`lists`] too. `docs/index-format.md` numbers them; the order here is
//! the order there. For n entries the checks allocate 4 n bytes, and at most 128 KiB for a stack of paths.

use std::cmp::Ordering;

use super::layout::*;
use super::{IndexError, LayerFacts, LayerFormat};
use crate::archive::inflate;
use crate::archive::listing::Contradiction;
use crate::archive::walker::{Caps, NO_ID};
use crate::digest::Digest;
use crate::modelkit::Compression;
use crate::object::{CHUNK_SIZE, ChunkList, chunk_count};
use crate::path::{MAX_NAME, MAX_PATH, TreePath, clean_depth};

/// The layer that the header describes. It may inflate to `max_inflated`, or to what [`inflate::max_inflated`] says.
pub(super) fn layer(header: &Header, max_inflated: Option<u64>) -> Result<LayerFacts, IndexError> {
    let wrong = |why| IndexError::Header { why };
    let format = match header.format {
        FORMAT_TAR => LayerFormat::Tar,
        FORMAT_RAW => LayerFormat::Raw,
        _ => return Err(wrong("unknown format: neither tar (0) nor raw (1)")),
    };
    let compression = match header.compression {
        COMPRESSION_NONE => Compression::None,
        COMPRESSION_GZIP => Compression::Gzip,
        COMPRESSION_ZSTD => Compression::Zstd,
        _ => return Err(wrong("unknown compression: neither none (0) nor gzip (1) nor zstd (2)")),
    };
    if header.unused != [0; 2] {
        return Err(wrong("unused bytes are not zero"));
    }
    if header.chunk_size != CHUNK_SIZE {
        return Err(wrong("the chunk size is not 1 MiB"));
    }
    let (size, inflated) = (header.size.get(), header.inflated.get());
    let digest = Digest::from_bytes(header.digest);
    let diff_id = Digest::from_bytes(header.diff_id);
    match compression {
        Compression::None if size != inflated || digest != diff_id => {
            let why = "it is not compressed, so size and digest must be the same uncompressed";
            return Err(IndexError::Layer { layer: digest, why });
        }
        Compression::None => {}
        Compression::Gzip | Compression::Zstd => {
            let bound = max_inflated.unwrap_or_else(|| inflate::max_inflated(size));
            if inflated > bound {
                return Err(IndexError::InflatesTooFar { layer: digest, inflated, bound });
            }
        }
    }
    Ok(LayerFacts { digest, size, diff_id, inflated, format, compression })
}

/// Checks the records and names of an index of `layer`.
pub(super) fn entries(sections: &Sections<'_>, layer: &LayerFacts) -> Result<(), IndexError> {
    let mut walk = Walk { layer, names: sections.names, last: None, above: Vec::new(), named: 0, listed: 0 };
    for (position, record) in sections.records.iter().enumerate() {
        let path =
            walk.path(record).map_err(|why| error(position, record.path(sections.names).unwrap_or_default(), why))?;
        walk.place(position, path, record)?;
        walk.facts(path, record).map_err(|why| error(position, path, why))?;
    }
    if walk.named != sections.names.len() {
        return Err(IndexError::Unused { what: "names" });
    }
    if walk.listed != u64::from(sections.header.chunks.get()) {
        return Err(IndexError::Unused { what: "chunk digests" });
    }
    if layer.format == LayerFormat::Raw {
        raw(sections.records, layer)?;
    }
    overlaps(sections)
}

/// Where a pass over the records is.
struct Walk<'a> {
    layer: &'a LayerFacts,
    names: &'a [u8],
    /// The path before.
    last: Option<&'a [u8]>,
    /// Paths that the last one begins with and that are no directories, each longer than the one before.
    above: Vec<&'a [u8]>,
    /// How many bytes of the names are taken.
    named: usize,
    /// How many digests of the chunk lists are taken.
    listed: u64,
}

impl<'a> Walk<'a> {
    /// The path of the next record, which must begin where the names before it end.
    fn path(&mut self, record: &Record) -> Result<&'a [u8], &'static str> {
        if record.path.get() as usize != self.named {
            return Err("its path does not begin where the names before it end");
        }
        let path = record.path(self.names).ok_or("its path is not within the names")?;
        if clean_depth(path)? > Caps::DEFAULT.depth {
            return Err("it lies more than 256 directories deep");
        }
        self.named += path.len();
        Ok(path)
    }

    /// Checks that the path follows the one before and lies below directories only.
    fn place(&mut self, position: usize, path: &'a [u8], record: &Record) -> Result<(), IndexError> {
        match self.last.map(|last| last.cmp(path)) {
            None | Some(Ordering::Less) => {}
            Some(Ordering::Equal) => return Err(Contradiction::Duplicate { path: owned(path) }.into()),
            Some(Ordering::Greater) => return Err(error(position, path, "entries are not sorted by path")),
        }
        self.last = Some(path);
        // In this order whatever begins with a path follows it at once, so the paths to look at form a stack. Only its top
        // can be a parent: what lay below a deeper one would have been refused before.
        while self.above.pop_if(|above| !path.starts_with(above)).is_some() {}
        if let Some(above) = self.above.last().filter(|above| path.get(above.len()) == Some(&b'/')) {
            return Err(Contradiction::BelowFile { path: owned(above), below: owned(path) }.into());
        }
        if record.type_bits() != TYPE_DIRECTORY {
            self.above.push(path);
        }
        Ok(())
    }

    fn facts(&mut self, path: &[u8], record: &Record) -> Result<(), &'static str> {
        if ![TYPE_FILE, TYPE_DIRECTORY, TYPE_SYMLINK].contains(&record.type_bits()) {
            return Err("it is neither a file nor a directory nor a symbolic link");
        }
        let raw = self.layer.format == LayerFormat::Raw;
        if path.is_empty() && record.type_bits() != TYPE_DIRECTORY && !raw {
            return Err("the root must be a directory");
        }
        if [record.uid, record.gid].iter().any(|id| *id == NO_ID) {
            return Err("its owner or group is the number that stands for none");
        }
        let (size, offset) = (record.size.get(), record.offset.get());
        let content = if record.type_bits() == TYPE_FILE { size } else { 0 };
        if offset.checked_add(content).is_none_or(|end| end > self.layer.inflated) {
            return Err("it reaches beyond the end of the layer");
        }
        let (place, list) = if record.has_list() { (self.listed, chunk_count(size)) } else { (0, 0) };
        if u64::from(record.chunks.get()) != place {
            return Err("its chunk list does not begin where the lists before it end");
        }
        self.listed += list;
        if (record.type_bits() != TYPE_FILE || size == 0) && record.digest != [0; 32] {
            return Err("it has a digest, but no content");
        }
        if record.type_bits() == TYPE_DIRECTORY && size > 0 {
            return Err("a directory has no size");
        }
        if record.type_bits() == TYPE_SYMLINK {
            let target = record.target(self.names).ok_or("the link's target is not within the names")?;
            if target.is_empty() || target.len() > MAX_PATH || target.contains(&0) {
                return Err("the link's target is empty, longer than 4,095 bytes or contains a NUL byte");
            }
            self.named += target.len();
        }
        Ok(())
    }
}

/// A raw layer is one file, of which the layer says nothing but the bytes.
fn raw(records: &[Record], layer: &LayerFacts) -> Result<(), IndexError> {
    let wrong = |why| Err(IndexError::Layer { layer: layer.digest, why });
    let [file] = records else {
        return wrong("it is raw, so there is exactly one entry");
    };
    if file.type_bits() != TYPE_FILE || file.path_len != 0 || file.offset != 0 || file.size != layer.inflated {
        return wrong("it is raw, so its entry is the file at the root and takes the whole layer");
    }
    if file.mode.get() & !TYPE_BITS != RAW_MODE || file.uid != 0 || file.gid != 0 || file.mtime != 0 {
        return wrong("it is raw, so its file has mode 0644, owner and group 0 and time 0");
    }
    Ok(())
}

/// No two contents may share bytes of the layer.
fn overlaps(sections: &Sections<'_>) -> Result<(), IndexError> {
    let Sections { records, names, .. } = sections;
    let has_content = |record: &Record| record.type_bits() == TYPE_FILE && record.size > 0;
    let mut contents = Vec::with_capacity(records.iter().filter(|record| has_content(record)).count());
    contents.extend((0_u32..).zip(*records).filter(|(_, record)| has_content(record)).map(|(at, _)| at));
    let record = |at: u32| &records[at as usize];
    contents.sort_unstable_by_key(|at| record(*at).offset.get());
    for pair in contents.windows(2) {
        let (first, second) = (record(pair[0]), record(pair[1]));
        if first.offset.get() + first.size.get() > second.offset.get() {
            let path = |record: &Record| owned(record.path(names).unwrap_or_default());
            return Err(Contradiction::Overlap { first: path(first), second: path(second) }.into());
        }
    }
    Ok(())
}

/// Checks each chunk list against its object digest.
pub(super) fn lists(sections: &Sections<'_>) -> Result<(), IndexError> {
    let mut rest = sections.lists;
    for (position, record) in sections.records.iter().enumerate().filter(|(_, record)| record.has_list()) {
        // Their sum fits the section: that was checked before.
        let len = rest.len().min(chunk_count(record.size.get()) as usize * DIGEST_LEN);
        let (list, later) = rest.split_at(len);
        rest = later;
        list_of(record, list).map_err(|why| error(position, record.path(sections.names).unwrap_or_default(), why))?;
    }
    Ok(())
}

/// Checks one file's chunk list.
pub(super) fn list_of<L: AsRef<[u8]>>(record: &Record, list: L) -> Result<ChunkList<L>, &'static str> {
    let list = ChunkList::new(record.size.get(), list).ok_or("its chunk list does not fit its size")?;
    if *list.object().as_bytes() != record.digest {
        return Err("its object digest does not follow from its chunk list");
    }
    Ok(list)
}

fn error(position: usize, path: &[u8], why: &'static str) -> IndexError {
    // What is wrong may be that it is long.
    let path = String::from_utf8_lossy(&path[..path.len().min(MAX_NAME)]).into_owned();
    IndexError::Entry { position, path, why }
}

/// A path that was found to be clean.
fn owned(path: &[u8]) -> TreePath {
    TreePath::from_clean(path).unwrap_or_default()
}
