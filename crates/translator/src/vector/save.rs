//! Saving and restoring register state: FXSAVE, the XSAVE family, XCR0 and MXCSR (Intel SDM vol. 1, 10.5 and chapter 13).
//!
//! The engine's own area has the standard format, so most of this is copying parts of it. A component is in its initial
//! configuration (XINUSE) where its registers hold the initial values; nothing else is kept track of.

use std::ops::Range;

use engine::cpu_model::Feature;
use engine::state::{XsaveArea, cr0, cr4, gpr};
use iced_x86::{EncodingKind, Instruction, Mnemonic};

use crate::cpu::{Cpu, vector};
use crate::mmu::{Access, Rights};
use crate::op::{Done, Handler, Leave, Op};
use crate::vector::gate::{Gate, Sse, Vex};
use crate::vector::registers::{
    FCW, FCW_INIT, FDP, FIP, HEADER, MXCSR, MXCSR_INIT, MXCSR_MASK, Registers, ST, XMM, YMM_HIGH, init_x87,
    normalise_control, summarise,
};

/// State components (SDM vol. 1, 13.1).
mod component {
    pub(super) const X87: u64 = 1 << 0;
    pub(super) const SSE: u64 = 1 << 1;
    pub(super) const AVX: u64 = 1 << 2;
}
use component::{AVX, SSE, X87};

/// XCOMP_BV: the area is compacted.
const COMPACTED: u64 = 1 << 63;
/// Bytes of an area with everything that can be in one.
const AREA: usize = YMM_HIGH + 256;
/// Bytes that FXSAVE writes; what follows, up to 512, is reserved or software's.
const FXSAVE_BYTES: usize = 416;

/// The handler where the instruction is one of these.
pub(super) fn select(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    use Mnemonic::*;
    let vex = instruction.encoding() == EncodingKind::VEX;
    op.size =
        u8::from(matches!(instruction.mnemonic(), Fxsave64 | Fxrstor64 | Xsave64 | Xsaveopt64 | Xsavec64 | Xrstor64));
    Some(match instruction.mnemonic() {
        Fxsave | Fxsave64 => fxsave,
        Fxrstor | Fxrstor64 => fxrstor,
        Xsave | Xsave64 => xsave::<Plain>,
        Xsaveopt | Xsaveopt64 => xsave::<Optimised>,
        Xsavec | Xsavec64 => xsave::<Compacted>,
        Xrstor | Xrstor64 => xrstor,
        Xgetbv => xgetbv,
        Xsetbv => xsetbv,
        Ldmxcsr | Vldmxcsr if vex => ldmxcsr::<Vex>,
        Ldmxcsr => ldmxcsr::<Sse>,
        Stmxcsr | Vstmxcsr if vex => stmxcsr::<Vex>,
        Stmxcsr => stmxcsr::<Sse>,
        _ => return None,
    })
}

/// True where the instruction has REX.W: 64-bit instruction and data pointers.
fn wide(op: &Op) -> bool {
    op.size != 0
}

/// Bytes of the XMM registers that the mode can name: half of them outside 64-bit mode.
fn reachable(cpu: &Cpu) -> usize {
    if cpu.mode.is_64() { 256 } else { 128 }
}

/// The first 24 bytes of an area: control, status, tags and pointers.
fn x87_header(area: &XsaveArea, wide: bool) -> [u8; MXCSR] {
    let mut bytes = [0; MXCSR];
    bytes.copy_from_slice(&area.0[..MXCSR]);
    bytes[5] = 0;
    if !wide {
        // 32-bit pointers with selectors, which are zero (CPUID.7.0:EBX[13]).
        bytes[FIP + 4..FDP].fill(0);
        bytes[FDP + 4..].fill(0);
    }
    bytes
}

/// Loads x87 state from an area in guest format.
fn load_x87(area: &mut XsaveArea, from: &[u8], wide: bool) {
    area.0[..MXCSR].copy_from_slice(&from[..MXCSR]);
    if !wide {
        area.0[FIP + 4..FDP].fill(0);
        area.0[FDP + 4..MXCSR].fill(0);
    }
    area.0[5] = 0;
    let opcode = area.u16(6) & 0x7ff;
    area.set_u16(6, opcode);
    normalise_control(area);
    area.0[ST..XMM].copy_from_slice(&from[ST..XMM]);
    for register in 0..8 {
        area.0[ST + register * 16 + 10..ST + register * 16 + 16].fill(0);
    }
    summarise(area);
}

/// FXSAVE and FXRSTOR: #NM for CR0.EM or CR0.TS; a misaligned area is #GP.
fn fx_address(cpu: &mut Cpu, op: &Op, access: Access) -> Result<u64, Leave> {
    if cpu.state.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(cpu.raise(vector::NM));
    }
    let address = cpu.linear(&op.mem, 512, access)?;
    if address % 16 != 0 { Err(cpu.gp()) } else { Ok(address) }
}

