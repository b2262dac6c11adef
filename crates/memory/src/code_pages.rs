//! Which guest lines hold code an engine has decoded or translated, and a version that moves when they are written.
//!
//! The rule of the house for self-modifying, cross-modifying and DMA-modified code:
//!
//! 1. A reader of code first [`mark`](CodePages::mark)s the lines, then reads the bytes. What it derived is valid while the
//!    version stays what it was *before* that: a writer that has taken the marks away meanwhile moves it afterwards.
//! 2. A writer first writes the bytes, then calls [`note_write`](CodePages::note_write), which moves the version when
//!    a marked line was touched.
//!
//! Either order of the two therefore ends with the derived code seen as stale. Writers that bypass `note_write` (an
//! engine's fast path) must have been told beforehand that the page holds code: `mark` says when a page becomes one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::mapping::Mapping;
use crate::{PAGE_SHIFT, PAGE_SIZE};

/// Bytes a line of the code bitmap stands for.
pub const LINE_SIZE: u64 = 64;

#[derive(Debug, Default)]
struct Page {
    /// Bit n: line n of the page holds bytes that decoded code depends on.
    lines: AtomicU64,
    version: AtomicU32,
    /// Who may write here without telling: a bit per writer.
    writers: AtomicU32,
}

/// What [`CodePages::mark`] has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marked {
    /// The page held no code before: fast-path writers must be made to forget it before the bytes are read.
    pub first: bool,
    /// What is derived from the bytes is valid while the page has this version.
    pub version: u32,
}

/// Code tracking of one contiguous piece of RAM. Offsets are relative to its start.
#[derive(Debug)]
pub struct CodePages {
    pages: Box<[Page]>,
    hits: Arc<AtomicU64>,
}

impl CodePages {
    /// Tracking for `bytes` of RAM, all of it free of code.
    pub fn new(bytes: u64) -> Self {
        Self::counting(bytes, Arc::default())
    }

    /// As [`CodePages::new`], with a count of hits that several share.
    pub(crate) fn counting(bytes: u64, hits: Arc<AtomicU64>) -> Self {
        let count = bytes.div_ceil(PAGE_SIZE) as usize;
        Self { pages: (0..count).map(|_| Page::default()).collect(), hits }
    }

    /// Asks for leave to write to the page at `offset` without [`CodePages::note_write`]; `writer` is any number, folded
    /// to 0..=31. Refused where the page holds code.
    pub fn admit_writer(&self, offset: u64, writer: u32) -> bool {
        let Some(page) = self.pages.get((offset >> PAGE_SHIFT) as usize) else { return false };
        let bit = 1 << (writer % 32);
        if page.writers.load(Ordering::Relaxed) & bit == 0 {
            // Either `mark` sees this bit, or the next line sees what `mark` has set.
            page.writers.fetch_or(bit, Ordering::SeqCst);
        }
        page.lines.load(Ordering::SeqCst) == 0
    }

    /// The writers admitted to the page at `offset` so far, and none from now on: a bit each.
    pub fn take_writers(&self, offset: u64) -> u32 {
        self.pages.get((offset >> PAGE_SHIFT) as usize).map_or(0, |page| page.writers.swap(0, Ordering::SeqCst))
    }

    /// Declares that code is about to be read from `len` bytes at `offset`, which must lie in one page.
    pub fn mark(&self, offset: u64, len: u64) -> Marked {
        let Some(page) = self.pages.get((offset >> PAGE_SHIFT) as usize) else { return Marked::default() };
        // In this order: see above.
        let version = page.version.load(Ordering::SeqCst);
        let before = page.lines.fetch_or(line_mask(offset % PAGE_SIZE, len), Ordering::SeqCst);
        Marked { first: before == 0, version }
    }

    /// True where any line of the page at `offset` holds code.
    pub fn holds_code(&self, offset: u64) -> bool {
        self.pages.get((offset >> PAGE_SHIFT) as usize).is_some_and(|page| page.lines.load(Ordering::SeqCst) != 0)
    }

    /// The version of the page at `offset`; moves whenever a marked line of it is written.
    pub fn version(&self, offset: u64) -> u32 {
        self.pages.get((offset >> PAGE_SHIFT) as usize).map_or(0, |page| page.version.load(Ordering::SeqCst))
    }

