//! Loops of one block, of programs with a window: what one turn has checked is followed through the next.
//!
//! ```text
//!   block:   check [rdi - 1] ─ elsewhere ──> the same code apart from loops, from here on
//!            cmp byte [rdi - 1 + distance], 0
//!            jne ─────────────┐
//!   behind:  ...              │
//!   turn:    inc rdi <────────┴──┐
//!            test [rdi - 1], 0xfff ─ zero: on another page ──> look for interrupts, check
//!            cmp byte [rdi - 1 + distance], 0
//!            jne ────────────────┘
//!            jmp behind
//! ```
//!
//! An address that moves by a constant from turn to turn is on the page of the turn before unless it has just come into
//! another, which its lowest bits say; one that stays needs no look at all. The code of a turn is there twice, for only
//! the second may rely on the first. It comes to another page after so many turns as a page has bytes, at most, and looks
//! for interrupts there: not at each branch back.
//!
//! Nothing in between may change what is in the window, so there are no calls in such a loop, and nothing that the interpreter
//! does. Misses of other accesses only add to the tables.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::asm::{At, Label};
use super::cold::Cold;
use super::emit::{Emit, condition};
use super::group::{self, Sum, is_sum};
use super::near::moved;
use super::same::Source;
use super::template::Kind;
use super::translate::Block;
use super::{APART, NEAR};
use crate::cpu::Cpu;

/// Most bytes from turn to turn.
const MOST_PACE: u64 = 2048;

/// What turns but the first begin at a multiple of, in bytes: what the processor fetches at a time.
const ALIGNED: u64 = 32;

/// A loop that is being emitted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turns {
    /// The position of the branch back.
    pub back: usize,
    /// Where turns but the first begin.
    pub head: Label,
    /// Vector registers are known to be in the processor there.
    vectors: bool,
}

/// Which turn of a loop is being emitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    First,
    /// All that follow. `looks`: none of its accesses looks for interrupts so far.
    Next {
        looks: bool,
    },
}

