//! File I/O straight into and out of guest RAM: `preadv(2)` and `pwritev(2)` on checked slices, without a copy.
#![allow(unsafe_code)] // the fence: the kernel reads and writes guest RAM by pointer

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// How many slices one system call takes (IOV_MAX of Linux).
pub const MAX_SLICES: usize = 1024;

/// Reads from `file` at `offset` into the first [`MAX_SLICES`] of `slices`; returns the bytes read, 0 at the end of the
/// file. Code that is overwritten is noticed.
///
/// # Errors
/// What the host said. Any part of the slices may have been written then.
pub fn read_at<B: BitmapSlice>(file: impl AsFd, offset: u64, slices: &[VolatileSlice<'_, B>]) -> io::Result<usize> {
    let slices = &slices[..slices.len().min(MAX_SLICES)];
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let vectors: Vec<libc::iovec> =
        guards.iter().map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }).collect();
    // SAFETY: each vector is the memory of a `VolatileSlice` that `guards` keeps mapped for the call; nothing else is
    // ever borrowed from it as Rust data, so the kernel may write it.
    let read = unsafe {
        libc::preadv(file.as_fd().as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int, offset as libc::off_t)
    };
    // A failed call may have written some of it: all of it counts as written.
    let mut written = usize::try_from(read).unwrap_or(usize::MAX);
    for slice in slices {
        let here = written.min(slice.len());
        slice.bitmap().mark_dirty(0, here);
        written -= here;
    }
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Writes the first [`MAX_SLICES`] of `slices` to `file` at `offset`; returns the bytes written.
///
/// # Errors
/// What the host said.
pub fn write_at<B: BitmapSlice>(file: impl AsFd, offset: u64, slices: &[VolatileSlice<'_, B>]) -> io::Result<usize> {
    let slices = &slices[..slices.len().min(MAX_SLICES)];
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard).collect();
    let vectors: Vec<libc::iovec> = guards
        .iter()
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast_mut().cast(), iov_len: guard.len() })
        .collect();
    // SAFETY: each vector is the memory of a `VolatileSlice` that `guards` keeps mapped for the call; the kernel only
    // reads it.
    let written = unsafe {
        libc::pwritev(file.as_fd().as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int, offset as libc::off_t)
    };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use vm_memory::{GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::{Gpa, GuestRam};

    #[test]
    fn scattered_slices_take_the_bytes_in_order_and_code_is_noticed() {
        let ram = GuestRam::new(&[(Gpa(0), 0x4000)]).unwrap();
        let file = File::from(rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.write_all_at(b"abcdefgh", 100).unwrap();
        ram.regions()[0].code().mark(0x1000, 4);
        let slice = |start, bytes| ram.backend().get_slice(GuestAddress(start), bytes).unwrap();

        let slices = [slice(0x2000, 3), slice(0x0fff, 2), slice(0x3000, 10)];
        assert_eq!(read_at(&file, 100, &slices).unwrap(), 8);
        let mut bytes = [0; 4];
        ram.read(Gpa(0x2000), &mut bytes).unwrap();
        assert_eq!(&bytes, b"abc\0");
        ram.read(Gpa(0x0fff), &mut bytes[..2]).unwrap();
        assert_eq!(&bytes[..2], b"de");
        assert!(!ram.regions()[0].code().holds_code(0x1000), "code under the second slice was overwritten");

        assert_eq!(write_at(&file, 4, &slices[..2]).unwrap(), 5);
        let mut back = [0; 5];
        file.read_exact_at(&mut back, 4).unwrap();
        assert_eq!(&back, b"abcde");
        assert_eq!(read_at(&file, 4096, &slices).unwrap(), 0, "past the end");
    }
}
