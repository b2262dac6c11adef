//! The native dialect's host half. The specification is docs/contract.md.
//!
//! ```text
//!   CPUID ───> offer                         what can be found
//!   MSRs ────> Vcpu ─┬─> pages               where VM page, vCPU pages and hypercall page are
//!   VMCALL ──> calls ┤
//!                    ├─> Agreement           offered, accepted, revoked
//!                    ├─> WaitTable           who waits for which word
//!                    ├─> TimerSet            all vCPUs' timers on one alarm
//!                    └─> Clock, Policy       time, and how fine
//!   device ──> user                          what user space has
//!   machine <──────── Interrupts, Place      local APICs; what vCPUs know of each other
//! ```
//!
//! A [`Vm`] is what all vCPUs share, a [`Vcpu`] one's own side of it. Lock order: agreement, then pages, then the clock.

mod agreement;
mod calls;
mod offer;
mod pages;
mod policy;
mod timers;
mod user;
mod vcpu;
mod vm;
mod wait;

pub use agreement::Terms;
pub use offer::{BUILT, Calling, offer};
pub use policy::Policy;
pub use user::UserPages;
pub use vcpu::{Asleep, Vcpu};
pub use vm::{Parts, Vm};

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod fuzz_tests;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod storm_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod wait_stress;
