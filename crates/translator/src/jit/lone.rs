//! Translated blocks one at a time, for whoever checks them.
//!
//! Blocks are not linked, landing tables stay as they are when empty, and a block that jumps to itself is left like any
//! other: each run goes once through a block, straight on, and comes back. What the interpreter's handlers do anyway is
//! not translated.

use std::sync::Arc;

use engine::state::rflags;
use host::LowWord;
use iced_x86::{Decoder, DecoderOptions, Instruction, OpKind, RflagsBits};

use super::same::Source;
use super::template::Kind;
use super::thunk::exit;
use super::{Block, Jit, Key, Map, Ran};
use crate::cpu::Cpu;
use crate::op::Op;

/// The blocks translated so far, as the guest has them.
#[derive(Default)]
pub(super) struct Lone {
    blocks: Map<Key, Noted>,
    /// What translated code that is not to poll looks at.
    quiet: LowWord,
}

/// A block wherever its page is.
struct Noted {
    /// Bytes and status flags that are needed before, for each instruction.
    steps: Vec<(Vec<u8>, u64)>,
    repeatable: bool,
    /// The block where it was last.
    plain: Option<Arc<Plain>>,
}

impl Noted {
    /// The block at RIP.
    fn plain(&mut self, cpu: &mut Cpu, key: Key) -> Arc<Plain> {
        let start = cpu.state.rip;
        if let Some(plain) = self.plain.as_ref().filter(|plain| plain.position(start) == Some(0)) {
            return Arc::clone(plain);
        }
        let mut rip = start;
        let steps = self.steps.iter().map(|(bytes, live)| {
            let instruction = Decoder::with_ip(64, bytes, rip, DecoderOptions::AMD).decode();
            rip = instruction.next_ip();
            let op = cpu.op(&instruction, bytes, instruction.ip(), u64::MAX);
            Step { instruction, op, bytes: bytes.clone(), live: *live }
        });
        let steps = steps.collect();
        let plain = Arc::new(Plain { gpa: key.gpa, user: key.is_user(), steps, repeatable: self.repeatable });
        self.plain = Some(Arc::clone(&plain));
        plain
    }
}

impl Lone {
    pub(super) fn clear(&mut self) {
        self.blocks.clear();
    }

    /// A signal word that nobody raises.
    pub(super) fn signal(&self) -> &LowWord {
        &self.quiet
    }
}

/// One instruction of a block.
pub(crate) struct Step {
    pub instruction: Instruction,
    pub op: Op,
    pub bytes: Vec<u8>,
    /// Status flags that are needed before it, as RFLAGS bits.
    pub live: u64,
}

/// A block as the guest has it.
pub(crate) struct Plain {
    pub gpa: u64,
    pub user: bool,
    pub steps: Vec<Step>,
    /// It can be run twice, with the same outcome.
    pub repeatable: bool,
}

impl Plain {
    /// The position of the instruction at an address; the number of instructions for what follows the last.
    pub(crate) fn position(&self, rip: u64) -> Option<usize> {
        let end = self.steps.last().is_some_and(|last| last.instruction.next_ip() == rip);
        let found = self.steps.iter().position(|step| step.instruction.ip() == rip);
        found.or_else(|| end.then_some(self.steps.len()))
    }
}

/// How a block was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// For RIP, by its end or a branch.
    Branched,
    /// Before the instruction at RIP, whose work nobody has done.
    Before,
    /// The same, by a branch to an address that cannot be; a CALL has written its return address.
    BeforeWild,
    /// It could not be entered.
    Unable,
}

/// Kinds whose translation is worth a check, and can be run twice. All others are left to the interpreter.
const fn is_checked(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Same
            | Kind::Copy
            | Kind::Nothing
            | Kind::Lea
            | Kind::MovConstant
            | Kind::MovAbsolute
            | Kind::ExchangeAccumulator
            | Kind::Bswap
            | Kind::PushRegister
            | Kind::PushConstant
            | Kind::PushMemory
            | Kind::PopRegister
            | Kind::Leave
            | Kind::Call
            | Kind::CallIndirect
            | Kind::Jump
            | Kind::JumpIndirect
            | Kind::JumpIf
            | Kind::Return
    )
}

