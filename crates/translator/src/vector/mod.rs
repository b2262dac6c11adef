//! x87, MMX, SSE and AVX.

use iced_x86::Instruction;

use crate::cpu::Cpu;
use crate::op::{Handler, Op};

/// The handler for a vector or floating-point instruction, where this is one. `bytes` start at the instruction.
pub(crate) fn select(_instruction: &Instruction, _bytes: &[u8], _cpu: &mut Cpu, _op: &mut Op) -> Option<Handler> {
    None
}
