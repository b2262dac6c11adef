//! Instructions that touch memory element by element: masked moves and gathers.
//!
//! What the mask leaves out is not accessed and cannot fault. Masked stores check every element before they write the
//! first; gathers keep what they have loaded when one element faults, and clear its mask, so that they go on from there
//! when they run again (Intel SDM vol. 2, VGATHERDPS).

use engine::state::rflags;
use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

use crate::cpu::Cpu;
use crate::decode::{memory_segment, raise_ud};
use crate::mmu::{Access, Rights};
use crate::op::{AddressForm, Done, Handler, Leave, Mem, NO_REG, Op};
use crate::vector::gate::{Gate, Mmx, Sse, Vex};
use crate::vector::registers::{Registers, ST, enter_mmx, high, set_high, set_xmm, xmm};

/// `op.prefixes` of the handlers here: the operand is a YMM register's.
const WIDE: u8 = 1 << 7;

/// The handler where the instruction is one of these. Vector registers in `op.reg` become plain numbers.
pub(super) fn select(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    use Mnemonic::*;
    let store = instruction.op0_kind() == OpKind::Memory;
    let handler: Handler = match instruction.mnemonic() {
        Vmaskmovps | Vpmaskmovd if store => store_masked::<4>,
        Vmaskmovpd | Vpmaskmovq if store => store_masked::<8>,
        Vmaskmovps | Vpmaskmovd => load_masked::<4>,
        Vmaskmovpd | Vpmaskmovq => load_masked::<8>,
        Maskmovdqu | Maskmovq | Vmaskmovdqu => {
            op.mem = destination(instruction);
            match instruction.mnemonic() {
                Maskmovdqu => store_bytes::<Sse>,
                Vmaskmovdqu => store_bytes::<Vex>,
                _ => store_bytes::<Mmx>,
            }
        }
        Vgatherdps | Vpgatherdd => gather_of::<4, 4>(instruction, op),
        Vgatherdpd | Vpgatherdq => gather_of::<4, 8>(instruction, op),
        Vgatherqps | Vpgatherqd => gather_of::<8, 4>(instruction, op),
        Vgatherqpd | Vpgatherqq => gather_of::<8, 8>(instruction, op),
        _ => return None,
    };
    let mut wide = instruction.memory_index().is_ymm();
    for position in 0..instruction.op_count().min(4) {
        if instruction.op_kind(position) == OpKind::Register {
            let register = instruction.op_register(position);
            wide |= register.is_ymm();
            op.reg[position as usize] = register.number() as u8;
        }
    }
    op.prefixes |= if wide { WIDE } else { 0 };
    Some(handler)
}

/// Where MASKMOVDQU stores: DS:rDI, or another segment.
fn destination(instruction: &Instruction) -> Mem {
    let address_size = match instruction.op0_kind() {
        OpKind::MemorySegDI => 1,
        OpKind::MemorySegEDI => 2,
        _ => 3,
    };
    let segment = memory_segment(instruction);
    Mem { form: AddressForm::General, segment, base: 7, address_size, ..Mem::NONE }
}

/// Both halves of a register.
fn whole(cpu: &Cpu, register: u8) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(&xmm(&cpu.state.xsave, register));
    bytes[16..].copy_from_slice(&high(&cpu.state.xsave, register));
    bytes
}

fn set_whole(cpu: &mut Cpu, register: u8, bytes: &[u8; 32]) {
    let (low, upper) = bytes.split_at(16);
    set_xmm(&mut cpu.state.xsave, register, low.try_into().unwrap_or_default());
    set_high(&mut cpu.state.xsave, register, upper.try_into().unwrap_or_default());
}

/// Bytes of the operand.
fn span(op: &Op) -> usize {
    if op.prefixes & WIDE != 0 { 32 } else { 16 }
}

/// True where the element of `size` bytes at `at` has its top bit set.
fn enabled(mask: &[u8], at: usize, size: usize) -> bool {
    mask[at + size - 1] >> 7 != 0
}

/// The linear address of the element of `size` bytes, `at` bytes into the operand.
fn element(cpu: &mut Cpu, op: &Op, at: usize, size: usize, access: Access) -> Result<u64, Leave> {
    let mem = Mem { disp: op.mem.disp.wrapping_add(at as u64), ..op.mem };
    cpu.linear(&mem, size as u64, access)
}

/// Runs the accesses of a masked move, which are at any alignment whatever RFLAGS.AC says.
fn at_any_alignment(cpu: &mut Cpu, accesses: impl FnOnce(&mut Cpu) -> Done) -> Done {
    // Elsewhere than at CPL 3 the flag is about SMAP.
    let check = if cpu.mode.cpl == 3 { cpu.state.rflags & rflags::AC } else { 0 };
    cpu.state.rflags &= !check;
    let done = accesses(cpu);
    cpu.state.rflags |= check;
    done
}

fn load_masked<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Done {
    Vex::check(cpu)?;
    let mask = whole(cpu, op.reg[1]);
    let mut value = [0; 32];
    at_any_alignment(cpu, |cpu| {
        for at in (0..span(op)).step_by(SIZE).filter(|&at| enabled(&mask, at, SIZE)) {
            let address = element(cpu, op, at, SIZE, Access::Read)?;
            cpu.read_bytes(address, &mut value[at..at + SIZE], op.mem.segment, Rights::Current)?;
        }
        Ok(())
    })?;
    set_whole(cpu, op.reg[0], &value);
    Ok(())
}

