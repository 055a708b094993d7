//! A repository in a registry, over the OCI distribution API.
//!
//! oci-client gives the vocabulary: `Reference` with Docker Hub's host, and the media types. The requests are our own,
//! manifests and tags included, because oci-client 0.18 can't keep these promises: it reads a manifest or token of any
//! length into memory, hides status and `Retry-After`, takes no client certificate, follows redirects from https to
//! plain http, does not renew a token on 401, and asks a token server of any scheme by itself once a stored token has
//! run out.
//!
//! What an answer must keep to: status 206 with exactly the range that was asked and the size that the manifest states,
//! and exactly as many bytes; 200 only where the whole blob was asked. The bytes remain unverified.

mod push;
mod referrers;
mod tags;
mod upload;

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use oci_client::Reference;
use oci_client::manifest::{
    IMAGE_MANIFEST_LIST_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE,
};
use reqwest::header::{
    ACCEPT, CONTENT_ENCODING, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue, IF_NONE_MATCH, RANGE, RETRY_AFTER,
};
use reqwest::{Method, Response, StatusCode};
use url::Url;

use crate::digest::{Digest, Unverified};
use crate::source::access::Access;
use crate::source::connection::Connection;
use crate::source::credentials::Keyring;
use crate::source::reach::{Away, Reach};
use crate::source::token::Tokens;
use crate::source::transport::{Answer, Body, Call, Transport, authority, is_loopback};
use crate::source::{BlobId, ByteStream, MAX_MANIFEST, Source, SourceError, body, check_range, retry_after};

/// Final URLs that are remembered: a kit has tens of layers, and forgetting costs one redirect.
const MAX_REMEMBERED: usize = 4096;
/// The longest tag, by the distribution specification.
pub(super) const MAX_TAG: usize = 128;

/// One repository in one registry.
pub struct Registry {
    /// `host/repository` as people write it.
    name: String,
    /// The host as people and credential files write it.
    host: String,
    /// `https://host/v2/repository/`.
    base: Url,
    transport: Transport,
    tokens: Tokens,
    reach: Reach,
    /// Where the registry redirected the last request for a blob. The query may be a signature.
    remembered: Mutex<HashMap<Digest, Url>>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Registry").field(&self.name).finish()
    }
}

/// A request below the repository.
struct Ask<'a> {
    method: Method,
    url: &'a Url,
    headers: HeaderMap,
    body: Body<'a>,
    access: Access,
}

impl<'a> Ask<'a> {
    /// A request that reads.
    fn read(method: Method, url: &'a Url, headers: HeaderMap) -> Self {
        Self { method, url, headers, body: Body::None, access: Access::Pull }
    }
}

impl Registry {
    /// A repository. No request is made yet.
    pub fn new(host: &str, repository: &str, connection: &Connection, kit_home: &Path) -> Result<Self, SourceError> {
        let name = format!("{host}/{repository}");
        let base = base_url(host, repository, connection.plain_http).map_err(|what| SourceError::Setup {
            what: format!("{name:?} is not a repository: {what}"),
            cause: None,
        })?;
        let transport = Transport::new(connection, &base, name.clone())?;
        let secure = base.scheme() == "https";
        let tokens = Tokens::new(transport.clone(), Keyring::of_user(kit_home), host, repository, secure);
        let (host, reach) = (host.to_owned(), connection.reach.clone());
        Ok(Self { name, host, base, transport, tokens, reach, remembered: Mutex::default() })
    }

    /// Sends a request, and notes whether the host answers.
    async fn ask(&self, ask: &Ask<'_>) -> Result<Answer, SourceError> {
        let asking = self.reach.ask(&self.host, &self.name);
        let outcome = self.ask_with_token(ask).await;
        match &outcome {
            Err(error) if error.is_transient() => asking.failed(error.clone()),
            Ok(answer) if answer.response.status().is_server_error() => {
                asking.failed(self.status_error(answer, "a request"));
            }
            Ok(_) | Err(_) => asking.answered(),
        }
        outcome
    }

