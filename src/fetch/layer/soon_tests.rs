use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use futures_util::StreamExt as _;

use super::*;
use crate::cache::Cache;
use crate::digest::{Digest, Unverified};
use crate::fetch::{Context, Limits};
use crate::modelkit::{Format, Layer, testing};
use crate::source::{BlobId, ByteStream, Source, SourceError};

const MIB: u64 = 1 << 20;

/// A source of one blob, which sends a MiB at a time.
#[derive(Debug)]
struct Wire {
    bytes: Vec<u8>,
    /// Before each MiB.
    pause: Duration,
    /// Sends nothing from this byte of the blob on.
    stops_at: u64,
    /// Sends nothing for half a second before this MiB of the blob.
    rests_at: u64,
    asked: AtomicUsize,
}

impl Wire {
    fn unused<T>() -> Result<T, SourceError> {
        Err(SourceError::NotFound { what: "anything but the blob".to_owned(), source_name: "the test".to_owned() })
    }
}

#[async_trait]
impl Source for Wire {
    fn name(&self) -> String {
        "the test".to_owned()
    }

    async fn resolve(&self, _: &str) -> Result<Digest, SourceError> {
        Self::unused()
    }

    async fn manifest(&self, _: &Digest) -> Result<Unverified, SourceError> {
        Self::unused()
    }

    async fn blob(&self, _: &BlobId, range: Range<u64>) -> Result<ByteStream, SourceError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let (pause, stops_at, rests_at) = (self.pause, self.stops_at, self.rests_at);
        let starts = (range.start..range.end).step_by(MIB as usize);
        let pieces =
            starts.map(|start| (start, self.bytes[start as usize..range.end.min(start + MIB) as usize].to_vec()));
        let sent = futures_util::stream::iter(pieces.collect::<Vec<_>>()).then(move |(start, piece)| async move {
            if start >= stops_at {
                std::future::pending::<()>().await;
            }
            sleep(if start == rests_at { 2 * LOOK } else { pause }).await;
            Ok(Unverified::new(piece))
        });
        Ok(Box::pin(sent))
    }

    async fn tags(&self) -> Result<Vec<String>, SourceError> {
        Self::unused()
    }

    async fn referrers(&self, _: &Digest, _: &str) -> Result<Vec<Digest>, SourceError> {
        Self::unused()
    }
}

/// A raw layer at the end of a wire.
struct Bench {
    layer: Arc<LayerFetch>,
    wire: Arc<Wire>,
    _dir: tempfile::TempDir,
}

fn bench(size: u64, change: impl FnOnce(&mut Wire, &mut Layer)) -> Bench {
    let bytes: Vec<u8> = (0..size).map(|at| (at / 11) as u8).collect();
    let format = Format::Raw { mode: 0o644, mtime: 0, stated_size: None };
    let mut layer = Layer { digest: Digest::of(&bytes), size, format, ..testing::layer("layer") };
    let asked = AtomicUsize::new(0);
    let mut wire = Wire { bytes, pause: Duration::ZERO, stops_at: u64::MAX, rests_at: u64::MAX, asked };
    change(&mut wire, &mut layer);
    let dir = tempfile::tempdir().expect("temporary directory");
    let cache = Arc::new(Cache::open(&dir.path().join("cache")).expect("a cache"));
    // One connection, so that the pauses are those of the whole blob.
    let limits = Limits { concurrency: 1, ..Limits::default() };
    let context = Context::new(cache, limits, Verify::Strict);
    let wire = Arc::new(wire);
    Bench { layer: LayerFetch::new(layer, context, vec![wire.clone()], None), wire, _dir: dir }
}

#[tokio::test]
async fn an_open_waits_for_what_is_here_in_a_moment() {
    let Bench { layer, wire, _dir } = bench(8 * MIB, |wire, _| wire.pause = Duration::from_millis(100));
    let object = layer.whole_soon(0).await.expect("all of it");
    let found = object.range(0..object.size()).block(0, u64::MAX).expect("reads");
    assert!(found.peek()[..] == wire.bytes[..]);
    let asked = wire.asked.load(Ordering::Relaxed);
    assert!(layer.whole_soon(0).await.is_some() && asked == wire.asked.load(Ordering::Relaxed), "it is here");
}

#[tokio::test]
async fn a_rest_on_the_way_is_no_slow_wire() {
    let Bench { layer, .. } = bench(14 * MIB, |wire, _| {
        (wire.pause, wire.rests_at) = (Duration::from_millis(100), 11 * MIB);
    });
    assert!(layer.whole_soon(0).await.is_some());
}

#[tokio::test]
async fn a_slow_wire_does_not_hold_an_open() {
    let Bench { layer, .. } = bench(64 * MIB, |wire, _| wire.pause = Duration::from_millis(150));
    assert!(layer.whole_soon(0).await.is_none());
    assert!(layer.fill.is_running() && *layer.progress().borrow() < 32 * MIB, "it goes on without");
}

#[tokio::test]
async fn nor_does_a_source_that_stalls_at_its_beginning_or_in_the_middle() {
    for stops_at in [0, 3 * MIB] {
        let Bench { layer, .. } = bench(4 * MIB, |wire, _| wire.stops_at = stops_at);
        let began = Instant::now();
        assert!(layer.whole_soon(0).await.is_none());
        assert!(layer.fill.is_running() && began.elapsed() < WAIT, "it was held to the end");
    }
}

#[tokio::test]
async fn a_layer_that_can_not_be_here_in_time_is_not_begun_for_an_open() {
    let Bench { layer, wire, .. } = bench(MIB, |_, layer| layer.size = SMALL + 1);
    assert!(layer.whole_soon(0).await.is_none());
    assert!(!layer.fill.is_running() && wire.asked.load(Ordering::Relaxed) == 0);
}

#[tokio::test]
async fn what_is_wrong_with_a_layer_is_told_to_who_reads_it() {
    let Bench { layer, .. } = bench(MIB, |wire, _| wire.bytes[7] ^= 1);
    assert!(layer.whole_soon(0).await.is_none());
    assert!(matches!(layer.content(0, MIB).await, Err(FetchError::Poisoned { .. })));
}
