//! Handlers that run one guest instruction on the host's processor.
//!
//! ```text
//!   gate (#UD #NM #MF) ─> address, alignment, load or probe (#GP #SS #PF) ─> stub ─┬─> registers, flags, MXCSR, store
//!                                                                                  └─> #XM, nothing written
//! ```

use engine::state::{cr4, rflags};

use crate::cpu::{Cpu, vector};
use crate::mmu::{Access, Rights};
use crate::op::{Done, Handler, Leave, Op};
use crate::vector::emit::{Frame, General, Memory};
use crate::vector::gate::{Gate, Mmx, Sse, SseMmx, Vex};
use crate::vector::registers::{MXCSR, MXCSR_INIT, Registers, enter_mmx};
use crate::vector::stub::Stub;

/// MXCSR: the exception flags.
const FLAGS: u32 = 0x3f;
/// MXCSR: flags found before computing (SDM vol. 1, 11.5.2): invalid, denormal, divide by zero.
const BEFORE: u32 = 0x07;
/// MXCSR: underflow.
const UNDERFLOW: u32 = 1 << 4;
/// From a flag to its mask.
const MASKS: u32 = 7;
/// MXCSR: all exceptions masked.
const ALL_MASKED: u32 = FLAGS << MASKS;
/// MXCSR: flush to zero.
const FLUSH: u32 = 1 << 15;

/// Room for the largest operand, aligned as the strictest instruction wants it.
#[repr(C, align(64))]
pub(super) struct Bounce(pub [u8; 64]);

/// The handler for an instruction with a stub, which goes into `op.imm`. Vector registers in `op.reg` are 16-byte units
/// in the XSAVE area.
pub(super) fn handler(stub: &'static Stub, vex: bool, xmm: bool, op: &mut Op) -> Handler {
    op.imm = stub.address();
    match (vex, stub.mmx, xmm) {
        (true, ..) => by_memory::<Vex>(stub.memory),
        (_, true, true) => by_memory::<SseMmx>(stub.memory),
        (_, true, false) => by_memory::<Mmx>(stub.memory),
        _ => by_memory::<Sse>(stub.memory),
    }
}

fn by_memory<G: Gate>(memory: Memory) -> Handler {
    match memory {
        Memory::None => plain::<G>,
        Memory::Load => load::<G>,
        Memory::Store => store::<G>,
    }
}

/// The stub of an op made by [`handler`].
#[inline(always)]
pub(super) fn stub_of(op: &Op) -> &'static Stub {
    // SAFETY: `handler` and `x87::handler`, the only makers of ops with these handlers, put a leaked `Stub` there.
    unsafe { &*std::ptr::with_exposed_provenance(op.imm as usize) }
}

fn plain<G: Gate>(cpu: &mut Cpu, op: &Op) -> Done {
    G::check(cpu)?;
    run::<G>(cpu, op, stub_of(op), std::ptr::null_mut())
}

fn load<G: Gate>(cpu: &mut Cpu, op: &Op) -> Done {
    G::check(cpu)?;
    let stub = stub_of(op);
    let mut bounce = Bounce([0; 64]);
    let memory = operand(cpu, op, stub, &mut bounce)?;
    run::<G>(cpu, op, stub, memory)
}

fn store<G: Gate>(cpu: &mut Cpu, op: &Op) -> Done {
    G::check(cpu)?;
    let stub = stub_of(op);
    let bytes = usize::from(stub.bytes);
    let address = cpu.linear(&op.mem, bytes as u64, Access::Write)?;
    aligned(cpu, stub, address)?;
    if stub.float || G::MMX {
        // There is more to it than the store: it must not fault after that.
        cpu.probe_write(address, bytes as u64, op.mem.segment, Rights::Current)?;
    }
    let mut bounce = Bounce([0; 64]);
    run::<G>(cpu, op, stub, bounce.0.as_mut_ptr())?;
    cpu.write_bytes(address, &bounce.0[..bytes], op.mem.segment, Rights::Current)
}

