//! MOVS, STOS, LODS, CMPS, SCAS, alone and under REP.
//!
//! ```text
//!   REP: count left? ─┬─ both sides lie in pages the soft TLB knows ─> the host's own REP, up to the page's end
//!                     └─ else ─> one element the ordinary way: faults, devices, page crossings, pages with code
//! ```
//!
//! RSI, RDI and RCX are written after each piece, so a fault finds them as the processor would leave them. A long run
//! gives way ([`Leave::Again`]) when something is pending, after [`MOST_BYTES`], and after each element under RFLAGS.TF.

use std::arch::asm;

use engine::state::{rflags, seg};
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::by_width;
use crate::cpu::{Cpu, size_mask};
use crate::mmu::{Access, Rights};
use crate::op::{Done, Handler, Leave, Op, REP, REPNE};
use crate::width::Width;

const RAX: u8 = 0;
const RCX: usize = 1;
const RSI: usize = 6;
const RDI: usize = 7;

/// Bytes a repeated instruction moves before it gives way.
const MOST_BYTES: u64 = 64 * 1024;

pub(super) fn select(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    // MOVSD and CMPSD are SSE instructions too.
    if !instruction.is_string_instruction() {
        return None;
    }
    let (bytes, kind) = match instruction.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Stosb | Mnemonic::Lodsb | Mnemonic::Cmpsb | Mnemonic::Scasb => (1, instruction),
        Mnemonic::Movsw | Mnemonic::Stosw | Mnemonic::Lodsw | Mnemonic::Cmpsw | Mnemonic::Scasw => (2, instruction),
        Mnemonic::Movsd | Mnemonic::Stosd | Mnemonic::Lodsd | Mnemonic::Cmpsd | Mnemonic::Scasd => (4, instruction),
        Mnemonic::Movsq | Mnemonic::Stosq | Mnemonic::Lodsq | Mnemonic::Cmpsq | Mnemonic::Scasq => (8, instruction),
        _ => return None, // INS and OUTS
    };
    op.mem.segment = crate::decode::memory_segment(kind);
    op.mem.address_size = address_size(kind);
    let repeated = op.prefixes & (REP | REPNE) != 0;
    Some(match kind.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => forms::<Movs>(bytes, repeated),
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => forms::<Stos>(bytes, repeated),
        Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => forms::<Lods>(bytes, repeated),
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => forms::<Cmps>(bytes, repeated),
        _ => forms::<Scas>(bytes, repeated),
    })
}

fn address_size(instruction: &Instruction) -> u8 {
    let kinds = (0..instruction.op_count()).map(|position| instruction.op_kind(position));
    for kind in kinds {
        match kind {
            OpKind::MemorySegSI | OpKind::MemoryESDI => return 1,
            OpKind::MemorySegESI | OpKind::MemoryESEDI => return 2,
            _ => {}
        }
    }
    3
}

fn forms<S: Element>(bytes: usize, repeated: bool) -> Handler {
    if repeated { by_width!(bytes, repeat, S) } else { by_width!(bytes, once, S) }
}

/// What happens to one element.
trait Element {
    /// Stops a repetition by its flags (CMPS and SCAS).
    const COMPARES: bool = false;
    /// One element, registers moved.
    fn one<W: Width>(cpu: &mut Cpu, op: &Op) -> Done;
    /// Up to `left` elements at once, upwards; how many were done, registers moved. 0 where they need care.
    fn many<W: Width>(_cpu: &mut Cpu, _op: &Op, _left: u64) -> u64 {
        0
    }
}

struct Movs;
struct Stos;
struct Lods;
struct Cmps;
struct Scas;

fn once<S: Element, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    S::one::<W>(cpu, op)
}

fn repeat<S: Element, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let size = op.mem.address_size;
    let mut left = cpu.gpr(RCX, size);
    let mut budget = MOST_BYTES;
    while left != 0 {
        let upwards = cpu.state.rflags & (rflags::DF | rflags::TF) == 0;
        let wanted = left.min(budget / W::BYTES as u64);
        let done = match if upwards { S::many::<W>(cpu, op, wanted) } else { 0 } {
            0 => {
                S::one::<W>(cpu, op)?;
                1
            }
            done => done,
        };
        left -= done;
        cpu.set_gpr(RCX, size, left);
        if S::COMPARES && cpu.flags.zf() == (op.prefixes & REPNE != 0) {
            return Ok(());
        }
        budget = budget.saturating_sub(done * W::BYTES as u64);
        let give_way = budget < W::BYTES as u64
            || cpu.recheck
            || cpu.state.rflags & rflags::TF != 0
            || !cpu.config.signal.pending().is_empty();
        if left != 0 && give_way {
            return Err(Leave::Again);
        }
    }
    Ok(())
}

impl Cpu {
    /// The segment of RSI (the override, if there is one) or RDI (always ES).
    fn string_segment(op: &Op, register: usize) -> usize {
        if register == RSI { op.mem.segment.into() } else { seg::ES }
    }

    fn string_address<W: Width>(&mut self, op: &Op, register: usize, access: Access) -> Result<u64, Leave> {
        let offset = self.gpr(register, op.mem.address_size);
        self.segmented(Self::string_segment(op, register), offset, W::BYTES as u64, access)
    }

    fn string_load<W: Width>(&mut self, op: &Op, register: usize) -> Result<W, Leave> {
        let address = self.string_address::<W>(op, register, Access::Read)?;
        self.read_linear(address, Self::string_segment(op, register) as u8, Rights::Current)
    }

    fn string_store<W: Width>(&mut self, op: &Op, value: W) -> Done {
        let address = self.string_address::<W>(op, RDI, Access::Write)?;
        self.write_linear(address, value, seg::ES as u8, Rights::Current)
    }

