//! Who refers to a manifest: the registry's referrers API, or where it has none the tag that stands in for it.
//!
//! The tag `sha256-<hex of the subject>` names an index that its writers keep: read, added to, written back. Two of
//! them at the same moment may lose one entry, since registries know no condition for a write; writing the referrer
//! again mends it.

use std::collections::HashSet;

use reqwest::header::{HeaderMap, LINK};
use reqwest::{Method, StatusCode};
use url::Url;

use super::{Ask, Registry};
use crate::digest::Digest;
use crate::source::index_file::{Descriptor, INDEX_TYPE, IndexFile, referrers_tag};
use crate::source::{MAX_MANIFEST, NewManifest, Refers, SourceError};

/// More pages than any list of referrers has; an endless one ends here.
const MAX_PAGES: usize = 100;
/// Referrers of one type that are kept: far more than whoever asks looks at, and a few hundred KiB.
const MAX_FOUND: usize = 4096;

/// The referrers of one type, each once, in the order in which they are listed.
struct Found<'a> {
    artifact_type: &'a str,
    digests: Vec<Digest>,
    seen: HashSet<Digest>,
}

impl<'a> Found<'a> {
    fn new(artifact_type: &'a str) -> Self {
        Self { artifact_type, digests: Vec::new(), seen: HashSet::new() }
    }

    fn add(&mut self, page: IndexFile) {
        let fitting = page.manifests.iter().filter(|entry| entry.artifact_type.as_deref() == Some(self.artifact_type));
        for digest in fitting.filter_map(|entry| entry.digest.parse().ok()) {
            if !self.is_full() && self.seen.insert(digest) {
                self.digests.push(digest);
            }
        }
    }

    fn is_full(&self) -> bool {
        self.digests.len() >= MAX_FOUND
    }
}

impl Registry {
    /// The referrers of this type, by whichever way the registry has.
    pub(super) async fn find_referrers(
        &self,
        subject: &Digest,
        artifact_type: &str,
    ) -> Result<Vec<Digest>, SourceError> {
        let mut found = Found::new(artifact_type);
        if !self.ask_referrers(subject, &mut found).await? {
            found.add(self.referrers_index(subject).await?);
        }
        Ok(found.digests)
    }

    /// Asks the API, page by page, until there is no more or enough. `false` where there is no such API.
    async fn ask_referrers(&self, subject: &Digest, found: &mut Found<'_>) -> Result<bool, SourceError> {
        let what = format!("the referrers of {subject}");
        let mut url = self.url("referrers", &subject.to_string());
        url.query_pairs_mut().append_pair("artifactType", found.artifact_type);
        for page in 0..MAX_PAGES {
            let answer = self.ask(&Ask::read(Method::GET, &url, HeaderMap::new())).await?;
            match answer.response.status() {
                StatusCode::OK => {}
                // The specification says 404. Older registries don't know the path, or take it for something else.
                StatusCode::NOT_FOUND
                | StatusCode::BAD_REQUEST
                | StatusCode::METHOD_NOT_ALLOWED
                | StatusCode::NOT_IMPLEMENTED
                    if page == 0 =>
                {
                    return Ok(false);
                }
                _ => return Err(self.status_error(&answer, &what)),
            }
            let next = answer.response.headers().get(LINK).and_then(|link| next_page(&url, link.to_str().ok()?));
            let bytes = self.transport.read_small(answer.response, MAX_MANIFEST).await?;
            match serde_json::from_slice::<IndexFile>(&bytes) {
                Ok(page) => found.add(page),
                Err(_) if page == 0 => return Ok(false),
                Err(error) => return Err(self.transport.protocol(format!("{what} can't be read: {error}"))),
            }
            match next {
                // A token goes along: not to another host.
                Some(next) if next.origin() == self.base.origin() && !found.is_full() => url = next,
                _ => return Ok(true),
            }
        }
        Err(self.transport.protocol(format!("{what} fill more than {MAX_PAGES} pages")))
    }

    /// The index under the tag that stands in for the API; an empty one where there is no such tag.
    async fn referrers_index(&self, subject: &Digest) -> Result<IndexFile, SourceError> {
        let tag = referrers_tag(subject);
        let what = format!("tag {tag:?}");
        let bytes = match self.get_manifest(&tag, &what).await {
            Ok((_, bytes)) => Some(bytes),
            Err(SourceError::NotFound { .. }) => None,
            Err(error) => return Err(error),
        };
        IndexFile::read_or(bytes.as_deref(), IndexFile::empty).map_err(|error| {
            let what = format!("{what} should name the index of the referrers of {subject}: {error}; remove that tag");
            self.transport.protocol(what)
        })
    }

    /// Adds a referrer to the index under the tag, unless it stands there.
    pub(super) async fn list_referrer(&self, manifest: &NewManifest, refers: &Refers) -> Result<(), SourceError> {
        let mut index = self.referrers_index(&refers.subject).await?;
        if !index.add(Descriptor::of_referrer(manifest, refers)) {
            return Ok(());
        }
        let bytes = serde_json::to_vec(&index)
            .map_err(|error| self.transport.protocol(format!("the index of referrers can't be written: {error}")))?;
        self.write_manifest(&referrers_tag(&refers.subject), INDEX_TYPE, &bytes.into()).await?;
        Ok(())
    }
}

/// The next page that a `Link` header names.
fn next_page(from: &Url, link: &str) -> Option<Url> {
    let next = link.split(',').find_map(|one| {
        let (target, parameters) = one.trim().strip_prefix('<')?.split_once('>')?;
        let is_next = parameters.split(';').any(|parameter| matches!(parameter.trim(), "rel=\"next\"" | "rel=next"));
        is_next.then_some(target)
    })?;
    from.join(next).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_page_is_found_among_links() {
        let from = Url::parse("https://r.example/v2/a/referrers/x?n=1").expect("valid");
        let next = |link: &str| next_page(&from, link).map(String::from);
        assert_eq!(next("<?n=2>; rel=\"next\"").as_deref(), Some("https://r.example/v2/a/referrers/x?n=2"));
        assert_eq!(next("</p>; rel=prev, </q>; rel=next").as_deref(), Some("https://r.example/q"));
        for none in ["", "x", "<?n=2>", "<?n=2>; rel=\"prev\"", "<?n=2; rel=next"] {
            assert_eq!(next(none), None, "{none}");
        }
    }
}
