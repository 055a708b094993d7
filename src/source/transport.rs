//! One HTTP request over our own client: redirects by hand, deadlines, and errors that name no secret.
//!
//! Invariants:
//! - The `Authorization` header goes to the origin (scheme, host, port) it was meant for and no other; once a redirect
//!   has left that origin it is not sent again. `Range` is kept.
//! - Nothing goes from https to plain http.
//! - Only what reads follows a redirect: a write goes where it was sent, or nowhere.
//! - A URL's query may be a signature: it is in no error and no log line.

use std::sync::Arc;

use bytes::Bytes;
use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Method, Response, StatusCode};
use url::Url;

use crate::source::clients::Client;
use crate::source::connection::{Connection, Timeouts};
use crate::source::{SourceError, body};

/// Registries need one or two; more is a loop.
const MAX_REDIRECTS: usize = 5;
/// The client of one source.
#[derive(Clone)]
pub(super) struct Transport {
    client: Arc<Client>,
    /// The source, as errors name it.
    pub(super) name: String,
    pub(super) timeouts: Timeouts,
}

/// One request.
pub(super) struct Call<'a> {
    pub(super) method: Method,
    pub(super) url: &'a Url,
    pub(super) headers: HeaderMap,
    pub(super) authorization: Option<&'a HeaderValue>,
    /// What is sent along.
    pub(super) body: Body<'a>,
}

/// What a request sends along, as often as it is asked.
#[derive(Clone, Copy)]
pub(super) enum Body<'a> {
    None,
    /// An HTML form. It holds a secret.
    Form(&'a [(&'a str, &'a str)]),
    Bytes(&'a Bytes),
}

/// The answer to a request, after its redirects.
pub(super) struct Answer {
    pub(super) response: Response,
    /// The URL that answered, where it is not the one that was asked.
    pub(super) redirected: Option<Url>,
    /// Whether `Authorization` may go to that URL: whether every hop stayed on the origin.
    pub(super) same_origin: bool,
}

impl Transport {
    /// A client for the registry at `base`, which errors call `name`.
    pub(super) fn new(connection: &Connection, base: &Url, name: String) -> Result<Self, SourceError> {
        let client = connection.clients.get(connection, base)?;
        Ok(Self { client, name, timeouts: connection.timeouts })
    }

    /// Sends a request and follows its redirects, until the header of the last answer is here.
    pub(super) async fn send(&self, call: &Call<'_>) -> Result<Answer, SourceError> {
        let mut url = call.url.clone();
        let mut same_origin = true;
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send_once(call, &url, same_origin).await?;
            let reads = matches!(call.method, Method::GET | Method::HEAD);
            if !is_redirect(response.status()) || !reads {
                let redirected = (url != *call.url).then_some(url);
                return Ok(Answer { response, redirected, same_origin });
            }
            let location = response.headers().get(LOCATION).map(HeaderValue::as_bytes);
            let next = next_hop(&url, location).map_err(|what| self.protocol(what))?;
            same_origin &= next.origin() == url.origin();
            url = next;
        }
        Err(self.protocol(format!("more than {MAX_REDIRECTS} redirects")))
    }

    async fn send_once(&self, call: &Call<'_>, url: &Url, same_origin: bool) -> Result<Response, SourceError> {
        let mut request = self
            .client
            .to(url)?
            .request(call.method.clone(), url.clone())
            .headers(call.headers.clone())
            // A range of a compressed body is not a range of the blob.
            .header(ACCEPT_ENCODING, "identity");
        if let Some(authorization) = call.authorization.filter(|_| same_origin) {
            request = request.header(AUTHORIZATION, authorization);
        }
        request = match call.body {
            Body::None => request,
            Body::Form(form) => request.form(form),
            Body::Bytes(bytes) => request.body(bytes.clone()),
        };
        match tokio::time::timeout(self.timeouts.answer, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(self.broken(&authority(url), error)),
            Err(_) => Err(self.silent(&authority(url))),
        }
    }

    /// A PUT of a body of `length` bytes that comes as a stream. When to give up is the caller's to say.
    pub(super) fn put_stream(
        &self,
        url: &Url,
        authorization: Option<&HeaderValue>,
        length: u64,
        body: reqwest::Body,
    ) -> Result<impl Future<Output = Result<Response, reqwest::Error>> + use<>, SourceError> {
        let mut request = self
            .client
            .to(url)?
            .put(url.clone())
            .header(CONTENT_LENGTH, length)
            .header(CONTENT_TYPE, "application/octet-stream")
            .body(body);
        if let Some(authorization) = authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        Ok(request.send())
    }

    /// A whole answer of at most `cap` bytes, counted while it is read.
    pub(super) async fn read_small(&self, mut response: Response, cap: u64) -> Result<Vec<u8>, SourceError> {
        let host = authority(response.url());
        match tokio::time::timeout(self.timeouts.answer, body::read_capped(&mut response, cap)).await {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(body::Unread::TooLong)) => {
                Err(self.protocol(format!("{host} sent more than {cap} bytes where a manifest, tags or token belong")))
            }
            Ok(Err(body::Unread::Broken(error))) => Err(self.broken(&host, error)),
            Err(_) => Err(self.silent(&host)),
        }
    }

    /// The body of an answer that refuses something, as far as it is short and there.
    pub(super) async fn read_refusal(&self, response: &mut Response) -> Vec<u8> {
        /// An error in OCI's form has a few hundred bytes.
        const CAP: u64 = 64 << 10;
        match tokio::time::timeout(self.timeouts.answer, body::read_capped(response, CAP)).await {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(_)) | Err(_) => Vec::new(),
        }
    }

    /// An answer that breaks the protocol.
    pub(super) fn protocol(&self, what: String) -> SourceError {
        SourceError::Protocol { source_name: self.name.clone(), what }
    }

    /// A request or answer that failed on its way.
    pub(super) fn broken(&self, host: &str, error: reqwest::Error) -> SourceError {
        broken(&self.name, host, error)
    }

    fn silent(&self, host: &str) -> SourceError {
        let what = format!("{host} did not answer within {:?}", self.timeouts.answer);
        SourceError::Transport { source_name: self.name.clone(), what, cause: None }
    }
}

