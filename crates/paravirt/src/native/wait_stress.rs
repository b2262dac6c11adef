//! No wake is lost, in rounds by the million.
//!
//! ```text
//!   scheduler (seeded) ─┬─> two waiters: take a permit, or WAIT for one ─> the crate's WaitTable
//!    whose turn it is   ├─> a waker: give a permit back, WAKE            ─> the same
//!    at each step       └─> a deadline, an interrupt
//! ```
//!
//! Everyone is a machine of steps, each one access to what the others see, and any other's step may come between two. In the
//! middle of the table's own critical sections, too, those go on who need no lock: guests that write the word, vCPUs that look
//! at their signal. A round in which somebody sleeps beside a permit, and nobody has a step left, has lost a wake.

use std::cell::Cell;

use super::wait::{Ended, WaitTable};

const WORD: u64 = 0x1000;
const WAITERS: usize = 2;
/// The waiter that has a deadline, and gives up then.
const HASTY: usize = 0;
/// The waiter that interrupts come for.
const PATIENT: usize = 1;

/// Bits of a vCPU's signal.
const WAKE: u8 = 1;
const INTERRUPT: u8 = 2;

/// How a waiter compares and sleeps.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// As the host does it.
    InOneStep,
    /// What every guest would do without `wait`: looks, and goes to sleep then.
    LookThenSleep,
}

/// Whose next step is what.
#[derive(Clone, Copy, PartialEq)]
enum Next {
    /// A waiter looks for a permit in the word,
    Take,
    /// calls WAIT,
    Begin,
    /// (the mistake: has looked already, and goes to sleep)
    Join,
    /// takes what its signal has,
    Clear,
    /// looks whether it was woken, is late, or (true) has an interrupt,
    Look(bool),
    /// sleeps until its signal has something,
    Sleep,
    /// and leaves the table.
    End(Ended),
    /// The waker gives a permit back,
    Give,
    /// and calls WAKE.
    Wake,
    /// The deadline passes.
    Expire,
    /// An interrupt comes.
    Interrupt,
    /// There is nothing left to do.
    Nothing,
}

impl Next {
    /// True for steps that take the table's lock.
    fn locks(self) -> bool {
        matches!(self, Self::Begin | Self::Join | Self::Look(_) | Self::End(_) | Self::Wake)
    }
}

/// The waiters, then the waker, the deadline and the interrupt.
const ACTORS: usize = WAITERS + 3;
const WAKER: usize = WAITERS;

struct World {
    random: Cell<u64>,
    way: Way,
    table: WaitTable,
    permits: Cell<u32>,
    signals: [Cell<u8>; WAITERS],
    expired: Cell<bool>,
    /// A wake has counted the waiter.
    counted: [Cell<bool>; WAITERS],
    next: [Cell<Next>; ACTORS],
    sleeps: Cell<u64>,
}

impl World {
    fn new(way: Way) -> Self {
        Self {
            random: Cell::new(0x9e37_79b9_7f4a_7c15),
            way,
            table: WaitTable::new(WAITERS),
            permits: Cell::new(0),
            signals: Default::default(),
            expired: Cell::new(false),
            counted: Default::default(),
            next: [const { Cell::new(Next::Nothing) }; ACTORS],
            sleeps: Cell::new(0),
        }
    }

    /// A number below `limit`: xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators").
    fn below(&self, limit: usize) -> usize {
        let mut x = self.random.get();
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.random.set(x);
        let high = x.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        ((high * limit as u64) >> 32) as usize
    }

    /// One round. True where its wake was lost.
    fn round(&self) -> bool {
        let some = |next| if self.below(2) == 0 { next } else { Next::Nothing };
        let next = [Next::Take, Next::Take, Next::Give, some(Next::Expire), some(Next::Interrupt)];
        next.into_iter().zip(&self.next).for_each(|(next, actor)| actor.set(next));
        self.signals.iter().for_each(|signal| signal.set(0));
        self.permits.set(0);
        self.expired.set(false);
        while self.turn(|_| true) {}
        let asleep = |vcpu: usize| self.next[vcpu].get() != Next::Nothing;
        let lost = self.permits.get() > 0 && (0..WAITERS).any(asleep);
        for vcpu in 0..WAITERS {
            let ended = self.table.end(vcpu as u32, Ended::Interrupted);
            assert!(lost || ended != Ended::Woken, "woken, and not told");
            self.counted[vcpu].set(false);
        }
        lost
    }

    /// A step of somebody who has one and whom `may` lets. False where there is nobody.
    fn turn(&self, may: impl Fn(Next) -> bool) -> bool {
        let is_ready = |actor: usize| match self.next[actor].get() {
            Next::Nothing => false,
            Next::Sleep => self.signals[actor].get() != 0 || self.is_late(actor),
            next => may(next),
        };
        let ready: [bool; ACTORS] = std::array::from_fn(is_ready);
        let count = ready.iter().filter(|ready| **ready).count();
        if count == 0 {
            return false;
        }
        let chosen = (0..ACTORS).filter(|&actor| ready[actor]).nth(self.below(count));
        chosen.into_iter().for_each(|actor| self.step(actor));
        true
    }

