//! A condition that others bring about.

use super::mutex::Guard;
use super::{AtomicU32, Ordering, Waiting};

/// Where those wait who need something of what a [`Mutex`](super::Mutex) protects.
#[derive(Default)]
pub struct Condvar {
    /// Moves with each notification: who has seen the old number and finds the new one does not sleep.
    pub(super) notifications: AtomicU32,
}

impl Condvar {
    /// Gives the lock away, sleeps until a notification, and takes the lock again. May return for no reason.
    pub fn wait<'a, T, W: Waiting>(&self, guard: Guard<'a, T, W>) -> Guard<'a, T, W> {
        let (mutex, waiting) = (guard.mutex, guard.waiting);
        let seen = self.notifications.load(Ordering::Relaxed);
        drop(guard);
        waiting.wait(&self.notifications, seen);
        // Others may wait for the lock, woken together: whoever takes it now must wake the next.
        mutex.contend(waiting);
        Guard { mutex, waiting }
    }

    /// Wakes one of those who wait.
    pub fn notify_one(&self, waiting: &impl Waiting) {
        self.notify(waiting, 1);
    }

    /// Wakes all of them.
    pub fn notify_all(&self, waiting: &impl Waiting) {
        self.notify(waiting, u64::MAX);
    }

    fn notify(&self, waiting: &impl Waiting, most: u64) {
        self.notifications.fetch_add(1, Ordering::Relaxed);
        waiting.wake(&self.notifications, most);
    }
}
