//! A number of permits.

use core::sync::atomic::{AtomicU32, Ordering};

use super::Waiting;

/// Permits that are taken and given back.
pub struct Semaphore {
    permits: AtomicU32,
    waiters: AtomicU32,
}

impl Semaphore {
    /// With this many permits.
    pub const fn new(permits: u32) -> Self {
        Self { permits: AtomicU32::new(permits), waiters: AtomicU32::new(0) }
    }

    /// Takes a permit, asleep until there is one. No exit where there is.
    pub fn acquire(&self, waiting: &impl Waiting) {
        while !self.try_acquire() {
            self.waiters.fetch_add(1, Ordering::SeqCst);
            waiting.wait(&self.permits, 0);
            self.waiters.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Takes a permit where there is one.
    pub fn try_acquire(&self) -> bool {
        let take = |permits: u32| permits.checked_sub(1);
        self.permits.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok()
    }

    /// Gives a permit back. No exit where nobody waits.
    pub fn release(&self, waiting: &impl Waiting) {
        self.permits.fetch_add(1, Ordering::SeqCst);
        if self.waiters.load(Ordering::SeqCst) != 0 {
            waiting.wake(&self.permits, 1);
        }
    }
}
