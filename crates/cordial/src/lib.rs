//! The `cordial` program: command line, configuration, kernels, the guest's user space, output.
//!
//! ```text
//!   main ──> cli ──> settings (flags > environment > files) ──> values (typed, checked)
//!                        │
//!                        ├─ run:    kernel ──> initramfs ──> machine::Plan ──> machine ──> session ──> report
//!                        ├─ image:  kernel, cache
//!                        ├─ doctor: probes of all of these
//!                        └─ ps, contract: control ──> the processes that run machines
//! ```
//!
//! Neighbours: `machine` makes and runs what is planned here; `guest/init` answers [`session`] from inside.

pub mod cache;
pub mod cli;
pub mod console;
pub mod contract;
pub mod control;
pub mod copies;
pub mod doctor;
pub mod failure;
pub mod image;
pub mod initramfs;
pub mod kernel;
pub mod ps;
pub mod run;
pub mod session;
pub mod settings;
pub mod terminal;
pub mod userland;
pub mod values;
