//! Always-on counts of the dialogue between a driver and its device.

use std::sync::atomic::{AtomicU64, Ordering};

/// What has happened so far; shared by all threads of one device.
#[derive(Debug, Default)]
pub struct Counters {
    kicks: AtomicU64,
    interrupts: AtomicU64,
    requests: AtomicU64,
    bytes_to_guest: AtomicU64,
    bytes_from_guest: AtomicU64,
    faults: AtomicU64,
}

/// One reading of [`Counters`]. All counts are since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CounterValues {
    /// Notifications by the driver.
    pub kicks: u64,
    /// Interrupts raised, for queues and configuration changes.
    pub interrupts: u64,
    /// Descriptor chains taken from queues.
    pub requests: u64,
    /// Payload bytes into guest memory.
    pub bytes_to_guest: u64,
    /// Payload bytes out of guest memory.
    pub bytes_from_guest: u64,
    /// Times the driver broke the rules so that the device needs a reset.
    pub faults: u64,
}

impl Counters {
    pub(super) fn kicks(&self, count: u64) {
        self.kicks.fetch_add(count, Ordering::Relaxed);
    }

    pub(super) fn interrupt(&self) {
        self.interrupts.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn fault(&self) {
        self.faults.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts payload the device wrote into guest memory.
    pub fn to_guest(&self, bytes: u64) {
        self.bytes_to_guest.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts payload the device read from guest memory.
    pub fn from_guest(&self, bytes: u64) {
        self.bytes_from_guest.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Reads all counts; each is exact, together they may be a moment apart.
    pub fn read(&self) -> CounterValues {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CounterValues {
            kicks: load(&self.kicks),
            interrupts: load(&self.interrupts),
            requests: load(&self.requests),
            bytes_to_guest: load(&self.bytes_to_guest),
            bytes_from_guest: load(&self.bytes_from_guest),
            faults: load(&self.faults),
        }
    }
}
