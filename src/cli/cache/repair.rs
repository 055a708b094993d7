//! Fetching again what was set aside as damaged, for the kits that need it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::Failure;
use super::super::options::{ConnectionArgs, FetchArgs, ProgressArgs, TrustArgs};
use super::super::progress::Progress;
use crate::cache::KitRecord;
use crate::fetch::{Access, Context, FetchError, Kit, LayerFetch, Pace, Request, Verify};
use crate::reference::Reference;
use crate::report::chain;

/// What of a kit is to be had again. Layers are told by their positions in the kit's record.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    /// The damaged files that this is for, by the caller's count, with their layers.
    pub files: Vec<(usize, Option<usize>)>,
    /// The rows of the layers whose content is gone; none where the index is.
    rows: BTreeMap<usize, Vec<usize>>,
}

/// What became of the layers of which something was wanted.
pub(super) type Outcomes = BTreeMap<usize, Result<(), String>>;

impl Wanted {
    /// Adds what a damaged file was: content at a row of a layer, an index of a layer, or a document.
    pub fn add(&mut self, file: usize, layer: Option<usize>, row: Option<usize>) {
        self.files.push((file, layer));
        // The documents are fetched with any kit that is opened.
        let Some(layer) = layer else { return };
        self.rows.entry(layer).or_default().extend(row);
    }
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
            access: fetch.access(connection)?,
            request,
            progress,
        })
    }

    /// Opens a kit, which fetches its documents, and fetches what else is wanted of it; tells what became of each layer, by
    /// its position in the record.
    pub async fn kit(&self, record: &KitRecord, wanted: &Wanted) -> Result<Outcomes, FetchError> {
        let resolved = crate::fetch::resolve(&self.context, &self.access, &self.request).await?;
        let kit = Kit::open(&self.context, resolved);
        let _progress = Progress::of(&kit.layers, self.progress.mode());
        let mut outcomes = Outcomes::new();
        for (at, rows) in &wanted.rows {
            let Some(noted) = record.layers.get(*at) else { continue };
            let same = |fetch: &&Arc<LayerFetch>| {
                fetch.layer.digest == noted.digest && fetch.layer.root.to_string() == noted.path
            };
            let outcome = match kit.layers.iter().find(same) {
                Some(fetch) => layer(fetch, rows).await.map_err(|error| chain(&error)),
                None => Err(format!("the kit has no layer {} any more", noted.digest)),
            };
            outcomes.insert(*at, outcome);
        }
        Ok(outcomes)
    }
}

/// Fetches the index of a layer and the content of these rows, as far as they are not here.
async fn layer(fetch: &Arc<LayerFetch>, rows: &[usize]) -> Result<(), FetchError> {
    if fetch.look_for_index().await?.is_none() {
        // Content comes with the layer, and its index too.
        return if rows.is_empty() { fetch.derive().await.map(|_| ()) } else { fetch.fill().await.map(|_| ()) };
    }
    fetch.complete_rows(rows, Pace::Now).await
}
