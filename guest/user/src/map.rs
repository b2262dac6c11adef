//! A region of a device in this process.
#![allow(unsafe_code)] // maps it, and loads and stores by pointer

use std::fs::File;
use std::io;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Memory of a device. Others change it at any time, so each access is one of its own.
#[derive(Debug)]
pub(crate) struct Mapping {
    at: NonNull<u8>,
    bytes: usize,
}

// SAFETY: an address and a size; what lies there is accessed by volatile loads and stores only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// An integer that the device knows.
pub(crate) trait Word: Copy {}
impl Word for u32 {}
impl Word for u64 {}

impl Mapping {
    pub(crate) fn new(file: &File, bytes: u64, writable: bool) -> io::Result<Self> {
        // A shorter file would be SIGBUS at the first access.
        if file.metadata()?.len() < bytes {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "shorter than the region"));
        }
        let bytes = bytes as usize;
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a new mapping at an address the kernel chooses.
        let at = unsafe { mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, file, 0)? };
        let at = NonNull::new(at.cast()).ok_or_else(|| io::Error::other("mapped at address zero"))?;
        Ok(Self { at, bytes })
    }

    fn word<T: Word>(&self, offset: u64) -> *mut T {
        let end = offset.checked_add(size_of::<T>() as u64);
        assert!(end.is_some_and(|end| end <= self.bytes as u64) && offset.is_multiple_of(size_of::<T>() as u64));
        // SAFETY: within the mapping, as was just checked.
        unsafe { self.at.as_ptr().add(offset as usize).cast() }
    }

    /// Loads a word, in one access. Offsets are this crate's.
    pub(crate) fn load<T: Word>(&self, offset: u64) -> T {
        // SAFETY: `word` vouches for place and alignment; every bit pattern is a value.
        unsafe { self.word::<T>(offset).read_volatile() }
    }

    /// Stores a word, in one access. Only into a writable mapping.
    pub(crate) fn store<T: Word>(&self, offset: u64, value: T) {
        // SAFETY: as in `load`.
        unsafe { self.word::<T>(offset).write_volatile(value) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        let _ = unsafe { munmap(self.at.as_ptr().cast(), self.bytes) };
    }
}
