//! REP MOVS and REP STOS: page by page, as the host's own, or by wider elements where those are faster.
//!
//! What is in the way is the interpreter's: the direction flag, a miss, an element across two pages, a signal. It goes on
//! where this has come to, for guest registers are right after each page.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::asm::{At, Label, Place, reg};
use super::check::table_for;
use super::emit::{READ, T1, T3, condition};
use super::thunk::Builder;
use crate::home::offset;

/// Operations: MOVS and STOS of 1, 2, 4 and 8 bytes.
pub(super) const COUNT: usize = 8;
const STOS: usize = 4;

/// RFLAGS.DF, in the second byte.
const DF: u8 = 1 << 2;
const RDX: i32 = 2;
const COUNTER: u8 = reg::R9;
/// Bytes of a line of the cache. On Zen 3 a copy is 30 times as slow where the target lies in the line of the source or in the
/// next one, of whichever page, behind it: 9.4 us for 16 KiB beside 0.3 us, and 1.2 us by words.
const BEHIND: i32 = 64;

/// Which of the operations a repeated string instruction is, if it is one.
pub(super) fn operation(instruction: &Instruction) -> Option<usize> {
    let place = match instruction.code() {
        Code::Movsb_m8_m8 => 0,
        Code::Movsw_m16_m16 => 1,
        Code::Movsd_m32_m32 => 2,
        Code::Movsq_m64_m64 => 3,
        Code::Stosb_m8_AL => STOS,
        Code::Stosw_m16_AX => STOS + 1,
        Code::Stosd_m32_EAX => STOS + 2,
        Code::Stosq_m64_RAX => STOS + 3,
        _ => return None,
    };
    let wide = instruction.op0_kind() == OpKind::MemoryESRDI
        && (place >= STOS || instruction.op1_kind() == OpKind::MemorySegRSI);
    let flat = !matches!(instruction.segment_prefix(), Register::FS | Register::GS);
    (instruction.has_rep_prefix() && wide && flat).then_some(place)
}

