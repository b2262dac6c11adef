//! The local APIC: registers, priorities, IPIs to oneself, the timer, errors, x2APIC (SDM volume 3, chapter 11).

use crate::apic::{self, bit, enable, read, reg, send_self, take, wait_for, write};
use crate::cpu::{vector as v, *};
use crate::run::{Exit, Regs};
use crate::tables::*;
use crate::tap::*;
use crate::{code, tests};

tests![
    registers, reserved_bits_read_zero, software_disable, global_disable, self_ipi, irr_isr_tmr, priorities, tpr_masks,
    cr8_masks, eoi_order, physical_ipi, logical_ipi, shorthand_all, nmi, nmi_blocking, nmi_pair, timer_one_shot,
    timer_periodic, timer_masked, timer_stop, timer_deadline, error_status, hlt_wakes, x2apic_transitions, x2apic_reserved_msrs, x2apic_reserved_bits,
    x2apic_registers, x2apic_self_ipi,
];

const MASKED: u32 = 1 << 16;

/// Registers after INIT or reset, and what can be written (SDM 11.4.7.1).
fn registers(t: &mut T) {
    t.eq("ID is CPUID's", read(reg::ID) >> 24, cpuid(1, 0)[1] >> 24);
    let version = read(reg::VERSION);
    t.is("integrated APIC", (0x10..=0x15).contains(&(version & 0xFF)));
    t.is("at least five LVT entries beyond the first", version >> 16 & 0xFF >= 4);
    enable();
    for (what, register, value, want) in [
        ("TPR", reg::TPR, 0xFF, 0xFF),
        ("LDR", reg::LDR, 0xFFFF_FFFF, 0xFF00_0000),
        ("DFR", reg::DFR, 0x0FFF_FFFF, 0x0FFF_FFFF),
        ("ICR high", reg::ICR_HIGH, 0xFF00_0000, 0xFF00_0000),
        ("divide", reg::TIMER_DIVIDE, 0xB, 0xB),
        ("LVT timer", reg::LVT_TIMER, MASKED | 0x2_00EF, MASKED | 0x2_00EF),
        ("LVT error", reg::LVT_ERROR, MASKED | 0xEE, MASKED | 0xEE),
        ("LVT LINT0", reg::LVT_LINT0, MASKED | 0x700, MASKED | 0x700),
    ] {
        let before = read(register);
        write(register, value);
        t.eq(what, read(register), want);
        write(register, before);
    }
    for (what, register) in [("VERSION", reg::VERSION), ("PPR", reg::PPR), ("ISR", reg::ISR), ("IRR", reg::IRR), ("current count", reg::TIMER_CURRENT)] {
        let before = read(register);
        write(register, !before);
        t.eq(what, read(register), before);
    }
    write(reg::DFR, 0xFFFF_FFFF);
    enable();
}

/// Reserved bits read as zero; DFR's as one.
fn reserved_bits_read_zero(t: &mut T) {
    enable();
    write(reg::LVT_TIMER, !0x4_0000);
    t.eq("LVT timer", read(reg::LVT_TIMER) & !0x7_10FF, 0);
    write(reg::LVT_ERROR, 0xFFFF_FFFF);
    t.eq("LVT error", read(reg::LVT_ERROR) & !0x1_17FF, 0);
    write(reg::DFR, 0);
    t.eq("DFR", read(reg::DFR), 0x0FFF_FFFF);
    write(reg::DFR, 0xFFFF_FFFF);
    write(reg::TIMER_DIVIDE, 0xFFFF_FFFF);
    t.eq("divide", read(reg::TIMER_DIVIDE), 0xB);
    enable();
}

/// Clearing SVR's enable bit masks every LVT entry, and they cannot be unmasked until it is set (SDM 11.4.7.2).
fn software_disable(t: &mut T) {
    enable();
    write(reg::LVT_TIMER, 0x40);
    write(reg::SVR, 0xFF);
    t.eq("masked", read(reg::LVT_TIMER), MASKED | 0x40);
    write(reg::LVT_TIMER, 0x41);
    t.eq("stays masked", read(reg::LVT_TIMER), MASKED | 0x41);
    write(reg::SVR, 0x1FF);
    t.eq("still masked", read(reg::LVT_TIMER), MASKED | 0x41);
    enable();
}

