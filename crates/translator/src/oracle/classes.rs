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

use iced_x86::Instruction;

use super::case::Case;

/// A class of instructions.
pub(super) struct Class {
    pub name: &'static str,
    pub templates: &'static [&'static str],
    /// x87, SSE or AVX: the registers are loaded and compared.
    pub vector: bool,
}

pub(super) const CLASSES: &[Class] = &[
    Class {
        name: "arithmetic",
        templates: &[
            "lock 00+o /r",
            "lock 01+o /r",
            "02+o /r",
            "03+o /r",
            "04+o ib",
            "05+o iv",
            "lock 80 /r ib",
            "lock 81 /r iv",
            "lock 83 /r ib",
            "84 /r",
            "85 /r",
            "a8 ib",
            "a9 iv",
            "f6 /0 ib",
            "f7 /0 iv",
            "f6 /1 ib",
            "f7 /1 iv",
            "lock fe /0",
            "lock fe /1",
            "lock ff /0",
            "lock ff /1",
            "lock f6 /2",
            "lock f7 /2",
            "lock f6 /3",
            "lock f7 /3",
        ],
        vector: false,
    },
    Class {
        name: "moves",
        templates: &[
            "88 /r",
            "89 /r",
            "8a /r",
            "8b /r",
            "b0+r ib",
            "b8+r iq",
            "c6 /0 ib",
            "c7 /0 iv",
            "a0 moffs",
            "a1 moffs",
            "a2 moffs",
            "a3 moffs",
            "0f b6 /r",
            "0f b7 /r",
            "0f be /r",
            "0f bf /r",
            "63 /r",
            "8d /r:m",
            "0f c8+r",
            "0f 38 f0 /r:m",
            "0f 38 f1 /r:m",
            "0f c3 /r:m",
            "d7",
            "98",
            "99",
            "0f 40+c /r",
            "0f 90+c /r",
        ],
        vector: false,
    },
    Class {
        name: "shifts",
        templates: &[
            "c0 /r ib",
            "c1 /r ib",
            "d0 /r",
            "d1 /r",
            "d2 /r",
            "d3 /r",
            "0f a4 /r ib",
            "0f a5 /r",
            "0f ac /r ib",
            "0f ad /r",
        ],
        vector: false,
    },
    Class {
        name: "multiplication",
        templates: &[
            "f6 /4",
            "f7 /4",
            "f6 /5",
            "f7 /5",
            "f6 /6",
            "f7 /6",
            "f6 /7",
            "f7 /7",
            "0f af /r",
            "69 /r iv",
            "6b /r ib",
            "v2.f2 f6 /r",
        ],
        vector: false,
    },
    Class {
        name: "exchanges",
        templates: &[
            "lock 86 /r",
            "lock 87 /r",
            "90+r",
            "lock 0f c0 /r",
            "lock 0f c1 /r",
            "lock 0f b0 /r",
            "lock 0f b1 /r",
            "lock 0f c7 /1:m",
            "lock 0f c7 /1:m",
        ],
        vector: false,
    },
    Class {
        name: "bits",
        templates: &[
            "0f a3 /r",
            "lock 0f ab /r",
            "lock 0f b3 /r",
            "lock 0f bb /r",
            "0f ba /4 ib",
            "lock 0f ba /5 ib",
            "lock 0f ba /6 ib",
            "lock 0f ba /7 ib",
            "0f bc /r",
            "0f bd /r",
            "f3 0f bc /r",
            "f3 0f bd /r",
            "f3 0f b8 /r",
            "66 0f 38 f6 /r",
            "f3 0f 38 f6 /r",
            "f2 0f 38 f0 /r",
            "f2 0f 38 f1 /r",
            "v2 f2 /r",
            "v2 f3 /1",
            "v2 f3 /2",
            "v2 f3 /3",
            "v2 f7 /r",
            "v2 f5 /r",
            "v2.66 f7 /r",
            "v2.f3 f7 /r",
            "v2.f2 f7 /r",
            "v2.f3 f5 /r",
            "v2.f2 f5 /r",
            "v3.f2 f0 /r ib",
        ],
        vector: false,
    },
    Class {
        name: "stack",
        templates: &[
            "50+r", "58+r", "68 iv", "6a ib", "8f /0", "ff /6", "9c", "9d", "c8 iw ib", "c9", "0f a0", "0f a8",
        ],
        vector: false,
    },
    Class {
        name: "branches",
        templates: &[
            "70+c cb",
            "0f 80+c cv",
            "eb cb",
            "e9 cv",
            "e8 cv",
            "ff /2",
            "ff /4",
            "c3",
            "c2 iw",
            "e0 cb",
            "e1 cb",
            "e2 cb",
            "e3 cb",
        ],
        vector: false,
    },
    Class {
        name: "strings",
        templates: &[
            "rep a4", "rep a5", "rep a6", "rep a7", "rep aa", "rep ab", "rep ac", "rep ad", "rep ae", "rep af",
        ],
        vector: false,
    },
    Class {
        name: "hints",
        templates: &[
            "f5",
            "f8",
            "f9",
            "fc",
            "fd",
            "9e",
            "9f",
            "90",
            "0f 1f /r",
            "0f 0d /r:m",
            "0f 18 /r:m",
            "0f ae /7:m",
            "66 0f ae /7:m",
            "0f ae f0",
            "0f ae e8",
            "0f ae f8",
            "0f 0b",
            "0f b9 /r",
            "0f 19 /r",
            "0f 1c /r",
            "0f 1d /r",
            "0f 1e /r",
            "f3 0f 1e fa",
        ],
        vector: false,
    },
];

/// Flags of an instruction that are not compared: undefined by the manuals, and on processors without a simple rule.
///
/// None so far: what the manuals leave undefined, the interpreter does as AMD's Zen does.
pub(super) fn undefined_flags(_instruction: &Instruction, _case: &Case) -> u64 {
    0
}