fn fxsave(cpu: &mut Cpu, op: &Op) -> Done {
    let address = fx_address(cpu, op, Access::Write)?;
    let mut image = [0; FXSAVE_BYTES];
    let area = &cpu.state.xsave;
    image.copy_from_slice(&area.0[..FXSAVE_BYTES]);
    image[..MXCSR].copy_from_slice(&x87_header(area, wide(op)));
    image[MXCSR + 4..ST].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    let bytes = XMM + reachable(cpu);
    cpu.write_bytes(address, &image[..bytes], op.mem.segment, Rights::Current)
}

fn fxrstor(cpu: &mut Cpu, op: &Op) -> Done {
    let address = fx_address(cpu, op, Access::Read)?;
    let mut image = [0; 512];
    cpu.read_bytes(address, &mut image, op.mem.segment, Rights::Current)?;
    let mxcsr = word(&image, MXCSR);
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.gp());
    }
    let bytes = reachable(cpu);
    let area = &mut cpu.state.xsave;
    load_x87(area, &image, wide(op));
    area.set_u32(MXCSR, mxcsr);
    area.0[XMM..XMM + bytes].copy_from_slice(&image[XMM..XMM + bytes]);
    Ok(())
}

/// The address of an XSAVE area and the components asked for that are enabled (RFBM).
fn x_operand(cpu: &mut Cpu, op: &Op, access: Access) -> Result<(u64, u64), Leave> {
    if cpu.state.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    if cpu.state.cr0 & cr0::TS != 0 {
        return Err(cpu.raise(vector::NM));
    }
    let address = cpu.linear(&op.mem, HEADER as u64 + 64, access)?;
    if address % 64 != 0 {
        return Err(cpu.gp());
    }
    let asked = cpu.gpr(gpr::RAX, 2) | cpu.gpr(gpr::RDX, 2) << 32;
    Ok((address, asked & cpu.state.xcr0))
}

/// Components whose registers do not hold their initial values.
fn in_use(cpu: &Cpu) -> u64 {
    let area = &cpu.state.xsave;
    // No early way out: the compiler can vectorise this.
    let zero = |bytes: &[u8]| bytes.chunks_exact(8).fold(0, |all, chunk| all | quad(chunk, 0)) == 0;
    let control = area.u64(FCW) != u64::from(FCW_INIT);
    let x87 = control || !zero(&area.0[FIP..MXCSR]) || !zero(&area.0[ST..XMM]);
    let sse = area.u32(MXCSR) != MXCSR_INIT || !zero(&area.0[XMM..XMM + 256]);
    let avx = !zero(&area.0[YMM_HIGH..AREA]);
    (u64::from(x87) * X87) | (u64::from(sse) * SSE) | (u64::from(avx) * AVX)
}

/// The three XSAVE instructions.
trait Variant {
    /// Components in their initial configuration are left out of the area.
    const SKIPS: bool;
    /// The header says that the format is compacted. (The only extended component lies at the same place in both.)
    const COMPACTS: bool;
}
struct Plain;
struct Optimised;
struct Compacted;
impl Variant for Plain {
    const SKIPS: bool = false;
    const COMPACTS: bool = false;
}
impl Variant for Optimised {
    const SKIPS: bool = true;
    const COMPACTS: bool = false;
}
impl Variant for Compacted {
    const SKIPS: bool = true;
    const COMPACTS: bool = true;
}

/// XSAVE, XSAVEOPT, XSAVEC (SDM vol. 1, 13.7, 13.9, 13.10).
fn xsave<V: Variant>(cpu: &mut Cpu, op: &Op) -> Done {
    let (address, wanted) = x_operand(cpu, op, Access::Write)?;
    let bytes = if wanted & AVX != 0 { AREA } else { YMM_HIGH };
    let used = in_use(cpu);
    let saved = if V::SKIPS { wanted & used } else { wanted };
    let (segment, reach) = (op.mem.segment, reachable(cpu));
    // All faults come before any change.
    cpu.probe_write(address, bytes as u64, segment, Rights::Current)?;
    let mut header = [0; 16];
    if V::COMPACTS {
        header[..8].copy_from_slice(&(wanted & used).to_le_bytes());
        header[8..].copy_from_slice(&(COMPACTED | wanted).to_le_bytes());
    } else {
        cpu.read_bytes(address.wrapping_add(HEADER as u64), &mut header[..8], segment, Rights::Current)?;
        let present = quad(&header, 0) & !wanted | wanted & used;
        header[..8].copy_from_slice(&present.to_le_bytes());
    }
    let mut image = [0; AREA];
    image.copy_from_slice(&cpu.state.xsave.0[..AREA]);
    image[..MXCSR].copy_from_slice(&x87_header(&cpu.state.xsave, wide(op)));
    image[MXCSR + 4..ST].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    let mut put = |part: Range<usize>| {
        let at = address.wrapping_add(part.start as u64);
        cpu.write_bytes(at, &image[part], segment, Rights::Current)
    };
    if saved & X87 != 0 {
        put(0..MXCSR)?;
        put(ST..XMM)?;
    }
    if V::COMPACTS && saved & SSE != 0 || !V::COMPACTS && wanted & (SSE | AVX) != 0 {
        put(MXCSR..ST)?;
    }
    if saved & SSE != 0 {
        put(XMM..XMM + reach)?;
    }
    if saved & AVX != 0 {
        put(YMM_HIGH..YMM_HIGH + reach)?;
    }
    let written = if V::COMPACTS { 16 } else { 8 };
    cpu.write_bytes(address.wrapping_add(HEADER as u64), &header[..written], segment, Rights::Current)
}

