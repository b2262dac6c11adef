//! From guest bytes to [`Op`]s: iced-x86 decodes, the rooms choose handlers.
//!
//! Every room (`exec`, `vector`, `system`) has a `select`: the handler for an instruction it knows, or nothing. What
//! nobody knows is #UD for the guest and one line in the log.

use std::sync::atomic::{AtomicU32, Ordering};

use engine::Phase;
use iced_x86::{CodeSize, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, OpKind, Register};
use memory::{Gva, PAGE_SIZE};

use crate::block::{Block, Key, Version};
use crate::cpu::{Cpu, Mode, size_mask};
use crate::mmu::{Access, Rights};
use crate::op::{AddressForm, Done, Handler, LOCK, Leave, Mem, NO_REG, Op, REP, REPNE};
use crate::trap;

/// Most instructions in a block.
const MOST_OPS: usize = 32;
/// Most bytes read for a block.
const MOST_BYTES: u64 = 256;
/// Longest instruction (SDM vol. 2, 2.3.11).
const LONGEST: usize = 15;

impl Key {
    fn of(gpa: u64, rip: u64, mode: Mode) -> Self {
        Self {
            gpa,
            rip,
            mode: u16::from(mode.code) | u16::from(mode.stack) << 2 | u16::from(mode.real_segments()) << 4,
        }
    }
}

/// A block and whether it may be kept (one that lies in two pages may not).
pub(crate) struct Found {
    pub block: Box<Block>,
    pub keep: bool,
}

/// Where code comes from: the page RIP lies in.
pub(crate) struct CodePlace {
    /// Linear address of RIP.
    pub linear: u64,
    pub host: *const u8,
    pub gpa: u64,
}

impl Cpu {
    /// Finds the page RIP points into.
    #[inline(always)]
    pub(crate) fn code_place(&mut self) -> Result<CodePlace, Leave> {
        let rip = self.state.rip;
        let linear = if self.mode.is_64() {
            rip
        } else {
            self.state.segments[engine::state::seg::CS].base.wrapping_add(rip) & 0xffff_ffff
        };
        match self.tlb.lookup_code(self.mode.cpl == 3, linear) {
            Some((host, gpa)) => Ok(CodePlace { linear, host, gpa }),
            None => self.code_place_slow(linear),
        }
    }

    #[cold]
    fn code_place_slow(&mut self, linear: u64) -> Result<CodePlace, Leave> {
        if self.mode.long && !crate::mmu::canonical(linear) {
            return Err(self.gp());
        }
        let before = self.config.ledger.profile.begin(Phase::TlbFill);
        let found = self.translate(Gva(linear), Access::Execute, Rights::Current);
        self.config.ledger.profile.back(before);
        let translation = found?;
        let Some(host) = self.shared.ram.host_page(translation.gpa) else {
            // Code in device memory: nothing there to run. A processor would fetch whatever the bus returns.
            return Err(self.ud());
        };
        if let Some(bytes) = translation.large {
            self.tlb.note_large(linear, bytes);
        }
        self.tlb.fill_code(self.mode.cpl == 3, linear, host.as_ptr(), translation.gpa.0);
        self.config.ledger.work(engine::ledger::Work::TlbFill, 1);
        Ok(CodePlace { linear, host: host.as_ptr(), gpa: translation.gpa.0 })
    }

    /// The key of the block at RIP.
    #[inline(always)]
    pub(crate) fn block_key(&self, place: &CodePlace) -> Key {
        Key::of(place.gpa, self.state.rip, self.mode)
    }

