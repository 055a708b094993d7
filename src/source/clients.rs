//! The HTTP clients of a process: who reaches hosts in the same way shares connections, and what TLS knows of a host.
//!
//! HTTP/1.1 only, and none of reqwest's decoding of bodies: ranges over several connections are faster so, and a
//! decoded body would not be the bytes that were asked for.
//!
//! Lock: a plain mutex, held while a client is looked for or set up.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use url::Url;

use super::SourceError;
use super::connection::Connection;
use super::lookup::Lookup;
use super::transport::is_loopback;

/// Shorter than the idle timeout of usual servers (nginx: 75 s), so that no request goes out on a connection that the
/// other side is closing.
const POOL_IDLE: Duration = Duration::from_secs(50);
/// Idle connections to a host that are kept: as many as the fetches of a few layers use. A mount opens more for the first
/// reads of its layers, which a registry should not hold for nothing.
const MAX_IDLE: usize = 32;
/// The variables that name a proxy for plain HTTP.
const PROXIES: [&str; 4] = ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];

/// The clients that were set up so far. Clones share them.
#[derive(Clone, Default)]
pub struct Clients(Arc<Mutex<Vec<Arc<Client>>>>);

/// A client, or two: one that speaks TLS is set up when it is needed, as loading the system's authorities takes longer
/// than a near registry takes to answer.
pub(super) struct Client {
    settings: Settings,
    /// For plain HTTP, where no proxy may want TLS.
    plain: Option<reqwest::Client>,
    any: OnceLock<reqwest::Client>,
}

/// All that a client depends on.
#[derive(PartialEq, Eq)]
struct Settings {
    tls_verify: bool,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    ca: Option<PathBuf>,
    proxy: Option<String>,
    user_agent: String,
    connect: Duration,
    is_plain: bool,
    is_loopback: bool,
}

impl Clients {
    /// The client for a registry at `base`.
    pub(super) fn get(&self, connection: &Connection, base: &Url) -> Result<Arc<Client>, SourceError> {
        let settings = Settings {
            tls_verify: connection.tls_verify,
            cert: connection.cert.clone(),
            key: connection.key.clone(),
            ca: connection.ca.clone(),
            proxy: connection.proxy.clone(),
            user_agent: connection.user_agent.clone(),
            connect: connection.timeouts.connect,
            is_plain: base.scheme() == "http",
            is_loopback: is_loopback(base),
        };
        let mut clients = self.0.lock().unwrap_or_else(|held| held.into_inner());
        if let Some(client) = clients.iter().find(|client| client.settings == settings) {
            return Ok(client.clone());
        }
        let client = Arc::new(Client::new(settings)?);
        clients.push(client.clone());
        Ok(client)
    }
}

impl Client {
    /// Settings that can't be used are told now, and not when they are needed.
    fn new(settings: Settings) -> Result<Self, SourceError> {
        let has_files = settings.ca.is_some() || settings.cert.is_some() || settings.key.is_some();
        let plain = settings.needs_no_tls().then(|| build(&settings, true)).transpose()?;
        let client = Self { settings, plain, any: OnceLock::new() };
        if client.plain.is_none() || has_files {
            client.any()?;
        }
        Ok(client)
    }

    /// The client for requests to a URL.
    pub(super) fn to(&self, url: &Url) -> Result<&reqwest::Client, SourceError> {
        match &self.plain {
            Some(plain) if url.scheme() == "http" => Ok(plain),
            Some(_) | None => self.any(),
        }
    }

    fn any(&self) -> Result<&reqwest::Client, SourceError> {
        if let Some(client) = self.any.get() {
            return Ok(client);
        }
        let client = match build(&self.settings, false) {
            Ok(client) => client,
            // A slim container has no certificate authorities. Plain HTTP needs none.
            Err(_) if self.settings.is_plain && self.settings.ca.is_none() => build(&self.settings, true)?,
            Err(error) => return Err(error),
        };
        Ok(self.any.get_or_init(|| client))
    }
}

impl Settings {
    /// Whether nothing that is asked of the registry itself goes through TLS.
    fn needs_no_tls(&self) -> bool {
        let may_be_proxied = || !self.is_loopback && PROXIES.iter().any(|name| std::env::var_os(name).is_some());
        self.is_plain && self.proxy.is_none() && !may_be_proxied()
    }
}

