//! The ways in which programs read files.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::OFlags;

/// Opens a file with `O_DIRECT`.
pub fn open_directly(path: &Path) -> File {
    let flags = OFlags::DIRECT.bits().cast_signed();
    OpenOptions::new().read(true).custom_flags(flags).open(path).expect("opens")
}

/// Part of a file that is open with `O_DIRECT`, as the disks of what passes through want it: whole blocks, into aligned
/// memory.
pub fn part_directly(file: &File, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
    const BLOCK: u64 = 4096;
    let start = offset / BLOCK * BLOCK;
    let end = (offset + len as u64).next_multiple_of(BLOCK);
    let mut blocks = memmap2::MmapMut::map_anon((end - start) as usize)?;
    let (skipped, mut count) = ((offset - start) as usize, 0);
    while count < skipped + len {
        match file.read_at(&mut blocks[count..], start + count as u64)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            more => count += more,
        }
    }
    Ok(blocks[skipped..skipped + len].to_vec())
}

/// With `O_DIRECT`: block by block, at aligned offsets, into aligned memory.
pub fn directly(path: &Path) -> Vec<u8> {
    let file = open_directly(path);
    let mut buffer = memmap2::MmapMut::map_anon(256 << 10).expect("aligned memory");
    let mut all = Vec::new();
    loop {
        let count = file.read_at(&mut buffer, all.len() as u64).expect("reads");
        all.extend_from_slice(&buffer[..count]);
        if count < buffer.len() {
            return all;
        }
    }
}

/// A map of a file of a mount.
#[expect(unsafe_code, reason = "memory maps are what is tested; the file can't be truncated, it is read-only")]
pub fn map(file: &File) -> std::io::Result<memmap2::Mmap> {
    // SAFETY: the file system is read-only, so nobody changes the mapped bytes.
    unsafe { memmap2::Mmap::map(file) }
}

/// Through a map.
pub fn mapped(path: &Path) -> Vec<u8> {
    map(&File::open(path).expect("opens")).expect("maps").to_vec()
}

/// Through `sendfile`, into a file.
pub fn sent(path: &Path, to: &Path) -> Vec<u8> {
    let (from, into) = (File::open(path).expect("opens"), File::create(to).expect("creates"));
    while rustix::fs::sendfile(&into, &from, None, 1 << 20).expect("sends") > 0 {}
    fs::read(to).expect("reads")
}
