//! What the translator knows about an instruction form: how it is translated, and what of its operands has to be moved
//! to other registers. Looked up once per form and vCPU.

use iced_x86::{
    Code, EncodingKind, FlowControl, Instruction, InstructionInfo, InstructionInfoFactory, Mnemonic, OpAccess,
    OpCodeOperandKind, OpKind, Register,
};

use super::live::Flags;
use crate::system::features::Features;
use crate::vector;

/// How a form is translated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Kind {
    /// The instruction itself, with registers and memory operand replaced.
    Same,
    /// Its operands need no replacing at all.
    Copy,
    /// Nothing happens.
    Nothing,
    Lea,
    /// MOV r, imm without ModRM.
    MovConstant,
    /// MOV between the accumulator and an absolute address.
    MovAbsolute,
    /// XCHG with the accumulator, without ModRM.
    ExchangeAccumulator,
    Bswap,
    PushRegister,
    PushConstant,
    PushMemory,
    PopRegister,
    Leave,
    Call,
    CallIndirect,
    Jump,
    JumpIndirect,
    JumpIf,
    Return,
    DisableInterrupts,
    EnableInterrupts,
    PushFlags,
    SwapGs,
    SetAccessControl,
    ClearAccessControl,
    ReadTsc,
    /// The interpreter's handler is called.
    #[default]
    Interpret,
    /// The same, and where to go on is only known after it.
    InterpretLast,
}

/// What an instruction needs of the vector and x87 state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Unit {
    #[default]
    General,
    X87,
    Sse,
    /// SSE and MMX registers.
    Both,
    Avx,
}

/// Where a general-purpose register operand is encoded, and whether it is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Field {
    pub general: bool,
    pub written: bool,
    /// It is written without being read, all 64 bits of it.
    pub replaced: bool,
    /// The register's slot can take its place, as a memory operand.
    pub memory: bool,
}

/// A form.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Template {
    pub kind: Kind,
    pub unit: Unit,
    /// The memory operand is written.
    pub stores: bool,
    /// It is read, or written by parts of what was read.
    pub loads: bool,
    /// ModRM.reg.
    pub reg: Field,
    /// ModRM.rm, where it is a register.
    pub rm: Field,
    /// VEX.vvvv.
    pub second: Field,
    /// General-purpose registers that it may change without having them as operands that it writes, a bit each.
    pub changes: u16,
    /// RCX (or a part) is read without being an operand in ModRM.
    pub reads_rcx: bool,
    /// The same, written.
    pub writes_rcx: bool,
    /// A memory operand that is not aligned to its size is refused by the processor.
    pub aligned: bool,
    /// A byte register is an operand; ModRM.rm is one where it is a register.
    byte: bool,
    byte_rm: bool,
    /// A bit test whose register operand moves its memory operand.
    pub beyond: bool,
    /// It goes on to the next instruction.
    pub goes_on: bool,
    /// What it does to status flags, where that does not depend on a constant.
    flags: Option<Flags>,
}

impl Template {
    /// True where an operand is a byte register; `direct`: ModRM.rm is a register.
    pub(super) fn has_bytes(&self, direct: bool) -> bool {
        self.byte || direct && self.byte_rm
    }

    /// What an instruction of this form does to status flags.
    pub(super) fn flags(&self, instruction: &Instruction) -> Flags {
        self.flags.unwrap_or_else(|| Flags::of(instruction))
    }
}

/// The templates a vCPU has come across.
pub(super) struct Templates {
    known: Vec<Option<Template>>,
    infos: InstructionInfoFactory,
}

impl Templates {
    pub(super) fn new() -> Self {
        Self { known: Vec::new(), infos: InstructionInfoFactory::new() }
    }

    /// The template of an instruction of 64-bit code.
    #[inline]
    pub(super) fn get(&mut self, instruction: &Instruction, features: &Features) -> Template {
        match self.known.get(instruction.code() as usize) {
            Some(Some(template)) => *template,
            _ => self.learn(instruction, features),
        }
    }

    #[cold]
    fn learn(&mut self, instruction: &Instruction, features: &Features) -> Template {
        let at = instruction.code() as usize;
        if self.known.len() <= at {
            self.known.resize(at + 1, None);
        }
        let template = self.make(instruction, features);
        self.known[at] = Some(template);
        template
    }

