//! From guest bytes to a translated block.
//!
//! ```text
//!   decode ─> Source per instruction ─> flags needed after each ─> emit ─> code cache
//! ```

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};
use memory::{Gpa, Gva, PAGE_SIZE};

use super::anchor::FIXED;
use super::asm::Label;
use super::callback::Interpreted;
use super::emit::{Emit, Room, condition};
use super::encoding::Encoding;
use super::group::{self, Group, Part};
use super::lone::stands_alone;
use super::profile;
use super::same::{Source, moves_stack_pointer};
use super::strings;
use super::template::{Kind, Unit, disturbs_stack_pointer};
use super::{APART, Exit, Jit, Key, NEAR, live};
use crate::block::Version;
use crate::cpu::Cpu;
use crate::decode::CodePlace;
use crate::mmu::{Access, Rights};
use crate::op::Leave;

/// Most instructions in a block.
const MOST: usize = 24;
/// Most bytes read for a block.
const WINDOW: usize = 256;
/// Longest instruction.
const LONGEST: usize = 15;
/// Instructions, and bytes, looked at to find out whether a jump's target needs the flags. Most say so by the third; loops
/// of vectors take long.
const PEEK: usize = 64;
const PEEK_BYTES: u64 = 384;

/// A block's bytes, and where they are from.
pub(super) struct Bytes {
    bytes: Vec<u8>,
    /// The versions of the pages they were read from.
    versions: [Version; 2],
    /// The page of what lies across the first page's end.
    pub second: Option<Second>,
}

impl Bytes {
    /// True where they have not been overwritten since.
    pub(super) fn are_current(&self) -> bool {
        self.versions.iter().all(|version| version.is_current())
    }
}

/// The second page of an instruction across two.
#[derive(Clone, Copy, Debug)]
pub(super) struct Second {
    pub gpa: Gpa,
    pub anchor: u32,
}

/// A translated block, not yet in the code cache.
pub(super) struct Translation {
    /// The code, and where its instructions are.
    pub room: Room,
    /// Bytes in front of the block, for who lands there.
    pub head: usize,
    pub instructions: usize,
    pub exits: Vec<Exit>,
    #[expect(clippy::vec_box, reason = "translated code has their addresses")]
    pub ops: Vec<Box<Interpreted>>,
}

