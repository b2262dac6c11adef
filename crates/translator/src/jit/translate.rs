//! From the instructions of a block to host code.
//!
//! ```text
//!   guest bytes ─read.rs─> Source per instruction ─> emit ─> code cache
//! ```

use iced_x86::Instruction;
use memory::PAGE_SIZE;

use super::anchor::FIXED;
use super::asm::Label;
use super::callback::Interpreted;
use super::emit::{Emit, Inner, Room, condition, emptied};
use super::group::{self, Group};
use super::loops::Turns;
use super::profile;
use super::read::{Bytes, Second};
use super::same::{Source, moves_stack_pointer};
use super::strings;
use super::template::{Kind, Unit, disturbs_stack_pointer};
use super::{APART, Jit, Key, NEAR};
use crate::cpu::Cpu;
use crate::trap;

/// A translated block, not yet in the code cache.
pub(super) struct Translation {
    /// The code, and where its instructions are.
    pub room: Room,
    /// Bytes in front of the block, for who lands there.
    pub head: usize,
    pub instructions: usize,
    #[expect(clippy::vec_box, reason = "translated code has their addresses")]
    pub ops: Vec<Box<Interpreted>>,
}

impl Jit {
    /// Translates a block to run at the end of the code cache; `lands`: with what makes indirect branches find it. `None`: it
    /// cannot be done.
    pub(super) fn translate(
        &mut self,
        cpu: &mut Cpu,
        (key, anchor): (Key, u32),
        bytes: &Bytes,
        (lands, careful): (bool, bool),
    ) -> Option<Translation> {
        let mut sources: Vec<Source<'_>> = std::mem::take(&mut self.sources);
        self.read(cpu, key, bytes, &mut sources)?;
        let next = sources.last()?.instruction.next_ip();
        let next_code = self.arena.next();
        let mut block = Block {
            emit: Emit::new(
                next_code,
                (self.known, anchor),
                &self.thunks,
                &mut self.sites,
                std::mem::take(&mut self.room),
            ),
            key,
            ops: Vec::new(),
            start: None,
            turns: None,
            broken: None,
            lone: self.lone.is_some(),
        };
        (block.emit.careful, block.emit.block) = (careful, (self.blocks.len() as u32, key.rip));
        block.emit.first_exit = self.exits.len() as u32;
        block.emit.window = (key.mode & NEAR != 0).then_some(self.distance as i32);
        if lands {
            block.emit.landing(key.rip);
        }
        let head = block.emit.begin();
        let start = block.emit.asm.bound();
        block.start = (self.lone.is_none() && key.mode & APART == 0).then_some(start);
        if let Some(second) = bytes.second
            && second.anchor != FIXED
        {
            block.second_page(second);
        }
        block.turns = block.loop_of(&sources);
        let count = sources.len();
        if !block.body(cpu, &mut sources, count) {
            block.go_on(next);
        }
        block.next_turns(cpu, &mut sources)?;
        let room = block.emit.finish()?;
        let (instructions, ops) = (sources.len(), block.ops);
        self.sources = emptied(sources);
        Some(Translation { room, head, instructions, ops })
    }
}

/// True where the block goes on behind the instruction, whatever it does.
fn goes_on(source: &Source<'_>) -> bool {
    !matches!(
        source.template.kind,
        Kind::Jump
            | Kind::JumpIf
            | Kind::JumpIndirect
            | Kind::Call
            | Kind::CallIndirect
            | Kind::Return
            | Kind::Interpret
            | Kind::InterpretLast
            | Kind::EnableInterrupts
    )
}

/// A block being emitted.
pub(super) struct Block<'a> {
    pub(super) emit: Emit<'a>,
    pub(super) key: Key,
    #[expect(clippy::vec_box, reason = "translated code has their addresses")]
    ops: Vec<Box<Interpreted>>,
    pub(super) start: Option<Label>,
    /// The loop that it is.
    pub(super) turns: Option<Turns>,
    /// Where what has been checked for groups was lost last.
    pub(super) broken: Option<usize>,
    /// It is run alone.
    lone: bool,
}

