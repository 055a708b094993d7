//! A blob's bytes on their way to a target: counted and hashed, so that a wrong source is blamed and not the target.
//!
//! The last bytes are passed on only after the digest held. Who never sees the end of a blob keeps none of it. Bytes are
//! hashed on a thread of their own, behind those that are on their way, so that the threads of the runtime are free.

use std::pin::Pin;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::digest::{Digest, Mismatch, StreamHasher};
use crate::source::{BlobId, ByteStream, SourceError};

/// Pieces that wait to be hashed. The network gives them in 16 to 64 KiB, a disk in 1 MiB: 16 MiB at most.
const QUEUE: usize = 16;

/// A blob's bytes that ends with an error unless they are the blob.
pub(super) type Checked = Pin<Box<dyn Stream<Item = Result<Bytes, SourceError>> + Send>>;

/// Checks `bytes` against the blob that they shall be. Errors name `target`.
pub(super) fn checked(bytes: ByteStream, blob: &BlobId, target: &str) -> Checked {
    let check = Check { bytes, blob: *blob, seen: 0, hashing: Some(Hashing::begin()), target: target.to_owned() };
    Box::pin(stream::try_unfold(check, Check::next))
}

struct Check {
    bytes: ByteStream,
    blob: BlobId,
    seen: u64,
    /// Taken when the digest has held.
    hashing: Option<Hashing>,
    target: String,
}

impl Check {
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, SourceError> {
        while let Some(piece) = self.bytes.next().await {
            let piece = piece?.peek().clone();
            if piece.is_empty() {
                continue;
            }
            self.seen += piece.len() as u64;
            if self.seen > self.blob.size {
                return Err(self.wrong(format!("are more than the {} bytes of its descriptor", self.blob.size)));
            }
            if let Some(hashing) = &self.hashing {
                hashing.update(piece.clone()).await;
            }
            if self.seen == self.blob.size {
                self.prove().await?;
            }
            return Ok(Some((piece, self)));
        }
        if self.seen < self.blob.size {
            return Err(self.wrong(format!("ended after {} of {}", self.seen, self.blob.size)));
        }
        self.prove().await?;
        Ok(None)
    }

    async fn prove(&mut self) -> Result<(), SourceError> {
        let Some(hashing) = self.hashing.take() else { return Ok(()) };
        let expected = self.blob.digest;
        match hashing.digest().await {
            Some(found) if found == expected => Ok(()),
            Some(found) => {
                Err(SourceError::Damaged { target: self.target.clone(), cause: Box::new(Mismatch { expected, found }) })
            }
            None => Err(self.wrong("could not be hashed, as kitfs is being ended".to_owned())),
        }
    }

    fn wrong(&self, problem: String) -> SourceError {
        let what = format!("the bytes to write as blob {} {problem}; nothing was written", self.blob.digest);
        SourceError::Protocol { source_name: self.target.clone(), what }
    }
}

/// A thread that hashes what it is sent, and ends with who sends it.
struct Hashing {
    pieces: mpsc::Sender<Bytes>,
    thread: JoinHandle<Digest>,
}

impl Hashing {
    fn begin() -> Self {
        let (pieces, mut queue) = mpsc::channel::<Bytes>(QUEUE);
        let thread = tokio::task::spawn_blocking(move || {
            let mut hasher = StreamHasher::new();
            while let Some(piece) = queue.blocking_recv() {
                hasher.update(&piece);
            }
            hasher.digest()
        });
        Self { pieces, thread }
    }

    async fn update(&self, piece: Bytes) {
        // A thread that is gone has no digest to tell either.
        let _ = self.pieces.send(piece).await;
    }

    /// The digest of all that was sent.
    async fn digest(self) -> Option<Digest> {
        drop(self.pieces);
        self.thread.await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Unverified;

    async fn check(pieces: &[&'static str], size: u64, of: &str) -> (Vec<u8>, Option<String>) {
        let pieces: Vec<_> = pieces.iter().map(|piece| Ok(Unverified::new(piece.as_bytes()))).collect();
        let blob = BlobId { digest: Digest::of(of.as_bytes()), size };
        let mut stream = checked(Box::pin(stream::iter(pieces)), &blob, "there");
        let mut passed = Vec::new();
        while let Some(piece) = stream.next().await {
            match piece {
                Ok(piece) => passed.extend_from_slice(&piece),
                Err(error) => return (passed, Some(error.to_string())),
            }
        }
        (passed, None)
    }

    #[tokio::test]
    async fn the_end_of_a_blob_is_passed_on_only_if_it_is_the_blob() {
        assert_eq!(check(&["ab", "", "c"], 3, "abc").await, (b"abc".to_vec(), None));
        assert_eq!(check(&[], 0, "").await, (Vec::new(), None));
        for (pieces, size, problem) in [
            (&["ab", "x"][..], 3, "have the digest"),
            (&["ab"], 3, "ended after 2 of 3"),
            (&["ab", "cd"], 3, "more than the 3 bytes"),
        ] {
            let (passed, error) = check(pieces, size, "abc").await;
            assert_eq!(passed, b"ab"[..passed.len()]);
            assert!(passed.len() < 3, "{passed:?}");
            assert!(error.expect("an error").contains(problem), "{problem}");
        }
        assert!(check(&[], 0, "abc").await.1.expect("an error").contains("have the digest"));
    }
}
