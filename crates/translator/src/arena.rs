//! Memory for generated code, never writable and executable by the same mapping.
//!
//! One memory file is mapped twice: bytes are written through a mapping that cannot execute, and run through one that
//! cannot write. The two lie at unrelated addresses.
//!
//! ```text
//!   ┌─ code that runs ────> ┬─ code that rarely does ───> ┐
//! ```
//!
//! What rarely runs lies apart, so that it takes no room in the processor's caches between what does.

use std::ffi::c_void;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Two growing pieces of code of bounded size.
pub(crate) struct Arena {
    write: View,
    run: View,
    bytes: usize,
    hot: Part,
    cold: Part,
    /// Bytes from the start that the host has been asked to keep in large pages.
    large: usize,
}

/// A part of an arena. Offsets are from the arena's start.
struct Part {
    start: usize,
    used: usize,
    end: usize,
}

/// Where the next code will run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Next {
    pub hot: u64,
    pub cold: u64,
}

/// A mapping of the whole, at a multiple of [`LARGE`].
struct View {
    start: NonNull<u8>,
    /// What has been reserved for it.
    reserved: (*mut c_void, usize),
}

// SAFETY: the mappings belong to this value alone; they may move between threads with it.
unsafe impl Send for Arena {}

/// Pieces of code that runs start at multiples of this, for the instruction fetch.
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
    /// Room for `hot` bytes of code that runs and `cold` of code that rarely does; costs memory only as it fills.
    pub(crate) fn new(hot: usize, cold: usize) -> io::Result<Self> {
        let bytes = hot + cold;
        let file = memfd_create("stubs", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, bytes as u64)?;
        let write = View::new(&file, bytes, ProtFlags::READ | ProtFlags::WRITE)?;
        let run = View::new(&file, bytes, ProtFlags::READ | ProtFlags::EXEC)?;
        let part = |start, end| Part { start, used: start, end };
        Ok(Self { write, run, bytes, hot: part(0, hot), cold: part(hot, bytes), large: 0 })
    }

    /// Where the next pieces added will run.
    pub(crate) fn next(&self) -> Next {
        let at = |offset| self.run.start.as_ptr() as u64 + offset as u64;
        Next { hot: at(self.hot.next()), cold: at(self.cold.used) }
    }

    /// Bytes used by code that runs.
    pub(crate) fn used(&self) -> usize {
        self.hot.used
    }

    /// The addresses code runs at.
    pub(crate) fn range(&self) -> std::ops::Range<u64> {
        let start = self.run.start.as_ptr() as u64;
        start..start + self.bytes as u64
    }

    /// What code that runs at `at` begins with.
    pub(crate) fn bytes<const N: usize>(&self, at: u64) -> [u8; N] {
        let offset = at.wrapping_sub(self.run.start.as_ptr() as u64) as usize;
        assert!(offset <= self.bytes && N <= self.bytes - offset, "outside the code");
        // SAFETY: within the mapping, as just checked.
        unsafe { self.write.start.as_ptr().add(offset).cast::<[u8; N]>().read_unaligned() }
    }

    /// Replaces bytes of code that runs at `at`. Nobody may be running them.
    pub(crate) fn patch(&mut self, at: u64, bytes: &[u8]) {
        let offset = at.wrapping_sub(self.run.start.as_ptr() as u64) as usize;
        let inside = |part: &Part| (part.start..part.used).contains(&offset) && bytes.len() <= part.used - offset;
        assert!(inside(&self.hot) || inside(&self.cold), "patch outside the code");
        // SAFETY: within the mapping, as just checked.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.write.start.as_ptr().add(offset), bytes.len()) };
    }

    /// Takes out everything but the first `keep` bytes. Nobody may run what goes.
    pub(crate) fn truncate(&mut self, keep: usize) {
        self.hot.used = self.hot.used.min(keep);
        self.cold.used = self.cold.start;
    }

    /// Adds code and returns where it runs; `None` where it does not fit any more.
    pub(crate) fn add(&mut self, code: &[u8]) -> Option<NonNull<u8>> {
        self.add_parts(code, &[])
    }

    /// Adds code that runs and code that rarely does, and returns where the former runs; `None` where they do not fit any
    /// more.
    pub(crate) fn add_parts(&mut self, hot: &[u8], cold: &[u8]) -> Option<NonNull<u8>> {
        let (start, apart) = (self.hot.next(), self.cold.used);
        if hot.len() > self.hot.end.saturating_sub(start) || cold.len() > self.cold.end - apart {
            return None;
        }
        for (code, at) in [(hot, start), (cold, apart)] {
            // SAFETY: `at + code.len()` lies within the mapping, and nobody runs these bytes before they are returned.
            unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.start.as_ptr().add(at), code.len()) };
        }
        self.hot.used = start + hot.len();
        self.cold.used = apart + cold.len();
        self.enlarge();
        // SAFETY: within the mapping.
        Some(unsafe { self.run.start.add(start) })
    }

    /// Makes sure that code that runs, and will be added next, lies in large pages: code is larger than what it was made
    /// from, and its small pages do not all fit into the processor's TLB.
    fn enlarge(&mut self) {
        while self.large < self.hot.used && self.hot.end - self.large >= LARGE {
            // SAFETY: a piece of the mapping. The advice changes the size of pages only; a host may refuse it.
            unsafe { libc::madvise(self.write.start.as_ptr().add(self.large).cast(), LARGE, libc::MADV_COLLAPSE) };
            self.large += LARGE;
        }
    }
}

impl Part {
    fn next(&self) -> usize {
        self.used.next_multiple_of(ALIGN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_runs_until_the_arena_is_full() {
        let mut arena = Arena::new(4096, 4096).unwrap();
        let mut added = 0;
        while let Some(at) = arena.add(&[0xb8, added as u8, 0, 0, 0, 0xc3]) {
            // SAFETY: `mov eax, imm; ret`.
            let function: extern "sysv64" fn() -> u32 = unsafe { std::mem::transmute(at) };
            assert_eq!(function(), added & 0xff);
            added += 1;
        }
        assert_eq!(added, 4096 / ALIGN as u32);
        assert!(arena.add_parts(&[], &[0xc3]).is_some() && arena.add(&[0xc3]).is_none());
    }

    #[test]
    fn code_that_rarely_runs_lies_apart() {
        let mut arena = Arena::new(4096, 2048).unwrap();
        let next = arena.next();
        let distance = (next.cold.wrapping_sub(next.hot + 5) as u32).to_le_bytes();
        let jump = [0xe9, distance[0], distance[1], distance[2], distance[3]];
        let at = arena.add_parts(&jump, &[0xb8, 7, 0, 0, 0, 0xc3]).unwrap();
        assert_eq!(at.as_ptr() as u64, next.hot);
        // SAFETY: `jmp` to `mov eax, imm; ret`.
        let function: extern "sysv64" fn() -> u32 = unsafe { std::mem::transmute(at) };
        assert_eq!(function(), 7);
        assert!(arena.add_parts(&jump, &[0; 4096]).is_none(), "no room there");
        assert_eq!(arena.next().cold, next.cold + 6, "and nothing was added");
        arena.truncate(0);
        assert_eq!(arena.next().cold, next.cold);
    }
}