    fn make(&mut self, instruction: &Instruction, features: &Features) -> Template {
        let (kind, unit) = classify(instruction, features);
        let (reads_rcx, writes_rcx) = implicit_rcx(instruction);
        let mut template = Template {
            kind,
            unit,
            stores: false,
            loads: false,
            reg: Field::default(),
            rm: Field::default(),
            second: Field::default(),
            changes: 0,
            reads_rcx,
            writes_rcx,
            aligned: vector::needs_alignment(instruction) || instruction.mnemonic() == Mnemonic::Cmpxchg16b,
            byte: false,
            byte_rm: false,
            beyond: reaches_beyond(instruction),
            goes_on: instruction.flow_control() == FlowControl::Next,
            flags: Flags::of_form(instruction),
        };
        let info = self.infos.info(instruction);
        template.changes = changes(instruction, info);
        let form = instruction.op_code();
        for position in 0..form.op_count() {
            let access = info.op_access(position);
            let reads = !matches!(access, OpAccess::None | OpAccess::Write | OpAccess::NoMemAccess);
            let writes =
                !matches!(access, OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
            if may_be_memory(form.op_kind(position)) {
                template.stores |= writes;
                // XOR r, r and the like read nothing; the same form with a memory operand does.
                template.loads |= reads || access == OpAccess::None;
            }
            template.byte |= matches!(
                form.op_kind(position),
                OpCodeOperandKind::r8_reg
                    | OpCodeOperandKind::r8_opcode
                    | OpCodeOperandKind::al
                    | OpCodeOperandKind::cl
            );
            template.byte_rm |= form.op_kind(position) == OpCodeOperandKind::r8_or_mem;
            let wide =
                matches!(instruction.mnemonic(), Mnemonic::Mov | Mnemonic::Movzx | Mnemonic::Movsx | Mnemonic::Movsxd);
            let field = Field {
                general: true,
                written: writes,
                replaced: writes && !reads && wide && !narrow(form.op_kind(position)),
                memory: may_be_slot(instruction, form.op_kind(position), writes),
            };
            match encoded_in(form.op_kind(position)) {
                Some(Encoded::Reg) => template.reg = field,
                Some(Encoded::Rm) => template.rm = field,
                Some(Encoded::Second) => template.second = field,
                None => continue,
            }
        }
        template
    }
}

/// General-purpose registers changed that are not operands written.
fn changes(instruction: &Instruction, info: &InstructionInfo) -> u16 {
    let bit = |register: Register| 1 << (register.full_register().number() & 15);
    let writes = |access: OpAccess| {
        matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
    };
    let used = info.used_registers().iter().filter(|used| used.register().is_gpr() && writes(used.access()));
    let all = used.fold(0, |all, used| all | bit(used.register()));
    let named = (0..instruction.op_count())
        .filter(|&position| instruction.op_kind(position) == OpKind::Register && writes(info.op_access(position)));
    let named = named.fold(0, |named, position| named | bit(instruction.op_register(position)));
    // The accumulator may be an operand of this one, too.
    let accumulator = u16::from(instruction.mnemonic() == Mnemonic::Cmpxchg);
    all & !named | accumulator
}

/// A bit test whose register operand moves its memory operand.
fn reaches_beyond(instruction: &Instruction) -> bool {
    use Mnemonic::{Bt, Btc, Btr, Bts};
    matches!(instruction.mnemonic(), Bt | Bts | Btr | Btc) && instruction.op1_kind() == OpKind::Register
}

/// RCX read and written without being an operand in ModRM.
fn implicit_rcx(instruction: &Instruction) -> (bool, bool) {
    use Mnemonic::*;
    let form = instruction.op_code();
    let by_cl = (0..form.op_count()).any(|position| form.op_kind(position) == OpCodeOperandKind::cl);
    let reads = by_cl || matches!(instruction.mnemonic(), Cmpxchg8b | Cmpxchg16b);
    let index =
        matches!(instruction.mnemonic(), Pcmpestri | Pcmpestri64 | Pcmpistri | Vpcmpestri | Vpcmpestri64 | Vpcmpistri);
    (reads, index)
}

/// True where an interpreted instruction may leave RSP other than a multiple of 8.
pub(super) fn disturbs_stack_pointer(instruction: &Instruction) -> bool {
    let named = (0..instruction.op_count()).any(|position| {
        instruction.op_kind(position) == OpKind::Register
            && instruction.op_register(position).full_register() == Register::RSP
    });
    let moved = instruction.is_stack_instruction()
        && (instruction.stack_pointer_increment() % 8 != 0
            || matches!(instruction.mnemonic(), Mnemonic::Enter | Mnemonic::Leave));
    named || moved
}

enum Encoded {
    Reg,
    Rm,
    Second,
}

fn encoded_in(kind: OpCodeOperandKind) -> Option<Encoded> {
    use OpCodeOperandKind::{
        r8_or_mem, r8_reg, r16_or_mem, r16_reg, r16_reg_mem, r16_rm, r32_or_mem, r32_reg, r32_reg_mem, r32_rm,
        r32_vvvv, r64_or_mem, r64_reg, r64_reg_mem, r64_rm, r64_vvvv,
    };
    Some(match kind {
        r8_reg | r16_reg | r16_reg_mem | r32_reg | r32_reg_mem | r64_reg | r64_reg_mem => Encoded::Reg,
        r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem | r16_rm | r32_rm | r64_rm => Encoded::Rm,
        r32_vvvv | r64_vvvv => Encoded::Second,
        _ => return None,
    })
}

fn may_be_memory(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind::*;
    matches!(
        kind,
        mem | r8_or_mem
            | r16_or_mem
            | r32_or_mem
            | r64_or_mem
            | mm_or_mem
            | xmm_or_mem
            | ymm_or_mem
            | r32_reg_mem
            | mem_offs
    )
}

/// True where a register operand in ModRM.rm does what it does in memory too.
fn may_be_slot(instruction: &Instruction, kind: OpCodeOperandKind, written: bool) -> bool {
    use OpCodeOperandKind::{r8_or_mem, r16_or_mem, r32_or_mem, r64_or_mem};
    let kind = match kind {
        r8_or_mem | r16_or_mem | r64_or_mem => true,
        r32_or_mem => !written, // it would clear the upper half of a register
        _ => false,
    };
    // In memory, XCHG is locked, and bit tests go beyond their operand. XADD writes its two operands in this order.
    use Mnemonic::{Bt, Btc, Btr, Bts, Xadd, Xchg};
    kind && !matches!(instruction.mnemonic(), Xchg | Xadd | Bt | Bts | Btr | Btc)
}

fn narrow(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind::*;
    matches!(kind, r8_reg | r8_or_mem | r16_reg | r16_reg_mem | r16_or_mem | r16_rm)
}

fn classify(instruction: &Instruction, features: &Features) -> (Kind, Unit) {
    if instruction.flow_control() != FlowControl::Next {
        return (branch(instruction), Unit::General);
    }
    if vector::is_ours(instruction) {
        return vectors(instruction, features);
    }
    (general(instruction, features), Unit::General)
}

fn branch(instruction: &Instruction) -> Kind {
    use Code::*;
    match instruction.code() {
        Jmp_rel8_64 | Jmp_rel32_64 => Kind::Jump,
        Call_rel32_64 => Kind::Call,
        Jmp_rm64 => Kind::JumpIndirect,
        Call_rm64 => Kind::CallIndirect,
        Retnq | Retnq_imm16 => Kind::Return,
        _ if instruction.is_jcc_short_or_near() && instruction.op0_kind() == OpKind::NearBranch64 => Kind::JumpIf,
        _ => Kind::InterpretLast,
    }
}

/// Forms with a translation of their own.
fn special(instruction: &Instruction) -> Option<Kind> {
    use Code::*;
    Some(match instruction.code() {
        Push_r64 => Kind::PushRegister,
        Pushq_imm8 | Pushq_imm32 => Kind::PushConstant,
        Push_rm64 => Kind::PushMemory,
        Pop_r64 => Kind::PopRegister,
        Leaveq => Kind::Leave,
        Mov_r8_imm8 | Mov_r16_imm16 | Mov_r32_imm32 | Mov_r64_imm64 => Kind::MovConstant,
        Mov_AL_moffs8 | Mov_AX_moffs16 | Mov_EAX_moffs32 | Mov_RAX_moffs64 | Mov_moffs8_AL | Mov_moffs16_AX
        | Mov_moffs32_EAX | Mov_moffs64_RAX => Kind::MovAbsolute,
        Cli => Kind::DisableInterrupts,
        Sti => Kind::EnableInterrupts,
        Pushfq => Kind::PushFlags,
        Swapgs => Kind::SwapGs,
        Stac => Kind::SetAccessControl,
        Clac => Kind::ClearAccessControl,
        Rdtsc | Rdtscp => Kind::ReadTsc,
        Xchg_r16_AX | Xchg_r32_EAX | Xchg_r64_RAX => Kind::ExchangeAccumulator,
        Mov_r16_rm16 | Mov_r32_rm32 | Mov_r64_rm64 | Mov_rm8_r8 | Mov_rm16_r16 | Mov_rm32_r32 | Mov_rm64_r64
        | Mov_r8_rm8 | Mov_rm8_imm8 | Mov_rm16_imm16 | Mov_rm32_imm32 | Mov_rm64_imm32 => Kind::Same,
        _ => return None,
    })
}

fn general(instruction: &Instruction, features: &Features) -> Kind {
    if let Some(kind) = special(instruction)
        && (instruction.mnemonic() != Mnemonic::Rdtscp || features.rdtscp)
    {
        return kind;
    }
    use Mnemonic::*;
    let has = |feature| features.has(feature);
    use engine::cpu_model::Feature;
    let offered = match instruction.mnemonic() {
        Add | Or | Adc | Sbb | And | Sub | Xor | Cmp | Test | Inc | Dec | Neg | Not | Shl | Sal | Shr | Sar | Rol
        | Ror | Rcl | Rcr | Shld | Shrd | Imul | Mul | Div | Idiv | Movzx | Movsx | Movsxd | Seta | Setae | Setb
        | Setbe | Sete | Setg | Setge | Setl | Setle | Setne | Setno | Setnp | Setns | Seto | Setp | Sets | Xchg
        | Xadd | Cmpxchg | Cmpxchg8b | Bt | Bts | Btr | Btc | Bsf | Bsr | Cbw | Cwde | Cdqe | Cwd | Cdq | Cqo | Clc
        | Stc | Cmc | Movnti => true,
        Cmova | Cmovae | Cmovb | Cmovbe | Cmove | Cmovg | Cmovge | Cmovl | Cmovle | Cmovne | Cmovno | Cmovnp
        | Cmovns | Cmovo | Cmovp | Cmovs => has(Feature::Cmov),
        Lea => return Kind::Lea,
        Mnemonic::Bswap if instruction.op0_register().size() >= 4 => return Kind::Bswap,
        Nop | Endbr64 | Endbr32 | Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2 | Prefetchw | Prefetch => {
            return Kind::Nothing;
        }
        Lahf | Sahf => has(Feature::LahfLm),
        Lfence | Sfence | Mfence => return Kind::Copy,
        Cmpxchg16b => has(Feature::Cx16),
        Popcnt => has(Feature::Popcnt),
        Lzcnt => has(Feature::Abm),
        Tzcnt | Andn | Bextr | Blsi | Blsmsk | Blsr => has(Feature::Bmi1),
        Bzhi | Mulx | Pdep | Pext | Rorx | Sarx | Shlx | Shrx => has(Feature::Bmi2),
        Adcx | Adox => has(Feature::Adx),
        Movbe => has(Feature::Movbe),
        Crc32 => has(Feature::Sse42),
        _ => false,
    };
    let copied = matches!(instruction.mnemonic(), Cbw | Cwde | Cdqe | Cwd | Cdq | Cqo | Clc | Stc | Cmc | Lahf | Sahf)
        || is_accumulator_constant(instruction);
    match (offered, copied) {
        (false, _) => Kind::Interpret,
        (true, true) => Kind::Copy,
        (true, false) => Kind::Same,
    }
}

/// ALU operations between the accumulator and a constant, in their form without ModRM.
fn is_accumulator_constant(instruction: &Instruction) -> bool {
    use OpCodeOperandKind::{al, ax, eax, rax};
    let form = instruction.op_code();
    form.op_count() == 2 && matches!(form.op_kind(0), al | ax | eax | rax) && instruction.op1_kind() != OpKind::Register
}

fn vectors(instruction: &Instruction, features: &Features) -> (Kind, Unit) {
    use Mnemonic::*;
    let special = matches!(
        instruction.mnemonic(),
        Fxsave
            | Fxsave64
            | Fxrstor
            | Fxrstor64
            | Xsave
            | Xsave64
            | Xsaveopt
            | Xsaveopt64
            | Xsavec
            | Xsavec64
            | Xrstor
            | Xrstor64
            | Xgetbv
            | Xsetbv
            | Ldmxcsr
            | Vldmxcsr
            | Vmaskmovps
            | Vmaskmovpd
            | Vpmaskmovd
            | Vpmaskmovq
            | Maskmovdqu
            | Maskmovq
            | Vmaskmovdqu
            | Fnsave
            | Fsave
            | Frstor
            | Fldenv
            | Fnstenv
            | Fstenv
            | Fbld
            | Fbstp
            | Wait
    );
    if special || instruction.is_vsib() || !crate::offered::offered(instruction, features) {
        return (Kind::Interpret, Unit::General);
    }
    let form = instruction.op_code();
    let any = |test: fn(OpCodeOperandKind) -> bool| (0..form.op_count()).any(|position| test(form.op_kind(position)));
    let mmx =
        any(|kind| matches!(kind, OpCodeOperandKind::mm_reg | OpCodeOperandKind::mm_rm | OpCodeOperandKind::mm_or_mem));
    let xmm = any(|kind| {
        matches!(kind, OpCodeOperandKind::xmm_reg | OpCodeOperandKind::xmm_rm | OpCodeOperandKind::xmm_or_mem)
    });
    let x87 = format!("{:?}", instruction.mnemonic()).starts_with('F') || instruction.mnemonic() == Emms;
    let unit = match (instruction.encoding(), mmx || x87, xmm) {
        (EncodingKind::VEX, ..) => Unit::Avx,
        (_, true, true) => Unit::Both,
        (_, true, false) => Unit::X87,
        _ => Unit::Sse,
    };
    let kind = if form.op_count() == 0 { Kind::Copy } else { Kind::Same };
    (kind, unit)
}
