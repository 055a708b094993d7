//! One pass over a layer's bytes, in order: layer digest ∥ inflate → walk → chunk digests → index; and, where there is a
//! staging directory, the files.
//!
//! Two blocking threads take the same bytes: one hashes the blob, one cuts it into files ([`super::cut`]). Where the digest
//! fails, that is the error that is told, not what the damage did to the archive.
//!
//! What was staged stays for the next pass where only the source has failed ([`super::replay`]).

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use tokio::sync::mpsc;

use super::FetchError;
use super::cut::{Cut, CutError, Cutter, Files, Staged, Stopped};
use crate::archive::index::Index;
use crate::cache::Staging;
use crate::digest::{Mismatch, Proof, StreamHasher, Unverified};
use crate::modelkit::Layer;

/// Pieces in flight to each thread. The network gives them in 16 to 64 KiB, 4 MiB in all; a disk in 1 MiB, 64 MiB in all.
const QUEUE: usize = 64;

/// The bytes of a blob in order.
pub type Ordered = BoxStream<'static, Result<Unverified, FetchError>>;

/// What a pass found.
#[derive(Debug)]
pub struct Passed {
    /// What the layer holds.
    pub index: Index,
    /// That its digest held.
    pub proof: Proof,
    /// What became of its files.
    pub staged: Staged,
}

/// What a pass ended with, other than success.
#[derive(Debug)]
pub enum Failure {
    /// The bytes are not the layer's; and what they hold, where that is anything.
    False(Mismatch, Option<Box<Index>>),
    /// Anything else.
    Error(FetchError),
}

impl From<FetchError> for Failure {
    fn from(error: FetchError) -> Self {
        Self::Error(error)
    }
}

/// Reads a layer. `max_inflated` as in [`super::Limits`].
pub async fn pass(
    layer: &Layer,
    max_inflated: Option<u64>,
    bytes: Ordered,
    files: Option<Files>,
) -> Result<Passed, Failure> {
    let lost = || FetchError::Lost { what: format!("layer {}", layer.digest) };
    let (to_hash, mut hash_queue) = mpsc::channel::<Bytes>(QUEUE);
    let hasher = tokio::task::spawn_blocking(move || {
        let mut hasher = StreamHasher::new();
        while let Some(bytes) = hash_queue.blocking_recv() {
            hasher.update(&bytes);
        }
        hasher
    });
    let (to_cut, mut cut_queue) = mpsc::channel::<Bytes>(QUEUE);
    let mut cutter = Cutter::new(layer.clone(), max_inflated, files).map_err(|error| error.into_fetch_error(layer))?;
    let mut cutting = tokio::task::spawn_blocking(move || {
        while let Some(bytes) = cut_queue.blocking_recv() {
            if let Err(error) = cutter.feed(&bytes) {
                return Err(cutter.stop(error));
            }
        }
        cutter.finish()
    });

    let mut feeding = std::pin::pin!(feed(layer, bytes, to_hash, to_cut));
    // The cutter is waited for in any case: what it still has to do must not reach into the pass that comes next.
    let (fed, cut) = tokio::select! {
        biased;
        fed = &mut feeding => (fed, cutting.await),
        cut = &mut cutting => match cut {
            // What can't be staged need not be fetched.
            Ok(Err(stopped)) if matches!(stopped.error, CutError::Cache(_)) => {
                let Stopped { error, staging } = *stopped;
                let_go(staging, false).await;
                return Err(error.into_fetch_error(layer).into());
            }
            // It stops at a broken archive too; whether the bytes were the layer's at all is still to be told.
            cut => (feeding.await, cut),
        },
    };
    let proof = match fed {
        Ok(()) => {
            hasher.await.map_err(|_| lost())?.finish(&layer.digest).map_err(|mismatch| Failure::False(mismatch, None))
        }
        Err(error) => Err(error.into()),
    };
    match (proof, cut) {
        (Ok(proof), Ok(Ok(cut))) => {
            let Cut { index, staged, .. } = cut.checked(layer);
            Ok(Passed { index, proof, staged })
        }
        (Ok(_), Ok(Err(stopped))) => {
            let Stopped { error, staging } = *stopped;
            let_go(staging, false).await;
            Err(error.into_fetch_error(layer).into())
        }
        (Ok(_), Err(_)) => Err(lost().into()),
        (Err(failure), cut) => {
            let (held, staging) = match cut {
                Ok(Ok(cut)) => (Some(Box::new(cut.index)), cut.staged.into_staging()),
                Ok(Err(stopped)) => (None, stopped.staging),
                Err(_) => (None, None),
            };
            // Bytes that the source gave before it failed are as good as any.
            let is_sound = matches!(&failure, Failure::Error(error) if !matches!(error, FetchError::Cache(_)));
            let_go(staging, is_sound).await;
            Err(match failure {
                Failure::False(mismatch, _) => Failure::False(mismatch, held),
                error @ Failure::Error(_) => error,
            })
        }
    }
}

/// Lets staging go, on a thread that may wait for the disk; what is sound in it, another pass may go on from.
async fn let_go(staging: Option<Staging>, is_sound: bool) {
    let let_go = move || match staging {
        Some(staging) if !is_sound => staging.discard(),
        _ => {}
    };
    // It is over in any case.
    let _ = tokio::task::spawn_blocking(let_go).await;
}

/// Hands the layer's bytes to both threads as they arrive.
async fn feed(
    layer: &Layer,
    mut bytes: Ordered,
    to_hash: mpsc::Sender<Bytes>,
    to_cut: mpsc::Sender<Bytes>,
) -> Result<(), FetchError> {
    while let Some(piece) = bytes.next().await {
        let piece = piece?.peek().clone();
        let lost = |_| FetchError::Lost { what: format!("layer {}", layer.digest) };
        to_hash.send(piece.clone()).await.map_err(lost)?;
        // A cutter that has stopped is not fed any more.
        let _ = to_cut.send(piece).await;
    }
    Ok(())
}
