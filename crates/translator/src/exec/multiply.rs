//! MUL, IMUL, DIV, IDIV, MULX (Intel SDM vol. 2).

use engine::cpu_model::Feature;
use engine::state::rflags::{AF, CF, OF, STATUS};
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{by_width, offered_vex, operand_bytes};
use crate::cpu::{Cpu, vector};
use crate::op::{Done, Handler, Leave, Op};
use crate::width::Width;

const RAX: u8 = 0;
const AH: u8 = 1;
const RDX: u8 = 16;

pub(super) fn select(instruction: &Instruction, cpu: &Cpu) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Mul => one_operand::<Multiply<false>>(instruction),
        Mnemonic::Imul if instruction.op_count() == 1 => one_operand::<Multiply<true>>(instruction),
        Mnemonic::Imul => truncating(instruction),
        Mnemonic::Div => one_operand::<Divide<false>>(instruction),
        Mnemonic::Idiv => one_operand::<Divide<true>>(instruction),
        Mnemonic::Mulx if !offered_vex(cpu, Feature::Bmi2) => crate::decode::raise_ud,
        Mnemonic::Mulx if instruction.op2_kind() == OpKind::Register => {
            by_width!(operand_bytes(instruction, 0), mulx_register)
        }
        Mnemonic::Mulx => by_width!(operand_bytes(instruction, 0), mulx_memory),
        _ => return None,
    })
}

/// An operation on rDX:rAX (AX for bytes) and one operand.
trait Accumulate {
    fn run<W: Width>(cpu: &mut Cpu, operand: W) -> Done;
}

struct Multiply<const SIGNED: bool>;
struct Divide<const SIGNED: bool>;

fn one_operand<A: Accumulate>(instruction: &Instruction) -> Handler {
    let bytes = operand_bytes(instruction, 0);
    match instruction.op0_kind() {
        OpKind::Register => by_width!(bytes, by_register, A),
        _ => by_width!(bytes, by_memory, A),
    }
}

fn by_register<A: Accumulate, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let operand = cpu.get::<W>(op.reg[0]);
    A::run(cpu, operand)
}

fn by_memory<A: Accumulate, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let operand = cpu.load::<W>(&op.mem)?;
    A::run(cpu, operand)
}

/// The high half goes to AH for bytes, to rDX else.
fn high_half<W: Width>() -> u8 {
    if W::BYTES == 1 { AH } else { RDX }
}

fn signed<W: Width>(value: W) -> i128 {
    (value.sext() as i64).into()
}

fn unsigned<W: Width>(value: W) -> u128 {
    value.zext().into()
}

impl<const SIGNED: bool> Accumulate for Multiply<SIGNED> {
    #[inline(always)]
    fn run<W: Width>(cpu: &mut Cpu, operand: W) -> Done {
        let a = cpu.get::<W>(RAX);
        let product = if SIGNED { (signed(a) * signed(operand)) as u128 } else { unsigned(a) * unsigned(operand) };
        let (low, high) = (W::of(product as u64), W::of((product >> W::BITS) as u64));
        let significant = if SIGNED { product != signed(low) as u128 } else { high.zext() != 0 };
        cpu.set(RAX, low);
        cpu.set(high_half::<W>(), high);
        // SF, ZF, AF and PF are undefined; AMD's processors leave them.
        cpu.flags.set_cf_of(significant, significant);
        Ok(())
    }
}

impl Cpu {
    fn divide_error(&mut self) -> Leave {
        self.raise(vector::DE)
    }
}

impl<const SIGNED: bool> Accumulate for Divide<SIGNED> {
    #[inline(always)]
    fn run<W: Width>(cpu: &mut Cpu, operand: W) -> Done {
        let (low, high) = (cpu.get::<W>(RAX), cpu.get::<W>(high_half::<W>()));
        let quotient = if SIGNED { divide_signed(low, high, operand) } else { divide(low, high, operand) };
        let Some((quotient, remainder)) = quotient else { return Err(cpu.divide_error()) };
        cpu.set(RAX, quotient);
        cpu.set(high_half::<W>(), remainder);
        // All six are undefined; AMD's processors leave CF and OF.
        cpu.flags.change(STATUS & !(CF | OF), AF);
        Ok(())
    }
}

