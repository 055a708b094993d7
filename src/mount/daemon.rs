//! Going into the background: the command starts itself once more, as the daemon, and stays until that one is ready.
//!
//! A process with threads cannot fork, so the daemon is a new process from its first instruction on: `/proc/self/exe`
//! with the same arguments, and a mark in its environment, which holds the path of its log. Its standard input is a
//! socket to the command, over which it reports in JSON lines: any number of `progress`, then `ready` or `failed`.
//!
//! - Until it has reported, the daemon gives up when the command goes away (an interrupt, a kill): nothing stays behind.
//! - A daemon that ends without a report makes the command fail, with the end of its log.
//! - What the arguments name relative to the working directory must be made absolute before the daemon is ready: then
//!   it goes to `/`, so that it keeps no directory busy.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream as StdStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// The variable that makes a process the daemon.
const MARK: &str = "KITFS_DAEMON_LOG";
/// The process's name.
const NAME: &std::ffi::CStr = c"kitfs";
/// How long an interrupted daemon may take to clean up; unmounting is a matter of milliseconds.
const GIVE_UP: Duration = Duration::from_secs(10);
/// Lines that may wait for the command to read them; progress beyond is left out.
const BACKLOG: usize = 64;
/// Places that progress leaves for the last report.
const RESERVED: usize = 8;
/// How much of its log speaks for a daemon that ended without a word.
const LOG_TAIL: usize = 2000;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Report {
    Progress(Value),
    Ready(Value),
    Failed(String),
}

/// The daemon did not get ready.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// It could not be started.
    #[error("starting the daemon failed: cannot {action}")]
    Start {
        /// What was tried.
        action: &'static str,
        /// The system's error.
        #[source]
        cause: io::Error,
    },
    /// It said why.
    #[error("{0}")]
    Failed(String),
    /// It ended without a report.
    #[error("the daemon ended before it was ready ({status}); its log {} ends with:\n{tail}", log.display())]
    Died {
        /// How it ended.
        status: String,
        /// Its log.
        log: PathBuf,
        /// The end of the log.
        tail: String,
    },
    /// The user interrupted.
    #[error("interrupted")]
    Interrupted,
}

/// Starts this program again as a daemon that logs to `log`, with `arguments`, hands its progress to `progress`, and
/// returns what it says when it is ready.
pub async fn launch(
    arguments: impl IntoIterator<Item = OsString>,
    log: &Path,
    mut progress: impl FnMut(Value),
) -> Result<Value, DaemonError> {
    let start = |action| move |cause| DaemonError::Start { action, cause };
    // Before the daemon exists, so that no signal can come between it and them.
    let mut interrupt = signal(SignalKind::interrupt()).map_err(start("handle signals"))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(start("handle signals"))?;
    let (ours, theirs) = StdStream::pair().map_err(start("make a socket"))?;
    let mut child = spawn(arguments, log, theirs)?;
    ours.set_nonblocking(true).map_err(start("use a socket"))?;
    let (reader, mut writer) = UnixStream::from_std(ours).map_err(start("use a socket"))?.into_split();
    let listening = async {
        let mut lines = BufReader::new(reader).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            match serde_json::from_str(&line) {
                Ok(Report::Progress(value)) => progress(value),
                Ok(Report::Ready(value)) => return Some(Ok(value)),
                Ok(Report::Failed(message)) => return Some(Err(DaemonError::Failed(message))),
                Err(error) => tracing::debug!(%error, line, "not a report"),
            }
        }
        None
    };
    tokio::pin!(listening);
    let outcome = tokio::select! {
        outcome = &mut listening => outcome,
        _ = interrupt.recv() => Some(Err(DaemonError::Interrupted)),
        _ = terminate.recv() => Some(Err(DaemonError::Interrupted)),
    };
    match outcome {
        Some(Err(DaemonError::Interrupted)) => {
            // The daemon sees the end of the line and cleans up; its own end of the socket closes when it has.
            let _ = writer.shutdown().await;
            if timeout(GIVE_UP, &mut listening).await.is_err() {
                tracing::warn!(pid = child.id(), "the daemon is still cleaning up");
            }
            Err(DaemonError::Interrupted)
        }
        Some(report) => report,
        None => Err(died(&mut child, log)),
    }
}

fn spawn(arguments: impl IntoIterator<Item = OsString>, log: &Path, socket: StdStream) -> Result<Child, DaemonError> {
    let start = |action| move |cause| DaemonError::Start { action, cause };
    let output = OpenOptions::new().create(true).append(true).mode(0o600).open(log).map_err(start("open its log"))?;
    let errors = output.try_clone().map_err(start("open its log"))?;
    Command::new("/proc/self/exe")
        .arg0(std::env::args_os().next().unwrap_or_else(|| "kitfs".into()))
        .args(arguments)
        .env(MARK, log)
        .stdin(Stdio::from(OwnedFd::from(socket)))
        .stdout(output)
        .stderr(errors)
        .spawn()
        .map_err(start("run /proc/self/exe"))
}

fn died(child: &mut Child, log: &Path) -> DaemonError {
    // Its end of the socket is closed, so it is ending.
    let status = child.wait().map_or_else(|cause| cause.to_string(), |status| status.to_string());
    let text = fs::read(log).unwrap_or_default();
    let tail = String::from_utf8_lossy(&text[text.len().saturating_sub(LOG_TAIL)..]).trim().to_owned();
    DaemonError::Died { status, log: log.to_owned(), tail }
}

