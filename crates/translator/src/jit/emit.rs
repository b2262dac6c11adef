//! Emission: guest registers, memory operands and their checks.
//!
//! ```text
//!   guest  rax rcx rdx rbx rsp rbp rsi rdi r8  r9  | r10 to r15
//!   host   rax r9  rdx rbx r8  rbp rsi rdi r12 r13 | in memory
//!
//!   rcx, r11, r10   temporaries: addend, effective address, operand
//!   r15             4 bytes before the read table: its low 16 bits say BEXTR what an index is made of
//!   r14             before the write table, within the home's first page
//!   rsp             the shadow return stack
//! ```
//!
//! An access finds the page's addend by bits 47:12 of its address, which cannot leave the table whatever the address is:
//! BEXTR takes them, or PEXT where status flags are needed. An addend of zero is a miss. A non-canonical address reaches
//! the entry of its canonical twin, but the sum is then not canonical either, and the host's processor refuses it.

use iced_x86::{Instruction, Register};

use super::anchor::FIXED;
use super::asm::{Asm, At, Label, reg};
use super::cold::Cold;
use super::loops::Turn;
use super::near::Far;
use super::thunk::Thunks;
use super::{APART, Exit, Mark};
use crate::arena::Next;
use crate::home::offset;
use crate::mmu::TABLE_SKEW;

/// Addend, count, scratch.
pub(super) const T1: u8 = reg::RCX;
/// Effective address.
pub(super) const T2: u8 = reg::R11;
/// Operand, or the addend of a group of stack accesses.
pub(super) const T3: u8 = reg::R10;
/// Read table.
pub(super) const READ: u8 = reg::R15;
/// Write table.
pub(super) const WRITE: u8 = reg::R14;
/// How far the read table begins behind where its register points: a displacement of 8 bits. The register's low 16 bits are
/// 36 bits from bit 12 on, as BEXTR reads it.
pub(super) const READ_AHEAD: i32 = TABLE_SKEW as i32 - (36 << 8 | 12);
/// How far the write table begins behind where its register points: a displacement of 8 bits, as of most of what is
/// between, the end of the home's first page.
pub(super) const WRITE_AHEAD: i32 = 0x78;

/// A field of the home that starts at `low`: at hand by the register of the write table, where it is near enough.
pub(super) fn field(low: i32, offset: i32) -> At {
    let near = offset - offset::FRONT + WRITE_AHEAD;
    if (i8::MIN.into()..WRITE_AHEAD).contains(&near) { At::Base(WRITE, near) } else { At::Absolute(low + offset) }
}

const RSP: usize = 4;
/// A jump of the host's with a displacement of 32 bits.
const JUMP_BYTES: u16 = 5;

/// The host register that holds a guest register, where one does.
pub(super) const HOST: [Option<u8>; 16] = [
    Some(reg::RAX),
    Some(reg::R9),
    Some(reg::RDX),
    Some(reg::RBX),
    Some(reg::R8),
    Some(reg::RBP),
    Some(reg::RSI),
    Some(reg::RDI),
    Some(reg::R12),
    Some(reg::R13),
    None,
    None,
    None,
    None,
    None,
    None,
];

/// The host register of the guest's RSP.
pub(super) const STACK: u8 = match HOST[RSP] {
    Some(host) => host,
    None => panic!("RSP is pinned"),
};

/// Condition codes as Jcc encodes them.
pub(super) mod condition {
    pub(crate) const BELOW: u8 = 2;
    pub(crate) const ABOVE_OR_EQUAL: u8 = 3;
    pub(crate) const ZERO: u8 = 4;
    pub(crate) const NOT_ZERO: u8 = 5;
    pub(crate) const BELOW_OR_EQUAL: u8 = 6;
    pub(crate) const ABOVE: u8 = 7;
}

/// A guest address.
#[derive(Clone, Copy, Debug)]
pub(super) enum Address {
    /// In a host register.
    In(u8),
    /// A constant that 32 bits say, sign-extended.
    Constant(i32),
}

