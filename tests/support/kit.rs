//! Makes ModelKits for tests: tars, configs and manifests as `kit` writes them, and hostile ones.

use std::io::Write as _;

use kitfs::archive::index::annotations::Pin;
use kitfs::digest::Digest;
use serde_json::{Map, Value, json};

use super::index::{attest, index_of};
use super::{Content, FaultServer};

/// A kit in the making.
pub struct KitBuilder {
    config: Map<String, Value>,
    layers: Vec<(String, String, Digest, Blob)>,
    indexed: Option<Indexed>,
}

/// Where the indexes of a kit are named.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Indexed {
    /// In its manifest.
    Pinned,
    /// In a referrer.
    Attested,
}

/// What the server gets for a layer.
enum Blob {
    Bytes(Vec<u8>),
    Content(Content),
}

/// A kit that a server serves.
pub struct Served {
    /// The manifest's digest.
    pub digest: Digest,
    /// The layers' digests, in order.
    pub layers: Vec<Digest>,
    /// What to mount.
    pub reference: String,
    /// What names the indexes of the layers, in order; empty where the kit was served without.
    pub indexes: Vec<Pin>,
    /// The referrer that names them, for [`KitBuilder::attested`].
    pub referrer: Option<Digest>,
}

impl KitBuilder {
    /// A kit without layers.
    pub fn new() -> Self {
        let mut config = Map::new();
        config.insert("manifestVersion".to_owned(), json!("1.0.0"));
        config.insert("package".to_owned(), json!({"name": "made-for-tests"}));
        Self { config, layers: Vec::new(), indexed: None }
    }

    /// Serves indexes of the layers, which the manifest pins.
    pub fn indexed(self) -> Self {
        Self { indexed: Some(Indexed::Pinned), ..self }
    }

    /// Serves indexes of the layers, which a referrer names; the manifest is as it would be without.
    pub fn attested(self) -> Self {
        Self { indexed: Some(Indexed::Attested), ..self }
    }

    /// A tar layer for `path`: `kind` is `model`, `code`, `datasets` or `docs`.
    pub fn tar(self, kind: &str, path: &str, tar: Vec<u8>) -> Self {
        self.layer(kind, path, "tar", tar)
    }

    /// A layer with a media type suffix of its own.
    pub fn layer(mut self, kind: &str, path: &str, suffix: &str, blob: Vec<u8>) -> Self {
        let digest = Digest::of(&blob);
        self.describe(kind, path, digest);
        self.layers.push((media_type(kind, suffix), path.to_owned(), digest, Blob::Bytes(blob)));
        self
    }

    /// A layer whose bytes are computed while they are served.
    pub fn content(mut self, kind: &str, path: &str, content: Content) -> Self {
        let mut hasher = kitfs::digest::StreamHasher::new();
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        while at < content.len() {
            let len = buffer.len().min((content.len() - at) as usize);
            content.read_at(at, &mut buffer[..len]);
            hasher.update(&buffer[..len]);
            at += len as u64;
        }
        let digest = hasher.digest();
        self.describe(kind, path, digest);
        self.layers.push((media_type(kind, "tar"), path.to_owned(), digest, Blob::Content(content)));
        self
    }

    /// Names a layer in the config, whether the manifest has it or not.
    pub fn describe(&mut self, kind: &str, path: &str, digest: Digest) {
        let mut entry = json!({"path": path, "digest": digest.to_string()});
        if kind == "model" {
            entry["name"] = json!("m");
            self.config.insert("model".to_owned(), entry);
            return;
        }
        if let Some(Value::Array(list)) = Some(self.config.entry(kind).or_insert_with(|| json!([]))) {
            list.push(entry);
        }
    }

    /// Builds on another kit, by reference.
    pub fn parent(mut self, reference: &str) -> Self {
        self.config.insert("model".to_owned(), json!({"name": "child", "path": reference}));
        self
    }

