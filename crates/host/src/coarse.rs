//! The host's time for those who may have it coarsely only: clocks that stand still, and timers that ring where they step.
//!
//! ```text
//!   the host's TSC   ──┼─────────┼─────────┼─────────┼──>   points, a fixed number of ticks apart
//!   what is read       ├─────────┤ the last point: TSC, monotonic time and time of day alike
//!   timers                  ╷    ▲
//!                       deadline └ served at the first point that is not before it
//! ```
//!
//! All clocks step at the same points: two that stepped at different moments would together be finer than either.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Clock, Timer, TimerCallback, Timers};

const NS_PER_MS: u128 = 1_000_000;
/// How often the time of day is read again because a point went by meanwhile.
const MOST_READS: u32 = 8;

/// Points of the host's time-stamp counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscGrid {
    origin: u64,
    period: NonZeroU64,
}

impl TscGrid {
    /// Points each `period` ticks from `origin` on.
    pub fn new(origin: u64, period: NonZeroU64) -> Self {
        Self { origin, period }
    }

    /// The last point that is not after `tsc`; the first of all before that.
    #[inline]
    pub fn floor(self, tsc: u64) -> u64 {
        let since = tsc.saturating_sub(self.origin);
        self.origin + (since - since % self.period)
    }

    /// The first point that is at least `ticks` behind the origin; the last number where there is none.
    fn point_after(self, ticks: u128) -> u64 {
        let period = u128::from(self.period.get());
        let point = ticks.div_ceil(period).saturating_mul(period).saturating_add(self.origin.into());
        u64::try_from(point).unwrap_or(u64::MAX)
    }
}

/// A clock that stands at the last point of its grid.
pub struct CoarseClock {
    exact: Arc<dyn Clock>,
    grid: TscGrid,
    quantum_ns: u64,
    khz: u64,
    /// Monotonic time at the grid's origin.
    started_ns: u64,
    /// The point at which the time of day was last asked for, and what it was.
    realtime: Mutex<(u64, u64)>,
}

impl CoarseClock {
    /// A clock that follows `exact` in steps of `period` ticks, from now on; its time of day is a multiple of `quantum_ns`.
    pub fn new(exact: Arc<dyn Clock>, period: NonZeroU64, quantum_ns: u64) -> Self {
        let (started_ns, origin, khz) = (exact.monotonic_ns(), exact.tsc(), exact.tsc_khz().max(1));
        let grid = TscGrid::new(origin, period);
        Self { exact, grid, quantum_ns: quantum_ns.max(1), khz, started_ns, realtime: Mutex::new((u64::MAX, 0)) }
    }

    /// The points at which it steps.
    pub fn grid(&self) -> TscGrid {
        self.grid
    }

    fn nanoseconds(&self, ticks: u64) -> u64 {
        u64::try_from(u128::from(ticks) * NS_PER_MS / u128::from(self.khz)).unwrap_or(u64::MAX)
    }

    /// The time of day at `point`, which was the last one when this was called.
    fn realtime_at(&self, point: u64) -> u64 {
        let mut reads = 0;
        loop {
            let before = self.exact.tsc();
            let ns = self.exact.realtime_ns();
            reads += 1;
            if self.grid.floor(self.exact.tsc()) == self.grid.floor(before) || reads == MOST_READS {
                return ns.saturating_sub(self.nanoseconds(before.saturating_sub(point)));
            }
        }
    }
}

impl Clock for CoarseClock {
    fn monotonic_ns(&self) -> u64 {
        self.started_ns.saturating_add(self.nanoseconds(self.tsc() - self.grid.origin))
    }

    fn realtime_ns(&self) -> u64 {
        // One answer a point: what is read first is what all read, however the host's own time of day is adjusted.
        let mut last = lock(&self.realtime);
        let point = self.tsc();
        if last.0 != point {
            let ns = self.realtime_at(point);
            *last = (point, ns - ns % self.quantum_ns);
        }
        last.1
    }

    fn tsc(&self) -> u64 {
        self.grid.floor(self.exact.tsc())
    }

