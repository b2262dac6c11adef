//! Fast system calls and the bases that go with them (SDM volume 3, 5.8.7 and 5.8.8; volume 2).

use crate::cpu::*;
use crate::run::{self, USER_ALIAS};
use crate::tables::*;
use crate::tap::*;
use crate::{code, tests};

tests![
    fsgsbase, swapgs, syscall, sysret, sysret_non_canonical, sysenter_sysexit,
];

/// RDFSBASE and friends: CR4.FSGSBASE, any level, canonical (SDM volume 2).
fn fsgsbase(t: &mut T) {
    let write = code!(".byte 0xF3, 0x48, 0x0F, 0xAE, 0xD0"); // wrfsbase rax
    let read = code!(".byte 0xF3, 0x48, 0x0F, 0xAE, 0xC0"); // rdfsbase rax
    t.user_faults("without CR4.FSGSBASE", write, UD);
    if !Feature::FSGSBASE.present() {
        return;
    }
    write_cr4(read_cr4() | cr4::FSGSBASE);
    t.runs("wrfsbase", &write.user().with(|r| r.rax = 0x1234_5678_9ABC));
    t.eq("MSR", rdmsr(msr::FS_BASE), 0x1234_5678_9ABC);
    t.eq("rdfsbase", read.user().run().regs.rax, 0x1234_5678_9ABC);
    let exit = write.user().with(|r| r.rax = 1 << 47).run();
    t.fault("non-canonical", write, &exit, gp(0));
    let write32 = code!(".byte 0xF3, 0x0F, 0xAE, 0xD8"); // wrgsbase eax
    t.runs("wrgsbase eax", &write32.user().with(|r| r.rax = u64::MAX));
    t.eq("zero-extended", rdmsr(msr::GS_BASE), 0xFFFF_FFFF);
    let compat = code!(32: ".byte 0xF3, 0x0F, 0xAE, 0xD0");
    t.fault("compatibility mode", compat, &compat.user32().run(), UD);
    write_cr4(read_cr4() & !cr4::FSGSBASE);
}

/// SWAPGS exchanges the bases.
fn swapgs(t: &mut T) {
    wrmsr(msr::GS_BASE, 0x1000);
    wrmsr(msr::KERNEL_GS_BASE, 0xFFFF_8000_0000_0000);
    t.runs("swapgs", &code!("swapgs").kernel());
    t.eq("GS base", rdmsr(msr::GS_BASE), 0xFFFF_8000_0000_0000);
    t.eq("kernel GS base", rdmsr(msr::KERNEL_GS_BASE), 0x1000);
    let compat = code!(32: ".byte 0x0F, 0x01, 0xF8");
    t.fault("compatibility mode", compat, &compat.user32().run(), UD);
}

/// SYSCALL: RCX, R11, FMASK, selectors from STAR, flat segments whatever the descriptors (SDM volume 2).
fn syscall(t: &mut T) {
    let handler = code!("mov rax, rsp", "mov edx, cs", "mov esi, ss");
    wrmsr(msr::LSTAR, handler.start);
    wrmsr(msr::FMASK, flag::IF | flag::DF | flag::CF | flag::TF);
    let code = code!(""; "syscall"; "nop");
    let set = flag::CF | flag::DF | flag::ZF | flag::AC | flag::FIXED;
    let exit = t.runs("syscall", &code.user().with(|r| r.rflags = set));
    t.eq("RCX", exit.regs.rcx, code.next + USER_ALIAS);
    t.eq("R11", exit.regs.r11, set);
    t.eq("RFLAGS", exit.regs.rflags, flag::ZF | flag::AC | flag::FIXED);
    t.eq("RSP is kept", exit.regs.rax, run::snippet_stack(0) + USER_ALIAS);
    t.eq("CS", exit.regs.rdx, KERNEL_CODE.into());
    t.eq("SS", exit.regs.rsi, KERNEL_DATA.into());
    // The descriptors are not read: a STAR that names nonsense still gives 64-bit code at level 0.
    let star = rdmsr(msr::STAR);
    wrmsr(msr::STAR, 0x1003 << 32);
    let exit = t.runs("STAR beyond the GDT", &code.user());
    t.eq("CS with RPL cleared", exit.regs.rdx, 0x1000);
    t.eq("SS", exit.regs.rsi, 0x1008);
    wrmsr(msr::STAR, star);
}

