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
pub mod boot;
mod error;
pub mod layout;
mod outcome;
pub mod plan;
mod run;

pub use error::Error;
pub use layout::Layout;
pub use outcome::{Attachments, Event, MemoryFigures, Outcome, Protocol, Report, SerialEnds};
pub use plan::Plan;
pub use run::{Handle, Machine, SelectedEngine, select_engine};
