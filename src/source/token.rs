//! What a registry wants in the `Authorization` header, fetched once for all who need it.
//!
//! Invariants:
//! - At most one token request is in flight. It runs as a task of its own, so that a reader who leaves cancels nothing,
//!   and ends by its requests' deadlines; a guard clears it, on panic too.
//! - A grant is renewed before it expires, when the registry refuses it (the caller asks for that once a request), and
//!   when it does not cover what is asked.
//! - No secret goes from an https registry to a plain http token server.
//!
//! The one lock here guards a few fields and is never held across an await.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use reqwest::header::{HeaderMap, HeaderValue};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use url::Url;

use crate::source::access::Access;
use crate::source::challenge::{self, Challenge};
use crate::source::credentials::{Credential, Found, Keyring, Secret};
use crate::source::transport::{Body, Call, Transport, authority};
use crate::source::{MAX_MANIFEST, SourceError, registry};

/// What the token specification assumes where `expires_in` is missing.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);
/// A token is renewed this long before it expires, so that it does not expire on its way; or after three quarters of a
/// shorter life.
const SKEW: Duration = Duration::from_secs(10);
/// How kitfs calls itself to token servers that ask.
const CLIENT_ID: &str = "kitfs";

/// The header that was granted.
#[derive(Clone)]
pub(super) struct Grant {
    pub(super) header: HeaderValue,
    /// Tells a grant from the one that the registry refused.
    number: u64,
    /// `None` for what does not expire by itself.
    until: Option<Instant>,
    /// What it was asked for.
    access: Access,
}

impl Grant {
    /// Whether it may still be sent, and for this.
    fn serves(&self, access: &Access) -> bool {
        self.until.is_none_or(|until| Instant::now() < until) && self.access.covers(access)
    }
}

type Flight = Shared<BoxFuture<'static, Result<Grant, SourceError>>>;

/// The tokens for one repository.
pub(super) struct Tokens {
    shared: Arc<Office>,
}

struct Office {
    transport: Transport,
    keyring: Keyring,
    /// The host as credential files and messages name it.
    host: String,
    repository: String,
    /// Whether the registry is reached over https.
    secure: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What the registry asked for last.
    challenge: Option<Challenge>,
    grant: Option<Grant>,
    flight: Option<(Access, Flight)>,
    grants: u64,
    /// Which credentials were used last.
    tried: Option<String>,
}

impl Tokens {
    pub(super) fn new(transport: Transport, keyring: Keyring, host: &str, repository: &str, secure: bool) -> Self {
        let (host, repository) = (host.to_owned(), repository.to_owned());
        let state = Mutex::default();
        Self { shared: Arc::new(Office { transport, keyring, host, repository, secure, state }) }
    }

    /// The grant to send, renewed if it is about to expire; nothing as long as the registry has asked for nothing.
    pub(super) async fn current(&self, access: &Access) -> Result<Option<Grant>, SourceError> {
        let challenge = {
            let state = self.shared.lock();
            match (&state.grant, &state.challenge) {
                (Some(grant), _) if grant.serves(access) => return Ok(Some(grant.clone())),
                (Some(_), Some(challenge)) => challenge.clone(),
                _ => return Ok(None),
            }
        };
        self.grant(challenge, None, access).await.map(Some)
    }

    /// A grant after the registry answered 401 to a request that carried `refused`.
    pub(super) async fn answer(
        &self,
        headers: &HeaderMap,
        refused: Option<&Grant>,
        access: &Access,
    ) -> Result<Grant, SourceError> {
        match challenge::choose(headers) {
            Some(challenge) => self.grant(challenge, refused.map(|grant| grant.number), access).await,
            None => Err(self.refused()),
        }
    }

    async fn grant(&self, challenge: Challenge, refused: Option<u64>, access: &Access) -> Result<Grant, SourceError> {
        loop {
            let (enough, flight) = {
                let mut state = self.shared.lock();
                match (&state.grant, &state.flight) {
                    (Some(grant), _) if grant.serves(access) && Some(grant.number) != refused => {
                        return Ok(grant.clone());
                    }
                    (_, Some((asked, flight))) => (asked.covers(access), flight.clone()),
                    _ => {
                        state.challenge = Some(challenge.clone());
                        // The task lands only after this lock is released, so it can't be cleared before it is entered.
                        let flight = launch(Arc::clone(&self.shared), challenge.clone(), access.clone());
                        state.flight = Some((access.clone(), flight.clone()));
                        (true, flight)
                    }
                }
            };
            let outcome = flight.await;
            // One that was asked for less lands first: it may not be overtaken.
            if enough {
                return outcome;
            }
        }
    }

