//! How a run ends, from whichever thread it is decided on: once, for all vCPUs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use device::power::{PowerEvent, PowerSwitch};
use engine::{Signal, Signals};

use crate::Outcome;

/// What all vCPU threads and the machine's handle share about the end.
pub(crate) struct Control {
    signals: Vec<Arc<Signal>>,
    power: PowerSwitch,
    outcome: OnceLock<Outcome>,
    difference: OnceLock<String>,
    ending: AtomicBool,
}

impl Control {
    pub(crate) fn new(signals: Vec<Arc<Signal>>, power: PowerSwitch) -> Self {
        Self { signals, power, outcome: OnceLock::new(), difference: OnceLock::new(), ending: AtomicBool::new(false) }
    }

    /// Ends the run. The first reason counts.
    pub(crate) fn end(&self, outcome: Outcome) {
        let _ = self.outcome.set(outcome);
        self.stop_all();
    }

    /// Ends the run because a vCPU's engine does not agree with itself.
    pub(crate) fn end_by_difference(&self, vcpu: u32, rip: u64, difference: String) {
        let _ = self.difference.set(difference);
        self.end(Outcome::EngineDifference { vcpu, rip });
    }

    /// What the engine found wrong with itself.
    pub(crate) fn difference(&self) -> Option<String> {
        self.difference.get().cloned()
    }

    /// Gets every vCPU out of guest code and out of its sleep, for good.
    pub(crate) fn stop_all(&self) {
        self.ending.store(true, Ordering::SeqCst);
        self.signals.iter().for_each(|signal| signal.raise(Signals::STOP));
    }

    /// Ends the run where a device asked for it.
    pub(crate) fn follow_power(&self) {
        match self.power.event() {
            Some(PowerEvent::PowerOff) => self.end(Outcome::PowerOff),
            Some(PowerEvent::Reset) => self.end(Outcome::Reset),
            Some(PowerEvent::TestExit(status)) => self.end(Outcome::TestExit { status }),
            None => {}
        }
    }

    /// True once a device has asked for the end; one load.
    pub(crate) fn power_pressed(&self) -> bool {
        self.power.is_pressed()
    }

    /// True once the run is ending.
    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// Why the run ended, if it has.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        self.outcome.get().copied()
    }
}