/// What emitting takes memory for: it serves one block after the other. A new one takes none yet.
#[derive(Default)]
pub(super) struct Room {
    pub asm: Asm,
    /// Where the translation of each instruction begins.
    pub marks: Vec<Mark>,
    /// Empty between blocks, as are the others.
    pub colds: Vec<Cold>,
    pub fars: Vec<Far<'static>>,
    pub pending: Vec<(Label, Label)>,
    pub inner: Vec<Inner>,
    pub met: Vec<(usize, Label)>,
    /// Those of the block.
    pub exits: Vec<Exit>,
}

/// Where a branch leads to an instruction of its block.
#[derive(Clone, Copy)]
pub(super) struct Inner {
    /// The instruction's.
    pub position: usize,
    pub label: Label,
    /// Vector registers are known to be in the processor there.
    pub vectors: bool,
}

/// An empty vector, in the memory of one that may have been of something else: of the same for another lifetime.
pub(super) fn emptied<A, B>(mut vector: Vec<A>) -> Vec<B> {
    vector.clear();
    // Where layouts are the same, collecting into the same memory is what the library does.
    vector.into_iter().filter_map(|_| None).collect()
}

impl Room {
    /// The finished code, and what stands apart from it.
    pub(super) fn code(&self) -> (&[u8], &[u8]) {
        self.asm.parts()
    }
}

/// Addresses that emitted code has in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    /// Where the vCPU's home starts.
    pub low: i32,
    /// The word that is not zero where the monitor is asked for.
    pub signal: i32,
}

/// Where a piece of code may be left.
#[derive(Clone, Copy, Debug)]
pub(super) struct Site {
    pub block: u32,
    /// The guest instruction, from the block's first.
    pub offset: u16,
    /// What RSP has to be moved by to undo what has been done of it, in pieces of 8 bytes.
    pub undo: i16,
}

/// The emitter of one block.
pub(super) struct Emit<'a> {
    pub asm: Asm,
    known: Known,
    pub thunks: &'a Thunks,
    sites: &'a mut Vec<Site>,
    pub colds: Vec<Cold>,
    pub fars: Vec<Far<'a>>,
    pub marks: Vec<Mark>,
    /// Where the block may be left for others, and the number of the first.
    pub exits: Vec<Exit>,
    pub first_exit: u32,
    /// Where code runs that is out of the way.
    pub apart: u64,
    /// Bytes in front of the block.
    head: usize,
    /// Where it may be entered last.
    entered: u16,
    /// Short jumps that still need a place to land, and where they go on to.
    pub pending: Vec<(Label, Label)>,
    pub oldest: usize,
    /// Branches inside, and instructions that they have led to.
    pub inner: Vec<Inner>,
    pub met: Vec<(usize, Label)>,
    /// The number the block will have, and its first instruction.
    pub block: (u32, u64),
    /// Address of the instruction being translated, from where the anchor is.
    pub rip: u64,
    pub anchor: u32,
    /// Vector registers are known to be in the processor.
    pub vectors: bool,
    /// The guest register that is in memory, and in T3 too.
    pub cached: Option<usize>,
    /// How far the guest's RSP is from what its register says, where that waits for the end of several pushes or pops. Who leaves
    /// by a fault finds it in the mark.
    pub behind: i32,
    /// What pages in the window are moved by, where most of the accesses are to those.
    pub window: Option<i32>,
    /// The turn of the loop that is being emitted.
    pub turn: Option<Turn>,
    /// Short jumps land at once, so that none is too long: for blocks that did not come out otherwise.
    pub careful: bool,
}

impl<'a> Emit<'a> {
    /// For code that is to run at `next`.
    #[inline]
    pub(super) fn new(
        next: Next,
        (known, anchor): (Known, u32),
        thunks: &'a Thunks,
        sites: &'a mut Vec<Site>,
        room: Room,
    ) -> Self {
        let Room { mut asm, mut marks, mut exits, colds, fars, pending, inner, met } = room;
        asm.restart(next.hot);
        marks.clear();
        exits.clear();
        Self {
            asm,
            known,
            thunks,
            sites,
            colds,
            fars,
            marks,
            exits,
            first_exit: 0,
            apart: next.cold,
            head: 0,
            entered: 0,
            pending,
            oldest: 0,
            inner,
            met,
            block: (0, 0),
            rip: 0,
            anchor,
            vectors: false,
            cached: None,
            behind: 0,
            window: None,
            turn: None,
            careful: false,
        }
    }

