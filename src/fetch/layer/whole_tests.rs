use super::*;
use crate::cache::Cache;
use crate::fetch::{Context, FILLS, Limits, Verify};
use crate::modelkit::testing;

/// A layer that nobody has.
fn layer(name: &str, context: &Context) -> Arc<LayerFetch> {
    LayerFetch::new(testing::layer(name), context.clone(), Vec::new(), None)
}

#[tokio::test]
async fn who_waits_for_a_turn_waits_while_one_ahead_moves_and_no_longer() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let cache = Arc::new(Cache::open(&dir.path().join("cache")).expect("a cache"));
    let context = Context::new(cache, Limits::default(), Verify::Strict);
    let mut ahead = Vec::new();
    for at in 0..FILLS {
        let layer = layer(&at.to_string(), &context);
        let turn = layer.turn(Pace::Now).await.expect("a turn");
        ahead.push((layer, turn));
    }
    let last = layer("last", &context);
    let mut told = last.progress();
    let waiting = tokio::spawn({
        let last = last.clone();
        async move { last.turn(Pace::Now).await.map(|_| ()) }
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
