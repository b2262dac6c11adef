//! One-shot timers against [`Clock::monotonic_ns`].

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::{Clock, HostClock};

/// What a timer does when it fires; runs on the timer thread and must be brief.
pub type TimerCallback = Box<dyn Fn() + Send + Sync>;

/// Makes timers.
pub trait Timers: Send + Sync {
    /// A new timer, not armed.
    fn timer(&self, callback: TimerCallback) -> Box<dyn Timer>;
}

/// A one-shot timer. Dropping it disarms it.
pub trait Timer: Send + Sync {
    /// Fires once at `deadline_ns` (monotonic; at once where that has passed). Replaces an earlier deadline.
    fn arm(&self, deadline_ns: u64);
    /// Forgets the deadline. A callback already running is not waited for.
    fn disarm(&self);
}

struct Entry {
    callback: TimerCallback,
}

#[derive(Default)]
struct Queue {
    /// (deadline, timer id); the first is the next to fire.
    armed: BTreeSet<(u64, u64)>,
    entries: std::collections::HashMap<u64, (Option<u64>, Arc<Entry>)>,
    next_id: u64,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All timers of a VM on one thread: many deadlines, one sleeper.
pub struct HostTimers {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl HostTimers {
    /// Starts the timer thread.
    ///
    /// # Errors
    /// What the host said where it refuses a thread.
    pub fn start() -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("timers".into()).spawn(move || run(&for_thread))?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl Drop for HostTimers {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // The last owner may be a callback on the timer thread itself, which cannot wait for itself.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

impl Timers for HostTimers {
    fn timer(&self, callback: TimerCallback) -> Box<dyn Timer> {
        let mut queue = self.shared.lock();
        let id = queue.next_id;
        queue.next_id += 1;
        queue.entries.insert(id, (None, Arc::new(Entry { callback })));
        Box::new(HostTimer { shared: Arc::downgrade(&self.shared), id })
    }
}

struct HostTimer {
    shared: Weak<Shared>,
    id: u64,
}

impl HostTimer {
    fn set(&self, deadline: Option<u64>) {
        let Some(shared) = self.shared.upgrade() else { return };
        let mut queue = shared.lock();
        let first = queue.armed.first().map(|armed| armed.0);
        let Some((current, _)) = queue.entries.get_mut(&self.id) else { return };
        let old = std::mem::replace(current, deadline);
        if let Some(old) = old {
            queue.armed.remove(&(old, self.id));
        }
        if let Some(deadline) = deadline {
            queue.armed.insert((deadline, self.id));
            if first.is_none_or(|first| deadline < first) {
                shared.changed.notify_all();
            }
        }
    }
}

impl Timer for HostTimer {
    fn arm(&self, deadline_ns: u64) {
        self.set(Some(deadline_ns));
    }

    fn disarm(&self) {
        self.set(None);
    }
}

impl Drop for HostTimer {
    fn drop(&mut self) {
        self.set(None);
        if let Some(shared) = self.shared.upgrade() {
            // Taken out under the lock, dropped after it: a callback may own other timers.
            let entry = shared.lock().entries.remove(&self.id);
            drop(entry);
        }
    }
}

fn run(shared: &Shared) {
    let mut queue = shared.lock();
    while !queue.closed {
        let now = HostClock.monotonic_ns();
        match queue.armed.first().copied() {
            Some((deadline, id)) if deadline <= now => {
                queue.armed.pop_first();
                let due = queue.entries.get_mut(&id).map(|(armed, entry)| {
                    *armed = None;
                    Arc::clone(entry)
                });
                drop(queue);
                if let Some(entry) = due {
                    (entry.callback)();
                }
                queue = shared.lock();
            }
            Some((deadline, _)) => {
                let wait = Duration::from_nanos(deadline - now);
                queue = shared.changed.wait_timeout(queue, wait).unwrap_or_else(PoisonError::into_inner).0;
            }
            None => queue = shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn timers_fire_in_order_of_their_deadlines_and_disarmed_ones_never() {
        let timers = HostTimers::start().unwrap();
        let (sender, receiver) = channel();
        let make = |name: &'static str| {
            let sender = sender.clone();
            timers.timer(Box::new(move || sender.send(name).unwrap()))
        };
        let (late, early, never) = (make("late"), make("early"), make("never"));
        let now = HostClock.monotonic_ns();
        late.arm(now + 20_000_000);
        never.arm(now + 15_000_000);
        early.arm(now + 10_000_000);
        never.disarm();
        assert_eq!(receiver.recv().unwrap(), "early");
        assert_eq!(receiver.recv().unwrap(), "late");
        assert!(receiver.try_recv().is_err());
    }

    #[test]
    fn arming_again_replaces_the_deadline() {
        let timers = HostTimers::start().unwrap();
        let (sender, receiver) = channel();
        let timer = timers.timer(Box::new(move || sender.send(()).unwrap()));
        timer.arm(u64::MAX);
        timer.arm(0);
        receiver.recv().unwrap();
        drop(timers);
        timer.arm(0); // a timer outlives its maker harmlessly
    }
}
