//! Streaming decompression of a layer, with a bound on what comes out.
//!
//! Invariants:
//! - Output comes in pieces of at most [`PIECE`] bytes out of one reused buffer; a layer that is not compressed is passed
//!   on as it is, not copied.
//! - Not one byte beyond the bound reaches the caller.
//! - The stream ends where a gzip member or a Zstandard frame ends, else it is an error. As in Go, whatever follows the last
//!   gzip member must be another member: even zeros are an error.

use flate2::{Crc, Decompress, FlushDecompress, Status};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation as _, OutBuffer};

use crate::modelkit::Compression;

/// The most that comes out in one piece: 256 KiB stays in a core's cache until it is hashed and written.
pub const PIECE: usize = 256 << 10;

/// The largest Zstandard window that is followed: 2^27 = 128 MiB, the default of the `zstd` tool. A frame states its window,
/// and the decoder takes that much memory.
const WINDOW_LOG_MAX: u32 = 27;

/// Up to this size a layer may inflate whatever its own size is: 1 GiB.
const FREE_BOUND: u64 = 1 << 30;
/// How many times its size a larger layer may inflate to. Weights compress by less than 2, text and tables by 10 to 20;
/// what reaches 64 is mostly zeros.
const RATIO_BOUND: u64 = 64;

/// How far a compressed layer of `size` bytes may inflate: max(1 GiB, 64 × its size).
pub const fn max_inflated(size: u64) -> u64 {
    let bound = size.saturating_mul(RATIO_BOUND);
    if bound > FREE_BOUND { bound } else { FREE_BOUND }
}

/// How far a blob of `size` bytes can inflate at all, by what the formats can say.
pub const fn can_inflate(compression: Compression, size: u64) -> u64 {
    size.saturating_mul(match compression {
        Compression::None => 1,
        // Deflate: at the shortest, two bits for a match of 258 bytes.
        Compression::Gzip => 258 * 4,
        // At the shortest, a block header of three bytes and one byte that fills 128 KiB.
        Compression::Zstd => (128 << 10) / 4,
    })
}

/// A layer that can't be decompressed.
#[derive(Debug, thiserror::Error)]
pub enum InflateError {
    /// More came out than the bound allows.
    #[error("the layer inflates to more than {bound} bytes; if it is right to, raise the bound with --max-inflated")]
    InflatesTooFar {
        /// The bound.
        bound: u64,
    },
    /// The stream ended within a gzip member or Zstandard frame.
    #[error("the compressed layer ends too early, after {read} bytes: it is cut short")]
    Truncated {
        /// How much there was.
        read: u64,
    },
    /// The stream is not gzip, or is damaged.
    #[error("not valid gzip data at about byte {offset} of the layer: {why}")]
    Gzip {
        /// Where, in the compressed layer.
        offset: u64,
        /// What is wrong.
        why: String,
    },
    /// The stream is not Zstandard, is damaged, or wants a window of more than 128 MiB.
    #[error("not valid Zstandard data (with a window of at most 128 MiB) at about byte {offset} of the layer")]
    Zstd {
        /// Where, in the compressed layer.
        offset: u64,
        /// What the decoder says.
        source: std::io::Error,
    },
}

/// Decompresses one layer. After an error it is of no more use.
pub struct Inflater {
    codec: Codec,
    bound: u64,
    read: u64,
    written: u64,
    piece: Vec<u8>,
}

enum Codec {
    None,
    Gzip(Gzip),
    Zstd { decoder: Decoder<'static>, at_boundary: bool },
}

impl Inflater {
    /// A decompressor for `compression` that gives at most `bound` bytes; see [`max_inflated`].
    pub fn new(compression: Compression, bound: u64) -> Result<Self, InflateError> {
        let failed = |source| InflateError::Zstd { offset: 0, source };
        let codec = match compression {
            Compression::None => Codec::None,
            Compression::Gzip => Codec::Gzip(Gzip::new()),
            Compression::Zstd => {
                let mut decoder = Decoder::new().map_err(failed)?;
                decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).map_err(failed)?;
                Codec::Zstd { decoder, at_boundary: false }
            }
        };
        let piece = if matches!(codec, Codec::None) { Vec::new() } else { vec![0; PIECE] };
        Ok(Self { codec, bound, read: 0, written: 0, piece })
    }

