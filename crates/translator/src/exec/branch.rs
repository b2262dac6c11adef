//! Near branches: Jcc, JMP, CALL, RET, LOOPcc, JCXZ. Targets are checked before anything else happens.
//!
//! Far transfers are `system`'s: they load CS.

use engine::state::seg;
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::{by_width, condition_of, operand_bytes};
use crate::cpu::Cpu;
use crate::mmu::{Access, Rights, canonical};
use crate::op::{Done, Handler, Leave, Op, REP, REPNE};
use crate::width::Width;

const RCX: usize = 1;

pub(super) fn select(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let stack_bytes = || instruction.stack_pointer_increment().unsigned_abs() as usize;
    Some(match instruction.mnemonic() {
        Mnemonic::Jmp if is_near_target(instruction) => jump,
        Mnemonic::Call if is_near_target(instruction) => by_width!(instruction_bytes(instruction), call),
        Mnemonic::Jmp if is_indirect_near(instruction) => match instruction.op0_kind() {
            OpKind::Register => by_width!(operand_bytes(instruction, 0), jump_register),
            _ => by_width!(operand_bytes(instruction, 0), jump_memory),
        },
        Mnemonic::Call if is_indirect_near(instruction) => match instruction.op0_kind() {
            OpKind::Register => by_width!(operand_bytes(instruction, 0), call_register),
            _ => by_width!(operand_bytes(instruction, 0), call_memory),
        },
        Mnemonic::Ret => {
            if instruction.op_count() == 0 {
                by_width!(stack_bytes(), ret)
            } else {
                op.imm = instruction.immediate16().into();
                by_width!(stack_bytes() - op.imm as usize, ret_releasing)
            }
        }
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => {
            op.size = loop_counter(instruction.code());
            // A repeat prefix, which means nothing here, decides the condition on AMD's processors.
            match (instruction.mnemonic(), op.prefixes & (REP | REPNE)) {
                (Mnemonic::Loop, _) => loop_always,
                (_, REP) | (Mnemonic::Loope, 0) => loop_if::<true>,
                _ => loop_if::<false>,
            }
        }
        Mnemonic::Jcxz => jump_if_no_count::<1>,
        Mnemonic::Jecxz => jump_if_no_count::<2>,
        Mnemonic::Jrcxz => jump_if_no_count::<3>,
        _ if instruction.is_jcc_short_or_near() => JCC[usize::from(condition_of(instruction)?)],
        _ => return None,
    })
}

fn is_near_target(instruction: &Instruction) -> bool {
    instruction.is_jmp_short_or_near() || instruction.is_call_near()
}

fn is_indirect_near(instruction: &Instruction) -> bool {
    instruction.is_jmp_near_indirect() || instruction.is_call_near_indirect()
}

/// Bytes a direct CALL pushes.
fn instruction_bytes(instruction: &Instruction) -> usize {
    instruction.stack_pointer_increment().unsigned_abs() as usize
}

/// log2 of the bytes LOOPcc counts in: the address size.
fn loop_counter(code: Code) -> u8 {
    match code {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => 1,
        Code::Loop_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loopne_rel8_16_RCX
        | Code::Loopne_rel8_64_RCX => 3,
        _ => 2,
    }
}

const JCC: [Handler; 16] = [
    jump_if::<0>,
    jump_if::<1>,
    jump_if::<2>,
    jump_if::<3>,
    jump_if::<4>,
    jump_if::<5>,
    jump_if::<6>,
    jump_if::<7>,
    jump_if::<8>,
    jump_if::<9>,
    jump_if::<10>,
    jump_if::<11>,
    jump_if::<12>,
    jump_if::<13>,
    jump_if::<14>,
    jump_if::<15>,
];

impl Cpu {
    /// Refuses a near branch target outside the code segment, or not canonical.
    #[inline(always)]
    fn check_near_target(&mut self, target: u64) -> Done {
        let good = if self.mode.is_64() { canonical(target) } else { target <= self.code_limit() };
        if good { Ok(()) } else { Err(self.gp()) }
    }

