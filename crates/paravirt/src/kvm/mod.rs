//! The kvm dialect's host half: what stock Linux knows (Documentation/virt/kvm/x86/{cpuid,msr,hypercalls}.rst; the guest's
//! half is arch/x86/kernel/kvm.c).
//!
//! ```text
//!   MSRs ────> Vcpu ─┬─> Clock           the time page, the wall clock
//!                    ├─> StealTime       stolen time, the preempted flag, a flush that waits for the vCPU
//!                    └─> EOI byte        where an interrupt may end without an exit
//!   VMCALL ──> calls ──> Interrupts, Place, Clock
//! ```
//!
//! Deliberately absent: asynchronous page faults (MSRs 4b564d02h, 06h, 07h). All of guest RAM is there, so no page can be
//! missing; their place is beside `Vcpu::msr_write` once one can be. Page encryption and migration control
//! (MSR 4b564d08h, call 12) belong to encrypted guests, MMU operations (call 2) to the past.

mod calls;
mod vcpu;

use std::sync::Arc;

use memory::GuestRam;

use crate::{Clock, Features, Interrupts, Place};

pub(crate) use calls::Reply;
pub(crate) use vcpu::Vcpu;

/// What the vCPUs of one VM share, of this dialect and of both.
pub struct Vm {
    /// What is offered of this dialect; nothing where it is not spoken.
    pub features: Features,
    /// The VM's RAM.
    pub ram: GuestRam,
    /// Its clock.
    pub clock: Arc<Clock>,
    /// The host's clock.
    pub host: Arc<dyn host::Clock>,
    /// Its local APICs.
    pub interrupts: Arc<dyn Interrupts>,
    /// Its vCPUs.
    pub places: Arc<[Place]>,
}

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;
