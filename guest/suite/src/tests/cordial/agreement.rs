//! What is found, accepted, refused, and taken back.

use super::unused::unused;
use super::*;
use crate::run::USER_ALIAS;
use kit::sync::Mutex;

/// The signature is found, whatever the hypervisor bit says, and the leaves are plausible.
pub(super) fn found(t: &mut T) {
    let Some(contract) = contract(t) else { return };
    let found = contract.found();
    t.eq("major version", found.version >> 16, 1);
    t.eq("features nobody knows", found.offered & !feature::NAMES.iter().fold(0, |all, (bit, _)| all | bit), 0);
    t.is("limits", found.timers >= 1 && found.batch >= 1 && found.ranges >= 1 && found.vcpus >= 1);
    t.is("time", found.quantum_ns >= 1 && found.calls_per_s >= 1 && found.burst >= 1);
    let terms = contract.terms();
    t.eq("offered in the VM page", terms.offered, found.offered);
    t.eq("epoch", terms.epoch, 1);
    names(found.offered).for_each(|(_, name)| println!("# offered cordial {name}"));
}

/// Nothing works before it is accepted.
pub(super) fn refused_before_accepted(t: &mut T) {
    let Some(contract) = contract(t) else { return };
    if contract.terms().accepted != 0 {
        t.skip("accepted by an earlier test");
        return;
    }
    unused(t, contract, contract.found().offered, Case::Refusal);
    t.same("of a later version", raw(call::ENTROPY, [physical(WORD.as_ptr()), 4, 0, 0]), status::NOT_ACCEPTED);
    t.same("not offered", contract.accept(1 << 63 | feature::LEDGER), Err(Status::NotOffered));
    t.eq("nothing is accepted", contract.terms().accepted, 0);
}

/// All that is offered is accepted, and the page says so; what is not offered works no more than before.
pub(super) fn accepted(t: &mut T) {
    let Some(contract) = contract(t) else { return };
    let offered = contract.found().offered;
    t.same("accept", contract.accept(offered), Ok(1));
    t.eq("in the VM page", contract.terms().accepted, offered);
    for (bit, name) in feature::NAMES {
        if offered & bit == 0 {
            t.same(name, contract.accept(bit), Err(Status::NotOffered));
        }
    }
    unused(t, contract, !offered, Case::Refusal);
}

/// Numbers without a meaning, and calls from level 3.
pub(super) fn unknown_calls(t: &mut T) {
    let Some(contract) = contract(t) else { return };
    for number in [call::COUNT, 0x100, 0xFFFF] {
        t.same("unknown", raw(number, [0; 4]), status::UNKNOWN_CALL);
    }
    // By the page with the right to use ports, which is no right to call.
    let page = contract.calling_page() as u64 + USER_ALIAS;
    let exit = code!("call r9").user().with(|r| (r.rax, r.r9, r.rflags) = (call::BASE, page, r.rflags | flag::IOPL3)).run();
    t.eq("from level 3", exit.regs.rax, status::PERMISSION as u64);
    if !contract.found().page_only {
        let exit = code!("vmcall").user().with(|r| r.rax = call::BASE).run();
        t.eq("from level 3, by the instruction", exit.regs.rax, status::PERMISSION as u64);
    }
}

/// Revocations that nobody answers are overdue after a while, each by itself, for all to see; the feature works until it is
/// given up.
pub(super) fn overdue(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::TIME_OF_DAY | feature::CLOCK) else { return };
    until(&processor, processor.now() + 200 * MILLISECOND); // the rate of calls is ours again
    let epoch = contract.terms().epoch;
    for round in 1..=2 {
        outl(port::REVOKE, feature::TIME_OF_DAY as u32);
        let terms = contract.terms();
        t.eq("epoch", terms.epoch, epoch + round);
        t.eq("revoking", terms.revoking, feature::TIME_OF_DAY);
        t.is("not overdue yet", !terms.overdue);
        let end = processor.now() + 5_000 * MILLISECOND;
        while !contract.terms().overdue && processor.now() < end {
            core::hint::spin_loop();
        }
        t.is("overdue", contract.terms().overdue);
    }
    t.is("still honoured", contract.time_of_day().is_ok());
    t.same("a stale epoch", raw(call::REVOKE_ACK, [epoch + 1, 0, 0, 0]), status::STALE_EPOCH);
    t.same("given up", contract.handle_revocation(|_| ()), Ok(feature::TIME_OF_DAY));
    unused(t, contract, feature::TIME_OF_DAY, Case::Revocation);
    let terms = contract.terms();
    t.is("settled", !terms.overdue && terms.revoking == 0 && terms.accepted & feature::TIME_OF_DAY == 0);
}

/// The same feature twice, and an acknowledgement twice: the newest epoch counts, once. What is gone is revoked without an
/// answer.
pub(super) fn revoked_twice(t: &mut T) {
    let Some((contract, _)) = using(t, feature::YIELD) else { return };
    let epoch = contract.terms().epoch;
    for _ in 0..2 {
        outl(port::REVOKE, feature::YIELD as u32);
    }
    let terms = contract.terms();
    t.same("two epochs", (terms.epoch, terms.revoking), (epoch + 2, feature::YIELD));
    t.same("accepted again", contract.accept(feature::YIELD), Err(Status::NotOffered));
    t.same("the older epoch", raw(call::REVOKE_ACK, [epoch + 1, 0, 0, 0]), status::STALE_EPOCH);
    t.same("still honoured", contract.yield_to(None), Ok(true));
    t.same("given up", contract.handle_revocation(|_| ()), Ok(feature::YIELD));
    let accepted = contract.terms().accepted;
    t.same("given up again", raw(call::REVOKE_ACK, [epoch + 2, 0, 0, 0]), accepted as i64);
    unused(t, contract, feature::YIELD, Case::Revocation);
    outl(port::REVOKE, feature::YIELD as u32);
    let terms = contract.terms();
    t.same("no answer is due", (terms.epoch, terms.revoking, terms.accepted), (epoch + 3, 0, accepted));
    t.same("nothing to give up", contract.handle_revocation(|_| ()), Ok(0));
}

/// Each feature in turn is taken back: the event comes, the guest gives it up, and it is refused from then on.
pub(super) fn revoked(t: &mut T) {
    let Some((contract, _)) = using(t, 0) else { return };
    apic::enable();
    t.same("event", contract.set_event(VECTOR), Ok(()));
    let accepted = contract.terms().accepted;
    // The ledger comes last: other tests' helper wants it.
    for (bit, name) in names(accepted & !feature::LEDGER).chain(names(feature::LEDGER)) {
        outl(port::REVOKE, bit as u32);
        t.same("the event", apic::take(), Some(VECTOR.into()));
        apic::write(apic::reg::EOI, 0);
        t.is(name, contract.uses(bit));
        let mut told = 0;
        t.same(name, contract.handle_revocation(|features| told = features), Ok(bit));
        t.eq(name, told, bit);
        t.is(name, !contract.uses(bit));
        t.eq(name, contract.terms().accepted & bit, 0);
        t.same(name, contract.accept(bit), Err(Status::NotOffered));
        unused(t, contract, bit, Case::Revocation);
    }
    t.eq("accepted", contract.terms().accepted, 0);
    // Locks go on without a host that helps.
    let mutex = Mutex::new(0);
    *mutex.lock(contract) += 1;
    t.eq("the mutex", *mutex.lock(contract), 1);
    t.same("no more events", contract.set_event(0), Ok(()));
}
