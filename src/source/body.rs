//! The bytes of an answer: counted, and given up when they stop coming.

use futures_util::stream;
use reqwest::Response;
use tokio::time::{Duration, Instant};

use crate::digest::Unverified;
use crate::source::connection::Timeouts;
use crate::source::transport::{authority, broken};
use crate::source::{ByteStream, SourceError};

/// Why a short answer was not read.
pub(super) enum Unread {
    /// It is longer than the cap.
    TooLong,
    /// It broke off.
    Broken(reqwest::Error),
}

/// Reads a whole answer of at most `cap` bytes. The header's length is not trusted to be right, only to be too much.
pub(super) async fn read_capped(response: &mut Response, cap: u64) -> Result<Vec<u8>, Unread> {
    if response.content_length().is_some_and(|length| length > cap) {
        return Err(Unread::TooLong);
    }
    let mut bytes = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(Unread::Broken)? {
        if (bytes.len() + piece.len()) as u64 > cap {
            return Err(Unread::TooLong);
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

/// A body of exactly `length` bytes as a stream: one that ends early is a transport error, a longer one breaks the
/// protocol, and one without progress is given up.
pub(super) fn exactly(response: Response, length: u64, timeouts: Timeouts, source_name: &str) -> ByteStream {
    let host = authority(response.url());
    let patience = Patience::new(timeouts.stall);
    let body = Body { response, length, left: length, patience, host, source_name: source_name.to_owned() };
    Box::pin(stream::try_unfold(body, Body::next))
}

struct Body {
    response: Response,
    length: u64,
    left: u64,
    patience: Patience,
    host: String,
    source_name: String,
}

impl Body {
    async fn next(mut self) -> Result<Option<(Unverified, Self)>, SourceError> {
        loop {
            let piece = self.patience.wait(self.response.chunk()).await;
            if self.left == 0 {
                // All that was asked for has come; only more of it could still be wrong.
                return match piece {
                    Some(Ok(Some(piece))) if !piece.is_empty() => Err(self.too_long()),
                    _ => Ok(None),
                };
            }
            let piece = match piece {
                Some(Ok(Some(piece))) if piece.is_empty() => continue,
                Some(Ok(Some(piece))) => piece,
                Some(Ok(None)) => return Err(self.truncated(None)),
                Some(Err(error)) => return Err(self.truncated(Some(error))),
                None => return Err(self.stalled()),
            };
            let got = piece.len() as u64;
            if got > self.left {
                return Err(self.too_long());
            }
            self.left -= got;
            self.patience.progress(got);
            return Ok(Some((Unverified::new(piece), self)));
        }
    }

    fn truncated(&self, error: Option<reqwest::Error>) -> SourceError {
        let what = format!("{} ended the body after {} of {} bytes", self.host, self.length - self.left, self.length);
        let cause = error.and_then(|error| match broken(&self.source_name, &self.host, error) {
            SourceError::Transport { cause, .. } => cause,
            _ => None,
        });
        SourceError::Transport { source_name: self.source_name.clone(), what, cause }
    }

    fn too_long(&self) -> SourceError {
        let what = format!("{} sent more than the {} bytes that were asked for", self.host, self.length);
        SourceError::Protocol { source_name: self.source_name.clone(), what }
    }

    fn stalled(&self) -> SourceError {
        let (done, rule) = (self.length - self.left, self.patience.window);
        let what = format!("{} stalled at byte {done} of {}: less than 64 KiB in {rule:?}", self.host, self.length);
        SourceError::Transport { source_name: self.source_name.clone(), what, cause: None }
    }
}

/// The rule of progress: [`Timeouts::PROGRESS`] bytes in each window. Only the time spent waiting for the server
/// counts: a reader that takes its time is not the server's fault.
struct Patience {
    window: Duration,
    left: Duration,
    received: u64,
}

impl Patience {
    fn new(window: Duration) -> Self {
        Self { window, left: window, received: 0 }
    }

    /// Waits for `next`, until the window is used up.
    async fn wait<T>(&mut self, next: impl Future<Output = T>) -> Option<T> {
        let start = Instant::now();
        let outcome = tokio::time::timeout(self.left, next).await.ok();
        self.left = self.left.saturating_sub(start.elapsed());
        outcome
    }

    fn progress(&mut self, bytes: u64) {
        self.received += bytes;
        if self.received >= Timeouts::PROGRESS {
            *self = Self::new(self.window);
        }
    }
}