/// Finds the branch that closes a loop over all that comes before it. What is behind is then met by its turns' ends.
pub(super) fn find(sources: &mut [Source<'_>]) -> Option<usize> {
    let start = sources.first()?.instruction.ip();
    let back = sources.iter().rposition(|source| {
        matches!(source.template.kind, Kind::Jump | Kind::JumpIf)
            && source.inner.is_none()
            && source.instruction.near_branch_target() == start
    })?;
    let calm = |source: &Source<'_>| source.template.kind != Kind::Call && group::goes_through(source, true);
    if !sources[..=back].iter().all(calm) {
        return None;
    }
    if let Some(behind) = sources.get_mut(back + 1) {
        behind.met = true;
    }
    Some(back)
}

/// Says how far the accesses of a loop, which ends with the branch at `back`, move from turn to turn. Where none of them is
/// known to, the loop is none.
pub(super) fn pace(sources: &mut [Source<'_>], back: usize) {
    let always = always(&sources[..=back]);
    let steps = steps(&sources[..=back], &always);
    let pace = |sum: Sum| {
        let step = |register: Register| {
            if register == Register::None { Some(0) } else { steps[register.number() % steps.len()] }
        };
        let pace = step(sum.base)?.checked_add(step(sum.index)?.checked_mul(i64::from(sum.scale))?)?;
        (pace.unsigned_abs() <= MOST_PACE).then_some(pace as i32)
    };
    let mut known = false;
    for (source, _) in sources.iter_mut().zip(&always).filter(|(_, always)| **always) {
        for group in source.part.begins.iter_mut().flatten() {
            group.pace = pace(group.sum);
            known |= group.pace.is_some();
        }
        let single = !source.live && source.part.of.is_none() && is_sum(&source.instruction);
        if single && (source.template.loads || source.template.stores) {
            source.pace = pace(Sum::of(&source.instruction));
            known |= source.pace.is_some();
        }
    }
    sources[back].again = known;
}

/// Which instructions of a loop every turn runs that comes to its end.
fn always(sources: &[Source<'_>]) -> Vec<bool> {
    let mut always = vec![true; sources.len()];
    for (position, source) in sources.iter().enumerate() {
        if let Some(inner) = source.inner {
            always[position + 1..inner.clamp(position + 1, sources.len())].fill(false);
        }
    }
    always
}

/// How far a turn moves each general-purpose register. `None`: nobody knows.
fn steps(sources: &[Source<'_>], always: &[bool]) -> [Option<i64>; 16] {
    let mut steps = [Some(0_i64); 16];
    for (source, always) in sources.iter().zip(always) {
        let changed = source.changed();
        for (number, step) in steps.iter_mut().enumerate().filter(|(number, _)| changed >> number & 1 != 0) {
            let by = if number == Register::RSP.number() {
                group::moves_stack(source)
            } else {
                moves(&source.instruction, number)
            };
            *step = step.zip(by).filter(|_| *always).and_then(|(step, by)| step.checked_add(by));
        }
    }
    steps
}

/// How far an instruction that changes a register moves it. `None`: nobody knows.
fn moves(instruction: &Instruction, number: usize) -> Option<i64> {
    let to = instruction.op0_register();
    if instruction.op0_kind() != OpKind::Register || !to.is_gpr64() || to.number() != number {
        return None;
    }
    let constant = instruction.op_count() == 2 && !matches!(instruction.op1_kind(), OpKind::Register | OpKind::Memory);
    match instruction.mnemonic() {
        Mnemonic::Inc => Some(1),
        Mnemonic::Dec => Some(-1),
        Mnemonic::Add if constant => Some(instruction.immediate(1) as i64),
        Mnemonic::Sub if constant => (instruction.immediate(1) as i64).checked_neg(),
        Mnemonic::Lea if instruction.memory_base() == to && instruction.memory_index() == Register::None => {
            Some(instruction.memory_displacement64() as i64)
        }
        _ => None,
    }
}

impl<'a> Block<'a> {
    /// The loop that a block's instructions are.
    pub(super) fn loop_of(&mut self, sources: &[Source<'a>]) -> Option<Turns> {
        let back = sources.iter().position(|source| source.again)?;
        self.emit.turn = Some(Turn::First);
        Some(Turns { back, head: self.emit.asm.label(), vectors: false })
    }

    /// Where a branch back leads that has nothing to look for.
    pub(super) fn next_turn(&mut self, source: &Source<'_>) -> Option<Label> {
        let turns = self.turns.as_mut().filter(|_| source.again)?;
        if self.emit.turn == Some(Turn::First) {
            turns.vectors = self.emit.vectors;
        }
        (self.emit.turn != Some(Turn::Next { looks: true })).then_some(turns.head)
    }

    /// True where turns but the first are being emitted, for an instruction behind the loop.
    pub(super) fn is_behind(&self, position: usize) -> bool {
        let next = matches!(self.emit.turn, Some(Turn::Next { .. }));
        next && self.turns.is_some_and(|turns| position > turns.back)
    }

    /// Emits all turns but the first, where the block is a loop. `None`: this cannot be done.
    pub(super) fn next_turns(&mut self, cpu: &mut Cpu, sources: &mut [Source<'a>]) -> Option<()> {
        let Some(turns) = self.turns else { return Some(()) };
        self.emit.island();
        self.emit.asm.align(ALIGNED);
        self.emit.asm.bind(turns.head);
        let broken = |broken: Option<usize>| broken.is_some_and(|broken| broken <= turns.back);
        if broken(self.broken) {
            // The interpreter does something of it: each turn is a first one.
            let out = self.emit.look_at(self.key.rip);
            self.emit.poll(out);
            self.emit.asm.jmp(self.start?);
            return Some(());
        }
        (self.emit.turn, self.emit.cached) = (Some(Turn::Next { looks: true }), None);
        self.emit.vectors = turns.vectors;
        self.emit.inner.clear();
        let ended = self.body(cpu, sources, turns.back + 1);
        if broken(self.broken) {
            return None;
        }
        if !ended {
            match self.emit.met.iter().find(|met| met.0 == turns.back + 1) {
                Some(&(_, behind)) => self.emit.asm.jmp(behind),
                None => self.go_on(sources[turns.back].instruction.next_ip()),
            }
        }
        Some(())
    }
}

impl Emit<'_> {
    /// Where a loop is emitted, or a group: leaves for code apart from them where a byte is not in the window. `live`: flags are
    /// needed behind.
    pub(super) fn stay_near(&mut self, byte: At, write: bool, distance: i32, (pace, live): (Option<i32>, bool)) {
        match (self.turn, pace) {
            (Some(Turn::Next { .. }), Some(0)) => {}
            _ if live => {
                let near = self.asm.label();
                self.window_less_entry(byte, write, distance);
                self.asm.jrcxz(near);
                // Behind the byte of the opcode.
                let apart = self.exit_apart(Some(self.asm.here() + 1));
                self.asm.jmp(apart);
                self.asm.bind(near);
            }
            (Some(Turn::Next { looks }), Some(pace)) => {
                let looks = looks.then(|| self.look_at(self.rip));
                self.turn = Some(Turn::Next { looks: false });
                self.follow(byte, write, pace, looks);
            }
            _ => {
                self.compare_entry(byte, write, distance);
                self.leave_apart(condition::NOT_ZERO);
            }
        }
    }

    /// Checks a byte that the turn before has checked `pace` bytes from here, if that was on another page. There, interrupts
    /// are looked for, and `looks` is gone to, if it is there.
    fn follow(&mut self, byte: At, write: bool, pace: i32, looks: Option<Label>) {
        let most = pace.unsigned_abs().next_power_of_two() as i32;
        // The byte itself where it goes up, a byte not before the last one where it goes down: among the page's first
        // `most` bytes wherever there is a page's end in between.
        let seen = if pace < 0 { moved(byte, most) } else { byte };
        let register = self.at_hand(seen);
        let (here, back) = (self.asm.label(), self.asm.label());
        self.asm.test_32(register, 0x1000 - most);
        self.asm.jcc(condition::ZERO, here);
        self.asm.bind(back);
        let astray = self.exit_apart(None);
        self.colds.push(Cold::Page { here, back, byte, write, looks, astray });
    }
}

/// Blocks of this mode may be loops.
pub(super) fn may_be(mode: u16) -> bool {
    mode & (NEAR | APART) == NEAR
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use engine::ledger::Work;
    use engine::{CpuState, Exit, Signals, Vcpu as _};
    use memory::Gpa;

    use crate::bare::{Bare, CODE, DATA, PROGRAM, as_program, remap};
    use crate::config::Config;

    /// Where the program has its data, and where that ends.
    const HERE: u64 = PROGRAM + DATA;
    const END: u64 = 2 * PROGRAM;
    const ELSEWHERE: u64 = DATA + 0x8000;
    /// again: movzx edx, byte [rsi]; add rax, rdx; inc rsi; dec rcx; jne again; xor ecx, ecx; ud2
    const SUM: [u8; 18] =
        [0x0f, 0xb6, 0x16, 0x48, 0x01, 0xd0, 0x48, 0xff, 0xc6, 0x48, 0xff, 0xc9, 0x75, 0xf2, 0x31, 0xc9, 0x0f, 0x0b];
    /// again: mov [rdi], rax; sub rdi, 8; dec rcx; jne again; xor ecx, ecx; ud2
    const FILL: [u8; 16] =
        [0x48, 0x89, 0x07, 0x48, 0x83, 0xef, 0x08, 0x48, 0xff, 0xc9, 0x75, 0xf4, 0x31, 0xc9, 0x0f, 0x0b];

    struct Program {
        bare: Bare,
        state: Box<CpuState>,
    }

    impl Program {
        /// One that has most of its pages in the window.
        fn new(code: &[u8]) -> Self {
            let mut bare = Bare::new(code, Config::default());
            let mut state = bare.vcpu.save();
            as_program(&mut state);
            for page in 0..16 {
                bare.ram.fill(Gpa(DATA + page * 0x1000), page as u8 + 1, 0x1000).unwrap();
            }
            Self { bare, state }
        }

        fn start(&mut self, pointer: u64, turns: u64) {
            let cpu = &mut self.bare.vcpu.cpu;
            *cpu.state = (*self.state).clone();
            (cpu.state.gpr[0], cpu.state.gpr[1], cpu.state.gpr[6], cpu.state.gpr[7]) = (0, turns, pointer, pointer);
            cpu.refresh();
            cpu.window.favour();
        }

        fn run(&mut self, pointer: u64, turns: u64) -> Box<CpuState> {
            self.start(pointer, turns);
            let (exit, state) = self.bare.run();
            assert_eq!(exit, Exit::Shutdown);
            self.bare.vcpu.cpu.fill_window();
            state
        }

        fn is_near(&mut self, page: u64) -> bool {
            self.bare.vcpu.cpu.tlb.is_in_window(HERE + page * 0x1000)
        }
    }

    #[test]
    fn a_loop_finds_the_pages_that_are_in_the_window_and_those_that_are_not() {
        let mut program = Program::new(&SUM);
        let expected = |pages: [u64; 4]| 0x10 * pages[0] + 0x1000 * (pages[1] + pages[2]) + 0x20 * pages[3];
        let sum = |program: &mut Program| program.run(HERE + 0xff0, 0x2030).gpr[0];
        for _ in 0..3 {
            assert_eq!(sum(&mut program), expected([1, 2, 3, 4]));
        }
        assert!((0..4).all(|page| program.is_near(page)));
        // Another page takes the place of one in the middle.
        remap(&program.bare.ram, HERE + 0x2000, ELSEWHERE);
        program.bare.vcpu.cpu.tlb.flush_page(HERE + 0x2000);
        for _ in 0..3 {
            assert_eq!(sum(&mut program), expected([1, 2, 9, 4]));
        }
    }

    #[test]
    fn a_loop_is_not_entered_behind_its_checks() {
        let mut program = Program::new(&SUM);
        for _ in 0..3 {
            program.run(HERE + 0xff0, 0x1020);
        }
        // The window still has what was there before.
        remap(&program.bare.ram, HERE + 0x1000, ELSEWHERE);
        program.bare.vcpu.cpu.tlb.flush_page(HERE + 0x1000);
        program.state.rip += 3;
        assert_eq!(program.run(HERE + 0x1000, 3).gpr[0], 2 * 9, "and RDX, which is 0");
    }

    #[test]
    fn a_loop_downwards_writes_where_the_pages_are() {
        let mut program = Program::new(&FILL);
        for round in 0..3 {
            program.run(HERE + 0x2ff4, 0x300);
            let first = HERE + 0x2ff4 - 8 * 0x2ff;
            for address in [HERE + 0x2ff4, HERE + 0x2000 - 4, first] {
                let value: u64 = program.bare.ram.read_value(Gpa(address - PROGRAM)).unwrap();
                assert_eq!(value, 0, "{address:#x}, round {round}");
            }
            let below: u8 = program.bare.ram.read_value(Gpa(first - 1 - PROGRAM)).unwrap();
            assert_eq!(below, 2, "round {round}");
            for page in 1..3 {
                program.bare.ram.fill(Gpa(DATA + page * 0x1000), page as u8 + 1, 0x1000).unwrap();
            }
        }
    }

    #[test]
    fn a_loop_faults_at_the_access_that_does() {
        let mut program = Program::new(&SUM);
        for _ in 0..3 {
            let state = program.run(END - 0x1010, 0x2000);
            assert_eq!((state.cr2, state.rip, state.gpr[1], state.gpr[6]), (END, PROGRAM + CODE, 0x2000 - 0x1010, END));
        }
    }

    #[test]
    fn turns_after_the_first_look_less() {
        // The same with LEA RSI, [RSI + RBX] in the place of INC RSI, and with RBX 1: nobody knows by how much it moves.
        let mut unknown = SUM.to_vec();
        unknown.splice(6..9, [0x48, 0x8d, 0x34, 0x1e]);
        unknown[14] -= 1;
        let bytes = |code: &[u8]| {
            let mut program = Program::new(code);
            program.state.gpr[3] = 1;
            assert_eq!(program.run(HERE, 0x1001).gpr[0], 0x1000 + 2);
            program.bare.ledger.worked(Work::TranslateBytes)
        };
        // A loop is there twice.
        assert!(bytes(&SUM) > bytes(&unknown) + 40, "{} bytes of host code, {}", bytes(&SUM), bytes(&unknown));
    }

    #[test]
    fn a_loop_can_be_stopped_where_it_comes_to_another_page() {
        let mut program = Program::new(&SUM);
        let (turns, end) = (0xf_e000, END - 0x2000);
        let whole = program.run(HERE, turns).gpr[0];
        assert!((0..0xfe).all(|page| program.is_near(page)));
        for _ in 0..1000 {
            program.start(HERE, turns);
            let signal = Arc::clone(&program.bare.vcpu.cpu.config.signal);
            let (exit, state) = std::thread::scope(|scope| {
                scope.spawn(|| signal.raise(Signals::STOP));
                program.bare.run()
            });
            signal.take(Signals::STOP);
            let left = state.gpr[1];
            if exit == Exit::Stopped && (1..turns).contains(&left) {
                assert_eq!((state.gpr[6], left % 0x1000), (end - left, 0), "at a page's start");
                let (exit, state) = program.bare.run();
                assert_eq!((exit, state.gpr[0]), (Exit::Shutdown, whole));
                return;
            }
        }
        panic!("never stopped on its way");
    }
}
