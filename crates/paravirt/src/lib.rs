//! The host's half of the paravirtual contract.
//!
//! ```text
//!   CPUID ──> negotiation: what is offered
//!   MSRs  ──> Vcpu ─┬──> Clock ──> one time page a vCPU and dialect, in guest RAM, read without an exit
//!   VMCALL ─> Vcpu ─┴──> native: the native dialect, where it is spoken
//! ```
//!
//! What is not offered is refused on use. An address a guest names is an allegation: checked before anything changes.
//!
//! Neighbours: `contract` has the numbers and layouts; the machine asks here for MSRs and hypercalls its devices do not
//! know. Nothing here knows an engine or a device.

mod clock;
pub mod native;
mod negotiation;
mod seqlock;
mod sync;
mod vcpu;

pub use clock::{Clock, ClockPage, TscScale};
pub use negotiation::{Features, Rates, hide, offer, show};
pub use vcpu::Vcpu;
