//! The engine on `/dev/kvm`: the host's kernel and processor run guest code, this crate tells them what of.
//!
//! ```text
//!   GuestRam ──> memory slots ──┐
//!   CpuidTable, CpuState ──────>│  the host's KVM ──┬─ leave ──> Runner ──> CpuIo (port, mmio, msr), Exit
//!   LocalApics, Doorbells ─────>│                   └─ answered by itself: local APIC, timer, HLT, CPUID, doorbells
//!   Signal ──kick──────────────>┘
//! ```
//!
//! * `kvm.rs`: the VM: memory slots, what guests may be given, the engine's traits; `capability.rs`: what it needs.
//! * `vcpu.rs`: the loop around `KVM_RUN`; `leave.rs`: what it returned; `failure.rs`: what cannot be gone on with.
//! * `state.rs`, `kernel_state.rs`, `cpuid.rs`: pure translations between the engine's structures and KVM's.
//! * `kick.rs`, `run_page.rs`: how other threads reach a vCPU; `doze.rs`: how it sleeps while a hypercall waits.
//! * `probe/`: whether a guest as Linux would be runs here, found out by running one.
//!
//! Interrupt chips are split: local APICs in the host's kernel, I/O APIC and PIC in the machine. docs/kvm.md says why.
//!
//! Neighbours: `machine` chooses between this engine and `translator`, and brings devices and local APICs together.
#![allow(unsafe_code)] // the fence: system calls, and memory shared with the host's kernel

mod capability;
mod cpuid;
mod dirty;
mod doorbell;
mod doze;
mod failure;
mod interrupt;
mod kernel_state;
mod kick;
mod kvm;
mod leave;
pub mod probe;
mod run_page;
mod state;
mod stats;
mod sys;
#[cfg(test)]
mod tests;
mod vcpu;

pub use capability::{CAPABILITIES, Capability};
pub use dirty::DirtyPages;
pub use kvm::{Config, Kvm};
