//! The host's half of the paravirtual contract.
//!
//! ```text
//!   CPUID ──> negotiation: what is offered
//!   MSRs  ──> Vcpu ─┬──> kvm ────┬──> Clock ──> one time page a vCPU and dialect, in guest RAM, read without an exit
//!   VMCALL ─> Vcpu ─┴──> native ─┤
//!                                └──> Interrupts, Place: local APICs, and what vCPUs know of each other
//! ```
//!
//! What is not offered is refused on use. An address a guest names is an allegation: checked before anything changes.
//!
//! Neighbours: `contract` has the numbers and layouts; the machine asks here for MSRs and hypercalls its devices do not
//! know. Nothing here knows an engine or a device.

mod clock;
mod eoi;
#[cfg(test)]
mod fixture;
mod interrupts;
pub mod kvm;
pub mod native;
mod negotiation;
mod processors;
mod seqlock;
mod stolen;
mod sync;
mod usage;
mod vcpu;

pub use clock::{Clock, ClockPage, TscScale};
pub use interrupts::Interrupts;
pub use negotiation::{Features, Rates, hide, offer, show};
pub use processors::Place;
pub use usage::{KvmUsage, Used};
pub use vcpu::Vcpu;
