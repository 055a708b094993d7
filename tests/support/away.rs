//! What may be found at a registry's address when the registry is gone.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

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
        let listener = TcpListener::bind(address).expect("the address is free");
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
