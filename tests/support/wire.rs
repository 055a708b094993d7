//! The fault server's HTTP/1.1: one thread a connection, one request after the other.

use std::collections::HashMap;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use base64::Engine as _;
use kitfs::digest::Digest;

use super::content::Content;
use super::fault::{Auth, Fault, Login, Request, Shared};
use super::upload;

/// What one write sends.
const BLOCK: u64 = 64 << 10;
/// Longer than any test; the server's end cuts it short.
pub(super) const FOREVER: Duration = Duration::from_secs(3600);

/// An answer before faults touch its body.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: Vec<(String, String)>,
    body: Option<(Arc<Content>, u64, u64)>,
}

impl Answer {
    pub(super) fn new(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: None }
    }

    pub(super) fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }

    pub(super) fn bytes(mut self, bytes: Vec<u8>) -> Self {
        let length = bytes.len() as u64;
        self.body = Some((Arc::new(Content::Bytes(bytes)), 0, length));
        self
    }

    fn length(&self) -> u64 {
        self.body.as_ref().map_or(0, |(_, first, end)| end - first)
    }
}

/// Serves a connection until it ends.
pub(super) fn serve(shared: &Shared, stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut reader = BufReader::new(stream);
    while let Ok(Some(request)) = read_request(&mut reader) {
        if shared.stopped() || serve_one(shared, stream, &mut reader, request).is_err() {
            return;
        }
    }
}

fn read_request(reader: &mut BufReader<&TcpStream>) -> io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut parts = line.split(' ');
    let (Some(method), Some(path)) = (parts.next(), parts.next()) else { return Ok(None) };
    let (method, path) = (method.to_owned(), path.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        let value = value.trim();
        headers
            .entry(name.to_ascii_lowercase())
            .and_modify(|all: &mut String| {
                all.push_str(", ");
                all.push_str(value);
            })
            .or_insert_with(|| value.to_owned());
    }
    let mut request = Request { method, path, headers, body: Vec::new() };
    if !upload::brings_a_blob(&request) {
        request.body = vec![0; upload::length(&request) as usize];
        reader.read_exact(&mut request.body)?;
    }
    Ok(Some(request))
}

/// Answers one request. An error ends the connection.
fn serve_one(
    shared: &Shared,
    stream: &TcpStream,
    reader: &mut BufReader<&TcpStream>,
    mut request: Request,
) -> io::Result<()> {
    let target = request.target();
    let (faults, rtt) = {
        let mut state = shared.state();
        state.requests.push(request.clone());
        (take_faults(state.faults.get_mut(&target)), state.rtt)
    };
    shared.sleep(rtt);
    for fault in &faults {
        match fault {
            Fault::Delay(pause) => shared.sleep(*pause),
            Fault::Silence => {
                shared.sleep(FOREVER);
                return Err(io::ErrorKind::TimedOut.into());
            }
            _ => {}
        }
    }
    let refused = faults.iter().any(|fault| matches!(fault, Fault::Status { .. } | Fault::Refuse { .. }));
    if upload::brings_a_blob(&request) {
        let granted = refused || authorize(shared, &request).is_none();
        if !granted || refused {
            // Answered before the bytes have come, as servers and proxies do.
            let early = answer(shared, &request, &faults);
            send(shared, stream, &request, early, &faults)?;
            io::copy(&mut reader.take(upload::length(&request)), &mut io::sink())?;
            return Ok(());
        }
        request.body = upload::read_blob(shared, stream, reader, &request, &faults)?;
        let answer = answer(shared, &request, &[]);
        return send(shared, stream, &request, answer, &[]);
    }
    let answer = answer(shared, &request, &faults);
    send(shared, stream, &request, answer, &faults)
}

fn take_faults(faults: Option<&mut Vec<(Fault, usize)>>) -> Vec<Fault> {
    let Some(faults) = faults else { return Vec::new() };
    let now = faults.iter().map(|(fault, _)| fault.clone()).collect();
    for (_, times) in faults.iter_mut() {
        *times = times.saturating_sub(1);
    }
    faults.retain(|(_, times)| *times > 0);
    now
}

