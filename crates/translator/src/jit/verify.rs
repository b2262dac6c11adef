//! Emitted code, read again: whatever the guest's code is, its translation must keep to its own memory.
//!
//! A small abstract interpretation of each piece follows what the temporaries hold along all paths: a table's index, an
//! entry, an entry that is not zero, a pointer made of one. Guest memory is accessed through the latter two only, and
//! written to only where the entry was one for writing.

use std::ops::Range;

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Formatter as _, GasFormatter, Instruction, InstructionInfoFactory,
    Mnemonic, OpAccess, OpKind, Register, UsedMemory,
};

use super::check::table_for;
use super::emit::{Known, WRITE_AHEAD};
use crate::home::{LANDINGS, offset};
use state::{Held, Part, R10, RCX, SCRATCH, START, State, Sum, slot};

/// Entries of a translation table.
const ENTRIES: i64 = 1 << 36;

/// What a piece of code may refer to.
pub(super) struct Bounds<'a> {
    pub known: Known,
    /// Where the thunks run.
    pub thunks: Range<u64>,
    /// Those that keep R10.
    pub keeping: [u64; 3],
    /// The addend of pages in the window.
    pub distance: u64,
    /// Starts of other pieces that this one leads to.
    pub others: &'a [u64],
}

/// Panics where code, by where it is to run, ascending, does what emitted code never does.
pub(super) fn verify(code: &[(&[u8], u64)], bounds: &Bounds<'_>) {
    if let Err(complaint) = check(code, bounds) {
        panic!("{complaint}\n{}", text(code));
    }
}

fn instructions(code: &[(&[u8], u64)]) -> impl Iterator<Item = Instruction> {
    code.iter().flat_map(|&(bytes, at)| Decoder::with_ip(64, bytes, at, DecoderOptions::NONE))
}

fn text(code: &[(&[u8], u64)]) -> String {
    let mut text = String::new();
    let mut formatter = GasFormatter::new();
    for instruction in instructions(code) {
        text += &format!("  {:#x}  ", instruction.ip());
        formatter.format(&instruction, &mut text);
        text.push('\n');
    }
    text
}

fn check(code: &[(&[u8], u64)], bounds: &Bounds<'_>) -> Result<(), String> {
    let absolute = |instruction| by_address(instruction, bounds.known.low);
    let instructions: Vec<Instruction> = instructions(code).map(absolute).collect();
    let mut piece = Piece { instructions, bounds, infos: InstructionInfoFactory::new() };
    let states = piece.follow()?;
    for (position, state) in states.iter().enumerate() {
        let Some(state) = state else { continue };
        let instruction = piece.instructions[position];
        piece
            .allowed(position, state)
            .map_err(|complaint| format!("emitted code at {:#x} {complaint} ({state:?})", instruction.ip()))?;
    }
    Ok(())
}

/// An instruction that calls a field of the home by its address, whether it does or finds it in front of the write table.
fn by_address(mut instruction: Instruction, low: i32) -> Instruction {
    let displacement = instruction.memory_displacement64() as i64;
    let in_front = (i8::MIN.into()..WRITE_AHEAD.into()).contains(&displacement);
    if in_front && (instruction.memory_base(), instruction.memory_index()) == (Register::R14, Register::None) {
        instruction.set_memory_base(Register::None);
        let address = i64::from(low) + i64::from(offset::FRONT - WRITE_AHEAD) + displacement;
        instruction.set_memory_displacement64(address as u64);
        instruction.set_memory_displ_size(8);
    }
    instruction
}

struct Piece<'a> {
    instructions: Vec<Instruction>,
    bounds: &'a Bounds<'a>,
    infos: InstructionInfoFactory,
}

