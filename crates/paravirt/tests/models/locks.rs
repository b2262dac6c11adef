//! What `guest/kit/src/sync/mod.rs` has around the guest kit's locks.

pub(crate) use loom::sync::atomic::{AtomicU32, Ordering};

pub(crate) trait Waiting {
    fn wait(&self, word: &AtomicU32, expected: u32);
    fn wake(&self, word: &AtomicU32, most: u64);
}

#[path = "../../../../guest/kit/src/sync/condvar.rs"]
pub(crate) mod condvar;
#[path = "../../../../guest/kit/src/sync/mutex.rs"]
pub(crate) mod mutex;
#[path = "../../../../guest/kit/src/sync/semaphore.rs"]
pub(crate) mod semaphore;

pub(crate) use mutex::Mutex;

pub(crate) fn mutex<T>(value: T) -> Mutex<T> {
    Mutex { state: AtomicU32::new(0), value: core::cell::UnsafeCell::new(value) }
}

pub(crate) fn condvar() -> condvar::Condvar {
    condvar::Condvar { notifications: AtomicU32::new(0) }
}

pub(crate) fn semaphore(permits: u32) -> semaphore::Semaphore {
    semaphore::Semaphore { state: AtomicU32::new(permits) }
}
