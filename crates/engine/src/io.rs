//! The narrow way out of a vCPU that keeps it running: device access and questions only the machine can answer.
//!
//! Called on the thread that runs the vCPU. Widths are what the guest instruction used; engines split accesses that
//! cross a page first.

use memory::Gpa;

/// The guest named an MSR (or a value for it) that the machine does not know: the engine raises #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrRefused;

/// A VMCALL or VMMCALL by the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HypercallArgs {
    /// RAX: the call's number.
    pub number: u64,
    /// RBX, RCX, RDX, RSI (truncated to 32 bits outside 64-bit mode).
    pub args: [u64; 4],
    /// The privilege level it came from, 0..=3.
    pub cpl: u8,
    /// It came from 64-bit mode.
    pub wide: bool,
}

/// What the machine says to a hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The value for RAX.
    Now(u64),
    /// The vCPU sleeps first: the engine leaves with [`Exit::Waiting`](crate::Exit::Waiting) behind the instruction, and the
    /// value for RAX comes with [`Vcpu::answer`](crate::Vcpu::answer).
    Later,
}

/// What a vCPU asks its machine while running.
pub trait CpuIo {
    /// IN: `data` is 1, 2 or 4 bytes. Nobody there reads as all ones.
    fn port_read(&mut self, port: u16, data: &mut [u8]);
    /// OUT: `data` is 1, 2 or 4 bytes.
    fn port_write(&mut self, port: u16, data: &[u8]);
    /// A load from a guest-physical address that is not RAM, 1..=64 bytes within a page.
    fn mmio_read(&mut self, gpa: Gpa, data: &mut [u8]);
    /// A store to a guest-physical address that is not RAM.
    fn mmio_write(&mut self, gpa: Gpa, data: &[u8]);
    /// RDMSR of an MSR the engine does not own (APIC base, x2APIC, TSC deadline, paravirtual).
    ///
    /// # Errors
    /// [`MsrRefused`] where the machine does not know it either.
    fn msr_read(&mut self, index: u32) -> Result<u64, MsrRefused>;
    /// WRMSR of an MSR the engine does not own.
    ///
    /// # Errors
    /// [`MsrRefused`] where the machine does not know it, or the value sets reserved bits.
    fn msr_write(&mut self, index: u32, value: u64) -> Result<(), MsrRefused>;
    /// The guest moved its time-stamp counter (IA32_TSC, IA32_TSC_ADJUST): whoever told it the time may have to correct
    /// that. Called after the counter has moved.
    fn tsc_moved(&mut self) {}
    /// VMCALL / VMMCALL.
    fn hypercall(&mut self, call: HypercallArgs) -> Answer;
    /// The vector of the interrupt to deliver now, acknowledged (moved to in-service); `None` where none is
    /// deliverable. Called with interrupts enabled only. On an engine with local APICs of its own it is the PIC's.
    fn take_interrupt(&mut self) -> Option<u8>;
    /// The guest ended a level-triggered interrupt of `vector` that [`LocalApics::route`](crate::LocalApics::route) told
    /// the engine of. Only engines with local APICs of their own say so.
    fn end_of_interrupt(&mut self, _vector: u8) {}
    /// True where [`CpuIo::take_interrupt`] would return one; changes nothing.
    fn interrupt_pending(&mut self) -> bool;
    /// CR8: bits 7:4 of the task-priority register, 0..=15.
    fn task_priority(&mut self) -> u8;
    /// Writes CR8, 0..=15.
    fn set_task_priority(&mut self, priority: u8);
    /// True once a device wants the run to end (power-off, reset, test exit); asked after each device access.
    fn stop_requested(&self) -> bool;
}