    /// The error for a registry that keeps refusing.
    pub(super) fn refused(&self) -> SourceError {
        SourceError::Unauthorized { host: self.shared.host.clone(), tried: self.tried() }
    }

    /// Which credentials were used, for the user.
    pub(super) fn tried(&self) -> String {
        self.shared.lock().tried.clone().unwrap_or_else(|| "it asked for no credentials".to_owned())
    }
}

fn launch(office: Arc<Office>, challenge: Challenge, access: Access) -> Flight {
    let name = office.transport.name.clone();
    let task = tokio::spawn(async move {
        let landing = Landing(office);
        let outcome = landing.0.fetch(&challenge, &access).await;
        if let Ok(grant) = &outcome {
            landing.0.lock().grant = Some(grant.clone());
        }
        outcome
    });
    let flight = async move {
        task.await.unwrap_or_else(|failure| {
            let what = "the token request was given up".to_owned();
            Err(SourceError::Transport { source_name: name, what, cause: Some(Arc::new(failure)) })
        })
    };
    flight.boxed().shared()
}

/// Clears the flight when its task ends, however it ends.
struct Landing(Arc<Office>);

impl Drop for Landing {
    fn drop(&mut self) {
        self.0.lock().flight = None;
    }
}

/// What a token server is asked.
struct TokenAsk<'a> {
    realm: &'a str,
    service: Option<&'a str>,
    /// The scope that the registry stated.
    stated: Option<&'a str>,
    access: &'a Access,
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<Secret>,
    access_token: Option<Secret>,
    expires_in: Option<u64>,
}

impl Office {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every field is right at every instant, so a panic elsewhere changes nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn fetch(&self, challenge: &Challenge, access: &Access) -> Result<Grant, SourceError> {
        let Found { credential, tried } = self.keyring.find(&self.host, &self.repository).await;
        self.lock().tried = Some(tried.clone());
        match (challenge, credential) {
            // What the user wrote down is all there is, whatever it is good for.
            (_, Some(Credential::Bearer(token))) => self.bearer(&token, None, Access::Any),
            (Challenge::Basic, Some(Credential::Password { user, password })) => {
                self.header(&basic(&user, &password), None, Access::Any)
            }
            (Challenge::Basic, Some(Credential::Identity(_)) | None) => {
                Err(SourceError::Unauthorized { host: self.host.clone(), tried })
            }
            (Challenge::Bearer { realm, service, scope }, credential) => {
                let ask = TokenAsk { realm, service: service.as_deref(), stated: scope.as_deref(), access };
                self.token(&ask, credential, tried).await
            }
        }
    }

    async fn token(
        &self,
        ask: &TokenAsk<'_>,
        credential: Option<Credential>,
        tried: String,
    ) -> Result<Grant, SourceError> {
        let mut url = self.realm(ask.realm)?;
        let asked = Instant::now();
        let service = ask.service.map(|service| ("service", service));
        let scopes = ask.access.scopes(&self.repository, ask.stated);
        let answer = match &credential {
            Some(Credential::Identity(secret)) => {
                let scope = scopes.join(" ");
                let mut form =
                    vec![("grant_type", "refresh_token"), ("scope", scope.as_str()), ("client_id", CLIENT_ID)];
                form.extend(service);
                form.push(("refresh_token", secret.expose()));
                self.ask(Method::POST, &url, None, Some(&form)).await?
            }
            other => {
                let scopes = scopes.iter().map(|scope| ("scope", scope));
                url.query_pairs_mut().extend_pairs(service).extend_pairs(scopes);
                let authorization = match other {
                    Some(Credential::Password { user, password }) => {
                        url.query_pairs_mut().append_pair("account", user);
                        Some(self.header(&basic(user, password), None, Access::Any)?.header)
                    }
                    _ => None,
                };
                self.ask(Method::GET, &url, authorization.as_ref(), None).await?
            }
        };
        let server = authority(&url);
        match answer.status() {
            StatusCode::OK => {}
            // Token servers answer bad credentials with any of these.
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST => {
                return Err(SourceError::Unauthorized { host: self.host.clone(), tried });
            }
            _ => {
                let what = format!("a token from {server}");
                return Err(registry::status_error(&self.transport.name, &answer, &what, &self.host, &tried));
            }
        }
        let bytes = self.transport.read_small(answer, MAX_MANIFEST).await?;
        // serde's own words may quote what they stumbled over.
        let answer: TokenAnswer = serde_json::from_slice(&bytes)
            .map_err(|_| self.transport.protocol(format!("{server} sent something else than a token")))?;
        let filled = |token: Option<Secret>| token.filter(|token| !token.expose().is_empty());
        let token = filled(answer.token)
            .or(filled(answer.access_token))
            .ok_or_else(|| self.transport.protocol(format!("{server} sent no token")))?;
        let life = answer.expires_in.map_or(DEFAULT_LIFETIME, Duration::from_secs);
        self.bearer(&token, asked.checked_add(life - SKEW.min(life / 4)), ask.access.clone())
    }

