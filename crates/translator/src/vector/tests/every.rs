//! Every vector and x87 instruction of the model against the host's processor, on random registers.

use iced_x86::{Code, Encoder, Instruction, InstructionInfoFactory, Mnemonic, OpCodeOperandKind, OpKind, Register};

use super::super::emit::Recipe;
use super::super::registers::{FOP, HEADER, MXCSR, ST, XMM, YMM_HIGH};
use super::super::{ours, stub};
use super::host::{Host, State, Window};
use super::*;
use crate::cpu::vector::XM;

/// One page for operands.
const WINDOW: Window = Window { at: DATA, bytes: 0x1000 };
/// Where an operand lies in it: aligned for anything, with room before and after.
const OPERAND: u64 = DATA + 0x400;
/// Random states per form of instruction, where the environment does not say.
const ROUNDS: usize = 24;
/// What the native oracle's length is set by.
const CASES: &str = "CORDIAL_ORACLE_CASES";

/// xorshift64*: the same numbers each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, chance: u64) -> bool {
        self.below(chance) == 0
    }

    /// Eight bytes that are interesting as one double, two singles or integers.
    fn lane(&mut self) -> u64 {
        const DOUBLES: [u64; 12] = [
            0,
            1 << 63,
            1,
            0x000f_ffff_ffff_ffff,
            0x0010_0000_0000_0000,
            0x3ff0_0000_0000_0000,
            0x7fef_ffff_ffff_ffff,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff8_0000_0000_0001,
            0x7ff0_0000_0000_0001,
            0x4008_0000_0000_0000,
        ];
        const SINGLES: [u32; 12] = [
            0,
            1 << 31,
            1,
            0x007f_ffff,
            0x0080_0000,
            0x3f80_0000,
            0x7f7f_ffff,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0001,
            0x7f80_0001,
            0x4040_0000,
        ];
        match self.below(8) {
            0 | 1 => DOUBLES[self.below(12) as usize],
            2 | 3 => u64::from(SINGLES[self.below(12) as usize]) | u64::from(SINGLES[self.below(12) as usize]) << 32,
            4 => self.next() & 0x0f0f_0f0f_0f0f_0f0f,
            5 => (1.0 + self.below(1000) as f64 / 7.0).to_bits(),
            6 => {
                let small = |n: u64| u64::from((1.0 + n as f32 / 7.0).to_bits());
                small(self.below(1000)) | small(self.below(1000)) << 32
            }
            _ => self.next(),
        }
    }

    /// An 80-bit number.
    fn extended(&mut self) -> [u8; 10] {
        let (mantissa, exponent) = match self.below(8) {
            0 => (0, 0),
            1 => (1 << 63, 0x7fff),
            2 => (0xc000_0000_0000_0001, 0x7fff),
            3 => (self.next() >> 1, 0),
            4 => (self.next(), self.next() as u16),
            _ => (self.next() | 1 << 63, (0x3fff - 8 + self.below(40) as u16) | (self.next() as u16 & 0x8000)),
        };
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&mantissa.to_le_bytes());
        bytes[8..].copy_from_slice(&exponent.to_le_bytes());
        bytes
    }

    fn state(&mut self) -> State {
        let mut state = State::new();
        for lane in state.area[XMM..HEADER].chunks_exact_mut(8).take(32) {
            lane.copy_from_slice(&self.lane().to_le_bytes());
        }
        for lane in state.area[YMM_HIGH..YMM_HIGH + 256].chunks_exact_mut(8) {
            lane.copy_from_slice(&self.lane().to_le_bytes());
        }
        for register in 0..8 {
            let bytes = self.extended();
            state.area[ST + register * 16..ST + register * 16 + 10].copy_from_slice(&bytes);
        }
        let masks = if self.one_in(3) { self.next() as u16 & 0x3f } else { 0x3f };
        let control = (self.next() as u16 & 0x0f00) | 0x40 | masks;
        // Flags whose exceptions are unmasked would be pending.
        let status = (self.next() as u16 & 0x7f3f) & !(!masks & 0x3f);
        state.area[..2].copy_from_slice(&control.to_le_bytes());
        state.area[2..4].copy_from_slice(&status.to_le_bytes());
        state.area[4] = if self.one_in(2) { 0xff } else { self.next() as u8 };
        let masks = if self.one_in(4) { self.next() as u32 & 0x1f80 } else { 0x1f80 };
        let mxcsr = (self.next() as u32 & 0xe040) | masks | (self.next() as u32 & 0x3f);
        let mxcsr = if self.one_in(2) { mxcsr & 0x1fff } else { mxcsr };
        state.area[MXCSR..MXCSR + 4].copy_from_slice(&mxcsr.to_le_bytes());
        state.area[HEADER] = 7;
        for number in 0..16 {
            state.gpr[number] = self.lane();
        }
        state.gpr[6] = OPERAND;
        state.flags = 2 | self.next() & engine::state::rflags::STATUS;
        state
    }
}

