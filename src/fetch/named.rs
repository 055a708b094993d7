//! Indexes that somebody vouches for: a manifest's author by an annotation, or whom the user trusts by a referrer.

use super::Tier;
use crate::archive::index::annotations::Pin;

/// An index that a manifest or a trusted referrer names for a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Named {
    /// Which index.
    pub pin: Pin,
    /// Who vouches for it: [`Tier::Pinned`] or [`Tier::Attested`].
    pub tier: Tier,
}