/// Clearing IA32_APIC_BASE's enable bit hides the APIC; setting it again resets it (SDM 11.4.3).
fn global_disable(t: &mut T) {
    if is_tcg() {
        return t.skip("QEMU's APIC cannot be enabled again");
    }
    enable();
    write(reg::TPR, 0x50);
    let base = rdmsr(msr::APIC_BASE);
    wrmsr(msr::APIC_BASE, base & !(1 << 11));
    t.eq("CPUID", cpuid(1, 0)[3] >> 9 & 1, 0);
    wrmsr(msr::APIC_BASE, base);
    t.eq("CPUID", cpuid(1, 0)[3] >> 9 & 1, 1);
    t.eq("TPR", read(reg::TPR), 0);
    t.eq("SVR", read(reg::SVR) & 0x1FF, 0xFF);
    t.eq("LVT timer", read(reg::LVT_TIMER), MASKED);
    t.eq("DFR", read(reg::DFR), 0xFFFF_FFFF);
    enable();
}

/// Every legal vector arrives as itself.
fn self_ipi(t: &mut T) {
    enable();
    for vector in (0x20..0xF0).chain(0xF1..0xFF) {
        send_self(vector);
        t.same("vector", take(), Some(vector.into()));
        write(reg::EOI, 0);
    }
    t.same("nothing left", take(), None);
}

/// IRR while requested, ISR while in service, neither after EOI; TMR clear for edges.
fn irr_isr_tmr(t: &mut T) {
    enable();
    send_self(0x65);
    t.same("requested", (bit(reg::IRR, 0x65), bit(reg::ISR, 0x65)), (true, false));
    t.same("taken", take(), Some(0x65));
    t.same("in service", (bit(reg::IRR, 0x65), bit(reg::ISR, 0x65)), (false, true));
    t.eq("PPR", read(reg::PPR), 0x60);
    send_self(0x65);
    t.same("requested again", (bit(reg::IRR, 0x65), bit(reg::ISR, 0x65)), (true, true));
    t.same("not taken", take(), None);
    write(reg::EOI, 0);
    t.eq("PPR", read(reg::PPR), 0);
    t.same("taken", take(), Some(0x65));
    write(reg::EOI, 0);
    t.same("edge", bit(reg::TMR, 0x65), false);
    t.same("nothing left", take(), None);
}

/// A higher class interrupts a lower one; the same class waits (SDM 11.8.3).
fn priorities(t: &mut T) {
    enable();
    for vector in [0x51, 0x83, 0x44, 0x85] {
        send_self(vector);
    }
    t.same("highest first", take(), Some(0x85));
    t.same("its class waits", take(), None);
    send_self(0x91);
    t.same("a higher class does not", take(), Some(0x91));
    t.eq("PPR", read(reg::PPR), 0x90);
    write(reg::EOI, 0);
    t.eq("PPR", read(reg::PPR), 0x80);
    write(reg::EOI, 0);
    for vector in [0x83, 0x51, 0x44] {
        t.same("in order", take(), Some(vector));
        write(reg::EOI, 0);
    }
    // PPR's subclass is TPR's only where TPR's class is the higher one.
    write(reg::TPR, 0x5A);
    t.eq("PPR from TPR", read(reg::PPR), 0x5A);
    write(reg::TPR, 0);
}

/// TPR holds back its class and those below.
fn tpr_masks(t: &mut T) {
    enable();
    send_self(0x5F);
    for (tpr, taken) in [(0x50, false), (0x5F, false), (0xF0, false), (0x4F, true)] {
        write(reg::TPR, tpr);
        t.same(format_args!("TPR {tpr:#x}"), take().is_some(), taken);
    }
    write(reg::TPR, 0);
    write(reg::EOI, 0);
}

/// The same through CR8, and an interrupt let in by lowering it is taken before the next instruction.
fn cr8_masks(t: &mut T) {
    enable();
    write_cr8(5);
    send_self(0x55);
    t.same("held back", take(), None);
    let code = code!("xor eax, eax", "sti", "nop", "mov cr8, rax"; "nop"; "nop");
    let exit = code.kernel().run();
    t.stopped_at("lowered", &exit, plain(0x55), code.mark);
    write(reg::EOI, 0);
    write_cr8(15);
    send_self(0xEF);
    t.same("15 holds back everything", take(), None);
    write_cr8(14);
    t.same("14 holds back class 14", take(), None);
    write_cr8(13);
    t.same("13 does not", take(), Some(0xEF));
    write(reg::EOI, 0);
    write_cr8(0);
}

