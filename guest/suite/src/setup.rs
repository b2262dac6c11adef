//! The state every test begins in.

use crate::cpu::*;
use crate::{paging, run, tables};
use core::arch::asm;

/// CR0 outside of a test.
pub const CR0: u64 = cr0::PG | cr0::WP | cr0::NE | cr0::ET | cr0::MP | cr0::PE;
/// CR4 outside of a test; OSXSAVE is added where the processor has it.
pub const CR4: u64 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
/// x87 and SSE registers as FXRSTOR takes them (SDM volume 1, 10.5.1).
#[repr(C, align(16))]
struct Fxsave([u32; 128]);

/// After reset by software: every exception masked (FCW 37Fh, MXCSR 1F80h), all registers zero.
static FXSAVE: Fxsave = {
    let mut words = [0; 128];
    words[0] = 0x037F;
    words[6] = 0x1F80;
    Fxsave(words)
};

/// Puts the executing processor, number 0, back into its initial state.
pub fn reset_cpu() {
    // SAFETY: interrupts off and strings upwards is what Rust code expects.
    unsafe { asm!("cli", "cld") };
    for pic in [0x21, 0xA1] {
        outb(pic, 0xFF); // mask what the firmware may have left running
    }
    load_control_registers();
    run::init(0);
    paging::reset();
    tables::load(0);
    write_dr7(0x400);
    write_dr6(0xFFFF_0FF0);
    wrmsr(msr::STAR, (u64::from(tables::USER_CODE32 & !3) << 48) | u64::from(tables::KERNEL_CODE) << 32);
    wrmsr(msr::FMASK, 0);
    if Feature::XSAVE.present() {
        xsetbv(if Feature::AVX.present() { 7 } else { 3 });
    }
    // SAFETY: the register state Rust code expects.
    unsafe { asm!("fxrstor64 [{}]", in(reg) &FXSAVE) };
}

/// Control registers and EFER as tests find them.
pub fn load_control_registers() {
    let osxsave = if Feature::XSAVE.present() { cr4::OSXSAVE } else { 0 };
    let scratch = CR4 | osxsave;
    write_cr0(CR0);
    if read_cr4() != scratch {
        write_cr4(scratch);
    }
    wrmsr(msr::EFER, efer::LME | efer::LMA | efer::NXE | efer::SCE);
    write_cr8(0);
}
