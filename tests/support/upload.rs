//! What the fault server takes: blobs in one PUT, manifests, lists of referrers.
//!
//! ```text
//! POST /v2/<repository>/blobs/uploads/[?mount=…&from=…]    opens an upload, or mounts
//! PUT  /v2/<repository>/blobs/uploads/<session>?digest=…   brings a blob, also below /elsewhere
//! PUT  /v2/<repository>/manifests/<tag or digest>
//! GET  /v2/<repository>/referrers/<digest>
//! ```

use std::io::{self, BufReader, Read as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use kitfs::digest::Digest;
use serde_json::{Value, json};

use super::content::Content;
use super::fault::{Fault, Request, Shared};
use super::wire::{Answer, FOREVER};

/// What is read at once.
const BLOCK: u64 = 16 << 10;

/// Whether a request's body is a blob, which is read piece by piece.
pub(super) fn brings_a_blob(request: &Request) -> bool {
    request.method == "PUT" && request.path.contains("/blobs/uploads/")
}

/// Whether a request changes something.
pub(super) fn writes(request: &Request) -> bool {
    matches!(request.method.as_str(), "POST" | "PUT" | "DELETE")
}

pub(super) fn length(request: &Request) -> u64 {
    request.header("content-length").and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Reads the bytes of a blob, as far as the faults allow.
pub(super) fn read_blob(
    shared: &Shared,
    stream: &TcpStream,
    reader: &mut BufReader<&TcpStream>,
    request: &Request,
    faults: &[Fault],
) -> io::Result<Vec<u8>> {
    let (target, length) = (request.target(), length(request));
    let mut body = Vec::new();
    while (body.len() as u64) < length {
        let mut next = BLOCK.min(length - body.len() as u64);
        for fault in faults {
            let (Fault::Truncate { after } | Fault::Reset { after } | Fault::Hang { after }) = fault else { continue };
            if (body.len() as u64) < *after {
                next = next.min(after - body.len() as u64);
                continue;
            }
            match fault {
                Fault::Hang { .. } => shared.sleep(FOREVER),
                Fault::Reset { .. } => rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO))?,
                _ => {}
            }
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let start = body.len();
        body.resize(start + next as usize, 0);
        reader.read_exact(&mut body[start..])?;
        *shared.state().uploaded.entry(target.clone()).or_default() += next;
    }
    for fault in faults {
        if let Fault::FlipBit { offset } = fault {
            body[*offset as usize] ^= 1;
        }
    }
    Ok(body)
}

/// Answers a request that changes something below `kind`.
pub(super) fn write(shared: &Shared, request: &Request, kind: &str, faults: &[Fault]) -> Answer {
    match (request.method.as_str(), kind) {
        ("POST", "blobs") => open(shared, request, faults),
        ("PUT", "blobs") => blob(shared, request),
        ("DELETE", "blobs") => Answer::new(204),
        ("PUT", "manifests") => manifest(shared, request),
        _ => Answer::new(405),
    }
}

fn open(shared: &Shared, request: &Request, faults: &[Fault]) -> Answer {
    let mut state = shared.state();
    let mounted = request.query("mount").and_then(|digest| digest.parse().ok());
    if mounted.is_some_and(|digest: Digest| state.mounts && state.contents.contains_key(&digest)) {
        return Answer::new(201);
    }
    state.sessions += 1;
    let own = format!("/v2/{}/blobs/uploads/session-{}?_state=a%2Fb", shared.repository, state.sessions);
    let location = faults.iter().find_map(|fault| match fault {
        Fault::Location(location) => Some(location.clone()),
        _ => None,
    });
    match location.unwrap_or(Some(own)) {
        Some(location) => Answer::new(202).with("Location", location),
        None => Answer::new(202),
    }
}

fn blob(shared: &Shared, request: &Request) -> Answer {
    let digest = Digest::of(&request.body);
    if request.query("digest") != Some(digest.to_string()) {
        return refusal(400, "DIGEST_INVALID", "provided digest did not match uploaded content");
    }
    shared.state().contents.insert(digest, Arc::new(Content::Bytes(request.body.clone())));
    Answer::new(201).with("Docker-Content-Digest", digest)
}

fn manifest(shared: &Shared, request: &Request) -> Answer {
    let (target, digest) = (request.target(), Digest::of(&request.body));
    let Ok(manifest) = serde_json::from_slice::<Value>(&request.body) else {
        return refusal(400, "MANIFEST_INVALID", "no JSON");
    };
    let mut state = shared.state();
    match target.parse::<Digest>() {
        Ok(stated) if stated != digest => return refusal(400, "DIGEST_INVALID", "another digest"),
        Ok(_) => {}
        Err(_) => {
            state.tags.insert(target, digest);
        }
    }
    state.contents.insert(digest, Arc::new(Content::Bytes(request.body.clone())));
    let answer = Answer::new(201).with("Docker-Content-Digest", digest);
    let subject = manifest["subject"]["digest"].as_str().and_then(|text| text.parse::<Digest>().ok());
    match (subject, &mut state.referrers) {
        (Some(subject), Some(referrers)) => {
            let descriptor = json!({"mediaType": request.header("content-type"), "digest": digest,
                "size": request.body.len(), "artifactType": manifest["artifactType"]});
            let list = referrers.entry(subject).or_default();
            if !list.contains(&descriptor) {
                list.push(descriptor);
            }
            answer.with("OCI-Subject", subject)
        }
        _ => answer,
    }
}

/// The list of a subject's referrers, unfiltered as a registry may leave it, in pages of what `set_page` says.
pub(super) fn referrers(shared: &Shared, request: &Request, subject: &str) -> Answer {
    let state = shared.state();
    let Some(all) = &state.referrers else { return Answer::new(404) };
    let list = subject.parse().ok().and_then(|subject: Digest| all.get(&subject)).cloned().unwrap_or_default();
    let from = request.query("from").and_then(|text| text.parse().ok()).unwrap_or(0);
    let end = list.len().min(from + state.page.unwrap_or(usize::MAX / 2));
    let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": list[from..end]});
    let answer = Answer::new(200)
        .with("Content-Type", "application/vnd.oci.image.index.v1+json")
        .bytes(index.to_string().into_bytes());
    if end < list.len() { answer.with("Link", format!("<?from={end}>; rel=\"next\"")) } else { answer }
}

fn refusal(status: u16, code: &str, message: &str) -> Answer {
    let body = json!({"errors": [{"code": code, "message": message}]});
    Answer::new(status).bytes(body.to_string().into_bytes())
}

/// The scopes that a token needs for a request.
pub(super) fn wanted_scopes(shared: &Shared, request: &Request) -> Vec<String> {
    let push = if writes(request) { ",push" } else { "" };
    let mut wanted = vec![format!("repository:{}:pull{push}", shared.repository)];
    wanted.extend(request.query("from").filter(|_| writes(request)).map(|from| format!("repository:{from}:pull")));
    wanted
}

/// The scopes that a token server is asked for.
pub(super) fn asked_scopes(request: &Request) -> String {
    let query = request.path.split_once('?').map_or("", |(_, query)| query).as_bytes().to_vec();
    let pairs = [query, request.body.clone()];
    let scopes = pairs.iter().flat_map(|text| url::form_urlencoded::parse(text));
    scopes.filter(|(key, _)| key == "scope").map(|(_, value)| value.into_owned()).collect::<Vec<_>>().join(" ")
}
