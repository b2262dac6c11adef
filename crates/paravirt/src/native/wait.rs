//! Who waits for which word.
//!
//! ```text
//!            begin (the word holds what was expected)        wake
//!   Idle ──────────────────────────────────────────> Waiting ────> Woken
//!    ▲                                                  │            │
//!    └──────────── end: timed out, interrupted ─────────┴── end ─────┘
//! ```
//!
//! The comparison and the step to Waiting are one under the lock that each wake takes, so a wake that follows a change of
//! the word is before the comparison, which then sees the change, or behind the step, and then finds the waiter. A waiter
//! that was woken says so whatever else ended its sleep: no wake is lost.

use std::collections::VecDeque;

use crate::sync::{Mutex, MutexGuard, PoisonError};

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Woken,
    TimedOut,
    Interrupted,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Waiting(u64),
    Woken,
}

struct Inner {
    states: Vec<State>,
    /// vCPUs that wait, those that have waited longest first; one appears once, so this is bounded.
    order: VecDeque<u32>,
}

/// All waits of a VM: at most one a vCPU.
pub(crate) struct WaitTable(Mutex<Inner>);

impl WaitTable {
    pub(crate) fn new(vcpus: usize) -> Self {
        Self(Mutex::new(Inner { states: vec![State::Idle; vcpus], order: VecDeque::with_capacity(vcpus) }))
    }

    /// `vcpu` waits for a wake on `word` from now on, where `holds` says that the word holds what was expected.
    pub(crate) fn begin<E>(&self, vcpu: u32, word: u64, holds: impl FnOnce() -> Result<bool, E>) -> Result<bool, E> {
        let mut inner = self.lock();
        if !holds()? {
            return Ok(false);
        }
        inner.states[vcpu as usize] = State::Waiting(word);
        inner.order.push_back(vcpu);
        Ok(true)
    }

    /// True once a wake was for `vcpu`.
    pub(crate) fn is_woken(&self, vcpu: u32) -> bool {
        self.lock().states[vcpu as usize] == State::Woken
    }

    /// Ends the wait of `vcpu`, if it has one: because of `why`, unless it was woken.
    pub(crate) fn end(&self, vcpu: u32, why: Ended) -> Ended {
        let mut inner = self.lock();
        match std::mem::replace(&mut inner.states[vcpu as usize], State::Idle) {
            State::Woken => Ended::Woken,
            State::Waiting(_) => {
                inner.order.retain(|waiter| *waiter != vcpu);
                why
            }
            State::Idle => why,
        }
    }

    /// Wakes up to `most` vCPUs that wait for `word`, those that have waited longest first. `rouse` gets each out of its
    /// sleep. Returns how many.
    pub(crate) fn wake(&self, word: u64, most: u64, mut rouse: impl FnMut(u32)) -> u64 {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let (states, mut woken) = (&mut inner.states, 0);
        inner.order.retain(|&vcpu| {
            let state = &mut states[vcpu as usize];
            let hit = woken < most && *state == State::Waiting(word);
            if hit {
                *state = State::Woken;
                woken += 1;
                rouse(vcpu);
            }
            !hit
        });
        woken
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