impl Builder<'_> {
    /// Called with T2 as for [`super::thunk::Thunks::op`], which `slow` is. `user`: there are no upper addresses.
    pub(super) fn string(&mut self, operation: usize, user: bool, slow: u64) -> u64 {
        let start = self.asm.here();
        let (moves, size) = (operation < STOS, (operation % STOS) as u8);
        self.asm.store(self.field(offset::SCRATCH), reg::RAX);
        self.asm.raw(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
        self.asm.store(self.field(offset::OWN_FLAGS), reg::RAX);
        self.asm.load(reg::RAX, self.field(offset::SCRATCH));
        self.asm.store(self.slot(RDX), reg::RDX);
        let (out, done) = (self.asm.label(), self.asm.label());
        self.asm.op(0, 0, &[0xf6], 0, Place::Mem(self.field(offset::RFLAGS + 1))); // test byte
        self.asm.byte(DF);
        self.asm.jcc(condition::NOT_ZERO, out);
        let page = self.asm.bound();
        self.asm.test(COUNTER, COUNTER);
        self.asm.jcc(condition::ZERO, done);
        self.asm.compare_32_at(At::Absolute(self.plan.known.signal), 0);
        self.asm.jcc(condition::NOT_ZERO, out);
        // T3: how many elements, as far as both pages go.
        self.room(T3, reg::RDI);
        if moves {
            self.room(T1, reg::RSI);
            self.least(T3, T1);
        }
        self.shift_right(T3, size);
        self.asm.jcc(condition::ZERO, out);
        self.least(T3, COUNTER);
        // RDX and RAX: the addends. RAX is what STOS stores.
        let target = if moves { reg::RAX } else { reg::RDX };
        self.addend(target, reg::RDI, table_for(true), user, out);
        if moves {
            self.addend(reg::RDX, reg::RSI, table_for(false), user, out);
            self.apart(out);
            self.asm.lea(reg::RSI, At::Index(reg::RSI, reg::RDX, 0, 0));
        }
        self.asm.lea(reg::RDI, At::Index(reg::RDI, target, 0, 0));
        self.subtract(COUNTER, T3);
        if moves && size == 0 {
            self.words_first();
        } else {
            self.asm.mov(reg::RCX, T3);
        }
        let opcode = if moves { 0xa4 } else { 0xaa } | u8::from(size > 0);
        let prefixes: &[u8] = match size {
            1 => &[0x66, 0xf3],
            3 => &[0xf3, 0x48],
            _ => &[0xf3],
        };
        self.asm.raw(prefixes);
        self.asm.byte(opcode);
        self.subtract(reg::RDI, target);
        if moves {
            self.subtract(reg::RSI, reg::RDX);
        }
        self.asm.jmp(page);
        self.asm.bind(done);
        self.as_before();
        self.asm.ret();
        self.asm.bind(out);
        self.as_before();
        self.asm.jmp_to(slow);
        start
    }

    /// RAX, RDX and flags are the guest's again.
    fn as_before(&mut self) {
        self.asm.load(reg::RAX, self.field(offset::OWN_FLAGS));
        self.asm.raw(&[0x04, 0x7f, 0x9e]); // add al, 127; sahf
        self.asm.load(reg::RAX, self.field(offset::SCRATCH));
        self.asm.load(reg::RDX, self.slot(RDX));
    }

    /// `to` becomes the bytes from an address to its page's end.
    fn room(&mut self, to: u8, address: u8) {
        self.asm.mov_32(to, address);
        self.asm.op(0, 0, &[0x81], 1, Place::Reg(to)); // or
        self.asm.raw(&(!0xfff_u32).to_le_bytes());
        self.asm.op(0, 0, &[0xf7], 3, Place::Reg(to)); // neg
    }

    /// `to` becomes the lesser of two.
    fn least(&mut self, to: u8, other: u8) {
        self.asm.op(0, 8, &[0x3b], to, Place::Reg(other)); // cmp
        self.asm.op(0, 8, &[0x0f, 0x47], to, Place::Reg(other)); // cmova
    }

    /// "Zero" where nothing is left.
    fn shift_right(&mut self, register: u8, by: u8) {
        if by == 0 {
            return self.asm.test(register, register);
        }
        self.asm.op(0, 8, &[0xc1], 5, Place::Reg(register));
        self.asm.byte(by);
    }

    fn subtract(&mut self, from: u8, what: u8) {
        self.asm.op(0, 8, &[0x2b], from, Place::Reg(what));
    }

    /// `to` becomes the addend of the page of an address; goes to `out` where there is none. T1 is lost.
    fn addend(&mut self, to: u8, address: u8, (table, ahead): (u8, i32), user: bool, out: Label) {
        self.asm.mov(T1, address);
        if user {
            self.shift_right(T1, 47);
            self.asm.jcc(condition::NOT_ZERO, out);
        } else {
            for shift in [4, 7] {
                self.asm.op(0, 8, &[0xc1], shift, Place::Reg(T1)); // shl, sar
                self.asm.byte(16);
            }
            self.asm.op(0, 8, &[0x3b], T1, Place::Reg(address));
            self.asm.jcc(condition::NOT_ZERO, out);
        }
        self.asm.extract_bits(T1, address, READ);
        self.asm.load(to, At::Index(table, T1, 3, ahead));
        self.asm.test(to, to);
        self.asm.jcc(condition::ZERO, out);
    }

    /// RCX becomes the bytes, of T3, that are left to copy. Where the target is less than [`BEHIND`] bytes behind the source,
    /// but for whole pages, all words are copied before: there, some processors copy bytes one at a time.
    fn words_first(&mut self) {
        let (usual, there) = (self.asm.label(), self.asm.label());
        self.asm.mov(reg::RCX, reg::RDI);
        self.subtract(reg::RCX, reg::RSI);
        self.asm.op(0, 8, &[0x83], 7, Place::Reg(reg::RCX)); // cmp
        self.asm.byte(8);
        self.asm.jcc(condition::BELOW, usual); // words would be read before the ones in front are written
        self.asm.and_32(reg::RCX, 0xfff);
        self.asm.compare_32(reg::RCX, BEHIND);
        self.asm.jcc(condition::ABOVE_OR_EQUAL, usual);
        self.asm.mov(reg::RCX, T3);
        self.shift_right(reg::RCX, 3);
        self.asm.raw(&[0xf3, 0x48, 0xa5]); // rep movsq
        self.asm.mov_32(reg::RCX, T3);
        self.asm.and_32(reg::RCX, 7);
        self.asm.jmp(there);
        self.asm.bind(usual);
        self.asm.mov(reg::RCX, T3);
        self.asm.bind(there);
    }

    /// Goes to `out` where both addresses are in one page that is found in two places of the host's: the host must see
    /// where they overlap.
    fn apart(&mut self, out: Label) {
        let apart = self.asm.label();
        self.asm.op(0, 8, &[0x3b], reg::RAX, Place::Reg(reg::RDX));
        self.asm.jcc(condition::ZERO, apart);
        self.asm.mov(T1, reg::RSI);
        self.asm.op(0, 8, &[0x33], T1, Place::Reg(reg::RDI)); // xor
        self.shift_right(T1, 12);
        self.asm.jcc(condition::ZERO, out);
        self.asm.bind(apart);
    }
}

