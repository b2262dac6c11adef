//! Accesses to pages in the window ([`crate::mmu::Window`]): the operand moves by a constant.
//!
//! ```text
//!   lea   rcx, [operand + size - 1]                          (or the end of a group of operands)
//!   bextr rcx, rcx, r15
//!   cmp   qword [table + rcx * 8], distance ─ another ─> the check of any access, and the instruction again
//!   op    [operand + distance]                                │
//!   ... <─────────────────────────────────────────────────────┘
//! ```
//!
//! The entry does not have to arrive before the access is made: the processor goes on as if the comparison came out equal.
//! It is the page of the last byte that is looked at, for the tables keep a page from being there without the one before it.

use iced_x86::{Instruction, Mnemonic};

use super::asm::{At, Label};
use super::check::table_for;
use super::emit::{Address, Emit, READ, T1, T2, condition};
use super::encoding::Encoding;
use super::group::{Sum, is_sum};
use super::same::{Source, on_stack};
use crate::home::offset;

/// Largest operand.
pub(super) const MOST_BYTES: u32 = 64;

/// An instruction whose operand is not in the window.
pub(super) struct Far<'a> {
    here: Label,
    again: Label,
    back: Label,
    source: Source<'a>,
    /// [`Emit::cached`] before the instruction and behind it.
    before: Option<usize>,
    after: Option<usize>,
}

impl<'a> Emit<'a> {
    /// Emits an instruction with an operand in the window. False where it has none that could be.
    pub(super) fn near(&mut self, source: &Source<'a>, encoding: &Encoding, again: Label) -> bool {
        let Some(distance) = self.window else { return false };
        if source.part.of.is_some() {
            let displacement = source.instruction.memory_displacement64() as i32;
            let at = self.sum(Sum::of(&source.instruction), displacement + distance);
            self.operate(source, encoding, Some(at));
            return true;
        }
        let bytes = source.instruction.memory_size().size() as u32;
        let access = source.template.loads || source.template.stores;
        if source.live || !access || !(1..=MOST_BYTES).contains(&bytes) {
            return false;
        }
        let before = self.cached;
        let Some(operand) = self.whole_operand(&source.instruction, distance) else { return false };
        let here = self.asm.label();
        self.compare_window(source, operand, bytes, distance, here);
        self.operate(source, encoding, Some(moved(operand, distance)));
        if self.turn.is_some() {
            return true;
        }
        let (back, after) = (self.asm.bound(), self.cached);
        self.put_off(Far { here, again, back, source: *source, before, after });
        true
    }

    /// Emits an instruction whose operand is not in the window. `None`: it cannot be done.
    pub(super) fn far(&mut self, far: &Far<'a>) -> Option<()> {
        self.asm.bind(far.here);
        (self.cached, self.rip) = (far.before, far.source.instruction.ip());
        self.mark(false);
        self.checked(&far.source, &far.source.encoding?, far.again)?;
        debug_assert_eq!(self.cached, far.after);
        self.asm.jmp(far.back);
        Some(())
    }

    /// A memory operand as one of the host's that has room for `distance`; T1 is not in it. `None`: there is none.
    fn whole_operand(&mut self, instruction: &Instruction, distance: i32) -> Option<At> {
        if !is_sum(instruction) {
            return match self.address(instruction) {
                Address::In(register) => Some(At::Base(register, 0)),
                Address::Constant(_) => None,
            };
        }
        let displacement = instruction.memory_displacement64() as i32;
        displacement.checked_add(distance)?.checked_add(MOST_BYTES as i32)?;
        Some(self.sum(Sum::of(instruction), displacement))
    }

    /// Memory at a distance from a sum of guest registers; T1 is not in it.
    pub(super) fn sum(&mut self, sum: Sum, displacement: i32) -> At {
        let base = sum.base.is_gpr().then(|| self.value(sum.base.number(), T2));
        let index = sum.index.is_gpr().then(|| self.value(sum.index.number(), T1));
        let scale = sum.scale.trailing_zeros() as u8;
        let at = match (base, index) {
            (Some(base), Some(index)) => At::Index(base, index, scale, displacement),
            (None, Some(index)) => At::Scaled(index, scale, displacement),
            (Some(base), None) => At::Base(base, displacement),
            (None, None) => At::Absolute(displacement),
        };
        if index == Some(T1) {
            self.asm.lea(T2, at);
            return At::Base(T2, 0);
        }
        at
    }

