//! Locks on wait-if-equal: no exit where nobody waits, and nobody spins where somebody does.
//!
//! The host's crate compiles mutex, condition and semaphore into its models, with atomics that loom watches; so these come
//! from here, and what makes locks at compile time, which such atomics cannot be, stands apart.

mod condvar;
mod constructors;
mod mutex;
mod semaphore;
mod spinlock;

pub(crate) use core::sync::atomic::{AtomicU32, Ordering};

pub use condvar::Condvar;
pub use mutex::{Guard, Mutex};
pub use semaphore::Semaphore;
pub use spinlock::SpinLock;

/// Whoever can have a vCPU sleep: the [`Contract`](crate::Contract), or [`Spin`] where there is none.
pub trait Waiting {
    /// Returns once a wake on `word` was for this vCPU, at once where the word does not hold `expected`, or for no reason.
    fn wait(&self, word: &AtomicU32, expected: u32);
    /// Wakes up to `most` of those who wait for `word`.
    fn wake(&self, word: &AtomicU32, most: u64);
}

/// Waiting without a host that helps.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spin;

impl Waiting for Spin {
    fn wait(&self, _word: &AtomicU32, _expected: u32) {
        core::hint::spin_loop();
    }

    fn wake(&self, _word: &AtomicU32, _most: u64) {}
}

#[cfg(test)]
mod tests;
