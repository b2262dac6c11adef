//! XCHG, XADD, CMPXCHG, CMPXCHG8B, CMPXCHG16B: what locks and lists are made of.
//!
//! Memory forms count as writes whether or not they change anything, and are atomic with LOCK (XCHG always).

use std::arch::asm;

use engine::cpu_model::Feature;
use engine::state::rflags::ZF;
use iced_x86::{CodeSize, Instruction, Mnemonic, OpKind};
use memory::Gva;

use super::{by_width, offered, operand_bytes};
use crate::cpu::Cpu;
use crate::mmu::{Access, Rights};
use crate::op::{Done, Handler, Leave, Op};
use crate::width::Width;

const RAX: u8 = 0;
const RCX: u8 = 8;
const RDX: u8 = 16;
const RBX: u8 = 24;
const R8: u8 = 64;

pub(super) fn select(instruction: &Instruction, code: &[u8], cpu: &Cpu, op: &mut Op) -> Option<Handler> {
    let bytes = || operand_bytes(instruction, 0);
    if let Some(handler) = xchg_behind_f3(instruction, code, op) {
        return Some(handler);
    }
    let memory = instruction.op0_kind() == OpKind::Memory;
    Some(match instruction.mnemonic() {
        Mnemonic::Xchg if memory => by_width!(bytes(), xchg_memory),
        // XCHG reg, mem is the same instruction; which operand comes first is the disassembler's choice.
        Mnemonic::Xchg if instruction.op1_kind() == OpKind::Memory => by_width!(bytes(), xchg_from_memory),
        Mnemonic::Xchg => by_width!(bytes(), xchg_register),
        Mnemonic::Xadd if memory => by_width!(bytes(), xadd_memory),
        Mnemonic::Xadd => by_width!(bytes(), xadd_register),
        Mnemonic::Cmpxchg if memory => by_width!(bytes(), cmpxchg_memory),
        Mnemonic::Cmpxchg => by_width!(bytes(), cmpxchg_register),
        Mnemonic::Cmpxchg8b if offered(cpu, Feature::Cx8) => cmpxchg8b,
        Mnemonic::Cmpxchg16b if offered(cpu, Feature::Cx16) && is_x86_feature_detected!("cmpxchg16b") => cmpxchg16b,
        Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b => crate::decode::raise_ud,
        _ => return None,
    })
}

/// F3 90 is PAUSE, but with REX.B before the 90 it is XCHG R8, rAX, which iced calls PAUSE too.
fn xchg_behind_f3(instruction: &Instruction, code: &[u8], op: &mut Op) -> Option<Handler> {
    let rex = *code.get(instruction.len().checked_sub(2)?)?;
    if instruction.mnemonic() != Mnemonic::Pause || instruction.code_size() != CodeSize::Code64 || rex & 0xf1 != 0x41 {
        return None;
    }
    (op.reg[0], op.reg[1]) = (RAX, R8);
    let narrow = code[..instruction.len()].contains(&0x66);
    Some(by_width!(
        if rex & 8 != 0 {
            8
        } else if narrow {
            2
        } else {
            4
        },
        xchg_register
    ))
}

fn xchg_register<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let (a, b) = (cpu.get::<W>(op.reg[0]), cpu.get::<W>(op.reg[1]));
    cpu.set(op.reg[0], b);
    cpu.set(op.reg[1], a);
    Ok(())
}

#[inline(always)]
fn exchange<W: Width>(cpu: &mut Cpu, op: &Op, register: u8) -> Done {
    let new = cpu.get::<W>(register);
    let address = cpu.linear(&op.mem, W::BYTES as u64, Access::Write)?;
    let (old, _) = cpu.modify_linear(address, op.mem.segment, true, |_| new)?;
    cpu.set(register, old);
    Ok(())
}

fn xchg_memory<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    exchange::<W>(cpu, op, op.reg[1])
}

fn xchg_from_memory<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    exchange::<W>(cpu, op, op.reg[0])
}

fn sum<W: Width>(a: W, b: W) -> W {
    W::of(a.zext().wrapping_add(b.zext()))
}

/// The source is written first: XADD of a register with itself leaves the sum.
fn xadd_register<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let (a, b) = (cpu.get::<W>(op.reg[0]), cpu.get::<W>(op.reg[1]));
    let result = sum(a, b);
    cpu.set(op.reg[1], a);
    cpu.set(op.reg[0], result);
    cpu.flags.add(a, b, result);
    Ok(())
}

fn xadd_memory<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let b = cpu.get::<W>(op.reg[1]);
    let (a, result) = cpu.modify(op, |a| sum(a, b))?;
    cpu.set(op.reg[1], a);
    cpu.flags.add(a, b, result);
    Ok(())
}

