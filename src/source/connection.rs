//! How to reach a registry, and where kit keeps its files.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::clients::Clients;
use super::reach::Reach;

/// The settings of a connection, by kit's names. A source keeps a copy; nothing here changes later but what is known of
/// hosts.
#[derive(Clone)]
pub struct Connection {
    /// Plain HTTP for every host. Loopback hosts get it anyway.
    pub plain_http: bool,
    /// Whether the server's certificate is checked.
    pub tls_verify: bool,
    /// PEM file of the client's certificate.
    pub cert: Option<PathBuf>,
    /// PEM file of the client's key.
    pub key: Option<PathBuf>,
    /// PEM file of authorities that are trusted beside the system's.
    pub ca: Option<PathBuf>,
    /// The proxy for every request. Without it the environment's `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY` count.
    pub proxy: Option<String>,
    /// How many requests a caller should keep in flight. The source itself does not count them: a limit held while a
    /// body is read could make two readers wait for each other.
    pub concurrency: usize,
    /// Whether registries are never asked.
    pub offline: bool,
    /// The `User-Agent` header.
    pub user_agent: String,
    /// When to give up.
    pub timeouts: Timeouts,
    /// Which hosts answer: shared by all sources that are opened with a clone of these settings.
    pub reach: Reach,
    /// Their connections: shared in the same way, by those that reach hosts alike.
    pub clients: Clients,
}

/// When a request is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Until a connection stands, TLS included.
    pub connect: Duration,
    /// Until the header of an answer is here; for manifests, tags and tokens until the whole answer is.
    pub answer: Duration,
    /// How long [`Timeouts::PROGRESS`] bytes of a blob may take.
    pub stall: Duration,
}

impl Timeouts {
    /// What counts as progress: a server that sends less than 64 KiB in each [`Timeouts::stall`] holds its readers for
    /// no use. It is the smallest window that a listing reads.
    pub const PROGRESS: u64 = 64 << 10;
}

impl Default for Timeouts {
    /// Five seconds tell a dead host from a far one; 30 seconds is what a busy registry may think; ten seconds for
    /// 64 KiB is a 50 kbit/s line.
    fn default() -> Self {
        Self { connect: Duration::from_secs(5), answer: Duration::from_secs(30), stall: Duration::from_secs(10) }
    }
}

impl Default for Connection {
    fn default() -> Self {
        Self {
            plain_http: false,
            tls_verify: true,
            cert: None,
            key: None,
            ca: None,
            proxy: None,
            // kit's own default.
            concurrency: 5,
            offline: false,
            user_agent: concat!("kitfs/", env!("CARGO_PKG_VERSION")).to_owned(),
            timeouts: Timeouts::default(),
            reach: Reach::default(),
            clients: Clients::default(),
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A proxy's URL may hold a password.
        f.debug_struct("Connection")
            .field("plain_http", &self.plain_http)
            .field("tls_verify", &self.tls_verify)
            .field("cert", &self.cert)
            .field("key", &self.key)
            .field("ca", &self.ca)
            .field("proxy", &self.proxy.as_ref().map(|_| "…"))
            .field("concurrency", &self.concurrency)
            .field("timeouts", &self.timeouts)
            .finish_non_exhaustive()
    }
}

/// kit's home: `explicit`, else `KITOPS_HOME`, else `$XDG_DATA_HOME/kitops`, else `~/.local/share/kitops`.
pub fn kit_home(explicit: Option<&Path>) -> PathBuf {
    kit_home_from(explicit, |name| std::env::var_os(name), std::env::home_dir())
}

fn kit_home_from(
    explicit: Option<&Path>,
    variable: impl Fn(&str) -> Option<OsString>,
    home: Option<PathBuf>,
) -> PathBuf {
    let set = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    explicit
        .map(Path::to_owned)
        .or_else(|| set("KITOPS_HOME"))
        .or_else(|| set("XDG_DATA_HOME").map(|data| data.join("kitops")))
        .unwrap_or_else(|| home.unwrap_or_default().join(".local/share/kitops"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kits_home_is_found_in_kits_order() {
        let home = |set: &'static [&'static str], explicit: Option<&str>| {
            let variable = |name: &str| set.contains(&name).then(|| OsString::from(format!("/{name}")));
            kit_home_from(explicit.map(Path::new), variable, Some("/home/me".into()))
        };
        assert_eq!(home(&["KITOPS_HOME", "XDG_DATA_HOME"], Some("/x")), Path::new("/x"));
        assert_eq!(home(&["KITOPS_HOME", "XDG_DATA_HOME"], None), Path::new("/KITOPS_HOME"));
        assert_eq!(home(&["XDG_DATA_HOME"], None), Path::new("/XDG_DATA_HOME/kitops"));
        assert_eq!(home(&[], None), Path::new("/home/me/.local/share/kitops"));
        let empty = kit_home_from(None, |_| Some(OsString::new()), Some("/home/me".into()));
        assert_eq!(empty, Path::new("/home/me/.local/share/kitops"));
    }

    #[test]
    fn a_proxys_password_is_not_in_debug_output() {
        let connection = Connection { proxy: Some("http://me:hunter2@proxy".into()), ..Connection::default() };
        assert!(!format!("{connection:?}").contains("hunter2"));
    }
}
