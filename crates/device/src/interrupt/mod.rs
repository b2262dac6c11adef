//! Interrupts: lines and messages from devices, chips that route them, pins of processors at the end.
//!
//! ```text
//!   IrqLine ──┬──> PIC ──────── LINT0 ────────┐
//!             └──> I/O APIC ──┐               ├──> local APIC ──> CpuPins
//!   MSI ──────────────────────┴── Message ────┘        └─ IPI, EOI: carried by InterruptChips
//! ```
//!
//! On an engine that has local APICs of its own, they take the place of the last two: [`ExternalApics`].
//!
//! [`InterruptChips`] composes them. Lock order: PIC, then I/O APIC, then one local APIC; none is held on the way back.

use std::sync::Arc;

mod chips;
#[cfg(test)]
pub(crate) mod fixture;
pub mod ioapic;
pub mod lapic;
mod message;
mod pic;

pub use chips::{Delivery, InterruptChips};
pub use ioapic::IoApic;
pub use lapic::{Lapic, LapicConfig, TscReference};
pub use message::{DeliveryMode, Destination, Effect, Message, Shorthand};
pub use pic::Pic;

/// The guest named a register that does not exist in the current mode, or set reserved bits: #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

/// Where devices' interrupt lines end: the machine's interrupt chips together.
pub trait InterruptSink: Send + Sync {
    /// Sets the level of global system interrupt `gsi` (0..=23; 0..=15 also reach the PIC).
    fn set_line(&self, gsi: u32, level: bool);
    /// A message-signalled interrupt: a 32-bit write of `data` to `address` (Intel SDM vol. 3A, 11.11).
    fn message(&self, address: u64, data: u32);
}

/// Local APICs that are not [`Lapic`]s: an engine's own, in the host's kernel. Implemented by the machine.
pub trait ExternalApics: Send + Sync {
    /// Delivers a message-signalled interrupt. True where a local APIC accepted it.
    fn message(&self, address: u64, data: u32) -> bool;
    /// What pin `pin` of the I/O APIC sends, as address and data, while it is level-triggered: the ends of such interrupts
    /// are to come back by [`InterruptChips::end_of_interrupt`].
    fn route(&self, pin: usize, message: Option<(u64, u32)>);
    /// The PIC has an interrupt for LINT0 of the bootstrap processor, to be taken by [`InterruptChips::take_interrupt`].
    fn pic_pending(&self);
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

/// An interrupt line whose device works its level out anew at each access: only changes reach the chips.
pub(crate) struct LevelLine {
    line: IrqLine,
    level: bool,
}

impl LevelLine {
    /// A line that is low.
    pub(crate) fn new(line: IrqLine) -> Self {
        Self { line, level: false }
    }

    /// Sets the line's level.
    pub(crate) fn set(&mut self, level: bool) {
        if level != std::mem::replace(&mut self.level, level) {
            self.line.set(level);
        }
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
