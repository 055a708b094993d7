//! The body of a blob on its way to a registry: a stream of known length, given up when the registry stops taking it.
//!
//! Only the time spent waiting for the registry counts: a source that takes its time has a deadline of its own.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use reqwest::Response;
use reqwest::header::HeaderValue;
use tokio::time::Instant;
use url::Url;

use crate::source::checked::Checked;
use crate::source::transport::{Transport, authority};
use crate::source::{BlobId, SourceError};

/// What the client is handed at once: it asks again when sixteen of them are on their way.
const PIECE: usize = 16 << 10;
/// That is four times what counts as progress, so it may take four times as long.
const LAG: u32 = 4;
/// How fast a registry is at least, in bytes a second, that reads a blob once more before it answers, as those over
/// object storage do.
const SETTLING: u64 = 16 << 20;

/// Sends a blob. What its source did wrong is the error before anything that follows from it.
pub(super) async fn put(
    transport: &Transport,
    url: &Url,
    authorization: Option<&HeaderValue>,
    blob: &BlobId,
    bytes: Checked,
) -> Result<Response, SourceError> {
    let (stall, settling) =
        (transport.timeouts.stall * LAG, transport.timeouts.answer + Duration::from_secs(blob.size / SETTLING));
    let meter = Arc::new(Meter(Mutex::new(State { waits: Waits::Registry(Instant::now()), sent: 0, blame: None })));
    let body = reqwest::Body::wrap_stream(stream::try_unfold(
        Sending { bytes, size: blob.size, left: Bytes::new(), meter: Arc::clone(&meter) },
        Sending::next,
    ));
    let host = authority(url);
    let sending = transport.put_stream(url, authorization, blob.size, body)?;
    let outcome = tokio::select! {
        outcome = sending => outcome,
        () = meter.patience_ends(stall, settling) => {
            let sent = meter.state().sent;
            let what = format!("{host} stalled: it took {sent} of {} bytes of blob {}", blob.size, blob.digest);
            return Err(SourceError::Transport { source_name: transport.name.clone(), what, cause: None });
        }
    };
    let state = meter.state();
    match (outcome, &state.blame) {
        (_, Some(blame)) => Err(blame.clone()),
        (Err(error), None) => Err(transport.broken(&host, error)),
        (Ok(response), None) if response.status().is_success() && state.sent < blob.size => {
            let what = format!("{host} answered {} after {} of {} bytes", response.status(), state.sent, blob.size);
            Err(transport.protocol(what))
        }
        (Ok(response), None) => Ok(response),
    }
}

struct Sending {
    bytes: Checked,
    size: u64,
    /// What is left of a piece from the source.
    left: Bytes,
    meter: Arc<Meter>,
}

impl Sending {
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, SourceError> {
        if self.left.is_empty() {
            self.meter.state().waits = Waits::Source;
            match self.bytes.next().await {
                Some(Ok(piece)) => self.left = piece,
                Some(Err(error)) => {
                    self.meter.state().blame = Some(error.clone());
                    return Err(error);
                }
                None => {
                    self.meter.state().waits = Waits::Answer(Instant::now());
                    return Ok(None);
                }
            }
        }
        let piece = self.left.split_to(PIECE.min(self.left.len()));
        {
            let mut state = self.meter.state();
            state.sent += piece.len() as u64;
            // The client does not ask again once it has all.
            let all = state.sent == self.size;
            state.waits = if all { Waits::Answer(Instant::now()) } else { Waits::Registry(Instant::now()) };
        }
        Ok(Some((piece, self)))
    }
}

/// Who is waited for, and since when.
enum Waits {
    Source,
    Registry(Instant),
    Answer(Instant),
}

struct State {
    waits: Waits,
    /// How much was handed to the client.
    sent: u64,
    /// What the source did wrong.
    blame: Option<SourceError>,
}

/// Shared by the body, which moves on, and the one who watches it.
struct Meter(Mutex<State>);

impl Meter {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every field is right at every instant.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when the registry has taken nothing for `stall`, or has not answered `settling` after it could have had
    /// all.
    async fn patience_ends(&self, stall: Duration, settling: Duration) {
        loop {
            let now = Instant::now();
            let until = match self.state().waits {
                Waits::Source => now + stall,
                Waits::Registry(since) => since + stall,
                Waits::Answer(since) => since + stall + settling,
            };
            if until <= now {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    }
}