    /// Goes to `far` where an operand is not in the window; in loops, to code apart from them.
    fn compare_window(&mut self, source: &Source<'_>, operand: At, bytes: u32, distance: i32, far: Label) {
        let aligned = bytes == 1 || source.template.aligned || on_stack(&source.instruction, bytes);
        if is_locked(&source.instruction) && !aligned {
            // Across two pages it is the interpreter's, one vCPU after the other.
            self.asm.lea(T1, operand);
            self.asm.test_byte(T1, (bytes - 1) as u8);
            match self.turn {
                Some(_) => self.leave_apart(condition::NOT_ZERO),
                None => self.asm.jcc(condition::NOT_ZERO, far),
            }
        }
        let last = if aligned { operand } else { moved(operand, bytes as i32 - 1) };
        if self.turn.is_some() {
            return self.stay_near(last, source.template.stores, distance, (source.pace, false));
        }
        self.compare_entry(last, source.template.stores, distance);
        self.asm.jcc(condition::NOT_ZERO, far);
    }

    /// "Not zero" where a byte is not in the window.
    pub(super) fn compare_entry(&mut self, byte: At, write: bool, distance: i32) {
        let address = self.at_hand(byte);
        self.asm.extract_bits(T1, address, READ);
        let (table, ahead) = table_for(write);
        self.asm.compare_at(At::Index(table, T1, 3, ahead), distance);
    }

    /// T1 becomes zero where a byte is in the window; flags stay.
    pub(super) fn window_less_entry(&mut self, byte: At, write: bool, distance: i32) {
        let address = self.at_hand(byte);
        self.asm.extract_at(T1, address, self.field(offset::INDEX_BITS));
        let (table, ahead) = table_for(write);
        self.asm.load(T1, At::Index(table, T1, 3, ahead));
        self.asm.lea(T1, At::Base(T1, -distance));
    }

    /// The register that has an address: T1 where that is not one anyway.
    pub(super) fn at_hand(&mut self, at: At) -> u8 {
        match at {
            At::Base(register, 0) => register,
            at => {
                self.asm.lea(T1, at);
                T1
            }
        }
    }
}

/// True where an access is one step to other processors, at whatever address.
pub(super) fn is_locked(instruction: &Instruction) -> bool {
    instruction.has_lock_prefix() || instruction.mnemonic() == Mnemonic::Xchg
}

/// An operand so many bytes further on.
pub(super) fn moved(at: At, by: i32) -> At {
    match at {
        At::Base(base, displacement) => At::Base(base, displacement + by),
        At::Index(base, index, scale, displacement) => At::Index(base, index, scale, displacement + by),
        At::Scaled(index, scale, displacement) => At::Scaled(index, scale, displacement + by),
        At::Absolute(displacement) => At::Absolute(displacement + by),
    }
}

#[cfg(test)]
mod tests {
    use engine::ledger::Work;
    use engine::{CpuState, Exit, Vcpu as _};
    use memory::Gpa;

    use crate::bare::{Bare, CODE, DATA, PROGRAM, as_program, remap};
    use crate::config::Config;

    /// Where the program has its data.
    const HERE: u64 = PROGRAM + DATA;
    const ELSEWHERE: u64 = DATA + 0x8000;
    const ONES: u64 = 0x0101_0101_0101_0101;

    /// A program that copies 8 bytes from RSI to RDI, and ends by an exception that nobody handles.
    struct Program {
        bare: Bare,
        state: Box<CpuState>,
        /// It runs as one that has most of its pages in the window.
        near: bool,
    }

