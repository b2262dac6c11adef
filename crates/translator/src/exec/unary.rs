//! INC, DEC, NEG and NOT.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{by_width, operand_bytes};
use crate::cpu::Cpu;
use crate::flags::Flags;
use crate::op::{Done, Handler, Op};
use crate::width::Width;

/// A one-operand operation.
trait Unary {
    fn result<W: Width>(a: W) -> W;
    fn flags<W: Width>(flags: &mut Flags, a: W, result: W);
}

struct Inc;
struct Dec;
struct Neg;
struct Not;

impl Unary for Inc {
    #[inline(always)]
    fn result<W: Width>(a: W) -> W {
        W::of(a.zext().wrapping_add(1))
    }
    #[inline(always)]
    fn flags<W: Width>(flags: &mut Flags, a: W, result: W) {
        let cf = flags.cf();
        flags.add(a, W::of(1), result);
        flags.set_cf(cf);
    }
}

impl Unary for Dec {
    #[inline(always)]
    fn result<W: Width>(a: W) -> W {
        W::of(a.zext().wrapping_sub(1))
    }
    #[inline(always)]
    fn flags<W: Width>(flags: &mut Flags, a: W, result: W) {
        let cf = flags.cf();
        flags.sub(a, W::of(1), result);
        flags.set_cf(cf);
    }
}

impl Unary for Neg {
    #[inline(always)]
    fn result<W: Width>(a: W) -> W {
        W::of(a.zext().wrapping_neg())
    }
    #[inline(always)]
    fn flags<W: Width>(flags: &mut Flags, a: W, result: W) {
        flags.sub(W::of(0), a, result);
    }
}

impl Unary for Not {
    #[inline(always)]
    fn result<W: Width>(a: W) -> W {
        W::of(!a.zext())
    }
    #[inline(always)]
    fn flags<W: Width>(_flags: &mut Flags, _a: W, _result: W) {}
}

pub(super) fn select(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Inc => forms::<Inc>(instruction),
        Mnemonic::Dec => forms::<Dec>(instruction),
        Mnemonic::Neg => forms::<Neg>(instruction),
        Mnemonic::Not => forms::<Not>(instruction),
        _ => return None,
    })
}

fn forms<U: Unary>(instruction: &Instruction) -> Handler {
    let bytes = operand_bytes(instruction, 0);
    match instruction.op0_kind() {
        OpKind::Register => by_width!(bytes, register, U),
        _ => by_width!(bytes, memory, U),
    }
}

fn register<U: Unary, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let a = cpu.get::<W>(op.reg[0]);
    let result = U::result(a);
    U::flags(&mut cpu.flags, a, result);
    cpu.set(op.reg[0], result);
    Ok(())
}

fn memory<U: Unary, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let (a, result) = cpu.modify::<W>(op, U::result)?;
    U::flags(&mut cpu.flags, a, result);
    Ok(())
}
