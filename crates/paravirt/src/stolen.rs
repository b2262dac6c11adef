//! Stolen time: asked of the host at a bounded rate.

use std::sync::Arc;

use host::{Clock, RunDelay};

/// How long an answer is good for, in thousandths of a second. A guest looks with its timer tick, which is not more frequent.
const GOOD_FOR_MS: u64 = 1;

/// One vCPU's stolen time.
pub(crate) struct Stolen {
    clock: Arc<dyn Clock>,
    delay: Box<dyn RunDelay>,
    /// The host's TSC when it was last asked.
    asked: Option<u64>,
}

impl Stolen {
    pub(crate) fn new(clock: Arc<dyn Clock>, delay: Box<dyn RunDelay>) -> Self {
        Self { clock, delay, asked: None }
    }

    /// Nanoseconds stolen since the first question; `None` where it was asked a moment ago.
    pub(crate) fn news(&mut self) -> Option<u64> {
        let now = self.clock.tsc();
        let interval = GOOD_FOR_MS * self.clock.tsc_khz();
        if self.asked.is_some_and(|asked| now.wrapping_sub(asked) < interval) {
            return None;
        }
        self.asked = Some(now);
        Some(self.delay.waited_ns())
    }

    /// The next question is answered.
    pub(crate) fn forget(&mut self) {
        self.asked = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use host::fake::{FakeClock, FakeRunDelay};

    #[test]
    fn the_host_is_asked_once_a_millisecond_at_most() {
        let (clock, delay) = (FakeClock::new(), FakeRunDelay::default());
        let mut stolen = Stolen::new(Arc::new(clock.clone()), Box::new(delay.clone()));
        delay.wait(5);
        assert_eq!((stolen.news(), stolen.news()), (Some(5), None));
        delay.wait(2);
        clock.advance(999_999);
        assert_eq!(stolen.news(), None);
        clock.advance(1);
        assert_eq!((stolen.news(), stolen.news()), (Some(7), None));
        stolen.forget();
        assert_eq!(stolen.news(), Some(7));
    }
}
