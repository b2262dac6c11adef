//! An assembler for the few instruction shapes that translated code is made of.
//!
//! It writes bytes; nothing is looked up. Registers are numbers as instructions encode them. Everything is 64-bit unless
//! the name says otherwise. Jumps go to labels of the same piece of code, or to absolute addresses within 2 GiB.

/// Host register numbers.
pub(crate) mod reg {
    #![allow(dead_code)] // the full table
    pub(crate) const RAX: u8 = 0;
    pub(crate) const RCX: u8 = 1;
    pub(crate) const RDX: u8 = 2;
    pub(crate) const RBX: u8 = 3;
    pub(crate) const RSP: u8 = 4;
    pub(crate) const RBP: u8 = 5;
    pub(crate) const RSI: u8 = 6;
    pub(crate) const RDI: u8 = 7;
    pub(crate) const R8: u8 = 8;
    pub(crate) const R9: u8 = 9;
    pub(crate) const R10: u8 = 10;
    pub(crate) const R11: u8 = 11;
    pub(crate) const R12: u8 = 12;
    pub(crate) const R13: u8 = 13;
    pub(crate) const R14: u8 = 14;
    pub(crate) const R15: u8 = 15;
}

/// A memory operand of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    /// `[base + displacement]`
    Base(u8, i32),
    /// `[base + index * (1 << scale) + displacement]`; the index is not RSP.
    Index(u8, u8, u8, i32),
    /// `[index * (1 << scale) + displacement]`
    Scaled(u8, u8, i32),
    /// `[displacement]`
    Absolute(i32),
}

/// A register or memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Reg(u8),
    Mem(At),
}

/// A place in the code, perhaps not reached yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Label(u32);

const UNBOUND: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Fixup {
    at: u32,
    label: Label,
    short: bool,
}

/// A piece of code under construction.
pub(crate) struct Asm {
    bytes: Vec<u8>,
    base: u64,
    /// How many bytes run there, and where the rest does.
    rest: Option<(usize, u64)>,
    labels: Vec<u32>,
    fixups: Vec<Fixup>,
    /// A short jump did not reach: the code is of no use.
    broken: bool,
}

impl Asm {
    /// Code that will run at `base`.
    pub(crate) fn new(base: u64) -> Self {
        Self { bytes: Vec::new(), base, rest: None, labels: Vec::new(), fixups: Vec::new(), broken: false }
    }

    /// Begins anew, with code that will run at `base`.
    pub(crate) fn restart(&mut self, base: u64) {
        self.bytes.clear();
        self.labels.clear();
        self.fixups.clear();
        (self.base, self.rest, self.broken) = (base, None, false);
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Where the next byte will run.
    pub(crate) fn here(&self) -> u64 {
        self.address(self.bytes.len())
    }

    /// The rest of the code will run at `base`. What was before does not run on into it.
    pub(crate) fn go_on_at(&mut self, base: u64) {
        self.rest = Some((self.bytes.len(), base));
    }

    /// Where what is at an offset will run.
    fn address(&self, offset: usize) -> u64 {
        match self.rest {
            Some((start, base)) if offset >= start => base + (offset - start) as u64,
            _ => self.base + offset as u64,
        }
    }

    /// The finished code; `None` where a short jump did not reach.
    pub(crate) fn finish(mut self) -> Option<Vec<u8>> {
        self.resolve_all().then_some(self.bytes)
    }

    /// Finishes the code. False where a short jump did not reach.
    pub(crate) fn resolve_all(&mut self) -> bool {
        for at in 0..self.fixups.len() {
            let fixup = self.fixups[at];
            let target = self.labels[fixup.label.0 as usize];
            debug_assert_ne!(target, UNBOUND);
            self.resolve(&fixup, target);
        }
        !self.broken
    }

    /// The code, and what of it runs elsewhere.
    pub(crate) fn parts(&self) -> (&[u8], &[u8]) {
        self.bytes.split_at(self.rest.map_or(self.bytes.len(), |(start, _)| start))
    }

    fn resolve(&mut self, fixup: &Fixup, target: u32) {
        let at = fixup.at as usize;
        if fixup.short {
            match i8::try_from(i64::from(target) - i64::from(fixup.at) - 1) {
                Ok(distance) => self.bytes[at] = distance as u8,
                Err(_) => self.broken = true,
            }
        } else {
            let distance = self.address(target as usize).wrapping_sub(self.address(at) + 4) as u32;
            self.bytes[at..at + 4].copy_from_slice(&distance.to_le_bytes());
        }
    }

    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(UNBOUND);
        Label(self.labels.len() as u32 - 1)
    }

