//! SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS and the FS/GS base instructions (AMD APM vol. 3; Intel SDM vol. 2).

use engine::state::{Segment, cr4, efer, rflags, seg};
use iced_x86::{Code, Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::mmu::canonical;
use crate::op::{Done, Handler, Leave, Op};

pub(super) fn select(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Syscall => syscall,
        Mnemonic::Sysret | Mnemonic::Sysretq => {
            op.size = if instruction.code() == Code::Sysretq { 3 } else { 2 };
            sysret
        }
        Mnemonic::Sysenter => sysenter,
        Mnemonic::Sysexit | Mnemonic::Sysexitq => sysexit,
        Mnemonic::Swapgs => swapgs,
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase => {
            op.imm = base_segment(instruction);
            op.size = if instruction.op0_register().is_gpr64() { 3 } else { 2 };
            read_base
        }
        Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            op.imm = base_segment(instruction);
            op.size = if instruction.op0_register().is_gpr64() { 3 } else { 2 };
            write_base
        }
        _ => return None,
    })
}

fn base_segment(instruction: &Instruction) -> u64 {
    let fs = matches!(instruction.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Wrfsbase);
    if fs { seg::FS as u64 } else { seg::GS as u64 }
}

/// A flat code segment as SYSCALL and SYSENTER load it, without reading a descriptor.
fn flat_code(selector: u16, dpl: u8, long: bool) -> Segment {
    let size = if long { 1 << 13 } else { 1 << 14 };
    Segment { selector, attributes: 0x809b | size | u16::from(dpl) << 5, limit: u32::MAX, base: 0 }
}

fn flat_stack(selector: u16, dpl: u8) -> Segment {
    Segment { selector, attributes: 0xc093 | u16::from(dpl) << 5, limit: u32::MAX, base: 0 }
}

/// After SYSCALL and SYSRET the trap flag as it is *then* decides about a single-step trap, so that stepping over a
/// system call looks like one step.
fn step_by_new_flags(cpu: &mut Cpu) {
    cpu.no_step = true;
    if cpu.state.rflags & rflags::TF != 0 {
        cpu.pending_debug |= 1 << 14;
    }
}

fn syscall(cpu: &mut Cpu, op: &Op) -> Done {
    if cpu.state.efer & efer::SCE == 0 || cpu.mode.real_segments() {
        return Err(cpu.ud());
    }
    let selector = (cpu.state.star >> 32) as u16 & !3;
    let flags = cpu.rflags() & !rflags::RF;
    if cpu.mode.long {
        cpu.state.gpr[1] = op.next;
        cpu.state.gpr[11] = flags;
        cpu.state.rip = if cpu.mode.is_64() { cpu.state.lstar } else { cpu.state.cstar };
        let mask = cpu.state.sfmask;
        cpu.state.segments[seg::CS] = flat_code(selector, 0, true);
        cpu.state.segments[seg::SS] = flat_stack(selector.wrapping_add(8), 0);
        cpu.set_rflags(flags & !mask);
    } else {
        cpu.state.gpr[1] = op.next;
        cpu.state.rip = cpu.state.star & 0xffff_ffff;
        cpu.state.segments[seg::CS] = flat_code(selector, 0, false);
        cpu.state.segments[seg::SS] = flat_stack(selector.wrapping_add(8), 0);
        cpu.set_rflags(flags & !(rflags::VM | rflags::IF));
    }
    step_by_new_flags(cpu);
    Err(Leave::Boundary)
}

fn sysret(cpu: &mut Cpu, op: &Op) -> Done {
    if cpu.state.efer & efer::SCE == 0 || cpu.mode.real_segments() {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let star = (cpu.state.star >> 48) as u16;
    let long = cpu.mode.long;
    let flags = if long { cpu.state.gpr[11] & 0x3c_7fd7 } else { cpu.rflags() | rflags::IF };
    if op.size == 3 {
        cpu.state.segments[seg::CS] = flat_code(star.wrapping_add(16) | 3, 3, true);
        // A non-canonical RCX faults at the fetch, at CPL 3 (AMD APM vol. 3).
        cpu.state.rip = cpu.state.gpr[1];
    } else {
        cpu.state.segments[seg::CS] = flat_code(star | 3, 3, false);
        cpu.state.rip = cpu.gpr(1, 2);
    }
    cpu.state.segments[seg::SS] = flat_stack(star.wrapping_add(8) | 3, 3);
    cpu.set_rflags(flags & !(rflags::RF | rflags::VM));
    if long {
        step_by_new_flags(cpu);
    }
    Err(Leave::Boundary)
}

/// Not in IA-32e mode: processors of this vendor have it in legacy mode only (AMD APM vol. 3, SYSENTER).
fn sysenter(cpu: &mut Cpu, _op: &Op) -> Done {
    if cpu.mode.long || !cpu.features.sysenter {
        return Err(cpu.ud());
    }
    let selector = cpu.state.sysenter_cs as u16 & !3;
    if cpu.mode.real || selector == 0 {
        return Err(cpu.gp());
    }
    cpu.state.segments[seg::CS] = flat_code(selector, 0, false);
    cpu.state.segments[seg::SS] = flat_stack(selector.wrapping_add(8), 0);
    cpu.state.gpr[4] = cpu.state.sysenter_esp & 0xffff_ffff;
    cpu.state.rip = cpu.state.sysenter_eip & 0xffff_ffff;
    let flags = cpu.rflags() & !(rflags::VM | rflags::IF | rflags::RF);
    cpu.set_rflags(flags);
    Err(Leave::Boundary)
}

fn sysexit(cpu: &mut Cpu, _op: &Op) -> Done {
    if cpu.mode.long || !cpu.features.sysenter {
        return Err(cpu.ud());
    }
    let selector = cpu.state.sysenter_cs as u16 & !3;
    if cpu.mode.real_segments() || cpu.mode.cpl > 0 || selector == 0 {
        return Err(cpu.gp());
    }
    cpu.state.segments[seg::CS] = flat_code(selector.wrapping_add(16) | 3, 3, false);
    cpu.state.segments[seg::SS] = flat_stack(selector.wrapping_add(24) | 3, 3);
    cpu.state.gpr[4] = cpu.gpr(1, 2);
    cpu.state.rip = cpu.gpr(2, 2);
    cpu.refresh();
    Err(Leave::Boundary)
}

fn swapgs(cpu: &mut Cpu, _op: &Op) -> Done {
    if !cpu.mode.is_64() {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let state = &mut *cpu.state;
    std::mem::swap(&mut state.segments[seg::GS].base, &mut state.kernel_gs_base);
    Ok(())
}

fn check_base(cpu: &mut Cpu) -> Done {
    if !cpu.mode.is_64() || cpu.state.cr4 & cr4::FSGSBASE == 0 { Err(cpu.ud()) } else { Ok(()) }
}

fn read_base(cpu: &mut Cpu, op: &Op) -> Done {
    check_base(cpu)?;
    let base = cpu.state.segments[op.imm as usize].base;
    cpu.set_gpr((op.reg[0] >> 3) as usize, op.size, base);
    Ok(())
}

fn write_base(cpu: &mut Cpu, op: &Op) -> Done {
    check_base(cpu)?;
    let base = cpu.gpr((op.reg[0] >> 3) as usize, op.size);
    if !canonical(base) {
        return Err(cpu.gp());
    }
    cpu.state.segments[op.imm as usize].base = base;
    Ok(())
}
