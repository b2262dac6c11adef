//! Accesses with one check for several.
//!
//! ```text
//!   check [rsp - 40, rsp + 24)  ─ page has no entry, or begins in between ─> the same code, translated without groups
//!   push rbp                       mov [r8 + r10 - 8], rbp
//!   push rbx                       mov [r8 + r10 - 8], rbx
//!   mov rax, [rsp + 32]            mov rax, [r8 + r10 + 32]
//! ```
//!
//! A block's accesses at known distances from where a register was form a group. Before the first, one check makes sure of
//! all of them. What could fault does so in code that was translated without groups, at the instruction that it belongs to.
//!
//! The check takes the flags. Where they are needed, it is made earlier, before the instruction that sets them: `add rsp, 8`
//! in front of a function's last pops, a comparison with a load between it and its branch. Where it cannot, and there is a
//! window, it is one that keeps them.
//!
//! * Of the **stack** there is one group at a time: pushes, pops, operands at RSP, the CALL or RET at its end. All are in
//!   one page, which may be written if any of them writes; its addend is in T3.
//! * Of **pages in the window** there are several, at whatever sum of registers: nothing has to be kept for them. Reads are
//!   apart from writes, and the check is that of the last byte (see [`super::near`]), so they may lie across two pages.

use std::ops::Range;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::asm::At;
use super::check::table_for;
use super::emit::{Emit, READ, STACK, T1, T2, T3, condition};
use super::near::is_locked;
use super::read::MOST;
use super::same::{Source, high_register};
use super::template::Kind;

/// Fewest accesses that are worth a group: of the stack, of pages in the window.
const FEWEST: [u32; 2] = [3, 2];
/// Most bytes from the first to the last: of the stack, of pages in the window. A group of the former goes apart where its last
/// byte is among so many of the page's first.
const MOST_BYTES: [i64; 2] = [512, 2048];
/// Farthest from the registers: where those move on, displacements must still be what 32 bits can say.
const FARTHEST: i64 = 1 << 20;
/// Most groups in the window at a time.
const MOST_OPEN: usize = 4;
const _: () = assert!(MOST <= u32::BITS as usize, "a block's instructions have a bit each");

/// What an address is made of, but for its displacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sum {
    pub base: Register,
    pub index: Register,
    pub scale: u32,
}

impl Sum {
    const STACK: Self = Self { base: Register::RSP, index: Register::None, scale: 1 };

    pub(super) fn of(instruction: &Instruction) -> Self {
        let scale = instruction.memory_index_scale();
        Self { base: instruction.memory_base(), index: instruction.memory_index(), scale }
    }
}

/// A group, at its first access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub sum: Sum,
    /// Where it starts, from the sum.
    start: i32,
    /// How long it is.
    bytes: i32,
    pub writes: bool,
    /// How far it moves from turn to turn of its loop, in turns that its check is made in, where that is known.
    pub pace: Option<i32>,
}

impl Group {
    /// Its last byte.
    pub(super) fn last(&self) -> i32 {
        self.start + self.bytes - 1
    }
}

/// What groups mean to an instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Part {
    /// Groups begin here.
    pub begins: [Option<Group>; 2],
    /// The instruction's access belongs to the group that begins at that position.
    pub of: Option<usize>,
    /// T3 is the addend of the group that begins there.
    pub inside: Option<usize>,
    /// Something relies on a check before.
    pub covered: bool,
}

impl Part {
    /// What is left where no check made up to a position counts any more.
    pub(super) fn without(self, position: usize) -> Self {
        let later = |begin: &usize| *begin > position;
        Self { of: self.of.filter(later), inside: self.inside.filter(later), ..self }
    }
}

/// An access, from its sum as it is before the instruction.
struct Access {
    sum: Sum,
    at: i64,
    bytes: i64,
    writes: bool,
}

/// A group in the making.
struct Open {
    sum: Sum,
    /// Where its check is made.
    begin: usize,
    /// The first and the last, and a bit for each.
    first: usize,
    last: usize,
    members: u32,
    /// The sum, from where it was at the check.
    moved: i64,
    start: i64,
    end: i64,
    writes: bool,
}

impl Open {
    fn new((begin, moved): (usize, i64), position: usize, access: &Access) -> Self {
        let &Access { sum, at, bytes, writes } = access;
        let start = moved + at;
        let members = 1 << position;
        Self { sum, begin, first: position, last: position, members, moved, start, end: start + bytes, writes }
    }

