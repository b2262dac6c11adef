//! A guest that does wrong over and over.

use super::*;

/// How often each call is made.
const CALLS: u64 = if cfg!(integer_only) { 20 } else { 2_000 };
/// All that a call may say.
const STATUSES: [i64; 10] = [
    status::PERMISSION,
    status::NO_VCPU,
    status::TOO_LONG,
    status::TOO_OFTEN,
    status::BAD_ADDRESS,
    status::BAD_ARGUMENT,
    status::UNKNOWN_CALL,
    status::NOT_ACCEPTED,
    status::NOT_OFFERED,
    status::STALE_EPOCH,
];

/// Every call and page register, over and over, with nonsense: each answer is one that the contract has, and nothing has
/// changed when it is over.
pub(super) fn storm(t: &mut T) {
    let Some((contract, processor)) = using(t, 0) else { return };
    apic::enable();
    let terms = contract.terms();
    let words = [0x1234_5678u32; 4];
    let at = physical(&raw const words);
    let (mut unknown, mut made) = (0u64, 0u64);
    for number in 0..call::COUNT + 2 {
        for round in 0..CALLS {
            let args = match round % 4 {
                0 => [u64::MAX; 4],
                1 => [at + 1, round, round << 40, 7],
                2 => [NO_RAM[round as usize / 4 % 4], u64::MAX, 1, 0],
                _ => [at, 0, 0, 1 << 63],
            };
            let answer = raw(number, args);
            unknown += u64::from(answer < 0 && !STATUSES.contains(&answer));
            made += 1;
        }
    }
    t.eq("answers nobody knows", unknown, 0);
    t.eq("calls", made, (call::COUNT + 2) * CALLS);
    let mut refused = 0u64;
    for round in 0..CALLS {
        for register in 0..=msr::COUNT {
            let exit = write_msr(register, round << 12 | 0x100_0002);
            refused += u64::from(Event(exit.vector, exit.error) == gp(0));
        }
    }
    t.eq("registers refused", refused, CALLS * u64::from(msr::COUNT + 1));
    t.same("the words", words, [0x1234_5678; 4]);
    t.same("the terms", contract.terms(), terms);
    t.eq("exits of nothing", exits(contract, &processor, || contract.sync()), 1);
    apic::drain();
}
