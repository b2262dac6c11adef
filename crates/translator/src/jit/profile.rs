//! What a profiled run wants to know of translated code: where it lies, what was made, how many instructions it runs.
//!
//! ```text
//!   block:   count 3 │ i i jcc │ count 2 │ i jmp          a count where a stretch of instructions begins that
//!                        └──> exit                        is left early by exceptions and misses only
//! ```
//!
//! Counting costs translated code a load and a store a stretch, so it is there only where the engine is told to count.

use engine::ledger::Work;

use super::Jit;
use super::asm::At;
use super::emit::{Emit, T1};
use super::same::Source;
use super::template::Kind;
use super::translate::Translation;
use crate::cpu::Cpu;
use crate::home::{COUNTERS, offset};

impl Jit {
    /// Says where what translates runs.
    pub(super) fn declare_code(&self, cpu: &Cpu) {
        let code = self.arena.range();
        let blocks = code.start + self.floor as u64;
        cpu.config.ledger.profile.declare_code(blocks..code.end, code.start..blocks);
    }

    /// Counts a block that was translated.
    pub(super) fn count_block(cpu: &Cpu, translation: &Translation) {
        let ledger = &cpu.config.ledger;
        ledger.work(Work::Translate, 1);
        ledger.work(Work::TranslateInstructions, translation.instructions as u64);
        let (hot, cold) = translation.room.code();
        ledger.work(Work::TranslateBytes, (hot.len() + cold.len()) as u64);
    }
}

/// True for an instruction that the block may be left after.
fn may_leave(source: &Source<'_>) -> bool {
    matches!(source.template.kind, Kind::JumpIf | Kind::Interpret | Kind::Call | Kind::CallIndirect)
}

/// True for the first of a stretch of instructions, up to the next that the block may be left after, or that others lead
/// to.
pub(super) fn begins(sources: &[Source<'_>], position: usize) -> bool {
    position == 0 || sources[position].met || may_leave(&sources[position - 1])
}

impl Emit<'_> {
    /// Has a stretch of instructions counted at its first. Keeps flags.
    pub(super) fn count(&mut self, sources: &[Source<'_>], position: usize) {
        if !begins(sources, position) {
            return;
        }
        let rest = &sources[position..];
        let left = rest.iter().position(may_leave).map_or(rest.len(), |last| last + 1);
        let met = rest.iter().skip(1).position(|source| source.met).map_or(rest.len(), |next| next + 1);
        let stretch = left.min(met);
        let counter = self.field(offset::INSTRUCTIONS + 8 * (self.rip % COUNTERS as u64) as i32);
        self.asm.load(T1, counter);
        self.asm.lea(T1, At::Base(T1, stretch as i32));
        self.asm.store(counter, T1);
    }
}