    fn add(&mut self, position: usize, access: &Access, most: i64) -> bool {
        let at = self.moved + access.at;
        let (start, end) = (self.start.min(at), self.end.max(at + access.bytes));
        let fits = end - start <= most;
        if fits {
            (self.start, self.end, self.writes) = (start, end, self.writes || access.writes);
            (self.last, self.members) = (position, self.members | 1 << position);
        }
        fits
    }

    fn close(&self, near: bool, parts: &mut [Part]) {
        let &Self { begin, first, last, members, .. } = self;
        // A check that keeps the flags costs more than two that do not.
        let fewest = if near && begin != first { 1 } else { FEWEST[usize::from(near)] };
        if members.count_ones() < fewest {
            return;
        }
        let Some(free) = parts[begin].begins.iter().position(Option::is_none) else { return };
        let (start, bytes) = (self.start as i32, (self.end - self.start) as i32);
        parts[begin].begins[free] = Some(Group { sum: self.sum, start, bytes, writes: self.writes, pace: None });
        for part in &mut parts[begin..=last] {
            part.inside = (!near).then_some(begin);
        }
        for part in &mut parts[begin + 1..=last] {
            part.covered = true;
        }
        for member in (first..=last).filter(|position| members & 1 << position != 0) {
            parts[member].of = Some(begin);
        }
    }
}

/// What planning takes memory for: it serves one block after the other.
#[derive(Default)]
pub(super) struct Room {
    open: Vec<Open>,
    parts: Vec<Part>,
}

/// Groups in the making.
struct Plan<'a> {
    sources: &'a [Source<'a>],
    near: bool,
    open: &'a mut Vec<Open>,
    /// The last place where a check may take the flags and holds until here.
    calm: Option<usize>,
    parts: &'a mut Vec<Part>,
}

/// Finds the groups of a block, and tells the instructions; `near`: of a program that has most of its pages in the window.
pub(super) fn plan(sources: &mut [Source<'_>], near: bool, room: &mut Room) {
    if !near && sources.iter().filter(|source| may_join(source)).count() < FEWEST[0] as usize {
        return;
    }
    let Room { open, parts } = room;
    parts.clear();
    parts.resize(sources.len(), Part::default());
    let mut plan = Plan { sources, near, open, calm: None, parts };
    for (position, source) in sources.iter().enumerate() {
        let through = goes_through(source, near);
        if source.met || !through {
            plan.close_if(|_| true);
            plan.calm = None;
        }
        if !source.live {
            plan.calm = Some(position);
        }
        if let Some(access) = access(source, near) {
            plan.take(position, &access);
        }
        plan.follow(source);
    }
    plan.close_if(|_| true);
    for (source, part) in sources.iter_mut().zip(parts) {
        source.part = *part;
    }
}

impl Plan<'_> {
    /// An access joins a group, or begins one.
    fn take(&mut self, position: usize, access: &Access) {
        let near = self.near;
        let same = |open: &Open| !near || open.sum == access.sum && open.writes == access.writes;
        let most = MOST_BYTES[usize::from(near)];
        if self.open.iter_mut().find(|open| same(open)).is_some_and(|open| open.add(position, access, most)) {
            return;
        }
        self.close_if(same);
        let calm = self.calm.and_then(|begin| Some((begin, self.moved(access.sum, begin..position)?)));
        let begin = if near {
            calm.unwrap_or((position, 0))
        } else {
            let Some(calm) = calm else { return };
            calm
        };
        // T3 has room for one addend.
        if self.parts[begin.0..position].iter().any(|part| part.inside.is_some()) {
            return;
        }
        if self.open.len() >= MOST_OPEN {
            let oldest = self.open.remove(0);
            oldest.close(near, self.parts);
        }
        self.open.push(Open::new(begin, position, access));
    }

    /// How far a sum moves in a stretch of instructions. `None`: nobody knows, or what follows may be meant for some addresses
    /// only.
    fn moved(&self, sum: Sum, stretch: Range<usize>) -> Option<i64> {
        self.sources.get(stretch)?.iter().try_fold(0, |moved, source| {
            let meant = sum == Sum::STACK || source.template.kind != Kind::JumpIf;
            meant.then(|| moves(source, sum)).flatten().map(|more| moved + more)
        })
    }

    /// What an instruction does to the registers of the open groups.
    fn follow(&mut self, source: &Source<'_>) {
        if source.template.kind == Kind::Call || !goes_through(source, self.near) {
            self.calm = None;
            return self.close_if(|_| true);
        }
        let (near, parts) = (self.near, &mut self.parts);
        self.open.retain_mut(|open| match moves(source, open.sum) {
            Some(by) => {
                open.moved += by;
                true
            }
            None => {
                open.close(near, parts);
                false
            }
        });
    }

    fn close_if(&mut self, wanted: impl Fn(&Open) -> bool) {
        let (near, parts) = (self.near, &mut self.parts);
        for open in self.open.extract_if(.., |open| wanted(open)) {
            open.close(near, parts);
        }
    }
}

