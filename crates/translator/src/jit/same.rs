//! Instructions that are translated to themselves: operands move, everything else stays.

use iced_x86::{Instruction, OpKind, Register};

use super::asm::{At, Label, Place, reg};
use super::check::Access;
use super::emit::{Address, Emit, HOST, T1, T2, T3};
use super::encoding::{Encoding, Operands, Window};
use super::group::{Part, at_stack};
use super::template::{Field, Kind, Template};

const RCX: usize = 1;
const RSP: u8 = 4;

/// One instruction on its way.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub instruction: Instruction,
    pub template: Template,
    /// Its bytes.
    pub bytes: &'a [u8],
    /// Taken apart, where that is needed.
    pub encoding: Option<Encoding>,
    /// It writes RSP, or a part of it, by a register operand.
    pub moves_stack: bool,
    /// Status flags are needed after the checks of its memory operand.
    pub live: bool,
    /// They are not where it branches to.
    pub forgets: bool,
    /// The instruction of the same block, by its position, that it branches to.
    pub inner: Option<usize>,
    /// One of the same block branches to it.
    pub met: bool,
    /// It closes a loop: a branch back to the block's start.
    pub again: bool,
    /// How far its own access moves from turn to turn of a loop, where that is known.
    pub pace: Option<i32>,
    /// What groups of accesses mean to it.
    pub part: Part,
}

impl Source<'_> {
    /// One that nothing is known about but where its bytes begin.
    pub(super) fn at(bytes: &[u8]) -> Source<'_> {
        Source {
            instruction: Instruction::default(),
            template: Template::default(),
            bytes,
            encoding: None,
            moves_stack: false,
            live: true,
            forgets: false,
            inner: None,
            met: false,
            again: false,
            pace: None,
            part: Part::default(),
        }
    }

    /// Takes it apart where its translation needs that; a window is what its bytes begin with.
    pub(super) fn take_apart(&mut self, window: &Window) {
        if matches!(self.template.kind, Kind::Same | Kind::Lea) {
            self.encoding = Encoding::parse(window, self.instruction.len());
            self.moves_stack = self.encoding.is_some_and(|encoding| writes_stack_pointer(&self.template, &encoding));
        }
    }

    /// True where its translation takes T3.
    pub(super) fn is_crowded(&self) -> bool {
        let template = &self.template;
        let shared = template.reads_rcx || template.writes_rcx || template.second.general;
        shared
            && self.encoding.is_none_or(|encoding| {
                let other = template.reads_rcx || template.writes_rcx || spilled(template.second, encoding.second);
                other && spilled(template.reg, encoding.reg)
            })
    }

    /// The general-purpose registers that it may change, a bit each.
    pub(super) fn changed(&self) -> u16 {
        let (instruction, template) = (&self.instruction, &self.template);
        let first = || 1 << (instruction.op0_register().full_register().number() & 15);
        match template.kind {
            Kind::Nothing | Kind::Jump | Kind::JumpIf => 0,
            Kind::PushRegister | Kind::PushConstant | Kind::PushMemory | Kind::Call | Kind::Return => 1 << RSP,
            Kind::PopRegister => first() | 1 << RSP,
            Kind::MovConstant | Kind::Bswap => first(),
            Kind::MovAbsolute | Kind::Copy => template.changes | 1,
            Kind::Same | Kind::Lea if !high_register(instruction) => {
                let Some(encoding) = self.encoding else { return u16::MAX };
                let written = |field: Field, number: u8| u16::from(field.general && field.written) << number;
                let rm = if encoding.direct { written(template.rm, encoding.rm) } else { 0 };
                template.changes | written(template.reg, encoding.reg) | written(template.second, encoding.second) | rm
            }
            _ => u16::MAX,
        }
    }
}

/// True where a memory operand cannot cross a page, given that RSP is a multiple of 8.
pub(super) fn on_stack(instruction: &Instruction, bytes: u32) -> bool {
    at_stack(instruction) && instruction.memory_displacement64() as u32 % 8 + bytes <= 8
}

impl<'a> Emit<'a> {
    /// Checks the memory operand of an instruction. `None`: it is a constant address across two pages.
    pub(super) fn memory(&mut self, source: &Source<'_>, again: Label) -> Option<At> {
        let bytes = source.instruction.memory_size().size() as u32;
        if bytes == 0 || !(source.template.loads || source.template.stores) {
            return None;
        }
        if source.part.inside.is_some() && source.part.of.is_some() && source.template.kind == Kind::Same {
            return Some(self.in_group(source.instruction.memory_displacement64() as i32));
        }
        let address = self.address(&source.instruction);
        if let Address::Constant(value) = address
            && (value & 0xfff) as u32 + bytes > 0x1000
        {
            return None;
        }
        let access = Access {
            bytes,
            write: source.template.stores,
            aligned: source.template.aligned || on_stack(&source.instruction, bytes),
            refused: source.template.aligned,
            anywhere: bytes > 16,
            live: source.live,
        };
        Some(self.check(address, access, again))
    }

