//! An assembler for the few instruction shapes that translated code is made of.
//!
//! It writes bytes; nothing is looked up. Registers are numbers as instructions encode them. Everything is 64-bit unless
//! the name says otherwise. Jumps go to labels of the same piece of code, or to absolute addresses within 2 GiB.

pub(crate) use super::operand::{At, Constant, Operand, Place};

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

/// How many bytes are written at a time, whether all are needed or not; the next are written over the rest.
const ROOM: usize = 16;
/// Most bytes of a piece of code: what is noted about blocks has 16 bits for them.
const MOST: usize = 1 << 16;

/// A piece of code under construction.
#[derive(Default)]
pub(crate) struct Asm {
    /// The code, and room for more.
    bytes: Vec<u8>,
    /// Where the code ends.
    end: u32,
    base: u64,
    /// How many bytes run there, and where the rest does.
    rest: Option<(usize, u64)>,
    labels: Vec<u32>,
    fixups: Vec<Fixup>,
    /// A short jump did not reach, or there is too much of it: the code is of no use.
    broken: bool,
}

/// What comes before an instruction's operands: REX bits that must be there (0x40 forces an empty one, for byte registers),
/// and opcode bytes, the first one lowest.
#[derive(Clone, Copy)]
struct Form {
    opcode: u32,
    length: u8,
    bits: u8,
}

/// A few instructions that are often written one after the other, ready made: none of them leads anywhere.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ready {
    bytes: [u8; ROOM],
    length: u8,
}

impl Ready {
    pub(crate) fn new(write: impl FnOnce(&mut Asm)) -> Self {
        let mut asm = Asm { bytes: vec![0; 2 * ROOM], ..Asm::default() };
        write(&mut asm);
        let mut ready = Self { length: asm.end as u8, ..Self::default() };
        ready.bytes[..asm.len()].copy_from_slice(asm.parts().0);
        ready
    }
}

impl Asm {
    /// Code that will run at `base`.
    pub(crate) fn new(base: u64) -> Self {
        Self { bytes: vec![0; MOST + ROOM], base, ..Self::default() }
    }

    /// Begins anew, with code that will run at `base`.
    pub(crate) fn restart(&mut self, base: u64) {
        self.bytes.resize(MOST + ROOM, 0);
        self.labels.clear();
        self.fixups.clear();
        (self.end, self.base, self.rest, self.broken) = (0, base, None, false);
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> usize {
        self.end as usize
    }

    /// Where the next byte will run.
    pub(crate) fn here(&self) -> u64 {
        self.address(self.len())
    }

    /// The rest of the code will run at `base`. What was before does not run on into it.
    pub(crate) fn go_on_at(&mut self, base: u64) {
        self.rest = Some((self.len(), base));
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
        let good = self.resolve_all();
        self.bytes.truncate(self.end as usize);
        good.then_some(self.bytes)
    }

    /// Finishes the code. False where a short jump did not reach.
    pub(crate) fn resolve_all(&mut self) -> bool {
        // How far behind its place in `bytes` the rest runs.
        let (start, moved) = match self.rest {
            Some((start, base)) => (start as u32, base.wrapping_sub(self.base + start as u64) as u32),
            None => (u32::MAX, 0),
        };
        for &Fixup { at, label, short } in &self.fixups {
            let target = self.labels[label.0 as usize];
            debug_assert_ne!(target, UNBOUND);
            if short {
                let distance = i8::try_from(i64::from(target) - i64::from(at) - 1);
                self.broken |= distance.is_err();
                self.bytes[at as usize] = distance.unwrap_or(0) as u8;
                continue;
            }
            let moved_by = |place: u32| if place >= start { moved } else { 0 };
            let distance = target.wrapping_add(moved_by(target)).wrapping_sub(at + 4).wrapping_sub(moved_by(at));
            if let Some(place) = self.bytes.get_mut(at as usize..at as usize + 4) {
                place.copy_from_slice(&distance.to_le_bytes());
            }
        }
        !self.broken
    }

    /// The code, and what of it runs elsewhere.
    pub(crate) fn parts(&self) -> (&[u8], &[u8]) {
        self.bytes[..self.len()].split_at(self.rest.map_or(self.len(), |(start, _)| start))
    }

    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(UNBOUND);
        Label(self.labels.len() as u32 - 1)
    }