/// XRSTOR (SDM vol. 1, 13.8).
fn xrstor(cpu: &mut Cpu, op: &Op) -> Done {
    let (address, wanted) = x_operand(cpu, op, Access::Read)?;
    let mut image = [0; AREA];
    cpu.read_bytes(address, &mut image[..YMM_HIGH], op.mem.segment, Rights::Current)?;
    let (present, layout) = (quad(&image, HEADER), quad(&image, HEADER + 8));
    let compacted = layout & COMPACTED != 0;
    let rest = if compacted { HEADER + 16 } else { HEADER + 8 };
    let enabled = cpu.state.xcr0;
    let bad_header = if compacted {
        !cpu.features.has(Feature::Xsavec) || layout & !COMPACTED & !enabled != 0 || present & !layout != 0
    } else {
        present & !enabled != 0
    };
    let reserved = &image[rest..if compacted { YMM_HIGH } else { HEADER + 24 }];
    if bad_header || reserved.iter().any(|&byte| byte != 0) {
        return Err(cpu.gp());
    }
    let loaded = wanted & present;
    // The standard format has MXCSR whatever XSTATE_BV says; the compacted one treats it as part of SSE.
    let control = if compacted { loaded & SSE } else { wanted & (SSE | AVX) };
    let mxcsr = word(&image, MXCSR);
    if control != 0 && mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.gp());
    }
    if loaded & AVX != 0 {
        let at = address.wrapping_add(YMM_HIGH as u64);
        cpu.read_bytes(at, &mut image[YMM_HIGH..], op.mem.segment, Rights::Current)?;
    }
    let reach = reachable(cpu);
    let area = &mut cpu.state.xsave;
    if loaded & X87 != 0 {
        load_x87(area, &image, wide(op));
    } else if wanted & X87 != 0 {
        init_x87(area);
    }
    if control != 0 {
        area.set_u32(MXCSR, mxcsr);
    } else if wanted & SSE != 0 {
        area.set_u32(MXCSR, MXCSR_INIT);
    }
    for (component, start) in [(SSE, XMM), (AVX, YMM_HIGH)] {
        if loaded & component != 0 {
            area.0[start..start + reach].copy_from_slice(&image[start..start + reach]);
        } else if wanted & component != 0 {
            area.0[start..start + reach].fill(0);
        }
    }
    Ok(())
}

fn xgetbv(cpu: &mut Cpu, _op: &Op) -> Done {
    if cpu.state.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    let value = match cpu.gpr(gpr::RCX, 2) {
        0 => cpu.state.xcr0,
        1 if cpu.features.has(Feature::Xgetbv1) => cpu.state.xcr0 & in_use(cpu),
        _ => return Err(cpu.gp()),
    };
    cpu.set_gpr(gpr::RAX, 2, value);
    cpu.set_gpr(gpr::RDX, 2, value >> 32);
    Ok(())
}

/// XSETBV: what CPUID leaf 0xd offers, x87 always, and no AVX without SSE.
fn xsetbv(cpu: &mut Cpu, _op: &Op) -> Done {
    if cpu.state.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    let value = cpu.gpr(gpr::RAX, 2) | cpu.gpr(gpr::RDX, 2) << 32;
    let offered = if cpu.features.has(Feature::Avx) { X87 | SSE | AVX } else { X87 | SSE };
    let consistent = value & X87 != 0 && value & (SSE | AVX) != AVX && value & !offered == 0;
    if cpu.mode.cpl != 0 || cpu.gpr(gpr::RCX, 2) != 0 || !consistent {
        return Err(cpu.gp());
    }
    cpu.state.xcr0 = value;
    Ok(())
}

fn ldmxcsr<G: Gate>(cpu: &mut Cpu, op: &Op) -> Done {
    G::check(cpu)?;
    let value = cpu.load::<u32>(&op.mem)?;
    if value & !MXCSR_MASK != 0 {
        return Err(cpu.gp());
    }
    cpu.state.xsave.set_u32(MXCSR, value);
    Ok(())
}

fn stmxcsr<G: Gate>(cpu: &mut Cpu, op: &Op) -> Done {
    G::check(cpu)?;
    let value = cpu.state.xsave.mxcsr();
    cpu.store(&op.mem, value)
}

fn word(image: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([image[at], image[at + 1], image[at + 2], image[at + 3]])
}

fn quad(image: &[u8], at: usize) -> u64 {
    u64::from(word(image, at)) | u64::from(word(image, at + 4)) << 32
}
