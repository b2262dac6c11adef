//! Yielding, sleeping, what was stolen, and flushes.

use super::*;
use crate::paging::{TEST_VA, Window, frame, pte};
use contract::native::{offset, run_state};

/// Stolen time is told without an exit, and does not go back.
pub(super) fn stolen(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::STEAL | feature::YIELD) else { return };
    let mut last = processor.stolen_ns();
    for _ in 0..100 {
        t.same("yield", contract.yield_to(None), Ok(true));
        t.is("never back", processor.stolen_ns() >= last);
        last = processor.stolen_ns();
    }
    t.eq("exits", exits(contract, &processor, || _ = processor.stolen_ns()), 0);
    t.eq("preempted", page::<u32>(0, offset::PREEMPTED), 0);
    shows(Case::Use, feature::STEAL);
}

/// Yielding and boosting are one exit each.
pub(super) fn yields(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::YIELD) else { return };
    let mut given = Ok(false);
    t.eq("exits of yield", exits(contract, &processor, || given = contract.yield_to(None)), 1);
    t.same("given", given, Ok(true));
    t.eq("exits of boost", exits(contract, &processor, || t_ok(contract.boost(0))), 1);
    shows(Case::Use, feature::YIELD);
    t.same("to nobody", contract.yield_to(Some(contract.found().vcpus)), Err(Status::NoVcpu));
    t.same("boost nobody", contract.boost(u32::MAX), Err(Status::NoVcpu));
    shows(Case::BadArgument, feature::YIELD);
}

/// A critical section costs no exit.
pub(super) fn critical_sections(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::CRITICAL | feature::RUN_STATE) else { return };
    t.eq("exits of a critical section", exits(contract, &processor, || processor.critical(|| ())), 0);
    t.eq("run state", processor.run_state(), run_state::RUNNING);
    shows(Case::Use, feature::CRITICAL);
}

/// A processor in HLT says so, where it has registered its page and nowhere else, and nothing is yielded to it.
pub(super) fn halted(t: &mut T) {
    let Some((contract, _, _)) = several(t, feature::RUN_STATE | feature::YIELD | feature::IPI) else { return };
    static REFUSED: AtomicU64 = AtomicU64::new(0);
    begin(1, |cpu| {
        shared().processor(&PAGES[cpu]);
        let refused = NO_RAM.iter().filter(|&&bad| {
            let bad = bad | msr::PAGE_ENABLE;
            let write = code!("wrmsr").kernel_on(cpu).with(|r| {
                (r.rcx, r.rax, r.rdx) = (u64::from(msr::BASE + msr::VCPU_PAGE), bad & 0xFFFF_FFFF, bad >> 32);
            });
            crate::run::run_on(cpu, &write).vector == vector::GP
        });
        REFUSED.store(refused.count() as u64, SeqCst);
        crate::run::run_on(cpu, &code!("sti", "hlt", "cli").kernel_on(cpu));
        apic::write(apic::reg::EOI, 0);
        seen(cpu).store(page::<u32>(cpu, offset::PREEMPTED).into(), SeqCst);
    });
    t.is("halts", patiently(|| page::<u32>(1, offset::RUN_STATE) == run_state::HALTED));
    let told = contract.uses(feature::STEAL);
    t.is("preempted", patiently(|| (page::<u32>(1, offset::PREEMPTED) != 0) == told));
    t.same("yield", contract.yield_to(Some(vcpu(1))), Ok(false));
    t.same("wake it", contract.send_ipi(VECTOR, vcpu(1), 1), Ok(1));
    t.is("finished", finished(1));
    t.eq("runs", page::<u32>(1, offset::RUN_STATE), run_state::RUNNING);
    t.eq("preempted while it ran", seen(1).load(SeqCst), 0);
    t.eq("bad addresses before", REFUSED.load(SeqCst), NO_RAM.len() as u64);
    shows(Case::Use, feature::RUN_STATE);
    shows(Case::BadArgument, feature::RUN_STATE | if told { feature::STEAL } else { 0 });
}

/// After a flush no processor uses an old translation.
pub(super) fn flush(t: &mut T) {
    let Some((contract, processor, _)) = several(t, feature::FLUSH_TLB) else { return };
    static STOP: AtomicU32 = AtomicU32::new(0);
    let window = Window::new();
    (frame(0)[0], frame(1)[0]) = (1, 2);
    STOP.store(0, SeqCst);
    seen(1).store(0, SeqCst);
    begin(1, |_| {
        // How often it has looked, and what it saw last.
        for looks in 1u64.. {
            // SAFETY: mapped by the window.
            let value: u64 = unsafe { (TEST_VA as *const u8).read_volatile() }.into();
            seen(1).store(looks << 8 | value, SeqCst);
            if STOP.load(SeqCst) != 0 {
                break;
            }
        }
    });
    for round in 0..20 {
        let (new, value) = if round % 2 == 0 { (1, 2) } else { (0, 1) };
        let looks = seen(1).load(SeqCst) >> 8;
        t.is("looks", patiently(|| seen(1).load(SeqCst) >> 8 > looks));
        *window.entry(3, 0) = physical(frame(new)) | pte::ALL;
        let mut flushed = Ok(0);
        t.eq("exits", exits(contract, &processor, || flushed = contract.flush_tlb(0, 1 | 1 << vcpu(1), &[])), 1);
        t.same("flushed", flushed, Ok(2));
        // What it was about to store is of before the flush; the look behind that is not.
        let looks = seen(1).load(SeqCst) >> 8;
        t.is("looks again", patiently(|| seen(1).load(SeqCst) >> 8 >= looks + 2));
        t.eq("the new page", seen(1).load(SeqCst) & 0xFF, value);
    }
    STOP.store(1, SeqCst);
    t.is("finished", finished(1));
    shows(Case::Use, feature::FLUSH_TLB);
}
