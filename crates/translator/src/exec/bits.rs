//! BT, BTS, BTR, BTC, BSF, BSR, TZCNT, LZCNT, POPCNT, CRC32, ADCX, ADOX.

use engine::cpu_model::Feature;
use engine::state::rflags::{CF, OF, STATUS, ZF};
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{by_width, offered, operand_bytes};
use crate::cpu::Cpu;
use crate::decode::raise_ud;
use crate::op::{Done, Handler, Op};
use crate::width::Width;

pub(super) fn select(instruction: &Instruction, cpu: &Cpu) -> Option<Handler> {
    let has = |feature| offered(cpu, feature);
    Some(match instruction.mnemonic() {
        Mnemonic::Bt => bit_forms::<Bt>(instruction),
        Mnemonic::Bts => bit_forms::<Bts>(instruction),
        Mnemonic::Btr => bit_forms::<Btr>(instruction),
        Mnemonic::Btc => bit_forms::<Btc>(instruction),
        Mnemonic::Bsf => source_forms::<ScanForward>(instruction),
        Mnemonic::Bsr => source_forms::<ScanReverse>(instruction),
        // Before these existed, processors ignored their F3 prefix.
        Mnemonic::Tzcnt if !has(Feature::Bmi1) => source_forms::<ScanForward>(instruction),
        Mnemonic::Lzcnt if !has(Feature::Abm) => source_forms::<ScanReverse>(instruction),
        Mnemonic::Tzcnt => source_forms::<TrailingZeros>(instruction),
        Mnemonic::Lzcnt => source_forms::<LeadingZeros>(instruction),
        Mnemonic::Popcnt if !has(Feature::Popcnt) => raise_ud,
        Mnemonic::Popcnt => source_forms::<Population>(instruction),
        Mnemonic::Adcx | Mnemonic::Adox if !has(Feature::Adx) => raise_ud,
        Mnemonic::Adcx => source_forms::<AddCarrying<{ CF }>>(instruction),
        Mnemonic::Adox => source_forms::<AddCarrying<{ OF }>>(instruction),
        Mnemonic::Crc32 if !has(Feature::Sse42) => raise_ud,
        Mnemonic::Crc32 => crc32_forms(instruction),
        _ => return None,
    })
}

/// What becomes of the tested bit.
trait BitChange {
    const WRITES: bool = true;
    fn change(value: u64, bit: u64) -> u64;
}

struct Bt;
struct Bts;
struct Btr;
struct Btc;

impl BitChange for Bt {
    const WRITES: bool = false;
    fn change(value: u64, _bit: u64) -> u64 {
        value
    }
}

impl BitChange for Bts {
    fn change(value: u64, bit: u64) -> u64 {
        value | bit
    }
}

impl BitChange for Btr {
    fn change(value: u64, bit: u64) -> u64 {
        value & !bit
    }
}

impl BitChange for Btc {
    fn change(value: u64, bit: u64) -> u64 {
        value ^ bit
    }
}

fn bit_forms<B: BitChange>(instruction: &Instruction) -> Handler {
    let bytes = operand_bytes(instruction, 0);
    match (instruction.op0_kind(), instruction.op1_kind()) {
        (OpKind::Register, OpKind::Register) => by_width!(bytes, bit_register_register, B),
        (OpKind::Register, _) => by_width!(bytes, bit_register_immediate, B),
        (_, OpKind::Register) => by_width!(bytes, bit_memory_register, B),
        _ => by_width!(bytes, bit_memory_immediate, B),
    }
}

#[inline(always)]
fn bit_register<B: BitChange, W: Width>(cpu: &mut Cpu, op: &Op, index: u64) -> Done {
    let bit = 1 << (index & u64::from(W::BITS - 1));
    let value = cpu.get::<W>(op.reg[0]).zext();
    if B::WRITES {
        cpu.set(op.reg[0], W::of(B::change(value, bit)));
    }
    cpu.flags.set_cf(value & bit != 0);
    Ok(())
}

#[inline(always)]
fn bit_memory<B: BitChange, W: Width>(cpu: &mut Cpu, op: &Op, index: u64) -> Done {
    let bit = 1 << (index & u64::from(W::BITS - 1));
    let value = if B::WRITES {
        cpu.modify(op, |value: W| W::of(B::change(value.zext(), bit)))?.0
    } else {
        cpu.load::<W>(&op.mem)?
    };
    cpu.flags.set_cf(value.zext() & bit != 0);
    Ok(())
}

fn bit_register_register<B: BitChange, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let index = cpu.get::<W>(op.reg[1]).zext();
    bit_register::<B, W>(cpu, op, index)
}

fn bit_register_immediate<B: BitChange, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    bit_register::<B, W>(cpu, op, op.imm)
}

fn bit_memory_immediate<B: BitChange, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    bit_memory::<B, W>(cpu, op, op.imm)
}

/// The index is signed and reaches beyond the operand: it names a bit of the string that begins at the address.
fn bit_memory_register<B: BitChange, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let index = cpu.get::<W>(op.reg[1]).sext();
    let elements = index as i64 >> W::BITS.trailing_zeros();
    let mut moved = *op;
    moved.mem.disp = op.mem.disp.wrapping_add((elements as u64).wrapping_mul(W::BYTES as u64));
    bit_memory::<B, W>(cpu, &moved, index)
}

