//! Clocks: monotonic time, wall time, and the processor's time-stamp counter.
#![allow(unsafe_code)] // the fence: RDTSC is an intrinsic

use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

/// Where a VM takes its time from.
pub trait Clock: Send + Sync {
    /// Nanoseconds of a clock that never goes back (CLOCK_MONOTONIC).
    fn monotonic_ns(&self) -> u64;
    /// Nanoseconds since 1970-01-01 UTC.
    fn realtime_ns(&self) -> u64;
    /// The time-stamp counter now.
    fn tsc(&self) -> u64;
    /// How fast [`Clock::tsc`] counts, in kHz.
    fn tsc_khz(&self) -> u64;
    /// How long to sleep until [`Clock::monotonic_ns`] reads `deadline_ns` or more, nanoseconds of the host's; 0 where it does.
    fn ns_until(&self, deadline_ns: u64) -> u64 {
        deadline_ns.saturating_sub(self.monotonic_ns())
    }
}

/// The host's own clocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostClock;

impl Clock for HostClock {
    fn monotonic_ns(&self) -> u64 {
        let now = clock_gettime(ClockId::Monotonic);
        now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
    }

    fn realtime_ns(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
    }

    fn tsc(&self) -> u64 {
        read_tsc()
    }

    fn tsc_khz(&self) -> u64 {
        static KHZ: OnceLock<u64> = OnceLock::new();
        *KHZ.get_or_init(|| measured_tsc_khz(self))
    }
}

/// The host's time-stamp counter, without the price of a virtual call.
#[inline]
pub fn read_tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 processor and touches no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Counts TSC ticks over 20 ms of monotonic time; the host kernel's own figure is not readable without privilege.
fn measured_tsc_khz(clock: &HostClock) -> u64 {
    // The first pair of reads may be disturbed by a preemption between its two halves; the tightest of a few is not.
    let sample = || {
        (0..8)
            .map(|_| {
                let before = read_tsc();
                let ns = clock.monotonic_ns();
                let after = read_tsc();
                (after - before, before + (after - before) / 2, ns)
            })
            .min()
            .map_or((0, 0), |(_, tsc, ns)| (tsc, ns))
    };
    let (tsc_start, ns_start) = sample();
    std::thread::sleep(Duration::from_millis(20));
    let (tsc_end, ns_end) = sample();
    ((u128::from(tsc_end - tsc_start) * 1_000_000) / u128::from((ns_end - ns_start).max(1))) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_clock_moves_forward() {
        let clock = HostClock;
        let (ns, tsc) = (clock.monotonic_ns(), clock.tsc());
        assert!(clock.monotonic_ns() >= ns);
        assert!(clock.tsc() > tsc);
        assert!(clock.tsc_khz() > 100_000, "a TSC below 100 MHz is a bad measurement");
    }
}
