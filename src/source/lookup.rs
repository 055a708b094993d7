//! Host names, looked up on threads that nobody waits for.
//!
//! The system's look-up can't be given up: where name servers are silent it takes up to half a minute. On the runtime's own
//! threads it would hold the end of a command that has long said what is wrong.

use std::net::ToSocketAddrs as _;
use std::thread;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::sync::oneshot;

/// The system's look-up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lookup;

impl Resolve for Lookup {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let (tell, told) = oneshot::channel();
            // Nobody listens any more where the connection was given up.
            let look = move || drop(tell.send((name.as_str(), 0).to_socket_addrs()));
            thread::Builder::new().name("lookup".to_owned()).spawn(look)?;
            let addresses: Addrs = Box::new(told.await??);
            Ok(addresses)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_are_found_or_named_unknown() {
        let look = |name: &str| Lookup.resolve(name.parse().expect("a name"));
        let found: Vec<_> = look("localhost").await.expect("an address").collect();
        assert!(found.iter().all(|address| address.ip().is_loopback()) && !found.is_empty(), "{found:?}");
        assert!(look("no-such-host.invalid").await.is_err());
    }
}