/// True where what has been checked before an instruction still holds at it, and behind it but for what it does to
/// registers.
pub(super) fn goes_through(source: &Source<'_>, near: bool) -> bool {
    match source.template.kind {
        Kind::PushRegister | Kind::PushConstant | Kind::PushMemory | Kind::Call | Kind::Return => true,
        Kind::Nothing | Kind::Copy | Kind::MovAbsolute | Kind::Jump | Kind::JumpIf => true,
        Kind::PopRegister => near || source.instruction.op0_register() != Register::RSP,
        Kind::MovConstant | Kind::Bswap => near || source.instruction.op0_register().full_register() != Register::RSP,
        Kind::Same | Kind::Lea => near || !source.is_crowded() && moves_stack(source).is_some(),
        _ => false,
    }
}

/// How far an instruction moves a sum. `None`: nobody knows.
fn moves(source: &Source<'_>, sum: Sum) -> Option<i64> {
    if sum == Sum::STACK {
        return moves_stack(source);
    }
    let changed = source.changed();
    let stays = |part: Register| part == Register::None || changed >> part.number() & 1 == 0;
    (stays(sum.base) && stays(sum.index)).then_some(0)
}

/// True where RSP need not be right in its register before an instruction: pushes and pops of a group, and what lies between them
/// and leaves for nowhere, unless the host's processor refuses it.
pub(super) fn leaves_stack_behind(source: &Source<'_>) -> bool {
    use Mnemonic::{Add, And, Cmp, Lea, Mov, Movsx, Movsxd, Movzx, Or, Sub, Test, Xor};
    let Source { instruction, part, .. } = source;
    if !part.covered || part.begins.iter().any(Option::is_some) {
        return false;
    }
    let registers = (0..instruction.op_count()).map(|operand| instruction.op_register(operand));
    let parts = [instruction.memory_base(), instruction.memory_index()];
    if registers.chain(parts).any(|register| register.full_register() == Register::RSP) {
        return false;
    }
    let plain =
        matches!(instruction.mnemonic(), Add | And | Cmp | Lea | Mov | Movsx | Movsxd | Movzx | Or | Sub | Test | Xor);
    match source.template.kind {
        Kind::PushRegister | Kind::PushConstant | Kind::PopRegister | Kind::Return => part.of.is_some(),
        Kind::MovConstant | Kind::Lea => true,
        Kind::Same => plain && !source.template.loads && !source.template.stores,
        _ => false,
    }
}

/// How far an instruction moves RSP. `None`: nobody knows.
pub(super) fn moves_stack(source: &Source<'_>) -> Option<i64> {
    match source.template.kind {
        Kind::PushRegister | Kind::PushConstant | Kind::PushMemory | Kind::Call => Some(-8),
        Kind::PopRegister => (source.instruction.op0_register() != Register::RSP).then_some(8),
        Kind::MovConstant | Kind::Bswap => {
            (source.instruction.op0_register().full_register() != Register::RSP).then_some(0)
        }
        Kind::Same | Kind::Lea if source.moves_stack => displacement(&source.instruction),
        _ => Some(0),
    }
}

/// True where an instruction may make an access to the stack that can be one of a group.
fn may_join(source: &Source<'_>) -> bool {
    match source.template.kind {
        Kind::PushRegister | Kind::PushConstant | Kind::PushMemory | Kind::PopRegister => true,
        Kind::Call | Kind::Return => true,
        Kind::Same => source.instruction.memory_base() == Register::RSP,
        _ => false,
    }
}