/// An instruction of this code with random operands, `memory` where it can have one.
fn instance(code: Code, memory: bool, random: &mut Random) -> Option<Instruction> {
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    let mut used = [false; 16];
    for (position, kind) in code.op_code().op_kinds().iter().enumerate() {
        let position = position as u32;
        let name = format!("{kind:?}");
        // Gathers want three different registers.
        let mut pick = |count: u64| loop {
            let number = random.below(count) as u32;
            if !std::mem::replace(&mut used[number as usize], true)
                || !name.starts_with("xmm") && !name.starts_with("ymm")
            {
                return number;
            }
        };
        let is_memory = name == "mem" || name.starts_with("mem_vsib") || name.ends_with("_or_mem") && memory;
        let register = match name.split('_').next().unwrap_or("") {
            _ if is_memory => {
                instruction.set_op_kind(position, OpKind::Memory);
                instruction.set_memory_base(Register::RSI);
                let vsib = name.strip_prefix("mem_vsib");
                if let Some(kind) = vsib {
                    let first = if kind.ends_with('x') { Register::XMM0 } else { Register::YMM0 };
                    let number = random.below(16) as u32;
                    if std::mem::replace(&mut used[number as usize], true) {
                        return None;
                    }
                    instruction.set_memory_index(first + number);
                    instruction.set_memory_index_scale(1 << random.below(4));
                }
                continue;
            }
            "imm8" | "imm4" => {
                instruction.set_op_kind(position, OpKind::Immediate8);
                instruction.set_immediate8(if name == "imm8" { random.next() as u8 } else { random.below(4) as u8 });
                continue;
            }
            "seg" => {
                instruction.set_op_kind(position, OpKind::MemorySegRDI);
                continue;
            }
            "xmm" => Register::XMM0 + pick(16),
            "ymm" => Register::YMM0 + pick(16),
            "mm" => Register::MM0 + pick(8),
            "st0" => Register::ST0,
            "sti" => Register::ST0 + pick(8),
            "ax" => Register::AX,
            "r32" => Register::EAX + [0, 1, 2, 3, 5, 8, 13][random.below(7) as usize],
            "r64" => Register::RAX + [0, 1, 2, 3, 5, 8, 13][random.below(7) as usize],
            _ => panic!("{code:?}: operand kind {name}"),
        };
        instruction.set_op_kind(position, OpKind::Register);
        instruction.set_op_register(position, register);
    }
    let has_memory = code.op_code().op_kinds().iter().any(|kind| format!("{kind:?}").ends_with("_or_mem"));
    (has_memory || !memory).then_some(instruction)
}

/// Those whose result is not a function of what is compared here.
fn elsewhere(mnemonic: Mnemonic) -> bool {
    matches!(mnemonic, Mnemonic::Xgetbv | Mnemonic::Xsetbv)
}

/// Codes that the model offers and 64-bit mode has.
fn codes(bench: &Bench) -> Vec<Code> {
    let ours = |code: &Code| {
        let mut instruction = Instruction::default();
        instruction.set_code(*code);
        for (position, kind) in code.op_code().op_kinds().iter().enumerate() {
            let name = format!("{kind:?}");
            let register = match name.split('_').next() {
                Some("xmm") => Register::XMM0,
                Some("ymm") => Register::YMM0,
                Some("mm") => Register::MM0,
                _ => continue,
            };
            instruction.set_op_kind(position as u32, OpKind::Register);
            instruction.set_op_register(position as u32, register);
        }
        let op_code = code.op_code();
        op_code.is_instruction()
            && op_code.mode64()
            && !op_code.fwait()
            && ours::is_ours(&instruction)
            && crate::offered::offered(&instruction, &bench.cpu.features)
    };
    Code::values().filter(ours).collect()
}

struct Comparison {
    bench: Bench,
    host: Host,
    random: Random,
}