impl Piece<'_> {
    /// The states before all instructions that can be reached.
    fn follow(&mut self) -> Result<Vec<Option<State>>, String> {
        let mut states: Vec<Option<State>> = vec![None; self.instructions.len()];
        let mut open = vec![(0, START)];
        while let Some((position, state)) = open.pop() {
            let Some(known) = states.get_mut(position) else {
                return Err("emitted code runs over its end".into());
            };
            let merged = match known {
                Some(known) => known.merge(&state),
                None => state,
            };
            if known.as_ref() == Some(&merged) {
                continue;
            }
            *known = Some(merged.clone());
            let instruction = self.instructions[position];
            let after = self.after(&instruction, &merged);
            // What runs elsewhere is not what code runs on into.
            let adjoining = self.instructions.get(position + 1).filter(|next| next.ip() == instruction.next_ip());
            let behind = adjoining.map_or(self.instructions.len(), |_| position + 1);
            let zero = match instruction.mnemonic() {
                Mnemonic::Jrcxz => Some(RCX),
                Mnemonic::Je => merged.tested,
                _ => None,
            };
            match instruction.flow_control() {
                FlowControl::Next => open.push((behind, after)),
                FlowControl::ConditionalBranch => {
                    let mut stays = after.clone();
                    if instruction.mnemonic() == Mnemonic::Jne {
                        stays = State { looked_up: merged.looked_up, ..stays }.found();
                        stays.looked_up = None;
                    }
                    if let Some(slot) = zero {
                        stays = stays.not_zero(slot);
                    }
                    if let (Mnemonic::Je, Some(masked)) = (instruction.mnemonic(), merged.masked) {
                        stays = stays.on_the_page(masked);
                    }
                    open.push((behind, stays));
                    let there = if instruction.mnemonic() == Mnemonic::Jrcxz { after.zero(RCX) } else { after };
                    self.go(&instruction, there, &mut open)?;
                }
                FlowControl::UnconditionalBranch => self.go(&instruction, after, &mut open)?,
                FlowControl::Call => {
                    let keeps = self.bounds.keeping.contains(&instruction.near_branch_target());
                    let mut known = START;
                    if keeps {
                        (known.held[R10], known.group) = (merged.held[R10], merged.group);
                        (known.near, known.same) = (merged.near.clone(), merged.same);
                        for lost in [Register::RCX, Register::R11] {
                            known.forget(Part::Host(lost));
                        }
                    }
                    open.push((behind, known));
                    self.go(&instruction, after, &mut open)?;
                }
                FlowControl::Return | FlowControl::IndirectBranch => {}
                other => return Err(format!("emitted code at {:#x} has {other:?}", instruction.ip())),
            }
        }
        Ok(states)
    }

    /// Goes to a branch's target, which lies in this piece, or in the thunks.
    fn go(&self, instruction: &Instruction, state: State, open: &mut Vec<(usize, State)>) -> Result<(), String> {
        let target = instruction.near_branch_target();
        if self.bounds.thunks.contains(&target) || self.bounds.others.contains(&target) {
            return Ok(());
        }
        match self.instructions.binary_search_by_key(&target, Instruction::ip) {
            Ok(position) => open.push((position, state)),
            Err(_) => return Err(format!("emitted code at {:#x} goes to {target:#x}", instruction.ip())),
        }
        Ok(())
    }

    /// What the temporaries hold after an instruction.
    fn after(&mut self, instruction: &Instruction, before: &State) -> State {
        let mut after = State { tested: None, masked: None, looked_up: None, ..before.clone() };
        for used in self.infos.info(instruction).used_registers().iter().filter(|used| writes(used.access())) {
            if let Some(slot) = slot(used.register()) {
                after.held[slot] = Held::Anything;
            }
            if used.register().full_register() == Register::R8 {
                after = after.moved(moves(instruction, before));
            } else {
                let itself = used.register() == instruction.op0_register() && slot(used.register()).is_none();
                let by = if itself { adds(instruction) } else { None };
                after.step(Part::Host(used.register().full_register()), by);
            }
            if is_table(used.register()) {
                after = START; // what was found in the tables before is not found in these
            }
            if slot(used.register()) == Some(R10) {
                after.group = None;
            }
        }
        let to = instruction.op0_register();
        match instruction.op0_kind() {
            OpKind::Register => {
                if let Some(slot) = slot(to) {
                    after.held[slot] = self.result(instruction, before, after.held[slot]);
                }
            }
            OpKind::Memory if self.is_field(instruction, offset::SCRATCH) => {
                let stored = before.of(instruction.op1_register());
                after.held[SCRATCH] = if instruction.code() == Code::Mov_rm64_r64 { stored } else { Held::Anything };
            }
            _ => {}
        }
        if let (OpKind::Memory, Some(kept)) = (instruction.op0_kind(), self.kept(instruction))
            && self.infos.info(instruction).used_memory().iter().any(|memory| writes(memory.access()))
        {
            let by = match (instruction.code(), before.of(instruction.op1_register())) {
                (Code::Mov_rm64_r64, Held::Kept(original)) if original == kept => Some(0),
                (Code::Mov_rm64_r64, Held::Sum(sum)) => sum.beyond(&Sum::of(Part::Kept(kept))),
                _ => adds(instruction),
            };
            after.step(Part::Kept(kept), by);
            if let (Code::Mov_rm64_r64, Some(slot)) = (instruction.code(), slot(instruction.op1_register())) {
                after.held[slot] = Held::Kept(kept);
                if let Held::Kept(original) = before.of(instruction.op1_register())
                    && original != kept
                {
                    after.same = Some((original, kept));
                }
            }
        }
        if instruction.code() == Code::Test_rm64_r64 && to == instruction.op1_register() {
            after.tested = slot(to);
        }
        if let (Code::Test_rm32_imm32, OpKind::Register) = (instruction.code(), instruction.op0_kind()) {
            after.masked = masked(instruction, before);
        }
        if let (true, Held::Index(Some(sum))) = (self.compares_window(instruction), before.held[RCX])
            && !sum.has(Part::Host(Register::RCX))
        {
            after.looked_up = Some((sum, instruction.memory_base() == Register::R14));
        }
        after
    }

    /// What the first operand, a temporary, holds after an instruction; `otherwise` where that is not known.
    fn result(&self, instruction: &Instruction, before: &State, otherwise: Held) -> Held {
        let memory = (1..instruction.op_count()).any(|position| instruction.op_kind(position) == OpKind::Memory);
        let to = instruction.op0_register();
        match instruction.code() {
            Code::Mov_r64_imm64 | Code::Mov_rm64_imm32 | Code::Mov_r32_imm32 => {
                Held::Constant(instruction.immediate(1) as i64)
            }
            Code::VEX_Bextr_r64_rm64_r64 if instruction.op2_register() == Register::R15 => {
                Held::Index(if memory { None } else { indexed(instruction, before) })
            }
            Code::VEX_Pext_r64_r64_rm64 if memory && self.is_field(instruction, offset::INDEX_BITS) => {
                Held::Index(indexed(instruction, before))
            }
            Code::Movzx_r32_rm16 if instruction.op1_register() == Register::CX => Held::Short,
            Code::Mov_r64_rm64 if memory => match instruction.memory_base() {
                Register::R15 => Held::Entry { write: false, of: entry_of(instruction, before) },
                Register::R14 => Held::Entry { write: true, of: entry_of(instruction, before) },
                _ if self.is_field(instruction, offset::TSC) => Held::Word,
                _ if self.is_field(instruction, offset::SCRATCH) => before.held[SCRATCH],
                _ => self.kept(instruction).map_or(otherwise, Held::Kept),
            },
            Code::Mov_r64_rm64 => before.of(instruction.op1_register()),
            Code::Lea_r64_m
                if (instruction.memory_base(), instruction.memory_index()) == (Register::R8, Register::None) =>
            {
                Held::Stack(instruction.memory_displacement64() as i64)
            }
            Code::Lea_r64_m => {
                let scaled = instruction.memory_index_scale() != 1;
                match (before.of(instruction.memory_base()), before.of(instruction.memory_index())) {
                    (Held::Addend { write }, _) => Held::Pointer { write },
                    (_, Held::Addend { write }) if !scaled => Held::Pointer { write },
                    (Held::Entry { write, of: Some(of) }, _) if self.lacks_distance(instruction) => {
                        Held::Beyond { write, of }
                    }
                    _ => {
                        let address = (
                            instruction.memory_base(),
                            instruction.memory_index(),
                            instruction.memory_index_scale(),
                            instruction.memory_displacement64() as i64,
                        );
                        let sum = before.sum(address);
                        if sum.has(Part::Host(to)) { otherwise } else { Held::Sum(sum) }
                    }
                }
            }
            _ => match (before.of(to), adds(instruction)) {
                (Held::Kept(at), Some(by)) => Held::Sum(Sum { displacement: by, ..Sum::of(Part::Kept(at)) }),
                _ => otherwise,
            },
        }
    }

    /// True for an addition of what makes the entry of pages in the window zero.
    fn lacks_distance(&self, instruction: &Instruction) -> bool {
        instruction.memory_index() == Register::None
            && instruction.memory_displacement64() == self.bounds.distance.wrapping_neg()
    }

    /// True for a comparison of an entry with that of pages in the window.
    fn compares_window(&self, instruction: &Instruction) -> bool {
        instruction.code() == Code::Cmp_rm64_imm32
            && is_table(instruction.memory_base())
            && instruction.memory_index() == Register::RCX
            && instruction.immediate(1) == self.bounds.distance
    }

    /// True where a memory operand is at, or right beside, an address whose page is in the window.
    fn is_near(&self, memory: &UsedMemory, state: &State, stores: bool) -> bool {
        let displacement = (memory.displacement() as i64).wrapping_sub(self.bounds.distance as i64);
        let here = state.sum((memory.base(), memory.index(), memory.scale(), displacement));
        let named = |one, other| [here.renamed(one, other), here.renamed(other, one)];
        let [this, that] = state.same.map_or([here; 2], |(one, other)| named(one, other));
        let bytes = memory.memory_size().size() as i64;
        state.near.iter().any(|(byte, write)| {
            // All of it up to that byte, and not further away than the page before; or an aligned one, from that byte on.
            let good = |from: i64| from > -0x1000 && from + bytes <= 1 || from == 0;
            let beyond = |sum: &Sum| sum.beyond(byte).is_some_and(good);
            let fits = (*write || !stores) && bytes <= super::near::MOST_BYTES.into();
            fits && [here, this, that].iter().any(beyond)
        })
    }

    /// Where in the home the memory operand is, if it is a guest register there.
    fn kept(&self, instruction: &Instruction) -> Option<i64> {
        let at = instruction.memory_displacement64() as i64 - i64::from(self.bounds.known.low);
        let plain = (instruction.memory_base(), instruction.memory_index()) == (Register::None, Register::None);
        let first = i64::from(offset::GPR);
        (plain && (first..first + 16 * 8).contains(&at)).then_some(at - (at - first) % 8)
    }

    /// True where the memory operand is a field of the home.
    fn is_field(&self, instruction: &Instruction, offset: i32) -> bool {
        (instruction.memory_base(), instruction.memory_index()) == (Register::None, Register::None)
            && instruction.memory_displacement64() == i64::from(self.bounds.known.low + offset) as u64
    }

    /// Says what is wrong with an instruction, if anything is.
    fn allowed(&mut self, position: usize, state: &State) -> Result<(), String> {
        let instruction = self.instructions[position];
        let control = matches!(instruction.flow_control(), FlowControl::Call | FlowControl::Return);
        if instruction.is_invalid() || instruction.is_privileged() || is_the_monitors(instruction.mnemonic()) {
            return Err("is for the monitor alone".into());
        }
        let stack = control || self.reads_flags(position);
        let info = self.infos.info(&instruction);
        let memory = info.used_memory().to_vec();
        let changed: Vec<Register> = info
            .used_registers()
            .iter()
            .filter(|used| writes(used.access()))
            .map(|used| used.register())
            .filter(|register| {
                is_table(*register) || register.full_register() == Register::RSP || register.is_segment_register()
            })
            .collect();
        for register in changed {
            if !(stack && register == Register::RSP || self.changes_tables(&instruction)) {
                return Err(format!("changes {register:?}"));
            }
        }
        if stack {
            return Ok(()); // the shadow stack
        }
        memory.iter().try_for_each(|memory| self.reaches(&instruction, memory, state))
    }

    /// PUSHFQ with the POP of a temporary behind it, or that POP.
    fn reads_flags(&self, position: usize) -> bool {
        let code = |position: usize| self.instructions.get(position).map(Instruction::code);
        match self.instructions[position].code() {
            Code::Pushfq => code(position + 1) == Some(Code::Pop_r64),
            Code::Pop_r64 => {
                let temporary = slot(self.instructions[position].op0_register()).is_some();
                temporary && position > 0 && code(position - 1) == Some(Code::Pushfq)
            }
            _ => false,
        }
    }

    /// STAC and CLAC put other tables in force, of those that the monitor has noted.
    fn changes_tables(&self, instruction: &Instruction) -> bool {
        let second = match instruction.op0_register() {
            Register::R15 => 0,
            Register::R14 => 8,
            _ => return false,
        };
        instruction.code() == Code::Mov_r64_rm64
            && [0, 16].iter().any(|first| self.is_field(instruction, offset::TABLES + first + second))
    }

    /// Says what is wrong with a memory operand, if anything is.
    fn reaches(&self, instruction: &Instruction, memory: &UsedMemory, state: &State) -> Result<(), String> {
        let (base, index) = (memory.base(), memory.index());
        let (scale, displacement) = (memory.scale(), memory.displacement() as i64);
        let loads_rcx = instruction.code() == Code::Mov_r64_rm64
            && matches!(instruction.op0_register(), Register::RCX | Register::R10);
        let loads = loads_rcx || self.compares_window(instruction);
        let stores = writes(memory.access());
        let good = match (base, index) {
            _ if self.is_near(memory, state, stores) => true,
            (Register::None, Register::None) if displacement == i64::from(self.bounds.known.signal) => {
                memory.memory_size().size() == 4 && !stores
            }
            (Register::None, Register::None) => self.is_home(displacement, memory.memory_size().size() as i64),
            (Register::None, Register::RCX) => {
                let inside = self.is_home(displacement, LANDINGS as i64 * 8);
                inside && scale == 8 && state.held[RCX] == Held::Short && instruction.is_jmp_near_indirect()
            }
            (Register::R14 | Register::R15, Register::None) => loads_rcx,
            (Register::R14 | Register::R15, Register::RCX) => {
                let (_, ahead) = table_for(base == Register::R14);
                let index = match state.held[RCX] {
                    Held::Index(_) => true,
                    Held::Constant(value) => (0..ENTRIES).contains(&value),
                    _ => false,
                };
                loads && scale == 8 && index && displacement == i64::from(ahead)
            }
            (Register::RCX | Register::R10 | Register::R11, Register::None) => match state.of(base) {
                Held::Addend { write } => write || !stores,
                Held::Pointer { write } => displacement == 0 && (write || !stores),
                Held::Word => displacement == 0 && !stores,
                _ => false,
            },
            (base, Register::R10) => {
                let end = displacement + memory.memory_size().size() as i64;
                let inside = state
                    .group
                    .is_some_and(|(at, first, last)| state.part(base) == at && first <= displacement && end <= last);
                matches!(state.held[R10], Held::Addend { write } if scale == 1 && inside && (write || !stores))
            }
            (base, Register::RCX) => {
                let to_host = scale == 1 && displacement == 0 && base != Register::RSP;
                matches!(state.held[RCX], Held::Addend { write } if to_host && (write || !stores))
            }
            _ => false,
        };
        let segment = matches!(memory.segment(), Register::FS | Register::GS);
        if good && !segment { Ok(()) } else { Err(format!("reaches {memory:?}")) }
    }

    fn is_home(&self, address: i64, bytes: i64) -> bool {
        let (start, end) =
            (i64::from(self.bounds.known.low), i64::from(self.bounds.known.low) + i64::from(offset::END));
        (start..end).contains(&address) && address + bytes <= end
    }
}

