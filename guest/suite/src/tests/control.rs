//! Control registers, EFER and MSRs: reserved bits, illegal combinations, canonical checks (SDM volume 3, 2.5, 2.2.1; volume 4).

use crate::cpu::*;
use crate::paging::{physical, frame, root};
use crate::run::{Code, Exit, USER_ALIAS};
use crate::tap::*;
use crate::{code, setup, tests};

tests![
    cr0_combinations, cr0_reads_back, lmsw_and_clts, cr4_reserved, cr4_features, cr4_pae_and_la57, cr8_tpr, efer_bits,
    efer_lme_under_paging, xcr0_rules, msr_canonical, msr_unknown, sysenter_msrs, star_and_fmask, pat_encodings,
    mtrr_encodings, apic_base_msr, tsc, tsc_adjust, tsc_aux, serialize, tsd_and_pce, misc_enable, smsw, cpuid_dynamic_bits,
    cpuid_not_privileged,
];

/// Runs `mov cr, rax` and restores the register.
fn write_register(code: Code, value: u64) -> Exit {
    let (cr0, cr4) = (read_cr0(), read_cr4());
    let exit = code.kernel().with(|r| r.rax = value).run();
    write_cr0(cr0);
    write_cr4(cr4);
    exit
}

/// WRMSR at level 0. The caller restores what it must.
fn write_msr(index: u32, value: u64) -> Exit {
    code!("wrmsr").kernel().with(|r| (r.rcx, r.rax, r.rdx) = (index.into(), value & 0xFFFF_FFFF, value >> 32)).run()
}

/// RDMSR at level 0.
fn read_msr(index: u32) -> (Exit, u64) {
    let exit = code!("rdmsr").kernel().with(|r| r.rcx = index.into()).run();
    (exit, exit.regs.rax & 0xFFFF_FFFF | exit.regs.rdx << 32)
}

/// Writes each value and checks the result; values that must be taken are read back. The register is restored.
fn msr_values(t: &mut T, index: u32, values: &[(u64, bool)]) {
    let (exit, original) = read_msr(index);
    t.done(format_args!("rdmsr {index:#x}"), &exit);
    for &(value, good) in values {
        let exit = write_msr(index, value);
        t.event(format_args!("wrmsr {index:#x}, {value:#x}"), &exit, if good { DONE } else { gp(0) });
        if good {
            t.eq(format_args!("rdmsr {index:#x}"), read_msr(index).1, value);
        }
    }
    write_msr(index, original);
}

/// CR0: PG needs PE, NW needs CD, the upper half is reserved (SDM 2.5).
fn cr0_combinations(t: &mut T) {
    let code = code!("mov cr0, rax");
    let good = setup::CR0;
    let bad = [
        ("PG without PE", good & !cr0::PE),
        ("NW without CD", good | cr0::NW),
        ("bit 32", good | 1 << 32),
        ("bit 63", good | 1 << 63),
        // Clearing PG in 64-bit mode: it may only be done from compatibility mode.
        ("PG clear in 64-bit mode", good & !cr0::PG),
    ];
    for (what, value) in bad {
        if is_tcg() && value & (cr0::PG | cr0::PE) != cr0::PG | cr0::PE {
            continue; // QEMU's translator does as it is told and never comes back
        }
        t.fault(what, code, &write_register(code, value), gp(0));
        t.eq("unchanged", read_cr0(), good);
    }
    for (what, value) in [
        ("CD", good | cr0::CD),
        ("CD and NW", good | cr0::CD | cr0::NW),
        ("AM, no WP", good & !cr0::WP | cr0::AM),
        ("reserved bits below 32 are ignored", good | 1 << 6 | 1 << 17 | 1 << 28),
    ] {
        t.done(what, &write_register(code, value));
    }
    // With PCIDE set, PG cannot be cleared either (SDM 4.10.1); and CR0.WP cannot be cleared with CR4.CET, absent here.
}

/// ET is always one; reserved bits read as zero.
fn cr0_reads_back(t: &mut T) {
    for value in [setup::CR0 & !cr0::ET, setup::CR0 | 0x1FFA_FFC0 & !cr0::WP & !cr0::AM & !0x20] {
        write_cr0(value);
        let got = read_cr0();
        write_cr0(setup::CR0);
        t.eq("CR0", got, setup::CR0);
    }
}

