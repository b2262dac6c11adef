//! The parts of an instruction's encoding, and how it is put together again with other registers.

use super::asm::{Asm, Constant, Operand, Place, VEX_BYTES, vex};

/// An instruction of 64-bit code taken apart (Intel SDM vol. 2, 2.1 to 2.3). Instructions with a ModRM byte only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Encoding {
    /// 66, F2, F3, F0 as they are there, in this order.
    legacy: Constant,
    /// Opcode bytes without a VEX prefix's map; with escapes otherwise.
    opcode: Constant,
    /// What follows the operands.
    immediate: Constant,
    vex: Option<Vex>,
    /// REX.W or VEX.W.
    wide: bool,
    /// A REX prefix was there, so that byte registers 4..7 are SPL..DIL.
    rex: bool,
    /// ModRM.reg, extended.
    pub reg: u8,
    /// ModRM.rm as a register, extended.
    pub rm: u8,
    /// VEX.vvvv.
    pub second: u8,
    /// ModRM.mod is 3.
    pub direct: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Vex {
    map: u8,
    /// L and pp.
    low: u8,
}

/// The registers and memory operand that take the place of an instruction's own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operands {
    pub reg: u8,
    pub place: Place,
    pub second: u8,
}

/// Longest instruction.
const LONGEST: usize = 15;

/// The first bytes of some code.
pub(super) type Window = [u8; LONGEST + 1];

/// What is between two places of a window. `None`: it is more than a constant has room for, or ends before it starts.
fn constant(window: &Window, start: usize, end: usize) -> Option<Constant> {
    let length = end.checked_sub(start).filter(|length| *length <= 4)?;
    let mut bytes = [0; LONGEST + 5];
    bytes[..window.len()].copy_from_slice(window);
    let value = u32::from_le_bytes(*bytes[start & LONGEST..].first_chunk()?);
    Some(Constant { value, length: length as u8 })
}

/// True for legacy prefixes and REX.
const fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
}

const PREFIXES: [bool; 256] = {
    let mut all = [false; 256];
    let mut byte = 0;
    while byte < all.len() {
        all[byte] = is_prefix(byte as u8);
        byte += 1;
    }
    all
};

impl Encoding {
    /// Takes apart the instruction of so many bytes that a window begins with; `None` for what has no ModRM byte that this
    /// knows.
    pub(super) fn parse(window: &Window, length: usize) -> Option<Self> {
        let byte = |at: usize| window[at & LONGEST];
        let mut e = Self {
            legacy: Constant::default(),
            opcode: Constant::default(),
            immediate: Constant::default(),
            vex: None,
            wide: false,
            rex: false,
            reg: 0,
            rm: 0,
            second: 0,
            direct: false,
        };
        let (start, rex) = e.prefixes(window);
        let (mut r, mut b) = ((rex & 4) << 1, (rex & 1) << 3);
        // Where the opcode begins and where its last byte is.
        let (first, last) = match byte(start) {
            0xc4 => {
                let (one, two) = (byte(start + 1), byte(start + 2));
                (r, b) = (!one >> 7 << 3, (!one >> 5 & 1) << 3);
                e.vex = Some(Vex { map: one & 0x1f, low: two & 7 });
                e.wide = two >> 7 != 0;
                e.second = !two >> 3 & 15;
                (start + 3, start + 3)
            }
            0xc5 => {
                let one = byte(start + 1);
                r = !one >> 7 << 3;
                e.vex = Some(Vex { map: 1, low: one & 7 });
                e.second = !one >> 3 & 15;
                (start + 2, start + 2)
            }
            0x0f if matches!(byte(start + 1), 0x38 | 0x3a) => (start, start + 2),
            0x0f => (start, start + 1),
            _ => (start, start),
        };
        e.opcode = constant(window, first, last + 1)?;
        let modrm = byte(last + 1);
        e.direct = modrm >> 6 == 3;
        e.reg = modrm >> 3 & 7 | r;
        e.rm = modrm & 7 | b;
        let mut end = last + 2;
        if !e.direct {
            let has_sib = modrm & 7 == 4;
            let base = if has_sib { byte(end) } else { modrm };
            end += usize::from(has_sib);
            end += match (modrm >> 6, base & 7) {
                (1, _) => 1,
                (2, _) | (0, 5) => 4,
                _ => 0,
            };
        }
        e.immediate = constant(window, end, length)?;
        Some(e)
    }

