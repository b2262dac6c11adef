//! A lock for what is held briefly: spins a while, then sleeps.

use super::Waiting;
use super::mutex::{Guard, Mutex};

/// Looks at a taken lock before it sleeps: longer than a critical section of a vCPU that runs.
const SPINS: u32 = 100;

/// One at a time; the others spin for a bounded while, in case the holder runs, and then sleep, since it may not.
pub struct SpinLock<T>(Mutex<T>);

impl<T> SpinLock<T> {
    /// Free.
    pub const fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    /// Takes the lock. No exit where it is free or soon is.
    pub fn lock<'a, W: Waiting>(&'a self, waiting: &'a W) -> Guard<'a, T, W> {
        for _ in 0..SPINS {
            if self.0.seems_free()
                && let Some(guard) = self.0.try_lock(waiting)
            {
                return guard;
            }
            core::hint::spin_loop();
        }
        self.0.lock(waiting)
    }
}