    /// Decodes the block at RIP.
    pub(crate) fn decode_block(&mut self, place: &CodePlace) -> Result<Found, Leave> {
        self.config.ledger.work(engine::ledger::Work::Decode, 1);
        let key = self.block_key(place);
        let available = (PAGE_SIZE - place.gpa % PAGE_SIZE).min(MOST_BYTES);
        let version = self.mark_code(place.gpa, available);
        let mut bytes = [0_u8; MOST_BYTES as usize];
        // SAFETY: `place.host` is good up to the end of its page.
        unsafe { std::ptr::copy_nonoverlapping(place.host, bytes.as_mut_ptr(), available as usize) };
        let bytes = &bytes[..available as usize];

        let limit = self.code_limit();
        let mut decoder = decoder(bytes, self.mode, key.rip);
        let mut ops = Vec::with_capacity(8);
        let mut next = key.rip;
        while ops.len() < MOST_OPS {
            let at = decoder.position();
            if at == bytes.len() {
                break;
            }
            let instruction = decoder.decode();
            if instruction.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
                if !ops.is_empty() {
                    break; // the next block begins here
                }
                return self.decode_across(place, key);
            }
            let op = self.op(&instruction, &bytes[at..], next, limit);
            next = op.next;
            ops.push(op);
            if ends_block(&instruction) {
                break;
            }
        }
        Ok(Found { block: Box::new(Block { key, version, ops, next }), keep: true })
    }

    /// Decodes one instruction whose bytes lie in two pages. Such a block is not kept: the second page may move.
    fn decode_across(&mut self, place: &CodePlace, key: Key) -> Result<Found, Leave> {
        let head = (PAGE_SIZE - place.linear % PAGE_SIZE) as usize;
        let second = self.translate(Gva(place.linear.wrapping_add(head as u64)), Access::Execute, Rights::Current)?;
        let Some(tail) = self.shared.ram.host_page(second.gpa) else { return Err(self.ud()) };
        let mut bytes = [0_u8; LONGEST];
        let head = head.min(LONGEST);
        // SAFETY: `place.host` is good to the end of its page, `head` bytes on; `tail` starts a page.
        unsafe {
            std::ptr::copy_nonoverlapping(place.host, bytes.as_mut_ptr(), head);
            std::ptr::copy_nonoverlapping(tail.as_ptr(), bytes.as_mut_ptr().add(head), LONGEST - head);
        }
        let instruction = decoder(&bytes, self.mode, key.rip).decode();
        let limit = self.code_limit();
        let op = self.op(&instruction, &bytes, key.rip, limit);
        let next = op.next;
        Ok(Found { block: Box::new(Block { key, version: Version::NEVER, ops: vec![op], next }), keep: false })
    }

    /// Declares the lines of code about to be read, and returns the version what is read belongs to.
    pub(crate) fn mark_code(&mut self, gpa: u64, bytes: u64) -> Version {
        let gpa = memory::Gpa(gpa);
        let Some(region) = self.shared.ram.region(gpa) else { return Version::NEVER };
        let offset = gpa.0 - region.start.0;
        // Where the page becomes code, nobody may write to it by the fast path any more.
        let marked = region.code().mark(offset, bytes);
        if marked.first && region.code().take_writers(offset) != 0 {
            self.forget_writes(gpa);
            self.tell_others(gpa);
        }
        let cell = self.shared.ram.region(gpa).and_then(|region| region.code().version_cell(offset));
        // SAFETY: the cell lives as long as guest RAM, which outlives this vCPU's blocks through `shared`.
        cell.map_or(Version::NEVER, |cell| unsafe { Version::of(cell, marked.version) })
    }

    /// The largest instruction pointer a byte of code may have.
    pub(crate) fn code_limit(&self) -> u64 {
        if self.mode.is_64() { u64::MAX } else { self.state.segments[engine::state::seg::CS].limit.into() }
    }

    /// Turns a decoded instruction into an [`Op`]. `bytes` start at the instruction.
    pub(crate) fn op(&mut self, instruction: &Instruction, bytes: &[u8], rip: u64, limit: u64) -> Op {
        let length = instruction.len().max(1) as u8;
        let mask = size_mask(self.mode.code);
        let mut op = Op {
            handler: raise_ud,
            next: rip.wrapping_add(length.into()) & mask,
            imm: 0,
            mem: Mem::NONE,
            reg: [NO_REG; 4],
            length,
            size: 0,
            prefixes: prefixes(instruction),
        };
        if rip.checked_add(u64::from(length) - 1).is_none_or(|last| last > limit) {
            op.handler = raise_gp; // past the code segment's limit
            return op;
        }
        if instruction.is_invalid() {
            let lenient = DecoderOptions::AMD | DecoderOptions::NO_INVALID_CHECK;
            let complete = || !Decoder::with_ip(8 << self.mode.code, bytes, rip, lenient).decode().is_invalid();
            if (instruction.len() >= LONGEST || too_long(bytes)) && !complete() {
                op.handler = raise_gp; // longer than 15 bytes (SDM vol. 2, 2.3.11)
            }
            return op;
        }
        operands(instruction, &mut op);
        if self.shared.config.classic
            && let Some(cause) = trap::cause(instruction)
        {
            op.note_cause(cause);
        }
        match self.select(instruction, bytes, &mut op) {
            Some(handler) => op.handler = handler,
            None if crate::offered::missed(instruction, &self.features) => report_unknown(instruction),
            None => {}
        }
        op
    }

    fn select(&mut self, instruction: &Instruction, bytes: &[u8], op: &mut Op) -> Option<Handler> {
        crate::exec::select(instruction, bytes, self, op)
            .or_else(|| crate::system::select(instruction, op))
            .or_else(|| crate::vector::select(instruction, bytes, self, op))
    }
}

fn decoder(bytes: &[u8], mode: Mode, rip: u64) -> Decoder<'_> {
    Decoder::with_ip(8 << mode.code, bytes, rip, DecoderOptions::AMD)
}

/// True where the instruction may go elsewhere than on.
fn ends_block(instruction: &Instruction) -> bool {
    instruction.flow_control() != FlowControl::Next
}

/// 15 bytes of legacy prefixes and still no opcode.
fn too_long(bytes: &[u8]) -> bool {
    let prefix = |byte: &u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3 | 0x40..=0x4f);
    bytes.len() >= LONGEST && bytes[..LONGEST].iter().all(prefix)
}

