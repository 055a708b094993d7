//! Requests on the control socket: a command, and what it takes, as JSON.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Asked, Serving, served};
use crate::digest::Digest;
use crate::history::Action;
use crate::reference::Reference;
use crate::report::chain;
use crate::source;

/// How long asking for a tag may take for `status`.
pub const CHECK: Duration = Duration::from_secs(20);

/// What can be asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "lowercase")]
pub enum Request {
    /// How the mount is.
    Status {
        /// Whether to ask where the tag points now.
        #[serde(default)]
        check: bool,
    },
    /// To serve another kit.
    Switch {
        /// Which.
        reference: String,
        /// Whether it goes back.
        #[serde(default)]
        is_rollback: bool,
        /// Whether all of it must be here first.
        #[serde(default)]
        prefetch: bool,
        /// Who asks.
        #[serde(default)]
        user: String,
    },
    /// How far the kit is that is completed before it is switched to.
    Coming,
    /// To follow the tag again.
    Follow,
}

/// Answers a request.
pub fn answer(serving: Arc<Serving>, request: Value) -> BoxFuture<'static, Value> {
    Box::pin(async move { answered(&serving, request).await })
}

async fn answered(serving: &Arc<Serving>, request: Value) -> Value {
    match serde_json::from_value(request) {
        Ok(Request::Status { check }) => status(serving, check).await,
        Ok(Request::Coming) => {
            let coming = serving.coming.lock().unwrap_or_else(|held| held.into_inner()).clone();
            let report = coming.and_then(|fs| Some(fs.prefetch()?.report(fs.kit())));
            json!({ "prefetch": report })
        }
        Ok(Request::Switch { reference, is_rollback, prefetch, user }) => {
            let reference = match reference.parse::<Reference>() {
                Ok(reference) => reference,
                Err(error) => return json!({ "error": error.to_string() }),
            };
            let action = if is_rollback { Action::Rollback } else { Action::Switch };
            let asked = Asked { reference, typed: None, action, prefetch, user: Some(user) };
            let switched = serving.switch(asked).await;
            switched.unwrap_or_else(|failure| json!({ "error": failure.to_string() }))
        }
        Ok(Request::Follow) => match &serving.follow {
            Some(follow) => {
                follow.resume();
                json!({ "follow": follow.report(serving.now().top) })
            }
            None => json!({
                "error": format!("{} was mounted without --follow; mount it anew with it", serving.purpose.dir.display()),
            }),
        },
        Err(error) => json!({ "error": format!("unknown request: {error}") }),
    }
}

async fn status(serving: &Arc<Serving>, check: bool) -> Value {
    let (fs, served, top, reference) = {
        let now = serving.now();
        (now.fs.clone(), now.served.clone(), now.top, now.reference.clone())
    };
    let mut all = served::status(serving, fs, served.clone()).await;
    let more = json!({
        "reference": served.reference,
        "asked": reference.to_string(),
        "digest": served.digest,
        "trees": serving.trees.digests(),
        "labels": serving.purpose.labels,
        "follow": serving.follow.as_ref().map(|follow| follow.report(top)),
        "tag": if check { Some(tag(serving, &reference, top).await) } else { None },
    });
    if let (Value::Object(all), Value::Object(more)) = (&mut all, more) {
        all.extend(more);
    }
    all
}

/// Where the tag points now that the mount was asked for by.
async fn tag(serving: &Serving, reference: &Reference, top: Digest) -> Value {
    // What was chosen by digest since, as by a rollback, leaves the tag that the mount was made for.
    let reference = if reference.digest.is_some() { &serving.purpose.reference } else { reference };
    if reference.digest.is_some() {
        return json!({ "error": "it was asked for by digest, which never moves" });
    }
    let asked = async {
        let access = serving.opener.access();
        let source = source::open(&reference.location, &access.connection, &access.kit_home);
        source.map_err(|error| chain(&error))?.resolve(reference.tag()).await.map_err(|error| chain(&error))
    };
    match tokio::time::timeout(CHECK, asked).await {
        Ok(Ok(digest)) => json!({ "tag": reference.tag(), "digest": digest, "drift": digest != top }),
        Ok(Err(why)) => json!({ "tag": reference.tag(), "error": why }),
        Err(_) => json!({ "tag": reference.tag(), "error": format!("no answer within {} s", CHECK.as_secs()) }),
    }
}