    impl Program {
        fn new() -> Self {
            Self::of(&[0x48, 0x8b, 0x06, 0x48, 0x89, 0x07]) // mov rax, [rsi]; mov [rdi], rax
        }

        /// Some code, with XOR ECX, ECX behind it, so that nobody needs the flags that a check takes, and UD2.
        fn of(code: &[u8]) -> Self {
            let code = &[code, &[0x31, 0xc9, 0x0f, 0x0b]].concat();
            let mut bare = Bare::new(code, Config::default());
            let mut state = bare.vcpu.save();
            as_program(&mut state);
            for page in 0..16 {
                bare.ram.fill(Gpa(DATA + page * 0x1000), page as u8 + 1, 0x1000).unwrap();
            }
            Self { bare, state, near: true }
        }

        /// Runs it with RSI and RDI, with a look at what belongs into the window afterwards.
        fn run(&mut self, from: u64, to: u64) -> (Exit, Box<CpuState>) {
            (self.state.gpr[6], self.state.gpr[7]) = (from, to);
            let cpu = &mut self.bare.vcpu.cpu;
            *cpu.state = (*self.state).clone();
            cpu.refresh();
            if self.near {
                cpu.window.favour();
            }
            let ended = self.bare.run();
            self.bare.vcpu.cpu.fill_window();
            ended
        }

        /// What it copies.
        fn copies(&mut self, from: u64, to: u64) -> u64 {
            let (exit, state) = self.run(from, to);
            assert_eq!((exit, state.rip), (Exit::Shutdown, PROGRAM + CODE + 8));
            state.gpr[0]
        }

        fn is_near(&mut self, page: u64) -> bool {
            self.bare.vcpu.cpu.tlb.is_in_window(HERE + page * 0x1000)
        }
    }

    #[test]
    fn what_runs_over_a_pages_end_finds_the_page_that_is_there() {
        let mut program = Program::new();
        program.copies(HERE, HERE + 0x4000);
        program.copies(HERE + 0x1000, HERE + 0x5000);
        assert!([0, 1, 4, 5].into_iter().all(|page| program.is_near(page)));
        assert_eq!(program.copies(HERE + 0xffc, HERE + 0x4ffc), 0x0202_0202_0101_0101);
        // Another page takes the first one's place; it stays mapped in the window.
        remap(&program.bare.ram, HERE, ELSEWHERE);
        program.bare.vcpu.cpu.tlb.flush_page(HERE);
        assert!(!program.is_near(1), "good only with the one before");
        assert_eq!(program.copies(HERE + 0xffc, HERE + 0x4ffc), 0x0202_0202_0909_0909);
        assert_eq!(program.copies(HERE + 0xffc, HERE + 0x4ffc), 0x0202_0202_0909_0909);
        assert!(program.is_near(0) && program.is_near(1), "once more, with the new one");
        assert_eq!(program.bare.ram.read_value::<u64>(Gpa(DATA + 0x4ffc)).unwrap(), 0x0202_0202_0909_0909);
    }

    #[test]
    fn what_may_not_be_written_is_not_near_for_writing() {
        let mut program = Program::new();
        program.copies(HERE + 0x2000, HERE + 0x4000);
        assert!(program.is_near(2), "read, not yet written");
        program.copies(HERE, HERE + 0x2008);
        assert_eq!(program.bare.ram.read_value::<u64>(Gpa(DATA + 0x2008)).unwrap(), 0x0101_0101_0101_0101);
    }

