//! What a guest finds on its buses.
//!
//! ```text
//!   CpuIo (machine) ──> Bus ──> devices ──> IrqLine ──> PIC, I/O APIC ──> local APICs ──> CpuPins (machine)
//!                                   └─────> MessageSink (MSI) ───────────────┘
//! ```
//!
//! Devices never see vCPUs: they pull interrupt lines or send messages, and the local APICs drive [`interrupt::CpuPins`].
//! Lock order: a device's own lock, then the interrupt chips', never the reverse.

pub mod bus;
pub mod contract;
pub mod emulated;
pub mod interrupt;
mod log_limit;
pub mod pci;
pub mod power;
pub mod virtio;
