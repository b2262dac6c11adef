//! SHL, SHR, SAR, ROL, ROR, RCL, RCR, SHLD, SHRD (Intel SDM vol. 2).
//!
//! Counts are masked to 5 bits, 6 for 64-bit operands. A masked count of 0 changes no flag, but the destination is
//! written all the same: a 32-bit register loses its upper half, memory must be writable.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{by_width, operand_bytes};
use crate::cpu::Cpu;
use crate::flags::Flags;
use crate::op::{Done, Handler, Op};
use crate::width::Width;

const CL: u8 = 8;

/// A shift or rotate by a masked count; `flags` is asked for counts other than 0 only.
trait Shift {
    fn result<W: Width>(a: W, count: u32, carry: bool) -> W;
    fn flags<W: Width>(flags: &mut Flags, a: W, count: u32, result: W);
}

struct Shl;
struct Shr;
struct Sar;
struct Rol;
struct Ror;
struct Rcl;
struct Rcr;

fn top<W: Width>(value: W) -> bool {
    value.zext() >> (W::BITS - 1) & 1 != 0
}

/// The bit below the top one.
fn second<W: Width>(value: W) -> bool {
    value.zext() >> (W::BITS - 2) & 1 != 0
}

fn bit(value: u64, number: u32) -> bool {
    value.checked_shr(number).unwrap_or(0) & 1 != 0
}

impl Shift for Shl {
    #[inline(always)]
    fn result<W: Width>(a: W, count: u32, _carry: bool) -> W {
        W::of(a.zext() << count)
    }
    #[inline(always)]
    fn flags<W: Width>(flags: &mut Flags, a: W, count: u32, result: W) {
        let cf = count <= W::BITS && bit(a.zext(), W::BITS - count);
        flags.shifted(result, cf, top(result) != cf);
    }
}

impl Shift for Shr {
    #[inline(always)]
    fn result<W: Width>(a: W, count: u32, _carry: bool) -> W {
        W::of(a.zext() >> count)
    }
    #[inline(always)]
    fn flags<W: Width>(flags: &mut Flags, a: W, count: u32, result: W) {
        flags.shifted(result, bit(a.zext(), count - 1), top(result) != second(result));
    }
}

impl Shift for Sar {
    #[inline(always)]
    fn result<W: Width>(a: W, count: u32, _carry: bool) -> W {
        W::of((a.sext() as i64 >> count) as u64)
    }
    #[inline(always)]
    fn flags<W: Width>(flags: &mut Flags, a: W, count: u32, result: W) {
        flags.shifted(result, bit(a.sext(), count - 1), false);
    }
}

fn rotate_left<W: Width>(a: W, count: u32) -> W {
    let count = count % W::BITS;
    let a = a.zext();
    W::of(a << count | a.checked_shr(W::BITS - count).unwrap_or(0))
}

impl Shift for Rol {
    #[inline(always)]
    fn result<W: Width>(a: W, count: u32, _carry: bool) -> W {
        rotate_left(a, count)
    }
    #[inline(always)]
    fn flags<W: Width>(flags: &mut Flags, _a: W, _count: u32, result: W) {
        let cf = bit(result.zext(), 0);
        flags.set_cf_of(cf, top(result) != cf);
    }
}

impl Shift for Ror {
    #[inline(always)]
    fn result<W: Width>(a: W, count: u32, _carry: bool) -> W {
        rotate_left(a, W::BITS - count % W::BITS)
    }
    #[inline(always)]
    fn flags<W: Width>(flags: &mut Flags, _a: W, _count: u32, result: W) {
        flags.set_cf_of(top(result), top(result) != second(result));
    }
}

/// `a` with the carry above its top bit, rotated left by `count` of the `BITS + 1` bits.
fn rotate_through_carry<W: Width>(a: W, count: u32, carry: bool) -> (W, bool) {
    let bits = W::BITS + 1;
    let count = count % bits;
    let whole = u128::from(carry) << W::BITS | u128::from(a.zext());
    let rotated = (whole << count | whole >> (bits - count)) & ((1_u128 << bits) - 1);
    (W::of(rotated as u64), rotated >> W::BITS != 0)
}

impl Shift for Rcl {
    fn result<W: Width>(a: W, count: u32, carry: bool) -> W {
        rotate_through_carry(a, count, carry).0
    }
    fn flags<W: Width>(flags: &mut Flags, a: W, count: u32, result: W) {
        let (_, cf) = rotate_through_carry(a, count, flags.cf());
        flags.set_cf_of(cf, top(result) != cf);
    }
}

impl Shift for Rcr {
    fn result<W: Width>(a: W, count: u32, carry: bool) -> W {
        let bits = W::BITS + 1;
        rotate_through_carry(a, bits - count % bits, carry).0
    }
    fn flags<W: Width>(flags: &mut Flags, a: W, count: u32, result: W) {
        let bits = W::BITS + 1;
        let (_, cf) = rotate_through_carry(a, bits - count % bits, flags.cf());
        flags.set_cf_of(cf, top(result) != second(result));
    }
}

pub(super) fn select(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => forms::<Shl>(instruction),
        Mnemonic::Shr => forms::<Shr>(instruction),
        Mnemonic::Sar => forms::<Sar>(instruction),
        Mnemonic::Rol => forms::<Rol>(instruction),
        Mnemonic::Ror => forms::<Ror>(instruction),
        Mnemonic::Rcl => forms::<Rcl>(instruction),
        Mnemonic::Rcr => forms::<Rcr>(instruction),
        Mnemonic::Shld => double_forms::<true>(instruction),
        Mnemonic::Shrd => double_forms::<false>(instruction),
        _ => return None,
    })
}