impl Comparison {
    /// Runs one instruction on both sides; what differs.
    fn compare(&mut self, instruction: &Instruction) -> Option<String> {
        let mut encoder = Encoder::new(64);
        encoder.encode(instruction, CODE).ok()?;
        let bytes = encoder.take_buffer();
        let mut state = self.random.state();
        self.prepare(instruction, &mut state);
        let mut memory = [0_u8; 0x1000];
        for lane in memory.chunks_exact_mut(8) {
            lane.copy_from_slice(&self.random.lane().to_le_bytes());
        }
        if matches!(instruction.mnemonic(), Mnemonic::Fld | Mnemonic::Fbld | Mnemonic::Frstor) {
            memory[0x400..0x40a].copy_from_slice(&self.random.extended());
        }
        valid_image(instruction, &mut memory[0x400..], &mut self.random);
        self.load(&state, &memory);
        // SAFETY: the window is mapped, and nobody else uses it.
        unsafe { std::ptr::copy_nonoverlapping(memory.as_ptr(), WINDOW.at as *mut u8, memory.len()) };
        let before = state.clone();
        let signal = self.host.run(&bytes, &mut state);
        let mut theirs = [0_u8; 0x1000];
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(WINDOW.at as *const u8, theirs.as_mut_ptr(), theirs.len()) };
        let result = self.bench.run(&bytes);
        let expected = if signal == libc::SIGFPE as u64 { exception(XM) } else { Ok(()) };
        let mut ours = self.bench.get::<0x1000>(DATA);
        forget_pointers(instruction, &mut ours);
        forget_pointers(instruction, &mut theirs);
        if signal == libc::SIGFPE as u64 {
            // What is not known about unmasked exceptions: see `native::unmasked`.
            let mxcsr = state.area[MXCSR] | self.bench.mxcsr() as u8 & 0x20;
            if mxcsr & 0x18 != 0 {
                state.area[MXCSR] = mxcsr;
            }
            use Mnemonic::*;
            if matches!(instruction.mnemonic(), Dpps | Dppd | Vdpps | Vdppd) {
                let flags = self.bench.mxcsr() as u8 & 0x3f;
                state.area[MXCSR] = state.area[MXCSR] & !0x3f | flags;
            }
        }
        let difference = if result != expected || signal == libc::SIGILL as u64 {
            Some(format!("{result:?}, signal {signal}"))
        } else {
            self.difference(&state).or_else(|| {
                let at = (0..0x1000).find(|&at| ours[at] != theirs[at])?;
                Some(format!("memory {at:#x}: {:x?} not {:x?}", &ours[at..at + 8], &theirs[at..at + 8]))
            })
        };
        difference.map(|text| {
            let mxcsr = u32::from_le_bytes(before.area[MXCSR..MXCSR + 4].try_into().unwrap());
            format!("{:?} {bytes:02x?} (mxcsr {mxcsr:#x}): {text}", instruction.code())
        })
    }

    /// Operand values that the instruction needs: small indices, an address in RDI, lengths.
    fn prepare(&mut self, instruction: &Instruction, state: &mut State) {
        use Mnemonic::*;
        match instruction.mnemonic() {
            Maskmovq | Maskmovdqu | Vmaskmovdqu => state.gpr[7] = OPERAND + self.random.below(16),
            Pcmpestri | Pcmpestrm | Vpcmpestri | Vpcmpestrm | Pcmpestri64 | Pcmpestrm64 | Vpcmpestri64
            | Vpcmpestrm64 => {
                for number in [0, 2] {
                    state.gpr[number] = self.random.below(48).wrapping_sub(24);
                }
            }
            Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xrstor | Xrstor64 => {
                state.gpr[0] = self.random.below(8);
                state.gpr[2] = 0;
            }
            _ => {}
        }
        let index = instruction.memory_index();
        if index.is_vector_register() {
            let name = format!("{:?}", instruction.code());
            let quads = name.contains("vm64");
            for (at, start) in [(0, XMM), (16, YMM_HIGH)] {
                let _ = at;
                for lane in 0..if quads { 2 } else { 4 } {
                    let value = (self.random.below(64) as i64 - 32).to_le_bytes();
                    let size = if quads { 8 } else { 4 };
                    let to = start + index.number() * 16 + lane * size;
                    state.area[to..to + size].copy_from_slice(&value[..size]);
                }
            }
        }
    }

    fn load(&mut self, state: &State, memory: &[u8]) {
        let cpu = &mut self.bench.cpu;
        cpu.state.xsave.0[..YMM_HIGH + 256].copy_from_slice(&state.area[..YMM_HIGH + 256]);
        cpu.state.xsave.set_u32(MXCSR + 4, 0xffff);
        cpu.state.gpr = state.gpr;
        cpu.flags.set_status(state.flags);
        self.bench.put(DATA, memory);
    }

    fn difference(&self, state: &State) -> Option<String> {
        let cpu = &self.bench.cpu;
        let ours = &cpu.state.xsave.0;
        let differs = |range: std::ops::Range<usize>| ours[range.clone()] != state.area[range];
        let show = |name: &str, range: std::ops::Range<usize>| {
            Some(format!("{name}: {:02x?} not {:02x?}", &ours[range.clone()], &state.area[range]))
        };
        for (name, range) in [("fcw", 0..2), ("fsw", 2..4), ("ftw", 4..5), ("mxcsr", MXCSR..MXCSR + 4)] {
            if differs(range.clone()) {
                return show(name, range);
            }
        }
        for number in 0..16 {
            let (low, high, st) = (XMM + number * 16, YMM_HIGH + number * 16, ST + number * 16);
            if number < 8 && differs(st..st + 10) {
                return show(&format!("st{number}"), st..st + 10);
            }
            for range in [low..low + 16, high..high + 16] {
                if differs(range.clone()) {
                    return show(&format!("vector {number}"), range);
                }
            }
            if number != 4 && cpu.state.gpr[number] != state.gpr[number] {
                return Some(format!("gpr {number}: {:#x} not {:#x}", cpu.state.gpr[number], state.gpr[number]));
            }
        }
        let flags = state.flags & engine::state::rflags::STATUS;
        (cpu.flags.status() != flags).then(|| format!("flags {:#x} not {flags:#x}", cpu.flags.status()))
    }
}