    /// Says that `label` is here.
    pub(crate) fn bind(&mut self, label: Label) {
        self.labels[label.0 as usize] = self.bytes.len() as u32;
    }

    /// A label that is here.
    pub(crate) fn bound(&mut self) -> Label {
        let label = self.label();
        self.bind(label);
        label
    }

    pub(crate) fn byte(&mut self, byte: u8) {
        self.bytes.push(byte);
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Goes on at a multiple of `bytes`. The code before does not run on.
    pub(crate) fn align(&mut self, bytes: u64) {
        while !self.here().is_multiple_of(bytes) {
            self.byte(0x90);
        }
    }

    fn imm32(&mut self, value: i32) {
        self.raw(&value.to_le_bytes());
    }

    /// ModRM, SIB and displacement.
    pub(crate) fn operand(&mut self, field: u8, place: Place) {
        let field = (field & 7) << 3;
        match place {
            Place::Reg(rm) => self.byte(0xc0 | field | rm & 7),
            Place::Mem(At::Absolute(displacement)) => {
                self.raw(&[field | 4, 0x25]);
                self.imm32(displacement);
            }
            Place::Mem(At::Scaled(index, scale, displacement)) => {
                self.raw(&[field | 4, scale << 6 | (index & 7) << 3 | 5]);
                self.imm32(displacement);
            }
            Place::Mem(At::Base(base, displacement)) => {
                let mode = displacement_mode(base, displacement);
                self.byte(mode | field | base & 7);
                if base & 7 == 4 {
                    self.byte(0x24);
                }
                self.displacement(mode, displacement);
            }
            Place::Mem(At::Index(base, index, scale, displacement)) => {
                let mode = displacement_mode(base, displacement);
                self.raw(&[mode | field | 4, scale << 6 | (index & 7) << 3 | base & 7]);
                self.displacement(mode, displacement);
            }
        }
    }

    fn displacement(&mut self, mode: u8, displacement: i32) {
        match mode {
            0x40 => self.byte(displacement as u8),
            0x80 => self.imm32(displacement),
            _ => {}
        }
    }

    /// One instruction: a prefix or 0, REX as needed, opcode bytes, operands. `bits` are REX bits that must be there
    /// (0x40 forces an empty one, for byte registers).
    pub(crate) fn op(&mut self, prefix: u8, bits: u8, opcode: &[u8], field: u8, place: Place) {
        if prefix != 0 {
            self.byte(prefix);
        }
        let rex = bits | extension(field, place);
        if rex != 0 {
            self.byte(0x40 | rex);
        }
        self.raw(opcode);
        self.operand(field, place);
    }

    /// A VEX-encoded instruction of map 2 (0F38) or 3 (0F3A), 64 bits wide.
    fn vex(&mut self, map: u8, pp: u8, opcode: u8, field: u8, second: u8, place: Place) {
        let rex = extension(field, place);
        let (r, x, b) = (rex >> 2 & 1, rex >> 1 & 1, rex & 1);
        self.raw(&[0xc4, (r ^ 1) << 7 | (x ^ 1) << 6 | (b ^ 1) << 5 | map, 0x80 | (!second & 15) << 3 | pp, opcode]);
        self.operand(field, place);
    }

    /// `mov to, from`
    pub(crate) fn mov(&mut self, to: u8, from: u8) {
        self.op(0, 8, &[0x8b], to, Place::Reg(from));
    }

    /// `mov to32, from32`
    pub(crate) fn mov_32(&mut self, to: u8, from: u8) {
        self.op(0, 0, &[0x8b], to, Place::Reg(from));
    }

    pub(crate) fn load(&mut self, to: u8, at: At) {
        self.op(0, 8, &[0x8b], to, Place::Mem(at));
    }

    pub(crate) fn load_32(&mut self, to: u8, at: At) {
        self.op(0, 0, &[0x8b], to, Place::Mem(at));
    }

    pub(crate) fn store(&mut self, at: At, from: u8) {
        self.op(0, 8, &[0x89], from, Place::Mem(at));
    }

    /// Stores a sign-extended 32-bit constant as 64 bits.
    pub(crate) fn store_constant(&mut self, at: At, value: i32) {
        self.op(0, 8, &[0xc7], 0, Place::Mem(at));
        self.imm32(value);
    }

    /// A constant in the shortest way; flags stay.
    pub(crate) fn constant(&mut self, to: u8, value: u64) {
        if let Ok(value) = u32::try_from(value) {
            if to > 7 {
                self.byte(0x41);
            }
            self.byte(0xb8 | to & 7);
            self.raw(&value.to_le_bytes());
        } else if let Ok(value) = i32::try_from(value as i64) {
            self.op(0, 8, &[0xc7], 0, Place::Reg(to));
            self.imm32(value);
        } else {
            self.byte(0x48 | to >> 3);
            self.byte(0xb8 | to & 7);
            self.raw(&value.to_le_bytes());
        }
    }

    pub(crate) fn lea(&mut self, to: u8, at: At) {
        self.op(0, 8, &[0x8d], to, Place::Mem(at));
    }

    /// `lea to32, at`: the sum, truncated to 32 bits.
    pub(crate) fn lea_32(&mut self, to: u8, at: At) {
        self.op(0, 0, &[0x8d], to, Place::Mem(at));
    }

    /// `rorx to, from, count`: flags stay.
    pub(crate) fn rotate_right(&mut self, to: u8, from: u8, count: u8) {
        self.vex(3, 3, 0xf0, to, 0, Place::Reg(from));
        self.byte(count);
    }

    /// `bextr to, from, bits`: flags are lost.
    pub(crate) fn extract_bits(&mut self, to: u8, from: u8, bits: u8) {
        self.vex(2, 0, 0xf7, to, bits, Place::Reg(from));
    }

    /// `shrx to, from, count`: flags stay.
    pub(crate) fn shift_right(&mut self, to: u8, from: u8, count: u8) {
        self.vex(2, 3, 0xf7, to, count, Place::Reg(from));
    }

    /// `not register`: flags stay.
    pub(crate) fn not(&mut self, register: u8) {
        self.op(0, 8, &[0xf7], 2, Place::Reg(register));
    }

    /// `pext to, from, mask`: flags stay.
    pub(crate) fn extract(&mut self, to: u8, from: u8, mask: u8) {
        self.vex(2, 2, 0xf5, to, from, Place::Reg(mask));
    }

    /// `pext to, from, [mask]`: flags stay.
    pub(crate) fn extract_at(&mut self, to: u8, from: u8, mask: At) {
        self.vex(2, 2, 0xf5, to, from, Place::Mem(mask));
    }

    /// `pdep to, from, mask`: flags stay.
    pub(crate) fn deposit(&mut self, to: u8, from: u8, mask: u8) {
        self.vex(2, 3, 0xf5, to, from, Place::Reg(mask));
    }

    pub(crate) fn test(&mut self, a: u8, b: u8) {
        self.op(0, 8, &[0x85], b, Place::Reg(a));
    }

    /// Tests the low byte of a register against a constant.
    pub(crate) fn test_byte(&mut self, register: u8, mask: u8) {
        self.op(0, 0x40, &[0xf6], 0, Place::Reg(register));
        self.byte(mask);
    }

    /// `test register32, mask`
    pub(crate) fn test_32(&mut self, register: u8, mask: i32) {
        self.op(0, 0, &[0xf7], 0, Place::Reg(register));
        self.imm32(mask);
    }

    /// `cmp register32, value`
    pub(crate) fn compare_32(&mut self, register: u8, value: i32) {
        self.op(0, 0, &[0x81], 7, Place::Reg(register));
        self.imm32(value);
    }

    /// `cmp dword at, value`
    pub(crate) fn compare_32_at(&mut self, at: At, value: i8) {
        self.op(0, 0, &[0x83], 7, Place::Mem(at));
        self.byte(value as u8);
    }

    /// `cmp qword at, value`
    pub(crate) fn compare_at(&mut self, at: At, value: i32) {
        self.op(0, 8, &[0x81], 7, Place::Mem(at));
        self.imm32(value);
    }

    /// `and register32, value`
    pub(crate) fn and_32(&mut self, register: u8, value: i32) {
        self.op(0, 0, &[0x81], 4, Place::Reg(register));
        self.imm32(value);
    }

    pub(crate) fn jmp(&mut self, label: Label) {
        self.byte(0xe9);
        self.fix(label, false);
    }

    /// `condition` is the low four bits of the opcode.
    pub(crate) fn jcc(&mut self, condition: u8, label: Label) {
        self.raw(&[0x0f, 0x80 | condition]);
        self.fix(label, false);
    }

    pub(crate) fn jmp_short(&mut self, label: Label) {
        self.byte(0xeb);
        self.fix(label, true);
    }

    pub(crate) fn jcc_short(&mut self, condition: u8, label: Label) {
        self.byte(0x70 | condition);
        self.fix(label, true);
    }

    /// Jumps where RCX is zero; flags stay. It reaches 127 bytes.
    pub(crate) fn jrcxz(&mut self, label: Label) {
        self.byte(0xe3);
        self.fix(label, true);
    }

    pub(crate) fn jmp_to(&mut self, target: u64) {
        self.byte(0xe9);
        self.relative(target);
    }

    pub(crate) fn call_to(&mut self, target: u64) {
        self.byte(0xe8);
        self.relative(target);
    }

    pub(crate) fn call(&mut self, label: Label) {
        self.byte(0xe8);
        self.fix(label, false);
    }

    pub(crate) fn jmp_at(&mut self, at: At) {
        self.op(0, 0, &[0xff], 4, Place::Mem(at));
    }

    pub(crate) fn jmp_register(&mut self, register: u8) {
        self.op(0, 0, &[0xff], 4, Place::Reg(register));
    }

    pub(crate) fn call_register(&mut self, register: u8) {
        self.op(0, 0, &[0xff], 2, Place::Reg(register));
    }

    pub(crate) fn push(&mut self, register: u8) {
        if register > 7 {
            self.byte(0x41);
        }
        self.byte(0x50 | register & 7);
    }

    pub(crate) fn pop(&mut self, register: u8) {
        if register > 7 {
            self.byte(0x41);
        }
        self.byte(0x58 | register & 7);
    }

    pub(crate) fn ret(&mut self) {
        self.byte(0xc3);
    }

    fn fix(&mut self, label: Label, short: bool) {
        self.fixups.push(Fixup { at: self.bytes.len() as u32, label, short });
        self.raw(if short { &[0] } else { &[0; 4] });
    }

    fn relative(&mut self, target: u64) {
        let distance = target.wrapping_sub(self.here() + 4);
        self.raw(&(distance as u32).to_le_bytes());
    }
}

fn displacement_mode(base: u8, displacement: i32) -> u8 {
    if displacement == 0 && base & 7 != 5 {
        0
    } else if i8::try_from(displacement).is_ok() {
        0x40
    } else {
        0x80
    }
}

/// REX.RXB for an operand pair.
pub(crate) fn extension(field: u8, place: Place) -> u8 {
    let (index, base) = match place {
        Place::Reg(rm) => (0, rm),
        Place::Mem(At::Base(base, _)) => (0, base),
        Place::Mem(At::Index(base, index, ..)) => (index, base),
        Place::Mem(At::Scaled(index, ..)) => (index, 0),
        Place::Mem(At::Absolute(_)) => (0, 0),
    };
    (field >> 3 & 1) << 2 | (index >> 3 & 1) << 1 | base >> 3 & 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Formatter as _, IntelFormatter};

