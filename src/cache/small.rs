//! Small files: manifests and configs by digest, derived indexes by key, the last known digests of tags.

use std::fs;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Cache, CacheError, io_error};
use crate::digest::{Digest, Unverified, Verified};

/// What a tag was when it was last resolved.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct KnownTag {
    /// The repository and tag it is about, so that the file says so too.
    pub reference: String,
    /// The manifest digest.
    pub digest: Digest,
    /// Seconds since the epoch at which the registry said so.
    pub seen: u64,
}

impl Cache {
    /// A blob, if it is here and hashes right. A damaged one is removed.
    pub fn blob(&self, digest: &Digest) -> Result<Option<Verified>, CacheError> {
        let path = self.spread("blobs/sha256", &digest.hex());
        let Some(bytes) = read(&path)? else { return Ok(None) };
        match Unverified::new(bytes).verify(digest) {
            Ok(verified) => Ok(Some(verified)),
            Err(mismatch) => {
                tracing::warn!(path = %path.display(), %mismatch, "cache: damaged blob removed");
                fs::remove_file(&path).map_err(io_error("remove", &path))?;
                Ok(None)
            }
        }
    }

    /// Keeps a small blob.
    pub fn keep_blob(&self, digest: &Digest, bytes: &Verified) -> Result<(), CacheError> {
        let path = self.spread("blobs/sha256", &digest.hex());
        if path.exists() { Ok(()) } else { self.write_file(&path, bytes.bytes()) }
    }

    /// A derived index by its key, if it is here and undamaged.
    pub fn index(&self, key: &Digest) -> Result<Option<Vec<u8>>, CacheError> {
        let path = self.spread("indexes", &key.hex());
        let Some(bytes) = read(&path)? else { return Ok(None) };
        let Some((digest, body)) = bytes.split_first_chunk::<32>() else {
            return Ok(None);
        };
        if Digest::of(body) == Digest::from_bytes(*digest) {
            return Ok(Some(body.to_vec()));
        }
        tracing::warn!(path = %path.display(), "cache: damaged index removed");
        fs::remove_file(&path).map_err(io_error("remove", &path))?;
        Ok(None)
    }

    /// Keeps a derived index: the digest of the body, then the body.
    pub(super) fn keep_index(&self, key: &Digest, body: &[u8]) -> Result<(), CacheError> {
        let bytes = [Digest::of(body).as_bytes(), body].concat();
        self.write_file(&self.spread("indexes", &key.hex()), &bytes)
    }

    /// The digest that `repository:tag` had when it was last resolved.
    pub fn known_tag(&self, reference: &str) -> Result<Option<KnownTag>, CacheError> {
        let path = self.spread("tags", &Digest::of(reference.as_bytes()).hex());
        let Some(bytes) = read(&path)? else { return Ok(None) };
        let known = serde_json::from_slice::<KnownTag>(&bytes).ok();
        Ok(known.filter(|known| known.reference == reference))
    }

    /// Remembers what `repository:tag` is now.
    pub fn remember_tag(&self, reference: &str, digest: &Digest) -> Result<(), CacheError> {
        let seen = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let known = KnownTag { reference: reference.to_owned(), digest: *digest, seen };
        let path = self.spread("tags", &Digest::of(reference.as_bytes()).hex());
        let bytes = serde_json::to_vec(&known).map_err(|error| io_error("encode", &path)(io::Error::other(error)))?;
        self.write_file(&path, &bytes)
    }
}

fn read(path: &std::path::Path) -> Result<Option<Vec<u8>>, CacheError> {
    use std::io::Read as _;
    let Some(mut file) = super::open_existing(path).map_err(io_error("open", path))? else {
        return Ok(None);
    };
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(io_error("read", path))?;
    Ok(Some(bytes))
}
