//! Digests, and the types that carry proof of them.
//!
//! Invariants:
//! - A [`Digest`] is always a well-formed `sha256:<64 lower-case hex>`; nothing else reaches a URL or a file name.
//! - [`Unverified`] bytes came from outside. They can be parsed for names and sizes, never served as content.
//! - [`Verified`] bytes and a [`Proof`] are made in this module alone, and only after a digest held. That is promise 1
//!   of the design as a type: serving an unverified byte does not compile.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use sha2::Digest as _;

/// A SHA-256 digest in OCI's form, `sha256:<64 hex digits>`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// A text that is not a digest kitfs can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a digest: expected `sha256:` and 64 lower-case hexadecimal digits")]
pub struct InvalidDigest(pub String);

/// Bytes did not have the digest they were asked for by.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("digest mismatch: expected {expected}, found {found}")]
pub struct Mismatch {
    /// What was asked for.
    pub expected: Digest,
    /// What the bytes hash to.
    pub found: Digest,
}

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = StreamHasher::new();
        hasher.update(bytes);
        hasher.digest()
    }

    /// A digest from its 32 raw bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 raw bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hexadecimal digits without the algorithm, as used in file names.
    pub fn hex(&self) -> String {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        // Not by `fmt`: the names of a small file's places are a good part of what it takes of the processor.
        let digit = |half: u8| char::from(DIGITS[usize::from(half)]);
        self.0.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
    }

    /// The first twelve hexadecimal digits, for people.
    pub fn short(&self) -> String {
        let mut hex = self.hex();
        hex.truncate(12);
        hex
    }

    /// Parses 64 lower-case hexadecimal digits without a prefix.
    pub fn from_hex(hex: &str) -> Result<Self, InvalidDigest> {
        let invalid = || InvalidDigest(hex.to_owned());
        let text = hex.as_bytes();
        if text.len() != 64 {
            return Err(invalid());
        }
        let mut out = [0; 32];
        for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
            let nibble = |c: u8| match c {
                b'0'..=b'9' => Some(c - b'0'),
                b'a'..=b'f' => Some(c - b'a' + 10),
                _ => None,
            };
            let (Some(high), Some(low)) = (nibble(pair[0]), nibble(pair[1])) else {
                return Err(invalid());
            };
            *byte = high << 4 | low;
        }
        Ok(Self(out))
    }
}

impl FromStr for Digest {
    type Err = InvalidDigest;
    fn from_str(text: &str) -> Result<Self, InvalidDigest> {
        text.strip_prefix("sha256:")
            .and_then(|hex| Self::from_hex(hex).ok())
            .ok_or_else(|| InvalidDigest(text.to_owned()))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Bytes from outside that no digest covers yet.
#[derive(Clone)]
pub struct Unverified(Bytes);

impl Unverified {
    /// Wraps bytes as they arrived.
    pub fn new(bytes: impl Into<Bytes>) -> Self {
        Self(bytes.into())
    }

    /// How many bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The bytes, to hash them, stage them or parse headers out of them; never to serve them.
    pub fn peek(&self) -> &Bytes {
        &self.0
    }

    /// Turns the bytes into verified ones if they hash to `expected`.
    pub fn verify(self, expected: &Digest) -> Result<Verified, Mismatch> {
        Hashed::from(self).verify(expected)
    }
}

impl fmt::Debug for Unverified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Unverified({} bytes)", self.0.len())
    }
}

/// Bytes from outside, and what they hash to.
#[derive(Debug)]
pub struct Hashed {
    bytes: Unverified,
    found: Digest,
}

impl From<Unverified> for Hashed {
    fn from(bytes: Unverified) -> Self {
        let found = Digest::of(bytes.peek());
        Self { bytes, found }
    }
}

impl Hashed {
    /// Turns the bytes into verified ones if what they hash to is `expected`.
    pub fn verify(self, expected: &Digest) -> Result<Verified, Mismatch> {
        let Self { bytes, found } = self;
        if found == *expected { Ok(Verified(bytes.0)) } else { Err(Mismatch { expected: *expected, found }) }
    }
}

/// Memory that bytes are put together in.
pub trait Room: AsRef<[u8]> + Send + 'static {
    /// Adds bytes behind those that are there, as far as it holds them.
    fn push(&mut self, bytes: &[u8]);
}

/// Bytes that are put together, and hashed as they come, while the processor has them at hand: later they would have to
/// come from memory once more, which costs half as much again as the hash.
#[derive(Debug)]
pub struct Gathering<R> {
    room: R,
    hasher: StreamHasher,
}

impl<R: Room> Gathering<R> {
    /// Puts bytes together in `room`, behind what it holds.
    pub fn new(room: R) -> Self {
        let mut hasher = StreamHasher::new();
        hasher.update(room.as_ref());
        Self { room, hasher }
    }

