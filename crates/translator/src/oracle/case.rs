//! One instruction with everything it starts from, and what became of it.

/// The code pages: three, readable and executable, filled with INT3.
pub(super) const CODE: u64 = 0x1234_5000;
pub(super) const CODE_BYTES: usize = 0x3000;
/// The data pages. Nothing is mapped before the first and after the last.
pub(super) const ARENA: u64 = 0x1367_8000;
pub(super) const ARENA_BYTES: usize = 0x4000;
/// Where data segments of 16-bit code begin: a page below the arena. They end a page above it.
pub(super) const DATA_BASE_16: u64 = ARENA - 0x1000;
pub(super) const DATA_LIMIT_16: u32 = ARENA_BYTES as u32 + 0x1fff;
/// The third data page may only be read.
pub(super) const READ_ONLY: u64 = ARENA + 0x2000;
/// x87, SSE and AVX state in the standard XSAVE format.
pub(super) const XSAVE_BYTES: usize = 832;
/// No exception.
pub(super) const NO_VECTOR: u64 = u64::MAX;

/// The code an instruction is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Code {
    /// 64-bit mode.
    Bits64 = 64,
    /// Compatibility mode, flat segments.
    Bits32 = 32,
    /// Compatibility mode, segments as 16-bit programs have them: based, short, with a 16-bit stack pointer.
    Bits16 = 16,
}

impl Code {
    /// Linear address of the code segment.
    pub(super) fn code_base(self) -> u64 {
        if self == Self::Bits16 { CODE } else { 0 }
    }

    /// Linear address of DS, ES and SS.
    pub(super) fn data_base(self) -> u64 {
        if self == Self::Bits16 { DATA_BASE_16 } else { 0 }
    }

    /// CS as Linux has it; the first entry of the LDT for 16-bit code.
    pub(super) fn code_selector(self) -> u16 {
        match self {
            Self::Bits64 => 0x33,
            Self::Bits32 => 0x23,
            Self::Bits16 => 0x07,
        }
    }

    /// DS, ES and SS.
    pub(super) fn data_selector(self) -> u16 {
        if self == Self::Bits16 { 0x0f } else { 0x2b }
    }
}

/// What an instruction starts from. The first two fields are read by assembly.
#[derive(Clone)]
#[repr(C, align(64))]
pub(super) struct Case {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15.
    pub gpr: [u64; 16],
    pub rflags: u64,
    /// Where the instruction stands, from the code segment's base.
    pub rip: u64,
    pub code: Code,
    pub bytes: [u8; 16],
    pub length: usize,
    /// The instruction looks at `xsave`.
    pub vector: bool,
    pub xsave: Xsave,
    pub memory: [u8; ARENA_BYTES],
}

/// What an instruction left behind.
#[derive(Clone)]
#[repr(C, align(64))]
pub(super) struct Outcome {
    pub gpr: [u64; 16],
    pub rflags: u64,
    pub rip: u64,
    /// Exception vector, or [`NO_VECTOR`].
    pub fault: u64,
    pub error: u64,
    /// Linear address of a page fault.
    pub address: u64,
    pub xsave: Xsave,
    pub memory: [u8; ARENA_BYTES],
}

#[derive(Clone)]
#[repr(C, align(64))]
pub(super) struct Xsave(pub [u8; XSAVE_BYTES]);

impl Xsave {
    /// The state after reset, with all three components present.
    pub(super) const fn reset() -> Self {
        let mut bytes = [0; XSAVE_BYTES];
        bytes[0] = 0x7f;
        bytes[1] = 0x03;
        bytes[24] = 0x80;
        bytes[25] = 0x1f;
        bytes[512] = 7;
        Self(bytes)
    }
}

impl Case {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// Where the instruction stands, from [`CODE`].
    pub(super) fn place(&self) -> usize {
        (self.rip + self.code.code_base() - CODE) as usize
    }
}

impl Outcome {
    pub(super) fn new() -> Self {
        Self {
            gpr: [0; 16],
            rflags: 0,
            rip: 0,
            fault: NO_VECTOR,
            error: 0,
            address: 0,
            xsave: Xsave::reset(),
            memory: [0; ARENA_BYTES],
        }
    }
}
