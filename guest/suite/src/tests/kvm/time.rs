//! The clock, pairs of clocks, and stolen time.

use super::*;

/// The pvclock page, read as msr.rst says: nanoseconds, or `None` while the version is odd.
pub fn read_clock(page: *const u8) -> Option<u64> {
    // SAFETY: the page is the suite's own, and the offsets are inside of it.
    let word = |offset: usize| unsafe { page.add(offset).cast::<u32>().read_volatile() };
    let version = word(0);
    let wide = |offset| u64::from(word(offset)) | u64::from(word(offset + 4)) << 32;
    let (stamp, system_time, multiplier) = (wide(8), wide(16), word(24));
    let shift = word(28) as u8 as i8;
    let delta = rdtsc().wrapping_sub(stamp);
    let delta = if shift >= 0 { delta << shift } else { delta >> -shift };
    let time = system_time + ((u128::from(delta) * u128::from(multiplier)) >> 32) as u64;
    (version & 1 == 0 && word(0) == version).then_some(time)
}

/// kvmclock never goes back, through both MSRs, and the page stops changing once it is off.
pub(super) fn clock(t: &mut T) {
    let Some(features) = features(t) else { return };
    for (bit, index) in [(feature::CLOCK, 0x4B56_4D01u32), (feature::CLOCK_OLD, 0x12)] {
        if features >> bit & 1 == 0 {
            continue;
        }
        frame(0).fill(0);
        let page = physical(frame(0));
        t.event("enable", &write_msr(index, page | 1), DONE);
        t.eq("read back", rdmsr(index), page | 1);
        t.is("multiplier", frame(0)[24..28] != [0; 4]);
        if features >> feature::CLOCK_STABLE & 1 != 0 {
            t.is("stable bit", frame(0)[29] & 1 != 0);
            shows(Case::Use, feature::CLOCK_STABLE);
        }
        let (mut last, mut backwards) = (0, 0u64);
        for _ in 0..10_000 {
            if let Some(now) = read_clock(frame(0).as_ptr()) {
                backwards += u64::from(now < last);
                last = now;
            }
        }
        t.is("time passes", last > 0);
        t.eq("backwards", backwards, 0);
        t.event("disable", &write_msr(index, 0), DONE);
        shows(Case::Use, bit);
    }
    t.is("feature leaf", true);
}

/// The wall clock is written once, with an even version and a plausible year.
pub(super) fn wall_clock(t: &mut T) {
    let Some(features) = features(t) else { return };
    for (bit, index) in [(feature::CLOCK, 0x4B56_4D00u32), (feature::CLOCK_OLD, 0x11)] {
        if features >> bit & 1 == 0 {
            continue;
        }
        frame(0).fill(0);
        t.event("write", &write_msr(index, physical(frame(0))), DONE);
        let word = |o: usize| u32::from_le_bytes(frame(0)[o..o + 4].try_into().unwrap());
        t.is("version", word(0) & 1 == 0);
        t.is("nanoseconds", word(8) < 1_000_000_000);
        t.is("after 2020", word(4) > 1_577_836_800);
        t.eq("read back", rdmsr(index), physical(frame(0)));
    }
    t.is("feature leaf", true);
}

/// An address for a clock that is not aligned, or not RAM: #GP(0), and the clock stays where it was.
pub(super) fn bad_clocks(t: &mut T) {
    let Some(features) = features(t) else { return };
    for (bit, clock, wall) in [(feature::CLOCK, 0x4B56_4D01, 0x4B56_4D00), (feature::CLOCK_OLD, 0x12, 0x11)] {
        if features >> bit & 1 == 0 {
            continue;
        }
        frame(0).fill(0);
        let page = physical(frame(0));
        t.event("enable", &write_msr(clock, page | 1), DONE);
        refuses(t, clock, &[page | 3, page + 2]);
        t.event("wall clock", &write_msr(wall, page + 0x800), DONE);
        refuses(t, wall, &[page + 0x802, page + 0x801]);
        t.is("still there", read_clock(frame(0).as_ptr()).is_some_and(|now| now > 0));
        t.event("disable", &write_msr(clock, 0), DONE);
        shows(Case::BadArgument, bit);
    }
    t.is("feature leaf", true);
}

/// The time of day and the counter, of one moment.
pub(super) fn clock_pairing(t: &mut T) {
    if !offered(t, feature::CLOCK) {
        return;
    }
    frame(0).fill(0xFF);
    let before = rdtsc();
    t.same("paired", hypercall(call::CLOCK_PAIRING, [physical(frame(0)), 0, 0, 0]), 0);
    let after = rdtsc();
    let wide = |at: usize| u64::from_le_bytes(frame(0)[at..at + 8].try_into().unwrap());
    t.is("after 2020", wide(0) > 1_577_836_800);
    t.is("nanoseconds", wide(8) < 1_000_000_000);
    t.is("of this moment", (before..=after).contains(&wide(16)));
    t.is("zero", frame(0)[24..64].iter().all(|byte| *byte == 0));
    t.eq("the end", frame(0)[64], 0xFF);
    t.same("another kind", hypercall(call::CLOCK_PAIRING, [physical(frame(0)), 1, 0, 0]), -95);
    for bad in NO_RAM.into_iter().chain([u64::MAX]) {
        t.same("no RAM", hypercall(call::CLOCK_PAIRING, [bad, 0, 0, 0]), -14);
    }
}

/// Stolen time never goes back, and its version is even.
pub(super) fn steal_time(t: &mut T) {
    if !offered(t, feature::STEAL_TIME) {
        return;
    }
    frame(0).fill(0);
    let page = physical(frame(0));
    t.event("enable", &write_msr(pv::STEAL_TIME, page | 1), DONE);
    t.eq("read back", rdmsr(pv::STEAL_TIME), page | 1);
    t.is("written", frame(0)[8..12] != [0; 4]);
    let steal = || u64::from_le_bytes(frame(0)[..8].try_into().unwrap());
    let mut last = steal();
    for _ in 0..100 {
        hypercall(call::SCHED_YIELD, [apic_id(), 0, 0, 0]);
        t.is("never back", steal() >= last);
        last = steal();
        t.eq("version", frame(0)[8] & 1, 0);
    }
    t.eq("preempted", frame(0)[PREEMPTED], 0);
    t.is("the rest is zero", frame(0)[12..].iter().all(|byte| *byte == 0));
    shows(Case::Use, feature::STEAL_TIME);
    refuses(t, pv::STEAL_TIME, &[page | 3, page | 0x21, page | 2]);
    shows(Case::BadArgument, feature::STEAL_TIME);
    t.event("disable", &write_msr(pv::STEAL_TIME, 0), DONE);
}