/// How far an instruction moves the guest's RSP, which it changes, where that is a constant.
fn moves(instruction: &Instruction, before: &State) -> Option<i64> {
    match (instruction.code(), before.of(instruction.op1_register())) {
        (Code::Mov_r64_rm64, Held::Stack(at)) => Some(at),
        _ => adds(instruction),
    }
}

/// The address whose index an instruction takes from a register, where it stays known.
fn indexed(instruction: &Instruction, before: &State) -> Option<Sum> {
    let (to, from) = (instruction.op0_register(), instruction.op1_register());
    match before.of(from) {
        Held::Sum(sum) if !sum.has(Part::Host(to)) => Some(sum),
        Held::Stack(at) => Some(Sum::near(Register::R8, at)),
        Held::Kept(at) => Some(Sum { base: Part::Kept(at), ..Sum::near(Register::None, 0) }),
        _ if from != to => Some(Sum::near(from, 0)),
        _ => None,
    }
}

/// The address whose entry an instruction loads, where it stays known.
fn entry_of(instruction: &Instruction, before: &State) -> Option<Sum> {
    match before.of(instruction.memory_index()) {
        Held::Index(sum) => sum.filter(|sum| !sum.has(Part::Host(instruction.op0_register()))),
        _ => None,
    }
}

/// How much an instruction adds to its first operand, where that is a constant, and all that it does.
fn adds(instruction: &Instruction) -> Option<i64> {
    let itself = instruction.memory_base() == instruction.op0_register();
    match instruction.code() {
        Code::Lea_r64_m if itself && instruction.memory_index() == Register::None => {
            Some(instruction.memory_displacement64() as i64)
        }
        Code::Add_rm64_imm8 | Code::Add_rm64_imm32 | Code::Add_RAX_imm32 => Some(instruction.immediate(1) as i64),
        Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 | Code::Sub_RAX_imm32 => Some(-(instruction.immediate(1) as i64)),
        Code::Inc_rm64 => Some(1),
        Code::Dec_rm64 => Some(-1),
        _ => None,
    }
}