/// EOI ends the highest in service.
fn eoi_order(t: &mut T) {
    enable();
    send_self(0x41);
    t.same("low", take(), Some(0x41));
    send_self(0x61);
    t.same("high", take(), Some(0x61));
    write(reg::EOI, 0);
    t.same("high ended", (bit(reg::ISR, 0x41), bit(reg::ISR, 0x61)), (true, false));
    write(reg::EOI, 0);
    t.same("low ended", bit(reg::ISR, 0x41), false);
    write(reg::EOI, 0); // with nothing in service: no effect
    t.eq("PPR", read(reg::PPR), 0);
}

/// Sends an IPI and says whether it is requested of this processor.
fn reaches_us(destination: u32, low: u32) -> bool {
    write(reg::ICR_HIGH, destination << 24);
    write(reg::ICR_LOW, low);
    let reached = (0..10_000).any(|_| bit(reg::IRR, low & 0xFF));
    if reached {
        take();
        write(reg::EOI, 0);
    }
    reached
}

/// Physical destination: our ID, broadcast, and someone else's.
fn physical_ipi(t: &mut T) {
    enable();
    let id = read(reg::ID) >> 24;
    t.is("own ID", reaches_us(id, 0x4040));
    t.is("broadcast", reaches_us(0xFF, 0x4040));
    t.is("nobody", !reaches_us(0xEE, 0x4040));
    t.eq("delivery status idle", read(reg::ICR_LOW) & 1 << 12, 0);
}

/// Logical destination: flat and cluster models (SDM 11.6.2.2).
fn logical_ipi(t: &mut T) {
    enable();
    write(reg::LDR, 0x0400_0000);
    write(reg::DFR, 0xFFFF_FFFF);
    for (destination, reached) in [(4u32, true), (0xFF, true), (0xFB, false), (6, true), (0, false)] {
        t.same(format_args!("flat {destination:#x}"), reaches_us(destination, 0x4842), reached);
    }
    write(reg::DFR, 0x0FFF_FFFF);
    write(reg::LDR, 0x2400_0000);
    for (destination, reached) in [(0x24u32, true), (0x2F, true), (0x2B, false), (0x34, false), (0xFF, true)] {
        t.same(format_args!("cluster {destination:#x}"), reaches_us(destination, 0x4842), reached);
    }
    write(reg::DFR, 0xFFFF_FFFF);
    write(reg::LDR, 0);
}

/// Shorthands: self, all, all but self.
fn shorthand_all(t: &mut T) {
    enable();
    t.is("self", reaches_us(0xEE, 0x4_4043));
    t.is("all including self", reaches_us(0xEE, 0x8_4043));
    t.is("all but self", !reaches_us(0xEE, 0xC_4043));
}

/// An NMI by ICR arrives on vector 2 whatever IF and TPR are, and does not pass through IRR and ISR.
fn nmi(t: &mut T) {
    enable();
    write(reg::TPR, 0xFF);
    let code = code!("mov [rax], edx", "mov ecx, 10000", "2: dec ecx", "jnz 2b");
    write(reg::ICR_HIGH, read(reg::ID));
    let exit = code.kernel().with(|r| (r.rax, r.rdx) = (apic::BASE + u64::from(reg::ICR_LOW), 0x4400)).run();
    t.event("NMI", &exit, plain(v::NMI));
    t.is("not in service", !bit(reg::ISR, 2) && !bit(reg::IRR, 2));
    write(reg::TPR, 0);
}

/// No NMI during an NMI's handler until IRET; one is kept (SDM 6.7.1).
fn nmi_blocking(t: &mut T) {
    enable();
    write(reg::ICR_HIGH, read(reg::ID));
    // The handler counts in RBX, sends another NMI the first time, and keeps in RSI what the count was a while later.
    let handler = code!(
        "inc rbx", "cmp rbx, 1", "jne 3f", "mov [rax], edx", "mov edi, 10000", "2: dec edi", "jnz 2b", "mov rsi, rbx", "3: iretq"
    );
    idt(0)[2] = gate(handler.start, KERNEL_CODE, 0x8E, 1);
    let code = code!("mov [rax], edx", "mov ecx, 20000", "2: dec ecx", "jnz 2b");
    let exit = code.kernel().with(|r| (r.rax, r.rdx) = (apic::BASE + u64::from(reg::ICR_LOW), 0x4400)).run();
    t.done("NMIs", &exit);
    t.eq("held back in the handler", exit.regs.rsi, 1);
    t.eq("delivered after it", exit.regs.rbx, 2);
}

