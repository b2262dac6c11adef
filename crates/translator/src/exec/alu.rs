//! ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST (Intel SDM vol. 2).

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{by_width, operand_bytes};
use crate::cpu::Cpu;
use crate::flags::Flags;
use crate::op::{Done, Handler, Op};
use crate::width::Width;

/// A two-operand operation on the status flags and a result.
trait Binary {
    /// The result is written back (not for CMP and TEST).
    const WRITES: bool = true;
    /// The result.
    fn result<W: Width>(a: W, b: W, carry: bool) -> W;
    /// The flags of that result.
    fn flags<W: Width>(flags: &mut Flags, a: W, b: W, result: W);
}

macro_rules! binary {
    ($name:ident, $writes:literal, |$a:ident, $b:ident, $carry:ident| $result:expr, $flags:ident) => {
        struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn result<W: Width>(a: W, b: W, carry: bool) -> W {
                let ($a, $b, $carry) = (a.zext(), b.zext(), u64::from(carry));
                let _ = $carry;
                W::of($result)
            }
            #[inline(always)]
            fn flags<W: Width>(flags: &mut Flags, a: W, b: W, result: W) {
                binary!(@$flags flags, a, b, result);
            }
        }
    };
    (@add $flags:ident, $a:ident, $b:ident, $r:ident) => { $flags.add($a, $b, $r) };
    (@sub $flags:ident, $a:ident, $b:ident, $r:ident) => { $flags.sub($a, $b, $r) };
    (@logic $flags:ident, $a:ident, $b:ident, $r:ident) => { { let _ = ($a, $b); $flags.logic($r) } };
}

binary!(Add, true, |a, b, carry| a.wrapping_add(b), add);
binary!(Adc, true, |a, b, carry| a.wrapping_add(b).wrapping_add(carry), add);
binary!(Sub, true, |a, b, carry| a.wrapping_sub(b), sub);
binary!(Sbb, true, |a, b, carry| a.wrapping_sub(b).wrapping_sub(carry), sub);
binary!(Cmp, false, |a, b, carry| a.wrapping_sub(b), sub);
binary!(And, true, |a, b, carry| a & b, logic);
binary!(Or, true, |a, b, carry| a | b, logic);
binary!(Xor, true, |a, b, carry| a ^ b, logic);
binary!(Test, false, |a, b, carry| a & b, logic);

pub(super) fn select(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Add => forms::<Add>(instruction, op),
        Mnemonic::Adc => forms::<Adc>(instruction, op),
        Mnemonic::Sub => forms::<Sub>(instruction, op),
        Mnemonic::Sbb => forms::<Sbb>(instruction, op),
        Mnemonic::Cmp => forms::<Cmp>(instruction, op),
        Mnemonic::And => forms::<And>(instruction, op),
        Mnemonic::Or => forms::<Or>(instruction, op),
        Mnemonic::Xor => forms::<Xor>(instruction, op),
        Mnemonic::Test => forms::<Test>(instruction, op),
        _ => return None,
    })
}

fn forms<B: Binary>(instruction: &Instruction, op: &Op) -> Handler {
    let bytes = operand_bytes(instruction, 0);
    let _ = op;
    match (instruction.op0_kind(), instruction.op1_kind()) {
        (OpKind::Register, OpKind::Register) => by_width!(bytes, register_register, B),
        (OpKind::Register, OpKind::Memory) => by_width!(bytes, register_memory, B),
        (OpKind::Memory, OpKind::Register) => by_width!(bytes, memory_register, B),
        (OpKind::Register, _) => by_width!(bytes, register_immediate, B),
        _ => by_width!(bytes, memory_immediate, B),
    }
}

#[inline(always)]
fn into_register<B: Binary, W: Width>(cpu: &mut Cpu, op: &Op, b: W) -> Done {
    let a = cpu.get::<W>(op.reg[0]);
    let result = B::result(a, b, cpu.flags.cf());
    B::flags(&mut cpu.flags, a, b, result);
    if B::WRITES {
        cpu.set(op.reg[0], result);
    }
    Ok(())
}

#[inline(always)]
fn into_memory<B: Binary, W: Width>(cpu: &mut Cpu, op: &Op, b: W) -> Done {
    let carry = cpu.flags.cf();
    let (a, result) = if B::WRITES {
        cpu.modify(op, |a| B::result(a, b, carry))?
    } else {
        let a = cpu.load::<W>(&op.mem)?;
        (a, B::result(a, b, carry))
    };
    B::flags(&mut cpu.flags, a, b, result);
    Ok(())
}

fn register_register<B: Binary, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let b = cpu.get::<W>(op.reg[1]);
    into_register::<B, W>(cpu, op, b)
}

fn register_memory<B: Binary, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let b = cpu.load::<W>(&op.mem)?;
    into_register::<B, W>(cpu, op, b)
}

fn register_immediate<B: Binary, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    into_register::<B, W>(cpu, op, W::of(op.imm))
}

fn memory_register<B: Binary, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let b = cpu.get::<W>(op.reg[1]);
    into_memory::<B, W>(cpu, op, b)
}

fn memory_immediate<B: Binary, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    into_memory::<B, W>(cpu, op, W::of(op.imm))
}