    /// Adds bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        let before = self.room.as_ref().len();
        self.room.push(bytes);
        // What it holds, which is what will be served.
        self.hasher.update(&self.room.as_ref()[before..]);
    }

    /// All of them.
    pub fn finish(self) -> Hashed {
        Hashed { bytes: Unverified::new(Bytes::from_owner(self.room)), found: self.hasher.digest() }
    }
}

/// Bytes whose digest held, or which follow from such bytes alone.
#[derive(Clone)]
pub struct Verified(Bytes);

impl Verified {
    /// The bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.0
    }

    /// A part of them.
    pub fn slice(&self, range: std::ops::Range<usize>) -> Verified {
        Verified(self.0.slice(range))
    }

    /// The same in memory of their own: these may lie in a buffer that others wait for.
    pub fn copied(&self) -> Verified {
        Verified(Bytes::copy_from_slice(&self.0))
    }

    /// Bytes that a pure function made from verified ones, as the Kitfile is made from the config.
    pub fn derive(&self, make: impl FnOnce(&[u8]) -> Vec<u8>) -> Verified {
        Verified(make(&self.0).into())
    }
}

impl fmt::Debug for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Verified({} bytes)", self.0.len())
    }
}

/// So many bytes are brought near the processor before they are hashed: a page of memory, and a part of the smallest cache.
const NEAR: usize = 4 << 10;
/// What comes from memory at once.
const LINE: usize = 64;

/// Hashes a stream that is too long to hold, and says at its end whether the digest held.
#[derive(Clone, Default)]
pub struct StreamHasher(sha2::Sha256);

impl StreamHasher {
    /// An empty stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes of the stream.
    pub fn update(&mut self, bytes: &[u8]) {
        for near in bytes.chunks(NEAR) {
            bring_near(near);
            self.0.update(near);
        }
    }

    /// What the stream hashed to.
    pub fn digest(self) -> Digest {
        Digest(self.0.finalize().into())
    }

    /// Ends the stream: a proof if it was the expected one.
    pub fn finish(self, expected: &Digest) -> Result<Proof, Mismatch> {
        let found = self.digest();
        if found == *expected { Ok(Proof(())) } else { Err(Mismatch { expected: *expected, found }) }
    }
}

/// Reads a byte of each line. The hash asks for a line when it is done with the one before, and waits for the memory each
/// time; here all are asked for at once, and bytes that come from memory are hashed in three quarters of the time.
fn bring_near(bytes: &[u8]) {
    std::hint::black_box(bytes.iter().step_by(LINE).fold(0, |all: u8, byte| all ^ byte));
}

impl fmt::Debug for StreamHasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StreamHasher")
    }
}

/// Evidence that a whole stream hashed to a digest. What was staged from that stream may be served.
#[derive(Debug)]
pub struct Proof(());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_reads_back_as_it_is_written() {
        let digest = Digest::of(b"kitfs");
        assert_eq!(digest.to_string().parse::<Digest>(), Ok(digest));
    }

    #[test]
    fn other_algorithms_lengths_and_cases_are_refused() {
        let hex = Digest::of(b"").hex();
        for text in [
            format!("sha512:{hex}"),
            format!("sha256:{}", hex.to_uppercase()),
            format!("sha256:{}", &hex[1..]),
            "sha256:../../etc/passwd".to_owned(),
            hex,
            String::new(),
        ] {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_gathered_is_hashed_as_far_as_the_room_holds_it() {
        struct Small(Vec<u8>);
        impl AsRef<[u8]> for Small {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
        impl Room for Small {
            fn push(&mut self, bytes: &[u8]) {
                self.0.extend(bytes.iter().take(4 - self.0.len()));
            }
        }
        let gather = |pieces: [&[u8]; 2]| {
            let mut gathering = Gathering::new(Small(b"a".to_vec()));
            pieces.into_iter().for_each(|piece| gathering.push(piece));
            gathering.finish()
        };
        let verified = gather([b"b", b"cd"]).verify(&Digest::of(b"abcd")).expect("what it holds");
        assert_eq!(verified.bytes(), &b"abcd"[..]);
        let verified = gather([b"bc", b"def"]).verify(&Digest::of(b"abcd")).expect("what it holds");
        assert_eq!(verified.bytes(), &b"abcd"[..]);
        assert!(gather([b"bc", b"def"]).verify(&Digest::of(b"abcdef")).is_err());
    }

    #[test]
    fn bytes_become_verified_only_under_their_own_digest() {
        let bytes = Unverified::new(&b"abc"[..]);
        assert!(bytes.clone().verify(&Digest::of(b"abc")).is_ok());
        let mismatch = bytes.verify(&Digest::of(b"abd")).err();
        assert_eq!(mismatch.map(|m| m.found), Some(Digest::of(b"abc")));
    }
}
