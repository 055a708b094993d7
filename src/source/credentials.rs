//! What the user has logged in with: Docker's, kit's and Podman's credential files.
//!
//! Invariants:
//! - Files and helpers are read anew at each token request: they expire under a mount that lives for weeks.
//! - The first file that has something for the registry wins; in one file the longest key that is a prefix of
//!   `host/repository`. A helper for the registry goes before the file's own entry, as in Docker.
//! - Nothing here is fatal: what could not be read is named in the error if the registry then refuses.
//! - A [`Secret`] is in no error, log or debug output.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;

use crate::source::helper;

/// Docker Hub's key in credential files and stores.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
/// The names that Docker Hub goes by.
const DOCKER_HUB_HOSTS: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];
/// The user name that says: the secret is an identity token (Docker's word for an OAuth refresh token).
const IDENTITY_TOKEN_USER: &str = "<token>";
/// The same in Azure's registries.
const AZURE_TOKEN_USER: &str = "00000000-0000-0000-0000-000000000000";
/// A credential file of hundreds of registries has some 100 KiB.
const MAX_FILE: u64 = 1 << 20;

/// A password or token. Only [`Secret::expose`] shows it.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub(super) struct Secret(String);

impl Secret {
    pub(super) fn new(text: String) -> Self {
        Self(text)
    }

    /// The secret itself, for a request.
    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// How to prove who is asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Credential {
    /// A user and a password.
    Password { user: String, password: Secret },
    /// A refresh token, to be exchanged at the registry's token server.
    Identity(Secret),
    /// A token to be sent to the registry as it is.
    Bearer(Secret),
}

impl Credential {
    /// What a user name and a secret mean together; `None` if there is neither.
    pub(super) fn from_user(user: String, secret: Secret) -> Option<Self> {
        match user.as_str() {
            _ if secret.expose().is_empty() => None,
            IDENTITY_TOKEN_USER | AZURE_TOKEN_USER => Some(Self::Identity(secret)),
            _ => Some(Self::Password { user, password: secret }),
        }
    }
}

/// The outcome of a search.
#[derive(Debug)]
pub(super) struct Found {
    /// Nothing means: ask anonymously.
    pub(super) credential: Option<Credential>,
    /// Where it came from, or where it was looked for in vain; for the user.
    pub(super) tried: String,
}

/// The credential files, in the order in which they count.
#[derive(Debug, Clone)]
pub(super) struct Keyring {
    files: Vec<PathBuf>,
}

#[derive(Deserialize)]
struct ConfigFile {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
    #[serde(default, rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
    #[serde(default, rename = "credsStore")]
    store: String,
}

#[derive(Deserialize, Default)]
struct Entry {
    #[serde(default)]
    auth: Secret,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: Secret,
    #[serde(default, rename = "identitytoken")]
    identity: Secret,
    #[serde(default, rename = "registrytoken")]
    registry: Secret,
}

impl Keyring {
    /// The files of this user.
    pub(super) fn of_user(kit_home: &Path) -> Self {
        Self::from(kit_home, |name| std::env::var_os(name), std::env::home_dir())
    }

    fn from(kit_home: &Path, variable: impl Fn(&str) -> Option<OsString>, home: Option<PathBuf>) -> Self {
        let set = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let docker = set("DOCKER_CONFIG").or_else(|| home.map(|home| home.join(".docker")));
        let files = [
            set("REGISTRY_AUTH_FILE"),
            set("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json")),
            Some(kit_home.join("credentials.json")),
            docker.map(|dir| dir.join("config.json")),
        ];
        Self { files: files.into_iter().flatten().collect() }
    }

    /// What there is for a repository.
    pub(super) async fn find(&self, host: &str, repository: &str) -> Found {
        let mut troubles = Vec::new();
        for path in &self.files {
            let config = match read(path).await {
                Ok(Some(config)) => config,
                Ok(None) => continue,
                Err(trouble) => {
                    troubles.push(format!("{}: {trouble}", path.display()));
                    continue;
                }
            };
            if let Some(credential) = config.find(host, repository, &mut troubles).await {
                let who = match &credential {
                    Credential::Password { user, .. } => format!("user {user:?}"),
                    Credential::Identity(_) => "the identity token".to_owned(),
                    Credential::Bearer(_) => "the registry token".to_owned(),
                };
                return Found { credential: Some(credential), tried: format!("{who} of {}", path.display()) };
            }
        }
        let files = self.files.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        let mut tried = format!("without credentials: none for it in {files}");
        for trouble in troubles {
            tried.push_str("; ");
            tried.push_str(&trouble);
        }
        Found { credential: None, tried }
    }
}

