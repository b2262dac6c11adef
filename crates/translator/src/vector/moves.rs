//! The moves that guests copy memory with, in plain Rust: no stub, no host vector state.

use std::arch::x86_64::{
    __m128i, _mm_cvtsi64_si128, _mm_cvtsi128_si64, _mm_loadu_si128, _mm_setzero_si128, _mm_storeu_si128,
};

use iced_x86::{Code, EncodingKind, Instruction, Mnemonic, OpKind};

use crate::cpu::Cpu;
use crate::mmu::{Access, Rights};
use crate::op::{Done, Handler, Leave, Op};
use crate::vector::gate::{Gate, Sse, Vex};
use crate::vector::registers::{TO_HIGH, XMM};
use crate::width::Width;

/// How an encoding treats what lies above the operand.
trait Form {
    type Gate: Gate;
    /// Bits above what is written become zero.
    const CLEARS: bool;
}

struct Legacy;
struct VexForm;

impl Form for Legacy {
    type Gate = Sse;
    const CLEARS: bool = false;
}

impl Form for VexForm {
    type Gate = Vex;
    const CLEARS: bool = true;
}

/// What a load may rely on.
trait Alignment {
    const REQUIRED: bool;
}
struct Aligned;
struct Anywhere;
impl Alignment for Aligned {
    const REQUIRED: bool = true;
}
impl Alignment for Anywhere {
    const REQUIRED: bool = false;
}

/// The handler where the instruction is such a move. Vector registers in `op.reg` become plain numbers.
pub(super) fn select(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    use Mnemonic::*;
    let handler = match instruction.mnemonic() {
        Movups | Movupd | Movdqu | Lddqu => whole::<Legacy, Anywhere, 16>(instruction),
        Movaps | Movapd | Movdqa | Movntps | Movntpd | Movntdq | Movntdqa => whole::<Legacy, Aligned, 16>(instruction),
        Vmovups | Vmovupd | Vmovdqu | Vlddqu if is_ymm(instruction) => whole::<VexForm, Anywhere, 32>(instruction),
        Vmovups | Vmovupd | Vmovdqu | Vlddqu => whole::<VexForm, Anywhere, 16>(instruction),
        Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa if is_ymm(instruction) => {
            whole::<VexForm, Aligned, 32>(instruction)
        }
        Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa => {
            whole::<VexForm, Aligned, 16>(instruction)
        }
        Movd | Movq => scalar::<Legacy>(instruction)?,
        Vmovd | Vmovq => scalar::<VexForm>(instruction)?,
        Movss => float::<Legacy, u32>(instruction)?,
        Movsd => float::<Legacy, u64>(instruction)?,
        Vmovss => float::<VexForm, u32>(instruction)?,
        Vmovsd => float::<VexForm, u64>(instruction)?,
        Pxor | Xorps | Xorpd if same(instruction, 0, 1) && instruction.op0_register().is_xmm() => zero::<Legacy>,
        Vpxor | Vxorps | Vxorpd if same(instruction, 1, 2) => zero::<VexForm>,
        Vzeroupper => zero_upper,
        Vzeroall => zero_all,
        _ => return None,
    };
    for position in 0..instruction.op_count().min(4) {
        if instruction.op_kind(position) == OpKind::Register && instruction.op_register(position).is_vector_register() {
            op.reg[position as usize] -= (XMM / 16) as u8;
        }
    }
    Some(handler)
}

fn is_ymm(instruction: &Instruction) -> bool {
    let ymm =
        |position| instruction.op_kind(position) == OpKind::Register && instruction.op_register(position).is_ymm();
    ymm(0) || ymm(1)
}

fn same(instruction: &Instruction, a: u32, b: u32) -> bool {
    instruction.op_kind(a) == OpKind::Register
        && instruction.op_kind(b) == OpKind::Register
        && instruction.op_register(a) == instruction.op_register(b)
}

fn whole<F: Form, A: Alignment, const BYTES: usize>(instruction: &Instruction) -> Handler {
    match (instruction.op0_kind(), instruction.op1_kind()) {
        (OpKind::Memory, _) => store_whole::<F, A, BYTES>,
        (_, OpKind::Memory) => load_whole::<F, A, BYTES>,
        _ => copy_whole::<F, BYTES>,
    }
}

