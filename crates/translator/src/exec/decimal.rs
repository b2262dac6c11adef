//! Instructions 64-bit mode dropped: DAA, DAS, AAA, AAS, AAM, AAD, SALC, BOUND.

use engine::state::rflags::{AF, CF};
use iced_x86::{Instruction, Mnemonic};

use super::operand_bytes;
use crate::cpu::{Cpu, vector};
use crate::op::{Done, Handler, Op};

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

/// SF, ZF and PF of AL; CF and AF as given; OF, which is undefined, clear.
fn adjusted(cpu: &mut Cpu, al: u8, cf: bool, af: bool) {
    cpu.set(RAX, al);
    cpu.flags.result_with(al, cf, false);
    cpu.flags.change(AF, if af { AF } else { 0 });
}

fn daa(cpu: &mut Cpu, _op: &Op) -> Done {
    let old = cpu.get::<u8>(RAX);
    let af = old & 15 > 9 || cpu.flags.af();
    let cf = old > 0x99 || cpu.flags.cf();
    let al = old.wrapping_add(if af { 6 } else { 0 }).wrapping_add(if cf { 0x60 } else { 0 });
    adjusted(cpu, al, cf, af);
    Ok(())
}

/// A borrow from the low digit's adjustment counts as a carry too (SDM vol. 2, DAS).
fn das(cpu: &mut Cpu, _op: &Op) -> Done {
    let old = cpu.get::<u8>(RAX);
    let af = old & 15 > 9 || cpu.flags.af();
    let high = old > 0x99 || cpu.flags.cf();
    let cf = high || af && old < 6;
    let al = old.wrapping_sub(if af { 6 } else { 0 }).wrapping_sub(if high { 0x60 } else { 0 });
    adjusted(cpu, al, cf, af);
    Ok(())
}

fn ascii_adjust<const SUBTRACT: bool>(cpu: &mut Cpu, _op: &Op) -> Done {
    let ax = cpu.get::<u16>(RAX);
    let adjust = ax & 15 > 9 || cpu.flags.af();
    let result = match (adjust, SUBTRACT) {
        (false, _) => ax,
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(6).wrapping_sub(0x100),
    };
    cpu.set(RAX, result & 0xff0f);
    adjusted(cpu, result as u8 & 15, adjust, adjust);
    Ok(())
}

fn aam(cpu: &mut Cpu, op: &Op) -> Done {
    let base = op.imm as u8;
    let al = cpu.get::<u8>(RAX);
    let Some(high) = al.checked_div(base) else { return Err(cpu.raise(vector::DE)) };
    cpu.set(AH, high);
    adjusted(cpu, al % base, false, false);
    Ok(())
}

fn aad(cpu: &mut Cpu, op: &Op) -> Done {
    let (al, ah) = (cpu.get::<u8>(RAX), cpu.get::<u8>(AH));
    let result = al.wrapping_add(ah.wrapping_mul(op.imm as u8));
    cpu.set(RAX, u16::from(result));
    adjusted(cpu, result, false, false);
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

fn bound_16(cpu: &mut Cpu, op: &Op) -> Done {
    let pair = cpu.load::<u32>(&op.mem)?;
    let index = cpu.get::<u16>(op.reg[0]) as i16;
    check_bound(cpu, index.into(), (pair as i16).into(), ((pair >> 16) as i16).into())
}

fn bound_32(cpu: &mut Cpu, op: &Op) -> Done {
    let pair = cpu.load::<u64>(&op.mem)?;
    let index = cpu.get::<u32>(op.reg[0]) as i32;
    check_bound(cpu, index, pair as i32, (pair >> 32) as i32)
}
