//! A part of a memory file, mapped so that the host can use large pages for it.
#![allow(unsafe_code)] // the fence: maps memory

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// The host's large pages, in bytes.
const LARGE: u64 = 2 << 20;
/// So many uses of a large page's memory make it worth while: few enough that most of the memory in use comes to be in
/// large pages, enough that a guest that uses a page here and there does not come to use 512 times as much.
const ENOUGH: u8 = 32;

/// A mapping for reading and writing. Its distance from a multiple of [`LARGE`] is that of the part in the file: only there
/// does the host use large pages.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    bytes: u64,
    /// What has been reserved for it.
    reserved: (*mut c_void, usize),
    /// From the multiple of [`LARGE`] at or before the start, in bytes.
    lead: u64,
    /// How often the memory of each large page has been used, up to [`ENOUGH`] and a little more.
    uses: Box<[AtomicU8]>,
}

// SAFETY: addresses and sizes; whoever uses the memory keeps to the rules of `Region`.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes` bytes of `file` from `offset` on, both multiples of 4096.
    pub(crate) fn new(file: &File, offset: u64, bytes: u64) -> io::Result<Self> {
        let (lead, large) = (offset % LARGE, LARGE as usize);
        let too_much = || io::Error::from(io::ErrorKind::OutOfMemory);
        let reserve =
            bytes.checked_add(2 * LARGE).and_then(|bytes| usize::try_from(bytes).ok()).ok_or_else(too_much)?;
        let nowhere = std::ptr::null_mut();
        // SAFETY: a new mapping at an address the kernel chooses.
        let at =
            unsafe { mmap_anonymous(nowhere, reserve, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE)? };
        let start = at.map_addr(|address| address.next_multiple_of(large) + lead as usize);
        let mapping = Self {
            start: NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address zero"))?,
            bytes,
            reserved: (at, reserve),
            lead,
            uses: (0..(lead + bytes).div_ceil(LARGE)).map(|_| AtomicU8::new(0)).collect(),
        };
        let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: in place of a part of the mapping just made, which is longer by two large pages: `start` is less than that behind its start.
        unsafe { mmap(start, bytes as usize, ProtFlags::READ | ProtFlags::WRITE, flags, file, offset)? };
        // SAFETY: of the mapping just made; the advice changes the size of pages only, and a host may refuse it.
        unsafe { libc::madvise(start, bytes as usize, libc::MADV_HUGEPAGE) };
        Ok(mapping)
    }

    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Notes that a guest uses the page at `offset`.
    pub(crate) fn note_use(&self, offset: u64) {
        let large = (self.lead + offset) / LARGE;
        let Some(uses) = self.uses.get(large as usize) else { return };
        if uses.load(Ordering::Relaxed) < ENOUGH && uses.fetch_add(1, Ordering::Relaxed) + 1 == ENOUGH {
            self.collapse(large);
        }
    }

    /// Has all large pages that lie in these bytes made, which are about to be used whole.
    pub(crate) fn enlarge(&self, range: Range<u64>) {
        let (first, end) = ((self.lead + range.start).div_ceil(LARGE), (self.lead + range.end.min(self.bytes)) / LARGE);
        for large in first..end {
            if self.uses[large as usize].swap(ENOUGH, Ordering::Relaxed) < ENOUGH {
                self.collapse(large);
            }
        }
    }

    /// Asks the host to make one large page. Contents stay.
    fn collapse(&self, large: u64) {
        let Some(offset) = (large * LARGE).checked_sub(self.lead) else { return };
        if offset + LARGE > self.bytes {
            return;
        }
        // SAFETY: a large page within the mapping, as just checked.
        let at = unsafe { self.start.add(offset as usize) };
        // SAFETY: within the mapping, and an access that changes nothing: where there is no memory yet, the host refuses.
        unsafe { at.read_volatile() };
        // SAFETY: of the mapping; it changes the size of pages only, and a host may refuse it.
        unsafe { libc::madvise(at.as_ptr().cast(), LARGE as usize, libc::MADV_COLLAPSE) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value's own; the addresses that are given out are good only as long as it lives.
        let _ = unsafe { munmap(self.reserved.0, self.reserved.1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    #[test]
    fn the_distance_from_a_large_page_is_that_in_the_file() {
        let file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, 8 * LARGE).unwrap();
        for (offset, bytes) in [(0, LARGE), (0x1000, 0x1000), (LARGE - 0x1000, 3 * LARGE), (3 * LARGE, 4096)] {
            let mapping = Mapping::new(&file, offset, bytes).unwrap();
            assert_eq!(mapping.start().as_ptr() as u64 % LARGE, offset % LARGE);
            for at in (0..bytes).step_by(4096) {
                // SAFETY: a page within the mapping.
                unsafe { mapping.start().add(at as usize).cast::<u64>().write((offset + at) | 1) };
                for _ in 0..300 {
                    mapping.note_use(at);
                }
            }
            mapping.enlarge(0..bytes);
            mapping.enlarge(0..u64::MAX >> 1);
            mapping.note_use(bytes);
            let again = Mapping::new(&file, offset, bytes).unwrap();
            for at in (0..bytes).step_by(4096) {
                // SAFETY: a page within the mapping.
                assert_eq!(unsafe { again.start().add(at as usize).cast::<u64>().read() }, (offset + at) | 1);
            }
        }
    }
}
