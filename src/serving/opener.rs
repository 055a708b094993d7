//! From a reference to a tree that can be served, as the mount's flags say: for the mount itself and for each switch.

use super::NotServed;
use crate::fetch::kit::Probed;
use crate::fetch::{Access, Context, Kit, Request, Resolved, resolve};
use crate::fs::{Fs, Ownership};
use crate::reference::Reference;
use crate::source::Reach;

/// How kits are opened for a mount.
#[derive(Debug)]
pub struct Opener {
    /// What is asked for, but for the reference. Its policy says what the mount may serve, from the first to the last.
    pub request: Request,
    /// How sources are reached.
    pub access: Access,
    /// The cache and the limits.
    pub context: Context,
    /// Whose the files are shown to be.
    pub ownership: Ownership,
}

/// A kit that can be served.
#[derive(Debug)]
pub struct Opened {
    /// Its tree.
    pub fs: Fs,
    /// What is wrong with it, which is served all the same.
    pub warnings: Vec<String>,
    /// Why a layer could not be asked what it holds.
    pub(super) unasked: Option<String>,
}

impl Opener {
    /// Follows a reference and asks the kit's layers what they hold; `step` hears what is done.
    pub async fn open(&self, reference: &Reference, step: impl Fn(&str)) -> Result<Opened, NotServed> {
        step(&format!("resolving {reference}"));
        let resolved = self.resolve(reference).await?;
        self.open_resolved(resolved, step).await
    }

    pub(super) async fn resolve(&self, reference: &Reference) -> Result<Resolved, NotServed> {
        let request = Request { reference: reference.clone(), is_to_mount: true, ..self.request.clone() };
        let access = self.access();
        let resolved = resolve(&self.context, &access, &request).await;
        resolved.map_err(|error| NotServed(access.why_not(reference, &error)))
    }

    /// How sources are reached by who asks now: that a host was away for another switch says nothing.
    pub(super) fn access(&self) -> Access {
        let mut access = self.access.clone();
        access.connection.reach = Reach::default();
        access
    }

    pub(super) async fn open_resolved(&self, resolved: Resolved, step: impl Fn(&str)) -> Result<Opened, NotServed> {
        let kit = Kit::open(&self.context, resolved);
        step(&format!("reading the beginning of {} layers", kit.layers.len()));
        let mut tree = kit.skeleton();
        let Probed { warnings, unasked, .. } = kit.probe(&self.context, &mut tree).await?;
        for warning in kit.resolved.plan.warnings.iter().chain(&warnings) {
            tracing::warn!("{warning}");
        }
        Ok(Opened { fs: Fs::new(kit, self.context.clone(), tree, self.ownership), warnings, unasked })
    }
}