fn prefixes(instruction: &Instruction) -> u8 {
    let mut prefixes = 0;
    if instruction.has_lock_prefix() {
        prefixes |= LOCK;
    }
    if instruction.has_rep_prefix() {
        prefixes |= REP;
    }
    if instruction.has_repne_prefix() {
        prefixes |= REPNE;
    }
    prefixes
}

/// Fills in registers, memory operand and immediate.
fn operands(instruction: &Instruction, op: &mut Op) {
    for position in 0..instruction.op_count().min(4) {
        match instruction.op_kind(position) {
            OpKind::Register => op.reg[position as usize] = register_offset(instruction.op_register(position)),
            OpKind::Memory => op.mem = memory_operand(instruction),
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                op.imm = instruction.near_branch_target();
            }
            OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => {
                // ENTER, EXTRQ and INSERTQ have two: the second goes above the first.
                let value = instruction.immediate(position);
                op.imm = if instruction.op_kind(position) == OpKind::Immediate8_2nd {
                    op.imm & 0xffff_ffff | value << 32
                } else {
                    value
                };
            }
            _ => {} // string operands and far pointers: their handlers ask the instruction
        }
    }
}

/// The byte offset of a general-purpose register in the register file; [`NO_REG`] for others.
pub(crate) fn register_offset(register: Register) -> u8 {
    if !register.is_gpr() {
        return NO_REG;
    }
    // By the full register: iced counts the byte registers AL..R15L 0..=19.
    let number = register.full_register().number() as u8 & 15;
    match register {
        Register::AH | Register::CH | Register::DH | Register::BH => number * 8 + 1,
        _ => number * 8,
    }
}

/// The number of a general-purpose register, [`NO_REG`] where there is none.
fn register_number(register: Register) -> u8 {
    if register.is_gpr() { register.number() as u8 } else { NO_REG }
}

/// The segment register of a memory operand. 64-bit mode ignores overrides other than FS and GS (AMD APM vol. 3, 1.2.4),
/// but the stack pointer and the frame pointer as bases still mean #SS.
pub(crate) fn memory_segment(instruction: &Instruction) -> u8 {
    let segment = instruction.memory_segment().number() as u8;
    if instruction.code_size() != CodeSize::Code64 || segment >= engine::state::seg::FS as u8 {
        return segment;
    }
    let of_stack = matches!(instruction.memory_base(), Register::RSP | Register::RBP | Register::ESP | Register::EBP);
    if of_stack { engine::state::seg::SS as u8 } else { engine::state::seg::DS as u8 }
}

/// The memory operand of an instruction.
pub(crate) fn memory_operand(instruction: &Instruction) -> Mem {
    let segment = memory_segment(instruction);
    let displacement = instruction.memory_displacement64();
    if instruction.is_ip_rel_memory_operand() {
        let address = instruction.ip_rel_memory_address();
        let narrow = instruction.memory_base() == Register::EIP;
        let flat = segment < 4 && !narrow;
        return Mem {
            form: if flat { AddressForm::Absolute } else { AddressForm::General },
            segment,
            base: NO_REG,
            index: NO_REG,
            scale: 0,
            address_size: if narrow { 2 } else { 3 },
            disp: address,
        };
    }
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    let wide = |register: Register| register == Register::None || register.is_gpr64();
    let address_size = match (base, index) {
        (Register::None, Register::None) => match instruction.memory_displ_size() {
            8 => 3,
            4 => 2,
            2 => 1,
            _ => 3,
        },
        _ if wide(base) && wide(index) => 3,
        _ if base.is_gpr32() || index.is_gpr32() || !index.is_gpr() && !base.is_gpr16() => 2,
        _ => 1,
    };
    let flat = address_size == 3 && segment < 4;
    let (base, index) = (register_number(base), register_number(index));
    let form = match (flat, base != NO_REG, index != NO_REG) {
        (true, false, false) => AddressForm::Absolute,
        (true, true, false) => AddressForm::Base,
        (true, true, true) => AddressForm::BaseIndex,
        _ => AddressForm::General,
    };
    let scale = instruction.memory_index_scale().trailing_zeros() as u8;
    Mem { form, segment, base, index, scale, address_size, disp: displacement }
}

pub(crate) fn raise_ud(cpu: &mut Cpu, _op: &Op) -> Done {
    Err(cpu.ud())
}

fn raise_gp(cpu: &mut Cpu, _op: &Op) -> Done {
    Err(cpu.gp())
}

/// Says once in a while what guests use that this engine does not know.
fn report_unknown(instruction: &Instruction) {
    static SAID: AtomicU32 = AtomicU32::new(0);
    if SAID.fetch_add(1, Ordering::Relaxed) < 16 {
        tracing::warn!(code = ?instruction.code(), rip = instruction.ip(), "instruction not supported: the guest gets #UD");
    }
}
