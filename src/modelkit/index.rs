//! Image indexes: several kits under one tag, and the choice of one.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::str::FromStr;

use super::error::ModelKitError;
use super::manifest::{Descriptor, is_manifest_type};
use crate::digest::{Digest, Verified};

/// What a kit in an index is called.
pub const TITLE: &str = "org.opencontainers.image.title";
/// Docker marks what is no image of its own, such as attestations, with this annotation.
const DOCKER_REFERENCE_TYPE: &str = "vnd.docker.reference.type";
/// What the types of manifests and configs of kits begin with.
const KIT_TYPES: [&str; 3] =
    ["application/vnd.kitops.modelkit.", "application/vnd.cncf.model.", "application/vnd.cnai.model."];

/// An image index.
#[derive(Debug, Clone)]
pub struct ImageIndex {
    /// What it lists.
    pub manifests: Vec<Descriptor>,
    /// Annotations of the index.
    pub annotations: BTreeMap<String, String>,
    /// The bytes it was read from.
    pub bytes: Verified,
}

/// An operating system and architecture, by Go's names as everywhere in OCI.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Platform {
    /// `linux`, `darwin`, …
    pub os: String,
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// `v8`, …
    pub variant: Option<String>,
}

/// Why one kit of an index is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Why {
    /// It was asked for by its digest.
    Selected,
    /// There is no other.
    Only,
    /// It is the only one for the platform that was asked for.
    Platform(Platform),
    /// It is the only one for the host's platform.
    Host(Platform),
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Selected => f.write_str("it was selected by its digest"),
            Self::Only => f.write_str("it is the only kit in the index"),
            Self::Platform(platform) => write!(f, "it is the only kit for {platform}, which was asked for"),
            Self::Host(platform) => write!(f, "it is the only kit for {platform}, this machine's platform"),
        }
    }
}

impl ImageIndex {
    /// The kit to mount: the one that `select` names; else the only one; else the only one for `platform`, which is the
    /// host's unless it is given. A platform that is given must match even where there is one kit alone.
    pub fn select(&self, platform: Option<&Platform>, select: Option<&Digest>) -> Result<&Descriptor, ModelKitError> {
        self.choose(platform, select).map(|(descriptor, _)| descriptor)
    }

    /// The same with the reason for it.
    pub fn choose(
        &self,
        platform: Option<&Platform>,
        select: Option<&Digest>,
    ) -> Result<(&Descriptor, Why), ModelKitError> {
        let candidates = self.kits();
        let lines = || lines(&candidates);
        if let Some(selected) = select {
            let found = candidates.iter().find(|candidate| candidate.digest == *selected);
            return found
                .map(|found| (*found, Why::Selected))
                .ok_or_else(|| ModelKitError::NotInIndex { selected: *selected, candidates: lines() });
        }
        if candidates.is_empty() {
            return Err(ModelKitError::EmptyIndex);
        }
        if let ([only], None) = (candidates.as_slice(), platform) {
            return Ok((only, Why::Only));
        }
        let (wanted, is_given) = (platform.cloned().unwrap_or_else(Platform::host), platform.is_some());
        let fitting: Vec<_> = candidates
            .iter()
            .filter(|candidate| candidate.platform.as_ref().is_some_and(|platform| wanted.accepts(platform)))
            .collect();
        match fitting.as_slice() {
            [one] if is_given => Ok((one, Why::Platform(wanted))),
            [one] => Ok((one, Why::Host(wanted))),
            [] => Err(ModelKitError::Ambiguous {
                why: format!("{}, none of them for {wanted}", count(candidates.len())),
                candidates: lines(),
            }),
            several => Err(ModelKitError::Ambiguous {
                why: format!("{}, {} of them for {wanted}", count(candidates.len()), several.len()),
                candidates: lines(),
            }),
        }
    }

    /// What can be a kit: manifests that do not say they are something else, each once.
    pub fn kits(&self) -> Vec<&Descriptor> {
        let (mut candidates, mut seen) = (Vec::new(), HashSet::new());
        for descriptor in &self.manifests {
            let may_be_a_kit = is_manifest_type(&descriptor.media_type)
                && !descriptor.annotations.contains_key(DOCKER_REFERENCE_TYPE)
                && descriptor
                    .artifact_type
                    .as_ref()
                    .is_none_or(|artifact_type| KIT_TYPES.iter().any(|kit| artifact_type.starts_with(kit)));
            if may_be_a_kit && seen.insert((descriptor.digest, &descriptor.platform)) {
                candidates.push(descriptor);
            }
        }
        candidates
    }
}

fn count(kits: usize) -> String {
    if kits == 1 { "1 kit".to_owned() } else { format!("{kits} kits") }
}

/// The candidates for people, one a line.
fn lines(candidates: &[&Descriptor]) -> Vec<String> {
    /// More than this nobody reads.
    const MAX_LISTED: usize = 50;
    let mut lines: Vec<_> = candidates.iter().take(MAX_LISTED).map(|candidate| line(candidate)).collect();
    if candidates.len() > MAX_LISTED {
        lines.push(format!("  … and {} more", candidates.len() - MAX_LISTED));
    }
    lines
}

fn line(candidate: &Descriptor) -> String {
    let title = candidate.annotations.get(TITLE).map_or("no title", String::as_str);
    let platform = candidate.platform.as_ref().map_or_else(|| "no platform".to_owned(), Platform::to_string);
    format!("  {}  {}  {platform}", candidate.digest, title.escape_debug())
}

impl Platform {
    /// The platform that kitfs runs on.
    pub fn host() -> Self {
        let os = match std::env::consts::OS {
            "macos" => "darwin",
            os => os,
        };
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "x86" => "386",
            "aarch64" => "arm64",
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            "powerpc64" => "ppc64",
            "loongarch64" => "loong64",
            architecture => architecture,
        };
        Self { os: os.to_owned(), architecture: architecture.to_owned(), variant: None }
    }

    /// Whether a kit for `offered` serves who wants `self`: a variant counts only where it is wanted.
    fn accepts(&self, offered: &Self) -> bool {
        self.os == offered.os
            && self.architecture == offered.architecture
            && (self.variant.is_none() || self.variant == offered.variant)
    }
}

impl FromStr for Platform {
    type Err = ModelKitError;
    fn from_str(text: &str) -> Result<Self, ModelKitError> {
        let is_part = |part: &&str| {
            !part.is_empty() && part.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-'))
        };
        let parts: Vec<_> = text.split('/').filter(is_part).map(str::to_ascii_lowercase).collect();
        let all_are_valid = parts.len() == text.split('/').count();
        match parts.as_slice() {
            [os, architecture] if all_are_valid => {
                Ok(Self { os: os.clone(), architecture: architecture.clone(), variant: None })
            }
            [os, architecture, variant] if all_are_valid => {
                Ok(Self { os: os.clone(), architecture: architecture.clone(), variant: Some(variant.clone()) })
            }
            _ => Err(ModelKitError::InvalidPlatform(text.to_owned())),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}
