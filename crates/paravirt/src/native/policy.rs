//! What a guest may have of the host's time, and how often.

/// The limits of one VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What `time_of_day` and the VM page's wall clock are multiples of, nanoseconds, at least 1.
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
    interval_ns: u64,
    burst_ns: u64,
    /// When the bucket will be full again.
    full_at: u64,
}

impl Bucket {
    pub(crate) fn new(policy: &Policy) -> Self {
        let interval_ns = 1_000_000_000 / u64::from(policy.calls_per_s.clamp(1, 1_000_000_000));
        Self { interval_ns, burst_ns: interval_ns * u64::from(policy.burst.max(1)), full_at: 0 }
    }

    /// True where a call may pass at `now`.
    pub(crate) fn take(&mut self, now: u64) -> bool {
        let full_at = self.full_at.max(now) + self.interval_ns;
        let passes = full_at - now <= self.burst_ns;
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
    fn times_are_rounded_down_to_the_quantum() {
        let policy = Policy { quantum_ns: 1000, ..Policy::default() };
        assert_eq!([0, 999, 1000, 1999].map(|ns| policy.quantised(ns)), [0, 0, 1000, 1000]);
        let none = Policy { quantum_ns: 0, ..policy };
        assert_eq!(none.quantised(7), 7);
    }
}
