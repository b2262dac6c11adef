//! How a device ends the run of its machine: power-off, reset, test exit.
//!
//! ```text
//!   ACPI PM1 control, reset port, keyboard controller, debug-exit port ──> PowerSwitch ──> machine
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// What a guest asked of its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// ACPI S5.
    PowerOff,
    /// Any of the reset ports.
    Reset,
    /// The debug-exit port; the status for the monitor's process, always odd.
    TestExit(u8),
}

#[derive(Default)]
struct Shared {
    pressed: AtomicBool,
    event: Mutex<Option<PowerEvent>>,
    changed: Condvar,
}

/// Where devices leave a [`PowerEvent`] and the machine finds it. Clones share it. The first event counts until taken.
#[derive(Clone, Default)]
pub struct PowerSwitch(Arc<Shared>);

impl PowerSwitch {
    /// Asks for `event`; ignored where another is waiting to be taken.
    pub fn press(&self, event: PowerEvent) {
        self.0.event.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(event);
        self.0.pressed.store(true, Ordering::Release);
        self.0.changed.notify_all();
    }

    /// True where an event waits. One load: cheap enough to ask after each device access.
    pub fn is_pressed(&self) -> bool {
        self.0.pressed.load(Ordering::Acquire)
    }

    /// The event, if any; it stays.
    pub fn event(&self) -> Option<PowerEvent> {
        *self.0.event.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the event, if any, so that the next counts.
    pub fn take(&self) -> Option<PowerEvent> {
        let mut event = self.0.event.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.pressed.store(false, Ordering::Release);
        event.take()
    }

    /// Waits for an event; it stays.
    pub fn wait(&self) -> PowerEvent {
        let mut event = self.0.event.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(event) = *event {
                return event;
            }
            event = self.0.changed.wait(event).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_event_counts_until_taken() {
        let switch = PowerSwitch::default();
        assert!(!switch.is_pressed());
        let presser = switch.clone();
        std::thread::spawn(move || presser.press(PowerEvent::TestExit(3))).join().unwrap();
        switch.press(PowerEvent::Reset);
        assert!(switch.is_pressed());
        assert_eq!(switch.wait(), PowerEvent::TestExit(3));
        assert_eq!(switch.take(), Some(PowerEvent::TestExit(3)));
        assert_eq!((switch.is_pressed(), switch.event()), (false, None));
        switch.press(PowerEvent::PowerOff);
        assert_eq!(switch.event(), Some(PowerEvent::PowerOff));
    }
}
