//! Groups of flags that commands share. A flag with a variable has a key in the config file too.

use std::io::{self, IsTerminal as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args, ValueEnum};

use super::Failure;
use super::config::absolute;
use crate::cache::{Cache, Limit, Settings};
use crate::digest::Digest;
use crate::fetch::{Access, Context, Limits, RepositoryPattern, Request, Trust, Verify};
use crate::inventory;
use crate::modelkit::index::Platform;
use crate::source::{self, Connection};
use crate::units;

/// How much of its file system the cache leaves free, in percent, unless a size is given: a kubelet evicts pods at 15 %.
const KEPT_FREE: u8 = 20;

/// What of a kit is wanted.
#[derive(Debug, Args)]
#[command(next_help_heading = "Selection")]
pub(super) struct SelectionArgs {
    /// Only these parts, as `kit unpack --filter`: TYPE[,TYPE…][:NAME[,NAME…]]; may be repeated
    #[arg(long, value_name = "FILTER")]
    pub(super) filter: Vec<String>,
    #[command(flatten)]
    pub(super) choice: ChoiceArgs,
}

/// Which kit of an image index is wanted.
#[derive(Debug, Args)]
#[command(next_help_heading = "Selection")]
pub(super) struct ChoiceArgs {
    /// The platform to take from an image index [default: this machine's]
    #[arg(long, value_name = "OS/ARCH")]
    pub(super) platform: Option<Platform>,
    /// The manifest to take from an image index
    #[arg(long, value_name = "DIGEST")]
    pub(super) select: Option<Digest>,
}

/// Whose word counts for what a layer holds, before it has been fetched whole.
#[derive(Debug, Args)]
#[command(next_help_heading = "Trust")]
pub(super) struct TrustArgs {
    /// Use the layer indexes that a kit or a trusted referrer names (index), or none of them (layer)
    #[arg(
        long,
        env = "KITFS_TRUST",
        value_enum,
        default_value = "index",
        hide_possible_values = true,
        value_name = "index|layer"
    )]
    trust: TrustMode,
    /// Trust this referrer to name the kit's indexes, as `kitfs index REF` printed it; may be repeated
    #[arg(long, value_name = "DIGEST")]
    index_digest: Vec<Digest>,
    /// Trust the referrers in these repositories: registry.internal/team/* covers all that is below team, however deep;
    /// a * elsewhere stays within its part; may be repeated, or take several with commas between
    #[arg(long, env = "KITFS_TRUST_INDEX", value_name = "PATTERN", value_delimiter = ',')]
    trust_index: Vec<RepositoryPattern>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TrustMode {
    Index,
    Layer,
}

/// How registries are reached.
#[derive(Debug, Args)]
#[command(next_help_heading = "Connection")]
pub(super) struct ConnectionArgs {
    /// Speak plain HTTP (loopback hosts get it anyway)
    #[arg(long, env = "KITFS_PLAIN_HTTP", value_name = "true|false", action = ArgAction::Set, value_parser = BoolishValueParser::new(), num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "false", hide_default_value = true)]
    plain_http: bool,
    /// Check the server's certificate
    #[arg(long, env = "KITFS_TLS_VERIFY", value_name = "true|false", action = ArgAction::Set, value_parser = BoolishValueParser::new(), num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "true")]
    tls_verify: bool,
    /// The client's certificate, a PEM file [variable: KITOPS_CLIENT_CERT]
    #[arg(long, env = "KITOPS_CLIENT_CERT", value_name = "FILE")]
    cert: Option<PathBuf>,
    /// The client's key, a PEM file [variable: KITOPS_CLIENT_KEY]
    #[arg(long, env = "KITOPS_CLIENT_KEY", value_name = "FILE")]
    key: Option<PathBuf>,
    /// Authorities to trust beside the system's, a PEM file
    #[arg(long, env = "KITFS_CA", value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The proxy for all requests [default: HTTPS_PROXY, HTTP_PROXY and NO_PROXY count]
    #[arg(long, env = "KITFS_PROXY", value_name = "URL")]
    proxy: Option<String>,
    /// Never touch the network: what is not in the cache or on a disk is an error
    #[arg(long, env = "KITFS_OFFLINE", value_name = "true|false", action = ArgAction::Set, value_parser = BoolishValueParser::new(), num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "false", hide_default_value = true)]
    offline: bool,
    /// Refuse a tag whose registry can't be reached, instead of taking the digest it had last
    #[arg(long, env = "KITFS_REQUIRE_FRESH", value_name = "true|false", action = ArgAction::Set, value_parser = BoolishValueParser::new(), num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "false", hide_default_value = true)]
    require_fresh: bool,
    /// Requests in flight for one layer
    #[arg(long, env = "KITFS_CONCURRENCY", value_name = "N", default_value = "5", value_parser = parse_concurrency)]
    concurrency: usize,
    /// kit's home, with its credentials and local storage [variable: KITOPS_HOME]
    #[arg(long, env = "KITOPS_HOME", value_name = "DIR")]
    kit_home: Option<PathBuf>,
}

