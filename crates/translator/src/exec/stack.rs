//! PUSH, POP, PUSHA, POPA, PUSHF, POPF, ENTER, LEAVE.
//!
//! POP of a segment register loads a descriptor and is `system`'s.

use engine::state::{cr4, rflags, seg};
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::by_width;
use crate::cpu::{Cpu, size_mask};
use crate::mmu::{Access, Rights};
use crate::op::{Done, Handler, Op};
use crate::width::Width;

const RSP: usize = 4;
const RBP: usize = 5;

pub(super) fn select(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let bytes = || instruction.stack_pointer_increment().unsigned_abs() as usize;
    let segment = || instruction.op0_kind() == OpKind::Register && !instruction.op0_register().is_gpr();
    Some(match instruction.mnemonic() {
        Mnemonic::Push if segment() => {
            op.imm = instruction.op0_register().number() as u64;
            by_width!(bytes(), push_segment)
        }
        Mnemonic::Push => match instruction.op0_kind() {
            OpKind::Register => by_width!(bytes(), push_register),
            OpKind::Memory => by_width!(bytes(), push_memory),
            _ => by_width!(bytes(), push_immediate),
        },
        Mnemonic::Pop if segment() => return None,
        Mnemonic::Pop if instruction.op0_kind() == OpKind::Register => by_width!(bytes(), pop_register),
        Mnemonic::Pop => by_width!(bytes(), pop_memory),
        Mnemonic::Pusha => push_all::<u16>,
        Mnemonic::Pushad => push_all::<u32>,
        Mnemonic::Popa => pop_all::<u16>,
        Mnemonic::Popad => pop_all::<u32>,
        Mnemonic::Pushf => push_flags::<u16>,
        Mnemonic::Pushfd => push_flags::<u32>,
        Mnemonic::Pushfq => push_flags::<u64>,
        Mnemonic::Popf => pop_flags::<u16>,
        Mnemonic::Popfd => pop_flags::<u32>,
        Mnemonic::Popfq => pop_flags::<u64>,
        Mnemonic::Enter => match instruction.code() {
            iced_x86::Code::Enterw_imm16_imm8 => enter::<u16>,
            iced_x86::Code::Enterd_imm16_imm8 => enter::<u32>,
            _ => enter::<u64>,
        },
        Mnemonic::Leave => match instruction.code() {
            iced_x86::Code::Leavew => leave::<u16>,
            iced_x86::Code::Leaved => leave::<u32>,
            _ => leave::<u64>,
        },
        _ => return None,
    })
}

fn push_register<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let value = cpu.get::<W>(op.reg[0]);
    cpu.push(value)
}

fn push_immediate<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.push(W::of(op.imm))
}

fn push_memory<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let value = cpu.load::<W>(&op.mem)?;
    cpu.push(value)
}

/// A selector is stored zero-extended to the operand size (AMD APM vol. 3, PUSH).
fn push_segment<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let selector = cpu.state.segments[op.imm as usize].selector;
    cpu.push(W::of(selector.into()))
}

fn pop_register<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let value = cpu.pop::<W>()?;
    cpu.set(op.reg[0], value);
    Ok(())
}

/// The address is computed with the stack pointer already moved (SDM vol. 2, POP).
fn pop_memory<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let pointer = cpu.state.gpr[RSP];
    let value = cpu.pop::<W>()?;
    cpu.store(&op.mem, value).inspect_err(|_| cpu.state.gpr[RSP] = pointer)
}

/// PUSHA: AX, CX, DX, BX, the old SP, BP, SI, DI.
fn push_all<W: Width>(cpu: &mut Cpu, _op: &Op) -> Done {
    let pointer = cpu.state.gpr[RSP];
    for number in 0..8 {
        let value = if number == RSP { pointer } else { cpu.state.gpr[number] };
        if let Err(leave) = cpu.push(W::of(value)) {
            cpu.state.gpr[RSP] = pointer;
            return Err(leave);
        }
    }
    Ok(())
}

/// POPA: the reverse, the stored SP being skipped. Where the stack faults half-way, AMD's processors have loaded what came
/// before, and so have we; the stack pointer has not moved.
fn pop_all<W: Width>(cpu: &mut Cpu, _op: &Op) -> Done {
    let pointer = cpu.state.gpr[RSP];
    for number in (0..8).rev() {
        match cpu.pop::<W>() {
            Ok(value) if number != RSP => cpu.set((number * 8) as u8, value),
            Ok(_) => {}
            Err(leave) => {
                cpu.state.gpr[RSP] = pointer;
                return Err(leave);
            }
        }
    }
    Ok(())
}