    /// Sends a request; a 401 is answered with a new token, once.
    async fn ask_with_token(&self, ask: &Ask<'_>) -> Result<Answer, SourceError> {
        let mut grant = self.tokens.current(&ask.access).await?;
        let mut renewed = false;
        loop {
            let call = Call {
                method: ask.method.clone(),
                url: ask.url,
                headers: ask.headers.clone(),
                authorization: grant.as_ref().map(|grant| &grant.header),
                body: ask.body,
            };
            let answer = self.transport.send(&call).await?;
            let unauthorized = answer.response.status() == StatusCode::UNAUTHORIZED;
            if !unauthorized || !answer.same_origin || renewed {
                return Ok(answer);
            }
            grant = Some(self.tokens.answer(answer.response.headers(), grant.as_ref(), &ask.access).await?);
            renewed = true;
        }
    }

    /// The answer with this status, or the error that another status means.
    fn expect(&self, answer: Answer, allowed: &[StatusCode], what: &str) -> Result<Answer, SourceError> {
        if allowed.contains(&answer.response.status()) {
            self.check_is_no_page(&answer.response)?;
            return Ok(answer);
        }
        Err(self.status_error(&answer, what))
    }

    /// Refuses a web page. It says nothing of the registry, so that this is as if nobody had answered: a network that wants
    /// a login answers all requests in the place of their hosts.
    fn check_is_no_page(&self, response: &Response) -> Result<(), SourceError> {
        if is_page(response.headers()) { Err(self.stranger(response.url())) } else { Ok(()) }
    }

    /// Somebody else has answered than a registry.
    fn stranger(&self, url: &Url) -> SourceError {
        let what = format!(
            "a web page came where {} should answer: the network wants a login, or the host is no registry",
            authority(url)
        );
        SourceError::Transport { source_name: self.name.clone(), what, cause: None }
    }

    fn status_error(&self, answer: &Answer, what: &str) -> SourceError {
        if answer.same_origin {
            return status_error(&self.name, &answer.response, what, &self.host, &self.tokens.tried());
        }
        // A storage server that the registry sent us to: no login helps there.
        let host = authority(answer.response.url());
        let tried = format!("{} redirected there", self.host);
        match status_error(&self.name, &answer.response, what, &host, &tried) {
            SourceError::Unauthorized { host, tried } => SourceError::Forbidden { host, what: what.to_owned(), tried },
            error => error,
        }
    }

