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
    finding: OnceLock<String>,
    ending: AtomicBool,
}

impl Control {
    pub(crate) fn new(signals: Vec<Arc<Signal>>, power: PowerSwitch) -> Self {
        Self { signals, power, outcome: OnceLock::new(), finding: OnceLock::new(), ending: AtomicBool::new(false) }
    }

    /// Ends the run. The first reason counts.
    pub(crate) fn end(&self, outcome: Outcome) {
        let _ = self.outcome.set(outcome);
        self.stop_all();
    }

    /// Ends the run because of what an engine found.
    pub(crate) fn end_with(&self, outcome: Outcome, finding: String) {
        let _ = self.finding.set(finding);
        self.end(outcome);
    }

    /// What an engine found that ended the run.
    pub(crate) fn finding(&self) -> Option<String> {
        self.finding.get().cloned()
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
