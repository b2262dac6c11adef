//! Delivery of exceptions and interrupts through the IVT or IDT (Intel SDM vol. 3A, chapter 6).

use crate::cpu::Cpu;
use crate::op::Leave;

/// The processor is in the shutdown state: a fault while delivering a double fault.
pub(crate) struct ShutDown;

impl Cpu {
    /// Delivers [`Cpu::exception`], RIP being what is to be pushed.
    pub(crate) fn deliver_exception(&mut self) -> Result<(), ShutDown> {
        Err(ShutDown)
    }

    /// Delivers an external interrupt.
    pub(crate) fn deliver_interrupt(&mut self, _vector: u8) -> Result<(), Leave> {
        Ok(())
    }

    /// Delivers an NMI.
    pub(crate) fn deliver_nmi(&mut self) -> Result<(), Leave> {
        Ok(())
    }

    /// Raises #DB for what is in [`Cpu::pending_debug`].
    pub(crate) fn raise_pending_debug(&mut self) -> Result<(), Leave> {
        Err(self.raise(1))
    }

    /// True where DR7 has a code breakpoint enabled.
    pub(crate) fn code_breakpoints(&self) -> bool {
        false
    }

    /// True where RIP is at a code breakpoint; notes it in [`Cpu::pending_debug`].
    pub(crate) fn at_code_breakpoint(&mut self) -> bool {
        false
    }

    /// Points the TLB at the address space CR3 names.
    pub(crate) fn select_address_space(&mut self) {}
}
