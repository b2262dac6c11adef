//! Operands of host instructions, and their bytes: ModRM, SIB, displacement (Intel SDM vol. 2, 2.1.5).

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

/// A constant behind an instruction's operands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Constant {
    pub value: u32,
    /// Bytes of it, 4 at most; the others mean nothing.
    pub length: u8,
}

impl Constant {
    pub(crate) const NONE: Self = Self { value: 0, length: 0 };

    pub(crate) fn byte(value: u8) -> Self {
        Self { value: value.into(), length: 1 }
    }

    pub(crate) fn word(value: u32) -> Self {
        Self { value, length: 4 }
    }
}

/// An operand pair, encoded.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    /// ModRM, SIB and displacement, the first lowest; what is above them means nothing.
    pub bytes: u64,
    /// How many bytes that are: 6 at most.
    pub length: u8,
    /// REX.RXB.
    pub extension: u8,
}

impl Operand {
    #[inline(always)]
    pub(crate) fn new(field: u8, place: Place) -> Self {
        let (reg, r) = ((field & 7) << 3, (field >> 3 & 1) << 2);
        let with_sib = |modrm: u8, sib: u8, displacement: i32| {
            u64::from(modrm) | u64::from(sib) << 8 | u64::from(displacement as u32) << 16
        };
        match place {
            Place::Reg(rm) => Self { bytes: (0xc0 | reg | rm & 7).into(), length: 1, extension: r | rm >> 3 & 1 },
            Place::Mem(At::Base(base, displacement)) => {
                let (mode, length) = shortest(base, displacement);
                let (modrm, extension) = (mode | reg | base & 7, r | base >> 3 & 1);
                if base & 7 == 4 {
                    return Self { bytes: with_sib(modrm, 0x24, displacement), length: 2 + length, extension };
                }
                let bytes = u64::from(modrm) | u64::from(displacement as u32) << 8;
                Self { bytes, length: 1 + length, extension }
            }
            Place::Mem(At::Index(base, index, scale, displacement)) => {
                let (mode, length) = shortest(base, displacement);
                let sib = scale << 6 | (index & 7) << 3 | base & 7;
                let extension = r | (index >> 3 & 1) << 1 | base >> 3 & 1;
                Self { bytes: with_sib(mode | reg | 4, sib, displacement), length: 2 + length, extension }
            }
            Place::Mem(At::Scaled(index, scale, displacement)) => {
                let sib = scale << 6 | (index & 7) << 3 | 5;
                let extension = r | (index >> 3 & 1) << 1;
                Self { bytes: with_sib(reg | 4, sib, displacement), length: 6, extension }
            }
            Place::Mem(At::Absolute(displacement)) => {
                Self { bytes: with_sib(reg | 4, 0x25, displacement), length: 6, extension: r }
            }
        }
    }
}

/// ModRM.mod, and how many bytes of displacement that takes, at least.
#[inline(always)]
fn shortest(base: u8, displacement: i32) -> (u8, u8) {
    if displacement == 0 && base & 7 != 5 {
        (0, 0)
    } else if i8::try_from(displacement).is_ok() {
        (0x40, 1)
    } else {
        (0x80, 4)
    }
}
