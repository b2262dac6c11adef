//! The translator against the interpreter, block by block.
//!
//! ```text
//!   state ──> interpreter (rehearsal) ──> state A, stores A ──┐
//!     │            stores taken back                          ├─ the same? go on : once more, then report
//!     └─────> translated block, alone ──> state B, memory B ──┘
//! ```
//!
//! A block that was left early (an access for the interpreter, a fault) is compared as far as it got; the instruction it
//! was left at is then the interpreter's, and not compared. While a block is checked no other vCPU runs, but devices do:
//! what differs is tried again before it is believed.

mod rehearsal;
mod report;
#[cfg(test)]
mod tests;
mod turn;

use engine::ledger::Work;
use engine::state::{XsaveArea, rflags};
use engine::{CpuState, Phase};

use crate::cpu::{Cpu, Exception};
use crate::flags::Flags;
use crate::jit::{Jit, Left, Plain, Ran, status_bits};
use crate::op::Leave;
pub(crate) use rehearsal::Rehearsal;
use report::{Finding, report};
pub(crate) use turn::{Queue, take_turn};

/// How often a block is run before a difference is believed.
const TRIES: usize = 3;

/// Parts of the XSAVE area that are compared: control and status words, tag word, MXCSR, registers, upper halves. Not the
/// last x87 instruction's addresses, which are the host's.
const COMPARED: [std::ops::Range<usize>; 4] = [0..6, 24..28, 32..416, 576..832];

/// The state between two runs of a block.
#[derive(Clone)]
struct Moment {
    state: CpuState,
    flags: Flags,
    exception: Exception,
    recheck: bool,
    pending_debug: u64,
}

impl Moment {
    fn of(cpu: &Cpu) -> Box<Self> {
        Box::new(Self {
            state: (*cpu.state).clone(),
            flags: cpu.flags,
            exception: cpu.exception,
            recheck: cpu.recheck,
            pending_debug: cpu.pending_debug,
        })
    }

    /// The state with all of RFLAGS.
    fn whole(&self) -> CpuState {
        CpuState { rflags: self.state.rflags & !rflags::STATUS | self.flags.status(), ..self.state.clone() }
    }

    fn restore(&self, cpu: &mut Cpu) {
        cpu.state.clone_from(&self.state);
        cpu.flags = self.flags;
        (cpu.exception, cpu.recheck, cpu.pending_debug) = (self.exception, self.recheck, self.pending_debug);
    }
}

/// How far a rehearsal got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reached {
    /// Instructions that are done.
    steps: usize,
    /// The block was left by its end or a branch, not before an instruction.
    branched: bool,
}

/// Runs one block in both ways, or says what else is to be done.
///
/// # Errors
/// A difference, as a text for people.
pub(crate) fn step(jit: &mut Jit, cpu: &mut Cpu) -> Result<Ran, String> {
    let (block, plain) = match jit.ready(cpu) {
        Ok(ready) => ready,
        Err(ran) => return Ok(ran),
    };
    if !plain.repeatable {
        return Ok(Ran::One);
    }
    let before = Moment::of(cpu);
    let mut found = None;
    for _ in 0..TRIES {
        match attempt(jit, cpu, block, &plain, &before) {
            Ok(ran) => return Ok(ran),
            Err(finding) => found = Some(finding),
        }
        before.restore(cpu);
    }
    Err(found.map_or_else(String::new, |finding| report(&plain, &before.whole(), &finding)))
}