/// Quotient and remainder; nothing where the divisor is 0 or the quotient does not fit.
#[inline(always)]
fn divide<W: Width>(low: W, high: W, divisor: W) -> Option<(W, W)> {
    if high.zext() >= divisor.zext() {
        return None;
    }
    if W::BYTES < 8 || high.zext() == 0 {
        let dividend = high.zext().checked_shl(W::BITS).unwrap_or(0) | low.zext();
        return Some((W::of(dividend / divisor.zext()), W::of(dividend % divisor.zext())));
    }
    let dividend = unsigned(high) << 64 | unsigned(low);
    Some((W::of((dividend / unsigned(divisor)) as u64), W::of((dividend % unsigned(divisor)) as u64)))
}

#[inline(always)]
fn divide_signed<W: Width>(low: W, high: W, divisor: W) -> Option<(W, W)> {
    let dividend = signed(high) << W::BITS | unsigned(low) as i128;
    let divisor = signed(divisor);
    // Nearly always the dividend is a sign-extended one, for which the host's own division does.
    let narrow = i64::try_from(dividend).ok().zip(i64::try_from(divisor).ok());
    let (quotient, remainder) = match narrow.and_then(|(a, b)| a.checked_div(b).zip(a.checked_rem(b))) {
        Some((quotient, remainder)) => (i128::from(quotient), i128::from(remainder)),
        None => (dividend.checked_div(divisor)?, dividend.checked_rem(divisor)?),
    };
    let result = W::of(quotient as u64);
    (signed(result) == quotient).then(|| (result, W::of(remainder as u64)))
}

/// IMUL with two or three operands.
fn truncating(instruction: &Instruction) -> Handler {
    let bytes = operand_bytes(instruction, 0);
    match (instruction.op_count(), instruction.op1_kind()) {
        (2, OpKind::Register) => by_width!(bytes, truncating_register),
        (2, _) => by_width!(bytes, truncating_memory),
        (_, OpKind::Register) => by_width!(bytes, truncating_register_immediate),
        _ => by_width!(bytes, truncating_memory_immediate),
    }
}

#[inline(always)]
fn truncate_product<W: Width>(cpu: &mut Cpu, op: &Op, a: W, b: W) -> Done {
    let product = signed(a) * signed(b);
    let low = W::of(product as u64);
    let significant = product != signed(low);
    cpu.set(op.reg[0], low);
    cpu.flags.set_cf_of(significant, significant);
    Ok(())
}

fn truncating_register<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let (a, b) = (cpu.get::<W>(op.reg[0]), cpu.get::<W>(op.reg[1]));
    truncate_product(cpu, op, a, b)
}

fn truncating_memory<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let b = cpu.load::<W>(&op.mem)?;
    let a = cpu.get::<W>(op.reg[0]);
    truncate_product(cpu, op, a, b)
}

fn truncating_register_immediate<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let a = cpu.get::<W>(op.reg[1]);
    truncate_product(cpu, op, a, W::of(op.imm))
}

fn truncating_memory_immediate<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let a = cpu.load::<W>(&op.mem)?;
    truncate_product(cpu, op, a, W::of(op.imm))
}

/// MULX: no flags; where both destinations are one register, the high half stays.
#[inline(always)]
fn mulx<W: Width>(cpu: &mut Cpu, op: &Op, operand: W) -> Done {
    let product = unsigned(cpu.get::<W>(RDX)) * unsigned(operand);
    cpu.set(op.reg[1], W::of(product as u64));
    cpu.set(op.reg[0], W::of((product >> W::BITS) as u64));
    Ok(())
}

fn mulx_register<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let operand = cpu.get::<W>(op.reg[2]);
    mulx(cpu, op, operand)
}

fn mulx_memory<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let operand = cpu.load::<W>(&op.mem)?;
    mulx(cpu, op, operand)
}
