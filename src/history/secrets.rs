//! What must not get into the record, which lives for a year and is read by auditors: user and password of a URL, its
//! query, which may be a signature, what follows `Bearer` and `Basic`, and what is called a token, password, secret or key.
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
    for (key, value) in &mut event.labels {
        *value = if is_secret(key) { STRUCK.to_owned() } else { without_secrets(value) };
    }
    event
}

/// What a secret is called, as a part of its name.
const SECRET: [&str; 7] = ["token", "password", "passwd", "pwd", "secret", "api_key", "apikey"];

/// Whether a name is that of a secret.
fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    SECRET.iter().any(|secret| name.ends_with(secret))
}

/// `name=value` or `name:value` without a value that is secret; `None` where it is neither.
fn assigned(word: &str) -> Option<String> {
    let at = word.find(['=', ':']).filter(|at| is_secret(&word[..*at]) && !word[*at..].starts_with("://"))?;
    let value = if word.len() > at + 1 { STRUCK } else { "" };
    Some(format!("{}{value}", &word[..=at]))
}

fn without_secrets(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut is_credential = false;
    let mut was_named = false;
    // Words with what ends them.
    for piece in text.split_inclusive(|c: char| c.is_whitespace() || "\"'`<>()".contains(c)) {
        let word = piece.trim_end_matches(|c: char| c.is_whitespace() || "\"'`<>()".contains(c));
        let end = &piece[word.len()..];
        // A name may stand in quotes, and what says that a value follows by itself.
        if word.is_empty() || (was_named && matches!(word, "=" | ":")) {
            out.push_str(piece);
            is_credential |= was_named && !word.is_empty();
            continue;
        }
        let assigned = assigned(word);
        let value_follows = assigned.as_ref().is_some_and(|assigned| assigned == word);
        out.push_str(&if is_credential { STRUCK.to_owned() } else { assigned.unwrap_or_else(|| clean(word)) });
        out.push_str(end);
        is_credential = value_follows || ["bearer", "basic"].iter().any(|scheme| word.eq_ignore_ascii_case(scheme));
        was_named = is_secret(word);
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
            ("token=s3cr3t and password: s3cr3t, pwd=x", "token=… and password: … pwd=…"),
            ("{\"access_token\":\"s3cr3t\",\"a\":1}", "{\"access_token\":\"…\",\"a\":1}"),
            ("secret = s3cr3t; api_key= k", "secret = … api_key= …"),
            ("the token is old, no tokens: 3", "the token is old, no tokens: 3"),
            ("ghcr.io/team/llama:8b@sha256:00", "ghcr.io/team/llama:8b@sha256:00"),
            ("why? no tag in a/b: took `latest`", "why? no tag in a/b: took `latest`"),
        ] {
            assert_eq!(without_secrets(text), left, "{text}");
        }
    }
}