/// Of two NMIs in a row the first is taken and the second kept. Of three sent while one is handled, one is kept.
fn nmi_pair(t: &mut T) {
    if is_tcg() {
        return t.skip("QEMU's processor keeps one NMI in all");
    }
    enable();
    write(reg::ICR_HIGH, read(reg::ID));
    let counts = code!("inc rbx", "iretq");
    idt(0)[2] = gate(counts.start, KERNEL_CODE, 0x8E, 1);
    let pair = code!("mov [rax], edx", "mov [rax], edx", "mov ecx, 20000", "2: dec ecx", "jnz 2b");
    let start = |r: &mut Regs| (r.rax, r.rdx) = (apic::BASE + u64::from(reg::ICR_LOW), 0x4400);
    let exit = pair.kernel().with(start).run();
    t.done("two", &exit);
    t.eq("both arrive", exit.regs.rbx, 2);
    let sends = code!(
        "inc rbx", "cmp rbx, 1", "jne 3f", "mov [rax], edx", "mov edi, 10000", "2: dec edi", "jnz 2b",
        "mov [rax], edx", "mov [rax], edx", "mov edi, 10000", "2: dec edi", "jnz 2b", "3: iretq"
    );
    idt(0)[2] = gate(sends.start, KERNEL_CODE, 0x8E, 1);
    let code = code!("mov [rax], edx", "mov ecx, 20000", "2: dec ecx", "jnz 2b");
    let exit = code.kernel().with(start).run();
    t.done("three in the handler", &exit);
    t.eq("one of them is kept", exit.regs.rbx, 2);
}

/// Fires once; the count stays at zero.
fn timer_one_shot(t: &mut T) {
    enable();
    write(reg::TIMER_DIVIDE, 0xB);
    write(reg::LVT_TIMER, 0x42);
    write(reg::TIMER_INITIAL, 10_000);
    t.is("fires", wait_for(|| bit(reg::IRR, 0x42)));
    t.same("vector", take(), Some(0x42));
    write(reg::EOI, 0);
    t.eq("count", read(reg::TIMER_CURRENT), 0);
    t.eq("initial count is kept", read(reg::TIMER_INITIAL), 10_000);
    t.same("only once", take(), None);
    enable();
}

/// Fires again and again, and counts down in between.
fn timer_periodic(t: &mut T) {
    enable();
    write(reg::TIMER_DIVIDE, 0xB);
    write(reg::LVT_TIMER, 0x2_0043);
    write(reg::TIMER_INITIAL, 100_000);
    for _ in 0..3 {
        t.is("fires", wait_for(|| bit(reg::IRR, 0x43)));
        t.is("count within the period", read(reg::TIMER_CURRENT) <= 100_000);
        t.same("vector", take(), Some(0x43));
        write(reg::EOI, 0);
    }
    enable();
}

/// A masked timer counts, and requests nothing.
fn timer_masked(t: &mut T) {
    enable();
    write(reg::LVT_TIMER, MASKED | 0x44);
    write(reg::TIMER_INITIAL, 10_000);
    t.is("counts down to zero", wait_for(|| read(reg::TIMER_CURRENT) == 0));
    t.is("requests nothing", !bit(reg::IRR, 0x44));
    enable();
}

/// An initial count of zero stops it.
fn timer_stop(t: &mut T) {
    enable();
    write(reg::LVT_TIMER, 0x45);
    write(reg::TIMER_INITIAL, 0xFFFF_FFFF);
    let first = read(reg::TIMER_CURRENT);
    t.is("counts", wait_for(|| read(reg::TIMER_CURRENT) < first));
    write(reg::TIMER_INITIAL, 0);
    t.eq("stopped", read(reg::TIMER_CURRENT), 0);
    t.is("requests nothing", !bit(reg::IRR, 0x45));
    enable();
}