#[inline(always)]
fn compared<W: Width>(cpu: &mut Cpu, expected: W, found: W) {
    cpu.flags.sub(expected, found, W::of(expected.zext().wrapping_sub(found.zext())));
    if expected != found {
        cpu.set(RAX, found);
    }
}

fn cmpxchg_register<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let (expected, found) = (cpu.get::<W>(RAX), cpu.get::<W>(op.reg[0]));
    if expected == found {
        cpu.set(op.reg[0], cpu.get::<W>(op.reg[1]));
    }
    compared(cpu, expected, found);
    Ok(())
}

fn cmpxchg_memory<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let (expected, new) = (cpu.get::<W>(RAX), cpu.get::<W>(op.reg[1]));
    let (found, _) = cpu.modify(op, |found| if found == expected { new } else { found })?;
    compared(cpu, expected, found);
    Ok(())
}

/// rDX:rAX and rCX:rBX of two registers of width `W` each.
fn pairs<W: Width>(cpu: &Cpu) -> (u128, u128) {
    let pair = |high, low| u128::from(cpu.get::<W>(high).zext()) << W::BITS | u128::from(cpu.get::<W>(low).zext());
    (pair(RDX, RAX), pair(RCX, RBX))
}

fn pair_compared<W: Width>(cpu: &mut Cpu, expected: u128, found: u128) {
    let equal = expected == found;
    if !equal {
        cpu.set(RAX, W::of(found as u64));
        cpu.set(RDX, W::of((found >> W::BITS) as u64));
    }
    cpu.flags.change(ZF, if equal { ZF } else { 0 });
}

fn cmpxchg8b(cpu: &mut Cpu, op: &Op) -> Done {
    let (expected, new) = pairs::<u32>(cpu);
    let (expected, new) = (expected as u64, new as u64);
    let (found, _) = cpu.modify(op, |found| if found == expected { new } else { found })?;
    pair_compared::<u32>(cpu, expected.into(), found.into());
    Ok(())
}

/// 16 bytes aligned to 16, or #GP(0). Done by the host's own instruction, atomically with or without LOCK.
fn cmpxchg16b(cpu: &mut Cpu, op: &Op) -> Done {
    let (expected, new) = pairs::<u64>(cpu);
    let address = cpu.linear(&op.mem, 16, Access::Write)?;
    if address % 16 != 0 {
        return Err(cpu.gp());
    }
    let found = match cpu.bulk(address, 16, Access::Write) {
        // SAFETY: `bulk` vouches for 16 bytes here; the alignment is checked and guest pages are page-aligned in the
        // host; `select` saw that the host has the instruction.
        Some((host, _)) => unsafe { compare_exchange_16(host, expected, new) },
        None => cmpxchg16b_slow(cpu, op.mem.segment, address, expected, new)?,
    };
    pair_compared::<u64>(cpu, expected, found);
    Ok(())
}

#[cold]
fn cmpxchg16b_slow(cpu: &mut Cpu, segment: u8, address: u64, expected: u128, new: u128) -> Result<u128, Leave> {
    // All checks and breakpoints of a write; what follows cannot fault.
    cpu.probe_write(address, 16, segment, Rights::Current)?;
    let gpa = cpu.translate(Gva(address), Access::Write, Rights::Current)?.gpa;
    if let Some(host) = cpu.shared.ram.host_page(gpa) {
        cpu.note_store(gpa, 16);
        // SAFETY: an aligned operand lies within the page `host_page` vouches for; else as in `cmpxchg16b`.
        let found = unsafe { compare_exchange_16(host.as_ptr(), expected, new) };
        cpu.note_code_write(gpa, 16);
        return Ok(found);
    }
    // A device: nothing is atomic there.
    let mut held = [0; 16];
    cpu.read_bytes(address, &mut held, segment, Rights::Current)?;
    let found = u128::from_le_bytes(held);
    let value = if found == expected { new } else { found };
    cpu.write_bytes(address, &value.to_le_bytes(), segment, Rights::Current)?;
    Ok(found)
}

/// LOCK CMPXCHG16B; returns what memory held.
///
/// # Safety
/// 16 bytes at `host` must be readable and writable, `host` aligned to 16, and the processor must have the instruction.
unsafe fn compare_exchange_16(host: *mut u8, expected: u128, new: u128) -> u128 {
    let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
    // SAFETY: by the caller's promise. RBX, which the compiler keeps to itself, is swapped in and back.
    unsafe {
        asm!(
            "xchg {new_low}, rbx",
            "lock cmpxchg16b [rdi]",
            "mov rbx, {new_low}",
            new_low = inout(reg) new as u64 => _,
            in("rdi") host,
            in("rcx") (new >> 64) as u64,
            inout("rax") low,
            inout("rdx") high,
            options(nostack),
        );
    }
    u128::from(high) << 64 | u128::from(low)
}