    /// Says that `label` is here.
    pub(crate) fn bind(&mut self, label: Label) {
        self.labels[label.0 as usize] = self.end;
    }

    /// A label that is here.
    pub(crate) fn bound(&mut self) -> Label {
        let label = self.label();
        self.bind(label);
        label
    }

    /// Writes something into the room behind the code, of which so many bytes stay.
    #[inline(always)]
    fn write(&mut self, length: usize, write: impl Fn(&mut [u8; ROOM])) {
        let end = self.end as usize;
        match self.bytes.get_mut(end..end + ROOM).and_then(|room| room.as_mut_array()) {
            Some(room) => {
                write(room);
                self.end += length as u32;
            }
            None => self.broken = true,
        }
    }

    /// Writes the low bytes of a number, 8 at most.
    #[inline(always)]
    fn put(&mut self, bytes: u64, length: usize) {
        self.write(length, |room| room[..8].copy_from_slice(&bytes.to_le_bytes()));
    }

    /// Writes the low bytes of two numbers, one behind the other: 7 at most, and 8.
    #[inline(always)]
    fn put_two(&mut self, first: (u64, u8), second: (u64, u8)) {
        self.write((first.1 + second.1).into(), |room| {
            room[..8].copy_from_slice(&first.0.to_le_bytes());
            room[usize::from(first.1 & 7)..][..8].copy_from_slice(&second.0.to_le_bytes());
        });
    }

    pub(crate) fn ready(&mut self, ready: &Ready) {
        self.write(ready.length.into(), |room| *room = ready.bytes);
    }

    #[inline]
    pub(crate) fn byte(&mut self, byte: u8) {
        self.put(byte.into(), 1);
    }

