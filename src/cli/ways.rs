//! How the kernel may have files read: the flags of a mount, and what `status` tells of it.

use clap::{Args, ValueEnum};

use crate::fs::ways::{Allowed, ReadAhead, Report};
use crate::units::format_size;

/// How files may be read.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Reading")]
pub(super) struct WaysArgs {
    /// Let the kernel read complete files by itself where it can (auto), or never
    #[arg(
        long,
        env = "KITFS_PASSTHROUGH",
        value_enum,
        default_value = "auto",
        hide_possible_values = true,
        value_name = "auto|never"
    )]
    passthrough: Use,
    /// Read large files that are not here yet past the kernel's cache, which is faster for who asks for much at a time
    /// (auto), or never
    #[arg(
        long,
        env = "KITFS_DIRECT_IO",
        value_enum,
        default_value = "auto",
        hide_possible_values = true,
        value_name = "auto|never"
    )]
    direct_io: Use,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Use {
    Auto,
    Never,
}

impl WaysArgs {
    pub(super) fn allowed(self) -> Allowed {
        Allowed { passthrough: self.passthrough == Use::Auto, direct_io: self.direct_io == Use::Auto }
    }
}

/// How files are read, for people.
pub(super) fn in_words(report: &Report) -> String {
    match (&report.why, &report.not_all_why) {
        (None, None) => "passthrough".to_owned(),
        (None, Some(why)) => format!("passthrough, but some files cached, because {why}"),
        (Some(why), _) => format!("cached, because {why}"),
    }
}

/// How far the kernel reads ahead, where that is less than it should.
pub(super) fn short_read_ahead(report: &Report) -> Option<String> {
    let ReadAhead { bytes, why } = report.read_ahead.as_ref()?;
    Some(format!("{}, because {}", format_size(*bytes), why.as_ref()?))
}
