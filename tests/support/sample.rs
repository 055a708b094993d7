//! The kit that tests of a mounted tree look at.

use super::FaultServer;
use super::kit::{KitBuilder, Served, pattern, tar};

/// When its entries were last changed.
pub const MTIME: u64 = 1_600_000_000;
/// Bytes of its big file.
pub const SIZE: usize = (3 << 20) + 777;

/// One entry of a tar, owned by 1234:2345, last changed at [`MTIME`].
fn entry(tar: &mut tar::Builder<Vec<u8>>, path: &str, mode: u32, content: Result<&[u8], &str>) {
    let mut header = tar::Header::new_ustar();
    header.set_mode(mode);
    header.set_uid(1234);
    header.set_gid(2345);
    header.set_mtime(MTIME);
    match content {
        Ok(bytes) if path.ends_with('/') => {
            header.set_entry_type(tar::EntryType::Directory);
            tar.append_data(&mut header, path, bytes).expect("an entry");
        }
        Ok(bytes) => {
            header.set_size(bytes.len() as u64);
            tar.append_data(&mut header, path, bytes).expect("an entry");
        }
        Err(target) => {
            header.set_entry_type(tar::EntryType::Symlink);
            tar.append_link(&mut header, path, target).expect("an entry");
        }
    }
}

/// A kit with a big file, a link, modes of several kinds and a document; and the big file's content.
pub fn kit(server: &FaultServer) -> (Served, Vec<u8>) {
    let bytes = pattern(7, SIZE);
    let mut model = tar::Builder::new(Vec::new());
    entry(&mut model, "w/", 0o750, Ok(b""));
    entry(&mut model, "w/a.bin", 0o640, Ok(&bytes));
    entry(&mut model, "w/b.sh", 0o700, Ok(b"#!/bin/sh\n"));
    entry(&mut model, "w/link", 0o777, Err("a.bin"));
    entry(&mut model, "w/sub/", 0o700, Ok(b""));
    entry(&mut model, "w/sub/empty", 0o600, Ok(b""));
    let kit = KitBuilder::new().tar("model", "w", model.into_inner().expect("a tar")).tar(
        "docs",
        "README.md",
        tar(&[("README.md", b"read me")]),
    );
    (kit.serve(server, "v1"), bytes)
}
