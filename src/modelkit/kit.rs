//! One kit, read: its Kitfile's entries, each with the layer that belongs to it.
//!
//! Which layer is whose: an entry that names a digest has the layer of that digest; in a legacy kit the n-th entry of a
//! kind has the n-th layer of that kind; in a ModelPack artifact each layer says by annotation where it belongs.
//! An entry whose layer can't be used is refused when it is asked for and not before, as in kit: a filter that leaves
//! it out makes the rest usable.

use std::collections::{BTreeMap, HashMap};

use super::config::{self, Config, Entry as ConfigEntry, Stated};
use super::error::ModelKitError;
use super::manifest::{Descriptor, Flavor, MAX_CONFIG, Manifest};
use super::media_type::LayerType;
use super::{Compression, Format, Kind, KitfileSource, Layer, kitfile, quoted, timestamp};
use crate::digest::{Digest, Verified};
use crate::path::TreePath;
use crate::reference::Reference;

/// Where a layer's file belongs; the second name is the older one.
const FILE_PATH: [&str; 2] = ["org.cncf.model.filepath", "org.cnai.model.filepath"];
/// Mode, size and mtime of a raw layer's file.
const FILE_METADATA: [&str; 2] = ["org.cncf.model.file.metadata+json", "org.cnai.model.file.metadata+json"];
/// The Kitfile of a ModelPack artifact that kit packed.
const KITFILE_JSON: &str = "ml.kitops.modelkit.kitfile";
/// The mode of a raw layer's file where none is stated.
const DEFAULT_MODE: u32 = 0o644;

/// A kit as its manifest and config describe it.
#[derive(Debug)]
pub struct Kit {
    /// The manifest's digest.
    pub digest: Digest,
    /// The manifest's annotations.
    pub annotations: BTreeMap<String, String>,
    pub(super) kitfile: Option<KitfileSource>,
    /// In the order in which kit unpacks them: that of the manifest.
    pub(super) entries: Vec<Entry>,
    pub(super) warnings: Vec<String>,
    parent: Option<Reference>,
}

/// A Kitfile entry that should have a layer.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) kind: Kind,
    pub(super) name: Option<String>,
    pub(super) path: String,
    /// Its layer, or why that can't be used.
    pub(super) layer: Result<Layer, ModelKitError>,
}

impl Kit {
    /// Reads a kit. `digest` is the manifest's, `config` what its config descriptor names.
    pub fn read(digest: Digest, manifest: &Manifest, config: &Verified) -> Result<Self, ModelKitError> {
        let (kitfile_json, diff_ids) = match manifest.flavor {
            Flavor::ModelKit => (Some(Config::parse(config.bytes())?), Vec::new()),
            Flavor::ModelPack => {
                let embedded = manifest.annotations.get(KITFILE_JSON);
                let embedded = embedded.map(|json| Config::parse(json.as_bytes())).transpose()?;
                (embedded, config::model_pack_diff_ids(config.bytes())?)
            }
        };
        let mut reader = Reader::new(manifest);
        let rendered = match (&kitfile_json, manifest.flavor) {
            (None, _) => None,
            (Some(parsed), Flavor::ModelKit) => Some(config.derive(|_| kitfile::render(parsed))),
            (Some(parsed), Flavor::ModelPack) => Some(manifest.bytes.derive(|_| kitfile::render(parsed))),
        };
        let kitfile = reader.kitfile_layer()?.or(rendered.map(KitfileSource::Rendered));
        let config = kitfile_json.unwrap_or_default();
        let parent = config.model.as_ref().and_then(|model| Reference::parse_model_path(&model.entry.path));
        match manifest.flavor {
            Flavor::ModelKit => reader.kit_entries(&config, parent.is_some()),
            Flavor::ModelPack => reader.model_pack_entries(&config, &diff_ids),
        }
        reader.note_unused();
        reader.found.sort_by_key(|(at, _)| *at);
        Ok(Self {
            digest,
            annotations: manifest.annotations.clone(),
            kitfile,
            entries: reader.found.into_iter().map(|(_, entry)| entry).collect(),
            warnings: reader.warnings,
            parent,
        })
    }