    /// Takes the next bytes of the blob and gives what comes out of them to `out`, in order. An error of `out` ends it.
    pub fn feed<E: From<InflateError>>(
        &mut self,
        mut input: &[u8],
        out: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        // A full piece may leave more of the same input inside the decoder.
        let mut full = false;
        while !input.is_empty() || full {
            let offset = self.read;
            let (taken, made) = match &mut self.codec {
                Codec::None => {
                    self.read += input.len() as u64;
                    return emit(&mut self.written, self.bound, input, out);
                }
                Codec::Gzip(gzip) => {
                    let progress = gzip.run(input, &mut self.piece);
                    progress.map_err(|why| InflateError::Gzip { offset, why })?
                }
                Codec::Zstd { decoder, at_boundary } => {
                    // The next frame starts with its first byte, not before.
                    if *at_boundary && input.is_empty() {
                        return Ok(());
                    }
                    let mut from = InBuffer::around(input);
                    let mut to = OutBuffer::around(&mut self.piece[..]);
                    let hint =
                        decoder.run(&mut from, &mut to).map_err(|source| InflateError::Zstd { offset, source })?;
                    *at_boundary = hint == 0;
                    (from.pos(), to.pos())
                }
            };
            input = &input[taken..];
            self.read += taken as u64;
            emit(&mut self.written, self.bound, &self.piece[..made], out)?;
            full = made == self.piece.len();
        }
        Ok(())
    }

    /// Ends the blob, and says how many bytes came out.
    pub fn finish(self) -> Result<u64, InflateError> {
        let whole = match self.codec {
            Codec::None => true,
            Codec::Gzip(gzip) => gzip.at_boundary(),
            Codec::Zstd { at_boundary, .. } => at_boundary,
        };
        if whole { Ok(self.written) } else { Err(InflateError::Truncated { read: self.read }) }
    }
}

impl std::fmt::Debug for Inflater {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Inflater({} of {} bytes out)", self.written, self.bound)
    }
}

/// Passes `bytes` on, up to the bound.
fn emit<E: From<InflateError>>(
    written: &mut u64,
    bound: u64,
    bytes: &[u8],
    out: &mut dyn FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    if bytes.is_empty() {
        return Ok(());
    }
    if bytes.len() as u64 > bound - *written {
        return Err(InflateError::InflatesTooFar { bound }.into());
    }
    *written += bytes.len() as u64;
    out(bytes)
}

/// The gzip format (RFC 1952) around raw deflate. Written out because flate2's decoders either read from a reader, or write
/// into a buffer that grows with what a hostile stream inflates to.
struct Gzip {
    state: GzipState,
    deflate: Decompress,
    crc: Crc,
    /// Whether a member has ended, so that the stream may.
    members: bool,
}

#[derive(Debug, Clone, Copy)]
enum GzipState {
    /// The ten bytes that each member starts with.
    Fixed {
        bytes: [u8; 10],
        len: usize,
    },
    Optional(Field),
    Body,
    /// CRC and size of the content.
    Trailer {
        bytes: [u8; 8],
        len: usize,
    },
}

/// The header's optional fields, in their order, with the flags that are still to be read.
#[derive(Debug, Clone, Copy)]
enum Field {
    Next { flags: u8 },
    ExtraLength { flags: u8, low: Option<u8> },
    Extra { flags: u8, left: u16 },
    Text { flags: u8 },
    HeaderCrc { low: Option<u8>, computed: u16 },
}

// Flags of the header. Others are reserved and ignored, as Go does, although RFC 1952 asks to refuse them.
const FLAG_CRC: u8 = 1 << 1;
const FLAG_EXTRA: u8 = 1 << 2;
const FLAG_NAME: u8 = 1 << 3;
const FLAG_COMMENT: u8 = 1 << 4;

const MEMBER_START: GzipState = GzipState::Fixed { bytes: [0; 10], len: 0 };

impl Gzip {
    fn new() -> Self {
        Self { state: MEMBER_START, deflate: Decompress::new(false), crc: Crc::new(), members: false }
    }

    fn at_boundary(&self) -> bool {
        self.members && matches!(self.state, GzipState::Fixed { len: 0, .. })
    }

