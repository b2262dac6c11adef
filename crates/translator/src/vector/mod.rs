//! x87, MMX, SSE and AVX.
//!
//! The host's processor executes these instructions itself, one at a time: floating point is exactly as on hardware, and
//! nothing is emulated that the host can do.
//!
//! ```text
//!   instruction ─select─┬─ moves         loads, stores, copies, zeroing: plain Rust, no stub
//!                       ├─ masked        element by element: masked moves, gathers
//!                       ├─ x87, control  the x87 stack; environments, control and status words
//!                       ├─ save          FXSAVE, XSAVE and their siblings, XCR0, MXCSR
//!                       └─ native ──stub──> emit: the instruction with its operands in fixed places
//! ```
//!
//! `registers` says where the state is, `gate` when an instruction may run at all, `ours` which are this room's.
//! Deliberately absent (#UD): what no model offers, that is AVX-512, AMX, XOP, FMA4, 3DNow!, SSE4A, XSAVES.

mod emit;
mod gate;
mod masked;
mod moves;
mod native;
mod ours;
mod registers;
mod save;
mod stub;
mod x87;

#[cfg(test)]
mod tests;

use iced_x86::{EncodingKind, Instruction, OpKind};

use crate::cpu::Cpu;
use crate::decode::raise_ud;
use crate::op::{Handler, Op};

pub(crate) use emit::needs_alignment;
pub(crate) use ours::is_ours;
pub(crate) use registers::adopt;

/// The handler for a vector or floating-point instruction, where this is one. `bytes` start at the instruction.
pub(crate) fn select(instruction: &Instruction, bytes: &[u8], cpu: &mut Cpu, op: &mut Op) -> Option<Handler> {
    if !ours::is_ours(instruction) {
        return None;
    }
    if !crate::offered::offered(instruction, &cpu.features) {
        return Some(raise_ud);
    }
    let mut xmm = false;
    for position in 0..instruction.op_count().min(4) {
        if instruction.op_kind(position) == OpKind::Register {
            let register = instruction.op_register(position);
            let number = register.number() as u8;
            if register.is_xmm() || register.is_ymm() {
                xmm = true;
                op.reg[position as usize] = (registers::XMM / 16) as u8 + number;
            } else if register.is_mm() {
                op.reg[position as usize] = (registers::ST / 16) as u8 + number;
            }
        }
    }
    let handler = save::select(instruction, op)
        .or_else(|| moves::select(instruction, op))
        .or_else(|| masked::select(instruction, op))
        .or_else(|| x87::select(instruction, bytes, op));
    if handler.is_some() {
        return handler;
    }
    let stub = stub::get(instruction).filter(|stub| !stub.x87)?;
    if instruction.op_count() < 4 {
        op.reg[emit::IMPLICIT] = (registers::XMM / 16) as u8;
    }
    Some(native::handler(stub, instruction.encoding() == EncodingKind::VEX, xmm, op))
}
