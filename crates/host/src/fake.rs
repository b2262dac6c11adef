//! Deterministic stand-ins: time moves when a test says so, random bytes are a known stream.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::{Clock, Entropy, RunDelay, Timer, TimerCallback, Timers};

/// A clock that stands still until told otherwise. Its TSC counts at 1 GHz, one tick a nanosecond.
#[derive(Clone, Debug, Default)]
pub struct FakeClock {
    ns: Arc<AtomicU64>,
}

impl FakeClock {
    /// A clock at zero.
    pub fn new() -> Self {
        Self::default()
    }

    /// Moves time forward.
    pub fn advance(&self, ns: u64) {
        self.ns.fetch_add(ns, Ordering::SeqCst);
    }
}

impl Clock for FakeClock {
    fn monotonic_ns(&self) -> u64 {
        self.ns.load(Ordering::SeqCst)
    }

    fn realtime_ns(&self) -> u64 {
        1_700_000_000_000_000_000 + self.monotonic_ns()
    }

    fn tsc(&self) -> u64 {
        self.monotonic_ns()
    }

    fn tsc_khz(&self) -> u64 {
        1_000_000
    }
}

struct FakeEntry {
    deadline: Mutex<Option<u64>>,
    callback: TimerCallback,
}

/// Timers that fire only from [`FakeTimers::advance`].
#[derive(Clone, Default)]
pub struct FakeTimers {
    clock: FakeClock,
    entries: Arc<Mutex<Vec<std::sync::Weak<FakeEntry>>>>,
}

impl FakeTimers {
    /// Timers that follow `clock`.
    pub fn new(clock: FakeClock) -> Self {
        Self { clock, entries: Arc::default() }
    }

    /// Moves the clock forward by `ns`, firing what falls due, each at its own deadline.
    pub fn advance(&self, ns: u64) {
        let end = self.clock.monotonic_ns() + ns;
        while let Some((deadline, entry)) = self.next_due(end) {
            self.clock.advance(deadline.saturating_sub(self.clock.monotonic_ns()));
            *entry.deadline.lock().unwrap_or_else(PoisonError::into_inner) = None;
            (entry.callback)();
        }
        self.clock.advance(end - self.clock.monotonic_ns());
    }

    fn next_due(&self, end: u64) -> Option<(u64, Arc<FakeEntry>)> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let armed = entries.iter().filter_map(|entry| {
            let entry = entry.upgrade()?;
            let deadline = (*entry.deadline.lock().unwrap_or_else(PoisonError::into_inner))?;
            (deadline <= end).then_some((deadline, entry))
        });
        armed.min_by_key(|(deadline, _)| *deadline)
    }
}

struct FakeTimer(Arc<FakeEntry>);

impl Timers for FakeTimers {
    fn timer(&self, callback: TimerCallback) -> Box<dyn Timer> {
        let entry = Arc::new(FakeEntry { deadline: Mutex::new(None), callback });
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&entry));
        Box::new(FakeTimer(entry))
    }
}

impl Timer for FakeTimer {
    fn arm(&self, deadline_ns: u64) {
        *self.0.deadline.lock().unwrap_or_else(PoisonError::into_inner) = Some(deadline_ns);
    }

    fn disarm(&self) {
        *self.0.deadline.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// A thread that waits for a processor when a test says so.
#[derive(Clone, Debug, Default)]
pub struct FakeRunDelay {
    ns: Arc<AtomicU64>,
}

impl FakeRunDelay {
    /// It has waited `ns` longer.
    pub fn wait(&self, ns: u64) {
        self.ns.fetch_add(ns, Ordering::SeqCst);
    }
}

impl RunDelay for FakeRunDelay {
    fn waited_ns(&mut self) -> u64 {
        self.ns.load(Ordering::SeqCst)
    }
}

/// A known stream of bytes: 0, 1, 2, ... 255, 0, ...
#[derive(Debug, Default)]
pub struct FakeEntropy {
    next: AtomicU64,
}

impl Entropy for FakeEntropy {
    fn fill(&self, buffer: &mut [u8]) -> std::io::Result<()> {
        for byte in buffer {
            *byte = self.next.fetch_add(1, Ordering::SeqCst) as u8;
        }
        Ok(())
    }
}
