//! Everything privileged: exceptions and interrupts, segments and far transfers, control registers, MSRs, CPUID.

mod control;
mod descriptor;
mod far;
pub(crate) mod features;
mod interrupt;
mod io;
mod msr;
mod segment;
mod syscall;
mod task;

use iced_x86::Instruction;

use crate::op::{Handler, Op};

/// The handler for a system instruction, where this is one.
pub(crate) fn select(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    control::select(instruction, op)
        .or_else(|| segment::select(instruction, op))
        .or_else(|| far::select(instruction, op))
        .or_else(|| interrupt::select(instruction, op))
        .or_else(|| syscall::select(instruction, op))
        .or_else(|| msr::select(instruction, op))
        .or_else(|| io::select(instruction, op))
}
