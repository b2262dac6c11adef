//! The memory that a vCPU shares with the host's kernel (`struct kvm_run`), mapped once more for this engine: what is read
//! and written here is no one's reference.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU8;

use kvm_bindings::{kvm_run, kvm_run__bindgen_ty_1};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A mapping of it.
#[derive(Debug)]
pub(crate) struct RunPage {
    start: NonNull<kvm_run>,
    bytes: usize,
}

// SAFETY: an address and a size. What is done through the address is atomic, or done by the one thread that runs the vCPU,
// outside of KVM_RUN.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps `bytes` (`KVM_GET_VCPU_MMAP_SIZE`) of a vCPU's file.
    pub(crate) fn new(vcpu: impl AsFd, bytes: usize) -> io::Result<Self> {
        if bytes < size_of::<kvm_run>() {
            return Err(io::Error::other(format!("a vCPU's shared memory has only {bytes} bytes")));
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address the kernel chooses.
        let at = unsafe { mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, vcpu, 0)? };
        let start = NonNull::new(at.cast()).ok_or_else(|| io::Error::other("mapped at address zero"))?;
        Ok(Self { start, bytes })
    }

    /// Where not 0, KVM_RUN does what is left of the last exit and returns with EINTR.
    pub(crate) fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: within the mapping, which lives as long as `self`; nobody accesses the byte but through this.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.start.as_ptr()).immediate_exit) }
    }

    /// Why KVM_RUN returned, and what belongs to that. For the thread that runs the vCPU, while it does not, as is all below.
    pub(crate) fn exit(&self) -> (u32, kvm_run__bindgen_ty_1) {
        // SAFETY: within the mapping, numbers all over, and the kernel writes only within KVM_RUN.
        unsafe { ((*self.start.as_ptr()).exit_reason, (*self.start.as_ptr()).__bindgen_anon_1) }
    }

    /// Changes what belongs to the exit: the answer.
    pub(crate) fn answer(&self, change: impl FnOnce(&mut kvm_run__bindgen_ty_1)) {
        // SAFETY: as in `exit`; the reference is to this part alone, which only this thread accesses now.
        change(unsafe { &mut (*self.start.as_ptr()).__bindgen_anon_1 });
    }

    /// An interrupt from outside the local APIC can be handed over now. Tells it once.
    pub(crate) fn take_readiness(&self) -> bool {
        // SAFETY: as in `answer`.
        let ready = unsafe { &mut (*self.start.as_ptr()).ready_for_interrupt_injection };
        std::mem::take(ready) != 0
    }

    /// The same without taking it.
    pub(crate) fn is_ready(&self) -> bool {
        // SAFETY: as in `exit`.
        unsafe { (*self.start.as_ptr()).ready_for_interrupt_injection != 0 }
    }

    /// Whether KVM_RUN is to return as soon as one can.
    pub(crate) fn ask_for_window(&self, wanted: bool) {
        // SAFETY: as in `answer`.
        unsafe { (*self.start.as_ptr()).request_interrupt_window = wanted.into() };
    }

    /// Copies from `offset` of the mapping; `false` where that is not all inside.
    #[must_use]
    pub(crate) fn copy_out(&self, offset: u64, to: &mut [u8]) -> bool {
        let Some(at) = self.place(offset, to.len()) else { return false };
        // SAFETY: `place` checked that source and length lie in the mapping; `to` is other memory.
        unsafe { std::ptr::copy_nonoverlapping(at, to.as_mut_ptr(), to.len()) };
        true
    }

    /// Copies to `offset` of the mapping; `false` where that is not all inside.
    #[must_use]
    pub(crate) fn copy_in(&self, offset: u64, from: &[u8]) -> bool {
        let Some(at) = self.place(offset, from.len()) else { return false };
        // SAFETY: as in `copy_out`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), at, from.len()) };
        true
    }

    fn place(&self, offset: u64, length: usize) -> Option<*mut u8> {
        let offset = usize::try_from(offset).ok()?;
        let end = offset.checked_add(length)?;
        // SAFETY: the offset lies in the mapping.
        (end <= self.bytes).then(|| unsafe { self.start.as_ptr().cast::<u8>().add(offset) })
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and references into it do not outlive `self`.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}
