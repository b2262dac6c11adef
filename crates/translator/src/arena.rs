//! Memory for generated code, never writable and executable by the same mapping.
//!
//! One memory file is mapped twice: bytes are written through a mapping that cannot execute, and run through one that
//! cannot write. The two lie at unrelated addresses.

use std::ffi::c_void;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// A growing piece of code of bounded size.
pub(crate) struct Arena {
    write: View,
    run: View,
    bytes: usize,
    used: usize,
    /// Bytes from the start that the host has been asked to keep in large pages.
    large: usize,
}

/// A mapping of the whole, at a multiple of [`LARGE`].
struct View {
    start: NonNull<u8>,
    /// What has been reserved for it.
    reserved: (*mut c_void, usize),
}

// SAFETY: the mappings belong to this value alone; they may move between threads with it.
unsafe impl Send for Arena {}

/// Pieces start at multiples of this, for the instruction fetch.
const ALIGN: usize = 32;
/// The host's large pages.
const LARGE: usize = 2 << 20;

impl View {
    fn new(file: impl AsFd, bytes: usize, protection: ProtFlags) -> io::Result<Self> {
        let reserved = bytes + LARGE;
        let nowhere = std::ptr::null_mut();
        // SAFETY: a new mapping at an address the kernel chooses.
        let at = unsafe { mmap_anonymous(nowhere, reserved, ProtFlags::empty(), MapFlags::PRIVATE)? };
        let start = at.map_addr(|address| address.next_multiple_of(LARGE));
        let view = Self {
            start: NonNull::new(start.cast::<u8>()).ok_or_else(|| io::Error::other("mapped at address zero"))?,
            reserved: (at, reserved),
        };
        // SAFETY: in place of a part of the mapping just made.
        unsafe { mmap(start, bytes, protection, MapFlags::SHARED | MapFlags::FIXED, file, 0)? };
        Ok(view)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: this value's own; whoever keeps code from it keeps the arena.
        let _ = unsafe { munmap(self.reserved.0, self.reserved.1) };
    }
}

impl Arena {
    /// Room for `bytes` of code; costs memory only as it fills.
    pub(crate) fn new(bytes: usize) -> io::Result<Self> {
        let file = memfd_create("stubs", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, bytes as u64)?;
        let write = View::new(&file, bytes, ProtFlags::READ | ProtFlags::WRITE)?;
        let run = View::new(&file, bytes, ProtFlags::READ | ProtFlags::EXEC)?;
        Ok(Self { write, run, bytes, used: 0, large: 0 })
    }

    /// Makes sure that what is used, and will be next, lies in large pages: code is larger than what it was made from, and
    /// its small pages do not all fit into the processor's TLB.
    fn enlarge(&mut self) {
        while self.large < self.used && self.bytes - self.large >= LARGE {
            // SAFETY: a piece of the mapping. The advice changes the size of pages only; a host may refuse it.
            unsafe { libc::madvise(self.write.start.as_ptr().add(self.large).cast(), LARGE, libc::MADV_COLLAPSE) };
            self.large += LARGE;
        }
    }

    /// Where the next piece added will run.
    pub(crate) fn next(&self) -> u64 {
        self.run.start.as_ptr() as u64 + self.used.next_multiple_of(ALIGN) as u64
    }

    /// Bytes used.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// The addresses code runs at.
    pub(crate) fn range(&self) -> std::ops::Range<u64> {
        let start = self.run.start.as_ptr() as u64;
        start..start + self.bytes as u64
    }

    /// Replaces bytes of code that runs at `at`. Nobody may be running them.
    pub(crate) fn patch(&mut self, at: u64, bytes: &[u8]) {
        let offset = at.wrapping_sub(self.run.start.as_ptr() as u64) as usize;
        assert!(offset < self.used && bytes.len() <= self.used - offset, "patch outside the code");
        // SAFETY: within the mapping, as just checked.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.write.start.as_ptr().add(offset), bytes.len()) };
    }

    /// Takes out everything but the first `keep` bytes. Nobody may run what goes.
    pub(crate) fn truncate(&mut self, keep: usize) {
        self.used = self.used.min(keep);
    }

    /// Adds code and returns where it runs; `None` where it does not fit any more.
    pub(crate) fn add(&mut self, code: &[u8]) -> Option<NonNull<u8>> {
        let start = self.used.next_multiple_of(ALIGN);
        if code.len() > self.bytes - start.min(self.bytes) {
            return None;
        }
        // SAFETY: `start + code.len()` lies within the mapping, and nobody runs these bytes before they are returned.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.start.as_ptr().add(start), code.len());
        }
        self.used = start + code.len();
        self.enlarge();
        // SAFETY: within the mapping.
        Some(unsafe { self.run.start.add(start) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_runs_until_the_arena_is_full() {
        let mut arena = Arena::new(4096).unwrap();
        let mut added = 0;
        while let Some(at) = arena.add(&[0xb8, added as u8, 0, 0, 0, 0xc3]) {
            // SAFETY: `mov eax, imm; ret`.
            let function: extern "sysv64" fn() -> u32 = unsafe { std::mem::transmute(at) };
            assert_eq!(function(), added & 0xff);
            added += 1;
        }
        assert_eq!(added, 4096 / ALIGN as u32);
        assert!(arena.add(&[]).is_some() || arena.used == 4096);
    }
}
