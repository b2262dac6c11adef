//! What a guest may have of the host's time, and how often.

/// The limits of one VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What `time_of_day` and the VM page's wall clock are multiples of, nanoseconds, at least 1. Where time is coarse, what all
    /// clocks step by.
    pub quantum_ns: u32,
    /// `time_of_day` calls a second, at least 1.
    pub calls_per_s: u32,
    /// How many of them may come at once, at least 1.
    pub burst: u32,
    /// How long a guest has to acknowledge a revocation, nanoseconds.
    pub patience_ns: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self { quantum_ns: 1_000, calls_per_s: 10_000, burst: 1_000, patience_ns: 1_000_000_000 }
    }
}

impl Policy {
    /// `ns`, as the guest may know it.
    pub(crate) fn quantised(&self, ns: u64) -> u64 {
        ns - ns % u64::from(self.quantum_ns.max(1))
    }
}

/// A token bucket: calls that are spread out pass, a burst passes up to its size.
#[derive(Debug)]
pub(crate) struct Bucket {
    /// Tokens a second, at least 1.
    rate: u128,
    /// A full bucket, in billionths of a token.
    burst: u128,
    /// When the bucket will be full again, nanoseconds times [`Bucket::rate`]: whole numbers at any rate.
    full_at: u128,
}

impl Bucket {
    /// Nanoseconds times tokens a second: a token.
    const TOKEN: u128 = 1_000_000_000;

    pub(crate) fn new(policy: &Policy) -> Self {
        let [rate, burst] = [policy.calls_per_s, policy.burst].map(|value| u128::from(value.max(1)));
        Self { rate, burst: burst * Self::TOKEN, full_at: 0 }
    }

    /// True where a call may pass at `now`, nanoseconds.
    pub(crate) fn take(&mut self, now: u64) -> bool {
        let now = u128::from(now) * self.rate;
        let full_at = self.full_at.max(now) + Self::TOKEN;
        let passes = full_at - now <= self.burst;
        if passes {
            self.full_at = full_at;
        }
        passes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let mut bucket = Bucket::new(&Policy { calls_per_s: 1000, burst: 3, ..Policy::default() });
        assert_eq!([0, 0, 0, 0, 999_999].map(|now| bucket.take(now)), [true, true, true, false, false]);
        assert_eq!([1_000_000, 1_000_001, 2_000_001].map(|now| bucket.take(now)), [true, false, true]);
        let later = 10_000_000_000;
        assert_eq!([0, 1, 2, 3].map(|after| bucket.take(later + after)), [true, true, true, false]);
    }

    #[test]
    fn the_rate_is_kept_whatever_it_is() {
        for calls_per_s in [1, 3, 7_777, 1_000_000, 333_333_333, u32::MAX] {
            let mut bucket = Bucket::new(&Policy { calls_per_s, burst: 4, ..Policy::default() });
            // As often as could pass and more, for 100,000 calls' time: the clock moves by less than a call's time.
            let span = 100_000_000_000_000_u128.div_ceil(calls_per_s.into()) as u64;
            let passed = (0..=1_000_000).filter(|step| bucket.take(span / 1_000_000 * step)).count();
            let most = 4 + span as u128 * u128::from(calls_per_s) / 1_000_000_000;
            assert!(passed as u128 <= most, "{passed} at {calls_per_s}");
            if span >= 1_000_000 {
                assert!((99_000..=101_000).contains(&passed), "{passed} at {calls_per_s}");
            }
        }
    }

    /// Ten million requests a second, whatever passes: to the call, what the rate and the burst are.
    #[test]
    fn ten_million_requests_a_second_pass_at_the_rate_and_a_burst_beyond() {
        const EACH_NS: u64 = 100;
        for (calls_per_s, burst, seconds) in [
            (1, 1, 4),
            (1, 1_000, 1),
            (10, 2, 2),
            (1_000, 1_000, 1),
            (10_000, 1_000, 1),
            (7_777, 2, 1),
            (99_999, 2, 1),
            (333_333, 5, 1),
            (1_000_000, 1, 1),
            (1_000_000, 1_000_000, 1),
        ] {
            let mut bucket = Bucket::new(&Policy { calls_per_s, burst, ..Policy::default() });
            let start = 1_234_567_890_123;
            let requests = seconds * 1_000_000_000 / EACH_NS;
            let passed = (0..=requests).filter(|request| bucket.take(start + request * EACH_NS)).count() as u64;
            assert_eq!(passed, u64::from(burst) + seconds * u64::from(calls_per_s), "{calls_per_s} {burst}");
        }
    }

    #[test]
    fn a_clock_that_steps_lets_the_rate_pass_where_the_burst_covers_a_step() {
        // Asked each microsecond of ten seconds, on a clock that steps by a millisecond.
        let count = |burst| {
            let mut bucket = Bucket::new(&Policy { calls_per_s: 10_000, burst, ..Policy::default() });
            (0..10_000_000_u64).filter(|us| bucket.take(us / 1000 * 1_000_000)).count()
        };
        assert_eq!((count(10), count(5)), (100_000, 50_000));
    }

    #[test]
    fn times_are_rounded_down_to_the_quantum() {
        let policy = Policy { quantum_ns: 1000, ..Policy::default() };
        assert_eq!([0, 999, 1000, 1999].map(|ns| policy.quantised(ns)), [0, 0, 1000, 1000]);
        let none = Policy { quantum_ns: 0, ..policy };
        assert_eq!(none.quantised(7), 7);
    }
}
