//! Stack accesses with one check for several.
//!
//! ```text
//!   check [rsp - 40, rsp + 24)  ─ page has no entry, or ends in between ─> the same code, translated without groups
//!   push rbp                       mov [r8 + r10 - 8], rbp
//!   push rbx                       mov [r8 + r10 - 8], rbx
//!   mov rax, [rsp + 32]            mov rax, [r8 + r10 + 32]
//! ```
//!
//! A block's accesses at known distances from where RSP was form a group: pushes, pops, operands at RSP, the CALL or RET
//! at its end. Before the first, one check makes sure that all of them are in one page, which may be written if any of
//! them writes, and leaves the page's addend in T3 for all. What could fault does so in code that was translated without
//! groups, at the instruction that it belongs to.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::asm::At;
use super::emit::{Emit, READ, READ_BIAS, STACK, T1, T2, T3, WRITE};
use super::same::{Source, writes_stack_pointer};
use super::template::Kind;

/// Fewest accesses that are worth a group.
const FEWEST: usize = 3;
/// Most bytes from the first to the last.
const MOST_BYTES: i64 = 2048;
/// Farthest from RSP: where the stack moves on, displacements must still be what 32 bits can say.
const FARTHEST: i64 = 1 << 20;

/// A group, at its first access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    /// Where it starts, from RSP.
    start: i32,
    /// How long it is.
    bytes: i32,
    writes: bool,
}

/// What groups mean to an instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Part {
    /// A group begins here.
    pub begins: Option<Group>,
    /// The instruction's stack access belongs to one.
    pub member: bool,
    /// T3 is the addend of one that goes on.
    pub inside: bool,
}

/// A stack access, from RSP as it is before the instruction.
struct Access {
    at: i64,
    bytes: i64,
    writes: bool,
}

/// What an instruction does with the stack.
enum Effect {
    /// RSP moves by so many bytes.
    Known(Option<Access>, i64),
    /// Nothing is known about RSP or T3 behind it.
    Ends,
}

/// A group in the making.
struct Open {
    members: Vec<usize>,
    /// RSP, from where it was at the first access.
    moved: i64,
    start: i64,
    end: i64,
    writes: bool,
}

impl Open {
    fn add(&mut self, position: usize, access: &Access) -> bool {
        let at = self.moved + access.at;
        let (start, end) = (self.start.min(at), self.end.max(at + access.bytes));
        let fits = end - start <= MOST_BYTES;
        if fits {
            (self.start, self.end, self.writes) = (start, end, self.writes || access.writes);
            self.members.push(position);
        }
        fits
    }

    fn close(self, parts: &mut [Part]) {
        let [first, .., last] = self.members[..] else { return };
        if self.members.len() < FEWEST {
            return;
        }
        parts[first].begins =
            Some(Group { start: self.start as i32, bytes: (self.end - self.start) as i32, writes: self.writes });
        for part in &mut parts[first..=last] {
            part.inside = true;
        }
        for member in self.members {
            parts[member].member = true;
        }
    }
}

/// The groups of a block.
pub(super) fn plan(sources: &[Source<'_>]) -> Vec<Part> {
    let mut parts = vec![Part::default(); sources.len()];
    let mut open: Option<Open> = None;
    for (position, source) in sources.iter().enumerate() {
        if source.met
            && let Some(open) = open.take()
        {
            open.close(&mut parts);
        }
        let Effect::Known(access, moves) = effect(source) else {
            if let Some(open) = open.take() {
                open.close(&mut parts);
            }
            continue;
        };
        if let Some(access) = access {
            let added = open.as_mut().is_some_and(|open| open.add(position, &access));
            if !added {
                if let Some(open) = open.take() {
                    open.close(&mut parts);
                }
                // The check takes the flags.
                open = (!source.live).then(|| Open {
                    members: vec![position],
                    moved: 0,
                    start: access.at,
                    end: access.at + access.bytes,
                    writes: access.writes,
                });
            }
        }
        if let Some(open) = &mut open {
            open.moved += moves;
        }
        if source.template.kind == Kind::Call
            && let Some(open) = open.take()
        {
            open.close(&mut parts);
        }
    }
    if let Some(open) = open {
        open.close(&mut parts);
    }
    parts
}

fn effect(source: &Source<'_>) -> Effect {
    let instruction = &source.instruction;
    let read = |at, bytes| Some(Access { at, bytes, writes: false });
    let push = Some(Access { at: -8, bytes: 8, writes: true });
    match source.template.kind {
        Kind::PushRegister | Kind::PushConstant | Kind::PushMemory | Kind::Call => Effect::Known(push, -8),
        Kind::PopRegister if instruction.op0_register() != Register::RSP => Effect::Known(read(0, 8), 8),
        Kind::Return => Effect::Known(read(0, 8), 0), // nothing follows
        Kind::Nothing | Kind::Copy | Kind::MovAbsolute | Kind::Jump | Kind::JumpIf => Effect::Known(None, 0),
        Kind::MovConstant | Kind::Bswap if instruction.op0_register().full_register() != Register::RSP => {
            Effect::Known(None, 0)
        }
        Kind::Same | Kind::Lea if !source.is_crowded() => {
            match (writes_stack_pointer(source), displacement(instruction)) {
                (false, _) => Effect::Known(operand(source), 0),
                (true, Some(moves)) => Effect::Known(None, moves),
                _ => Effect::Ends,
            }
        }
        _ => Effect::Ends,
    }
}

/// The memory operand, where it is at RSP.
fn operand(source: &Source<'_>) -> Option<Access> {
    let (instruction, template) = (&source.instruction, &source.template);
    let bytes = instruction.memory_size().size() as i64;
    let at = i64::from(instruction.memory_displacement64() as i32);
    let near = at_stack(instruction) && at.abs() <= FARTHEST;
    (near && bytes > 0 && (template.loads || template.stores)).then_some(Access { at, bytes, writes: template.stores })
}

/// True where the memory operand's address is RSP and a displacement.
pub(super) fn at_stack(instruction: &Instruction) -> bool {
    instruction.memory_base() == Register::RSP
        && instruction.memory_index() == Register::None
        && !matches!(instruction.memory_segment(), Register::FS | Register::GS)
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
    .filter(|moves| moves.abs() <= MOST_BYTES)
}

impl Emit<'_> {
    /// T3 becomes the addend of a group's first page, T2 its first address; flags say whether there is none.
    pub(super) fn find_group(&mut self, group: &Group) {
        let (table, bias) = if group.writes { (WRITE, 0) } else { (READ, READ_BIAS as i32) };
        self.cached = None;
        self.asm.lea(T2, At::Base(STACK, group.start));
        self.asm.extract_bits(T1, T2, READ);
        self.asm.load(T3, At::Index(table, T1, 3, -bias));
        self.asm.test(T3, T3);
    }

    /// "Above" where the group at T2 crosses its page's end.
    pub(super) fn compare_group_end(&mut self, group: &Group) {
        self.compare_page_end(T1, T2, group.bytes as u32);
    }

    /// Memory at a distance from RSP that belongs to the current group.
    pub(super) fn in_group(&self, displacement: i32) -> At {
        At::Index(STACK, T3, 0, displacement)
    }
}
