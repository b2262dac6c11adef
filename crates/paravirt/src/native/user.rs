//! The dialect for the guest's user space, which has no privilege level 0: what the contract device calls.
//!
//! What needs privilege, a physical address, or a vCPU's sleep is refused. User space accepts and gives up features of its
//! own; what the guest's kernel has accepted is the kernel's to give up.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use contract::native::device::{USER_FEATURES, page};
use contract::native::{call, feature, status};
use engine::{Cause, Ledger};
use memory::{Gpa, GuestRam};

use super::Terms;
use super::vm::Vm;

/// What user space sees: pages that it can only read.
#[derive(Clone)]
pub struct UserPages {
    /// The pages, [`page::SIZE`] bytes.
    pub pages: GuestRam,
    /// Where they begin.
    pub at: Gpa,
    /// The ledgers of all vCPUs.
    pub ledgers: Vec<Arc<Ledger>>,
}

impl UserPages {
    fn ledger(&self, vcpu: usize) -> Gpa {
        Gpa(self.at.0 + page::LEDGER + vcpu as u64 * page::LEDGER_STRIDE)
    }

    /// Brings the ledgers up to date, or takes them away.
    fn account(&self, shown: bool) {
        for (vcpu, ledger) in self.ledgers.iter().enumerate() {
            let counts = Cause::ALL.map(|cause| if shown { ledger.count(cause) } else { 0 });
            let _ = self.pages.write_value(self.ledger(vcpu), &counts); // the pages have room for every vCPU there can be
        }
    }
}

impl Vm {
    /// A call of user space: what RAX would hold. All calls of user space come one after the other.
    pub fn user_call(&self, number: u64) -> u64 {
        let start = host::read_tsc();
        let value = match number {
            call::NOP => {
                self.account_for_users();
                Ok(0)
            }
            call::TIME_OF_DAY if self.agreement.honours(feature::TIME_OF_DAY) => self.time_of_day(),
            call::TIME_OF_DAY => Err(status::NOT_ACCEPTED),
            _ if number < call::COUNT => Err(status::PERMISSION),
            _ => Err(status::UNKNOWN_CALL),
        };
        self.count_user(number, value.is_ok(), start);
        value.unwrap_or_else(|status| status as u64)
    }

    /// User space accepts features: all of them or none.
    pub fn user_accept(&self, features: u64) {
        let start = host::read_tsc();
        let honoured = features & !USER_FEATURES == 0 && self.accept(features).is_ok();
        self.count_user(call::ACCEPT, honoured, start);
    }

    /// User space has given up what was revoked up to `epoch`.
    pub fn user_acknowledge(&self, epoch: u64) {
        let start = host::read_tsc();
        // What is being revoked changes with the epoch only, which is looked at once more.
        let kernels = self.agreement.look(|terms| terms.revoking) & self.kernels.load(Ordering::SeqCst);
        let honoured = kernels == 0 && self.acknowledge(epoch).is_ok();
        self.count_user(call::REVOKE_ACK, honoured, start);
    }

    /// How often user space called, and was refused.
    pub fn user_calls(&self) -> crate::Used {
        self.user_calls.all()
    }

    fn count_user(&self, number: u64, honoured: bool, start: u64) {
        self.user_calls.count(number, honoured, host::read_tsc().wrapping_sub(start));
    }

    fn account_for_users(&self) {
        if let Some(user) = &self.user {
            user.account(self.agreement.honours(feature::LEDGER));
        }
    }

