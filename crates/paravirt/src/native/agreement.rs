//! What is offered, accepted and on its way out.
//!
//! ```text
//!            accept                revoke                          acknowledge (of that epoch)
//!   offered ────────> accepted ──────────────> accepted, revoking ───────────────────────────> not honoured
//!                                 epoch + 1        │        ▲ still honoured
//!                                                  └ overdue ┘ after a while, visibly
//! ```
//!
//! A feature is honoured until the guest has acknowledged the epoch that revoked it, however long that takes: what to do
//! about a guest that does not answer is for whoever revoked.

use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering, PoisonError};

/// What holds between guest and host at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Features that can be accepted.
    pub offered: u64,
    /// Features that are honoured.
    pub accepted: u64,
    /// Accepted features that the host wants back.
    pub revoking: u64,
    /// Moves with each revocation.
    pub epoch: u64,
    /// The guest has not acknowledged in time.
    pub overdue: bool,
}

/// A guest named features it was not offered, or an epoch that has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mismatch;

/// The terms of one VM.
pub(crate) struct Agreement {
    terms: Mutex<Terms>,
    /// [`Terms::accepted`], for a look without the lock.
    honoured: AtomicU64,
}

impl Agreement {
    pub(crate) fn new(offered: u64) -> Self {
        let terms = Terms { offered, accepted: 0, revoking: 0, epoch: 1, overdue: false };
        Self { terms: Mutex::new(terms), honoured: AtomicU64::new(0) }
    }

    /// True where every bit of `feature` is accepted.
    pub(crate) fn honours(&self, feature: u64) -> bool {
        self.honoured.load(Ordering::Acquire) & feature == feature
    }

    /// Hands the terms to `publish` while nobody changes them.
    pub(crate) fn look<R>(&self, publish: impl FnOnce(&Terms) -> R) -> R {
        publish(&self.lock())
    }

    /// The guest accepts `features` as well. `publish` tells it what holds then, before anyone can change it again.
    pub(crate) fn accept(&self, features: u64, publish: impl FnOnce(&Terms)) -> Result<Terms, Mismatch> {
        let mut terms = self.lock();
        if features & !(terms.offered & !terms.revoking) != 0 {
            return Err(Mismatch);
        }
        terms.accepted |= features;
        Ok(self.settle(&terms, publish))
    }

    /// The host takes `features` back: they can no longer be accepted, and those that were are revoked.
    pub(crate) fn revoke(&self, features: u64, publish: impl FnOnce(&Terms)) -> Terms {
        let mut terms = self.lock();
        terms.offered &= !features;
        terms.revoking |= features & terms.accepted;
        terms.epoch += 1;
        terms.overdue = false;
        self.settle(&terms, publish)
    }

    /// The guest has given up what was revoked up to `epoch`.
    pub(crate) fn acknowledge(&self, epoch: u64, publish: impl FnOnce(&Terms)) -> Result<Terms, Mismatch> {
        let mut terms = self.lock();
        if epoch != terms.epoch {
            return Err(Mismatch);
        }
        terms.accepted &= !terms.revoking;
        (terms.revoking, terms.overdue) = (0, false);
        Ok(self.settle(&terms, publish))
    }

    /// The time that `epoch` had to be acknowledged in is over.
    pub(crate) fn expire(&self, epoch: u64, publish: impl FnOnce(&Terms)) {
        let mut terms = self.lock();
        if terms.revoking != 0 && terms.epoch == epoch {
            terms.overdue = true;
            self.settle(&terms, publish);
        }
    }

    fn settle(&self, terms: &Terms, publish: impl FnOnce(&Terms)) -> Terms {
        self.honoured.store(terms.accepted, Ordering::Release);
        publish(terms);
        *terms
    }

    fn lock(&self) -> MutexGuard<'_, Terms> {
        self.terms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