/// LMSW writes PE..TS and cannot clear PE; CLTS clears TS (SDM volume 2).
fn lmsw_and_clts(t: &mut T) {
    let run = |value| {
        let exit = code!("lmsw ax", "mov rbx, cr0", "mov cr0, rcx").kernel().with(|r| (r.rax, r.rcx) = (value, setup::CR0)).run();
        exit.regs.rbx
    };
    let low = cr0::MP | cr0::EM | cr0::TS;
    t.eq("all ones", run(0xFFFF), setup::CR0 | low);
    t.eq("zero", run(0), setup::CR0 & !low);
    let exit = code!("mov cr0, rax", "clts", "mov rbx, cr0").kernel().with(|r| r.rax = setup::CR0 | cr0::TS).run();
    t.eq("clts", exit.regs.rbx, setup::CR0);
}

/// Reserved bits of CR4 (SDM 2.5).
fn cr4_reserved(t: &mut T) {
    if is_tcg() {
        return t.skip("QEMU's translator makes it a VM exit to nowhere and hangs");
    }
    let code = code!("mov cr4, rax");
    let base = read_cr4();
    for bit in [15u32, 19, 26, 29, 30, 31, 33, 40, 63] {
        // Some of these have come to mean something since; on a processor that has it, the CPUID bit says so.
        t.fault(format_args!("bit {bit}"), code, &write_register(code, base | 1 << bit), gp(0));
    }
    t.eq("unchanged", read_cr4(), base);
}

/// A bit whose feature CPUID does not report is reserved; one it reports can be set.
fn cr4_features(t: &mut T) {
    let code = code!("mov cr4, rax");
    let base = read_cr4();
    for (what, bit, feature) in [
        ("UMIP", cr4::UMIP, Feature::UMIP),
        ("SMXE", cr4::SMXE, Feature::SMX),
        ("FSGSBASE", cr4::FSGSBASE, Feature::FSGSBASE),
        ("PCIDE", cr4::PCIDE, Feature::PCID),
        ("OSXSAVE", cr4::OSXSAVE, Feature::XSAVE),
        ("SMEP", cr4::SMEP, Feature::SMEP),
        ("SMAP", cr4::SMAP, Feature::SMAP),
        ("PKE", cr4::PKE, Feature::PKU),
    ] {
        if is_tcg() && !feature.present() {
            continue; // as in `cr4_reserved`
        }
        let exit = write_register(code, base | bit);
        t.event(what, &exit, if feature.present() { DONE } else { gp(0) });
    }
    // CPUID.1:EDX bits that stand for CR4's first ones.
    for (bit, edx) in [(0u32, 1u32), (1, 1), (2, 4), (3, 2), (4, 3), (6, 7), (7, 13)] {
        let exit = write_register(code, base | 1 << bit);
        t.event(format_args!("bit {bit}"), &exit, if Feature(1, 3, edx).present() { DONE } else { gp(0) });
    }
}

/// PAE and LA57 cannot change in 64-bit mode.
fn cr4_pae_and_la57(t: &mut T) {
    if is_tcg() {
        return t.skip("QEMU's translator does not check and triple-faults");
    }
    let code = code!("mov cr4, rax");
    let base = read_cr4();
    t.fault("PAE clear", code, &write_register(code, base & !cr4::PAE), gp(0));
    t.fault("LA57", code, &write_register(code, base | cr4::LA57), gp(0));
}

/// CR8 is TPR bits 7:4; bits 63:4 are reserved (SDM 11.8.6.1).
fn cr8_tpr(t: &mut T) {
    let code = code!("mov cr8, rax");
    for value in 0..16 {
        t.done("mov cr8", &code.kernel().with(|r| r.rax = value).run());
        t.eq("CR8", read_cr8(), value);
        t.eq("TPR", u64::from(crate::apic::read(crate::apic::reg::TPR)), value << 4);
    }
    for bit in [4u32, 8, 31, 32, 63] {
        t.fault("reserved bit", code, &code.kernel().with(|r| r.rax = 1 << bit).run(), gp(0));
    }
    crate::apic::write(crate::apic::reg::TPR, 0x5A);
    t.eq("CR8 from TPR", read_cr8(), 5);
    write_cr8(0);
    t.eq("TPR cleared, subclass too", crate::apic::read(crate::apic::reg::TPR), 0);
}

