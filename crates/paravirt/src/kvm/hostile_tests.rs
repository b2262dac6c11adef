//! Guests that say anything: nothing panics, nothing is written but what an MSR or a call names.

use contract::kvm::{hypercall, msr};
use engine::HypercallArgs;
use memory::Gpa;
use proptest::prelude::*;

use super::fixture::{Bench, RAM};
use crate::Features;

const MSRS: [u32; 9] = [
    msr::WALL_CLOCK_OLD,
    msr::SYSTEM_TIME_OLD,
    msr::WALL_CLOCK,
    msr::SYSTEM_TIME,
    msr::STEAL_TIME,
    msr::PV_EOI,
    msr::POLL_CONTROL,
    msr::WALL_CLOCK + 2,
    msr::WALL_CLOCK + 8,
];

/// Numbers near what matters, and any.
fn argument() -> impl Strategy<Value = u64> {
    let places = [0, 0x40, 0x1000, RAM, 1 << 32, 1 << 45, 1 << 63, u64::MAX];
    let near =
        (prop::sample::select(places.to_vec()), -66_i64..66).prop_map(|(place, by)| place.wrapping_add_signed(by));
    prop_oneof![near, 0_u64..RAM, any::<u64>()]
}

#[derive(Clone, Debug)]
enum Deed {
    Call(HypercallArgs),
    Read(u32),
    Write(u32, u64),
    /// The host's side: an interrupt whose end may stand in memory, sleep, time.
    Interrupt,
    Sleep,
    Init,
    Advance(u64),
}

fn call() -> impl Strategy<Value = HypercallArgs> {
    let args = [argument(), argument(), argument(), argument()];
    let number = prop_oneof![8 => 0..hypercall::SCHED_YIELD + 2, 1 => any::<u64>()];
    let made = |(number, args, wide, user)| HypercallArgs { number, args, cpl: if user { 3 } else { 0 }, wide };
    (number, args, any::<bool>(), prop::bool::weighted(0.1)).prop_map(made)
}

fn deed() -> impl Strategy<Value = Deed> {
    let index = || prop::sample::select(MSRS.to_vec());
    prop_oneof![
        6 => call().prop_map(Deed::Call),
        1 => index().prop_map(Deed::Read),
        4 => (index(), argument()).prop_map(|(index, value)| Deed::Write(index, value)),
        2 => Just(Deed::Interrupt),
        2 => Just(Deed::Sleep),
        1 => Just(Deed::Init),
        1 => (0_u64..10_000_000).prop_map(Deed::Advance),
    ]
}

fn contents(bench: &Bench) -> Vec<u8> {
    let mut bytes = vec![0; RAM as usize];
    bench.ram.read(Gpa(0), &mut bytes).unwrap();
    bytes
}

/// How many bytes an MSR's address is about.
fn reach(index: u32) -> u64 {
    match index {
        msr::SYSTEM_TIME | msr::SYSTEM_TIME_OLD => 32,
        msr::WALL_CLOCK | msr::WALL_CLOCK_OLD => 12,
        msr::STEAL_TIME => 64,
        _ => 0, // the byte of an interrupt's end is written when there is one
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn no_deed_of_a_guest_of_the_kvm_dialect_panics(deeds in prop::collection::vec((0_usize..3, deed()), 1..60)) {
        let mut bench = Bench::new(3, Features::ALL);
        for (vcpu, deed) in deeds {
            let vcpu = &mut bench.vcpus[vcpu];
            match deed {
                Deed::Call(call) => drop(vcpu.hypercall(call)),
                Deed::Read(index) => drop(vcpu.msr_read(index)),
                Deed::Write(index, value) => drop(vcpu.msr_write(index, value)),
                Deed::Interrupt => {
                    vcpu.before_interrupt();
                    vcpu.offer_end();
                }
                Deed::Sleep => {
                    vcpu.set_halted(true);
                    vcpu.set_halted(false);
                }
                Deed::Init => vcpu.reset(),
                Deed::Advance(ns) => bench.clock.advance(ns),
            }
        }
    }

    #[test]
    fn an_msr_of_the_kvm_dialect_writes_its_structure_and_nothing_else(index in prop::sample::select(MSRS.to_vec()), value in argument(), fill: u8) {
        let mut bench = Bench::new(1, Features::ALL);
        bench.ram.fill(Gpa(0), fill, RAM).unwrap();
        let before = contents(&bench);
        let done = bench.vcpus[0].msr_write(index, value).is_ok();
        let start = value & !1;
        for (offset, (old, new)) in (0..).zip(before.iter().zip(&contents(&bench))) {
            prop_assert!(old == new || done && offset >= start && offset - start < reach(index), "{offset:#x}");
        }
    }

    #[test]
    fn a_call_of_the_kvm_dialect_writes_nothing_it_was_not_told_to(call in call(), fill: u8) {
        let mut bench = Bench::new(3, Features::ALL);
        bench.ram.fill(Gpa(0), fill, RAM).unwrap();
        let before = contents(&bench);
        let result = bench.call_as(0, call);
        let pairs = call.number == hypercall::CLOCK_PAIRING && result == 0;
        for (offset, (old, new)) in (0_u64..).zip(before.iter().zip(&contents(&bench))) {
            prop_assert!(old == new || pairs && offset.wrapping_sub(call.args[0]) < 64, "{offset:#x} after {result}");
        }
    }

    #[test]
    fn what_a_vcpu_keeps_writing_stays_in_its_structures(place in 0_u64..RAM / 64 - 2, deeds in prop::collection::vec(0..3, 1..20)) {
        let mut bench = Bench::new(1, Features::ALL);
        let start = place * 64;
        bench.vcpus[0].msr_write(msr::STEAL_TIME, start | 1).unwrap();
        bench.vcpus[0].msr_write(msr::PV_EOI, (start + 64) | 1).unwrap();
        let before = contents(&bench);
        for deed in deeds {
            bench.clock.advance(1_000_000);
            bench.delay.wait(1);
            match deed {
                0 => bench.vcpus[0].give_way(),
                1 => bench.vcpus[0].offer_end(),
                _ => bench.vcpus[0].before_interrupt(),
            }
        }
        for (offset, (old, new)) in (0_u64..).zip(before.iter().zip(&contents(&bench))) {
            prop_assert!(old == new || offset.wrapping_sub(start) <= 64, "{offset:#x}");
        }
    }
}
