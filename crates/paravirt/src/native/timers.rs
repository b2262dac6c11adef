//! The timers of all vCPUs on one alarm of the host's.
//!
//! ```text
//!   vCPU 0   ├────── slack ──────┤                    a timer may be raised anywhere between its deadline
//!   vCPU 1        ├──── slack ────────┤               and its deadline plus its slack
//!   vCPU 1     ├─────── slack ──┤
//!                               ▲ the alarm: the first moment that a slack ends. All that are due then are raised at once.
//! ```

use crate::sync::{Mutex, MutexGuard, PoisonError};

/// What the host wakes us with.
pub(crate) trait Alarm {
    /// Calls [`TimerSet::expire`] at `deadline`, and not at an earlier deadline.
    fn arm(&self, deadline: u64);
    /// Does not call.
    fn disarm(&self);
}

/// A timer that is to be raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Armed {
    /// Not before this, nanoseconds on the VM's clock.
    pub(crate) deadline: u64,
    /// Not after this.
    pub(crate) latest: u64,
    /// What is raised.
    pub(crate) vector: u8,
}

struct Inner {
    timers: Vec<Option<Armed>>,
    /// What the alarm is armed for.
    alarm: Option<u64>,
}

/// All timers of a VM, by number.
pub(crate) struct TimerSet<A> {
    inner: Mutex<Inner>,
    alarm: A,
}

impl<A: Alarm> TimerSet<A> {
    pub(crate) fn new(count: usize, alarm: A) -> Self {
        Self { inner: Mutex::new(Inner { timers: vec![None; count], alarm: None }), alarm }
    }

    /// Arms a timer, or disarms it. Returns what it was before.
    pub(crate) fn set(&self, number: usize, timer: Option<Armed>) -> Option<Armed> {
        let mut inner = self.lock();
        let before = std::mem::replace(&mut inner.timers[number], timer);
        self.follow(&mut inner);
        before
    }

    /// Takes out what is due at `now`: numbers and vectors, in the order of their deadlines.
    pub(crate) fn expire(&self, now: u64) -> Vec<(usize, u8)> {
        let mut inner = self.lock();
        inner.alarm = None; // it has rung
        let mut due: Vec<(u64, usize, u8)> = Vec::new();
        for (number, timer) in inner.timers.iter_mut().enumerate() {
            if let Some(armed) = timer.take_if(|armed| armed.deadline <= now) {
                due.push((armed.deadline, number, armed.vector));
            }
        }
        self.follow(&mut inner);
        due.sort_unstable();
        due.into_iter().map(|(_, number, vector)| (number, vector)).collect()
    }

    /// Arms the alarm for the first slack that ends. Under the lock: a decision that is armed later could replace a newer one.
    fn follow(&self, inner: &mut Inner) {
        let first = inner.timers.iter().flatten().map(|armed| armed.latest).min();
        if first == inner.alarm {
            return;
        }
        inner.alarm = first;
        match first {
            Some(deadline) => self.alarm.arm(deadline),
            None => self.alarm.disarm(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