    #[test]
    fn accesses_beside_each_other_have_one_check() {
        // mov rax, [rsi]; mov rdx, [rsi or rdi + 8], where flags are needed and where they are not
        let bytes = |needed: bool, second: u8| {
            let loads = [0x48, 0x8b, 0x06, 0x48, 0x8b, second, 8];
            // cmp rdx, rdx; lea rsi, [rsi]; lea rdi, [rdi] ... jne to the next instruction
            let (before, behind): (&[u8], &[u8]) =
                (&[0x48, 0x39, 0xd2, 0x48, 0x8d, 0x36, 0x48, 0x8d, 0x3f], &[0x75, 0x00]);
            let code = if needed { [before, &loads, behind].concat() } else { loads.to_vec() };
            let mut program = Program::of(&code);
            program.near = false;
            program.run(HERE, HERE);
            let before = program.bare.ledger.worked(Work::TranslateBytes);
            program.near = true;
            let (exit, state) = program.run(HERE, HERE);
            assert_eq!((exit, state.gpr[0], state.gpr[2]), (Exit::Shutdown, ONES, ONES));
            program.bare.ledger.worked(Work::TranslateBytes) - before
        };
        for needed in [false, true] {
            let (one, two) = (bytes(needed, 0x56), bytes(needed, 0x57));
            assert!(one < two, "{one} bytes of host code, {two} with two checks; flags needed: {needed}");
        }
    }

    #[test]
    fn a_check_is_made_before_flags_are_needed() {
        // cmp rdx, rdx; (lea rsi, [rsi]); mov rax, [rsi]; jne to the next instruction
        let with = |between: &[u8]| {
            let code = [&[0x48, 0x39, 0xd2], between, &[0x48, 0x8b, 0x06, 0x75, 0x00]].concat();
            let mut program = Program::of(&code);
            program.near = false;
            program.run(HERE, HERE);
            let before = program.bare.ledger.worked(Work::TranslateBytes);
            program.near = true;
            let (exit, state) = program.run(HERE, HERE);
            assert_eq!((exit, state.gpr[0]), (Exit::Shutdown, ONES));
            let bytes = program.bare.ledger.worked(Work::TranslateBytes) - before;
            // What is not there faults where it is read, not where it is looked for.
            let (exit, state) = program.run(HERE + 0x4000_0000, HERE);
            assert_eq!((exit, state.rip), (Exit::Shutdown, PROGRAM + CODE + 3 + between.len() as u64));
            bytes
        };
        let (early, late) = (with(&[]), with(&[0x48, 0x8d, 0x36]));
        assert!(early + 16 < late, "{early} bytes of host code, {late} where the address comes after the flags");
    }

    #[test]
    fn a_write_that_begins_in_a_page_that_is_only_read_there_reaches_both() {
        let mut program = Program::new();
        for _ in 0..3 {
            program.copies(HERE + 0x4000, HERE + 0x5000);
            assert!(program.is_near(4) && program.is_near(5));
        }
        for page in [1, 2, 3] {
            program.copies(HERE + page * 0x1000, HERE + 0x4ffc);
            let written = program.bare.ram.read_value::<u64>(Gpa(DATA + 0x4ffc)).unwrap();
            assert_eq!(written, (page + 1) * ONES);
        }
    }

    #[test]
    fn a_write_that_begins_in_a_page_that_is_elsewhere_now_goes_there() {
        let mut program = Program::new();
        program.copies(HERE + 0x4000, HERE);
        program.copies(HERE + 0x4000, HERE + 0x1000);
        program.copies(HERE + 0x4000, HERE + 0xffc);
        assert!(program.is_near(0) && program.is_near(1));
        let write = |program: &Program, at| program.bare.ram.read_value::<u32>(Gpa(at)).unwrap();
        remap(&program.bare.ram, HERE, ELSEWHERE);
        program.bare.vcpu.cpu.tlb.flush_page(HERE);
        program.copies(HERE + 0x2000, HERE + 0xffc);
        assert_eq!(write(&program, DATA + 0xffc), 0x0505_0505, "as before");
        assert_eq!((write(&program, ELSEWHERE + 0xffc), write(&program, DATA + 0x1000)), (0x0303_0303, 0x0303_0303));
    }

    #[test]
    fn a_window_that_is_taken_away_changes_nothing() {
        let mut program = Program::new();
        for _ in 0..3 {
            assert_eq!(program.copies(HERE, HERE + 0x4000), 0x0101_0101_0101_0101);
            assert!(program.is_near(0));
            let cpu = &mut program.bare.vcpu.cpu;
            cpu.tlb.leave_window();
            cpu.window.clear();
            assert!(!program.is_near(0));
        }
    }
}
