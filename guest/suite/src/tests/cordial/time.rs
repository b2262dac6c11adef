//! The clock, the time of day, timers.

use super::*;

/// Reads of the clock: fewer where each instruction is emulated.
const READS: u64 = if cfg!(integer_only) { 2_000 } else { 1_000_000 };

/// Many reads of the clock: no exit, and never backwards.
pub(super) fn clock(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::CLOCK) else { return };
    let (mut last, mut backwards) = (processor.now(), 0u64);
    let first = last;
    let cost = exits(contract, &processor, || {
        for _ in 0..READS {
            let now = processor.now();
            backwards += u64::from(now < last);
            last = now;
        }
    });
    t.eq("exits", cost, 0);
    t.eq("backwards", backwards, 0);
    t.is("time passes", last > first);
    shows(Case::Use, feature::CLOCK);
}

/// The host changes the rate while we read: time goes on.
pub(super) fn clock_goes_on(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::CLOCK) else { return };
    let khz = contract.found().tsc_khz;
    let mut last = processor.now();
    let mut backwards = 0u64;
    for round in 0..50 {
        outl(port::RATE, if round % 2 == 0 { khz / 3 * 4 } else { khz });
        for _ in 0..100 {
            let now = processor.now();
            backwards += u64::from(now < last);
            last = now;
        }
    }
    t.eq("backwards", backwards, 0);
}

/// One exit; coarse; refused beyond the rate.
pub(super) fn time_of_day(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::TIME_OF_DAY) else { return };
    let mut time = Ok(0);
    t.eq("exits", exits(contract, &processor, || time = contract.time_of_day()), 1);
    t.is("after 2020", time.is_ok_and(|ns| ns > 1_577_836_800_000_000_000));
    t.eq("quantum", time.unwrap_or(1) % u64::from(contract.found().quantum_ns), 0);
    let (burst, mut refused) = (contract.found().burst, 0);
    for _ in 0..burst * 4 {
        refused += u32::from(contract.time_of_day() == Err(Status::TooOften));
    }
    t.is("refused beyond the rate", refused > 0);
    t.is("but not all", refused < burst * 4);
    shows(Case::Use, feature::TIME_OF_DAY);
}

/// A timer interrupts, not before its deadline; setting it is one exit.
pub(super) fn timer(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::CLOCK | feature::TIMER) else { return };
    apic::enable();
    let deadline = processor.now() + 5 * MILLISECOND;
    let mut armed = Ok(true);
    let cost = exits(contract, &processor, || armed = processor.set_timer(0, deadline, 0, VECTOR));
    t.eq("exits", cost, 1);
    t.same("armed before", armed, Ok(false));
    t.is("comes", patiently(|| apic::bit(apic::reg::IRR, VECTOR.into())));
    t.is("not early", processor.now() >= deadline);
    t.same("delivered", apic::take(), Some(VECTOR.into()));
    apic::write(apic::reg::EOI, 0);
    t.same("replaced", processor.set_timer(1, processor.now() + 1_000_000 * MILLISECOND, 0, VECTOR), Ok(false));
    t.same("cancelled", processor.cancel_timer(1), Ok(true));
    t.same("cancelled again", processor.cancel_timer(1), Ok(false));
    shows(Case::Use, feature::TIMER);
    t.same("no such timer", processor.set_timer(contract.found().timers, 1, 0, VECTOR), Err(Status::BadArgument));
    t.same("no such vector", processor.set_timer(0, 1, 0, 15), Err(Status::BadArgument));
    shows(Case::BadArgument, feature::TIMER);
}

/// All timers of a processor within their slack: one wake-up of the host.
pub(super) fn merged_timers(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::CLOCK | feature::TIMER) else { return };
    apic::enable();
    let (wakeups, raised) = contract.timer_counts();
    let (count, now) = (contract.found().timers, processor.now());
    for number in 0..count {
        let deadline = now + 200 * MILLISECOND + u64::from(number) * 100_000;
        t.same("set", processor.set_timer(number, deadline, 300 * MILLISECOND, VECTOR + number as u8), Ok(false));
    }
    t.is("all come", patiently(|| contract.timer_counts().1 == raised + u64::from(count)));
    t.eq("wake-ups of the host", contract.timer_counts().0, wakeups + 1);
    let vectors = VECTOR..VECTOR + count as u8;
    let here = |vector: u8| apic::bit(apic::reg::IRR, vector.into());
    t.is("interrupts", patiently(|| vectors.clone().all(here)));
    apic::drain();
}

/// Timers of all processors within their slack: one wake-up of the host.
pub(super) fn timers_of_all(t: &mut T) {
    let Some((contract, processor, count)) = several(t, feature::CLOCK | feature::TIMER) else { return };
    static DEADLINE: AtomicU64 = AtomicU64::new(0);
    fn arm(cpu: usize) {
        let processor = shared().processor(&PAGES[cpu]);
        let armed = processor.set_timer(0, DEADLINE.load(SeqCst) + cpu as u64 * 100_000, 1_000 * MILLISECOND, VECTOR);
        seen(cpu).store(u64::from(armed == Ok(false)), SeqCst);
    }
    let (wakeups, raised) = contract.timer_counts();
    DEADLINE.store(processor.now() + 1_000 * MILLISECOND, SeqCst);
    for cpu in 1..count {
        begin(cpu, arm);
    }
    arm(0);
    for cpu in 0..count {
        t.is("finished", cpu == 0 || finished(cpu));
        t.eq("armed", seen(cpu).load(SeqCst), 1);
    }
    t.is("all come", patiently(|| contract.timer_counts().1 == raised + count as u64));
    t.eq("wake-ups of the host", contract.timer_counts().0, wakeups + 1);
    for cpu in 1..count {
        begin(cpu, apic::drain_on);
        t.is("drained", finished(cpu));
    }
    apic::drain();
}
