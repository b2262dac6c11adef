//! Interrupts: lines and messages from devices, chips that route them, pins of processors at the end.

use std::sync::Arc;

/// Where devices' interrupt lines end: the machine's interrupt chips together.
pub trait InterruptSink: Send + Sync {
    /// Sets the level of global system interrupt `gsi` (0..=23; 0..=15 also reach the PIC).
    fn set_line(&self, gsi: u32, level: bool);
    /// A message-signalled interrupt: a 32-bit write of `data` to `address` (Intel SDM vol. 3A, 11.11).
    fn message(&self, address: u64, data: u32);
}

/// One device's interrupt line.
#[derive(Clone)]
pub struct IrqLine {
    sink: Arc<dyn InterruptSink>,
    gsi: u32,
}

impl IrqLine {
    /// The line `gsi` of `sink`.
    pub fn new(sink: Arc<dyn InterruptSink>, gsi: u32) -> Self {
        Self { sink, gsi }
    }

    /// Sets the line's level.
    pub fn set(&self, level: bool) {
        self.sink.set_line(self.gsi, level);
    }

    /// Raises and lowers the line: one edge.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }

    /// Which line it is.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }
}

/// The pins of one processor that its local APIC drives. Implemented by the machine on the vCPU's signal.
pub trait CpuPins: Send + Sync {
    /// INTR: look at the local APIC (and the PIC) for a vector.
    fn interrupt(&self);
    /// A non-maskable interrupt.
    fn nmi(&self);
    /// INIT.
    fn init(&self);
    /// Start-up at `vector << 12`.
    fn startup(&self, vector: u8);
}
