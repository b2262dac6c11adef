//! The stack, calls, returns and jumps.
//!
//! ```text
//!   CALL: guest return address onto the guest's stack, host CALL to the target ─> shadow stack
//!   RET:  guest return address from the guest's stack to T2, host RET ─> behind the CALL, which compares T2
//! ```
//!
//! RSP is a multiple of 8 wherever translated code runs, so no access of 8 bytes at a multiple of 8 from it crosses a page.

use iced_x86::{Code, Instruction, OpKind};

use super::anchor::FIXED;
use super::asm::{At, Label};
use super::check::Access;
use super::emit::{Address, Emit, HOST, STACK, T1, T2, T3};
use super::same::Source;
use super::thunk;
use crate::home::offset;

const RSP: usize = 4;
const RBP: usize = 5;

impl Emit<'_> {
    fn stack_access(write: bool, live: bool) -> Access {
        Access { bytes: 8, write, aligned: true, refused: false, anywhere: false, live }
    }

    /// Room for a push, which [`Emit::pushed`] completes: unless in a group, T2 is the new RSP. Returns where to write.
    pub(super) fn push_room(&mut self, source: &Source<'_>, again: Label) -> At {
        if source.part.of.is_some() {
            return self.in_group(-8);
        }
        self.asm.lea(T2, At::Base(STACK, -8));
        self.check(Address::In(T2), Self::stack_access(true, source.live), again)
    }

    /// RSP becomes what [`Emit::push_room`] has made room for; in a group, once that is needed.
    pub(super) fn pushed(&mut self, source: &Source<'_>) {
        if source.part.of.is_some() {
            self.behind -= 8;
        } else {
            self.asm.mov(STACK, T2);
        }
    }

    /// Where a pop, or a return, reads.
    fn top(&mut self, source: &Source<'_>, again: Label) -> At {
        if source.part.of.is_some() {
            return self.in_group(0);
        }
        self.check(Address::In(STACK), Self::stack_access(false, source.live), again)
    }

    pub(super) fn push_register(&mut self, source: &Source<'_>) -> Option<()> {
        let again = self.asm.bound();
        let at = self.push_room(source, again);
        let temporary = if source.part.inside.is_some() { T2 } else { T3 };
        let value = self.value(source.instruction.op0_register().number(), temporary);
        self.asm.store(at, value);
        self.pushed(source);
        Some(())
    }

    pub(super) fn push_constant(&mut self, source: &Source<'_>) -> Option<()> {
        let again = self.asm.bound();
        let at = self.push_room(source, again);
        self.asm.store_constant(at, source.instruction.immediate(0) as i32);
        self.pushed(source);
        Some(())
    }

    pub(super) fn push_memory(&mut self, source: &Source<'_>) -> Option<()> {
        if source.instruction.op0_kind() == OpKind::Register {
            return self.push_register(source); // the same, encoded otherwise
        }
        self.cached = None; // T3 is something else where the second check goes back to the first
        let again = self.asm.bound();
        let from = self.memory(source, again)?;
        // T3 outlives the second check: that is an aligned one, whose cold code does not use it.
        let value = if source.part.inside.is_some() { T1 } else { T3 };
        self.asm.load(value, from);
        self.between();
        let room = self.push_room(source, again);
        self.asm.store(room, value);
        self.pushed(source);
        Some(())
    }

    pub(super) fn pop_register(&mut self, source: &Source<'_>) -> Option<()> {
        let number = source.instruction.op0_register().number();
        let again = self.asm.bound();
        let at = self.top(source, again);
        let to = HOST[number].unwrap_or(T1);
        if number == RSP {
            self.asm.load(STACK, at);
            return Some(());
        }
        self.asm.load(to, at);
        self.set(number, to);
        self.behind += 8;
        if source.part.of.is_none() {
            self.settle_stack();
        }
        Some(())
    }

    pub(super) fn leave_frame(&mut self, source: &Source<'_>) -> Option<()> {
        let frame = HOST[RBP]?;
        let again = self.asm.bound();
        let access = Access { aligned: false, ..Self::stack_access(false, source.live) };
        let at = self.check(Address::In(frame), access, again);
        self.asm.load(T1, at);
        self.asm.lea(STACK, At::Base(frame, 8));
        self.asm.mov(frame, T1);
        Some(())
    }

    /// Pushes the address after a CALL. T3 is kept.
    fn push_return(&mut self, source: &Source<'_>, again: Label) {
        let next = source.instruction.next_ip();
        let at = self.push_room(source, again);
        match i32::try_from(next as i64) {
            Ok(short) if self.anchor == FIXED => {
                self.asm.store_constant(at, short);
                self.pushed(source);
            }
            _ if source.part.of.is_some() => {
                self.linear(T2, next);
                self.asm.store(at, T2);
                self.pushed(source);
            }
            _ => {
                // T2 is needed as the new RSP first.
                self.asm.lea(T1, at);
                self.pushed(source);
                self.linear(T2, next);
                self.asm.store(At::Base(T1, 0), T2);
            }
        }
    }

    /// A direct CALL: returns where its displacement is, for the caller to link.
    pub(super) fn call_direct(&mut self, source: &Source<'_>, target: Label, user: bool) -> usize {
        let next = source.instruction.next_ip();
        let again = self.asm.bound();
        self.push_return(source, again);
        self.settle_stack();
        let at = self.asm.len() + 1;
        self.asm.call(target);
        self.returned(next, user);
        at
    }

    /// Where a host RET arrives: goes on where T2 is the address after the CALL. Flags stay, for what is at T2 otherwise.
    fn returned(&mut self, next: u64, user: bool) {
        let right = self.asm.label();
        self.difference(T2, next);
        self.asm.jrcxz(right);
        self.asm.jmp_to(self.thunks.mismatch[usize::from(user)]);
        self.asm.bind(right);
        self.vectors = false;
        self.cached = None;
    }

    /// Where an indirect branch leads, in `to`.
    fn target(&mut self, source: &Source<'_>, again: Label, to: u8) -> Option<()> {
        if source.instruction.op0_kind() == OpKind::Register {
            let value = self.value(source.instruction.op0_register().number(), to);
            if value != to {
                self.asm.mov(to, value);
            }
        } else {
            let at = self.memory(source, again)?;
            self.asm.load(to, at);
        }
        Some(())
    }

    /// T3 says which instruction an indirect branch comes from, for one that leads to a non-canonical address.
    fn note_site(&mut self, undo: i64) {
        let site = self.site(undo);
        self.asm.constant(T3, site.into());
    }

    pub(super) fn jump_indirect(&mut self, source: &Source<'_>, table: usize, poll: Label) -> Option<()> {
        let again = self.asm.bound();
        self.poll(poll);
        self.target(source, again, T2)?;
        self.land(table, 0);
        Some(())
    }

    /// Goes to where a landing table says T2 is.
    fn land(&mut self, table: usize, undo: i64) {
        thunk::landing_index(&mut self.asm);
        self.note_site(undo);
        self.asm.jmp_at(At::Scaled(T1, 3, self.low() + offset::landings(table)));
    }

    pub(super) fn call_indirect(&mut self, source: &Source<'_>, table: usize, poll: Label) -> Option<()> {
        let next = source.instruction.next_ip();
        self.cached = None; // as for a push of memory
        let again = self.asm.bound();
        self.poll(poll);
        self.target(source, again, T3)?;
        self.between();
        self.push_return(source, again);
        self.asm.mov(T2, T3);
        // Over the landing jump, so that the host's return address is that of what follows it.
        let (land, after) = (self.asm.label(), self.asm.label());
        self.asm.call(land);
        self.asm.jmp_short(after);
        self.asm.bind(land);
        self.land(table, 8);
        self.asm.bind(after);
        self.returned(next, table != 0);
        Some(())
    }

    pub(super) fn ret(&mut self, source: &Source<'_>) -> Option<()> {
        let release = match source.instruction.code() {
            Code::Retnq_imm16 => i32::from(source.instruction.immediate16()),
            _ => 0,
        };
        if release % 8 != 0 {
            return None;
        }
        let again = self.asm.bound();
        let at = self.top(source, again);
        self.asm.load(T2, at);
        self.behind += 8 + release;
        self.settle_stack();
        self.note_site(i64::from(-8 - release));
        self.asm.ret();
        Some(())
    }

    /// Calls `thunk`, which calls the interpreter's handler for an instruction; goes to the handler for good where the block
    /// ends there.
    pub(super) fn interpret(&mut self, op: u64, thunk: Option<u64>) {
        self.asm.constant(T2, op);
        match thunk {
            Some(thunk) => self.asm.call_to(thunk),
            None => self.asm.jmp_to(self.thunks.last),
        }
        self.vectors = false;
        self.cached = None;
    }

    /// A conditional jump on the flags to a label. Returns where its displacement is.
    pub(super) fn jump_if(&mut self, instruction: &Instruction, target: Label) -> usize {
        let at = self.asm.len() + 2;
        self.asm.jcc(condition_of(instruction), target);
        at
    }

    /// The opposite, over what follows.
    pub(super) fn jump_unless(&mut self, instruction: &Instruction, target: Label) {
        self.asm.jcc_short(condition_of(instruction) ^ 1, target);
    }

    /// A host instruction the processor runs as it is.
    pub(super) fn copy(&mut self, source: &Source<'_>) {
        self.asm.raw(&source.bytes[..source.instruction.len()]);
    }
}

/// The low four bits of a Jcc's opcode.
fn condition_of(instruction: &Instruction) -> u8 {
    // The enumeration is in the opcodes' order, after `None`.
    instruction.condition_code() as u8 - 1
}