    /// Goes on until the input is used up or the output is full: how much was read and made.
    fn run(&mut self, input: &[u8], output: &mut [u8]) -> Result<(usize, usize), String> {
        let (mut taken, mut made) = (0, 0);
        loop {
            if let GzipState::Body = self.state {
                let taken_before = taken;
                let (read_before, made_before) = (self.deflate.total_in(), self.deflate.total_out());
                let status = self
                    .deflate
                    .decompress(&input[taken..], &mut output[made..], FlushDecompress::None)
                    .map_err(|error| error.to_string())?;
                let now_made = (self.deflate.total_out() - made_before) as usize;
                self.crc.update(&output[made..made + now_made]);
                taken += (self.deflate.total_in() - read_before) as usize;
                made += now_made;
                if status != Status::StreamEnd {
                    let stuck = now_made == 0 && taken == taken_before && taken < input.len() && made < output.len();
                    return if stuck { Err("the decoder makes no progress".to_owned()) } else { Ok((taken, made)) };
                }
                self.state = GzipState::Trailer { bytes: [0; 8], len: 0 };
            }
            let Some(byte) = input.get(taken) else { return Ok((taken, made)) };
            taken += 1;
            self.framing(*byte)?;
        }
    }

    /// Takes one byte of a header or trailer.
    fn framing(&mut self, byte: u8) -> Result<(), String> {
        match &mut self.state {
            GzipState::Fixed { bytes, len } => {
                bytes[*len] = byte;
                *len += 1;
                if *len == bytes.len() {
                    let [0x1f, 0x8b, 8, flags, ..] = *bytes else {
                        return Err("no gzip header where a member should start".to_owned());
                    };
                    self.crc.reset();
                    self.crc.update(bytes);
                    self.optional(Field::Next { flags });
                }
            }
            GzipState::Optional(field) => {
                let field = *field;
                self.field(field, byte)?;
            }
            GzipState::Trailer { bytes, len } => {
                bytes[*len] = byte;
                *len += 1;
                if *len == bytes.len() {
                    let stated = u64::from_le_bytes(*bytes);
                    let found = u64::from(self.crc.sum()) | (self.deflate.total_out() & 0xffff_ffff) << 32;
                    if stated != found {
                        return Err("checksum or size of the content is wrong".to_owned());
                    }
                    self.members = true;
                    self.state = MEMBER_START;
                }
            }
            GzipState::Body => {}
        }
        Ok(())
    }

    /// Takes one byte of an optional field of the header.
    fn field(&mut self, field: Field, byte: u8) -> Result<(), String> {
        if !matches!(field, Field::HeaderCrc { .. }) {
            self.crc.update(&[byte]);
        }
        match field {
            Field::ExtraLength { flags, low: None } => {
                self.state = Field::ExtraLength { flags, low: Some(byte) }.into()
            }
            Field::ExtraLength { flags, low: Some(low) } => {
                self.optional(Field::Extra { flags, left: u16::from_le_bytes([low, byte]) });
            }
            Field::Extra { flags, left } => self.optional(Field::Extra { flags, left: left - 1 }),
            Field::Text { flags } if byte == 0 => self.optional(Field::Next { flags }),
            Field::Text { .. } | Field::Next { .. } => {}
            Field::HeaderCrc { low: None, computed } => {
                self.state = Field::HeaderCrc { low: Some(byte), computed }.into();
            }
            Field::HeaderCrc { low: Some(low), computed } => {
                if u16::from_le_bytes([low, byte]) != computed {
                    return Err("checksum of the header is wrong".to_owned());
                }
                self.body();
            }
        }
        Ok(())
    }

    /// Turns to `field`, or past it to the next one that is there.
    fn optional(&mut self, field: Field) {
        self.state = match field {
            Field::Next { flags } | Field::Extra { flags, left: 0 } => {
                if flags & FLAG_EXTRA != 0 {
                    Field::ExtraLength { flags: flags & !FLAG_EXTRA, low: None }
                } else if flags & FLAG_NAME != 0 {
                    Field::Text { flags: flags & !FLAG_NAME }
                } else if flags & FLAG_COMMENT != 0 {
                    Field::Text { flags: flags & !FLAG_COMMENT }
                } else if flags & FLAG_CRC != 0 {
                    Field::HeaderCrc { low: None, computed: (self.crc.sum() & 0xffff) as u16 }
                } else {
                    return self.body();
                }
            }
            other => other,
        }
        .into();
    }

    fn body(&mut self) {
        self.crc.reset();
        self.deflate.reset(false);
        self.state = GzipState::Body;
    }
}

impl From<Field> for GzipState {
    fn from(field: Field) -> Self {
        Self::Optional(field)
    }
}

#[cfg(test)]
#[path = "inflate_tests.rs"]
mod tests;
