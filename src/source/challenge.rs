//! The `WWW-Authenticate` header: what a registry wants before it answers.

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};

/// One way to prove who is asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// A token from the server at `realm`.
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
    /// User and password with each request.
    Basic,
}

/// The challenge to answer: a bearer token where there is a choice, since it does not carry the password around.
pub(super) fn choose(headers: &HeaderMap) -> Option<Challenge> {
    let offered: Vec<_> =
        headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok()).flat_map(parse).collect();
    let bearer = offered.iter().find(|challenge| matches!(challenge, Challenge::Bearer { .. }));
    bearer.or_else(|| offered.first()).cloned()
}

/// Reads `Scheme key="value", key=value, Scheme …` leniently; schemes other than Bearer and Basic are passed over.
fn parse(text: &str) -> Vec<Challenge> {
    let mut challenges: Vec<(String, Vec<(String, String)>)> = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find([' ', '\t', ',', '=']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if word.is_empty() && after.is_empty() {
            break;
        }
        if let Some(value) = after.trim_start_matches([' ', '\t']).strip_prefix('=') {
            let (value, after) = value_of(value.trim_start_matches([' ', '\t']));
            if let Some((_, parameters)) = challenges.last_mut() {
                parameters.push((word.to_ascii_lowercase(), value));
            }
            rest = after;
        } else {
            challenges.push((word.to_ascii_lowercase(), Vec::new()));
            rest = after;
        }
    }
    challenges.into_iter().filter_map(|(scheme, parameters)| challenge(&scheme, parameters)).collect()
}

fn challenge(scheme: &str, parameters: Vec<(String, String)>) -> Option<Challenge> {
    match scheme {
        "basic" => Some(Challenge::Basic),
        "bearer" => {
            let get = |key: &str| parameters.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone());
            Some(Challenge::Bearer { realm: get("realm")?, service: get("service"), scope: get("scope") })
        }
        _ => None,
    }
}

/// A quoted or plain value, and what follows it.
fn value_of(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([' ', '\t', ',']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            other => value.push(other),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        let own = |text: Option<&str>| text.map(str::to_owned);
        Challenge::Bearer { realm: realm.to_owned(), service: own(service), scope: own(scope) }
    }

    #[test]
    fn a_bearer_challenge_is_read_with_its_commas_and_escapes() {
        let text = r#"Bearer realm="https://auth.example/token",service=reg, scope="repository:a/b:pull,push""#;
        assert_eq!(parse(text), [bearer("https://auth.example/token", Some("reg"), Some("repository:a/b:pull,push"))]);
        assert_eq!(parse(r#"bearer realm="a\"b""#), [bearer("a\"b", None, None)]);
    }

    #[test]
    fn bearer_is_chosen_before_basic_however_they_are_sent() {
        let mut headers = HeaderMap::new();
        headers.append(WWW_AUTHENTICATE, r#"Negotiate, Basic realm="x""#.parse().expect("valid"));
        assert_eq!(choose(&headers), Some(Challenge::Basic));
        headers.append(WWW_AUTHENTICATE, r#"Bearer realm="https://a/t""#.parse().expect("valid"));
        assert_eq!(choose(&headers), Some(bearer("https://a/t", None, None)));
    }

    #[test]
    fn nonsense_is_no_challenge() {
        for text in ["", ",,,", "Bearer", "Bearer service=x", "=", "\"", "Digest realm=\"x\"", "Bearer realm"] {
            assert_eq!(parse(text), [], "{text}");
        }
    }
}