    fn url(&self, kind: &str, last: &str) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().push(kind).push(last);
        }
        url
    }

    /// A manifest, and the digest that a header tells.
    async fn get_manifest(&self, reference: &str, what: &str) -> Result<(Option<Digest>, Vec<u8>), SourceError> {
        let url = self.url("manifests", reference);
        let ask = Ask::read(Method::GET, &url, manifest_headers());
        let answer = self.expect(self.ask(&ask).await?, &[StatusCode::OK], what)?;
        let stated = stated_digest(answer.response.headers());
        Ok((stated, self.transport.read_small(answer.response, MAX_MANIFEST).await?))
    }

    /// What errors call a tag; one that is none is in no repository, and leads to no request.
    fn tag_name(&self, tag: &str) -> Result<String, SourceError> {
        let what = format!("tag {tag:?}");
        if is_tag(tag) {
            return Ok(what);
        }
        let what = format!("{what} (a tag is at most {MAX_TAG} of A-Z a-z 0-9 _ . -, not first . or -)");
        Err(SourceError::NotFound { what, source_name: self.name.clone() })
    }

    fn remembered(&self) -> MutexGuard<'_, HashMap<Digest, Url>> {
        // A map of URLs is right after any panic.
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks where the last redirect led. `None` if there was none or it leads nowhere any more: then the registry knows.
    async fn ask_remembered(&self, digest: &Digest, headers: &HeaderMap) -> Option<Answer> {
        let url = self.remembered().get(digest).cloned()?;
        let (method, headers) = (Method::GET, headers.clone());
        let call = Call { method, url: &url, headers, authorization: None, body: Body::None };
        let answer = self.transport.send(&call).await.ok().filter(|answer| answer.response.status().is_success());
        if answer.is_none() {
            self.remembered().remove(digest);
        }
        answer.map(|answer| Answer { same_origin: false, ..answer })
    }

    fn remember(&self, digest: Digest, answer: &Answer) {
        // Within the registry's own origin the token is needed, and the redirect is cheap.
        let Some(url) = answer.redirected.as_ref().filter(|_| !answer.same_origin) else { return };
        let mut remembered = self.remembered();
        if remembered.len() >= MAX_REMEMBERED {
            remembered.clear();
        }
        remembered.insert(digest, url.clone());
    }

    /// Whether an answer is the range that was asked, and nothing else.
    fn check_blob(&self, answer: Answer, blob: &BlobId, range: &Range<u64>) -> Result<ByteStream, SourceError> {
        // A blob may be a page; one of another length is not the blob.
        if answer.response.status() == StatusCode::OK && answer.response.content_length() != Some(blob.size) {
            self.check_is_no_page(&answer.response)?;
        }
        let what = format!("blob {}", blob.digest);
        let length = range.end - range.start;
        let headers = answer.response.headers();
        let wrong = |problem: String| Err(self.transport.protocol(format!("{what}: {problem}")));
        match answer.response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let stated = headers.get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).unwrap_or("none");
                let expected = (range.start, range.end - 1, blob.size);
                if content_range(stated) != Some(expected) {
                    let (first, last, size) = expected;
                    return wrong(format!("expected Content-Range `bytes {first}-{last}/{size}`, found `{stated}`"));
                }
            }
            StatusCode::OK if length == blob.size => {}
            StatusCode::OK => return Err(SourceError::RangeIgnored { source_name: self.name.clone() }),
            StatusCode::RANGE_NOT_SATISFIABLE => {
                return wrong(format!("it is shorter than the {} bytes that the manifest states", blob.size));
            }
            _ => return Err(self.status_error(&answer, &what)),
        }
        if let Some(encoding) = headers.get(CONTENT_ENCODING).filter(|value| *value != "identity") {
            return wrong(format!("it came with Content-Encoding {encoding:?}, which was not asked for"));
        }
        match answer.response.content_length() {
            Some(stated) if stated != length => wrong(format!("expected {length} bytes, Content-Length is {stated}")),
            _ => Ok(body::exactly(answer.response, length, self.transport.timeouts, &self.name)),
        }
    }
}

#[async_trait]
impl Source for Registry {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn resolve(&self, tag: &str) -> Result<Digest, SourceError> {
        let what = self.tag_name(tag)?;
        let url = self.url("manifests", tag);
        let ask = Ask::read(Method::HEAD, &url, manifest_headers());
        let answer = self.ask(&ask).await?;
        let digest = match answer.response.status() {
            StatusCode::OK => {
                self.check_is_no_page(&answer.response)?;
                stated_digest(answer.response.headers())
            }
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => None,
            _ => return Err(self.status_error(&answer, &what)),
        };
        match digest {
            // It proves nothing, and need not: the manifest is fetched by this digest and hashed.
            Some(digest) => Ok(digest),
            None => Ok(self.tagged(tag).await?.0),
        }
    }

    async fn moved(&self, tag: &str, known: &Digest) -> Result<Option<Digest>, SourceError> {
        let what = self.tag_name(tag)?;
        let mut headers = manifest_headers();
        // A manifest's entity tag is its digest, where a registry has them at all.
        if let Ok(value) = HeaderValue::from_str(&format!("\"{known}\"")) {
            headers.insert(IF_NONE_MATCH, value);
        }
        let url = self.url("manifests", tag);
        let answer = self.ask(&Ask::read(Method::HEAD, &url, headers)).await?;
        let found = match answer.response.status() {
            StatusCode::NOT_MODIFIED => return Ok(None),
            StatusCode::OK => {
                self.check_is_no_page(&answer.response)?;
                stated_digest(answer.response.headers())
            }
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => None,
            _ => return Err(self.status_error(&answer, &what)),
        };
        let found = match found {
            Some(found) => found,
            None => self.tagged(tag).await?.0,
        };
        Ok(Some(found).filter(|digest| digest != known))
    }

