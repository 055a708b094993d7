//! The control socket: how a command asks a daemon.
//!
//! One connection, one request, one answer: each a JSON value in one line. The socket is 0600 in a directory that is
//! 0700, so who can ask is the user (or root). Lines are bounded, and every wait for the other end has a deadline; a request
//! whose client leaves is given up, as far as its work can be.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// The longest request: commands are short.
const MAX_REQUEST: u64 = 64 << 10;
/// The longest answer: a status with a line for each of some thousand layers.
const MAX_ANSWER: u64 = 4 << 20;
/// How long a peer may take to send or take a line: both ends are on this machine.
const LINE_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections served at once; more wait in the backlog.
const CLIENTS: usize = 16;

/// Asking a daemon failed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens.
    #[error("no daemon listens on {}", socket.display())]
    NoDaemon {
        /// The socket.
        socket: PathBuf,
        /// The system's error.
        #[source]
        cause: io::Error,
    },
    /// The conversation broke.
    #[error("talking to the daemon on {} failed", socket.display())]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// The system's error.
        #[source]
        cause: io::Error,
    },
    /// The daemon took too long.
    #[error("the daemon on {} did not answer within {seconds} s", socket.display())]
    Timeout {
        /// The socket.
        socket: PathBuf,
        /// How long it was given.
        seconds: u64,
    },
}

/// Asks the daemon behind `socket` and waits for its answer, `patience` at most.
pub async fn ask(socket: &Path, request: &Value, patience: Duration) -> Result<Value, ControlError> {
    let broken = |cause| ControlError::Broken { socket: socket.to_owned(), cause };
    let conversation = async {
        let stream = connect(socket).map_err(|cause| ControlError::NoDaemon { socket: socket.to_owned(), cause })?;
        let mut stream = UnixStream::from_std(stream).map_err(broken)?;
        write_line(&mut stream, request).await.map_err(broken)?;
        read_line(&mut stream, MAX_ANSWER).await.map_err(broken)
    };
    timeout(patience, conversation)
        .await
        .unwrap_or_else(|_| Err(ControlError::Timeout { socket: socket.to_owned(), seconds: patience.as_secs() }))
}

/// Answers requests on `listener` by `handler`, until it is dropped.
pub(super) async fn serve<H, F>(listener: UnixListener, handler: H)
where
    H: Fn(Value) -> F + Clone + Send + 'static,
    F: Future<Output = Value> + Send + 'static,
{
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            // An error of accept is the client's, or a lack of descriptors, which passes.
            accepted = listener.accept(), if clients.len() < CLIENTS => match accepted {
                Ok((stream, _)) => drop(clients.spawn(converse(stream, handler.clone()))),
                Err(cause) => {
                    tracing::debug!(%cause, "a control connection failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = clients.join_next() => {}
        }
    }
}

async fn converse<H, F>(mut stream: UnixStream, handler: H)
where
    H: Fn(Value) -> F,
    F: Future<Output = Value>,
{
    let answer = match timeout(LINE_TIMEOUT, read_line(&mut stream, MAX_REQUEST)).await {
        Ok(Ok(request)) => tokio::select! {
            answer = handler(request) => answer,
            // Nobody waits for it any more.
            () = hung_up(&stream) => return,
        },
        // Who only looks whether somebody is there says nothing, and is told nothing.
        Ok(Err(cause)) if cause.kind() == io::ErrorKind::UnexpectedEof => return,
        Ok(Err(cause)) => json!({ "error": format!("not a request: {cause}") }),
        Err(_) => json!({ "error": format!("no request within {} s", LINE_TIMEOUT.as_secs()) }),
    };
    if let Ok(Err(cause)) = timeout(LINE_TIMEOUT, write_line(&mut stream, &answer)).await {
        tracing::debug!(%cause, "a control client left before its answer");
    }
}

/// Waits until the other end has gone.
async fn hung_up(stream: &UnixStream) {
    let mut byte = [0];
    loop {
        if stream.readable().await.is_err() {
            return;
        }
        match stream.try_read(&mut byte) {
            Ok(1..) => {}
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => {}
            Ok(0) | Err(_) => return,
        }
    }
}

async fn read_line(stream: &mut UnixStream, limit: u64) -> io::Result<Value> {
    let mut line = Vec::new();
    BufReader::new(stream.take(limit)).read_until(b'\n', &mut line).await?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if line.last() != Some(&b'\n') {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a line that is cut off or too long"));
    }
    serde_json::from_slice(&line).map_err(io::Error::from)
}

async fn write_line(stream: &mut UnixStream, value: &Value) -> io::Result<()> {
    // serde_json writes no newline but this one.
    let line = format!("{value}\n");
    stream.write_all(line.as_bytes()).await
}

/// Binds a socket that only its owner may use.
pub(super) fn bind(socket: &Path) -> io::Result<StdListener> {
    let (_dir, short) = short_path(socket)?;
    let listener = StdListener::bind(short)?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Whether a process accepts on `socket`.
pub(super) fn is_served(socket: &Path) -> bool {
    match connect(socket) {
        Ok(_) => true,
        // Its backlog is full: it lives, and is stopped or busy.
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    }
}

/// Connects without waiting; where the backlog is full, the error is `WouldBlock`.
fn connect(socket: &Path) -> io::Result<StdStream> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let (_dir, short) = short_path(socket)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let stream = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&stream, &SocketAddrUnix::new(short)?)?;
    Ok(stream.into())
}