    /// Where the vCPU's home starts.
    pub(super) fn low(&self) -> i32 {
        self.known.low
    }

    /// A field of the vCPU's home.
    pub(super) fn field(&self, offset: i32) -> At {
        field(self.known.low, offset)
    }

    /// Where a guest register is while it is in no host register.
    pub(super) fn slot(&self, number: usize) -> At {
        self.field(offset::GPR + 8 * number as i32)
    }

    /// A guest register's value in some host register: its own, or `temporary`.
    pub(super) fn value(&mut self, number: usize, temporary: u8) -> u8 {
        match HOST[number] {
            Some(host) => host,
            None => {
                self.fetch(number, temporary);
                temporary
            }
        }
    }

    /// Loads a guest register that is in memory.
    pub(super) fn fetch(&mut self, number: usize, to: u8) {
        match (self.cached == Some(number), to) {
            (true, T3) => {}
            (true, _) => self.asm.mov(to, T3),
            (false, _) => self.asm.load(to, self.slot(number)),
        }
        if to == T3 {
            self.cached = Some(number);
        }
    }

    /// The slot of a guest register is written to directly.
    pub(super) fn outdated(&mut self, number: usize) {
        if self.cached == Some(number) {
            self.cached = None;
        }
    }

    /// Sets a guest register.
    pub(super) fn set(&mut self, number: usize, from: u8) {
        match HOST[number] {
            Some(host) if host == from => {}
            Some(host) => self.asm.mov(host, from),
            None => {
                self.asm.store(self.slot(number), from);
                if from == T3 {
                    self.cached = Some(number);
                } else {
                    self.outdated(number);
                }
            }
        }
    }

    /// A field of an anchor.
    fn anchored(&self, anchor: u32, field: i32) -> At {
        self.field(offset::anchor(anchor) + field)
    }

    /// `to` becomes the linear address of what is `rip` to translated code; flags stay.
    pub(super) fn linear(&mut self, to: u8, rip: u64) {
        if self.anchor == FIXED {
            return self.asm.constant(to, rip);
        }
        self.asm.load(to, self.anchored(self.anchor, offset::ADDRESS_IN_ANCHOR));
        // A displacement of 32 bits is from behind the instruction, and so a little more from the page's start.
        let within = (rip as i64).clamp(i32::MIN.into(), i32::MAX.into());
        self.asm.lea(to, At::Base(to, within as i32));
        if within != rip as i64 {
            self.asm.lea(to, At::Base(to, (rip as i64 - within) as i32));
        }
    }

    /// T1 becomes zero where `register` holds the linear address of `rip`; flags stay.
    pub(super) fn difference(&mut self, register: u8, rip: u64) {
        let negative = rip.wrapping_neg();
        let rest = if self.anchor == FIXED {
            match i32::try_from(negative as i64) {
                Ok(short) => return self.asm.lea(T1, At::Base(register, short)),
                Err(_) => self.asm.constant(T1, negative),
            }
            0
        } else {
            // Not further than the instruction behind its page.
            self.asm.load(T1, self.anchored(self.anchor, offset::NEGATIVE_IN_ANCHOR));
            negative as i32
        };
        self.asm.lea(T1, At::Index(T1, register, 0, rest));
    }

    /// T1 becomes zero where another anchor is so far from this one's; T2 is lost, flags stay.
    pub(super) fn distance(&mut self, other: u32, distance: i32) {
        self.asm.load(T1, self.anchored(other, offset::NEGATIVE_IN_ANCHOR));
        self.asm.load(T2, self.anchored(self.anchor, offset::ADDRESS_IN_ANCHOR));
        self.asm.lea(T1, At::Index(T1, T2, 0, distance));
    }

