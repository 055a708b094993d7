//! The `Kitfile` that `kit unpack` writes: the config as YAML, without the layers' digests.
//!
//! The order of the fields is that of kit's own structures, and empty fields are left out, but for the version at the
//! top and the path of a document. The module `yaml` has the bytes.

use super::config::{Config, Entry, Package};
use super::json::Json;
use super::key_order::sort_keys;
use super::yaml::{self, Node};

/// The bytes of the `Kitfile`.
pub fn render(config: &Config) -> Vec<u8> {
    let mut root = vec![("manifestVersion".to_owned(), Node::Text(config.manifest_version.clone()))];
    if config.package != Package::default() {
        root.push(("package".to_owned(), package(&config.package)));
    }
    if let Some(model) = &config.model {
        let entry = &model.entry;
        let mut pairs = texts(&[
            ("name", &entry.name),
            ("path", &entry.path),
            ("license", &entry.license),
            ("framework", &model.framework),
            ("format", &model.format),
            ("version", &model.version),
            ("description", &entry.description),
        ]);
        list(&mut pairs, "parts", &model.parts, |part| {
            texts(&[("name", &part.name), ("path", &part.path), ("license", &part.license), ("type", &part.part_type)])
        });
        parameters(&mut pairs, entry);
        root.push(("model".to_owned(), Node::Map(pairs)));
    }
    list(&mut root, "code", &config.code, |code| {
        texts(&[("path", &code.path), ("description", &code.description), ("license", &code.license)])
    });
    list(&mut root, "datasets", &config.datasets, |dataset| {
        let mut pairs = texts(&[
            ("name", &dataset.name),
            ("path", &dataset.path),
            ("remotePath", &dataset.remote_path),
            ("remoteHash", &dataset.remote_hash),
            ("description", &dataset.description),
            ("license", &dataset.license),
        ]);
        parameters(&mut pairs, dataset);
        pairs
    });
    list(&mut root, "docs", &config.docs, |docs| {
        let mut pairs = vec![("path".to_owned(), Node::Text(docs.path.clone()))];
        pairs.extend(texts(&[("description", &docs.description)]));
        pairs
    });
    let named =
        |entry: &Entry| texts(&[("name", &entry.name), ("path", &entry.path), ("description", &entry.description)]);
    list(&mut root, "prompts", &config.prompts, named);
    list(&mut root, "mcpServers", &config.mcp_servers, named);
    yaml::document(&root).into_bytes()
}

fn package(package: &Package) -> Node {
    let mut pairs = texts(&[
        ("name", &package.name),
        ("version", &package.version),
        ("description", &package.description),
        ("license", &package.license),
    ]);
    if !package.authors.is_empty() {
        pairs.push(("authors".to_owned(), Node::FlowList(package.authors.clone())));
    }
    Node::Map(pairs)
}

/// The fields that are not empty.
fn texts(fields: &[(&str, &str)]) -> Vec<(String, Node)> {
    let filled = fields.iter().filter(|(_, text)| !text.is_empty());
    filled.map(|(name, text)| ((*name).to_owned(), Node::Text((*text).to_owned()))).collect()
}

fn list(
    pairs: &mut Vec<(String, Node)>,
    name: &str,
    entries: &[Entry],
    fields: impl Fn(&Entry) -> Vec<(String, Node)>,
) {
    if !entries.is_empty() {
        pairs.push((name.to_owned(), Node::List(entries.iter().map(|entry| Node::Map(fields(entry))).collect())));
    }
}

fn parameters(pairs: &mut Vec<(String, Node)>, entry: &Entry) {
    if let Some(parameters) = &entry.parameters {
        pairs.push(("parameters".to_owned(), node(parameters)));
    }
}

/// A free value: maps are sorted, and the last of several equal keys wins.
pub(super) fn node(json: &Json) -> Node {
    match json {
        Json::Null => Node::Null,
        Json::Bool(value) => Node::Bool(*value),
        Json::Number(number) => Node::Number(*number),
        Json::Text(text) => Node::Text(text.clone()),
        Json::List(items) => Node::List(items.iter().map(node).collect()),
        Json::Object(pairs) => {
            let last: std::collections::BTreeMap<_, _> = pairs.iter().map(|(key, value)| (key, value)).collect();
            Node::Map(sort_keys(last.into_iter().map(|(key, value)| (key.clone(), node(value))).collect()))
        }
    }
}