    fn tsc_khz(&self) -> u64 {
        self.khz
    }

    fn ns_until(&self, deadline_ns: u64) -> u64 {
        let wanted = u128::from(deadline_ns.saturating_sub(self.started_ns)) * u128::from(self.khz);
        let left = self.grid.point_after(wanted.div_ceil(NS_PER_MS)).saturating_sub(self.exact.tsc());
        u64::try_from((u128::from(left) * NS_PER_MS).div_ceil(self.khz.into())).unwrap_or(u64::MAX)
    }
}

/// Timers on a [`CoarseClock`]: their deadlines are its readings.
pub struct CoarseTimers {
    exact: Arc<dyn Timers>,
    clock: Arc<CoarseClock>,
}

impl CoarseTimers {
    /// Timers that `exact` rings.
    pub fn new(exact: Arc<dyn Timers>, clock: Arc<CoarseClock>) -> Self {
        Self { exact, clock }
    }
}

struct CoarseTimer {
    clock: Arc<CoarseClock>,
    deadline: Mutex<Option<u64>>,
    timer: Box<dyn Timer>,
    callback: TimerCallback,
}

impl CoarseTimer {
    /// Arms the host's timer. Under the deadline's lock: what is armed later could replace a newer deadline.
    fn arm_exact(&self, deadline_ns: u64) {
        let now = self.clock.exact.monotonic_ns();
        self.timer.arm(now.saturating_add(self.clock.ns_until(deadline_ns)));
    }

    fn ring(&self) {
        let mut deadline = lock(&self.deadline);
        match *deadline {
            // The host's monotonic time and its TSC part in the long run, and a newer deadline may have come.
            Some(at) if self.clock.monotonic_ns() < at => self.arm_exact(at),
            Some(_) => {
                *deadline = None;
                drop(deadline);
                (self.callback)();
            }
            None => {}
        }
    }
}

impl Timers for CoarseTimers {
    fn timer(&self, callback: TimerCallback) -> Box<dyn Timer> {
        let timer = Arc::new_cyclic(|this: &std::sync::Weak<CoarseTimer>| {
            let this = this.clone();
            let timer = self.exact.timer(Box::new(move || {
                if let Some(timer) = this.upgrade() {
                    timer.ring();
                }
            }));
            CoarseTimer { clock: Arc::clone(&self.clock), deadline: Mutex::new(None), timer, callback }
        });
        Box::new(Owner(timer))
    }
}

/// The one who has a timer: it is disarmed with it.
struct Owner(Arc<CoarseTimer>);

impl Timer for Owner {
    fn arm(&self, deadline_ns: u64) {
        let mut deadline = lock(&self.0.deadline);
        *deadline = Some(deadline_ns);
        self.0.arm_exact(deadline_ns);
    }

