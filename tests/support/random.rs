//! Numbers that look random and are the same in every run.

use super::kit::pattern;

/// A sequence of them.
pub struct Random {
    seed: u64,
    drawn: u64,
}

impl Random {
    /// The sequence that follows from a seed.
    pub fn new(seed: u64) -> Self {
        Self { seed, drawn: 0 }
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.drawn += 1;
        let bytes = pattern(self.seed * 1000 + self.drawn, 8);
        (u64::from_le_bytes(bytes.try_into().expect("eight bytes")) >> 16) as usize % end
    }
}