async fn read(path: &Path) -> Result<Option<ConfigFile>, String> {
    use tokio::io::AsyncReadExt as _;
    let file = match tokio::fs::File::open(path).await {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(error.to_string()),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes).await.map_err(|error| error.to_string())?;
    // serde's own words may quote what they stumbled over.
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| format!("not a credential file (line {}, column {})", error.line(), error.column()))
}

impl ConfigFile {
    async fn find(&self, host: &str, repository: &str, troubles: &mut Vec<String>) -> Option<Credential> {
        let helper = longest(self.helpers.iter(), host, repository);
        let (key, helper) = match &helper {
            Some((key, helper)) => (key.as_str(), helper.as_str()),
            None => (if is_docker_hub(host) { DOCKER_HUB_KEY } else { host }, self.store.as_str()),
        };
        if !helper.is_empty() {
            match helper::get(helper, key).await {
                Ok(Some(credential)) => return Some(credential),
                Ok(None) => {}
                Err(trouble) => troubles.push(trouble),
            }
        }
        let (_, entry) = longest(self.auths.iter(), host, repository)?;
        entry.credential()
    }
}

impl Entry {
    fn credential(&self) -> Option<Credential> {
        if !self.identity.expose().is_empty() {
            return Some(Credential::Identity(self.identity.clone()));
        }
        if !self.registry.expose().is_empty() {
            return Some(Credential::Bearer(self.registry.clone()));
        }
        if self.auth.expose().is_empty() {
            return Credential::from_user(self.username.clone(), self.password.clone());
        }
        /// Docker pads, other tools do not.
        const LENIENT: GeneralPurpose = GeneralPurpose::new(
            &base64::alphabet::STANDARD,
            GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
        );
        let decoded = LENIENT.decode(self.auth.expose().trim()).ok()?;
        let text = String::from_utf8(decoded).ok()?;
        let (user, password) = text.split_once(':')?;
        // Old Docker versions pad the password with NUL.
        Credential::from_user(user.to_owned(), Secret::new(password.trim_end_matches('\0').to_owned()))
    }
}

fn is_docker_hub(host: &str) -> bool {
    DOCKER_HUB_HOSTS.contains(&host)
}

