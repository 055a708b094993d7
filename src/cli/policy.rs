//! What may be mounted and pulled, by flags and the config file.

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args};

use crate::fetch::{Policy, RegistryPattern, RepositoryPattern};
use crate::tagging::TagPattern;

/// The rules for what may be mounted, pulled and switched to.
#[derive(Debug, Args)]
#[command(next_help_heading = "Policy, also for the kits that it builds on")]
pub(super) struct PolicyArgs {
    /// Refuse what is not named by a digest
    #[arg(long, env = "KITFS_REQUIRE_DIGEST", value_name = "true|false", action = ArgAction::Set, value_parser = BoolishValueParser::new(), num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "false", hide_default_value = true)]
    require_digest: bool,
    /// Refuse these tags, patterns as for `kitfs tags --match`; one that is left out is latest. May be repeated, or take
    /// several with commas between, as the two below
    #[arg(long, env = "KITFS_DENY_TAGS", value_name = "GLOB", value_delimiter = ',')]
    deny_tags: Vec<TagPattern>,
    /// Refuse other registries than these: ghcr.io, *.internal:5000. None is asked that is not allowed; what is on this
    /// machine's disks is in none
    #[arg(long, env = "KITFS_ALLOW_REGISTRIES", value_name = "PATTERN", value_delimiter = ',')]
    allow_registries: Vec<RegistryPattern>,
    /// Refuse other repositories than these, wherever they are: registry.internal/team/* (all below team),
    /// oci:/srv/kits/*, llama
    #[arg(long, env = "KITFS_ALLOW_REPOSITORIES", value_name = "PATTERN", value_delimiter = ',')]
    allow_repositories: Vec<RepositoryPattern>,
}

impl PolicyArgs {
    /// The rules that are set.
    pub(super) fn policy(&self) -> Policy {
        Policy {
            require_digest: self.require_digest,
            deny_tags: self.deny_tags.clone(),
            allow_registries: self.allow_registries.clone(),
            allow_repositories: self.allow_repositories.clone(),
        }
    }
}
