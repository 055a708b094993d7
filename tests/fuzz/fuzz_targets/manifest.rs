//! Any bytes as a manifest or image index: no panic, and the sizes of what parsed can be added.
#![no_main]

use kitfs::digest::{Digest, Unverified};
use kitfs::modelkit::manifest::{Document, MAX_LAYERS};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let bytes = Unverified::new(data.to_vec()).verify(&Digest::of(data)).expect("its own digest");
    let Ok(Document::Manifest(manifest)) = Document::parse(&bytes) else { return };
    assert!(manifest.layers.len() <= MAX_LAYERS);
    let sizes = manifest.layers.iter().map(|layer| layer.size);
    assert!(sizes.into_iter().try_fold(0_u64, u64::checked_add).is_some());
});