/// TSC-deadline mode: armed by the MSR, which reads zero once fired; a past deadline fires at once (SDM 11.5.4.1).
fn timer_deadline(t: &mut T) {
    if !Feature::TSC_DEADLINE.present() {
        return t.skip("no TSC deadline");
    }
    enable();
    wrmsr(msr::TSC_DEADLINE, rdtsc() + 1000);
    t.eq("ignored in another mode", rdmsr(msr::TSC_DEADLINE), 0);
    write(reg::LVT_TIMER, 0x4_0046);
    write(reg::TIMER_INITIAL, 1000);
    t.eq("the count is not used", read(reg::TIMER_CURRENT), 0);
    for ahead in [1_000_000u64, 0] {
        let deadline = rdtsc() + ahead;
        wrmsr(msr::TSC_DEADLINE, deadline);
        t.is("fires", wait_for(|| bit(reg::IRR, 0x46)));
        t.is("not early", rdtsc() >= deadline);
        t.eq("disarmed", rdmsr(msr::TSC_DEADLINE), 0);
        t.same("vector", take(), Some(0x46));
        write(reg::EOI, 0);
    }
    let far = rdtsc() + (1 << 50);
    wrmsr(msr::TSC_DEADLINE, far);
    t.eq("reads back", rdmsr(msr::TSC_DEADLINE), far);
    wrmsr(msr::TSC_DEADLINE, 0);
    t.eq("zero disarms", rdmsr(msr::TSC_DEADLINE), 0);
    wrmsr(msr::TSC_DEADLINE, far);
    write(reg::LVT_TIMER, 0x46);
    t.eq("so does leaving the mode", rdmsr(msr::TSC_DEADLINE), 0);
    enable();
}

/// ESR is latched by a write; illegal vectors and registers (SDM 11.5.3).
fn error_status(t: &mut T) {
    enable();
    let latch = || {
        write(reg::ESR, 0);
        read(reg::ESR)
    };
    latch();
    t.eq("clear", latch(), 0);
    write(reg::ICR_LOW, 0x4_0005);
    let status = latch();
    t.is("send illegal vector", status & 1 << 5 != 0);
    t.eq("read again without a write", read(reg::ESR), status);
    t.eq("cleared by the next write", latch(), 0);
    read(0x40);
    t.eq("illegal register", latch() & 1 << 7, 1 << 7);
    // The error interrupt.
    write(reg::LVT_ERROR, 0x47);
    write(reg::ICR_LOW, 0x4_0005);
    t.same("interrupt", take(), Some(0x47));
    write(reg::EOI, 0);
    enable();
    latch();
}

/// HLT ends with an interrupt, RIP beyond it.
fn hlt_wakes(t: &mut T) {
    enable();
    write(reg::LVT_TIMER, 0x48);
    write(reg::TIMER_INITIAL, 1_000_000);
    let code = code!("sti"; "hlt"; "nop");
    let exit = code.kernel().run();
    t.trap("hlt", code, &exit, plain(0x48));
    write(reg::EOI, 0);
    enable();
}

const EXTD: u64 = 1 << 10;
const EN: u64 = 1 << 11;

/// WRMSR at level 0.
fn write_msr(index: u32, value: u64) -> Exit {
    code!("wrmsr").kernel().with(|r| (r.rcx, r.rax, r.rdx) = (index.into(), value & 0xFFFF_FFFF, value >> 32)).run()
}

/// RDMSR at level 0.
fn read_msr(index: u32) -> Exit {
    code!("rdmsr").kernel().with(|r: &mut Regs| r.rcx = index.into()).run()
}

/// Runs `body` in x2APIC mode and returns to xAPIC mode through the disabled state.
fn in_x2apic(t: &mut T, body: impl FnOnce(&mut T)) {
    if !Feature::X2APIC.present() {
        return t.skip("no x2APIC");
    }
    enable();
    let base = rdmsr(msr::APIC_BASE) & !(EN | EXTD);
    wrmsr(msr::APIC_BASE, base | EN | EXTD);
    body(t);
    wrmsr(msr::APIC_BASE, base);
    wrmsr(msr::APIC_BASE, base | EN);
    enable();
}

/// The state machine of IA32_APIC_BASE (SDM 11.12.5, figure 11-27).
fn x2apic_transitions(t: &mut T) {
    in_x2apic(t, |t| {
        let base = rdmsr(msr::APIC_BASE) & !(EN | EXTD);
        let mut step = |what, bits, want| t.event(what, &write_msr(msr::APIC_BASE, base | bits), want);
        step("x2APIC to xAPIC", EN, gp(0));
        step("x2APIC to invalid", EXTD, gp(0));
        step("x2APIC to x2APIC", EN | EXTD, DONE);
        step("x2APIC to disabled", 0, DONE);
        step("disabled to x2APIC", EN | EXTD, gp(0));
        step("disabled to invalid", EXTD, gp(0));
        step("disabled to disabled", 0, DONE);
        step("disabled to xAPIC", EN, DONE);
        step("xAPIC to invalid", EXTD, gp(0));
        step("xAPIC to x2APIC", EN | EXTD, DONE);
    });
    // The registers are not MSRs in xAPIC mode.
    t.event("rdmsr in xAPIC mode", &read_msr(0x802), gp(0));
    t.event("wrmsr in xAPIC mode", &write_msr(0x80B, 0), gp(0));
}

