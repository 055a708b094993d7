//! What is in the cache, by kit: which objects, indexes and documents belong to which kit, what may go and what stays.
//!
//! The cache knows files by digest; which of them belong together follows from the records of kits ([`KitRecord`]
//! (crate::cache::KitRecord)) and from the indexes of their layers. Nothing is remembered here: each answer is read
//! from the disk when it is asked for.

use crate::cache::{Cache, CacheError, Policy, Protected, Small};

/// What eviction has to know.
pub fn policy() -> Policy {
    Policy { protected, spare }
}

fn protected(_cache: &Cache) -> Result<Protected, CacheError> {
    Ok(Protected::default())
}

fn spare(_cache: &Cache) -> Result<Vec<Small>, CacheError> {
    Ok(Vec::new())
}
