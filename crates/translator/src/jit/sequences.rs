//! Random straight-line code, translated and interpreted: what one instruction leaves for the next.
//!
//! The oracle compares single instructions with the processor. Here it is what holds between them that is looked at:
//! registers kept in temporaries, groups of stack accesses, flags that have to live across checks, page ends.

use engine::state::{CpuState, rflags};
use engine::{Exit, Vcpu as _};
use memory::Gpa;

use crate::bare::{Bare, CODE, PROGRAM, as_program};
use crate::config::Config;
use crate::random::Random;

const CASES: u64 = 1500;
const DATA: u64 = 0x10_0000;
const STACK: u64 = 0x17_f000;
/// What is compared of memory, from either.
const AREA: usize = 0x3000;

/// Registers that are written to: all but RSP, RBP and R13, which are pointers, and R12, a small index.
const GENERAL: [u8; 12] = [0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 14, 15];

struct Writer {
    random: Random,
    code: Vec<u8>,
    /// Slots of 8 bytes between the stack pointer and where it began.
    depth: i32,
}

impl Writer {
    fn register(&mut self) -> u8 {
        // Half of the time one of few, so that instructions meet in the same registers.
        if self.random.one_in(2) { self.random.pick(&[9, 10, 11, 14]) } else { self.random.pick(&GENERAL) }
    }

    /// Prefix, REX, opcode and a ModRM byte of two registers. Byte registers never are AH to BH.
    fn direct(&mut self, prefix: &[u8], wide: bool, opcode: &[u8], reg: u8, rm: u8) {
        self.code.extend(prefix);
        self.code.push(0x40 | u8::from(wide) << 3 | reg >> 3 << 2 | rm >> 3);
        self.code.extend(opcode);
        self.code.push(0xc0 | (reg & 7) << 3 | rm & 7);
    }

    /// The same with an operand at RSP, RBP or R13, or as far from those as R12 says.
    fn memory(&mut self, wide: bool, opcode: &[u8], reg: u8) {
        let (operand, near) = (self.random.below(8), self.random.below(64) as i32 - 32);
        let (rex, rm, sib) = match operand {
            0..4 => (0, 4, Some(0x24)),
            4 => (0, 5, None),
            5 => (1, 5, None),
            6 => (2, 4, Some(0xa5)), // rbp + r12 * 4
            _ => (3, 4, Some(0xa5)), // r13 + r12 * 4
        };
        self.code.push(0x40 | u8::from(wide) << 3 | reg >> 3 << 2 | rex);
        self.code.extend(opcode);
        self.code.push(0x80 | (reg & 7) << 3 | rm);
        self.code.extend(sib);
        let of_stack = (near / 5) * 8 + if self.random.one_in(4) { 3 } else { 0 };
        self.code.extend(if operand < 4 { of_stack } else { near }.to_le_bytes());
    }

    /// Pointers and the index move a little.
    fn pointers(&mut self) {
        let by = self.random.below(33) as u8;
        match self.random.below(3) {
            0 => self.code.extend([0x49, 0x8d, 0x6d, by.wrapping_sub(16)]), // lea rbp, [r13 + by]
            1 => self.code.extend([0x4c, 0x8d, 0x6d, by.wrapping_sub(16)]), // lea r13, [rbp + by]
            _ => self.code.extend([0x49, 0x83, 0xf4, by & 3]),              // xor r12, by
        }
    }

    /// An instruction that keeps flags.
    fn neutral(&mut self) {
        let (a, b, wide) = (self.register(), self.register(), self.random.one_in(2));
        match self.random.below(12) {
            0 => self.direct(&[], wide, &[0x89], a, b),
            1 => self.direct(&[], wide, &[0x0f, 0xb6], a, b),
            2 => self.direct(&[], true, &[0x63], a, b),
            3 => self.direct(&[], wide, &[0x87], a, b),
            4 => self.direct(&[], wide, &[0x88], a, b),
            5 => self.direct(&[0x66], false, &[0x89], a, b),
            6 => self.memory(wide, &[0x8b], a),
            7 => self.memory(wide, &[0x89], a),
            8 => {
                self.code.extend([0x40 | a >> 3, 0x50 | a & 7]); // push
                self.depth += 1;
            }
            9 if self.depth > 0 => {
                self.code.extend([0x40 | a >> 3, 0x58 | a & 7]); // pop
                self.depth -= 1;
            }
            10 => {
                self.memory(false, &[0xff], 6); // push of memory
                self.depth += 1;
            }
            _ => {
                // lea a, [b + a * 4 + 5]
                self.code.push(0x48 | a >> 3 << 2 | a >> 3 << 1 | b >> 3);
                self.code.extend([0x8d, 0x44 | (a & 7) << 3, 0x80 | (a & 7) << 3 | b & 7, 5]);
            }
        }
    }