fn store_masked<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Done {
    Vex::check(cpu)?;
    let (mask, value) = (whole(cpu, op.reg[1]), whole(cpu, op.reg[2]));
    at_any_alignment(cpu, |cpu| {
        probe_elements::<SIZE>(cpu, op, &mask[..span(op)])?;
        write_elements::<SIZE>(cpu, op, &mask[..span(op)], &value)
    })
}

/// MASKMOVDQU and MASKMOVQ. All of the operand is checked, whatever the mask says (for alignment by quadwords), and MMX
/// state is entered first: so does AMD's Zen.
fn store_bytes<G: Gate>(cpu: &mut Cpu, op: &Op) -> Done {
    G::check(cpu)?;
    let (span, mask, value) = if G::MMX {
        enter_mmx(&mut cpu.state.xsave);
        (8, mmx(cpu, op.reg[2]), mmx(cpu, op.reg[1]))
    } else {
        (16, whole(cpu, op.reg[2]), whole(cpu, op.reg[1]))
    };
    let address = cpu.linear(&op.mem, span as u64, Access::Write)?;
    for at in (0..span as u64).step_by(8) {
        cpu.probe_write(address.wrapping_add(at), 8, op.mem.segment, Rights::Current)?;
    }
    write_elements::<1>(cpu, op, &mask[..span], &value)
}

/// An MMX register, whatever TOP is.
fn mmx(cpu: &Cpu, register: u8) -> [u8; 32] {
    let area = &cpu.state.xsave;
    let at = ST + (usize::from(register & 7) + 8 - area.top()) % 8 * 16;
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&area.0[at..at + 8]);
    bytes
}

fn probe_elements<const SIZE: usize>(cpu: &mut Cpu, op: &Op, mask: &[u8]) -> Done {
    for at in (0..mask.len()).step_by(SIZE).filter(|&at| enabled(mask, at, SIZE)) {
        let address = element(cpu, op, at, SIZE, Access::Write)?;
        cpu.probe_write(address, SIZE as u64, op.mem.segment, Rights::Current)?;
    }
    Ok(())
}

fn write_elements<const SIZE: usize>(cpu: &mut Cpu, op: &Op, mask: &[u8], value: &[u8; 32]) -> Done {
    for at in (0..mask.len()).step_by(SIZE).filter(|&at| enabled(mask, at, SIZE)) {
        let address = element(cpu, op, at, SIZE, Access::Write)?;
        cpu.write_bytes(address, &value[at..at + SIZE], op.mem.segment, Rights::Current)?;
    }
    Ok(())
}

/// Prepares a gather: its memory operand has a vector register as index, whose number goes into `op.reg[3]`.
fn gather_of<const INDEX: usize, const SIZE: usize>(instruction: &Instruction, op: &mut Op) -> Handler {
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    let number = |register: Register| register.number();
    let (target, mask) = (number(instruction.op0_register()), number(instruction.op2_register()));
    if instruction.encoding() != EncodingKind::VEX || target == mask || target == number(index) || mask == number(index)
    {
        return raise_ud;
    }
    let narrow =
        base.is_gpr32() || base == Register::EIP || base == Register::None && instruction.memory_displ_size() != 8;
    op.mem = Mem {
        form: AddressForm::General,
        base: if base.is_gpr() { base.number() as u8 } else { NO_REG },
        index: NO_REG,
        address_size: if narrow { 2 } else { 3 },
        ..op.mem
    };
    op.reg[3] = number(index) as u8;
    gather::<INDEX, SIZE>
}

fn gather<const INDEX: usize, const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Done {
    Vex::check(cpu)?;
    let indices = whole(cpu, op.reg[3]);
    let (mut value, mut mask) = (whole(cpu, op.reg[0]), whole(cpu, op.reg[2]));
    let elements = span(op) / INDEX.max(SIZE);
    let mut done = Ok(());
    for number in 0..elements {
        let at = number * SIZE;
        if !enabled(&mask, at, SIZE) {
            mask[at..at + SIZE].fill(0);
            continue;
        }
        let mut index = [0; 8];
        index[..INDEX].copy_from_slice(&indices[number * INDEX..(number + 1) * INDEX]);
        let index = if INDEX == 4 {
            i64::from(i32::from_le_bytes([index[0], index[1], index[2], index[3]])) as u64
        } else {
            u64::from_le_bytes(index)
        };
        let mem = Mem { disp: op.mem.disp.wrapping_add(index << op.mem.scale), ..op.mem };
        let loaded = cpu
            .linear(&mem, SIZE as u64, Access::Read)
            .and_then(|address| cpu.read_bytes(address, &mut value[at..at + SIZE], op.mem.segment, Rights::Current));
        if loaded.is_err() {
            done = loaded;
            break;
        }
        mask[at..at + SIZE].fill(0);
    }
    if done.is_ok() {
        value[elements * SIZE..].fill(0);
        mask.fill(0);
    }
    set_whole(cpu, op.reg[0], &value);
    set_whole(cpu, op.reg[2], &mask);
    done
}
