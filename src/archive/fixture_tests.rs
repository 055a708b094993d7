//! Layers that real tools packed: kit, modctl, and Python's tarfile as a second opinion.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::inflate::{InflateError, Inflater, max_inflated};
use super::testing::{headers, hop, hop_with, index_of, stream};
use super::walker::Caps;
use super::{Entry, EntryKind, listing::Listing};
use crate::digest::Digest;
use crate::modelkit::Compression;

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn json(path: &Path) -> serde_json::Value {
    let text = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All layers of an OCI layout that hold a tar, with their media types.
fn tar_layers(layout: &Path) -> Vec<(String, Vec<u8>)> {
    let blob = |descriptor: &serde_json::Value| {
        let digest: Digest = descriptor["digest"].as_str().expect("a digest").parse().expect("a digest");
        layout.join("blobs/sha256").join(digest.hex())
    };
    let mut layers = Vec::new();
    let mut indexes = vec![json(&layout.join("index.json"))];
    while let Some(index) = indexes.pop() {
        for descriptor in index["manifests"].as_array().into_iter().flatten() {
            indexes.push(json(&blob(descriptor)));
        }
        for descriptor in index["layers"].as_array().into_iter().flatten() {
            let media_type = descriptor["mediaType"].as_str().expect("a media type").to_owned();
            if media_type.contains(".tar") {
                layers.push((media_type, std::fs::read(blob(descriptor)).expect("the layer's blob")));
            }
        }
    }
    layers
}

fn inflate(media_type: &str, blob: &[u8]) -> Vec<u8> {
    let compression = match media_type {
        gzip if gzip.ends_with("+gzip") => Compression::Gzip,
        zstd if zstd.ends_with("+zstd") => Compression::Zstd,
        _ => Compression::None,
    };
    let mut inflater = Inflater::new(compression, max_inflated(blob.len() as u64)).expect("made");
    let mut layer = Vec::new();
    for piece in blob.chunks(1000) {
        let mut keep = |bytes: &[u8]| {
            layer.extend_from_slice(bytes);
            Ok::<(), InflateError>(())
        };
        inflater.feed(piece, &mut keep).expect("sound");
    }
    assert_eq!(inflater.finish().expect("whole"), layer.len() as u64);
    layer
}

/// What `kit unpack` wrote: name without directories, mode, and for a file its digest.
fn recorded() -> HashSet<(Vec<u8>, u32, Option<String>)> {
    let trees =
        std::fs::read_dir(data().join("trees")).expect("the recorded trees").map(|entry| entry.expect("read").path());
    let trees = trees.filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    let lines = trees.flat_map(|path| {
        let text = std::fs::read_to_string(path).expect("a recorded tree");
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    });
    lines
        .map(|line| {
            let row: serde_json::Value = serde_json::from_str(&line).expect("a row");
            let name = row["path"].as_str().expect("a path").rsplit('/').next().expect("a name").as_bytes().to_vec();
            let mode = u32::from_str_radix(row["mode"].as_str().expect("a mode"), 8).expect("an octal mode");
            (name, mode, row["sha256"].as_str().map(str::to_owned))
        })
        .collect()
}

#[test]
fn every_layer_that_kit_packed_walks_cleanly_and_holds_what_kit_unpacked() {
    let recorded = recorded();
    let (mut layers, mut files) = (0, 0);
    for layout in std::fs::read_dir(data().join("layouts")).expect("the layouts") {
        for (media_type, blob) in tar_layers(&layout.expect("read").path()) {
            let layer = inflate(&media_type, &blob);
            let (streamed, warning) = stream(&layer, None, &[700, 1300, 5000]).expect("a sound tar");
            assert_eq!(warning, None);
            assert_eq!(hop(&layer, 65_536).expect("a sound tar"), (headers(&streamed), None));
            let listing = Listing::build(headers(&streamed)).expect("no contradictions");
            let index = index_of(&layer).expect("no contradictions");
            assert!(index.head().rows().map(|row| row.entry()).eq(listing.entries()));
            layers += 1;
            for (entry, content) in &streamed {
                let digest = (entry.kind == EntryKind::File).then(|| Digest::of(content).hex());
                files += usize::from(digest.is_some());
                let name = entry.path.name().expect("not the root").to_vec();
                let known = recorded.contains(&(name, entry.mode, digest));
                assert!(known, "{entry:?} is in no recorded tree");
            }
        }
    }
    assert!(layers > 40 && files > 800, "{layers} layers with {files} files: the fixtures are missing");
}

/// Writes tars in all three formats and says what it reads back from them.
const PYTHON_TARS: &str = r#"
import io, json, sys, tarfile
for form in tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT:
    posix = form == tarfile.PAX_FORMAT
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        def add(name, type=tarfile.REGTYPE, size=0, mode=0o644, **more):
            info = tarfile.TarInfo(name)
            info.type, info.size, info.mode = type, size, mode
            for key, value in more.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(b"x" * size) if size else None)
        add("dir", tarfile.DIRTYPE, mode=0o1777)
        add("dir/file", size=513, uid=1000, gid=100, mtime=12345, uname="someone")
        add("p" * 90 + "/" + "n" * 90, size=1)
        add("dir/link", tarfile.SYMTYPE, linkname="../elsewhere")
        add("dir/cont", tarfile.CONTTYPE, size=5)
        if form != tarfile.USTAR_FORMAT:
            add("q" * 200 + "/" + "m" * 200, size=1)
            add("l" * 120, tarfile.SYMTYPE, linkname="t" * 150)
            add("big-ids", uid=1 << 31, gid=1 << 40)
            add("old", mtime=-5)
        if posix:
            add("time", mtime=1234.75)
            add("before", mtime=-1.5)
            add("new\nline = \u00fc", size=2)
    data = out.getvalue()
    rows = []
    for info in tarfile.open(fileobj=io.BytesIO(data)):
        rows.append(dict(name=info.name, type=info.type.decode(), link=info.linkname, mode=info.mode, uid=info.uid,
                         gid=min(info.gid, 65534), mtime=int(info.mtime // 1), size=info.size, offset=info.offset_data))
    big = tarfile.TarInfo("big")
    big.size = 9 << 30
    big = big.tobuf(form).hex() if form != tarfile.USTAR_FORMAT else None
    print(json.dumps(dict(tar=data.hex(), rows=rows, big=big)))
"#;

fn python_tars() -> Vec<serde_json::Value> {
    let output = Command::new("python3").args(["-c", PYTHON_TARS]).output().expect("python3 is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("JSON");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn unhex(text: &serde_json::Value) -> Option<Vec<u8>> {
    let digits = text.as_str()?.as_bytes();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    digits.chunks(2).map(byte).collect()
}

#[test]
fn what_python_writes_is_read_as_python_reads_it() {
    let tars = python_tars();
    assert_eq!(tars.len(), 3);
    for written in tars {
        let tar = unhex(&written["tar"]).expect("hexadecimal");
        let (entries, warning) = hop(&tar, 512).expect("a sound tar");
        assert_eq!(warning, None);
        let ours: Vec<_> = entries.iter().map(row).collect();
        assert_eq!(serde_json::Value::from(ours), written["rows"]);
    }
}

fn row(entry: &Entry) -> serde_json::Value {
    let (kind, link) = match &entry.kind {
        EntryKind::File if entry.path.name() == Some(b"cont") => ("7", &b""[..]),
        EntryKind::File => ("0", &b""[..]),
        EntryKind::Directory => ("5", &b""[..]),
        EntryKind::Symlink(target) => ("2", &target[..]),
    };
    let Entry { mode, uid, gid, mtime, size, offset, .. } = entry;
    serde_json::json!({
        "name": entry.path.to_string(), "type": kind, "link": String::from_utf8_lossy(link),
        "mode": mode, "uid": uid, "gid": gid, "mtime": mtime, "size": size, "offset": offset,
    })
}

#[test]
fn a_file_of_9_gib_is_hopped_over_in_gnu_and_pax_form() {
    let headers: Vec<Vec<u8>> = python_tars().iter().filter_map(|written| unhex(&written["big"])).collect();
    assert_eq!(headers.len(), 2);
    for header in headers {
        let after = header.len() as u64 + (9 << 30);
        let tail = super::testing::Tar::new().file("after", b"x").end();
        let read = |offset: u64, len: u64| {
            let (part, at) = if offset < after { (&header, offset) } else { (&tail, offset - after) };
            part[at as usize..][..len as usize].to_vec()
        };
        let (entries, _) = hop_with(after + tail.len() as u64, Caps::default(), read).expect("a sound tar");
        let sizes: Vec<_> = entries.iter().map(|entry| (entry.path.to_string(), entry.size)).collect();
        assert_eq!(sizes, [("big".into(), 9 << 30), ("after".into(), 1)]);
    }
}
