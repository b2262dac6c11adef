//! From a template to a case: bytes, then registers and memory that make the operands worth looking at.

use engine::state::rflags::{AC, DF, ID, IF, STATUS, TF};
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

use super::case::{ARENA, ARENA_BYTES, CODE, CODE_BYTES, Case, Code, DATA_BASE_16, DATA_LIMIT_16, XSAVE_BYTES, Xsave};
use crate::random::Random;

const LOCK: u8 = 0xf0;
const OPERAND_SIZE: u8 = 0x66;
const ADDRESS_SIZE: u8 = 0x67;

/// Fills `case` from `template`; returns the instruction where the bytes are one.
pub(super) fn generate(random: &mut Random, template: &str, case: &mut Case) -> Instruction {
    let bytes = encode(random, template, case.code);
    case.length = bytes.len();
    case.bytes[..bytes.len()].copy_from_slice(&bytes);
    // Mostly in the middle of a page; sometimes across the end of one.
    let place = if random.one_in(8) { 0x2000 - random.below(bytes.len() as u64) } else { 0x1800 };
    case.rip = CODE + place - case.code.code_base();
    case.rflags = 0x202 | random.next() & STATUS;
    for (bit, rarity) in [(DF, 4), (ID, 8), (AC, 16)] {
        if random.one_in(rarity) {
            case.rflags |= bit;
        }
    }
    for register in &mut case.gpr {
        *register = random.value();
    }
    for chunk in case.memory.chunks_exact_mut(8) {
        chunk.copy_from_slice(&random.next().to_le_bytes());
    }
    if case.vector {
        fill_vectors(random, case);
    }
    place_operands(random, case);
    if case.code != Code::Bits64 {
        // Nobody says what is in the upper halves outside 64-bit mode.
        case.gpr[..8].iter_mut().for_each(|register| *register &= 0xffff_ffff);
    }
    decode(case).0
}

