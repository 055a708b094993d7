//! Bytes from a source, resumed and retried: ranges here, a blob's bytes in order, over several ranges in flight, in
//! [`ordered`]; [`vain`]: what was waited for in vain a moment ago.
//!
//! Progress means [`PROGRESS`] bytes or the end of what was asked for: a peer that sends a byte a second makes none.
//! Without progress for the read timeout a transfer ends in [`FetchError::Timeout`] or in its source's last error.

pub mod ordered;
pub mod vain;

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use futures_util::TryStreamExt as _;
use tokio::sync::watch;

use super::memory::Memory;
use super::{FetchError, Limits};
use crate::digest::Unverified;
use crate::source::{BlobId, ByteStream, Source, SourceError};
use vain::Vain;

/// So many bytes count as progress (design section 5: at least 64 KiB in 10 s).
pub(super) const PROGRESS: u64 = 64 << 10;
/// How often a small request is made before its error is told: over a hiccup, not over an outage.
pub const ATTEMPTS: u32 = 4;
/// How long a host may answer nothing before who can do without gives up: over a hiccup, and a person waits.
const AWAY: Duration = Duration::from_secs(2);
/// The longest a server may put us off with `Retry-After`.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// How long something is asked for again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Persistence {
    /// Until the deadline: a reader waits for it.
    UntilDeadline,
    /// Likewise, but only while the host answers somebody: it can be had later too.
    UnlessAway,
}

/// One source of one blob, with the limits that hold for it.
#[derive(Debug, Clone)]
pub struct Transfer {
    /// Where from.
    pub source: Arc<dyn Source>,
    /// Which blob.
    pub blob: BlobId,
    /// Deadlines and parallelism.
    pub limits: Limits,
    /// Counts bytes as they arrive: the sign of life for those who wait.
    pub received: watch::Sender<u64>,
    /// How long it is tried.
    pub persistence: Persistence,
    /// Counts them too, and never begins again.
    pub fetched: Arc<AtomicU64>,
    /// What its bytes may take of memory.
    pub memory: Arc<Memory>,
    /// What was waited for in vain a moment ago.
    pub vain: Arc<Vain>,
}

impl Transfer {
    /// All bytes of a range.
    pub async fn range(&self, range: Range<u64>) -> Result<Vec<Unverified>, FetchError> {
        let mut pieces = Vec::new();
        self.each_piece(range, |piece| pieces.push(piece)).await?;
        Ok(pieces)
    }

    /// Hands on the bytes of a range as they arrive, in order and each once, whatever breaks on the way.
    pub async fn each_piece(
        &self,
        range: Range<u64>,
        mut take: impl FnMut(Unverified) + Send,
    ) -> Result<(), FetchError> {
        if let Some(end) = self.vain.recent(self.source.name(), self.blob.digest, self.heard()) {
            return Err(end.into_error(self.what()));
        }
        let mut received = 0;
        let mut pause = Pause::new(self.limits.read_timeout);
        let mut counted = 0;
        let mut heard = self.heard();
        loop {
            self.check_host()?;
            let rest = range.start + received..range.end;
            let Err(error) = self.read_into(rest, &mut take, &mut received).await else { return Ok(()) };
            self.check_host()?;
            if received - counted >= PROGRESS {
                counted = received;
                heard = self.heard();
                pause.reset();
            }
            pause.before_retry(error).await.map_err(|end| self.given_up(end, heard))?;
        }
    }

    /// Refuses to ask a host that is away, where that is wanted.
    fn check_host(&self) -> Result<(), FetchError> {
        if self.persistence == Persistence::UntilDeadline {
            return Ok(());
        }
        match self.source.away().filter(|away| away.since.elapsed() >= AWAY) {
            Some(away) => Err(GivenUp { cause: away.error, deadline: None }.into_error(self.what())),
            None => Ok(()),
        }
    }

    /// The first `len` bytes. A server that ignores ranges is cut off after them.
    pub async fn head(&self, len: u64) -> Result<Vec<u8>, FetchError> {
        let append = |mut bytes: Vec<u8>, piece: Unverified| async move {
            bytes.extend_from_slice(piece.peek());
            Ok(bytes)
        };
        self.first(len).try_fold(Vec::new(), append).await
    }

    async fn read_into(
        &self,
        range: Range<u64>,
        take: &mut (impl FnMut(Unverified) + Send),
        received: &mut u64,
    ) -> Result<(), SourceError> {
        if range.is_empty() {
            return Ok(());
        }
        let mut stream = self.open(range).await?;
        while let Some(piece) = stream.try_next().await? {
            *received += piece.len() as u64;
            self.count(piece.len());
            take(piece);
        }
        Ok(())
    }