    /// Translates an instruction to itself. `None`: this cannot be done.
    pub(super) fn same(&mut self, source: &Source<'a>) -> Option<()> {
        let encoding = source.encoding?;
        if has_memory(&source.instruction) == encoding.direct || !encoding.direct && source.template.beyond {
            return None;
        }
        if self.any_high(source, &encoding) {
            return self.high_bytes(source, &encoding);
        }
        if encoding.direct {
            self.operate(source, &encoding, None);
            return Some(());
        }
        let again = self.asm.bound();
        if !self.near(source, &encoding, again) {
            self.checked(source, &encoding, again)?;
        }
        Some(())
    }

    /// Checks the memory operand of an instruction that is translated to itself, and emits it.
    pub(super) fn checked(&mut self, source: &Source<'_>, encoding: &Encoding, again: Label) -> Option<()> {
        let at = self.memory(source, again)?;
        self.operate(source, encoding, Some(at));
        Some(())
    }

    /// Emits an instruction that is translated to itself, with its memory operand at `at`.
    pub(super) fn operate(&mut self, source: &Source<'_>, encoding: &Encoding, at: Option<At>) {
        let template = &source.template;
        let in_memory = at.is_none() && spilled(template.rm, encoding.rm);
        let through_rcx = template.reads_rcx || template.writes_rcx;
        if !(in_memory
            || through_rcx
            || spilled(template.reg, encoding.reg)
            || spilled(template.second, encoding.second))
        {
            // All registers are where instructions can name them.
            let place = at.map_or_else(|| Place::Reg(pinned(template.rm, encoding.rm)), Place::Mem);
            let reg = pinned(template.reg, encoding.reg);
            let second = pinned(template.second, encoding.second);
            return self.write(source, encoding, Operands { reg, place, second });
        }
        // A register that is only read may be the memory operand instead, unless it is at hand.
        let reads = spilled(template.reg, encoding.reg) && !template.reg.written && !through_rcx && !in_memory;
        if reads
            && self.cached != Some(encoding.reg.into())
            && let Some(reversed) = encoding.reversed()
        {
            let place = Place::Mem(self.slot(encoding.reg.into()));
            let reg = pinned(template.rm, encoding.rm);
            return self.write(source, &reversed, Operands { reg, place, second: 0 });
        }
        let place = at.map(|at| {
            let second = template.reads_rcx || template.writes_rcx || spilled(template.second, encoding.second);
            let read = spilled(template.reg, encoding.reg) && !template.reg.replaced;
            let crowded = second || source.part.inside.is_some() && read;
            if crowded && matches!(at, At::Index(_, T1, ..) | At::Base(T1, _)) { self.fold(at) } else { at }
        });
        let rm_at_hand = place.is_none() && self.is_at_hand(template, encoding);
        let reg = self.operand(template.reg, encoding.reg, if source.part.inside.is_some() { T1 } else { T3 });
        let second = self.operand(template.second, encoding.second, T1);
        let place = match place {
            Some(at) => Place::Mem(at),
            None if rm_at_hand => Place::Reg(T3),
            // What is written is at hand for the next, which need not wait for the store.
            None if template.rm.written
                && spilled(template.rm, encoding.rm)
                && reg != T3
                && source.part.inside.is_none() =>
            {
                Place::Reg(self.operand(template.rm, encoding.rm, T3))
            }
            None if template.rm.memory && spilled(template.rm, encoding.rm) => {
                if template.rm.written {
                    self.outdated(encoding.rm.into());
                }
                Place::Mem(self.slot(encoding.rm.into()))
            }
            None => Place::Reg(self.operand(template.rm, encoding.rm, T2)),
        };
        if template.reads_rcx || template.writes_rcx {
            let value = self.value(RCX, T1);
            self.asm.mov(T1, value);
        }
        self.write(source, encoding, Operands { reg, place, second });
        if template.writes_rcx {
            self.set(RCX, T1);
        }
        // In this order: where MULX has one destination twice, it is the high half that stays.
        self.put(template.second, encoding.second, second);
        self.put(template.reg, encoding.reg, reg);
        if let Place::Reg(rm) = place {
            self.put(template.rm, encoding.rm, rm);
        }
    }

    /// Writes an instruction with its operands where they are now.
    fn write(&mut self, source: &Source<'_>, encoding: &Encoding, operands: Operands) {
        let template = &source.template;
        let low = |number: u8| (4..8).contains(&number);
        let rex = template.has_bytes(encoding.direct)
            && (template.reg.general && low(operands.reg)
                || template.rm.general && matches!(operands.place, Place::Reg(number) if low(number)));
        encoding.emit(&mut self.asm, operands, rex);
    }

