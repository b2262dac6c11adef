//! The `cordial` program.
fn main() {}
