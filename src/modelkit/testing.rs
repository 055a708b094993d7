//! A layer for tests of those who work with layers.

use std::collections::BTreeMap;

use super::{Compression, Format, Kind, Layer};
use crate::digest::Digest;
use crate::path::TreePath;

/// A tar of one byte that nobody has, of the kit itself.
pub fn layer(name: &str) -> Layer {
    Layer {
        digest: Digest::of(name.as_bytes()),
        size: 1,
        diff_id: None,
        media_type: String::new(),
        annotations: BTreeMap::new(),
        kind: Kind::Model,
        name: None,
        path: name.to_owned(),
        format: Format::Tar,
        compression: Compression::None,
        root: TreePath::root(),
        prefix: TreePath::root(),
        kit: 0,
    }
}
