//! Loaders of weights map them into memory: the tensors that the `safetensors` library finds in a mount are those of the
//! unpacked kit.

mod support;

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use support::data;
use support::program::Kitfs;

/// Says what to install where the libraries are missing.
const NEEDS: &str = "the test needs the Python packages safetensors and numpy: run `scripts/setup test` and put \
                     target/tools/bin first in PATH, or `pip install safetensors numpy`";

/// Opens each file below two directories by mmap, and compares names, shapes, types and bytes of all tensors.
const COMPARE: &str = r#"
import pathlib, sys
from safetensors import safe_open
mounted, unpacked = map(pathlib.Path, sys.argv[1:])
files = sorted(path.relative_to(unpacked) for path in unpacked.rglob("*.safetensors"))
assert files == sorted(path.relative_to(mounted) for path in mounted.rglob("*.safetensors")), files
tensors = 0
for file in files:
    with safe_open(mounted / file, framework="np") as one, safe_open(unpacked / file, framework="np") as other:
        assert sorted(one.keys()) == sorted(other.keys()), file
        assert one.metadata() == other.metadata(), file
        for name in one.keys():
            a, b = one.get_tensor(name), other.get_tensor(name)
            assert a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes(), (file, name)
            assert a.size > 0, (file, name)
            tensors += 1
print(len(files), tensors)
"#;

/// Unpacks the layers of an OCI layout's only manifest with this tag, as tars and nothing else.
fn unpack(layout: &Path, tag: &str, into: &Path) {
    let json = |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).expect("reads")).expect("JSON") };
    let blob = |digest: &Value| {
        let (_, hex) = digest.as_str().and_then(|digest| digest.split_once(':')).expect("a digest");
        layout.join("blobs/sha256").join(hex)
    };
    let index = json(&layout.join("index.json"));
    let manifests = index["manifests"].as_array().expect("manifests");
    let tagged = |entry: &&Value| entry["annotations"]["org.opencontainers.image.ref.name"] == tag;
    let manifest = json(&blob(&manifests.iter().find(tagged).expect("the tag")["digest"]));
    for layer in manifest["layers"].as_array().expect("layers") {
        let tar = File::open(blob(&layer["digest"])).expect("the layer");
        tar::Archive::new(tar).unpack(into).expect("unpacks");
    }
}

#[test]
fn tensors_mapped_from_a_mount_are_those_of_the_unpacked_kit() {
    let python = Command::new("python3").args(["-c", "import numpy, safetensors.numpy"]).output();
    let python = python.unwrap_or_else(|error| panic!("python3: {error}; {NEEDS}"));
    assert!(python.status.success(), "{NEEDS}\n{}", String::from_utf8_lossy(&python.stderr));

    let layout = data("layouts/tiny-llm");
    let kitfs = Kitfs::new();
    let unpacked = kitfs.path("unpacked");
    unpack(&layout, "1.2.0", &unpacked);
    let mount = kitfs.mount(&format!("oci:{}:1.2.0", layout.display()), &[]);
    // Once while the layers are fetched, once from the cache.
    for _ in 0..2 {
        let output = Command::new("python3")
            .args(["-c", COMPARE])
            .args([mount.path("weights"), unpacked.join("weights")])
            .output()
            .expect("python3 runs");
        assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), kitfs.logs());
        let said = String::from_utf8_lossy(&output.stdout);
        let (files, tensors) = said.trim().split_once(' ').expect("two numbers");
        assert_eq!(files, "2");
        assert!(tensors.parse::<usize>().expect("a number") >= 2, "{said}");
    }
}
