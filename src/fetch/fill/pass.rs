//! One pass over a layer's bytes, in order: layer digest ∥ inflate → walk → chunk digests → index; and, where there is a
//! staging directory, the files.
//!
//! Each step has a thread of its own, and what is slowest sets the pace: one hashes the blob, one inflates it if it is
//! compressed, one cuts it into files and hashes their chunks ([`super::cut`]), one writes them ([`super::stage`]). Bytes
//! are handed from one to the next as they came, none is copied. Where the digest fails, that is the error that is told,
//! not what the damage did to the archive.
//!
//! What was staged stays for the next pass where only the source has failed ([`super::replay`]).

use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};

use super::cut::{Cut, CutError, Cutter};
use super::stage::{Batch, Files, Stager};
use crate::archive::index::Index;
use crate::archive::inflate::{self, Inflater};
use crate::cache::{CacheError, StagedNumber, Staging};
use crate::digest::{Mismatch, Proof, StreamHasher};
use crate::fetch::FetchError;
use crate::fetch::transfer::ordered::Ordered;
use crate::modelkit::{Compression, Layer};
use crate::object::ObjectDigest;

/// Pieces in flight between two threads. The network gives them in 16 to 400 KiB, a disk in 1 MiB, so that no more than
/// 16 MiB wait for each.
const QUEUE: usize = 16;

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

/// What became of a layer's files.
#[derive(Debug)]
pub enum Staged {
    /// There was no place for them.
    Nowhere,
    /// They are all staged.
    All {
        /// Where.
        staging: Staging,
        /// What they hold.
        files: Vec<(StagedNumber, ObjectDigest)>,
    },
    /// There was no room for them.
    NoRoom {
        /// Empty; its lock tells others that somebody is at it.
        staging: Staging,
        /// Why.
        why: CacheError,
    },
}

impl Staged {
    fn new(staged: Option<(Files, Vec<StagedNumber>)>, objects: Vec<ObjectDigest>) -> Self {
        match staged {
            None => Self::Nowhere,
            Some((Files { staging, no_room: Some(why), .. }, _)) => Self::NoRoom { staging, why },
            Some((Files { staging, .. }, numbers)) => {
                Self::All { staging, files: numbers.into_iter().zip(objects).collect() }
            }
        }
    }
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

/// Reads a layer. `max_inflated` as in [`crate::fetch::Limits`].
pub async fn pass(
    layer: &Layer,
    max_inflated: Option<u64>,
    bytes: Ordered,
    files: Option<Files>,
) -> Result<Passed, Failure> {
    let lost = || FetchError::Lost { what: format!("layer {}", layer.digest) };
    let (to_hash, mut hash_queue) = mpsc::channel::<Bytes>(QUEUE);
    let hasher = spawn_blocking(move || {
        let mut hasher = StreamHasher::new();
        while let Some(bytes) = hash_queue.blocking_recv() {
            hasher.update(&bytes);
        }
        hasher
    });
    let (to_cut, cut_queue) = mpsc::channel::<Bytes>(QUEUE);
    let mut cutting = std::pin::pin!(Line::start(layer, max_inflated, cut_queue, files).end());
    let mut feeding = std::pin::pin!(feed(layer, bytes, to_hash, to_cut));
    // The cutting is waited for in any case: what it still has to do must not reach into the pass that comes next.
    let (fed, Ended { cut, staged }) = tokio::select! {
        biased;
        fed = &mut feeding => (fed, cutting.await),
        ended = &mut cutting => match ended {
            // What can't be staged need not be fetched.
            Ended { cut: Err(error @ CutError::Cache(_)), staged } => {
                let_go(staged, false).await;
                return Err(error.into_fetch_error(layer).into());
            }
            // It stops at a broken archive too; whether the bytes were the layer's at all is still to be told.
            ended => (feeding.await, ended),
        },
    };
    let proof = match fed {
        Ok(()) => {
            hasher.await.map_err(|_| lost())?.finish(&layer.digest).map_err(|mismatch| Failure::False(mismatch, None))
        }
        Err(error) => Err(error.into()),
    };
    match (proof, cut) {
        (Ok(proof), Ok(cut)) => {
            cut.tell(layer);
            Ok(Passed { index: cut.index, proof, staged: Staged::new(staged, cut.objects) })
        }
        (Ok(_), Err(error)) => {
            let_go(staged, false).await;
            Err(error.into_fetch_error(layer).into())
        }
        (Err(failure), cut) => {
            // Bytes that the source gave before it failed are as good as any.
            let is_sound = matches!(&failure, Failure::Error(error) if !matches!(error, FetchError::Cache(_)));
            let_go(staged, is_sound).await;
            Err(match failure {
                Failure::False(mismatch, _) => Failure::False(mismatch, cut.ok().map(|cut| Box::new(cut.index))),
                error @ Failure::Error(_) => error,
            })
        }
    }
}

/// The threads that cut a layer into files, one after the other.
struct Line {
    /// Gives up when the next one takes nothing any more.
    inflating: Option<JoinHandle<Result<(), CutError>>>,
    cutting: JoinHandle<Result<Option<Cut>, CutError>>,
    staging: Option<JoinHandle<(Result<(), CacheError>, Stager)>>,
}

/// What they came to.
struct Ended {
    cut: Result<Cut, CutError>,
    staged: Option<(Files, Vec<StagedNumber>)>,
}

impl Line {
    fn start(layer: &Layer, max_inflated: Option<u64>, mut blob: mpsc::Receiver<Bytes>, files: Option<Files>) -> Self {
        let is_plain = layer.compression == Compression::None;
        let (to_stage, mut batches) = mpsc::channel::<Batch>(QUEUE);
        let to_stage = files.is_some().then_some(to_stage);
        let staging = files.map(|files| {
            spawn_blocking(move || {
                let mut stager = Stager::new(files, is_plain);
                while let Some(batch) = batches.blocking_recv() {
                    if let Err(error) = stager.take(batch) {
                        return (Err(error), stager);
                    }
                }
                (Ok(()), stager)
            })
        });
        let mut inflating = None;
        if !is_plain {
            let (to_cut, inflated) = mpsc::channel::<Bytes>(QUEUE);
            let compressed = std::mem::replace(&mut blob, inflated);
            let (layer, to_stage) = (layer.clone(), to_stage.clone());
            inflating =
                Some(spawn_blocking(move || inflate(&layer, max_inflated, compressed, &to_cut, to_stage.as_ref())));
        }
        let mut cutter = Cutter::new(layer.clone());
        let cutting = spawn_blocking(move || {
            let stage = |batch| to_stage.as_ref().is_none_or(|to_stage| to_stage.blocking_send(batch).is_ok());
            while let Some(bytes) = blob.blocking_recv() {
                if !stage(cutter.feed(&bytes)?) {
                    return Ok(None);
                }
            }
            let (last, cut) = cutter.finish()?;
            Ok(stage(last).then_some(cut))
        });
        Self { inflating, cutting, staging }
    }