    /// Takes the prefixes in front of the opcode. Returns where that is, and the REX prefix or 0.
    fn prefixes(&mut self, window: &Window) -> (usize, u8) {
        // Most have this one or none.
        let (mut at, mut rex) = if window[0] & 0xf0 == 0x40 { (1, window[0]) } else { (0, 0) };
        if PREFIXES[usize::from(window[at])] {
            (at, rex) = self.legacy_prefixes(window);
        }
        (self.rex, self.wide) = (rex != 0, rex & 8 != 0);
        (at, rex)
    }

    fn legacy_prefixes(&mut self, window: &Window) -> (usize, u8) {
        let mut kept = [0; 4];
        let (mut at, mut rex) = (0, 0);
        while at < LONGEST && PREFIXES[usize::from(window[at])] {
            let current = window[at];
            match current {
                0x66 => kept[0] = current,
                0xf2 => kept[1] = current,
                0xf3 => kept[2] = current,
                0xf0 => kept[3] = current,
                _ => {}
            }
            // It counts only right before the opcode.
            rex = if current & 0xf0 == 0x40 { current } else { 0 };
            at += 1;
        }
        for prefix in kept.into_iter().filter(|prefix| *prefix != 0) {
            self.legacy.value |= u32::from(prefix) << (8 * self.legacy.length);
            self.legacy.length += 1;
        }
        (at, rex)
    }

    /// True where byte register `number` is AH, CH, DH or BH.
    pub(super) fn is_high(&self, number: u8) -> bool {
        !self.rex && self.vex.is_none() && (4..8).contains(&number)
    }

    /// The form of an instruction that has its register operands the other way round, so that the one that is only read may
    /// be in memory (Intel SDM vol. 2, 2.1.5 and appendix A). `None`: there is none.
    pub(super) fn reversed(&self) -> Option<Self> {
        let opcode = match self.opcode.value & 0xff {
            // ADD, OR, ADC, SBB, AND, SUB, XOR, CMP; MOV
            alu @ (0x00..=0x3f | 0x88 | 0x89) if alu & 6 == 0 => alu | 2,
            test @ (0x84 | 0x85) => test,
            _ => return None,
        };
        let plain = self.vex.is_none() && self.opcode.length == 1 && self.direct;
        let opcode = Constant { value: opcode, ..self.opcode };
        plain.then_some(Self { opcode, reg: self.rm, rm: self.reg, direct: false, ..*self })
    }