    /// The kit that this one builds on.
    pub fn parent(&self) -> Option<&Reference> {
        self.parent.as_ref()
    }
}

/// Pairs entries with layers.
struct Reader<'a> {
    manifest: &'a Manifest,
    /// What each layer is.
    types: Vec<LayerType>,
    /// Where each digest stands; a digest may stand there more than once.
    by_digest: HashMap<Digest, Vec<usize>>,
    /// Where the layers of each kind stand.
    by_kind: HashMap<Kind, Vec<usize>>,
    /// Which layers belong to something.
    used: Vec<bool>,
    /// Entries with their layer's place in the manifest.
    found: Vec<(usize, Entry)>,
    warnings: Vec<String>,
}

impl<'a> Reader<'a> {
    fn new(manifest: &'a Manifest) -> Self {
        let types: Vec<_> = manifest.layers.iter().map(LayerType::of).collect();
        let (mut by_digest, mut by_kind) = (HashMap::<_, Vec<_>>::new(), HashMap::<_, Vec<_>>::new());
        for (at, (layer, layer_type)) in manifest.layers.iter().zip(&types).enumerate() {
            by_digest.entry(layer.digest).or_default().push(at);
            if let LayerType::Content { kind, .. } = layer_type {
                by_kind.entry(*kind).or_default().push(at);
            }
        }
        let used = vec![false; types.len()];
        Self { manifest, types, by_digest, by_kind, used, found: Vec::new(), warnings: Vec::new() }
    }

    fn kitfile_layer(&mut self) -> Result<Option<KitfileSource>, ModelKitError> {
        let mut found = None;
        for (at, layer) in self.manifest.layers.iter().enumerate() {
            if self.types[at] != LayerType::Kitfile {
                continue;
            }
            self.used[at] = true;
            if layer.size > MAX_CONFIG {
                return Err(ModelKitError::TooLarge { what: "Kitfile", size: layer.size, limit: MAX_CONFIG });
            }
            if found.replace(KitfileSource::Layer { digest: layer.digest, size: layer.size }).is_some() {
                let why = "it has more than one layer for the Kitfile".to_owned();
                return Err(ModelKitError::Invalid { what: "manifest", why });
            }
        }
        Ok(found)
    }

    fn kit_entries(&mut self, config: &Config, has_parent: bool) {
        let no_parts = Vec::new();
        let parts = config.model.as_ref().map_or(&no_parts, |model| &model.parts);
        let model = config.model.as_ref().map(|model| &model.entry).filter(|_| !has_parent);
        if let Some(model) = model.filter(|model| !model.path.is_empty() || model.stated.is_some()) {
            self.pair(Kind::Model, 0, model);
        }
        let sections = [
            (Kind::ModelPart, parts),
            (Kind::Code, &config.code),
            (Kind::Dataset, &config.datasets),
            (Kind::Docs, &config.docs),
            (Kind::Prompt, &config.prompts),
            (Kind::McpServer, &config.mcp_servers),
        ];
        for (kind, entries) in sections {
            let with_layer = entries.iter().filter(|entry| entry.remote_path.is_empty());
            for (nth, entry) in with_layer.enumerate() {
                self.pair(kind, nth, entry);
            }
        }
    }

    /// Finds the layer of the `nth` entry of a kind that has one.
    fn pair(&mut self, kind: Kind, nth: usize, entry: &ConfigEntry) {
        let label = kind.label(&entry.path);
        let (at, layer) = match &entry.stated {
            Some(stated) => match self.by_digest(kind, stated, &label) {
                Ok((at, diff_id)) => (at, self.layer(at, kind, entry, diff_id, TreePath::root())),
                Err(error) => (usize::MAX, Err(error)),
            },
            None => {
                let Some(at) = self.by_order(kind, nth) else {
                    self.warnings.push(format!("{label} has no layer in the manifest and is left out"));
                    return;
                };
                let prefix = clean(&label, &entry.path).map(|root| root.parent().unwrap_or_default());
                (at, prefix.and_then(|prefix| self.layer(at, kind, entry, None, prefix)))
            }
        };
        if let Some(used) = self.used.get_mut(at) {
            *used = true;
        }
        let name = (!entry.name.is_empty()).then(|| entry.name.clone());
        self.found.push((at, Entry { kind, name, path: entry.path.clone(), layer }));
    }