    fn text(build: impl FnOnce(&mut Asm)) -> Vec<String> {
        let mut asm = Asm::new(0x1000);
        build(&mut asm);
        let bytes = asm.finish().unwrap();
        let mut formatter = IntelFormatter::new();
        Decoder::with_ip(64, &bytes, 0x1000, DecoderOptions::NONE)
            .into_iter()
            .map(|instruction| {
                let mut text = String::new();
                formatter.format(&instruction, &mut text);
                text
            })
            .collect()
    }

    #[test]
    fn operands_of_every_shape() {
        use reg::*;
        let lines = text(|asm| {
            asm.load(RAX, At::Base(R12, 0));
            asm.load(R9, At::Base(R13, 0));
            asm.store(At::Index(R15, RCX, 3, -28), R8);
            asm.load(RCX, At::Absolute(0x4000_0000));
            asm.jmp_at(At::Scaled(RCX, 3, 0x4000_0010));
            asm.lea(R11, At::Index(RBP, RBX, 1, 0x1234));
            asm.mov(R8, RSP);
            asm.lea_32(R11, At::Base(RSP, 4));
            asm.store_constant(At::Index(RCX, R11, 0, 0), -2);
        });
        let expected = [
            "mov rax,[r12]",
            "mov r9,[r13]",
            "mov [r15+rcx*8-1Ch],r8",
            "mov rcx,[40000000h]",
            "jmp qword ptr [rcx*8+40000010h]",
            "lea r11,[rbp+rbx*2+1234h]",
            "mov r8,rsp",
            "lea r11d,[rsp+4]",
            "mov qword ptr [rcx+r11],0FFFFFFFFFFFFFFFEh",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn constants_and_flagless_arithmetic() {
        use reg::*;
        let lines = text(|asm| {
            asm.constant(R10, 0xffff_ffff);
            asm.constant(RCX, -5_i64 as u64);
            asm.constant(R11, 0x1234_5678_9abc);
            asm.rotate_right(RCX, R11, 48);
            asm.extract_bits(RCX, R11, R15);
            asm.extract_at(RCX, R8, At::Absolute(0x40));
            asm.extract(RCX, R8, RCX);
            asm.deposit(R10, R10, RCX);
            asm.test_byte(R8, 7);
            asm.test_byte(RSI, 7);
        });
        let expected = [
            "mov r10d,0FFFFFFFFh",
            "mov rcx,0FFFFFFFFFFFFFFFBh",
            "mov r11,123456789ABCh",
            "rorx rcx,r11,30h",
            "bextr rcx,r11,r15",
            "pext rcx,r8,[40h]",
            "pext rcx,r8,rcx",
            "pdep r10,r10,rcx",
            "test r8b,7",
            "test sil,7",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn jumps_find_their_labels_and_short_ones_say_when_they_do_not_reach() {
        let lines = text(|asm| {
            let (start, end) = (asm.bound(), asm.label());
            asm.jrcxz(end);
            asm.jmp(start);
            asm.bind(end);
            asm.jcc(4, start);
            asm.call_to(0x2000);
        });
        let expected =
            ["jrcxz 0000000000001007h", "jmp 0000000000001000h", "je 0000000000001000h", "call 0000000000002000h"];
        assert_eq!(lines, expected);
        let mut asm = Asm::new(0);
        let far = asm.label();
        asm.jrcxz(far);
        asm.raw(&[0x90; 200]);
        asm.bind(far);
        assert!(asm.finish().is_none());
    }
}
