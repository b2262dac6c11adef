//! The devices of a PC that guests know without asking: console, clocks and timers, power, and what test kernels expect.
//!
//! ```text
//!   serial ── IRQ 4      pit ── IRQ 0 ─┐                acpi, reset, i8042, debug::DebugExit ──> PowerSwitch
//!                        rtc ── IRQ 8 ─┴─ or hpet       debug, fw_cfg, testdev: for test kernels
//! ```
//!
//! Each is a state machine behind one lock, driven by port or memory accesses and, where it keeps time, by a
//! [`host::Timer`].

pub mod acpi;
pub mod debug;
pub mod fw_cfg;
pub mod hpet;
pub mod i8042;
pub mod pit;
pub mod reset;
pub mod rtc;
pub mod serial;
pub mod testdev;