impl Cpu {
    fn io_privilege(&self) -> u8 {
        (self.state.rflags >> 12 & 3) as u8
    }

    /// Virtual-8086 mode below IOPL 3, where PUSHF and POPF trap or, with CR4.VME, work on VIF.
    fn flags_are_sensitive(&self) -> bool {
        self.mode.v86 && self.io_privilege() < 3
    }
}

/// Moves bit `from` of `value` to bit `to`.
fn moved(value: u64, from: u64, to: u64) -> u64 {
    if value & from != 0 { value | to } else { value & !to }
}

fn push_flags<W: Width>(cpu: &mut Cpu, _op: &Op) -> Done {
    let flags = cpu.rflags();
    let mut image = flags & !(rflags::RF | rflags::VM);
    if cpu.flags_are_sensitive() {
        if W::BYTES != 2 || cpu.state.cr4 & cr4::VME == 0 {
            return Err(cpu.gp());
        }
        image = moved(flags, rflags::VIF, rflags::IF) | rflags::IOPL;
    }
    cpu.push(W::of(image))
}

/// Which bits may change depends on the privilege level (SDM vol. 2, POPF, table 4-14).
fn pop_flags<W: Width>(cpu: &mut Cpu, _op: &Op) -> Done {
    let old = cpu.rflags();
    let mut mask = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
    if W::BYTES > 2 {
        mask |= rflags::AC | rflags::ID;
    }
    if cpu.flags_are_sensitive() {
        if W::BYTES != 2 || cpu.state.cr4 & cr4::VME == 0 {
            return Err(cpu.gp());
        }
        let pointer = cpu.state.gpr[RSP];
        let image = cpu.pop::<W>()?.zext();
        if image & rflags::TF != 0 || image & rflags::IF != 0 && old & rflags::VIP != 0 {
            cpu.state.gpr[RSP] = pointer;
            return Err(cpu.gp());
        }
        let image = moved(image, rflags::IF, rflags::VIF);
        let mask = mask | rflags::VIF;
        cpu.set_rflags(old & !mask | image & mask);
        return Ok(());
    }
    if cpu.mode.cpl == 0 {
        mask |= rflags::IOPL;
    }
    if cpu.mode.cpl <= cpu.io_privilege() {
        mask |= rflags::IF;
    }
    let image = cpu.pop::<W>()?.zext();
    // RF is cleared, VM, VIF and VIP stay.
    cpu.set_rflags(old & !(mask | rflags::RF) | image & mask);
    Ok(())
}

/// ENTER with `imm` = frame size, nesting level above it. Nothing is written to registers before the last access that
/// may fault, which is a write to where the stack pointer ends up (SDM vol. 2, ENTER).
fn enter<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let size = op.imm & 0xffff;
    let level = op.imm >> 32 & 31;
    let (pointer, frame) = (cpu.state.gpr[RSP], cpu.state.gpr[RBP]);
    let finish = enter_frame::<W>(cpu, size, level, pointer, frame);
    if finish.is_err() {
        cpu.state.gpr[RSP] = pointer;
    }
    finish
}

fn enter_frame<W: Width>(cpu: &mut Cpu, size: u64, level: u64, pointer: u64, frame: u64) -> Done {
    let step = W::BYTES as u64;
    cpu.push(W::of(frame))?;
    let new_frame = cpu.state.gpr[RSP];
    if level > 0 {
        let mut outer = frame;
        for _ in 1..level {
            outer = outer.wrapping_sub(step);
            let address = cpu.stack_linear(outer, step, Access::Read)?;
            let display = cpu.read_linear::<W>(address, seg::SS as u8, Rights::Current)?;
            cpu.push(display)?;
        }
        cpu.push(W::of(new_frame))?;
    }
    let end = cpu.state.gpr[RSP].wrapping_sub(size);
    let address = cpu.stack_linear(end, step, Access::Write)?;
    cpu.probe_write(address, step, seg::SS as u8, Rights::Current)?;
    cpu.state.gpr[RSP] = pointer;
    cpu.set_stack_pointer(end);
    cpu.set((RBP * 8) as u8, W::of(new_frame));
    Ok(())
}

fn leave<W: Width>(cpu: &mut Cpu, _op: &Op) -> Done {
    let frame = cpu.state.gpr[RBP] & size_mask(cpu.mode.stack);
    let address = cpu.stack_linear(frame, W::BYTES as u64, Access::Read)?;
    let value = cpu.read_linear::<W>(address, seg::SS as u8, Rights::Current)?;
    cpu.set_stack_pointer(frame.wrapping_add(W::BYTES as u64));
    cpu.set((RBP * 8) as u8, value);
    Ok(())
}