impl Jit {
    /// Reads the bytes of the block of `key` at `place`, having declared them to be code.
    pub(super) fn fetch(&mut self, cpu: &mut Cpu, key: Key, place: &CodePlace) -> Result<Bytes, Leave> {
        let left = (PAGE_SIZE - place.gpa % PAGE_SIZE) as usize;
        let version = self.mark_page(cpu, place.gpa, left.min(WINDOW) as u64);
        let mut versions = [version; 2];
        let mut bytes = vec![0; left.min(WINDOW)];
        // SAFETY: `place.host` is good up to the end of its page.
        unsafe { std::ptr::copy_nonoverlapping(place.host, bytes.as_mut_ptr(), bytes.len()) };
        let mut second = None;
        if left < LONGEST {
            let mut decoder = Decoder::with_ip(64, &bytes, 0, DecoderOptions::AMD);
            if decoder.decode().is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
                let linear = place.linear.wrapping_add(left as u64);
                let gpa = cpu.translate(Gva(linear), Access::Execute, Rights::Current)?.gpa;
                let Some(host) = cpu.shared.ram.host_page(gpa) else { return Err(cpu.ud()) };
                versions[1] = self.mark_page(cpu, gpa.0, LONGEST as u64);
                let start = bytes.len();
                bytes.resize(LONGEST, 0);
                // SAFETY: `host` starts a page.
                unsafe {
                    std::ptr::copy_nonoverlapping(host.as_ptr(), bytes[start..].as_mut_ptr(), LONGEST - start);
                }
                let anchor = self.anchor(cpu, key, gpa).unwrap_or_else(|| {
                    self.full = true; // of anchors
                    FIXED
                });
                second = Some(Second { gpa, anchor });
            }
        }
        Ok(Bytes { bytes, versions, second })
    }

    /// Translates a block to run at the end of the code cache; `lands`: with what makes indirect branches find it. `None`: it
    /// cannot be done.
    pub(super) fn translate(
        &mut self,
        cpu: &mut Cpu,
        (key, anchor): (Key, u32),
        bytes: &Bytes,
        (lands, careful): (bool, bool),
    ) -> Option<Translation> {
        let across = bytes.second.is_some();
        let mut sources = self.decode(cpu, key, &bytes.bytes, if across { 1 } else { MOST });
        if self.lone.is_none() {
            join(&mut sources);
        }
        let needed = self.needed_flags(cpu, key, &mut sources)?;
        let next = sources.last()?.instruction.next_ip();
        if key.mode & APART == 0 {
            let parts = group::plan(&sources);
            for (source, part) in sources.iter_mut().zip(parts) {
                source.part = part;
            }
        }
        if self.lone.is_some() {
            self.note_plain(key, &sources, &needed);
        }
        #[cfg(test)]
        if self.wrong {
            sources.iter_mut().for_each(super::lone::mistranslate);
        }
        let at = self.arena.next();
        let mut block = Block {
            emit: Emit::new(at, (self.known, anchor), &self.thunks, &mut self.sites, std::mem::take(&mut self.room)),
            key,
            first_exit: self.exits.len() as u32,
            exits: Vec::with_capacity(8),
            inner: Vec::new(),
            ops: Vec::new(),
            start: None,
            broken: false,
            lone: self.lone.is_some(),
        };
        (block.emit.careful, block.emit.block) = (careful, (self.blocks.len() as u32, key.rip));
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
        let mut ended = false;
        let mut enabled = false;
        for position in 0..sources.len() {
            block.leave_broken_group(&mut sources[position]);
            let source = &sources[position];
            if source.met {
                block.meet(position);
            }
            block.emit.rip = source.instruction.ip();
            let apart = !source.part.inside || source.part.begins.is_some();
            let counted = cpu.shared.config.count && !profile::begins(&sources, position);
            block.emit.mark(apart && !counted && block.emit.is_plain());
            if let Some(group) = source.part.begins {
                block.begin_group(group);
            }
            block.emit.count(cpu, &sources, position);
            if source.template.kind == Kind::EnableInterrupts && sources.get(position + 1).is_some_and(goes_on) {
                block.emit.set_interrupts(source, true);
                block.emit.between();
                enabled = true;
                continue;
            }
            ended = block.instruction(cpu, source);
            if std::mem::take(&mut enabled) && !ended {
                // The shadow of STI ends here.
                let out = block.look_at(source.instruction.next_ip());
                block.emit.look_for_interrupts(out);
            }
            block.emit.between();
        }
        if !ended {
            let out = block.exit_to(next, 1);
            block.emit.asm.jmp(out);
        }
        let Block { emit, exits, ops, .. } = block;
        Some(Translation { room: emit.finish()?, head, instructions: sources.len(), exits, ops })
    }

    /// Finds out which flags are needed before each instruction, last first, and tells the instructions. `None`: there are
    /// none.
    fn needed_flags(&mut self, cpu: &mut Cpu, key: Key, sources: &mut [Source<'_>]) -> Option<Vec<u32>> {
        let last = sources.last()?;
        let next = last.instruction.next_ip();
        let mut live = match last.template.kind {
            Kind::Jump => 0, // see below
            Kind::Interpret | Kind::JumpIndirect | Kind::Return | Kind::InterpretLast => live::ALL,
            _ => self.needs_flags(cpu, key, next),
        };
        let mut needed: Vec<u32> = Vec::with_capacity(sources.len());
        let count = sources.len();
        for source in sources.iter_mut().rev() {
            let instruction = &source.instruction;
            match source.template.kind {
                Kind::Call | Kind::CallIndirect | Kind::Interpret | Kind::InterpretLast | Kind::PushFlags => {
                    live = live::ALL;
                }
                Kind::Jump | Kind::JumpIf => {
                    let there = match source.inner {
                        Some(position) => needed[count - 1 - position],
                        None => self.needs_flags(cpu, key, instruction.near_branch_target()),
                    };
                    source.forgets = there == 0;
                    live |= live::reads(instruction) | there;
                }
                _ => live = live & !live::replaces(instruction) | live::reads(instruction),
            }
            source.live = live != 0;
            needed.push(live);
        }
        Some(needed)
    }

    fn decode<'b>(&mut self, cpu: &mut Cpu, key: Key, bytes: &'b [u8], most: usize) -> Vec<Source<'b>> {
        let mut decoder = Decoder::with_ip(64, bytes, key.rip, DecoderOptions::AMD);
        let mut sources: Vec<Source<'b>> = Vec::with_capacity(MOST);
        while sources.len() < most && decoder.position() < bytes.len() {
            let at = decoder.position();
            let instruction = decoder.decode();
            if instruction.is_invalid() && !sources.is_empty() {
                break; // a block of its own: what is invalid, or cut off
            }
            let constants = decoder.get_constant_offsets(&instruction);
            let mut template = self.templates.get(&instruction, &cpu.features);
            if !key.allows(template.unit) || !key.may(template.kind) {
                template.kind = Kind::Interpret;
            }
            if template.kind == Kind::Interpret && (instruction.is_invalid() || disturbs_stack_pointer(&instruction)) {
                template.kind = Kind::InterpretLast;
            }
            let alone = self.lone.is_some() && stands_alone(template.kind);
            if alone && !sources.is_empty() {
                break;
            }
            sources.push(Source {
                instruction,
                template,
                bytes: &bytes[at..],
                encoding: matches!(template.kind, Kind::Same | Kind::Lea)
                    .then(|| Encoding::parse(&bytes[at..]))
                    .flatten(),
                constants,
                live: true,
                forgets: false,
                inner: None,
                met: false,
                part: Part::default(),
            });
            // A call comes back, mostly; a block that is run alone does not wait for it.
            let goes_on = match template.kind {
                Kind::JumpIf => true,
                Kind::Call | Kind::CallIndirect => self.lone.is_none(),
                _ => false,
            };
            let ends = !goes_on && instruction.flow_control() != iced_x86::FlowControl::Next;
            if ends || alone || template.kind == Kind::InterpretLast {
                break;
            }
            // What follows may have been translated already, as where a branch led.
            let branches = instruction.flow_control() != iced_x86::FlowControl::Next;
            if branches && self.by_key.contains_key(&key.after(decoder.position())) {
                break;
            }
        }
        sources
    }

    /// Which flags the code at `target` may read before it replaces them. Only the same page is looked at.
    pub(super) fn needs_flags(&mut self, cpu: &mut Cpu, key: Key, target: u64) -> u32 {
        if (target ^ key.rip) >> 12 != 0 {
            return live::ALL;
        }
        let gpa = key.gpa & !0xfff | target & 0xfff;
        let left = (PAGE_SIZE - gpa % PAGE_SIZE).min(PEEK_BYTES) as usize;
        let Some(host) = cpu.shared.ram.host_page(Gpa(gpa)) else { return live::ALL };
        self.mark_page(cpu, gpa, left as u64);
        let mut bytes = [0; PEEK_BYTES as usize];
        // SAFETY: good up to the end of the page.
        unsafe { std::ptr::copy_nonoverlapping(host.as_ptr(), bytes.as_mut_ptr(), left) };
        let mut decoder = Decoder::with_ip(64, &bytes[..left], target, DecoderOptions::AMD);
        let mut open = live::ALL;
        for _ in 0..PEEK {
            let instruction = decoder.decode();
            if instruction.is_invalid() || live::reads(&instruction) & open != 0 {
                return live::ALL;
            }
            open &= !live::replaces(&instruction);
            if open == 0 {
                return 0;
            }
            let kind = self.templates.get(&instruction, &cpu.features).kind;
            let plain = instruction.flow_control() == iced_x86::FlowControl::Next;
            if !plain || matches!(kind, Kind::Interpret | Kind::InterpretLast) {
                return live::ALL;
            }
        }
        live::ALL
    }
}

