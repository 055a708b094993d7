//! Any bytes as a config: no panic, and the Kitfile made of it is always the same.
#![no_main]

use kitfs::modelkit::config::{Config, model_pack_diff_ids};
use kitfs::modelkit::kitfile::render;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = model_pack_diff_ids(data);
    let Ok(config) = Config::parse(data) else { return };
    let again = Config::parse(data).expect("parsed a moment ago");
    assert_eq!(render(&config), render(&again));
});