/// EFER: reserved bits are #GP(0); LMA is read-only and its write ignored.
fn efer_bits(t: &mut T) {
    let base = rdmsr(msr::EFER);
    for bit in [1u32, 2, 5, 9, 16, 31, 32, 63] {
        t.event(format_args!("bit {bit}"), &write_msr(msr::EFER, base | 1 << bit), gp(0));
    }
    for (what, bit, present) in [
        ("FFXSR", efer::FFXSR, Feature::FFXSR.present()),
        ("SVME", efer::SVME, Feature::SVM.present()),
    ] {
        t.event(what, &write_msr(msr::EFER, base | bit), if present { DONE } else { gp(0) });
        write_msr(msr::EFER, base);
    }
    t.eq("unchanged", rdmsr(msr::EFER), base);
    t.done("SCE clear", &write_msr(msr::EFER, base & !efer::SCE));
    t.faults("syscall without SCE", code!("syscall"), UD);
    t.faults("sysret without SCE", code!("sysretq"), UD);
    write_msr(msr::EFER, base);
}

/// LME cannot change while paging is on (SDM 9.8.5.1).
fn efer_lme_under_paging(t: &mut T) {
    let base = rdmsr(msr::EFER);
    t.event("LME clear", &write_msr(msr::EFER, base & !efer::LME), gp(0));
    t.done("LMA clear is ignored", &write_msr(msr::EFER, base & !efer::LMA));
    t.eq("EFER", rdmsr(msr::EFER), base);
}

/// XSETBV: XCR0 exists, x87 always on, AVX needs SSE, unsupported components refused (SDM volume 1, 13.3).
fn xcr0_rules(t: &mut T) {
    let code = code!("xsetbv");
    let run = |index: u64, value: u64| code.kernel().with(|r| (r.rcx, r.rax, r.rdx) = (index, value & 0xFFFF_FFFF, value >> 32)).run();
    if !Feature::XSAVE.present() {
        return t.fault("without the feature", code, &run(0, 1), UD);
    }
    let [low, _, _, high] = cpuid(0xD, 0);
    let supported = u64::from(high) << 32 | u64::from(low);
    t.event("x87 off", &run(0, 0), gp(0));
    t.event("x87 off, SSE on", &run(0, 2), gp(0));
    t.event("AVX without SSE", &run(0, 5), gp(0));
    t.event("bit 63", &run(0, 1 << 63 | 3), gp(0));
    t.event("XCR1", &run(1, 3), gp(0));
    t.event("XCR 1 << 31", &run(1 << 31, 3), gp(0));
    for bit in 3..63u32 {
        if supported >> bit & 1 == 0 {
            t.event("unsupported component", &run(0, 7 & supported | 1 << bit), gp(0));
        }
    }
    t.done("x87", &run(0, 1));
    t.eq("XCR0", xgetbv(), 1);
    t.done("everything", &run(0, 7 & supported));
    t.eq("XCR0", xgetbv(), 7 & supported);
    t.event("xgetbv, XCR 2", &code!("xgetbv").kernel().with(|r| r.rcx = 2).run(), gp(0));
    t.runs("xgetbv at level 3", &code!("xgetbv").user());
    write_cr4(read_cr4() & !cr4::OSXSAVE);
    t.fault("without OSXSAVE", code, &run(0, 1), UD);
    t.faults("xgetbv without OSXSAVE", code!("xor ecx, ecx"; "xgetbv"), UD);
}

/// MSRs that hold linear addresses refuse non-canonical ones (SDM volume 2, WRMSR).
fn msr_canonical(t: &mut T) {
    let addresses = [(0, true), (0x7FFF_FFFF_FFFF, true), (1 << 47, false), (0xFFFF_8000_0000_0000, true),
        (0xFFFF_7FFF_FFFF_FFFF, false), (1 << 63, false), (u64::MAX, true)];
    for index in [msr::FS_BASE, msr::GS_BASE, msr::KERNEL_GS_BASE, msr::LSTAR, msr::CSTAR] {
        msr_values(t, index, &addresses);
    }
}

