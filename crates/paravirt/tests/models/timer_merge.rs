//! Timers on one alarm: whatever vCPUs do at the same time, the alarm is armed for the first slack that ends.

use std::cell::Cell;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

use crate::timers::{Alarm, Armed, TimerSet};

const NEVER: u64 = u64::MAX;

/// The host's timer: what it was armed for last.
#[derive(Clone)]
struct Fake(Arc<AtomicU64>);

impl Alarm for Fake {
    fn arm(&self, deadline: u64) {
        self.0.store(deadline, Ordering::SeqCst);
    }

    fn disarm(&self) {
        self.0.store(NEVER, Ordering::SeqCst);
    }
}

fn timer(deadline: u64) -> Armed {
    Armed { deadline, latest: deadline + 5, vector: 0x40 }
}

#[test]
fn the_alarm_is_armed_for_the_first_whoever_comes_last() {
    loom::model(|| {
        let fake = Fake(Arc::new(AtomicU64::new(NEVER)));
        let set = Arc::new(TimerSet::new(2, fake.clone()));
        let other = thread::spawn({
            let set = Arc::clone(&set);
            move || set.set(1, Some(timer(20)))
        });
        set.set(0, Some(timer(10)));
        other.join().unwrap();
        assert_eq!(fake.0.load(Ordering::SeqCst), 15);
    });
}

#[test]
fn a_timer_that_is_set_while_the_alarm_rings_is_not_forgotten() {
    loom::model(|| {
        let fake = Fake(Arc::new(AtomicU64::new(NEVER)));
        let set = Arc::new(TimerSet::new(3, fake.clone()));
        set.set(0, Some(timer(10)));
        set.set(1, Some(timer(100)));
        let rings = thread::spawn({
            let set = Arc::clone(&set);
            move || set.expire(15)
        });
        set.set(2, Some(timer(50)));
        assert_eq!(rings.join().unwrap(), [(0, 0x40)]);
        assert_eq!(fake.0.load(Ordering::SeqCst), 55);
    });
}

loom::thread_local! {
    /// What this thread has decided and not armed yet.
    static DECIDED: Cell<Option<u64>> = Cell::new(None);
}

/// The mutation: decisions are kept, and carried out behind the lock.
struct Late;

impl Alarm for Late {
    fn arm(&self, deadline: u64) {
        DECIDED.with(|decided| decided.set(Some(deadline)));
    }

    fn disarm(&self) {
        self.arm(NEVER);
    }
}

#[test]
fn arming_behind_the_lock_is_caught() {
    assert!(crate::fails(|| {
        let (set, alarm) = (Arc::new(TimerSet::new(2, Late)), Arc::new(AtomicU64::new(NEVER)));
        let arm = |set: &TimerSet<Late>, alarm: &AtomicU64, number, deadline| {
            set.set(number, Some(timer(deadline)));
            if let Some(decided) = DECIDED.with(Cell::take) {
                alarm.store(decided, Ordering::SeqCst);
            }
        };
        let other = thread::spawn({
            let (set, alarm) = (Arc::clone(&set), Arc::clone(&alarm));
            move || arm(&set, &alarm, 1, 20)
        });
        arm(&set, &alarm, 0, 10);
        other.join().unwrap();
        assert_eq!(alarm.load(Ordering::SeqCst), 15);
    }));
}
