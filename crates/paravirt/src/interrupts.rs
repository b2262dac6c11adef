//! How the contract reaches local APICs, which are not this crate's to know.

/// The local APICs of one VM. Implemented by the machine.
pub trait Interrupts: Send + Sync {
    /// A fixed, edge-triggered interrupt to a vCPU.
    fn raise(&self, vcpu: u32, vector: u8);
    /// An inter-processor interrupt to a vCPU, as the low half of an interrupt command has it: vector in bits 7:0, delivery
    /// mode in bits 10:8 (Intel SDM vol. 3A, 11.6.1). True where the local APIC accepted it.
    fn send(&self, vcpu: u32, command: u32) -> bool;
    /// The vCPU is done with the interrupt in service.
    fn end(&self, vcpu: u32);
}
