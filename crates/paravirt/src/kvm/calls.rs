//! The hypercalls. What is not offered answers as a call that nobody knows.

use contract::kvm::{ClockPairing, feature, hypercall};
use engine::{HypercallArgs, Signals};
use memory::Gpa;

use super::Vcpu;
use crate::{Features, Place};

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// The value for RAX.
    Value(i64),
    /// Zero, once somebody else has had the processor.
    Yield,
}

/// Bits of an interrupt command (Intel SDM vol. 3A, 11.6.1) that have no meaning where the call names the destinations:
/// logical mode, and the shorthands.
const DESTINATION: u64 = 1 << 11 | 3 << 18;

/// What a call belongs to.
fn feature_of(number: u64) -> Option<u32> {
    Some(match number {
        hypercall::KICK_CPU => feature::PV_UNHALT,
        hypercall::CLOCK_PAIRING => feature::CLOCKSOURCE2,
        hypercall::SEND_IPI => feature::PV_SEND_IPI,
        hypercall::SCHED_YIELD => feature::PV_SCHED_YIELD,
        _ => return None,
    })
}

impl Vcpu {
    /// VMCALL or VMMCALL.
    pub(crate) fn hypercall(&self, call: HypercallArgs) -> Reply {
        let start = host::read_tsc();
        let reply = self.answer(call);
        if let Some(feature) = feature_of(call.number) {
            let honoured = !matches!(reply, Reply::Value(value) if value < 0);
            self.usage().count(feature, honoured, host::read_tsc().wrapping_sub(start));
        }
        reply
    }

    fn answer(&self, call: HypercallArgs) -> Reply {
        let offered = |feature| self.vm.features.has(feature);
        let [first, second, ..] = call.args;
        Reply::Value(match call.number {
            _ if call.cpl != 0 => hypercall::EPERM,
            hypercall::VAPIC_POLL_IRQ if self.vm.features != Features::NONE => 0,
            hypercall::KICK_CPU if offered(feature::PV_UNHALT) => {
                let Some(target) = self.named(second) else { return Reply::Value(0) };
                target.signal.raise(Signals::UNHALT);
                return self.yield_to(second);
            }
            // It completes the clock, and has no feature bit of its own.
            hypercall::CLOCK_PAIRING if offered(feature::CLOCKSOURCE2) => self.pair_clocks(first, second),
            hypercall::SEND_IPI if offered(feature::PV_SEND_IPI) => self.send_ipi(call),
            hypercall::SCHED_YIELD if offered(feature::PV_SCHED_YIELD) => return self.yield_to(first),
            _ => hypercall::ENOSYS,
        })
    }

    /// The vCPU with this APIC id.
    fn named(&self, id: u64) -> Option<&Place> {
        self.vm.places.get(usize::try_from(id).ok()?)
    }

    /// The processor is given up where the other vCPU could use it. A thread cannot be told whom it makes room for.
    fn yield_to(&self, id: u64) -> Reply {
        let ready = |place: &Place| place.is_runnable() || place.is_roused();
        let other = id != u64::from(self.index);
        if other && self.named(id).is_some_and(ready) { Reply::Yield } else { Reply::Value(0) }
    }

    fn pair_clocks(&self, address: u64, kind: u64) -> i64 {
        if kind != hypercall::PAIR_WALL_CLOCK {
            return hypercall::EOPNOTSUPP;
        }
        let (ns, tsc) = self.vm.clock.pair(self.index);
        let (sec, nsec) = ((ns / 1_000_000_000) as i64, (ns % 1_000_000_000) as i64);
        let pairing = ClockPairing { sec, nsec, tsc, ..ClockPairing::default() };
        let written = self.vm.ram.write_value(Gpa(address), &pairing);
        written.map_or(hypercall::EFAULT, |()| 0)
    }

    fn send_ipi(&self, call: HypercallArgs) -> i64 {
        let [low, high, first, command] = call.args;
        if command & DESTINATION != 0 {
            return hypercall::EINVAL;
        }
        let width = if call.wide { 64 } else { 32 };
        let first = u64::from(first as u32); // an APIC id
        let set =
            |bitmap: u64, from: u64| (0..width).filter(move |bit| bitmap >> bit & 1 != 0).map(move |bit| from + bit);
        let ids = set(low, first).chain(set(high, first + width)).filter(|id| *id < self.vm.places.len() as u64);
        ids.map(|id| i64::from(self.vm.interrupts.send(id as u32, command as u32))).sum()
    }
}
