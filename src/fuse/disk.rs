//! Bytes of a file on the local disk, for a read's reply.
//!
//! - What is in the page cache is answered where the request is: `preadv2` with `RWF_NOWAIT` never waits for the disk.
//! - The rest is read on the blocking pool, at most `READS` at once, so memory is bounded whatever the load.
//! - Buffers are reused, last in, first out: fresh memory for each read cost a quarter of the throughput.

use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::ReadWriteFlags;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::fetch::chunks::Piece;

/// The largest read that the kernel is told to send; see `max_write` in `init`.
pub(super) const MAX_READ: u32 = 1 << 20;
/// Reads that may wait for the disk at once, and buffers that are kept: 32 MiB in all.
const READS: usize = 32;

pub(super) struct Disk {
    runtime: Handle,
    permits: Arc<Semaphore>,
    // A mutex, as it is held for a push or a pop.
    buffers: Mutex<Vec<Vec<u8>>>,
}

impl Disk {
    pub(super) fn new(runtime: Handle) -> Arc<Self> {
        Arc::new(Self { runtime, permits: Arc::new(Semaphore::new(READS)), buffers: Mutex::default() })
    }

    /// Reads `len` bytes at `offset` and hands them to `reply`, all of them or an error.
    pub(super) fn read(
        self: &Arc<Self>,
        file: Arc<File>,
        offset: u64,
        len: usize,
        reply: impl FnOnce(io::Result<&[u8]>) + Send + 'static,
    ) {
        let mut buffer = self.buffer(len);
        if read_resident(&file, offset, &mut buffer) {
            return reply(Ok(&buffer));
        }
        drop(buffer);
        self.off_thread(move |disk| {
            let mut buffer = disk.buffer(len);
            let outcome = file.read_exact_at(&mut buffer, offset);
            reply(outcome.map(|()| &*buffer));
        });
    }

    /// Hands the bytes of all pieces, one after the other, to `reply`.
    pub(super) fn gather(self: &Arc<Self>, pieces: Vec<Piece>, reply: impl FnOnce(io::Result<&[u8]>) + Send + 'static) {
        match &pieces[..] {
            [Piece::Memory(bytes)] => return reply(Ok(bytes.bytes())),
            [Piece::File(range)] => {
                return self.read(Arc::clone(range.file()), range.offset(), range.len() as usize, reply);
            }
            _ => {}
        }
        self.off_thread(move |disk| {
            let mut buffer = disk.buffer(pieces.iter().map(length).sum());
            let outcome = fill(&mut buffer, &pieces);
            reply(outcome.map(|()| &*buffer));
        });
    }

    /// Runs work that may wait for the disk, when it is its turn.
    fn off_thread(self: &Arc<Self>, work: impl FnOnce(&Arc<Self>) + Send + 'static) {
        let disk = Arc::clone(self);
        self.runtime.spawn(async move {
            let Ok(permit) = Arc::clone(&disk.permits).acquire_owned().await else {
                return; // The semaphore is never closed; and a dropped reply answers EIO.
            };
            disk.runtime.clone().spawn_blocking(move || {
                work(&disk);
                drop(permit);
            });
        });
    }

    fn buffer(self: &Arc<Self>, len: usize) -> Buffer {
        let mut bytes = self.buffers.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        // Always the whole of it, so that a reused buffer is never cleared again; untouched pages cost nothing.
        let size = len.max(MAX_READ as usize);
        if bytes.len() < size {
            bytes = vec![0; size];
        }
        Buffer { disk: Arc::clone(self), bytes, len }
    }
}

fn length(piece: &Piece) -> usize {
    match piece {
        Piece::Memory(bytes) => bytes.bytes().len(),
        Piece::File(range) => range.len() as usize,
    }
}

/// Fills `buffer`, which is as long as all pieces together.
fn fill(mut buffer: &mut [u8], pieces: &[Piece]) -> io::Result<()> {
    for piece in pieces {
        let (part, rest) = buffer.split_at_mut(length(piece));
        match piece {
            Piece::Memory(bytes) => part.copy_from_slice(bytes.bytes()),
            Piece::File(range) => range.file().read_exact_at(part, range.offset())?,
        }
        buffer = rest;
    }
    Ok(())
}

/// Fills `buffer` from the page cache, or says that it could not do so without waiting.
fn read_resident(file: &File, offset: u64, buffer: &mut [u8]) -> bool {
    let mut done = 0;
    while done < buffer.len() {
        let rest = io::IoSliceMut::new(&mut buffer[done..]);
        match rustix::io::preadv2(file, &mut [rest], offset + done as u64, ReadWriteFlags::NOWAIT) {
            Ok(count) if count > 0 => done += count,
            Err(rustix::io::Errno::INTR) => {}
            // Not resident, not supported here, at the end, or broken: the plain read will tell.
            Ok(_) | Err(_) => return false,
        }
    }
    true
}

/// A buffer of the pool; it goes back when it is dropped.
struct Buffer {
    disk: Arc<Disk>,
    bytes: Vec<u8>,
    len: usize,
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut buffers = self.disk.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        if buffers.len() < READS {
            buffers.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::sync::mpsc;
    use std::time::Duration;

    fn read(offset: u64, len: usize) -> Result<Vec<u8>, io::ErrorKind> {
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        let mut file = tempfile::tempfile().expect("file");
        file.write_all(b"0123456789").expect("write");
        let (sender, receiver) = mpsc::channel();
        Disk::new(runtime.handle().clone()).read(Arc::new(file), offset, len, move |outcome| {
            sender.send(outcome.map(<[u8]>::to_vec).map_err(|cause| cause.kind())).expect("send");
        });
        receiver.recv_timeout(Duration::from_secs(10)).expect("an answer")
    }

    #[test]
    fn a_range_is_read_in_full() {
        assert_eq!(read(2, 5), Ok(b"23456".to_vec()));
        assert_eq!(read(0, 10), Ok(b"0123456789".to_vec()));
        assert_eq!(read(10, 0), Ok(Vec::new()));
    }

    #[test]
    fn a_file_that_is_too_short_is_an_error_and_not_a_short_read() {
        assert_eq!(read(5, 6), Err(io::ErrorKind::UnexpectedEof));
    }

    #[test]
    fn buffers_are_reused() {
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        let disk = Disk::new(runtime.handle().clone());
        let first = disk.buffer(10).as_ptr();
        assert_eq!(first, disk.buffer(MAX_READ as usize).as_ptr());
    }
}