    /// One that defines all status flags that are looked at.
    fn arithmetic(&mut self) {
        let (a, b, wide) = (self.register(), self.register(), self.random.one_in(2));
        let operation = self.random.pick(&[0x01_u8, 0x29, 0x39, 0x03, 0x2b, 0x3b]);
        match self.random.below(5) {
            0 => self.memory(wide, &[operation], a),
            1 => self.direct(&[], wide, &[operation & !1], a, b),
            2 => self.direct(&[], wide, &[0x0f, 0xc1], a, b), // xadd
            _ => self.direct(&[], wide, &[operation], a, b),
        }
    }

    /// One that needs flags.
    fn dependent(&mut self) {
        let (a, b, wide) = (self.register(), self.register(), self.random.one_in(2));
        let condition = self.random.below(16) as u8;
        match self.random.below(4) {
            0 => self.direct(&[], wide, &[0x0f, 0x40 | condition], a, b),
            1 => self.direct(&[], false, &[0x0f, 0x90 | condition], 0, a),
            2 => self.direct(&[], wide, &[0x11], a, b),
            _ => self.code.extend([0x70 | condition, 4, 0x48, 0x83, 0xc0 | a & 3, 1]), // over an addition
        }
    }

    /// One whose flags are not defined in part.
    fn other(&mut self) {
        let (a, b, wide) = (self.register(), self.register(), self.random.one_in(2));
        match self.random.below(8) {
            7 => self.pointers(),
            0 => self.direct(&[], wide, &[0x0f, 0xaf], a, b),
            1 => self.direct(&[], wide, &[0xd3], 4, a),       // shl by cl
            2 => self.direct(&[], wide, &[0x0f, 0xa5], a, b), // shld by cl
            3 => self.direct(&[], wide, &[0x31], a, b),
            4 => self.direct(&[], wide, &[0xf7], 2, a), // not
            5 if self.depth > 2 => {
                self.code.extend([0x48, 0x83, 0xc4, 16]); // add rsp, 16
                self.depth -= 2;
            }
            _ => self.code.extend([0x48, 0x8d, 0x64, 0x24, 0]), // lea rsp, [rsp]
        }
    }

    fn sequence(&mut self) -> Vec<u8> {
        self.code.clear();
        self.depth = 0;
        for _ in 0..8 {
            if self.random.one_in(2) {
                self.other();
            }
            self.arithmetic();
            for _ in 0..self.random.below(4) {
                self.neutral();
            }
            self.dependent();
        }
        self.arithmetic();
        self.code.push(0xf4);
        std::mem::take(&mut self.code)
    }
}

/// Loops: the same instructions again and again, at addresses that move on.
impl Writer {
    /// A loop of one block. R12 counts its turns, downwards.
    fn repeated(&mut self) -> Vec<u8> {
        self.code.clear();
        self.depth = 0;
        let turns = 2 + self.random.below(48) as u8;
        self.code.extend([0x41, 0xbc, turns, 0, 0, 0]); // mov r12d, turns
        let start = self.code.len();
        for _ in 0..1 + self.random.below(3) {
            self.arithmetic();
            for _ in 0..self.random.below(3) {
                self.neutral();
            }
            match self.random.below(6) {
                0 => self.dependent(),
                1 => self.advance(),
                _ => {}
            }
        }
        self.advance();
        self.code.extend([0x49, 0xff, 0xcc, 0x0f, 0x85]); // dec r12; jne start
        let back = start as i32 - (self.code.len() as i32 + 4);
        self.code.extend(back.to_le_bytes());
        self.arithmetic();
        self.code.push(0xf4);
        std::mem::take(&mut self.code)
    }