/// The entry with the longest key that is `host/repository` or a parent of it.
fn longest<'a, T>(
    entries: impl Iterator<Item = (&'a String, &'a T)>,
    host: &str,
    repository: &str,
) -> Option<(&'a String, &'a T)> {
    let covers = |key: &str| {
        let key = normal(key);
        let (key_host, key_path) = key.split_once('/').unwrap_or((key, ""));
        let same_host = key_host.eq_ignore_ascii_case(host) || is_docker_hub(key_host) && is_docker_hub(host);
        let within = key_path.is_empty()
            || repository.strip_prefix(key_path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        (same_host && within).then_some(key_path.len())
    };
    entries
        .filter_map(|(key, entry)| Some((covers(key)?, key, entry)))
        .max_by_key(|(length, ..)| *length)
        .map(|(_, key, entry)| (key, entry))
}

/// A key without the scheme and API version that Docker used to write: `https://host/v1/` is `host`.
fn normal(key: &str) -> &str {
    let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let Some(bare) = bare else { return key.trim_end_matches('/') };
    let bare = bare.trim_end_matches('/');
    bare.strip_suffix("/v1").or_else(|| bare.strip_suffix("/v2")).unwrap_or(bare)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(user: &str, password: &str) -> Option<Credential> {
        Some(Credential::Password { user: user.to_owned(), password: Secret::new(password.to_owned()) })
    }

    async fn find(files: &[&str], host: &str, repository: &str) -> Found {
        let dir = tempfile::tempdir().expect("a directory");
        let mut keyring = Keyring { files: Vec::new() };
        for (number, text) in files.iter().enumerate() {
            let path = dir.path().join(format!("{number}.json"));
            std::fs::write(&path, text).expect("written");
            keyring.files.push(path);
        }
        keyring.find(host, repository).await
    }

    #[test]
    fn the_files_are_read_in_their_order() {
        let variable = |name: &str| (name != "DOCKER_CONFIG").then(|| OsString::from(format!("/{name}")));
        let keyring = Keyring::from(Path::new("/kit"), variable, Some("/home/me".into()));
        let files: Vec<_> = keyring.files.iter().map(|path| path.display().to_string()).collect();
        assert_eq!(
            files,
            [
                "/REGISTRY_AUTH_FILE",
                "/XDG_RUNTIME_DIR/containers/auth.json",
                "/kit/credentials.json",
                "/home/me/.docker/config.json"
            ]
        );
    }

    #[tokio::test]
    async fn the_first_file_with_an_entry_wins_and_the_longest_prefix_in_it() {
        // `a:1`, `b:2`, `c:3`
        let first = r#"{"auths":{"r.example/team":{"auth":"YTox"},"r.example/team/kit":{"auth":"Yjoy"}}}"#;
        let second = r#"{"auths":{"https://r.example/v1/":{"auth":"Yzoz"}}}"#;
        let files = [first, second];
        let found = |repository: &'static str| find(&files, "r.example", repository);
        assert_eq!(found("team/other").await.credential, password("a", "1"));
        assert_eq!(found("team/kit").await.credential, password("b", "2"));
        assert_eq!(found("team/kit/sub").await.credential, password("b", "2"));
        assert_eq!(found("teamwork/x").await.credential, password("c", "3"));
        assert_eq!(find(&files, "other.example", "team/kit").await.credential, None);
    }

    #[tokio::test]
    async fn docker_hub_is_known_by_its_old_key() {
        let file = r#"{"auths":{"https://index.docker.io/v1/":{"username":"me","password":"pw"}}}"#;
        assert_eq!(find(&[file], "docker.io", "library/x").await.credential, password("me", "pw"));
    }

    #[tokio::test]
    async fn identity_tokens_are_known_by_field_and_by_user() {
        let identity = Some(Credential::Identity(Secret::new("tok".to_owned())));
        for entry in [
            r#"{"identitytoken":"tok","auth":"YTox"}"#,
            r#"{"username":"<token>","password":"tok"}"#,
            r#"{"username":"00000000-0000-0000-0000-000000000000","password":"tok"}"#,
        ] {
            let file = format!(r#"{{"auths":{{"r.example":{entry}}}}}"#);
            assert_eq!(find(&[&file], "r.example", "x").await.credential, identity, "{entry}");
        }
    }

    #[tokio::test]
    async fn a_broken_file_and_a_missing_helper_are_named_without_their_secrets() {
        let broken = r#"{"auths":{"r.example":{"auth":["hunter2"]}}}"#;
        let helper = r#"{"credHelpers":{"r.example":"kitfs-test-nowhere"}}"#;
        let found = find(&[broken, helper], "r.example", "x").await;
        assert_eq!(found.credential, None);
        assert!(found.tried.contains("0.json: not a credential file (line 1"), "{}", found.tried);
        assert!(found.tried.contains("docker-credential-kitfs-test-nowhere is not installed"), "{}", found.tried);
        assert!(!found.tried.contains("hunter2"), "{}", found.tried);
    }

    #[tokio::test]
    async fn an_entry_counts_where_the_helper_is_missing() {
        let file = r#"{"credsStore":"kitfs-test-nowhere","auths":{"r.example":{"auth":"YTox"}}}"#;
        assert_eq!(find(&[file], "r.example", "x").await.credential, password("a", "1"));
    }

    #[test]
    fn a_secret_is_not_in_debug_output() {
        let text = format!("{:?}", password("me", "hunter2"));
        assert!(text.contains("me") && !text.contains("hunter2"), "{text}");
    }
}