    async fn ask(
        &self,
        method: Method,
        url: &Url,
        authorization: Option<&HeaderValue>,
        form: Option<&[(&str, &str)]>,
    ) -> Result<reqwest::Response, SourceError> {
        let body = form.map_or(Body::None, Body::Form);
        let call = Call { method, url, headers: HeaderMap::new(), authorization, body };
        Ok(self.transport.send(&call).await?.response)
    }

    /// The token server's URL, if a secret may go there.
    fn realm(&self, realm: &str) -> Result<Url, SourceError> {
        let url = Url::parse(realm)
            .ok()
            .filter(|url| url.has_host() && url.username().is_empty() && url.password().is_none())
            .ok_or_else(|| self.transport.protocol(format!("the token server {realm:?} is not a URL")))?;
        match url.scheme() {
            "https" => Ok(url),
            "http" if !self.secure => Ok(url),
            _ => {
                let what = format!("its token server {} is not reached over https; refused", authority(&url));
                Err(self.transport.protocol(what))
            }
        }
    }

    fn bearer(&self, token: &Secret, until: Option<Instant>, access: Access) -> Result<Grant, SourceError> {
        self.header(&Secret::new(format!("Bearer {}", token.expose())), until, access)
    }

    fn header(&self, value: &Secret, until: Option<Instant>, access: Access) -> Result<Grant, SourceError> {
        let mut header = HeaderValue::from_str(value.expose())
            .map_err(|_| self.transport.protocol("a token with characters that no header can hold".to_owned()))?;
        header.set_sensitive(true);
        let mut state = self.lock();
        state.grants += 1;
        Ok(Grant { header, number: state.grants, until, access })
    }
}

fn basic(user: &str, password: &Secret) -> Secret {
    let pair = format!("{user}:{}", password.expose());
    Secret::new(format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Connection;

    fn office(registry: &str) -> Tokens {
        let url = Url::parse(registry).expect("valid");
        let transport = Transport::new(&Connection::default(), &url, "r".to_owned()).expect("a client");
        let keyring = Keyring::of_user(std::path::Path::new("/nonexistent"));
        Tokens::new(transport, keyring, "r", "team/kit", url.scheme() == "https")
    }

    #[test]
    fn no_secret_goes_from_an_https_registry_to_a_plain_token_server() {
        let secure = office("https://registry.example.com");
        let refused = secure.shared.realm("http://auth.example.com/token").expect_err("must be refused").to_string();
        assert!(refused.contains("auth.example.com is not reached over https"), "{refused}");
        assert!(secure.shared.realm("https://auth.example.com/token").is_ok());
        assert!(secure.shared.realm("ftp://auth.example.com/token").is_err());
        assert!(office("http://localhost:5000").shared.realm("http://localhost:5001/token").is_ok());
    }

    #[tokio::test]
    async fn a_flight_that_panics_is_cleared_for_the_next() {
        let tokens = office("http://localhost:5000");
        let landing = Landing(Arc::clone(&tokens.shared));
        let stuck = futures_util::future::pending().boxed().shared();
        tokens.shared.lock().flight = Some((Access::Pull, stuck));
        let task = tokio::spawn(async move {
            let _landing = landing;
            panic!("as a test demands");
        });
        assert!(task.await.is_err());
        assert!(tokens.shared.lock().flight.is_none());
    }
}