    #[inline]
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(ROOM) {
            self.write(piece.len(), |room| room[..piece.len()].copy_from_slice(piece));
        }
    }

    /// Goes on at a multiple of `bytes`. The code before does not run on.
    pub(crate) fn align(&mut self, bytes: u64) {
        while !self.broken && !self.here().is_multiple_of(bytes) {
            self.byte(0x90);
        }
    }

    /// One instruction: a prefix or 0, REX as needed, opcode bytes, operands. `bits` are REX bits that must be there
    /// (0x40 forces an empty one, for byte registers).
    #[inline(always)]
    pub(crate) fn op<const N: usize>(&mut self, prefix: u8, bits: u8, opcode: &[u8; N], field: u8, place: Place) {
        self.op_with(prefix, bits, opcode, field, place, Constant::NONE);
    }

    #[inline(always)]
    fn op_with<const N: usize>(
        &mut self,
        prefix: u8,
        bits: u8,
        opcode: &[u8; N],
        field: u8,
        place: Place,
        constant: Constant,
    ) {
        if prefix != 0 {
            self.byte(prefix);
        }
        let opcode = opcode.iter().rev().fold(0, |all, byte| all << 8 | u32::from(*byte));
        self.instruction(Form { opcode, length: N as u8, bits }, field, place);
        if constant.length != 0 {
            self.put_constant(constant);
        }
    }

    fn instruction(&mut self, form: Form, field: u8, place: Place) {
        let operand = Operand::new(field, place);
        let rex = form.bits | operand.extension;
        let opcode = u64::from(form.opcode);
        if rex != 0 {
            self.complete(u64::from(0x40 | rex) | opcode << 8, form.length + 1, operand);
        } else {
            self.complete(opcode, form.length, operand);
        }
    }

    /// Writes an instruction, of which all but the operands is there, as far as those.
    #[inline(always)]
    pub(crate) fn complete(&mut self, head: u64, length: u8, operand: Operand) {
        self.put_two((head, length), (operand.bytes, operand.length));
    }

    /// Writes what an instruction begins or ends with.
    #[inline(always)]
    pub(crate) fn put_constant(&mut self, constant: Constant) {
        self.put(constant.value.into(), constant.length.into());
    }

    /// A VEX-encoded instruction of map 2 (0F38) or 3 (0F3A), 64 bits wide.
    fn vex(&mut self, (map, pp, opcode): (u8, u8, u8), field: u8, second: u8, place: Place) {
        self.vex_with((map, pp, opcode), field, second, place, Constant::NONE);
    }

    fn vex_with(&mut self, (map, pp, opcode): (u8, u8, u8), field: u8, second: u8, place: Place, constant: Constant) {
        let operand = Operand::new(field, place);
        let head = vex(operand.extension, map, 0x80 | (!second & 15) << 3 | pp, opcode);
        self.complete(head, VEX_BYTES, operand);
        self.put_constant(constant);
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
        self.op_with(0, 8, &[0xc7], 0, Place::Mem(at), Constant::word(value as u32));
    }

    /// `mov to32, value`
    #[inline]
    pub(crate) fn constant_32(&mut self, to: u8, value: u32) {
        let all = low_constant(to, value);
        if to > 7 { self.put(0x41 | all << 8, 6) } else { self.put(all, 5) }
    }

    /// A constant in the shortest way; flags stay.
    pub(crate) fn constant(&mut self, to: u8, value: u64) {
        if let Ok(value) = u32::try_from(value) {
            self.constant_32(to, value);
        } else if let Ok(value) = i32::try_from(value as i64) {
            self.op_with(0, 8, &[0xc7], 0, Place::Reg(to), Constant::word(value as u32));
        } else {
            self.put(u64::from(0x48 | to >> 3) | u64::from(0xb8 | to & 7) << 8, 2);
            self.put(value, 8);
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
        self.vex_with((3, 3, 0xf0), to, 0, Place::Reg(from), Constant::byte(count));
    }

    /// `bextr to, from, bits`: flags are lost.
    pub(crate) fn extract_bits(&mut self, to: u8, from: u8, bits: u8) {
        self.vex((2, 0, 0xf7), to, bits, Place::Reg(from));
    }

    /// `shrx to, from, count`: flags stay.
    pub(crate) fn shift_right(&mut self, to: u8, from: u8, count: u8) {
        self.vex((2, 3, 0xf7), to, count, Place::Reg(from));
    }

    /// `not register`: flags stay.
    pub(crate) fn not(&mut self, register: u8) {
        self.op(0, 8, &[0xf7], 2, Place::Reg(register));
    }

    /// `pext to, from, mask`: flags stay.
    pub(crate) fn extract(&mut self, to: u8, from: u8, mask: u8) {
        self.vex((2, 2, 0xf5), to, from, Place::Reg(mask));
    }

    /// `pext to, from, [mask]`: flags stay.
    pub(crate) fn extract_at(&mut self, to: u8, from: u8, mask: At) {
        self.vex((2, 2, 0xf5), to, from, Place::Mem(mask));
    }

    /// `pdep to, from, mask`: flags stay.
    pub(crate) fn deposit(&mut self, to: u8, from: u8, mask: u8) {
        self.vex((2, 3, 0xf5), to, from, Place::Reg(mask));
    }

    pub(crate) fn test(&mut self, a: u8, b: u8) {
        self.op(0, 8, &[0x85], b, Place::Reg(a));
    }

    /// Tests the low byte of a register against a constant.
    pub(crate) fn test_byte(&mut self, register: u8, mask: u8) {
        self.op_with(0, 0x40, &[0xf6], 0, Place::Reg(register), Constant::byte(mask));
    }

    /// `test register32, mask`
    pub(crate) fn test_32(&mut self, register: u8, mask: i32) {
        self.op_with(0, 0, &[0xf7], 0, Place::Reg(register), Constant::word(mask as u32));
    }

    /// `cmp register32, value`
    pub(crate) fn compare_32(&mut self, register: u8, value: i32) {
        self.op_with(0, 0, &[0x81], 7, Place::Reg(register), Constant::word(value as u32));
    }

    /// `cmp dword at, value`
    pub(crate) fn compare_32_at(&mut self, at: At, value: i8) {
        self.op_with(0, 0, &[0x83], 7, Place::Mem(at), Constant::byte(value as u8));
    }

    /// `cmp qword at, value`
    pub(crate) fn compare_at(&mut self, at: At, value: i32) {
        self.op_with(0, 8, &[0x81], 7, Place::Mem(at), Constant::word(value as u32));
    }

    /// `and register32, value`
    pub(crate) fn and_32(&mut self, register: u8, value: i32) {
        self.op_with(0, 0, &[0x81], 4, Place::Reg(register), Constant::word(value as u32));
    }

    pub(crate) fn jmp(&mut self, label: Label) {
        self.put(0xe9, 5);
        self.fix(label);
    }

    /// `condition` is the low four bits of the opcode.
    pub(crate) fn jcc(&mut self, condition: u8, label: Label) {
        self.put(0x800f | u64::from(condition) << 8, 6);
        self.fix(label);
    }

    pub(crate) fn jmp_short(&mut self, label: Label) {
        self.put(0xeb, 2);
        self.fix_short(label);
    }

    pub(crate) fn jcc_short(&mut self, condition: u8, label: Label) {
        self.put(0x70 | u64::from(condition), 2);
        self.fix_short(label);
    }

    /// Jumps where RCX is zero; flags stay. It reaches 127 bytes.
    pub(crate) fn jrcxz(&mut self, label: Label) {
        self.put(0xe3, 2);
        self.fix_short(label);
    }

    pub(crate) fn jmp_to(&mut self, target: u64) {
        self.put(self.branch_to(0xe9, target, 0), 5);
    }

    pub(crate) fn call_to(&mut self, target: u64) {
        self.put(self.branch_to(0xe8, target, 0), 5);
    }

    /// `mov to32, value; jmp target`, for one of the first eight registers.
    pub(crate) fn jmp_with(&mut self, to: u8, value: u32, target: u64) {
        self.put_two((low_constant(to, value), 5), (self.branch_to(0xe9, target, 5), 5));
    }

    /// `mov to32, value; call target`, for one of the first eight registers.
    pub(crate) fn call_with(&mut self, to: u8, value: u32, target: u64) {
        self.put_two((low_constant(to, value), 5), (self.branch_to(0xe8, target, 5), 5));
    }

    pub(crate) fn call(&mut self, label: Label) {
        self.put(0xe8, 5);
        self.fix(label);
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
        self.short(0x50, register);
    }

    pub(crate) fn pop(&mut self, register: u8) {
        self.short(0x58, register);
    }

    /// An instruction whose opcode has a register in it.
    fn short(&mut self, opcode: u8, register: u8) {
        let opcode = u64::from(opcode | register & 7);
        if register > 7 { self.put(0x41 | opcode << 8, 2) } else { self.put(opcode, 1) }
    }

    pub(crate) fn ret(&mut self) {
        self.byte(0xc3);
    }

    /// The displacement just written is to lead to a label.
    fn fix(&mut self, label: Label) {
        self.fixups.push(Fixup { at: self.end - 4, label, short: false });
    }

    fn fix_short(&mut self, label: Label) {
        self.fixups.push(Fixup { at: self.end - 1, label, short: true });
    }

    /// A branch to an address, from so many bytes further on.
    fn branch_to(&self, opcode: u64, target: u64, ahead: u64) -> u64 {
        let distance = target.wrapping_sub(self.here() + ahead + 5) as u32;
        opcode | u64::from(distance) << 8
    }
}

/// `mov to32, value`, but for REX.
fn low_constant(to: u8, value: u32) -> u64 {
    u64::from(0xb8 | to & 7) | u64::from(value) << 8
}

/// Bytes of a VEX prefix and an opcode.
pub(crate) const VEX_BYTES: u8 = 4;

/// A VEX prefix of three bytes and an opcode; `extension` is REX.RXB of the operands, `last` the third byte.
#[inline(always)]
pub(crate) fn vex(extension: u8, map: u8, last: u8, opcode: u8) -> u64 {
    u32::from_le_bytes([0xc4, (extension ^ 7) << 5 | map, last, opcode]).into()
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

    #[test]
    fn code_that_is_too_long_is_of_no_use_and_the_next_is() {
        let mut asm = Asm::new(0);
        for _ in 0..MOST / 4 + ROOM {
            asm.raw(&[0x90; 4]);
        }
        asm.call_to(0);
        assert!(!asm.resolve_all());
        asm.restart(0);
        asm.constant(reg::R10, 7);
        assert!(asm.resolve_all());
        assert_eq!(asm.parts(), (&[0x41, 0xba, 7, 0, 0, 0][..], &[][..]));
    }
}
