//! Machine code for one guest instruction: the instruction itself with its operands moved to fixed places, between loads
//! and stores of the registers it uses.
//!
//! ```text
//!   guest   vaddps ymm9, ymm2, [rax+rcx*8]        pinsrb xmm4, edi, 3
//!   stub    load ymm2, ymm3 from vectors[0..=1]   load xmm1 from vectors[0], rax from general
//!           vaddps ymm1, ymm2, [r9]               pinsrb xmm1, eax, 3
//!           store ymm1 to vectors[0]              store xmm1 to vectors[0]
//! ```
//!
//! Operand n uses vector register n + 1 and finds its value through a pointer, so that code does not depend on which
//! registers the guest chose, and the number of different stubs is bounded by the instruction set alone. XMM0 stays free
//! for the instructions that name it implicitly (its pointer is the fourth).

use std::mem::offset_of;

use iced_x86::code_asm::{
    AsmRegisterXmm, AsmRegisterYmm, CodeAssembler, dword_ptr, esi, qword_ptr, r9, rax, rcx, rdi, rdx, rsi, xmm0, xmm1,
    xmm2, xmm3, xmm4, xmmword_ptr, ymm0, ymm1, ymm2, ymm3, ymm4,
};
use iced_x86::{
    Code, CodeSize, EncodingKind, IcedError, Instruction, InstructionInfoFactory, MemoryOperand, Mnemonic, OpAccess,
    OpKind, Register, RflagsBits,
};

use crate::vector::registers::TO_HIGH;

/// True where the memory operand must lie on a multiple of its size (SDM vol. 1, 10.4.1.1 and 14.9).
pub(crate) fn needs_alignment(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let mnemonic = instruction.mnemonic();
    if instruction.encoding() == EncodingKind::VEX {
        return matches!(mnemonic, Vmovntdqa | Vmovntdq | Vmovntpd | Vmovntps | Vmovaps | Vmovapd | Vmovdqa);
    }
    let exempt = matches!(
        mnemonic,
        Pcmpestri | Pcmpestri64 | Pcmpestrm | Pcmpestrm64 | Pcmpistri | Pcmpistrm | Movups | Movupd | Movdqu | Lddqu
    );
    instruction.memory_size().size() == 16 && !exempt
}

/// What a stub gets. It must not be moved or outlived by what its pointers name while the stub runs.
#[repr(C)]
pub(super) struct Frame {
    /// By operand position, where each vector register's low half lies in the XSAVE area; MMX registers likewise.
    pub vectors: [*mut u8; 4],
    /// The general-purpose register operand, or the whole file where the instruction names registers implicitly.
    pub general: *mut u8,
    /// The memory operand.
    pub memory: *mut u8,
    /// RFLAGS before, where the instruction reads them, and after.
    pub flags: u64,
    /// MXCSR to run with: all exceptions masked, no flag set.
    pub mxcsr: u32,
    /// Exception flags that must not be raised: where one is, no register is written.
    pub forbidden: u32,
    /// MXCSR after.
    pub raised: u32,
    /// MXCSR of the host.
    pub host_mxcsr: u32,
}

/// Where a general-purpose register operand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum General {
    /// There is none.
    None,
    /// The operand at this position.
    Operand(u8),
    /// RAX, RDX in, RCX out: the string comparisons.
    Implicit,
}

/// What the memory operand is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    /// There is none.
    None,
    /// Read.
    Load,
    /// Written.
    Store,
}

/// An instruction with its operands in their fixed places, and what has to happen around it.
#[derive(Clone, Debug)]
pub(super) struct Recipe {
    /// The instruction to run.
    pub instruction: Instruction,
    /// Where GPR operands are.
    pub general: General,
    /// The memory operand's use.
    pub memory: Memory,
    /// Its size in bytes.
    pub bytes: u8,
    /// It writes status flags.
    pub flags_out: bool,
    /// It reads status flags.
    pub flags_in: bool,
    /// It looks at MXCSR and may raise SIMD floating-point exceptions.
    pub float: bool,
    /// It uses MMX registers.
    pub mmx: bool,
    /// An x87 instruction: all of the FPU is loaded and stored.
    pub x87: bool,
    /// The general-purpose register operand is written.
    general_out: bool,
    /// Registers to load, `(position in Frame::vectors, register)`.
    loads: Vec<(usize, Register)>,
    /// Register to store.
    store: Option<(usize, Register)>,
}

/// The status flags as iced names them (x87 condition codes are there too).
const STATUS: u32 = RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;
const MEMORY: Register = Register::R9;
/// The vector pointer of implicit XMM0.
pub(super) const IMPLICIT: usize = 3;

