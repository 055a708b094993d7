//! Layers and kits on a [`Site`]: a tar is written, hashed and indexed in one pass, as it may be of many gigabytes.

use std::fs::File;
use std::io::{BufWriter, Seek as _, SeekFrom, Write as _};

use kitfs::archive::chunk::{Chunker, Content};
use kitfs::archive::index::annotations::Pin;
use kitfs::archive::index::{Index, IndexEntry, LayerFacts, LayerFormat};
use kitfs::archive::{Entry, EntryKind};
use kitfs::digest::{Digest, StreamHasher};
use kitfs::modelkit::Compression;
use kitfs::object::{CHUNK_SIZE, ObjectDigest};
use kitfs::path::TreePath;
use serde_json::{Value, json};

use crate::site::Site;
use crate::support::kit::{header, pattern_at};

/// What is made, hashed and written at once: a chunk.
const PIECE: usize = CHUNK_SIZE as usize;
/// The block of a tar.
const BLOCK: u64 = 512;
/// The blocks of zeros that end it.
const END: u64 = 2 * BLOCK;

/// A layer that a site serves.
#[derive(Clone)]
pub struct Layer {
    pub digest: Digest,
    pub size: u64,
    /// Where the kit says that it belongs.
    path: String,
    pin: Pin,
}

/// A tar layer in the making. Directories are for who makes it to add; each file's bytes differ from all others'.
pub struct LayerMaker<'a> {
    site: &'a Site,
    path: String,
    file: BufWriter<tempfile::NamedTempFile>,
    blob: StreamHasher,
    size: u64,
    rows: Vec<IndexEntry>,
    /// Of the next file's bytes.
    seed: u64,
}

impl<'a> LayerMaker<'a> {
    /// A layer for `path`, with the directory of that name in it.
    pub fn new(site: &'a Site, path: &str) -> Self {
        let file = BufWriter::with_capacity(PIECE, site.new_file());
        let seed = path.bytes().fold(1, |seed, byte| seed * 31 % 65_521 + u64::from(byte));
        let mut layer =
            Self { site, path: path.to_owned(), file, blob: StreamHasher::new(), size: 0, rows: Vec::new(), seed };
        layer.dir(path);
        layer
    }

    /// Adds a directory.
    pub fn dir(&mut self, path: &str) {
        self.header(path, b'5', 0o755, 0);
        self.rows.push(IndexEntry { entry: entry(path, EntryKind::Directory, 0o755, 0, self.size), content: None });
    }

    /// Adds a file of bytes that look random.
    pub fn file(&mut self, path: &str, size: u64) {
        self.header(path, b'0', 0o644, size);
        let (offset, seed) = (self.size, self.seed);
        self.seed += 1;
        let mut chunker = Chunker::new();
        let mut buffer = vec![0; PIECE];
        let mut at = 0;
        while at < size {
            let piece = &mut buffer[..PIECE.min((size - at) as usize)];
            pattern_at(seed, at, piece);
            chunker.update(piece);
            self.put(piece);
            at += piece.len() as u64;
        }
        self.pad();
        self.rows.push(IndexEntry {
            entry: entry(path, EntryKind::File, 0o644, size, offset),
            content: Some(chunker.finish()),
        });
    }

    /// Adds a file of zeros that takes no disk. All its whole chunks have one digest, so only the layer's takes time.
    pub fn hole(&mut self, path: &str, size: u64) {
        assert!(size.is_multiple_of(u64::from(CHUNK_SIZE)), "whole chunks");
        self.header(path, b'0', 0o644, size);
        let offset = self.size;
        let zeros = vec![0; PIECE];
        for _ in 0..size / PIECE as u64 {
            self.blob.update(&zeros);
        }
        self.size += size;
        self.file.flush().expect("written");
        self.file.get_ref().as_file().set_len(self.size).expect("sparse");
        self.file.get_mut().as_file_mut().seek(SeekFrom::Start(self.size)).expect("seeks");
        let chunks = vec![Digest::of(&zeros); (size / PIECE as u64) as usize];
        let object = ObjectDigest::new(size, &chunks);
        let content = Some(Content { size, chunks, object });
        self.rows.push(IndexEntry { entry: entry(path, EntryKind::File, 0o644, size, offset), content });
    }

