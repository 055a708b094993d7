//! How a manifest names the indexes of its layers: media type, annotations, and their text forms.
//!
//! The three annotations of a layer descriptor stand together or not at all. Together they are a [`Pin`].

use std::collections::BTreeMap;

use super::layout::{DIGEST_LEN, HEADER_LEN, RECORD_LEN};
use super::{LayerFormat, MAX_HEAD, MAX_INDEX};
use crate::archive::inflate;
use crate::digest::Digest;
use crate::modelkit::{Compression, Layer};
use crate::object::CHUNK_SIZE;

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

    /// Whether the index of a layer can have these sizes. `max_inflated` as in [`Head::parse`](super::Head::parse). It bounds
    /// what a mount fetches by what the kit's layers are said to have, whoever vouches for the index.
    pub fn fits(&self, layer: &Layer, max_inflated: Option<u64>) -> bool {
        self.fits_one_of(layer.size, LayerFormat::from(&layer.format), layer.compression, max_inflated)
    }

    /// The same for a layer of this size and kind.
    pub fn fits_one_of(
        &self,
        size: u64,
        format: LayerFormat,
        compression: Compression,
        max_inflated: Option<u64>,
    ) -> bool {
        let inflated = match compression {
            Compression::None => size,
            Compression::Gzip | Compression::Zstd => {
                inflate::can_inflate(compression, size).min(max_inflated.unwrap_or_else(|| inflate::max_inflated(size)))
            }
        };
        let entries = match format {
            LayerFormat::Raw => RECORD_LEN as u64,
            // A tar's header takes 512 bytes and holds up to 256 of a path and 100 of a link's target. With the record's 76
            // that is less; and longer names stand in the tar as well, behind a header of their own.
            LayerFormat::Tar => inflated,
        };
        // A file has a list if it is longer than a chunk, so that it has less than two chunks a MiB.
        let chunks = inflated.saturating_mul(2) / u64::from(CHUNK_SIZE);
        let lists = self.size.saturating_sub(self.head_size);
        self.head_size <= entries.saturating_add(HEADER_LEN as u64) && lists <= chunks * DIGEST_LEN as u64
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
    use crate::archive::testing::{Tar, index_of};
    use crate::modelkit::{Format, Kind};
    use crate::path::TreePath;

    fn layer() -> Layer {
        Layer {
            digest: Digest::of(b"layer"),
            size: 0,
            diff_id: None,
            media_type: String::new(),
            annotations: BTreeMap::new(),
            kind: Kind::Model,
            name: None,
            path: String::new(),
            format: Format::Tar,
            compression: Compression::None,
            root: TreePath::root(),
            prefix: TreePath::root(),
            kit: 0,
        }
    }

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
    fn an_index_is_no_longer_than_its_layer_can_have() {
        let raw = Format::Raw { mode: 0o644, mtime: 0, stated_size: None };
        let fits = |head_size, lists, format: &Format, compression, size| {
            let layer = Layer { format: format.clone(), compression, size, ..layer() };
            Pin { head_size, size: head_size + lists, ..pin() }.fits(&layer, None)
        };
        let (none, gzip, zstd) = (Compression::None, Compression::Gzip, Compression::Zstd);
        assert!(fits(112 + 1024, 0, &Format::Tar, none, 1024) && !fits(113 + 1024, 0, &Format::Tar, none, 1024));
        assert!(fits(112, 64, &Format::Tar, none, 1 << 20) && !fits(112, 96, &Format::Tar, none, 1 << 20));
        assert!(fits(188, 96, &raw, none, (2 << 20) + 1) && !fits(189, 0, &raw, none, 1 << 30));
        assert!(fits(188, 32 << 10, &raw, gzip, 1 << 20) && !fits(188, 32 << 20, &raw, gzip, 1 << 20));
        assert!(fits(1 << 20, 0, &Format::Tar, gzip, 1024) && !fits(2 << 20, 0, &Format::Tar, gzip, 1024));
        assert!(fits(32 << 20, 0, &Format::Tar, zstd, 1024) && !fits(33 << 20, 0, &Format::Tar, zstd, 1024));
        assert!(!fits(2 << 30, 0, &Format::Tar, zstd, 1 << 20), "it may not inflate so far");
        assert!(fits(112, 0, &Format::Tar, none, 0) && fits(MAX_HEAD, 0, &Format::Tar, none, u64::MAX));
    }

    /// The head of a tar whose names are as long as they can be without records of their own, and with them.
    #[test]
    fn the_names_of_a_tar_take_more_there_than_in_its_index() {
        let full = Tar::new().header(&[b'n'; 100], b'2', 0, |header| {
            header.as_ustar_mut().expect("ustar").prefix = [b'p'; 155];
            header.as_old_mut().linkname = [b't'; 100];
        });
        let long = "l".repeat(250);
        let paths: Vec<_> = ["a", "b"].map(|last| format!("{long}/{long}/{long}/{last}")).into();
        let longer = Tar::new().pax(&[("path", paths[0].as_bytes())]).file("f", b"");
        let longest = longer.pax(&[("path", paths[1].as_bytes()), ("linkpath", &[b't'; 4000])]).symlink("f", b"x");
        for tar in [full, longest] {
            let entries = tar.clone().0.len() as u64;
            let index = index_of(&tar.end()).expect("sound");
            let head = index.pin().head_size - HEADER_LEN as u64;
            assert!(head > 256 && head <= entries, "{head} of {entries}");
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
