//! Writing to a registry.
//!
//! A blob goes in one PUT after the POST that opens its upload: three times as fast as in chunks. Its bytes can't be
//! sent twice, so whatever can be refused is refused at the POST, which carries none.

use async_trait::async_trait;
use bytes::Bytes;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use url::Url;

use super::{Ask, Registry, base_url, upload};
use crate::digest::Digest;
use crate::reference::Location;
use crate::source::access::Access;
use crate::source::checked::checked;
use crate::source::target::check_tag;
use crate::source::transport::{Answer, Body, authority, next_hop};
use crate::source::{BlobId, ByteStream, NewManifest, SourceError, Target};

/// How much of a registry's own words an error repeats: a sentence or two.
const MAX_WORDS: usize = 300;
/// No word of a sentence is longer, but a token is; a digest has 71.
const MAX_WORD: usize = 80;

impl Registry {
    /// Opens an upload; what is stated in the query may already end it.
    async fn open_upload(&self, query: &[(&str, &str)], access: Access) -> Result<Answer, SourceError> {
        let mut url = self.url("blobs", "uploads");
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.push("");
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let body = Body::Bytes(&Bytes::new());
        self.ask(&Ask { method: Method::POST, url: &url, headers: HeaderMap::new(), body, access }).await
    }

    /// Where the registry wants the bytes of an upload that it opened.
    fn upload_url(&self, answer: &Answer) -> Result<Url, SourceError> {
        let location = answer.response.headers().get(LOCATION).map(HeaderValue::as_bytes);
        next_hop(answer.response.url(), location)
            .map_err(|what| self.transport.protocol(format!("an upload was opened, and then {what}")))
    }

    /// Gives up an upload that nothing was sent to. A registry that won't hear of it forgets it by itself.
    async fn cancel_upload(&self, answer: &Answer) {
        let Ok(url) = self.upload_url(answer) else { return };
        if url.origin() == self.base.origin() {
            let (method, headers) = (Method::DELETE, HeaderMap::new());
            let ask = Ask { method, url: &url, headers, body: Body::None, access: Access::Push };
            let _ = self.ask(&ask).await;
        }
    }

    /// Writes a manifest under a tag or its digest. Says whether the registry keeps the list of its subject's referrers.
    pub(super) async fn write_manifest(
        &self,
        reference: &str,
        media_type: &str,
        bytes: &Bytes,
    ) -> Result<bool, SourceError> {
        let what = format!("manifest {reference}");
        let digest = Digest::of(bytes);
        let content_type = HeaderValue::from_str(media_type)
            .map_err(|_| self.transport.protocol(format!("{what}: {media_type:?} is not a media type")))?;
        let url = self.url("manifests", reference);
        let headers = HeaderMap::from_iter([(CONTENT_TYPE, content_type)]);
        let (body, access) = (Body::Bytes(bytes), Access::Push);
        let answer = self.ask(&Ask { method: Method::PUT, url: &url, headers, body, access }).await?;
        if !answer.response.status().is_success() {
            return Err(self.refusal(answer, &what).await);
        }
        let headers = answer.response.headers();
        let stated = headers.get_all("docker-content-digest").iter();
        let mut stated = stated.filter_map(|value| value.to_str().ok()?.parse::<Digest>().ok());
        if let Some(stated) = stated.find(|stated| *stated != digest) {
            // It has filed something else, or cannot be trusted to know: nobody will find what was sent.
            let problem = format!("it was sent as {digest}, and the registry says that it filed {stated}");
            return Err(self.transport.protocol(format!("{what}: {problem}; a proxy may rewrite manifests")));
        }
        Ok(headers.contains_key("oci-subject"))
    }