    /// Writes the instruction with other operands. `rex`: it needs a REX prefix, for SPL, BPL, SIL or DIL.
    pub(super) fn emit(&self, asm: &mut Asm, operands: Operands, rex: bool) {
        if self.legacy.length != 0 {
            asm.put_constant(self.legacy);
        }
        let operand = Operand::new(operands.reg, operands.place);
        let opcode = u64::from(self.opcode.value);
        if let Some(Vex { map, low }) = self.vex {
            let last = u8::from(self.wide) << 7 | (!operands.second & 15) << 3 | low;
            asm.complete(vex(operand.extension, map, last, self.opcode.value as u8), VEX_BYTES, operand);
        } else {
            let bits = operand.extension | u8::from(self.wide) << 3;
            if bits != 0 || rex {
                asm.complete(u64::from(0x40 | bits) | opcode << 8, self.opcode.length + 1, operand);
            } else {
                asm.complete(opcode, self.opcode.length, operand);
            }
        }
        asm.put_constant(self.immediate);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jit::asm::{At, reg};
    use iced_x86::{Decoder, DecoderOptions, Formatter as _, IntelFormatter};

    fn parsed(bytes: &[u8]) -> Encoding {
        let mut window = Window::default();
        window[..bytes.len()].copy_from_slice(bytes);
        Encoding::parse(&window, bytes.len()).unwrap()
    }

    fn again(bytes: &[u8], operands: Operands, rex: bool) -> String {
        text(&parsed(bytes), operands, rex)
    }

    fn text(encoding: &Encoding, operands: Operands, rex: bool) -> String {
        let mut asm = Asm::new(0);
        encoding.emit(&mut asm, operands, rex);
        let bytes = asm.finish().unwrap();
        let mut text = String::new();
        IntelFormatter::new().format(&Decoder::new(64, &bytes, DecoderOptions::NONE).decode(), &mut text);
        text
    }

    #[test]
    fn the_reversed_form_does_the_same() {
        let reversed = |bytes: &[u8]| {
            let encoding = parsed(bytes);
            let reversed = encoding.reversed()?;
            assert_eq!((reversed.reg, reversed.rm), (encoding.rm, encoding.reg));
            let operands = Operands { reg: reversed.reg, place: Place::Mem(At::Base(reg::R14, 8)), second: 0 };
            Some(text(&reversed, operands, false))
        };
        let cases: [(&[u8], &str); 7] = [
            (&[0x4c, 0x89, 0xe6], "mov rsi,[r14+8]"),       // mov rsi, r12
            (&[0x44, 0x89, 0xe6], "mov esi,[r14+8]"),       // mov esi, r12d
            (&[0x66, 0x45, 0x39, 0xe0], "cmp r8w,[r14+8]"), // cmp r8w, r12w
            (&[0x44, 0x38, 0xe2], "cmp dl,[r14+8]"),        // cmp dl, r12b
            (&[0x4c, 0x01, 0xe0], "add rax,[r14+8]"),       // add rax, r12
            (&[0x4d, 0x19, 0xf1], "sbb r9,[r14+8]"),        // sbb r9, r14
            (&[0x4c, 0x85, 0xe0], "test [r14+8],rax"),      // test rax, r12
        ];
        for (bytes, expected) in cases {
            assert_eq!(reversed(bytes).as_deref(), Some(expected), "{bytes:x?}");
        }
        // xchg rax, r12; mov rsi, [r12]; mov rsi, r12 in its other form; mov [rsi], r12; bt rax, r12
        for bytes in [
            &[0x4c, 0x87, 0xe0][..],
            &[0x49, 0x8b, 0x34, 0x24],
            &[0x49, 0x8b, 0xf4],
            &[0x4c, 0x89, 0x26],
            &[0x4c, 0x0f, 0xa3, 0xe0],
        ] {
            assert_eq!(reversed(bytes), None, "{bytes:x?}");
        }
    }

    #[test]
    fn operands_are_replaced_and_all_else_stays() {
        let memory = Operands { reg: reg::R9, place: Place::Mem(At::Index(reg::R11, reg::RCX, 0, 0)), second: 3 };
        assert_eq!(again(&[0x48, 0x01, 0x08], memory, false), "add [r11+rcx],r9", "add [rax], rcx");
        assert_eq!(again(&[0xf0, 0x65, 0x0f, 0xb1, 0x08], memory, false), "lock cmpxchg [r11+rcx],r9d");
        assert_eq!(again(&[0x66, 0x69, 0x08, 1, 2], memory, false), "imul r9w,[r11+rcx],201h");
        assert_eq!(again(&[0xc4, 0xe2, 0x60, 0xf2, 0x08], memory, false), "andn r9d,ebx,[r11+rcx]");
        assert_eq!(
            again(&[0xc5, 0xf5, 0x58, 0x08], Operands { reg: 9, second: 1, ..memory }, false),
            "vaddpd ymm9,ymm1,[r11+rcx]"
        );
        let registers = Operands { reg: reg::RSI, place: Place::Reg(reg::RAX), second: 0 };
        assert_eq!(again(&[0x40, 0x88, 0xf0], registers, true), "mov al,sil");
        assert_eq!(again(&[0x88, 0xe0], Operands { reg: 4, ..registers }, false), "mov al,ah");
        // A REX prefix that others follow is none.
        assert_eq!(again(&[0x4f, 0xf2, 0x48, 0x39, 0xf0], registers, false), "cmp rax,rsi");
        assert_eq!(again(&[0x4f, 0x66, 0x39, 0xf0], registers, false), "cmp ax,si");
        assert_eq!(again(&[0x66, 0x0f, 0x3a, 0x14, 0xc0, 7], registers, false), "pextrb eax,xmm6,7");
    }

    #[test]
    fn what_ends_before_its_operands_is_not_known() {
        let mut window = Window::default();
        window[..4].copy_from_slice(&[0x48, 0x8b, 0x44, 0x24]); // mov rax, [rsp + ...
        assert!(Encoding::parse(&window, 5).is_some());
        assert!((0..5).all(|length| Encoding::parse(&window, length).is_none()));
    }
}
