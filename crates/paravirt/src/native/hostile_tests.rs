//! Guests that say anything: nothing panics, nothing is written but what a call names.

use contract::native::{call, msr};
use engine::HypercallArgs;
use memory::Gpa;
use proptest::prelude::*;

use super::BUILT;
use super::fixture::{Bench, HIGH_RAM, LOW_RAM};

/// Where the VM's own pages are.
const PAGES: [u64; 3] = [0x8000, 0x9000, 0xa000];

/// Numbers near what matters, and any.
pub(super) fn argument() -> impl Strategy<Value = u64> {
    let places = [0, 0xfff, 0x1000, 0x5000, LOW_RAM, HIGH_RAM, HIGH_RAM + 0x1_0000, 1 << 32, 1 << 63, u64::MAX];
    let near =
        (prop::sample::select(places.to_vec()), -64_i64..64).prop_map(|(place, by)| place.wrapping_add_signed(by));
    prop_oneof![near, 0_u64..300, any::<u64>()]
}

#[derive(Clone, Debug)]
enum Deed {
    Call(u64, [u64; 4]),
    Read(u32),
    Write(u32, u64),
    Advance(u64),
    Revoke(u64),
}

fn deed() -> impl Strategy<Value = Deed> {
    let args = [argument(), argument(), argument(), argument()];
    let number = prop_oneof![8 => 0..call::COUNT + 2, 1 => any::<u64>()];
    prop_oneof![
        8 => (number, args).prop_map(|(number, args)| Deed::Call(number, args)),
        1 => (0..msr::COUNT + 1).prop_map(Deed::Read),
        2 => (0..msr::COUNT + 1, argument()).prop_map(|(index, value)| Deed::Write(index, value)),
        1 => (0_u64..10_000_000_000).prop_map(Deed::Advance),
        1 => any::<u64>().prop_map(|bits| Deed::Revoke(bits & bits >> 7 & bits << 5)),
    ]
}

pub(super) fn contents(bench: &Bench) -> Vec<u8> {
    let mut bytes = vec![0; LOW_RAM as usize + 0x1_0000];
    let (low, high) = bytes.split_at_mut(LOW_RAM as usize);
    bench.ram.read(Gpa(0), low).unwrap();
    bench.ram.read(Gpa(HIGH_RAM), high).unwrap();
    bytes
}

/// Whether a call may write at `offset` in RAM as [`contents`] has it.
fn may_write(number: u64, args: [u64; 4], offset: usize) -> bool {
    let offset = offset as u64;
    let gpa = if offset < LOW_RAM { offset } else { HIGH_RAM + (offset - LOW_RAM) };
    let named = number == call::MULTICALL && gpa.wrapping_sub(args[0]) < args[1].saturating_mul(48);
    named || PAGES.contains(&(gpa & !0xfff))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn no_deed_of_a_guest_panics(deeds in prop::collection::vec((0_usize..3, deed()), 1..60), accepted: u64) {
        let mut bench = Bench::new(3, accepted & BUILT);
        for (vcpu, deed) in deeds {
            match deed {
                Deed::Call(number, args) => if bench.call(vcpu, number, args).is_none() {
                    bench.vcpus[vcpu].asleep();
                    bench.vcpus[vcpu].interrupt_wait();
                },
                Deed::Read(index) => drop(bench.vcpus[vcpu].msr_read(msr::BASE + index)),
                Deed::Write(index, value) => drop(bench.vcpus[vcpu].msr_write(msr::BASE + index, value)),
                Deed::Advance(ns) => bench.timers.advance(ns),
                Deed::Revoke(bits) => drop(bench.vm.revoke(bits)),
            }
        }
    }

    #[test]
    fn a_call_writes_nothing_it_was_not_told_to(number in 0..call::COUNT + 2, args in [argument(), argument(), argument(), argument()], fill: u8) {
        let mut bench = Bench::new(3, BUILT);
        bench.ram.fill(Gpa(0), fill, LOW_RAM).unwrap();
        bench.ram.fill(Gpa(HIGH_RAM), fill, 0x1_0000).unwrap();
        for (register, page) in (0..).zip(PAGES) {
            prop_assert!(bench.write_msr(0, register, page | 1));
        }
        let before = contents(&bench);
        let call = HypercallArgs { number: call::BASE + number, args, cpl: 0, wide: true };
        let result = bench.vcpus[0].hypercall(call);
        let after = contents(&bench);
        let failed = matches!(result, engine::Answer::Now(value) if (value as i64) < 0);
        for (offset, (old, new)) in before.iter().zip(&after).enumerate() {
            prop_assert!(old == new || !failed && may_write(number, args, offset), "{offset:#x} after {result:?}");
        }
    }

    #[test]
    fn an_msr_writes_its_page_and_nothing_else(register in 0..msr::COUNT + 1, value in argument(), enable: bool) {
        let mut bench = Bench::new(1, BUILT);
        let value = if enable { value & !0xfff | 1 } else { value };
        let before = contents(&bench);
        let done = bench.write_msr(0, register, value);
        for (offset, (old, new)) in before.iter().zip(&contents(&bench)).enumerate() {
            let offset = offset as u64;
            let gpa = if offset < LOW_RAM { offset } else { HIGH_RAM + (offset - LOW_RAM) };
            prop_assert!(old == new || done && gpa & !0xfff == value & !0xfff, "{gpa:#x}");
        }
    }
}
