//! A number of permits.

use super::{AtomicU32, Ordering, Waiting};

/// Somebody may wait; the other bits are the permits. One word, so that nobody goes by half of a change.
const CONTENDED: u32 = 1 << 31;

/// Permits that are taken and given back.
pub struct Semaphore {
    pub(super) state: AtomicU32,
}

impl Semaphore {
    /// Takes a permit, asleep until there is one. No exit where there is.
    pub fn acquire(&self, waiting: &impl Waiting) {
        if self.try_acquire() {
            return;
        }
        loop {
            // Behind whom others may wait, as this one did.
            let take = |state: u32| Some((state & !CONTENDED).saturating_sub(1) | CONTENDED);
            let before = self.update(take).unwrap_or_else(|state| state) & !CONTENDED;
            match before {
                0 => waiting.wait(&self.state, CONTENDED),
                1 => return,
                // Given back by somebody who saw no contention any more: whoever waits next is ours to wake.
                _ => return waiting.wake(&self.state, 1),
            }
        }
    }

    /// Takes a permit where there is one.
    pub fn try_acquire(&self) -> bool {
        self.update(|state| (state & !CONTENDED != 0).then(|| state - 1)).is_ok()
    }

    /// Gives a permit back. No exit where nobody waits.
    pub fn release(&self, waiting: &impl Waiting) {
        let before = self.update(|state| Some((state & !CONTENDED) + 1)).unwrap_or_else(|state| state);
        if before & CONTENDED != 0 {
            waiting.wake(&self.state, 1);
        }
    }

    fn update(&self, change: impl FnMut(u32) -> Option<u32>) -> Result<u32, u32> {
        self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, change)
    }
}
