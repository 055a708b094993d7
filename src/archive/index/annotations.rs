//! How a manifest names the indexes of its layers: media type, annotations, and their text forms.
//!
//! The three annotations of a layer descriptor stand together or not at all. Together they are a [`Pin`].

use std::collections::BTreeMap;

use super::layout::{DIGEST_LEN, HEADER_LEN};
use super::{MAX_HEAD, MAX_INDEX};
use crate::digest::Digest;

/// The media type of an index, and the artifact type of the referrer that keeps indexes beside a kit.
pub const MEDIA_TYPE: &str = "application/vnd.kitfs.index.v1";

/// On a layer descriptor: the digest of the layer's index, `sha256:<hex>`.
pub const DIGEST: &str = "dev.kitfs.index.digest";
/// On a layer descriptor: how many bytes the index has, in decimal digits.
pub const SIZE: &str = "dev.kitfs.index.size";
/// On a layer descriptor: size and digest of the index's head, `<size>:sha256:<hex>`.
pub const HEAD: &str = "dev.kitfs.index.head";
/// On a manifest: the digest of the kit that it was made from by adding indexes.
pub const SOURCE: &str = "dev.kitfs.index.source";
/// On a layer of a referrer, which is an index: the digest of the layer that it is of. [`HEAD`] stands beside it; digest and
/// size are the descriptor's own.
pub const LAYER: &str = "dev.kitfs.index.layer";

/// Whether an annotation is one of those above, or may become one: what begins so is for kitfs to set.
pub fn is_ours(key: &str) -> bool {
    key.starts_with("dev.kitfs.index.")
}

/// How a digest is written.
const DIGEST_FORM: &str = "`sha256:` and 64 hexadecimal digits";

/// Which index a layer descriptor names, so that it can be fetched and proved: whole, or its head alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin {
    /// The digest of the index.
    pub digest: Digest,
    /// The size of the index.
    pub size: u64,
    /// The digest of its head.
    pub head_digest: Digest,
    /// The size of its head.
    pub head_size: u64,
}

/// Annotations that name no index.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPin {
    /// One is missing beside the others.
    #[error("annotation {key} is missing: {DIGEST}, {SIZE} and {HEAD} stand together or not at all")]
    Missing {
        /// Which one.
        key: &'static str,
    },
    /// A layer of a referrer lacks one.
    #[error("annotation {key} is missing: each index in a referrer has {LAYER} and {HEAD}")]
    Unreferred {
        /// Which one.
        key: &'static str,
    },
    /// One can't be read.
    #[error("annotation {key} is {value:?}: expected {expected}")]
    Malformed {
        /// Which one.
        key: &'static str,
        /// What it says.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// The sizes are of no index that is read.
    #[error(
        "annotations name an index of {size} bytes with a head of {head}: no index has these sizes, or it is too large"
    )]
    Sizes {
        /// The size of the index.
        size: u64,
        /// The size of the head.
        head: u64,
    },
}