/// An MSR that is not there is #GP(0), read or written; so is the top of each range.
fn msr_unknown(t: &mut T) {
    for index in [0x4242u32, 0x8000_0000, 0xC000_1FFF, 0xFFFF_FFFF, 0x4000_1234, 0xC001_FFFF] {
        t.event(format_args!("rdmsr {index:#x}"), &read_msr(index).0, gp(0));
        t.event(format_args!("wrmsr {index:#x}"), &write_msr(index, 0), gp(0));
    }
    // ECX is what counts, and RDMSR clears the upper halves of RAX and RDX.
    let exit = code!("rdmsr").kernel().with(|r| (r.rcx, r.rax, r.rdx) = (u64::from(msr::EFER) | 1 << 40, u64::MAX, u64::MAX)).run();
    t.done("upper half of RCX", &exit);
    t.eq("RAX", exit.regs.rax, rdmsr(msr::EFER));
    t.eq("RDX", exit.regs.rdx, 0);
}

/// SYSENTER's MSRs.
fn sysenter_msrs(t: &mut T) {
    if !Feature::SEP.present() {
        return t.skip("no SYSENTER");
    }
    msr_values(t, msr::SYSENTER_CS, &[(8, true), (0xFFFF, true), (0, true)]);
    if !is_amd() {
        // AMD's truncate to 32 bits.
        for index in [msr::SYSENTER_ESP, msr::SYSENTER_EIP] {
            msr_values(t, index, &[(0x1000, true), (1 << 47, false), (0xFFFF_8000_0000_0000, true)]);
        }
    }
}

/// STAR takes anything; FMASK's upper half is reserved.
fn star_and_fmask(t: &mut T) {
    msr_values(t, msr::STAR, &[(u64::MAX, true), (0, true)]);
    msr_values(t, msr::FMASK, &[(0, true), (0xFFFF_FFFF, true)]);
}

/// Each PAT byte is one of 0, 1, 4, 5, 6, 7 (SDM 12.12.2).
fn pat_encodings(t: &mut T) {
    t.eq("after reset", rdmsr(msr::PAT), 0x0007_0406_0007_0406);
    for entry in 0..8 {
        for kind in [0u64, 1, 2, 3, 4, 5, 6, 7, 8, 0x10, 0x80] {
            let value = 0x0007_0406_0007_0406 & !(0xFF << (8 * entry)) | kind << (8 * entry);
            msr_values(t, msr::PAT, &[(value, matches!(kind, 0 | 1 | 4..=7))]);
        }
    }
}

/// MTRRs: types 0, 1, 4, 5, 6; reserved bits (SDM 12.11.2).
fn mtrr_encodings(t: &mut T) {
    if !Feature::MTRR.present() {
        return t.skip("no MTRRs");
    }
    let (exit, capabilities) = read_msr(msr::MTRR_CAP);
    t.done("IA32_MTRRCAP", &exit);
    t.event("IA32_MTRRCAP is read-only", &write_msr(msr::MTRR_CAP, capabilities), gp(0));
    msr_values(t, msr::MTRR_DEF_TYPE, &[
        (0, true), (0xC00, true), (0xC06, true), (2, false), (3, false), (7, false), (0x100, false), (0x1000, false), (1 << 32, false),
    ]);
    if capabilities & 1 << 8 != 0 {
        for index in [0x250, 0x258, 0x259, 0x268, 0x26F] {
            msr_values(t, index, &[(0x0606_0606_0606_0606, true), (0x0002_0000_0000_0000, false), (7, false), (0x0100, true)]);
        }
    }
    if capabilities & 0xFF > 0 {
        let width = physical_bits();
        msr_values(t, 0x200, &[(6, true), (0x10_0006, true), (2, false), (0x100, false), (1 << width, false)]);
        msr_values(t, 0x201, &[(0x800, true), (0x10_0800, true), (1, false), (0x400, false), (1 << width, false)]);
    }
    let beyond = 0x200 + 2 * (capabilities as u32 & 0xFF);
    if beyond < 0x220 {
        t.event("beyond VCNT", &read_msr(beyond).0, gp(0));
    }
}