    /// The layer with the stated digest. Where the manifest has it several times: one of the entry's kind that no other
    /// entry has taken, else the next best.
    fn by_digest(&self, kind: Kind, stated: &Stated, label: &str) -> Result<(usize, Option<Digest>), ModelKitError> {
        let parse = |text: &str| {
            text.parse::<Digest>().map_err(|_| ModelKitError::Entry {
                entry: label.to_owned(),
                why: format!("{} is not a digest: expected `sha256:` and 64 hexadecimal digits", quoted(text)),
            })
        };
        let digest = parse(&stated.digest)?;
        let diff_id = if stated.diff_id.is_empty() { None } else { Some(parse(&stated.diff_id)?) };
        let places = self.by_digest.get(&digest).into_iter().flatten().copied();
        let best = places.min_by_key(|at| (self.kind_at(*at) != Some(kind), self.used[*at], *at));
        let at = best.ok_or_else(|| ModelKitError::MissingLayer { entry: label.to_owned(), digest })?;
        Ok((at, diff_id))
    }

    fn by_order(&self, kind: Kind, nth: usize) -> Option<usize> {
        self.by_kind.get(&kind)?.get(nth).copied()
    }

    fn kind_at(&self, at: usize) -> Option<Kind> {
        match self.types[at] {
            LayerType::Content { kind, .. } => Some(kind),
            LayerType::Kitfile | LayerType::Config | LayerType::Unknown => None,
        }
    }

    fn layer(
        &mut self,
        at: usize,
        kind: Kind,
        entry: &ConfigEntry,
        diff_id: Option<Digest>,
        prefix: TreePath,
    ) -> Result<Layer, ModelKitError> {
        let descriptor = &self.manifest.layers[at];
        let label = kind.label(&entry.path);
        let LayerType::Content { raw, compression, .. } = self.types[at] else {
            return Err(ModelKitError::UnknownLayer { entry: label, media_type: descriptor.media_type.clone() });
        };
        let diff_id = self.check_diff_id(descriptor, compression, diff_id, &label)?;
        let (format, root) = if raw {
            let path = file_path(descriptor).ok_or_else(|| ModelKitError::Entry {
                entry: label.clone(),
                why: format!("its raw layer {} lacks the annotation {}", descriptor.digest, FILE_PATH[0]),
            })?;
            let root = clean(&label, path)?;
            if root.is_root() {
                let why = format!("its raw layer {} has the kit's root as its path", descriptor.digest);
                return Err(ModelKitError::Entry { entry: label, why });
            }
            (raw_format(descriptor, compression), root)
        } else {
            (Format::Tar, clean(&label, &entry.path)?)
        };
        Ok(Layer {
            digest: descriptor.digest,
            size: descriptor.size,
            diff_id,
            media_type: descriptor.media_type.clone(),
            annotations: descriptor.annotations.clone(),
            kind,
            name: (!entry.name.is_empty()).then(|| entry.name.clone()),
            path: entry.path.clone(),
            format,
            compression,
            root,
            prefix,
            kit: 0,
        })
    }

    fn check_diff_id(
        &mut self,
        layer: &Descriptor,
        compression: Compression,
        diff_id: Option<Digest>,
        label: &str,
    ) -> Result<Option<Digest>, ModelKitError> {
        match (compression, diff_id) {
            (Compression::None, Some(diff_id)) if diff_id != layer.digest => Err(ModelKitError::Entry {
                entry: label.to_owned(),
                why: format!("its layer {} is not compressed, yet its diffId is {diff_id}", layer.digest),
            }),
            (Compression::Gzip | Compression::Zstd, Some(diff_id)) if diff_id == layer.digest => {
                self.warnings.push(format!("{label}: the diffId of its compressed layer is wrong and is ignored"));
                Ok(None)
            }
            (_, diff_id) => Ok(diff_id),
        }
    }