/// The address that a test looks at, and how many bytes from the start of a page it certainly lies where that does not come out
/// zero.
fn masked(instruction: &Instruction, before: &State) -> Option<(Sum, i64)> {
    let most = 0x1000 - i64::from(instruction.immediate32());
    let sum = before.sum((instruction.op0_register().full_register(), Register::None, 1, 0));
    let good = (1..0x1000).contains(&most) && most.count_ones() == 1 && !sum.is_passing();
    good.then_some((sum, most))
}

fn writes(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

/// The registers of the translation tables.
fn is_table(register: Register) -> bool {
    matches!(register.full_register(), Register::R14 | Register::R15)
}

/// Instructions that change what the monitor relies on, or answer for the host's processor.
fn is_the_monitors(mnemonic: Mnemonic) -> bool {
    use Mnemonic::{
        Cpuid, Fxrstor, Fxrstor64, Ldmxcsr, Popf, Popfq, Rdfsbase, Rdgsbase, Rdpid, Rdpkru, Sgdt, Sidt, Sldt, Smsw,
        Std, Str, Syscall, Sysenter, Vldmxcsr, Wrfsbase, Wrgsbase, Wrpkru, Xgetbv, Xrstor, Xrstor64,
    };
    matches!(
        mnemonic,
        Cpuid
            | Fxrstor
            | Fxrstor64
            | Ldmxcsr
            | Popf
            | Popfq
            | Rdfsbase
            | Rdgsbase
            | Rdpid
            | Rdpkru
            | Sgdt
            | Sidt
            | Sldt
            | Smsw
            | Std
            | Str
            | Syscall
            | Sysenter
            | Vldmxcsr
            | Wrfsbase
            | Wrgsbase
            | Wrpkru
            | Xgetbv
            | Xrstor
            | Xrstor64
    )
}

mod state;
#[cfg(test)]
mod tests;