/// Both runs, once. The translation's outcome stands where they agree; else memory is as it was.
fn attempt(jit: &mut Jit, cpu: &mut Cpu, block: u32, plain: &Plain, before: &Moment) -> Result<Ran, Box<Finding>> {
    let (mut rehearsal, mut reached) = rehearse(cpu, plain, usize::MAX);
    rehearsal.undo(&cpu.shared.ram);
    let mut ours = Moment::of(cpu);
    before.restore(cpu);
    let left = jit.alone(cpu, block);
    if left == Left::Unable {
        return Ok(Ran::Unable);
    }
    cpu.now(Phase::Other);
    let theirs = Moment::of(cpu);
    let held = rehearsal.held(&cpu.shared.ram);
    let mut expected = rehearsal.came_to().to_vec();
    let position = plain.position(theirs.state.rip).unwrap_or(usize::MAX);
    let shorter = left != Left::Branched && position < reached.steps;
    if shorter {
        // Once more, as far as the translation got.
        rehearsal.restore(&cpu.shared.ram);
        before.restore(cpu);
        let (mut again, so_far) = rehearse(cpu, plain, position);
        again.undo(&cpu.shared.ram);
        (ours, reached) = (Moment::of(cpu), so_far);
        expected = rehearsal.with(&again);
    }
    let differ = ours.flags.status() != theirs.flags.status();
    let flags = if differ { flags_compared(jit, cpu, block, plain, (left, reached), &theirs) } else { rflags::STATUS };
    let memory = if left == Left::BeforeWild { Vec::new() } else { rehearsal.compare(&expected, &held) };
    if !same(&ours, &theirs, flags) || !memory.is_empty() {
        rehearsal.restore(&cpu.shared.ram);
        return Err(Box::new(Finding { ours: ours.whole(), theirs: theirs.whole(), flags, memory }));
    }
    if shorter {
        rehearsal.redo(&cpu.shared.ram, &held);
        theirs.restore(cpu);
    }
    cpu.config.ledger.work(Work::Compared, 1);
    Ok(if left == Left::Branched { Ran::Look } else { Ran::One })
}

/// The interpreter runs up to `most` instructions of a block, straight on. RIP is where it stopped.
fn rehearse(cpu: &mut Cpu, plain: &Plain, most: usize) -> (Rehearsal, Reached) {
    cpu.now(Phase::Interpreting);
    cpu.begin_rehearsal();
    let mut reached = Reached { steps: 0, branched: plain.steps.len() <= most };
    for step in plain.steps.iter().take(most) {
        cpu.state.rip = step.op.next;
        match (step.op.handler)(cpu, &step.op) {
            Ok(()) | Err(Leave::Boundary) => reached.steps += 1,
            Err(_) => {
                cpu.state.rip = step.instruction.ip();
                reached.branched = false;
                break;
            }
        }
        if cpu.state.rip != step.op.next {
            reached.branched = true;
            break;
        }
    }
    (cpu.end_rehearsal(), reached)
}

/// The status flags that must be the same: those that are needed where the block was left, and defined.
fn flags_compared(
    jit: &mut Jit,
    cpu: &mut Cpu,
    block: u32,
    plain: &Plain,
    (left, reached): (Left, Reached),
    theirs: &Moment,
) -> u64 {
    let needed = match plain.steps.get(reached.steps) {
        Some(step) if left != Left::Branched => step.live,
        _ => {
            cpu.state.rip = theirs.state.rip;
            jit.flags_needed(cpu, block)
        }
    };
    let mut undefined = 0;
    for step in &plain.steps[..reached.steps.min(plain.steps.len())] {
        let instruction = &step.instruction;
        undefined =
            undefined & !status_bits(instruction.rflags_modified()) | status_bits(instruction.rflags_undefined());
    }
    needed & !undefined
}

/// True where both runs came to the same; of the status flags, `flags` are looked at.
fn same(ours: &Moment, theirs: &Moment, flags: u64) -> bool {
    let (ours_state, theirs_state) = (&ours.state, &theirs.state);
    (ours.flags.status() ^ theirs.flags.status()) & flags == 0
        && (ours_state == theirs_state || same_apart(ours_state, theirs_state))
}

/// The same where parts of the XSAVE area that are not compared may differ.
fn same_apart(ours: &CpuState, theirs: &CpuState) -> bool {
    let rest = |state: &CpuState| CpuState { xsave: XsaveArea::reset(), ..state.clone() };
    COMPARED.into_iter().all(|range| ours.xsave.0[range.clone()] == theirs.xsave.0[range]) && rest(ours) == rest(theirs)
}