/// MOVD and MOVQ.
fn scalar<F: Form>(instruction: &Instruction) -> Option<Handler> {
    use Code::*;
    let memory = |position| instruction.op_kind(position) == OpKind::Memory;
    Some(match instruction.code() {
        Movd_xmm_rm32 | VEX_Vmovd_xmm_rm32 if memory(1) => load_low::<F, u32>,
        Movd_xmm_rm32 | VEX_Vmovd_xmm_rm32 => from_general::<F, u32>,
        Movq_xmm_rm64 | VEX_Vmovq_xmm_rm64 if memory(1) => load_low::<F, u64>,
        Movq_xmm_rm64 | VEX_Vmovq_xmm_rm64 => from_general::<F, u64>,
        Movd_rm32_xmm | VEX_Vmovd_rm32_xmm if memory(0) => store_low::<F, u32>,
        Movd_rm32_xmm | VEX_Vmovd_rm32_xmm => to_general::<F, u32>,
        Movq_rm64_xmm | VEX_Vmovq_rm64_xmm if memory(0) => store_low::<F, u64>,
        Movq_rm64_xmm | VEX_Vmovq_rm64_xmm => to_general::<F, u64>,
        Movq_xmm_xmmm64 | VEX_Vmovq_xmm_xmmm64 if memory(1) => load_low::<F, u64>,
        Movq_xmmm64_xmm | VEX_Vmovq_xmmm64_xmm if memory(0) => store_low::<F, u64>,
        Movq_xmm_xmmm64 | VEX_Vmovq_xmm_xmmm64 | Movq_xmmm64_xmm | VEX_Vmovq_xmmm64_xmm => copy_quad::<F>,
        _ => return None,
    })
}

/// MOVSS and MOVSD between register and memory, and the two-operand copies.
fn float<F: Form, W: Width>(instruction: &Instruction) -> Option<Handler> {
    Some(match (instruction.op0_kind(), instruction.op1_kind()) {
        (OpKind::Memory, _) => store_low::<F, W>,
        (_, OpKind::Memory) => load_low::<F, W>,
        _ if instruction.encoding() == EncodingKind::Legacy => merge::<W>,
        _ => return None,
    })
}

/// Where a register's low half is; its upper half is [`TO_HIGH`] further.
#[inline(always)]
fn low_half(cpu: &mut Cpu, register: u8) -> *mut __m128i {
    // SAFETY: XMM0 to XMM15 lie within the area.
    unsafe { cpu.state.xsave.0.as_mut_ptr().add(XMM + usize::from(register & 15) * 16).cast() }
}

#[inline(always)]
fn low(cpu: &mut Cpu, register: u8) -> __m128i {
    // SAFETY: `low_half` points into the area.
    unsafe { _mm_loadu_si128(low_half(cpu, register)) }
}

#[inline(always)]
fn upper(cpu: &mut Cpu, register: u8) -> __m128i {
    // SAFETY: the upper halves lie within the area too.
    unsafe { _mm_loadu_si128(low_half(cpu, register).byte_add(TO_HIGH)) }
}

#[inline(always)]
fn set_upper(cpu: &mut Cpu, register: u8, value: __m128i) {
    // SAFETY: as in `upper`.
    unsafe { _mm_storeu_si128(low_half(cpu, register).byte_add(TO_HIGH), value) };
}

#[inline(always)]
fn nothing() -> __m128i {
    // SAFETY: SSE2 is there on every x86-64.
    unsafe { _mm_setzero_si128() }
}

/// Writes `value` to the low half, and what the encoding says above it.
#[inline(always)]
fn set<F: Form>(cpu: &mut Cpu, register: u8, value: __m128i, above: __m128i) {
    // SAFETY: `low_half` points into the area.
    unsafe { _mm_storeu_si128(low_half(cpu, register), value) };
    if F::CLEARS {
        set_upper(cpu, register, above);
    }
}

/// The linear address of the operand, aligned where the instruction insists.
#[inline(always)]
fn address<A: Alignment, const BYTES: usize>(cpu: &mut Cpu, op: &Op, access: Access) -> Result<u64, Leave> {
    let address = cpu.linear(&op.mem, BYTES as u64, access)?;
    if A::REQUIRED && !address.is_multiple_of(BYTES as u64) {
        return Err(cpu.gp());
    }
    Ok(address)
}

/// Two halves of an operand that takes the long way.
#[repr(C)]
struct Halves([__m128i; 2]);

impl Halves {
    fn bytes(&mut self) -> &mut [u8; 32] {
        // SAFETY: 32 bytes of plain data.
        unsafe { &mut *std::ptr::from_mut(self).cast() }
    }
}

fn load_whole<F: Form, A: Alignment, const BYTES: usize>(cpu: &mut Cpu, op: &Op) -> Done {
    F::Gate::check(cpu)?;
    let address = address::<A, BYTES>(cpu, op, Access::Read)?;
    let mut long_way = Halves([nothing(); 2]);
    let from: *const __m128i = match cpu.direct(address, BYTES as u64, Access::Read, Rights::Current) {
        Some(host) => host.cast(),
        None => {
            cpu.read_bytes(address, &mut long_way.bytes()[..BYTES], op.mem.segment, Rights::Current)?;
            long_way.0.as_ptr()
        }
    };
    // SAFETY: `BYTES` at `from`, guest memory or `long_way`.
    let (value, above) =
        unsafe { (_mm_loadu_si128(from), if BYTES == 32 { _mm_loadu_si128(from.add(1)) } else { nothing() }) };
    set::<F>(cpu, op.reg[0], value, above);
    Ok(())
}

