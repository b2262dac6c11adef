//! Instructions 64-bit mode dropped: DAA, DAS, AAA, AAS, AAM, AAD, SALC, BOUND.

use engine::state::rflags::{AF, CF};
use iced_x86::{Instruction, Mnemonic};

use super::operand_bytes;
use crate::cpu::{Cpu, vector};
use crate::op::{Done, Handler, Leave, Op};
use crate::width::Width;

const RAX: u8 = 0;
const AH: u8 = 1;

pub(super) fn select(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Daa => daa,
        Mnemonic::Das => das,
        Mnemonic::Aaa => ascii_adjust::<false>,
        Mnemonic::Aas => ascii_adjust::<true>,
        Mnemonic::Aam => aam,
        Mnemonic::Aad => aad,
        Mnemonic::Salc => salc,
        Mnemonic::Bound if operand_bytes(instruction, 0) == 2 => bound_16,
        Mnemonic::Bound => bound_32,
        _ => return None,
    })
}

/// Sets CF and AF after an addition or subtraction set all flags. OF is undefined, and so are SF, ZF and PF of AAA and AAS: AMD's processors leave what their one addition or subtraction makes of them.
fn carries(cpu: &mut Cpu, cf: bool, af: bool) {
    cpu.flags.change(CF | AF, if cf { CF } else { 0 } | if af { AF } else { 0 });
}

fn daa(cpu: &mut Cpu, _op: &Op) -> Done {
    let (al, adjust, cf, af) = decimal(cpu);
    let result = al.wrapping_add(adjust);
    cpu.set(RAX, result);
    cpu.flags.add(al, adjust, result);
    carries(cpu, cf, af);
    Ok(())
}

/// A borrow from the low digit's adjustment counts as a carry too (SDM vol. 2, DAS).
fn das(cpu: &mut Cpu, _op: &Op) -> Done {
    let (al, adjust, cf, af) = decimal(cpu);
    let result = al.wrapping_sub(adjust);
    cpu.set(RAX, result);
    cpu.flags.sub(al, adjust, result);
    carries(cpu, cf || af && al < 6, af);
    Ok(())
}

/// AL, what is to be added or subtracted, and whether the high and the low digit need it.
fn decimal(cpu: &Cpu) -> (u8, u8, bool, bool) {
    let al = cpu.get::<u8>(RAX);
    let low = al & 15 > 9 || cpu.flags.af();
    let high = al > 0x99 || cpu.flags.cf();
    (al, if low { 6 } else { 0 } + if high { 0x60 } else { 0 }, high, low)
}

fn ascii_adjust<const SUBTRACT: bool>(cpu: &mut Cpu, _op: &Op) -> Done {
    let ax = cpu.get::<u16>(RAX);
    let adjust = ax & 15 > 9 || cpu.flags.af();
    let distance = if adjust { 0x106 } else { 0 };
    let result = if SUBTRACT { ax.wrapping_sub(distance) } else { ax.wrapping_add(distance) };
    if SUBTRACT {
        cpu.flags.sub(ax, distance, result);
    } else {
        cpu.flags.add(ax, distance, result);
    }
    carries(cpu, adjust, adjust);
    cpu.set(RAX, result & 0xff0f);
    Ok(())
}

fn aam(cpu: &mut Cpu, op: &Op) -> Done {
    let base = op.imm as u8;
    let al = cpu.get::<u8>(RAX);
    let Some(high) = al.checked_div(base) else { return Err(cpu.raise(vector::DE)) };
    cpu.set(AH, high);
    cpu.set(RAX, al % base);
    cpu.flags.logic(al % base);
    Ok(())
}

fn aad(cpu: &mut Cpu, op: &Op) -> Done {
    let (al, ah) = (cpu.get::<u8>(RAX), cpu.get::<u8>(AH));
    let product = ah.wrapping_mul(op.imm as u8);
    let result = al.wrapping_add(product);
    cpu.set(RAX, u16::from(result));
    cpu.flags.add(al, product, result);
    Ok(())
}

/// Undocumented by Intel until late: AL becomes all ones or all zeros after CF.
fn salc(cpu: &mut Cpu, _op: &Op) -> Done {
    let ones = cpu.flags.status() & CF != 0;
    cpu.set(RAX, if ones { 0xff_u8 } else { 0 });
    Ok(())
}

fn check_bound(cpu: &mut Cpu, index: i32, lower: i32, upper: i32) -> Done {
    if (lower..=upper).contains(&index) { Ok(()) } else { Err(cpu.raise(vector::BR)) }
}

/// The two bounds are two accesses.
fn bounds<W: Width>(cpu: &mut Cpu, op: &Op) -> Result<(W, W), Leave> {
    let mut mem = op.mem;
    let lower = cpu.load::<W>(&mem)?;
    mem.disp = mem.disp.wrapping_add(W::BYTES as u64);
    Ok((lower, cpu.load::<W>(&mem)?))
}

fn bound_16(cpu: &mut Cpu, op: &Op) -> Done {
    let (lower, upper) = bounds::<u16>(cpu, op)?;
    let index = cpu.get::<u16>(op.reg[0]) as i16;
    check_bound(cpu, index.into(), (lower as i16).into(), (upper as i16).into())
}

fn bound_32(cpu: &mut Cpu, op: &Op) -> Done {
    let (lower, upper) = bounds::<u32>(cpu, op)?;
    let index = cpu.get::<u32>(op.reg[0]) as i32;
    check_bound(cpu, index, lower as i32, upper as i32)
}
