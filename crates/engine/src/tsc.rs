//! The guest's time-stamp counter: the host's, moved by an offset, and at the points of a grid only where time is coarse.

use std::sync::atomic::{AtomicU64, Ordering};

use host::TscGrid;

/// One vCPU's TSC. Shared by its engine (RDTSC, TSC MSRs), its timer (TSC deadline) and its clock pages.
#[derive(Debug, Default)]
pub struct GuestTsc {
    offset: AtomicU64,
    khz: u64,
    /// Where it steps; absent where each tick is one.
    grid: Option<TscGrid>,
}

impl GuestTsc {
    /// A counter that reads `start` when the host's reads `host_now`, counting at `khz`.
    pub fn new(khz: u64, host_now: u64, start: u64) -> Self {
        Self { offset: AtomicU64::new(start.wrapping_sub(host_now)), khz, grid: None }
    }

    /// The same counter, stepping at the points of `grid` only. The grid is the host's: no offset moves it.
    pub fn on(self, grid: TscGrid) -> Self {
        Self { grid: Some(grid), ..self }
    }

    /// True where it steps at the points of a grid: the guest may not read the host's counter then.
    pub fn is_coarse(&self) -> bool {
        self.grid.is_some()
    }

    /// What the guest reads when the host's counter reads `host`.
    #[inline]
    pub fn guest(&self, host: u64) -> u64 {
        let host = self.grid.map_or(host, |grid| grid.floor(host));
        host.wrapping_add(self.offset.load(Ordering::Relaxed))
    }

    /// What the host's counter reads when the guest reads `guest`.
    pub fn host(&self, guest: u64) -> u64 {
        guest.wrapping_sub(self.offset.load(Ordering::Relaxed))
    }

    /// Guest minus host.
    pub fn offset(&self) -> u64 {
        self.offset.load(Ordering::Relaxed)
    }

    /// The raw offset, for engines that add it in generated code where the counter is not coarse.
    pub fn word(&self) -> &AtomicU64 {
        &self.offset
    }

    /// Moves the counter by `delta` (a write to IA32_TSC or IA32_TSC_ADJUST).
    pub fn adjust(&self, delta: u64) {
        self.offset.fetch_add(delta, Ordering::Relaxed);
    }

    /// Its rate in kHz.
    pub fn khz(&self) -> u64 {
        self.khz
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::num::NonZeroU64;

    #[test]
    fn a_coarse_counter_steps_at_the_hosts_points_whatever_the_guest_writes() {
        let grid = TscGrid::new(100, NonZeroU64::new(1000).unwrap());
        let tsc = GuestTsc::new(1_000_000, 100, 0).on(grid);
        assert!(tsc.is_coarse() && !GuestTsc::new(1_000_000, 100, 0).is_coarse());
        let mut last = tsc.guest(100);
        for host in 100..10_100 {
            let now = tsc.guest(host);
            assert!(now == last || (host - 100) % 1000 == 0, "a step between points, at {host}");
            last = now;
            // IA32_TSC: what the guest asked for is what it reads, and goes on reading up to the next point.
            if host % 7 == 0 {
                tsc.adjust((host * 31).wrapping_sub(now));
                assert_eq!(tsc.guest(host), host * 31);
                last = host * 31;
            }
        }
        let tsc = GuestTsc::new(1_000_000, 100, 0).on(grid);
        tsc.adjust(7); // IA32_TSC_ADJUST
        let seen: BTreeSet<u64> = (100..10_100).map(|host| tsc.guest(host)).collect();
        assert!(seen.into_iter().eq((0..10).map(|step| step * 1000 + 7)));
    }
}
