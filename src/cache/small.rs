//! Derived indexes by key, and what names led to when they were last followed: `repository:tag` to a manifest, and
//! `repository@digest type` to the referrer of that type that a rule of trust took. Such a note stands in for a registry
//! that is away, never for one that answers.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use super::map::contents;
use super::{Cache, CacheError, Small, io_error};
use crate::digest::Digest;

/// The length of the digest that a derived index stands behind.
pub(super) const DIGEST_LEN: usize = 32;

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

impl LastKnown {
    /// The file that it stands in.
    pub fn file(&self) -> Small {
        Small::Tag(Digest::of(self.reference.as_bytes()))
    }

    /// What a file says, if it is about this name.
    pub(super) fn read(bytes: &[u8], reference: &str) -> Option<Self> {
        serde_json::from_slice::<Self>(bytes).ok().filter(|known| known.reference == reference)
    }

    /// The name that a file which holds this should have.
    pub(super) fn name_of(bytes: &[u8]) -> Option<Digest> {
        let known = serde_json::from_slice::<Self>(bytes).ok()?;
        Some(Digest::of(known.reference.as_bytes()))
    }
}

/// The index in a file, if the digest before it holds.
pub(super) fn index_body(mut file: Bytes) -> Option<Bytes> {
    let body = (file.len() >= DIGEST_LEN).then(|| file.split_off(DIGEST_LEN))?;
    (*Digest::of(&body).as_bytes() == *file).then_some(body)
}

impl Cache {
    /// Whether a small file is here or in a lower cache; nothing of it is read.
    pub fn seems_to_have(&self, small: &Small) -> bool {
        let (area, name) = small.place();
        self.spread(area, &name).exists() || self.lower.iter().any(|lower| lower.path(area, &name).exists())
    }

    /// A derived index by its key, if it is here and undamaged, or in a lower cache that we may believe; a long one is mapped
    /// and not read.
    pub fn index(&self, key: &Digest) -> Result<Option<Bytes>, CacheError> {
        let path = self.spread("indexes", &key.hex());
        if let Some(bytes) = contents(&path)? {
            if let Some(body) = index_body(bytes) {
                return Ok(Some(body));
            }
            self.quarantine(&path, &"its digest does not hold")?;
        }
        Ok(self.lower.iter().find_map(|lower| lower.index(key)))
    }

    /// Keeps a derived index: the digest of the body, then the body.
    pub fn keep_index(&self, key: &Digest, body: &[u8]) -> Result<(), CacheError> {
        self.write_file(&self.spread("indexes", &key.hex()), &[Digest::of(body).as_bytes(), body])
    }

    /// What a name led to when it was last followed, by us or a lower cache, whichever was later.
    pub fn known(&self, reference: &str) -> Result<Option<LastKnown>, CacheError> {
        let path = self.spread("tags", &Digest::of(reference.as_bytes()).hex());
        let own = contents(&path)?.and_then(|bytes| LastKnown::read(&bytes, reference));
        let lower = self.lower.iter().filter_map(|lower| lower.known(reference));
        // Of the same age, the first.
        Ok(own.into_iter().chain(lower).reduce(|first, next| if next.seen > first.seen { next } else { first }))
    }

    /// Remembers what a name leads to now.
    pub fn remember(&self, reference: &str, digest: &Digest) -> Result<(), CacheError> {
        let seen = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let known = LastKnown { reference: reference.to_owned(), digest: *digest, seen };
        let path = self.spread("tags", &Digest::of(reference.as_bytes()).hex());
        let bytes = serde_json::to_vec(&known).map_err(|error| io_error("encode", &path)(io::Error::other(error)))?;
        self.write_file(&path, &[&bytes])
    }

    /// All names that are known.
    pub fn all_known(&self) -> Result<Vec<LastKnown>, CacheError> {
        let mut all = Vec::new();
        for path in self.files_of("tags")? {
            let Some(bytes) = contents(&path)? else { continue };
            all.extend(serde_json::from_slice::<LastKnown>(&bytes));
        }
        Ok(all)
    }
}