impl Recipe {
    /// The recipe for an instruction with vector or x87 operands; `None` where it has an operand that no recipe covers.
    pub(super) fn new(original: &Instruction, infos: &mut InstructionInfoFactory) -> Option<Self> {
        let info = infos.info(original);
        let mut recipe = Self {
            instruction: *original,
            general: General::None,
            memory: Memory::None,
            bytes: original.memory_size().size() as u8,
            flags_out: original.rflags_modified() & STATUS != 0,
            flags_in: original.rflags_read() & STATUS != 0,
            float: reads_mxcsr(original.mnemonic()),
            mmx: false,
            x87: format!("{:?}", original.mnemonic()).starts_with('F'),
            general_out: false,
            loads: Vec::new(),
            store: None,
        };
        let fixed = &mut recipe.instruction;
        fixed.set_code_size(CodeSize::Code64);
        fixed.set_has_rep_prefix(false);
        fixed.set_has_repne_prefix(false);
        fixed.set_has_lock_prefix(false);
        fixed.set_segment_prefix(Register::None);
        for position in 0..original.op_count() {
            let access = info.op_access(position);
            let writes = !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::None);
            // What a legacy instruction "writes" it may write in part; only VEX replaces all of a register.
            let write_only = access == OpAccess::Write;
            let vex = original.encoding() == EncodingKind::VEX;
            let slot = position as usize;
            match original.op_kind(position) {
                OpKind::Register => {
                    let register = original.op_register(position);
                    let place = match () {
                        () if register.is_xmm() || register.is_ymm() || register.is_mm() => {
                            recipe.mmx |= register.is_mm();
                            let place = first_of_kind(register) + (position + 1);
                            if !(write_only && vex) {
                                recipe.loads.push((slot, place));
                            }
                            if writes {
                                recipe.store = Some((slot, place));
                            }
                            place
                        }
                        () if register.is_st() => register,
                        () if register.is_gpr32() || register.is_gpr64() => {
                            recipe.general = General::Operand(position as u8);
                            recipe.general_out = writes;
                            if register.is_gpr32() { Register::EAX } else { Register::RAX }
                        }
                        () => return None,
                    };
                    fixed.set_op_register(position, place);
                }
                OpKind::Memory => {
                    recipe.memory = if writes { Memory::Store } else { Memory::Load };
                    fixed.set_memory_base(MEMORY);
                    fixed.set_memory_index(Register::None);
                    fixed.set_memory_index_scale(1);
                    fixed.set_memory_displ_size(0);
                    fixed.set_memory_displacement64(0);
                }
                OpKind::Immediate8 => {}
                _ => return None,
            }
        }
        recipe.implicit(original);
        Some(recipe)
    }

    fn implicit(&mut self, original: &Instruction) {
        use Mnemonic::*;
        match original.mnemonic() {
            Pcmpestri | Pcmpestri64 | Pcmpistri | Vpcmpestri | Vpcmpestri64 | Vpcmpistri => {
                self.general = General::Implicit;
                self.general_out = true;
            }
            Pcmpestrm | Pcmpestrm64 | Pcmpistrm | Vpcmpestrm | Vpcmpestrm64 | Vpcmpistrm => {
                self.general = General::Implicit;
                self.store = Some((IMPLICIT, Register::XMM0));
            }
            Blendvpd | Blendvps | Pblendvb | Sha256rnds2 if original.op_count() == 2 => {
                self.loads.push((IMPLICIT, Register::XMM0));
            }
            _ => {}
        }
    }

    /// See [`needs_alignment`].
    pub(super) fn aligned(&self) -> bool {
        needs_alignment(&self.instruction)
    }

    /// True for the VEX encoding, which clears what it does not write of a vector register.
    fn vex(&self) -> bool {
        self.instruction.encoding() == EncodingKind::VEX
    }

    /// The machine code: a function of one argument, a pointer to a [`Frame`].
    pub(super) fn assemble(&self) -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(64)?;
        if self.memory != Memory::None {
            a.mov(r9, qword_ptr(rdi + offset_of!(Frame, memory)))?;
        }
        if self.x87 {
            self.x87_body(&mut a)?
        } else {
            self.vector_body(&mut a)?
        }
        a.ret()?;
        a.assemble(0)
    }

    fn x87_body(&self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        a.mov(rsi, qword_ptr(rdi + offset_of!(Frame, vectors)))?;
        a.fxrstor64(rsi + 0)?;
        if self.flags_in {
            a.push(qword_ptr(rdi + offset_of!(Frame, flags)))?;
            a.popfq()?;
        }
        a.add_instruction(self.instruction)?;
        if self.flags_out {
            a.pushfq()?;
            a.pop(qword_ptr(rdi + offset_of!(Frame, flags)))?;
        }
        a.fxsave64(rsi + 0)?;
        a.fninit()?;
        a.ldmxcsr(dword_ptr(rdi + offset_of!(Frame, host_mxcsr)))
    }

    fn vector_body(&self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        for &(slot, register) in &self.loads {
            self.load(a, slot, register)?;
        }
        self.load_general(a)?;
        if self.float {
            a.ldmxcsr(dword_ptr(rdi + offset_of!(Frame, mxcsr)))?;
        }
        a.add_instruction(self.instruction)?;
        if self.flags_out {
            a.pushfq()?;
            a.pop(qword_ptr(rdi + offset_of!(Frame, flags)))?;
        }
        let mut done = a.create_label();
        if self.float {
            a.stmxcsr(dword_ptr(rdi + offset_of!(Frame, raised)))?;
            a.ldmxcsr(dword_ptr(rdi + offset_of!(Frame, host_mxcsr)))?;
            a.mov(esi, dword_ptr(rdi + offset_of!(Frame, forbidden)))?;
            a.test(dword_ptr(rdi + offset_of!(Frame, raised)), esi)?;
            a.jne(done)?;
        }
        if let Some((slot, register)) = self.store {
            self.store(a, slot, register)?;
        }
        self.store_general(a)?;
        a.set_label(&mut done)?;
        a.zero_bytes()?;
        if self.vex() {
            a.vzeroupper()?;
        }
        if self.mmx {
            a.emms()?;
        }
        Ok(())
    }

    fn load(&self, a: &mut CodeAssembler, slot: usize, register: Register) -> Result<(), IcedError> {
        a.mov(rsi, qword_ptr(rdi + offset_of!(Frame, vectors) + slot * 8))?;
        if register.is_mm() {
            let memory = MemoryOperand::with_base(Register::RSI);
            return a.add_instruction(Instruction::with2(Code::Movq_mm_mmm64, register, memory)?);
        }
        let (low, whole) = halves(register);
        if !self.vex() {
            return a.movups(low, xmmword_ptr(rsi));
        }
        a.vmovups(low, xmmword_ptr(rsi))?;
        if register.is_ymm() { a.vinsertf128(whole, whole, xmmword_ptr(rsi + TO_HIGH), 1) } else { Ok(()) }
    }

    fn store(&self, a: &mut CodeAssembler, slot: usize, register: Register) -> Result<(), IcedError> {
        a.mov(rsi, qword_ptr(rdi + offset_of!(Frame, vectors) + slot * 8))?;
        if register.is_mm() {
            let memory = MemoryOperand::with_base(Register::RSI);
            a.add_instruction(Instruction::with2(Code::Movq_mmm64_mm, memory, register)?)?;
            // The exponent of an MMX register is all ones (SDM vol. 1, 9.5.2).
            let exponent = MemoryOperand::with_base_displ(Register::RSI, 8);
            return a.add_instruction(Instruction::with2(Code::Mov_rm16_imm16, exponent, 0xffff_u32)?);
        }
        let (low, whole) = halves(register);
        if !self.vex() {
            return a.movups(xmmword_ptr(rsi), low);
        }
        // A 128-bit instruction has left zeros above, and those are stored too.
        a.vmovups(xmmword_ptr(rsi), low)?;
        a.vextractf128(xmmword_ptr(rsi + TO_HIGH), whole, 1)
    }

    fn load_general(&self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        if self.general == General::None {
            return Ok(());
        }
        a.mov(rsi, qword_ptr(rdi + offset_of!(Frame, general)))?;
        a.mov(rax, qword_ptr(rsi))?;
        if self.general == General::Implicit {
            a.mov(rdx, qword_ptr(rsi + 16))?;
        }
        Ok(())
    }

    fn store_general(&self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        if !self.general_out {
            return Ok(());
        }
        a.mov(rsi, qword_ptr(rdi + offset_of!(Frame, general)))?;
        match self.general {
            General::Implicit => a.mov(qword_ptr(rsi + 8), rcx),
            _ => a.mov(qword_ptr(rsi), rax),
        }
    }
}

/// Register 0 of a vector register's kind.
fn first_of_kind(register: Register) -> Register {
    match () {
        () if register.is_ymm() => Register::YMM0,
        () if register.is_mm() => Register::MM0,
        () => Register::XMM0,
    }
}

/// The two names of one of the registers that stubs use.
fn halves(register: Register) -> (AsmRegisterXmm, AsmRegisterYmm) {
    [(xmm0, ymm0), (xmm1, ymm1), (xmm2, ymm2), (xmm3, ymm3), (xmm4, ymm4)][register.number() % 5]
}

/// True for the instructions that MXCSR governs: floating-point arithmetic, comparison, conversion and rounding.
fn reads_mxcsr(mnemonic: Mnemonic) -> bool {
    const FAMILIES: [&str; 17] = [
        "add", "sub", "mul", "div", "sqrt", "min", "max", "cmp", "comis", "ucomis", "cvt", "round", "dpp", "hadd",
        "hsub", "fm", "fnm",
    ];
    let name = format!("{mnemonic:?}").to_ascii_lowercase();
    let name = name.strip_prefix('v').unwrap_or(&name);
    FAMILIES.iter().any(|family| name.starts_with(family))
}