/// True where a block that is run alone has to end before an instruction of a kind, or behind it.
pub(super) const fn stands_alone(kind: Kind) -> bool {
    !is_checked(kind)
}

impl Jit {
    /// Notes what a block is, as it is translated. `live` are the flags needed before each instruction.
    pub(super) fn note_plain(&mut self, key: Key, sources: &[Source<'_>], live: &[u32]) {
        let bytes = |source: &Source<'_>| source.bytes[..source.instruction.len().min(source.bytes.len())].to_vec();
        let live = live.iter().map(|&live| status_bits(live));
        let steps = sources.iter().map(bytes).zip(live).collect();
        // A branch to where it would go anyway does not tell which way it went.
        let ambiguous = |source: &Source<'_>| {
            source.instruction.op0_kind() == OpKind::NearBranch64
                && source.instruction.near_branch_target() == source.instruction.next_ip()
        };
        let repeatable = sources.iter().all(|source| is_checked(source.template.kind) && !ambiguous(source));
        if let Some(lone) = &mut self.lone {
            lone.blocks.insert(key, Noted { steps, repeatable, plain: None });
        }
    }

    /// The block at RIP.
    pub(crate) fn ready(&mut self, cpu: &mut Cpu) -> Result<(u32, Arc<Plain>), Ran> {
        let block = self.first(cpu)?;
        let key = self.blocks[block as usize].key;
        match self.lone.as_mut().and_then(|lone| lone.blocks.get_mut(&key)) {
            Some(noted) => Ok((block, noted.plain(cpu, key))),
            None => Err(Ran::Unable),
        }
    }

    /// Runs a block alone. RIP is right afterwards.
    pub(crate) fn alone(&mut self, cpu: &mut Cpu, block: u32) -> Left {
        let start = self.blocks[block as usize].start;
        if !self.enter(cpu, start) {
            return Left::Unable;
        }
        let (why, value) = (cpu.state.hot().exit, cpu.state.hot().value);
        match why {
            exit::CHAIN => {
                cpu.state.rip = self.target_of(cpu, value);
                if self.exits[value as usize].mode != 0 {
                    return Left::Before;
                }
            }
            exit::LAND => {
                if self.refuse_landing(cpu, value).is_some() {
                    return Left::BeforeWild;
                }
                cpu.state.rip = value;
            }
            _ => {
                self.left(cpu, why, value);
                return Left::Before;
            }
        }
        Left::Branched
    }

    /// Status flags that the code at RIP may read, as RFLAGS bits.
    pub(crate) fn flags_needed(&mut self, cpu: &mut Cpu, block: u32) -> u64 {
        let Block { key, anchor, .. } = self.blocks[block as usize];
        let target = cpu.state.rip.wrapping_sub(Self::linear(cpu, anchor, 0));
        status_bits(self.needs_flags(cpu, key, target))
    }
}

/// Makes INC of RAX and of memory at RDI what DEC is: a mistake for tests to find.
#[cfg(test)]
pub(super) fn mistranslate(source: &mut Source<'_>) {
    let mut window = super::encoding::Window::default();
    match source.bytes {
        [0x48, 0xff, 0xc0, ..] => window[..3].copy_from_slice(&[0x48, 0xff, 0xc8]),
        [0x48, 0xff, 0x07, ..] => window[..3].copy_from_slice(&[0x48, 0xff, 0x0f]),
        _ => return,
    }
    source.take_apart(&window);
}

/// RFLAGS bits of status flags as iced numbers them.
pub(crate) fn status_bits(flags: u32) -> u64 {
    let pairs = [
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::OF, rflags::OF),
    ];
    pairs.iter().filter(|(iced, _)| flags & iced != 0).map(|(_, bit)| bit).sum()
}