/// XMM and YMM registers and MXCSR; the x87 stack is empty, MMX registers hold what they hold.
fn fill_vectors(random: &mut Random, case: &mut Case) {
    // What unmasked exceptions do is a matter of results, which `vector`'s own test compares.
    const ALL_MASKED: u64 = 0x1f80;
    case.xsave = Xsave::reset();
    for at in (32..416).chain(576..XSAVE_BYTES).step_by(8) {
        let value = random.value();
        // Eight of every sixteen bytes of x87 registers are reserved from the tenth on.
        let bytes = if at < 160 && at % 16 == 8 { 2 } else { 8 };
        case.xsave.0[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
    }
    let rounding_and_flags = random.next() & 0xe07f;
    case.xsave.0[24..28].copy_from_slice(&((ALL_MASKED | rounding_and_flags) as u32).to_le_bytes());
}

pub(super) fn decode(case: &Case) -> (Instruction, iced_x86::ConstantOffsets) {
    let mut decoder = Decoder::with_ip(case.code as u32, case.bytes(), case.rip, DecoderOptions::AMD);
    let instruction = decoder.decode();
    (instruction, decoder.get_constant_offsets(&instruction))
}

/// The prefixes, decided before the bytes that depend on them.
struct Prefixes {
    code: Code,
    legacy: Vec<u8>,
    rex: u8,
}

impl Prefixes {
    fn random(random: &mut Random, words: &[&str], code: Code) -> Self {
        let mut legacy = Vec::new();
        if random.one_in(4) {
            legacy.push(OPERAND_SIZE);
        }
        if random.one_in(8) {
            legacy.push(ADDRESS_SIZE);
        }
        if random.one_in(12) {
            // Not FS: the child's own thread-local storage is there.
            legacy.push(random.pick(&[0x26, 0x2e, 0x36, 0x3e, 0x65]));
        }
        if random.one_in(if words.contains(&"lock") { 3 } else { 48 }) {
            legacy.push(LOCK);
        }
        let repeats = words.contains(&"rep");
        if if repeats { !random.one_in(4) } else { random.one_in(32) } {
            legacy.push(random.pick(&[0xf2, 0xf3]));
        }
        let rex = if code == Code::Bits64 && random.one_in(2) { 0x40 | random.byte() & 15 } else { 0 };
        Self { code, legacy, rex }
    }

    fn wide(&self) -> bool {
        self.rex & 8 != 0
    }

    /// Bytes of an operand that REX.W does not widen.
    fn operand_bytes(&self) -> usize {
        let switched = !self.wide() && self.legacy.contains(&OPERAND_SIZE);
        if (self.code == Code::Bits16) != switched { 2 } else { 4 }
    }

    fn address_bytes(&self) -> usize {
        match (self.code, self.legacy.contains(&ADDRESS_SIZE)) {
            (Code::Bits64, false) => 8,
            (Code::Bits32, true) | (Code::Bits16, false) => 2,
            _ => 4,
        }
    }
}

fn encode(random: &mut Random, template: &str, code: Code) -> Vec<u8> {
    loop {
        let bytes = encode_once(random, template, code);
        if bytes.len() <= 15 {
            return bytes;
        }
    }
}

fn encode_once(random: &mut Random, template: &str, code: Code) -> Vec<u8> {
    let words: Vec<&str> = template.split(' ').collect();
    let prefixes = Prefixes::random(random, &words, code);
    let mut rest: &[&str] = &words;
    while let ["lock" | "rep", more @ ..] = rest {
        rest = more;
    }
    let mut bytes = Vec::new();
    match rest {
        [vex, more @ ..] if vex.starts_with('v') => {
            // VEX excludes 66, F2, F3, LOCK and REX; most of the time, so do we.
            let allowed = |byte: &u8| !matches!(byte, 0x66 | 0xf0 | 0xf2 | 0xf3);
            let strict = !random.one_in(16);
            bytes.extend(prefixes.legacy.iter().filter(|byte| !strict || allowed(byte)));
            vex_prefix(random, vex, code, &mut bytes);
            rest = more;
        }
        [mandatory @ ("66" | "f2" | "f3"), more @ ..] if more.first() == Some(&"0f") => {
            bytes.extend(prefixes.legacy.iter().filter(|byte| !matches!(byte, 0xf2 | 0xf3)));
            bytes.push(u8::from_str_radix(mandatory, 16).unwrap());
            rest = more;
            bytes.extend((prefixes.rex != 0).then_some(prefixes.rex));
        }
        _ => {
            bytes.extend(&prefixes.legacy);
            bytes.extend((prefixes.rex != 0).then_some(prefixes.rex));
        }
    }
    for word in rest {
        encode_word(random, word, &prefixes, &mut bytes);
    }
    bytes
}

fn vex_prefix(random: &mut Random, word: &str, code: Code, bytes: &mut Vec<u8>) {
    let (map, implied) = word[1..].split_once('.').unwrap_or((&word[1..], ""));
    let implied = ["", "66", "f3", "f2"].iter().position(|known| *known == implied).unwrap() as u8;
    let wide = random.byte() & 0x80;
    let length = if random.one_in(16) { 4 } else { 0 };
    let source = (random.byte() & 15) << 3;
    bytes.push(0xc4);
    // Outside 64-bit mode C4 is LES where it names memory, that is unless the top two bits are set.
    let extensions = if code == Code::Bits64 { random.byte() & 0xe0 } else { 0xe0 };
    bytes.push(extensions | map.parse::<u8>().unwrap());
    bytes.push(wide | source | length | implied);
}

fn encode_word(random: &mut Random, word: &str, prefixes: &Prefixes, bytes: &mut Vec<u8>) {
    let immediate = |random: &mut Random, size: usize| random.value().to_le_bytes()[..size].to_vec();
    let operand = prefixes.operand_bytes();
    match word {
        "ib" => bytes.extend(immediate(random, 1)),
        "iw" => bytes.extend(immediate(random, 2)),
        "iv" => bytes.extend(immediate(random, operand)),
        "iq" => bytes.extend(immediate(random, if prefixes.wide() { 8 } else { operand })),
        "moffs" => bytes.extend(immediate(random, prefixes.address_bytes())),
        "cb" => {
            // Not back into the instruction.
            let byte = random.byte();
            bytes.push(if random.one_in(2) { byte & 0x7f } else { byte & 0x5f | 0x80 });
        }
        "cv" => {
            let distance = random.below(0x1000) as i32 - 0x800;
            let distance = if (-24..0).contains(&distance) { 0x40 } else { distance };
            bytes.extend(&distance.to_le_bytes()[..operand]);
        }
        _ if word.starts_with('/') => modrm(random, word, prefixes, bytes),
        _ => {
            let (byte, low) = word.split_once('+').unwrap_or((word, ""));
            let byte = u8::from_str_radix(byte, 16).unwrap();
            bytes.push(match low {
                "r" => byte | random.byte() & 7,
                "c" => byte | random.byte() & 15,
                "o" => byte | random.byte() & 0x38,
                _ => byte,
            });
        }
    }
}

fn modrm(random: &mut Random, word: &str, prefixes: &Prefixes, bytes: &mut Vec<u8>) {
    let reg = match &word[1..2] {
        "r" => random.byte() & 7,
        digit => digit.parse().unwrap(),
    };
    let registers = match word.split_once(':') {
        Some((_, "m")) => false,
        Some(_) => true,
        None => random.one_in(2),
    };
    let mode = if registers { 3 } else { random.byte() % 3 };
    let rm = random.byte() & 7;
    bytes.push(mode << 6 | reg << 3 | rm);
    if registers {
        return;
    }
    let short = prefixes.address_bytes() == 2;
    let mut wide_displacement = mode == 2 || mode == 0 && rm == if short { 6 } else { 5 };
    if rm == 4 && !short {
        let sib = random.byte();
        bytes.push(sib);
        wide_displacement |= mode == 0 && sib & 7 == 5;
    }
    if wide_displacement {
        let small = random.byte() as i8 as i32;
        let displacement = if random.one_in(2) { small } else { random.next() as i32 };
        bytes.extend(&displacement.to_le_bytes()[..if short { 2 } else { 4 }]);
    } else if mode == 1 {
        bytes.push(random.byte());
    }
}

/// The offset in DS, ES or SS of an operand of `size` bytes: mostly in the arena, often near the end of a page.
fn address(random: &mut Random, code: Code, size: u64) -> u64 {
    linear_address(random, size).wrapping_sub(code.data_base())
}

fn linear_address(random: &mut Random, size: u64) -> u64 {
    let near = |random: &mut Random, place: u64| place.wrapping_sub(size + 4).wrapping_add(random.below(size + 8));
    match random.below(32) {
        0 => near(random, 1 << 47),
        1 => near(random, 0_u64.wrapping_sub(1 << 47)),
        2 => random.value(),
        3 => near(random, DATA_BASE_16 + u64::from(DATA_LIMIT_16) + 1),
        4..=11 => {
            let boundary = ARENA + random.below(5) * 0x1000;
            near(random, boundary)
        }
        12..=15 => ARENA + (random.below(ARENA_BYTES as u64 - 64) & !15),
        _ => ARENA + random.below(ARENA_BYTES as u64 - 64),
    }
}

/// Where a branch may lead: to an INT3, to nothing, to no address at all.
fn target(random: &mut Random, case: &Case) -> u64 {
    match random.below(8) {
        0 => random.value() & 0xffff,
        1 => (1 << 47) + random.below(64),
        2 => random.next() | 1 << 63,
        _ => loop {
            let target = CODE + random.below(CODE_BYTES as u64 - 16) - case.code.code_base();
            if !(case.rip..case.rip + 16).contains(&target) {
                break target;
            }
        },
    }
}

fn set(case: &mut Case, register: Register, value: u64) {
    case.gpr[register.full_register().number()] = value;
}

fn get(case: &Case, register: Register) -> u64 {
    case.gpr[register.full_register().number()]
}

/// Writes to the arena, where the address lies in it.
fn patch(case: &mut Case, at: u64, bytes: &[u8]) {
    let offset = at.wrapping_add(case.code.data_base()).wrapping_sub(ARENA);
    if offset < (ARENA_BYTES - bytes.len()) as u64 {
        case.memory[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }
}

fn place_operands(random: &mut Random, case: &mut Case) {
    let (instruction, _) = decode(case);
    if instruction.is_invalid() {
        return;
    }
    let mnemonic = instruction.mnemonic();
    if random.one_in(2) {
        // Shift counts, string counts, loop counts.
        case.gpr[1] = case.gpr[1] & !0xff | random.below(70);
    }
    match mnemonic {
        Mnemonic::Div | Mnemonic::Idiv if random.one_in(2) => {
            // A dividend of one register's width, so that the quotient fits.
            case.gpr[2] = if random.one_in(2) { 0 } else { (case.gpr[0] as i64 >> 63) as u64 };
        }
        _ => {}
    }
    if instruction.is_string_instruction() {
        return place_strings(random, case, &instruction);
    }
    if instruction.is_stack_instruction() || mnemonic == Mnemonic::Leave || mnemonic == Mnemonic::Enter {
        place_stack(random, case, &instruction);
    }
    let bit_string = matches!(mnemonic, Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && instruction.op1_kind() == OpKind::Register;
    if bit_string && !random.one_in(8) {
        set(case, instruction.op1_register(), random.below(600).wrapping_sub(300));
    }
    let goes_somewhere = instruction.is_jmp_near_indirect() || instruction.is_call_near_indirect();
    let through_stack_pointer = || instruction.op0_register().full_register() == Register::RSP;
    if goes_somewhere && instruction.op0_kind() == OpKind::Register && !through_stack_pointer() {
        let target = target(random, case);
        set(case, instruction.op0_register(), target);
    }
    if (0..instruction.op_count()).any(|position| instruction.op_kind(position) == OpKind::Memory) {
        let size = instruction.memory_size().size().max(1) as u64;
        let at = address(random, case.code, size);
        aim(random, case, &instruction, at);
        fill(random, case, at, goes_somewhere);
    }
}

fn place_strings(random: &mut Random, case: &mut Case, instruction: &Instruction) {
    let size = instruction.memory_size().size().max(1) as u64;
    case.gpr[6] = address(random, case.code, size);
    case.gpr[7] =
        if random.one_in(4) { case.gpr[6].wrapping_add(random.below(64)) } else { address(random, case.code, size) };
    if random.one_in(2) {
        // Runs of equal elements, so that comparisons go on for a while.
        let byte = random.byte();
        case.memory.fill(byte);
        case.gpr[0] = u64::from(byte) * 0x0101_0101_0101_0101;
        let odd = random.below(ARENA_BYTES as u64) as usize;
        case.memory[odd] ^= 1;
    }
}

fn place_stack(random: &mut Random, case: &mut Case, instruction: &Instruction) {
    let size = instruction.stack_pointer_increment().unsigned_abs().clamp(2, 8).into();
    case.gpr[4] = address(random, case.code, size);
    case.gpr[5] = if random.one_in(8) { random.value() } else { address(random, case.code, size) };
    let top = case.gpr[4];
    match instruction.mnemonic() {
        Mnemonic::Ret => {
            let target = target(random, case);
            patch(case, top, &target.to_le_bytes());
        }
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => {
            // Everything but the trap flag, which would trap in the middle of the signal's way back.
            let flags = (random.next() & 0x3f_ffff | IF) & !TF;
            patch(case, top, &flags.to_le_bytes());
        }
        _ => {}
    }
}

/// Chooses registers, or changes the displacement, so that the operand lies at `at`.
fn aim(random: &mut Random, case: &mut Case, instruction: &Instruction, at: u64) {
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    let scale = u64::from(instruction.memory_index_scale());
    let displacement = instruction.memory_displacement64();
    let garbage = |random: &mut Random, value: u64, register: Register| {
        // What a shorter address ignores may be anything.
        match register.size() {
            2 => value & 0xffff | random.next() << 16,
            4 => value & 0xffff_ffff | random.next() << 32,
            _ => value,
        }
    };
    if index == Register::AL {
        let value = at.wrapping_sub(get(case, index) & 0xff);
        return set(case, base, garbage(random, value, base));
    }
    if instruction.is_ip_rel_memory_operand() || (base == Register::None && index == Register::None) {
        return patch_displacement(case, instruction, at);
    }
    if base == Register::None {
        let value = at.wrapping_sub(displacement) / scale;
        return set(case, index, garbage(random, value, index));
    }
    if base.full_register() == index.full_register() {
        let value = at.wrapping_sub(displacement) / (scale + 1);
        return set(case, base, garbage(random, value, base));
    }
    let offset = if index == Register::None { 0 } else { get(case, index).wrapping_mul(scale) };
    let value = at.wrapping_sub(displacement).wrapping_sub(offset);
    set(case, base, garbage(random, value, base));
}

fn patch_displacement(case: &mut Case, instruction: &Instruction, at: u64) {
    let (_, offsets) = decode(case);
    let (place, size) = (offsets.displacement_offset(), offsets.displacement_size());
    let value = if instruction.is_ip_rel_memory_operand() { at.wrapping_sub(instruction.next_ip()) } else { at };
    case.bytes[place..place + size].copy_from_slice(&value.to_le_bytes()[..size]);
}

/// Something worth finding at the operand.
fn fill(random: &mut Random, case: &mut Case, at: u64, branch: bool) {
    if branch {
        let target = target(random, case);
        return patch(case, at, &target.to_le_bytes());
    }
    if random.one_in(2) {
        let value = random.value();
        patch(case, at, &value.to_le_bytes());
    }
    if random.one_in(3) {
        // What CMPXCHG and its wide siblings compare with.
        let offset = at.wrapping_add(case.code.data_base()).wrapping_sub(ARENA);
        if offset < ARENA_BYTES as u64 - 16 {
            let word = |at: usize| u64::from_le_bytes(case.memory[at..at + 8].try_into().unwrap());
            let (low, high) = (word(offset as usize), word(offset as usize + 8));
            case.gpr[0] = low;
            case.gpr[2] = if random.one_in(2) { high } else { low >> 32 };
        }
    }
}