/// How rustls tells that the other side refused our certificate, or that we have none.
const REFUSALS: [&str; 3] = ["alert: CertificateRequired", "alert: BadCertificate", "alert: UnknownCA"];

/// Turns reqwest's error into ours, without the URL.
pub(super) fn broken(source_name: &str, host: &str, error: reqwest::Error) -> SourceError {
    let error = error.without_url();
    let chain = {
        let mut chain = String::new();
        let mut link: Option<&dyn std::error::Error> = Some(&error);
        while let Some(error) = link {
            chain.push_str(&error.to_string());
            link = error.source();
        }
        chain
    };
    // rustls' errors are only reachable as text.
    let distrusted = if chain.contains("not valid for name") {
        Some(format!("the certificate of {host} is for another name; use that name, or --tls-verify=false"))
    } else if chain.contains("certificate expired") || chain.contains("not valid yet") {
        Some(format!(
            "the certificate of {host} has run out or is not valid yet; have it renewed, or set this machine's clock"
        ))
    } else if chain.contains("invalid peer certificate") {
        Some(format!(
            "the certificate of {host} is not trusted; name its authority with --ca FILE, or use --tls-verify=false"
        ))
    } else if REFUSALS.iter().any(|alert| chain.contains(alert)) {
        Some(format!("{host} wants a client certificate, or another one; name it with --cert FILE and --key FILE"))
    } else {
        None
    };
    if let Some(what) = distrusted {
        return SourceError::Untrusted { source_name: source_name.to_owned(), what, cause: Arc::new(error) };
    }
    if error.is_connect() && error.is_timeout() {
        // The library's error would only say that time has passed.
        let what = format!("{host} took no connection in time, or its name was not found in time");
        return SourceError::Transport { source_name: source_name.to_owned(), what, cause: None };
    }
    let what = if chain.contains("InvalidContentType") {
        format!("{host} does not speak TLS; use --plain-http if it is meant to be plain HTTP")
    } else if error.is_connect() {
        format!("{host} can't be reached")
    } else {
        format!("the connection to {host} broke")
    };
    SourceError::Transport { source_name: source_name.to_owned(), what, cause: Some(Arc::new(error)) }
}

/// Whether a URL's host is this machine.
pub(super) fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(domain)) => domain == "localhost",
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// Host and port of a URL, all of it that may be shown.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or("?");
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Where a `Location` leads, if it may be followed.
pub(super) fn next_hop(from: &Url, location: Option<&[u8]>) -> Result<Url, String> {
    let host = authority(from);
    let mut next = location
        .and_then(|location| std::str::from_utf8(location).ok())
        .and_then(|location| from.join(location).ok())
        .ok_or_else(|| format!("{host} sends us nowhere: its Location is missing or not a URL"))?;
    match (from.scheme(), next.scheme()) {
        (_, "https") | ("http", "http") => {}
        ("https", "http") => return Err(format!("{host} sends us from https to plain http; refused")),
        (_, scheme) => return Err(format!("{host} sends us to a {scheme}: URL; refused")),
    }
    // A user in the URL would become an Authorization header. Neither call can fail for a URL with a host.
    let _ = next.set_username("");
    let _ = next.set_password(None);
    Ok(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hop(from: &str, to: &str) -> Result<String, String> {
        next_hop(&Url::parse(from).expect("valid"), Some(to.as_bytes())).map(String::from)
    }

    #[test]
    fn a_redirect_from_https_to_plain_http_is_refused() {
        let refused = hop("https://registry.example.com/v2/", "http://storage.example.com/x?sig=secret");
        let refused = refused.expect_err("must be refused");
        assert!(refused.contains("from https to plain http"), "{refused}");
        assert!(!refused.contains("secret"), "{refused}");
        assert!(hop("http://localhost:5000/v2/", "http://127.0.0.1/x").is_ok());
        assert!(hop("http://localhost:5000/v2/", "https://storage.example.com/x").is_ok());
        assert!(hop("https://registry.example.com/v2/", "file:///etc/passwd").is_err());
    }

    #[test]
    fn a_relative_redirect_stays_on_its_host() {
        assert_eq!(hop("https://a.example/v2/x", "/y?z").as_deref(), Ok("https://a.example/y?z"));
        assert!(next_hop(&Url::parse("https://a.example").expect("valid"), None).is_err());
    }

    #[test]
    fn a_user_in_a_redirect_is_not_sent() {
        assert_eq!(hop("https://a.example/", "https://me:pw@b.example/x").as_deref(), Ok("https://b.example/x"));
    }

    #[test]
    fn loopback_is_known_by_name_and_by_address() {
        for (url, loopback) in [
            ("http://localhost:5000", true),
            ("http://127.8.9.1", true),
            ("http://[::1]:5000", true),
            ("http://localhost.example.com", false),
            ("http://10.0.0.1", false),
        ] {
            assert_eq!(is_loopback(&Url::parse(url).expect("valid")), loopback, "{url}");
        }
    }
}