/// Finds the conditional branches that lead to instructions further on in their block.
fn join(sources: &mut [Source<'_>]) {
    for position in 0..sources.len() {
        if sources[position].template.kind != Kind::JumpIf {
            continue;
        }
        let target = sources[position].instruction.near_branch_target();
        let behind = sources[position + 1..].iter().position(|source| source.instruction.ip() == target);
        if let Some(behind) = behind {
            let there = position + 1 + behind;
            sources[position].inner = Some(there);
            sources[there].met = true;
        }
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
struct Block<'a> {
    emit: Emit<'a>,
    key: Key,
    first_exit: u32,
    exits: Vec<Exit>,
    /// Where branches lead inside: the position, and whether vector registers are known to be in the processor there.
    inner: Vec<(usize, Label, bool)>,
    #[expect(clippy::vec_box, reason = "translated code has their addresses")]
    ops: Vec<Box<Interpreted>>,
    start: Option<Label>,
    /// The current group's addend is lost.
    broken: bool,
    /// It is run alone.
    lone: bool,
}

impl<'a> Block<'a> {
    /// A branch to an instruction further on in this block.
    fn jump_inside(&mut self, source: &Source<'_>, position: usize) {
        let label = self.emit.asm.label();
        self.inner.push((position, label, self.emit.vectors));
        self.emit.jump_if(&source.instruction, label);
    }

    /// Branches inside arrive here: what is known is what all of them know.
    fn meet(&mut self, position: usize) {
        self.emit.cached = None;
        for &(_, label, vectors) in self.inner.iter().filter(|inner| inner.0 == position) {
            self.emit.asm.bind(label);
            self.emit.vectors &= vectors;
        }
    }

    /// An exit to the block at `target`. The displacement that leads to it is `ahead` bytes from here.
    fn exit_to(&mut self, target: u64, ahead: usize) -> Label {
        let at = self.emit.asm.here() + ahead as u64;
        self.exits.push(Exit { target, anchor: self.emit.anchor, mode: 0, at: Some(at), instead: None });
        let exit = self.first_exit + self.exits.len() as u32 - 1;
        self.emit.exit(exit, false)
    }

    /// Checks a group of stack accesses; what does not pass goes to code without groups.
    fn begin_group(&mut self, group: Group) {
        self.emit.find_group(&group);
        self.leave_apart(condition::ZERO);
        self.emit.compare_group_end(&group);
        self.leave_apart(condition::ABOVE);
    }

    fn leave_apart(&mut self, condition: u8) {
        let apart = self.exit_to(self.emit.rip, 2);
        if let Some(exit) = self.exits.last_mut() {
            exit.mode = APART;
        }
        self.emit.asm.jcc(condition, apart);
    }

    /// An instruction that its group's addend is not there for any more is none of the group.
    fn leave_broken_group(&mut self, source: &mut Source<'_>) {
        if source.part.begins.is_some() {
            self.broken = false;
        } else if self.broken {
            source.part = Part::default();
        }
    }

    /// An exit to the monitor, to go on at `target`.
    fn look_at(&mut self, target: u64) -> Label {
        self.exits.push(Exit { target, anchor: self.emit.anchor, mode: 0, at: None, instead: None });
        let exit = self.first_exit + self.exits.len() as u32 - 1;
        self.emit.exit(exit, true)
    }

    /// Translates one instruction. True where the block ends with it.
    fn instruction(&mut self, cpu: &mut Cpu, source: &Source<'a>) -> bool {
        if source.template.unit != Unit::General
            && !matches!(source.template.kind, Kind::Interpret | Kind::InterpretLast)
        {
            self.emit.need_vectors();
        }
        let table = self.key.landings();
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
                let poll = self.look_at(self.emit.rip);
                self.emit.call_indirect(source, table, poll)
            }
            Kind::JumpIndirect => {
                let poll = self.look_at(self.emit.rip);
                self.emit.jump_indirect(source, table, poll)
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
            return self.interpret(cpu, source);
        }
        if matches!(kind, Kind::JumpIndirect | Kind::Return) {
            return true;
        }
        if moves_stack_pointer(source) {
            let out = self.look_at(source.instruction.next_ip());
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
        self.broken = true;
        let instruction = &source.instruction;
        let op = cpu.op(instruction, source.bytes, instruction.ip(), u64::MAX);
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
        let backward = self.is_backward(target);
        let out = backward.then(|| self.look_at(target));
        match out {
            Some(out) if source.forgets => {
                self.emit.compare_signal();
                let there = self.start_or_exit(target, 2);
                self.emit.asm.jcc(condition::ZERO, there);
                self.emit.asm.jmp(out);
                return;
            }
            Some(out) => self.emit.poll(out),
            None => {}
        }
        let there = self.start_or_exit(target, 1);
        self.emit.asm.jmp(there);
    }

    /// Where a branch goes: to this block's start or to another's. The displacement is `ahead` bytes from here.
    fn start_or_exit(&mut self, target: u64, ahead: usize) -> Label {
        match self.start {
            Some(start) if target == self.key.rip => start,
            _ => self.exit_to(target, ahead),
        }
    }

    fn jump_if(&mut self, source: &Source<'_>) {
        let target = source.instruction.near_branch_target();
        if self.is_backward(target) {
            let over = self.emit.asm.label();
            self.emit.jump_unless(&source.instruction, over);
            self.jump(source);
            self.emit.asm.bind(over);
        } else {
            let out = self.exit_to(target, 2);
            self.emit.jump_if(&source.instruction, out);
        }
    }

    fn call(&mut self, source: &Source<'_>) {
        let target = source.instruction.near_branch_target();
        if self.is_backward(target) {
            let out = self.look_at(self.emit.rip);
            self.emit.poll(out);
        }
        // Where the displacement is, is known once it is there.
        let out = self.exit_to(target, 0);
        let exit = self.exits.len() - 1;
        let base = self.emit.asm.here() - self.emit.asm.len() as u64;
        let at = self.emit.call_direct(source, out, self.key.is_user());
        self.exits[exit].at = Some(base + at as u64);
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
        let look = self.look_at(self.key.rip);
        self.emit.asm.jmp(look);
        self.emit.asm.bind(right);
    }
}