/// Makes the operand of an instruction that restores state one that it accepts.
fn valid_image(instruction: &Instruction, image: &mut [u8], random: &mut Random) {
    use Mnemonic::*;
    match instruction.mnemonic() {
        Ldmxcsr | Vldmxcsr => image[2..4].fill(0),
        Fxrstor | Fxrstor64 => image[MXCSR + 2..MXCSR + 4].fill(0),
        Xrstor | Xrstor64 => {
            image[MXCSR + 2..MXCSR + 4].fill(0);
            image[HEADER..YMM_HIGH].fill(0);
            image[HEADER] = random.below(8) as u8;
            if random.one_in(2) {
                image[HEADER + 8..HEADER + 16].copy_from_slice(&(1_u64 << 63 | 7).to_le_bytes());
            }
        }
        _ => {}
    }
}

/// Instruction and data pointers in saved x87 state are the host's own there, and so is the mask of MXCSR.
fn forget_pointers(instruction: &Instruction, memory: &mut [u8]) {
    use Mnemonic::*;
    let image = &mut memory[0x400..];
    match instruction.code() {
        Code::Fnstenv_m14byte | Code::Fnsave_m94byte => image[6..14].fill(0),
        Code::Fnstenv_m28byte | Code::Fnsave_m108byte => image[12..28].fill(0),
        _ => {}
    }
    if matches!(instruction.mnemonic(), Fxsave | Fxsave64 | Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64)
    {
        image[FOP..MXCSR].fill(0);
        image[MXCSR + 4..ST].fill(0);
    }
}

#[test]
fn all_stubs_there_can_be_fit_the_arena() {
    let bench = Bench::new();
    let mut infos = InstructionInfoFactory::new();
    let mut bytes = 0;
    for code in codes(&bench) {
        for memory in [false, true] {
            let Some(instruction) = instance(code, memory, &mut Random(1)) else { continue };
            let Some(recipe) = Recipe::new(&instruction, &mut infos) else { continue };
            let kinds = code.op_code().op_kinds();
            let count = |kind: OpCodeOperandKind| kinds.iter().filter(|other| **other == kind).count() as u32;
            let immediates = 256_usize.pow(count(OpCodeOperandKind::imm8));
            let stack = 8_usize.pow(count(OpCodeOperandKind::sti_opcode));
            bytes += recipe.assemble().unwrap().len().next_multiple_of(32) * immediates * stack;
        }
    }
    assert!(bytes <= stub::ARENA_BYTES, "{bytes}");
    assert!(bytes > stub::ARENA_BYTES / 4, "{bytes}: the bound is far too large");
}

#[test]
fn every_instruction_does_what_the_processor_does() {
    if !HostCpu::read().can(Feature::Avx) {
        return; // the trampoline itself needs AVX
    }
    let bench = Bench::new();
    let codes = codes(&bench);
    let mut all = Comparison { bench, host: Host::new(&WINDOW), random: Random(0x1234_5678_9abc_def1) };
    let cases = std::env::var(CASES).ok().and_then(|cases| cases.parse().ok()).unwrap_or(ROUNDS);
    let mut failures = Vec::new();
    let mut tried = 0;
    for &code in codes.iter().filter(|code| !elsewhere(code.mnemonic())) {
        let mut seen = false;
        for memory in [false, true] {
            let rounds = (0..cases).filter_map(|_| {
                let instruction = instance(code, memory, &mut all.random)?;
                seen = true;
                tried += 1;
                all.compare(&instruction)
            });
            if let Some(failure) = rounds.collect::<Vec<_>>().into_iter().next() {
                failures.push(failure);
            }
        }
        assert!(seen, "{code:?} was never tried");
    }
    eprintln!("{} codes, {tried} runs, {} failures", codes.len(), failures.len());
    assert!(failures.is_empty(), "{} of {} codes:\n{}", failures.len(), codes.len(), failures.join("\n"));
}
