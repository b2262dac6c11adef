//! One instruction with everything it starts from, and what became of it.

/// The code pages: three, readable and executable, filled with INT3.
pub(super) const CODE: u64 = 0x1234_5000;
pub(super) const CODE_BYTES: usize = 0x3000;
/// The data pages. Nothing is mapped before the first and after the last.
pub(super) const ARENA: u64 = 0x1367_8000;
pub(super) const ARENA_BYTES: usize = 0x4000;
/// The third data page may only be read.
pub(super) const READ_ONLY: u64 = ARENA + 0x2000;
/// x87, SSE and AVX state in the standard XSAVE format.
pub(super) const XSAVE_BYTES: usize = 832;
/// No exception.
pub(super) const NO_VECTOR: u64 = u64::MAX;

/// What an instruction starts from. The first three fields are read by assembly.
#[derive(Clone)]
#[repr(C, align(64))]
pub(super) struct Case {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15.
    pub gpr: [u64; 16],
    pub rflags: u64,
    /// Where the instruction stands.
    pub rip: u64,
    pub code: [u8; 16],
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
        &self.code[..self.length]
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
