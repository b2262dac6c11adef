//! Kicks, yields, polling, and flushes that are left to whom they are for.

use super::*;
use crate::apic::reg;
use crate::paging::{TEST_VA, Window, pte};
use core::arch::asm;

/// Bits of the preempted flag.
const IS_PREEMPTED: u8 = 1;
const FLUSH: u8 = 2;

/// A kick ends HLT, interrupts off or not; one that comes first ends the next one.
pub(super) fn unhalt(t: &mut T) {
    if !offered(t, feature::PV_UNHALT) {
        return;
    }
    let kicked = code!("vmcall", "cli", "hlt").kernel().with(|r| (r.rax, r.rcx) = (call::KICK_CPU, apic_id()));
    let exit = t.runs("kicked before", &kicked);
    t.eq("RAX", exit.regs.rax, 0);
    shows(Case::Use, feature::PV_UNHALT);
    for nobody in [0xFE, 0x1_0000, u64::MAX] {
        t.same("nobody", hypercall(call::KICK_CPU, [0, nobody, 0, 0]), 0);
    }
    shows(Case::BadArgument, feature::PV_UNHALT);
}

/// A kick wakes a processor that sleeps with interrupts off.
pub(super) fn kick_others(t: &mut T) {
    let Some(count) = several(t, feature::PV_UNHALT) else { return };
    for cpu in 1..count {
        let id = id_of(cpu);
        begin(cpu, |cpu| {
            seen(cpu).store(1, SeqCst);
            crate::run::run_on(cpu, &code!("cli", "hlt").kernel_on(cpu));
            seen(cpu).store(2, SeqCst);
        });
        t.is("begins", patiently(|| seen(cpu).load(SeqCst) == 1));
        t.same("kicked", hypercall(call::KICK_CPU, [0, id, 0, 0]), 0);
        t.is("finished", patiently(|| finish(cpu)));
        t.eq("woken", seen(cpu).load(SeqCst), 2);
    }
}

/// A hint: whoever it names.
pub(super) fn sched_yield(t: &mut T) {
    if !offered(t, feature::PV_SCHED_YIELD) {
        return;
    }
    t.same("to itself", hypercall(call::SCHED_YIELD, [apic_id(), 0, 0, 0]), 0);
    shows(Case::Use, feature::PV_SCHED_YIELD);
    for nobody in [0xFE, 0x1_0000, u64::MAX] {
        t.same("nobody", hypercall(call::SCHED_YIELD, [nobody, 0, 0, 0]), 0);
    }
    shows(Case::BadArgument, feature::PV_SCHED_YIELD);
}

/// A switch, on after reset.
pub(super) fn poll_control(t: &mut T) {
    if !offered(t, feature::POLL_CONTROL) {
        return;
    }
    t.eq("after reset", rdmsr(pv::POLL_CONTROL), 1);
    t.event("off", &write_msr(pv::POLL_CONTROL, 0), DONE);
    t.eq("off", rdmsr(pv::POLL_CONTROL), 0);
    for bad in [2, 3, 1 << 63] {
        t.event("reserved bits", &write_msr(pv::POLL_CONTROL, bad), gp(0));
        t.eq("still off", rdmsr(pv::POLL_CONTROL), 0);
    }
    shows(Case::BadArgument, feature::POLL_CONTROL);
    t.event("on", &write_msr(pv::POLL_CONTROL, 1), DONE);
    t.eq("on", rdmsr(pv::POLL_CONTROL), 1);
    shows(Case::Use, feature::POLL_CONTROL);
}

/// A processor in HLT is preempted, and does the flush that was left to it before it runs again.
pub(super) fn preempted_flush(t: &mut T) {
    if several(t, feature::PV_TLB_FLUSH).is_none() {
        return;
    }
    let (window, id) = (Window::new(), id_of(1) as u32);
    frame(0).fill(1);
    frame(1).fill(2);
    frame(2).fill(0);
    let flag = &raw mut frame(2)[PREEMPTED];
    for round in 0..10 {
        let (old, new) = if round % 2 == 0 { (0, 1) } else { (1, 0) };
        *window.entry(3, 0) = physical(frame(old)) | pte::ALL;
        begin(1, |cpu| {
            // SAFETY: this processor's translation of the window is of the round before.
            unsafe { asm!("invlpg [{}]", in(reg) TEST_VA) };
            let value = || u64::from(look(TEST_VA as *const u8));
            wrmsr(pv::STEAL_TIME, physical(frame(2)) | 1);
            let before = value();
            crate::run::run_on(cpu, &code!("sti", "hlt", "cli").kernel_on(cpu));
            let after = value();
            apic::write(reg::EOI, 0);
            wrmsr(pv::STEAL_TIME, 0);
            seen(cpu).store(before << 8 | after, SeqCst);
        });
        t.is("preempted", patiently(|| look(flag) == IS_PREEMPTED));
        *window.entry(3, 0) = physical(frame(new)) | pte::ALL;
        // SAFETY: a byte of the suite's own, which the host changes as well.
        let left = unsafe { core::sync::atomic::AtomicU8::from_ptr(flag) };
        // In every second round, beside bits that mean nothing.
        let asked_for = if round % 4 < 2 { FLUSH } else { FLUSH | 0xF8 };
        let asked = left.compare_exchange(IS_PREEMPTED, IS_PREEMPTED | asked_for, SeqCst, SeqCst);
        t.same("asked", asked, Ok(IS_PREEMPTED));
        apic::write(reg::ICR_HIGH, id << 24);
        apic::write(reg::ICR_LOW, VECTOR.into());
        t.is("finished", patiently(|| finish(1)));
        let [before, after] = [frame(old)[0], frame(new)[0]].map(u64::from);
        t.eq("before and after", seen(1).load(SeqCst), before << 8 | after);
        t.eq("runs", look(flag), 0);
    }
    shows(Case::Use, feature::PV_TLB_FLUSH);
    shows(Case::BadArgument, feature::PV_TLB_FLUSH);
}