/// IA32_APIC_BASE: reserved bits, and the mode change that is not allowed (SDM 11.12.1, 11.12.5).
fn apic_base_msr(t: &mut T) {
    let base = rdmsr(msr::APIC_BASE);
    t.eq("BSP, enabled, default address", base & 0xFFFF_F900, 0xFEE0_0900);
    for (what, value) in [
        ("bit 0", base | 1),
        ("bit 7", base | 1 << 7),
        ("bit 9", base | 1 << 9),
        ("x2APIC without enable", base & !(1 << 11) | 1 << 10),
    ] {
        t.event(what, &write_msr(msr::APIC_BASE, value), gp(0));
    }
    if physical_bits() < 52 {
        t.event("address too wide", &write_msr(msr::APIC_BASE, base | 1 << physical_bits()), gp(0));
    }
    if !Feature::X2APIC.present() {
        t.event("x2APIC without the feature", &write_msr(msr::APIC_BASE, base | 1 << 10), gp(0));
    }
    t.eq("unchanged", rdmsr(msr::APIC_BASE), base);
}

/// RDTSC and the MSR show the same counter; it rises; it can be written.
fn tsc(t: &mut T) {
    let (a, b, c) = (rdtsc(), rdmsr(msr::TSC), rdtsc());
    t.is("monotone", a <= b && b <= c);
    let exit = code!("rdtsc").kernel().with(|r| (r.rax, r.rdx) = (u64::MAX, u64::MAX)).run();
    t.eq("upper halves are zero", (exit.regs.rax | exit.regs.rdx) >> 32, 0);
    let before = rdtsc();
    wrmsr(msr::TSC, 0x10_0000_0000_0000);
    t.eq("written", rdtsc() >> 48, 0x10_0000_0000_0000 >> 48);
    wrmsr(msr::TSC, before);
}

/// A write to IA32_TSC moves IA32_TSC_ADJUST by as much, and the other way round (SDM 17.17.3).
fn tsc_adjust(t: &mut T) {
    if !Feature::TSC_ADJUST.present() {
        return t.skip("no TSC_ADJUST");
    }
    let original = rdmsr(msr::TSC_ADJUST);
    const STEP: u64 = 1 << 50;
    let before = rdtsc();
    wrmsr(msr::TSC_ADJUST, original.wrapping_add(STEP));
    let after = rdtsc();
    t.is("the counter moved", after - before >= STEP && after - before < STEP + (1 << 48));
    wrmsr(msr::TSC, before);
    let moved = rdmsr(msr::TSC_ADJUST).wrapping_sub(original) as i64;
    t.is("a write of the counter moves it back", moved <= 0 && moved > -(1 << 48));
    wrmsr(msr::TSC_ADJUST, original);
    t.eq("read back", rdmsr(msr::TSC_ADJUST), original);
}

/// SERIALIZE, for everybody (SDM 2B), changes nothing that can be seen.
fn serialize(t: &mut T) {
    let code = code!(".byte 0x0F, 0x01, 0xE8");
    if !Feature::SERIALIZE.present() {
        return t.faults("serialize without the feature", code, UD);
    }
    for regs in [code.kernel(), code.user()] {
        let before = regs.with(|r| r.rflags |= flag::CF | flag::ZF);
        let exit = t.runs("serialize", &before);
        t.eq("flags", exit.regs.rflags & (flag::CF | flag::ZF), flag::CF | flag::ZF);
        t.eq("RAX", exit.regs.rax, before.rax);
    }
}

/// TSC_AUX through RDTSCP and RDPID.
fn tsc_aux(t: &mut T) {
    let rdtscp = code!("rdtscp");
    if !Feature::RDTSCP.present() {
        return t.faults("rdtscp without the feature", rdtscp, UD);
    }
    let original = rdmsr(msr::TSC_AUX);
    wrmsr(msr::TSC_AUX, 0xDEAD_BEEF);
    for regs in [rdtscp.kernel(), rdtscp.user()] {
        let exit = t.runs("rdtscp", &regs.with(|r| r.rcx = u64::MAX));
        t.eq("RCX", exit.regs.rcx, 0xDEAD_BEEF);
    }
    let rdpid = code!(".byte 0xF3, 0x0F, 0xC7, 0xF8"); // rdpid rax
    if Feature::RDPID.present() {
        t.eq("rdpid", rdpid.user().with(|r| r.rax = u64::MAX).run().regs.rax, 0xDEAD_BEEF);
    } else {
        t.faults("rdpid without the feature", rdpid, UD);
    }
    if !is_amd() {
        // AMD's ignore it.
        t.event("upper half", &write_msr(msr::TSC_AUX, 1 << 32), gp(0));
    }
    wrmsr(msr::TSC_AUX, original);
}