/// Where the stub finds its operand: in guest RAM itself where that is one piece, else copied to `bounce`.
#[inline(always)]
pub(super) fn operand(cpu: &mut Cpu, op: &Op, stub: &Stub, bounce: &mut Bounce) -> Result<*mut u8, Leave> {
    let bytes = usize::from(stub.bytes);
    let address = cpu.linear(&op.mem, bytes as u64, Access::Read)?;
    aligned(cpu, stub, address)?;
    if let Some(host) = cpu.direct(address, bytes as u64, Access::Read, Rights::Current) {
        return Ok(host);
    }
    cpu.read_bytes(address, &mut bounce.0[..bytes], op.mem.segment, Rights::Current)?;
    Ok(bounce.0.as_mut_ptr())
}

#[inline(always)]
fn aligned(cpu: &mut Cpu, stub: &Stub, address: u64) -> Done {
    if stub.aligned && !address.is_multiple_of(u64::from(stub.bytes)) {
        return Err(cpu.gp());
    }
    Ok(())
}

#[inline(always)]
fn run<G: Gate>(cpu: &mut Cpu, op: &Op, stub: &Stub, memory: *mut u8) -> Done {
    if G::MMX {
        enter_mmx(&mut cpu.state.xsave);
    }
    let mut frame = frame(cpu, op, stub, memory);
    // SAFETY: the stub reads and writes the frame, the registers it points to and `stub.bytes` at `memory`, nothing else.
    unsafe { (stub.entry)(&mut frame) };
    if stub.float {
        settle(cpu, &frame)?;
    }
    if stub.flags_out {
        cpu.flags.set_status(frame.flags);
    }
    Ok(())
}

#[inline(always)]
pub(super) fn frame(cpu: &mut Cpu, op: &Op, stub: &Stub, memory: *mut u8) -> Frame {
    let area = cpu.state.xsave.0.as_mut_ptr();
    let file = cpu.state.gpr.as_mut_ptr().cast::<u8>();
    let general = match stub.general {
        // SAFETY: offsets of wide registers, 0..=120.
        General::Operand(position) => unsafe { file.add(usize::from(op.reg[usize::from(position & 3)] & 127)) },
        _ => file,
    };
    let guest = cpu.state.xsave.u32(MXCSR);
    let forbidden = !guest >> MASKS & FLAGS;
    let mut mxcsr = guest & !FLAGS | ALL_MASKED;
    if forbidden & UNDERFLOW != 0 {
        // An unmasked underflow is any tiny result, exact ones too; a masked one only inexact results. Flushing to zero
        // (which an unmasked guest does not get) flags all tiny ones.
        mxcsr |= FLUSH;
    }
    Frame {
        vectors: op.reg.map(|unit| area.wrapping_add(usize::from(unit) * 16)),
        general,
        memory,
        flags: 0,
        mxcsr,
        forbidden,
        raised: 0,
        host_mxcsr: MXCSR_INIT,
    }
}

/// Adds the exceptions of an instruction to MXCSR; raises #XM where one is unmasked.
#[inline(always)]
fn settle(cpu: &mut Cpu, frame: &Frame) -> Done {
    let raised = frame.raised & FLAGS;
    if raised & frame.forbidden == 0 {
        let guest = cpu.state.xsave.u32(MXCSR);
        cpu.state.xsave.set_u32(MXCSR, guest | raised);
        return Ok(());
    }
    unmasked(cpu, raised, frame.forbidden)
}

#[cold]
fn unmasked(cpu: &mut Cpu, raised: u32, forbidden: u32) -> Done {
    // Where an operand is already refused, nothing is computed, and no flag of the result is set.
    // Not exact: beside an unmasked overflow or underflow the precision flag is always set, as masked arithmetic has it;
    // a processor sets it only where the result would be inexact with an exponent of any size too.
    // And of the several steps of a dot product a processor runs only those up to the exception; flags of all are here.
    let raised = if raised & forbidden & BEFORE != 0 { raised & BEFORE } else { raised };
    let guest = cpu.state.xsave.u32(MXCSR);
    cpu.state.xsave.set_u32(MXCSR, guest | raised);
    let delivered = cpu.state.cr4 & cr4::OSXMMEXCPT != 0;
    Err(cpu.raise(if delivered { vector::XM } else { vector::UD }))
}

/// RFLAGS for a stub: the guest's status bits, and nothing that could disturb the host.
pub(super) fn flags_in(cpu: &Cpu) -> u64 {
    cpu.flags.status() | rflags::FIXED | rflags::IF
}
