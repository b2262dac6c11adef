//! BMI1 and BMI2 but TZCNT and MULX: ANDN, BEXTR, BLSI, BLSMSK, BLSR, BZHI, PDEP, PEXT, RORX, SARX, SHLX, SHRX.
//!
//! All are VEX-encoded, which real and virtual-8086 mode do not know.

use engine::cpu_model::Feature;
use engine::state::rflags::{AF, SF};
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{by_width, offered_vex, operand_bytes};
use crate::cpu::Cpu;
use crate::decode::raise_ud;
use crate::flags::Flags;
use crate::op::{Done, Handler, Op};
use crate::width::Width;

pub(super) fn select(instruction: &Instruction, cpu: &Cpu) -> Option<Handler> {
    let (feature, handler) = match instruction.mnemonic() {
        Mnemonic::Andn => (Feature::Bmi1, three::<Andn>(instruction)),
        Mnemonic::Bextr => (Feature::Bmi1, three::<Bextr>(instruction)),
        Mnemonic::Blsi => (Feature::Bmi1, three::<Blsi>(instruction)),
        Mnemonic::Blsmsk => (Feature::Bmi1, three::<Blsmsk>(instruction)),
        Mnemonic::Blsr => (Feature::Bmi1, three::<Blsr>(instruction)),
        Mnemonic::Bzhi => (Feature::Bmi2, three::<Bzhi>(instruction)),
        Mnemonic::Pdep => (Feature::Bmi2, three::<Pdep>(instruction)),
        Mnemonic::Pext => (Feature::Bmi2, three::<Pext>(instruction)),
        Mnemonic::Rorx => (Feature::Bmi2, three::<Rorx>(instruction)),
        Mnemonic::Sarx => (Feature::Bmi2, three::<Sarx>(instruction)),
        Mnemonic::Shlx => (Feature::Bmi2, three::<Shlx>(instruction)),
        Mnemonic::Shrx => (Feature::Bmi2, three::<Shrx>(instruction)),
        _ => return None,
    };
    Some(if offered_vex(cpu, feature) { handler } else { raise_ud })
}

/// The operation: `a` is the first source, `b` the second (register, memory or immediate; 0 where there is one only).
trait Bmi {
    fn result<W: Width>(a: W, b: W) -> W;
    fn flags<W: Width>(flags: &mut Flags, a: W, b: W, result: W);
}

macro_rules! bmi {
    ($name:ident, |$a:ident, $b:ident, $bits:ident| $result:expr $(, |$flags:ident, $r:ident| $set:expr)?) => {
        struct $name;
        impl Bmi for $name {
            #[inline(always)]
            fn result<W: Width>(a: W, b: W) -> W {
                let ($a, $b, $bits) = (a.zext(), b.zext(), u64::from(W::BITS));
                let _ = ($b, $bits);
                W::of($result)
            }
            #[inline(always)]
            #[allow(unused_variables)] // most look at some of them
            fn flags<W: Width>(flags: &mut Flags, a: W, b: W, result: W) {
                $(
                    let ($a, $b, $bits) = (a.zext(), b.zext(), u64::from(W::BITS));
                    let ($flags, $r) = (flags, result);
                    $set;
                )?
            }
        }
    };
}

bmi!(Andn, |a, b, bits| !a & b, |flags, r| flags.logic(r));
bmi!(Bextr, |a, b, bits| extract(a, b & 0xff, b >> 8 & 0xff), |flags, r| flags_of_bextr(flags, r));
bmi!(Blsi, |a, b, bits| a & a.wrapping_neg(), |flags, r| flags.result_with(r, a != 0, false));
bmi!(Blsmsk, |a, b, bits| a ^ a.wrapping_sub(1), |flags, r| flags.result_with(r, a == 0, false));
bmi!(Blsr, |a, b, bits| a & a.wrapping_sub(1), |flags, r| flags.result_with(r, a == 0, false));
bmi!(Bzhi, |a, b, bits| low_bits(a, b & 0xff), |flags, r| flags.result_with(r, b & 0xff >= bits, false));
bmi!(Pdep, |a, b, bits| deposit(a, b));
bmi!(Pext, |a, b, bits| collect(a, b));
bmi!(Rorx, |a, b, bits| a >> (b % bits) | a.checked_shl((bits - b % bits) as u32).unwrap_or(0));
bmi!(Sarx, |a, b, bits| (W::of(a).sext() as i64 >> (b % bits)) as u64);
bmi!(Shlx, |a, b, bits| a << (b % bits));
bmi!(Shrx, |a, b, bits| a >> (b % bits));

