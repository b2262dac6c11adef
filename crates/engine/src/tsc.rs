//! The guest's time-stamp counter: the host's, moved by an offset.

use std::sync::atomic::{AtomicU64, Ordering};

/// One vCPU's TSC. Shared by its engine (RDTSC, TSC MSRs), its timer (TSC deadline) and its clock pages.
#[derive(Debug, Default)]
pub struct GuestTsc {
    offset: AtomicU64,
    khz: u64,
}

impl GuestTsc {
    /// A counter that reads `start` when the host's reads `host_now`, counting at `khz`.
    pub fn new(khz: u64, host_now: u64, start: u64) -> Self {
        Self { offset: AtomicU64::new(start.wrapping_sub(host_now)), khz }
    }

    /// What the guest reads when the host's counter reads `host`.
    #[inline]
    pub fn guest(&self, host: u64) -> u64 {
        host.wrapping_add(self.offset.load(Ordering::Relaxed))
    }

    /// What the host's counter reads when the guest reads `guest`.
    pub fn host(&self, guest: u64) -> u64 {
        guest.wrapping_sub(self.offset.load(Ordering::Relaxed))
    }

    /// Guest minus host.
    pub fn offset(&self) -> u64 {
        self.offset.load(Ordering::Relaxed)
    }

    /// The raw offset, for engines that add it in generated code.
    pub fn word(&self) -> &AtomicU64 {
        &self.offset
    }

    /// Moves the counter by `delta` (a write to IA32_TSC or IA32_TSC_ADJUST).
    pub fn adjust(&self, delta: u64) {
        self.offset.fetch_add(delta, Ordering::Relaxed);
    }

    /// Its rate in kHz.
    pub fn khz(&self) -> u64 {
        self.khz
    }
}
