//! Composition: a plan becomes a machine and runs.
//!
//! ```text
//!   Plan (pure data) ──> Layout (pure function) ──> boot (kernel, tables into guest RAM)
//!                                                       │
//!        Report <── run (one thread a vCPU) <── assemble (devices on buses, paravirt on the VM, vCPUs on an engine)
//! ```
//!
//! Neighbours: `cordial` makes the plan and shows the report; `translator` and `kvm` run vCPUs; `device` and
//! `paravirt` answer what the guest asks for.

pub mod acpi;
mod announce;
mod board;
pub mod boot;
mod control;
mod dialects;
mod error;
mod firmware;
mod guest_io;
mod kernel_parts;
pub mod layout;
mod outcome;
mod pins;
pub mod plan;
mod processor;
mod run;
mod select;
pub mod smbios;
pub mod surfaces;
mod time;

pub use error::Error;
pub use layout::Layout;
pub use outcome::{Attachments, DeviceFigures, Event, MemoryFigures, Outcome, Protocol, Report, SerialEnds};
pub use plan::Plan;
pub use run::{Handle, Machine};
pub use select::{EngineWish, KvmReport, KvmStep, SelectedEngine, probe_kvm, select_engine};
