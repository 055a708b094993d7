//! What the fault server serves: bytes, a file, or a function of the offset. None is copied whole into memory.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Computes bytes from their offset.
type Generator = Box<dyn Fn(u64, &mut [u8]) + Send + Sync>;

/// The bytes of one blob.
pub enum Content {
    Bytes(Vec<u8>),
    File(File, u64),
    Generated { length: u64, fill: Generator },
}

impl Content {
    /// A file, sparse or not, read while it is served.
    pub fn file(path: &Path) -> Self {
        let file = File::open(path).expect("a readable file");
        let length = file.metadata().expect("metadata").len();
        Self::File(file, length)
    }

    /// `length` bytes computed from their offset.
    pub fn generated(length: u64, fill: impl Fn(u64, &mut [u8]) + Send + Sync + 'static) -> Self {
        Self::Generated { length, fill: Box::new(fill) }
    }

    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(_, length) | Self::Generated { length, .. } => *length,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buffer` from `offset`; the range must lie inside.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) {
        match self {
            Self::Bytes(bytes) => {
                let start = offset as usize;
                buffer.copy_from_slice(&bytes[start..start + buffer.len()]);
            }
            Self::File(file, _) => file.read_exact_at(buffer, offset).expect("the file is as long as it was"),
            Self::Generated { fill, .. } => fill(offset, buffer),
        }
    }
}