/// The access that an instruction makes, where it can be one of a group.
fn access(source: &Source<'_>, near: bool) -> Option<Access> {
    let stack = |at, writes| Some(Access { sum: Sum::STACK, at, bytes: 8, writes });
    match source.template.kind {
        Kind::PushRegister | Kind::PushConstant | Kind::PushMemory | Kind::Call => stack(-8, true),
        Kind::PopRegister if source.instruction.op0_register() != Register::RSP => stack(0, false),
        Kind::Return => stack(0, false), // nothing follows
        Kind::Same if near || !source.is_crowded() && !source.moves_stack => operand(source, near),
        _ => None,
    }
}

/// The memory operand: without `near`, where it is at RSP.
fn operand(source: &Source<'_>, near: bool) -> Option<Access> {
    let (instruction, template) = (&source.instruction, &source.template);
    let bytes = instruction.memory_size().size() as i64;
    let at = i64::from(instruction.memory_displacement64() as i32);
    let good = if near {
        is_sum(instruction) && !high_register(instruction) && !is_locked(instruction)
    } else {
        at_stack(instruction)
    };
    let good = good && at.abs() <= FARTHEST && (1..=super::near::MOST_BYTES.into()).contains(&bytes);
    let access = Access { sum: Sum::of(instruction), at, bytes, writes: template.stores };
    (good && (template.loads || template.stores)).then_some(access)
}

/// True where the memory operand's address is RSP and a displacement.
pub(super) fn at_stack(instruction: &Instruction) -> bool {
    instruction.memory_base() == Register::RSP
        && instruction.memory_index() == Register::None
        && !matches!(instruction.segment_prefix(), Register::FS | Register::GS)
}

/// True where it is a sum of whole registers and a displacement.
pub(super) fn is_sum(instruction: &Instruction) -> bool {
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    let whole = |register: Register| register.is_gpr64() || register == Register::None;
    !matches!(instruction.segment_prefix(), Register::FS | Register::GS)
        && whole(base)
        && whole(index)
        && (base, index) != (Register::None, Register::None)
}

/// How far an instruction moves RSP: ADD and SUB of a constant, LEA from itself.
fn displacement(instruction: &Instruction) -> Option<i64> {
    if instruction.op0_register() != Register::RSP {
        return None;
    }
    let constant = !matches!(instruction.op1_kind(), OpKind::Register | OpKind::Memory);
    match instruction.mnemonic() {
        Mnemonic::Add if constant => Some(instruction.immediate(1) as i64),
        Mnemonic::Sub if constant => Some((instruction.immediate(1) as i64).wrapping_neg()),
        Mnemonic::Lea if at_stack(instruction) => Some(instruction.memory_displacement64() as i64),
        _ => None,
    }
    .filter(|moves| moves.abs() <= FARTHEST)
}

impl Emit<'_> {
    /// T3 becomes the addend of a group's page; leaves for code without groups where there is none, or another page may begin
    /// in between.
    pub(super) fn find_group(&mut self, group: &Group) {
        let (table, ahead) = table_for(group.writes);
        self.cached = None;
        self.asm.lea(T2, At::Base(STACK, group.last()));
        self.asm.extract_bits(T1, T2, READ);
        self.asm.load(T3, At::Index(table, T1, 3, ahead));
        // The last byte is not among the page's first, so that what comes before it is there, too.
        let most = (group.bytes as u32 - 1).next_power_of_two() as i32;
        self.asm.test_32(T2, 0x1000 - most);
        self.leave_apart(condition::ZERO);
        self.asm.test(T3, T3);
        self.leave_apart(condition::ZERO);
    }

    /// Leaves for the same code without loops and groups, from this instruction on, on a condition.
    pub(super) fn leave_apart(&mut self, condition: u8) {
        // Behind the two bytes of the opcode.
        let apart = self.exit_apart(Some(self.asm.here() + 2));
        self.asm.jcc(condition, apart);
    }

    /// Memory at a distance from RSP that belongs to the current group.
    pub(super) fn in_group(&self, displacement: i32) -> At {
        let displacement = displacement + self.behind;
        match self.window {
            Some(distance) => At::Base(STACK, displacement + distance),
            None => At::Index(STACK, T3, 0, displacement),
        }
    }

    /// RSP is right in its register.
    pub(super) fn settle_stack(&mut self) {
        match std::mem::take(&mut self.behind) {
            0 => {}
            behind => self.asm.lea(STACK, At::Base(STACK, behind)),
        }
    }
}