    /// A pointer-stable view of one page's version, for code that checks it on every entry.
    pub fn version_cell(&self, offset: u64) -> Option<&AtomicU32> {
        self.pages.get((offset >> PAGE_SHIFT) as usize).map(|page| &page.version)
    }

    /// Tells that `len` bytes at `offset` have been written. Returns true where code was hit.
    pub fn note_write(&self, offset: u64, len: u64) -> bool {
        if len == 0 {
            return false;
        }
        let last_page = (offset + len - 1) >> PAGE_SHIFT;
        let mut hit = false;
        for number in offset >> PAGE_SHIFT..=last_page {
            let Some(page) = self.pages.get(number as usize) else { break };
            let lines = page.lines.load(Ordering::SeqCst);
            if lines == 0 {
                continue;
            }
            let start = offset.max(number << PAGE_SHIFT);
            let end = (offset + len).min((number + 1) << PAGE_SHIFT);
            if lines & line_mask(start % PAGE_SIZE, end - start) != 0 {
                // All that was derived from this page is stale now, so no line of it is marked any more.
                page.lines.store(0, Ordering::SeqCst);
                page.version.fetch_add(1, Ordering::SeqCst);
                self.hits.fetch_add(1, Ordering::SeqCst);
                hit = true;
            }
        }
        hit
    }
}

/// The bits of the lines that `len` bytes at `offset` in a page touch; what lies past the page is not counted.
fn line_mask(offset: u64, len: u64) -> u64 {
    if len == 0 {
        return 0;
    }
    let first = offset / LINE_SIZE;
    let last = ((offset + len - 1) / LINE_SIZE).min(63);
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

/// [`CodePages`] as the bitmap `vm-memory` reports every device write to.
#[derive(Clone, Debug)]
pub struct CodeBitmap {
    tracked: Arc<Tracked>,
    base: u64,
}

/// What a bitmap is about. It lives as long as the bitmap, and that as long as the region it belongs to.
#[derive(Debug)]
struct Tracked {
    pages: Arc<CodePages>,
    _memory: Arc<Mapping>,
}

impl CodeBitmap {
    /// The tracking of all of `memory`, which is kept.
    pub(crate) fn new(pages: Arc<CodePages>, memory: Arc<Mapping>) -> Self {
        Self { tracked: Arc::new(Tracked { pages, _memory: memory }), base: 0 }
    }
}

impl WithBitmapSlice<'_> for CodeBitmap {
    type S = Self;
}

impl BitmapSlice for CodeBitmap {}

impl Bitmap for CodeBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.tracked.pages.note_write(self.base + offset as u64, len as u64);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false // only code is tracked here; a dirty log is migration's business
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { tracked: Arc::clone(&self.tracked), base: self.base + offset as u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_cover_exactly_the_touched_lines() {
        assert_eq!(line_mask(0, 1), 1);
        assert_eq!(line_mask(63, 2), 0b11);
        assert_eq!(line_mask(64, 64), 0b10);
        assert_eq!(line_mask(4095, 1), 1 << 63);
        assert_eq!(line_mask(0, 4096), u64::MAX);
        assert_eq!(line_mask(4090, 100), 1 << 63);
        assert_eq!(line_mask(100, 0), 0);
    }

    #[test]
    fn a_write_beside_code_leaves_the_version_and_a_write_into_it_moves_it() {
        let pages = CodePages::new(2 * PAGE_SIZE);
        assert!(pages.mark(128, 10).first);
        assert!(!pages.mark(256, 10).first, "the page already held code");
        let before = pages.version(128);
        assert!(!pages.note_write(0, 128));
        assert_eq!(pages.version(128), before);
        assert!(pages.note_write(137, 1));
        assert_ne!(pages.version(128), before);
        assert!(!pages.holds_code(128), "stale code is no code");
    }

    #[test]
    fn a_write_across_pages_hits_the_second() {
        let pages = CodePages::new(2 * PAGE_SIZE);
        pages.mark(PAGE_SIZE, 1);
        assert!(pages.note_write(PAGE_SIZE - 4, 8));
    }

    #[test]
    fn writes_past_the_end_are_harmless() {
        let pages = CodePages::new(PAGE_SIZE);
        assert!(!pages.note_write(u64::MAX - 8, 4));
        assert!(!pages.mark(10 * PAGE_SIZE, 4).first);
    }
}