    /// The error that an answer to a write means, in the registry's own words where it has some.
    pub(super) async fn refusal(&self, mut answer: Answer, what: &str) -> SourceError {
        let status = answer.response.status();
        if status.is_redirection() {
            let location = answer.response.headers().get(LOCATION).map(HeaderValue::as_bytes);
            let to =
                next_hop(answer.response.url(), location).map_or_else(|_| "nowhere".to_owned(), |url| authority(&url));
            return self
                .transport
                .protocol(format!("it redirects the write of {what} to {to}; name that host instead"));
        }
        let body = self.transport.read_refusal(&mut answer.response).await;
        let told = own_words(&body);
        let words = if told.is_empty() { String::new() } else { format!(" ({told})") };
        if status.is_client_error() && says_immutable(&told) {
            let (source_name, what) = (self.name.clone(), what.into());
            return SourceError::TagImmutable { source_name, status: status.as_u16(), what, words: words.into() };
        }
        let meaning = match status {
            StatusCode::NOT_FOUND => "there is no such repository, or nothing can be written there",
            StatusCode::METHOD_NOT_ALLOWED => "it is read-only",
            StatusCode::PAYLOAD_TOO_LARGE => "it is too large for the registry, or for a proxy before it",
            _ if told.contains("DIGEST_INVALID") => "what reached it has another digest than what left here",
            StatusCode::BAD_REQUEST | StatusCode::CONFLICT | StatusCode::PRECONDITION_FAILED => "it does not take it",
            _ => {
                return match self.status_error(&answer, &format!("{what}{words}")) {
                    SourceError::Status { source_name, status, retry_after, .. } => {
                        SourceError::Status { source_name, status, retry_after, words: words.into() }
                    }
                    error => error,
                };
            }
        };
        let what = format!("{what}: {meaning}{words}");
        SourceError::Refused { source_name: self.name.clone(), status: status.as_u16(), what }
    }
}

#[async_trait]
impl Target for Registry {
    async fn has_blob(&self, blob: &BlobId) -> Result<bool, SourceError> {
        let what = format!("blob {}", blob.digest);
        let url = self.url("blobs", &blob.digest.to_string());
        // Whoever asks goes on to write: one token for both.
        let ask = Ask { access: Access::Push, ..Ask::read(Method::HEAD, &url, HeaderMap::new()) };
        let answer = self.ask(&ask).await?;
        match answer.response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => return Ok(false),
            _ => return Err(self.status_error(&answer, &what)),
        }
        let length = answer.response.headers().get(CONTENT_LENGTH);
        let stated: Option<u64> = length.and_then(|value| value.to_str().ok()?.parse().ok());
        match stated {
            Some(size) if size != blob.size => {
                let problem = format!("it holds {size} bytes under that digest, not {}", blob.size);
                Err(self.transport.protocol(format!("{what}: {problem}")))
            }
            _ => Ok(true),
        }
    }

    async fn mount_blob(&self, blob: &BlobId, from: &Location) -> Result<bool, SourceError> {
        let Location::Registry { host, repository } = from else { return Ok(false) };
        let plain_http = self.base.scheme() == "http";
        let Ok(theirs) = base_url(host, repository, plain_http) else { return Ok(false) };
        if theirs.origin() != self.base.origin() || theirs == self.base {
            return Ok(false);
        }
        let digest = blob.digest.to_string();
        let access = Access::Mount { from: repository.clone() };
        let answer = match self.open_upload(&[("mount", &digest), ("from", repository)], access).await {
            // No token for both repositories; there may be one to write.
            Err(SourceError::Unauthorized { .. } | SourceError::Forbidden { .. }) => return Ok(false),
            answer => answer?,
        };
        match answer.response.status() {
            StatusCode::CREATED => Ok(true),
            StatusCode::ACCEPTED => {
                self.cancel_upload(&answer).await;
                Ok(false)
            }
            _ => match self.status_error(&answer, &format!("blob {digest}")) {
                error if error.is_transient() => Err(error),
                // Not this blob, or not from there. Writing it says what is wrong, if something is.
                _ => Ok(false),
            },
        }
    }

    async fn put_blob(&self, blob: &BlobId, bytes: ByteStream) -> Result<(), SourceError> {
        let what = format!("blob {}", blob.digest);
        let answer = self.open_upload(&[], Access::Push).await?;
        if answer.response.status() != StatusCode::ACCEPTED {
            return Err(self.refusal(answer, &what).await);
        }
        let mut url = self.upload_url(&answer)?;
        url.query_pairs_mut().append_pair("digest", &blob.digest.to_string());
        let same_origin = url.origin() == self.base.origin();
        let grant = if same_origin { self.tokens.current(&Access::Push).await? } else { None };
        let authorization = grant.as_ref().map(|grant| &grant.header);
        let bytes = checked(bytes, blob, &self.name);
        let response = upload::put(&self.transport, &url, authorization, blob, bytes).await?;
        match response.status() {
            StatusCode::CREATED => Ok(()),
            StatusCode::UNAUTHORIZED if grant.is_some() => {
                // The token was good for the POST. A new one is fetched, and who asks again starts with it.
                self.tokens.answer(response.headers(), grant.as_ref(), &Access::Push).await?;
                let what = format!("the token ran out before {what} was sent");
                Err(SourceError::Transport { source_name: self.name.clone(), what, cause: None })
            }
            _ => Err(self.refusal(Answer { response, redirected: None, same_origin }, &what).await),
        }
    }

    async fn put_manifest(&self, manifest: &NewManifest, tag: Option<&str>) -> Result<Digest, SourceError> {
        let digest = Digest::of(&manifest.bytes);
        if let Some(tag) = tag {
            check_tag(tag, &self.name)?;
        }
        let reference = tag.map_or_else(|| digest.to_string(), str::to_owned);
        let listed = self.write_manifest(&reference, &manifest.media_type, &manifest.bytes).await?;
        if let Some(refers) = manifest.refers.as_ref().filter(|_| !listed) {
            self.list_referrer(manifest, refers).await?;
        }
        Ok(digest)
    }
}

