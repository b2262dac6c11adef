//! The moves that guests copy memory with, in plain Rust: no stub, no host vector state.

use iced_x86::{Code, EncodingKind, Instruction, Mnemonic, OpKind};

use crate::cpu::Cpu;
use crate::mmu::{Access, Rights};
use crate::op::{Done, Handler, Leave, Op};
use crate::vector::gate::{Gate, Sse, Vex};
use crate::vector::registers::{XMM, high, set_high, set_xmm, xmm};

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
        Movss => float::<Legacy, 4>(instruction)?,
        Movsd => float::<Legacy, 8>(instruction)?,
        Vmovss => float::<VexForm, 4>(instruction)?,
        Vmovsd => float::<VexForm, 8>(instruction)?,
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
        Movd_xmm_rm32 | VEX_Vmovd_xmm_rm32 if memory(1) => load_low::<F, 4>,
        Movd_xmm_rm32 | VEX_Vmovd_xmm_rm32 => from_general::<F, 4>,
        Movq_xmm_rm64 | VEX_Vmovq_xmm_rm64 if memory(1) => load_low::<F, 8>,
        Movq_xmm_rm64 | VEX_Vmovq_xmm_rm64 => from_general::<F, 8>,
        Movd_rm32_xmm | VEX_Vmovd_rm32_xmm if memory(0) => store_low::<F, 4>,
        Movd_rm32_xmm | VEX_Vmovd_rm32_xmm => to_general::<F, 4>,
        Movq_rm64_xmm | VEX_Vmovq_rm64_xmm if memory(0) => store_low::<F, 8>,
        Movq_rm64_xmm | VEX_Vmovq_rm64_xmm => to_general::<F, 8>,
        Movq_xmm_xmmm64 | VEX_Vmovq_xmm_xmmm64 if memory(1) => load_low::<F, 8>,
        Movq_xmmm64_xmm | VEX_Vmovq_xmmm64_xmm if memory(0) => store_low::<F, 8>,
        Movq_xmm_xmmm64 | VEX_Vmovq_xmm_xmmm64 | Movq_xmmm64_xmm | VEX_Vmovq_xmmm64_xmm => copy_quad::<F>,
        _ => return None,
    })
}

/// MOVSS and MOVSD between register and memory, and the two-operand copies.
fn float<F: Form, const BYTES: usize>(instruction: &Instruction) -> Option<Handler> {
    Some(match (instruction.op0_kind(), instruction.op1_kind()) {
        (OpKind::Memory, _) => store_low::<F, BYTES>,
        (_, OpKind::Memory) => load_low::<F, BYTES>,
        _ if instruction.encoding() == EncodingKind::Legacy => merge::<BYTES>,
        _ => return None,
    })
}

/// Writes `low`, and what the encoding says above it.
#[inline(always)]
fn write_low<F: Form>(cpu: &mut Cpu, register: u8, low: [u8; 16]) {
    set_xmm(&mut cpu.state.xsave, register, low);
    if F::CLEARS {
        set_high(&mut cpu.state.xsave, register, [0; 16]);
    }
}

/// Reads `BYTES` of memory in one piece where it lies in one page of RAM.
#[inline(always)]
fn fetch<const BYTES: usize>(cpu: &mut Cpu, op: &Op, aligned: bool) -> Result<[u8; BYTES], Leave> {
    let address = cpu.linear(&op.mem, BYTES as u64, Access::Read)?;
    if aligned && address % BYTES as u64 != 0 {
        return Err(cpu.gp());
    }
    if let Some((host, here)) = cpu.bulk(address, BYTES as u64, Access::Read)
        && here == BYTES as u64
    {
        // SAFETY: the TLB vouches for `BYTES` at `host`.
        return Ok(unsafe { host.cast::<[u8; BYTES]>().read_unaligned() });
    }
    let mut bytes = [0; BYTES];
    cpu.read_bytes(address, &mut bytes, op.mem.segment, Rights::Current)?;
    Ok(bytes)
}

/// Writes `BYTES` of memory likewise.
#[inline(always)]
fn put<const BYTES: usize>(cpu: &mut Cpu, op: &Op, aligned: bool, bytes: [u8; BYTES]) -> Done {
    let address = cpu.linear(&op.mem, BYTES as u64, Access::Write)?;
    if aligned && address % BYTES as u64 != 0 {
        return Err(cpu.gp());
    }
    if let Some((host, here)) = cpu.bulk(address, BYTES as u64, Access::Write)
        && here == BYTES as u64
    {
        // SAFETY: the TLB vouches for `BYTES` at `host`; pages that hold code are not in it.
        unsafe { host.cast::<[u8; BYTES]>().write_unaligned(bytes) };
        return Ok(());
    }
    cpu.write_bytes(address, &bytes, op.mem.segment, Rights::Current)
}

fn split<const BYTES: usize>(bytes: [u8; BYTES]) -> ([u8; 16], [u8; 16]) {
    let (mut low, mut upper) = ([0; 16], [0; 16]);
    low.copy_from_slice(&bytes[..16]);
    if BYTES == 32 {
        upper.copy_from_slice(&bytes[BYTES - 16..]);
    }
    (low, upper)
}