    async fn tagged(&self, tag: &str) -> Result<(Digest, Option<Unverified>), SourceError> {
        let what = self.tag_name(tag)?;
        let (stated, bytes) = self.get_manifest(tag, &what).await?;
        let digest = match stated {
            Some(digest) => digest,
            // Whatever came would be right by its own digest.
            None if serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).is_err() => {
                return Err(self.stranger(&self.base));
            }
            None => Digest::of(&bytes),
        };
        Ok((digest, Some(Unverified::new(bytes))))
    }

    async fn manifest(&self, digest: &Digest) -> Result<Unverified, SourceError> {
        let (_, bytes) = self.get_manifest(&digest.to_string(), &format!("manifest {digest}")).await?;
        Ok(Unverified::new(bytes))
    }

    async fn blob(&self, blob: &BlobId, range: Range<u64>) -> Result<ByteStream, SourceError> {
        check_range(blob, &range, &self.name)?;
        let mut headers = HeaderMap::new();
        if range != (0..blob.size)
            && let Ok(value) = HeaderValue::from_str(&format!("bytes={}-{}", range.start, range.end - 1))
        {
            headers.insert(RANGE, value);
        }
        let answer = match self.ask_remembered(&blob.digest, &headers).await {
            Some(answer) => answer,
            None => {
                let url = self.url("blobs", &blob.digest.to_string());
                let answer = self.ask(&Ask::read(Method::GET, &url, headers)).await?;
                if answer.response.status().is_success() {
                    self.remember(blob.digest, &answer);
                }
                answer
            }
        };
        self.check_blob(answer, blob, &range)
    }

    async fn tags(&self) -> Result<Vec<String>, SourceError> {
        self.list_tags().await
    }

    async fn referrers(&self, subject: &Digest, artifact_type: &str) -> Result<Vec<Digest>, SourceError> {
        self.find_referrers(subject, artifact_type).await
    }

    fn away(&self) -> Option<Away> {
        self.reach.away(&self.host)
    }
}

/// The error that a status means. `what` was asked of `host` with the credentials `tried`.
pub(super) fn status_error(source_name: &str, response: &Response, what: &str, host: &str, tried: &str) -> SourceError {
    let (source_name, what) = (source_name.to_owned(), what.to_owned());
    let (host, tried) = (host.to_owned(), tried.to_owned());
    match response.status().as_u16() {
        404 | 410 => SourceError::NotFound { what, source_name },
        401 => SourceError::Unauthorized { host, tried },
        403 => SourceError::Forbidden { host, what, tried },
        status @ (408 | 429 | 500..=599) => {
            let header = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
            let retry_after = header.and_then(|value| retry_after::parse(value, SystemTime::now()));
            SourceError::Status { source_name, status, retry_after, words: "".into() }
        }
        status => SourceError::Protocol { source_name, what: format!("unexpected status {status} for {what}") },
    }
}

/// The digest that an answer states of a manifest. It proves nothing.
fn stated_digest(headers: &HeaderMap) -> Option<Digest> {
    headers.get("docker-content-digest").and_then(|value| value.to_str().ok()?.parse().ok())
}

/// Whether an answer is for people to look at.
fn is_page(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    kind.is_some_and(|kind| kind.trim_start().to_ascii_lowercase().starts_with("text/html"))
}

fn manifest_headers() -> HeaderMap {
    let types =
        [OCI_IMAGE_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, IMAGE_MANIFEST_LIST_MEDIA_TYPE];
    types.into_iter().map(|media_type| (ACCEPT, HeaderValue::from_static(media_type))).collect()
}

