//! Memory that the host writes, or the host reads, while we look at it.
#![allow(unsafe_code)] // shared memory: only ever touched through pointers, a word at a time

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::ptr;
use core::sync::atomic::{AtomicU8, Ordering};

use contract::native::VmPage;

/// Something that host and guest share. There is never a reference to what is inside.
#[repr(transparent)]
pub struct Shared<T>(UnsafeCell<MaybeUninit<T>>);

// SAFETY: all accesses are volatile reads and writes of plain numbers through pointers.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// All zero.
    pub const fn new() -> Self {
        Self(UnsafeCell::new(MaybeUninit::zeroed()))
    }

    /// Where it is.
    pub fn address(&self) -> usize {
        self.0.get() as usize
    }

    /// Reads a field by its offset.
    ///
    /// # Panics
    /// Where no aligned `F` lies at `offset`: a mistake of the caller's.
    pub(crate) fn read<F: Number>(&self, offset: usize) -> F {
        // SAFETY: `field` makes sure that it lies inside and is aligned, and every bit pattern is a number.
        unsafe { ptr::read_volatile(self.field(offset)) }
    }

    /// Writes a field by its offset.
    ///
    /// # Panics
    /// As [`Shared::read`].
    pub(crate) fn write<F: Number>(&self, offset: usize, value: F) {
        // SAFETY: as in `read`; the host takes any number.
        unsafe { ptr::write_volatile(self.field(offset), value) }
    }

    /// Replaces a byte by zero, by one instruction; returns what was there.
    ///
    /// # Panics
    /// As [`Shared::read`].
    pub(crate) fn take(&self, offset: usize) -> u8 {
        // SAFETY: as in `read`; the host changes it only while we execute nothing.
        unsafe { AtomicU8::from_ptr(self.field(offset)) }.swap(0, Ordering::SeqCst)
    }

    fn field<F: Number>(&self, offset: usize) -> *mut F {
        assert!(offset.is_multiple_of(align_of::<F>()) && offset + size_of::<F>() <= size_of::<T>());
        assert!(self.address().is_multiple_of(align_of::<F>()));
        // SAFETY: inside of this object, by the assertion above.
        unsafe { self.0.get().cast::<u8>().add(offset).cast() }
    }
}

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// Numbers that are read in one piece.
pub(crate) trait Number: Copy {}
impl Number for u8 {}
impl Number for u32 {}
impl Number for u64 {}

/// A page of code that the host writes.
#[repr(C, align(4096))]
pub(crate) struct CodePage([u8; 4096]);

/// The pages of a VM as a whole. A `static`, in memory that may be executed.
#[repr(C)]
pub struct VmMemory {
    pub(crate) calls: Shared<CodePage>,
    pub(crate) vm: Shared<VmPage>,
}

impl VmMemory {
    /// Not in use yet.
    pub const fn new() -> Self {
        Self { calls: Shared::new(), vm: Shared::new() }
    }
}

impl Default for VmMemory {
    fn default() -> Self {
        Self::new()
    }
}
