//! The whole machine stands still for a while, whatever its processors do then: they go on with it, no wake and no timer is lost,
//! and clocks go on.

use super::*;
use crate::apic::reg;
use crate::run::run_on;
use contract::native::{offset, run_state};
use kit::Waited;

const PAUSE_MS: u64 = 30;
/// How far ahead a timer is set that is to end in a pause.
const AHEAD: u64 = 100 * MILLISECOND;
/// The vector of the native timer; [`VECTOR`] is the local APIC timer's.
const TIMER: u8 = 0x62;

/// What a processor that sleeps was to do, in nanoseconds of its clock; 0 while it has not said.
static DEADLINE: AtomicU64 = AtomicU64::new(0);
/// Whether processor 1 was told that it had stood still: once is 1.
static TOLD: AtomicU64 = AtomicU64::new(0);
/// What its page said of it when it ran again: 0 is that it runs. Asked there, since one that spins gives its processor up.
static STATE: AtomicU32 = AtomicU32::new(0);

/// Runs `sleep` on processor 1, which says how often it was told that it had stood still.
fn told_of(cpu: usize, sleep: impl FnOnce(&'static Contract, &Processor)) {
    let contract = shared();
    let processor = contract.processor(&PAGES[cpu]);
    processor.stood_still();
    sleep(contract, &processor);
    STATE.store(page::<u32>(cpu, offset::RUN_STATE) | page::<u32>(cpu, offset::PREEMPTED), SeqCst);
    TOLD.store((0..3).map(|_| u64::from(processor.stood_still())).sum(), SeqCst);
}

/// Begins `work` on processor 1, and pauses the machine for `ms`, once it is asleep as `state` says, or has said that it runs.
fn paused(t: &mut T, contract: &Contract, work: fn(usize), state: u32, ms: impl FnOnce(&Processor) -> u64) {
    let processor = contract.processor(&PAGES[0]);
    let sleeps = state != run_state::RUNNING;
    seen(1).store(0, SeqCst);
    DEADLINE.store(0, SeqCst);
    WORD.store(1, SeqCst);
    begin(1, work);
    if sleeps && contract.uses(feature::RUN_STATE) {
        t.is("sleeps", patiently(|| page::<u32>(1, offset::RUN_STATE) == state));
    } else {
        t.is("begins", patiently(|| seen(1).load(SeqCst) > 0));
        until(&processor, processor.now() + 20 * MILLISECOND);
    }
    let ms = ms(&processor);
    processor.stood_still();
    let before = processor.now();
    outl(port::PAUSE, ms as u32);
    let after = processor.now();
    // Two clocks of the host's: one of them ends the pause.
    t.is("time goes on", after >= before + ms * MILLISECOND * 99 / 100);
    t.same("told, once", [0; 2].map(|_| processor.stood_still()), [true, false]);
}

/// Processor 1 is asleep as before, and looks like it.
fn asleep_again(t: &mut T, contract: &Contract, state: u32) {
    if contract.uses(feature::RUN_STATE) {
        t.is("sleeps again", patiently(|| page::<u32>(1, offset::RUN_STATE) == state));
    }
    if contract.uses(feature::STEAL) {
        t.is("preempted", patiently(|| page::<u32>(1, offset::PREEMPTED) != 0));
    }
}

/// Waits for processor 1's end; its page said that it runs.
fn awake(t: &mut T) {
    t.is("finished", finished(1));
    t.eq("told, once", TOLD.load(SeqCst), 1);
    t.eq("it runs, and is not preempted", STATE.load(SeqCst), 0);
}

/// In a wait: it ends with the pause, and the next one is woken.
pub(super) fn paused_in_wait(t: &mut T) {
    let Some((contract, _, _)) = several(t, feature::WAIT | feature::CLOCK) else { return };
    let work = |cpu| {
        told_of(cpu, |contract, _| {
            let mut ended = 0;
            while WORD.load(SeqCst) == 1 {
                seen(1).store(ended + 1, SeqCst);
                ended = match contract.wait(&WORD, 1, None) {
                    Ok(Waited::Interrupted) => ended + 1,
                    Ok(Waited::Woken) => ended + 0x100,
                    _ => ended + 0x1_0000,
                };
            }
            seen(1).store(ended, SeqCst);
        });
    };
    paused(t, contract, work, run_state::WAITING, |_| PAUSE_MS);
    t.is("waits again", patiently(|| seen(1).load(SeqCst) == 2));
    asleep_again(t, contract, run_state::WAITING);
    WORD.store(0, SeqCst);
    // Where nobody tells that it sleeps, it may not yet.
    let woken = contract.wake(&WORD, 1);
    awake(t);
    let last = if woken == Ok(1) { 0x100 } else { 0x1_0000 };
    t.eq("interrupted once, then woken", seen(1).load(SeqCst), 1 + last);
    t.is("by the wake", woken == Ok(1) || !contract.uses(feature::RUN_STATE));
}

/// In a wait whose timeout passes in the pause: that is what ends it, not early, and only it. The next wait is woken.
pub(super) fn paused_with_timeout(t: &mut T) {
    let Some((contract, _, _)) = several(t, feature::WAIT | feature::CLOCK) else { return };
    let work = |cpu| {
        told_of(cpu, |contract, processor| {
            let deadline = processor.now() + AHEAD;
            seen(cpu).store(1, SeqCst);
            let ended = contract.wait(&WORD, 1, Some(AHEAD));
            let early = processor.now() < deadline;
            seen(cpu).store(2 + u64::from(early) + 0x100 * u64::from(ended != Ok(Waited::TimedOut)), SeqCst);
            let ended = contract.wait(&WORD, 1, None);
            seen(cpu).store(if ended == Ok(Waited::Woken) { 4 } else { 5 }, SeqCst);
        });
    };
    paused(t, contract, work, run_state::WAITING, |_| AHEAD / MILLISECOND + 10);
    t.is("ends", patiently(|| seen(1).load(SeqCst) != 1));
    t.eq("by its timeout, not early", seen(1).load(SeqCst), 2);
    asleep_again(t, contract, run_state::WAITING);
    WORD.store(0, SeqCst);
    // Where nobody tells that it sleeps, it may not yet.
    let woken = contract.wake(&WORD, 1);
    awake(t);
    t.eq("the next one is woken", seen(1).load(SeqCst), if woken == Ok(1) { 4 } else { 5 });
    t.is("by the wake", woken == Ok(1) || !contract.uses(feature::RUN_STATE));
}

/// In HLT: it halts on, until its interrupt comes.
pub(super) fn paused_in_hlt(t: &mut T) {
    let Some((contract, _, _)) = several(t, feature::CLOCK) else { return };
    let work = |cpu| {
        told_of(cpu, |_, _| {
            seen(cpu).store(1, SeqCst);
            let exit = run_on(cpu, &code!("sti", "hlt", "cli").kernel_on(cpu));
            apic::write(reg::EOI, 0);
            seen(cpu).store(exit.vector, SeqCst);
        });
    };
    paused(t, contract, work, run_state::HALTED, |_| PAUSE_MS);
    asleep_again(t, contract, run_state::HALTED);
    t.eq("still there", seen(1).load(SeqCst), 1);
    apic::write(reg::ICR_HIGH, vcpu(1) << 24);
    apic::write(reg::ICR_LOW, VECTOR.into());
    awake(t);
    t.eq("its interrupt", seen(1).load(SeqCst), VECTOR.into());
}

/// In HLT, with two timers whose deadlines pass in the pause: both come, once each, and not early.
pub(super) fn paused_with_timers(t: &mut T) {
    let Some((contract, _, _)) = several(t, feature::CLOCK | feature::TIMER) else { return };
    static LEFT: AtomicU64 = AtomicU64::new(0);
    let work = |cpu| {
        told_of(cpu, |_, processor| {
            let deadline = processor.now() + AHEAD;
            let armed = processor.set_timer(0, deadline, 0, TIMER);
            apic::write(reg::TIMER_DIVIDE, 0xB); // by 1
            apic::write(reg::LVT_TIMER, VECTOR.into()); // one-shot
            apic::write(reg::TIMER_INITIAL, AHEAD as u32); // of a nanosecond each
            DEADLINE.store(deadline, SeqCst);
            seen(cpu).store(1, SeqCst);
            let mut vectors = [0; 2];
            for vector in &mut vectors {
                *vector = run_on(cpu, &code!("sti", "hlt", "cli").kernel_on(cpu)).vector;
                apic::write(reg::EOI, 0);
            }
            let early = processor.now() < deadline || armed != Ok(false);
            vectors.sort_unstable();
            seen(cpu).store(vectors[0] | vectors[1] << 8 | u64::from(early) << 16, SeqCst);
            LEFT.store(apic::take_on(cpu).map_or(0, |vector| vector + 1), SeqCst);
            apic::enable_on(cpu);
        });
    };
    let (_, raised) = contract.timer_counts();
    let rest = |processor: &Processor| {
        let left = DEADLINE.load(SeqCst).saturating_sub(processor.now());
        (left / MILLISECOND + 10).max(PAUSE_MS)
    };
    paused(t, contract, work, run_state::HALTED, rest);
    awake(t);
    t.eq("both timers", seen(1).load(SeqCst), u64::from(VECTOR) | u64::from(TIMER) << 8);
    t.eq("and no more", LEFT.load(SeqCst), 0);
    t.eq("raised", contract.timer_counts().1, raised + 1);
}

/// While it yields: it goes on yielding. A timer of the processor that asks for the pause ends meanwhile.
pub(super) fn paused_in_yield(t: &mut T) {
    let Some((contract, _, _)) = several(t, feature::YIELD | feature::CLOCK | feature::TIMER) else { return };
    let work = |cpu| {
        told_of(cpu, |contract, processor| {
            let (mut last, mut stolen, mut backwards) = (processor.now(), processor.stolen_ns(), 0u64);
            while WORD.load(SeqCst) == 1 {
                let _ = contract.yield_to(None);
                let now = (processor.now(), processor.stolen_ns());
                backwards += u64::from(now.0 < last) + u64::from(now.1 < stolen);
                (last, stolen) = now;
                seen(cpu).fetch_add(1, SeqCst);
            }
            DEADLINE.store(backwards + 1, SeqCst);
        });
    };
    let (_, raised) = contract.timer_counts();
    paused(t, contract, work, run_state::RUNNING, |processor| {
        let armed = processor.set_timer(0, processor.now() + PAUSE_MS / 2 * MILLISECOND, 0, TIMER);
        u64::from(armed.is_ok()) * PAUSE_MS
    });
    let yielded = seen(1).load(SeqCst);
    t.is("goes on", patiently(|| seen(1).load(SeqCst) > yielded));
    WORD.store(0, SeqCst);
    awake(t);
    t.eq("never back", DEADLINE.load(SeqCst), 1);
    t.is("the timer comes", patiently(|| apic::bit(reg::IRR, TIMER.into())));
    t.same("taken", apic::take(), Some(TIMER.into()));
    apic::write(reg::EOI, 0);
    t.same("once", apic::take(), None);
    t.eq("raised", contract.timer_counts().1, raised + 1);
}
