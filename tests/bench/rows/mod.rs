//! The rows of the table.
//!
//! ```text
//! cold      P2 P2b P2c P2r    a large file that is not here yet, against a download
//! warm      P4 P4b            the same once it is, against the file in the cache
//! random    P5                what a small read somewhere costs
//! memory    P6                what streaming takes of memory
//! names     P7 P9             many entries
//! far       P0 P1 P11 P12     a server that is milliseconds away
//! ```

mod cold;
mod far;
mod memory;
mod names;
mod random;
mod warm;

use crate::Row;

/// All of them, in the order of the table.
pub fn all() -> Vec<Row> {
    let mut all: Vec<Row> = [far::rows(), cold::rows(), warm::rows(), random::rows(), memory::rows(), names::rows()]
        .into_iter()
        .flatten()
        .collect();
    let number = |row: &Row| row.name[1..].trim_end_matches(char::is_alphabetic).parse::<u32>().unwrap_or(u32::MAX);
    all.sort_by_key(|row| (number(row), row.name));
    all
}

/// Bytes in a GiB.
const GIB: u64 = 1 << 30;
/// Bytes in a MiB.
const MIB: u64 = 1 << 20;

/// Bytes in GiB.
fn gib(bytes: u64) -> f64 {
    bytes as f64 / GIB as f64
}
