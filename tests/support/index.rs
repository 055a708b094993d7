//! Indexes made from layers, without kitfs's own way of reading them whole; and the referrers that keep them.

use kitfs::archive::EntryKind;
use kitfs::archive::chunk::Chunker;
use kitfs::archive::index::annotations::{MEDIA_TYPE, Pin};
use kitfs::archive::index::{Index, IndexEntry, LayerFacts, LayerFormat};
use kitfs::archive::inflate::{InflateError, Inflater};
use kitfs::archive::stream::{Event, StreamWalker};
use kitfs::archive::walker::{Caps, TarError};
use kitfs::digest::{Digest, StreamHasher};
use kitfs::fetch::listing::raw_entry;
use kitfs::modelkit::Compression;
use serde_json::{Value, json};

use super::kit::Served;
use super::{Content, FaultServer};

#[derive(Debug)]
#[allow(dead_code, reason = "shown where a test fails")]
enum Broken {
    Inflate(InflateError),
    Tar(TarError),
}

impl From<InflateError> for Broken {
    fn from(error: InflateError) -> Self {
        Self::Inflate(error)
    }
}

impl From<TarError> for Broken {
    fn from(error: TarError) -> Self {
        Self::Tar(error)
    }
}

/// The index of a layer whose media type ends with `suffix`: `tar`, `raw`, `tar+gzip` and so on. The layer is read a MiB
/// at a time, so it may be of any size.
pub fn index_of(layer: &Content, suffix: &str) -> Index {
    let (format, compression) = suffix.split_once('+').unwrap_or((suffix, ""));
    let format = if format == "raw" { LayerFormat::Raw } else { LayerFormat::Tar };
    let compression = match compression {
        "gzip" => Compression::Gzip,
        "zstd" => Compression::Zstd,
        _ => Compression::None,
    };
    let mut inflater = Inflater::new(compression, u64::MAX).expect("a decompressor");
    let mut walker = (format == LayerFormat::Tar).then(|| StreamWalker::new(None, Caps::default()));
    let (mut blob, mut inflated) = (StreamHasher::new(), StreamHasher::new());
    let mut size = 0;
    let mut rows = Vec::new();
    let mut file = Chunker::new();
    let mut take = |mut bytes: &[u8]| {
        inflated.update(bytes);
        size += bytes.len() as u64;
        let Some(walker) = &mut walker else {
            file.update(bytes);
            return Ok(());
        };
        while let Some(event) = walker.next(&mut bytes)? {
            match event {
                Event::Entry(entry) => rows.push(IndexEntry { entry, content: None }),
                Event::Content(bytes) => file.update(bytes),
                Event::EntryEnd => {
                    let row = rows.last_mut().expect("an entry before its end");
                    assert_eq!(row.entry.kind, EntryKind::File);
                    row.content = Some(std::mem::take(&mut file).finish());
                }
            }
        }
        Ok::<(), Broken>(())
    };
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < layer.len() {
        let len = buffer.len().min((layer.len() - at) as usize);
        layer.read_at(at, &mut buffer[..len]);
        blob.update(&buffer[..len]);
        inflater.feed(&buffer[..len], &mut take).expect("a sound layer");
        at += len as u64;
    }
    inflater.finish().expect("a whole layer");
    if walker.is_none() {
        rows.push(IndexEntry { entry: raw_entry(size), content: Some(file.finish()) });
    }
    let (digest, diff_id) = (blob.digest(), inflated.digest());
    let facts = LayerFacts { digest, size: layer.len(), diff_id, inflated: size, format, compression };
    Index::build(facts, rows).expect("a sound layer")
}

/// An index of the same layer with other entries, which keeps all rules.
pub fn altered(index: &Index, edit: impl FnOnce(&mut Vec<IndexEntry>)) -> Index {
    let all = (0..index.head().len()).map(|at| index.entry(at)).collect::<Option<Vec<_>>>();
    let mut rows = all.expect("as many entries as it says");
    edit(&mut rows);
    Index::build(index.head().layer().clone(), rows).expect("an index that keeps all rules")
}

/// The bytes of an index after `edit`, whether they keep the rules or not, and what names them. The head is as long as it
/// was.
pub fn forged(index: &Index, edit: impl FnOnce(&mut Vec<u8>)) -> (Vec<u8>, Pin) {
    let mut bytes = index.as_bytes().to_vec();
    edit(&mut bytes);
    let head = &bytes[..index.head().as_bytes().len()];
    let (head_digest, head_size) = (Digest::of(head), head.len() as u64);
    let pin = Pin { digest: Digest::of(&bytes), size: bytes.len() as u64, head_digest, head_size };
    (bytes, pin)
}

/// Where the content of a file begins in the layer that an index is of.
pub fn offset_of(index: &Index, path: &str) -> u64 {
    let row = index.head().find(path.as_bytes()).and_then(|at| index.head().row(at));
    row.expect("the file").offset()
}

/// The kit of a tag again, with another pin of one layer's index: nothing but these annotations name it. The tag moves.
pub fn repin(server: &FaultServer, kit: &Served, tag: &str, layer: usize, annotations: &[(&str, String)]) -> Served {
    let manifest = server.bytes_of(&kit.digest).expect("the manifest");
    let mut manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
    let all: serde_json::Map<_, _> =
        annotations.iter().map(|(key, value)| ((*key).to_owned(), value.as_str().into())).collect();
    manifest["layers"][layer]["annotations"] = all.into();
    let digest = server.add_manifest(tag, manifest.to_string());
    let reference = server.reference(tag);
    Served { digest, layers: kit.layers.clone(), reference, indexes: kit.indexes.clone(), referrer: None }
}

/// The same with an index that is put on the server.
pub fn pin_index(server: &FaultServer, kit: &Served, tag: &str, layer: usize, index: &Index) -> Served {
    server.add_blob(index.as_bytes());
    repin(server, kit, tag, layer, &index.pin().annotations())
}

/// Puts a referrer of `subject` on a server, as `kitfs index REF` makes it; its digest.
pub fn attest(server: &FaultServer, subject: &Digest, pins: &[(Digest, Pin)]) -> Digest {
    let empty = server.add_blob(*b"{}");
    let layers: Vec<_> = pins
        .iter()
        .map(|(layer, pin)| {
            let annotations: serde_json::Map<_, _> = pin
                .referrer_annotations(layer)
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value.into()))
                .collect();
            json!({"mediaType": MEDIA_TYPE, "digest": pin.digest, "size": pin.size, "annotations": annotations})
        })
        .collect();
    let referrer = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": MEDIA_TYPE,
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": empty, "size": 2},
        "layers": layers,
        "subject": {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": subject,
            "size": server.len_of(subject).expect("the kit is on the server"),
        },
    });
    server.add_referrer(subject, MEDIA_TYPE, referrer.to_string())
}