    /// Puts it on a server under a tag.
    pub fn serve(self, server: &FaultServer, tag: &str) -> Served {
        let config = Value::Object(self.config).to_string().into_bytes();
        let config_digest = server.add_blob(config.clone());
        let mut descriptors = Vec::new();
        let mut layers = Vec::new();
        let mut pins = Vec::new();
        for (media_type, path, digest, blob) in self.layers {
            let content = match blob {
                Blob::Bytes(bytes) => Content::Bytes(bytes),
                Blob::Content(content) => content,
            };
            let mut annotations = Map::new();
            if media_type.contains(".raw") {
                annotations.insert("org.cncf.model.filepath".to_owned(), path.into());
            }
            if let Some(indexed) = self.indexed {
                let (_, suffix) = media_type.split_once(".v1.").expect("a layer's media type");
                let index = index_of(&content, suffix);
                server.add_blob(index.as_bytes());
                let pin = index.pin();
                if indexed == Indexed::Pinned {
                    annotations.extend(pin.annotations().map(|(key, value)| (key.to_owned(), value.into())));
                }
                pins.push((digest, pin));
            }
            let size = content.len();
            server.add_content(digest, content);
            let mut descriptor = json!({"mediaType": media_type, "digest": digest.to_string(), "size": size});
            if !annotations.is_empty() {
                descriptor["annotations"] = Value::Object(annotations);
            }
            descriptors.push(descriptor);
            layers.push(digest);
        }
        let manifest = json!({
            "schemaVersion": 2,
            "config": {
                "mediaType": "application/vnd.kitops.modelkit.config.v1+json",
                "digest": config_digest.to_string(),
                "size": config.len(),
            },
            "layers": descriptors,
        });
        let digest = server.add_manifest(tag, manifest.to_string());
        let referrer = (self.indexed == Some(Indexed::Attested)).then(|| attest(server, &digest, &pins));
        let indexes = pins.into_iter().map(|(_, pin)| pin).collect();
        Served { digest, layers, reference: server.reference(tag), indexes, referrer }
    }
}

fn media_type(kind: &str, suffix: &str) -> String {
    let base = if kind == "datasets" { "dataset" } else { kind };
    format!("application/vnd.kitops.modelkit.{base}.v1.{suffix}")
}

/// A tar of files, with an entry for each parent, as `kit` writes it.
pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut dirs = std::collections::BTreeSet::new();
    for (path, bytes) in files {
        for (at, _) in path.match_indices('/') {
            if dirs.insert(&path[..at]) {
                out.extend(header(&path[..at], b'5', 0o755, 0));
            }
        }
        out.extend(header(path, b'0', 0o644, bytes.len() as u64));
        out.extend_from_slice(bytes);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.extend([0; 1024]);
    out
}

/// One USTAR header with a right checksum, whatever the values are.
pub fn header(path: &str, kind: u8, mode: u32, size: u64) -> [u8; 512] {
    let mut block = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, path.as_bytes());
    put(100, format!("{mode:07o}").as_bytes());
    put(108, b"0001750");
    put(116, b"0000000");
    if size < 1 << 33 {
        put(124, format!("{size:011o}").as_bytes());
    } else {
        put(124, &[0x80, 0, 0, 0]);
        put(128, &size.to_be_bytes());
    }
    put(136, b"00000000000");
    put(148, b"        ");
    put(156, &[kind]);
    put(257, b"ustar\x0000");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// Bytes that look random and are the same in every run.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    pattern_at(seed, 0, &mut bytes);
    bytes
}

/// The same from an offset on.
pub fn pattern_at(seed: u64, offset: u64, buffer: &mut [u8]) {
    let word = |at: u64| {
        let word = (at ^ (seed << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (word ^ (word >> 29)).to_le_bytes()
    };
    // Whole words but for the ends: tests make gigabytes of it.
    let (head, rest) = buffer.split_at_mut(buffer.len().min((offset.next_multiple_of(8) - offset) as usize));
    head.copy_from_slice(&word(offset / 8)[(offset % 8) as usize..][..head.len()]);
    for (bytes, at) in rest.chunks_mut(8).zip(offset.div_ceil(8)..) {
        bytes.copy_from_slice(&word(at)[..bytes.len()]);
    }
}

/// A tar of one file of `size` bytes of [`pattern_at`], not held in memory.
pub fn huge_tar(path: &str, seed: u64, size: u64) -> Content {
    let head = header(path, b'0', 0o644, size);
    let padded = size.next_multiple_of(512);
    Content::generated(512 + padded + 1024, move |offset, buffer| {
        let end = offset + buffer.len() as u64;
        buffer.fill(0);
        if offset < 512 {
            let len = buffer.len().min(512 - offset as usize);
            buffer[..len].copy_from_slice(&head[offset as usize..offset as usize + len]);
        }
        let (from, to) = (offset.max(512), end.min(512 + size));
        if from < to {
            let part = &mut buffer[(from - offset) as usize..(to - offset) as usize];
            pattern_at(seed, from - 512, part);
        }
    })
}

/// gzip, at a level that is quick.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("compresses");
    encoder.finish().expect("compresses")
}
