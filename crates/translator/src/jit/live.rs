//! Which status flags an instruction reads, and which it certainly replaces: where flags are not needed any more, the
//! checks of memory accesses may use them.

use iced_x86::{Instruction, Mnemonic, OpKind, RflagsBits};

/// CF, PF, AF, ZF, SF and OF as iced numbers them.
pub(super) const ALL: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// What an instruction does to status flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flags {
    /// Flags read.
    pub reads: u32,
    /// Flags whose old values are gone after it, whatever its operands are.
    pub replaces: u32,
}

impl Flags {
    pub(super) fn of(instruction: &Instruction) -> Self {
        Self { reads: reads(instruction), replaces: replaces(instruction) }
    }

    /// What all instructions of a form do; `None` where that depends on a constant: shifts and rotations.
    pub(super) fn of_form(instruction: &Instruction) -> Option<Self> {
        use Mnemonic::{Rcl, Rcr, Rol, Ror, Sal, Sar, Shl, Shld, Shr, Shrd};
        let turns = matches!(instruction.mnemonic(), Shl | Sal | Shr | Sar | Shld | Shrd | Rol | Ror | Rcl | Rcr);
        (!turns).then(|| Self::of(instruction))
    }
}

/// Flags read.
fn reads(instruction: &Instruction) -> u32 {
    instruction.rflags_read() & ALL
}

fn replaces(instruction: &Instruction) -> u32 {
    use Mnemonic::*;
    match instruction.mnemonic() {
        Add | Adc | Sub | Sbb | Cmp | Neg | Xadd | Cmpxchg | And | Or | Xor | Test | Popcnt | Andn | Blsi | Blsmsk
        | Blsr | Bzhi | Bextr | Comiss | Comisd | Ucomiss | Ucomisd | Vcomiss | Vcomisd | Vucomiss | Vucomisd
        | Ptest | Vptest => ALL,
        Inc | Dec => ALL & !RflagsBits::CF,
        Shl | Sal | Shr | Sar | Shld | Shrd if shifts(instruction) => ALL,
        // The others are undefined, and on some processors as they were.
        Imul | Mul => RflagsBits::CF | RflagsBits::OF,
        Bt | Bts | Btr | Btc | Clc | Stc | Cmc => RflagsBits::CF,
        Tzcnt | Lzcnt => RflagsBits::CF | RflagsBits::ZF,
        Sahf => ALL & !RflagsBits::OF,
        _ => 0,
    }
}

/// True for a shift by a constant that is not zero: a shift by nothing leaves all flags.
fn shifts(instruction: &Instruction) -> bool {
    let last = instruction.op_count() - 1;
    let width = if instruction.op0_register().size() == 8 || instruction.memory_size().size() == 8 { 63 } else { 31 };
    instruction.op_kind(last) == OpKind::Immediate8 && u32::from(instruction.immediate8()) & width != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    #[test]
    fn shifts_by_nothing_keep_flags_and_shifts_by_something_do_not() {
        let decode = |bytes: &[u8]| Decoder::new(64, bytes, DecoderOptions::AMD).decode();
        assert_eq!(replaces(&decode(&[0xc1, 0xe0, 0x20])), 0, "shl eax, 32");
        assert_eq!(replaces(&decode(&[0x48, 0xc1, 0xe0, 0x20])), ALL, "shl rax, 32");
        assert_eq!(replaces(&decode(&[0xd3, 0xe0])), 0, "shl eax, cl");
        assert_eq!(reads(&decode(&[0x11, 0xc8])), RflagsBits::CF, "adc eax, ecx");
        assert_eq!(reads(&decode(&[0x74, 0x00])), RflagsBits::ZF, "je");
    }
}