/// CR4.TSD closes RDTSC and RDTSCP to users; CR4.PCE opens RDPMC (SDM 2.5).
fn tsd_and_pce(t: &mut T) {
    let (rdtsc, rdtscp) = (code!("rdtsc"), code!("rdtscp"));
    t.runs("rdtsc, user", &rdtsc.user());
    write_cr4(read_cr4() | cr4::TSD);
    t.user_faults("rdtsc with TSD, user", rdtsc, gp(0));
    t.runs("rdtsc with TSD, kernel", &rdtsc.kernel());
    if Feature::RDTSCP.present() {
        t.user_faults("rdtscp with TSD, user", rdtscp, gp(0));
    }
    write_cr4(read_cr4() & !cr4::TSD);
    t.user_faults("rdpmc, user, bad counter", code!("mov ecx, 0x3FFFFFFF"; "rdpmc"), gp(0));
}

/// IA32_MISC_ENABLE reads.
fn misc_enable(t: &mut T) {
    if is_amd() {
        return t.skip("not on AMD's processors");
    }
    t.done("rdmsr", &read_msr(msr::MISC_ENABLE).0);
}

/// SMSW: a 16-bit memory operand, a register of any size, at any level (but for UMIP).
fn smsw(t: &mut T) {
    let cr0 = read_cr0();
    t.eq("smsw ax", code!("smsw ax").kernel().with(|r| r.rax = u64::MAX).run().regs.rax, !0xFFFF | cr0 & 0xFFFF);
    t.eq("smsw rax", code!("smsw rax").user().run().regs.rax & 0xFFFF, cr0 & 0xFFFF);
    let page = frame(0);
    page[..8].fill(0xEE);
    let address = physical(page) + USER_ALIAS;
    t.runs("smsw [rbx]", &code!("smsw [rbx]").user().with(|r| r.rbx = address));
    t.eq("two bytes", u64::from_le_bytes(frame(0)[..8].try_into().unwrap()), 0xEEEE_EEEE_EEEE_0000 | cr0 & 0xFFFF);
    t.eq("CR3 is ours", read_cr3(), root());
}

/// CPUID mirrors CR4.OSXSAVE, CR4.PKE and the APIC's enable bit (SDM volume 2, CPUID).
fn cpuid_dynamic_bits(t: &mut T) {
    if Feature::XSAVE.present() {
        for on in [false, true] {
            write_cr4(read_cr4() & !cr4::OSXSAVE | if on { cr4::OSXSAVE } else { 0 });
            t.same("OSXSAVE", cpuid(1, 0)[2] >> 27 & 1 != 0, on);
        }
        // Leaf 0xD, EBX: the size of what XCR0 enables.
        xsetbv(1);
        t.eq("size, x87 only", cpuid(0xD, 0)[1], 576);
        xsetbv(3);
        t.eq("size, SSE", cpuid(0xD, 0)[1], 576);
        if Feature::AVX.present() {
            xsetbv(7);
            t.eq("size, AVX", cpuid(0xD, 0)[1], 832);
        }
    }
    if Feature::PKU.present() {
        for on in [false, true] {
            write_cr4(read_cr4() & !cr4::PKE | if on { cr4::PKE } else { 0 });
            t.same("OSPKE", cpuid(7, 0)[2] >> 4 & 1 != 0, on);
        }
        write_cr4(read_cr4() & !cr4::PKE);
    }
    t.same("APIC", cpuid(1, 0)[3] >> 9 & 1 != 0, rdmsr(msr::APIC_BASE) & 1 << 11 != 0);
}

/// CPUID runs anywhere, and clears the upper halves.
fn cpuid_not_privileged(t: &mut T) {
    let exit = t.runs("user", &code!("cpuid").user().with(|r| (r.rax, r.rbx) = (0, u64::MAX)));
    t.eq("upper halves", (exit.regs.rax | exit.regs.rbx | exit.regs.rcx | exit.regs.rdx) >> 32, 0);
    t.is("at least leaf 7", exit.regs.rax >= 7);
}