    /// Reads the top of the stack, leaving the stack pointer alone.
    fn stack_top<W: Width>(&mut self) -> Result<W, Leave> {
        let address = self.stack_linear(self.state.gpr[4], W::BYTES as u64, Access::Read)?;
        self.read_linear(address, seg::SS as u8, Rights::Current)
    }
}

#[inline(always)]
fn jump_to(cpu: &mut Cpu, target: u64) -> Done {
    cpu.check_near_target(target)?;
    cpu.state.rip = target;
    Ok(())
}

#[inline(always)]
fn call_to<W: Width>(cpu: &mut Cpu, op: &Op, target: u64) -> Done {
    if cpu.check_near_target(target).is_err() {
        // The stack's own fault comes first.
        let slot = cpu.state.gpr[4].wrapping_sub(W::BYTES as u64);
        let address = cpu.stack_linear(slot, W::BYTES as u64, Access::Write)?;
        cpu.probe_write(address, W::BYTES as u64, seg::SS as u8, Rights::Current)?;
        return Err(cpu.gp());
    }
    cpu.push(W::of(op.next))?;
    cpu.state.rip = target;
    Ok(())
}

fn jump(cpu: &mut Cpu, op: &Op) -> Done {
    jump_to(cpu, op.imm)
}

fn jump_if<const CONDITION: u8>(cpu: &mut Cpu, op: &Op) -> Done {
    if cpu.flags.condition(CONDITION) { jump_to(cpu, op.imm) } else { Ok(()) }
}

fn jump_register<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let target = cpu.get::<W>(op.reg[0]).zext();
    jump_to(cpu, target)
}

fn jump_memory<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let target = cpu.load::<W>(&op.mem)?.zext();
    jump_to(cpu, target)
}

fn call<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    call_to::<W>(cpu, op, op.imm)
}

fn call_register<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let target = cpu.get::<W>(op.reg[0]).zext();
    call_to::<W>(cpu, op, target)
}

fn call_memory<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let target = cpu.load::<W>(&op.mem)?.zext();
    call_to::<W>(cpu, op, target)
}

fn ret<W: Width>(cpu: &mut Cpu, _op: &Op) -> Done {
    return_releasing::<W>(cpu, 0)
}

fn ret_releasing<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    return_releasing::<W>(cpu, op.imm)
}

#[inline(always)]
fn return_releasing<W: Width>(cpu: &mut Cpu, release: u64) -> Done {
    let target = cpu.stack_top::<W>()?.zext();
    cpu.check_near_target(target)?;
    let pointer = cpu.state.gpr[4].wrapping_add(W::BYTES as u64).wrapping_add(release);
    cpu.set_stack_pointer(pointer);
    cpu.state.rip = target;
    Ok(())
}

/// Counts down, unless the branch would be taken and its target refused.
#[inline(always)]
fn count_and_jump(cpu: &mut Cpu, op: &Op, condition: bool) -> Done {
    let count = cpu.gpr(RCX, op.size).wrapping_sub(1) & crate::cpu::size_mask(op.size);
    let taken = count != 0 && condition;
    if taken {
        cpu.check_near_target(op.imm)?;
        cpu.state.rip = op.imm;
    }
    cpu.set_gpr(RCX, op.size, count);
    Ok(())
}

fn loop_always(cpu: &mut Cpu, op: &Op) -> Done {
    count_and_jump(cpu, op, true)
}

fn loop_if<const ZERO: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    let condition = cpu.flags.zf() == ZERO;
    count_and_jump(cpu, op, condition)
}

fn jump_if_no_count<const SIZE: u8>(cpu: &mut Cpu, op: &Op) -> Done {
    if cpu.gpr(RCX, SIZE) == 0 { jump_to(cpu, op.imm) } else { Ok(()) }
}
