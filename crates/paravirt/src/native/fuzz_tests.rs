//! Both dialects' calls and MSRs with hostile arguments: some in every test run, and for as long as one likes by
//! `cargo xtask fuzz contract`.

use std::time::{Duration, Instant};

use contract::{kvm, native};
use engine::{Answer, HypercallArgs};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestCaseError, TestRng, TestRunner};

use super::fixture::Bench;
use super::hostile_tests::{argument, contents};
use super::{Asleep, BUILT};
use crate::Features;

const VCPUS: usize = 3;
/// Cases from one seed; the next ones are from the next seed.
const BATCH: u32 = 64;

/// What the environment asks for: `CORDIAL_CONTRACT_{MINUTES,SEED}`.
fn wish(name: &str) -> Option<u64> {
    let text = std::env::var(format!("CORDIAL_CONTRACT_{name}")).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("CORDIAL_CONTRACT_{name}={text} is not a number")))
}

#[derive(Clone, Debug)]
enum Deed {
    Call {
        number: u64,
        args: [u64; 4],
        cpl: u8,
    },
    Read(u32),
    Write(u32, u64),
    /// What the host does of its own accord.
    Advance(u64),
    Revoke(u64),
    Rescale(u64),
    Halt(bool),
    Reset,
}

fn index() -> impl Strategy<Value = u32> {
    let bases = prop::sample::select(vec![native::msr::BASE, kvm::msr::WALL_CLOCK, kvm::msr::WALL_CLOCK_OLD]);
    prop_oneof![9 => (bases, 0_u32..10).prop_map(|(base, by)| base + by), 1 => any::<u32>()]
}

/// Registers take pages and vectors: aligned addresses with the lowest bit set more often than chance has them.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![argument(), argument().prop_map(|value| value & !0xfff | 1), argument().prop_map(|value| value & !3)]
}

fn deed() -> impl Strategy<Value = Deed> {
    let native = (0..native::call::COUNT + 2).prop_map(|number| native::call::BASE + number);
    let number = prop_oneof![8 => native, 2 => 0_u64..16, 1 => any::<u64>()];
    let cpl = prop_oneof![9 => Just(0_u8), 1 => 1_u8..4];
    let args = [argument(), argument(), argument(), argument()];
    prop_oneof![
        8 => (number, args, cpl).prop_map(|(number, args, cpl)| Deed::Call { number, args, cpl }),
        2 => index().prop_map(Deed::Read),
        4 => (index(), value()).prop_map(|(index, value)| Deed::Write(index, value)),
        1 => (0_u64..10_000_000_000).prop_map(Deed::Advance),
        1 => any::<u64>().prop_map(|bits| Deed::Revoke(bits & bits >> 7 & bits << 5)),
        1 => any::<u64>().prop_map(Deed::Rescale),
        1 => any::<bool>().prop_map(Deed::Halt),
        1 => Just(Deed::Reset),
    ]
}

/// Does it all, and looks at what must hold whatever was done.
fn run(accepted: u64, offers_kvm: bool, deeds: Vec<(usize, Deed)>) -> Result<(), TestCaseError> {
    let bench = Bench::new(VCPUS, accepted & BUILT);
    let features = if offers_kvm { Features::ALL } else { Features::NONE };
    let mut vcpus: Vec<crate::Vcpu> = (0..VCPUS as u32).map(|index| bench.whole(index, features)).collect();
    for (index, deed) in deeds {
        let vcpu = &mut vcpus[index];
        match deed {
            Deed::Call { number, args, cpl } => {
                let before = (cpl != 0).then(|| contents(&bench));
                let answer = vcpu.hypercall(HypercallArgs { number, args, cpl, wide: true });
                if let Some(before) = before {
                    prop_assert!(matches!(answer, Answer::Now(value) if (value as i64) < 0), "{answer:?} to a user");
                    prop_assert!(contents(&bench) == before, "a user's call wrote something");
                }
                if answer == Answer::Later {
                    let native = vcpu.native().expect("the kvm dialect's calls never sleep");
                    if native.finish_flush().is_none() && matches!(native.asleep(), Asleep::For(_)) {
                        native.interrupt_wait();
                    }
                }
            }
            Deed::Read(index) => drop(vcpu.msr_read(index)),
            Deed::Write(index, value) => {
                let before = (vcpu.msr_read(index), contents(&bench));
                if vcpu.msr_write(index, value).is_err() {
                    prop_assert!((vcpu.msr_read(index), contents(&bench)) == before, "refused, and changed something");
                }
            }
            Deed::Advance(ns) => bench.timers.advance(ns),
            Deed::Revoke(bits) => drop(bench.vm.revoke(bits)),
            Deed::Rescale(khz) => bench.vm.rescale(khz),
            Deed::Halt(halted) => vcpu.set_halted(halted),
            Deed::Reset => vcpu.reset(),
        }
        let terms = bench.vm.terms();
        prop_assert_eq!(terms.accepted & !(terms.offered | terms.revoking), 0);
        prop_assert!(!terms.overdue || terms.revoking != 0);
    }
    Ok(())
}

#[test]
fn no_guest_of_either_dialect_does_harm() {
    let deadline = wish("MINUTES").map(|minutes| Instant::now() + Duration::from_secs(minutes * 60));
    let first = wish("SEED").unwrap_or(1);
    let config = ProptestConfig { cases: BATCH, failure_persistence: None, ..ProptestConfig::default() };
    let strategy = (any::<u64>(), any::<bool>(), prop::collection::vec((0..VCPUS, deed()), 1..60));
    let mut seed = first;
    loop {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        let mut runner = TestRunner::new_with_rng(config.clone(), rng);
        if let Err(error) = runner.run(&strategy, |(accepted, kvm, deeds)| run(accepted, kvm, deeds)) {
            panic!("with CORDIAL_CONTRACT_SEED={seed}: {error}");
        }
        seed += 1;
        if deadline.is_none_or(|deadline| Instant::now() >= deadline) {
            break;
        }
    }
    eprintln!("{} cases from seed {first}", (seed - first) * u64::from(BATCH));
}