#[cfg(test)]
mod tests {
    use engine::{Exit, Vcpu as _};
    use memory::Gpa;

    use crate::bare::{Bare, DATA, PROGRAM, as_program};
    use crate::config::Config;

    /// A string instruction: prefixes, opcode, RCX, and where RSI and RDI are in the data.
    type Case<'a> = (&'a [u8], u8, [u64; 3], bool);

    /// What memory and the registers RCX, RSI and RDI are after it.
    fn after(translate: bool, program: bool, (prefixes, opcode, place, backward): Case<'_>) -> (Vec<u8>, [u64; 3]) {
        let mut code = vec![if backward { 0xfd } else { 0xfc }];
        code.extend(prefixes);
        code.extend([opcode, 0xf4]);
        let mut bare = Bare::new(&code, Config { translate, ..Config::default() });
        let mut memory: Vec<u8> = (0..0x6000_u32).map(|at| (at * 7 / 5) as u8).collect();
        bare.ram.write(Gpa(DATA), &memory).unwrap();
        let mut state = bare.vcpu.save();
        let [count, from, to] = place;
        (state.gpr[0], state.gpr[1]) = (0x1122_3344_5566_7788, count);
        (state.gpr[6], state.gpr[7]) = (DATA + from, DATA + to);
        if program {
            as_program(&mut state);
            state.gpr[6] += PROGRAM;
            state.gpr[7] += PROGRAM;
        }
        // The second time all pages are known.
        for _ in 0..2 {
            *bare.vcpu.cpu.state = (*state).clone();
            bare.vcpu.cpu.refresh();
            assert_eq!(bare.run().0, if program { Exit::Shutdown } else { Exit::Halted });
        }
        bare.ram.read(Gpa(DATA), &mut memory).unwrap();
        let state = bare.vcpu.save();
        (memory, [1, 6, 7].map(|register| state.gpr[register]))
    }

    #[test]
    fn strings_are_what_they_are_interpreted() {
        let forms: [(&[u8], u8); 8] = [
            (&[0xf3], 0xa4),
            (&[0x66, 0xf3], 0xa5),
            (&[0xf3], 0xa5),
            (&[0xf3, 0x48], 0xa5),
            (&[0xf3], 0xaa),
            (&[0x66, 0xf3], 0xab),
            (&[0xf3], 0xab),
            (&[0xf3, 0x48], 0xab),
        ];
        let places = [
            ([0, 0, 0], false),
            ([1, 8, 0x3008], false),
            ([0x200, 0x1000, 0x4000], false),
            ([0x333, 0x123, 0x2345], false),  // across pages, with elements across two
            ([0x100, 0x1000, 0x1001], false), // what is written is read
            ([0x100, 0x1000, 0x1007], false),
            ([0x100, 0x1000, 0x1008], false),
            ([0x1ff, 0x1010, 0x1039], false),
            ([0x333, 0xf10, 0x3f2b], false), // words first
            ([0x100, 0x1001, 0x1000], false),
            ([0x100, 0xff8, 0x1000], false),
            ([0x20, 0x1800, 0x2804], true),
            ([0x20, 0x1800, 0x1801], true),
        ];
        for (prefixes, opcode) in forms {
            for (place, backward) in places {
                for program in [false, true] {
                    let case = (prefixes, opcode, place, backward);
                    let [ours, theirs] = [true, false].map(|translate| after(translate, program, case));
                    assert!(ours == theirs, "{case:x?}, program: {program}: {:x?} {:x?}", ours.1, theirs.1);
                }
            }
        }
    }
}
