//! The `kitfs` binary.
fn main() {}