    /// Inside a critical section: others do what needs no lock, or do not.
    fn preempted(&self) {
        for _ in 0..self.below(3) {
            self.turn(|next| !next.locks());
        }
    }

    fn is_late(&self, actor: usize) -> bool {
        actor == HASTY && self.expired.get()
    }

    fn step(&self, actor: usize) {
        let now = self.next[actor].get();
        // Who is in a critical section has no other step meanwhile.
        self.next[actor].set(Next::Nothing);
        let next = if actor < WAITERS { self.wait(actor, now) } else { self.disturb(actor, now) };
        self.next[actor].set(next);
    }

    /// The guest's semaphore, WAIT, and the processor's loop around it.
    fn wait(&self, vcpu: usize, now: Next) -> Next {
        let looks_clear = || self.permits.get() == 0;
        match (now, self.way) {
            (Next::Take, _) if !looks_clear() => {
                self.permits.set(self.permits.get() - 1);
                Next::Nothing
            }
            (Next::Take, _) => Next::Begin,
            (Next::Begin, Way::InOneStep) => self.begin(vcpu, || {
                self.preempted();
                let clear = looks_clear();
                self.preempted();
                clear
            }),
            (Next::Begin, Way::LookThenSleep) => {
                if looks_clear() {
                    Next::Join
                } else {
                    Next::Take
                }
            }
            (Next::Join, _) => self.begin(vcpu, || true),
            (Next::Clear, _) => Next::Look(self.signals[vcpu].replace(0) & INTERRUPT != 0),
            (Next::Look(interrupted), _) => {
                if self.table.is_woken(vcpu as u32) {
                    Next::End(Ended::Interrupted)
                } else if self.is_late(vcpu) {
                    Next::End(Ended::TimedOut)
                } else if interrupted {
                    Next::End(Ended::Interrupted)
                } else {
                    Next::Sleep
                }
            }
            (Next::Sleep, _) => Next::Clear,
            (Next::End(why), _) => {
                let ended = self.table.end(vcpu as u32, why);
                assert_eq!(self.counted[vcpu].take(), ended == Ended::Woken, "who was counted hears of it");
                if ended == Ended::TimedOut { Next::Nothing } else { Next::Take }
            }
            _ => unreachable!("no step of a waiter"),
        }
    }

    fn begin(&self, vcpu: usize, holds: impl FnOnce() -> bool) -> Next {
        let Ok(joined) = self.table.begin(vcpu as u32, WORD, || Ok::<_, std::convert::Infallible>(holds()));
        self.sleeps.set(self.sleeps.get() + u64::from(joined));
        if joined { Next::Clear } else { Next::Take }
    }

    /// Everyone else.
    fn disturb(&self, actor: usize, now: Next) -> Next {
        let raise = |vcpu: usize, bit| self.signals[vcpu].set(self.signals[vcpu].get() | bit);
        match now {
            Next::Give => {
                self.permits.set(self.permits.get() + 1);
                return Next::Wake;
            }
            Next::Wake => {
                assert_eq!(actor, WAKER);
                self.table.wake(WORD, 1, |vcpu| {
                    self.counted[vcpu as usize].set(true);
                    self.preempted();
                    raise(vcpu as usize, WAKE);
                    self.preempted();
                });
            }
            Next::Expire => self.expired.set(true),
            Next::Interrupt => raise(PATIENT, INTERRUPT),
            _ => unreachable!("no step of the waker's, the deadline or the interrupt"),
        }
        Next::Nothing
    }
}

/// (Rounds that lost their wake, waits that slept.)
fn rounds(way: Way, count: u64) -> (u64, u64) {
    let world = World::new(way);
    let lost = (0..count).filter(|_| world.round()).count();
    (lost as u64, world.sleeps.get())
}

#[test]
fn ten_million_rounds_lose_no_wake() {
    const ROUNDS: u64 = 10_000_000;
    let (lost, slept) = rounds(Way::InOneStep, ROUNDS);
    eprintln!("{ROUNDS} rounds, {slept} waits, {lost} wakes lost");
    assert_eq!(lost, 0);
    assert!(slept > ROUNDS, "a round has more than one wait in it, {slept}");
}

#[test]
fn looking_first_and_sleeping_then_loses_some() {
    const ROUNDS: u64 = 1_000_000;
    let (lost, slept) = rounds(Way::LookThenSleep, ROUNDS);
    eprintln!("{ROUNDS} rounds, {slept} waits, {lost} wakes lost");
    assert!(lost > 0, "the rounds find nothing");
}