fn store_whole<F: Form, A: Alignment, const BYTES: usize>(cpu: &mut Cpu, op: &Op) -> Done {
    F::Gate::check(cpu)?;
    let (value, above) = (low(cpu, op.reg[1]), upper(cpu, op.reg[1]));
    let address = address::<A, BYTES>(cpu, op, Access::Write)?;
    if let Some(host) = cpu.direct(address, BYTES as u64, Access::Write, Rights::Current) {
        let to: *mut __m128i = host.cast();
        // SAFETY: `direct` vouches for `BYTES` at `host`.
        unsafe {
            _mm_storeu_si128(to, value);
            if BYTES == 32 {
                _mm_storeu_si128(to.add(1), above);
            }
        }
        return Ok(());
    }
    cpu.write_bytes(address, &Halves([value, above]).bytes()[..BYTES], op.mem.segment, Rights::Current)
}

fn copy_whole<F: Form, const BYTES: usize>(cpu: &mut Cpu, op: &Op) -> Done {
    F::Gate::check(cpu)?;
    let value = low(cpu, op.reg[1]);
    let above = if BYTES == 32 { upper(cpu, op.reg[1]) } else { nothing() };
    set::<F>(cpu, op.reg[0], value, above);
    Ok(())
}

/// A vector with `value` at the bottom and zeros above.
#[inline(always)]
fn bottom(value: u64) -> __m128i {
    // SAFETY: SSE2 is there on every x86-64.
    unsafe { _mm_cvtsi64_si128(value as i64) }
}

/// The low 64 bits.
#[inline(always)]
fn quad(value: __m128i) -> u64 {
    // SAFETY: as in `bottom`.
    unsafe { _mm_cvtsi128_si64(value) as u64 }
}

fn load_low<F: Form, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    F::Gate::check(cpu)?;
    let value = cpu.load::<W>(&op.mem)?;
    set::<F>(cpu, op.reg[0], bottom(value.zext()), nothing());
    Ok(())
}

fn store_low<F: Form, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    F::Gate::check(cpu)?;
    let value = quad(low(cpu, op.reg[1]));
    cpu.store(&op.mem, W::of(value))
}

fn from_general<F: Form, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    F::Gate::check(cpu)?;
    let value = cpu.get::<W>(op.reg[1]);
    set::<F>(cpu, op.reg[0], bottom(value.zext()), nothing());
    Ok(())
}

fn to_general<F: Form, W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    F::Gate::check(cpu)?;
    let value = quad(low(cpu, op.reg[1]));
    cpu.set(op.reg[0], W::of(value)); // a 32-bit result clears the upper half
    Ok(())
}

fn copy_quad<F: Form>(cpu: &mut Cpu, op: &Op) -> Done {
    F::Gate::check(cpu)?;
    let value = quad(low(cpu, op.reg[1]));
    set::<F>(cpu, op.reg[0], bottom(value), nothing());
    Ok(())
}

/// MOVSS or MOVSD between registers: the rest of the destination stays.
fn merge<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    Sse::check(cpu)?;
    let value = W::of(quad(low(cpu, op.reg[1])));
    // SAFETY: at most 8 of the 16 bytes at the bottom of a register.
    unsafe { value.store(low_half(cpu, op.reg[0]).cast()) };
    Ok(())
}

fn zero<F: Form>(cpu: &mut Cpu, op: &Op) -> Done {
    F::Gate::check(cpu)?;
    set::<F>(cpu, op.reg[0], nothing(), nothing());
    Ok(())
}

/// Registers that VZEROUPPER and VZEROALL reach: all of them in 64-bit mode, else eight.
fn reachable(cpu: &Cpu) -> u8 {
    if cpu.mode.is_64() { 16 } else { 8 }
}

fn zero_upper(cpu: &mut Cpu, _op: &Op) -> Done {
    Vex::check(cpu)?;
    for register in 0..reachable(cpu) {
        set_upper(cpu, register, nothing());
    }
    Ok(())
}

fn zero_all(cpu: &mut Cpu, _op: &Op) -> Done {
    Vex::check(cpu)?;
    for register in 0..reachable(cpu) {
        set::<VexForm>(cpu, register, nothing(), nothing());
    }
    Ok(())
}