/// AF and SF are undefined; AMD's processors set the one and clear the other.
fn flags_of_bextr<W: Width>(flags: &mut Flags, result: W) {
    flags.logic(result);
    flags.change(AF | SF, AF);
}

fn low_bits(value: u64, count: u64) -> u64 {
    if count >= 64 { value } else { value & ((1 << count) - 1) }
}

fn extract(value: u64, start: u64, length: u64) -> u64 {
    low_bits(value.checked_shr(start as u32).unwrap_or(0), length)
}

/// PDEP: the low bits of `value` go where `mask` has ones.
fn deposit(value: u64, mut mask: u64) -> u64 {
    let (mut result, mut value) = (0, value);
    while mask != 0 {
        if value & 1 != 0 {
            result |= mask & mask.wrapping_neg();
        }
        value >>= 1;
        mask &= mask - 1;
    }
    result
}

/// PEXT: the bits of `value` where `mask` has ones, packed.
fn collect(value: u64, mut mask: u64) -> u64 {
    let (mut result, mut at) = (0, 0);
    while mask != 0 {
        let bit = value >> mask.trailing_zeros() & 1;
        result |= bit << at;
        at += 1;
        mask &= mask - 1;
    }
    result
}

/// By where the sources are. For BEXTR, BZHI and the shifts the register or memory operand comes first and the count
/// second; for ANDN, PDEP and PEXT it is the other way round.
fn three<B: Bmi>(instruction: &Instruction) -> Handler {
    let bytes = operand_bytes(instruction, 0);
    let second = if instruction.op_count() == 3 { Some(instruction.op2_kind()) } else { None };
    match (instruction.op1_kind(), second) {
        (OpKind::Register, Some(OpKind::Register)) => by_width!(bytes, register_register, B),
        (OpKind::Register, Some(OpKind::Memory)) => by_width!(bytes, register_memory, B),
        (OpKind::Memory, Some(OpKind::Register)) => by_width!(bytes, memory_register, B),
        (OpKind::Register, _) => by_width!(bytes, register_immediate, B),
        _ => by_width!(bytes, memory_immediate, B),
    }
}

#[inline(always)]
fn finish<B: Bmi, W: Width>(cpu: &mut Cpu, op: &Op, a: W, b: W) -> Done {
    let result = B::result(a, b);
    B::flags(&mut cpu.flags, a, b, result);
    cpu.set(op.reg[0], result);
    Ok(())
}

fn register_register<B: Bmi, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let (a, b) = (cpu.get::<W>(op.reg[1]), cpu.get::<W>(op.reg[2]));
    finish::<B, W>(cpu, op, a, b)
}

fn register_memory<B: Bmi, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let b = cpu.load::<W>(&op.mem)?;
    let a = cpu.get::<W>(op.reg[1]);
    finish::<B, W>(cpu, op, a, b)
}

fn memory_register<B: Bmi, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let a = cpu.load::<W>(&op.mem)?;
    let b = cpu.get::<W>(op.reg[2]);
    finish::<B, W>(cpu, op, a, b)
}

fn register_immediate<B: Bmi, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let a = cpu.get::<W>(op.reg[1]);
    finish::<B, W>(cpu, op, a, W::of(op.imm))
}

fn memory_immediate<B: Bmi, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let a = cpu.load::<W>(&op.mem)?;
    finish::<B, W>(cpu, op, a, W::of(op.imm))
}
