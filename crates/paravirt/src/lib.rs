//! The host's half of the paravirtual contract.
//!
//! ```text
//!   CPUID ──> negotiation: what is offered
//!   MSRs  ──> Vcpu ──> Clock ──> one time page a vCPU, in guest RAM, read without an exit
//!   VMCALL ─> Vcpu::hypercall
//! ```
//!
//! What is not offered is refused on use. An address a guest names is an allegation: checked before anything changes.
//!
//! Neighbours: `contract` has the numbers and layouts; the machine asks here for MSRs and hypercalls its devices do not
//! know. Nothing here knows an engine or a device.

mod clock;
mod negotiation;
mod vcpu;

pub use clock::{Clock, TscScale};
pub use negotiation::{Features, Rates, hide, offer};
pub use vcpu::Vcpu;