/// Which MSRs exist, and in which direction (SDM table 11-6).
fn x2apic_reserved_msrs(t: &mut T) {
    in_x2apic(t, |t| {
        for index in [0x800u32, 0x801, 0x804, 0x807, 0x809, 0x80C, 0x80E, 0x829, 0x82E, 0x831, 0x83A, 0x83D, 0x840, 0x8FF] {
            t.event(format_args!("rdmsr {index:#x}"), &read_msr(index), gp(0));
            t.event(format_args!("wrmsr {index:#x}"), &write_msr(index, 0), gp(0));
        }
        for index in [0x802u32, 0x803, 0x80A, 0x80D, 0x810, 0x817, 0x818, 0x81F, 0x820, 0x827, 0x839] {
            t.event(format_args!("rdmsr {index:#x}"), &read_msr(index), DONE);
            t.event(format_args!("read-only: wrmsr {index:#x}"), &write_msr(index, 0), gp(0));
        }
        for index in [0x80Bu32, 0x83F] {
            t.event(format_args!("write-only: rdmsr {index:#x}"), &read_msr(index), gp(0));
        }
    });
}

/// Reserved bits are #GP(0) in x2APIC mode (SDM 11.12.1.3).
fn x2apic_reserved_bits(t: &mut T) {
    in_x2apic(t, |t| {
        for (what, index, value) in [
            ("TPR bit 8", 0x808u32, 1u64 << 8),
            ("TPR bit 32", 0x808, 1 << 32),
            ("EOI not zero", 0x80B, 1),
            ("SVR bit 10", 0x80F, 1 << 10),
            ("ESR not zero", 0x828, 1),
            ("ICR bit 13", 0x830, 0x4_2040),
            ("ICR bit 16", 0x830, 0x5_0040),
            ("ICR bit 20", 0x830, 0x14_0040),
            ("LVT timer bit 8", 0x832, 0x1_0100),
            ("LVT timer bit 13", 0x832, 0x1_2000),
            ("LVT timer bit 19", 0x832, 0x9_0000),
            ("LVT timer bit 32", 0x832, 1 << 32),
            ("LVT error bit 8", 0x837, 0x1_0100),
            ("initial count bit 32", 0x838, 1 << 32),
            ("divide bit 2", 0x83E, 4),
            ("divide bit 4", 0x83E, 0x10),
            ("self IPI bit 8", 0x83F, 0x100),
        ] {
            t.event(what, &write_msr(index, value), gp(0));
        }
    });
}

/// ID and LDR are 32 bits wide; the registers are the same ones (SDM 11.12.1.2, 11.12.10.2).
fn x2apic_registers(t: &mut T) {
    enable();
    let (id, svr, version) = (read(reg::ID) >> 24, read(reg::SVR), read(reg::VERSION));
    in_x2apic(t, |t| {
        let id = u64::from(id);
        t.eq("ID", rdmsr(0x802), id);
        t.eq("SVR is kept", rdmsr(0x80F), svr.into());
        t.eq("version", rdmsr(0x803), version.into());
        t.eq("LDR", rdmsr(0x80D), id >> 4 << 16 | 1 << (id & 15));
        write_cr8(7);
        t.eq("TPR", rdmsr(0x808), 0x70);
        write_cr8(0);
        wrmsr(0x830, 0x4_0049);
        t.eq("IRR", rdmsr(0x820 + 0x49 / 32) >> (0x49 % 32) & 1, 1);
        t.same("taken", take(), Some(0x49));
        t.eq("ISR", rdmsr(0x810 + 0x49 / 32) >> (0x49 % 32) & 1, 1);
        wrmsr(0x80B, 0);
        wrmsr(0x830, id << 32 | 0x4A);
        t.same("32-bit destination", take(), Some(0x4A));
        wrmsr(0x80B, 0);
    });
}

/// The SELF IPI register.
fn x2apic_self_ipi(t: &mut T) {
    in_x2apic(t, |t| {
        for vector in [0x20u64, 0x7F, 0xEF] {
            wrmsr(0x83F, vector);
            t.same("vector", take(), Some(vector));
            wrmsr(0x80B, 0);
        }
    });
}