fn forms<S: Shift>(instruction: &Instruction) -> Handler {
    let bytes = operand_bytes(instruction, 0);
    match (instruction.op0_kind(), instruction.op1_kind()) {
        (OpKind::Register, OpKind::Register) => by_width!(bytes, register_by_cl, S),
        (OpKind::Register, _) => by_width!(bytes, register_by_immediate, S),
        (_, OpKind::Register) => by_width!(bytes, memory_by_cl, S),
        _ => by_width!(bytes, memory_by_immediate, S),
    }
}

/// The count a shift of width `W` uses.
#[inline(always)]
fn masked<W: Width>(count: u8) -> u32 {
    u32::from(count) & if W::BYTES == 8 { 63 } else { 31 }
}

#[inline(always)]
fn register<S: Shift, W: Width>(cpu: &mut Cpu, op: &Op, count: u8) -> Done {
    let count = masked::<W>(count);
    let a = cpu.get::<W>(op.reg[0]);
    let result = S::result(a, count, cpu.flags.cf());
    cpu.set(op.reg[0], result);
    if count != 0 {
        S::flags(&mut cpu.flags, a, count, result);
    }
    Ok(())
}

#[inline(always)]
fn memory<S: Shift, W: Width>(cpu: &mut Cpu, op: &Op, count: u8) -> Done {
    let count = masked::<W>(count);
    let carry = cpu.flags.cf();
    let (a, result) = cpu.modify::<W>(op, |a| S::result(a, count, carry))?;
    if count != 0 {
        S::flags(&mut cpu.flags, a, count, result);
    }
    Ok(())
}

fn register_by_cl<S: Shift, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let count = cpu.get::<u8>(CL);
    register::<S, W>(cpu, op, count)
}

fn register_by_immediate<S: Shift, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    register::<S, W>(cpu, op, op.imm as u8)
}

fn memory_by_cl<S: Shift, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let count = cpu.get::<u8>(CL);
    memory::<S, W>(cpu, op, count)
}

fn memory_by_immediate<S: Shift, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    memory::<S, W>(cpu, op, op.imm as u8)
}

fn double_forms<const LEFT: bool>(instruction: &Instruction) -> Handler {
    macro_rules! double {
        ($handler:ident) => {
            match operand_bytes(instruction, 0) {
                2 => $handler::<u16, LEFT> as Handler,
                4 => $handler::<u32, LEFT>,
                _ => $handler::<u64, LEFT>,
            }
        };
    }
    match (instruction.op0_kind(), instruction.op2_kind()) {
        (OpKind::Register, OpKind::Register) => double!(double_register_by_cl),
        (OpKind::Register, _) => double!(double_register_by_immediate),
        (_, OpKind::Register) => double!(double_memory_by_cl),
        _ => double!(double_memory_by_immediate),
    }
}

/// `a` shifted, bits of `b` moving in. Counts above 16 of 16-bit operands are undefined by the manuals; AMD's processors
/// then move in `b` once more.
fn double<W: Width, const LEFT: bool>(a: W, b: W, count: u32) -> W {
    let (a, b) = (u128::from(a.zext()), u128::from(b.zext()));
    let bits = W::BITS;
    let once = if LEFT { a << bits | b } else { b << bits | a };
    match (bits, LEFT) {
        (64, true) => W::of((once << count >> 64) as u64),
        (64, false) => W::of((once >> count) as u64),
        (_, true) => W::of(((once << bits | b) << count >> (2 * bits)) as u64),
        (_, false) => W::of(((b << (2 * bits) | once) >> count) as u64),
    }
}

/// CF is the last bit shifted out; 0 where the count is above the width. OF is defined for a count of 1; for others, and
/// where the count reaches the width, it is what AMD's processors make of it.
fn double_flags<W: Width, const LEFT: bool>(flags: &mut Flags, a: W, b: W, count: u32, result: W) {
    let before = double::<W, LEFT>(a, b, count - 1);
    let out = if LEFT { top(before) } else { bit(before.zext(), 0) };
    let cf = count <= W::BITS && out;
    let of = match LEFT {
        true => cf != (count < W::BITS && top(result)),
        false => top(result) != second(result),
    };
    flags.shifted(result, cf, of);
}

#[inline(always)]
fn double_register<W: Width, const LEFT: bool>(cpu: &mut Cpu, op: &Op, count: u8) -> Done {
    let count = masked::<W>(count);
    let (a, b) = (cpu.get::<W>(op.reg[0]), cpu.get::<W>(op.reg[1]));
    let result = double::<W, LEFT>(a, b, count);
    cpu.set(op.reg[0], result);
    if count != 0 {
        double_flags::<W, LEFT>(&mut cpu.flags, a, b, count, result);
    }
    Ok(())
}

#[inline(always)]
fn double_memory<W: Width, const LEFT: bool>(cpu: &mut Cpu, op: &Op, count: u8) -> Done {
    let count = masked::<W>(count);
    let b = cpu.get::<W>(op.reg[1]);
    let (a, result) = cpu.modify::<W>(op, |a| double::<W, LEFT>(a, b, count))?;
    if count != 0 {
        double_flags::<W, LEFT>(&mut cpu.flags, a, b, count, result);
    }
    Ok(())
}

fn double_register_by_cl<W: Width, const LEFT: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    let count = cpu.get::<u8>(CL);
    double_register::<W, LEFT>(cpu, op, count)
}

fn double_register_by_immediate<W: Width, const LEFT: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    double_register::<W, LEFT>(cpu, op, op.imm as u8)
}

fn double_memory_by_cl<W: Width, const LEFT: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    let count = cpu.get::<u8>(CL);
    double_memory::<W, LEFT>(cpu, op, count)
}

fn double_memory_by_immediate<W: Width, const LEFT: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    double_memory::<W, LEFT>(cpu, op, op.imm as u8)
}