fn load_whole<F: Form, A: Alignment, const BYTES: usize>(cpu: &mut Cpu, op: &Op) -> Done {
    F::Gate::check(cpu)?;
    let (low, upper) = split(fetch::<BYTES>(cpu, op, A::REQUIRED)?);
    set_xmm(&mut cpu.state.xsave, op.reg[0], low);
    if F::CLEARS {
        set_high(&mut cpu.state.xsave, op.reg[0], upper);
    }
    Ok(())
}

fn store_whole<F: Form, A: Alignment, const BYTES: usize>(cpu: &mut Cpu, op: &Op) -> Done {
    F::Gate::check(cpu)?;
    let mut bytes = [0; BYTES];
    bytes[..16].copy_from_slice(&xmm(&cpu.state.xsave, op.reg[1]));
    if BYTES == 32 {
        bytes[BYTES - 16..].copy_from_slice(&high(&cpu.state.xsave, op.reg[1]));
    }
    put(cpu, op, A::REQUIRED, bytes)
}

fn copy_whole<F: Form, const BYTES: usize>(cpu: &mut Cpu, op: &Op) -> Done {
    F::Gate::check(cpu)?;
    let area = &mut cpu.state.xsave;
    let (low, upper) = (xmm(area, op.reg[1]), if BYTES == 32 { high(area, op.reg[1]) } else { [0; 16] });
    set_xmm(area, op.reg[0], low);
    if F::CLEARS {
        set_high(area, op.reg[0], upper);
    }
    Ok(())
}

fn load_low<F: Form, const BYTES: usize>(cpu: &mut Cpu, op: &Op) -> Done {
    F::Gate::check(cpu)?;
    let bytes = fetch::<BYTES>(cpu, op, false)?;
    let mut low = [0; 16];
    low[..BYTES].copy_from_slice(&bytes);
    write_low::<F>(cpu, op.reg[0], low);
    Ok(())
}

fn store_low<F: Form, const BYTES: usize>(cpu: &mut Cpu, op: &Op) -> Done {
    F::Gate::check(cpu)?;
    let mut bytes = [0; BYTES];
    bytes.copy_from_slice(&xmm(&cpu.state.xsave, op.reg[1])[..BYTES]);
    put(cpu, op, false, bytes)
}

fn from_general<F: Form, const BYTES: usize>(cpu: &mut Cpu, op: &Op) -> Done {
    F::Gate::check(cpu)?;
    let mut low = [0; 16];
    low[..BYTES].copy_from_slice(&cpu.get::<u64>(op.reg[1]).to_le_bytes()[..BYTES]);
    write_low::<F>(cpu, op.reg[0], low);
    Ok(())
}

fn to_general<F: Form, const BYTES: usize>(cpu: &mut Cpu, op: &Op) -> Done {
    F::Gate::check(cpu)?;
    let mut bytes = [0; 8];
    bytes[..BYTES].copy_from_slice(&xmm(&cpu.state.xsave, op.reg[1])[..BYTES]);
    cpu.set(op.reg[0], u64::from_le_bytes(bytes)); // a 32-bit result clears the upper half
    Ok(())
}

fn copy_quad<F: Form>(cpu: &mut Cpu, op: &Op) -> Done {
    F::Gate::check(cpu)?;
    let mut low = xmm(&cpu.state.xsave, op.reg[1]);
    low[8..].fill(0);
    write_low::<F>(cpu, op.reg[0], low);
    Ok(())
}

/// MOVSS or MOVSD between registers: the rest of the destination stays.
fn merge<const BYTES: usize>(cpu: &mut Cpu, op: &Op) -> Done {
    Sse::check(cpu)?;
    let mut value = xmm(&cpu.state.xsave, op.reg[0]);
    value[..BYTES].copy_from_slice(&xmm(&cpu.state.xsave, op.reg[1])[..BYTES]);
    set_xmm(&mut cpu.state.xsave, op.reg[0], value);
    Ok(())
}

fn zero<F: Form>(cpu: &mut Cpu, op: &Op) -> Done {
    F::Gate::check(cpu)?;
    write_low::<F>(cpu, op.reg[0], [0; 16]);
    Ok(())
}

/// Registers that VZEROUPPER and VZEROALL reach: all of them in 64-bit mode, else eight.
fn reachable(cpu: &Cpu) -> u8 {
    if cpu.mode.is_64() { 16 } else { 8 }
}

fn zero_upper(cpu: &mut Cpu, _op: &Op) -> Done {
    Vex::check(cpu)?;
    for register in 0..reachable(cpu) {
        set_high(&mut cpu.state.xsave, register, [0; 16]);
    }
    Ok(())
}

fn zero_all(cpu: &mut Cpu, _op: &Op) -> Done {
    Vex::check(cpu)?;
    for register in 0..reachable(cpu) {
        write_low::<VexForm>(cpu, register, [0; 16]);
    }
    Ok(())
}
