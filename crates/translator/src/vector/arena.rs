//! Memory for generated code, never writable and executable by the same mapping.
//!
//! One memory file is mapped twice: bytes are written through a mapping that cannot execute, and run through one that
//! cannot write. The two lie at unrelated addresses.

use std::io;
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A growing piece of code of bounded size. Nothing is ever taken out.
pub(super) struct Arena {
    write: NonNull<u8>,
    run: NonNull<u8>,
    bytes: usize,
    used: usize,
}

// SAFETY: the mappings belong to this value alone; they may move between threads with it.
unsafe impl Send for Arena {}

/// Pieces start at multiples of this, for the instruction fetch.
const ALIGN: usize = 32;

impl Arena {
    /// Room for `bytes` of code; costs memory only as it fills.
    pub(super) fn new(bytes: usize) -> io::Result<Self> {
        let file = memfd_create("stubs", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, bytes as u64)?;
        let map = |protection| {
            // SAFETY: a new mapping at an address the kernel chooses.
            let at = unsafe { mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, &file, 0)? };
            NonNull::new(at.cast::<u8>()).ok_or_else(|| io::Error::other("mapped at address zero"))
        };
        let write = map(ProtFlags::READ | ProtFlags::WRITE)?;
        let run = map(ProtFlags::READ | ProtFlags::EXEC).inspect_err(|_| {
            // SAFETY: the mapping just made, which nobody knows yet.
            let _ = unsafe { munmap(write.as_ptr().cast(), bytes) };
        })?;
        Ok(Self { write, run, bytes, used: 0 })
    }

    /// Adds code and returns where it runs; `None` where it does not fit any more. It stays there as long as the arena.
    pub(super) fn add(&mut self, code: &[u8]) -> Option<NonNull<u8>> {
        let start = self.used.next_multiple_of(ALIGN);
        if code.len() > self.bytes - start.min(self.bytes) {
            return None;
        }
        // SAFETY: `start + code.len()` lies within the mapping, and nobody runs these bytes before they are returned.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.as_ptr().add(start), code.len());
        }
        self.used = start + code.len();
        // SAFETY: within the mapping.
        Some(unsafe { self.run.add(start) })
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: both mappings are this value's own; whoever keeps code from them keeps the arena.
        unsafe {
            let _ = munmap(self.write.as_ptr().cast(), self.bytes);
            let _ = munmap(self.run.as_ptr().cast(), self.bytes);
        }
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
