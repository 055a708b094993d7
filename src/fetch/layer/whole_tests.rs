use std::collections::BTreeMap;

use super::*;
use crate::cache::Cache;
use crate::digest::Digest;
use crate::fetch::{Context, FILLS, Limits, Verify};
use crate::modelkit::{Compression, Format, Kind, Layer};
use crate::path::TreePath;

/// A layer that nobody has.
fn layer(name: &str, context: &Context) -> Arc<LayerFetch> {
    let layer = Layer {
        digest: Digest::of(name.as_bytes()),
        size: 1,
        diff_id: None,
        media_type: String::new(),
        annotations: BTreeMap::new(),
        kind: Kind::Model,
        name: None,
        path: name.to_owned(),
        format: Format::Tar,
        compression: Compression::None,
        root: TreePath::root(),
        prefix: TreePath::root(),
        kit: 0,
    };
    LayerFetch::new(layer, context.clone(), Vec::new(), None)
}

#[tokio::test]
async fn who_waits_for_a_turn_waits_while_one_ahead_moves_and_no_longer() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let cache = Arc::new(Cache::open(&dir.path().join("cache")).expect("a cache"));
    let context = Context::new(cache, Limits::default(), Verify::Strict);
    let mut ahead = Vec::new();
    for at in 0..FILLS {
        let layer = layer(&at.to_string(), &context);
        let turn = layer.turn().await.expect("a turn");
        ahead.push((layer, turn));
    }
    let last = layer("last", &context);
    let mut told = last.progress();
    let waiting = tokio::spawn({
        let last = last.clone();
        async move { last.turn().await.map(|_| ()) }
    });
    // What the others told when they began is over.
    tokio::time::sleep(TOLD).await;
    told.mark_unchanged();

    tokio::time::sleep(3 * TOLD).await;
    assert!(!told.has_changed().expect("it waits"), "nobody moves, and it is told so");
    ahead[0].0.progress.send_modify(|_| {});
    tokio::time::sleep(2 * TOLD).await;
    assert!(!told.has_changed().expect("it waits"), "no byte came");
    ahead[0].0.progress.send_modify(|bytes| *bytes += 1);
    let patience = Duration::from_secs(10);
    tokio::time::timeout(patience, told.changed()).await.expect("it is told").expect("it waits");
    drop(ahead.pop());
    tokio::time::timeout(patience, waiting).await.expect("its turn comes").expect("no panic").expect("a turn");
}
