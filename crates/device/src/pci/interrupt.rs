//! How a function interrupts: MSI-X messages, or a level on a pin that shares its line with other functions.

use std::sync::{Arc, Mutex, PoisonError};

use super::msix::Msix;
use crate::interrupt::IrqLine;

/// One interrupt line of the bus: asserted while any slot on it asserts its pin (wired-OR).
pub(super) struct SharedLine {
    line: IrqLine,
    /// Bit n: slot n asserts.
    asserting: Mutex<u32>,
}

impl SharedLine {
    pub(super) fn new(line: IrqLine) -> Self {
        Self { line, asserting: Mutex::new(0) }
    }

    /// The global system interrupt it is wired to.
    pub(super) fn gsi(&self) -> u32 {
        self.line.gsi()
    }

    fn set(&self, slot: u8, level: bool) {
        // Held across the line's change, so that two functions cannot leave the line at the older one's level.
        let mut asserting = self.asserting.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *asserting;
        *asserting = if level { before | 1 << slot } else { before & !(1 << slot) };
        if (before == 0) != (*asserting == 0) {
            self.line.set(level);
        }
    }
}

#[derive(Default)]
struct IntxState {
    /// What the device says.
    pending: bool,
    /// INTx disable of the command register.
    disabled: bool,
}

/// The INTA# pin of one function.
pub(super) struct Intx {
    line: Arc<SharedLine>,
    slot: u8,
    state: Mutex<IntxState>,
}

impl Intx {
    pub(super) fn new(line: Arc<SharedLine>, slot: u8) -> Self {
        Self { line, slot, state: Mutex::default() }
    }

    fn update(&self, change: impl FnOnce(&mut IntxState)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        self.line.set(self.slot, state.pending && !state.disabled);
    }

    /// The command register's INTx disable bit changed.
    pub(super) fn set_disabled(&self, disabled: bool) {
        self.update(|state| state.disabled = disabled);
    }

    /// The interrupt status bit: pending, disabled or not.
    pub(super) fn is_pending(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).pending
    }
}

/// The interrupt wires of one function, for whichever of its threads has something to say.
#[derive(Clone)]
pub struct FunctionInterrupts {
    msix: Option<Arc<Msix>>,
    intx: Option<Arc<Intx>>,
}

impl FunctionInterrupts {
    pub(super) fn new(msix: Option<Arc<Msix>>, intx: Option<Arc<Intx>>) -> Self {
        Self { msix, intx }
    }

    /// True while the guest has MSI-X on: then [`FunctionInterrupts::set_intx`] must not be used.
    pub fn uses_messages(&self) -> bool {
        self.msix.as_ref().is_some_and(|msix| msix.is_enabled())
    }

    /// Raises an MSI-X vector; kept pending while masked, lost while MSI-X is off.
    pub fn message(&self, vector: u16) {
        if let Some(msix) = &self.msix {
            msix.signal(vector);
        }
    }

    /// Sets the level of the function's pin.
    pub fn set_intx(&self, level: bool) {
        if let Some(intx) = &self.intx {
            intx.update(|state| state.pending = level);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::fixture::Recorder;

    #[test]
    fn a_shared_line_is_the_or_of_its_pins_and_the_disable_bit_takes_one_out() {
        let recorder = Arc::new(Recorder::default());
        let line = Arc::new(SharedLine::new(recorder.line(17)));
        let (first, second) = (Arc::new(Intx::new(line.clone(), 1)), Arc::new(Intx::new(line, 5)));
        let wires = |intx: &Arc<Intx>| FunctionInterrupts::new(None, Some(intx.clone()));
        wires(&first).set_intx(true);
        wires(&second).set_intx(true);
        wires(&first).set_intx(false);
        assert_eq!(recorder.lines(), [(17, true)]);
        second.set_disabled(true);
        assert!(second.is_pending(), "the status bit ignores the disable bit");
        second.set_disabled(false);
        wires(&second).set_intx(false);
        assert_eq!(recorder.lines(), [(17, false), (17, true), (17, false)]);
    }
}
