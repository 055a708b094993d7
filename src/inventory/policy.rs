//! What eviction has to know: what stays, what goes late, and which small files nothing needs any more.

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use super::layers;
use super::take::{Inventory, KitState};
use crate::cache::{Cache, CacheError, LayerRecord, Policy, Protected, Small};
use crate::digest::Digest;

/// A file that no kit names may be one's that is being opened, and whose record follows. That takes seconds, and what is
/// removed too early is fetched again.
pub const SETTLED: Duration = Duration::from_secs(60);

/// What eviction has to know.
pub fn policy() -> Policy {
    Policy { protected, spare }
}

/// Before this moment, what no kit names is nobody's.
pub fn settled() -> SystemTime {
    SystemTime::now() - SETTLED
}

fn protected(cache: &Cache) -> Result<Protected, CacheError> {
    let kits = cache.kits()?;
    let served = cache.served()?;
    let now: HashSet<Digest> = served.iter().map(|served| served.now).collect();
    let before: HashSet<Digest> = served.iter().filter_map(|served| served.before).collect();
    let layers = |of: &HashSet<Digest>| {
        let wanted = kits.iter().filter(|(record, _)| of.contains(&record.digest));
        wanted.flat_map(|(record, _)| &record.layers).collect::<Vec<&LayerRecord>>()
    };
    let mut protected = Protected::default();
    let kept = kits.iter().flat_map(|(record, _)| &record.layers).filter(|layer| layer.kept);
    layers::objects(cache, kept, |object| {
        protected.never.insert(object);
    })?;
    layers::objects(cache, layers(&before), |object| {
        protected.late.insert(object);
    })?;
    if !protected.late.is_empty() {
        // What is served now too is as recent as it was read.
        layers::objects(cache, layers(&now), |object| {
            protected.late.remove(&object);
        })?;
    }
    Ok(protected)
}

/// Small files of kits of which no object is here any more, but for kits that are kept, served, or about to be filled;
/// before them what no kit names.
fn spare(cache: &Cache) -> Result<Vec<Small>, CacheError> {
    let inventory = Inventory::take(cache)?;
    let served: HashSet<Digest> = cache.served()?.into_iter().map(|served| served.now).collect();
    let loose = inventory.loose(settled()).smalls.into_iter().map(|(small, _)| small);
    let is_wanted = |kit: &KitState| {
        kit.objects > 0
            || kit.record.is_kept()
            || kit.used > settled()
            || served.contains(&kit.record.digest)
            || inventory.is_staged(kit)
    };
    let of_kits = inventory.smalls_of(|kit| !is_wanted(kit));
    Ok(loose.chain(of_kits).collect())
}