impl Pin {
    /// The annotations of a layer descriptor that name the index.
    pub fn annotations(&self) -> [(&'static str, String); 3] {
        let head = format!("{}:{}", self.head_size, self.head_digest);
        [(DIGEST, self.digest.to_string()), (SIZE, self.size.to_string()), (HEAD, head)]
    }

    /// Reads a layer descriptor's annotations; `None` if they name no index.
    pub fn read(annotations: &BTreeMap<String, String>) -> Result<Option<Self>, InvalidPin> {
        let all = [DIGEST, SIZE, HEAD];
        if all.iter().all(|key| !annotations.contains_key(*key)) {
            return Ok(None);
        }
        let get = |key| annotations.get(key).map(String::as_str).ok_or(InvalidPin::Missing { key });
        let digest = read(DIGEST, get(DIGEST)?, DIGEST_FORM, |text| text.parse().ok())?;
        let size = read(SIZE, get(SIZE)?, "a size in decimal digits", decimal)?;
        Self::with_head(digest, size, get(HEAD)?).map(Some)
    }

    /// The annotations of the index's own descriptor in a referrer, where it is of `layer`.
    pub fn referrer_annotations(&self, layer: &Digest) -> [(&'static str, String); 2] {
        [(LAYER, layer.to_string()), (HEAD, format!("{}:{}", self.head_size, self.head_digest))]
    }

    /// Reads the descriptor of an index in a referrer: the layer that it is of, and the index.
    pub fn read_referred(
        digest: Digest,
        size: u64,
        annotations: &BTreeMap<String, String>,
    ) -> Result<(Digest, Self), InvalidPin> {
        let get = |key| annotations.get(key).map(String::as_str).ok_or(InvalidPin::Unreferred { key });
        let layer = read(LAYER, get(LAYER)?, DIGEST_FORM, |text| text.parse().ok())?;
        Ok((layer, Self::with_head(digest, size, get(HEAD)?)?))
    }

    fn with_head(digest: Digest, size: u64, head: &str) -> Result<Self, InvalidPin> {
        let (head_size, head_digest) = read(HEAD, head, "`<size>:sha256:<64 hexadecimal digits>`", |text| {
            let (size, digest) = text.split_once(':')?;
            Some((decimal(size)?, digest.parse().ok()?))
        })?;
        let lists = size.checked_sub(head_size).filter(|lists| lists.is_multiple_of(DIGEST_LEN as u64));
        if lists.is_none() || head_size < HEADER_LEN as u64 || head_size > MAX_HEAD || size > MAX_INDEX {
            return Err(InvalidPin::Sizes { size, head: head_size });
        }
        Ok(Self { digest, size, head_digest, head_size })
    }
}

fn read<T>(
    key: &'static str,
    value: &str,
    expected: &'static str,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<T, InvalidPin> {
    parse(value).ok_or_else(|| InvalidPin::Malformed { key, value: value.to_owned(), expected })
}

/// A number as it is written: no sign, no zeros before it.
fn decimal(text: &str) -> Option<u64> {
    text.parse::<u64>().ok().filter(|number| number.to_string() == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pin() -> Pin {
        Pin { digest: Digest::of(b"index"), size: 1000 + 64, head_digest: Digest::of(b"head"), head_size: 1000 }
    }

    fn annotations(pin: &Pin) -> BTreeMap<String, String> {
        let pairs = pin.annotations().into_iter().map(|(key, value)| (key.to_owned(), value));
        pairs.chain([("other".to_owned(), "x".to_owned())]).collect()
    }

    fn refused(key: &str, value: &str) -> String {
        let mut annotations = annotations(&pin());
        annotations.insert(key.to_owned(), value.to_owned());
        Pin::read(&annotations).expect_err("refused").to_string()
    }

    #[test]
    fn a_pin_reads_back_as_it_is_written() {
        let written = annotations(&pin());
        assert_eq!(Pin::read(&written), Ok(Some(pin())));
        assert_eq!(written[SIZE], "1064");
        assert_eq!(written[HEAD], format!("1000:{}", Digest::of(b"head")));
    }

    #[test]
    fn an_index_in_a_referrer_reads_back_as_it_is_written() {
        let layer = Digest::of(b"layer");
        let written = pin().referrer_annotations(&layer).map(|(key, value)| (key.to_owned(), value));
        let written = BTreeMap::from(written);
        assert_eq!(Pin::read_referred(pin().digest, pin().size, &written), Ok((layer, pin())));
        for key in [LAYER, HEAD] {
            let mut some = written.clone();
            some.remove(key);
            assert_eq!(Pin::read_referred(pin().digest, pin().size, &some), Err(InvalidPin::Unreferred { key }));
        }
        let sizes = Pin::read_referred(pin().digest, 999, &written);
        assert_eq!(sizes, Err(InvalidPin::Sizes { size: 999, head: 1000 }));
    }

    #[test]
    fn without_annotations_there_is_no_pin_and_with_some_of_them_an_error() {
        assert_eq!(Pin::read(&BTreeMap::new()), Ok(None));
        for key in [DIGEST, SIZE, HEAD] {
            let mut annotations = annotations(&pin());
            annotations.remove(key);
            assert_eq!(Pin::read(&annotations), Err(InvalidPin::Missing { key }));
        }
    }

    #[test]
    fn other_text_forms_are_refused() {
        for size in ["", "-1", "+1064", "01064", " 1064", "1064 ", "1e3", "18446744073709551616"] {
            assert!(refused(SIZE, size).contains("expected a size in decimal digits"), "{size}");
        }
        let digest = Digest::of(b"head");
        for head in
            ["", "1000", ":", "1000:", &format!(":{digest}"), &format!("1000:{}", digest.hex()), &digest.to_string()]
        {
            assert!(refused(HEAD, head).contains("expected `<size>:sha256:"), "{head}");
        }
        assert!(refused(DIGEST, "sha512:00").contains("expected `sha256:`"));
    }

    #[test]
    fn sizes_that_no_index_has_are_refused() {
        let digest = Digest::of(b"head");
        for (size, head) in
            [(1064, 1065), (1064, 1001), (111, 111), (MAX_INDEX + 32, 1000), (MAX_HEAD + 1, MAX_HEAD + 1)]
        {
            let mut annotations = annotations(&pin());
            annotations.insert(SIZE.to_owned(), size.to_string());
            annotations.insert(HEAD.to_owned(), format!("{head}:{digest}"));
            assert_eq!(Pin::read(&annotations), Err(InvalidPin::Sizes { size, head }));
        }
    }
}
