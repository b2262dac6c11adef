//! Segment registers and descriptor-table registers: MOV, POP, LDS and kin, LGDT, LLDT, LTR, LAR, LSL, VERR, VERW, ARPL
//! (Intel SDM vol. 2; checks as in vol. 3A, 5.4 to 5.9).

use engine::state::rflags::ZF;
use engine::state::{Segment, Shadow, cr4, seg};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::descriptor::{is_null, kind, selector_code};
use crate::cpu::{Cpu, vector};
use crate::mmu::{Access, Rights, canonical};
use crate::op::{Done, Handler, Leave, NO_REG, Op};

pub(super) fn select(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let size = |register: Register| match register.size() {
        2 => 1,
        4 => 2,
        _ => 3,
    };
    Some(match instruction.mnemonic() {
        Mnemonic::Mov if instruction.op0_register().is_segment_register() => {
            op.size = instruction.op0_register().number() as u8;
            mov_to_segment
        }
        Mnemonic::Mov if instruction.op1_register().is_segment_register() => {
            op.imm = instruction.op1_register().number() as u64;
            op.size = if instruction.op0_kind() == OpKind::Register { size(instruction.op0_register()) } else { 1 };
            mov_from_segment
        }
        Mnemonic::Push if instruction.op0_register().is_segment_register() => {
            op.imm = instruction.op0_register().number() as u64;
            op.size = stack_size(instruction);
            push_segment
        }
        Mnemonic::Pop if instruction.op0_register().is_segment_register() => {
            op.imm = instruction.op0_register().number() as u64;
            op.size = stack_size(instruction);
            pop_segment
        }
        Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss => {
            op.imm = match instruction.mnemonic() {
                Mnemonic::Lds => seg::DS,
                Mnemonic::Les => seg::ES,
                Mnemonic::Lfs => seg::FS,
                Mnemonic::Lgs => seg::GS,
                _ => seg::SS,
            } as u64;
            op.size = size(instruction.op0_register());
            load_far_pointer
        }
        Mnemonic::Lgdt | Mnemonic::Lidt => {
            op.imm = u64::from(instruction.mnemonic() == Mnemonic::Lidt);
            op.size = table_size(instruction);
            load_table
        }
        Mnemonic::Sgdt | Mnemonic::Sidt => {
            op.imm = u64::from(instruction.mnemonic() == Mnemonic::Sidt);
            op.size = table_size(instruction);
            store_table
        }
        Mnemonic::Lldt => lldt,
        Mnemonic::Ltr => ltr,
        Mnemonic::Sldt | Mnemonic::Str => {
            op.imm = u64::from(instruction.mnemonic() == Mnemonic::Str);
            op.size = if instruction.op0_kind() == OpKind::Register { size(instruction.op0_register()) } else { 1 };
            store_selector
        }
        Mnemonic::Lar | Mnemonic::Lsl => {
            op.imm = u64::from(instruction.mnemonic() == Mnemonic::Lsl);
            op.size = size(instruction.op0_register());
            lar_lsl
        }
        Mnemonic::Verr | Mnemonic::Verw => {
            op.imm = u64::from(instruction.mnemonic() == Mnemonic::Verw);
            verify
        }
        Mnemonic::Arpl => {
            op.size = 1;
            arpl
        }
        _ => return None,
    })
}

/// log2 of the bytes PUSH or POP moves.
fn stack_size(instruction: &Instruction) -> u8 {
    match instruction.stack_pointer_increment().abs() {
        2 => 1,
        4 => 2,
        _ => 3,
    }
}

/// log2 of the operand size of LGDT and kin: 1 gives a 24-bit base.
fn table_size(instruction: &Instruction) -> u8 {
    use iced_x86::Code;
    match instruction.code() {
        Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 | Code::Sgdt_m1632_16 | Code::Sidt_m1632_16 => 1,
        Code::Lgdt_m1632 | Code::Lidt_m1632 | Code::Sgdt_m1632 | Code::Sidt_m1632 => 2,
        _ => 3,
    }
}

