//! A network between here and a server of this machine: a TCP proxy that lets every byte take its time, and limits no rate.
//!
//! Each direction takes half a round trip. A handshake would take a whole one before the client may say anything, and
//! the kernel's own is over at once: so what a client says first leaves as if it had waited for that. Bytes are stamped
//! as they come and written when they are due, so that as many are on their way as the two ends put there.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

/// What is read at once.
const BUFFER: usize = 256 << 10;
/// Buffers on their way in one direction of one connection: 64 MiB, which is 1 GiB/s at 60 ms.
const ON_THE_WAY: usize = 256;

/// A proxy before a server; it ends when it is dropped.
pub struct Delay {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    ended: Arc<AtomicBool>,
}

impl Delay {
    /// A proxy before the server at `host`, which is `rtt` away.
    pub fn before(host: &str, rtt: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("its address");
        let (connections, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (host, count, over) = (host.to_owned(), connections.clone(), ended.clone());
        thread::spawn(move || {
            for client in listener.incoming() {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(client) = client else { continue };
                count.fetch_add(1, Ordering::Relaxed);
                // What the proxy does for a connection is no part of the way: the next one does not wait for it.
                let (host, stands) = (host.clone(), Instant::now() + rtt);
                thread::spawn(move || {
                    let Ok(server) = TcpStream::connect(&host) else { return };
                    carry(client, server, stands, rtt / 2);
                });
            }
        });
        Self { address, connections, ended }
    }

    /// Where it listens.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// How many connections were made.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Delay {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // So that it looks.
        drop(TcpStream::connect(self.address));
    }
}

/// Carries both directions of a connection, which stands from `stands` on; each takes `way`.
fn carry(client: TcpStream, server: TcpStream, stands: Instant, way: Duration) {
    let clone = |stream: &TcpStream| stream.try_clone().expect("a descriptor");
    let (from, to) = (clone(&server), clone(&client));
    thread::spawn(move || carry_one_way(from, to, stands, way));
    carry_one_way(client, server, stands, way);
}

fn carry_one_way(from: TcpStream, to: TcpStream, stands: Instant, way: Duration) {
    to.set_nodelay(true).expect("a socket");
    let (due, when_due) = mpsc::sync_channel(ON_THE_WAY);
    let (used, spare) = mpsc::sync_channel(ON_THE_WAY);
    thread::spawn(move || take(from, &due, &spare, stands, way));
    give(to, &when_due, &used);
}

/// Takes bytes as they come.
fn take(
    mut from: TcpStream,
    due: &SyncSender<(Instant, Vec<u8>, usize)>,
    spare: &Receiver<Vec<u8>>,
    stands: Instant,
    way: Duration,
) {
    loop {
        let mut buffer = spare.try_recv().unwrap_or_else(|_| vec![0; BUFFER]);
        match from.read(&mut buffer) {
            Ok(len) if len > 0 => {
                let at = Instant::now().max(stands) + way;
                if due.send((at, buffer, len)).is_err() {
                    let _ = from.shutdown(Shutdown::Read);
                    return;
                }
            }
            // The other end is told when what is on its way has come.
            Ok(_) | Err(_) => return,
        }
    }
}

/// Gives them on when they are due.
fn give(mut to: TcpStream, due: &Receiver<(Instant, Vec<u8>, usize)>, used: &SyncSender<Vec<u8>>) {
    while let Ok((at, buffer, len)) = due.recv() {
        thread::sleep(at.saturating_duration_since(Instant::now()));
        if to.write_all(&buffer[..len]).is_err() {
            return;
        }
        let _ = used.try_send(buffer);
    }
    let _ = to.shutdown(Shutdown::Write);
}