    /// Moves RSI or RDI by `elements` in the direction RFLAGS.DF says.
    fn advance<W: Width>(&mut self, op: &Op, register: usize, elements: u64) {
        let size = op.mem.address_size;
        let distance = elements * W::BYTES as u64;
        let distance = if self.state.rflags & rflags::DF == 0 { distance } else { distance.wrapping_neg() };
        let moved = self.gpr(register, size).wrapping_add(distance);
        self.set_gpr(register, size, moved);
    }

    /// The host address of as many of `elements` as lie in one page, inside the segment and below the address size's
    /// end; nothing where the soft TLB does not know the page.
    fn string_run<W: Width>(
        &mut self,
        op: &Op,
        register: usize,
        elements: u64,
        access: Access,
    ) -> Option<(*mut u8, u64)> {
        let width = W::BYTES as u64;
        let offset = self.gpr(register, op.mem.address_size);
        let to_end = (size_mask(op.mem.address_size) - offset).saturating_add(1) / width;
        let segment = Self::string_segment(op, register);
        let first = self.segmented(segment, offset, width, access).ok()?;
        let in_page = (0x1000 - (first & 0xfff)) / width;
        let elements = elements.min(to_end).min(in_page);
        if elements == 0 {
            return None;
        }
        let address = self.segmented(segment, offset, elements * width, access).ok()?;
        self.bulk(address, elements * width, access).map(|(host, bytes)| (host, bytes / width))
    }
}

impl Element for Movs {
    fn one<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
        let value = cpu.string_load::<W>(op, RSI)?;
        cpu.string_store(op, value)?;
        cpu.advance::<W>(op, RSI, 1);
        cpu.advance::<W>(op, RDI, 1);
        Ok(())
    }

    fn many<W: Width>(cpu: &mut Cpu, op: &Op, left: u64) -> u64 {
        let Some((from, readable)) = cpu.string_run::<W>(op, RSI, left, Access::Read) else { return 0 };
        let Some((to, count)) = cpu.string_run::<W>(op, RDI, readable, Access::Write) else { return 0 };
        // SAFETY: both runs are vouched for by the soft TLB. They may overlap: the instruction copies element by
        // element, as the guest's would.
        unsafe { host_movs::<W>(from, to, count) };
        cpu.advance::<W>(op, RSI, count);
        cpu.advance::<W>(op, RDI, count);
        count
    }
}

impl Element for Stos {
    fn one<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
        let value = cpu.get::<W>(RAX);
        cpu.string_store(op, value)?;
        cpu.advance::<W>(op, RDI, 1);
        Ok(())
    }

    fn many<W: Width>(cpu: &mut Cpu, op: &Op, left: u64) -> u64 {
        let Some((to, count)) = cpu.string_run::<W>(op, RDI, left, Access::Write) else { return 0 };
        // SAFETY: the run is vouched for by the soft TLB.
        unsafe { host_stos(cpu.get::<W>(RAX), to, count) };
        cpu.advance::<W>(op, RDI, count);
        count
    }
}

impl Element for Lods {
    fn one<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
        let value = cpu.string_load::<W>(op, RSI)?;
        cpu.set(RAX, value);
        cpu.advance::<W>(op, RSI, 1);
        Ok(())
    }
}

fn compare<W: Width>(cpu: &mut Cpu, a: W, b: W) {
    cpu.flags.sub(a, b, W::of(a.zext().wrapping_sub(b.zext())));
}

impl Element for Cmps {
    const COMPARES: bool = true;

    fn one<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
        // AMD's processors look at the second operand first, which shows where both fault.
        let b = cpu.string_load::<W>(op, RDI)?;
        let a = cpu.string_load::<W>(op, RSI)?;
        compare(cpu, a, b);
        cpu.advance::<W>(op, RSI, 1);
        cpu.advance::<W>(op, RDI, 1);
        Ok(())
    }
}

impl Element for Scas {
    const COMPARES: bool = true;

    fn one<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
        let b = cpu.string_load::<W>(op, RDI)?;
        compare(cpu, cpu.get::<W>(RAX), b);
        cpu.advance::<W>(op, RDI, 1);
        Ok(())
    }
}

/// REP MOVS upwards.
///
/// # Safety
/// `count` elements must be readable at `from` and writable at `to`.
unsafe fn host_movs<W: Width>(from: *const u8, to: *mut u8, count: u64) {
    macro_rules! movs {
        ($instruction:literal) => {
            asm!($instruction, inout("rcx") count => _, inout("rsi") from => _, inout("rdi") to => _,
                options(nostack, preserves_flags))
        };
    }
    // SAFETY: by the caller's promise; DF is clear between Rust functions.
    unsafe {
        match W::BYTES {
            1 => movs!("rep movsb"),
            2 => movs!("rep movsw"),
            4 => movs!("rep movsd"),
            _ => movs!("rep movsq"),
        }
    }
}

/// REP STOS upwards.
///
/// # Safety
/// `count` elements must be writable at `to`.
unsafe fn host_stos<W: Width>(value: W, to: *mut u8, count: u64) {
    macro_rules! stos {
        ($instruction:literal) => {
            asm!($instruction, inout("rcx") count => _, in("rax") value.zext(), inout("rdi") to => _,
                options(nostack, preserves_flags))
        };
    }
    // SAFETY: by the caller's promise; DF is clear between Rust functions.
    unsafe {
        match W::BYTES {
            1 => stos!("rep stosb"),
            2 => stos!("rep stosw"),
            4 => stos!("rep stosd"),
            _ => stos!("rep stosq"),
        }
    }
}