impl Cpu {
    /// A 16-bit operand at position `position`.
    pub(super) fn selector_operand(&mut self, op: &Op, position: usize) -> Result<u16, Leave> {
        if op.reg[position] != NO_REG { Ok(self.get(op.reg[position])) } else { self.load(&op.mem) }
    }

    /// Loads a segment register other than CS, as MOV and POP do.
    pub(super) fn load_segment(&mut self, number: usize, selector: u16) -> Done {
        let segment = self.checked_segment(number, selector, self.mode.cpl)?;
        self.state.segments[number] = segment;
        if number == seg::SS {
            self.refresh();
        }
        Ok(())
    }

    /// What a data or stack segment register becomes when `selector` is loaded at privilege `cpl`, with all checks made.
    pub(super) fn checked_segment(&mut self, number: usize, selector: u16, cpl: u8) -> Result<Segment, Leave> {
        if self.mode.v86 {
            return Ok(Segment { attributes: 0xf3, ..Segment::real_mode(selector) });
        }
        if self.mode.real {
            // Limit and attributes stay what they were (SDM vol. 3A, 20.1.1).
            return Ok(Segment { selector, base: u64::from(selector) << 4, ..self.state.segments[number] });
        }
        let rpl = selector as u8 & 3;
        if is_null(selector) {
            let allowed = number != seg::SS || self.mode.is_64() && cpl < 3 && rpl == cpl;
            if !allowed {
                return Err(self.gp());
            }
            // An unusable stack segment still carries the privilege level.
            let attributes = if number == seg::SS { u16::from(cpl) << 5 } else { 0 };
            return Ok(Segment { selector, attributes, limit: 0, base: 0 });
        }
        let mut descriptor = self.descriptor(selector, vector::GP, 0)?;
        let dpl = descriptor.dpl();
        let allowed = if number == seg::SS {
            descriptor.is_writable_data() && rpl == cpl && dpl == cpl
        } else {
            let conforming = descriptor.is_code() && descriptor.is_conforming();
            descriptor.is_readable() && (conforming || rpl <= dpl && cpl <= dpl)
        };
        if !allowed {
            return Err(self.gp_selector(selector));
        }
        if !descriptor.present() {
            let fault = if number == seg::SS { vector::SS } else { vector::NP };
            return Err(self.raise_code(fault, selector_code(selector)));
        }
        self.set_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// #GP(0) above CPL 0, where paging or protection is on.
    pub(super) fn require_cpl0(&mut self) -> Done {
        if self.mode.cpl == 0 { Ok(()) } else { Err(self.gp()) }
    }

    /// #UD in real and virtual-8086 mode.
    fn require_protected(&mut self) -> Done {
        if self.mode.real_segments() { Err(self.ud()) } else { Ok(()) }
    }

    /// CR4.UMIP: SGDT, SIDT, SLDT, STR and SMSW only at CPL 0.
    pub(super) fn check_umip(&mut self) -> Done {
        if self.state.cr4 & cr4::UMIP != 0 && self.mode.cpl > 0 { Err(self.gp()) } else { Ok(()) }
    }
}

fn mov_to_segment(cpu: &mut Cpu, op: &Op) -> Done {
    let selector = cpu.selector_operand(op, 1)?;
    let number = op.size as usize;
    if number == seg::CS || number > seg::GS {
        return Err(cpu.ud());
    }
    cpu.load_segment(number, selector)?;
    if number == seg::SS {
        cpu.state.shadow = Shadow::MovSs;
        cpu.recheck = true;
    }
    Ok(())
}

fn mov_from_segment(cpu: &mut Cpu, op: &Op) -> Done {
    let Some(segment) = cpu.state.segments.get(op.imm as usize) else { return Err(cpu.ud()) };
    let selector = segment.selector;
    store_16(cpu, op, selector.into())
}

/// Stores to a register of `op.size`, or 16 bits to memory.
pub(super) fn store_16(cpu: &mut Cpu, op: &Op, value: u64) -> Done {
    if op.reg[0] == NO_REG {
        return cpu.store(&op.mem, value as u16);
    }
    cpu.set_gpr((op.reg[0] >> 3) as usize, op.size, value);
    Ok(())
}

fn push_segment(cpu: &mut Cpu, op: &Op) -> Done {
    let selector = cpu.state.segments[op.imm as usize].selector;
    cpu.push_sized(op.size, selector.into())
}

fn pop_segment(cpu: &mut Cpu, op: &Op) -> Done {
    let number = op.imm as usize;
    let before = cpu.state.gpr[4];
    let selector = cpu.pop_sized(op.size)? as u16;
    if let Err(fault) = cpu.load_segment(number, selector) {
        cpu.state.gpr[4] = before;
        return Err(fault);
    }
    if number == seg::SS {
        cpu.state.shadow = Shadow::MovSs;
        cpu.recheck = true;
    }
    Ok(())
}

fn load_far_pointer(cpu: &mut Cpu, op: &Op) -> Done {
    let bytes = 1_u64 << op.size;
    let address = cpu.linear(&op.mem, bytes + 2, Access::Read)?;
    let mut buffer = [0; 10];
    cpu.read_bytes(address, &mut buffer[..bytes as usize + 2], op.mem.segment, Rights::Current)?;
    let selector = u16::from_le_bytes([buffer[bytes as usize], buffer[bytes as usize + 1]]);
    buffer[bytes as usize..].fill(0);
    let offset =
        u64::from_le_bytes([buffer[0], buffer[1], buffer[2], buffer[3], buffer[4], buffer[5], buffer[6], buffer[7]]);
    cpu.load_segment(op.imm as usize, selector)?;
    cpu.set_gpr((op.reg[0] >> 3) as usize, op.size, offset);
    Ok(())
}

fn load_table(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_cpl0()?;
    let wide = cpu.mode.is_64();
    let bytes = if wide { 10 } else { 6 };
    let address = cpu.linear(&op.mem, bytes, Access::Read)?;
    let mut buffer = [0; 10];
    cpu.read_bytes(address, &mut buffer[..bytes as usize], op.mem.segment, Rights::Current)?;
    let limit = u16::from_le_bytes([buffer[0], buffer[1]]);
    let mut base =
        u64::from_le_bytes([buffer[2], buffer[3], buffer[4], buffer[5], buffer[6], buffer[7], buffer[8], buffer[9]]);
    if wide && !canonical(base) {
        return Err(cpu.gp());
    }
    if !wide && op.size == 1 {
        base &= 0xff_ffff;
    }
    let table = if op.imm == 0 { &mut cpu.state.gdtr } else { &mut cpu.state.idtr };
    (table.base, table.limit) = (base, limit);
    Ok(())
}

fn store_table(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.check_umip()?;
    let wide = cpu.mode.is_64();
    let table = if op.imm == 0 { cpu.state.gdtr } else { cpu.state.idtr };
    let bytes = if wide { 10 } else { 6 };
    let mut buffer = [0; 10];
    buffer[..2].copy_from_slice(&table.limit.to_le_bytes());
    buffer[2..].copy_from_slice(&table.base.to_le_bytes());
    let address = cpu.linear(&op.mem, bytes, Access::Write)?;
    cpu.write_bytes(address, &buffer[..bytes as usize], op.mem.segment, Rights::Current)
}

fn lldt(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_protected()?;
    cpu.require_cpl0()?;
    let selector = cpu.selector_operand(op, 0)?;
    if is_null(selector) {
        cpu.state.ldtr = Segment { selector, ..Segment::default() };
        return Ok(());
    }
    if selector & 4 != 0 {
        return Err(cpu.gp_selector(selector));
    }
    let descriptor = cpu.descriptor(selector, vector::GP, 0)?;
    if descriptor.code_or_data() || descriptor.kind() != kind::LDT {
        return Err(cpu.gp_selector(selector));
    }
    if !descriptor.present() {
        return Err(cpu.raise_code(vector::NP, selector_code(selector)));
    }
    let segment = descriptor.segment(selector);
    if cpu.mode.long && !canonical(segment.base) {
        return Err(cpu.gp_selector(selector));
    }
    cpu.state.ldtr = segment;
    Ok(())
}

fn ltr(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_protected()?;
    cpu.require_cpl0()?;
    let selector = cpu.selector_operand(op, 0)?;
    if is_null(selector) {
        return Err(cpu.gp());
    }
    if selector & 4 != 0 {
        return Err(cpu.gp_selector(selector));
    }
    let mut descriptor = cpu.descriptor(selector, vector::GP, 0)?;
    let fits = match descriptor.kind() {
        kind::TSS => true,
        kind::TSS_16 => !cpu.mode.long,
        _ => false,
    };
    if descriptor.code_or_data() || !fits {
        return Err(cpu.gp_selector(selector));
    }
    if !descriptor.present() {
        return Err(cpu.raise_code(vector::NP, selector_code(selector)));
    }
    if cpu.mode.long && !canonical(descriptor.segment(selector).base) {
        return Err(cpu.gp_selector(selector));
    }
    let busy = descriptor.kind() | 2;
    cpu.set_descriptor_kind(&mut descriptor, busy)?;
    cpu.state.tr = descriptor.segment(selector);
    Ok(())
}

fn store_selector(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_protected()?;
    cpu.check_umip()?;
    let selector = if op.imm == 0 { cpu.state.ldtr.selector } else { cpu.state.tr.selector };
    store_16(cpu, op, selector.into())
}

/// Raises the RPL of the first operand to that of the second.
fn arpl(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_protected()?;
    let selector = cpu.selector_operand(op, 0)?;
    let least = cpu.get::<u16>(op.reg[1]) & 3;
    let raise = selector & 3 < least;
    if raise {
        store_16(cpu, op, (selector & !3 | least).into())?;
    }
    cpu.flags.change(ZF, if raise { ZF } else { 0 });
    Ok(())
}

fn lar_lsl(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_protected()?;
    let selector = cpu.selector_operand(op, 1)?;
    let value = visible(cpu, selector, op.imm == 1)?;
    if let Some(value) = value {
        cpu.set_gpr((op.reg[0] >> 3) as usize, op.size, value);
    }
    cpu.flags.change(ZF, if value.is_some() { ZF } else { 0 });
    Ok(())
}

/// What LAR (access rights) or LSL (limit) returns, where the descriptor is visible to the program.
fn visible(cpu: &mut Cpu, selector: u16, limit: bool) -> Result<Option<u64>, Leave> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(descriptor) = cpu.find_descriptor(selector)? else { return Ok(None) };
    let has_one = descriptor.code_or_data()
        || match descriptor.kind() {
            kind::LDT | kind::TSS | kind::TSS_BUSY => true,
            kind::TSS_16 | kind::TSS_16_BUSY => !cpu.mode.long,
            kind::CALL_GATE => !limit,
            kind::CALL_GATE_16 | kind::TASK_GATE => !limit && !cpu.mode.long,
            _ => false,
        };
    let conforming = descriptor.is_code() && descriptor.is_conforming();
    let privileged = conforming || (cpu.mode.cpl <= descriptor.dpl() && selector as u8 & 3 <= descriptor.dpl());
    if !has_one || !privileged {
        return Ok(None);
    }
    Ok(Some(if limit { descriptor.limit().into() } else { descriptor.low >> 32 & 0x00ff_ff00 }))
}

fn verify(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_protected()?;
    let selector = cpu.selector_operand(op, 0)?;
    let mut accessible = false;
    if !is_null(selector)
        && let Some(descriptor) = cpu.find_descriptor(selector)?
    {
        let conforming = descriptor.is_code() && descriptor.is_conforming();
        let privileged = conforming || (cpu.mode.cpl <= descriptor.dpl() && selector as u8 & 3 <= descriptor.dpl());
        let kind = if op.imm == 1 { descriptor.is_writable_data() } else { descriptor.is_readable() };
        accessible = kind && privileged;
    }
    cpu.flags.change(ZF, if accessible { ZF } else { 0 });
    Ok(())
}
