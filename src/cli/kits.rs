//! From a reference to an opened kit: what all commands on a kit have in common.

use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use super::options::{CacheArgs, ChoiceArgs, ConnectionArgs, FetchArgs, SelectionArgs, TrustArgs};
use super::{Failure, output};
use crate::fetch::listing::Listing;
use crate::fetch::{Access, Context, FetchError, Kit, Policy, Request, Resolved, Verify};
use crate::fs::{Fs, Ownership};
use crate::modelkit::filter::Filters;
use crate::path::TreePath;
use crate::reference::{Location, Reference};
use crate::source::{self, Target};
use crate::tree::Tree;

/// A command ends when its user ends it; until then it may wait for names as long as there is progress. Ten years.
const NO_DEADLINE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Which part of a kit, and how to get it.
#[derive(Debug, Args)]
pub(super) struct KitArgs {
    #[command(flatten)]
    selection: SelectionArgs,
    #[command(flatten)]
    trust: TrustArgs,
    #[command(flatten)]
    pub(super) fetch: FetchArgs,
    #[command(flatten)]
    pub(super) connection: ConnectionArgs,
}

impl KitArgs {
    /// Follows a reference to its plan; `is_to_mount` says that all layers will be asked what they hold.
    pub(super) async fn resolve(
        &self,
        reference: &Reference,
        verify: Verify,
        is_to_mount: bool,
        policy: Policy,
    ) -> Result<(Context, Resolved), Failure> {
        let context = self.fetch.context(&self.connection, verify)?;
        let resolved = self.resolve_in(&context, reference, is_to_mount, policy).await?;
        Ok((context, resolved))
    }

    /// Follows a reference for a look, for who has a use for the error. No policy is about looks.
    pub(super) async fn follow(
        &self,
        reference: &Reference,
        verify: Verify,
    ) -> Result<(Context, Access, Result<Resolved, FetchError>), Failure> {
        let request = self.request(reference)?;
        let context = self.fetch.context(&self.connection, verify)?;
        let access = self.fetch.access(&self.connection)?;
        let resolved = crate::fetch::resolve(&context, &access, &request).await;
        Ok((context, access, resolved))
    }

    /// Which kit of an image index is wanted.
    pub(super) fn choice(&self) -> &ChoiceArgs {
        &self.selection.choice
    }

    /// The same with a cache and limits that are there already.
    pub(super) async fn resolve_in(
        &self,
        context: &Context,
        reference: &Reference,
        is_to_mount: bool,
        policy: Policy,
    ) -> Result<Resolved, Failure> {
        let request = Request { is_to_mount, policy, ..self.request(reference)? };
        let access = self.fetch.access(&self.connection)?;
        resolve(context, &access, &request).await
    }

    /// What is asked for. A filter that kit refuses is wrong use.
    pub(super) fn request(&self, reference: &Reference) -> Result<Request, Failure> {
        let filters = Filters::parse(&self.selection.filter).map_err(Failure::usage)?;
        let mut request = Request { filters, ..Request::new(reference.clone()) };
        self.selection.choice.apply(&mut request);
        self.trust.apply(&mut request)?;
        Ok(request)
    }

    /// Opens two kits for a look inside, over one cache, and says what there is to note of both.
    pub(super) async fn open_both(
        &self,
        [first, second]: [&Reference; 2],
        verify: Verify,
    ) -> Result<[Kit; 2], Failure> {
        say_whose(&self.fetch.cache, &self.connection)?;
        let (first, second) = (self.request(first)?, self.request(second)?);
        let context = self.fetch.context(&self.connection, verify)?;
        let access = self.fetch.access(&self.connection)?;
        let both = tokio::try_join!(resolve(&context, &access, &first), resolve(&context, &access, &second))?;
        Ok(<[Resolved; 2]>::from(both).map(|resolved| opened(context.clone(), resolved).1))
    }

    /// Opens a kit for a look inside, and says what there is to note. No policy is about looks.
    pub(super) async fn open(&self, reference: &Reference, verify: Verify) -> Result<(Context, Kit), Failure> {
        self.open_if(reference, verify, Policy::default()).await
    }

