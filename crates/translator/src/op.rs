//! What a decoded instruction is: a handler and its operands.

use crate::cpu::Cpu;

/// Why a handler did not simply finish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leave {
    /// An exception is in [`Cpu::exception`]; the instruction did not happen.
    Raised,
    /// As [`Leave::Raised`], met by a task switch that can no longer be undone: RIP is that of the new task, whose
    /// exception it is.
    RaisedInTask,
    /// The instruction is done (RIP is the handler's business): look at the machine before the next one.
    Boundary,
    /// The instruction is not done, but made progress (REP): look at the machine, then start it again.
    Again,
    /// Translated code is to be left before the instruction, for the loop to run it.
    Monitor,
}

/// What a handler returns.
pub(crate) type Done = Result<(), Leave>;

/// Executes one decoded instruction. On entry RIP holds the address after the block's last instruction; handlers that
/// need the address after their own use [`Op::next`].
pub(crate) type Handler = fn(&mut Cpu, &Op) -> Done;

/// [`Op::reg`] where the operand is no general-purpose register.
pub(crate) const NO_REG: u8 = 0xff;

/// How a memory operand's address is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AddressForm {
    /// 64-bit: disp (absolute or RIP-relative, resolved).
    Absolute,
    /// 64-bit: base + disp, flat.
    Base,
    /// 64-bit: base + index * scale + disp, flat.
    BaseIndex,
    /// Everything else: FS/GS base, 16- and 32-bit addresses, segmented modes.
    General,
}

/// A memory operand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mem {
    /// How the address is computed.
    pub form: AddressForm,
    /// Segment register number, override applied.
    pub segment: u8,
    /// Base register number, or [`NO_REG`].
    pub base: u8,
    /// Index register number, or [`NO_REG`].
    pub index: u8,
    /// log2 of the index's factor.
    pub scale: u8,
    /// log2 of the address size in bytes: 1, 2 or 3.
    pub address_size: u8,
    /// Displacement; the whole address where there is no base and no index.
    pub disp: u64,
}

impl Mem {
    /// No memory operand.
    pub(crate) const NONE: Self = Self {
        form: AddressForm::Absolute,
        segment: 3,
        base: NO_REG,
        index: NO_REG,
        scale: 0,
        address_size: 3,
        disp: 0,
    };
}

/// A decoded instruction. Operands by position: `reg[n]` where operand n is a general-purpose register, `mem` where one
/// is memory, `imm` where one is an immediate.
#[derive(Clone, Copy)]
pub(crate) struct Op {
    /// What it does.
    pub handler: Handler,
    /// The address of the next instruction (truncated to the code size).
    pub next: u64,
    /// The immediate, sign-extended; a near branch's target; handlers may pack more here.
    pub imm: u64,
    /// The memory operand.
    pub mem: Mem,
    /// Registers by operand position, as byte offsets into the register file (AH is 1), or [`NO_REG`].
    pub reg: [u8; 4],
    /// Bytes, 1..=15.
    pub length: u8,
    /// log2 of the operand size in bytes, for handlers that serve several.
    pub size: u8,
    /// Prefixes and the like that handlers ask about; see the constants. Above them, what the instruction leaves for
    /// (`trap.rs`).
    pub prefixes: u8,
}

/// LOCK prefix.
pub(crate) const LOCK: u8 = 1 << 0;
/// REP or REPE prefix.
pub(crate) const REP: u8 = 1 << 1;
/// REPNE prefix.
pub(crate) const REPNE: u8 = 1 << 2;

impl Op {
    /// The address of this instruction. `next` was truncated to the code size, and so is this.
    pub(crate) fn address(&self, code_mask: u64) -> u64 {
        self.next.wrapping_sub(self.length.into()) & code_mask
    }
}