fn answer(shared: &Shared, request: &Request, faults: &[Fault]) -> Answer {
    let path = request.path.split('?').next().unwrap_or_default();
    for fault in faults {
        match fault {
            Fault::Status { status, retry_after } => {
                let answer = Answer::new(*status).bytes(b"{}".to_vec());
                return match retry_after {
                    Some(value) => answer.with("Retry-After", value),
                    None => answer,
                };
            }
            Fault::Refuse { status, body } => return Answer::new(*status).bytes(body.clone().into_bytes()),
            Fault::RefuseWrites { status, body } if upload::writes(request) => {
                return Answer::new(*status).bytes(body.clone().into_bytes());
            }
            Fault::Redirect { to } if path.starts_with("/v2/") => {
                if let Some(refusal) = authorize(shared, request) {
                    return refusal;
                }
                return Answer::new(307).with("Location", to);
            }
            _ => {}
        }
    }
    if path == "/token" {
        return issue_token(shared, request);
    }
    if path.starts_with("/storage/") {
        let signature = shared.state().signature.clone();
        if signature.is_some_and(|signature| !request.path.ends_with(&format!("sig={signature}"))) {
            return Answer::new(403);
        }
        return content(shared, request, faults);
    }
    if let Some(refusal) = authorize(shared, request) {
        return refusal;
    }
    for fault in faults {
        if let Fault::Replace(bytes) = fault {
            return Answer::new(200).bytes(bytes.clone());
        }
    }
    let repository = format!("/v2/{}/", shared.repository);
    match path.strip_prefix(&repository).and_then(|rest| rest.split_once('/')) {
        _ if path == "/v2/" => Answer::new(200).bytes(b"{}".to_vec()),
        Some((kind, _)) if upload::writes(request) => upload::write(shared, request, kind, faults),
        Some(("referrers", subject)) => upload::referrers(shared, request, subject),
        Some(("manifests" | "blobs", _)) => content(shared, request, faults),
        Some(("tags", "list")) => tags(shared, request),
        _ => Answer::new(404),
    }
}

fn authorize(shared: &Shared, request: &Request) -> Option<Answer> {
    let state = shared.state();
    let header = request.header("authorization");
    let (granted, challenge) = match &state.auth {
        Auth::Open => return None,
        Auth::Basic { user, password } => {
            (header == Some(basic(user, password).as_str()), "Basic realm=\"fault\"".to_owned())
        }
        Auth::Bearer { realm, .. } => {
            let token = header.and_then(|header| header.strip_prefix("Bearer ")).unwrap_or_default();
            let realm = realm.clone().unwrap_or_else(|| format!("http://{}/token", shared.address));
            let wanted = upload::wanted_scopes(shared, request);
            let challenge = format!("Bearer realm=\"{realm}\",service=\"fault\",scope=\"{}\"", wanted.join(" "));
            let granted = state.tokens.get(token).is_some_and(|(until, scopes)| {
                Instant::now() < *until && wanted.iter().all(|one| scopes.split(' ').any(|own| own.starts_with(one)))
            });
            (granted, challenge)
        }
    };
    (!granted).then(|| Answer::new(401).with("WWW-Authenticate", challenge).bytes(b"{}".to_vec()))
}

