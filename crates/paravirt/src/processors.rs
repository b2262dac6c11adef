//! What vCPUs know of each other: who runs, who sleeps, who wants to keep its processor.
//!
//! Each vCPU has a thread, and the host's kernel schedules threads. Giving the processor up is what the monitor can do by
//! itself; keeping it means not giving it up in PAUSE loops.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering, fence};

use contract::native::run_state;
use engine::{Signal, Signals};

/// How often a boosted vCPU may keep its processor in a PAUSE loop.
const BOOST: u32 = 16;
/// How often a vCPU in a critical section may, one after the other.
const MOST_GRACE: u32 = 4;

/// One vCPU, as the others see it.
pub struct Place {
    pub(crate) signal: Arc<Signal>,
    /// Executes guest code, or is about to.
    in_guest: AtomicBool,
    run_state: AtomicU32,
    grace: AtomicU32,
    /// The vector of the notification event; 0 for none.
    pub(crate) event: AtomicU8,
}

impl Place {
    /// The place of the vCPU with this signal.
    pub fn new(signal: Arc<Signal>) -> Self {
        Self {
            signal,
            in_guest: AtomicBool::new(false),
            run_state: AtomicU32::new(run_state::RUNNING),
            grace: AtomicU32::new(0),
            event: AtomicU8::new(0),
        }
    }

    /// From now on the vCPU executes guest code, or no longer does. Behind it, what was asked of it before is seen.
    pub(crate) fn set_in_guest(&self, inside: bool) {
        self.in_guest.store(inside, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    pub(crate) fn set_run_state(&self, state: u32) {
        self.run_state.store(state, Ordering::Relaxed);
    }

    /// True where a processor given up could be of use to this vCPU.
    pub(crate) fn is_runnable(&self) -> bool {
        self.run_state.load(Ordering::Relaxed) == run_state::RUNNING
    }

    /// True where it sleeps, and has been asked to look at something: its thread is about to run, or wants to.
    pub(crate) fn is_roused(&self) -> bool {
        self.signal.pending().intersects(Signals::INTERRUPT | Signals::NMI | Signals::UNHALT | Signals::WAKE)
    }

    pub(crate) fn boost(&self) {
        self.grace.store(BOOST, Ordering::Relaxed);
    }

    /// Takes one of what a boost has left.
    pub(crate) fn take_grace(&self) -> bool {
        self.grace.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    /// True while the vCPU may go on with old translations.
    fn has_to_flush(&self) -> bool {
        self.in_guest.load(Ordering::SeqCst) && self.signal.pending().contains(Signals::FLUSH)
    }
}

/// Has `targets` forget their translations before they execute another instruction.
pub(crate) fn begin_flush(places: &[Place], targets: &[usize]) {
    targets.iter().for_each(|&target| places[target].signal.raise(Signals::FLUSH));
    fence(Ordering::SeqCst);
}

/// Waits until each of `targets` has, or is out of guest code and will before it comes back.
///
/// For vCPUs that are out of guest code themselves, also in the eyes of their engine: those who run may wait for them about
/// other things.
pub(crate) fn end_flush(places: &[Place], targets: &[usize]) {
    for &target in targets {
        while places[target].has_to_flush() {
            std::thread::yield_now(); // until its next look between two instructions
        }
    }
}

/// Whether a vCPU in a critical section keeps its processor, bounded.
#[derive(Default)]
pub(crate) struct Grace {
    used: u32,
}

impl Grace {
    /// Asked each time the processor would be given up.
    pub(crate) fn keeps(&mut self, critical: bool) -> bool {
        self.used = if critical && self.used < MOST_GRACE { self.used + 1 } else { 0 };
        self.used > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_critical_section_is_respected_a_bounded_number_of_times() {
        let mut grace = Grace::default();
        assert_eq!([true; 6].map(|critical| grace.keeps(critical)), [true, true, true, true, false, true]);
        assert_eq!([false, true].map(|critical| grace.keeps(critical)), [false, true]);
    }

    #[test]
    fn a_boost_is_used_up() {
        let place = Place::new(Arc::default());
        assert!(!place.take_grace());
        place.boost();
        assert_eq!((0..100).filter(|_| place.take_grace()).count(), BOOST as usize);
    }

    #[test]
    fn a_flush_waits_for_those_who_run_and_for_nobody_else() {
        let places: [Place; 3] = std::array::from_fn(|_| Place::new(Arc::default()));
        places[1].set_in_guest(true);
        std::thread::scope(|scope| {
            begin_flush(&places, &[0, 1, 2]);
            let flush = scope.spawn(|| end_flush(&places, &[0, 1, 2]));
            assert!(!flush.is_finished(), "vCPU 1 has not looked yet");
            places[1].signal.take(Signals::FLUSH);
            flush.join().unwrap();
        });
        let pending = [0, 1, 2].map(|index: usize| places[index].signal.pending().contains(Signals::FLUSH));
        assert_eq!(pending, [true, false, true], "those who do not run do it before they do");
    }
}
