//! How a run ends, from whichever thread it is decided on: once, for all vCPUs. And how it pauses.
//!
//! ```text
//!              ┌─────── pause: STOP to all ──────┐
//!   vCPUs:  running ─> Exit::Stopped ─> hold ─> held ─> running       pause returns once none runs
//!                                         └── resume, or the end ──┘
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

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
    pause: Mutex<Pause>,
    /// Of what `pause` says, or of the end.
    changed: Condvar,
}

#[derive(Default)]
struct Pause {
    wanted: bool,
    /// vCPU threads that are not held.
    running: usize,
}

impl Control {
    pub(crate) fn new(signals: Vec<Arc<Signal>>, power: PowerSwitch) -> Self {
        Self {
            signals,
            power,
            outcome: OnceLock::new(),
            finding: OnceLock::new(),
            ending: AtomicBool::new(false),
            pause: Mutex::default(),
            changed: Condvar::new(),
        }
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
        drop(self.lock()); // nobody is between looking and waiting
        self.changed.notify_all();
        self.signals.iter().for_each(|signal| signal.raise(Signals::STOP));
    }

    /// Has all vCPUs stand still, and returns once they do. Not from a vCPU's thread.
    pub(crate) fn pause(&self) {
        self.ask_to_pause();
        let mut pause = self.lock();
        while pause.wanted && pause.running > 0 {
            pause = self.changed.wait(pause).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Has all vCPUs stand still soon.
    pub(crate) fn ask_to_pause(&self) {
        self.lock().wanted = true; // before they stop and look
        self.signals.iter().for_each(|signal| signal.raise(Signals::STOP));
    }

    /// Has them go on.
    pub(crate) fn resume(&self) {
        self.lock().wanted = false;
        self.changed.notify_all();
    }

    /// A vCPU's thread begins.
    pub(crate) fn enter(&self) {
        self.lock().running += 1;
    }

    /// It ends.
    pub(crate) fn leave(&self) {
        self.lock().running -= 1;
        self.changed.notify_all();
    }

    /// Holds a vCPU's thread while the run is paused. True where it was.
    pub(crate) fn hold(&self) -> bool {
        let mut pause = self.lock();
        if !pause.wanted {
            return false;
        }
        pause.running -= 1;
        self.changed.notify_all();
        while pause.wanted && !self.is_ending() {
            pause = self.changed.wait(pause).unwrap_or_else(PoisonError::into_inner);
        }
        pause.running += 1;
        true
    }

    fn lock(&self) -> MutexGuard<'_, Pause> {
        self.pause.lock().unwrap_or_else(PoisonError::into_inner)
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