/// Where verified bytes are kept.
#[derive(Debug, Args)]
#[command(next_help_heading = "Cache and fetching")]
pub(super) struct CacheArgs {
    /// The cache [default: $XDG_CACHE_HOME/kitfs, else ~/.cache/kitfs]
    #[arg(long, env = "KITFS_CACHE_DIR", value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// How much the cache may hold [default: as much as leaves 20 % of its file system free]
    #[arg(long, env = "KITFS_CACHE_SIZE", value_name = "SIZE", value_parser = units::parse_size)]
    cache_size: Option<u64>,
    /// Another cache to look into before the network: read, never written, whoever owns it; may be repeated
    #[arg(long, env = "KITFS_CACHE_LOWER", value_name = "DIR")]
    cache_lower: Vec<PathBuf>,
}

/// How long is waited for what is small.
#[derive(Debug, Args)]
#[command(next_help_heading = "Cache and fetching")]
pub(super) struct NameArgs {
    /// How long names and sizes may take in total
    #[arg(long, env = "KITFS_META_TIMEOUT", value_name = "DURATION", default_value = "30s",
        value_parser = units::parse_duration)]
    pub(super) meta_timeout: Duration,
}

/// How layers are fetched, and kept in the cache.
#[derive(Debug, Args)]
#[command(next_help_heading = "Cache and fetching")]
pub(super) struct FetchArgs {
    #[command(flatten)]
    pub(super) cache: CacheArgs,
    /// Hash what is in the cache again whenever it is opened
    #[arg(long, env = "KITFS_RECHECK", value_name = "true|false", action = ArgAction::Set, value_parser = BoolishValueParser::new(), num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "false", hide_default_value = true)]
    recheck: bool,
    /// How long content may make no progress
    #[arg(long, env = "KITFS_READ_TIMEOUT", value_name = "DURATION", default_value = "60s",
        value_parser = units::parse_duration)]
    read_timeout: Duration,
    #[command(flatten)]
    names: NameArgs,
    /// What a compressed layer may inflate to [default: 1 GiB or 64 times its size]
    #[arg(long, env = "KITFS_MAX_INFLATED", value_name = "SIZE", value_parser = units::parse_size)]
    max_inflated: Option<u64>,
    /// What content on its way from the registry may take of memory
    #[arg(long, env = "KITFS_MEMORY", value_name = "SIZE", default_value = "256MiB", value_parser = parse_memory)]
    memory: u64,
}

/// How the result is shown.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Output")]
pub(super) struct JsonArgs {
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// How progress is shown.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Output")]
pub(super) struct ProgressArgs {
    /// How to show progress [default: fancy on a terminal, else plain]
    #[arg(long, env = "KITFS_PROGRESS", value_enum)]
    progress: Option<ProgressMode>,
}

/// The ways to show progress, by kit's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ProgressMode {
    None,
    Plain,
    Fancy,
}