fn build(settings: &Settings, without_authorities: bool) -> Result<reqwest::Client, SourceError> {
    let mut builder = reqwest::Client::builder()
        .http1_only()
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        .connect_timeout(settings.connect)
        .dns_resolver(Arc::new(Lookup))
        .pool_idle_timeout(POOL_IDLE)
        .pool_max_idle_per_host(MAX_IDLE)
        .user_agent(&settings.user_agent)
        .tls_danger_accept_invalid_certs(!settings.tls_verify);
    if without_authorities {
        builder = builder.tls_certs_only([]);
    }
    if let Some(path) = &settings.ca {
        let certificates = reqwest::Certificate::from_pem_bundle(&read_pem("--ca", path)?)
            .map_err(|error| setup(format!("--ca {}: not a PEM certificate", path.display()), error))?;
        if certificates.is_empty() {
            let what = format!("--ca {}: no certificate in it; expected PEM", path.display());
            return Err(SourceError::Setup { what, cause: None });
        }
        builder = builder.tls_certs_merge(certificates);
    }
    match (&settings.cert, &settings.key) {
        (Some(cert), Some(key)) => {
            let mut pem = read_pem("--cert", cert)?;
            pem.push(b'\n');
            pem.extend(read_pem("--key", key)?);
            let identity = reqwest::Identity::from_pem(&pem).map_err(|error| {
                let what =
                    format!("--cert {} and --key {}: not a PEM certificate and key", cert.display(), key.display());
                setup(what, error)
            })?;
            builder = builder.identity(identity);
        }
        (None, None) => {}
        (Some(_), None) | (None, Some(_)) => {
            let what = "a client certificate needs both --cert and --key".to_owned();
            return Err(SourceError::Setup { what, cause: None });
        }
    }
    match &settings.proxy {
        Some(proxy) => {
            // The URL may hold a password, so it is not repeated.
            let proxy = reqwest::Proxy::all(proxy).map_err(|error| {
                setup("--proxy is not a URL; expected http://host:port or https://host:port".to_owned(), error)
            })?;
            builder = builder.proxy(proxy);
        }
        // As kit (Go) does: the environment's proxy can't reach this machine's loopback.
        None if settings.is_loopback => builder = builder.no_proxy(),
        None => {}
    }
    builder.build().map_err(|error| setup("the HTTP client can't be set up".to_owned(), error))
}

fn read_pem(flag: &str, path: &Path) -> Result<Vec<u8>, SourceError> {
    std::fs::read(path).map_err(|error| SourceError::Setup {
        what: format!("{flag} {} can't be read", path.display()),
        cause: Some(Arc::new(error)),
    })
}

fn setup(what: String, error: reqwest::Error) -> SourceError {
    SourceError::Setup { what, cause: Some(Arc::new(error.without_url())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_shared_by_those_who_reach_hosts_in_the_same_way_and_by_nobody_else() {
        let url = |text: &str| Url::parse(text).expect("valid");
        let connection = Connection::default();
        let get =
            |connection: &Connection, base: &str| connection.clients.get(connection, &url(base)).expect("a client");
        let first = get(&connection, "https://a.example/v2/kit/");
        assert!(Arc::ptr_eq(&first, &get(&connection.clone(), "https://b.example/v2/other/")));
        let others = [
            Connection { tls_verify: false, ..connection.clone() },
            Connection { proxy: Some("http://proxy".to_owned()), ..connection.clone() },
        ];
        for other in &others {
            assert!(!Arc::ptr_eq(&first, &get(other, "https://a.example/v2/kit/")), "{other:?}");
        }
        assert!(!Arc::ptr_eq(&first, &get(&connection, "http://localhost:5000/v2/kit/")));
    }

    #[test]
    fn who_speaks_plain_http_alone_loads_no_authorities() {
        let url = |text: &str| Url::parse(text).expect("valid");
        let connection = Connection::default();
        let client = connection.clients.get(&connection, &url("http://localhost:5000/v2/kit/")).expect("a client");
        client.to(&url("http://localhost:5000/v2/")).expect("a client");
        assert!(client.any.get().is_none());
        client.to(&url("https://storage.example/x")).expect("a client");
        assert!(client.any.get().is_some());
    }

    #[test]
    fn settings_that_cannot_be_used_are_named() {
        let base = Url::parse("https://registry.example.com").expect("valid");
        let refusal = |connection: &Connection| {
            connection.clients.get(connection, &base).err().expect("must be refused").to_string()
        };
        let missing = Connection { ca: Some("/nonexistent/ca.pem".into()), ..Connection::default() };
        assert!(refusal(&missing).contains("--ca /nonexistent/ca.pem can't be read"));
        let half = Connection { cert: Some("/x".into()), ..Connection::default() };
        assert!(refusal(&half).contains("needs both --cert and --key"));
        let proxy = Connection { proxy: Some("http://me:hunter2@:bad".into()), ..Connection::default() };
        let text = refusal(&proxy);
        assert!(text.contains("--proxy is not a URL") && !text.contains("hunter2"), "{text}");
    }
}
