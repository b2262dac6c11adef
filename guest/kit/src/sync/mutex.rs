//! A lock that sleeps.
#![allow(unsafe_code)] // hands out what it protects

use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};

use super::{AtomicU32, Ordering, Waiting};

pub(super) const FREE: u32 = 0;
const TAKEN: u32 = 1;
/// Taken, and somebody may wait.
const CONTENDED: u32 = 2;

/// One at a time; the others sleep.
pub struct Mutex<T> {
    pub(super) state: AtomicU32,
    pub(super) value: UnsafeCell<T>,
}

// SAFETY: the value is reached through a guard only, and there is one at a time.
unsafe impl<T: Send> Sync for Mutex<T> {}

impl<T> Mutex<T> {
    /// Takes the lock, asleep until it is free. No exit where it is.
    pub fn lock<'a, W: Waiting>(&'a self, waiting: &'a W) -> Guard<'a, T, W> {
        if self.state.compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed).is_err() {
            self.contend(waiting);
        }
        Guard { mutex: self, waiting }
    }

    /// Takes the lock where it is free.
    pub fn try_lock<'a, W: Waiting>(&'a self, waiting: &'a W) -> Option<Guard<'a, T, W>> {
        let taken = self.state.compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed);
        // Only then may there be a guard: it would free the lock again.
        taken.is_ok().then(|| Guard { mutex: self, waiting })
    }

    /// A look that takes no cache line from the holder.
    pub(super) fn seems_free(&self) -> bool {
        self.state.load(Ordering::Relaxed) == FREE
    }

    /// Takes the lock as somebody behind whom others may wait.
    pub(super) fn contend(&self, waiting: &impl Waiting) {
        while self.state.swap(CONTENDED, Ordering::Acquire) != FREE {
            waiting.wait(&self.state, CONTENDED);
        }
    }

    pub(super) fn unlock(&self, waiting: &impl Waiting) {
        if self.state.swap(FREE, Ordering::Release) == CONTENDED {
            waiting.wake(&self.state, 1);
        }
    }
}

/// The lock is taken while this is there.
pub struct Guard<'a, T, W: Waiting> {
    pub(super) mutex: &'a Mutex<T>,
    pub(super) waiting: &'a W,
}

impl<T, W: Waiting> Deref for Guard<'_, T, W> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: this guard is the only one.
        unsafe { &*self.mutex.value.get() }
    }
}

impl<T, W: Waiting> DerefMut for Guard<'_, T, W> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and it is borrowed exclusively.
        unsafe { &mut *self.mutex.value.get() }
    }
}

impl<T, W: Waiting> Drop for Guard<'_, T, W> {
    fn drop(&mut self) {
        self.mutex.unlock(self.waiting);
    }
}