    /// Ends it, and gives the site the layer and its index.
    pub fn finish(mut self) -> Layer {
        self.put(&[0; END as usize]);
        let digest = self.blob.digest();
        let file = self.file.into_inner().expect("written");
        file.persist(self.site.blob(&digest)).expect("the layer gets its name");
        publish(self.site, self.path, facts(digest, self.size), self.rows)
    }

    fn header(&mut self, path: &str, kind: u8, mode: u32, size: u64) {
        self.put(&header(path, kind, mode, size));
    }

    fn pad(&mut self) {
        let len = (self.size.next_multiple_of(BLOCK) - self.size) as usize;
        self.put(&[0; BLOCK as usize][..len]);
    }

    fn put(&mut self, bytes: &[u8]) {
        self.blob.update(bytes);
        self.file.write_all(bytes).expect("written");
        self.size += bytes.len() as u64;
    }
}

/// A layer of `files` small files in directories of a thousand, of which there is an index and no bytes: for who looks at
/// names only. Its digest is made up; a read of a file would fail.
pub fn names_only(site: &Site, path: &str, files: u64) -> Layer {
    const SIZE: u64 = 100;
    let content = {
        let mut chunker = Chunker::new();
        chunker.update(&[7; SIZE as usize]);
        chunker.finish()
    };
    let mut rows = vec![IndexEntry { entry: entry(path, EntryKind::Directory, 0o755, 0, BLOCK), content: None }];
    let mut at = BLOCK;
    for number in 0..files {
        let dir = format!("{path}/{:04}", number / 1000);
        if number % 1000 == 0 {
            at += BLOCK;
            rows.push(IndexEntry { entry: entry(&dir, EntryKind::Directory, 0o755, 0, at), content: None });
        }
        at += BLOCK;
        let file = entry(&format!("{dir}/file-{number:07}.txt"), EntryKind::File, 0o644, SIZE, at);
        rows.push(IndexEntry { entry: file, content: Some(content.clone()) });
        at += BLOCK;
    }
    let digest = Digest::of(format!("{files} names").as_bytes());
    let size = at + END;
    File::create(site.blob(&digest)).and_then(|file| file.set_len(size)).expect("a sparse file");
    publish(site, path.to_owned(), facts(digest, size), rows)
}

/// Puts a kit of these layers on the site under a tag; its manifest pins their indexes, or names none.
pub fn kit(site: &Site, tag: &str, layers: &[Layer], indexed: bool) {
    let datasets: Vec<Value> =
        layers.iter().map(|layer| json!({"path": layer.path, "digest": layer.digest.to_string()})).collect();
    let config = json!({"manifestVersion": "1.0.0", "package": {"name": "bench"}, "datasets": datasets}).to_string();
    let descriptors = layers.iter().map(|layer| {
        let mut descriptor = json!({
            "mediaType": "application/vnd.kitops.modelkit.dataset.v1.tar",
            "digest": layer.digest.to_string(),
            "size": layer.size,
        });
        if indexed {
            descriptor["annotations"] =
                layer.pin.annotations().into_iter().map(|(key, value)| (key.to_owned(), Value::from(value))).collect();
        }
        descriptor
    });
    let manifest = json!({
        "schemaVersion": 2,
        "config": {
            "mediaType": "application/vnd.kitops.modelkit.config.v1+json",
            "digest": site.add_blob(config.as_bytes()).to_string(),
            "size": config.len(),
        },
        "layers": descriptors.collect::<Vec<_>>(),
    });
    site.add_manifest(tag, manifest.to_string().as_bytes());
}

fn publish(site: &Site, path: String, facts: LayerFacts, rows: Vec<IndexEntry>) -> Layer {
    let (digest, size) = (facts.digest, facts.size);
    let index = Index::build(facts, rows).expect("a sound layer");
    site.add_blob(index.as_bytes());
    Layer { digest, size, path, pin: index.pin() }
}

/// The facts of a tar without compression.
fn facts(digest: Digest, size: u64) -> LayerFacts {
    let (format, compression) = (LayerFormat::Tar, Compression::None);
    LayerFacts { digest, size, diff_id: digest, inflated: size, format, compression }
}

/// An entry with the owner and time that [`header`] writes.
fn entry(path: &str, kind: EntryKind, mode: u32, size: u64, offset: u64) -> Entry {
    let path = TreePath::clean(path.as_bytes()).expect("a valid path");
    Entry { path, kind, mode, uid: 1000, gid: 0, mtime: 0, size, offset }
}
