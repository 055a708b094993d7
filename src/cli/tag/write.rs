//! Writing what was planned: what a tag is to lead to first, all of it, then the tag; then a look whether it leads there.

use std::sync::Arc;

use super::plan::{Item, Part, Plan};
use super::show::Report;
use super::undo::recorded;
use super::{Origin, Tools};
use crate::cli::options::ProgressMode;
use crate::cli::progress::Progress;
use crate::cli::{Failure, kits, output};
use crate::digest::Digest;
use crate::fetch;
use crate::history::{Action, Event, Outcome};
use crate::modelkit::manifest::Document as Parsed;
use crate::publish::copy::Parcel;
use crate::publish::moves::Step;
use crate::publish::{Document, PublishError, Writer};
use crate::reference::Location;
use crate::report::chain;
use crate::source::Source;

/// Writes all parts, and reports what was done until something failed.
pub(super) async fn write(
    tools: &Tools,
    origin: &Origin,
    plan: &Plan,
    progress: ProgressMode,
    report: &mut Report,
) -> Result<(), Failure> {
    for part in &plan.parts {
        let target = kits::open_target(&part.repository.location, &tools.access).await?;
        let writer = Writer::new(&tools.context, target, &origin.location, &origin.sources);
        if needs_copy(origin, part) {
            let mut parcel = Parcel::of(&tools.context, &writer, origin.digest, &origin.manifest).await?;
            let copied = {
                let _progress = Progress::of(&parcel.all_blobs(), progress);
                parcel.put(&writer).await?
            };
            // Where it was already, nothing came and nothing is left behind.
            if part.repository.location != origin.location {
                report.copied(part.repository.location.name(), copied, parcel);
            }
        }
        for item in &part.items {
            if item.is_written() {
                move_tag(tools, origin, item, &writer).await?;
            }
            report.done(item);
        }
    }
    Ok(())
}

/// Whether the kit has to be made sure of: not within a repository of a registry, which does so itself.
fn needs_copy(origin: &Origin, part: &Part) -> bool {
    let location = &part.repository.location;
    let is_beside = *location == origin.location && matches!(location, Location::Registry { .. });
    let is_led_to = |item: &Item| item.to == origin.digest && !matches!(item.step, Step::Behind { .. });
    !is_beside && part.items.iter().any(is_led_to)
}

/// Moves or makes one tag, and records it.
async fn move_tag(tools: &Tools, origin: &Origin, item: &Item, writer: &Writer) -> Result<(), Failure> {
    // The copy may have taken hours, and somebody else the tag.
    let found = writer.tagged(item.name.tag()).await?;
    if found != item.from() {
        let shown = |digest: Option<Digest>| digest.map_or_else(|| "not there".to_owned(), |digest| digest.to_string());
        return Err(Failure::failed(format!(
            "{} was {} and is {} now: somebody was faster, and it is left; look at it and run again",
            item.name,
            shown(item.from()),
            shown(found)
        )));
    }
    let (document, revision) = document(tools, origin, writer, &item.to).await?;
    let outcome = put(writer, &document, item).await;
    let event = Event {
        digest: Some(item.to),
        from: item.from(),
        revision,
        outcome: outcome.as_ref().map_or_else(|error| Outcome::Failed(chain(error)), |()| Outcome::Done),
        ..Event::now(Action::Tag, recorded(&item.name))
    };
    let history = tools.history.clone();
    let appended = tokio::task::spawn_blocking(move || history.append(&event)).await?;
    if let Err(error) = appended {
        output::say("warning", format!("{}: {}; --undo won't know of this move", item.name, chain(&error)));
    }
    Ok(outcome?)
}

async fn put(writer: &Writer, document: &Document, item: &Item) -> Result<(), PublishError> {
    let tag = item.name.tag();
    match writer.put_kit(document, tag).await {
        Ok(()) => writer.check_tag(tag, &item.to).await,
        // What answers with an error, or not at all, may have done it all the same.
        Err(error) => match writer.tagged(tag).await {
            Ok(Some(found)) if found == item.to => {
                output::say("warning", format!("{}: {}; the tag has moved all the same", item.name, chain(&error)));
                Ok(())
            }
            _ => Err(error),
        },
    }
}

/// What a tag is to lead to, and the commit that it states.
async fn document(
    tools: &Tools,
    origin: &Origin,
    writer: &Writer,
    digest: &Digest,
) -> Result<(Document, Option<String>), Failure> {
    let manifest = if *digest == origin.digest {
        origin.manifest.clone()
    } else {
        // What a tag has left is where the tag is.
        let there: Arc<dyn Source> = writer.target.clone();
        fetch::manifest(&tools.context, &[there], digest).await?
    };
    let annotations = match Parsed::parse(&manifest) {
        Ok(Parsed::Manifest(manifest)) => manifest.annotations,
        Ok(Parsed::Index(index)) => index.annotations,
        Err(_) => Default::default(),
    };
    Ok((Document::unchanged(*digest, &manifest)?, annotations.get(crate::modelkit::REVISION).cloned()))
}
