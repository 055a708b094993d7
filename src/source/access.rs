//! What a request needs to be allowed, and the scopes of a token that allows it.

/// What a request does with the repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Access {
    Pull,
    /// Writing, which reads as well.
    Push,
    /// Writing, with blobs taken over from another repository.
    Mount {
        from: String,
    },
    /// All that the user's own credential allows: there is no other to ask for.
    Any,
}

impl Access {
    /// Whether what was granted for this is enough for `other`.
    pub(super) fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Any, _) | (_, Self::Pull) => true,
            (Self::Push | Self::Mount { .. }, Self::Push) => true,
            (Self::Mount { from }, Self::Mount { from: other }) => from == other,
            _ => false,
        }
    }

    /// The scopes to ask a token server for. `stated` is what the registry wants, which may name the repository
    /// differently than we do; it is only added to where it would not be enough.
    pub(super) fn scopes(&self, repository: &str, stated: Option<&str>) -> Vec<String> {
        let mut scopes: Vec<String> = stated.unwrap_or_default().split_whitespace().map(str::to_owned).collect();
        let has = |scopes: &[String], start: &str, action: &str| {
            scopes.iter().filter(|scope| scope.starts_with(start)).any(|scope| {
                let actions = scope.rsplit_once(':').map_or("", |(_, actions)| actions);
                actions.split(',').any(|one| one == action || one == "*")
            })
        };
        let own = format!("repository:{repository}:");
        if *self == Self::Pull || *self == Self::Any {
            if scopes.is_empty() {
                scopes.push(format!("{own}pull"));
            }
        } else if !has(&scopes, "repository:", "push") {
            scopes.retain(|scope| !scope.starts_with(&own));
            scopes.push(format!("{own}pull,push"));
        }
        if let Self::Mount { from } = self {
            let start = format!("repository:{from}:");
            if !has(&scopes, &start, "pull") {
                scopes.push(format!("{start}pull"));
            }
        }
        scopes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_granted_for_more_serves_for_less() {
        let mount = |from: &str| Access::Mount { from: from.to_owned() };
        assert!(
            mount("a").covers(&Access::Push) && Access::Push.covers(&Access::Pull) && Access::Any.covers(&mount("a"))
        );
        assert!(!Access::Pull.covers(&Access::Push) && !Access::Push.covers(&mount("a")));
        assert!(mount("a").covers(&mount("a")) && !mount("a").covers(&mount("b")));
    }

    #[test]
    fn a_writer_asks_for_push_even_where_the_registry_stated_pull() {
        let mount = Access::Mount { from: "b".to_owned() };
        for (access, stated, expected) in [
            (&Access::Pull, None, "repository:a:pull"),
            (&Access::Pull, Some("repository:x/a:pull"), "repository:x/a:pull"),
            (&Access::Push, None, "repository:a:pull,push"),
            (&Access::Push, Some("repository:a:pull"), "repository:a:pull,push"),
            (&Access::Push, Some("repository:x/a:pull,push"), "repository:x/a:pull,push"),
            (&Access::Push, Some("repository:a:*"), "repository:a:*"),
            (&mount, Some("repository:a:pull,push"), "repository:a:pull,push repository:b:pull"),
            (&mount, Some("repository:a:pull,push repository:b:pull"), "repository:a:pull,push repository:b:pull"),
        ] {
            assert_eq!(access.scopes("a", stated).join(" "), expected, "{access:?} {stated:?}");
        }
    }
}