impl<'a> Block<'a> {
    /// Translates the first `count` instructions. True where the block ends with the last.
    pub(super) fn body(&mut self, cpu: &mut Cpu, sources: &mut [Source<'a>], count: usize) -> bool {
        let mut ended = false;
        let mut enabled = false;
        for position in 0..count {
            if self.turns.is_some_and(|turns| position > turns.back) {
                self.emit.turn = None;
            }
            if let Some(broken) = self.broken {
                sources[position].part = sources[position].part.without(broken);
            }
            let source = &sources[position];
            if !group::leaves_stack_behind(source) {
                self.emit.settle_stack();
            }
            if source.met {
                self.meet(position);
            }
            self.emit.rip = source.instruction.ip();
            let counts = cpu.shared.config.count;
            let counted = counts && !profile::begins(sources, position);
            let open = position == 0 || self.emit.turn.is_none();
            self.emit.mark(open && !source.part.covered && !counted && self.emit.is_plain());
            for group in source.part.begins.iter().flatten() {
                self.begin_group(group, source.live);
            }
            if counts {
                self.emit.count(sources, position);
            }
            if source.template.kind == Kind::EnableInterrupts && sources.get(position + 1).is_some_and(goes_on) {
                self.emit.set_interrupts(source, true);
                self.emit.between();
                enabled = true;
                continue;
            }
            ended = self.instruction(cpu, position, source);
            if std::mem::take(&mut enabled) && !ended {
                // The shadow of STI ends here.
                let out = self.emit.look_at(source.instruction.next_ip());
                self.emit.look_for_interrupts(out);
            }
            self.emit.between();
        }
        self.emit.settle_stack();
        ended
    }

    /// A branch to an instruction further on in this block.
    fn jump_inside(&mut self, source: &Source<'_>, position: usize) {
        if let Some(&(_, behind)) = self.emit.met.iter().find(|met| self.is_behind(met.0) && met.0 == position) {
            self.emit.jump_if(&source.instruction, behind);
            return;
        }
        let label = self.emit.asm.label();
        self.emit.inner.push(Inner { position, label, vectors: self.emit.vectors });
        self.emit.jump_if(&source.instruction, label);
    }

    /// Branches inside arrive here: what is known is what all of them know.
    fn meet(&mut self, position: usize) {
        self.emit.cached = None;
        let Emit { inner, asm, vectors, .. } = &mut self.emit;
        for inner in inner.iter().filter(|inner| inner.position == position) {
            asm.bind(inner.label);
            *vectors &= inner.vectors;
        }
        let here = self.emit.asm.bound();
        self.emit.met.push((position, here));
    }

    /// Goes on at the block at `target`.
    pub(super) fn go_on(&mut self, target: u64) {
        let out = self.emit.exit_to(target, 1);
        self.emit.asm.jmp(out);
    }

    /// Checks a group of accesses; what does not pass goes to code without groups. `live`: flags are needed behind the check.
    fn begin_group(&mut self, group: &Group, live: bool) {
        if let Some(distance) = self.emit.window {
            let last = self.emit.sum(group.sum, group.last());
            return self.emit.stay_near(last, group.writes, distance, (group.pace, live));
        }
        self.emit.find_group(group);
    }

    /// Translates one instruction. True where the block ends with it.
    fn instruction(&mut self, cpu: &mut Cpu, position: usize, source: &Source<'a>) -> bool {
        if source.template.unit != Unit::General
            && !matches!(source.template.kind, Kind::Interpret | Kind::InterpretLast)
        {
            self.emit.need_vectors();
        }
        let done = match source.template.kind {
            Kind::Same => self.emit.same(source),
            Kind::Copy => {
                self.emit.copy(source);
                Some(())
            }
            Kind::Nothing => Some(()),
            Kind::Lea => self.emit.load_address(source),
            Kind::MovConstant => self.emit.move_constant(source),
            Kind::MovAbsolute => self.emit.move_absolute(source),
            Kind::ExchangeAccumulator => self.emit.exchange_accumulator(source),
            Kind::Bswap => self.emit.swap_bytes(source),
            Kind::PushRegister => self.emit.push_register(source),
            Kind::PushConstant => self.emit.push_constant(source),
            Kind::PushMemory => self.emit.push_memory(source),
            Kind::PopRegister => self.emit.pop_register(source),
            Kind::Leave => self.emit.leave_frame(source),
            Kind::Jump => {
                self.jump(source);
                return true;
            }
            Kind::JumpIf => {
                match source.inner {
                    Some(position) => self.jump_inside(source, position),
                    None => self.jump_if(source),
                }
                return false;
            }
            Kind::Call => {
                self.call(source);
                return false;
            }
            Kind::CallIndirect => {
                let poll = self.emit.look_at(self.emit.rip);
                self.emit.call_indirect(source, self.key.landings(), poll)
            }
            Kind::JumpIndirect => {
                let poll = self.emit.look_at(self.emit.rip);
                self.emit.jump_indirect(source, self.key.landings(), poll)
            }
            Kind::Return => self.emit.ret(source),
            Kind::PushFlags => self.emit.push_flags(source),
            Kind::DisableInterrupts
            | Kind::SwapGs
            | Kind::SetAccessControl
            | Kind::ClearAccessControl
            | Kind::ReadTsc => {
                self.privileged(source);
                Some(())
            }
            // STI where its shadow cannot be seen to the end.
            Kind::EnableInterrupts | Kind::Interpret | Kind::InterpretLast => None,
        };
        let kind = source.template.kind;
        if done.is_none() {
            self.broken = Some(position);
            return self.interpret(cpu, source);
        }
        if matches!(kind, Kind::JumpIndirect | Kind::Return) {
            return true;
        }
        if moves_stack_pointer(source) {
            let out = self.emit.look_at(source.instruction.next_ip());
            self.emit.check_stack_pointer(out);
        }
        false
    }

    fn privileged(&mut self, source: &Source<'_>) {
        match source.template.kind {
            Kind::DisableInterrupts => self.emit.set_interrupts(source, false),
            Kind::SetAccessControl => self.emit.set_access_control(source, true),
            Kind::ClearAccessControl => self.emit.set_access_control(source, false),
            Kind::ReadTsc => self.emit.read_tsc(source),
            _ => self.emit.swap_gs(),
        }
    }

    /// The interpreter does it. True where the block ends with it.
    fn interpret(&mut self, cpu: &mut Cpu, source: &Source<'_>) -> bool {
        self.emit.settle_stack();
        let instruction = &source.instruction;
        let mut op = cpu.op(instruction, source.bytes, instruction.ip(), u64::MAX);
        if op.cause().is_some() && !self.key.is_user() {
            op.handler = trap::leave;
        }
        let op = Box::new(Interpreted::new(op, instruction, self.emit.anchor));
        let address = std::ptr::from_ref::<Interpreted>(&op).expose_provenance() as u64;
        self.ops.push(op);
        let last =
            source.template.kind != Kind::Interpret && self.ends(instruction) || disturbs_stack_pointer(instruction);
        let thunks = self.emit.thunks;
        let string = strings::operation(instruction).filter(|_| !self.lone);
        let thunk = string.map_or(thunks.op, |string| thunks.strings[usize::from(self.key.is_user())][string]);
        self.emit.interpret(address, (!last).then_some(thunk));
        last
    }

    /// Where an instruction goes on is only known after it.
    fn ends(&self, instruction: &Instruction) -> bool {
        instruction.is_invalid() || instruction.flow_control() != iced_x86::FlowControl::Next
    }

    /// Goes to a target, with a look at the signal word where that is backwards.
    fn jump(&mut self, source: &Source<'_>) {
        let target = source.instruction.near_branch_target();
        if let Some(head) = self.next_turn(source) {
            return self.emit.asm.jmp(head);
        }
        let backward = self.is_backward(target);
        let out = backward.then(|| self.emit.look_at(target));
        match out {
            Some(out) if source.forgets => {
                self.emit.compare_signal();
                let there = self.start_or_exit(source, 2);
                self.emit.asm.jcc(condition::ZERO, there);
                self.emit.asm.jmp(out);
                return;
            }
            Some(out) => self.emit.poll(out),
            None => {}
        }
        let there = self.start_or_exit(source, 1);
        self.emit.asm.jmp(there);
    }

    /// Where a branch goes: to this block's start or to another's. The displacement is `ahead` bytes from here.
    fn start_or_exit(&mut self, source: &Source<'_>, ahead: usize) -> Label {
        let target = source.instruction.near_branch_target();
        match (self.start, self.turns) {
            (_, Some(turns)) if source.again => turns.head,
            (Some(start), _) if target == self.key.rip => start,
            _ => self.emit.exit_to(target, ahead),
        }
    }

    fn jump_if(&mut self, source: &Source<'_>) {
        let target = source.instruction.near_branch_target();
        if let Some(head) = self.next_turn(source) {
            self.emit.jump_if(&source.instruction, head);
        } else if self.is_backward(target) {
            let over = self.emit.asm.label();
            self.emit.jump_unless(&source.instruction, over);
            self.jump(source);
            self.emit.asm.bind(over);
        } else {
            let out = self.emit.exit_to(target, 2);
            self.emit.jump_if(&source.instruction, out);
        }
    }

    fn call(&mut self, source: &Source<'_>) {
        let target = source.instruction.near_branch_target();
        if self.is_backward(target) {
            let out = self.emit.look_at(self.emit.rip);
            self.emit.poll(out);
        }
        // Where the displacement is, is known once it is there.
        let out = self.emit.exit_to(target, 0);
        let exit = self.emit.exits.len() - 1;
        let base = self.emit.asm.here() - self.emit.asm.len() as u64;
        let at = self.emit.call_direct(source, out, self.key.is_user());
        self.emit.exits[exit].at = Some(base + at as u64);
    }

    /// True where a branch to `target` goes backwards. Addresses are from the page's start, perhaps before it.
    fn is_backward(&self, target: u64) -> bool {
        target as i64 <= self.emit.rip as i64
    }

    /// Leaves where the second page of the block's one instruction is not known to be behind the first.
    fn second_page(&mut self, second: Second) {
        let right = self.emit.asm.label();
        self.emit.distance(second.anchor, PAGE_SIZE as i32);
        self.emit.asm.jrcxz(right);
        let look = self.emit.look_at(self.key.rip);
        self.emit.asm.jmp(look);
        self.emit.asm.bind(right);
    }
}
