//! What a mount tells of itself, for people.

use super::Failure;
use super::output::{Output, printable};
use crate::fetch::Tier;
use crate::fs::prefetch::{Report, State};
use crate::serving::served::Served;
use crate::units::format_size;

/// What it means for a mount that registries are not to be asked.
pub(super) const OFFLINE: &str = "no registry is asked; to read what is not in the cache is an I/O error";

/// Prints what is served, when it begins to be.
pub(super) fn print(served: &Served, as_json: bool) -> Result<(), Failure> {
    let mut out = Output::new();
    if as_json {
        out.json(served)?;
        return out.finish();
    }
    let trust = match served.trust {
        Tier::Provisional => "provisional: names are known, content waits for its layer's digest",
        Tier::Pinned => "pinned: content is read in parts, proved by the kit's own index",
        Tier::Attested => "attested: content is read in parts, proved by an index that you trust",
        Tier::Derived => "derived",
    };
    let plural = if served.layers == 1 { "layer" } else { "layers" };
    let mut lines = vec![
        ("mounted", served.reference.clone()),
        ("on", served.mountpoint.display().to_string()),
        ("holds", format!("{} in {} {plural}", format_size(served.bytes), served.layers)),
        ("trust", trust.to_owned()),
    ];
    if served.offline {
        lines.push(("offline", OFFLINE.to_owned()));
    }
    lines.extend(served.prefetch.as_ref().map(|report| ("prefetch", in_words(report))));
    lines.extend(served.kits.iter().skip(1).map(|kit| ("parent", format!("{}@{}", kit.repository, kit.digest))));
    lines.extend(served.notes.iter().map(|note| ("note", note.clone())));
    lines.extend(served.warnings.iter().map(|warning| ("warning", warning.clone())));
    let rows = lines.into_iter().map(|(key, value)| vec![key.to_owned(), printable(value.as_bytes())]);
    out.table(&rows.collect::<Vec<_>>())?;
    out.finish()
}

/// How far the prefetch is, for people.
pub(super) fn in_words(report: &Report) -> String {
    let Report { mode, state, done, total, why } = report;
    let bytes = || format!("{} of {}", format_size(*done), format_size(*total));
    let why = why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
    match state {
        State::Waiting => format!("{mode}, waiting for reads"),
        State::Running => format!("{mode}, {} are here", bytes()),
        State::Done => format!("{mode}, done: {}{why}", format_size(*total)),
        State::Failed => format!("{mode}, failed at {}{why}", bytes()),
    }
}
