//! What an engine may have beyond running guest code, where the host's kernel helps it: local APICs, stores that are told
//! without a callback, and the state that belongs to those.
//!
//! ```text
//!   device ── message, route ──> LocalApics ──> the vCPU, running or asleep
//!   guest  ── store ──> Doorbells ──> the counter of an eventfd, which a device waits for
//! ```
//!
//! Engines that have none of it leave the machine's own local APICs and callbacks in their place.

use std::os::fd::BorrowedFd;

use memory::Gpa;

/// The local APICs of an engine that has its own.
pub trait LocalApics: Send + Sync {
    /// Delivers a message-signalled interrupt: a 32-bit write of `data` to `address` (Intel SDM vol. 3A, 11.11). True where
    /// a local APIC accepted it.
    fn message(&self, address: u64, data: u32) -> bool;

    /// What pin `pin` of the I/O APIC sends while its line is up: address and data of a level-triggered message, or
    /// nothing. Ends of such interrupts come back by [`CpuIo::end_of_interrupt`](crate::CpuIo::end_of_interrupt).
    fn route(&self, pin: usize, message: Option<(u64, u32)>);
}

/// Addresses whose stores only add to a counter.
pub trait Doorbells: Send + Sync {
    /// From now on, a store of any width to `gpa` adds one to the eventfd `counter` and is not told otherwise. False where
    /// the host refuses; stores are then told as ever.
    fn attach(&self, gpa: Gpa, counter: BorrowedFd) -> bool;

    /// Takes that back.
    fn detach(&self, gpa: Gpa, counter: BorrowedFd);
}

/// An event that a vCPU was saved in the middle of: taken from its source, not yet seen by the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PendingEvent {
    /// An exception, with its error code where it has one.
    Exception(u8, Option<u32>),
    /// An external interrupt, acknowledged.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
}

/// What an engine keeps of a vCPU beside [`CpuState`](crate::CpuState).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelState {
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// The local APIC's registers, laid out as its page is (Intel SDM vol. 3A, table 11-1).
    pub apic: Box<[u8; 1024]>,
    /// The processor waits for a start-up IPI.
    pub waits_for_startup: bool,
    /// An event in the middle of its delivery.
    pub event: Option<PendingEvent>,
    /// Further MSRs, by number: the TSC deadline, speculation control, what the kvm dialect keeps.
    pub msrs: Vec<(u32, u64)>,
}
