//! Everything privileged: exceptions and interrupts, segments and far transfers, control registers, MSRs, CPUID.

pub(crate) mod features;
mod interrupt;

use iced_x86::Instruction;

use crate::cpu::Cpu;
use crate::op::{Handler, Op};

/// The handler for a system instruction, where this is one.
pub(crate) fn select(_instruction: &Instruction, _cpu: &Cpu, _op: &mut Op) -> Option<Handler> {
    None
}
