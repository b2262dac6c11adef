//! Locks as statics have them.

use core::cell::UnsafeCell;

use super::mutex::FREE;
use super::{AtomicU32, Condvar, Mutex, Semaphore};

impl<T> Mutex<T> {
    /// Free.
    pub const fn new(value: T) -> Self {
        Self { state: AtomicU32::new(FREE), value: UnsafeCell::new(value) }
    }
}

impl Condvar {
    /// Nobody waits.
    pub const fn new() -> Self {
        Self { notifications: AtomicU32::new(0) }
    }
}

impl Semaphore {
    /// With this many permits, below 2^31.
    pub const fn new(permits: u32) -> Self {
        Self { state: AtomicU32::new(permits) }
    }
}
