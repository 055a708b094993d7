//! Extended attributes: what is served, and how far it is proved.
//!
//! All of ours are `user.` attributes. Labels, capabilities and access control lists there are none, and are said to be not
//! supported rather than missing: `ls -l` asks each file for them until one says so.

use super::{Fs, FsError, Ino, NodeKind};
use crate::tree::{NodeId, Origin};

impl Fs {
    /// An extended attribute: of the root its reference and digest, of a file where it comes from and how far it is
    /// proved.
    pub async fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>, FsError> {
        if !name.starts_with(b"user.") {
            return Err(FsError::NoSuchAttributes);
        }
        let (id, meta, origin) = self.node(ino)?;
        let resolved = &self.kit.resolved;
        let text = match (origin, meta.kind) {
            _ if id == NodeId::ROOT => match name {
                b"user.kitfs.reference" => resolved.reference.to_string(),
                b"user.kitfs.digest" => resolved.digest.to_string(),
                _ => return Err(FsError::NoAttribute),
            },
            (Origin::Layer { layer, entry }, NodeKind::File) => {
                let (layer, row) = (&self.kit.layers[layer as usize], entry as usize);
                match name {
                    b"user.kitfs.layer" => layer.layer.digest.to_string(),
                    b"user.kitfs.trust" => layer.tier().to_string(),
                    b"user.kitfs.cached" => if layer.is_cached(row).await? { "yes" } else { "no" }.to_owned(),
                    // Known only with an index.
                    b"user.kitfs.digest" => layer.object_of(row).ok_or(FsError::NoAttribute)?.to_string(),
                    _ => return Err(FsError::NoAttribute),
                }
            }
            _ => return Err(FsError::NoAttribute),
        };
        Ok(text.into_bytes())
    }

    /// The names of a node's extended attributes.
    pub async fn listxattr(&self, ino: Ino) -> Result<Vec<Vec<u8>>, FsError> {
        let (id, meta, origin) = self.node(ino)?;
        let mut names: Vec<&str> = match (origin, meta.kind) {
            _ if id == NodeId::ROOT => vec!["user.kitfs.reference", "user.kitfs.digest"],
            (Origin::Layer { .. }, NodeKind::File) => vec!["user.kitfs.layer", "user.kitfs.trust", "user.kitfs.cached"],
            _ => Vec::new(),
        };
        if let (Origin::Layer { layer, .. }, NodeKind::File) = (origin, meta.kind)
            && self.kit.layers[layer as usize].known().is_some()
        {
            names.push("user.kitfs.digest");
        }
        Ok(names.into_iter().map(|name| name.as_bytes().to_vec()).collect())
    }
}
