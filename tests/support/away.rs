//! What may be found at a registry's address when the registry is gone, and what users then know and wait for.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::kit::{KitBuilder, Served, gzip, pattern, tar};
use super::program::Kitfs;
use super::{FaultServer, eventually};

/// How a host is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Away {
    /// It takes no connection and says nothing, as if a firewall dropped the packets.
    Drops,
    /// It takes connections and says nothing.
    Silent,
    /// Somebody else answers every request with a web page.
    Page,
}

/// Something at an address that is no registry; dropping it ends it.
pub struct Nobody {
    stop: Arc<AtomicBool>,
    address: String,
    serving: Option<JoinHandle<()>>,
    /// What keeps the queue of connections full.
    _queued: Vec<TcpStream>,
    _listener: TcpListener,
}

impl Nobody {
    /// Takes the place of a registry that has gone.
    pub fn at(address: &str, away: Away) -> Self {
        // A process that another test is just starting may hold the old listener until it is the program.
        let mut bound = None;
        eventually("the address is free", || {
            bound = TcpListener::bind(address).ok();
            bound.is_some()
        });
        let listener = bound.expect("just bound");
        let stop = Arc::new(AtomicBool::new(false));
        let (mut queued, mut serving) = (Vec::new(), None);
        if away == Away::Drops {
            // The kernel drops what comes when the queue is full.
            rustix::net::listen(&listener, 0).expect("a shorter queue");
            let to = listener.local_addr().expect("its address");
            while let Ok(stream) = TcpStream::connect_timeout(&to, Duration::from_millis(300)) {
                queued.push(stream);
                assert!(queued.len() < 64, "the queue of connections does not fill");
            }
        } else {
            let (accepting, stop) = (listener.try_clone().expect("a second handle"), Arc::clone(&stop));
            serving = Some(std::thread::spawn(move || {
                let mut held = Vec::new();
                for stream in accepting.incoming().map_while(Result::ok) {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    if away == Away::Page {
                        std::thread::spawn(move || show_page(stream));
                    } else {
                        held.push(stream);
                    }
                }
            }));
        }
        Self { stop, address: address.to_owned(), serving, _queued: queued, _listener: listener }
    }
}

/// Answers one request, whatever it is. Who hangs up does not matter.
fn show_page(mut stream: TcpStream) {
    let page = "<html><body>Please log in to this network.</body></html>";
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(len) => request.extend_from_slice(&buffer[..len]),
        }
    }
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        page.len()
    );
    let body = if request.starts_with(b"HEAD ") { "" } else { page };
    let _ = stream.write_all(format!("{head}{body}").as_bytes());
}

impl Drop for Nobody {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(serving) = self.serving.take() {
            // Wakes the thread that accepts.
            let _ = TcpStream::connect(&self.address);
            let _ = serving.join();
        }
    }
}

/// What a busy machine takes for what needs no waiting.
pub const AT_ONCE: Duration = Duration::from_secs(4);
/// A host that refuses connections is given up after a second or two.
pub const SOON: Duration = Duration::from_secs(10);
/// Connecting takes 5 s, and an answer is waited for 10 s.
pub const GIVEN_UP: Duration = Duration::from_secs(20);
/// How old the knowledge of a tag is made.
pub const OLD: u64 = 3 * 3600 + 5 * 60;

/// A kit of two layers, one of them with chunks, as `v1`.
pub fn kit(server: &FaultServer) -> Served {
    two_layers(KitBuilder::new()).serve(server, "v1")
}

/// The same, not served yet.
pub fn two_layers(kit: KitBuilder) -> KitBuilder {
    let weights = tar(&[("w/a.bin", &pattern(3, (2 << 20) + 5)), ("w/b.bin", &pattern(4, 1000))]);
    kit.tar("model", "w", weights).layer("docs", "docs", "tar+gzip", gzip(&tar(&[("docs/x.md", b"read me")])))
}

/// What is known of tags was learned three hours and five minutes ago.
pub fn make_old(kitfs: &Kitfs) {
    let notes = kitfs.cached_files("tags");
    assert!(!notes.is_empty(), "nothing is known of any tag");
    for path in notes {
        let mut note: Value = serde_json::from_slice(&fs::read(&path).expect("a note")).expect("JSON");
        note["seen"] = json!(note["seen"].as_u64().expect("a time") - OLD);
        fs::write(&path, note.to_string()).expect("written");
    }
}

/// What a command prints as JSON.
pub fn json_of(kitfs: &Kitfs, arguments: &[&str]) -> Value {
    serde_json::from_str(&kitfs.ok(arguments)).expect("JSON")
}

/// That an age is what [`make_old`] made it, or a little more.
pub fn is_old(known: &Value) {
    let age = known["age_seconds"].as_u64().unwrap_or_else(|| panic!("no age: {known}"));
    assert!((OLD..OLD + 300).contains(&age), "{known}");
    let seen = known["seen"].as_str().expect("a time");
    assert!(seen.len() == "2026-01-01T00:00:00Z".len() && seen.ends_with('Z') && seen.contains('T'), "{known}");
}

/// What `work` gives, and that it took no longer than it may.
pub fn within<T>(limit: Duration, what: &str, work: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let value = work();
    let elapsed = began.elapsed();
    assert!(elapsed < limit, "{what} took {elapsed:?}");
    value
}
