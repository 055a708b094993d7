//! What must not get into the record, which lives for a year and is read by auditors: user and password of a URL, its
//! query, which may be a signature, and what follows `Bearer` and `Basic`.
//!
//! References hold none of it, as they are parsed. What a registry or a proxy answered may, and so may what a user has set
//! as a label.

use super::{Event, Outcome};

/// What stands for what was struck out.
const STRUCK: &str = "…";

/// The event without secrets.
pub(super) fn struck_out(event: &Event) -> Event {
    let mut event = event.clone();
    event.reference = without_secrets(&event.reference);
    if let Outcome::Failed(why) = &mut event.outcome {
        *why = without_secrets(why);
    }
    event.revision = event.revision.as_deref().map(without_secrets);
    event.labels.values_mut().for_each(|value| *value = without_secrets(value));
    event
}

fn without_secrets(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut is_credential = false;
    // Words with what ends them.
    for piece in text.split_inclusive(|c: char| c.is_whitespace() || "\"'`<>()".contains(c)) {
        let word = piece.trim_end_matches(|c: char| c.is_whitespace() || "\"'`<>()".contains(c));
        let end = &piece[word.len()..];
        if word.is_empty() {
            out.push_str(end);
            continue;
        }
        out.push_str(&if is_credential { STRUCK.to_owned() } else { clean(word) });
        out.push_str(end);
        is_credential = ["bearer", "basic"].iter().any(|scheme| word.eq_ignore_ascii_case(scheme));
    }
    out
}

/// A word; of a URL, the parts that can't be secret.
fn clean(word: &str) -> String {
    let Some((scheme, rest)) = word.split_once("://") else { return word.to_owned() };
    let (rest, query) = match rest.find(['?', '#']) {
        Some(at) => (&rest[..at], format!("{}{STRUCK}", &rest[at..=at])),
        None => (rest, String::new()),
    };
    // Several in one word end like this too; better a host too few than a password too many.
    let rest = match rest.rsplit_once('@') {
        Some((_, behind)) => format!("{STRUCK}@{behind}"),
        None => rest.to_owned(),
    };
    format!("{scheme}://{rest}{query}")
}

#[cfg(test)]
mod tests {
    use super::without_secrets;

    #[test]
    fn users_passwords_queries_and_tokens_are_struck_out_and_nothing_else() {
        for (text, left) in [
            ("the proxy http://kit:sesame@proxy:3128/ refused", "the proxy http://…@proxy:3128/ refused"),
            ("GET https://s3/b/x?X-Amz-Signature=abc: 403", "GET https://s3/b/x?… 403"),
            ("(https://a:b@c/d#e)", "(https://…@c/d#…)"),
            ("(\"https://h/d?sig=1\")", "(\"https://h/d?…\")"),
            ("http://a@b@c", "http://…@c"),
            ("http://a:b@c,http://d:e@f", "http://…@f"),
            ("http://a:b/c@d", "http://…@d"),
            ("Authorization: Bearer abc.def and basic Zm9v", "Authorization: Bearer … and basic …"),
            ("ghcr.io/team/llama:8b@sha256:00", "ghcr.io/team/llama:8b@sha256:00"),
            ("why? no tag in a/b: took `latest`", "why? no tag in a/b: took `latest`"),
        ] {
            assert_eq!(without_secrets(text), left, "{text}");
        }
    }
}