    /// The same, if the policy allows it.
    pub(super) async fn open_if(
        &self,
        reference: &Reference,
        verify: Verify,
        policy: Policy,
    ) -> Result<(Context, Kit), Failure> {
        say_whose(&self.fetch.cache, &self.connection)?;
        let (context, resolved) = self.resolve(reference, verify, false, policy).await?;
        Ok(opened(context, resolved))
    }
}

/// The same with what was resolved.
pub(super) fn opened(mut context: Context, resolved: Resolved) -> (Context, Kit) {
    output::say_all("note", &resolved.notes);
    output::say_all("warning", &resolved.plan.warnings);
    context.limits.meta_timeout = NO_DEADLINE;
    let kit = Kit::open(&context, resolved);
    (context, kit)
}

/// Follows a reference, as it is asked for, to its plan.
pub(super) async fn resolve(context: &Context, access: &Access, request: &Request) -> Result<Resolved, Failure> {
    let resolved = crate::fetch::resolve(context, access, request).await;
    resolved.map_err(|error| not_resolved(&request.reference, access, &error))
}

/// Opens what is written to, on a thread that may wait: a directory is made, under a lock that others may hold.
pub(super) async fn open_target(location: &Location, access: &Access) -> Result<Arc<dyn Target>, Failure> {
    let (location, Access { connection, kit_home, .. }) = (location.clone(), access.clone());
    let opened = tokio::task::spawn_blocking(move || source::open_target(&location, &connection, &kit_home));
    Ok(opened.await??)
}

/// Under sudo it is root's home that counts, which surprises: says whose cache and credentials these are. For each
/// command that uses them, once, and not for the daemon that a command starts.
pub(super) fn say_whose(cache: &CacheArgs, connection: &ConnectionArgs) -> Result<(), Failure> {
    let user = std::env::var("SUDO_USER").ok().filter(|user| user != "root");
    if let (Some(user), true) = (user, rustix::process::geteuid().is_root()) {
        let (cache, home) = (cache.dir()?, connection.kit_home()?);
        output::say(
            "note",
            format!(
                "under sudo, as root, not {user}: the cache is {}, credentials and kit's storage are in {}, \
                 Docker's below {}; choose others with --cache-dir and --kit-home",
                cache.display(),
                home.display(),
                std::env::home_dir().unwrap_or_default().display()
            ),
        );
    }
    Ok(())
}

/// Says that no digest stands behind what follows.
pub(super) fn say_unverified(what: &str) {
    output::say("UNVERIFIED", format!("{what} as the source gave them; no digest was checked, and nothing is kept"));
}

/// Adds to `tree` what the headers of the layers that concern `path` tell, unverified, and returns those listings by
/// the positions of their layers. All layers are asked only where `path` is in none of them.
pub(super) async fn list_unverified(
    kit: &Kit,
    tree: &mut Tree,
    path: &TreePath,
) -> Result<Vec<(usize, Arc<Listing>)>, Failure> {
    let concerns = |root: &TreePath| root.is_within(path) || path.is_within(root);
    let positions = 0..kit.layers.len();
    let (first, rest): (Vec<_>, Vec<_>) = positions.partition(|at| concerns(&kit.layers[*at].layer.root));
    let mut listings = Vec::new();
    for at in first.into_iter().map(Some).chain([None]).chain(rest.into_iter().map(Some)) {
        let Some(at) = at else {
            if tree.find(path).is_some() {
                break;
            }
            continue;
        };
        let listing = kit.layers[at].unverified_listing().await?;
        if let Some(conflict) = tree.add_listing(at, listing.metas()).into_iter().next() {
            return Err(FetchError::Conflict(kit.describe(&conflict)).into());
        }
        listings.push((at, listing));
    }
    Ok(listings)
}

/// A file system for a look inside: the kit's own modes and owners, no deadline for names.
pub(super) fn look(kit: Kit, context: Context, tree: Tree) -> Arc<Fs> {
    let ownership = Ownership { uid: 0, gid: 0, file_mode: None, dir_mode: None, from_kit: true, for_others: false };
    Arc::new(Fs::new(kit, context, tree, ownership))
}

/// Why a reference leads nowhere.
pub(super) fn not_resolved(reference: &Reference, access: &Access, error: &FetchError) -> Failure {
    Failure::failed(access.why_not(reference, error))
}
