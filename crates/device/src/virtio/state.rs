//! What all threads of one virtio device share: status, interrupts, counters.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::queue::NO_VECTOR;
use super::{Counters, Fault};
use crate::log_limit::LogLimit;
use crate::pci::FunctionInterrupts;

/// Device status bits (virtio 1.2, 2.1).
pub(super) mod status {
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const FEATURES_OK: u8 = 8;
    pub(crate) const NEEDS_RESET: u8 = 0x40;
}

/// ISR status: a queue has completions.
const ISR_QUEUE: u8 = 1;
/// ISR status: the configuration changed.
const ISR_CONFIG: u8 = 2;

/// The shared part of a device.
pub(super) struct DeviceState {
    name: String,
    status: AtomicU8,
    /// Negotiated features, valid from FEATURES_OK on.
    features: AtomicU64,
    generation: AtomicU8,
    config_vector: AtomicU16,
    /// The function may access guest memory (PCI command register). No reset of the device changes it.
    bus_master: AtomicBool,
    interrupts: OnceLock<FunctionInterrupts>,
    isr: Mutex<u8>,
    pub(super) counters: Counters,
    faults: LogLimit,
}

impl DeviceState {
    pub(super) fn new(name: String) -> Self {
        Self {
            name,
            status: AtomicU8::new(0),
            features: AtomicU64::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            bus_master: AtomicBool::new(false),
            interrupts: OnceLock::new(),
            isr: Mutex::new(0),
            counters: Counters::default(),
            faults: LogLimit::default(),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn connect(&self, interrupts: FunctionInterrupts) {
        // A second set of wires would be the bus's mistake; the first stays.
        let _ = self.interrupts.set(interrupts);
    }

    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn set_status_bits(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::SeqCst);
    }

    /// Back to the beginning; nothing runs from here on.
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.features.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        self.take_isr();
    }

    /// Notes whether the function may access guest memory; true where that is new.
    pub(super) fn set_bus_master(&self, bus_master: bool) -> bool {
        self.bus_master.swap(bus_master, Ordering::SeqCst) != bus_master
    }

    /// True while queues may be served: the device runs and may access guest memory.
    pub(super) fn serves(&self) -> bool {
        self.is_running() && self.bus_master.load(Ordering::SeqCst)
    }

    /// True while the driver is ready and has not gone wrong.
    pub(super) fn is_running(&self) -> bool {
        self.status() & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    pub(super) fn features(&self) -> u64 {
        self.features.load(Ordering::SeqCst)
    }

    pub(super) fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::SeqCst);
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::SeqCst)
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(vector, Ordering::SeqCst);
    }

    /// The driver broke the rules (virtio 1.2, 2.1.2): stop, say so to it and, not too often, to the log.
    pub(super) fn fail(&self, fault: &Fault) {
        let before = self.status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
        if before & status::NEEDS_RESET != 0 {
            return;
        }
        self.counters.fault();
        if let Some(times) = self.faults.pass() {
            tracing::warn!("{}: {fault}; the device needs a reset (fault {times})", self.name);
        }
        self.config_interrupt();
    }

    pub(super) fn queue_interrupt(&self, vector: u16) {
        self.interrupt(vector, ISR_QUEUE);
    }

    fn config_interrupt(&self) {
        if self.status() & status::DRIVER_OK != 0 {
            self.interrupt(self.config_vector(), ISR_CONFIG);
        }
    }

    fn interrupt(&self, vector: u16, cause: u8) {
        let Some(interrupts) = self.interrupts.get() else { return };
        if !interrupts.uses_messages() {
            // Held across the pin's change, so that a read of the ISR cannot lower the pin of a newer cause.
            let mut isr = self.isr.lock().unwrap_or_else(PoisonError::into_inner);
            *isr |= cause;
            interrupts.set_intx(true);
        } else if vector != NO_VECTOR {
            interrupts.message(vector);
        } else {
            return;
        }
        self.counters.interrupt();
    }

    /// Reads and clears the ISR status, which lowers the pin (virtio 1.2, 4.1.4.5).
    pub(super) fn take_isr(&self) -> u8 {
        let mut isr = self.isr.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(interrupts) = self.interrupts.get() {
            interrupts.set_intx(false);
        }
        std::mem::take(&mut *isr)
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.config_interrupt();
    }
}

/// A device's own way to what its transport knows.
#[derive(Clone)]
pub struct Link(pub(super) Arc<DeviceState>);

impl Link {
    /// The negotiated feature bits; 0 before negotiation is over.
    pub fn features(&self) -> u64 {
        self.0.features()
    }

    /// True while the driver is up.
    pub fn is_running(&self) -> bool {
        self.0.is_running()
    }

    /// The configuration structure changed: moves its generation and tells the driver.
    pub fn config_changed(&self) {
        self.0.config_changed();
    }

    /// The device's counters.
    pub fn counters(&self) -> &Counters {
        &self.0.counters
    }

    /// What the machine calls this device.
    pub fn name(&self) -> &str {
        self.0.name()
    }
}
