//! Derived indexes by key, and what names led to when they were last followed: `repository:tag` to a manifest, and
//! `repository@digest type` to the referrer of that type that a rule of trust took. Such a note stands in for a registry
//! that is away, never for one that answers.

use std::fs;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use super::map::contents;
use super::{Cache, CacheError, io_error};
use crate::digest::Digest;

/// The length of the digest that a derived index stands behind.
const DIGEST_LEN: usize = 32;

/// What a name led to when it was last followed.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LastKnown {
    /// The name, so that the file says so too.
    pub reference: String,
    /// The digest of the manifest, or of the referrer.
    pub digest: Digest,
    /// Seconds since the epoch at which the registry said so.
    pub seen: u64,
}

impl Cache {
    /// A derived index by its key, if it is here and undamaged; a long one is mapped and not read.
    pub fn index(&self, key: &Digest) -> Result<Option<Bytes>, CacheError> {
        let path = self.spread("indexes", &key.hex());
        let Some(mut bytes) = contents(&path)? else { return Ok(None) };
        if bytes.len() >= DIGEST_LEN {
            let body = bytes.split_off(DIGEST_LEN);
            if *Digest::of(&body).as_bytes() == *bytes {
                return Ok(Some(body));
            }
        }
        tracing::warn!(path = %path.display(), "cache: damaged index removed");
        fs::remove_file(&path).map_err(io_error("remove", &path))?;
        Ok(None)
    }

    /// Keeps a derived index: the digest of the body, then the body.
    pub fn keep_index(&self, key: &Digest, body: &[u8]) -> Result<(), CacheError> {
        self.write_file(&self.spread("indexes", &key.hex()), &[Digest::of(body).as_bytes(), body])
    }

    /// What a name led to when it was last followed.
    pub fn known(&self, reference: &str) -> Result<Option<LastKnown>, CacheError> {
        let path = self.spread("tags", &Digest::of(reference.as_bytes()).hex());
        let Some(bytes) = contents(&path)? else { return Ok(None) };
        let known = serde_json::from_slice::<LastKnown>(&bytes).ok();
        Ok(known.filter(|known| known.reference == reference))
    }

    /// Remembers what a name leads to now.
    pub fn remember(&self, reference: &str, digest: &Digest) -> Result<(), CacheError> {
        let seen = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let known = LastKnown { reference: reference.to_owned(), digest: *digest, seen };
        let path = self.spread("tags", &Digest::of(reference.as_bytes()).hex());
        let bytes = serde_json::to_vec(&known).map_err(|error| io_error("encode", &path)(io::Error::other(error)))?;
        self.write_file(&path, &[&bytes])
    }
}