    /// Goes on behind this only where T2 is the address of `rip`, which the block that follows is for. T3 may be the number
    /// of a site. Flags stay even where the block does not need them: the one that is at the address instead may.
    pub(super) fn landing(&mut self, rip: u64) {
        let right = self.asm.label();
        self.difference(T2, rip);
        self.asm.jrcxz(right);
        if self.anchor != FIXED {
            // Perhaps its page can be placed there.
            let offset = rip as i32;
            self.asm.store(self.field(offset::ADDRESS), T3);
            self.asm.lea(T2, At::Base(T2, -offset));
            self.asm.constant(T3, (self.known.low + offset::anchor(self.anchor)) as u64);
            self.asm.call_to(self.thunks.place);
            self.asm.lea(T2, At::Base(T2, offset));
            self.asm.load(T3, self.field(offset::ADDRESS));
            self.asm.jrcxz(right);
        }
        self.asm.jmp_to(self.thunks.land);
        self.asm.bind(right);
    }

    /// The block begins here; returns how many bytes are in front of it.
    pub(super) fn begin(&mut self) -> usize {
        self.head = self.asm.len();
        self.head
    }

    /// Notes that the translation of the current instruction, or a part of it, begins here; `enter`: and that a block may.
    pub(super) fn mark(&mut self, enter: bool) {
        let guest = self.rip.wrapping_sub(self.block.1) as u16;
        let host = (self.asm.len() - self.head) as u16;
        // Where a block begins there is room for a jump that takes its place.
        let enter = enter && host >= self.entered + JUMP_BYTES;
        debug_assert!(!enter || self.behind == 0, "whoever comes in has RSP right");
        if enter {
            self.entered = host;
        }
        self.marks.push(Mark { host, guest, behind: self.behind as i16, enter });
    }

    /// True where nothing that translated code relies on is in temporaries or known of the vector registers.
    pub(super) fn is_plain(&self) -> bool {
        self.cached.is_none() && !self.vectors
    }

    pub(super) fn site(&mut self, undo: i64) -> u32 {
        let (block, first) = self.block;
        self.sites.push(Site { block, offset: self.rip.wrapping_sub(first) as u16, undo: (undo / 8) as i16 });
        self.sites.len() as u32 - 1
    }

    /// The address of a memory operand; T2, and T1 where two registers of it are in memory.
    pub(super) fn address(&mut self, instruction: &Instruction) -> Address {
        let segment = match instruction.segment_prefix() {
            Register::FS => Some(4),
            Register::GS => Some(5),
            _ => None,
        };
        let address = self.offset(instruction, T2, false);
        let Some(segment) = segment else { return address };
        let base = self.segment_base(segment);
        match address {
            Address::Constant(value) => {
                self.asm.load(T2, base);
                if value != 0 {
                    self.asm.lea(T2, At::Base(T2, value));
                }
            }
            Address::In(register) => {
                self.asm.load(T1, base);
                self.asm.lea(T2, At::Index(register, T1, 0, 0));
            }
        }
        Address::In(T2)
    }

    pub(super) fn segment_base(&self, number: usize) -> At {
        let base = std::mem::offset_of!(engine::state::Segment, base);
        self.field(offset::SEGMENTS + (number * size_of::<engine::state::Segment>() + base) as i32)
    }

    /// The offset part of an address: what LEA computes, or the lower half of it. What is not there yet is put into `to`.
    pub(super) fn offset(&mut self, instruction: &Instruction, to: u8, half: bool) -> Address {
        let narrow = half
            || instruction.memory_base().is_gpr32()
            || instruction.memory_index().is_gpr32()
            || instruction.memory_base() == Register::EIP
            || instruction.memory_displ_size() == 4
                && instruction.memory_base() == Register::None
                && instruction.memory_index() == Register::None;
        let displacement = instruction.memory_displacement64();
        let general = |register: Register| register.is_gpr().then(|| register.number());
        let (base, index) = (general(instruction.memory_base()), general(instruction.memory_index()));
        if instruction.is_ip_rel_memory_operand() || base.is_none() && index.is_none() {
            if instruction.is_ip_rel_memory_operand() && self.anchor != FIXED {
                self.linear(to, displacement);
                if narrow {
                    self.asm.mov_32(to, to);
                }
                return Address::In(to);
            }
            let value = if narrow { displacement & 0xffff_ffff } else { displacement };
            return match i32::try_from(value as i64) {
                Ok(value) => Address::Constant(value),
                Err(_) => {
                    self.asm.constant(to, value);
                    Address::In(to)
                }
            };
        }
        let scale = instruction.memory_index_scale().trailing_zeros() as u8;
        let displacement = displacement as i32;
        let base = base.map(|number| self.value(number, T2));
        let index = index.map(|number| self.value(number, T1));
        let at = match (base, index) {
            (Some(base), None) if displacement == 0 && !narrow => return Address::In(base),
            (Some(base), None) => At::Base(base, displacement),
            (Some(base), Some(index)) => At::Index(base, index, scale, displacement),
            (None, Some(index)) => At::Scaled(index, scale, displacement),
            (None, None) => unreachable!("handled above"),
        };
        if narrow {
            self.asm.lea_32(to, at)
        } else {
            self.asm.lea(to, at)
        }
        Address::In(to)
    }

