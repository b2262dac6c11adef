//! How often a guest uses what it was offered, how often it tried what it was not, and what that cost.
//!
//! Written by the thread that makes the calls of one vCPU, readable by anyone at any time. What is used by loads from shared
//! memory leaves no trace here.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use contract::kvm::feature as kvm;
use contract::native::{call, feature};
use engine::ledger::{Histogram, Summary};

/// What is known of the use of a feature.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// Calls and register writes that were honoured: their times, in TSC ticks.
    pub times: Summary,
    /// Those that were not: the feature is not accepted, or an argument was wrong.
    pub refused: u64,
}

#[derive(Debug, Default)]
struct Tally {
    honoured: Histogram,
    refused: AtomicU64,
}

impl Tally {
    fn count(&self, honoured: bool, ticks: u64) {
        if honoured {
            self.honoured.record(ticks);
        } else {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn used<'a>(tallies: impl Iterator<Item = &'a Self> + Clone) -> Used {
        let refused = tallies.clone().map(|tally| tally.refused.load(Ordering::Relaxed)).sum();
        Used { times: Histogram::summary(tallies.map(|tally| &tally.honoured)), refused }
    }
}

/// The calls of the native dialect that one caller made.
#[derive(Debug, Default)]
pub(crate) struct Calls([Tally; call::COUNT as usize]);

impl Calls {
    /// Counts a call; `number` is that of [`call`]. Numbers without a meaning belong to no feature.
    pub(crate) fn count(&self, number: u64, honoured: bool, ticks: u64) {
        if let Some(tally) = usize::try_from(number).ok().and_then(|number| self.0.get(number)) {
            tally.count(honoured, ticks);
        }
    }

    /// All calls.
    pub(crate) fn all(&self) -> Used {
        Tally::used(self.0.iter())
    }

    /// What `callers` did of the calls that belong to `feature`; `None` where no call does.
    pub(crate) fn used<'a>(callers: impl Iterator<Item = &'a Self> + Clone, feature: u64) -> Option<Used> {
        let numbers = calls_of(feature)?;
        Some(Tally::used(callers.flat_map(|calls| numbers.iter().map(|&number| &calls.0[number as usize]))))
    }
}

/// The calls of a feature that has any.
fn calls_of(feature: u64) -> Option<&'static [u64]> {
    Some(match feature {
        feature::TIME_OF_DAY => &[call::TIME_OF_DAY],
        feature::TIMER => &[call::SET_TIMER],
        feature::INTERRUPTS => &[call::ACK, call::IRQ_WINDOW],
        feature::YIELD => &[call::YIELD_TO, call::BOOST],
        feature::IPI => &[call::SEND_IPI],
        feature::FLUSH_TLB => &[call::FLUSH_TLB],
        feature::WAIT => &[call::WAIT, call::WAKE],
        feature::MULTICALL => &[call::MULTICALL],
        _ => return None,
    })
}

/// Features of the kvm dialect that are used by registers or calls.
const KVM: [u32; 8] = [
    kvm::CLOCKSOURCE,
    kvm::CLOCKSOURCE2,
    kvm::STEAL_TIME,
    kvm::PV_EOI,
    kvm::PV_UNHALT,
    kvm::PV_SEND_IPI,
    kvm::POLL_CONTROL,
    kvm::PV_SCHED_YIELD,
];
/// Those of them that the guest holds on to: it has told the host an address.
const HELD: u32 = kvm::CLOCKSOURCE | kvm::CLOCKSOURCE2 | kvm::STEAL_TIME | kvm::PV_EOI;

/// What one vCPU does with the registers and calls of the kvm dialect.
#[derive(Debug, Default)]
pub struct KvmUsage {
    tallies: [Tally; KVM.len()],
    /// Bits of [`HELD`].
    held: AtomicU32,
}

impl KvmUsage {
    fn tally(&self, feature: u32) -> Option<&Tally> {
        KVM.iter().position(|known| *known == feature).and_then(|index| self.tallies.get(index))
    }