/// SYSRET: 64-bit and 32-bit forms, selectors with RPL 3, RF and VM cleared (SDM volume 2).
fn sysret(t: &mut T) {
    let target = code!("mov edx, cs", "mov esi, ss");
    let code = code!("sysretq");
    let regs = code.kernel().with(|r| (r.rcx, r.r11) = (target.start + USER_ALIAS, flag::CF | flag::RF | flag::VM | 1 << 15));
    let exit = t.runs("sysretq", &regs);
    t.eq("CS", exit.regs.rdx, USER_CODE.into());
    t.eq("SS", exit.regs.rsi, USER_DATA.into());
    t.eq("RFLAGS", exit.regs.rflags, flag::CF | flag::FIXED);
    let target = code!(32: "mov edx, cs");
    let exit = t.runs("sysretl", &code!(".byte 0x0F, 0x07").kernel().with(|r| (r.rcx, r.r11) = (target.start + USER_ALIAS, 2)));
    t.eq("CS", exit.regs.rdx & 0xFFFF, USER_CODE32.into());
}

/// SYSRET to a non-canonical RCX: #GP(0) at level 0 on Intel, after the change of level on AMD (SDM, APM volume 3).
fn sysret_non_canonical(t: &mut T) {
    let code = code!("sysretq");
    let exit = code.kernel().with(|r| (r.rcx, r.r11) = (1 << 47, 2)).run();
    t.event("#GP", &exit, gp(0));
    let level = if is_amd() { 3 } else { 0 };
    t.eq("level", exit.regs.cs & 3, level);
}

/// SYSENTER and SYSEXIT (SDM volume 2); AMD's have neither in long mode.
fn sysenter_sysexit(t: &mut T) {
    let handler = code!("mov rax, rsp", "mov edx, cs", "mov esi, ss");
    let code = code!("sysenter");
    if is_amd() {
        return t.user_faults("sysenter on AMD", code, UD);
    }
    wrmsr(msr::SYSENTER_CS, 0);
    t.user_faults("SYSENTER_CS null", code, gp(0));
    t.faults("sysexit, SYSENTER_CS null", code!("sysexit"), gp(0));
    wrmsr(msr::SYSENTER_CS, KERNEL_CODE.into());
    wrmsr(msr::SYSENTER_ESP, 0x1234_5000);
    wrmsr(msr::SYSENTER_EIP, handler.start);
    let exit = t.runs("sysenter", &code.user().with(|r| r.rflags |= flag::IF | flag::CF));
    t.eq("RSP", exit.regs.rax, 0x1234_5000);
    t.eq("CS", exit.regs.rdx, KERNEL_CODE.into());
    t.eq("SS", exit.regs.rsi, KERNEL_DATA.into());
    t.eq("IF cleared", exit.regs.rflags, flag::CF | flag::FIXED);
    let target = code!("mov ebx, cs", "mov esi, ss");
    let sysexit = code!(".byte 0x48, 0x0F, 0x35");
    let regs = sysexit.kernel().with(|r| (r.rdx, r.rcx) = (target.start + USER_ALIAS, run::snippet_stack(0) + USER_ALIAS));
    let exit = t.runs("sysexit", &regs);
    t.eq("CS", exit.regs.rbx, (u64::from(KERNEL_CODE) + 32) | 3);
    t.eq("SS", exit.regs.rsi, (u64::from(KERNEL_CODE) + 40) | 3);
    t.fault("RDX non-canonical", sysexit, &regs.with(|r| r.rdx = 1 << 47).run(), gp(0));
    t.fault("RCX non-canonical", sysexit, &regs.with(|r| r.rcx = 1 << 47).run(), gp(0));
}
