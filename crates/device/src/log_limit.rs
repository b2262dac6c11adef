//! A brake on log lines a guest can cause at will.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts occurrences of one event and says which of them deserve a log line: the first four, then each power of two.
#[derive(Debug, Default)]
pub(crate) struct LogLimit(AtomicU64);

impl LogLimit {
    /// Counts one occurrence; `Some(how many so far)` where it should be logged.
    pub(crate) fn pass(&self) -> Option<u64> {
        let count = self.0.fetch_add(1, Ordering::Relaxed) + 1;
        (count <= 4 || count.is_power_of_two()).then_some(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_events_cost_a_handful_of_lines() {
        let limit = LogLimit::default();
        assert_eq!((0..1_000_000).filter_map(|_| limit.pass()).count(), 21);
    }
}
