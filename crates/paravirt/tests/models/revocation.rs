//! Revocation: a feature is honoured until the guest has given it up, and not behind that.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

use crate::agreement::Agreement;

const FEATURE: u64 = 1;

struct Vm {
    agreement: Agreement,
    /// The VM page's words, as published last.
    epoch: AtomicU64,
    accepted: AtomicU64,
    revoking: AtomicU64,
}

impl Vm {
    fn new() -> Arc<Self> {
        let [epoch, accepted, revoking] = [1, 0, 0].map(AtomicU64::new);
        let vm = Self { agreement: Agreement::new(FEATURE), epoch, accepted, revoking };
        vm.agreement.accept(FEATURE, |_| {}).unwrap();
        vm.accepted.store(FEATURE, Ordering::Relaxed);
        Arc::new(vm)
    }

    fn revoke(&self) {
        self.agreement.revoke(FEATURE, |terms| self.publish(terms));
    }

    fn publish(&self, terms: &crate::agreement::Terms) {
        self.accepted.store(terms.accepted, Ordering::Relaxed);
        self.revoking.store(terms.revoking, Ordering::Relaxed);
        self.epoch.store(terms.epoch, Ordering::Release);
    }

    /// The guest's handler: gives up what is revoked, and says so.
    fn handle(&self) -> bool {
        let epoch = self.epoch.load(Ordering::Acquire);
        self.revoking.load(Ordering::Relaxed) != 0
            && self.agreement.acknowledge(epoch, |terms| self.publish(terms)).is_ok()
    }
}

/// The host revokes while the guest uses the feature and looks for news now and then.
fn use_while_revoked(revoke: fn(&Vm)) {
    let vm = Vm::new();
    let host = thread::spawn({
        let vm = Arc::clone(&vm);
        move || revoke(&vm)
    });
    let mut given_up = false;
    for _ in 0..2 {
        assert_eq!(vm.agreement.honours(FEATURE), !given_up, "honoured exactly until it is given up");
        given_up |= vm.handle();
    }
    host.join().unwrap();
    if !given_up {
        assert!(vm.agreement.honours(FEATURE));
        assert!(vm.handle(), "the news is there");
    }
    assert!(!vm.agreement.honours(FEATURE));
    assert_eq!(vm.accepted.load(Ordering::Relaxed), 0);
}

#[test]
fn a_feature_is_honoured_exactly_until_it_is_given_up() {
    loom::model(|| use_while_revoked(Vm::revoke));
}

#[test]
fn taking_it_away_at_once_is_caught() {
    assert!(crate::fails(|| {
        use_while_revoked(|vm| {
            vm.revoke();
            // The mutation: the host does not wait for the guest.
            let epoch = vm.epoch.load(Ordering::Acquire);
            let _ = vm.agreement.acknowledge(epoch, |terms| vm.publish(terms));
        });
    }));
}

/// Two revocations at once: whatever the page says last is what holds, and the last epoch settles both.
fn revoke_twice(publish: fn(&Vm)) {
    let vm = Vm::new();
    let other = thread::spawn({
        let vm = Arc::clone(&vm);
        move || publish(&vm)
    });
    publish(&vm);
    other.join().unwrap();
    assert_eq!(vm.epoch.load(Ordering::Acquire), vm.agreement.look(|terms| terms.epoch), "the page is up to date");
}

#[test]
fn the_page_says_what_holds_after_two_changes_at_once() {
    loom::model(|| revoke_twice(Vm::revoke));
}

#[test]
fn publishing_behind_the_lock_is_caught() {
    assert!(crate::fails(|| {
        revoke_twice(|vm| {
            let terms = vm.agreement.revoke(FEATURE, |_| {}); // the mutation: the page is written later
            vm.publish(&terms);
        });
    }));
}