    fn disarm(&self) {
        let mut deadline = lock(&self.0.deadline);
        *deadline = None;
        self.0.timer.disarm();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{FakeClock, FakeTimers};
    use std::sync::atomic::{AtomicU64, Ordering};

    fn period(ticks: u64) -> NonZeroU64 {
        NonZeroU64::new(ticks).unwrap()
    }

    /// A fake clock (a tick a nanosecond) at 500, and what is seen of it in steps of 1000.
    fn coarse() -> (FakeClock, Arc<CoarseClock>) {
        let exact = FakeClock::new();
        exact.advance(500);
        let clock = Arc::new(CoarseClock::new(Arc::new(exact.clone()), period(1000), 1000));
        (exact, clock)
    }

    #[test]
    fn all_clocks_step_together_and_by_the_quantum() {
        let (exact, clock) = coarse();
        let mut seen = Vec::new();
        for ns in 0..10_000 {
            let now = (clock.tsc(), clock.monotonic_ns(), clock.realtime_ns());
            if seen.last() != Some(&now) {
                assert_eq!(ns % 1000, 0, "a step between points");
                seen.push(now);
            }
            exact.advance(1);
        }
        assert_eq!(seen.len(), 10);
        let day = 1_700_000_000_000_000_000;
        for (step, now) in (0..).zip(seen) {
            let point = 500 + step * 1000;
            assert_eq!(now, (point, point, day + point - 500), "multiples of the quantum");
        }
    }

    #[test]
    fn a_grid_takes_any_number() {
        let grid = TscGrid::new(500, period(1000));
        assert_eq!([0, 499, 500, 1499, 1500].map(|tsc| grid.floor(tsc)), [500, 500, 500, 500, 1500]);
        assert!((u64::MAX - 1000..=u64::MAX).contains(&grid.floor(u64::MAX)));
        assert_eq!(TscGrid::new(u64::MAX, period(u64::MAX)).floor(0), u64::MAX);
        assert_eq!([0, 1, 1000, 1001].map(|ticks| grid.point_after(ticks)), [500, 1500, 1500, 2500]);
        assert_eq!(grid.point_after(u128::MAX), u64::MAX);
    }

    #[test]
    fn what_is_left_ends_at_the_first_point_that_is_not_before_the_deadline() {
        let (exact, clock) = coarse();
        exact.advance(300);
        let left = [0, 500, 501, 1500, 1501].map(|deadline| clock.ns_until(deadline));
        assert_eq!(left, [0, 0, 700, 700, 1700]);
        assert_eq!(clock.ns_until(u64::MAX), u64::MAX - 800, "never is the end of time");
    }

    #[test]
    fn timers_ring_at_points_only_and_never_before_their_deadline() {
        let (exact, clock) = coarse();
        let fakes = FakeTimers::new(exact.clone());
        let timers = CoarseTimers::new(Arc::new(fakes.clone()), Arc::clone(&clock));
        for deadline in (0..5000).step_by(13) {
            let start = exact.monotonic_ns();
            let rung = Arc::new(AtomicU64::new(0));
            let (sees, at) = (exact.clone(), Arc::clone(&rung));
            let timer = timers.timer(Box::new(move || at.store(sees.monotonic_ns(), Ordering::SeqCst)));
            timer.arm(start + deadline);
            fakes.advance(7001);
            let rang = rung.load(Ordering::SeqCst);
            assert_eq!((rang % 1000, rang), (500, rang.max(start + deadline)), "at a point, not before {deadline}");
            assert!(rang < start + deadline + 1000, "at the first");
        }
        let never = timers.timer(Box::new(|| panic!("disarmed")));
        never.arm(exact.monotonic_ns() + 1);
        never.disarm();
        drop(never);
        fakes.advance(2000);
    }

    /// A TSC that is fast against monotonic time by a thousandth, as one whose rate was measured badly.
    struct Drifting(FakeClock);

    impl Clock for Drifting {
        fn monotonic_ns(&self) -> u64 {
            self.0.monotonic_ns()
        }
        fn realtime_ns(&self) -> u64 {
            self.0.realtime_ns()
        }
        fn tsc(&self) -> u64 {
            self.0.monotonic_ns() * 999 / 1000
        }
        fn tsc_khz(&self) -> u64 {
            1_000_000
        }
    }

    #[test]
    fn a_timer_that_rings_early_goes_on_to_its_point() {
        let exact = FakeClock::new();
        let fakes = FakeTimers::new(exact.clone());
        let clock = Arc::new(CoarseClock::new(Arc::new(Drifting(exact)), period(1000), 1000));
        let timers = CoarseTimers::new(Arc::new(fakes.clone()), Arc::clone(&clock));
        let (rung, sees) = (Arc::new(AtomicU64::new(0)), Arc::clone(&clock));
        let at = Arc::clone(&rung);
        let timer = timers.timer(Box::new(move || at.store(sees.monotonic_ns(), Ordering::SeqCst)));
        timer.arm(1_000_000);
        fakes.advance(1_000_000);
        assert_eq!(rung.load(Ordering::SeqCst), 0, "its clock is at 999,000");
        fakes.advance(1_002);
        assert_eq!(rung.load(Ordering::SeqCst), 1_000_000);
        drop(timer);
    }
}
