//! Bytes of a file on the local disk, for a read's reply.
//!
//! - What is in the page cache is answered where the request is: `preadv2` with `RWF_NOWAIT` never waits for the disk.
//! - The rest is read on the blocking pool, as many at once as the budget has buffers for replies.
//! - A buffer is held for one read and one answer, and who waits for one holds none.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use rustix::io::ReadWriteFlags;
use tokio::runtime::Handle;

use crate::fetch::chunks::Piece;
use crate::fetch::memory::{BUFFER, Buffers, Place};

/// The largest read that the kernel is told to send; see `max_write` in `init`.
pub(super) const MAX_READ: u32 = BUFFER as u32;

pub(super) struct Disk {
    runtime: Handle,
    buffers: Arc<Buffers>,
}

impl Disk {
    pub(super) fn new(runtime: Handle, buffers: Arc<Buffers>) -> Arc<Self> {
        Arc::new(Self { runtime, buffers })
    }

    /// Reads `len` bytes at `offset` and hands them to `reply`, all of them or an error.
    pub(super) fn read(
        self: &Arc<Self>,
        file: Arc<File>,
        offset: u64,
        len: usize,
        reply: impl FnOnce(io::Result<&[u8]>) + Send + 'static,
    ) {
        if let Some(place) = self.buffers.place_now()
            && let Some(buffer) = place.buffer().first(len)
            && read_resident(&file, offset, buffer)
        {
            return reply(Ok(buffer));
        }
        self.off_thread(len, move |buffer| file.read_exact_at(buffer, offset), reply);
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
        self.off_thread(pieces.iter().map(length).sum(), move |buffer| fill(buffer, &pieces), reply);
    }

    /// Fills `len` bytes, which may wait for the disk, when there is a buffer for them.
    fn off_thread(
        self: &Arc<Self>,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> io::Result<()> + Send + 'static,
        reply: impl FnOnce(io::Result<&[u8]>) + Send + 'static,
    ) {
        let disk = Arc::clone(self);
        self.runtime.spawn(async move {
            let place = disk.buffers.place().await;
            disk.runtime.spawn_blocking(move || reply_from(&place, len, fill, reply));
        });
    }
}

/// Fills `len` bytes of a buffer and hands them to `reply`.
fn reply_from(
    place: &Place,
    len: usize,
    fill: impl FnOnce(&mut [u8]) -> io::Result<()>,
    reply: impl FnOnce(io::Result<&[u8]>),
) {
    let mut buffer = place.buffer();
    // The kernel was told so; what it asks for beyond is refused and not cut short.
    let too_long = || io::Error::new(io::ErrorKind::InvalidInput, format!("a read of {len} bytes at once"));
    let outcome = buffer.first(len).ok_or_else(too_long).and_then(|bytes| fill(bytes).map(|()| &*bytes));
    reply(outcome);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::memory::Memory;
    use std::io::Write as _;
    use std::sync::mpsc;
    use std::time::Duration;

    fn read(offset: u64, len: usize) -> Result<Vec<u8>, io::ErrorKind> {
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        let mut file = tempfile::tempfile().expect("file");
        file.write_all(b"0123456789").expect("write");
        let (sender, receiver) = mpsc::channel();
        let memory = Memory::new(32 << 20);
        let disk = Disk::new(runtime.handle().clone(), memory.replies().clone());
        disk.read(Arc::new(file), offset, len, move |outcome| {
            sender.send(outcome.map(<[u8]>::to_vec).map_err(|cause| cause.kind())).expect("send");
        });
        let answer = receiver.recv_timeout(Duration::from_secs(10)).expect("an answer");
        assert!(memory.replies().place_now().is_some());
        answer
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
    fn more_than_a_buffer_holds_is_refused_and_not_cut_short() {
        assert_eq!(read(0, BUFFER + 1), Err(io::ErrorKind::InvalidInput));
    }

    #[test]
    fn a_read_that_finds_no_buffer_waits_for_one() {
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        let memory = Memory::new(32 << 20);
        let mut places: Vec<_> = std::iter::from_fn(|| memory.replies().place_now()).collect();
        let mut file = tempfile::tempfile().expect("file");
        file.write_all(b"0123456789").expect("write");
        let (sender, receiver) = mpsc::channel();
        let disk = Disk::new(runtime.handle().clone(), memory.replies().clone());
        disk.read(Arc::new(file), 3, 2, move |outcome| {
            sender.send(outcome.map(<[u8]>::to_vec).map_err(|cause| cause.kind())).expect("send");
        });
        assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err());
        places.pop();
        assert_eq!(receiver.recv_timeout(Duration::from_secs(10)).expect("an answer"), Ok(b"34".to_vec()));
    }
}