fn issue_token(shared: &Shared, request: &Request) -> Answer {
    let Auth::Bearer { login, expires_in, .. } = shared.state().auth.clone() else { return Answer::new(404) };
    let form = String::from_utf8_lossy(&request.body).into_owned();
    let (granted, key) = match login {
        Login::Anyone => (true, "token"),
        Login::Nobody => (false, "token"),
        Login::Password { user, password } => {
            (request.header("authorization") == Some(basic(&user, &password).as_str()), "token")
        }
        Login::RefreshToken(token) => {
            let has = |pair: String| form.split('&').any(|part| part == pair);
            let right = has("grant_type=refresh_token".to_owned()) && has(format!("refresh_token={token}"));
            (request.method == "POST" && right, "access_token")
        }
    };
    if !granted {
        return Answer::new(401);
    }
    let token = shared.new_token(Duration::from_secs(expires_in), upload::asked_scopes(request));
    Answer::new(200).bytes(format!(r#"{{"{key}":"{token}","expires_in":{expires_in}}}"#).into_bytes())
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
}

fn content(shared: &Shared, request: &Request, faults: &[Fault]) -> Answer {
    let target = request.target();
    let found = {
        let state = shared.state();
        let digest: Option<Digest> = target.parse().ok().or_else(|| state.tags.get(&target).copied());
        digest.and_then(|digest| Some((digest, Arc::clone(state.contents.get(&digest)?))))
    };
    let Some((digest, content)) = found else { return Answer::new(404).bytes(b"{}".to_vec()) };
    let size = content.len();
    let mut answer = Answer::new(200).with("Docker-Content-Digest", digest);
    if request.path.contains("/manifests/") {
        let mut start = vec![0; size.min(BLOCK) as usize];
        content.read_at(0, &mut start);
        let is_index = String::from_utf8_lossy(&start).contains("\"manifests\"");
        let kind = if is_index { "index" } else { "manifest" };
        answer = answer.with("Content-Type", format!("application/vnd.oci.image.{kind}.v1+json"));
    }
    let ignore = faults.iter().any(|fault| matches!(fault, Fault::IgnoreRange));
    let (first, end) = match request.range().filter(|_| !ignore) {
        Some((first, last)) if first < size && first <= last => {
            let end = size.min(last + 1);
            answer.status = 206;
            let stated = faults.iter().find_map(|fault| match fault {
                Fault::ContentRange(text) => Some(text.clone()),
                _ => None,
            });
            let stated = stated.unwrap_or_else(|| format!("bytes {first}-{}/{size}", end - 1));
            answer = answer.with("Content-Range", stated);
            (first, end)
        }
        Some(_) => return Answer::new(416).with("Content-Range", format!("bytes */{size}")),
        None => (0, size),
    };
    answer.body = Some((content, first, end));
    answer
}

fn tags(shared: &Shared, request: &Request) -> Answer {
    let state = shared.state();
    let query = request.path.split_once('?').map_or("", |(_, query)| query);
    let last = query.split('&').find_map(|pair| pair.strip_prefix("last=")).unwrap_or_default();
    let rest: Vec<&String> = state.tags.keys().filter(|tag| last.is_empty() || tag.as_str() > last).collect();
    let page = &rest[..state.page.unwrap_or(rest.len()).min(rest.len())];
    let body = serde_json::json!({ "name": shared.repository, "tags": page }).to_string();
    let mut answer = Answer::new(200).bytes(body.into_bytes());
    if page.len() < rest.len() {
        answer = answer.with("Link", "<ignored>; rel=\"next\"");
    }
    answer
}

fn send(
    shared: &Shared,
    mut stream: &TcpStream,
    request: &Request,
    answer: Answer,
    faults: &[Fault],
) -> io::Result<()> {
    let extra = faults.iter().find_map(|fault| match fault {
        Fault::Longer { extra } => Some(*extra),
        _ => None,
    });
    let mut head = format!("HTTP/1.1 {} Fault\r\n", answer.status);
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    for fault in faults {
        if let Fault::Header(name, value) = fault {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
    }
    match extra {
        Some(_) => head.push_str("Connection: close\r\n"),
        None => head.push_str(&format!("Content-Length: {}\r\n", answer.length())),
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())?;
    if request.method != "HEAD"
        && let Some((content, first, end)) = &answer.body
    {
        send_body(shared, stream, &request.target(), content, *first, *end, faults)?;
    }
    match extra {
        Some(extra) => {
            stream.write_all(&vec![b'x'; extra as usize])?;
            Err(io::ErrorKind::ConnectionAborted.into())
        }
        None => Ok(()),
    }
}

/// Sends a body in blocks, each as long as the next fault or gate allows.
fn send_body(
    shared: &Shared,
    mut stream: &TcpStream,
    target: &str,
    content: &Content,
    first: u64,
    end: u64,
    faults: &[Fault],
) -> io::Result<()> {
    let gate = shared.state().gates.get(target).cloned();
    let drip = faults.iter().find_map(|fault| match fault {
        Fault::Drip { every } => Some(*every),
        _ => None,
    });
    let mut at_gate = gate.is_some();
    let mut offset = first;
    loop {
        let sent = offset - first;
        if let Some(gate) = gate.as_ref().filter(|gate| at_gate && sent >= gate.after) {
            at_gate = false;
            gate.reached.fetch_add(1, Ordering::Relaxed);
            while !gate.open.load(Ordering::Relaxed) && !shared.stopped() {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        let mut length = BLOCK.min(end - offset);
        for fault in faults {
            let (Fault::Truncate { after } | Fault::Reset { after } | Fault::Hang { after }) = fault else { continue };
            if sent < *after {
                length = length.min(after - sent);
                continue;
            }
            match fault {
                Fault::Hang { .. } => shared.sleep(FOREVER),
                // Linger 0 makes the close a reset.
                Fault::Reset { .. } => rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO))?,
                _ => {}
            }
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        if length == 0 {
            return Ok(());
        }
        if let Some(gate) = gate.as_ref().filter(|gate| at_gate && sent < gate.after) {
            length = length.min(gate.after - sent);
        }
        if drip.is_some() {
            length = 1;
        }
        let mut block = vec![0; length as usize];
        content.read_at(offset, &mut block);
        for fault in faults {
            if let Fault::FlipBit { offset: at } = fault
                && (offset..offset + length).contains(at)
            {
                block[(at - offset) as usize] ^= 1;
            }
        }
        wait_for_turn(shared, length);
        // Counted before it is written, so that who has read it finds it counted.
        *shared.state().bytes.entry(target.to_owned()).or_default() += length;
        stream.write_all(&block)?;
        offset += length;
        if let Some(every) = drip {
            shared.sleep(every);
        }
    }
}

/// Shares the rate among all connections: each block takes its turn on one line.
fn wait_for_turn(shared: &Shared, length: u64) {
    let turn = {
        let mut state = shared.state();
        let Some(rate) = state.rate else { return };
        let now = Instant::now();
        let start = state.rate_free_at.map_or(now, |free| free.max(now));
        let end = start + Duration::from_secs_f64(length as f64 / rate as f64);
        state.rate_free_at = Some(end);
        end
    };
    shared.sleep(turn.saturating_duration_since(Instant::now()));
}
