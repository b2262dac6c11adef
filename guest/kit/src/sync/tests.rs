//! The locks on threads, with a host that keeps to the letter: it compares and sleeps in one step, wakes in order, and
//! counts.

use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::collections::VecDeque;
use std::sync::{Condvar as StdCondvar, Mutex as StdMutex};
use std::thread;

use super::*;

#[derive(Default)]
struct Host {
    /// (ticket, word) of those who sleep, in order.
    sleepers: StdMutex<VecDeque<(usize, usize)>>,
    woken: StdCondvar,
    tickets: AtomicUsize,
    calls: AtomicUsize,
}

impl Waiting for Host {
    fn wait(&self, word: &AtomicU32, expected: u32) {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let mut sleepers = self.sleepers.lock().unwrap();
        if word.load(Ordering::SeqCst) != expected {
            return;
        }
        let ticket = self.tickets.fetch_add(1, Ordering::SeqCst);
        sleepers.push_back((ticket, word.as_ptr() as usize));
        while sleepers.iter().any(|sleeper| sleeper.0 == ticket) {
            sleepers = self.woken.wait(sleepers).unwrap();
        }
    }

    fn wake(&self, word: &AtomicU32, most: u64) {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let mut left = most;
        self.sleepers.lock().unwrap().retain(|sleeper| {
            let hit = left > 0 && sleeper.1 == word.as_ptr() as usize;
            left -= u64::from(hit);
            !hit
        });
        self.woken.notify_all();
    }
}

const THREADS: usize = 4;
const ROUNDS: usize = 5_000;

#[test]
fn a_mutex_excludes_and_everyone_gets_in() {
    let (host, mutex) = (Host::default(), Mutex::new(0));
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for round in 0..ROUNDS {
                    let mut value = mutex.lock(&host);
                    let seen = *value;
                    if round % 64 == 0 {
                        thread::yield_now(); // a holder that has lost its processor
                    }
                    *value = seen + 1;
                }
            });
        }
    });
    assert_eq!(*mutex.lock(&host), THREADS * ROUNDS);
}

#[test]
fn a_spinlock_excludes_with_a_host_and_without() {
    let (host, lock) = (Host::default(), SpinLock::new(0));
    let add = |waiting: &dyn Fn()| (0..ROUNDS).for_each(|_| waiting());
    thread::scope(|scope| {
        for _ in 0..THREADS / 2 {
            scope.spawn(|| add(&|| *lock.lock(&host) += 1));
            scope.spawn(|| add(&|| *lock.lock(&host) += 1));
        }
    });
    assert_eq!(*lock.lock(&host), THREADS * ROUNDS);
    let alone = SpinLock::new(0);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| add(&|| *alone.lock(&Spin) += 1));
        }
    });
    assert_eq!(*alone.lock(&Spin), 2 * ROUNDS);
}

#[test]
fn what_nobody_contends_for_makes_no_call() {
    let host = Host::default();
    let (mutex, lock, semaphore) = (Mutex::new(()), SpinLock::new(()), Semaphore::new(1));
    for _ in 0..100 {
        drop(mutex.lock(&host));
        drop(lock.lock(&host));
        semaphore.acquire(&host);
        semaphore.release(&host);
    }
    assert_eq!(host.calls.load(Ordering::SeqCst), 0);
    let held = mutex.lock(&host);
    for _ in 0..2 {
        assert!(mutex.try_lock(&host).is_none(), "a try that fails leaves the lock to who has it");
    }
    drop(held);
    assert!(mutex.try_lock(&host).is_some());
}

#[test]
fn a_condition_is_told_to_those_who_wait_for_it() {
    let (host, queue, filled) = (Host::default(), Mutex::new(VecDeque::new()), Condvar::new());
    let received = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let mut guard = queue.lock(&host);
                    while guard.is_empty() {
                        guard = filled.wait(guard);
                    }
                    match guard.pop_front() {
                        Some(Some(value)) => received.fetch_add(value, Ordering::SeqCst),
                        _ => break,
                    };
                }
            });
        }
        for _ in 0..ROUNDS {
            queue.lock(&host).push_back(Some(1));
            filled.notify_one(&host);
        }
        queue.lock(&host).extend([None; THREADS]);
        filled.notify_all(&host);
    });
    assert_eq!(received.load(Ordering::SeqCst), ROUNDS);
}

#[test]
fn a_semaphore_lets_in_as_many_as_it_has_permits() {
    let (host, semaphore) = (Host::default(), Semaphore::new(2));
    let (inside, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..ROUNDS {
                    semaphore.acquire(&host);
                    most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    inside.fetch_sub(1, Ordering::SeqCst);
                    semaphore.release(&host);
                }
            });
        }
    });
    let most = most.load(Ordering::SeqCst);
    assert!((1..=2).contains(&most), "{most}");
    assert!(semaphore.try_acquire() && semaphore.try_acquire() && !semaphore.try_acquire());
}