/// Whether a registry's words tell of a tag that may not move. There is no code for it, and each registry has its status;
/// those that know such tags have this word.
fn says_immutable(words: &str) -> bool {
    words.to_ascii_lowercase().contains("immutab")
}

/// What a registry says in an error of OCI's form, as far as a line can hold and show it.
fn own_words(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Told {
        errors: Vec<One>,
    }
    #[derive(Deserialize)]
    struct One {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let Ok(told) = serde_json::from_slice::<Told>(body) else { return String::new() };
    let all = told.errors.iter().map(|one| format!("{}: {}", one.code, one.message)).collect::<Vec<_>>().join("; ");
    // A registry may repeat what it was sent: a word as long as a token is not shown.
    let words = all.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    let shown = words.map(|word| if word.len() > MAX_WORD { "…" } else { word }).collect::<Vec<_>>().join(" ");
    let mut shown: String = shown.escape_debug().to_string().replace("\\\"", "\"").replace("\\'", "'");
    if let Some((end, _)) = shown.char_indices().nth(MAX_WORDS) {
        shown.truncate(end);
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(code: &str, message: &str) -> String {
        own_words(serde_json::json!({"errors": [{"code": code, "message": message}]}).to_string().as_bytes())
    }

    #[test]
    fn a_tag_that_may_not_move_is_told_by_the_registrys_words() {
        for words in [
            "TAG_INVALID: The image tag 'v1' already exists in the 'a' repository and cannot be overwritten because the repository is immutable.",
            "PRECONDITION: Failed to process request due to 'a:v1' configured as immutable.",
            "DENIED: Tag immutability is enabled",
        ] {
            assert!(says_immutable(words), "{words}");
        }
        assert!(!says_immutable("DENIED: requested access to the resource is denied"));
    }

    #[test]
    fn a_registrys_words_are_short_printable_and_hold_no_token() {
        assert_eq!(words("DENIED", "no \"push\" here"), "DENIED: no \"push\" here");
        assert_eq!(words("X", "a\u{1b}[31m\n\tb\u{202e}"), "X: a [31m b\\u{202e}");
        assert_eq!(words("X", &format!("bad token {}", "e".repeat(200))), "X: bad token …");
        assert_eq!(words("X", &"many words ".repeat(100)).chars().count(), MAX_WORDS + 1);
        for nonsense in ["", "<html>", "{}", r#"{"errors":"x"}"#] {
            assert_eq!(own_words(nonsense.as_bytes()), "");
        }
    }
}
