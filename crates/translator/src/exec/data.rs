//! Moves: MOV, MOVZX, MOVSX, MOVSXD, MOVBE, MOVNTI, LEA, BSWAP, XLAT, SETcc, CMOVcc and the CBW and CWD families.

use engine::cpu_model::Feature;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{by_width, condition_of, offered, operand_bytes};
use crate::cpu::Cpu;
use crate::op::{AddressForm, Done, Handler, NO_REG, Op};
use crate::width::Width;

const RAX: u8 = 0;
const RDX: u8 = 16;

pub(super) fn select(instruction: &Instruction, cpu: &Cpu, op: &mut Op) -> Option<Handler> {
    let bytes = || operand_bytes(instruction, 0);
    Some(match instruction.mnemonic() {
        Mnemonic::Mov => return mov(instruction),
        Mnemonic::Movnti => by_width!(bytes(), store_register),
        Mnemonic::Movzx => extend::<Zero>(instruction),
        Mnemonic::Movsx | Mnemonic::Movsxd => extend::<Sign>(instruction),
        Mnemonic::Movbe if !offered(cpu, Feature::Movbe) => crate::decode::raise_ud,
        Mnemonic::Movbe if instruction.op0_kind() == OpKind::Memory => by_width!(bytes(), store_swapped),
        Mnemonic::Movbe => by_width!(bytes(), load_swapped),
        Mnemonic::Lea => by_width!(bytes(), lea),
        Mnemonic::Bswap => match bytes() {
            8 => bswap_64,
            4 => bswap_32,
            _ => bswap_16,
        },
        Mnemonic::Xlatb => xlat_operand(instruction, op),
        Mnemonic::Cbw => cbw,
        Mnemonic::Cwde => cwde,
        Mnemonic::Cdqe => cdqe,
        Mnemonic::Cwd => sign_into_dx::<u16>,
        Mnemonic::Cdq => sign_into_dx::<u32>,
        Mnemonic::Cqo => sign_into_dx::<u64>,
        _ => return conditional(instruction, op),
    })
}

/// MOV between general-purpose registers, memory and immediates; segment, control and debug registers are `system`'s.
fn mov(instruction: &Instruction) -> Option<Handler> {
    let other =
        |position| instruction.op_kind(position) == OpKind::Register && !instruction.op_register(position).is_gpr();
    if other(0) || other(1) {
        return None;
    }
    let bytes = operand_bytes(instruction, 0);
    Some(match (instruction.op0_kind(), instruction.op1_kind()) {
        (OpKind::Register, OpKind::Register) => by_width!(bytes, register_register),
        (OpKind::Register, OpKind::Memory) => by_width!(bytes, load_register),
        (OpKind::Memory, OpKind::Register) => by_width!(bytes, store_register),
        (OpKind::Register, _) => by_width!(bytes, register_immediate),
        _ => by_width!(bytes, store_immediate),
    })
}

fn register_register<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.set(op.reg[0], cpu.get::<W>(op.reg[1]));
    Ok(())
}

fn load_register<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let value = cpu.load::<W>(&op.mem)?;
    cpu.set(op.reg[0], value);
    Ok(())
}

fn store_register<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let value = cpu.get::<W>(op.reg[1]);
    cpu.store(&op.mem, value)
}

fn register_immediate<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.set(op.reg[0], W::of(op.imm));
    Ok(())
}

fn store_immediate<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.store(&op.mem, W::of(op.imm))
}

/// How a narrow value becomes a wide one.
trait Extend {
    fn extend<W: Width>(value: W) -> u64;
}

struct Zero;
struct Sign;

impl Extend for Zero {
    #[inline(always)]
    fn extend<W: Width>(value: W) -> u64 {
        value.zext()
    }
}

impl Extend for Sign {
    #[inline(always)]
    fn extend<W: Width>(value: W) -> u64 {
        value.sext()
    }
}

fn extend<E: Extend>(instruction: &Instruction) -> Handler {
    let (to, mut from) = (operand_bytes(instruction, 0), operand_bytes(instruction, 1));
    if instruction.mnemonic() == Mnemonic::Movsxd {
        from = 4; // with an operand-size prefix too: only the result is shorter
    }
    match (instruction.op1_kind(), from) {
        (OpKind::Register, 1) => by_width!(to, extend_register, E, u8),
        (OpKind::Register, 2) => by_width!(to, extend_register, E, u16),
        (OpKind::Register, _) => by_width!(to, extend_register, E, u32),
        (_, 1) => by_width!(to, extend_memory, E, u8),
        (_, 2) => by_width!(to, extend_memory, E, u16),
        _ => by_width!(to, extend_memory, E, u32),
    }
}