    /// Ledgers that are not accepted (any more) are taken away. Under the agreement's lock.
    pub(super) fn settle_users(&self, terms: &Terms) {
        self.kernels.fetch_and(terms.accepted, Ordering::SeqCst);
        if let Some(user) = self.user.as_ref().filter(|_| terms.accepted & feature::LEDGER == 0) {
            user.account(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{Bench, USER_PAGES};
    use super::*;
    use contract::native::{VmPage, vm_state};
    use zerocopy::FromBytes;

    fn page(bench: &Bench) -> VmPage {
        let mut bytes = vec![0; 4096];
        bench.user.read(Gpa(USER_PAGES), &mut bytes).unwrap();
        VmPage::read_from_bytes(&bytes).unwrap()
    }

    #[test]
    fn user_space_has_what_needs_no_privilege_and_nothing_else() {
        let bench = Bench::new(2, 0);
        let call = |number| bench.vm.user_call(number) as i64;
        assert_eq!((call(call::NOP), call(call::TIME_OF_DAY)), (0, status::NOT_ACCEPTED));
        bench.vm.user_accept(feature::TIME_OF_DAY | feature::WAIT);
        assert_eq!(page(&bench).accepted, 0, "all or none");
        bench.vm.user_accept(USER_FEATURES);
        assert_eq!((page(&bench).accepted, bench.vm.terms().accepted), (USER_FEATURES, USER_FEATURES));
        assert_ne!(page(&bench).generation, [0; 16]);
        assert!(call(call::TIME_OF_DAY) >= 0);
        for number in (0..call::COUNT).filter(|number| ![call::NOP, call::TIME_OF_DAY].contains(number)) {
            assert_eq!(call(number), status::PERMISSION, "{number}");
        }
        for number in [call::COUNT, 63, u64::MAX] {
            assert_eq!(call(number), status::UNKNOWN_CALL);
        }
        // Numbers without a meaning belong to nobody.
        let used = bench.vm.user_calls();
        assert_eq!((used.times.count, used.refused), (3, 1 + 1 + (call::COUNT - 2)));
        // Of a feature, whoever makes them.
        let used = |feature| bench.vm.used(feature).map(|used| (used.times.count, used.refused));
        assert_eq!((used(feature::TIME_OF_DAY), used(feature::WAIT)), (Some((1, 1)), Some((0, 2))));
    }

    #[test]
    fn a_revocation_is_acknowledged_by_those_who_have_the_feature() {
        let mut bench = Bench::new(1, 0);
        bench.vm.user_accept(feature::TIME_OF_DAY | feature::LEDGER);
        assert_eq!(bench.vm.revoke(feature::TIME_OF_DAY).epoch, 2);
        assert_eq!((page(&bench).state, page(&bench).revoking), (vm_state::REVOKING, feature::TIME_OF_DAY));
        assert!(bench.vm.user_call(call::TIME_OF_DAY) as i64 >= 0, "honoured until it is given up");
        bench.vm.user_acknowledge(1);
        assert_eq!(page(&bench).revoking, feature::TIME_OF_DAY, "a stale epoch");
        bench.vm.user_acknowledge(2);
        assert_eq!((page(&bench).state, page(&bench).accepted), (0, feature::LEDGER));
        assert_eq!(bench.vm.user_call(call::TIME_OF_DAY) as i64, status::NOT_ACCEPTED);
        // The kernel has it, too: it is the kernel's to give up.
        assert_eq!(bench.call(0, call::ACCEPT, [feature::LEDGER | feature::WAIT, 0, 0, 0]), Some(2));
        bench.vm.revoke(feature::LEDGER);
        bench.vm.user_acknowledge(3);
        assert_eq!(page(&bench).revoking, feature::LEDGER);
        assert_eq!(bench.call(0, call::REVOKE_ACK, [3, 0, 0, 0]), Some(feature::WAIT as i64));
        assert_eq!(bench.vm.kernels.load(Ordering::SeqCst), feature::WAIT);
        // What it could not have, it has no say in.
        assert_eq!(bench.call(0, call::ACCEPT, [feature::LEDGER, 0, 0, 0]), Some(status::NOT_OFFERED));
        assert_eq!(bench.vm.kernels.load(Ordering::SeqCst), feature::WAIT);
    }

    #[test]
    fn ledgers_are_shown_while_they_are_accepted() {
        let bench = Bench::new(3, 0);
        let count = |vcpu: u64| {
            let at = USER_PAGES + page::LEDGER + vcpu * page::LEDGER_STRIDE + 8 * Cause::Halt as u64;
            bench.user.read_value::<u64>(Gpa(at)).unwrap()
        };
        bench.ledgers[2].record(Cause::Halt, 5);
        bench.vm.user_call(call::NOP);
        assert_eq!(count(2), 0, "not accepted");
        bench.vm.user_accept(feature::LEDGER);
        bench.vm.user_call(call::NOP);
        assert_eq!([0, 1, 2].map(count), [0, 0, 1]);
        bench.ledgers[2].record(Cause::Halt, 5);
        assert_eq!(count(2), 1, "as of the last NOP");
        bench.vm.revoke(feature::LEDGER);
        bench.vm.user_call(call::NOP);
        assert_eq!(count(2), 2, "honoured until it is given up");
        bench.vm.user_acknowledge(2);
        assert_eq!(count(2), 0);
    }
}
