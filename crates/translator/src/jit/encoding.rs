//! The parts of an instruction's encoding, and how it is put together again with other registers.

use super::asm::{Asm, Place, extension};

/// An instruction of 64-bit code taken apart (Intel SDM vol. 2, 2.1 to 2.3). Instructions with a ModRM byte only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Encoding {
    /// 66, F2, F3, F0 where they are there, in this order; 0 elsewhere.
    legacy: [u8; 4],
    vex: Option<Vex>,
    /// REX.W or VEX.W.
    wide: bool,
    /// A REX prefix was there, so that byte registers 4..7 are SPL..DIL.
    rex: bool,
    /// Opcode bytes without a VEX prefix's map; with escapes otherwise.
    opcode: [u8; 3],
    opcode_length: usize,
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

impl Encoding {
    /// Takes apart the bytes of one instruction; `None` for what has no ModRM byte that this knows.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let mut e = Self {
            legacy: [0; 4],
            vex: None,
            wide: false,
            rex: false,
            opcode: [0; 3],
            opcode_length: 0,
            reg: 0,
            rm: 0,
            second: 0,
            direct: false,
        };
        let mut at = 0;
        let mut byte = || {
            at += 1;
            bytes.get(at - 1).copied()
        };
        let mut current = byte()?;
        let mut rex = 0;
        loop {
            match current {
                0x66 => e.legacy[0] = current,
                0xf2 => e.legacy[1] = current,
                0xf3 => e.legacy[2] = current,
                0xf0 => e.legacy[3] = current,
                0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x67 | 0x40..=0x4f => {}
                _ => break,
            }
            // It counts only right before the opcode.
            rex = if current & 0xf0 == 0x40 { current } else { 0 };
            current = byte()?;
        }
        (e.rex, e.wide) = (rex != 0, rex & 8 != 0);
        let (mut r, mut b) = ((rex & 4) << 1, (rex & 1) << 3);
        match current {
            0xc4 => {
                let (first, second) = (byte()?, byte()?);
                (r, b) = (!first >> 7 << 3, (!first >> 5 & 1) << 3);
                e.vex = Some(Vex { map: first & 0x1f, low: second & 7 });
                e.wide = second >> 7 != 0;
                e.second = !second >> 3 & 15;
                current = byte()?;
            }
            0xc5 => {
                let first = byte()?;
                r = !first >> 7 << 3;
                e.vex = Some(Vex { map: 1, low: first & 7 });
                e.second = !first >> 3 & 15;
                current = byte()?;
            }
            _ => {}
        }
        e.push(current);
        if e.vex.is_none() && current == 0x0f {
            current = byte()?;
            e.push(current);
            if matches!(current, 0x38 | 0x3a) {
                let last = byte()?;
                e.push(last);
            }
        }
        let modrm = byte()?;
        e.direct = modrm >> 6 == 3;
        e.reg = modrm >> 3 & 7 | r;
        e.rm = modrm & 7 | b;
        Some(e)
    }

    fn push(&mut self, byte: u8) {
        self.opcode[self.opcode_length] = byte;
        self.opcode_length += 1;
    }

    /// True where byte register `number` is AH, CH, DH or BH.
    pub(super) fn is_high(&self, number: u8) -> bool {
        !self.rex && self.vex.is_none() && (4..8).contains(&number)
    }

    /// Writes the instruction with other operands. `bytes` is true where a register operand is a byte wide, and none of
    /// them AH..BH unless no operand needs a REX prefix. `immediate` are the bytes after the operands.
    pub(super) fn emit(&self, asm: &mut Asm, operands: Operands, byte_registers: &[u8], immediate: &[u8]) {
        for prefix in self.legacy.iter().filter(|prefix| **prefix != 0) {
            asm.byte(*prefix);
        }
        let rex = extension(operands.reg, operands.place);
        if let Some(vex) = self.vex {
            let (r, x, b) = (rex >> 2 & 1, rex >> 1 & 1, rex & 1);
            let first = (r ^ 1) << 7 | (x ^ 1) << 6 | (b ^ 1) << 5 | vex.map;
            asm.raw(&[0xc4, first, u8::from(self.wide) << 7 | (!operands.second & 15) << 3 | vex.low, self.opcode[0]]);
        } else {
            let rex = rex | u8::from(self.wide) << 3;
            if rex != 0 || byte_registers.iter().any(|number| (4..8).contains(number)) {
                asm.byte(0x40 | rex);
            }
            asm.raw(&self.opcode[..self.opcode_length]);
        }
        asm.operand(operands.reg, operands.place);
        asm.raw(immediate);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jit::asm::{At, reg};
    use iced_x86::{Decoder, DecoderOptions, Formatter as _, IntelFormatter};

    fn again(bytes: &[u8], operands: Operands, byte_registers: &[u8], immediate: &[u8]) -> String {
        let mut asm = Asm::new(0);
        Encoding::parse(bytes).unwrap().emit(&mut asm, operands, byte_registers, immediate);
        let bytes = asm.finish().unwrap();
        let mut text = String::new();
        IntelFormatter::new().format(&Decoder::new(64, &bytes, DecoderOptions::NONE).decode(), &mut text);
        text
    }

    #[test]
    fn operands_are_replaced_and_all_else_stays() {
        let memory = Operands { reg: reg::R9, place: Place::Mem(At::Index(reg::R11, reg::RCX, 0, 0)), second: 3 };
        assert_eq!(again(&[0x48, 0x01, 0x08], memory, &[], &[]), "add [r11+rcx],r9", "add [rax], rcx");
        assert_eq!(again(&[0xf0, 0x65, 0x0f, 0xb1, 0x08], memory, &[], &[]), "lock cmpxchg [r11+rcx],r9d");
        assert_eq!(again(&[0x66, 0x69, 0x08, 1, 2], memory, &[], &[1, 2]), "imul r9w,[r11+rcx],201h");
        assert_eq!(again(&[0xc4, 0xe2, 0x60, 0xf2, 0x08], memory, &[], &[]), "andn r9d,ebx,[r11+rcx]");
        assert_eq!(
            again(&[0xc5, 0xf5, 0x58, 0x08], Operands { reg: 9, second: 1, ..memory }, &[], &[]),
            "vaddpd ymm9,ymm1,[r11+rcx]"
        );
        let registers = Operands { reg: reg::RSI, place: Place::Reg(reg::RAX), second: 0 };
        assert_eq!(again(&[0x40, 0x88, 0xf0], registers, &[reg::RSI, 0], &[]), "mov al,sil");
        assert_eq!(again(&[0x88, 0xe0], Operands { reg: 4, ..registers }, &[], &[]), "mov al,ah");
        // A REX prefix that others follow is none.
        assert_eq!(again(&[0x4f, 0xf2, 0x48, 0x39, 0xf0], registers, &[], &[]), "cmp rax,rsi");
        assert_eq!(again(&[0x4f, 0x66, 0x39, 0xf0], registers, &[], &[]), "cmp ax,si");
        assert_eq!(again(&[0x66, 0x0f, 0x3a, 0x14, 0xc0, 7], registers, &[], &[7]), "pextrb eax,xmm6,7");
    }
}
