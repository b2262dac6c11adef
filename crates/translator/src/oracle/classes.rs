//! What the oracle tries: opcodes by class, in the notation of the manuals' opcode tables, and flags nobody can know.
//!
//! A template is a line of words:
//!
//! | word | meaning |
//! |---|---|
//! | `lock`, `rep` | prefixes worth trying often |
//! | `66`, `f2`, `f3` before the opcode | a mandatory prefix |
//! | `v1`, `v2`, `v3` with `.66`, `.f2`, `.f3` | VEX, opcode map 0F, 0F38 or 0F3A, with that implied prefix |
//! | `c3` | an opcode byte |
//! | `50+r`, `70+c`, `00+o` | its low three or four bits, or bits 5:3, random |
//! | `/r`, `/4` | a ModRM byte, its reg field random or given; `:m` or `:r` for memory or registers only |
//! | `ib`, `iw`, `iv`, `iq` | an immediate: 8 bits, 16, operand size up to 32, operand size |
//! | `moffs`, `cb`, `cv` | an absolute address, branch displacements |

use engine::state::rflags::{AF, CF, OF, PF, SF};
use iced_x86::{Instruction, Mnemonic};

use super::case::Code;

/// A class of instructions.
pub(super) struct Class {
    pub name: &'static str,
    pub templates: &'static [&'static [&'static str]],
    /// The code segment.
    pub code: Code,
    /// x87, SSE or AVX: the registers are loaded and compared.
    pub vector: bool,
}

impl Class {
    const fn integer(name: &'static str, code: Code, templates: &'static [&'static [&'static str]]) -> Self {
        Self { name, templates, code, vector: false }
    }

    /// The template of a case.
    pub(super) fn template(&self, number: u64) -> &'static str {
        let all = self.templates.iter().flat_map(|list| list.iter());
        let count: usize = self.templates.iter().map(|list| list.len()).sum();
        all.copied().nth((number % count as u64) as usize).unwrap_or_default()
    }
}

/// What every mode has.
const EVERYWHERE: &[&[&str]] =
    &[ARITHMETIC, MOVES, SHIFTS, MULTIPLICATION, EXCHANGES, BITS, STACK, BRANCHES, STRINGS, HINTS, LEGACY];

pub(super) const CLASSES: &[Class] = &[
    Class::integer("arithmetic", Code::Bits64, &[ARITHMETIC]),
    Class::integer("moves", Code::Bits64, &[MOVES, LONG]),
    Class::integer("shifts", Code::Bits64, &[SHIFTS]),
    Class::integer("multiplication", Code::Bits64, &[MULTIPLICATION]),
    Class::integer("exchanges", Code::Bits64, &[EXCHANGES]),
    Class::integer("bits", Code::Bits64, &[BITS]),
    Class::integer("stack", Code::Bits64, &[STACK]),
    Class::integer("branches", Code::Bits64, &[BRANCHES]),
    Class::integer("strings", Code::Bits64, &[STRINGS]),
    Class::integer("hints", Code::Bits64, &[HINTS]),
    Class::integer("compatibility", Code::Bits32, EVERYWHERE),
    Class::integer("compatibility_16", Code::Bits16, EVERYWHERE),
    Class { name: "vectors", templates: &[VECTORS], code: Code::Bits64, vector: true },
];

#[rustfmt::skip]
const ARITHMETIC: &[&str] = &[
    "lock 00+o /r", "lock 01+o /r", "02+o /r", "03+o /r", "04+o ib", "05+o iv", "lock 80 /r ib", "lock 81 /r iv",
    "lock 83 /r ib", "84 /r", "85 /r", "a8 ib", "a9 iv", "f6 /0 ib", "f7 /0 iv", "f6 /1 ib", "f7 /1 iv", "lock fe /0",
    "lock fe /1", "lock ff /0", "lock ff /1", "lock f6 /2", "lock f7 /2", "lock f6 /3", "lock f7 /3",
];

#[rustfmt::skip]
const MOVES: &[&str] = &[
    "88 /r", "89 /r", "8a /r", "8b /r", "b0+r ib", "b8+r iq", "c6 /0 ib", "c7 /0 iv", "a0 moffs", "a1 moffs",
    "a2 moffs", "a3 moffs", "0f b6 /r", "0f b7 /r", "0f be /r", "0f bf /r", "8d /r:m", "0f c8+r", "0f 38 f0 /r:m",
    "0f 38 f1 /r:m", "0f c3 /r:m", "d7", "98", "99", "0f 40+c /r", "0f 90+c /r",
];

#[rustfmt::skip]
const SHIFTS: &[&str] = &[
    "c0 /r ib", "c1 /r ib", "d0 /r", "d1 /r", "d2 /r", "d3 /r", "0f a4 /r ib", "0f a5 /r", "0f ac /r ib", "0f ad /r",
];

#[rustfmt::skip]
const MULTIPLICATION: &[&str] = &[
    "f6 /4", "f7 /4", "f6 /5", "f7 /5", "f6 /6", "f7 /6", "f6 /7", "f7 /7", "0f af /r", "69 /r iv", "6b /r ib",
    "v2.f2 f6 /r",
];

#[rustfmt::skip]
const EXCHANGES: &[&str] = &[
    "lock 86 /r", "lock 87 /r", "90+r", "lock 0f c0 /r", "lock 0f c1 /r", "lock 0f b0 /r", "lock 0f b1 /r",
    "lock 0f c7 /1:m", "lock 0f c7 /1:m",
];