    /// Makes sure that the guest's vector registers are in the processor.
    pub(super) fn need_vectors(&mut self) {
        if !std::mem::replace(&mut self.vectors, true) {
            let here = self.asm.label();
            self.asm.load_32(T1, self.field(offset::VECTORS_AWAY));
            self.asm.jrcxz(here);
            self.asm.call_to(self.thunks.vectors);
            self.asm.bind(here);
        }
    }

    /// An exit to the block at `target`. The displacement that leads to it is `ahead` bytes from here.
    pub(super) fn exit_to(&mut self, target: u64, ahead: usize) -> Label {
        let at = self.asm.here() + ahead as u64;
        self.exit(target, 0, Some(at), false)
    }

    /// An exit to this instruction in code that was translated without loops and groups; `at` as for others.
    pub(super) fn exit_apart(&mut self, at: Option<u64>) -> Label {
        self.exit(self.rip, APART, at, false)
    }

    /// An exit to the monitor, to go on at `target`.
    pub(super) fn look_at(&mut self, target: u64) -> Label {
        self.exit(target, 0, None, true)
    }

    /// A label that leads to an exit; `mode` is what more the mode of the block has that it leads to, `at` where the
    /// displacement is, if it is to be linked. With `poll`, it leads to the monitor and not to a block.
    fn exit(&mut self, target: u64, mode: u16, at: Option<u64>, poll: bool) -> Label {
        debug_assert_eq!(self.behind, 0, "whoever goes on finds RSP right");
        let exit = self.first_exit + self.exits.len() as u32;
        self.exits.push(Exit { target, anchor: self.anchor, mode, at, block: self.block.0, instead: false });
        let here = self.asm.label();
        self.colds.push(Cold::Exit { here, exit, poll });
        here
    }

    /// Compares the signal word with what it is where nobody asks for the monitor: "not zero" where somebody does.
    pub(super) fn compare_signal(&mut self) {
        self.asm.compare_32_at(At::Absolute(self.known.signal), 0);
    }

    /// Leaves to the monitor where it has been asked for; keeps flags. `out` is where to.
    pub(super) fn poll(&mut self, out: Label) {
        let on = self.asm.label();
        self.asm.load_32(T1, At::Absolute(self.known.signal));
        self.asm.jrcxz(on);
        self.asm.jmp(out);
        self.asm.bind(on);
    }

    /// Leaves for the instruction after this one, to the monitor, where RSP is not a multiple of 8: translated code takes
    /// that for granted. Keeps flags.
    pub(super) fn check_stack_pointer(&mut self, out: Label) {
        let on = self.asm.label();
        let pointer = self.value(RSP, T2);
        self.asm.constant(T1, 7);
        self.asm.extract(T1, pointer, T1);
        self.asm.jrcxz(on);
        self.asm.jmp(out);
        self.asm.bind(on);
    }

    /// Saves the status flags.
    pub(super) fn save_flags(&mut self) {
        self.asm.store(self.field(offset::SCRATCH), reg::RAX);
        self.asm.raw(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
        self.asm.store(self.field(offset::OWN_FLAGS), reg::RAX);
        self.asm.load(reg::RAX, self.field(offset::SCRATCH));
    }

    pub(super) fn restore_flags(&mut self) {
        self.asm.store(self.field(offset::SCRATCH), reg::RAX);
        self.asm.load(reg::RAX, self.field(offset::OWN_FLAGS));
        self.asm.raw(&[0x04, 0x7f, 0x9e]); // add al, 127; sahf
        self.asm.load(reg::RAX, self.field(offset::SCRATCH));
    }
}
