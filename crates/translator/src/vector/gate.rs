//! Whether the control registers let an instruction run (Intel SDM vol. 2, 2.4 "exception classes"; vol. 3A, 2.5, 13.1).

use engine::state::{cr0, cr4};

use crate::cpu::{Cpu, vector};
use crate::op::Done;
use crate::vector::registers::Registers;

/// The checks one class of instructions makes before it looks at its operands.
pub(super) trait Gate {
    /// It uses MMX registers: the x87 state becomes MMX state.
    const MMX: bool = false;
    /// #UD, #NM or #MF where it must not run.
    fn check(cpu: &mut Cpu) -> Done;
}

/// SSE instructions in their legacy encoding.
pub(super) struct Sse;
/// VEX-encoded instructions.
pub(super) struct Vex;
/// MMX instructions, whichever extension they came with.
pub(super) struct Mmx;
/// SSE instructions between XMM and MMX registers.
pub(super) struct SseMmx;
/// x87 instructions that look at pending exceptions first.
pub(super) struct X87;
/// FNINIT, FNSTCW and the like: they do not look.
pub(super) struct X87NoWait;

impl Gate for Sse {
    #[inline(always)]
    fn check(cpu: &mut Cpu) -> Done {
        let (cr0, cr4) = (cpu.state.cr0, cpu.state.cr4);
        if cr0 & (cr0::EM | cr0::TS) != 0 || cr4 & cr4::OSFXSR == 0 {
            return refuse(cpu, cr0 & cr0::EM != 0 || cr4 & cr4::OSFXSR == 0);
        }
        Ok(())
    }
}

impl Gate for Vex {
    #[inline(always)]
    fn check(cpu: &mut Cpu) -> Done {
        let (cr0, cr4, xcr0) = (cpu.state.cr0, cpu.state.cr4, cpu.state.xcr0);
        let off = cr4 & cr4::OSXSAVE == 0 || xcr0 & 6 != 6 || cpu.mode.real_segments();
        if off || cr0 & cr0::TS != 0 {
            return refuse(cpu, off);
        }
        Ok(())
    }
}

impl Gate for Mmx {
    const MMX: bool = true;
    #[inline(always)]
    fn check(cpu: &mut Cpu) -> Done {
        let cr0 = cpu.state.cr0;
        if cr0 & (cr0::EM | cr0::TS) != 0 {
            return refuse(cpu, cr0 & cr0::EM != 0);
        }
        pending(cpu)
    }
}

impl Gate for SseMmx {
    const MMX: bool = true;
    #[inline(always)]
    fn check(cpu: &mut Cpu) -> Done {
        Sse::check(cpu)?;
        pending(cpu)
    }
}

impl Gate for X87 {
    #[inline(always)]
    fn check(cpu: &mut Cpu) -> Done {
        X87NoWait::check(cpu)?;
        pending(cpu)
    }
}

impl Gate for X87NoWait {
    #[inline(always)]
    fn check(cpu: &mut Cpu) -> Done {
        if cpu.state.cr0 & (cr0::EM | cr0::TS) != 0 {
            return refuse(cpu, false);
        }
        Ok(())
    }
}

/// WAIT: #NM needs both CR0.MP and CR0.TS.
pub(super) fn wait(cpu: &mut Cpu) -> Done {
    if cpu.state.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
        return refuse(cpu, false);
    }
    pending(cpu)
}

/// #MF for an x87 exception the guest unmasked. With CR0.NE clear a processor signals FERR# instead, which PCs of old
/// wired to IRQ 13; that wire is deliberately absent, and the exception is as if ignored (IGNNE#).
#[inline(always)]
fn pending(cpu: &mut Cpu) -> Done {
    if cpu.state.xsave.fpu_pending() && cpu.state.cr0 & cr0::NE != 0 {
        return Err(cpu.raise(vector::MF));
    }
    Ok(())
}

/// #UD, or else #NM.
#[cold]
fn refuse(cpu: &mut Cpu, undefined: bool) -> Done {
    Err(cpu.raise(if undefined { vector::UD } else { vector::NM }))
}
