//! Fetching again what was set aside as damaged, for the kits that need it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::Failure;
use super::super::options::{ConnectionArgs, FetchArgs, ProgressArgs, TrustArgs};
use super::super::progress::Progress;
use crate::cache::KitRecord;
use crate::fetch::layer::{Content, RowContent};
use crate::fetch::{Access, Context, FetchError, Kit, LayerFetch, Request, Verify};
use crate::reference::Reference;

/// A file is fetched so many bytes at a time: what is joined into one request.
const PIECE: u64 = 16 << 20;

/// How long a disk may take to keep a file that was fetched, and how often is looked.
const KEPT: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(20);

/// What of a kit is to be had again.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Wanted {
    /// Layers whose index is gone, by their positions in the record.
    pub indexes: BTreeSet<usize>,
    /// Files whose content is gone, by the positions of their layers in the record and their rows in these.
    pub rows: BTreeSet<(usize, usize)>,
}

/// How what is missing is fetched.
pub(super) struct Refetch {
    context: Context,
    access: Access,
    request: Request,
    progress: ProgressArgs,
}

impl Refetch {
    pub fn new(
        fetch: &FetchArgs,
        connection: &ConnectionArgs,
        trust: &TrustArgs,
        progress: ProgressArgs,
        reference: Reference,
    ) -> Result<Self, Failure> {
        let mut request = Request::new(reference);
        trust.apply(&mut request)?;
        Ok(Self {
            context: fetch.context(connection, Verify::Strict)?,
            access: connection.access(fetch)?,
            request,
            progress,
        })
    }

    /// Opens a kit, which fetches its documents, and fetches what else is wanted of it.
    pub async fn kit(&self, record: &KitRecord, wanted: &Wanted) -> Result<(), FetchError> {
        let resolved = crate::fetch::resolve(&self.context, &self.access, &self.request).await?;
        let kit = Kit::open(&self.context, resolved);
        let _progress = Progress::of(&kit.layers, self.progress.mode());
        let mut rows: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (layer, row) in &wanted.rows {
            rows.entry(*layer).or_default().push(*row);
        }
        for at in wanted.indexes.iter().chain(rows.keys()).collect::<BTreeSet<_>>() {
            let Some(noted) = record.layers.get(*at) else { continue };
            let same = |fetch: &&Arc<LayerFetch>| {
                (fetch.layer.digest, fetch.layer.root.to_string()) == (noted.digest, noted.path.clone())
            };
            let lost = || FetchError::Lost { what: format!("layer {} of the kit", noted.digest) };
            let fetch = kit.layers.iter().find(same).ok_or_else(lost)?;
            layer(fetch, rows.get(at).map_or(&[], Vec::as_slice)).await?;
        }
        Ok(())
    }
}

/// Fetches the index of a layer and the content of these rows, as far as they are not here.
async fn layer(fetch: &Arc<LayerFetch>, rows: &[usize]) -> Result<(), FetchError> {
    if fetch.look_for_index().await?.is_none() {
        // Content comes with the layer, and its index too.
        return if rows.is_empty() { fetch.derive().await.map(|_| ()) } else { fetch.fill().await.map(|_| ()) };
    }
    for row in rows {
        let size = fetch.known().and_then(|known| Some(known.head().row(*row)?.size())).unwrap_or(0);
        let RowContent::Verified(Content::Chunked(file)) = fetch.content(*row, size).await? else { continue };
        for start in (0..size).step_by(PIECE as usize) {
            fetch.read(*row, &file, start..size.min(start + PIECE)).await?;
        }
        drop(file);
        kept(fetch, *row).await?;
    }
    Ok(())
}

/// Waits until the cache has a file under its name: behind the last read come a sync and a rename.
async fn kept(fetch: &Arc<LayerFetch>, row: usize) -> Result<(), FetchError> {
    let start = Instant::now();
    while !fetch.is_cached(row).await? {
        if start.elapsed() > KEPT {
            return Err(FetchError::Lost { what: format!("a file of layer {}", fetch.layer.digest) });
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}