/// The daemon's line to the command that started it.
#[derive(Debug)]
pub struct Reporter {
    log: PathBuf,
    reader: OwnedReadHalf,
    reports: mpsc::Sender<Report>,
    writer: JoinHandle<()>,
    ready: AtomicBool,
}

impl Reporter {
    /// If this process was started as the daemon, leaves the command's session and takes up the line to it. Belongs
    /// before anything else that the process does.
    pub fn attach() -> Result<Option<Self>, DaemonError> {
        let Some(log) = std::env::var_os(MARK).map(PathBuf::from) else { return Ok(None) };
        let start = |action| move |cause| DaemonError::Start { action, cause };
        let line =
            rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3).map_err(|cause| start("use its line")(cause.into()))?;
        let line = StdStream::from(line);
        // A variable that was merely inherited, by a program that the daemon started, comes without a socket.
        if line.peer_addr().is_err() {
            return Ok(None);
        }
        let nothing = File::open("/dev/null").map_err(start("open /dev/null"))?;
        rustix::stdio::dup2_stdin(nothing).map_err(|cause| start("use /dev/null")(cause.into()))?;
        // Else `ps` would show what it was started by: "exe". A name is no reason to fail.
        let _ = rustix::thread::set_name(NAME);
        // Fails only for the leader of a process group, which is not what `launch` makes.
        rustix::process::setsid().map_err(|cause| start("leave the session")(cause.into()))?;
        line.set_nonblocking(true).map_err(start("use its line"))?;
        let (reader, writer) = UnixStream::from_std(line).map_err(start("use its line"))?.into_split();
        let (reports, queue) = mpsc::channel(BACKLOG);
        let writer = tokio::spawn(write_reports(queue, writer));
        Ok(Some(Self { log, reader, reports, writer, ready: AtomicBool::new(false) }))
    }

    /// Where this daemon logs: its standard error is that file.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Reports progress; left out if the command does not keep up.
    pub fn progress(&self, value: Value) {
        if self.reports.capacity() > RESERVED {
            let _ = self.reports.try_send(Report::Progress(value));
        }
    }

    /// Reports that the daemon is ready, and leaves the working directory. From now on it lives on its own.
    pub fn ready(&self, value: Value) {
        self.ready.store(true, Ordering::Relaxed);
        if let Err(cause) = std::env::set_current_dir("/") {
            tracing::warn!(%cause, "the working directory stays in use");
        }
        if self.reports.try_send(Report::Ready(value)).is_err() {
            tracing::debug!("nobody waits for the daemon any more");
        }
    }

    /// Reports why the daemon ends, and sees the report off.
    pub async fn failed(self, message: String) {
        let _ = self.reports.send(Report::Failed(message)).await;
        let Self { reports, writer, .. } = self;
        drop(reports);
        // A command that has stopped reading is not waited for.
        let _ = timeout(GIVE_UP, writer).await;
    }

    /// Waits until the command has gone before the daemon was ready; so forever, if that doesn't happen.
    pub async fn abandoned(&self) {
        let mut byte = [0];
        loop {
            let gone = match self.reader.readable().await {
                Ok(()) => match self.reader.try_read(&mut byte) {
                    Ok(0) => true,
                    Ok(_) => false,
                    Err(cause) => cause.kind() != io::ErrorKind::WouldBlock,
                },
                Err(_) => true,
            };
            if gone && self.ready.load(Ordering::Relaxed) {
                return std::future::pending().await;
            }
            if gone {
                return;
            }
        }
    }
}

async fn write_reports(mut queue: mpsc::Receiver<Report>, mut line: OwnedWriteHalf) {
    while let Some(report) = queue.recv().await {
        let Ok(text) = serde_json::to_string(&report) else { continue };
        if line.write_all(format!("{text}\n").as_bytes()).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn reporter() -> (Reporter, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        let (reader, writer) = theirs.into_split();
        let (reports, queue) = mpsc::channel(BACKLOG);
        let writer = tokio::spawn(write_reports(queue, writer));
        (Reporter { log: PathBuf::new(), reader, reports, writer, ready: AtomicBool::new(false) }, ours)
    }

    #[tokio::test]
    async fn a_failure_is_reported_after_the_progress_before_it() {
        let (reporter, command) = reporter();
        reporter.progress(json!(1));
        reporter.failed("no such kit".to_owned()).await;
        let mut lines = BufReader::new(command).lines();
        assert_eq!(lines.next_line().await.expect("line").as_deref(), Some(r#"{"progress":1}"#));
        assert_eq!(lines.next_line().await.expect("line").as_deref(), Some(r#"{"failed":"no such kit"}"#));
        assert_eq!(lines.next_line().await.expect("end"), None);
    }

    #[tokio::test]
    async fn progress_leaves_room_for_the_last_report() {
        let (reporter, command) = reporter();
        for step in 0..10 * BACKLOG {
            reporter.progress(json!(step));
        }
        reporter.failed("full".to_owned()).await;
        let mut lines = BufReader::new(command).lines();
        let mut last = String::new();
        while let Some(line) = lines.next_line().await.expect("line") {
            last = line;
        }
        assert_eq!(last, r#"{"failed":"full"}"#);
    }

    #[tokio::test]
    async fn a_command_that_goes_away_is_noticed() {
        let (reporter, command) = reporter();
        drop(command);
        timeout(Duration::from_secs(10), reporter.abandoned()).await.expect("noticed");
    }

    #[test]
    fn without_its_mark_a_process_is_no_daemon() {
        assert!(Reporter::attach().expect("attach").is_none());
    }
}