/// An operation of a register and a register or memory operand, both of one width.
trait FromSource {
    fn run<W: Width>(cpu: &mut Cpu, to: u8, source: W);
}

struct ScanForward;
struct ScanReverse;
struct TrailingZeros;
struct LeadingZeros;
struct Population;
/// ADCX and ADOX: the flag that carries.
struct AddCarrying<const FLAG: u64>;

fn source_forms<S: FromSource>(instruction: &Instruction) -> Handler {
    let bytes = operand_bytes(instruction, 0);
    match instruction.op1_kind() {
        OpKind::Register => by_width!(bytes, source_register, S),
        _ => by_width!(bytes, source_memory, S),
    }
}

fn source_register<S: FromSource, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let source = cpu.get::<W>(op.reg[1]);
    S::run(cpu, op.reg[0], source);
    Ok(())
}

fn source_memory<S: FromSource, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let source = cpu.load::<W>(&op.mem)?;
    S::run(cpu, op.reg[0], source);
    Ok(())
}

fn zf_if(zero: bool) -> u64 {
    if zero { ZF } else { 0 }
}

/// BSF and BSR leave the destination alone where the source is 0 (AMD APM vol. 3; Intel's processors agree).
fn scanned<W: Width>(cpu: &mut Cpu, to: u8, source: W, position: u32) {
    cpu.flags.change(ZF, zf_if(source.zext() == 0));
    if source.zext() != 0 {
        cpu.set(to, W::of(position.into()));
    }
}

impl FromSource for ScanForward {
    fn run<W: Width>(cpu: &mut Cpu, to: u8, source: W) {
        scanned(cpu, to, source, source.zext().trailing_zeros());
    }
}

impl FromSource for ScanReverse {
    fn run<W: Width>(cpu: &mut Cpu, to: u8, source: W) {
        scanned(cpu, to, source, 63 - source.zext().leading_zeros().min(63));
    }
}

/// TZCNT and LZCNT: CF where the source is 0, ZF where the count is. The others are undefined; AMD's processors clear all
/// but OF.
fn counted<W: Width>(cpu: &mut Cpu, to: u8, source: W, count: u32) {
    let cf = if source.zext() == 0 { CF } else { 0 };
    cpu.flags.change(STATUS & !OF, cf | zf_if(count == 0));
    cpu.set(to, W::of(count.into()));
}

impl FromSource for TrailingZeros {
    fn run<W: Width>(cpu: &mut Cpu, to: u8, source: W) {
        counted(cpu, to, source, source.zext().trailing_zeros().min(W::BITS));
    }
}

impl FromSource for LeadingZeros {
    fn run<W: Width>(cpu: &mut Cpu, to: u8, source: W) {
        counted(cpu, to, source, source.zext().leading_zeros() - (64 - W::BITS));
    }
}

impl FromSource for Population {
    fn run<W: Width>(cpu: &mut Cpu, to: u8, source: W) {
        cpu.flags.set_status(zf_if(source.zext() == 0));
        cpu.set(to, W::of(source.zext().count_ones().into()));
    }
}

impl<const FLAG: u64> FromSource for AddCarrying<FLAG> {
    fn run<W: Width>(cpu: &mut Cpu, to: u8, source: W) {
        let carry = cpu.flags.status() & FLAG != 0;
        let sum = u128::from(cpu.get::<W>(to).zext()) + u128::from(source.zext()) + u128::from(carry);
        cpu.flags.change(FLAG, if sum >> W::BITS != 0 { FLAG } else { 0 });
        cpu.set(to, W::of(sum as u64));
    }
}

/// CRC32's two operands differ in width; the result has 32 bits in either destination.
fn crc32_forms(instruction: &Instruction) -> Handler {
    let bytes = operand_bytes(instruction, 1);
    match instruction.op1_kind() {
        OpKind::Register => by_width!(bytes, crc32_register),
        _ => by_width!(bytes, crc32_memory),
    }
}

/// The polynomial 11EDC6F41h, bits reflected (SDM vol. 2, CRC32).
const CRC32C: u32 = 0x82f6_3b78;

const CRC32C_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut value = index as u32;
        let mut bit = 0;
        while bit < 8 {
            value = value >> 1 ^ if value & 1 != 0 { CRC32C } else { 0 };
            bit += 1;
        }
        table[index] = value;
        index += 1;
    }
    table
};

#[inline(always)]
fn crc32<W: Width>(cpu: &mut Cpu, op: &Op, source: W) -> Done {
    let bytes = source.zext().to_le_bytes();
    let start = cpu.get::<u32>(op.reg[0]);
    let step = |crc: u32, byte: &u8| crc >> 8 ^ CRC32C_TABLE[usize::from(crc as u8 ^ byte)];
    cpu.set(op.reg[0], bytes[..W::BYTES].iter().fold(start, step));
    Ok(())
}

fn crc32_register<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let source = cpu.get::<W>(op.reg[1]);
    crc32(cpu, op, source)
}

fn crc32_memory<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let source = cpu.load::<W>(&op.mem)?;
    crc32(cpu, op, source)
}
