//! Verified random access: what a read of a kit with indexes costs on the wire, and what a false byte costs its readers.

mod support;

use std::os::unix::fs::FileExt as _;

use support::FaultServer;
use support::kit::{KitBuilder, huge_tar, pattern_at};
use support::program::Kitfs;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

#[test]
fn a_small_read_in_the_middle_of_a_cold_1_gib_file_is_one_request_of_at_most_1_mib() {
    let server = FaultServer::empty("team/big");
    let kit = KitBuilder::new().indexed().content("model", "m.bin", huge_tar("m.bin", 1, GIB)).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&kit.reference, &[]);
    assert_eq!(std::fs::metadata(mount.path("m.bin")).expect("stat").len(), GIB);
    assert_eq!(server.requests_for(kit.layers[0]), 0, "the index lists the layer without a touch");

    let file = std::fs::File::open(mount.path("m.bin")).expect("opens");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).expect("fadvise");
    let (mut found, mut expected) = (vec![0; 4096], vec![0; 4096]);
    let offset = GIB / 2 + 12_345;
    file.read_exact_at(&mut found, offset).expect("reads");
    pattern_at(1, offset, &mut expected);
    assert!(found == expected, "wrong bytes");
    let ranges = server.ranges_for(kit.layers[0]);
    let [(first, last)] = ranges[..] else { panic!("one request, not {ranges:?}") };
    assert!(last - first < MIB, "{first}-{last}");
}
