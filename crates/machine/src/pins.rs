//! The pins of a processor, as its local APIC drives them, on the vCPU's signal.
//!
//! A start-up IPI counts only while the processor waits for one, or is about to because of an INIT: the first after
//! each INIT. Guests send two (MultiProcessor Specification, B.4).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use device::interrupt::CpuPins;
use engine::{Signal, Signals};

/// One processor's pins.
pub(crate) struct Pins {
    signal: Arc<Signal>,
    accepts_startup: AtomicBool,
}

impl Pins {
    /// The pins of a processor that runs (the bootstrap processor) or waits for its start-up IPI.
    pub(crate) fn new(signal: Arc<Signal>, waits: bool) -> Self {
        Self { signal, accepts_startup: AtomicBool::new(waits) }
    }
}

impl CpuPins for Pins {
    fn interrupt(&self) {
        self.signal.raise(Signals::INTERRUPT);
    }

    fn nmi(&self) {
        self.signal.raise_nmi();
    }

    fn init(&self) {
        // A start-up not yet acted on is overridden, as is everything else.
        self.signal.take(Signals::STARTUP);
        self.accepts_startup.store(true, Ordering::SeqCst);
        self.signal.raise(Signals::INIT);
    }

    fn startup(&self, vector: u8) {
        if self.accepts_startup.swap(false, Ordering::SeqCst) {
            self.signal.raise_startup(vector);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_startup_after_an_init_counts() {
        let signal = Arc::new(Signal::default());
        let pins = Pins::new(Arc::clone(&signal), false);
        pins.startup(1);
        assert_eq!(signal.pending(), Signals::empty(), "a running processor ignores it");
        pins.init();
        pins.startup(2);
        pins.startup(3);
        assert_eq!((signal.pending(), signal.startup_vector()), (Signals::INIT | Signals::STARTUP, 2));
        signal.take(Signals::all());
        pins.startup(4);
        assert_eq!(signal.pending(), Signals::empty());
        pins.init();
        pins.startup(5);
        pins.init();
        assert_eq!(signal.pending(), Signals::INIT, "an INIT overrides an earlier start-up");
    }
}
