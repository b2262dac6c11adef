//! PCI: a host bridge, one bus of functions, and the two ways a guest reaches their configuration spaces.
//!
//! ```text
//!   0xCF8/0xCFC ──> ConfigPorts ──┐                    ┌─> ConfigSpace  (header, capabilities, write masks)
//!                                 ├──> PciBus ── slot ─┼─> Msix         (table, PBA, masks) ──> InterruptSink::message
//!   ECAM window ──> Ecam ─────────┘       │            ├─> Intx         (status, disable)   ──> IrqLine, wired-OR
//!                                         │            └─> PciFunction  (the device itself)
//!                                         └── BARs come and go on device::bus::Bus
//! ```
//!
//! Neighbours: `virtio` is the main [`PciFunction`]; the machine places [`PciBus::config_ports`] and [`PciBus::ecam`]
//! on its bus and describes [`PciBus::windows`] and [`PciBus::interrupt_routes`] in ACPI.
//!
//! Specification: PCI Local Bus 3.0, and PCI Express Base 7.2.2 for the enhanced configuration window. Deliberately
//! absent: bridges, expansion ROMs, power management, MSI (MSI-X only), and functions beyond 0.

use memory::Gpa;

mod bus;
mod config;
mod interrupt;
mod msix;

pub use bus::{ConfigPorts, Ecam, Error, PciBus, Route, Slot, Windows};
pub use config::{Bar, BarKind, Capability, ConfigSpace, Identity};
pub use interrupt::FunctionInterrupts;

/// What a function tells the bus about itself once, when it is added.
#[derive(Clone, Debug)]
pub struct Description {
    /// Vendor, device, class.
    pub identity: Identity,
    /// Its regions of ports and memory.
    pub bars: Vec<Bar>,
    /// Its capabilities beyond MSI-X, in list order.
    pub capabilities: Vec<Capability>,
    /// MSI-X: the BAR index its table gets (not among `bars`) and the number of vectors, 1..=2048.
    pub msix: Option<(u8, u16)>,
    /// True where it has an interrupt pin (INTA#).
    pub interrupt_pin: bool,
}

/// A single-function PCI device, as its bus sees it.
pub trait PciFunction: Send {
    /// What it is. Asked once.
    fn describe(&self) -> Description;

    /// Receives its interrupt wires. Called once, before any access.
    fn connect(&mut self, interrupts: FunctionInterrupts);

    /// A load of 1..=64 bytes from a BAR (ports: 1, 2 or 4).
    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]);

    /// A store of 1..=64 bytes to a BAR.
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]);

    /// Where a memory BAR is to be at first; a function that says nothing gets any place. It must be in the window.
    fn bar_place(&self, _bar: u8) -> Option<Gpa> {
        None
    }

    /// A memory BAR answers at this address from now on, or nowhere.
    fn bar_moved(&mut self, _bar: u8, _at: Option<Gpa>) {}

    /// The guest is about to read `length` bytes of configuration space at `offset`: bytes that change by themselves
    /// are put in place here.
    fn before_config_read(&mut self, _config: &mut ConfigSpace, _offset: usize, _length: usize) {}

    /// The guest has written `length` bytes of configuration space at `offset`.
    fn after_config_write(&mut self, _config: &mut ConfigSpace, _offset: usize, _length: usize) {}
}