#[rustfmt::skip]
const BITS: &[&str] = &[
    "0f a3 /r", "lock 0f ab /r", "lock 0f b3 /r", "lock 0f bb /r", "0f ba /4 ib", "lock 0f ba /5 ib",
    "lock 0f ba /6 ib", "lock 0f ba /7 ib", "0f bc /r", "0f bd /r", "f3 0f bc /r", "f3 0f bd /r", "f3 0f b8 /r",
    "66 0f 38 f6 /r", "f3 0f 38 f6 /r", "f2 0f 38 f0 /r", "f2 0f 38 f1 /r", "v2 f2 /r", "v2 f3 /1", "v2 f3 /2",
    "v2 f3 /3", "v2 f7 /r", "v2 f5 /r", "v2.66 f7 /r", "v2.f3 f7 /r", "v2.f2 f7 /r", "v2.f3 f5 /r", "v2.f2 f5 /r",
    "v3.f2 f0 /r ib",
];

#[rustfmt::skip]
const STACK: &[&str] = &[
    "50+r", "58+r", "68 iv", "6a ib", "8f /0", "ff /6", "9c", "9d", "c8 iw ib", "c9", "0f a0", "0f a8",
];

#[rustfmt::skip]
const BRANCHES: &[&str] = &[
    "70+c cb", "0f 80+c cv", "eb cb", "e9 cv", "e8 cv", "ff /2", "ff /4", "c3", "c2 iw", "e0 cb", "e1 cb", "e2 cb",
    "e3 cb",
];

#[rustfmt::skip]
const STRINGS: &[&str] = &[
    "rep a4", "rep a5", "rep a6", "rep a7", "rep aa", "rep ab", "rep ac", "rep ad", "rep ae", "rep af",
];

#[rustfmt::skip]
const HINTS: &[&str] = &[
    "f5", "f8", "f9", "fc", "fd", "9e", "9f", "90", "0f 1f /r", "0f 0d /r:m", "0f 18 /r:m", "0f ae /7:m",
    "66 0f ae /7:m", "0f ae f0", "0f ae e8", "0f ae f8", "0f 0b", "0f b9 /r", "0f 19 /r", "0f 1c /r", "0f 1d /r",
    "0f 1e /r", "f3 0f 1e fa",
];

/// MOVSXD; ARPL outside 64-bit mode.
const LONG: &[&str] = &["63 /r"];

/// What 64-bit mode dropped: DAA, DAS, AAA, AAS, AAM, AAD, SALC, INC, DEC, PUSHA, POPA, BOUND, pushes of segments.
#[rustfmt::skip]
const LEGACY: &[&str] = &[
    "27", "2f", "37", "3f", "d4 ib", "d5 ib", "d6", "40+r", "48+r", "60", "61", "62 /r:m", "06", "0e", "16", "1e",
    "lock 82 /r ib",
];

/// Addressing, faults and encodings of SSE and AVX; results, of every instruction, are `vector`'s own test. Not here:
/// LDMXCSR, whose reserved bits are the CPU model's: none has the misaligned-exception mask that processors of AMD's have.
#[rustfmt::skip]
const VECTORS: &[&str] = &[
    "0f 10 /r", "0f 11 /r", "66 0f 10 /r", "f3 0f 10 /r", "f2 0f 11 /r", "0f 12 /r", "0f 13 /r:m", "0f 14 /r",
    "0f 16 /r", "0f 17 /r:m", "0f 28 /r", "66 0f 29 /r", "f3 0f 2a /r", "f2 0f 2c /r", "f2 0f 2d /r", "0f 2e /r",
    "66 0f 2f /r", "66 0f 50 /r:r", "0f 51 /r", "f3 0f 51 /r", "0f 54+r /r", "66 0f 58+r /r", "f3 0f 58+r /r",
    "f2 0f 58+r /r", "0f 58+r /r", "66 0f 60+r /r", "66 0f 68+r /r", "f3 0f 6f /r", "66 0f 70 /r ib", "66 0f 74 /r",
    "66 0f 7e /r", "66 0f 7f /r", "0f c2 /r ib", "66 0f c4 /r ib", "66 0f c5 /r:r ib", "0f c6 /r ib", "66 0f d0+c /r",
    "66 0f e0+c /r", "66 0f f4 /r", "66 0f f8+r /r", "0f ae /3:m", "66 0f 38 00+r /r", "66 0f 38 17 /r",
    "66 0f 3a 0f /r ib", "v1 10 /r", "v1 11 /r", "v1.66 28 /r", "v1.f3 6f /r", "v1.66 7f /r", "v1 58 /r", "v1.f2 58 /r",
    "v1.66 ef /r", "v1 77", "v2.66 18 /r:m", "v2.66 00 /r", "v3.66 0f /r ib", "v3.66 06 /r ib", "v1.66 d7 /r:r",
    "66 0f f7 /r:r", "0f f7 /r:r", "v1.66 f7 /r:r", "v2.66 2c+r /r:m", "v2.66 8c /r:m", "v2.66 8e /r:m",
];

/// Flags of an instruction that are not compared: undefined by the manuals, and not the same on all processors of AMD's.
/// Elsewhere the interpreter does what Zen does, defined or not.
pub(super) fn undefined_flags(instruction: &Instruction) -> u64 {
    match instruction.mnemonic() {
        // Zen 4 clears them but for PF, which is that of the result; others leave them alone.
        Mnemonic::Bsf | Mnemonic::Bsr => CF | PF | AF | SF | OF,
        _ => 0,
    }
}

/// True where both operands may fault and processors differ in which they look at first: with REPE CMPSB it is RSI's on
/// Zen 4, and RDI's, as everywhere else, on others.
pub(super) fn either_fault(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Cmpsb
}