    /// True where the register in ModRM.rm is in T3, and will be when the other operands are where they have to be.
    fn is_at_hand(&self, template: &Template, encoding: &Encoding) -> bool {
        spilled(template.rm, encoding.rm)
            && self.cached == Some(encoding.rm.into())
            && (!spilled(template.reg, encoding.reg) || encoding.reg == encoding.rm)
    }

    /// Puts an operand's host address into T2, which frees T1.
    fn fold(&mut self, at: At) -> At {
        self.asm.lea(T2, at);
        At::Base(T2, 0)
    }

    /// The host register for an operand; what is no general-purpose register stays what it is.
    fn operand(&mut self, field: Field, number: u8, temporary: u8) -> u8 {
        if !field.general {
            return number;
        }
        match HOST[usize::from(number)] {
            Some(host) => host,
            None => {
                if !field.replaced {
                    self.fetch(number.into(), temporary);
                }
                temporary
            }
        }
    }

    /// Stores what was written to a temporary.
    fn put(&mut self, field: Field, number: u8, host: u8) {
        if field.general && field.written {
            self.set(number.into(), host);
        }
    }

    fn any_high(&self, source: &Source<'_>, encoding: &Encoding) -> bool {
        let template = &source.template;
        template.has_bytes(encoding.direct)
            && high_register(&source.instruction)
            && (template.reg.general && encoding.is_high(encoding.reg)
                || encoding.direct && template.rm.general && encoding.is_high(encoding.rm))
    }

    /// An instruction with AH, CH, DH or BH: no operand may need a REX prefix, so guest RCX moves to RCX.
    fn high_bytes(&mut self, source: &Source<'_>, encoding: &Encoding) -> Option<()> {
        let template = &source.template;
        let of_rcx = |field: Field, number: u8| field.general && matches!(number, 1 | 5);
        let uses_rcx = of_rcx(template.reg, encoding.reg) || encoding.direct && of_rcx(template.rm, encoding.rm);
        let wide = |field: Field, number: u8| field.general && !matches!(number, 0..=7);
        if wide(template.reg, encoding.reg)
            || encoding.direct && wide(template.rm, encoding.rm)
            || template.reads_rcx
            || !encoding.direct && uses_rcx
            || wide_stack_pointer(&source.instruction)
        {
            return None;
        }
        let again = self.asm.bound();
        let place = if encoding.direct {
            if uses_rcx {
                let value = self.value(RCX, T1);
                self.asm.mov(T1, value);
            }
            Place::Reg(encoding.rm)
        } else {
            let at = self.memory(source, again)?;
            self.asm.lea(T1, at);
            Place::Mem(At::Base(T1, 0))
        };
        encoding.emit(&mut self.asm, Operands { reg: encoding.reg, place, second: 0 }, false);
        if uses_rcx {
            self.set(RCX, T1);
        }
        Some(())
    }

    /// LEA.
    pub(super) fn load_address(&mut self, source: &Source<'_>) -> Option<()> {
        let encoding = source.encoding?;
        let number = usize::from(encoding.reg);
        let size = source.instruction.op0_register().size();
        if size == 2 {
            return None;
        }
        let to = HOST[number].unwrap_or(T2);
        match self.offset(&source.instruction, to, size == 4) {
            Address::Constant(value) => {
                let value = value as i64 as u64;
                self.asm.constant(to, if size == 4 { value & 0xffff_ffff } else { value });
            }
            Address::In(from) if from == to => {}
            Address::In(from) => self.asm.mov(to, from),
        }
        if HOST[number].is_none() {
            self.set(number, to);
        }
        Some(())
    }

    /// MOV r, imm.
    pub(super) fn move_constant(&mut self, source: &Source<'_>) -> Option<()> {
        let register = source.instruction.op0_register();
        let number = register.full_register().number();
        let value = source.instruction.immediate(1);
        match register.size() {
            4 | 8 => {
                let value = if register.size() == 4 { value & 0xffff_ffff } else { value };
                match HOST[number] {
                    Some(host) => self.asm.constant(host, value),
                    None => match i32::try_from(value as i64) {
                        Ok(short) => {
                            self.asm.store_constant(self.slot(number), short);
                            self.outdated(number);
                        }
                        Err(_) => {
                            self.asm.constant(T2, value);
                            self.set(number, T2);
                        }
                    },
                }
            }
            2 => {
                let host = self.value(number, T2);
                self.asm.op(0x66, 0, &[0xc7], 0, Place::Reg(host));
                self.asm.raw(&(value as u16).to_le_bytes());
                self.set(number, host);
            }
            _ if matches!(register, Register::CH) => return None,
            _ if matches!(register, Register::AH | Register::DH | Register::BH) => {
                self.asm.raw(&[0xb4 + number as u8, value as u8]);
            }
            _ => {
                let host = self.value(number, T2);
                self.asm.op(0, 0x40, &[0xc6], 0, Place::Reg(host));
                self.asm.byte(value as u8);
                self.set(number, host);
            }
        }
        Some(())
    }

