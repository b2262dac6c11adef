//! wait and wake: no wake is lost.

use loom::sync::atomic::{AtomicU32, Ordering};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

use crate::locks::{self, Waiting};
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

    /// What the processor's loop does for a wait that has begun.
    fn sleep(&self, vcpu: u32, begun: bool) {
        if begun {
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

/// A vCPU that calls the host, as the guest kit's locks see it: words are named by their addresses.
struct Caller<'a> {
    vm: &'a Vm,
    vcpu: u32,
}

impl Waiting for Caller<'_> {
    fn wait(&self, word: &AtomicU32, expected: u32) {
        let same = || Ok::<_, ()>(word.load(Ordering::SeqCst) == expected);
        self.vm.sleep(self.vcpu, self.vm.table.begin(self.vcpu, address(word), same).unwrap());
    }

    fn wake(&self, word: &AtomicU32, most: u64) {
        self.vm.table.wake(address(word), most, |vcpu| self.vm.sleeps[vcpu as usize].raise());
    }
}

fn address(word: &AtomicU32) -> u64 {
    std::ptr::from_ref(word) as u64
}

/// Runs `work` on two vCPUs at once. loom reports it where one sleeps for ever.
fn on_both<T: Send + Sync + 'static>(shared: T, work: fn(&T, &Caller<'_>)) -> Arc<T> {
    let (vm, shared) = (Vm::new(), Arc::new(shared));
    let other = thread::spawn({
        let (vm, shared) = (Arc::clone(&vm), Arc::clone(&shared));
        move || work(&shared, &Caller { vm: &vm, vcpu: 1 })
    });
    work(&shared, &Caller { vm: &vm, vcpu: 0 });
    other.join().unwrap();
    shared
}

#[test]
fn the_kits_mutex_excludes_and_wakes() {
    loom::model(|| {
        let both = on_both((locks::mutex(0), AtomicU32::new(0)), |(mutex, inside), caller| {
            let mut guard = mutex.lock(caller);
            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "one at a time");
            *guard += 1;
            inside.fetch_sub(1, Ordering::SeqCst);
        });
        assert_eq!(*both.0.lock(&Caller { vm: &Vm::new(), vcpu: 0 }), 2);
    });
}

#[test]
fn the_kits_semaphore_lets_in_one_after_the_other() {
    loom::model(|| {
        on_both((locks::semaphore(1), AtomicU32::new(0)), |(semaphore, inside), caller| {
            semaphore.acquire(caller);
            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "one permit");
            inside.fetch_sub(1, Ordering::SeqCst);
            semaphore.release(caller);
        });
    });
}

/// Two permits come back while two wait: both get in, although the second release sees nobody wait any more. Three
/// threads are more interleavings than there is time for: those with up to two preemptions are run.
#[test]
fn the_kits_semaphore_forgets_nobody_who_waits() {
    let mut bounded = loom::model::Builder::new();
    bounded.preemption_bound = Some(2);
    bounded.check(|| {
        let (vm, semaphore) = (Vm::new(), Arc::new(locks::semaphore(0)));
        let waiters = [0, 1].map(|vcpu| {
            let (vm, semaphore) = (Arc::clone(&vm), Arc::clone(&semaphore));
            thread::spawn(move || semaphore.acquire(&Caller { vm: &vm, vcpu }))
        });
        let caller = Caller { vm: &vm, vcpu: 2 };
        semaphore.release(&caller);
        semaphore.release(&caller);
        waiters.into_iter().for_each(|waiter| waiter.join().unwrap());
        assert!(!semaphore.try_acquire());
    });
}

#[test]
fn the_kits_condition_is_told_to_who_waits_for_it() {
    loom::model(|| {
        on_both((locks::mutex(false), locks::condvar()), |(mutex, condvar), caller| {
            let mut done = mutex.lock(caller);
            if caller.vcpu == 0 {
                *done = true;
                drop(done);
                condvar.notify_one(caller);
            } else {
                while !*done {
                    done = condvar.wait(done);
                }
            }
        });
    });
}