    /// One entry a layer; what the embedded Kitfile says of a layer, if there is one, is added by the layer's digest.
    fn model_pack_entries(&mut self, config: &Config, diff_ids: &[Digest]) {
        let states_all = diff_ids.len() == self.manifest.layers.len();
        if !states_all && !diff_ids.is_empty() {
            self.warnings.push(format!(
                "the config states {} diffIds for {} layers; they are ignored",
                diff_ids.len(),
                self.manifest.layers.len()
            ));
        }
        let model = config.model.iter().flat_map(|model| std::iter::once(&model.entry).chain(&model.parts));
        let others = [&config.code, &config.datasets, &config.docs, &config.prompts, &config.mcp_servers];
        let mut listed: HashMap<&str, &ConfigEntry> = HashMap::new();
        for entry in model.chain(others.into_iter().flatten()) {
            if let Some(stated) = &entry.stated {
                listed.entry(&stated.digest).or_insert(entry);
            }
        }
        for (at, descriptor) in self.manifest.layers.iter().enumerate() {
            let Some(kind) = self.kind_at(at) else { continue };
            let digest = descriptor.digest.to_string();
            let known = listed.get(digest.as_str());
            let mut entry = known.map_or_else(ConfigEntry::default, |known| (*known).clone());
            if let Some(path) = file_path(descriptor) {
                path.clone_into(&mut entry.path);
            }
            self.used[at] = true;
            let layer = if entry.path.is_empty() {
                let why = format!("it lacks the annotation {}", FILE_PATH[0]);
                Err(ModelKitError::Entry { entry: format!("the layer {digest}"), why })
            } else {
                let diff_id = diff_ids.get(at).copied().filter(|_| states_all);
                self.layer(at, kind, &entry, diff_id, TreePath::root())
            };
            let name = (!entry.name.is_empty()).then(|| entry.name.clone());
            self.found.push((at, Entry { kind, name, path: entry.path, layer }));
        }
    }

    fn note_unused(&mut self) {
        for (at, layer) in self.manifest.layers.iter().enumerate().filter(|(at, _)| !self.used[*at]) {
            match self.types[at] {
                LayerType::Config | LayerType::Kitfile => {}
                LayerType::Content { .. } => {
                    self.warnings
                        .push(format!("the layer {} belongs to no Kitfile entry and is left out", layer.digest));
                }
                LayerType::Unknown => self.warnings.push(format!(
                    "the layer {} has the unknown type {} and is left out",
                    layer.digest,
                    quoted(&layer.media_type)
                )),
            }
        }
    }
}

fn file_path(layer: &Descriptor) -> Option<&str> {
    FILE_PATH.iter().find_map(|name| layer.annotations.get(*name)).map(String::as_str).filter(|path| !path.is_empty())
}

fn clean(label: &str, path: &str) -> Result<TreePath, ModelKitError> {
    TreePath::clean(path.as_bytes()).map_err(|cause| ModelKitError::Path { entry: label.to_owned(), cause })
}

/// What the metadata annotation of a raw layer says; tools differ in its `typeflag`, so that is not looked at.
#[derive(serde::Deserialize, Default)]
#[serde(default)]
struct FileMetadata {
    mode: Option<u32>,
    size: Option<u64>,
    mtime: Option<String>,
}

fn raw_format(layer: &Descriptor, compression: Compression) -> Format {
    let annotated = FILE_METADATA.iter().find_map(|name| layer.annotations.get(*name));
    // Nothing depends on it: an annotation that can't be read is one that is not there.
    let metadata: FileMetadata = annotated.and_then(|json| serde_json::from_str(json).ok()).unwrap_or_default();
    Format::Raw {
        mode: metadata.mode.map_or(DEFAULT_MODE, |mode| mode & 0o7777),
        mtime: metadata.mtime.as_deref().and_then(timestamp::parse).unwrap_or(0),
        stated_size: metadata.size.filter(|_| compression != Compression::None),
    }
}