    /// A pointer moves on by a constant.
    fn advance(&mut self) {
        let by = self.random.pick(&[0, 1, 2, 3, 8, 16, 24, 40, 64, 100]) as u8;
        let by = if self.random.one_in(2) { by } else { by.wrapping_neg() };
        let far = (i32::from(by as i8) * 4).to_le_bytes();
        match self.random.below(8) {
            0 => self.code.extend([0x48, 0x83, 0xc5, by]), // add rbp, by
            1 => self.code.extend([0x49, 0x83, 0xed, by]), // sub r13, by
            2 => self.code.extend([0x4d, 0x8d, 0x6d, by]), // lea r13, [r13 + by]
            3 => self.code.extend([0x48, 0xff, 0xc5]),     // inc rbp
            4 => self.code.extend([0x49, 0xff, 0xcd]),     // dec r13
            5 => self.code.extend([[0x49, 0x81, 0xc5].as_slice(), &far].concat()), // add r13, far
            6 => self.code.extend([[0x48, 0x81, 0xed].as_slice(), &far].concat()), // sub rbp, far
            _ => self.code.extend([0x48, 0x8d, 0x6c, 0x25, by]), // lea rbp, [rbp + by]
        }
    }
}

/// Who runs the code.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    Kernel,
    /// A program that has its data in the window. HLT ends it by an exception that nobody handles.
    Program,
}

/// Runs code from a state; returns what it comes to, with the memory around both pointers.
fn outcome(bare: &mut Bare, code: &[u8], state: &CpuState) -> (Exit, Box<CpuState>, Vec<u8>) {
    let mut memory = vec![0x5a; 2 * AREA];
    bare.ram.write(Gpa(CODE), code).unwrap();
    for (area, start) in memory.chunks(AREA).zip([DATA, STACK]) {
        bare.ram.write(Gpa(start - 0x1000), area).unwrap();
    }
    bare.vcpu.load(state).unwrap();
    let (exit, after) = bare.run();
    for (area, start) in memory.chunks_mut(AREA).zip([DATA, STACK]) {
        bare.ram.read(Gpa(start - 0x1000), area).unwrap();
    }
    (exit, after, memory)
}

#[test]
fn sequences_are_translated_as_they_are_interpreted() {
    compare(Who::Kernel, Writer::sequence);
}

#[test]
fn sequences_of_programs_with_a_window_are_too() {
    compare(Who::Program, Writer::sequence);
}

#[test]
fn loops_are_too_with_their_data_in_the_window_and_not() {
    compare(Who::Kernel, Writer::repeated);
    compare(Who::Program, Writer::repeated);
}

fn compare(who: Who, write: fn(&mut Writer) -> Vec<u8>) {
    let mut translated = Bare::new(&[0xf4], Config::default());
    let mut interpreted = Bare::new(&[0xf4], Config { translate: false, ..Config::default() });
    let start = translated.run().1;
    let mut near = 0;
    for case in 0..CASES {
        let mut writer = Writer { random: Random::new(case), code: Vec::new(), depth: 0 };
        let code = write(&mut writer);
        let mut state = start.clone();
        for register in GENERAL {
            state.gpr[usize::from(register)] = writer.random.value();
        }
        (state.halted, state.rip) = (false, CODE);
        state.gpr[4] = STACK + 8 * writer.random.below(12);
        state.gpr[5] = DATA + writer.random.below(80);
        state.gpr[12] = writer.random.below(8);
        state.gpr[13] = DATA + writer.random.below(80);
        if who == Who::Program {
            as_program(&mut state);
            state.gpr[4] += PROGRAM;
            state.gpr[5] += PROGRAM;
            state.gpr[13] += PROGRAM;
            translated.vcpu.cpu.window.favour();
        }
        let ours = outcome(&mut translated, &code, &state);
        let theirs = outcome(&mut interpreted, &code, &state);
        let flags = |state: &CpuState| state.rflags & rflags::STATUS & !rflags::AF;
        let end = if who == Who::Kernel { Exit::Halted } else { Exit::Shutdown };
        assert_eq!((ours.0, theirs.0), (end, end), "case {case}: {code:02x?}");
        assert_eq!((ours.1.gpr, ours.1.rip), (theirs.1.gpr, theirs.1.rip), "case {case}: {code:02x?}");
        assert_eq!(flags(&ours.1), flags(&theirs.1), "case {case}: {code:02x?}");
        assert!(ours.2 == theirs.2, "case {case}, memory: {code:02x?}");
        translated.vcpu.cpu.fill_window();
        let tlb = &mut translated.vcpu.cpu.tlb;
        near += u64::from([DATA, STACK].into_iter().any(|data| tlb.is_in_window(PROGRAM + data)));
    }
    assert!(if who == Who::Program { near > CASES / 2 } else { near == 0 }, "{near} cases had data in the window");
}