/// The API's URL of a repository. Nothing in host or repository can lead to another path.
fn base_url(host: &str, repository: &str, plain_http: bool) -> Result<Url, String> {
    let named = Reference::with_tag(host.to_owned(), repository.to_owned(), "latest".to_owned());
    let host = named.resolve_registry();
    let parse = |scheme: &str| Url::parse(&format!("{scheme}://{host}/")).ok();
    let mut url = parse("https")
        .filter(|url| authority_is(url, host))
        .ok_or_else(|| format!("{host:?} is not a host; expected a name or address, and a port where needed"))?;
    if plain_http || is_loopback(&url) {
        // Parsed again: each scheme has its own default port.
        url = parse("http").ok_or_else(|| format!("{host:?} is not a host"))?;
    }
    let is_component = |part: &str| {
        let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
        part.bytes().all(|c| inner(c) || matches!(c, b'.' | b'_' | b'-'))
            && part.bytes().next().is_some_and(inner)
            && part.bytes().next_back().is_some_and(inner)
    };
    if !repository.split('/').all(is_component) {
        return Err("expected lower-case letters, digits and . _ - between slashes".to_owned());
    }
    url.set_path(&format!("/v2/{repository}/"));
    Ok(url)
}

/// Whether a URL is the host and nothing more: no user, path or query slipped in.
fn authority_is(url: &Url, host: &str) -> bool {
    url.has_host()
        && url.username().is_empty()
        && url.password().is_none()
        && url.path() == "/"
        && url.query().is_none()
        && url.fragment().is_none()
        && !host.contains(['/', '\\', '@', '?', '#'])
        && !host.chars().any(|c| c.is_whitespace() || c.is_control())
}

/// Whether a text is a tag by the distribution specification.
pub(super) fn is_tag(tag: &str) -> bool {
    let word = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
    tag.len() <= MAX_TAG
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|c| word(c) || matches!(c, b'.' | b'-'))
}

/// First byte, last byte and size of `bytes first-last/size`.
fn content_range(text: &str) -> Option<(u64, u64, u64)> {
    let (range, size) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?, size.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(host: &str, repository: &str, plain_http: bool) -> Result<String, String> {
        base_url(host, repository, plain_http).map(String::from)
    }

    #[test]
    fn loopback_hosts_get_plain_http_and_others_only_if_asked() {
        for (host, url) in [
            ("registry.example.com", "https://registry.example.com/v2/a/b/"),
            ("localhost:5000", "http://localhost:5000/v2/a/b/"),
            ("127.0.0.1:5000", "http://127.0.0.1:5000/v2/a/b/"),
            ("[::1]:5000", "http://[::1]:5000/v2/a/b/"),
            ("docker.io", "https://index.docker.io/v2/a/b/"),
        ] {
            assert_eq!(base(host, "a/b", false).as_deref(), Ok(url));
        }
        assert_eq!(base("registry:443", "a", true).as_deref(), Ok("http://registry:443/v2/a/"));
    }

    #[test]
    fn no_name_leads_to_another_path() {
        for host in ["", "a/b", "me@host", "host?x", "host#x", "ho st", "host\\x", "host:port", "a\nb"] {
            assert!(base(host, "kit", false).is_err(), "{host}");
        }
        for repository in ["", "..", "a/../b", "a//b", "/a", "a/", "A", "a?b", "a%2fb", "a/.", "a b", ".a"] {
            assert!(base("registry.example.com", repository, false).is_err(), "{repository}");
        }
        for tag in ["", "../x", "a/b", "-a", ".a", "a?b", &"a".repeat(129)] {
            assert!(!is_tag(tag), "{tag}");
        }
        assert!(is_tag("1.2.0_rc-1"));
    }

    #[test]
    fn a_content_range_is_read_or_refused() {
        assert_eq!(content_range("bytes 0-9/100"), Some((0, 9, 100)));
        for text in ["bytes 0-9/*", "bytes */100", "0-9/100", "bytes 0-9", "items 0-9/100", "bytes 0-x/100"] {
            assert_eq!(content_range(text), None, "{text}");
        }
    }
}