/// What a mount serves before a layer's digest has held.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Cache and fetching")]
pub(super) struct MountVerifyArgs {
    /// What waits for a layer's digest: content (strict), nothing (stream), names too (listing)
    #[arg(
        long,
        env = "KITFS_VERIFY",
        value_enum,
        default_value = "strict",
        hide_possible_values = true,
        value_name = "strict|stream|listing"
    )]
    verify: MountVerify,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum MountVerify {
    Strict,
    Stream,
    Listing,
}

/// The same for a look inside, which may also do without.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Cache and fetching")]
pub(super) struct LookVerifyArgs {
    /// As for mount; none reads names and content by range, UNVERIFIED, and keeps nothing
    #[arg(
        long,
        env = "KITFS_VERIFY",
        value_enum,
        default_value = "strict",
        hide_possible_values = true,
        value_name = "strict|stream|listing|none"
    )]
    verify: LookVerify,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LookVerify {
    Strict,
    Stream,
    Listing,
    None,
}

impl ChoiceArgs {
    /// Adds the choice to what is asked for.
    pub(super) fn apply(&self, request: &mut Request) {
        request.platform.clone_from(&self.platform);
        request.select = self.select;
    }
}

impl TrustArgs {
    /// Adds what is trusted to what is asked for.
    pub(super) fn apply(&self, request: &mut Request) -> Result<(), Failure> {
        if self.trust == TrustMode::Layer && !self.index_digest.is_empty() {
            return Err(Failure::usage(
                "--index-digest trusts an index, and --trust=layer none: leave one of them out, or say --trust=index",
            ));
        }
        request.trust = match self.trust {
            TrustMode::Index => {
                Trust::Index { referrers: self.index_digest.clone(), repositories: self.trust_index.clone() }
            }
            TrustMode::Layer => Trust::Layer,
        };
        Ok(())
    }
}

impl ConnectionArgs {
    /// Whether registries are not to be asked.
    pub(super) fn is_offline(&self) -> bool {
        self.offline
    }

    /// kit's home directory.
    pub(super) fn kit_home(&self) -> Result<PathBuf, Failure> {
        absolute(&source::kit_home(self.kit_home.as_deref()))
    }

    /// How sources are reached for names. Paths become absolute, as credentials are read anew while a mount lives.
    pub(super) fn access(&self, names: &NameArgs) -> Result<Access, Failure> {
        let path = |path: &Option<PathBuf>| path.as_deref().map(absolute).transpose();
        let mut connection = Connection {
            plain_http: self.plain_http,
            tls_verify: self.tls_verify,
            cert: path(&self.cert)?,
            key: path(&self.key)?,
            ca: path(&self.ca)?,
            proxy: self.proxy.clone(),
            offline: self.offline,
            concurrency: self.concurrency,
            ..Connection::default()
        };
        // A single request may not outlast what the user is willing to wait for.
        connection.timeouts.answer = connection.timeouts.answer.min(names.meta_timeout);
        Ok(Access { connection, kit_home: self.kit_home()?, require_fresh: self.require_fresh })
    }
}

impl FetchArgs {
    /// The cache, limits and rules of this process. Blocks on the disk for a moment.
    pub(super) fn context(&self, connection: &ConnectionArgs, verify: Verify) -> Result<Context, Failure> {
        let limits = Limits {
            read_timeout: self.read_timeout,
            meta_timeout: self.names.meta_timeout,
            concurrency: connection.concurrency,
            max_inflated: self.max_inflated,
            memory: self.memory,
        };
        let settings = Settings { recheck: self.recheck, ..self.cache.settings()? };
        let cache = Cache::open_with(&self.cache.dir()?, settings)?;
        Ok(Context::new(Arc::new(cache), limits, verify))
    }