    /// MOV between the accumulator and an absolute address.
    pub(super) fn move_absolute(&mut self, source: &Source<'_>) -> Option<()> {
        let again = self.asm.bound();
        let at = self.memory(source, again)?;
        let bytes = source.instruction.memory_size().size();
        let prefix = if bytes == 2 { 0x66 } else { 0 };
        let wide = if bytes == 8 { 8 } else { 0 };
        let opcode = (if source.template.stores { 0x88 } else { 0x8a }) | u8::from(bytes > 1);
        self.asm.op(prefix, wide, &[opcode], reg::RAX, Place::Mem(at));
        Some(())
    }

    /// XCHG of the accumulator with a register.
    pub(super) fn exchange_accumulator(&mut self, source: &Source<'_>) -> Option<()> {
        let other = source.instruction.op0_register();
        let other = if other.full_register() == Register::RAX { source.instruction.op1_register() } else { other };
        let number = other.full_register().number();
        let host = self.value(number, T2);
        let (prefix, wide) = (if other.size() == 2 { 0x66 } else { 0 }, if other.size() == 8 { 8 } else { 0 });
        self.asm.op(prefix, wide, &[0x87], host, Place::Reg(reg::RAX));
        self.set(number, host);
        Some(())
    }

    /// BSWAP.
    pub(super) fn swap_bytes(&mut self, source: &Source<'_>) -> Option<()> {
        let register = source.instruction.op0_register();
        let number = register.full_register().number();
        let host = self.value(number, T2);
        let rex = 0x40 | if register.size() == 8 { 8 } else { 0 } | host >> 3;
        if rex != 0x40 {
            self.asm.byte(rex);
        }
        self.asm.raw(&[0x0f, 0xc8 | host & 7]);
        self.set(number, host);
        Some(())
    }
}

/// The host register for an operand that is in one; what is no general-purpose register stays what it is.
fn pinned(field: Field, number: u8) -> u8 {
    HOST[usize::from(number & 15)].filter(|_| field.general).unwrap_or(number)
}

fn spilled(field: Field, number: u8) -> bool {
    field.general && HOST[usize::from(number)].is_none()
}

/// True where an operand is in memory.
fn has_memory(instruction: &Instruction) -> bool {
    // Those that are not there are registers.
    [instruction.op0_kind(), instruction.op1_kind(), instruction.op2_kind(), instruction.op3_kind()]
        .contains(&OpKind::Memory)
}

pub(super) fn high_register(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|position| {
        instruction.op_kind(position) == OpKind::Register
            && matches!(instruction.op_register(position), Register::AH | Register::CH | Register::DH | Register::BH)
    })
}

/// RSP or ESP is an operand (of MOVZX and the like: their first operand is wider).
fn wide_stack_pointer(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|position| {
        instruction.op_kind(position) == OpKind::Register
            && !instruction.op_register(position).is_gpr8()
            && instruction.op_register(position).full_register() == Register::RSP
    })
}

/// True where an instruction that writes RSP certainly leaves it a multiple of 8.
fn keeps_alignment(instruction: &Instruction) -> bool {
    use iced_x86::Mnemonic::{Add, And, Sub};
    instruction.op0_register() == Register::RSP
        && instruction.op1_kind() != OpKind::Register
        && instruction.op1_kind() != OpKind::Memory
        && matches!(instruction.mnemonic(), Add | And | Sub)
        && instruction.immediate(1).is_multiple_of(8)
}

/// True where a translated instruction may leave RSP other than a multiple of 8.
pub(super) fn moves_stack_pointer(source: &Source<'_>) -> bool {
    let instruction = &source.instruction;
    let names = || {
        (0..instruction.op_count()).any(|position| {
            instruction.op_kind(position) == OpKind::Register
                && instruction.op_register(position).full_register() == Register::RSP
        })
    };
    match source.template.kind {
        Kind::Leave => true,
        Kind::PopRegister | Kind::MovConstant | Kind::ExchangeAccumulator | Kind::Bswap => names(),
        Kind::Same | Kind::Lea => source.moves_stack && !keeps_alignment(instruction),
        _ => false,
    }
}

/// True where a general-purpose register operand that is written is RSP or a part of it.
fn writes_stack_pointer(template: &Template, encoding: &Encoding) -> bool {
    let of_stack = |field: Field, number: u8| field.general && field.written && number == RSP;
    of_stack(template.reg, encoding.reg)
        || encoding.direct && of_stack(template.rm, encoding.rm)
        || of_stack(template.second, encoding.second)
}
