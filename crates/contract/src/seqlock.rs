//! The reader's half of the version protocol of shared pages.
//!
//! Neighbours: clocks and the VM page are read with it. The host's crate, which has the writer's half, compiles this file
//! into its models.

use crate::sync::{Ordering, fence};

/// Reads `body` between two looks at the version: `None` where the host was writing.
pub fn read<R>(version: impl Fn() -> u32, body: impl FnOnce() -> R) -> Option<R> {
    let before = version();
    fence(Ordering::Acquire);
    let body = body();
    fence(Ordering::Acquire);
    (before.is_multiple_of(2) && before == version()).then_some(body)
}
