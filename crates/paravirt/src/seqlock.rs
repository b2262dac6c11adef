//! The writer's half of the version protocol of shared pages: an odd version, the body, the next even version.
//!
//! A reader that finds two equal, even versions around its reads has read one body. A reader in the middle of a change
//! reads again, so whatever the writer reads between [`begin`] and [`end`] (the clock, say) is later than whatever a
//! reader has read with the old body.
//!
//! Neighbours: the clock's pages and the VM page are written with it; the reader is in `contract`. Callers see to it
//! that a page has one writer at a time.

use crate::sync::{Ordering, fence};

/// A page with a version.
pub(crate) trait Versioned {
    /// The version that stands there.
    fn version(&self) -> u32;
    /// Replaces it.
    fn set_version(&self, version: u32);
}

/// Makes the version odd; returns it for [`end`]. Goes on from what is there, so that a reader in between notices even
/// where the page was somebody else's before.
pub(crate) fn begin(page: &impl Versioned) -> u32 {
    let odd = page.version().wrapping_add(1) | 1;
    page.set_version(odd);
    fence(Ordering::SeqCst);
    odd
}

/// Makes the version even again, behind all of the body.
pub(crate) fn end(page: &impl Versioned, odd: u32) {
    fence(Ordering::SeqCst);
    page.set_version(odd.wrapping_add(1));
}
