//! The guest's time: how much of the host's it may have, and its TSC in terms of that, for the local APIC's deadline timer.

use std::num::NonZeroU64;
use std::sync::Arc;

use device::interrupt::TscReference;
use engine::GuestTsc;
use host::{Clock, CoarseClock, CoarseTimers, Timers, TscGrid};
use paravirt::TscScale;

use crate::plan::TimePolicy;

/// What a machine has instead of the host's time. Everything that a guest can read, or be woken by, takes its time here.
pub(crate) struct GuestTime {
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) timers: Arc<dyn Timers>,
    /// Where the vCPUs' counters step; absent where each tick is one.
    pub(crate) grid: Option<TscGrid>,
}

impl GuestTime {
    pub(crate) fn new(policy: TimePolicy, clock: Arc<dyn Clock>, timers: Arc<dyn Timers>) -> Self {
        let TimePolicy::Coarse(quantum_ns) = policy else { return Self { clock, timers, grid: None } };
        let ticks = TscScale::new(clock.tsc_khz()).ticks_of(quantum_ns.into());
        let period = NonZeroU64::new(ticks).unwrap_or(NonZeroU64::MIN);
        let coarse = Arc::new(CoarseClock::new(clock, period, quantum_ns.into()));
        let timers = Arc::new(CoarseTimers::new(timers, Arc::clone(&coarse)));
        let grid = Some(coarse.grid());
        Self { clock: coarse, timers, grid }
    }
}

/// One vCPU's TSC against the host's clock.
pub(crate) struct TscClock {
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) tsc: Arc<GuestTsc>,
}

impl TscReference for TscClock {
    fn guest_now(&self) -> u64 {
        self.tsc.guest(self.clock.tsc())
    }

    fn deadline_ns(&self, guest_tsc: u64) -> u64 {
        let (now_ns, now) = (self.clock.monotonic_ns(), self.guest_now());
        // ticks / (kHz * 1000) s = ticks * 10^6 / kHz ns
        let ns = (u128::from(guest_tsc.saturating_sub(now)) * 1_000_000).div_ceil(u128::from(self.tsc.khz().max(1)));
        now_ns.saturating_add(u64::try_from(ns).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use host::fake::FakeClock;

    #[test]
    fn deadlines_are_rounded_up_and_never_wrap() {
        let clock = FakeClock::new();
        clock.advance(1000);
        // 3 ticks a nanosecond as the guest is told; reads 500 now.
        let tsc = Arc::new(GuestTsc::new(3_000_000, 1000, 500));
        let reference = TscClock { clock: Arc::new(clock), tsc };
        assert_eq!(reference.guest_now(), 500);
        assert_eq!(
            [0, 499, 500, 501, 503, 504].map(|at| reference.deadline_ns(at)),
            [1000, 1000, 1000, 1001, 1001, 1002]
        );
        assert_eq!(reference.deadline_ns(u64::MAX), 1000 + (u64::MAX - 500).div_ceil(3));
    }
}