/// A path to the socket that fits into the 108 bytes which an address may have, valid while the directory is open.
fn short_path(socket: &Path) -> io::Result<(File, PathBuf)> {
    let (Some(dir), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let dir = File::open(dir)?;
    let short = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name);
    Ok((dir, short))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listening(dir: &Path) -> PathBuf {
        let socket = dir.join("socket");
        let listener = UnixListener::from_std(bind(&socket).expect("bind")).expect("listener");
        tokio::spawn(serve(listener, async |request| json!({ "asked": request })));
        socket
    }

    const PATIENCE: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn a_question_is_answered() {
        let temp = tempfile::tempdir().expect("dir");
        let socket = listening(temp.path());
        let request = json!({ "cmd": "status" });
        for _ in 0..3 {
            let answer = ask(&socket, &request, PATIENCE).await.expect("answer");
            assert_eq!(answer, json!({ "asked": { "cmd": "status" } }));
        }
    }

    #[tokio::test]
    async fn a_path_longer_than_an_address_works() {
        let temp = tempfile::tempdir().expect("dir");
        let dir = temp.path().join("d".repeat(120));
        fs::create_dir(&dir).expect("create");
        let socket = listening(&dir);
        assert!(ask(&socket, &json!(1), PATIENCE).await.is_ok());
    }

    #[tokio::test]
    async fn what_is_no_request_is_told_so() {
        let temp = tempfile::tempdir().expect("dir");
        let socket = listening(temp.path());
        for line in ["status\n".to_owned(), "[".repeat(MAX_REQUEST as usize + 1)] {
            let mut stream = UnixStream::connect(&socket).await.expect("connect");
            // The daemon may close before it has taken the whole of a line that is too long.
            let _ = stream.write_all(line.as_bytes()).await;
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer).await;
            assert!(answer.contains("not a request") || line.len() > 100, "{answer}");
            assert!(!answer.contains("asked"), "{answer}");
        }
    }

    #[tokio::test]
    async fn a_socket_without_a_daemon_says_so() {
        let temp = tempfile::tempdir().expect("dir");
        let socket = temp.path().join("socket");
        drop(bind(&socket).expect("bind"));
        assert!(!is_served(&socket));
        let error = ask(&socket, &json!(1), PATIENCE).await.expect_err("nobody");
        assert!(matches!(error, ControlError::NoDaemon { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_daemon_that_says_nothing_is_not_waited_for() {
        let temp = tempfile::tempdir().expect("dir");
        let socket = temp.path().join("socket");
        let _listener = bind(&socket).expect("bind");
        let error = ask(&socket, &json!(1), Duration::from_millis(50)).await.expect_err("silence");
        assert!(matches!(error, ControlError::Timeout { .. }), "{error}");
    }
}
