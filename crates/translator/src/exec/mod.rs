//! The integer instructions, one module a family.
//!
//! Each module's `select` looks at the decoded instruction once and returns a handler made for its operand kinds and
//! width; the handler itself decides nothing that the encoding already told.

mod alu;
mod bits;
mod bmi;
mod branch;
mod data;
mod decimal;
mod exchange;
mod hint;
mod multiply;
mod shift;
mod stack;
mod string;
mod unary;

use engine::cpu_model::Feature;
use iced_x86::{ConditionCode, Instruction};

use crate::cpu::Cpu;
use crate::op::{Handler, Op};

/// The handler for an integer instruction, where this is one. `bytes` start at the instruction.
pub(crate) fn select(instruction: &Instruction, bytes: &[u8], cpu: &Cpu, op: &mut Op) -> Option<Handler> {
    alu::select(instruction, op)
        .or_else(|| branch::select(instruction, op))
        .or_else(|| data::select(instruction, cpu, op))
        .or_else(|| stack::select(instruction, op))
        .or_else(|| shift::select(instruction))
        .or_else(|| unary::select(instruction))
        .or_else(|| string::select(instruction, op))
        .or_else(|| exchange::select(instruction, bytes, cpu, op))
        .or_else(|| multiply::select(instruction, cpu))
        .or_else(|| bits::select(instruction, cpu))
        .or_else(|| hint::select(instruction, cpu))
        .or_else(|| bmi::select(instruction, cpu))
        .or_else(|| decimal::select(instruction))
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

/// The condition of Jcc, SETcc, CMOVcc as the low four bits of its opcode.
fn condition_of(instruction: &Instruction) -> Option<u8> {
    match instruction.condition_code() {
        ConditionCode::None => None,
        // The enumeration is in the opcodes' order, after `None`.
        code => Some(code as u8 - 1),
    }
}

/// True where the CPU model offers a feature; what it does not offer is #UD, or decodes as what it was before.
fn offered(cpu: &Cpu, feature: Feature) -> bool {
    cpu.config.cpuid.has(feature)
}

/// The same for a feature whose instructions have a VEX prefix, which real and virtual-8086 mode take for LES and LDS.
fn offered_vex(cpu: &Cpu, feature: Feature) -> bool {
    !cpu.mode.real_segments() && offered(cpu, feature)
}
