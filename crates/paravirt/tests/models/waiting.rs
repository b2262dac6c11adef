//! wait and wake: no wake is lost.

use loom::sync::atomic::{AtomicU32, Ordering};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

use crate::wait::{Ended, WaitTable};

const WORD: u64 = 0x1000;

/// A vCPU's sleep, as `engine::Signal` has it: a bit that stays until it is taken, and a condition.
#[derive(Default)]
struct Sleep {
    raised: Mutex<bool>,
    changed: Condvar,
}

impl Sleep {
    fn raise(&self) {
        *self.raised.lock().unwrap() = true;
        self.changed.notify_all();
    }

    /// loom reports a deadlock where nobody ever raises.
    fn wait(&self) {
        let mut raised = self.raised.lock().unwrap();
        while !std::mem::take(&mut *raised) {
            raised = self.changed.wait(raised).unwrap();
        }
    }
}

struct Vm {
    table: WaitTable,
    word: AtomicU32,
    sleeps: [Sleep; 2],
}

impl Vm {
    fn new() -> Arc<Self> {
        Arc::new(Self { table: WaitTable::new(2), word: AtomicU32::new(0), sleeps: Default::default() })
    }

    /// The hypercall, as the processor's loop makes it. `same` says whether the word holds what was expected.
    fn wait(&self, vcpu: u32, same: impl FnOnce() -> bool) {
        if self.table.begin(vcpu, WORD, || Ok::<_, ()>(same())).unwrap() {
            while !self.table.is_woken(vcpu) {
                self.sleeps[vcpu as usize].wait();
            }
            assert_eq!(self.table.end(vcpu, Ended::Interrupted), Ended::Woken);
        }
    }

    fn wake(&self, most: u64) -> u64 {
        self.table.wake(WORD, most, |vcpu| self.sleeps[vcpu as usize].raise())
    }

    fn is_clear(&self) -> bool {
        self.word.load(Ordering::SeqCst) == 0
    }
}

/// One vCPU waits for a word to change, another changes it and wakes: whoever sleeps then sleeps for ever.
fn change_and_wake(begin: fn(&Vm) -> bool) {
    let vm = Vm::new();
    let waiter = thread::spawn({
        let vm = Arc::clone(&vm);
        move || begin(&vm)
    });
    vm.word.store(1, Ordering::SeqCst);
    vm.wake(1);
    let asleep = waiter.join().unwrap();
    assert!(!asleep || vm.table.is_woken(0), "asleep, and nobody will wake it");
}

#[test]
fn a_wake_after_a_change_is_not_lost() {
    loom::model(|| change_and_wake(|vm| vm.table.begin(0, WORD, || Ok::<_, ()>(vm.is_clear())).unwrap()));
}

#[test]
fn checking_first_and_sleeping_then_loses_it() {
    assert!(crate::fails(|| {
        change_and_wake(|vm| {
            let clear = vm.is_clear(); // the mutation: outside of the lock that wakes take
            vm.table.begin(0, WORD, || Ok::<_, ()>(clear)).unwrap()
        });
    }));
}

/// A waiter gives up at the same time as it is woken: then the wake is its own, or somebody else's, but never nobody's.
fn give_up_while_woken(end: fn(&WaitTable) -> Ended) {
    let vm = Vm::new();
    assert!(vm.table.begin(0, WORD, || Ok::<_, ()>(true)).unwrap());
    assert!(vm.table.begin(1, WORD, || Ok::<_, ()>(true)).unwrap());
    let first = thread::spawn({
        let vm = Arc::clone(&vm);
        move || end(&vm.table)
    });
    assert_eq!(vm.wake(1), 1);
    let first = first.join().unwrap();
    let second = vm.table.end(1, Ended::TimedOut);
    let woken = [first, second].into_iter().filter(|ended| *ended == Ended::Woken).count();
    assert_eq!(woken, 1, "{first:?} {second:?}");
}

#[test]
fn a_wake_goes_to_somebody_who_says_so() {
    loom::model(|| give_up_while_woken(|table| table.end(0, Ended::TimedOut)));
}

#[test]
fn forgetting_a_wake_at_the_timeout_loses_it() {
    assert!(crate::fails(|| {
        give_up_while_woken(|table| {
            table.end(0, Ended::TimedOut);
            Ended::TimedOut // the mutation: what the table says is not looked at
        });
    }));
}

/// Two vCPUs under a lock made of one word: 0 free, 1 taken, 2 taken and somebody waits.
#[test]
fn a_lock_on_it_excludes_and_wakes() {
    loom::model(|| {
        let vm = Vm::new();
        let inside = Arc::new(AtomicU32::new(0));
        let enter = |vm: &Vm, vcpu: u32, inside: &AtomicU32| {
            if vm.word.compare_exchange(0, 1, Ordering::SeqCst, Ordering::SeqCst).is_err() {
                while vm.word.swap(2, Ordering::SeqCst) != 0 {
                    vm.wait(vcpu, || vm.word.load(Ordering::SeqCst) == 2);
                }
            }
            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "one at a time");
            inside.fetch_sub(1, Ordering::SeqCst);
            if vm.word.swap(0, Ordering::SeqCst) == 2 {
                vm.wake(1);
            }
        };
        let other = thread::spawn({
            let (vm, inside) = (Arc::clone(&vm), Arc::clone(&inside));
            move || enter(&vm, 1, &inside)
        });
        enter(&vm, 0, &inside);
        other.join().unwrap();
    });
}