    /// Counts a write to a register of `feature`, or a call.
    pub(crate) fn count(&self, feature: u32, honoured: bool, ticks: u64) {
        if let Some(tally) = self.tally(feature) {
            tally.count(honoured, ticks);
        }
    }

    /// From now on the vCPU holds on to `feature`, or no longer does.
    pub(crate) fn hold(&self, feature: u32, held: bool) {
        if held {
            self.held.fetch_or(feature, Ordering::Relaxed);
        } else {
            self.held.fetch_and(!feature, Ordering::Relaxed);
        }
    }

    /// It holds on to nothing any more.
    pub(crate) fn let_go(&self) {
        self.held.store(0, Ordering::Relaxed);
    }

    /// What the vCPUs did with `feature`; `None` where that is by loads and stores, or by nothing.
    pub fn used<'a>(vcpus: impl Iterator<Item = &'a Self> + Clone, feature: u32) -> Option<Used> {
        KVM.contains(&feature).then(|| Tally::used(vcpus.filter_map(move |vcpu| vcpu.tally(feature))))
    }

    /// True where any of them holds on to `feature`; `None` where there is nothing to hold on to.
    pub fn held<'a>(mut vcpus: impl Iterator<Item = &'a Self>, feature: u32) -> Option<bool> {
        (HELD & feature != 0).then(|| vcpus.any(|vcpu| vcpu.held.load(Ordering::Relaxed) & feature != 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_features_calls_are_counted_over_all_callers() {
        let callers = [Calls::default(), Calls::default()];
        callers[0].count(call::WAIT, true, 10);
        callers[1].count(call::WAKE, true, 30);
        callers[1].count(call::WAKE, false, 500);
        callers[1].count(call::NOP, true, 1);
        for without_meaning in [call::COUNT, u64::MAX] {
            callers[0].count(without_meaning, false, 1);
        }
        let used = Calls::used(callers.iter(), feature::WAIT).unwrap();
        assert_eq!((used.times.count, used.times.ticks, used.times.longest, used.refused), (2, 40, 30, 1));
        assert_eq!(Calls::used(callers.iter(), feature::TIMER), Some(Used::default()));
        assert_eq!(Calls::used(callers.iter(), feature::CLOCK), None, "used by loads");
    }

    #[test]
    fn what_vcpus_do_with_the_kvm_dialect_is_counted_by_feature() {
        let vcpus = [KvmUsage::default(), KvmUsage::default()];
        let look = |feature| {
            let used = KvmUsage::used(vcpus.iter(), feature).map(|used| (used.times.count, used.refused));
            (used, KvmUsage::held(vcpus.iter(), feature))
        };
        vcpus[1].count(kvm::CLOCKSOURCE, true, 7);
        vcpus[1].hold(kvm::CLOCKSOURCE, true);
        vcpus[1].hold(kvm::PV_EOI, true);
        vcpus[0].count(kvm::CLOCKSOURCE2, false, 7);
        vcpus.iter().for_each(|vcpu| vcpu.count(kvm::PV_SEND_IPI, true, 7));
        assert_eq!(look(kvm::CLOCKSOURCE), (Some((1, 0)), Some(true)));
        assert_eq!(look(kvm::CLOCKSOURCE2), (Some((0, 1)), Some(false)));
        assert_eq!(look(kvm::PV_SEND_IPI), (Some((2, 0)), None));
        assert_eq!(look(kvm::PV_TLB_FLUSH), (None, None), "used by loads and stores");
        vcpus[1].hold(kvm::CLOCKSOURCE, false);
        assert_eq!([kvm::CLOCKSOURCE, kvm::PV_EOI].map(|feature| look(feature).1), [Some(false), Some(true)]);
        vcpus[1].let_go();
        assert_eq!(look(kvm::PV_EOI).1, Some(false));
    }
}
