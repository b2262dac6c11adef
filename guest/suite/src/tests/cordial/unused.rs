//! Features that are used without the right to: not offered, not accepted, or given up.

use super::*;
use contract::native::offset;

/// What is looked at of a feature that lives in pages.
type Look = fn(&mut T, &Contract, &Processor);

/// Uses each of `features` all the same: calls are refused, and the host writes nothing of it into the pages, nor goes by what
/// stands there. Says of which that was seen.
pub(super) fn unused(t: &mut T, contract: &Contract, features: u64, case: Case) {
    apic::enable();
    let mut shown = calls(t, features);
    let processor = contract.processor(&PAGES[0]); // which clears the page
    let tests: [(u64, Look); 5] = [
        (feature::CLOCK, clock),
        (feature::INTERRUPTS, mask),
        (feature::EOI, end_in_memory),
        (feature::GENERATION, generation),
        (feature::LEDGER, ledger),
    ];
    for (bit, test) in tests {
        if features & bit != 0 {
            test(t, contract, &processor);
            shown |= bit;
        }
    }
    shown |= sleeper(t, features & (feature::RUN_STATE | feature::STEAL));
    apic::drain(); // what the host had to say may be news that we asked for
    shows(case, shown);
}

/// What is done by calls.
fn calls(t: &mut T, features: u64) -> u64 {
    let word = physical(WORD.as_ptr());
    let mut shown = 0;
    for (bit, number, args) in [
        (feature::TIME_OF_DAY, call::TIME_OF_DAY, [0; 4]),
        (feature::TIMER, call::SET_TIMER, [0, 1, 0, VECTOR.into()]),
        (feature::INTERRUPTS, call::ACK, [0; 4]),
        (feature::INTERRUPTS, call::IRQ_WINDOW, [0; 4]),
        (feature::YIELD, call::YIELD_TO, [u64::MAX, 0, 0, 0]),
        (feature::YIELD, call::BOOST, [0; 4]),
        (feature::IPI, call::SEND_IPI, [VECTOR.into(), 0, 1, 0]),
        (feature::FLUSH_TLB, call::FLUSH_TLB, [1, 0, 0, 0]),
        (feature::MULTICALL, call::MULTICALL, [word, 0, 0, 0]),
        (feature::WAIT, call::WAIT, [word, 1, 0, 0]),
        (feature::WAIT, call::WAKE, [word, 1, 0, 0]),
    ] {
        if features & bit != 0 {
            t.same(number, raw(number, args), status::NOT_ACCEPTED);
            shown |= bit;
        }
    }
    shown
}

/// The page has no time, and gets none when the host writes time anew.
fn clock(t: &mut T, contract: &Contract, processor: &Processor) {
    let time = || page::<[u32; 8]>(0, offset::TIME);
    let before = time();
    outl(port::RATE, contract.found().tsc_khz);
    t.same("the time", time(), before);
    t.eq("now", processor.now(), 0);
}

/// The mask holds nothing back, and nobody is told that something waits.
fn mask(t: &mut T, _: &Contract, processor: &Processor) {
    let guard = processor.mask();
    apic::send_self(VECTOR.into());
    t.same("not held back", apic::take(), Some(VECTOR.into()));
    apic::write(apic::reg::EOI, 0);
    t.is("nothing waits", !processor.interrupt_waits());
    drop(guard);
}

/// An interrupt is delivered without an offer.
fn end_in_memory(t: &mut T, _: &Contract, _: &Processor) {
    apic::send_self(VECTOR.into());
    t.same("taken", apic::take(), Some(VECTOR.into()));
    t.eq("offered", page::<u8>(0, offset::EOI), 0);
    apic::write(apic::reg::EOI, 0);
}

/// There is no generation id, nor a new one.
fn generation(t: &mut T, contract: &Contract, _: &Processor) {
    outl(port::GENERATION, 0);
    t.same("generation", contract.terms().generation, [0; 16]);
}

/// Exits are not told.
fn ledger(t: &mut T, contract: &Contract, processor: &Processor) {
    (0..3).for_each(|_| contract.sync());
    t.eq("exits", processor.exits().iter().sum::<u64>(), 0);
}

/// A processor that sleeps does not look like one, and nothing is stolen from this one.
fn sleeper(t: &mut T, features: u64) -> u64 {
    if features == 0 {
        return 0;
    }
    if features & feature::STEAL != 0 {
        for _ in 0..20 {
            apic::send_self(VECTOR.into());
            t.same("taken", apic::take(), Some(VECTOR.into()));
            apic::write(apic::reg::EOI, 0);
        }
        t.eq("stolen", page::<u64>(0, offset::STOLEN_NS), 0);
    }
    if start_others(t) < 2 {
        return features & feature::STEAL;
    }
    seen(1).store(0, SeqCst);
    begin(1, |cpu| {
        shared().processor(&PAGES[cpu]);
        seen(cpu).store(1, SeqCst);
        crate::run::run_on(cpu, &code!("sti", "hlt", "cli").kernel_on(cpu));
        apic::write(apic::reg::EOI, 0);
    });
    t.is("begins", patiently(|| seen(1).load(SeqCst) == 1));
    let (mut state, mut preempted) = (0, 0);
    for _ in 0..200_000 {
        state |= page::<u32>(1, offset::RUN_STATE);
        preempted |= page::<u32>(1, offset::PREEMPTED);
    }
    apic::write(apic::reg::ICR_HIGH, vcpu(1) << 24);
    apic::write(apic::reg::ICR_LOW, VECTOR.into());
    t.is("finished", finished(1));
    if features & feature::RUN_STATE != 0 {
        t.eq("run state", state, 0);
    }
    if features & feature::STEAL != 0 {
        t.eq("preempted", preempted, 0);
    }
    features
}
