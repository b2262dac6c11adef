//! What the vCPUs of one VM owe each other about pages that hold code.
//!
//! A vCPU that is about to read code from a page for the first time must know that no other vCPU still writes there by
//! its fast path, which would not move the page's version. And one that has overwritten code must know that no other
//! still runs what was made of it. So it tells all others which page it is about, and waits until each has answered, or
//! is seen outside guest code (it answers when it comes back).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use engine::{Signal, Signals};
use memory::{Gpa, GuestRam};

use crate::config::Config;
use crate::lockstep::Queue;

/// Stands for all pages in what [`Link::answer`] hands out.
pub(crate) const EVERY_PAGE: Gpa = Gpa(u64::MAX);
/// Pages remembered one by one.
const MOST_PAGES: usize = 1024;

/// One VM's engine-wide state.
pub(crate) struct Shared {
    /// Guest RAM.
    pub ram: GuestRam,
    /// How the engine is to work.
    pub config: Config,
    links: Mutex<Vec<Arc<Link>>>,
    /// Whose turn it is to run guest code, where the engine is checked.
    pub turns: Queue,
    /// Taken for locked accesses that cross a page, which no host instruction can do for us.
    pub split_lock: Mutex<()>,
}

/// One vCPU as the others see it.
pub(crate) struct Link {
    signal: Arc<Signal>,
    requested: AtomicU64,
    done: AtomicU64,
    in_guest: AtomicBool,
    pages: Mutex<Vec<Gpa>>,
}

impl Shared {
    pub(crate) fn new(ram: GuestRam, config: Config) -> Self {
        Self { ram, config, links: Mutex::default(), turns: Queue::default(), split_lock: Mutex::default() }
    }

    /// Registers a vCPU.
    pub(crate) fn link(&self, signal: Arc<Signal>) -> Arc<Link> {
        let link = Arc::new(Link {
            signal,
            requested: AtomicU64::new(0),
            done: AtomicU64::new(0),
            in_guest: AtomicBool::new(false),
            pages: Mutex::default(),
        });
        self.links.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&link));
        link
    }

    /// How many vCPUs there are.
    pub(crate) fn vcpus(&self) -> usize {
        self.links.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Makes every vCPU but `own` forget how it writes to the page of `gpa`, and what it made of stale code there; `serve`
    /// is called while waiting, to answer others' requests of the same kind.
    pub(crate) fn tell_others(&self, own: &Arc<Link>, gpa: Gpa, mut serve: impl FnMut()) {
        let others: Vec<(Arc<Link>, u64)> = {
            let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
            let others = links.iter().filter(|link| !Arc::ptr_eq(link, own));
            others.map(|link| (Arc::clone(link), link.request(gpa))).collect()
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
    /// Asks for an answer about a page. Returns the number of the request.
    fn request(&self, gpa: Gpa) -> u64 {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        match pages.as_slice() {
            [EVERY_PAGE] => {}
            // A vCPU that sleeps for long need not know them one by one.
            many if many.len() >= MOST_PAGES => *pages = vec![EVERY_PAGE],
            _ => pages.push(gpa),
        }
        drop(pages);
        self.requested.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// The vCPU enters guest code. True where it must answer first.
    #[must_use]
    pub(crate) fn enter(&self) -> bool {
        self.in_guest.store(true, Ordering::SeqCst);
        self.asked()
    }

    /// The vCPU leaves guest code.
    pub(crate) fn leave(&self) {
        self.in_guest.store(false, Ordering::SeqCst);
    }

    /// True where an answer is owed.
    pub(crate) fn asked(&self) -> bool {
        self.requested.load(Ordering::SeqCst) != self.done.load(Ordering::SeqCst)
    }

    /// Answers: `forget` is called with the pages it is about, then others may go on.
    pub(crate) fn answer(&self, forget: impl FnOnce(Vec<Gpa>)) {
        let requested = self.requested.load(Ordering::SeqCst);
        forget(std::mem::take(&mut *self.pages.lock().unwrap_or_else(PoisonError::into_inner)));
        self.done.store(requested, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleeping_vcpu_is_not_waited_for_but_flushes_when_it_comes_back() {
        let shared = Shared::new(GuestRam::new(&[(Gpa(0), 0x1000)]).unwrap(), Config::default());
        let (one, two) = (shared.link(Arc::default()), shared.link(Arc::default()));
        assert!(!one.enter());
        shared.tell_others(&one, Gpa(0x5000), || {});
        assert!(two.enter());
        let mut pages = Vec::new();
        two.answer(|asked| pages = asked);
        assert_eq!(pages, [Gpa(0x5000)]);
        assert!(!two.asked());
    }

    #[test]
    fn a_running_vcpu_is_waited_for() {
        let shared = Arc::new(Shared::new(GuestRam::new(&[(Gpa(0), 0x1000)]).unwrap(), Config::default()));
        let (one, two) = (shared.link(Arc::default()), shared.link(Arc::default()));
        assert!(!one.enter() && !two.enter());
        let other = Arc::clone(&two);
        let thread = std::thread::spawn(move || {
            other.signal.wait(Signals::ENGINE, None);
            other.answer(|_| {});
        });
        shared.tell_others(&one, Gpa(0), || {});
        assert!(!two.asked());
        thread.join().unwrap();
    }
}
