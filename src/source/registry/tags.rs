//! The list of a repository's tags, page by page.
//!
//! A registry that has more says so by a `Link` with the question for the next page, which may hold a cursor of its own
//! that nobody else could make up. Only its query is taken: it can't send us to another host or path. Without a link, a
//! page that is full is followed by what comes after its last tag.

use std::collections::HashSet;

use reqwest::header::{HeaderMap, LINK};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use url::Url;

use super::{Ask, Registry};
use crate::source::index_file::is_referrers_tag;
use crate::source::{MAX_MANIFEST, SourceError};

/// Tags per page: what large registries allow at most.
const TAGS_PER_PAGE: usize = 1000;
/// More tags than any real repository has; an endless list ends here.
const MAX_TAGS: usize = 100_000;

#[derive(Deserialize)]
struct Page {
    tags: Option<Vec<String>>,
}

impl Registry {
    /// All tags but those that stand in for the referrers API.
    pub(super) async fn list_tags(&self) -> Result<Vec<String>, SourceError> {
        let what = "the list of tags";
        let list = self.url("tags", "list");
        let mut url = list.clone();
        url.query_pairs_mut().append_pair("n", &TAGS_PER_PAGE.to_string());
        let mut tags: Vec<String> = Vec::new();
        let (mut seen, mut asked) = (HashSet::new(), HashSet::new());
        // What was asked before is answered as before.
        while asked.insert(url.clone()) {
            let ask = Ask::read(Method::GET, &url, HeaderMap::new());
            let answer = self.expect(self.ask(&ask).await?, &[StatusCode::OK], what)?;
            let (has_link, linked) = next_page(answer.response.headers(), &list);
            let bytes = self.transport.read_small(answer.response, MAX_MANIFEST).await?;
            let page: Page = serde_json::from_slice(&bytes)
                .map_err(|error| self.transport.protocol(format!("{what} can't be read: {error}")))?;
            let page = page.tags.unwrap_or_default();
            let full = page.len() == TAGS_PER_PAGE;
            let before = tags.len();
            tags.extend(page.into_iter().filter(|tag| seen.insert(tag.clone())));
            if tags.len() > MAX_TAGS || asked.len() > MAX_TAGS {
                return Err(self.transport.protocol(format!("{what} has more than {MAX_TAGS} entries")));
            }
            url = match (linked, tags.last()) {
                (Some(next), _) => next,
                // A registry that knows no pages sends all at once, or the same again.
                (None, Some(last)) if (has_link || full) && tags.len() > before => {
                    let mut next = list.clone();
                    next.query_pairs_mut().append_pair("n", &TAGS_PER_PAGE.to_string()).append_pair("last", last);
                    next
                }
                (None, _) => break,
            };
        }
        tags.retain(|tag| !is_referrers_tag(tag));
        Ok(tags)
    }
}

/// Whether a `Link` to more is there, and where it leads, if that is a page of this list.
fn next_page(headers: &HeaderMap, list: &Url) -> (bool, Option<Url>) {
    let links = headers.get_all(LINK).iter().filter_map(|value| value.to_str().ok());
    let mut targets = links.filter_map(|link| link.split_once('<')?.1.split_once('>').map(|(target, _)| target));
    let Some(target) = targets.next() else { return (headers.contains_key(LINK), None) };
    // A proxy before the registry may be known there by another name, so host and scheme say nothing.
    let next = list.join(target).ok().filter(|next| next.path() == list.path() && next.query().is_some());
    let next = next.map(|next| {
        let mut page = list.clone();
        page.set_query(next.query());
        page
    });
    (true, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_link_the_query_alone_is_followed() {
        let list: Url = "https://r.example/v2/team/kit/tags/list".parse().expect("a URL");
        let next = |link: &str| {
            let headers = HeaderMap::from_iter([(LINK, link.parse().expect("a header"))]);
            next_page(&headers, &list).1.map(String::from)
        };
        let page = |query: &str| Some(format!("{list}?{query}"));
        assert_eq!(next(r#"</v2/team/kit/tags/list?last=b&n=2>; rel="next""#), page("last=b&n=2"));
        assert_eq!(
            next("<http://inner:5000/v2/team/kit/tags/list?next_page=gAAA%3D>; rel=next"),
            page("next_page=gAAA%3D")
        );
        assert_eq!(next("<?last=b>; rel=next"), page("last=b"));
        for elsewhere in
            ["<again>; rel=next", "</v2/other/tags/list?last=b>", "<https://evil.example/?last=b>", "nonsense"]
        {
            assert_eq!(next(elsewhere), None, "{elsewhere}");
        }
        assert_eq!(next_page(&HeaderMap::new(), &list), (false, None));
    }
}
