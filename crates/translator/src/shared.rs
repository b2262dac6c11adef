//! What the vCPUs of one VM owe each other: forgetting write translations of pages that become code.
//!
//! A vCPU that is about to read code from a page for the first time must know that no other vCPU still writes there by
//! its fast path, which would not move the page's version. So it asks all others to flush, and waits until each has, or
//! is seen outside guest code (it flushes when it comes back).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use engine::{Signal, Signals};
use memory::GuestRam;

/// One VM's engine-wide state.
pub(crate) struct Shared {
    /// Guest RAM.
    pub ram: GuestRam,
    links: Mutex<Vec<Arc<Link>>>,
    /// Taken for locked accesses that cross a page, which no host instruction can do for us.
    pub split_lock: Mutex<()>,
}

/// One vCPU as the others see it.
pub(crate) struct Link {
    signal: Arc<Signal>,
    requested: AtomicU64,
    done: AtomicU64,
    in_guest: AtomicBool,
}

impl Shared {
    pub(crate) fn new(ram: GuestRam) -> Self {
        Self { ram, links: Mutex::default(), split_lock: Mutex::default() }
    }

    /// Registers a vCPU.
    pub(crate) fn link(&self, signal: Arc<Signal>) -> Arc<Link> {
        let link = Arc::new(Link {
            signal,
            requested: AtomicU64::new(0),
            done: AtomicU64::new(0),
            in_guest: AtomicBool::new(false),
        });
        self.links.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&link));
        link
    }

    /// Makes every vCPU but `own` forget its write translations; `serve` is called while waiting, to answer the same
    /// request from others.
    pub(crate) fn flush_writers(&self, own: &Arc<Link>, mut serve: impl FnMut()) {
        let others: Vec<(Arc<Link>, u64)> = {
            let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
            let others = links.iter().filter(|link| !Arc::ptr_eq(link, own));
            others.map(|link| (Arc::clone(link), link.requested.fetch_add(1, Ordering::SeqCst) + 1)).collect()
        };
        for (link, _) in &others {
            if link.in_guest.load(Ordering::SeqCst) {
                link.signal.raise(Signals::ENGINE);
            }
        }
        for (link, wanted) in &others {
            let mut spins = 0_u32;
            while link.in_guest.load(Ordering::SeqCst) && link.done.load(Ordering::SeqCst) < *wanted {
                serve();
                spins += 1;
                if spins.is_multiple_of(64) { std::thread::yield_now() } else { std::hint::spin_loop() }
            }
        }
    }
}

impl Link {
    /// The vCPU enters guest code. True where it must flush its write translations first.
    #[must_use]
    pub(crate) fn enter(&self) -> bool {
        self.in_guest.store(true, Ordering::SeqCst);
        self.flush_requested()
    }

    /// The vCPU leaves guest code.
    pub(crate) fn leave(&self) {
        self.in_guest.store(false, Ordering::SeqCst);
    }

    /// True where a flush is asked for and not yet done.
    pub(crate) fn flush_requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst) != self.done.load(Ordering::SeqCst)
    }

    /// Flushes by `flush`, then says so.
    pub(crate) fn answer(&self, flush: impl FnOnce()) {
        let requested = self.requested.load(Ordering::SeqCst);
        flush();
        self.done.store(requested, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memory::Gpa;

    #[test]
    fn a_sleeping_vcpu_is_not_waited_for_but_flushes_when_it_comes_back() {
        let shared = Shared::new(GuestRam::new(&[(Gpa(0), 0x1000)]).unwrap());
        let (one, two) = (shared.link(Arc::default()), shared.link(Arc::default()));
        assert!(!one.enter());
        shared.flush_writers(&one, || {});
        assert!(two.enter());
        let mut flushed = false;
        two.answer(|| flushed = true);
        assert!(flushed && !two.flush_requested());
    }

    #[test]
    fn a_running_vcpu_is_waited_for() {
        let shared = Arc::new(Shared::new(GuestRam::new(&[(Gpa(0), 0x1000)]).unwrap()));
        let (one, two) = (shared.link(Arc::default()), shared.link(Arc::default()));
        assert!(!one.enter() && !two.enter());
        let other = Arc::clone(&two);
        let thread = std::thread::spawn(move || {
            other.signal.wait(Signals::ENGINE, None);
            other.answer(|| {});
        });
        shared.flush_writers(&one, || {});
        assert!(!two.flush_requested());
        thread.join().unwrap();
    }
}
