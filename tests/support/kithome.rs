//! Fills kit's local storage from an OCI layout, as `kit` itself lays it out on disk.

use std::path::Path;

use base64::Engine as _;
use serde_json::{Map, Value, json};

/// Copies a layout's blobs into `home` and files its tags under the local name `repository`.
pub fn import(layout: &Path, home: &Path, repository: &str) {
    let storage = home.join("storage");
    let blobs = storage.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).expect("mkdir");
    for blob in std::fs::read_dir(layout.join("blobs/sha256")).expect("blobs") {
        let blob = blob.expect("a blob");
        std::fs::copy(blob.path(), blobs.join(blob.file_name())).expect("copy");
    }
    std::fs::write(storage.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("write");
    let index = std::fs::read(layout.join("index.json")).expect("index.json");
    let index: Value = serde_json::from_slice(&index).expect("JSON");
    let mut tags = Map::new();
    let mut manifests = Vec::new();
    for mut descriptor in index["manifests"].as_array().expect("manifests").clone() {
        let tag = descriptor["annotations"]["org.opencontainers.image.ref.name"].as_str().expect("a tag").to_owned();
        descriptor.as_object_mut().expect("a descriptor").remove("annotations");
        manifests.push(descriptor.clone());
        tags.insert(tag, descriptor);
    }
    let name = base64::engine::general_purpose::URL_SAFE.encode(format!("localhost/{repository}"));
    let write = |suffix: &str, value: Value| {
        std::fs::write(storage.join(format!("{name}-{suffix}.json")), value.to_string()).expect("write");
    };
    write("index", json!({"schemaVersion": 2, "manifests": manifests}));
    write("tags", Value::Object(tags));
}