    /// Waits for all of them.
    async fn end(self) -> Ended {
        let inflated = match self.inflating {
            Some(inflating) => inflating.await.unwrap_or(Err(CutError::Lost)),
            None => Ok(()),
        };
        let cut = self.cutting.await.unwrap_or(Err(CutError::Lost));
        let (written, staged) = match self.staging {
            Some(staging) => match staging.await {
                Ok((written, stager)) => (written.map_err(CutError::from), Some(stager.finish())),
                Err(_) => (Err(CutError::Lost), None),
            },
            None => (Ok(()), None),
        };
        // The one that stopped first is to be told; those before and behind it have stopped for its sake.
        let cut = written.and(inflated).and(cut).and_then(|cut| cut.ok_or(CutError::Lost));
        Ended { cut, staged }
    }
}

/// Inflates a blob for who cuts it. Blocks.
fn inflate(
    layer: &Layer,
    max_inflated: Option<u64>,
    mut blob: mpsc::Receiver<Bytes>,
    to_cut: &mpsc::Sender<Bytes>,
    to_stage: Option<&mpsc::Sender<Batch>>,
) -> Result<(), CutError> {
    /// Why it ends.
    enum Stop {
        /// Nobody takes what comes out.
        Unwanted,
        Broken(CutError),
    }
    impl From<inflate::InflateError> for Stop {
        fn from(error: inflate::InflateError) -> Self {
            Self::Broken(error.into())
        }
    }
    let bound = max_inflated.unwrap_or_else(|| inflate::max_inflated(layer.size));
    let mut inflater = Inflater::new(layer.compression, bound)?;
    while let Some(bytes) = blob.blocking_recv() {
        if to_stage.is_some_and(|to_stage| to_stage.blocking_send(Batch::blob(bytes.clone())).is_err()) {
            return Ok(());
        }
        let fed = inflater.feed(&bytes, &mut |bytes: &[u8]| {
            to_cut.blocking_send(Bytes::copy_from_slice(bytes)).map_err(|_| Stop::Unwanted)
        });
        match fed {
            Ok(()) => {}
            Err(Stop::Unwanted) => return Ok(()),
            Err(Stop::Broken(error)) => return Err(error),
        }
    }
    inflater.finish()?;
    Ok(())
}

/// Lets staging go, on a thread that may wait for the disk; what is sound in it, another pass may go on from.
async fn let_go(staged: Option<(Files, Vec<StagedNumber>)>, is_sound: bool) {
    let let_go = move || match staged {
        Some((files, _)) if !is_sound => files.staging.discard(),
        _ => {}
    };
    // It is over in any case.
    let _ = spawn_blocking(let_go).await;
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
