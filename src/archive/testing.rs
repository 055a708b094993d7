//! Tars for tests, good and hostile, and both ways to walk them.

use super::chunk::{Chunker, Content};
use super::index::{Index, IndexEntry, IndexError, LayerFacts, LayerFormat};
use super::stream::{Event, StreamWalker};
use super::walker::{Caps, Step, TarError, Walker, Warning};
use super::{Entry, EntryKind};
use crate::digest::Digest;
use crate::modelkit::Compression;

/// A tar that is put together header by header, because no builder writes the wrong ones.
#[derive(Default, Clone)]
pub struct Tar(pub Vec<u8>);

impl Tar {
    pub fn new() -> Self {
        Self::default()
    }

    /// A header of mode 0644 whose fields `change` may spoil; the checksum is right.
    pub fn header(mut self, name: &[u8], typeflag: u8, size: u64, change: impl FnOnce(&mut tar::Header)) -> Self {
        let mut header = tar::Header::new_ustar();
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.as_old_mut().linkflag = [typeflag];
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(size);
        change(&mut header);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self
    }

    /// Content or records, padded to whole blocks.
    pub fn data(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn entry(self, name: &[u8], typeflag: u8, content: &[u8]) -> Self {
        self.header(name, typeflag, content.len() as u64, |_| {}).data(content)
    }

    pub fn file(self, name: &str, content: &[u8]) -> Self {
        self.entry(name.as_bytes(), b'0', content)
    }

    pub fn dir(self, name: &str) -> Self {
        self.entry(name.as_bytes(), b'5', b"")
    }

    pub fn symlink(self, name: &str, target: &[u8]) -> Self {
        self.header(name.as_bytes(), b'2', 0, |header| {
            header.as_old_mut().linkname[..target.len()].copy_from_slice(target);
        })
    }

    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let records: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
        self.entry(b"PaxHeaders.0/x", b'x', &records)
    }

    pub fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 1024]);
        self.0
    }
}

/// One PAX record, which states its own length.
pub fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let length = (1..20).map(|digits| rest + digits).find(|length| length.to_string().len() + rest == *length);
    let mut record = format!("{} {key}=", length.expect("some length fits")).into_bytes();
    record.extend_from_slice(value);
    record.push(b'\n');
    record
}

/// What a walk found.
pub type Walk = Result<(Vec<Entry>, Option<Warning>), TarError>;

/// Hops over a layer in windows of at least `window` bytes.
pub fn hop(layer: &[u8], window: u64) -> Walk {
    let size = layer.len() as u64;
    hop_with(size, Caps::default(), |offset, len| {
        let end = size.min(offset + len.max(window));
        layer[offset as usize..end as usize].to_vec()
    })
}

/// Hops over a layer that `read` makes up. Fails the test if the walker asks for the same twice or for too much.
pub fn hop_with(size: u64, caps: Caps, mut read: impl FnMut(u64, u64) -> Vec<u8>) -> Walk {
    let extension = caps.extension;
    let mut walker = Walker::new(Some(size), caps);
    let (mut entries, mut start, mut bytes) = (Vec::new(), 0, Vec::new());
    let mut asked = None;
    loop {
        match walker.step(start, &bytes)? {
            Step::Need { offset, len } => {
                assert!(asked < Some((offset, len)), "asks for {len} bytes at {offset} after {asked:?}");
                assert!(len <= extension.max(512) && offset + len <= size, "asks for {len} bytes at {offset}");
                asked = Some((offset, len));
                (start, bytes) = (offset, read(offset, len));
            }
            Step::Entry(entry) => {
                assert!(entry.offset + entry.size <= size, "{entry:?}");
                entries.push(entry);
            }
            Step::End { warning, .. } => return Ok((entries, warning)),
        }
    }
}

/// An entry and its content.
pub type Streamed = (Entry, Vec<u8>);

/// Streams a layer in pieces that end at `cuts`, and checks that events come in their order.
pub fn stream(layer: &[u8], size: Option<u64>, cuts: &[usize]) -> Result<(Vec<Streamed>, Option<Warning>), TarError> {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| (*cut).min(layer.len())).collect();
    cuts.push(layer.len());
    cuts.sort_unstable();
    let mut walker = StreamWalker::new(size, Caps::default());
    let mut entries: Vec<Streamed> = Vec::new();
    let (mut open, mut from) = (false, 0);
    for cut in cuts {
        let mut rest = &layer[from..cut];
        while let Some(event) = walker.next(&mut rest)? {
            match event {
                Event::Entry(entry) => {
                    assert!(!open, "an entry within another");
                    open = entry.kind == EntryKind::File;
                    entries.push((entry, Vec::new()));
                }
                Event::Content(bytes) => {
                    assert!(open && !bytes.is_empty(), "content of nothing, or none");
                    entries.last_mut().expect("an entry").1.extend_from_slice(bytes);
                }
                Event::EntryEnd => {
                    let (entry, content) = entries.last().expect("an entry");
                    assert!(open && content.len() as u64 == entry.size, "ends too early");
                    open = false;
                }
            }
        }
        assert!(rest.is_empty(), "input left over");
        from = cut;
    }
    let warning = walker.finish()?;
    assert!(!open, "a file has no end");
    Ok((entries, warning))
}

/// The entries of a stream without their contents.
pub fn headers(streamed: &[Streamed]) -> Vec<Entry> {
    streamed.iter().map(|(entry, _)| entry.clone()).collect()
}

/// The index of an uncompressed tar.
pub fn index_of(layer: &[u8]) -> Result<Index, IndexError> {
    let (streamed, _) = stream(layer, None, &[]).expect("a sound tar");
    let size = layer.len() as u64;
    let digest = Digest::of(layer);
    let (format, compression) = (LayerFormat::Tar, Compression::None);
    let facts = LayerFacts { digest, size, diff_id: digest, inflated: size, format, compression };
    let row = |(entry, content): Streamed| {
        let content = (entry.kind == EntryKind::File).then(|| content_of(&content));
        IndexEntry { entry, content }
    };
    Index::build(facts, streamed.into_iter().map(row).collect())
}

/// The digests of one file's bytes.
pub fn content_of(bytes: &[u8]) -> Content {
    let mut chunker = Chunker::new();
    chunker.update(bytes);
    chunker.finish()
}