    pub(super) fn count(&self, bytes: usize) {
        self.received.send_modify(|all| *all += bytes as u64);
        self.fetched.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Asks for a range, for no longer than readers wait: what goes on behind their backs would hold those who ask anew.
    pub(super) async fn open(&self, range: Range<u64>) -> Result<ByteStream, SourceError> {
        let patience = self.limits.read_timeout;
        tokio::time::timeout(patience, self.source.blob(&self.blob, range)).await.unwrap_or_else(|_| {
            let what = format!("no answer for {}", crate::units::format_duration(patience));
            Err(SourceError::Transport { source_name: self.source.name(), what, cause: None })
        })
    }

    /// How many bytes of the blob have come, for all who get some of it.
    pub(super) fn heard(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    /// The error of who has given up; those who ask next are told it too, if nothing has come since so many bytes were there.
    pub(super) fn given_up(&self, end: GivenUp, heard: u64) -> FetchError {
        if end.deadline.is_some() && self.heard() == heard {
            self.vain.note(self.source.name(), self.blob.digest, heard, end.clone());
        }
        end.into_error(self.what())
    }

    fn what(&self) -> String {
        format!("layer {}", self.blob.digest)
    }
}

/// Tries `ask` up to [`ATTEMPTS`] times while that may help, for `deadline` in total; `what` names it in errors. For
/// manifests and tags, where a person waits for the answer.
pub async fn retried<T, F>(what: &str, deadline: Duration, ask: impl FnMut() -> F) -> Result<T, FetchError>
where
    F: Future<Output = Result<T, SourceError>>,
{
    attempted(what, ATTEMPTS, deadline, deadline, ask).await
}

/// Tries `ask` up to `attempts` times while that may help, anew for as long as `patience` and for `deadline` in total.
pub async fn attempted<T, F>(
    what: &str,
    attempts: u32,
    patience: Duration,
    deadline: Duration,
    mut ask: impl FnMut() -> F,
) -> Result<T, FetchError>
where
    F: Future<Output = Result<T, SourceError>>,
{
    let mut pause = Pause { attempts, ..Pause::new(patience) };
    let attempts = async {
        loop {
            match ask().await {
                Ok(value) => return Ok(value),
                Err(error) => pause.before_retry(error).await?,
            }
        }
    };
    match tokio::time::timeout(deadline, attempts).await {
        Ok(outcome) => outcome.map_err(|end: GivenUp| end.into_error(what.to_owned())),
        Err(_) => Err(FetchError::Timeout { what: what.to_owned(), after: deadline, cause: None }),
    }
}

/// The pauses between attempts: exponential with full jitter, within a deadline that progress moves.
pub(super) struct Pause {
    attempts: u32,
    patience: Duration,
    since: Instant,
    backoff: backon::ExponentialBackoff,
}

/// Why there is no further attempt.
#[derive(Debug, Clone)]
pub(super) struct GivenUp {
    cause: SourceError,
    /// The deadline that would pass; `None` where trying again can't help.
    deadline: Option<Duration>,
}

impl Pause {
    pub(super) fn new(patience: Duration) -> Self {
        Self { attempts: u32::MAX, patience, since: Instant::now(), backoff: Self::backoff() }
    }

    fn backoff() -> backon::ExponentialBackoff {
        // From 100 ms, doubled with jitter to 10 s: quick over a hiccup, gentle on a registry that is down.
        ExponentialBuilder::default()
            .with_jitter()
            .with_min_delay(Duration::from_millis(100))
            .with_max_delay(Duration::from_secs(10))
            .without_max_times()
            .build()
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.patience);
    }

    pub(super) async fn before_retry(&mut self, error: SourceError) -> Result<(), GivenUp> {
        self.attempts -= 1;
        if !error.is_transient() || self.attempts == 0 {
            return Err(GivenUp { cause: error, deadline: None });
        }
        let asked = match &error {
            SourceError::Status { retry_after, .. } => retry_after.map(|delay| delay.min(LONGEST_PAUSE)),
            _ => None,
        };
        let delay = asked.or_else(|| self.backoff.next()).unwrap_or(LONGEST_PAUSE);
        if self.since.elapsed() + delay >= self.patience {
            return Err(GivenUp { cause: error, deadline: Some(self.patience) });
        }
        tracing::debug!(%error, ?delay, "trying again");
        tokio::time::sleep(delay).await;
        Ok(())
    }
}

impl GivenUp {
    fn into_error(self, what: String) -> FetchError {
        match self.deadline {
            Some(after) => FetchError::Timeout { what, after, cause: Some(self.cause) },
            None => FetchError::Source { what, cause: self.cause },
        }
    }
}