    /// How long names and sizes may take in total.
    pub(super) fn meta_timeout(&self) -> Duration {
        self.names.meta_timeout
    }

    /// How sources are reached, for content too.
    pub(super) fn access(&self, connection: &ConnectionArgs) -> Result<Access, Failure> {
        let mut access = connection.access(&self.names)?;
        let timeouts = &mut access.connection.timeouts;
        timeouts.stall = timeouts.stall.min(self.read_timeout);
        Ok(access)
    }
}

impl CacheArgs {
    /// The cache, with its limit. Blocks on the disk for a moment.
    pub(super) fn open(&self) -> Result<Cache, Failure> {
        Ok(Cache::open_with(&self.dir()?, self.settings()?)?)
    }

    /// The same where its `format` may be damaged, to check it.
    pub(super) fn open_to_check(&self) -> Result<Cache, Failure> {
        Ok(Cache::open_to_check(&self.dir()?, self.settings()?)?)
    }

    fn settings(&self) -> Result<Settings, Failure> {
        Ok(Settings {
            limit: self.cache_size.map_or(Limit::KeepFree(KEPT_FREE), Limit::Bytes),
            policy: inventory::policy(),
            recheck: false,
            lower: self.cache_lower.iter().map(|dir| absolute(dir)).collect::<Result<_, _>>()?,
        })
    }

    /// Where the cache is.
    pub(super) fn dir(&self) -> Result<PathBuf, Failure> {
        if let Some(dir) = &self.cache_dir {
            return absolute(dir);
        }
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        // The XDG specification says to ignore relative paths.
        let dir = set("XDG_CACHE_HOME").filter(|path| path.is_absolute());
        let dir = dir.or_else(|| std::env::home_dir().map(|home| home.join(".cache")));
        let dir = dir.ok_or_else(|| {
            Failure::usage("neither XDG_CACHE_HOME nor HOME is set; choose a cache with --cache-dir or KITFS_CACHE_DIR")
        })?;
        Ok(dir.join("kitfs"))
    }
}

impl ProgressArgs {
    /// How progress is shown here.
    pub(super) fn mode(&self) -> ProgressMode {
        let by_itself = || if io::stderr().is_terminal() { ProgressMode::Fancy } else { ProgressMode::Plain };
        self.progress.unwrap_or_else(by_itself)
    }
}

impl MountVerifyArgs {
    pub(super) fn verify(&self) -> Verify {
        match self.verify {
            MountVerify::Strict => Verify::Strict,
            MountVerify::Stream => Verify::Stream,
            MountVerify::Listing => Verify::Listing,
        }
    }
}

impl LookVerifyArgs {
    /// What may be shown before a digest held. Where nothing is verified, the strict rule stays for what is fetched
    /// by the way.
    pub(super) fn verify(&self) -> Verify {
        match self.verify {
            LookVerify::Strict | LookVerify::None => Verify::Strict,
            LookVerify::Stream => Verify::Stream,
            LookVerify::Listing => Verify::Listing,
        }
    }

    /// Whether unverified names and bytes are wanted.
    pub(super) fn is_none(&self) -> bool {
        self.verify == LookVerify::None
    }
}

fn parse_memory(text: &str) -> Result<u64, String> {
    /// Four requests of 4 MiB, and what is hashed and answered meanwhile.
    const LEAST: u64 = 32 << 20;
    let size = units::parse_size(text).map_err(|error| error.to_string())?;
    if size < LEAST { Err(format!("expected at least {}", units::format_size(LEAST))) } else { Ok(size) }
}

fn parse_concurrency(text: &str) -> Result<usize, String> {
    /// More connections than this are an attack on the registry, and slower than eight.
    const MOST: usize = 64;
    let number = text.parse().ok().filter(|number| (1..=MOST).contains(number));
    number.ok_or_else(|| format!("expected a number from 1 to {MOST}"))
}
