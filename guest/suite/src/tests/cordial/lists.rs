//! Calls with lists and masks.

use super::*;
use kit::Batch;

/// Several calls are one exit; a bad one among them fails alone.
pub(super) fn batch(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::MULTICALL | feature::TIMER | feature::IPI) else { return };
    apic::enable();
    let mut batch = Batch::<16>::new();
    let far = u64::MAX / 2;
    for number in 0..8 {
        t.is("room", batch.set_timer(contract, number, far, 0, VECTOR));
    }
    t.is("room", batch.set_timer(contract, 99, far, 0, VECTOR) && batch.send_ipi(contract, VECTOR, 0, 1));
    let mut done = Ok(0);
    t.eq("exits", exits(contract, &processor, || done = batch.run(contract)), 1);
    t.same("succeeded", done, Ok(9));
    t.same("the bad one", batch.result(8), Some(Err(Status::BadArgument)));
    t.same("the interrupt", batch.result(9), Some(Ok(1)));
    t.is("came", patiently(|| apic::bit(apic::reg::IRR, VECTOR.into())));
    apic::drain();
    for number in 0..8 {
        t.same("was armed", processor.cancel_timer(number), Ok(true));
    }
    shows(Case::Use, feature::MULTICALL);
}

/// Lists and masks that are not right: refused, nothing changes.
pub(super) fn bad_lists(t: &mut T) {
    let Some((contract, _)) = using(t, feature::MULTICALL | feature::IPI) else { return };
    let list = [0u64; 12];
    let at = physical(&raw const list);
    for count in [u64::from(contract.found().batch) + 1, u64::MAX, 1 << 60] {
        t.same("too many calls", raw(call::MULTICALL, [at, count, 0, 0]), status::TOO_LONG);
    }
    t.same("unaligned", raw(call::MULTICALL, [at + 4, 1, 0, 0]), status::BAD_ARGUMENT);
    for bad in NO_RAM.into_iter().chain([u64::MAX - 7]) {
        t.same("no RAM", raw(call::MULTICALL, [bad, 1, 0, 0]), status::BAD_ADDRESS);
    }
    for (first, mask) in no_vcpus(contract) {
        t.same("no vCPU", raw(call::SEND_IPI, [VECTOR.into(), first, mask, 0]), status::NO_VCPU);
    }
    for vector in [0, 15, 256] {
        t.same("vector", raw(call::SEND_IPI, [vector, 0, 1, 0]), status::BAD_ARGUMENT);
    }
    t.same("the list", list, [0; 12]);
    shows(Case::BadArgument, feature::MULTICALL | feature::IPI);
}

/// The same of flushes.
pub(super) fn bad_ranges(t: &mut T) {
    let Some((contract, _)) = using(t, feature::FLUSH_TLB) else { return };
    let list = [0u64; 2];
    let at = physical(&raw const list);
    let too_many = u64::from(contract.found().ranges) + 1;
    t.same("too many ranges", raw(call::FLUSH_TLB, [1, 0, at, too_many]), status::TOO_LONG);
    t.same("unaligned", raw(call::FLUSH_TLB, [1, 0, at + 1, 1]), status::BAD_ARGUMENT);
    for bad in NO_RAM.into_iter().chain([u64::MAX - 7]) {
        t.same("no RAM", raw(call::FLUSH_TLB, [1, 0, bad, 1]), status::BAD_ADDRESS);
    }
    t.same("an empty range", raw(call::FLUSH_TLB, [1, 0, at, 1]), status::BAD_ARGUMENT);
    for (first, mask) in no_vcpus(contract) {
        t.same("no vCPU", raw(call::FLUSH_TLB, [mask, first, 0, 0]), status::NO_VCPU);
    }
    shows(Case::BadArgument, feature::FLUSH_TLB);
}

/// First vCPUs and masks that name one that does not exist.
fn no_vcpus(contract: &Contract) -> [(u64, u64); 3] {
    [(u64::from(contract.found().vcpus), 1), (0, 1 << 63), (u64::MAX, 2)]
}
