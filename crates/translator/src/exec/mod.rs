//! The integer instructions, one module a family.
//!
//! Each module's `select` looks at the decoded instruction once and returns a handler made for its operand kinds and
//! width; the handler itself decides nothing that the encoding already told.

mod alu;

use iced_x86::Instruction;

use crate::cpu::Cpu;
use crate::op::{Handler, Op};

/// The handler for an integer instruction, where this is one.
pub(crate) fn select(instruction: &Instruction, _cpu: &Cpu, op: &mut Op) -> Option<Handler> {
    alu::select(instruction, op)
}

/// Picks the instance of a handler for an operand width.
macro_rules! by_width {
    ($bytes:expr, $handler:ident $(, $argument:ty)*) => {
        match $bytes {
            1 => $handler::<$($argument,)* u8> as $crate::op::Handler,
            2 => $handler::<$($argument,)* u16>,
            4 => $handler::<$($argument,)* u32>,
            _ => $handler::<$($argument,)* u64>,
        }
    };
}
pub(crate) use by_width;

/// Bytes of the operand at `position`: a register's size, or the memory operand's.
pub(crate) fn operand_bytes(instruction: &Instruction, position: u32) -> usize {
    match instruction.op_kind(position) {
        iced_x86::OpKind::Register => instruction.op_register(position).size(),
        _ => instruction.memory_size().size(),
    }
}