fn extend_register<E: Extend, From: Width, To: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let value = E::extend(cpu.get::<From>(op.reg[1]));
    cpu.set(op.reg[0], To::of(value));
    Ok(())
}

fn extend_memory<E: Extend, From: Width, To: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let value = E::extend(cpu.load::<From>(&op.mem)?);
    cpu.set(op.reg[0], To::of(value));
    Ok(())
}

fn swapped<W: Width>(value: W) -> W {
    W::of(value.zext().swap_bytes() >> (64 - W::BITS))
}

fn load_swapped<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let value = cpu.load::<W>(&op.mem)?;
    cpu.set(op.reg[0], swapped(value));
    Ok(())
}

fn store_swapped<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let value = cpu.get::<W>(op.reg[1]);
    cpu.store(&op.mem, swapped(value))
}

fn bswap_64(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.set(op.reg[0], cpu.get::<u64>(op.reg[0]).swap_bytes());
    Ok(())
}

fn bswap_32(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.set(op.reg[0], cpu.get::<u32>(op.reg[0]).swap_bytes());
    Ok(())
}

/// Undefined by the manuals (SDM vol. 2, BSWAP); processors clear the register.
fn bswap_16(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.set(op.reg[0], 0_u16);
    Ok(())
}

fn lea<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.set(op.reg[0], W::of(cpu.effective_address(&op.mem)));
    Ok(())
}

/// XLAT: the index is AL, zero-extended, which no other addressing form has; the handler adds it.
fn xlat_operand(instruction: &Instruction, op: &mut Op) -> Handler {
    op.mem.form = AddressForm::General;
    op.mem.base = 3;
    op.mem.index = NO_REG;
    op.mem.address_size = match instruction.memory_base() {
        Register::RBX => 3,
        Register::EBX => 2,
        _ => 1,
    };
    xlat
}

fn xlat(cpu: &mut Cpu, op: &Op) -> Done {
    let mut mem = op.mem;
    mem.disp = cpu.get::<u8>(RAX).zext();
    let value = cpu.load::<u8>(&mem)?;
    cpu.set(RAX, value);
    Ok(())
}

fn cbw(cpu: &mut Cpu, _op: &Op) -> Done {
    cpu.set(RAX, u16::of(cpu.get::<u8>(RAX).sext()));
    Ok(())
}

fn cwde(cpu: &mut Cpu, _op: &Op) -> Done {
    cpu.set(RAX, u32::of(cpu.get::<u16>(RAX).sext()));
    Ok(())
}

fn cdqe(cpu: &mut Cpu, _op: &Op) -> Done {
    cpu.set(RAX, cpu.get::<u32>(RAX).sext());
    Ok(())
}

/// CWD, CDQ, CQO: every bit of DX becomes the sign of AX.
fn sign_into_dx<W: Width>(cpu: &mut Cpu, _op: &Op) -> Done {
    let sign = cpu.get::<W>(RAX).sext() as i64 >> 63;
    cpu.set(RDX, W::of(sign as u64));
    Ok(())
}

/// SETcc and CMOVcc; the condition goes into the immediate, which neither has.
fn conditional(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
    let condition = condition_of(instruction)?;
    if instruction.is_jcc_short_or_near() || instruction.is_loopcc() {
        return None;
    }
    op.imm = condition.into();
    Some(match (instruction.op_count(), memory) {
        (1, true) => set_memory,
        (1, false) => set_register,
        (_, true) => by_width!(operand_bytes(instruction, 0), move_memory_if),
        (_, false) => by_width!(operand_bytes(instruction, 0), move_register_if),
    })
}

fn set_register(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.set(op.reg[0], u8::from(cpu.flags.condition(op.imm as u8)));
    Ok(())
}

fn set_memory(cpu: &mut Cpu, op: &Op) -> Done {
    let value = u8::from(cpu.flags.condition(op.imm as u8));
    cpu.store(&op.mem, value)
}

/// CMOVcc writes its destination always, which for 32 bits clears the upper half.
#[inline(always)]
fn move_if<W: Width>(cpu: &mut Cpu, op: &Op, source: W) -> Done {
    let value = if cpu.flags.condition(op.imm as u8) { source } else { cpu.get(op.reg[0]) };
    cpu.set(op.reg[0], value);
    Ok(())
}

fn move_register_if<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let source = cpu.get::<W>(op.reg[1]);
    move_if(cpu, op, source)
}

/// Memory is read whether or not the condition holds.
fn move_memory_if<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let source = cpu.load::<W>(&op.mem)?;
    move_if(cpu, op, source)
}
